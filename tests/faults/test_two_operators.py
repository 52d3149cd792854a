"""Two operators, one of which leads: whichever is killed, in the middle of whatever, the other one goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.conftest import EVERYTHING
from tests.faults.rig import WATCHFUL, Rig
from tests.faults.test_outages import create

MANY = 30 if EVERYTHING else 6
SETTINGS = {**WATCHFUL, "SMSCHANNEL_LEASE_DURATION_SECONDS": "9"}


@pytest.fixture
def both(rig: Rig) -> Iterator[Rig]:
    """A rig with two operators. Both are stopped afterwards, and one is started with the usual settings."""
    rig.restart_operator(SETTINGS)
    rig.start_second()
    rig.stack.twin_call("DELETE", "/journal")
    yield rig
    if rig.has_second:
        rig.stop_second(kill=False)
    rig.restart_operator()


def test_either_operator_may_crash_in_the_middle_of_its_work(both: Rig) -> None:
    cases = create(both, MANY)
    both.kill_operator()
    assert both.settle(cases, 60) == {}
    both.start_operator(SETTINGS)
    for case in cases:
        both.apply(case, case.numbers[1])
    both.stop_second()
    assert both.settle(cases, 60) == {}
    both.start_second()
    for case in cases:
        both.delete(case)
    both.kill_operator()
    assert both.settle(cases, 60) == {}
    # Four writes are needed, and one more where the answer was lost at one of the three crashes.
    assert [wrong for case in cases if (wrong := both.unexpected_writes(case, at_most=4 + 3))] == []
