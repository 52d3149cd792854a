"""The decisions of core/plan.py, row by row of its table: changes and verdict for each observation.

At the end, what holds for every observation: applying the plan comes to an end, in the safe order, and never
writes the same thing twice.
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
from smschannel.api.reasons import Effective, Reason, Recheck
from smschannel.api.resource import DeletionPolicy, DriftPolicy, SmsChannel, TakeoverPolicy
from smschannel.core.plan import (
    AddFinalizer,
    Change,
    CreateRecord,
    Current,
    DeleteRecord,
    Desired,
    Number,
    Observed,
    RemoveFinalizer,
    RestoreWebhook,
    Routing,
    Rules,
    SetWebhook,
    UpdateRecord,
    Waiter,
    WriteOff,
    desired,
    foresee,
    plan,
    with_current,
    with_record,
    without_record,
)
from smschannel.core.record import Contents, Key, Login, Record, Webhook, WebhookTemplate

ACCOUNT = "AC" + "0" * 32
OTHER_ACCOUNT = "AC" + "1" * 32
NAMESPACE = "sms-channels"
INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
OTHER_INSTANCE = "00000000-0000-4000-8000-000000000000"

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GRACE = timedelta(seconds=120)
DEADLINE = timedelta(days=7)
GRACE_OVER = NOW - GRACE
DEADLINE_OVER = NOW - DEADLINE
SECOND = timedelta(seconds=1)

TEMPLATE = WebhookTemplate("https://sms.example.com/{instance_id}/sms", ("https://old.example.com/{instance_id}",))
RULES = Rules(TEMPLATE, deletion_grace=GRACE, restore_deadline=DEADLINE)
OURS = Webhook(url=TEMPLATE.url(NAMESPACE, INSTANCE), method="POST")
OURS_GET = Webhook(url=OURS.url, method="GET")
ANOTHER_INSTANCE = Webhook(url=TEMPLATE.url(NAMESPACE, OTHER_INSTANCE), method="POST")
DEMO = Webhook(url="https://demo.twilio.com/welcome/sms/reply", method="POST")
FORMER = Webhook(url=f"https://old.example.com/{INSTANCE}", method="POST")
BEFORE = Webhook(url="https://before.example.com/sms", method="GET")
ELSEWHERE = Webhook(url="https://elsewhere.example.com/", method="POST")
UNUSED = Webhook(url="", method="POST")

LOGIN = Login(sid=ACCOUNT, token=SecretStr("first"))
NEWER = Login(sid=ACCOUNT, token=SecretStr("second"))
OTHER_LOGIN = Login(sid=OTHER_ACCOUNT, token=SecretStr("other"))

DESIRED = Desired(
    namespace=NAMESPACE,
    name=INSTANCE,
    uid="uid-1",
    account_sid=ACCOUNT,
    phone_number="+61400111222",
    webhook=OURS,
    suspend=False,
    takeover_policy=TakeoverPolicy.ALWAYS,
    drift_policy=DriftPolicy.CORRECT,
    deletion_policy=DeletionPolicy.RESTORE,
)
SUSPENDED = replace(DESIRED, suspend=True)
IF_UNUSED = replace(DESIRED, takeover_policy=TakeoverPolicy.IF_UNUSED)
REPORT = replace(DESIRED, drift_policy=DriftPolicy.REPORT)
RETAIN = replace(DESIRED, deletion_policy=DeletionPolicy.RETAIN)
CLEAR = replace(DESIRED, deletion_policy=DeletionPolicy.CLEAR)

NUMBER = Number(sid="PN1", phone_number=DESIRED.phone_number, webhook=BEFORE, application_sid="", receives_sms=True)
RECORD = Record(
    number_sid="PN1",
    phone_number=DESIRED.phone_number,
    account_sid=ACCOUNT,
    namespace=NAMESPACE,
    name=INSTANCE,
    uid="uid-1",
    source="sealed",
    contents=Contents(login=LOGIN, previous=BEFORE, wrote=(OURS.url,)),
)
OLD_RECORD = replace(RECORD, number_sid="PN0", phone_number="+61400000000")
OLDER_RECORD = replace(RECORD, number_sid="PN9", phone_number="+61400000009")
UNREADABLE = replace(RECORD, contents=None)
OLD_UNREADABLE = replace(OLD_RECORD, contents=None)

DOWN = TwilioUnavailable("Twilio answers HTTP 503.")
IN_USE = Refused(Reason.NumberInUse, "+61400111222 already serves another channel.")
DENIED = Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")
NO_SECRET = Refused(Reason.SecretNotFound, "Secret twilio does not exist.")
DAMAGED = Unreadable("the record cannot be opened")
NO_RECORD = Refused(Reason.RecordUnreadable, "The operator's record of the number cannot be opened.")


def at(webhook: Webhook, number_sid: str = "PN1") -> Number:
    """The number, pointing at `webhook`."""
    former = {record.number_sid: record.phone_number for record in (OLD_RECORD, OLDER_RECORD)}
    phone_number = former.get(number_sid, NUMBER.phone_number)
    return replace(NUMBER, sid=number_sid, phone_number=phone_number, webhook=webhook)


def by_number(*records: Record) -> Mapping[str, Record]:
    return {record.number_sid: record for record in records}


NEW = Observed(login=LOGIN, source="sealed", number=NUMBER)
CONFIGURED = replace(NEW, records=by_number(RECORD), finalizer=True, number=at(OURS))
MOVED = replace(CONFIGURED, records=by_number(OLD_RECORD, RECORD), to_restore={"PN0": at(OURS, "PN0")})
DELETING = Observed(records=by_number(RECORD), finalizer=True, deleted_at=NOW, to_restore={"PN1": at(OURS)})
LATE = replace(DELETING, deleted_at=GRACE_OVER)
GONE = replace(DELETING, deleted_at=None, finalizer=False)
HOUR = timedelta(hours=1)
WAITER = Waiter(Key("team-b", OTHER_INSTANCE), "uid-2", ACCOUNT, NEWER, at(OURS))
UNSEEN = replace(CONFIGURED, number=DENIED, login=None, unseen={"PN1": True})
"""Twilio refuses the channel's logins, for less than a second."""
LONG_UNSEEN = replace(UNSEEN, records=by_number(replace(RECORD, unseen_since=NOW - HOUR)))
WAITED_FOR = replace(LONG_UNSEEN, waiters={"PN1": WAITER})
"""For an hour, and a waiter's login sees the number."""
WITH_THE_WAITERS_LOGIN = replace(RECORD.with_contents(login=NEWER), unseen_since=NOW - HOUR)
SET_WEBHOOK = SetWebhook(LOGIN, ACCOUNT, "PN1", OURS)


@dataclass(frozen=True)
class Row:
    why: str
    desired: Desired | None
    observed: Observed
    changes: tuple[Change, ...]
    reason: Reason
    effective: Effective | None = None


CREATED = (
    Row(
        "a number is claimed after the finalizer, by a record of what it pointed at; the webhook is for the next round",
        DESIRED,
        NEW,
        (AddFinalizer(), CreateRecord(RECORD)),
        Reason.Pending,
    ),
    Row(
        "once the number is claimed, the webhook is set",
        DESIRED,
        replace(NEW, records=by_number(RECORD), finalizer=True),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "an empty webhook is a previous one like any other: Restore empties it again",
        DESIRED,
        replace(NEW, number=at(UNUSED)),
        (AddFinalizer(), CreateRecord(RECORD.with_contents(previous=UNUSED))),
        Reason.Pending,
    ),
    Row(
        "after a crash that follows the finalizer, the record is created",
        DESIRED,
        replace(NEW, finalizer=True),
        (CreateRecord(RECORD),),
        Reason.Pending,
    ),
    Row(
        "after a crash that follows the record, only the webhook is set, and the previous one is kept",
        DESIRED,
        replace(CONFIGURED, number=NUMBER),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "a claim may return a record from before a crash: its contents stay, and the URL is added",
        DESIRED,
        replace(CONFIGURED, records=by_number(RECORD.with_contents(wrote=(FORMER.url,))), number=at(ELSEWHERE)),
        (UpdateRecord(RECORD.with_contents(wrote=(FORMER.url, OURS.url))), SET_WEBHOOK),
        Reason.Configured,
    ),
    Row(
        "after a crash that follows the webhook nothing is left to do",
        DESIRED,
        CONFIGURED,
        (),
        Reason.Configured,
    ),
    Row(
        "a removed finalizer is added again",
        DESIRED,
        replace(CONFIGURED, finalizer=False),
        (AddFinalizer(),),
        Reason.Configured,
    ),
    Row(
        "a number that points at us without a record has an unknown previous webhook, not ours",
        DESIRED,
        replace(NEW, number=at(OURS)),
        (AddFinalizer(), CreateRecord(RECORD.with_contents(previous=None))),
        Reason.Pending,
    ),
    Row(
        "another instance's webhook is ours too, and never a previous one",
        DESIRED,
        replace(NEW, number=at(ANOTHER_INSTANCE)),
        (AddFinalizer(), CreateRecord(RECORD.with_contents(previous=None))),
        Reason.Pending,
    ),
    Row(
        "the webhook of a former template is ours too",
        DESIRED,
        replace(NEW, number=at(FORMER)),
        (AddFinalizer(), CreateRecord(RECORD.with_contents(previous=None))),
        Reason.Pending,
    ),
    Row(
        "nothing is decided about a number that was not read",
        DESIRED,
        replace(NEW, number=None),
        (),
        Reason.Pending,
    ),
    Row(
        "nothing is decided about a number that no login found",
        DESIRED,
        replace(NEW, login=None),
        (),
        Reason.Pending,
    ),
)

REFUSED = (
    Row(
        "since when none of the holder's logins sees its number is recorded, so that a restart does not forget it",
        DESIRED,
        UNSEEN,
        (UpdateRecord(replace(RECORD, unseen_since=NOW)),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a number that nobody waits for stays with its holder for good",
        DESIRED,
        LONG_UNSEEN,
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a number that somebody waits for stays with its holder for an hour",
        DESIRED,
        replace(WAITED_FOR, records=by_number(replace(RECORD, unseen_since=NOW - HOUR + SECOND))),
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "after an hour without a break it is restored with the waiter's login",
        DESIRED,
        WAITED_FOR,
        (RestoreWebhook(WITH_THE_WAITERS_LOGIN, BEFORE),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "and then it is free",
        DESIRED,
        replace(WAITED_FOR, to_restore={"PN1": at(BEFORE)}),
        (DeleteRecord(replace(RECORD, unseen_since=NOW - HOUR), yielded_to=WAITER),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "after a crash between the two it is only freed",
        DESIRED,
        replace(WAITED_FOR, waiters={"PN1": replace(WAITER, number=at(BEFORE))}),
        (DeleteRecord(replace(RECORD, unseen_since=NOW - HOUR), yielded_to=replace(WAITER, number=at(BEFORE))),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a webhook that somebody changed since stays",
        DESIRED,
        replace(WAITED_FOR, waiters={"PN1": replace(WAITER, number=at(ELSEWHERE))}),
        (DeleteRecord(replace(RECORD, unseen_since=NOW - HOUR), yielded_to=replace(WAITER, number=at(ELSEWHERE))),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "deletionPolicy Retain leaves the webhook for the waiter to change",
        RETAIN,
        replace(
            WAITED_FOR,
            records=by_number(replace(RECORD, unseen_since=NOW - HOUR, deletion_policy=DeletionPolicy.RETAIN)),
        ),
        (
            DeleteRecord(
                replace(RECORD, unseen_since=NOW - HOUR, deletion_policy=DeletionPolicy.RETAIN), yielded_to=WAITER
            ),
        ),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a restore that fails frees nothing",
        DESIRED,
        replace(WAITED_FOR, to_restore={"PN1": DOWN}),
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a previous webhook that Twilio refuses keeps nobody waiting: the waiter sets its own",
        DESIRED,
        replace(WAITED_FOR, to_restore={"PN1": Refused(Reason.WebhookRefused, "It has a fallback URL.")}),
        (DeleteRecord(replace(RECORD, unseen_since=NOW - HOUR), yielded_to=WAITER),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a waiter whose login is refused in that moment frees nothing",
        DESIRED,
        replace(WAITED_FOR, to_restore={"PN1": DENIED}),
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "an hour that began in the future, by a clock that was ahead, begins now",
        DESIRED,
        replace(WAITED_FOR, records=by_number(replace(RECORD, unseen_since=NOW + 24 * HOUR))),
        (UpdateRecord(replace(RECORD, unseen_since=NOW)),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a number that moved to another account is restored there",
        DESIRED,
        replace(
            WAITED_FOR,
            number=Refused(Reason.NumberNotFound, "The account has no such number."),
            waiters={"PN1": replace(WAITER, account_sid=OTHER_ACCOUNT, login=OTHER_LOGIN)},
        ),
        (
            RestoreWebhook(
                replace(WITH_THE_WAITERS_LOGIN.with_contents(login=OTHER_LOGIN), account_sid=OTHER_ACCOUNT), BEFORE
            ),
        ),
        Reason.NumberNotFound,
    ),
    Row(
        "one answer that shows the number begins the hour anew",
        DESIRED,
        replace(WAITED_FOR, unseen={"PN1": False}, waiters={}),
        (UpdateRecord(RECORD),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "an outage neither begins the hour anew nor ends it",
        DESIRED,
        replace(WAITED_FOR, unseen={}),
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "credentials that work again begin the hour anew",
        DESIRED,
        replace(CONFIGURED, records=by_number(replace(RECORD, unseen_since=NOW - HOUR))),
        (UpdateRecord(RECORD),),
        Reason.Configured,
    ),
    Row(
        "suspend begins the hour anew",
        SUSPENDED,
        Observed(records=by_number(replace(RECORD, unseen_since=NOW - HOUR)), finalizer=True),
        (UpdateRecord(RECORD),),
        Reason.Suspended,
    ),
    Row(
        "a record that cannot be opened holds its number for good",
        DESIRED,
        replace(WAITED_FOR, records=by_number(replace(UNREADABLE, unseen_since=NOW - HOUR)), number=NO_RECORD),
        (),
        Reason.RecordUnreadable,
    ),
)

CHANGED = (
    Row(
        "a changed template keeps the previous webhook and every URL that we wrote",
        DESIRED,
        replace(
            CONFIGURED,
            records=by_number(RECORD.with_contents(wrote=(FORMER.url,))),
            number=at(FORMER),
            was_named=True,
        ),
        (UpdateRecord(RECORD.with_contents(wrote=(FORMER.url, OURS.url))), SET_WEBHOOK),
        Reason.Configured,
    ),
    Row(
        "a template that comes back is not recorded twice",
        DESIRED,
        replace(CONFIGURED, records=by_number(RECORD.with_contents(wrote=(OURS.url, FORMER.url))), number=at(FORMER)),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "drift is corrected, and the drifted webhook is never taken for the previous one",
        DESIRED,
        replace(CONFIGURED, number=at(ELSEWHERE), was_configured=True),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "driftPolicy Report reports nothing while the webhook is ours",
        REPORT,
        replace(CONFIGURED, was_configured=True, was_named=True),
        (),
        Reason.Configured,
    ),
    Row(
        "driftPolicy Report leaves a drifted webhook as it is and reports it",
        REPORT,
        replace(CONFIGURED, number=at(ELSEWHERE), was_configured=True),
        (),
        Reason.WebhookDrifted,
        Effective.URL_MISMATCH,
    ),
    Row(
        "a foreign webhook is only reported also if the template changes, or the number was missing for a while",
        REPORT,
        replace(
            CONFIGURED,
            records=by_number(RECORD.with_contents(wrote=(FORMER.url,))),
            number=at(ELSEWHERE),
            was_named=True,
        ),
        (UpdateRecord(RECORD.with_contents(wrote=(FORMER.url, OURS.url))),),
        Reason.WebhookDrifted,
        Effective.URL_MISMATCH,
    ),
    Row(
        "driftPolicy Report does not keep a channel from moving to a changed template",
        REPORT,
        replace(
            CONFIGURED,
            records=by_number(RECORD.with_contents(wrote=(FORMER.url,))),
            number=at(FORMER),
            was_named=True,
        ),
        (UpdateRecord(RECORD.with_contents(wrote=(FORMER.url, OURS.url))), SET_WEBHOOK),
        Reason.Configured,
    ),
    Row(
        "driftPolicy Report does not keep a channel from a number that another of our instances had",
        REPORT,
        replace(
            CONFIGURED,
            records=by_number(RECORD.with_contents(previous=None)),
            number=at(ANOTHER_INSTANCE),
            was_named=True,
        ),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "a change between the record and the first configuration, with a crash in between, is not drift",
        REPORT,
        replace(CONFIGURED, number=at(ELSEWHERE)),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "driftPolicy Report does not keep a channel from its first configuration",
        REPORT,
        replace(CONFIGURED, number=NUMBER),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "the same if the status already names the number, as after waiting for it",
        REPORT,
        replace(CONFIGURED, number=NUMBER, was_named=True),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "driftPolicy Report does not keep a number at a URL of ours that only the record names",
        REPORT,
        replace(
            CONFIGURED,
            records=by_number(RECORD.with_contents(wrote=(ELSEWHERE.url,))),
            number=at(ELSEWHERE),
            was_named=True,
        ),
        (UpdateRecord(RECORD.with_contents(wrote=(ELSEWHERE.url, OURS.url))), SET_WEBHOOK),
        Reason.Configured,
    ),
    Row(
        "our URL with another method is drift too, since Twilio would call it in another way",
        DESIRED,
        replace(CONFIGURED, number=at(OURS_GET), was_configured=True),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "a report of drift distinguishes a method from a URL",
        REPORT,
        replace(CONFIGURED, number=at(OURS_GET), was_configured=True),
        (),
        Reason.WebhookDrifted,
        Effective.METHOD_MISMATCH,
    ),
    Row(
        "a report of drift distinguishes a removed webhook from one that points elsewhere",
        REPORT,
        replace(CONFIGURED, number=at(UNUSED), was_configured=True),
        (),
        Reason.WebhookDrifted,
        Effective.NOT_SET,
    ),
    Row(
        "IfUnused leaves a number that points elsewhere as it is: no finalizer, no record",
        IF_UNUSED,
        NEW,
        (),
        Reason.WebhookForeign,
        Effective.FOREIGN_URL,
    ),
    Row(
        "IfUnused takes a number that points nowhere",
        IF_UNUSED,
        replace(NEW, number=at(UNUSED)),
        (AddFinalizer(), CreateRecord(RECORD.with_contents(previous=UNUSED))),
        Reason.Pending,
    ),
    Row(
        "IfUnused takes a number that still points at the webhook of a former template, since that is ours",
        IF_UNUSED,
        replace(NEW, number=at(FORMER)),
        (AddFinalizer(), CreateRecord(RECORD.with_contents(previous=None))),
        Reason.Pending,
    ),
    Row(
        "IfUnused takes a number that Twilio's demo answers, as it does for every new one",
        IF_UNUSED,
        replace(NEW, number=at(DEMO)),
        (AddFinalizer(), CreateRecord(RECORD.with_contents(previous=DEMO))),
        Reason.Pending,
    ),
    Row(
        "IfUnused matters for the first claim only: later a foreign webhook is drift",
        IF_UNUSED,
        replace(CONFIGURED, number=at(ELSEWHERE), was_configured=True),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "an application receives the messages: the webhook is ours all the same, and reported as not effective",
        DESIRED,
        replace(CONFIGURED, number=replace(at(OURS), application_sid="AP1")),
        (),
        Reason.WebhookOverridden,
        Effective.OVERRIDDEN_BY_APPLICATION,
    ),
    Row(
        "a Messaging Service receives the messages: the same",
        DESIRED,
        replace(CONFIGURED, routing=Routing(service_sid="MG1")),
        (),
        Reason.WebhookOverridden,
        Effective.OVERRIDDEN_BY_MESSAGING_SERVICE,
    ),
    Row(
        "credentials that may not read Messaging Services make a working channel all the same",
        DESIRED,
        replace(CONFIGURED, routing=Routing(unknown="They cannot be read.")),
        (),
        Reason.Configured,
    ),
    Row(
        "two corrections in a row do not count as contested",
        DESIRED,
        replace(CONFIGURED, number=at(ELSEWHERE), was_configured=True, corrections=2),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "the third in a row is contested: it is corrected, less often from then on, and reported",
        DESIRED,
        replace(CONFIGURED, number=at(ELSEWHERE), was_configured=True, corrections=3),
        (SET_WEBHOOK,),
        Reason.WebhookContested,
        Effective.URL_MISMATCH,
    ),
    Row(
        "a record is no longer pending once its channel exists again",
        DESIRED,
        replace(CONFIGURED, records=by_number(replace(RECORD, restore_since=DEADLINE_OVER))),
        (UpdateRecord(RECORD),),
        Reason.Configured,
    ),
    Row(
        "the same for its former numbers: a later deletion gives each of them its whole deadline",
        DESIRED,
        replace(
            MOVED,
            records=by_number(
                replace(OLD_UNREADABLE, restore_since=DEADLINE_OVER),
                replace(OLDER_RECORD, restore_since=DEADLINE_OVER),
                RECORD,
            ),
            to_restore={"PN0": DAMAGED, "PN9": DOWN},
        ),
        (UpdateRecord(OLD_UNREADABLE), UpdateRecord(OLDER_RECORD)),
        Reason.Configured,
    ),
    Row(
        "a number without SMS is neither claimed nor written",
        DESIRED,
        replace(NEW, number=replace(NUMBER, receives_sms=False)),
        (),
        Reason.NumberLacksSms,
    ),
    Row(
        "a number that no longer receives SMS keeps its record, and is not written either",
        DESIRED,
        replace(CONFIGURED, number=replace(at(ELSEWHERE), receives_sms=False), was_configured=True),
        (),
        Reason.NumberLacksSms,
    ),
    Row(
        "what Twilio or the credentials refuse is reported, and nothing is written",
        DESIRED,
        replace(CONFIGURED, number=DENIED),
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "no record is created just for a policy",
        RETAIN,
        replace(NEW, number=DENIED),
        (),
        Reason.AuthenticationFailed,
    ),
    Row(
        "a verified newer login replaces the one before, also for the account's former numbers",
        DESIRED,
        replace(MOVED, login=NEWER, source="secret/twilio@2", to_restore={"PN0": DENIED}),
        (
            UpdateRecord(replace(OLD_RECORD.with_contents(login=NEWER), source="secret/twilio@2")),
            UpdateRecord(replace(RECORD.with_contents(login=NEWER), source="secret/twilio@2")),
        ),
        Reason.Configured,
    ),
    Row(
        "a verified newer login is not recorded for a former number of another account",
        DESIRED,
        replace(
            MOVED,
            records=by_number(replace(OLD_RECORD, account_sid=OTHER_ACCOUNT), RECORD),
            login=NEWER,
            source="secret/twilio@2",
            to_restore={"PN0": DENIED},
        ),
        (UpdateRecord(replace(RECORD.with_contents(login=NEWER), source="secret/twilio@2")),),
        Reason.Configured,
    ),
    Row(
        "a rejected newer token changes nothing: the record keeps the source of the token that works",
        DESIRED,
        replace(CONFIGURED, source="secret/twilio@2", rejected=DENIED),
        (),
        Reason.TokenRejected,
    ),
    Row(
        "a newer login is recorded also while drift is only reported: it may be the only one that can restore",
        REPORT,
        replace(CONFIGURED, login=NEWER, source="secret/twilio@2", number=at(ELSEWHERE), was_configured=True),
        (UpdateRecord(replace(RECORD.with_contents(login=NEWER), source="secret/twilio@2")),),
        Reason.WebhookDrifted,
        Effective.URL_MISMATCH,
    ),
    Row(
        "drift is corrected with the older token while the newer one is rejected",
        DESIRED,
        replace(CONFIGURED, source="secret/twilio@2", rejected=DENIED, number=at(ELSEWHERE), was_configured=True),
        (SET_WEBHOOK,),
        Reason.TokenRejected,
    ),
    Row(
        "drift is corrected with the recorded token while the Secret is gone",
        DESIRED,
        replace(CONFIGURED, rejected=NO_SECRET, number=at(ELSEWHERE), was_configured=True),
        (SET_WEBHOOK,),
        Reason.SecretNotFound,
    ),
    Row(
        "suspend leaves Twilio as it is: neither drift is corrected nor a former number restored",
        SUSPENDED,
        replace(MOVED, number=at(ELSEWHERE)),
        (),
        Reason.Suspended,
    ),
    Row(
        "a channel that is created suspended claims nothing",
        SUSPENDED,
        NEW,
        (),
        Reason.Suspended,
    ),
)

POLICY_EDITED = (
    Row(
        "the policy of a configured channel is recorded",
        RETAIN,
        CONFIGURED,
        (UpdateRecord(replace(RECORD, deletion_policy=DeletionPolicy.RETAIN)),),
        Reason.Configured,
    ),
    Row(
        "a policy edited while the channel cannot be configured applies if the channel is deleted next",
        RETAIN,
        replace(CONFIGURED, number=DENIED),
        (UpdateRecord(replace(RECORD, deletion_policy=DeletionPolicy.RETAIN)),),
        Reason.AuthenticationFailed,
    ),
    Row(
        "the same for each record of a channel that waits for another number",
        RETAIN,
        replace(MOVED, number=IN_USE, to_restore={}),
        (
            UpdateRecord(replace(OLD_RECORD, deletion_policy=DeletionPolicy.RETAIN)),
            UpdateRecord(replace(RECORD, deletion_policy=DeletionPolicy.RETAIN)),
        ),
        Reason.NumberInUse,
    ),
    Row(
        "a suspended channel records its edited policy",
        replace(CLEAR, suspend=True),
        CONFIGURED,
        (UpdateRecord(replace(RECORD, deletion_policy=DeletionPolicy.CLEAR)),),
        Reason.Suspended,
    ),
    Row(
        "a suspended channel records it for each of its numbers",
        replace(CLEAR, suspend=True),
        MOVED,
        (
            UpdateRecord(replace(OLD_RECORD, deletion_policy=DeletionPolicy.CLEAR)),
            UpdateRecord(replace(RECORD, deletion_policy=DeletionPolicy.CLEAR)),
        ),
        Reason.Suspended,
    ),
    Row(
        "a channel whose new number is refused records it for the number that it still has",
        replace(IF_UNUSED, deletion_policy=DeletionPolicy.CLEAR),
        replace(NEW, records=by_number(OLD_RECORD), finalizer=True),
        (UpdateRecord(replace(OLD_RECORD, deletion_policy=DeletionPolicy.CLEAR)),),
        Reason.WebhookForeign,
        Effective.FOREIGN_URL,
    ),
    Row(
        "the policy is recorded before a former number is restored by it",
        CLEAR,
        MOVED,
        (
            UpdateRecord(replace(OLD_RECORD, deletion_policy=DeletionPolicy.CLEAR)),
            UpdateRecord(replace(RECORD, deletion_policy=DeletionPolicy.CLEAR)),
        ),
        Reason.Configured,
    ),
)

RECORD_UNREADABLE = (
    Row(
        "a record that cannot be opened is neither written over nor deleted",
        DESIRED,
        replace(CONFIGURED, records=by_number(UNREADABLE), number=NO_RECORD),
        (),
        Reason.RecordUnreadable,
    ),
    Row(
        "an edited policy is recorded all the same: it is not part of the sealed contents",
        RETAIN,
        replace(CONFIGURED, records=by_number(UNREADABLE), number=NO_RECORD),
        (UpdateRecord(replace(UNREADABLE, deletion_policy=DeletionPolicy.RETAIN)),),
        Reason.RecordUnreadable,
    ),
    Row(
        "a former number whose record cannot be opened stays held, and the channel works",
        DESIRED,
        replace(MOVED, records=by_number(OLD_UNREADABLE, RECORD), to_restore={"PN0": DAMAGED}),
        (),
        Reason.Configured,
    ),
    Row(
        "a newer login is not recorded where the contents cannot be opened",
        DESIRED,
        replace(
            MOVED,
            records=by_number(OLD_UNREADABLE, RECORD),
            to_restore={"PN0": DAMAGED},
            login=NEWER,
            source="secret/twilio@2",
        ),
        (UpdateRecord(replace(RECORD.with_contents(login=NEWER), source="secret/twilio@2")),),
        Reason.Configured,
    ),
    Row(
        "a record that cannot be opened holds the finalizer during the grace period",
        None,
        replace(DELETING, records=by_number(UNREADABLE), to_restore={"PN1": DAMAGED}),
        (),
        Reason.RestoreFailed,
    ),
    Row(
        "a record that cannot be opened does not block the deletion, and gets a deadline like any other",
        None,
        replace(LATE, records=by_number(UNREADABLE), to_restore={"PN1": DAMAGED}),
        (UpdateRecord(replace(UNREADABLE, restore_since=NOW)), RemoveFinalizer()),
        Reason.RestoreFailed,
    ),
    Row(
        "a record that cannot be opened, of a channel that is gone, keeps its number until the deadline",
        None,
        replace(
            GONE,
            records=by_number(replace(UNREADABLE, restore_since=DEADLINE_OVER + SECOND)),
            to_restore={"PN1": DAMAGED},
        ),
        (),
        Reason.RestoreFailed,
    ),
    Row(
        "after the deadline a record that cannot be opened is written off: its number is free again",
        None,
        replace(GONE, records=by_number(replace(UNREADABLE, restore_since=DEADLINE_OVER)), to_restore={"PN1": DAMAGED}),
        (WriteOff(replace(UNREADABLE, restore_since=DEADLINE_OVER), str(DAMAGED)),),
        Reason.RestoreFailed,
    ),
)

CONTENTS_NOT_READ = (
    Row(
        "no webhook is set while the record that should name it cannot be opened",
        DESIRED,
        replace(CONFIGURED, records=by_number(UNREADABLE), number=at(ELSEWHERE), was_configured=True),
        (),
        Reason.RecordUnreadable,
    ),
    Row(
        "a record that was not opened is not taken for restored, even if its number left the account",
        None,
        replace(LATE, records=by_number(UNREADABLE), to_restore={"PN1": None}),
        (UpdateRecord(replace(UNREADABLE, restore_since=NOW)), RemoveFinalizer()),
        Reason.RestoreFailed,
    ),
    Row(
        "the same if it points at us",
        None,
        replace(DELETING, records=by_number(UNREADABLE)),
        (),
        Reason.RestoreFailed,
    ),
)

NUMBER_CHANGED = (
    Row(
        "the new number is claimed before the old one is restored",
        DESIRED,
        replace(MOVED, records=by_number(OLD_RECORD), number=NUMBER),
        (CreateRecord(RECORD),),
        Reason.Pending,
    ),
    Row(
        "the new number is configured before the old one is restored",
        DESIRED,
        replace(MOVED, number=NUMBER),
        (SET_WEBHOOK,),
        Reason.Configured,
    ),
    Row(
        "once the new number points at us, the old one is restored",
        DESIRED,
        MOVED,
        (RestoreWebhook(OLD_RECORD, BEFORE),),
        Reason.Configured,
    ),
    Row(
        "once the old number is restored, its record is deleted",
        DESIRED,
        replace(MOVED, to_restore={"PN0": at(BEFORE, "PN0")}),
        (DeleteRecord(OLD_RECORD),),
        Reason.Configured,
    ),
    Row(
        "an old number whose previous webhook is not known is freed as it is, and reported",
        DESIRED,
        replace(MOVED, records=by_number(OLD_RECORD.with_contents(previous=None), RECORD)),
        (DeleteRecord(OLD_RECORD.with_contents(previous=None), orphaned=True),),
        Reason.Configured,
    ),
    Row(
        "a restore that is refused stays pending, and the channel works all the same",
        DESIRED,
        replace(MOVED, to_restore={"PN0": DENIED}),
        (),
        Reason.Configured,
    ),
    Row(
        "a number that Twilio moved to another account keeps its SID: it is restored there, with that login",
        replace(DESIRED, account_sid=OTHER_ACCOUNT),
        replace(CONFIGURED, login=OTHER_LOGIN),
        (UpdateRecord(replace(RECORD.with_contents(login=OTHER_LOGIN), account_sid=OTHER_ACCOUNT)),),
        Reason.Configured,
    ),
    Row(
        "a former number stays in the account where it was, with the login that it had",
        replace(DESIRED, account_sid=OTHER_ACCOUNT),
        replace(MOVED, login=OTHER_LOGIN, to_restore={"PN0": DOWN}),
        (UpdateRecord(replace(RECORD.with_contents(login=OTHER_LOGIN), account_sid=OTHER_ACCOUNT)),),
        Reason.Configured,
    ),
    Row(
        "an old number that left the account need not be restored",
        DESIRED,
        replace(MOVED, to_restore={"PN0": None}),
        (DeleteRecord(OLD_RECORD),),
        Reason.Configured,
    ),
    Row(
        "of two old numbers the one that is restored is freed, whatever becomes of the other",
        DESIRED,
        replace(MOVED, records=by_number(OLDER_RECORD, OLD_RECORD, RECORD), to_restore={"PN9": None, "PN0": DOWN}),
        (DeleteRecord(OLDER_RECORD),),
        Reason.Configured,
    ),
    Row(
        "of two old numbers the one that can be restored is, although the other is refused",
        DESIRED,
        replace(
            MOVED,
            records=by_number(OLDER_RECORD, OLD_RECORD, RECORD),
            to_restore={"PN9": DENIED, "PN0": at(OURS, "PN0")},
        ),
        (RestoreWebhook(OLD_RECORD, BEFORE),),
        Reason.Configured,
    ),
    Row(
        "several old numbers are restored independently",
        DESIRED,
        replace(
            MOVED,
            records=by_number(OLDER_RECORD, OLD_RECORD, RECORD),
            to_restore={"PN9": at(BEFORE, "PN9"), "PN0": at(OURS, "PN0")},
        ),
        (DeleteRecord(OLDER_RECORD), RestoreWebhook(OLD_RECORD, BEFORE)),
        Reason.Configured,
    ),
    Row(
        "the old number is restored also if the new one, which did work, was changed since",
        REPORT,
        replace(MOVED, number=at(ELSEWHERE), was_configured=True),
        (RestoreWebhook(OLD_RECORD, BEFORE),),
        Reason.WebhookDrifted,
        Effective.URL_MISMATCH,
    ),
)

SWAPPED = (
    Row(
        "a holder that waits for our number cannot free the desired one before, so ours is restored first",
        DESIRED,
        replace(CONFIGURED, number=IN_USE, to_restore={"PN1": at(OURS)}),
        (UpdateRecord(replace(RECORD, restore_since=NOW)),),
        Reason.NumberInUse,
    ),
    Row(
        "once that is written down, so that it is finished even if the swap falls through, the number is restored",
        DESIRED,
        replace(
            CONFIGURED,
            number=IN_USE,
            records={"PN1": replace(RECORD, restore_since=NOW)},
            to_restore={"PN1": at(OURS)},
        ),
        (RestoreWebhook(replace(RECORD, restore_since=NOW), BEFORE),),
        Reason.NumberInUse,
    ),
    Row(
        "once it is restored, the record and with it the claim is deleted; the finalizer stays",
        DESIRED,
        replace(CONFIGURED, number=IN_USE, to_restore={"PN1": at(BEFORE)}),
        (DeleteRecord(RECORD),),
        Reason.NumberInUse,
    ),
    Row(
        "without a record there is nothing left to do but wait",
        DESIRED,
        replace(CONFIGURED, records={}, number=IN_USE),
        (),
        Reason.NumberInUse,
    ),
    Row(
        "a number that cannot be restored stays claimed",
        DESIRED,
        replace(MOVED, number=IN_USE, to_restore={"PN1": DOWN, "PN0": DENIED}),
        (),
        Reason.NumberInUse,
    ),
    Row(
        "a number that is restored is freed, although another one cannot be restored",
        DESIRED,
        replace(MOVED, number=IN_USE, to_restore={"PN1": at(BEFORE), "PN0": DENIED}),
        (DeleteRecord(RECORD),),
        Reason.NumberInUse,
    ),
    Row(
        "a channel that is part of no swap keeps what works until the desired number is free",
        DESIRED,
        replace(CONFIGURED, number=IN_USE),
        (),
        Reason.NumberInUse,
    ),
    Row(
        "the current policy decides what the number is restored to",
        RETAIN,
        replace(CONFIGURED, number=IN_USE, to_restore={"PN1": None}),
        (UpdateRecord(replace(RECORD, deletion_policy=DeletionPolicy.RETAIN)),),
        Reason.NumberInUse,
    ),
    Row(
        "Retain frees the number as it is",
        RETAIN,
        replace(
            CONFIGURED,
            records=by_number(replace(RECORD, deletion_policy=DeletionPolicy.RETAIN)),
            number=IN_USE,
            to_restore={"PN1": None},
        ),
        (DeleteRecord(replace(RECORD, deletion_policy=DeletionPolicy.RETAIN)),),
        Reason.NumberInUse,
    ),
)

DELETED = (
    Row(
        "Restore writes what was there before the channel",
        None,
        DELETING,
        (RestoreWebhook(RECORD, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "Clear writes an empty webhook",
        None,
        replace(DELETING, records=by_number(replace(RECORD, deletion_policy=DeletionPolicy.CLEAR))),
        (RestoreWebhook(replace(RECORD, deletion_policy=DeletionPolicy.CLEAR), UNUSED),),
        Reason.Restoring,
    ),
    Row(
        "Retain leaves the webhook and frees the number",
        None,
        replace(
            DELETING,
            records=by_number(replace(RECORD, deletion_policy=DeletionPolicy.RETAIN)),
            to_restore={"PN1": None},
        ),
        (DeleteRecord(replace(RECORD, deletion_policy=DeletionPolicy.RETAIN)),),
        Reason.Restoring,
    ),
    Row(
        "Restore leaves the webhook if the previous one is not known, and reports the number as orphaned",
        None,
        replace(DELETING, records=by_number(RECORD.with_contents(previous=None))),
        (DeleteRecord(RECORD.with_contents(previous=None), orphaned=True),),
        Reason.Restoring,
    ),
    Row(
        "a number that points elsewhere is not orphaned, even if its previous webhook is not known",
        None,
        replace(DELETING, records=by_number(RECORD.with_contents(previous=None)), to_restore={"PN1": at(ELSEWHERE)}),
        (DeleteRecord(RECORD.with_contents(previous=None)),),
        Reason.Restoring,
    ),
    Row(
        "a former URL of ours is restored as well",
        None,
        replace(
            DELETING,
            records=by_number(RECORD.with_contents(wrote=(FORMER.url, OURS.url))),
            to_restore={"PN1": at(FORMER)},
        ),
        (RestoreWebhook(RECORD.with_contents(wrote=(FORMER.url, OURS.url)), BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "our URL with a changed method still points at us",
        None,
        replace(DELETING, to_restore={"PN1": at(OURS_GET)}),
        (RestoreWebhook(RECORD, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "a number that is restored is freed",
        None,
        replace(DELETING, to_restore={"PN1": at(BEFORE)}),
        (DeleteRecord(RECORD),),
        Reason.Restoring,
    ),
    Row(
        "a number that points elsewhere is left as it is",
        None,
        replace(DELETING, to_restore={"PN1": at(ELSEWHERE)}),
        (DeleteRecord(RECORD),),
        Reason.Restoring,
    ),
    Row(
        "a number that left the account need not be restored",
        None,
        replace(DELETING, to_restore={"PN1": None}),
        (DeleteRecord(RECORD),),
        Reason.Restoring,
    ),
    Row(
        "once the last record is deleted, the finalizer is removed",
        None,
        replace(DELETING, records={}, to_restore={}),
        (RemoveFinalizer(),),
        Reason.Restoring,
    ),
    Row(
        "of two numbers the one that is restored is freed at once",
        None,
        replace(DELETING, records=by_number(OLD_RECORD, RECORD), to_restore={"PN0": None, "PN1": DOWN}),
        (DeleteRecord(OLD_RECORD),),
        Reason.Restoring,
    ),
    Row(
        "of two numbers the one that can be restored is, although the other is refused",
        None,
        replace(DELETING, records=by_number(OLD_RECORD, RECORD), to_restore={"PN0": DENIED, "PN1": at(OURS)}),
        (RestoreWebhook(RECORD, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "while Twilio is unavailable, the finalizer waits",
        None,
        replace(DELETING, to_restore={"PN1": DOWN}),
        (),
        Reason.Restoring,
    ),
    Row(
        "a refusal is reported as one, and the finalizer waits as well",
        None,
        replace(DELETING, to_restore={"PN1": DENIED}),
        (),
        Reason.RestoreFailed,
    ),
    Row(
        "of several errors a refusal is reported: an outage ends by itself",
        None,
        replace(DELETING, records=by_number(OLD_RECORD, RECORD), to_restore={"PN0": DOWN, "PN1": DENIED}),
        (),
        Reason.RestoreFailed,
    ),
    Row(
        "the finalizer waits until the last second of the grace period",
        None,
        replace(DELETING, deleted_at=GRACE_OVER + SECOND, to_restore={"PN1": DOWN}),
        (),
        Reason.Restoring,
    ),
    Row(
        "after the grace period the finalizer is removed; the record stays, with the channel's last policy",
        None,
        replace(
            LATE,
            records=by_number(replace(RECORD, deletion_policy=DeletionPolicy.CLEAR)),
            to_restore={"PN1": DOWN},
        ),
        (
            UpdateRecord(replace(RECORD, deletion_policy=DeletionPolicy.CLEAR, restore_since=NOW)),
            RemoveFinalizer(),
        ),
        Reason.Restoring,
    ),
    Row(
        "after the grace period each number that is not restored gets a deadline",
        None,
        replace(LATE, records=by_number(OLD_RECORD, RECORD), to_restore={"PN0": DENIED, "PN1": DOWN}),
        (
            UpdateRecord(replace(OLD_RECORD, restore_since=NOW)),
            UpdateRecord(replace(RECORD, restore_since=NOW)),
            RemoveFinalizer(),
        ),
        Reason.RestoreFailed,
    ),
    Row(
        "a record whose channel was removed by force is to be restored from the moment that this is observed",
        None,
        replace(GONE, to_restore={"PN1": DOWN}),
        (UpdateRecord(replace(RECORD, restore_since=NOW)),),
        Reason.Restoring,
    ),
    Row(
        "a record without a channel just waits for Twilio, and its deadline is not put off",
        None,
        replace(
            GONE,
            records=by_number(replace(RECORD, restore_since=DEADLINE_OVER + SECOND)),
            to_restore={"PN1": DOWN},
        ),
        (),
        Reason.Restoring,
    ),
    Row(
        "after the deadline a number that is not restored is written off, and the reason is recorded",
        None,
        replace(GONE, records=by_number(replace(RECORD, restore_since=DEADLINE_OVER)), to_restore={"PN1": DENIED}),
        (WriteOff(replace(RECORD, restore_since=DEADLINE_OVER), str(DENIED)),),
        Reason.RestoreFailed,
    ),
    Row(
        "each number has a deadline of its own",
        None,
        replace(
            GONE,
            records=by_number(replace(OLD_RECORD, restore_since=DEADLINE_OVER), RECORD),
            to_restore={"PN0": DENIED, "PN1": DOWN},
        ),
        (
            WriteOff(replace(OLD_RECORD, restore_since=DEADLINE_OVER), str(DENIED)),
            UpdateRecord(replace(RECORD, restore_since=NOW)),
        ),
        Reason.RestoreFailed,
    ),
    Row(
        "a finalizer that could not be removed until the deadline does not wait any longer",
        None,
        replace(LATE, records=by_number(replace(RECORD, restore_since=DEADLINE_OVER)), to_restore={"PN1": DOWN}),
        (WriteOff(replace(RECORD, restore_since=DEADLINE_OVER), str(DOWN)), RemoveFinalizer()),
        Reason.Restoring,
    ),
    Row(
        "a number that can be restored after the deadline is restored",
        None,
        replace(GONE, records=by_number(replace(RECORD, restore_since=DEADLINE_OVER))),
        (RestoreWebhook(replace(RECORD, restore_since=DEADLINE_OVER), BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "a number that can be restored after the grace period is, before the finalizer is removed",
        None,
        LATE,
        (RestoreWebhook(RECORD, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "an orphan's number is restored although nothing waits for it",
        None,
        GONE,
        (RestoreWebhook(RECORD, BEFORE),),
        Reason.Restoring,
    ),
    Row(
        "an orphan's record is deleted; there is no finalizer to remove",
        None,
        replace(GONE, to_restore={"PN1": at(BEFORE)}),
        (DeleteRecord(RECORD),),
        Reason.Restoring,
    ),
    Row(
        "a channel that never claimed a number loses its finalizer at once",
        None,
        Observed(finalizer=True, deleted_at=NOW),
        (RemoveFinalizer(),),
        Reason.Restoring,
    ),
    Row(
        "nothing is left to do for a channel without record and finalizer",
        None,
        Observed(),
        (),
        Reason.Restoring,
    ),
)

TABLE = (
    *CREATED,
    *REFUSED,
    *CHANGED,
    *POLICY_EDITED,
    *RECORD_UNREADABLE,
    *CONTENTS_NOT_READ,
    *NUMBER_CHANGED,
    *SWAPPED,
    *DELETED,
)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.why)
def test_table(row: Row) -> None:
    planned = plan(row.desired, row.observed, RULES, NOW)
    assert planned.changes == row.changes, row.why
    assert planned.verdict.reason is row.reason, row.why
    assert planned.verdict.effective is row.effective, row.why
    is_found = isinstance(row.observed.number, Number) and row.observed.login is not None
    is_suspended = row.desired is not None and row.desired.suspend
    assert planned.verdict.number_sid == ("PN1" if is_found and not is_suspended else ""), "the number that it is about"
    if row.observed.rejected is None:
        assert planned.verdict.rejected is None, "conditions would report credentials as rejected"


def test_grace_period_is_judged_when_the_plan_is_made() -> None:
    """Reading from Twilio may take long: an observation from before the end of the grace period does not prolong it."""
    observed = replace(DELETING, deleted_at=NOW, to_restore={"PN1": DOWN})
    assert plan(None, observed, RULES, NOW + GRACE - SECOND).changes == ()
    assert RemoveFinalizer() in plan(None, observed, RULES, NOW + GRACE).changes


def test_deadline_is_recorded_in_whole_seconds() -> None:
    """Annotations have no fractions of seconds: otherwise the cached record would differ from the listed one."""
    observed = replace(GONE, to_restore={"PN1": DOWN})
    (change,) = plan(None, observed, RULES, NOW + timedelta(microseconds=7)).changes
    assert change == UpdateRecord(replace(RECORD, restore_since=NOW))


def test_message_of_a_failed_restore_is_the_refusal() -> None:
    observed = replace(DELETING, records=by_number(OLD_RECORD, RECORD), to_restore={"PN0": DOWN, "PN1": DENIED})
    assert plan(None, observed, RULES, NOW).verdict.message == f"The number is not restored yet: {DENIED}"


@pytest.mark.parametrize("error", [DENIED, DAMAGED])
def test_failed_restore_of_a_former_number_is_reported_with_the_working_one(error: ChannelError) -> None:
    verdict = plan(DESIRED, replace(MOVED, to_restore={"PN0": error}), RULES, NOW).verdict
    assert OLD_RECORD.phone_number in verdict.message
    assert str(error) in verdict.message


def test_outage_during_the_restore_of_a_former_number_does_not_change_the_verdict() -> None:
    """Otherwise the changing text of an outage would be written into the status each time."""
    verdict = plan(DESIRED, replace(MOVED, to_restore={"PN0": DOWN}), RULES, NOW).verdict
    assert verdict == plan(DESIRED, CONFIGURED, RULES, NOW).verdict


@pytest.mark.parametrize(
    ("observed", "reason"),
    [
        (CONFIGURED, Reason.TokenRejected),
        (replace(CONFIGURED, number=at(ELSEWHERE), was_configured=True), Reason.WebhookDrifted),
        (replace(CONFIGURED, routing=Routing(service_sid="MG1")), Reason.WebhookOverridden),
        (replace(NEW, number=replace(NUMBER, receives_sms=False)), Reason.NumberLacksSms),
    ],
)
def test_rejected_token_is_reported_whatever_else_is_wrong(observed: Observed, reason: Reason) -> None:
    verdict = plan(REPORT, replace(observed, rejected=DENIED), RULES, NOW).verdict
    assert (verdict.reason, verdict.rejected) == (reason, DENIED)


@pytest.mark.parametrize(
    ("refused", "observed", "says_so"),
    [
        (DENIED, replace(UNSEEN, records={}, lost=True), True),
        (DENIED, replace(WAITED_FOR, records={}), True),
        (DENIED, WAITED_FOR, False),
        (IN_USE, replace(UNSEEN, records={}, lost=True), False),
    ],
    ids=["it was lost before", "it was lost just now", "it is still held", "its own message says so"],
)
def test_reason_of_a_channel_that_lost_its_number_says_so(refused: Refused, observed: Observed, says_so: bool) -> None:
    verdict = plan(DESIRED, replace(observed, number=refused), RULES, NOW).verdict
    assert verdict.reason is refused.reason
    assert ("serves another channel now" in verdict.message) is says_so


@pytest.mark.parametrize(
    ("rejected", "reason", "recheck"),
    [
        (None, Reason.Configured, Recheck.DRIFT),
        (DENIED, Reason.TokenRejected, Recheck.SLOW),
        (NO_SECRET, Reason.SecretNotFound, Recheck.DRIFT),
        (Refused(Reason.TokenUnreadable, "It was cut."), Reason.TokenUnreadable, Recheck.DRIFT),
    ],
)
def test_channel_that_works_is_ready_whatever_its_newer_credentials(
    rejected: Refused | None, reason: Reason, recheck: Recheck
) -> None:
    verdict = plan(DESIRED, replace(CONFIGURED, rejected=rejected), RULES, NOW).verdict
    assert (verdict.reason, verdict.ready, verdict.progress) == (reason, "True", "Stalled" if rejected else None)
    assert verdict.recheck is recheck


def test_messaging_service_may_keep_the_number() -> None:
    """Without it, numbers in the USA cannot send; an application has no such setting."""
    service = plan(DESIRED, replace(CONFIGURED, routing=Routing(service_sid="MG1")), RULES, NOW).verdict.message
    assert 'With "Defer to sender\'s webhook" in its integration settings (UseInboundWebhookOnNumber)' in service
    assert "Take the number out" not in service + Reason.WebhookOverridden.remedy
    application = plan(
        DESIRED, replace(CONFIGURED, number=replace(at(OURS), application_sid="AP1")), RULES, NOW
    ).verdict.message
    assert application == "The TwiML application AP1 receives this number's messages. Take the number out of it."


@pytest.mark.parametrize("rejected", [None, DENIED])
def test_routing_that_cannot_be_read_is_reported(rejected: Refused | None) -> None:
    observed = replace(CONFIGURED, routing=Routing(unknown="Why."), rejected=rejected)
    assert plan(DESIRED, observed, RULES, NOW).verdict.unknown == "Why."


def test_desired_state_comes_from_spec_and_template() -> None:
    channel = SmsChannel.model_validate(
        {
            "metadata": {
                "name": INSTANCE,
                "namespace": NAMESPACE,
                "uid": "uid-1",
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {
                "accountSid": ACCOUNT,
                "phoneNumber": DESIRED.phone_number,
                "credentials": {"secretKeyRef": {"name": "twilio", "key": "auth_token"}},
            },
        }
    )
    assert desired(channel, TEMPLATE) == DESIRED
    assert desired(channel.as_deleted(NOW), TEMPLATE) is None, "nothing is desired while it is being deleted"


def test_desired_webhook_has_the_namespace_if_the_template_asks_for_it() -> None:
    channel = SmsChannel.model_validate(
        {
            "metadata": {
                "name": INSTANCE,
                "namespace": "team-a",
                "uid": "uid-1",
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {
                "accountSid": ACCOUNT,
                "phoneNumber": DESIRED.phone_number,
                "credentials": {"secretKeyRef": {"name": "twilio", "key": "auth_token"}},
            },
        }
    )
    found = desired(channel, WebhookTemplate("https://sms.example.com/{namespace}/{instance_id}"))
    assert found is not None
    assert found.webhook.url == f"https://sms.example.com/team-a/{INSTANCE}"


@pytest.mark.parametrize(
    ("url", "used"),
    [
        pytest.param("https://demo.twilio.com/welcome/sms/reply/", False, id="what new numbers have"),
        pytest.param("http://demo.twilio.com/docs/sms.xml", False, id="what numbers had that were bought years ago"),
        pytest.param("https://DEMO.twilio.com", False, id="hosts know no case, and need no path"),
        pytest.param("https://demo.twilio.com.example.com/", True, id="a host that only begins like it"),
        pytest.param("https://demo.twilio.com@example.com/", True, id="a user of that name"),
        pytest.param("https://[demo.twilio.com/", True, id="not a URL"),
    ],
)
def test_twilios_demo_counts_as_unused(url: str, used: bool) -> None:
    verdict = plan(IF_UNUSED, replace(NEW, number=at(Webhook(url=url, method="POST"))), RULES, NOW).verdict
    assert verdict.reason is (Reason.WebhookForeign if used else Reason.Pending)


# What holds for every observation

WEBHOOKS = st.sampled_from((OURS, OURS_GET, ANOTHER_INSTANCE, FORMER, BEFORE, ELSEWHERE, UNUSED))
# A later template may make URLs that were found as previous ones.
PREVIOUS = st.sampled_from((None, BEFORE, ELSEWHERE, UNUSED, OURS, FORMER))
WROTE = st.sampled_from(((OURS.url,), (FORMER.url,), (FORMER.url, OURS.url)))
ERRORS = st.sampled_from((DOWN, DENIED))
NUMBER_SIDS = ("PN0", "PN1", "PN2")
FAILED_RESTORES = st.dictionaries(st.sampled_from(NUMBER_SIDS), st.none() | ERRORS)
MOST_ROUNDS = 6


@st.composite
def records(draw: st.DrawFn, number_sid: str) -> Record:
    contents = Contents(login=LOGIN, previous=draw(PREVIOUS), wrote=draw(WROTE))
    return replace(
        RECORD,
        number_sid=number_sid,
        account_sid=draw(st.sampled_from((ACCOUNT, OTHER_ACCOUNT))),
        deletion_policy=draw(st.sampled_from(DeletionPolicy)),
        restore_since=draw(st.sampled_from((None, NOW, DEADLINE_OVER))),
        unseen_since=draw(st.sampled_from((None, NOW, NOW - HOUR))),
        contents=draw(st.sampled_from((contents, contents, None))),
    )


@st.composite
def situations(draw: st.DrawFn) -> tuple[Desired | None, Observed]:
    """Observations that a Reconciler can make: all numbers but the desired one are read, unless that one is refused."""
    channel = draw(
        st.none()
        | st.builds(
            replace,
            st.just(DESIRED),
            suspend=st.booleans(),
            takeover_policy=st.sampled_from(TakeoverPolicy),
            drift_policy=st.sampled_from(DriftPolicy),
            deletion_policy=st.sampled_from(DeletionPolicy),
        )
    )
    held = {sid: draw(records(sid)) for sid in draw(st.lists(st.sampled_from(NUMBER_SIDS), unique=True))}
    number: Number | Refused | None = None
    if channel is not None:
        number = draw(
            st.sampled_from((DENIED, IN_USE))
            | st.builds(
                replace,
                st.just(NUMBER),
                webhook=WEBHOOKS,
                application_sid=st.sampled_from(("", "AP1")),
                receives_sms=st.booleans(),
            )
        )
    found = number.sid if isinstance(number, Number) else None
    is_swap = number is IN_USE and draw(st.booleans())
    to_restore: dict[str, Current] = {}
    for number_sid, record in held.items():
        if number_sid == found or (isinstance(number, Refused) and not is_swap):
            continue
        if record.contents is None:
            to_restore[number_sid] = draw(st.sampled_from((DAMAGED, None)))
        else:
            to_restore[number_sid] = draw(st.none() | ERRORS | st.builds(at, WEBHOOKS, st.just(number_sid)))
    deleted_at = draw(st.sampled_from((None, NOW, GRACE_OVER))) if channel is None else None
    opened = [number_sid for number_sid, record in held.items() if record.contents and number is DENIED]
    unseen = {number_sid: draw(st.booleans()) for number_sid in opened if draw(st.booleans())}
    waited_for = [number_sid for number_sid, each in unseen.items() if each and draw(st.booleans())]
    waiters = {each: replace(WAITER, number=at(draw(WEBHOOKS), each)) for each in waited_for}
    return channel, Observed(
        unseen=unseen,
        waiters=waiters,
        records=held,
        to_restore=to_restore,
        finalizer=draw(st.booleans()) if channel or deleted_at else False,
        deleted_at=deleted_at,
        login=draw(st.sampled_from((LOGIN, NEWER))) if found else None,
        source=draw(st.sampled_from(("sealed", "secret/twilio@2"))),
        number=number,
        rejected=draw(st.none() | st.just(DENIED)) if found else None,
        routing=draw(st.sampled_from((Routing(), Routing(service_sid="MG1"), Routing(unknown="Why.")))),
        was_configured=draw(st.booleans()),
        was_named=draw(st.booleans()),
        corrections=draw(st.sampled_from((0, 2, 3))),
    )


def after(change: Change, observed: Observed, failed: Mapping[str, ChannelError | None]) -> Observed:
    """Return what is observed after a change; `failed` restores end in an error, or find that the number is gone."""
    match change:
        case AddFinalizer():
            assert not observed.finalizer
            return replace(observed, finalizer=True)
        case RemoveFinalizer():
            assert observed.finalizer, "there may be no channel to remove it from"
            return replace(observed, finalizer=False)
        case CreateRecord(record):
            assert record.number_sid not in observed.records, "a claim is made once"
            return with_record(observed, record)
        case UpdateRecord(record):
            before = observed.records[record.number_sid]
            assert before != record, "nothing is written twice"
            assert (before.contents is None) is (record.contents is None), "sealed contents stay as they are"
            return with_record(observed, record)
        case DeleteRecord(record) | WriteOff(record):
            assert observed.records[record.number_sid] == record
            return without_record(observed, record)
        case SetWebhook(_, _, number_sid, webhook):
            assert isinstance(observed.number, Number)
            assert observed.number.sid == number_sid
            assert observed.number.webhook != webhook, "nothing is written twice"
            return replace(observed, number=replace(observed.number, webhook=webhook))
        case RestoreWebhook(record, webhook):
            number_sid = record.number_sid
            waiter = observed.waiters.get(number_sid)
            before_restore = observed.to_restore.get(number_sid, waiter.number if waiter else None)
            assert isinstance(before_restore, Number), "what was not read is not written"
            assert before_restore.webhook != webhook, "nothing is written twice"
            current: Current = failed[number_sid] if number_sid in failed else at(webhook, number_sid)
            return with_current(observed, record, current)


def check_order(change: Change, observed: Observed) -> None:
    """The safe order: finalizer, record, Twilio; and back: restored, record deleted, finalizer removed."""
    match change:
        case CreateRecord(record):
            assert observed.finalizer, "the finalizer is there before the record"
            assert record.contents
            assert not (record.contents.previous and TEMPLATE.made(record.contents.previous.url)), (
                "a webhook of ours is never recorded as the previous one"
            )
        case SetWebhook(_, _, number_sid, webhook):
            held = observed.records.get(number_sid)
            assert observed.finalizer, "the finalizer is there before Twilio is written"
            assert held, "the record is there before Twilio is written"
            assert held.contents
            assert webhook.url in held.contents.wrote, "a URL is recorded as ours before it is written"
        case RestoreWebhook(record, _):
            waiter = observed.waiters.get(record.number_sid)
            current = observed.to_restore.get(record.number_sid, waiter.number if waiter else None)
            assert isinstance(current, Number)
            assert record.contents
            assert record.contents.points_at_us(current.webhook), "other webhooks are never overwritten"
        case DeleteRecord(record, orphaned):
            current = observed.to_restore[record.number_sid]
            assert record.contents, "a record that cannot be opened holds its number"
            assert not isinstance(current, ChannelError), "a number that is not restored stays claimed"
            if current and record.contents.points_at_us(current.webhook):
                retained = record.deletion_policy is DeletionPolicy.RETAIN
                assert retained or orphaned or record.contents.previous == current.webhook or not current.webhook.url
        case WriteOff(record):
            assert record.restore_since
            assert record.restore_since <= DEADLINE_OVER
        case RemoveFinalizer():
            late = observed.deleted_at is None or observed.deleted_at <= GRACE_OVER
            assert late or not observed.records, "the finalizer goes last"
            assert all(record.restore_since for record in observed.records.values()), "what remains has a deadline"


@settings(deadline=None)
@given(situation=situations(), failed=FAILED_RESTORES)
def test_applied_plans_end_and_keep_the_safe_order(
    situation: tuple[Desired | None, Observed], failed: Mapping[str, ChannelError | None]
) -> None:
    channel, observed = situation
    written: list[str] = []
    for _ in range(MOST_ROUNDS):
        changes = plan(channel, observed, RULES, NOW).changes
        if not changes:
            return
        kinds = {type(change) for change in changes}
        assert not {CreateRecord, SetWebhook} <= kinds, "the API server may answer a claim with an older record"
        for change in changes:
            check_order(change, observed)
            observed = after(change, observed, failed)
            if isinstance(change, SetWebhook):
                written.append(change.number_sid)
            elif isinstance(change, RestoreWebhook):
                written.append(change.record.number_sid)
            assert len(written) == len(set(written)), "no number is written twice"
    pytest.fail(f"changes are still planned after {MOST_ROUNDS} rounds: {plan(channel, observed, RULES, NOW).changes}")


@settings(deadline=None)
@given(situation=situations())
def test_foreseen_changes_are_the_applied_ones(situation: tuple[Desired | None, Observed]) -> None:
    channel, observed = situation
    foreseen = foresee(channel, observed, RULES, NOW)
    made: list[Change] = []
    while changes := plan(channel, observed, RULES, NOW).changes:
        for change in changes:
            observed = after(change, observed, {})
        made += changes
    assert foreseen.changes == tuple(made)
    assert foreseen.verdict == plan(channel, observed, RULES, NOW).verdict, "as it is reported in the end"


@settings(deadline=None)
@given(situation=situations())
def test_suspended_channel_writes_policies_only(situation: tuple[Desired | None, Observed]) -> None:
    channel, observed = situation
    if channel is not None:
        for change in plan(replace(channel, suspend=True), observed, RULES, NOW).changes:
            assert isinstance(change, UpdateRecord)
            before = observed.records[change.record.number_sid]
            assert change.record == replace(before, deletion_policy=channel.deletion_policy, unseen_since=None)


@settings(deadline=None)
@given(situation=situations(), failed=FAILED_RESTORES)
def test_deletion_always_ends(
    situation: tuple[Desired | None, Observed], failed: Mapping[str, ChannelError | None]
) -> None:
    _, observed = situation
    to_restore: dict[str, Current] = {
        number_sid: observed.to_restore.get(number_sid) if record.contents else DAMAGED
        for number_sid, record in observed.records.items()
    }
    observed = replace(observed, to_restore=to_restore, deleted_at=GRACE_OVER, finalizer=True)
    for _ in range(MOST_ROUNDS):
        for change in plan(None, observed, RULES, NOW).changes:
            observed = after(change, observed, failed)
    assert not observed.finalizer, "after the grace period the resource goes, whatever Twilio answers"


def test_deletion_ends_if_the_previous_webhook_matches_a_later_template() -> None:
    """The previous webhook is a URL of a later template: restoring it must end."""
    record = RECORD.with_contents(previous=OURS, wrote=("https://typo.example.com/", OURS.url))
    observed = replace(LATE, records=by_number(record))
    for _ in range(MOST_ROUNDS):
        for change in plan(None, observed, RULES, NOW).changes:
            observed = after(change, observed, {})
    assert not observed.finalizer
