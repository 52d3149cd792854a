"""Test what an outside attack broke: numbers that point at a channel that is gone, or that nobody can have."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from typing import Any

from smschannel.api.errors import KubernetesUnavailable, TwilioThrottled, TwilioTimeout, TwilioUnavailable
from smschannel.core.plan import Number
from smschannel.core.record import Webhook
from tests.unit.memory import (
    BEFORE,
    NAMESPACE,
    MemoryApi,
    MemoryTwilio,
    Operator,
    at_once,
    instance,
    raising,
    running,
    sid_of,
    url_of,
)
from tests.unit.virtual_time import virtually

N, M = "+61400000001", "+61400000002"


class LateFind(MemoryTwilio):
    """Once armed, answers the next find late, with what the number was when the call arrived."""

    def __init__(self, *phones: str) -> None:
        super().__init__(*phones)
        self.armed, self.read, self.go = False, asyncio.Event(), asyncio.Event()

    async def find_number(self, *args: Any) -> Number | None:
        number = await super().find_number(*args)
        if self.armed:
            self.armed = False
            self.read.set()
            await self.go.wait()
        return number

    async def moved(self, api: MemoryApi, **spec: Any) -> None:
        """Move N from channel 1 to channel 2, as one commit does; 2 reads it just before 1 restores it."""
        api.apply(1, N)
        await asyncio.sleep(1)
        self.armed = True
        api.apply(2, N, **spec)
        await self.read.wait()
        api.delete(1)
        await asyncio.sleep(1)
        assert (self.webhook(N), api.records()) == (BEFORE, {})


@virtually
async def test_previous_webhook_survives_a_failure_after_the_claim() -> None:
    api, twilio = MemoryApi(), LateFind(N)
    async with running(api, twilio):
        await twilio.moved(api)
        twilio.on_call = raising(TwilioTimeout("no answer"), method="fetch")
        twilio.go.set()
        await asyncio.sleep(0.2)
        twilio.on_call = at_once
        await asyncio.sleep(60)
        assert api.reason(2) == "Configured"
        api.delete(2)
        await asyncio.sleep(60)
    assert twilio.webhook(N) == BEFORE


@virtually
async def test_lagging_second_operator_does_not_take_a_freed_number() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    first = Operator(api, twilio)
    await first.start()
    api.apply(1, N)
    await asyncio.sleep(1)

    class Lagging(MemoryTwilio):
        def __init__(self) -> None:
            super().__init__()
            self.finds, self.may_find = asyncio.Event(), asyncio.Event()
            self.sets, self.may_set = asyncio.Event(), asyncio.Event()

        async def find_number(self, *args: Any) -> Number | None:
            self.finds.set()
            await self.may_find.wait()
            return await twilio.find_number(*args)

        async def set_webhook(self, *args: Any) -> Number:
            self.sets.set()
            await self.may_set.wait()
            return await twilio.set_webhook(*args)

    lagging = Lagging()
    second = Operator(api, lagging)
    await second.start()
    api.annotate(1, **{"channels.hydracore.io/check-now": "1"})
    await lagging.finds.wait()  # the second has opened the record
    await asyncio.sleep(1)

    async def on_call(method: str, _: str) -> None:
        if method == "DELETE":  # the first has restored N
            lagging.may_find.set()
            await lagging.sets.wait()  # the second takes that for drift

    api.on_call = on_call
    api.delete(1)
    await asyncio.sleep(5)
    assert (api.channel(1), api.records(), twilio.webhook(N)) == (None, {}, BEFORE)
    lagging.may_set.set()
    await asyncio.sleep(7200)
    await first.stop()
    await second.stop()
    assert twilio.webhook(N) == BEFORE


@virtually
async def test_swap_with_if_unused_leaves_no_channel_without_a_number() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N, M)
    async with running(api, twilio):
        for n, phone in ((1, N), (2, M)):
            api.apply(n, phone)
        await asyncio.sleep(1)
        api.apply(1, M, takeoverPolicy="IfUnused")
        await asyncio.sleep(1)
        api.apply(2, N, takeoverPolicy="IfUnused")
        await asyncio.sleep(7200)
        assert {int(each.name[-12:]) for each in api.records().values()} == {1, 2}


@virtually
async def test_swap_that_falls_through_halfway_leaves_no_number_unused() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N, M)
    async with running(api, twilio):
        api.apply(1, N, day=5)
        api.apply(2, M, day=6)
        await asyncio.sleep(1)
        failed: list[str] = []

        async def on_call(method: str, _: str) -> None:
            if method == "DELETE" and not failed:  # M is restored, its record is not deleted
                failed.append(method)
                api.apply(3, M, day=1)
                raise KubernetesUnavailable("503")

        api.on_call = on_call
        api.apply(1, M)
        await asyncio.sleep(0.5)
        api.apply(2, N)
        await asyncio.sleep(7200)
        for phone, record in api.records().items():
            assert twilio.webhook(phone) == url_of(int(record.name[-12:])), phone


@virtually
async def test_deletion_ends_although_twilio_asks_for_a_long_pause() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        twilio.on_call = raising(TwilioThrottled("429", 900))
        api.delete(1)
        await asyncio.sleep(130)
        assert api.channel(1) is None


@virtually
async def test_deletions_of_an_account_end_although_twilio_fails_slowly() -> None:
    phones = [f"+6140000{n:04d}" for n in range(60)]
    api, twilio = MemoryApi(), MemoryTwilio(*phones)
    async with running(api, twilio):
        for n, phone in enumerate(phones):
            api.apply(n, phone)
        await asyncio.sleep(60)

        async def on_call(*_: str) -> None:
            await asyncio.sleep(9)
            raise TwilioUnavailable("504")

        twilio.on_call = on_call
        for n in range(60):
            api.delete(n)
        await asyncio.sleep(180)
        assert sum(api.channel(n) is not None for n in range(60)) == 0


@virtually
async def test_channel_kept_by_another_finalizer_is_retried_with_backoff() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        api.objects["smschannels", NAMESPACE, instance(1)]["metadata"]["finalizers"].append("example.com/other")
        twilio.on_call = raising(TwilioUnavailable("503", 60))
        api.delete(1)
        await asyncio.sleep(600)
        twilio.calls = 0
        await asyncio.sleep(3600)
        assert twilio.calls <= 60


@virtually
async def test_if_unused_is_decided_on_the_webhook_that_would_be_overwritten() -> None:
    api, twilio = MemoryApi(), LateFind(N)
    async with running(api, twilio):
        await twilio.moved(api, takeoverPolicy="IfUnused")
        twilio.go.set()
        await asyncio.sleep(60)
        assert (api.reason(2), twilio.webhook(N)) == ("WebhookForeign", BEFORE)


@virtually
async def test_late_answer_about_a_holder_does_not_keep_its_number_in_use() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    armed: list[bool] = []
    request, go = api.request, asyncio.Event()

    async def late(method: str, path: str, *args: Any, accept: str = "", **options: Any) -> Any:
        answer = await request(method, path, *args, accept=accept, **options)
        if armed and "PartialObjectMetadata" in accept:
            armed.clear()
            await go.wait()
        return answer

    api.request = late  # type: ignore[method-assign]
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        armed.append(True)
        api.apply(2, N)
        await asyncio.sleep(1)
        api.delete(1)
        await asyncio.sleep(1)
        go.set()
        await asyncio.sleep(30)
        assert api.reason(2) == "Configured"


@virtually
async def test_swap_continues_once_the_older_waiter_is_gone() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N, M)
    async with running(api, twilio):
        api.apply(1, N, day=5)
        api.apply(2, M, day=6)
        await asyncio.sleep(1)
        api.apply(3, N, day=1)
        await asyncio.sleep(1)
        api.apply(1, M)
        api.apply(2, N)
        await asyncio.sleep(5)
        api.delete(3)
        await asyncio.sleep(60)
        assert (api.reason(1), api.reason(2)) == ("Configured", "Configured")


@virtually
async def test_late_event_of_a_deleted_channel_claims_nothing() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(1)
        late = copy.deepcopy(api.channel(1))
        assert late
        api.delete(1)
        await asyncio.sleep(1)
        operator.controller.on_channel("MODIFIED", late)
        await asyncio.sleep(30)
        assert twilio.webhook(N) == BEFORE


@virtually
async def test_corrections_of_channels_removed_by_force_are_forgotten() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(1)
        account, number = twilio.numbers[sid_of(N)]
        elsewhere = Webhook(url="https://elsewhere.example.com/", method="POST")
        twilio.numbers[sid_of(N)] = account, replace(number, webhook=elsewhere)
        await asyncio.sleep(800)
        api.delete(1, force=True)
        await asyncio.sleep(800)
        assert api.records() == {}
        assert operator.reconciler._observe._corrections == {}
