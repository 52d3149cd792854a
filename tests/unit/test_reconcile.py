"""Turns that no Twilio twin can bring about, with ports that do as a test says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

from pydantic import SecretStr

from smschannel.ledger import Claims, Entry, Login, Record, Webhook, WebhookTemplate
from smschannel.plan import Number
from smschannel.reasons import Reason
from smschannel.reconcile import Accounts, Intervals, Key, Kube, Reconciler, Twilio
from smschannel.resource import FINALIZER, SmsChannel
from smschannel.sealing import Keyring, SealingKey

INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
ACCOUNT = "AC" + "0" * 32
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

    async def secret(self, *_: str) -> None:
        return None

    async def load_record(self, _: str) -> Record | None:
        return self.record

    async def save_record(self, record: Record) -> None:
        self.record = record

    async def remove_finalizer(self, _: SmsChannel) -> None:
        self.let_go = True

    async def write_status(self, *_: Any) -> None:
        pass

    async def post_event(self, *_: Any, **__: Any) -> None:
        pass


class _DeafTwilio:
    """Answers 200 to every write, and does nothing."""

    writes = 0

    async def fetch_number(self, *_: Any) -> Number:
        return NUMBER

    async def set_webhook(self, *_: Any) -> Number:
        self.writes += 1
        return NUMBER


def deleted(ago: timedelta) -> SmsChannel:
    return SmsChannel.model_validate(
        {
            "metadata": {
                "name": INSTANCE,
                "namespace": RECORD.namespace,
                "uid": RECORD.uid,
                "creationTimestamp": NOW,
                "deletionTimestamp": NOW - ago,
                "finalizers": [FINALIZER],
            },
            "spec": {
                "accountSid": ACCOUNT,
                "phoneNumber": NUMBER.phone_number,
                "credentials": {"secretKeyRef": {"name": "twilio", "key": "auth_token"}},
            },
        }
    )


async def test_a_twilio_that_does_not_keep_what_is_given_back_does_not_wedge_the_deletion() -> None:
    kube, twilio = _Kube(), _DeafTwilio()
    reconciler = Reconciler(
        cast(Kube, kube),
        cast(Twilio, twilio),
        cast(Accounts, None),
        keyring=Keyring([SealingKey.generate()]),
        template=TEMPLATE,
        claims=Claims(),
        intervals=Intervals(drift=600, slow=1800, deletion_grace=120, release_deadline=3600),
        clock=lambda: NOW,
    )
    key = Key(RECORD.namespace, INSTANCE)
    outcome = await reconciler.reconcile(key, deleted(timedelta(seconds=1)))
    assert (outcome.verdict.reason, twilio.writes, kube.let_go) == (Reason.Releasing, 1, False), "told once in a turn"
    await reconciler.reconcile(key, deleted(timedelta(seconds=121)))
    assert kube.let_go
    assert kube.record
    assert kube.record.entries, "what is owed stays recorded"
