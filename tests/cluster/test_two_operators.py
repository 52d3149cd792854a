"""Two operators at once, as a node that lost its network brings about: whatever runs twice, a number has one holder.

A Deployment with the strategy Recreate does not prevent it, nor does deleting a pod by force.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deploy.local.stack import CHANNELS, Options, Stack, free_port, ready_reason
from tests.cluster.steps import before, delete, metric, name_of, records, wait_for, webhook
from tests.conftest import running, take_number

NUMBERS = 10
SETTLED = {"Configured", "NumberInUse"}
SETTINGS = {
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "2",
    "SMSCHANNEL_SLOW_INTERVAL_SECONDS": "2",
    "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "1",
    "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
    "SMSCHANNEL_DELETION_GRACE_SECONDS": "2",
}


@pytest.fixture(scope="module")
def second_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, second_url: str) -> Iterator[Stack]:
    """A stack with two operator processes."""
    with running(tmp_path_factory.mktemp("two"), Options(numbers=20, operator_settings=SETTINGS)) as started:
        started.start_operator("operator-2", int(second_url.rpartition(":")[2]))
        yield started


def test_contested_numbers_have_one_holder_each_and_are_restored(stack: Stack, second_url: str) -> None:
    numbers = [take_number(stack) for _ in range(NUMBERS)]
    pairs = [(stack.manifest(number), stack.manifest(number)) for number in numbers]
    names = [name_of(each) for pair in pairs for each in pair]
    stack.apply(*(each for pair in pairs for each in pair))
    stack.wait_until(lambda each: ready_reason(each)[1] in SETTLED, *names)
    holders = check_pairs(stack, numbers, pairs)
    wait_rounds(stack, second_url, 2)
    assert check_pairs(stack, numbers, pairs) == holders, "nothing changes hands afterwards"

    delete(stack, *names)
    check_restored(stack, numbers)


def check_pairs(stack: Stack, numbers: list[str], pairs: list[tuple[Any, Any]]) -> dict[str, str]:
    """Of each pair one channel must hold the number, by status, record and webhook alike; returns the holders."""
    listed = stack.channels.get(namespace=CHANNELS).to_dict()["items"]
    reasons = {name_of(each): ready_reason(each)[1] for each in listed}
    held = records(stack)
    assert sorted(held) == sorted(numbers)
    holders = {}
    for number, pair in zip(numbers, pairs, strict=True):
        assert sorted(reasons[name_of(each)] for each in pair) == ["Configured", "NumberInUse"], number
        holders[number] = next(name_of(each) for each in pair if reasons[name_of(each)] == "Configured")
        assert held[number].name == holders[number]
        assert webhook(stack, number) == stack.webhook_url(holders[number])
    return holders


def wait_rounds(stack: Stack, second_url: str, rounds: int) -> None:
    """Wait until both operators have reconciled every channel that often again, as far as figures can show that."""
    for url in (stack.operator_url, second_url):
        enough = metric(url, "smschannel_reconciles_total") + 2 * NUMBERS * rounds
        wait_for(lambda: metric(url, "smschannel_reconciles_total") >= enough, "both operators go on")  # noqa: B023


def check_restored(stack: Stack, numbers: list[str]) -> None:
    wait_for(lambda: not stack.records(), "no record is left")
    assert {number: webhook(stack, number) for number in numbers} == {number: before(number) for number in numbers}


def test_uncontested_channels_come_and_go(stack: Stack) -> None:
    numbers = [take_number(stack) for _ in range(NUMBERS)]
    manifests = [stack.manifest(number) for number in numbers]
    names = [name_of(each) for each in manifests]
    stack.apply(*manifests)
    stack.wait_ready(*names)
    assert {number: record.name for number, record in records(stack).items()} == dict(zip(numbers, names, strict=True))
    assert [webhook(stack, number) for number in numbers] == [stack.webhook_url(name) for name in names]
    delete(stack, *names)
    check_restored(stack, numbers)
