"""Two operators at once, as a node that lost its network brings about: both do everything, Kubernetes arbitrates."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from deploy.local.stack import ready_reason
from tests.faults.conftest import EVERYTHING
from tests.faults.rig import WATCHFUL, Case, Rig, World, webhook_of
from tests.faults.test_outages import create, delete

MANY = 30 if EVERYTHING else 6


@pytest.fixture
def both(rig: Rig) -> Iterator[Rig]:
    """A rig with two operators. Both are stopped afterwards, and one is started with the usual settings."""
    rig.restart_operator(WATCHFUL)
    rig.start_second()
    rig.stack.twin_call("DELETE", "/journal")
    yield rig
    if rig.has_second:
        rig.stop_second()
    rig.restart_operator()


def test_contested_numbers_have_one_holder_each_and_are_restored(both: Rig) -> None:
    cases = both.new_cases(MANY)
    pairs = [(case, replace(case, name=str(uuid.uuid4()))) for case in cases]
    for pair in pairs:
        for case in pair:
            both.apply(case, case.numbers[0])
    wait_until(both, lambda world: [wrong for pair in pairs if (wrong := contested(both, world, pair))])
    holders = [holder_of(both.world(), pair) for pair in pairs]
    time.sleep(2)  # a drift check by each operator
    world = both.world()
    assert [wrong for pair in pairs if (wrong := contested(both, world, pair))] == []
    assert [holder_of(world, pair) for pair in pairs] == holders

    both.stop_second()
    delete(both, holders)
    both.start_second()
    waiters = [next(case for case in pair if case not in holders) for pair in pairs]
    assert both.settle(waiters, 60) == {}
    delete(both, waiters)
    assert both.settle(waiters, 60) == {}
    assert both.world() == World({}, {})


def test_either_operator_may_crash_while_both_configure_the_same_channels(both: Rig) -> None:
    cases = create(both, MANY)
    both.kill_operator()
    assert both.settle(cases, 60) == {}
    both.start_operator(WATCHFUL)
    for case in cases:
        both.apply(case, case.numbers[1])
    both.stop_second()
    assert both.settle(cases, 60) == {}
    both.start_second()
    delete(both, cases)
    assert both.settle(cases, 60) == {}
    # Four writes are needed. Both operators may make each of them, and one may have to repeat its own.
    assert [wrong for case in cases if (wrong := both.unexpected_writes(case, at_most=4 * 3))] == []


def contested(rig: Rig, world: World, pair: tuple[Case, Case]) -> str:
    """What is wrong with two channels that want the same number; empty if exactly one of them has it."""
    number = pair[0].numbers[0]
    reasons = {case.name: ready_reason(world.channels[case.name])[1] for case in pair}
    if sorted(reasons.values()) != ["Configured", "NumberInUse"]:
        return f"{number}: {reasons}"
    holder = holder_of(world, pair)
    if reasons[holder.name] != "Configured" or sum(len(world.records_of(case.name)) for case in pair) != 1:
        return f"{number} is held by {holder.name}, and the reasons are {reasons}"
    url = rig.stack.number(number)["sms_url"]
    return "" if url == webhook_of(holder.name) else f"{number} points at {url}, and {holder.name} holds it"


def holder_of(world: World, pair: tuple[Case, Case]) -> Case:
    return next(case for case in pair if world.records_of(case.name))


def wait_until(rig: Rig, complaints: Callable[[World], list[str]], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while wrong := complaints(rig.world()):
        assert time.monotonic() < deadline, wrong
        time.sleep(0.2)
