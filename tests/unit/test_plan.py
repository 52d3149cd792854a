"""What is decided, row by row: plan.py's table with an observation, the changes asked for, and what people are told.

At the end: whatever was observed, doing what is planned comes to an end, in the safe order, and never writes twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from smschannel.api.errors import ChannelError, Refused, TwilioUnavailable, Unreadable
from smschannel.api.reasons import Reason
from smschannel.api.resource import DeletionPolicy, DriftPolicy, SmsChannel, TakeoverPolicy
from smschannel.core.plan import (
    AddFinalizer,
    Change,
    Debt,
    Desired,
    DropRecord,
    GiveBack,
    Number,
    Observed,
    RemoveFinalizer,
    Routing,
    SaveRecord,
    SetWebhook,
    WriteOff,
    desired,
    foresee,
    plan,
)
from smschannel.core.record import Entry, Login, Record, Webhook, WebhookTemplate

ACCOUNT = "AC" + "0" * 32
OTHER_ACCOUNT = "AC" + "1" * 32
INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
OTHER_INSTANCE = "00000000-0000-4000-8000-000000000000"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EARLIER = NOW - timedelta(days=9)

TEMPLATE = WebhookTemplate("https://sms.example.com/{instance_id}/sms", ("https://old.example.com/{instance_id}",))
OURS = Webhook(url=TEMPLATE.url(INSTANCE), method="POST")
OURS_GET = Webhook(url=OURS.url, method="GET")
ANOTHER_INSTANCE = Webhook(url=TEMPLATE.url(OTHER_INSTANCE), method="POST")
DEMO = Webhook(url="https://demo.twilio.com/welcome/sms/reply", method="POST")
FORMER = Webhook(url=f"https://old.example.com/{INSTANCE}", method="POST")
BEFORE = Webhook(url="https://before.example.com/sms", method="GET")
ELSEWHERE = Webhook(url="https://elsewhere.example.com/", method="POST")
UNUSED = Webhook(url="", method="POST")

LOGIN = Login(sid=ACCOUNT, token=SecretStr("first"))
NEWER = Login(sid=ACCOUNT, token=SecretStr("second"))
OTHER_LOGIN = Login(sid=OTHER_ACCOUNT, token=SecretStr("other"))

WANT = Desired(
    account_sid=ACCOUNT,
    phone_number="+61400111222",
    webhook=OURS,
    suspend=False,
    takeover_policy=TakeoverPolicy.ALWAYS,
    drift_policy=DriftPolicy.CORRECT,
    deletion_policy=DeletionPolicy.RESTORE,
)
NUMBER = Number(sid="PN1", phone_number=WANT.phone_number, webhook=BEFORE, application_sid="", receives_sms=True)
ENTRY = Entry(
    account_sid=ACCOUNT,
    number_sid="PN1",
    phone_number=WANT.phone_number,
    login=LOGIN,
    previous=BEFORE,
    wrote=(OURS.url,),
    claimed_at=NOW,
)
OLD_ENTRY = ENTRY.model_copy(update={"number_sid": "PN0", "phone_number": "+61400000000"})
EMPTY = Record(uid="uid-1", namespace="sms-channels", name=INSTANCE)
RECORD = EMPTY.model_copy(update={"source": "sealed", "entries": (ENTRY,)})
MOVED = RECORD.model_copy(update={"entries": (OLD_ENTRY, ENTRY)})
DOWN = TwilioUnavailable("Twilio answers HTTP 503.")
TAKEN = Refused(Reason.NumberInUse, "+61400111222 already serves another channel.")
DENIED = Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")
SEALED_AWAY = Unreadable("the record cannot be opened")

NEW = Observed(record=EMPTY, login=LOGIN, source="sealed", number=NUMBER)
SET = replace(NEW, record=RECORD, stored=True, finalizer=True, number=replace(NUMBER, webhook=OURS))
GOING = Observed(record=RECORD, stored=True, finalizer=True, debts={"PN1": replace(NUMBER, webhook=OURS)})
SET_IT = SetWebhook(LOGIN, ACCOUNT, "PN1", OURS)


def at(webhook: Webhook, sid: str = "PN1") -> Number:
    return replace(NUMBER, sid=sid, webhook=webhook)


def kept(record: Record = RECORD, **changed: object) -> Record:
    return record.model_copy(update=changed)


def owing(entry: Entry = ENTRY, **changed: object) -> Record:
    return kept(entries=(entry.model_copy(update=changed),))


@dataclass(frozen=True)
class Row:
    reason: str
    want: Desired | None
    seen: Observed
    changes: tuple[Change, ...]
    told: Reason
    effective: str = ""


CREATED = (
    Row(
        "a number is taken over only after a finalizer and a record of what was there",
        WANT,
        NEW,
        (AddFinalizer(), SaveRecord(RECORD), SET_IT),
        Reason.Configured,
    ),
    Row(
        "an empty webhook is a previous one like any other: Restore empties it again",
        WANT,
        replace(NEW, number=at(UNUSED)),
        (AddFinalizer(), SaveRecord(owing(previous=UNUSED)), SET_IT),
        Reason.Configured,
    ),
    Row(
        "after a crash behind the finalizer, record and webhook follow",
        WANT,
        replace(NEW, finalizer=True),
        (SaveRecord(RECORD), SET_IT),
        Reason.Configured,
    ),
    Row(
        "after a crash behind the record, the webhook alone follows, and what was there before stays known",
        WANT,
        replace(SET, number=NUMBER),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "after a crash behind the webhook nothing is left to do",
        WANT,
        SET,
        (),
        Reason.Configured,
    ),
    Row(
        "a finalizer that somebody took off comes back",
        WANT,
        replace(SET, finalizer=False),
        (AddFinalizer(),),
        Reason.Configured,
    ),
    Row(
        "a number that points at us without a record has an unknown previous webhook, not ours",
        WANT,
        replace(NEW, number=at(OURS)),
        (AddFinalizer(), SaveRecord(owing(previous=None))),
        Reason.Configured,
    ),
    Row(
        "another instance's webhook is ours too, and nobody's previous one",
        WANT,
        replace(NEW, number=at(ANOTHER_INSTANCE)),
        (AddFinalizer(), SaveRecord(owing(previous=None)), SET_IT),
        Reason.Configured,
    ),
    Row(
        "what a former template made is ours too",
        WANT,
        replace(NEW, number=at(FORMER)),
        (AddFinalizer(), SaveRecord(owing(previous=None)), SET_IT),
        Reason.Configured,
    ),
    Row(
        "nothing is decided about a number that nobody looked at",
        WANT,
        replace(NEW, number=None),
        (),
        Reason.Pending,
    ),
)

CHANGED = (
    Row(
        "a changed template keeps the previous webhook and every URL that we wrote",
        WANT,
        replace(SET, record=owing(wrote=(FORMER.url,)), number=at(FORMER), was_named=True),
        (SaveRecord(owing(wrote=(FORMER.url, OURS.url))), SET_IT),
        Reason.Configured,
    ),
    Row(
        "a template that comes back is not noted twice",
        WANT,
        replace(SET, record=owing(wrote=(OURS.url, FORMER.url)), number=at(FORMER)),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "drift is corrected, and the drifted webhook is never taken for the previous one",
        WANT,
        replace(SET, number=at(ELSEWHERE), was_configured=True),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "driftPolicy Report leaves a drifted webhook alone and says so",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, number=at(ELSEWHERE), was_configured=True),
        (),
        Reason.WebhookDrifted,
        "UrlMismatch",
    ),
    Row(
        "a foreign webhook is only reported also when the template changes, or the number was away for a while",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, record=owing(wrote=(FORMER.url,)), number=at(ELSEWHERE), was_named=True),
        (SaveRecord(owing(wrote=(FORMER.url, OURS.url))),),
        Reason.WebhookDrifted,
        "UrlMismatch",
    ),
    Row(
        "driftPolicy Report does not keep a channel from moving over to a changed template",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, record=owing(wrote=(FORMER.url,)), number=at(FORMER), was_named=True),
        (SaveRecord(owing(wrote=(FORMER.url, OURS.url))), SET_IT),
        Reason.Configured,
    ),
    Row(
        "nor from taking a number over that another of our instances had",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, record=owing(previous=None), number=at(ANOTHER_INSTANCE), was_named=True),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "nor does what was changed between the record and the first configuration, which a crash came between",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, number=at(ELSEWHERE)),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "driftPolicy Report does not keep a channel from its first configuration",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, number=NUMBER),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "our URL with another method is drift too, since Twilio would call it in another way",
        WANT,
        replace(SET, number=at(OURS_GET), was_configured=True),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "a report of drift tells a method from a URL",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, number=at(OURS_GET), was_configured=True),
        (),
        Reason.WebhookDrifted,
        "MethodMismatch",
    ),
    Row(
        "IfUnused leaves a number alone that points elsewhere, before any finalizer or record",
        replace(WANT, takeover_policy=TakeoverPolicy.IF_UNUSED),
        NEW,
        (),
        Reason.WebhookForeign,
        "ForeignUrl",
    ),
    Row(
        "IfUnused takes a number that points nowhere",
        replace(WANT, takeover_policy=TakeoverPolicy.IF_UNUSED),
        replace(NEW, number=at(UNUSED)),
        (AddFinalizer(), SaveRecord(owing(previous=UNUSED)), SET_IT),
        Reason.Configured,
    ),
    Row(
        "IfUnused takes a number that still points where a former template sent it: that was us",
        replace(WANT, takeover_policy=TakeoverPolicy.IF_UNUSED),
        replace(NEW, number=at(FORMER)),
        (AddFinalizer(), SaveRecord(owing(previous=None)), SET_IT),
        Reason.Configured,
    ),
    Row(
        "IfUnused takes a number that Twilio's demo answers, as it does for every new one",
        replace(WANT, takeover_policy=TakeoverPolicy.IF_UNUSED),
        replace(NEW, number=at(DEMO)),
        (AddFinalizer(), SaveRecord(owing(previous=DEMO)), SET_IT),
        Reason.Configured,
    ),
    Row(
        "IfUnused is asked at the first claim only: later a foreign webhook is drift",
        replace(WANT, takeover_policy=TakeoverPolicy.IF_UNUSED),
        replace(SET, number=at(ELSEWHERE), was_configured=True),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "an application takes the messages: the webhook is ours all the same, and the channel says it is not used",
        WANT,
        replace(SET, number=replace(at(OURS), application_sid="AP1")),
        (),
        Reason.WebhookOverridden,
        "OverriddenByApplication",
    ),
    Row(
        "a Messaging Service takes the messages: the same",
        WANT,
        replace(SET, routing=Routing(service_sid="MG1")),
        (),
        Reason.WebhookOverridden,
        "OverriddenByMessagingService",
    ),
    Row(
        "who may not read Messaging Services has a working channel all the same",
        WANT,
        replace(SET, routing=Routing(unknown="They cannot be read.")),
        (),
        Reason.Configured,
    ),
    Row(
        "a webhook that is gone is told from one that points elsewhere",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, number=at(UNUSED), was_configured=True),
        (),
        Reason.WebhookDrifted,
        "NotSet",
    ),
    Row(
        "two corrections in a row are accidents",
        WANT,
        replace(SET, number=at(ELSEWHERE), was_configured=True, corrections=2),
        (SET_IT,),
        Reason.Configured,
    ),
    Row(
        "the third is a fight: it is put right, seldom from now on, and told",
        WANT,
        replace(SET, number=at(ELSEWHERE), was_configured=True, corrections=3),
        (SET_IT,),
        Reason.WebhookContested,
        "UrlMismatch",
    ),
    Row(
        "a channel that lives again owes nothing for having been gone",
        WANT,
        replace(SET, record=kept(owed_since=EARLIER)),
        (SaveRecord(RECORD),),
        Reason.Configured,
    ),
    Row(
        "a number without SMS is neither claimed nor written",
        WANT,
        replace(NEW, number=replace(NUMBER, receives_sms=False)),
        (),
        Reason.NumberLacksSms,
    ),
    Row(
        "Twilio or the credentials stand in the way: their reason is told, and nothing is written",
        WANT,
        replace(SET, number=DENIED),
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a policy edited while nothing else can be done must hold if the channel is deleted next",
        replace(WANT, deletion_policy=DeletionPolicy.RETAIN),
        replace(SET, number=DENIED),
        (SaveRecord(kept(deletion_policy=DeletionPolicy.RETAIN)),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "no record is made for the sake of a policy",
        replace(WANT, deletion_policy=DeletionPolicy.RETAIN),
        replace(NEW, number=DENIED),
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "an unreadable record must not be written over",
        replace(WANT, deletion_policy=DeletionPolicy.RETAIN),
        Observed(record=EMPTY, finalizer=True, number=Refused(Reason.TokenUnreadable, "The record cannot be opened.")),
        (),
        Reason.TokenUnreadable,
    ),
    Row(
        "a verified newer token replaces the one before, for the account's older debts too",
        WANT,
        replace(SET, record=MOVED, login=NEWER, source="secret/twilio@2", debts={"PN0": DENIED}),
        (SaveRecord(kept(MOVED.with_login(ACCOUNT, NEWER), source="secret/twilio@2")),),
        Reason.Configured,
    ),
    Row(
        "a rejected newer token changes nothing: the record keeps the source of the token that works",
        WANT,
        replace(SET, source="secret/twilio@2", rejected=DENIED),
        (),
        Reason.TokenRejected,
    ),
    Row(
        "a newer token is kept also while drift is only reported: it may be the only one that gives the number back",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, login=NEWER, source="secret/twilio@2", number=at(ELSEWHERE), was_configured=True),
        (SaveRecord(kept(RECORD.with_login(ACCOUNT, NEWER), source="secret/twilio@2")),),
        Reason.WebhookDrifted,
        "UrlMismatch",
    ),
    Row(
        "drift is corrected with the older token while the newer one is rejected",
        WANT,
        replace(SET, source="secret/twilio@2", rejected=DENIED, number=at(ELSEWHERE), was_configured=True),
        (SET_IT,),
        Reason.TokenRejected,
    ),
    Row(
        "suspend is hands off: not even drift or a debt is touched",
        replace(WANT, suspend=True),
        replace(SET, record=MOVED, number=at(ELSEWHERE), debts={"PN0": at(OURS, "PN0")}),
        (),
        Reason.Suspended,
    ),
    Row(
        "a suspended channel remembers its edited policy",
        replace(WANT, suspend=True, deletion_policy=DeletionPolicy.CLEAR),
        SET,
        (SaveRecord(kept(deletion_policy=DeletionPolicy.CLEAR)),),
        Reason.Suspended,
    ),
    Row(
        "a channel that is created suspended takes nothing over",
        replace(WANT, suspend=True),
        NEW,
        (),
        Reason.Suspended,
    ),
)

NUMBER_CHANGED = (
    Row(
        "the new number is configured before the old one is given back",
        WANT,
        replace(SET, record=kept(entries=(OLD_ENTRY,)), number=NUMBER, debts={"PN0": at(OURS, "PN0")}),
        (SaveRecord(kept(entries=(OLD_ENTRY, ENTRY))), SET_IT),
        Reason.Configured,
    ),
    Row(
        "once the new number points at us, the old one is given back",
        WANT,
        replace(SET, record=MOVED, debts={"PN0": at(OURS, "PN0")}),
        (GiveBack(OLD_ENTRY, BEFORE),),
        Reason.Configured,
    ),
    Row(
        "once the old number is given back, the record forgets it",
        WANT,
        replace(SET, record=MOVED, debts={"PN0": at(BEFORE, "PN0")}),
        (SaveRecord(RECORD),),
        Reason.Configured,
    ),
    Row(
        "a refused give-back stays owed, and the channel works all the same",
        WANT,
        replace(SET, record=MOVED, debts={"PN0": DENIED}),
        (),
        Reason.Configured,
    ),
    Row(
        "a number that Twilio moved to another account keeps its SID: it is given back there, with that login",
        replace(WANT, account_sid=OTHER_ACCOUNT),
        replace(SET, login=OTHER_LOGIN),
        (SaveRecord(owing(account_sid=OTHER_ACCOUNT, login=OTHER_LOGIN)),),
        Reason.Configured,
    ),
    Row(
        "an old number that left the account is owed to nobody",
        WANT,
        replace(SET, record=MOVED, debts={"PN0": None}),
        (SaveRecord(RECORD),),
        Reason.Configured,
    ),
    Row(
        "a debt that is settled leaves the record beside one that is not",
        WANT,
        replace(
            SET,
            record=kept(entries=(OLD_ENTRY.model_copy(update={"number_sid": "PN9"}), OLD_ENTRY, ENTRY)),
            debts={"PN9": None, "PN0": DOWN},
        ),
        (SaveRecord(MOVED),),
        Reason.Configured,
    ),
    Row(
        "the old number is given back also where the new one, which did work, was changed by somebody since",
        replace(WANT, drift_policy=DriftPolicy.REPORT),
        replace(SET, record=MOVED, number=at(ELSEWHERE), was_configured=True, debts={"PN0": at(OURS, "PN0")}),
        (GiveBack(OLD_ENTRY, BEFORE),),
        Reason.WebhookDrifted,
        "UrlMismatch",
    ),
)

SWAPPED = (
    Row(
        "who waits for our number cannot let go of the wanted one before, so ours is given back first",
        WANT,
        replace(SET, number=TAKEN, debts={"PN1": at(OURS)}),
        (GiveBack(ENTRY, BEFORE),),
        Reason.NumberInUse,
    ),
    Row(
        "once it is given back there is no record, and with it no claim, any more; the finalizer stays",
        WANT,
        replace(SET, number=TAKEN, debts={"PN1": at(BEFORE)}),
        (DropRecord(),),
        Reason.NumberInUse,
    ),
    Row(
        "without a record there is nothing left to do but wait",
        WANT,
        replace(SET, record=EMPTY, stored=False, number=TAKEN, debts={"PN1": at(BEFORE)}),
        (),
        Reason.NumberInUse,
    ),
    Row(
        "what cannot be given back is kept, and with it the claim",
        WANT,
        replace(SET, record=MOVED, number=TAKEN, debts={"PN1": DOWN, "PN0": DENIED}),
        (),
        Reason.NumberInUse,
    ),
    Row(
        "who is in no circle keeps what works until the wanted number is free",
        WANT,
        replace(SET, number=TAKEN),
        (),
        Reason.NumberInUse,
    ),
    Row(
        "the policy of today decides what the number gets back",
        replace(WANT, deletion_policy=DeletionPolicy.RETAIN),
        replace(SET, number=TAKEN, debts={"PN1": None}),
        (SaveRecord(kept(deletion_policy=DeletionPolicy.RETAIN)),),
        Reason.NumberInUse,
    ),
)

DELETED = (
    Row(
        "Restore writes what was there before the channel",
        None,
        GOING,
        (GiveBack(ENTRY, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "Clear writes an empty webhook",
        None,
        replace(GOING, record=kept(deletion_policy=DeletionPolicy.CLEAR)),
        (GiveBack(ENTRY, UNUSED),),
        Reason.Restoring,
    ),
    Row(
        "Retain leaves the webhook and forgets the number",
        None,
        replace(GOING, record=kept(deletion_policy=DeletionPolicy.RETAIN), debts={"PN1": None}),
        (DropRecord(), RemoveFinalizer()),
        Reason.Restoring,
    ),
    Row(
        "Restore leaves a webhook whose predecessor is not known, and says which number that is",
        None,
        replace(GOING, record=owing(previous=None)),
        (DropRecord(left=(WANT.phone_number,)), RemoveFinalizer()),
        Reason.Restoring,
    ),
    Row(
        "a former URL of ours is given back as well",
        None,
        replace(GOING, record=owing(wrote=(FORMER.url, OURS.url)), debts={"PN1": at(FORMER)}),
        (GiveBack(ENTRY.model_copy(update={"wrote": (FORMER.url, OURS.url)}), BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "our URL with a method that somebody changed still points at us",
        None,
        replace(GOING, debts={"PN1": at(OURS_GET)}),
        (GiveBack(ENTRY, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "what was given back, or pointed elsewhere by somebody, is left: record first, then the finalizer",
        None,
        replace(GOING, debts={"PN1": at(ELSEWHERE)}),
        (DropRecord(), RemoveFinalizer()),
        Reason.Restoring,
    ),
    Row(
        "a number that is gone is owed to nobody",
        None,
        replace(GOING, debts={"PN1": None}),
        (DropRecord(), RemoveFinalizer()),
        Reason.Restoring,
    ),
    Row(
        "of two numbers the settled one leaves the record at once",
        None,
        replace(GOING, record=MOVED, debts={"PN0": None, "PN1": DOWN}),
        (SaveRecord(RECORD),),
        Reason.Restoring,
    ),
    Row(
        "while Twilio cannot be reached, the finalizer waits",
        None,
        replace(GOING, debts={"PN1": DOWN}),
        (),
        Reason.Restoring,
    ),
    Row(
        "a refusal is told as one, and waits as well",
        None,
        replace(GOING, debts={"PN1": DENIED}),
        (),
        Reason.RestoreFailed,
    ),
    Row(
        "after the grace period the resource goes; the record stays, with the policy that the channel had last",
        None,
        replace(GOING, record=kept(deletion_policy=DeletionPolicy.CLEAR), debts={"PN1": DOWN}, grace_over=True),
        (SaveRecord(kept(deletion_policy=DeletionPolicy.CLEAR, owed_since=NOW)), RemoveFinalizer()),
        Reason.Restoring,
    ),
    Row(
        "a record whose channel went by force is owed from the moment that is seen",
        None,
        replace(GOING, finalizer=False, debts={"PN1": DOWN}, grace_over=True),
        (SaveRecord(kept(owed_since=NOW)),),
        Reason.Restoring,
    ),
    Row(
        "a record without a channel just waits for Twilio, and the clock on it is not set back",
        None,
        replace(GOING, record=kept(owed_since=EARLIER), finalizer=False, debts={"PN1": DOWN}, grace_over=True),
        (),
        Reason.Restoring,
    ),
    Row(
        "after the deadline what is owed is written off, and says why",
        None,
        replace(
            GOING,
            record=kept(owed_since=EARLIER),
            finalizer=False,
            debts={"PN1": DENIED},
            grace_over=True,
            deadline_over=True,
        ),
        (WriteOff(kept(owed_since=EARLIER), str(DENIED)),),
        Reason.RestoreFailed,
    ),
    Row(
        "what can be given back after the deadline is given back",
        None,
        replace(GOING, record=kept(owed_since=EARLIER), finalizer=False, grace_over=True, deadline_over=True),
        (GiveBack(ENTRY, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "what still can be given back after the grace period is, before the resource goes",
        None,
        replace(GOING, grace_over=True),
        (GiveBack(ENTRY, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "an unreadable record is neither dropped nor written over, and holds the finalizer for a while",
        None,
        Observed(record=EMPTY, finalizer=True, debts={"": SEALED_AWAY}),
        (),
        Reason.RestoreFailed,
    ),
    Row(
        "an unreadable record does not wedge the deletion",
        None,
        Observed(record=EMPTY, finalizer=True, debts={"": SEALED_AWAY}, grace_over=True),
        (RemoveFinalizer(),),
        Reason.RestoreFailed,
    ),
    Row(
        "an orphan's number is given back although nobody waits for it",
        None,
        replace(GOING, finalizer=False),
        (GiveBack(ENTRY, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "an orphan's record goes without a finalizer to remove",
        None,
        replace(GOING, finalizer=False, debts={"PN1": at(BEFORE)}),
        (DropRecord(),),
        Reason.Restoring,
    ),
    Row(
        "a channel that never took a number over goes at once",
        None,
        Observed(record=EMPTY, finalizer=True),
        (RemoveFinalizer(),),
        Reason.Restoring,
    ),
    Row(
        "nothing at all is left to do for a channel without record and finalizer",
        None,
        Observed(record=EMPTY),
        (),
        Reason.Restoring,
    ),
)


@pytest.mark.parametrize("row", [*CREATED, *CHANGED, *NUMBER_CHANGED, *SWAPPED, *DELETED], ids=lambda row: row.reason)
def test_the_table(row: Row) -> None:
    asked = plan(row.want, row.seen, TEMPLATE, NOW)
    assert asked.changes == row.changes, row.reason
    assert asked.verdict.reason is row.told, row.reason
    assert asked.verdict.effective == row.effective, row.reason


def test_the_verdict_names_the_number_it_is_about() -> None:
    assert plan(WANT, SET, TEMPLATE, NOW).verdict.number_sid == "PN1"
    assert plan(WANT, replace(SET, number=DENIED), TEMPLATE, NOW).verdict.number_sid == ""


def test_a_refused_give_back_of_the_number_before_is_told_with_the_working_one() -> None:
    refused = plan(WANT, replace(SET, record=MOVED, debts={"PN0": DENIED}), TEMPLATE, NOW).verdict
    assert OLD_ENTRY.phone_number in refused.message
    unreachable = plan(WANT, replace(SET, record=MOVED, debts={"PN0": DOWN}), TEMPLATE, NOW).verdict
    assert unreachable == plan(WANT, SET, TEMPLATE, NOW).verdict, (
        "an outage's changing words would be written each time"
    )


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (SET, Reason.TokenRejected),
        (replace(SET, number=at(ELSEWHERE), was_configured=True), Reason.WebhookDrifted),
        (replace(SET, routing=Routing(service_sid="MG1")), Reason.WebhookOverridden),
    ],
)
def test_a_rejected_token_is_told_whatever_else_is_wrong(seen: Observed, told: Reason) -> None:
    verdict = plan(
        replace(WANT, drift_policy=DriftPolicy.REPORT), replace(seen, rejected=DENIED), TEMPLATE, NOW
    ).verdict
    assert (verdict.reason, verdict.rejected) == (told, str(DENIED))


def test_what_cannot_be_seen_of_the_routing_is_told() -> None:
    assert plan(WANT, replace(SET, routing=Routing(unknown="Why.")), TEMPLATE, NOW).verdict.unknown == "Why."


def test_claimed_at_is_the_first_claim_and_stays() -> None:
    entry = ENTRY.model_copy(update={"claimed_at": EARLIER, "wrote": (FORMER.url,)})
    asked = plan(WANT, replace(SET, record=kept(entries=(entry,)), number=at(FORMER)), TEMPLATE, NOW)
    saved = asked.changes[0]
    assert isinstance(saved, SaveRecord)
    assert saved.record.entries[0].claimed_at == EARLIER


def test_a_debt_of_another_account_keeps_its_own_login() -> None:
    foreign = OLD_ENTRY.model_copy(update={"account_sid": OTHER_ACCOUNT})
    seen = replace(SET, record=kept(entries=(foreign, ENTRY)), login=NEWER, debts={"PN0": DENIED})
    saved = plan(WANT, seen, TEMPLATE, NOW).changes[0]
    assert isinstance(saved, SaveRecord)
    assert [entry.login for entry in saved.record.entries] == [LOGIN, NEWER]


def test_what_is_desired_comes_from_spec_and_template() -> None:
    channel = SmsChannel.model_validate(
        {
            "metadata": {
                "name": INSTANCE,
                "namespace": "sms-channels",
                "uid": "uid-1",
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {
                "accountSid": ACCOUNT,
                "phoneNumber": WANT.phone_number,
                "credentials": {"secretKeyRef": {"name": "twilio", "key": "auth_token"}},
            },
        }
    )
    assert desired(channel, TEMPLATE) == WANT
    metadata = channel.metadata.model_copy(update={"deletion_timestamp": NOW})
    assert desired(channel.model_copy(update={"metadata": metadata}), TEMPLATE) is None, "then nothing is wanted"


# What holds for every observation

WEBHOOKS = st.sampled_from((OURS, OURS_GET, ANOTHER_INSTANCE, FORMER, BEFORE, ELSEWHERE, UNUSED))
PREVIOUS = st.sampled_from((None, BEFORE, ELSEWHERE, UNUSED, OURS, FORMER))  # a later template may make what was found
WROTE = st.sampled_from(((OURS.url,), (FORMER.url,), (FORMER.url, OURS.url)))
ERRORS = st.sampled_from((DOWN, DENIED))
GIVE_BACK_FAILS = st.dictionaries(st.sampled_from(("PN0", "PN1", "PN2")), st.one_of(st.none(), ERRORS))


@st.composite
def records(draw: st.DrawFn) -> Record:
    entries = tuple(
        Entry(
            account_sid=draw(st.sampled_from((ACCOUNT, OTHER_ACCOUNT))),
            number_sid=sid,
            phone_number=WANT.phone_number,
            login=LOGIN,
            previous=draw(PREVIOUS),
            wrote=draw(WROTE),
            claimed_at=EARLIER,
        )
        for sid in draw(st.lists(st.sampled_from(("PN0", "PN1", "PN2")), unique=True))
    )
    policy = draw(st.sampled_from(DeletionPolicy))
    since = draw(st.sampled_from((None, EARLIER)))
    return EMPTY.model_copy(
        update={"entries": entries, "deletion_policy": policy, "source": "sealed", "owed_since": since}
    )


@st.composite
def situations(draw: st.DrawFn) -> tuple[Desired | None, Observed]:
    """As the Reconciler observes: every entry but the wanted number's is looked at, where Twilio may be asked."""
    want = draw(
        st.none()
        | st.builds(
            replace,
            st.just(WANT),
            suspend=st.booleans(),
            takeover_policy=st.sampled_from(TakeoverPolicy),
            drift_policy=st.sampled_from(DriftPolicy),
            deletion_policy=st.sampled_from(DeletionPolicy),
        )
    )
    record = draw(records())
    number: Number | Refused | None = None
    if want is not None:
        number = draw(
            st.just(DENIED)
            | st.builds(
                replace,
                st.just(NUMBER),
                webhook=WEBHOOKS,
                application_sid=st.sampled_from(("", "AP1")),
                receives_sms=st.booleans(),
            )
        )
    wanted = number.sid if isinstance(number, Number) else None
    debts: dict[str, Debt] = {}
    for entry in record.entries:
        if entry.number_sid != wanted and not isinstance(number, Refused):
            debts[entry.number_sid] = draw(st.none() | ERRORS | st.builds(at, WEBHOOKS, st.just(entry.number_sid)))
    return want, Observed(
        record=record,
        stored=bool(record.entries),
        finalizer=draw(st.booleans()),
        login=draw(st.sampled_from((LOGIN, NEWER))) if wanted else None,
        source=draw(st.sampled_from(("sealed", "secret/twilio@2"))),
        number=number,
        rejected=draw(st.none() | st.just(DENIED)) if wanted else None,
        routing=draw(st.sampled_from((Routing(), Routing(service_sid="MG1"), Routing(unknown="Why.")))),
        was_configured=draw(st.booleans()),
        was_named=draw(st.booleans()),
        corrections=draw(st.sampled_from((0, 2, 3))),
        debts=debts,
        grace_over=draw(st.booleans()),
        deadline_over=draw(st.booleans()) if record.owed_since else False,
    )


def brought_about(change: Change, seen: Observed, fails: Mapping[str, ChannelError | None]) -> Observed:
    """The world after a change; `fails` are give-backs that end in an error, or in a number that is gone."""
    match change:
        case AddFinalizer():
            assert not seen.finalizer
            return replace(seen, finalizer=True)
        case RemoveFinalizer():
            assert seen.finalizer, "there may be no channel to take it from"
            return replace(seen, finalizer=False)
        case SaveRecord(record):
            return replace(seen, record=record, stored=True)
        case DropRecord():
            return replace(seen, record=seen.record.model_copy(update={"entries": ()}), stored=False)
        case WriteOff(record):
            return replace(seen, record=record.without(seen.debts), stored=False, debts={})
        case SetWebhook(_, _, sid, webhook):
            assert isinstance(seen.number, Number)
            assert seen.number.sid == sid
            return replace(seen, number=replace(seen.number, webhook=webhook))
        case GiveBack(entry, webhook):
            sid = entry.number_sid
            debt: Debt = fails[sid] if sid in fails else at(webhook, sid)
            return replace(seen, debts={**seen.debts, sid: debt})


ORDER: tuple[type[Change], ...] = (
    AddFinalizer,
    SaveRecord,
    SetWebhook,
    GiveBack,
    DropRecord,
    WriteOff,
    RemoveFinalizer,
)


@settings(deadline=None)
@given(situation=situations(), fails=GIVE_BACK_FAILS)
def test_doing_what_is_planned_ends(
    situation: tuple[Desired | None, Observed], fails: Mapping[str, ChannelError | None]
) -> None:
    want, seen = situation
    for _ in range(4):
        changes = plan(want, seen, TEMPLATE, NOW).changes
        if not changes:
            break
        places = [ORDER.index(type(change)) for change in changes]
        assert places == sorted(places), "finalizer before record before webhook; the record goes before the finalizer"
        for change in changes:
            if isinstance(change, SetWebhook):
                entry = seen.record.entry(change.number_sid)
                assert seen.finalizer, "a finalizer stands before Twilio is written"
                assert seen.stored, "a stored record stands before Twilio is written"
                assert entry is not None
                assert change.webhook.url in entry.wrote, "what is written is known to be ours beforehand"
            if isinstance(change, DropRecord):
                assert not [debt for debt in seen.debts.values() if isinstance(debt, ChannelError)], (
                    "nothing is forgotten"
                )
            seen = brought_about(change, seen, fails)
    else:
        pytest.fail(f"still asked for after 4 rounds: {plan(want, seen, TEMPLATE, NOW).changes}")


@settings(deadline=None)
@given(situation=situations())
def test_what_is_foreseen_is_what_is_done(situation: tuple[Desired | None, Observed]) -> None:
    want, seen = situation
    foreseen = foresee(want, seen, TEMPLATE, NOW)
    done: list[Change] = []
    while changes := plan(want, seen, TEMPLATE, NOW).changes:
        for change in changes:
            seen = brought_about(change, seen, {})
        done += changes
    assert foreseen.changes == tuple(done)
    assert foreseen.verdict == plan(want, seen, TEMPLATE, NOW).verdict, "as people are told at the end"


@pytest.mark.parametrize(
    ("url", "used"),
    [
        pytest.param("https://demo.twilio.com/welcome/sms/reply/", False, id="what new numbers have"),
        pytest.param("http://demo.twilio.com/docs/sms.xml", False, id="what numbers had that were bought years ago"),
        pytest.param("https://DEMO.twilio.com", False, id="hosts know no case, and need no path"),
        pytest.param("https://demo.twilio.com.example.com/", True, id="a host that only begins like it"),
        pytest.param("https://demo.twilio.com@example.com/", True, id="a user of that name"),
        pytest.param("https://[demo.twilio.com/", True, id="no URL at all"),
    ],
)
def test_twilios_demo_counts_as_unused(url: str, used: bool) -> None:
    want = replace(WANT, takeover_policy=TakeoverPolicy.IF_UNUSED)
    verdict = plan(want, replace(NEW, number=at(Webhook(url=url, method="POST"))), TEMPLATE, NOW).verdict
    assert verdict.reason is (Reason.WebhookForeign if used else Reason.Configured)


@settings(deadline=None)
@given(situation=situations())
def test_what_is_ours_is_never_recorded_as_previous(situation: tuple[Desired | None, Observed]) -> None:
    want, seen = situation
    for change in plan(want, seen, TEMPLATE, NOW).changes:
        if isinstance(change, SaveRecord):
            for entry in change.record.entries:
                new = seen.record.entry(entry.number_sid) is None
                assert not (new and entry.previous and TEMPLATE.made(entry.previous.url))


@settings(deadline=None)
@given(situation=situations())
def test_suspend_writes_nothing_to_twilio(situation: tuple[Desired | None, Observed]) -> None:
    want, seen = situation
    if want is not None:
        changes = plan(replace(want, suspend=True), seen, TEMPLATE, NOW).changes
        assert not [change for change in changes if not isinstance(change, SaveRecord)]


@settings(deadline=None)
@given(situation=situations(), fails=GIVE_BACK_FAILS)
def test_a_deletion_cannot_wedge(
    situation: tuple[Desired | None, Observed], fails: Mapping[str, ChannelError | None]
) -> None:
    seen = replace(situation[1], grace_over=True)
    for _ in range(4):
        for change in plan(None, seen, TEMPLATE, NOW).changes:
            seen = brought_about(change, seen, fails)
    assert not seen.finalizer, "after the grace period the resource goes, whatever Twilio says"


def test_a_previous_webhook_that_the_template_came_to_make_does_not_wedge_the_deletion() -> None:
    """The number pointed at what only a later template makes: giving that back must end."""
    entry = ENTRY.model_copy(update={"previous": OURS, "wrote": ("https://typo.example.com/", OURS.url)})
    seen = replace(GOING, record=kept(entries=(entry,)), grace_over=True)
    for _ in range(4):
        for change in plan(None, seen, TEMPLATE, NOW).changes:
            seen = brought_about(change, seen, {})
    assert not seen.finalizer
