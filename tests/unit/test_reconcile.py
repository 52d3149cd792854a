"""Turns that no Twilio twin can bring about, with ports that do as a test says."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from pydantic import SecretStr

from smschannel.api.errors import ChannelError, Refused, TwilioThrottled, Unreadable
from smschannel.api.reasons import Reason
from smschannel.api.resource import CREDENTIALS_LABEL, FINALIZER, SmsChannel
from smschannel.api.sealing import Keyring, SealingKey
from smschannel.core.plan import Number, Routing
from smschannel.core.record import Age, Claims, Entry, Login, Record, Webhook, WebhookTemplate
from smschannel.reconcile import Accounts, Intervals, Key, Kube, Reconciler, Twilio

INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
ACCOUNT = "AC" + "0" * 32
KEY = Key("sms-channels", INSTANCE)
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TEMPLATE = WebhookTemplate("https://sms.example.com/{instance_id}")
OURS = Webhook(url=TEMPLATE.url(INSTANCE), method="POST")
NUMBER = Number(sid="PN1", phone_number="+61400111222", webhook=OURS, application_sid="", receives_sms=True)
RECORD = Record(
    uid="uid-1",
    namespace="sms-channels",
    name=INSTANCE,
    entries=(
        Entry(
            account_sid=ACCOUNT,
            number_sid=NUMBER.sid,
            phone_number=NUMBER.phone_number,
            login=Login(sid=ACCOUNT, token=SecretStr("token")),
            previous=Webhook(url="", method="POST"),
            wrote=(OURS.url,),
            claimed_at=NOW,
        ),
    ),
)


class _Kube:
    """One record; notes what was done to the channel."""

    def __init__(self) -> None:
        self.record: Record | None = RECORD
        self.let_go = False
        self.broken: Unreadable | None = None
        self.meanwhile: Callable[[], object] = lambda: None
        self.statuses: list[dict[str, Any]] = []
        self.told: list[str] = []

    async def secret(self, _: str, name: str) -> dict[str, Any]:
        meta = {"name": name, "resourceVersion": "1", "labels": {CREDENTIALS_LABEL: "true"}}
        return {"metadata": meta, "data": {"auth_token": "dG9rZW4="}}

    async def load_record(self, _: str) -> Record | None:
        if self.broken:
            raise self.broken
        return self.record

    async def save_record(self, record: Record) -> None:
        self.record = record

    async def remove_finalizer(self, _: SmsChannel) -> None:
        self.let_go = True

    async def add_finalizer(self, _: SmsChannel) -> None:
        self.meanwhile()

    async def write_status(self, _: SmsChannel, status: dict[str, Any]) -> None:
        self.statuses.append(status)

    async def post_event(self, *_: Any, reason: str, **__: Any) -> None:
        self.told.append(reason)


class _DeafTwilio:
    """Answers 200 to every write, and does nothing."""

    writes = 0
    answer: ChannelError | Number = NUMBER

    def forget_refusal(self, *_: Any) -> None:
        pass

    async def find_number(self, *_: Any) -> Number:
        if isinstance(self.answer, ChannelError):
            raise self.answer
        return self.answer

    fetch_number = find_number

    async def set_webhook(self, *_: Any) -> Number:
        self.writes += 1
        return NUMBER


class _Accounts:
    async def routing(self, *_: Any, **__: Any) -> Routing:
        return Routing()


def channel(
    deleted_at: datetime | None = None, *, finalizers: tuple[str, ...] = (FINALIZER,), status: Any = None
) -> SmsChannel:
    return SmsChannel.model_validate(
        {
            "metadata": {
                "name": INSTANCE,
                "namespace": RECORD.namespace,
                "uid": RECORD.uid,
                "creationTimestamp": NOW,
                "deletionTimestamp": deleted_at,
                "finalizers": finalizers,
            },
            "spec": {
                "accountSid": ACCOUNT,
                "phoneNumber": NUMBER.phone_number,
                "credentials": {"secretKeyRef": {"name": "twilio", "key": "auth_token"}},
            },
            "status": status,
        }
    )


def reconciler(kube: _Kube, twilio: _DeafTwilio, claims: Claims[Key] | None = None) -> Reconciler:
    return Reconciler(
        cast(Kube, kube),
        cast(Twilio, twilio),
        cast(Accounts, _Accounts()),
        keyring=Keyring([SealingKey.generate()]),
        template=TEMPLATE,
        claims=Claims() if claims is None else claims,
        intervals=Intervals(drift=600, slow=1800, deletion_grace=120, restore_deadline=3600),
        clock=lambda: NOW,
    )


async def test_a_twilio_that_does_not_keep_what_is_given_back_does_not_wedge_the_deletion() -> None:
    kube, twilio = _Kube(), _DeafTwilio()
    turns = reconciler(kube, twilio)
    outcome = await turns.reconcile(KEY, channel(deleted_at=NOW - timedelta(seconds=1)))
    assert (outcome.verdict.reason, twilio.writes, kube.let_go) == (Reason.Restoring, 1, False), "told once in a turn"
    await turns.reconcile(KEY, channel(deleted_at=NOW - timedelta(seconds=121)))
    assert kube.let_go
    assert kube.record
    assert kube.record.entries, "what is owed stays recorded"


async def test_a_record_that_cannot_be_opened_is_named_to_who_may_mend_it() -> None:
    """To seal the token again, which is the cure for the reason's other causes, would mend nothing."""
    kube, twilio = _Kube(), _DeafTwilio()
    kube.broken = Unreadable("the record was altered")
    outcome = await reconciler(kube, twilio).reconcile(KEY, channel())
    assert outcome.verdict.reason is Reason.TokenUnreadable
    assert f"its Secret {RECORD.uid} must be restored, or deleted" in outcome.verdict.message
    assert twilio.writes == 0


@pytest.mark.parametrize(
    ("deleted", "at_most"),
    [
        pytest.param(None, None, id="a channel that is wanted waits as long as that"),
        pytest.param(1, 119, id="a deletion waits no longer than for its end"),
        pytest.param(121, None, id="and is not in a hurry any more once it is over"),
    ],
)
async def test_the_pause_that_twilio_asks_for_is_kept(deleted: int | None, at_most: float | None) -> None:
    twilio = _DeafTwilio()
    twilio.answer = TwilioThrottled("Twilio answers HTTP 429.", 300)
    since = None if deleted is None else NOW - timedelta(seconds=deleted)
    outcome = await reconciler(_Kube(), twilio).reconcile(KEY, channel(deleted_at=since))
    assert (outcome.again, outcome.at_least, outcome.at_most) == (None, 300, at_most)
    assert outcome.unreachable, "the account's other channels need no worker for it"


async def test_what_did_not_change_is_neither_written_nor_told_again() -> None:
    kube, twilio = _Kube(), _DeafTwilio()
    kube.record, twilio.answer = None, Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")
    turns = reconciler(kube, twilio)
    await turns.reconcile(KEY, channel(), fresh=True)
    [status] = kube.statuses
    await turns.reconcile(KEY, channel(status=status), fresh=True)
    assert (kube.statuses, kube.told) == ([status], ["AuthenticationFailed"])


async def test_during_an_outage_ready_goes_on_to_say_what_works() -> None:
    kube, twilio = _Kube(), _DeafTwilio()
    turns = reconciler(kube, twilio)
    assert (await turns.reconcile(KEY, channel(), fresh=True)).kept is None
    [status] = kube.statuses
    twilio.answer = TwilioThrottled("Twilio answers HTTP 429.", 300)
    outcome = await turns.reconcile(KEY, channel(status=status), fresh=True)
    assert (outcome.verdict.reason, outcome.kept) == (Reason.TwilioUnavailable, Reason.Configured)
    assert kube.statuses == [status]


async def test_an_elder_that_comes_between_reserving_and_keeping_gets_the_number() -> None:
    """Both have seen it; whoever is about to write must ask once more."""
    kube, twilio, claims = _Kube(), _DeafTwilio(), Claims[Key]()
    kube.record = None
    elder = Age(NOW - timedelta(days=1), "uid-0")
    kube.meanwhile = lambda: claims.reserve(NUMBER.sid, elder, elder.uid, Key("sms-channels", "elder"))
    outcome = await reconciler(kube, twilio, claims).reconcile(KEY, channel(finalizers=()))
    assert outcome.verdict.reason is Reason.NumberInUse
    assert (kube.record, twilio.writes) == (None, 0)
    assert claims.holds(elder.uid)
