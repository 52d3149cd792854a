"""How the commands print what they read: columns, ages, JSON and YAML. No I/O; the clock is an argument.

What comes from the cluster may have been written by anybody, so control characters, which a terminal would interpret,
are never printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

_UNITS = (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1))


def printable(text: str) -> str:
    """Return the text on one line, with "?" for every character that a terminal would interpret."""
    return "".join(each if each.isprintable() else "?" for each in text.replace("\n", " "))


def encoded(document: Any, form: str) -> str:
    """Return a document as `json` or `yaml`."""
    if form == "json":
        return json.dumps(document, indent=2)
    import yaml

    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return text.rstrip()


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield aligned lines, as kubectl prints tables."""
    table = [list(header), *([printable(cell) or "-" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def moment(written: object) -> datetime | None:
    """Parse a time of the API server; None if it is missing or none."""
    try:
        parsed = datetime.fromisoformat(str(written))
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def age(written: object, now: datetime) -> str:
    """Return how long ago a time was, in its largest unit, as `kubectl get` does; "unknown" if it is not a time."""
    if (since := moment(written)) is None:
        return "unknown"
    seconds = max(int((now - since).total_seconds()), 0)
    unit, size = next(each for each in _UNITS if seconds >= each[1] or each[1] == 1)
    return f"{seconds // size}{unit}"
