"""Twilio's pages: PageSize, Page and an opaque PageToken. No I/O.

A token names a neighbour ("after this one", "before that one") and not an offset, so that a reader neither skips nor
repeats a number when others are added or removed between two pages.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlencode

from tests.twin.refusals import BAD_REQUEST, Refusal

DEFAULT_SIZE = 50
LARGEST_SIZE = 1000

_TOKEN = re.compile(r"P([AB])([0-9a-f]{1,16})")


class Ordered(Protocol):
    """An item that can be paged: `ordinal` is unique and grows with creation."""

    @property
    def ordinal(self) -> int: ...


T = TypeVar("T", bound=Ordered)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page; `this`, `first`, `previous` and `next` are query strings, None for a page that does not exist."""

    items: Sequence[T]
    number: int
    size: int
    start: int
    this: str
    first: str
    previous: str | None
    next: str | None

    @property
    def end(self) -> int:
        return max(self.start, self.start + len(self.items) - 1)


def cut(items: Sequence[T], query: Mapping[str, str], filters: Sequence[str] = ()) -> Page[T]:
    """Return the page of `items` (sorted by ordinal) that `query` selects; links repeat its `filters`.

    PageSize above 1,000 means 1,000. An invalid size, page or token raises Refusal 400/20001.
    """
    size = min(_positive(query, "PageSize", DEFAULT_SIZE, least=1), LARGEST_SIZE)
    number = _positive(query, "Page", 0, least=0)
    token = query.get("PageToken")
    start = number * size if token is None else _neighbour(items, token, size)
    chosen = items[start : start + size]

    kept = {name: query[name] for name in filters if name in query}
    prefix = f"{urlencode(kept)}&" if kept else ""

    def link(page: int, mark: str | None = None) -> str:
        return f"{prefix}PageSize={size}&Page={page}" + ("" if mark is None else f"&PageToken={mark}")

    return Page(
        items=chosen,
        number=number,
        size=size,
        start=start,
        this=link(number, token),
        first=link(0),
        previous=link(max(number - 1, 0), f"PB{chosen[0].ordinal:x}") if start > 0 and chosen else None,
        next=link(number + 1, f"PA{chosen[-1].ordinal:x}") if start + size < len(items) else None,
    )


def _positive(query: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise Refusal(BAD_REQUEST, what=f"{name} must be a whole number of at least {least}")
    return int(text)


def _neighbour(items: Sequence[Ordered], token: str, size: int) -> int:
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise Refusal(BAD_REQUEST, what="PageToken is not valid")
    ordinal = int(match[2], 16)
    if match[1] == "A":
        return bisect_right(items, ordinal, key=_ordinal)
    return max(bisect_left(items, ordinal, key=_ordinal) - size, 0)


def _ordinal(item: Ordered) -> int:
    return item.ordinal
