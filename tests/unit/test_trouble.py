"""Passing trouble is not a verdict: wrong answers of Twilio, a Secret that goes, what Kubernetes refuses.

Controller, reconciler and the real limiter run together, in virtual time, with Twilio and an API server in memory.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from smschannel.api.errors import KubernetesRefused, Refused, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.api.resource import CHECK_NOW_ANNOTATION, CREDENTIALS_LABEL
from smschannel.api.status import condition, rest_status
from smschannel.core.plan import Number
from smschannel.core.record import Login, Webhook
from smschannel.twilio.limits import Limiter
from tests.unit.memory import (
    ACCOUNT,
    BEFORE,
    NAMESPACE,
    OPERATOR_NAMESPACE,
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
from tests.unit.virtual_time import now, virtually

PHONES = [f"+6140000{n:04d}" for n in range(5)]
N, M = PHONES[:2]
CONFIRM = 60.0
SLOW = 1800 * 1.2
"""The longest wait for a slow check."""
REFUSAL = "Twilio refuses the credentials (Twilio answers HTTP 401, code 20003)."
ELSEWHERE = Webhook(url="https://elsewhere.example.com/", method="POST")
SUSPENDED = "The Twilio account is suspended or closed (Twilio answers HTTP 401, code 20005)."


class LimitedTwilio(MemoryTwilio):
    """A Twilio behind the real limiter. It accepts `tokens`; the next `wrong` answers are refusals all the same."""

    def __init__(self, *phones: str) -> None:
        super().__init__(*phones)
        self.tokens = {"token"}
        self.wrong = 0
        self.suspended = False
        self.restart()

    def restart(self) -> None:
        """Forget what the operator's process remembers."""
        self.limiter = Limiter(concurrency=4, refusal_memory=450, confirm_after=CONFIRM, clock=now)

    def forget_refusal(self, login: Login, account_sid: str, *, older_than: float = 0) -> None:
        self.limiter.forget_refusal(login, account_sid, older_than=older_than)

    def trust(self, login: Login, account_sid: str) -> None:
        self.limiter.trust(login, account_sid)

    async def _limited(self, login: Login, account_sid: str, call: Callable[[], Any]) -> Any:
        async with self.limiter.call(login, account_sid):
            if self.wrong:
                self.wrong -= 1
                self.calls += 1
                raise Refused(Reason.AuthenticationFailed, REFUSAL)
            if self.suspended:
                self.calls += 1
                raise Refused(Reason.AccountSuspended, SUSPENDED)
            if login.token.get_secret_value() not in self.tokens:
                self.calls += 1
                raise Refused(Reason.AuthenticationFailed, REFUSAL)
            return await call()

    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None:
        find = super().find_number
        found: Number | None = await self._limited(login, account_sid, lambda: find(login, account_sid, phone_number))
        return found

    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None:
        fetch = super().fetch_number
        found: Number | None = await self._limited(login, account_sid, lambda: fetch(login, account_sid, number_sid))
        return found

    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number:
        write = super().set_webhook
        after: Number = await self._limited(login, account_sid, lambda: write(login, account_sid, number_sid, webhook))
        return after


def rotate(api: MemoryApi, token: str, *, name: str = "twilio") -> None:
    """Write the token into the Secret, as a user does."""
    place = "secrets", NAMESPACE, name
    api._store("secrets", {**api.objects[place], "data": {"auth_token": base64.b64encode(token.encode()).decode()}})
    for controller in api.watchers:
        controller.on_secret("MODIFIED", api.objects[place])


def reasons(api: MemoryApi) -> list[str]:
    return [api.reason(n) for n in range(len(PHONES)) if api.channel(n)]


def statuses(api: MemoryApi) -> list[Any]:
    return [(api.channel(n) or {})["status"] for n in range(len(PHONES))]


def check_all(api: MemoryApi, word: str) -> None:
    for n in range(len(PHONES)):
        api.annotate(n, **{CHECK_NOW_ANNOTATION: word})


# One wrong answer


@pytest.mark.parametrize("restarted", [False, True], ids=["it ran before", "after a restart"])
def test_one_wrong_refusal_changes_no_channel(restarted: bool) -> None:
    """It costs one channel one retry, not its account half an hour."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            for n, phone in enumerate(PHONES):
                api.apply(n, phone)
            await asyncio.sleep(10)
            before = statuses(api)
        if restarted:
            twilio.restart()
        twilio.wrong = 1
        async with running(api, twilio):
            check_all(api, "now")
            await asyncio.sleep(5)
            assert reasons(api) == ["Configured"] * 5
            handled = [each.get("lastHandledCheckNow") for each in statuses(api)]
            assert sorted(map(str, handled)) == ["None", "now", "now", "now", "now"], "four asked Twilio, one waits"
            await asyncio.sleep(CONFIRM + 5)
            assert statuses(api) == [{**each, "lastHandledCheckNow": "now"} for each in before]

    story()


@virtually
async def test_wrong_refusals_for_half_a_minute_change_no_channel() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        for n, phone in enumerate(PHONES):
            api.apply(n, phone)
        await asyncio.sleep(10)
        before = statuses(api)
        twilio.wrong = 1000
        check_all(api, "1")
        await asyncio.sleep(CONFIRM / 2)
        assert reasons(api) == ["Configured"] * 5
        twilio.wrong = 0
        await asyncio.sleep(2 * CONFIRM)
        assert statuses(api) == [{**each, "lastHandledCheckNow": "1"} for each in before]


@pytest.mark.parametrize("suspended", [False, True], ids=["token revoked", "account suspended"])
def test_lasting_refusal_is_reported_within_two_minutes(suspended: bool) -> None:
    """Once it is confirmed, the account's other channels are judged from memory."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            for n, phone in enumerate(PHONES):
                api.apply(n, phone)
            await asyncio.sleep(10)
            twilio.tokens, twilio.suspended = set() if not suspended else twilio.tokens, suspended
            check_all(api, "1")
            await asyncio.sleep(2 * CONFIRM)
            assert reasons(api) == ["AccountSuspended" if suspended else "AuthenticationFailed"] * 5
            twilio.calls = 0
            await asyncio.sleep(200)
            assert twilio.calls == 0, "the refusal is remembered"

    story()


@virtually
async def test_new_channel_is_not_refused_by_one_wrong_answer_about_a_login_that_works() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        twilio.wrong = 1
        api.apply(1, M)
        await asyncio.sleep(5)
        assert api.reason(1) == "TwilioUnavailable"
        await asyncio.sleep(CONFIRM + 5)
        assert reasons(api) == ["Configured"] * 2


@virtually
async def test_wrong_refusal_does_not_make_a_stalled_channel_pending() -> None:
    """What its conditions say is still the last thing that was seen."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        api.apply(1, N)
        await asyncio.sleep(1)
        before = (api.channel(1) or {})["status"]
        twilio.wrong = 1
        api.annotate(1, **{CHECK_NOW_ANNOTATION: "1"})
        await asyncio.sleep(5)
        assert (api.reason(1), (api.channel(1) or {})["status"]) == ("NumberInUse", before)


@virtually
async def test_deletion_after_one_wrong_refusal_restores_in_time() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        twilio.wrong = 1
        api.delete(0)
        await asyncio.sleep(CONFIRM + 5)
        assert api.channel(0) is None
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})
    assert url_of(0) not in twilio.webhook(N)


# What a person changes is asked again


def _edit(api: MemoryApi) -> None:
    api.apply(0, N, driftPolicy="Report")


def _check_now(api: MemoryApi) -> None:
    api.annotate(0, **{CHECK_NOW_ANNOTATION: "1"})


def _write_the_secret_again(api: MemoryApi) -> None:
    rotate(api, "token")


def _create_it_again(api: MemoryApi) -> None:
    api.delete(0)
    api.apply(0, N)


CHANGES = [_edit, _check_now, _write_the_secret_again, _create_it_again]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__).strip("_"))
@pytest.mark.parametrize("suspended", [False, True], ids=["token refused", "account suspended"])
def test_refused_channel_asks_twilio_after_a_change(change: Callable[[MemoryApi], None], suspended: bool) -> None:
    """The account was put right at Twilio, where nobody tells the operator; the person then sends the same again."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            twilio.tokens, twilio.suspended = set(), suspended
            api.apply(0, N)
            await asyncio.sleep(20)
            assert api.reason(0) == "AccountSuspended" if suspended else "AuthenticationFailed"
            twilio.tokens, twilio.suspended = {"token"}, False
            change(api)
            await asyncio.sleep(1)
            assert api.reason(0) == "Configured"

    story()


@virtually
async def test_channel_that_worked_asks_twilio_after_a_change() -> None:
    """The recorded login is asked again, too."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        twilio.tokens = set()
        _check_now(api)
        await asyncio.sleep(2 * CONFIRM)
        assert api.reason(0) == "AuthenticationFailed"
        twilio.tokens = {"token"}
        rotate(api, "wrong")
        await asyncio.sleep(1)
        assert api.reason(0) == "TokenRejected"


@virtually
async def test_many_channels_with_one_refused_token_cost_one_call() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    twilio.tokens = set()
    async with running(api, twilio):
        for n in range(50):
            api.apply(n, N)
            await asyncio.sleep(0.05)
        await asyncio.sleep(5)
    assert {api.reason(n) for n in range(50)} == {"AuthenticationFailed"}
    assert twilio.calls == 1


@virtually
async def test_resync_and_restart_ask_nothing_anew() -> None:
    """A list of Secrets is no change of them."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    twilio.tokens = set()
    api.apply(0, N)
    async with running(api, twilio, resync=20) as operator:
        await asyncio.sleep(10)
        calls = twilio.calls
        operator.controller.on_secret(None, api.objects["secrets", NAMESPACE, "twilio"])
        await asyncio.sleep(200)
        assert twilio.calls == calls


@virtually
async def test_missing_number_that_is_bought_is_found_when_it_is_asked_for() -> None:
    """Otherwise at the next slow check: Twilio tells nobody."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    sold = twilio.numbers.pop(sid_of(N))
    async with running(api, twilio):
        api.apply(0, N)
        api.apply(1, N)
        await asyncio.sleep(1)
        assert reasons(api) == ["NumberNotFound"] * 2
        twilio.numbers[sid_of(N)] = sold
        _check_now(api)
        await asyncio.sleep(1)
        assert reasons(api) == ["Configured", "NumberNotFound"]
        await asyncio.sleep(SLOW)
        assert reasons(api) == ["Configured", "NumberInUse"]


# The Secret goes


def _delete_the_secret(api: MemoryApi) -> None:
    _remove(api, api.objects.pop(("secrets", NAMESPACE, "twilio")))


def _take_its_label(api: MemoryApi) -> None:
    place = "secrets", NAMESPACE, "twilio"
    before = api.objects[place]
    api._store("secrets", {**before, "metadata": {**before["metadata"], "labels": {}}})
    _remove(api, before)  # so the watch of labelled Secrets shows it


def _remove(api: MemoryApi, secret: Any) -> None:
    for controller in api.watchers:
        controller.on_secret("DELETED", secret)


def _rename_its_key(api: MemoryApi) -> None:
    place = "secrets", NAMESPACE, "twilio"
    api._store("secrets", {**api.objects[place], "data": {"token": "dG9rZW4="}})
    for controller in api.watchers:
        controller.on_secret("MODIFIED", api.objects[place])


def _cut_the_sealed_token(api: MemoryApi) -> None:
    api.apply(0, N, credentials={"sealed": "A" * 1528})


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (_delete_the_secret, "SecretNotFound"),
        (_take_its_label, "SecretNotLabelled"),
        (_rename_its_key, "SecretKeyMissing"),
        (_cut_the_sealed_token, "TokenUnreadable"),
    ],
)
@pytest.mark.parametrize("restarted", [False, True], ids=["it ran before", "after a restart"])
def test_channel_goes_on_with_the_recorded_login_when_its_credentials_go(
    how: Callable[[MemoryApi], None], reason: str, restarted: bool
) -> None:
    """It is looked after as before: drift is corrected, and the deletion restores its number."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            api.apply(0, N)
            await asyncio.sleep(1)
            if not restarted:
                how(api)
            await asyncio.sleep(5)
        if restarted:
            how(api)
        async with running(api, twilio):
            await asyncio.sleep(750)
            status = (api.channel(0) or {})["status"]
            found = {each["type"]: each["status"] for each in status["conditions"]}
            assert (api.reason(0), rest_status(status)) == (reason, "degraded")
            assert found == {
                "Ready": "True",
                "Stalled": "True",
                "CredentialsValid": "False",
                "WebhookEffective": "True",
            }
            twilio.numbers[sid_of(N)] = ACCOUNT, replace(twilio.numbers[sid_of(N)][1], webhook=ELSEWHERE)
            await asyncio.sleep(750)
            assert twilio.webhook(N) == url_of(0), "drift is corrected"
            assert (api.channel(0) or {})["status"] == status
            api.delete(0)
            await asyncio.sleep(5)
        assert (twilio.webhook(N), api.records()) == (BEFORE, {})

    story()


@virtually
async def test_nothing_is_asserted_once_the_recorded_login_is_refused_too() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        _delete_the_secret(api)
        await asyncio.sleep(1)
        twilio.tokens = set()
        await asyncio.sleep(900)
        status = (api.channel(0) or {})["status"]
        found = {each["type"]: each["status"] for each in status["conditions"]}
        assert (api.reason(0), rest_status(status)) == ("SecretNotFound", "pending")
        assert found == {
            "Ready": "False",
            "Reconciling": "True",
            "CredentialsValid": "False",
            "WebhookEffective": "Unknown",
        }


@virtually
async def test_channel_without_a_record_waits_for_its_secret() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        secret = api.objects["secrets", NAMESPACE, "twilio"]
        _delete_the_secret(api)
        api.apply(0, N)
        await asyncio.sleep(5)
        assert rest_status((api.channel(0) or {})["status"]) == "pending"
        api._store("secrets", secret)
        for controller in api.watchers:
            controller.on_secret("ADDED", secret)
        await asyncio.sleep(1)
        assert api.reason(0) == "Configured"


@virtually
async def test_missing_secret_does_not_give_another_number_to_the_recorded_login() -> None:
    """The recorded login stands in only for the number that the channel holds."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        _delete_the_secret(api)
        api.apply(0, M)
        await asyncio.sleep(5)
        assert api.reason(0) == "SecretNotFound"
    assert (twilio.webhook(M), twilio.webhook(N)) == (BEFORE, url_of(0))


@pytest.mark.parametrize("how", [_delete_the_secret, lambda api: api.apply(0, N, suspend=True)])
def test_drift_during_a_time_without_checks_is_reported_afterwards(how: Callable[[MemoryApi], None]) -> None:
    """The status still knows that the webhook had been set, although it asserts nothing about it."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            api.apply(0, N, driftPolicy="Report")
            await asyncio.sleep(1)
            twilio.tokens = set()
            how(api)
            await asyncio.sleep(900)
            effective = condition((api.channel(0) or {})["status"], "WebhookEffective")
            assert (effective or {})["status"] == "Unknown"
            twilio.numbers[sid_of(N)] = (
                ACCOUNT,
                replace(twilio.numbers[sid_of(N)][1], webhook=Webhook(url=BEFORE, method="POST")),
            )
            twilio.tokens = {"token"}
            api.apply(0, N, driftPolicy="Report", deletionPolicy="Clear")
            await asyncio.sleep(5)
            assert twilio.webhook(N) == BEFORE
            effective = condition((api.channel(0) or {})["status"], "WebhookEffective")
            assert (effective or {})["reason"] == "UrlMismatch"

    story()


# What Kubernetes refuses


FORBIDDEN = KubernetesRefused(403, 'admission webhook "policy.example.com" denied the request: no')
QUOTA = KubernetesRefused(403, 'secrets "pn" is forbidden: exceeded quota: compute, requested: count/secrets=1')
NO_RIGHT = KubernetesRefused(403, 'secrets "twilio" is forbidden: User "operator" cannot get resource "secrets"')
_FINALIZER = {"method": "PATCH", "path": f"{instance(0)}"}
_RECORD = {"method": "POST", "path": f"{OPERATOR_NAMESPACE}/secrets"}
_SECRET = {"method": "GET", "path": f"{NAMESPACE}/secrets/twilio"}


def _refusing(error: KubernetesRefused, *, method: str, path: str) -> Any:
    """Refuse a call, but for status and Events."""

    async def on_call(its_method: str, its_path: str) -> None:
        if its_method == method and path in its_path and not its_path.endswith(("/status", "/events")):
            raise error

    return on_call


def _count(api: MemoryApi, operator: Operator) -> dict[str, int]:
    return {reason.name: count for reason, count in operator.channels.reasons.items() if count}


@pytest.mark.parametrize(
    ("error", "call"),
    [
        pytest.param(FORBIDDEN, _FINALIZER, id="a policy refuses the finalizer"),
        pytest.param(QUOTA, _RECORD, id="a quota refuses the record"),
        pytest.param(NO_RIGHT, _SECRET, id="a RoleBinding is missing"),
    ],
)
def test_what_kubernetes_refuses_is_the_reason_in_its_words(error: KubernetesRefused, call: dict[str, str]) -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio) as operator:
            api.on_call = _refusing(error, **call)
            api.apply(0, N)
            await asyncio.sleep(10)
            status = (api.channel(0) or {})["status"]
            ready = condition(status, "Ready")
            assert ready
            assert (ready["status"], ready["reason"]) == ("False", "KubernetesRefused")
            assert str(error) in ready["message"]
            assert condition(status, "Reconciling")
            assert (rest_status(status), _count(api, operator)) == ("pending", {"KubernetesRefused": 1})
            assert events(api)[0] == "KubernetesRefused"
            api.calls.clear()
            await asyncio.sleep(60)
            assert {method for method, path in api.calls if path.endswith(("/status", "/events"))} == set()
            api.on_call = at_once
            await asyncio.sleep(300)
            assert api.reason(0) == "Configured"
            assert _count(api, operator) == {"Configured": 1}

    story()


def events(api: MemoryApi) -> list[str]:
    """Return the reasons of the Events that were posted."""
    return [body["reason"] for body in api.events]


@virtually
async def test_kubernetes_that_refuses_for_some_seconds_changes_no_ready() -> None:
    """An API server that has just started does not know the operator's rights yet."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        before = (api.channel(0) or {})["status"]
        api.on_call = _refusing(NO_RIGHT, **_SECRET)
        rotate(api, "token")
        await asyncio.sleep(20)
        assert api.reason(0) == "Configured"
        assert (condition((api.channel(0) or {})["status"], "Reconciling") or {})["reason"] == "KubernetesRefused"
        api.on_call = at_once
        await asyncio.sleep(60)
        assert (api.channel(0) or {})["status"] == before
        api.on_call = _refusing(NO_RIGHT, **_SECRET)
        rotate(api, "token")
        await asyncio.sleep(400)
        assert api.reason(0) == "KubernetesRefused"


@virtually
async def test_refused_status_is_counted_and_posted_as_an_event() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio) as operator:
        api.on_call = raising(FORBIDDEN, method="PATCH", path="/status")
        api.apply(0, N)
        await asyncio.sleep(5)
        assert api.reason(0) == ""
        assert _count(api, operator) == {"KubernetesRefused": 1}
        assert set(events(api)) == {"KubernetesRefused"}
        api.on_call = at_once
        await asyncio.sleep(300)
        assert api.reason(0) == "Configured"


@virtually
async def test_refused_end_of_a_deletion_is_retried_with_backoff() -> None:
    """It ends with its grace period all the same; after that nothing may be called every second for good."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        api.on_call = _refusing(FORBIDDEN, method="DELETE", path="secrets")
        api.delete(0)
        await asyncio.sleep(900)
        assert api.channel(0) is None
        api.calls.clear()
        await asyncio.sleep(600)
        assert 0 < len([method for method, _ in api.calls if method == "DELETE"]) < 20
        api.on_call = at_once
        await asyncio.sleep(301)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


@virtually
async def test_refusal_about_a_predecessor_is_reported_on_its_successor() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        api.on_call = _refusing(FORBIDDEN, method="DELETE", path="secrets")
        api.delete(0, force=True)
        api.apply(0, N)
        await asyncio.sleep(20)
        assert api.reason(0) == "KubernetesRefused"
        api.on_call = at_once
        await asyncio.sleep(300)
        assert api.reason(0) == "Configured"


@virtually
async def test_lost_right_on_all_channels_is_logged_and_survived() -> None:
    """The operator's own token expired, for example: nothing can be reported, and nothing ends."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio) as operator:
        api.apply(0, N)
        await asyncio.sleep(1)
        api.on_call = raising(KubernetesRefused(401, "Unauthorized"))
        api.apply(1, M)
        api.annotate(0, **{CHECK_NOW_ANNOTATION: "1"})
        await asyncio.sleep(400)
        assert _count(api, operator) == {"KubernetesRefused": 2}
        api.on_call = at_once
        await asyncio.sleep(400)
        assert reasons(api) == ["Configured"] * 2


# A holder that Twilio refuses


HOUR = 3600.0


def _waiting(api: MemoryApi, word: str = "newer") -> None:
    """Create channel 1, whose token is `word`, for the number of channel 0."""
    meta = {"name": "newer", "namespace": NAMESPACE, "labels": {CREDENTIALS_LABEL: "true"}}
    data = {"auth_token": base64.b64encode(word.encode()).decode()}
    api._store("secrets", {"metadata": meta, "data": data})
    api.apply(1, N, credentials={"secretKeyRef": {"name": "newer", "key": "auth_token"}})


def _message(api: MemoryApi, n: int) -> str:
    return str((condition((api.channel(n) or {})["status"], "Ready") or {})["message"])


@pytest.mark.parametrize("restarted", [False, True], ids=["it runs on", "with a restart every 20 minutes"])
@pytest.mark.parametrize("policy", ["Restore", "Retain"])
def test_holder_that_twilio_refuses_for_an_hour_yields_to_a_verified_waiter(restarted: bool, policy: str) -> None:
    """Its token was rotated away; the account's owner made a new channel. An Event tells each of them."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            api.apply(0, N, deletionPolicy=policy)
            await asyncio.sleep(1)
            twilio.tokens = {"newer"}
            _waiting(api)
            _check_now(api)
            await asyncio.sleep(CONFIRM * 2)
            assert reasons(api) == ["AuthenticationFailed", "NumberInUse"]
            assert api.records()[N].unseen_since
        for _ in range(5):  # 100 minutes
            if restarted:
                twilio.restart()
            async with running(api, twilio):
                await asyncio.sleep(HOUR / 3)
            held = api.records()[N].name
            elapsed = now()
            if elapsed < HOUR:
                assert (held, twilio.webhook(N)) == (instance(0), url_of(0)), elapsed
        assert reasons(api) == ["AuthenticationFailed", "Configured"]
        assert (api.records()[N].name, twilio.webhook(N)) == (instance(1), url_of(1))
        assert "serves another channel now" in _message(api, 0)
        about = {(body["reason"], body["regarding"]["namespace"], body["regarding"]["name"]) for body in api.events}
        assert {
            ("ClaimLost", NAMESPACE, instance(0)),
            ("ClaimFreed", NAMESPACE, instance(1)),
            ("ClaimMoved", OPERATOR_NAMESPACE, sid_of(N).lower()),
        } <= about
        notes = {body["reason"]: body["note"] for body in api.events}
        assert instance(1) not in notes["ClaimLost"], "another tenant's name"
        assert instance(0) not in notes["ClaimFreed"], "another tenant's name"
        assert instance(0) in notes["ClaimMoved"]
        assert instance(1) in notes["ClaimMoved"]
        async with running(api, twilio):
            status = (api.channel(0) or {})["status"]
            await asyncio.sleep(HOUR)
            assert (api.channel(0) or {})["status"] == status, "it is reported once"
            api.delete(0)
            api.delete(1)
            await asyncio.sleep(10)
        assert api.records() == {}
        assert twilio.webhook(N) == (BEFORE if policy == "Restore" else url_of(1))

    story()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        pytest.param(lambda api, twilio: rotate(api, "another"), "Configured", id="a token that works is given to it"),
        pytest.param(lambda api, twilio: twilio.tokens.add("token"), "", id="its token works again"),
        pytest.param(lambda api, twilio: setattr(twilio, "on_call", _down), "", id="Twilio is down"),
    ],
)
def test_holder_whose_login_works_within_the_hour_keeps_its_number(how: Any, reason: str) -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            api.apply(0, N)
            await asyncio.sleep(1)
            twilio.tokens = {"newer", "another"}
            _waiting(api)
            _check_now(api)
            await asyncio.sleep(HOUR - 200)
            assert reasons(api) == ["AuthenticationFailed", "NumberInUse"]
            how(api, twilio)
            await asyncio.sleep(HOUR)
            assert api.records()[N].name == instance(0)
            assert twilio.webhook(N) == url_of(0)
            assert reason in {"", api.reason(0)}

    story()


async def _down(*_: str) -> None:
    raise TwilioUnavailable("Twilio answers HTTP 503, code 20503.")


@pytest.mark.parametrize("token", ["wrong", "token"])
def test_waiter_that_twilio_refuses_takes_nothing(token: str) -> None:
    """A wrong token, or one that stopped to work while the channel waits."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            api.apply(0, N)
            await asyncio.sleep(1)
            _waiting(api, token)
            await asyncio.sleep(1)
            twilio.tokens = set()
            check_now = {CHECK_NOW_ANNOTATION: "1"}
            api.annotate(0, **check_now)
            api.annotate(1, **check_now)
            await asyncio.sleep(4 * HOUR)
            assert api.records()[N].name == instance(0)
            assert twilio.webhook(N) == url_of(0)

    story()


@virtually
async def test_suspended_account_keeps_its_number() -> None:
    """Twilio knows the login: only credentials that it does not accept at all lose a number."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        _waiting(api, "token")
        await asyncio.sleep(1)
        twilio.suspended = True
        check = {CHECK_NOW_ANNOTATION: "1"}
        api.annotate(0, **check)
        await asyncio.sleep(4 * HOUR)
        assert (api.reason(0), api.records()[N].name) == ("AccountSuspended", instance(0))
        assert api.records()[N].unseen_since is None


@virtually
async def test_holder_that_waits_for_another_number_yields_its_former_one() -> None:
    """Its login works, but at another account; it would keep the number until it gets the one that it waits for."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    another = "AC" + "1" * 32
    twilio.numbers[sid_of(M)] = another, twilio.numbers[sid_of(M)][1]
    async with running(api, twilio):
        api.apply(0, N)
        api.apply(2, M, accountSid=another)
        await asyncio.sleep(1)
        twilio.tokens = {"newer", "theirs"}
        rotate(api, "theirs")
        api.apply(0, M, accountSid=another)
        _waiting(api)
        await asyncio.sleep(600)
        assert reasons(api) == ["NumberInUse", "NumberInUse", "Configured"]
        await asyncio.sleep(HOUR + SLOW)
        assert reasons(api) == ["NumberInUse", "Configured", "Configured"]
        assert twilio.webhook(N) == url_of(1)


@virtually
async def test_number_that_left_the_account_goes_to_a_waiter_of_its_new_account() -> None:
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    another = "AC" + "1" * 32
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        twilio.numbers[sid_of(N)] = another, twilio.numbers[sid_of(N)][1]
        api.apply(1, N, accountSid=another)
        _check_now(api)
        await asyncio.sleep(10)
        assert reasons(api) == ["NumberNotFound", "NumberInUse"]
        await asyncio.sleep(HOUR + SLOW)
        assert reasons(api) == ["NumberNotFound", "Configured"]
        assert twilio.webhook(N) == url_of(1)
        api.delete(1)
        await asyncio.sleep(10)
    assert twilio.webhook(N) == BEFORE


@virtually
async def test_holder_that_moved_on_keeps_nobody_waiting_for_its_former_number() -> None:
    """The former number's token was rotated away: the waiter's login restores it at once."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    another = "AC" + "1" * 32
    twilio.numbers[sid_of(M)] = another, twilio.numbers[sid_of(M)][1]
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        twilio.tokens = {"newer", "theirs"}
        rotate(api, "theirs")
        api.apply(0, M, accountSid=another)
        _waiting(api)
        await asyncio.sleep(CONFIRM * 2)
        await asyncio.sleep(600)
        assert reasons(api) == ["Configured", "Configured"]
        assert (twilio.webhook(N), twilio.webhook(M)) == (url_of(1), url_of(0))


@virtually
async def test_waiter_that_comes_after_the_hour_gets_the_number_at_once() -> None:
    """Not at the holder's next slow check."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        twilio.tokens = {"newer"}
        _check_now(api)
        await asyncio.sleep(3 * HOUR)
        assert api.records()[N].unseen_since
        _waiting(api)
        await asyncio.sleep(60)
        assert reasons(api) == ["AuthenticationFailed", "Configured"]


@virtually
async def test_waiter_that_comes_within_the_hour_asks_the_holder_once_each() -> None:
    """Holder and waiter must not keep each other busy."""
    api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        twilio.tokens = {"newer"}
        _check_now(api)
        await asyncio.sleep(600)
        _waiting(api)
        await asyncio.sleep(5)
        twilio.calls = 0
        await asyncio.sleep(600)
        assert twilio.calls < 10
        assert reasons(api) == ["AuthenticationFailed", "NumberInUse"]


@pytest.mark.parametrize(
    ("policy", "gets"), [("Restore", False), ("Clear", True), ("Retain", True)], ids=lambda each: str(each)
)
def test_waiter_that_takes_unused_numbers_only_costs_no_holder_its_number_for_nothing(policy: str, gets: bool) -> None:
    """Restored, the number points where it did before the holder had it; such a waiter would not take it."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), LimitedTwilio(*PHONES)
        async with running(api, twilio):
            api.apply(0, N, deletionPolicy=policy)
            await asyncio.sleep(1)
            twilio.tokens = {"newer"}
            _waiting(api)
            credentials = {"secretKeyRef": {"name": "newer", "key": "auth_token"}}
            api.apply(1, N, credentials=credentials, takeoverPolicy="IfUnused")
            _check_now(api)
            await asyncio.sleep(2 * HOUR)
            assert api.reason(1) == ("Configured" if gets else "NumberInUse")
            assert api.records()[N].name == instance(1 if gets else 0)
            assert twilio.webhook(N) == url_of(1 if gets else 0)

    story()


# Channels from before the current rules


@virtually
async def test_channel_that_breaks_the_rules_says_so_and_keeps_its_number() -> None:
    """It was created before the CRD had the rule. What it breaks is in its status, not in a log only."""
    api, twilio = MemoryApi(), MemoryTwilio(*PHONES)
    async with running(api, twilio) as operator:
        api.apply(0, N)
        await asyncio.sleep(1)
        api.apply(0, "0400 111 222", takeoverPolicy="Sometimes")
        await asyncio.sleep(1)
        assert api.reason(0) == "InvalidSpec"
        for part in ("spec.phoneNumber: phoneNumber is in E.164", "spec.takeoverPolicy", "Correct what the message"):
            assert part in _message(api, 0)
        status = (api.channel(0) or {})["status"]
        assert status["observedGeneration"] == 2
        assert (condition(status, "WebhookEffective") or {})["status"] == "Unknown", "nothing looks at it"
        assert _count(api, operator) == {"InvalidSpec": 1}
        assert (twilio.webhook(N), api.records()[N].name) == (url_of(0), instance(0))
        await asyncio.sleep(4 * HOUR)
        assert (api.channel(0) or {})["status"] == status, "it is reported once"
        api.apply(0, N)
        await asyncio.sleep(1)
        assert api.reason(0) == "Configured"


@virtually
async def test_channel_whose_name_breaks_the_rules_says_so() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(*PHONES)
    async with running(api, twilio):
        there = api.apply(0, N)
        meta = {"name": "by-hand", "namespace": NAMESPACE, "generation": 1, "creationTimestamp": "2025-01-01T00:00:00Z"}
        api._store("smschannels", {"metadata": meta, "spec": there["spec"], "status": {}}, "ADDED")
        await asyncio.sleep(5)
        status = api.objects["smschannels", NAMESPACE, "by-hand"]["status"]
        assert "its instance's id" in str(condition(status, "Ready"))
        assert api.reason(0) == "Configured"


@virtually
async def test_token_in_the_wrong_field_of_an_old_channel_is_not_repeated() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, "5d41402abc4b2a76b9719d911017c592", credentials={"sealed": "5d41402abc4b2a76b9719d911017c592"})
        await asyncio.sleep(5)
        assert api.reason(0) == "InvalidSpec"
        assert "5d41402a" not in str((api.channel(0) or {})["status"]) + str(api.events)


@virtually
async def test_invalid_channel_can_be_deleted() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(*PHONES)
    async with running(api, twilio):
        api.apply(0, N)
        await asyncio.sleep(1)
        api.apply(0, "no number")
        await asyncio.sleep(1)
        api.delete(0)
        await asyncio.sleep(60)
        assert api.channel(0) is None
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})
