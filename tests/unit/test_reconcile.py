"""Single reconciles: a real Reconciler over an API server and a Twilio in memory."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from smschannel.api.errors import ChannelError, NotFound, Refused, TwilioThrottled, TwilioTimeout, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.api.resource import CHECK_NOW_ANNOTATION, SmsChannel
from smschannel.core.record import Contents, Key, Login, Webhook
from smschannel.reconcile import Outcome, RequeueRateLimited
from tests.unit.memory import (
    ACCOUNT,
    BEFORE,
    KEYRING,
    NAMESPACE,
    OPERATOR_NAMESPACE,
    START,
    MemoryApi,
    MemoryTwilio,
    Operator,
    instance,
    raising,
    running,
    sid_of,
    url_of,
    virtual_clock,
)
from tests.unit.virtual_time import virtually

N, M = "+61400000001", "+61400000002"


async def reconciled(operator: Operator, api: MemoryApi, n: int = 1, *, deleted: float | None = None) -> Outcome:
    """Reconcile a channel once, as it is now; `deleted`: as if it had been deleted that many seconds ago."""
    body = api.channel(n)
    channel = SmsChannel.model_validate(body) if body else None
    if channel and deleted is not None:
        channel = channel.as_deleted(virtual_clock() - timedelta(seconds=deleted))
    return await operator.reconciler.reconcile(Key(NAMESPACE, instance(n)), channel)


def idle(api: MemoryApi, twilio: MemoryTwilio) -> Operator:
    """An operator whose controller does not run: reconciles are called by the test."""
    return Operator(api, twilio)


async def configured(api: MemoryApi, twilio: MemoryTwilio) -> Operator:
    api.apply(1, N)
    operator = idle(api, twilio)
    await operator.kube.open_keyring([NAMESPACE])
    outcome = await reconciled(operator, api)
    assert outcome.ready is Reason.Configured
    return operator


class DeafTwilio(MemoryTwilio):
    """A Twilio that answers writes with 200 and ignores them."""

    deaf = False

    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Any:
        if not self.deaf:
            return await super().set_webhook(login, account_sid, number_sid, webhook)
        self.writes.append((number_sid, webhook.url))
        return self.numbers[number_sid][1]


@virtually
async def test_twilio_that_does_not_keep_a_restore_does_not_block_the_deletion() -> None:
    api, twilio = MemoryApi(), DeafTwilio(N)
    operator = await configured(api, twilio)
    twilio.deaf = True
    twilio.writes.clear()
    outcome = await reconciled(operator, api, deleted=1)
    assert (outcome.verdict.reason, len(twilio.writes)) == (Reason.Restoring, 1), "set once in a reconcile"
    assert (api.channel(1) or {})["metadata"]["finalizers"]
    await reconciled(operator, api, deleted=121)
    assert (api.channel(1) or {})["metadata"]["finalizers"] == []
    assert api.records()[N].restore_since, "it is still to be restored"


@virtually
async def test_twilio_that_does_not_keep_the_webhook_is_unavailable_not_an_endless_loop() -> None:
    api, twilio = MemoryApi(), DeafTwilio(N)
    api.apply(1, N)
    twilio.deaf = True
    operator = idle(api, twilio)
    await operator.kube.open_keyring([NAMESPACE])
    outcome = await reconciled(operator, api)
    assert outcome.verdict.reason is Reason.TwilioUnavailable
    assert len(twilio.writes) < 10


@virtually
async def test_unreadable_record_names_its_secret() -> None:
    """The reason must not be TokenUnreadable: its remedy, sealing the token again, would not help."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    operator = await configured(api, twilio)
    api.edit_record(N, {"record": "AAAA"})
    twilio.writes.clear()
    outcome = await reconciled(operator, api)
    assert outcome.ready is Reason.RecordUnreadable
    assert sid_of(N).lower() in outcome.verdict.message
    shown = str((api.channel(1) or {})["status"])
    assert Reason.RecordUnreadable.remedy in shown
    assert Reason.TokenUnreadable.remedy not in shown, "one remedy, and not one that does not help"
    assert twilio.writes == []


@pytest.mark.parametrize(
    ("deleted", "at_most", "reason"),
    [
        (None, None, "a channel that is not deleted waits as long as Twilio asks"),
        (1.0, 119.0, "a deletion waits no longer than for its grace period"),
        (119.5, 0.5, "however little is left of it"),
    ],
)
def test_pause_requested_by_twilio_is_returned(deleted: float | None, at_most: float | None, reason: str) -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        operator = await configured(api, twilio)
        twilio.on_call = raising(TwilioThrottled("Twilio answers HTTP 429.", 300))
        outcome = await reconciled(operator, api, deleted=deleted)
        assert isinstance(outcome.requeue, RequeueRateLimited), reason
        assert outcome.requeue.at_least == 300, reason
        assert outcome.requeue.at_most == pytest.approx(at_most, abs=0.2) if at_most else not outcome.requeue.at_most
        assert outcome.pause == 300, "the whole account is paused"
        assert not outcome.twilio_failed, "and its workers are not taken away: Twilio answers"

    story()


@pytest.mark.parametrize("error", [TwilioTimeout("Twilio does not answer."), TwilioUnavailable("HTTP 503.")])
def test_hanging_or_failing_twilio_is_returned_as_failed(error: ChannelError) -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        operator = await configured(api, twilio)
        twilio.on_call = raising(error)
        for deleted in (None, 1):
            outcome = await reconciled(operator, api, deleted=deleted)
            assert (outcome.twilio_failed, outcome.pause) == (True, None)

    story()


@virtually
async def test_unchanged_channel_is_neither_written_nor_reported() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    api.apply(1, N)
    twilio.on_call = raising(Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials."))
    operator = idle(api, twilio)
    await operator.kube.open_keyring([NAMESPACE])
    await reconciled(operator, api)
    writes = [path for method, path in api.calls if method in {"PATCH", "POST"}]
    assert [path.rpartition("/")[2] for path in writes[-2:]] == ["status", "events"]
    api.calls.clear()
    await reconciled(operator, api)
    assert {method for method, _ in api.calls} == {"GET"}


@virtually
async def test_outage_leaves_ready_as_it_is() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    operator = await configured(api, twilio)
    before = (api.channel(1) or {})["status"]
    twilio.on_call = raising(TwilioThrottled("Twilio answers HTTP 429.", 300))
    outcome = await reconciled(operator, api)
    assert (outcome.verdict.reason, outcome.ready) == (Reason.TwilioUnavailable, Reason.Configured)
    assert (api.channel(1) or {})["status"] == before


@virtually
async def test_channel_that_loses_the_race_for_a_number_waits_for_it() -> None:
    """Both have read the number, which has no holder yet: the first POST at the API server wins."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    api.apply(1, N)
    api.apply(2, N)
    operator = idle(api, twilio)
    await operator.kube.open_keyring([NAMESPACE])
    outcomes = await asyncio.gather(reconciled(operator, api, 1), reconciled(operator, api, 2))
    assert sorted(str(outcome.ready.name) for outcome in outcomes if outcome.ready) == ["Configured", "NumberInUse"]
    assert len(twilio.writes) == 1
    assert len(api.records()) == 1


@virtually
async def test_claim_during_the_restore_of_the_former_holder_has_the_previous_webhook() -> None:
    """The number is read while it has the holder's webhook; the record must have the webhook from before that."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    holder = await configured(api, twilio)
    api.apply(2, N)
    other = idle(api, twilio)  # it has not heard of the holder yet
    await other.kube.open_keyring([NAMESPACE])
    restored = False

    async def restore_before_the_claim(method: str, path: str) -> None:
        nonlocal restored
        if method == "POST" and path.endswith("/secrets") and not restored:
            restored = True
            await reconciled(holder, api, 1, deleted=1)

    api.on_call = restore_before_the_claim
    outcome = await reconciled(other, api, 2)
    assert (outcome.ready, twilio.webhook(N)) == (Reason.Configured, url_of(2))
    await reconciled(other, api, 2, deleted=1)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


@virtually
async def test_number_without_a_record_can_be_claimed_if_the_index_is_out_of_date() -> None:
    """Another operator or a user deleted the record: it is read, since the index may be out of date."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    operator = await configured(api, twilio)
    api.apply(2, N)
    del api.objects["secrets", OPERATOR_NAMESPACE, sid_of(N).lower()]
    outcome = await reconciled(operator, api, 2)
    assert outcome.ready is Reason.Configured


# Which login is used for what


def rotate(api: MemoryApi, token: str) -> None:
    place = "secrets", NAMESPACE, "twilio"
    api._store("secrets", {**api.objects[place], "data": {"auth_token": base64.b64encode(token.encode()).decode()}})


class PickyTwilio(MemoryTwilio):
    """A Twilio that accepts only `tokens`."""

    tokens: tuple[str, ...] = ("token",)

    def _check(self, login: Login) -> None:
        if login.token.get_secret_value() not in self.tokens:
            raise Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")

    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Any:
        self._check(login)
        return await super().find_number(login, account_sid, phone_number)

    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Any:
        self._check(login)
        return await super().fetch_number(login, account_sid, number_sid)

    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Any:
        self._check(login)
        return await super().set_webhook(login, account_sid, number_sid, webhook)


@virtually
async def test_refused_newer_token_leaves_the_channel_working_with_the_recorded_one() -> None:
    api, twilio = MemoryApi(), PickyTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        rotate(api, "wrong")
        api.annotate(1, **{CHECK_NOW_ANNOTATION: "now"})
        await asyncio.sleep(5)
        assert api.reason(1) == "TokenRejected"
    assert twilio.webhook(N) == url_of(1)


@virtually
async def test_recorded_login_is_never_used_for_another_number() -> None:
    """A wrong token must not take another number of the account with the right token that is on record."""
    api, twilio = MemoryApi(), PickyTwilio(N, M)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        rotate(api, "wrong")
        api.apply(1, M)
        await asyncio.sleep(5)
        assert api.reason(1) == "AuthenticationFailed"
    assert twilio.webhook(M) == BEFORE
    assert twilio.webhook(N) == url_of(1)


@pytest.mark.parametrize(
    "successor",
    [pytest.param(1, id="a channel of the same name"), pytest.param(2, id="a channel that waits for the number")],
)
def test_login_of_the_channel_restores_if_the_recorded_one_is_revoked(successor: int) -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), PickyTwilio(N)
        async with running(api, twilio):
            api.apply(1, N)
            await asyncio.sleep(1)
            twilio.tokens = ("newer",)
            api.delete(1, force=True)
            await asyncio.sleep(5)
            assert twilio.webhook(N) == url_of(1), "the recorded token is dead"
            rotate(api, "newer")
            api.apply(successor, N)
            await asyncio.sleep(900)
            assert api.reason(successor) == "Configured"
            api.delete(successor)
            await asyncio.sleep(5)
        assert (twilio.webhook(N), api.records()) == (BEFORE, {})

    story()


@virtually
async def test_newest_login_is_recorded_for_all_numbers_of_its_account() -> None:
    api, twilio = MemoryApi(), PickyTwilio(N, M)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        fail = Refused(Reason.WebhookRefused, "Twilio refuses the webhook.")
        twilio.on_call = raising(fail, method="set", path=BEFORE)
        api.apply(1, M)
        await asyncio.sleep(20)
        assert api.records().keys() == {N, M}
        twilio.tokens = ("token", "newer")
        rotate(api, "newer")
        api.annotate(1, **{CHECK_NOW_ANNOTATION: "now"})
        await asyncio.sleep(400)
        twilio.tokens = ("newer",)
        twilio.on_call = raising(fail, method="nothing")
        await asyncio.sleep(400)
        assert api.records().keys() == {M}
    assert (twilio.webhook(N), twilio.webhook(M)) == (BEFORE, url_of(1))


# Crashes


@pytest.mark.parametrize("nth", range(1, 9))
def test_crash_at_any_call_converges(nth: int) -> None:
    """The process dies at its nth call; the next one finishes, and in the end the number is as it was found."""

    class Crashed(BaseException):
        pass

    def crashing() -> Callable[[str, str], Any]:
        calls = 0

        async def on_call(*_: str) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise Crashed

        return on_call

    async def until_crash(operator: Operator, api: MemoryApi, twilio: MemoryTwilio, **how: Any) -> None:
        api.on_call = twilio.on_call = crashing()
        try:
            await reconciled(operator, api, **how)
        except Crashed:
            pass
        finally:
            api.on_call = twilio.on_call = raising(NotFound("never"), method="never")

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        api.apply(1, N)
        first = idle(api, twilio)
        await first.kube.open_keyring([NAMESPACE])
        await until_crash(first, api, twilio)
        async with running(api, twilio):
            await asyncio.sleep(60)
            assert api.reason(1) == "Configured"
            assert twilio.webhook(N) == url_of(1)
        second = idle(api, twilio)
        await second.kube.open_keyring([NAMESPACE])
        for record in api.records().values():
            second.kube.claims.put(record)
        await until_crash(second, api, twilio, deleted=1)
        there = api.channel(1)
        async with running(api, twilio):
            if there:
                api.delete(1)
            await asyncio.sleep(60)
        assert (api.channel(1), twilio.webhook(N), api.records()) == (None, BEFORE, {})

    story()


# Written off


@virtually
async def test_written_off_record_frees_its_number_and_keeps_its_sealed_copy() -> None:
    api, twilio = MemoryApi(), PickyTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        record = api.records()[N]
        twilio.tokens = ("newer",)
        api.delete(1)
        await asyncio.sleep(8 * 86_400)
        assert api.records() == {}
        [copy] = [body for place, body in api.objects.items() if place[2].startswith("written-off-")]
        sealed = base64.b64decode(copy["data"]["record"])
        contents = Contents.decode(KEYRING.unwrap(sealed, record.binding))
        assert contents.previous == Webhook(url=BEFORE, method="POST")
        assert N in copy["metadata"]["annotations"]["channels.hydracore.io/written-off"]
        assert ACCOUNT in copy["metadata"]["annotations"]["channels.hydracore.io/written-off"]
        rotate(api, "newer")
        api.apply(2, N)
        await asyncio.sleep(60)
        assert api.reason(2) == "Configured"
    assert virtual_clock() - START > timedelta(days=8)
