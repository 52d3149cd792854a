"""Drift checks of channels to which nothing happened: what they cost, and what makes them a reconcile again."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from smschannel.api.errors import KubernetesUnavailable, Refused, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.api.resource import CHECK_NOW_ANNOTATION
from smschannel.core.plan import Number
from smschannel.core.record import Key, Login, Webhook
from smschannel.twilio.account_cache import AccountCache
from tests.unit.memory import (
    BEFORE,
    NAMESPACE,
    TEMPLATE,
    MemoryApi,
    MemoryTwilio,
    Operator,
    instance,
    running,
    sid_of,
    url_of,
)
from tests.unit.virtual_time import now, virtually

L, M, N = "+61400000003", "+61400000002", "+61400000001"
INTERVAL = 600


class Pages(MemoryTwilio):
    """A Twilio whose account can be read in pages; `pages` has the times of that."""

    def __init__(self, *phones: str) -> None:
        super().__init__(*phones)
        self.services: dict[str, str] = {}
        self.pages: list[float] = []

    async def number_pages(self, login: Login, account_sid: str) -> AsyncIterator[list[Number]]:
        self.pages.append(now())
        await self._call("page", account_sid)
        yield [number for _, number in self.numbers.values()]

    async def overriding_services(self, login: Login, account_sid: str) -> dict[str, str]:
        return self.services

    def change(self, phone: str, **changes: object) -> None:
        owner, number = self.numbers[sid_of(phone)]
        self.numbers[sid_of(phone)] = owner, replace(number, **changes)  # type: ignore[arg-type]


def cache(twilio: Pages) -> AccountCache:
    return AccountCache(twilio, is_own_url=TEMPLATE.made, max_age=INTERVAL / 2, clock=now)


async def settle(api: MemoryApi, twilio: Pages) -> None:
    """Wait until all channels were checked, and forget the calls so far."""
    await asyncio.sleep(3 * INTERVAL)
    api.calls.clear()
    twilio.pages.clear()


def story(test: Callable[[MemoryApi, Pages, Operator], Awaitable[None]]) -> Callable[[], None]:
    """Run a test in virtual time, with two settled channels of one account."""

    @virtually
    async def run() -> None:
        api, twilio = MemoryApi(), Pages(N, M, L)
        async with running(api, twilio, accounts=cache(twilio), resync=1e9) as operator:
            api.apply(1, N)
            api.apply(2, M)
            await settle(api, twilio)
            await test(api, twilio, operator)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@story
async def test_quiet_channels_cost_a_page_for_their_account(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    """Nothing of Kubernetes, and all channels of an account share one read in each interval."""
    calls = twilio.calls
    await asyncio.sleep(8 * INTERVAL)
    assert [path for _, path in api.calls if not path.endswith("smschannel-keyring")] == []
    assert 6 <= len(twilio.pages) <= 8
    assert twilio.calls - calls == len(twilio.pages)


@story
async def test_later_channel_shares_the_pages(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    await asyncio.sleep(4 * INTERVAL)
    api.apply(3, L)
    await settle(api, twilio)
    await asyncio.sleep(4 * INTERVAL)
    assert 3 <= len(twilio.pages) <= 4


@story
async def test_changed_webhook_is_corrected(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    twilio.change(N, webhook=Webhook(url="https://drift.example.com/", method="POST"))
    await asyncio.sleep(1.3 * INTERVAL)
    assert twilio.webhook(N) == url_of(1)
    assert [each["reason"] for each in api.events][-1] == "DriftCorrected"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda twilio: twilio.change(N, application_sid="AP1"), "WebhookOverridden"),
        (lambda twilio: twilio.change(N, receives_sms=False), "NumberLacksSms"),
        (lambda twilio: twilio.services.update({sid_of(N): "MG1"}), "WebhookOverridden"),
        (lambda twilio: twilio.numbers.pop(sid_of(N)), "NumberNotFound"),
    ],
    ids=["an application", "no SMS", "a Messaging Service", "released"],
)
def test_whatever_else_changed_at_twilio_is_reported(change: Callable[[Pages], object], reason: str) -> None:
    async def test(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
        before = (api.channel(1) or {})["status"]
        change(twilio)
        await asyncio.sleep(2 * INTERVAL)
        assert (api.channel(1) or {})["status"] != before
        assert api.reason(1) == reason
        await asyncio.sleep(3 * INTERVAL)
        assert operator.channels.reasons[Reason[reason]] == 1, "it is not checked as if it were configured"

    story(test)()


@story
async def test_refused_login_is_reported(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    async def refuse(kind: str, what: str) -> None:
        raise Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")

    twilio.on_call = refuse
    await asyncio.sleep(1.3 * INTERVAL)
    assert api.reason(1) == "AuthenticationFailed"


def _reads(api: MemoryApi) -> int:
    """Return how often the channel's record was read, as each reconcile does."""
    return sum(method == "GET" and path.endswith(sid_of(N).lower()) for method, path in api.calls)


def _in_next_reconcile(api: MemoryApi, act: Callable[[MemoryApi], object]) -> asyncio.Event:
    """Let something happen when the next reconcile reads its record. Return what is set then."""
    happened = asyncio.Event()

    async def during(method: str, path: str) -> None:
        if method == "GET" and path.endswith(sid_of(N).lower()) and not happened.is_set():
            happened.set()
            act(api)

    api.on_call = during
    return happened


def _edit_status(api: MemoryApi) -> None:
    there = api.objects["smschannels", NAMESPACE, instance(1)]
    api._store("smschannels", {**there, "status": {**there["status"], "webhookUrl": "https://x"}}, "MODIFIED")


def _rotate(api: MemoryApi) -> None:
    there = api.objects["secrets", NAMESPACE, "twilio"]
    body = api._store("secrets", {**there, "data": {"auth_token": base64.b64encode(b"new").decode()}})
    for controller in api.watchers:
        controller.on_secret("MODIFIED", body)


@pytest.mark.parametrize(
    ("happen", "why"),
    [
        (lambda api: api.annotate(1, **{CHECK_NOW_ANNOTATION: "1"}), "it is requested"),
        (lambda api: api.apply(1, N, deletionPolicy="Retain"), "the spec changed"),
        (_edit_status, "others wrote the status, for which no event adds the key"),
        (_rotate, "its Secret changed"),
        (
            lambda api: api.watchers[0]._kube.claims.on_change(Key(NAMESPACE, instance(1))),
            "its record was changed",
        ),
        (
            lambda api: api.watchers[0]._kube.claims.put(replace(api.records()[N], uid="another")),
            "another channel took its number",
        ),
    ],
    ids=["check-now", "spec", "status", "Secret", "record", "holder"],
)
def test_channel_to_which_something_happened_is_reconciled(happen: Callable[[MemoryApi], object], why: str) -> None:
    async def test(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
        happen(api)
        await asyncio.sleep(1.5 * INTERVAL)
        assert _reads(api), why
        await settle(api, twilio)
        await asyncio.sleep(2 * INTERVAL)
        assert not _reads(api), "and then it is only checked again"

    story(test)()


@story
async def test_what_happens_during_a_check_is_not_lost(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    asked = asyncio.Event()

    async def note(kind: str, what: str) -> None:
        if kind == "page" and not asked.is_set():
            asked.set()
            api.apply(1, N, deletionPolicy="Retain")
            await asyncio.sleep(1)

    twilio.on_call = note
    await asked.wait()
    await asyncio.sleep(5)
    assert _reads(api)
    assert (api.channel(1) or {})["status"]["observedGeneration"] == 2


@story
async def test_what_happens_during_a_reconcile_is_not_left_to_a_check(
    api: MemoryApi, twilio: Pages, operator: Operator
) -> None:
    """A request that comes while the status is written must not be taken for one that was handled."""
    happened = _in_next_reconcile(api, _rotate)
    api.annotate(1, **{CHECK_NOW_ANNOTATION: "1"})
    await happened.wait()
    await asyncio.sleep(5)
    assert _reads(api) >= 2


@story
async def test_check_asked_for_during_a_reconcile_is_not_taken_for_a_drift_check(
    api: MemoryApi, twilio: Pages, operator: Operator
) -> None:
    """It has to wait, and the status that the reconcile writes then has the version of what is cached."""
    for n in range(301):
        api.annotate(2, **{CHECK_NOW_ANNOTATION: str(n)})
    _edit_status(api)
    asked = asyncio.Event()

    async def during(method: str, path: str) -> None:
        if method == "GET" and path.endswith(sid_of(N).lower()) and not asked.is_set():
            asked.set()
            api.annotate(1, **{CHECK_NOW_ANNOTATION: "now"})

    api.on_call = during
    operator.kube.claims.on_change(Key(NAMESPACE, instance(1)))
    await asked.wait()
    await asyncio.sleep(5)
    assert (api.channel(1) or {})["status"]["lastHandledCheckNow"] == "now"


@story
async def test_reconcile_that_failed_is_not_repeated_as_a_check(
    api: MemoryApi, twilio: Pages, operator: Operator
) -> None:
    failed = asyncio.Event()

    async def fail_once(method: str, path: str) -> None:
        if method == "GET" and path.endswith(sid_of(N).lower()) and not failed.is_set():
            failed.set()
            raise KubernetesUnavailable("the API server answers HTTP 503")

    api.on_call = fail_once
    api.apply(1, N, deletionPolicy="Retain")
    await asyncio.sleep(60)
    assert (api.channel(1) or {})["status"]["observedGeneration"] == 2


@story
async def test_resync_reads_no_channel_that_has_not_changed(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    await operator.controller.resync()
    await asyncio.sleep(5)
    assert not _reads(api)


@story
async def test_secret_that_is_gone_is_forgotten(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    """Anybody who may label Secrets can create and delete them in a loop."""
    for kind in ("ADDED", "DELETED"):
        meta = {"namespace": NAMESPACE, "name": "passing", "resourceVersion": "7"}
        operator.controller.on_secret(kind, {"metadata": meta})
    await asyncio.sleep(5)
    assert Key(NAMESPACE, "passing") not in operator.controller._secrets


@story
async def test_secret_that_is_shown_again_adds_no_channel(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    """As at a start, and whenever its watch begins again."""
    operator.controller.on_secret(None, api.objects["secrets", NAMESPACE, "twilio"])
    await asyncio.sleep(5)
    assert api.calls == []


@story
async def test_what_a_reconcile_writes_is_no_reason_for_another(
    api: MemoryApi, twilio: Pages, operator: Operator
) -> None:
    api.apply(1, N, deletionPolicy="Retain")
    await asyncio.sleep(5)
    api.calls.clear()
    await asyncio.sleep(1.5 * INTERVAL)
    assert not _reads(api)


@story
async def test_deleted_channels_leave_nothing_in_memory(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    """Neither one whose record was deleted before, nor one that waits for the check that was asked for."""
    api.apply(3, N)
    await asyncio.sleep(60)
    for n in range(301):
        api.annotate(1, **{CHECK_NOW_ANNOTATION: str(n)})
    api.annotate(3, **{CHECK_NOW_ANNOTATION: "now"})
    api.delete(3)
    operator.kube.claims.remove(sid_of(M))
    api.delete(2, force=True)
    await asyncio.sleep(60)
    assert {*operator.controller._configured, *operator.controller._dirty} == {Key(NAMESPACE, instance(1))}


@story
async def test_status_that_others_write_during_a_reconcile_is_not_left_to_checks(
    api: MemoryApi, twilio: Pages, operator: Operator
) -> None:
    """The reconcile has read the status before, and no event adds the key for it."""
    happened = _in_next_reconcile(api, _edit_status)
    operator.kube.claims.on_change(Key(NAMESPACE, instance(1)))
    await happened.wait()
    await asyncio.sleep(1.3 * INTERVAL)
    assert (api.channel(1) or {})["status"]["webhookUrl"] == url_of(1)


@story
async def test_account_whose_pages_cannot_be_read_is_checked_number_by_number(
    api: MemoryApi, twilio: Pages, operator: Operator
) -> None:
    """One number that Twilio describes oddly, or a page that takes too long, must not hide the drift of all others."""

    async def fail(kind: str, what: str) -> None:
        if kind == "page":
            raise TwilioUnavailable("Twilio's answer describes no phone number.")

    twilio.on_call = fail
    twilio.change(N, webhook=Webhook(url="https://drift.example.com/", method="POST"))
    await asyncio.sleep(1.3 * INTERVAL)
    assert twilio.webhook(N) == url_of(1)


@story
async def test_record_that_is_gone_is_missed(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    del api.objects["secrets", "sms-operator", sid_of(N).lower()]
    operator.kube.claims.remove(sid_of(N))  # as a resync does
    await asyncio.sleep(1.3 * INTERVAL)
    assert [method for method, path in api.calls if path.endswith("/secrets")] == ["POST"], "it is created again"


@story
async def test_now_and_then_a_quiet_channel_is_reconciled(api: MemoryApi, twilio: Pages, operator: Operator) -> None:
    """In case something happened that no event and no resync shows."""
    await asyncio.sleep(26 * INTERVAL)
    assert 1 <= _reads(api) <= 3


@virtually
async def test_retry_for_an_earlier_channel_of_the_name_is_not_a_check() -> None:
    """At a start it takes two looks to prove that the earlier channel is gone; its successor is configured before."""
    api, twilio = MemoryApi(), Pages(N, M)
    async with running(api, twilio, accounts=cache(twilio), resync=1e9):
        api.apply(1, N)
        await asyncio.sleep(1)
    api.delete(1, force=True)
    api.apply(1, M)
    async with running(api, twilio, accounts=cache(twilio), resync=1e9):
        await asyncio.sleep(30)
        assert api.reason(1) == "Configured"
        assert twilio.webhook(N) == BEFORE
