"""Twilio hangs for all accounts: deletions still end in time, however many accounts there are.

Each account has a login of its own. If each had to wait for its own timeouts, their calls would fill all
workers. The controller, the reconciler and the limiter run together, in virtual time.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from smschannel.api.errors import TwilioTimeout
from smschannel.core.plan import Number
from smschannel.core.record import Login, Webhook
from smschannel.twilio.limits import Limiter
from tests.unit.memory import BEFORE, MemoryApi, MemoryTwilio, running, sid_of
from tests.unit.virtual_time import now, virtually

GRACE = 120.0


def account_of(n: int) -> str:
    return f"AC{n:032x}"


def phone_of(n: int) -> str:
    return f"+6140{n:07d}"


class Hanging(MemoryTwilio):
    """Each number has an account of its own, behind the real limiter; while `is_down`, calls time out."""

    def __init__(self, accounts: int, timeout: float) -> None:
        super().__init__()
        self.numbers = {
            sid_of(phone_of(n)): (
                account_of(n),
                Number(sid_of(phone_of(n)), phone_of(n), Webhook(url=BEFORE, method="POST"), "", True),
            )
            for n in range(accounts)
        }
        self.limiter = Limiter(concurrency=4, refusal_memory=450, clock=now)
        self.timeout = timeout
        self.is_down = False

    async def _limited(self, login: Login, account_sid: str) -> None:
        async with self.limiter.call(login, account_sid):
            if self.is_down:
                await asyncio.sleep(self.timeout)
                raise TwilioTimeout("Twilio does not answer in time.")
            await asyncio.sleep(0.05)

    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None:
        await self._limited(login, account_sid)
        return await super().find_number(login, account_sid, phone_number)

    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None:
        await self._limited(login, account_sid)
        return await super().fetch_number(login, account_sid, number_sid)

    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number:
        await self._limited(login, account_sid)
        owner, number = self.numbers[number_sid]
        self.numbers[number_sid] = owner, replace(number, webhook=webhook)
        return self.numbers[number_sid][1]


async def seconds_until_deleted(accounts: int, timeout: float, *, restarted: bool) -> float:  # noqa: ASYNC109
    """Return the seconds that the deletion of a channel takes in the middle of an outage of 300 seconds."""
    api, twilio = MemoryApi(), Hanging(accounts, timeout)
    options: dict[str, Any] = {"workers": 64}
    async with running(api, twilio, **options):
        for n in range(accounts):
            api.apply(n, phone_of(n), accountSid=account_of(n))
        await asyncio.sleep(600)
        assert {api.reason(n) for n in range(accounts)} == {"Configured"}
        twilio.is_down = not restarted
        if not restarted:
            return await _deletion(api)
    twilio.limiter = Limiter(concurrency=4, refusal_memory=450, clock=now)
    twilio.is_down = True
    async with running(api, twilio, **options):
        return await _deletion(api)


async def _deletion(api: MemoryApi) -> float:
    await asyncio.sleep(300)
    started = now()
    api.delete(7)
    while api.channel(7) is not None and now() - started < 3600:  # noqa: ASYNC110  (virtual)
        await asyncio.sleep(1)
    return now() - started


@pytest.mark.parametrize("restarted", [False, True], ids=["it ran before", "it restarts during the outage"])
@pytest.mark.parametrize(("accounts", "timeout"), [(10, 5.0), (10, 15.0), (800, 15.0)])
def test_deletion_ends_with_the_grace_period_and_one_timeout(accounts: int, timeout: float, restarted: bool) -> None:
    """800 accounts that each waited for their own timeouts would keep the 64 workers busy for over three minutes."""
    took: list[float] = []

    @virtually
    async def story() -> None:
        took.append(await seconds_until_deleted(accounts, timeout, restarted=restarted))

    story()
    assert took[0] <= GRACE + timeout + 2
