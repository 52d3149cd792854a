"""The picture of the dashboard: axes that fit, values as Grafana writes them, gaps, and no text that breaks the SVG."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from deploy.monitoring.drawing import Series, ceiling, draw, written


def panel(kind: str, unit: str = "short") -> dict[str, Any]:
    position = {"x": 0, "y": 0, "w": 12, "h": 7}
    return {"title": "A <title>", "type": kind, "gridPos": position, "fieldConfig": {"defaults": {"unit": unit}}}


@pytest.mark.parametrize(("highest", "top"), [(0, 1), (0.03, 0.04), (1, 1), (3, 4), (4.1, 5), (7, 10), (10, 10)])
def test_axis_ends_at_a_round_number(highest: float, top: float) -> None:
    assert ceiling(highest) == pytest.approx(top)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "s", "0 s"), (0.0123, "s", "12.3 ms"), (90, "s", "1.5 min"), (172_800, "s", "2 d"), (2.5, "ops", "2.5 ops/s")],
)
def test_values_are_written_with_their_unit(value: float, unit: str, text: str) -> None:
    assert written(value, unit) == text


def test_line_has_a_gap_where_there_is_no_value() -> None:
    points = ((0.0, 1.0), (2.0, 2.0), (4.0, math.nan), (6.0, 1.0))
    svg = ElementTree.fromstring(draw([(panel("timeseries"), [Series("a & b", points)])], 60))  # noqa: S314  (our own)
    (line,) = [each.get("d") or "" for each in svg.iter() if each.get("fill") == "none"]
    assert (line.count("M"), line.count("L")) == (2, 1)
    assert {"A <title>", "a & b"} <= {each.text for each in svg.iter()}


def test_figure_shows_the_newest_value_or_that_there_is_none() -> None:
    assert ">3<" in draw([(panel("stat"), [Series("numbers", ((0, 1), (2, 3)))])], 60)
    assert ">No data<" in draw([(panel("stat"), [])], 60)
