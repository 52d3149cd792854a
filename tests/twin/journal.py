"""The journal: the calls that the twin received, and those that the product promises never to make. No I/O.

Only the names of parameters are recorded, but for SmsUrl and SmsMethod, whose values tests check.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

WRITABLE = frozenset({"SmsUrl", "SmsMethod"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One API call. `status` is None if no complete answer was sent (reset, hang, truncate)."""

    at: float
    account: str | None
    method: str
    kind: str
    sid: str | None
    parameters: tuple[str, ...]
    sms_url: str | None
    sms_method: str | None
    status: int | None


@dataclass(frozen=True, slots=True)
class Violation:
    """A call that the product promises never to make; calls that the twin refused count too."""

    at: float
    account: str | None
    method: str
    kind: str
    sid: str | None
    why: str


class Journal:
    """The newest calls, counters over all of them (by "METHOD kind"), and the violations.

    `reset`, which a test may call at any time, keeps the violations; `reset_violations` removes them.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self.entries: deque[Entry] = deque(maxlen=capacity)
        self.counts: Counter[str] = Counter()
        self.violations: list[Violation] = []

    def record(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.counts[f"{entry.method} {entry.kind}"] += 1

    def reset(self) -> None:
        self.entries.clear()
        self.counts.clear()

    def reset_violations(self) -> None:
        self.violations.clear()


def forbidden(method: str, kind: str, form: Mapping[str, str]) -> str | None:
    """Return how the call breaks the promise "two fields only, no release, no transfer"; None if it keeps it."""
    if method in {"GET", "HEAD", "OPTIONS"}:
        return None
    if method != "POST" or kind != "number":
        return "release of a number" if (method, kind) == ("DELETE", "number") else f"{method} on {kind}"
    if "AccountSid" in form:
        return "transfer to another account"
    extra = sorted(form.keys() - WRITABLE)
    return f"write of {', '.join(extra)}" if extra else None
