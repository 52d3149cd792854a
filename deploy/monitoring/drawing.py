"""Draws panels of a dashboard as an SVG: lines over time, and single figures. No I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

_WIDTH, _CELL, _GAP = 1440, 30, 8  # pixels; a dashboard has 24 columns
_COLORS = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade2a")
_STYLE = (
    "text{font-family:Inter,Helvetica,Arial,sans-serif;fill:#ccccdc;font-size:12px}"
    ".title{font-size:14px;font-weight:500}.axis{fill:#8e8e99;font-size:11px}.figure{font-size:44px;font-weight:600}"
)
_SHOWN = 8  # series in a legend


class Series(NamedTuple):
    """A line: its name, and pairs of seconds and values. Values that are no number are gaps."""

    name: str
    points: tuple[tuple[float, float], ...]

    @property
    def last(self) -> float:
        """The newest value."""
        return self.points[-1][1] if self.points else math.nan


class _Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float


def draw(panels: Sequence[tuple[dict[str, Any], Sequence[Series]]], seconds: float) -> str:
    """Return an SVG of panels as Grafana describes them, each with what it shows of so many seconds."""
    height = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each, _ in panels) * _CELL + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#111217"/>',
        *(_panel(panel, shown, seconds) for panel, shown in panels),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _panel(panel: dict[str, Any], shown: Sequence[Series], seconds: float) -> str:
    at, column = panel["gridPos"], (_WIDTH - _GAP) / 24
    box = _Box(_GAP + at["x"] * column, _GAP + at["y"] * _CELL, at["w"] * column - _GAP, at["h"] * _CELL - _GAP)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    inner = _figure(box, shown, unit) if panel["type"] == "stat" else _lines(box, shown, unit, seconds)
    return (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="2" fill="#181b1f"'
        f' stroke="#2c3235"/>{_text(box.x + 10, box.y + 22, panel["title"], "title")}{inner}'
    )


def _figure(box: _Box, shown: Sequence[Series], unit: str) -> str:
    """A single figure, the newest, with its name if there are labels in it."""
    if not shown:
        return _text(box.x + box.width / 2, box.y + box.height / 2, "No data", "axis", "middle")
    value = _text(box.x + box.width / 2, box.y + box.height / 2 + 20, written(shown[0].last, unit), "figure", "middle")
    return value + _text(box.x + box.width / 2, box.y + box.height - 16, shown[0].name, "axis", "middle")


def _lines(box: _Box, shown: Sequence[Series], unit: str, seconds: float) -> str:
    left, top, bottom = box.x + 58, box.y + 36, box.y + box.height - 46
    width, height = box.x + box.width - 12 - left, bottom - top
    highest = ceiling(max((value for each in shown for _, value in each.points if math.isfinite(value)), default=1))
    parts = []
    for tick in range(5):
        y = bottom - height * tick / 4
        parts.append(f'<path d="M{left:.0f} {y:.0f}h{width:.0f}" stroke="#2c3235"/>')
        parts.append(_text(left - 6, y + 4, written(highest * tick / 4, unit), "axis", "end"))
    for minute in range(int(seconds // 30) + 1):
        label = f"{minute // 2}:{minute % 2 * 30:02d}"
        parts.append(_text(left + width * minute * 30 / seconds, bottom + 15, label, "axis", "middle"))
    for number, each in enumerate(shown):
        color, moves, is_gap = _COLORS[number % len(_COLORS)], [], True
        for at, value in each.points:
            if math.isfinite(value):
                moves.append(
                    f"{'M' if is_gap else 'L'}{left + width * at / seconds:.1f} {bottom - height * value / highest:.1f}"
                )
            is_gap = not math.isfinite(value)
        parts.append(f'<path d="{"".join(moves)}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    return "".join(parts) + _legend(box, shown, width)


def _legend(box: _Box, shown: Sequence[Series], width: float) -> str:
    parts, x = [], box.x + 12
    for number, each in enumerate(shown[:_SHOWN]):
        if x + 18 + 6.5 * len(each.name) > box.x + width + 58:
            break
        color, y = _COLORS[number % len(_COLORS)], box.y + box.height - 12
        parts.append(f'<path d="M{x:.0f} {y - 4:.0f}h12" stroke="{color}" stroke-width="3"/>')
        parts.append(_text(x + 17, y, each.name, ""))
        x += 32 + 6.5 * len(each.name)
    return "".join(parts)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def ceiling(highest: float) -> float:
    """Return a round number that is not below the highest value."""
    if highest <= 0:
        return 1
    power = 10.0 ** math.floor(math.log10(highest))
    return next(step * power for step in (1, 2, 4, 5, 10) if step * power >= highest * 0.999)


def written(value: float, unit: str) -> str:
    """Write a value as Grafana does with these units: `s`, `ops`, `reqps`, `short`."""
    if not math.isfinite(value):
        return "-"
    if unit == "s":
        for size, name in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return f"{value * 1000:.3g} ms" if value else "0 s"
    suffix = {"ops": " ops/s", "reqps": " req/s"}.get(unit, "")
    return f"{value:.3g}{suffix}"
