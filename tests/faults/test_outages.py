"""Faults that last longer than one call: watches that break, an API server or a Twilio that is down for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.conftest import EVERYTHING
from tests.faults.rig import FLOOR, Case, Rig

MANY = 50 if EVERYTHING else 10


@pytest.fixture
def calm(rig: Rig) -> Iterator[Rig]:
    """An operator with the usual settings. Nothing was broken before, and everything is repaired afterwards."""
    rig.restart_operator()
    rig.proxy.forget()
    rig.stack.twin_call("DELETE", "/journal")
    yield rig
    rig.proxy.away.clear()
    rig.proxy.cut_watches(every=None)


def create(rig: Rig, count: int) -> list[Case]:
    cases = rig.new_cases(count)
    for case in cases:
        rig.apply(case, case.numbers[0])
    return cases


def delete(rig: Rig, cases: list[Case]) -> None:
    for case in cases:
        rig.delete(case)


def live_and_die(rig: Rig, break_it: Callable[[], object]) -> None:
    """Half of the channels exist before the fault and are deleted; the others are created, and deleted afterwards."""
    old = create(rig, MANY)
    assert rig.settle(old, 60) == {}
    new = create(rig, MANY)
    delete(rig, old)
    break_it()
    assert rig.settle([*old, *new], 90) == {}
    delete(rig, new)
    assert rig.settle(new, 60) == {}
    assert [why for case in (*old, *new) if (why := rig.unexpected_writes(case, at_most=3))] == []


def watched(rig: Rig) -> int:
    return sum(call.kind == "WATCH smschannels" for call in rig.proxy.trace)


def test_watches_are_cut_every_second(calm: Rig) -> None:
    calm.proxy.cut_watches(every=1 if EVERYTHING else 0.2)  # a sample is over in two seconds
    live_and_die(calm, lambda: None)
    assert watched(calm) > 3


def test_watches_expire(calm: Rig) -> None:
    """410 within the stream: what happened meanwhile is found by a list."""
    watched_before = watched(calm)
    live_and_die(calm, lambda: calm.proxy.cut_watches(expired=True))
    assert watched(calm) > watched_before


def test_api_server_restarts(calm: Rig) -> None:
    live_and_die(calm, calm.stack.restart_control_plane)


def test_twilio_is_down_and_comes_back(calm: Rig) -> None:
    """Channels that are created or deleted meanwhile are retried at the configured pace, and converge afterwards."""
    old = create(calm, MANY)
    assert calm.settle(old, 60) == {}
    calm.proxy.forget()
    calm.proxy.away.add("twilio")
    began = time.monotonic()
    new = create(calm, MANY)
    delete(calm, old)
    calm.proxy.wait_called([case.name for case in (*old, *new)], "twilio", 30)
    down = time.monotonic() - began
    most = max(sum(call.side == "twilio" for call in calm.proxy.calls_about(case.name)) for case in (*old, *new))
    calm.proxy.away.clear()
    assert calm.settle([*old, *new], 60) == {}
    assert most <= 2 * down / FLOOR, "HTTP lets a client send a call again whose kept-alive connection broke"
    delete(calm, new)
    assert calm.settle(new, 60) == {}
