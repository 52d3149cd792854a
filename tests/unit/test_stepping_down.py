"""When a leader may not write to Twilio, or loses its lease: nothing is reported, nothing goes on, nothing is lost."""

from __future__ import annotations

import asyncio

from smschannel.api.errors import LeaseEndsSoon
from tests.unit.memory import BEFORE, MemoryApi, MemoryTwilio, Operator, at_once, raising, running, url_of
from tests.unit.virtual_time import now, virtually

PHONE = "+61400000001"
NOT_SENT = raising(LeaseEndsSoon("not sent"), method="set")


@virtually
async def test_write_that_may_not_begin_is_made_later() -> None:
    """The channel's status says nothing of it: it is no fault of Twilio or of the channel."""
    api, twilio = MemoryApi(), MemoryTwilio(PHONE)
    async with running(api, twilio):
        twilio.on_call = NOT_SENT
        api.apply(1, PHONE)
        await asyncio.sleep(20)
        assert api.reason(1) in {"", "Pending"}
        assert twilio.writes == []
        twilio.on_call = at_once
        await asyncio.sleep(60)
        assert api.reason(1) == "Configured"
        assert twilio.writes == [(PHONE, url_of(1))]


@virtually
async def test_restore_that_may_not_begin_is_made_later() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(PHONE)
    async with running(api, twilio):
        api.apply(1, PHONE)
        await asyncio.sleep(5)
        twilio.on_call = NOT_SENT
        api.delete(1)
        await asyncio.sleep(20)
        assert twilio.webhook(PHONE) == url_of(1)
        assert api.reason(1) == "Configured", "not RestoreFailed: nothing was tried"
        twilio.on_call = at_once
        await asyncio.sleep(60)
        assert twilio.webhook(PHONE) == BEFORE
        assert (api.channel(1), api.records()) == (None, {})


async def _hanging_reconcile() -> tuple[Operator, MemoryTwilio, asyncio.Event]:
    """Return an operator with a reconcile that waits for Twilio until the event is set, just before it writes there."""
    api, twilio, answer = MemoryApi(), MemoryTwilio(PHONE), asyncio.Event()

    async def on_call(kind: str, what: str) -> None:
        if kind == "set":
            await answer.wait()

    twilio.on_call = on_call
    operator = Operator(api, twilio)
    await operator.start()
    api.apply(1, PHONE)
    await asyncio.sleep(1)
    assert len(api.records()) == 1
    return operator, twilio, answer


@virtually
async def test_reconciles_in_flight_end_before_the_lease_is_released() -> None:
    operator, twilio, answer = await _hanging_reconcile()
    asyncio.get_running_loop().call_later(3, answer.set)
    began = now()
    await operator.stop()
    assert 3 <= now() - began < 4
    assert twilio.writes == [(PHONE, url_of(1))]


@virtually
async def test_reconciles_that_do_not_end_are_cancelled() -> None:
    operator, twilio, answer = await _hanging_reconcile()
    began = now()
    await operator.stop()
    assert now() - began == 10
    answer.set()
    await asyncio.sleep(60)
    assert twilio.writes == []


@virtually
async def test_reconciles_are_cancelled_at_once_when_the_lease_is_lost() -> None:
    operator, twilio, answer = await _hanging_reconcile()
    began = now()
    stopping = asyncio.create_task(operator.stop())
    await asyncio.sleep(2)
    operator.controller.abort()
    await stopping
    assert now() - began == 2
    answer.set()
    await asyncio.sleep(60)
    assert twilio.writes == []
