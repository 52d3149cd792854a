"""kill -9 before and after each call: of a channel's life, and of the operator's own start."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.conftest import EVERYTHING
from tests.faults.life import KILLS, Life
from tests.faults.rig import Rig
from tests.twin.faults import Match


def test_crash_at_any_call_loses_nothing(life: Life) -> None:
    """Killed at the call and started again, everything converges, and Twilio gets no more writes than needed.

    The sample has each call once: one is killed before it takes effect, the next one after.
    """
    trials = list(life.trials(KILLS))
    pairs = [trials[at : at + len(KILLS)] for at in range(0, len(trials), len(KILLS))]
    sample = [pair[at % len(KILLS)] for at, pair in enumerate(pairs)]
    assert life.kill_at(trials if EVERYTHING else sample) == {}


@pytest.mark.skipif(not EVERYTHING, reason="make faults: it takes a start for each call")
def test_crash_during_the_very_first_start_leaves_one_keyring(rig: Rig) -> None:
    """The operator can open what is sealed with the public key that it published."""
    for _ in crashed_starts(rig, rig.delete_keyring):
        [case] = rig.new_cases(1)
        rig.apply(case, case.numbers[0])
        assert rig.settle([case], 30) == {}
        rig.delete(case)
        assert rig.settle([case], 30) == {}


@pytest.mark.skipif(not EVERYTHING, reason="make faults: it takes a start for each call")
def test_crash_during_a_start_leaves_working_channels_alone(rig: Rig) -> None:
    rig.restart_operator()
    cases = rig.new_cases(3)
    for case in cases:
        rig.apply(case, case.numbers[0])
    assert rig.settle(cases, 30) == {}
    rig.stack.twin_call("DELETE", "/journal")
    versions = rig.versions()
    for _ in crashed_starts(rig, lambda: None):
        assert rig.settle(cases, 30) == {}
    assert rig.versions() == versions
    assert [rig.writes(case) for case in cases] == [[], [], []]
    for case in cases:
        rig.delete(case)
    assert rig.settle(cases, 30) == {}


def crashed_starts(rig: Rig, prepare: Callable[[], None]) -> Iterator[None]:
    """Kill the operator at each call of its start, and start it again; yield whenever it is ready."""
    rig.kill_operator()
    prepare()
    rig.proxy.forget()
    rig.start_operator()
    yield
    calls = [call.point for call in rig.proxy.trace]
    for kind, occurrence in calls[: calls.index(("LIST smschannels", 1)) + 1]:
        for action in KILLS.values():
            rig.kill_operator()
            prepare()
            rig.proxy.forget()
            rule = rig.proxy.add(Match(path=f"^{re.escape(kind)}$", nth=occurrence, count=1), action)
            with ThreadPoolExecutor() as thread:
                thread.submit(rig.start_operator)
                assert rig.proxy.wait_held(frozenset({rule.id}), quiet=20), f"{kind} #{occurrence} was not made"
                rig.kill_operator()
            rig.proxy.clear()
            rig.start_operator()
            yield
