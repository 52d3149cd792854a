"""Two operators at once, as after a node lost its network: the API server arbitrates their claims.

Each number has one holder, and its previous webhook is restored in the end.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.unit.memory import BEFORE, MemoryApi, MemoryTwilio, Operator, url_of
from tests.unit.virtual_time import virtually

NUMBERS = 10
PHONES = [f"+6140000{n:04d}" for n in range(NUMBERS)]


def _jitter(api: MemoryApi, twilio: MemoryTwilio, seed: int) -> None:
    """Every call takes a random time, so that the two operators interleave differently for each seed."""
    dice = random.Random(seed)  # noqa: S311

    async def on_call(*_: str) -> None:
        await asyncio.sleep(dice.uniform(0, 0.1))

    api.on_call = twilio.on_call = on_call


async def _check_one_holder_each(api: MemoryApi, twilio: MemoryTwilio) -> None:
    assert len(api.records()) == NUMBERS
    for n, phone in enumerate(PHONES):
        first, second = n, NUMBERS + n
        assert sorted((api.reason(first), api.reason(second))) == ["Configured", "NumberInUse"], phone
        holder = first if api.reason(first) == "Configured" else second
        assert twilio.webhook(phone) == url_of(holder)


@pytest.mark.parametrize("seed", range(20))
def test_contested_numbers_have_one_holder_each_and_are_restored(seed: int) -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(*PHONES)
        _jitter(api, twilio, seed)
        operators = [Operator(api, twilio, resync=20) for _ in range(2)]
        for operator in operators:
            await operator.start()
        for n, phone in enumerate(PHONES):
            api.apply(n, phone)
            api.apply(NUMBERS + n, phone)
        await asyncio.sleep(60)
        await _check_one_holder_each(api, twilio)
        for n in range(NUMBERS):  # the holders and the waiters go in any order
            api.delete(n)
        await asyncio.sleep(120)
        assert [api.reason(NUMBERS + n) for n in range(NUMBERS)] == ["Configured"] * NUMBERS
        for n in range(NUMBERS):
            api.delete(NUMBERS + n)
        await asyncio.sleep(120)
        for operator in operators:
            await operator.stop()
        assert api.records() == {}
        assert {twilio.webhook(phone) for phone in PHONES} == {BEFORE}

    story()


@pytest.mark.parametrize("seed", range(10))
def test_two_operators_configure_swap_and_restore_all_channels(seed: int) -> None:
    """Channels are created, swap their numbers in a ring and are deleted, while two operators run."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(*PHONES)
        _jitter(api, twilio, seed)
        operators = [Operator(api, twilio, resync=20) for _ in range(2)]
        for operator in operators:
            await operator.start()
        for n, phone in enumerate(PHONES):
            api.apply(n, phone)
        await asyncio.sleep(60)
        for n in range(NUMBERS):
            api.apply(n, PHONES[(n + 1) % NUMBERS])
        await asyncio.sleep(600)
        assert [api.reason(n) for n in range(NUMBERS)] == ["Configured"] * NUMBERS
        assert [twilio.webhook(PHONES[(n + 1) % NUMBERS]) for n in range(NUMBERS)] == [
            url_of(n) for n in range(NUMBERS)
        ]
        for n in range(NUMBERS):
            api.delete(n)
        await asyncio.sleep(300)
        for operator in operators:
            await operator.stop()
        assert api.records() == {}
        assert {twilio.webhook(phone) for phone in PHONES} == {BEFORE}

    story()
