"""Test what a hostile namespace costs another one: controller, work queue and limiter together, in virtual time.

`python -m tests.bench.neighbours` measures the same with real processes. The hostile namespace has 300 channels with
invented accounts and keeps changing something; Twilio takes 0.2 seconds.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import pytest

from smschannel.api.errors import Refused
from smschannel.api.reasons import Reason
from smschannel.api.resource import CHECK_NOW_ANNOTATION, CREDENTIALS_LABEL
from smschannel.core.plan import Number
from smschannel.core.record import Key, Login, Webhook
from smschannel.twilio.limits import Limiter
from tests.unit.memory import NAMESPACE, MemoryApi, MemoryTwilio, Operator, running, sid_of
from tests.unit.virtual_time import now, virtually

HOSTILE = "hostile"
CHANNELS = 300
TWILIO = 0.2
LATE = 1.5
"""Seconds until Ready that no channel beside a hostile namespace may take. It makes five calls, a second in all."""


class LimitedTwilio(MemoryTwilio):
    """A Twilio behind a limiter, that takes its time and refuses accounts that it does not know."""

    def __init__(self, *phones: str) -> None:
        super().__init__(*phones)
        self.limiter = Limiter(concurrency=4, refusal_memory=450, clock=now)
        self.accounts = {owner for owner, _ in self.numbers.values()}

    def add(self, phone: str, account: str) -> None:
        webhook = Webhook(url="https://before.example.com/", method="POST")
        self.numbers[sid_of(phone)] = account, Number(sid_of(phone), phone, webhook, "", True)
        self.accounts.add(account)

    def forget_refusal(self, login: Login, account_sid: str, *, older_than: float = 0) -> None:
        self.limiter.forget_refusal(login, account_sid, older_than=older_than)

    def trust(self, login: Login, account_sid: str) -> None:
        self.limiter.trust(login, account_sid)

    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None:
        async with self.limiter.call(login, account_sid):
            await self._answer(account_sid)
            return await super().find_number(login, account_sid, phone_number)

    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None:
        async with self.limiter.call(login, account_sid):
            await self._answer(account_sid)
            return await super().fetch_number(login, account_sid, number_sid)

    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number:
        async with self.limiter.call(login, account_sid):
            await self._answer(account_sid)
            return await super().set_webhook(login, account_sid, number_sid, webhook)

    async def _answer(self, account_sid: str) -> None:
        await asyncio.sleep(TWILIO)
        if account_sid not in self.accounts:
            raise Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")


def invented(n: int) -> str:
    return f"ACee{n:030x}"


def secret(namespace: str, version: int = 0) -> Any:
    meta = {"name": "twilio", "namespace": namespace, "labels": {CREDENTIALS_LABEL: "true"}}
    data = {"auth_token": base64.b64encode(b"token").decode()}
    return {"metadata": meta, "data": data, "version": version}


def check_now(api: MemoryApi, operator: Operator, count: int) -> None:
    for n in range(CHANNELS):
        api.annotate(n, namespace=HOSTILE, **{CHECK_NOW_ANNOTATION: str(count)})


def edit(api: MemoryApi, operator: Operator, count: int) -> None:
    for n in range(CHANNELS):
        api.apply(n, f"+1{count:09d}", namespace=HOSTILE, accountSid=invented(n))


def touch_the_secret(api: MemoryApi, operator: Operator, count: int) -> None:
    body = api._store("secrets", secret(HOSTILE, count))
    operator.controller.on_secret("MODIFIED", body)


def delete_and_create(api: MemoryApi, operator: Operator, count: int) -> None:
    for n in range(CHANNELS):
        api.delete(n, namespace=HOSTILE, force=True)
        api.apply(n, "+15550000", namespace=HOSTILE, accountSid=invented(count * CHANNELS + n))


ATTACKS = [check_now, edit, touch_the_secret, delete_and_create]


async def ready_beside(
    attack: Callable[[MemoryApi, Operator, int], None] | None, victims: Callable[[int], dict[str, Any]]
) -> list[float]:
    """Create a channel per second in another namespace; return the seconds that each took until it was configured."""
    api, twilio = MemoryApi(), LimitedTwilio("+61400000000")
    api._store("secrets", secret(HOSTILE))
    phones = [f"+6140000{n:04d}" for n in range(1, 21)]
    for n, phone in enumerate(phones):
        twilio.add(phone, victims(n).get("accountSid", next(iter(twilio.accounts))))
    times: list[float] = []
    async with running(api, twilio, workers=64, namespaces=(NAMESPACE, HOSTILE)) as operator:
        api.apply(999, "+61400000000")
        await asyncio.sleep(5)
        assert api.reason(999) == "Configured"
        if attack:
            for n in range(CHANNELS):
                api.apply(n, "+15550000", namespace=HOSTILE, accountSid=invented(n))
        for n, phone in enumerate(phones):
            if attack:
                attack(api, operator, n + 1)
            began = now()
            api.apply(n, phone, **victims(n))
            while api.reason(n) != "Configured":  # noqa: ASYNC110  (virtual)
                await asyncio.sleep(0.05)
            times.append(now() - began)
            await asyncio.sleep(max(0.0, began + 1 - now()))
    return times


def _of_a_known_account(n: int) -> dict[str, Any]:
    return {}


def _of_a_new_account(n: int) -> dict[str, Any]:
    """Nothing tells such a channel from one with an invented account."""
    return {"accountSid": f"ACffff{n:028x}"}


@pytest.mark.parametrize("victims", [_of_a_known_account, _of_a_new_account])
@pytest.mark.parametrize("attack", [None, *ATTACKS], ids=lambda each: each.__name__ if each else "none")
def test_hostile_namespace_does_not_delay_another_one(
    attack: Callable[[MemoryApi, Operator, int], None] | None, victims: Callable[[int], dict[str, Any]]
) -> None:
    @virtually
    async def story() -> None:
        times = await ready_beside(attack, victims)
        assert max(times) < LATE, [round(each, 1) for each in times]

    story()


def test_flood_in_its_own_namespace_leaves_known_accounts_alone() -> None:
    """Where all tenants share one namespace, as with REST, the small share of unverified channels protects the others.

    Only channels of accounts without others there wait among the invented ones.
    """

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio("+61400000000", "+61400000001")
        async with running(api, twilio, workers=64):
            api.apply(1000, "+61400000000")
            await asyncio.sleep(5)
            for n in range(CHANNELS):
                api.apply(n, "+15550000", accountSid=invented(n))
            began = now()
            api.apply(1001, "+61400000001")
            while api.reason(1001) != "Configured":  # noqa: ASYNC110  (virtual)
                await asyncio.sleep(0.05)
            assert now() - began < LATE
            api.delete(1000)
            while api.channel(1000) is not None:  # noqa: ASYNC110  (virtual)
                await asyncio.sleep(0.05)
            assert now() - began < 2 * LATE
            await asyncio.sleep(60)
            assert {api.reason(n) for n in range(CHANNELS)} == {"AuthenticationFailed"}, "and they have had their turn"

    story()


def test_thousands_of_deletions_do_not_delay_another_namespace() -> None:
    """Those of channels that hold a number: each is restored at Twilio."""

    @virtually
    async def story() -> None:
        phones = [f"+1555{n:07d}" for n in range(CHANNELS)]
        api, twilio = MemoryApi(), LimitedTwilio("+61400000000", "+61400000001")
        api._store("secrets", secret(HOSTILE))
        for n, phone in enumerate(phones):
            twilio.add(phone, invented(n % 100))
        async with running(api, twilio, workers=64, namespaces=(NAMESPACE, HOSTILE)):
            for n, phone in enumerate(phones):
                api.apply(n, phone, namespace=HOSTILE, accountSid=invented(n % 100))
            await asyncio.sleep(120)
            assert {api.reason(n, HOSTILE) for n in range(CHANNELS)} == {"Configured"}
            for n in range(CHANNELS):
                api.delete(n, namespace=HOSTILE)
            began = now()
            api.apply(1, "+61400000000")
            while api.reason(1) != "Configured":  # noqa: ASYNC110  (virtual)
                await asyncio.sleep(0.05)
            assert now() - began < LATE
            await asyncio.sleep(120)
            assert all(api.channel(n, HOSTILE) is None for n in range(CHANNELS))

    story()


@pytest.mark.parametrize("is_deleted", [False, True], ids=["written", "deleted and created"])
def test_users_of_a_secret_that_changes_in_a_loop_are_added_now_and_then(
    is_deleted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each write they would cost the event loop more than the API server spends on the write."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio("+61400000000")
        api._store("secrets", secret(HOSTILE))
        async with running(api, twilio, workers=64, namespaces=(NAMESPACE, HOSTILE)) as operator:
            for n in range(CHANNELS):
                api.apply(n, "+15550000", namespace=HOSTILE, accountSid=invented(n))
            added: list[float] = []
            users_of = operator.channels.users_of

            def noted(name: Key) -> tuple[Key, ...]:
                added.append(now())
                return users_of(name)

            monkeypatch.setattr(operator.channels, "users_of", noted)
            first = now()
            for count in range(300):
                if is_deleted:
                    operator.controller.on_secret("DELETED", api.objects["secrets", HOSTILE, "twilio"])
                touch_the_secret(api, operator, count)
                await asyncio.sleep(0.01)
            last = now() - 0.01
            await asyncio.sleep(1)
        assert added[0] == first, "the first write is handled at once"
        assert len(added) < 15, "and then once in 0.3 seconds"
        assert last < added[-1] < last + 0.5, "the last one, too"

    story()
