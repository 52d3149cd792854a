"""Faults on demand: rules that say which calls are hit and what happens to them. No I/O."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


class Match(BaseModel):
    """Which calls a rule hits; a field that is left out matches everything.

    `path` is a regular expression searched in the path (no query). `account` is the SID in the path, or the one
    that logs in. Of the calls that match, the `nth` (from 1) is the first to be hit; `count` are hit in all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Annotated[str, Field(pattern="^[A-Z]+$")] | None = None
    path: Annotated[str, AfterValidator(_compiles)] | None = None
    account: str | None = None
    nth: int = Field(default=1, ge=1)
    count: int | None = Field(default=None, ge=1)


class Action(BaseModel):
    """What happens to a call that is hit.

    status: an error with `status` and Twilio's `code` (default 20000 + status), as RFC 9457 if `problem`; reset:
    the connection is reset; hang: no answer, ever; delay: the answer is `seconds` late; truncate: half of the real
    body, then the connection is closed; html: an HTML page with `status`; html200: one with 200. With `after` the
    call takes effect first and only the answer is lost (for truncate always).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["status", "reset", "hang", "delay", "truncate", "html", "html200"]
    status: int = Field(default=503, ge=400, le=599)
    code: int | None = None
    retry_after: int | None = Field(default=None, ge=0)
    problem: bool = False
    seconds: float = Field(default=0.0, ge=0)
    after: bool = False


@dataclass(slots=True, eq=False)
class Rule:
    """A match and an action; how many calls it has matched (`seen`) and hit."""

    id: int
    match: Match
    action: Action
    seen: int = 0
    hit: int = 0

    def matches(self, method: str, path: str, accounts: Collection[str | None]) -> bool:
        """Return whether the call matches, before `nth` and `count`."""
        match = self.match
        return (
            (match.method is None or match.method == method)
            and (match.account is None or match.account in accounts)
            and (match.path is None or re.search(match.path, path) is not None)
        )

    def count_call(self) -> bool:
        """Count one call that matches. Return whether it is hit."""
        self.seen += 1
        match = self.match
        if self.seen < match.nth or (match.count is not None and self.hit >= match.count):
            return False
        self.hit += 1
        return True


class Faults:
    """The current rules, the oldest first; the first that hits a call decides."""

    def __init__(self) -> None:
        self.rules: dict[int, Rule] = {}
        self._ids = count(1)

    def add(self, match: Match, action: Action) -> Rule:
        rule = Rule(next(self._ids), match, action)
        self.rules[rule.id] = rule
        return rule

    def remove(self, rule_id: int) -> None:
        """Remove a rule; KeyError if there is none with this id."""
        del self.rules[rule_id]

    def clear(self) -> None:
        self.rules.clear()

    def strike(self, method: str, path: str, accounts: Collection[str | None]) -> Rule | None:
        """Count a call. Return the rule that hits it, None if none does."""
        return next(
            (rule for rule in self.rules.values() if rule.matches(method, path, accounts) and rule.count_call()), None
        )
