"""A number goes from one channel to the next: what it pointed at before is never lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from smschannel.api.errors import KubernetesUnavailable
from smschannel.api.kube_client import Object
from smschannel.core.plan import Number
from smschannel.core.record import Webhook
from tests.unit.memory import ACCOUNT, BEFORE, MemoryApi, MemoryTwilio, running, sid_of, url_of
from tests.unit.virtual_time import virtually

PHONE = "+61400111222"


class LostAnswer(MemoryApi):
    """Kubernetes, where the answer to the next creation of a record gets lost once `loses` is set."""

    loses = False

    async def request(self, method: str, path: str, body: Object | None = None, **options: Any) -> Object:
        answer = await super().request(method, path, body, **options)
        if self.loses and method == "POST" and path.endswith("/secrets"):
            self.loses = False
            raise KubernetesUnavailable("the API server does not answer")
        return answer


class SlowFind(MemoryTwilio):
    """Twilio, where the answer to the next search takes so long that it is out of date, once `is_slow` is set."""

    is_slow = False

    async def find_number(self, *arguments: Any) -> Number | None:
        number = await super().find_number(*arguments)
        if self.is_slow:
            self.is_slow = False
            await asyncio.sleep(5)
        return number


@virtually
async def test_waiter_whose_claim_has_no_answer_learns_the_previous_webhook() -> None:
    """It read the number before the holder restored it, and does not learn that its claim succeeded: as in a crash."""
    api, twilio = LostAnswer(), SlowFind(PHONE)
    async with running(api, twilio):
        api.apply(1, PHONE)
        await asyncio.sleep(1)
        twilio.is_slow = True
        api.apply(2, PHONE, day=2)
        await asyncio.sleep(1)
        api.loses = True
        api.delete(1)
        await asyncio.sleep(30)
        assert not api.loses
        assert (api.reason(2), twilio.webhook(PHONE)) == ("Configured", url_of(2))
        api.delete(2)
        await asyncio.sleep(30)
        assert (api.records(), twilio.webhook(PHONE)) == ({}, BEFORE)


@virtually
async def test_first_foreign_webhook_is_restored_if_the_previous_one_is_unknown() -> None:
    """A number that pointed at one of ours when it was claimed: what was set later is the best that is known."""
    api, twilio = MemoryApi(), MemoryTwilio(PHONE)
    number = twilio.numbers[sid_of(PHONE)][1]
    twilio.numbers[sid_of(PHONE)] = ACCOUNT, replace(number, webhook=Webhook(url=url_of(9), method="POST"))
    async with running(api, twilio):
        api.apply(1, PHONE)
        await asyncio.sleep(1)
        for foreign in (BEFORE, "https://later.example.com/"):
            twilio.numbers[sid_of(PHONE)] = ACCOUNT, replace(number, webhook=Webhook(url=foreign, method="GET"))
            await asyncio.sleep(800)
            assert twilio.webhook(PHONE) == url_of(1)
        api.delete(1)
        await asyncio.sleep(30)
        assert (api.records(), twilio.webhook(PHONE)) == ({}, BEFORE)
