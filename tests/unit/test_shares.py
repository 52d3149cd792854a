"""Test how tenants share places, and how requests are spaced out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smschannel.core.shares import Pace, leaves_room


@pytest.mark.parametrize(
    ("places", "taken"),
    [
        pytest.param(64, [48, 12, 3, 1], id="each takes three quarters of what the others left"),
        pytest.param(16, [12, 3, 1], id="the small share"),
        pytest.param(4, [3, 1], id="few"),
        pytest.param(2, [2], id="two: what is left free would be a half"),
        pytest.param(1, [1], id="one: whoever comes first"),
    ],
)
def test_those_who_come_later_find_places(places: int, taken: list[int]) -> None:
    free, found = places, []
    while free:
        mine = 0
        while leaves_room(mine, free):
            mine, free = mine + 1, free - 1
        found.append(mine)
    assert found == taken


@given(st.integers(0, 1000), st.integers(-3, 0))
def test_nothing_is_taken_where_nothing_is_free(taken: int, free: int) -> None:
    assert not leaves_room(taken, free)


def test_requests_beyond_the_burst_are_spaced_out() -> None:
    pace = Pace(burst=3, per_second=2)
    assert [pace.delay("a", 10.0) for _ in range(6)] == [0, 0, 0, 0.5, 1, 1.5]
    assert pace.delay("b", 10.0) == 0, "each owner for itself"


def test_burst_comes_back_while_nobody_asks() -> None:
    pace = Pace(burst=3, per_second=2)
    for _ in range(6):
        pace.delay("a", 0.0)
    assert pace.delay("a", 2.0) == 0, "the last of them was due at 1.5"
    assert pace.delay("a", 2.0) == 0.5
    assert [pace.delay("a", 1000.0) for _ in range(4)] == [0, 0, 0, 0.5], "and never more than the burst"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_no_second_begins_more_than_the_burst_and_the_rate(pauses: list[float]) -> None:
    pace, at, begins = Pace(burst=5, per_second=2), 0.0, []
    for pause in pauses:
        at += pause
        begins.append(at + pace.delay("a", at))
    for begin in begins:
        assert sum(begin <= each < begin + 1 for each in begins) <= 5 + 2 + 1
