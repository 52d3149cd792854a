"""Deciding what to do: desired state and observation in, changes and a verdict out. No I/O, no clock.

`plan` is asked again with what the changes brought about, until it has no more to ask for. One table, mirrored by
tests/unit/test_plan.py:

    channel                     number at Twilio             changes, in the safe order
    wanted                      points elsewhere             finalizer, record (previous webhook), webhook
    wanted, entry is there      points elsewhere             webhook (drift), or only a report of it
    wanted, written back often  points elsewhere             webhook, but seldom: somebody contests it
    wanted                      points at us                 none
    wanted, number was changed  new one points at us         give the old one back; then the record without it
    wanted, number was changed  held by who waits for ours   give the old one back first; then no record
    being deleted               points at us                 give back
    being deleted               points elsewhere, or gone    record without the entry; at last no record, no finalizer
    being deleted               cannot be reached            wait; after the grace period no finalizer, the record stays
    gone for long               cannot be reached            the record is written off, and kept for people to look at
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from urllib.parse import urlsplit

from smschannel.api.errors import ChannelError, Refused, Unreadable
from smschannel.api.reasons import Reason
from smschannel.api.resource import DeletionPolicy, DriftPolicy, SmsChannel, TakeoverPolicy
from smschannel.core.record import Entry, Login, Record, Webhook, WebhookTemplate


@dataclass(frozen=True)
class Desired:
    """What the channel's author and the operator's settings ask for."""

    account_sid: str
    phone_number: str
    webhook: Webhook
    suspend: bool
    takeover_policy: TakeoverPolicy
    drift_policy: DriftPolicy
    deletion_policy: DeletionPolicy


@dataclass(frozen=True)
class Number:
    """A phone number as Twilio has it. `application_sid` set means that the webhook is not used."""

    sid: str
    phone_number: str
    webhook: Webhook
    application_sid: str
    receives_sms: bool


@dataclass(frozen=True)
class Routing:
    """Who answers a number's messages instead of its webhook; `unknown` says why that cannot be seen."""

    service_sid: str = ""
    unknown: str = ""


Debt = Number | ChannelError | None
"""What became of a number that is owed: as it is, why that could not be seen, or None where it is gone."""


@dataclass(frozen=True)
class Observed:
    """What was found. `number` is a `Refused` where Twilio, the credentials or another channel stand in the way.

    `was_configured` says that by the status this number pointed at this URL, `was_named` only that the status is about
    this number. `corrections` counts the checks in a row that found our webhook overwritten. `grace_over` says that a
    deletion need not wait any longer, `deadline_over` that what is owed has been owed for too long.
    """

    record: Record
    stored: bool = False
    finalizer: bool = False
    login: Login | None = None
    source: str = ""
    number: Number | Refused | None = None
    rejected: Refused | None = None
    routing: Routing = Routing()
    was_configured: bool = False
    was_named: bool = False
    corrections: int = 0
    debts: Mapping[str, Debt] = field(default_factory=dict)
    grace_over: bool = False
    deadline_over: bool = False


@dataclass(frozen=True)
class AddFinalizer:
    pass


@dataclass(frozen=True)
class SaveRecord:
    record: Record


@dataclass(frozen=True)
class SetWebhook:
    """Point the wanted number at the instance's webhook."""

    login: Login
    account_sid: str
    number_sid: str
    webhook: Webhook


@dataclass(frozen=True)
class GiveBack:
    """Put back (or clear) the webhook of a number that is not wanted any more."""

    entry: Entry
    webhook: Webhook


@dataclass(frozen=True)
class DropRecord:
    """Nothing is owed any more. `left` names numbers that keep our webhook since nobody knows what was there before."""

    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class WriteOff:
    """Give up what is owed; `why` is for people."""

    record: Record
    why: str


@dataclass(frozen=True)
class RemoveFinalizer:
    pass


CONTESTED_AFTER = 3
"""So many checks in a row that found our webhook overwritten mean that somebody keeps doing it."""

Change = AddFinalizer | SaveRecord | SetWebhook | GiveBack | DropRecord | WriteOff | RemoveFinalizer


@dataclass(frozen=True)
class Verdict:
    """What to tell people. `effective` names what keeps the webhook from being used, where something does; `unknown`
    says why that cannot be seen; `rejected` why the channel's newer token is not used.
    """

    reason: Reason
    message: str
    number_sid: str = ""
    effective: str = ""
    unknown: str = ""
    rejected: str = ""


@dataclass(frozen=True)
class Plan:
    changes: tuple[Change, ...]
    verdict: Verdict


def desired(channel: SmsChannel, template: WebhookTemplate) -> Desired | None:
    """None while the channel is being deleted: then nothing is wanted, and everything is given back."""
    if channel.deleting:
        return None
    spec = channel.spec
    return Desired(
        account_sid=spec.account_sid,
        phone_number=spec.phone_number,
        webhook=Webhook(url=template.url(channel.metadata.name), method="POST"),
        suspend=spec.suspend,
        takeover_policy=spec.takeover_policy,
        drift_policy=spec.drift_policy,
        deletion_policy=spec.deletion_policy,
    )


def plan(want: Desired | None, seen: Observed, template: WebhookTemplate, now: datetime) -> Plan:
    return _release(seen, now) if want is None else _configure(want, seen, template, now)


def foresee(want: Desired | None, seen: Observed, template: WebhookTemplate, now: datetime) -> Plan:
    """All that `plan` would ask for, round after round, if each change succeeded; for looking at, not for doing."""
    changes: list[Change] = []
    while (step := plan(want, seen, template, now)).changes:
        for change in step.changes:
            seen = _done(change, seen)
        changes += step.changes
    return Plan(tuple(changes), step.verdict)


def _done(change: Change, seen: Observed) -> Observed:
    """What would be observed after a change, if Twilio keeps what it is told."""
    match change:
        case AddFinalizer() | RemoveFinalizer():
            return replace(seen, finalizer=isinstance(change, AddFinalizer))
        case SaveRecord(record):
            return replace(seen, record=record, stored=True)
        case DropRecord():
            return replace(seen, record=seen.record.model_copy(update={"entries": ()}), stored=False)
        case WriteOff(record):
            return replace(seen, record=record.model_copy(update={"entries": ()}), stored=False, debts={})
        case SetWebhook(webhook=webhook):
            assert isinstance(seen.number, Number)
            return replace(seen, number=replace(seen.number, webhook=webhook))
        case GiveBack(entry, webhook):
            debt = seen.debts[entry.number_sid]
            assert isinstance(debt, Number)
            return replace(seen, debts={**seen.debts, entry.number_sid: replace(debt, webhook=webhook)})


def _configure(want: Desired, seen: Observed, template: WebhookTemplate, now: datetime) -> Plan:
    if want.suspend:
        return Plan(
            _remember_policy(want, seen), Verdict(Reason.Suspended, "Twilio is left as it is: spec.suspend is true.")
        )
    number = seen.number
    if isinstance(number, Refused):
        return Plan(_remember_policy(want, seen) or _give_back_first(want, seen), Verdict(number.reason, str(number)))
    if number is None or seen.login is None:
        return Plan((), Verdict(Reason.Pending, "The number has not been looked at yet."))

    entry = seen.record.entry(number.sid)
    points_at_us = number.webhook == want.webhook
    rejected = str(seen.rejected or "")
    refusal = _refusal(want, seen, number, entry, template)
    if refusal and entry is None:
        return Plan(_remember_policy(want, seen), replace(refusal, rejected=rejected))

    changes: list[Change] = []  # also where a number of ours is left as it is: a newer token may be what gives it back
    record = _claimed(want, seen, number, entry, seen.login, template, now)
    if not seen.finalizer:
        changes.append(AddFinalizer())
    if record != seen.record:
        changes.append(SaveRecord(record))
    if not refusal and not points_at_us:
        changes.append(SetWebhook(seen.login, want.account_sid, number.sid, want.webhook))
    if not changes:
        changes += _pay(seen, record, want.deletion_policy)
    return Plan(tuple(changes), replace(refusal or _configured(number, seen), rejected=rejected))


def _refusal(
    want: Desired, seen: Observed, number: Number, entry: Entry | None, template: WebhookTemplate
) -> Verdict | None:
    """Why a number that is there and is ours to take is left alone."""
    foreign = number.webhook != want.webhook
    if not number.receives_sms:
        message = f"{number.phone_number} cannot receive SMS."
        return Verdict(Reason.NumberLacksSms, message, number.sid)
    if entry is None and want.takeover_policy is TakeoverPolicy.IF_UNUSED and _used(number.webhook.url, template):
        message = "The number already points elsewhere, and spec.takeoverPolicy is IfUnused."
        return Verdict(Reason.WebhookForeign, message, number.sid, effective="ForeignUrl")
    forgotten = seen.was_named and entry and _changed_since(entry, number.webhook, template)
    drifted = foreign and entry and (seen.was_configured or forgotten)
    if drifted and want.drift_policy is DriftPolicy.REPORT:
        message = "Somebody changed the number's webhook at Twilio, and spec.driftPolicy is Report."
        return Verdict(Reason.WebhookDrifted, message, number.sid, effective=_mismatch(number.webhook, want.webhook))
    return None


def _changed_since(entry: Entry, webhook: Webhook, template: WebhookTemplate) -> bool:
    """Whether it is neither what was found there nor any of ours: the status knows only of today's URL."""
    return webhook != entry.previous and not entry.points_at_us(webhook) and not template.made(webhook.url)


def _mismatch(found: Webhook, wanted: Webhook) -> str:
    if not found.url:
        return "NotSet"
    return "MethodMismatch" if found.url == wanted.url else "UrlMismatch"


def _used(url: str, template: WebhookTemplate) -> bool:
    """Whether somebody else receives the messages: neither we, nor the demo that Twilio gives new numbers."""
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    return bool(url) and host != "demo.twilio.com" and not template.made(url)


def _claimed(
    want: Desired,
    seen: Observed,
    number: Number,
    entry: Entry | None,
    login: Login,
    template: WebhookTemplate,
    now: datetime,
) -> Record:
    """The record that must be stored before Twilio is written."""
    if entry is None:
        entry = Entry(
            account_sid=want.account_sid,
            number_sid=number.sid,
            phone_number=number.phone_number,
            login=login,
            previous=None if template.made(number.webhook.url) else number.webhook,
            wrote=(want.webhook.url,),
            claimed_at=now,
        )
    wrote = entry.wrote if want.webhook.url in entry.wrote else (*entry.wrote, want.webhook.url)
    # A number keeps its SID when it is moved to another account: it is given back where it is now.
    entry = entry.model_copy(update={"account_sid": want.account_sid, "wrote": wrote})
    record = seen.record.with_entry(entry).with_login(want.account_sid, login)
    source = seen.record.source if seen.rejected else seen.source
    return record.model_copy(update={"deletion_policy": want.deletion_policy, "source": source, "owed_since": None})


def _remember_policy(want: Desired, seen: Observed) -> tuple[Change, ...]:
    """A policy edited while nothing else can be done must hold if the channel is deleted next."""
    if not seen.stored or seen.record.deletion_policy is want.deletion_policy:
        return ()
    return (SaveRecord(seen.record.model_copy(update={"deletion_policy": want.deletion_policy})),)


def _give_back_first(want: Desired, seen: Observed) -> tuple[Change, ...]:
    """For a channel that holds what the holder of its wanted number waits for: it cannot have the new one before."""
    give_back = _pay(seen, seen.record, want.deletion_policy)
    settled = seen.debts and not any(isinstance(debt, ChannelError) for debt in seen.debts.values())
    if settled and seen.stored and not give_back:
        return (DropRecord(_left(seen)),)
    return tuple(give_back)


def _configured(number: Number, seen: Observed) -> Verdict:
    """What is true once nothing is left to do."""
    if number.application_sid:
        message = f"The TwiML application {number.application_sid} receives this number's messages."
        return Verdict(Reason.WebhookOverridden, message, number.sid, effective="OverriddenByApplication")
    if seen.routing.service_sid:
        message = f"The Messaging Service {seen.routing.service_sid} receives this number's messages."
        return Verdict(Reason.WebhookOverridden, message, number.sid, effective="OverriddenByMessagingService")
    if seen.corrections >= CONTESTED_AFTER:
        message = "Somebody keeps writing another webhook over ours; it is put right less often now."
        return Verdict(Reason.WebhookContested, message, number.sid, effective="UrlMismatch")
    unknown = seen.routing.unknown
    if seen.rejected:
        return Verdict(Reason.TokenRejected, str(seen.rejected), number.sid, unknown=unknown)
    message = "The number points at the instance's webhook."
    for number_sid, debt in seen.debts.items():
        entry = seen.record.entry(number_sid)
        if entry and isinstance(debt, Refused):
            message += f" {entry.phone_number}, which it used before, is not given back yet: {debt}"
    return Verdict(Reason.Configured, message, number.sid, unknown=unknown)


def _release(seen: Observed, now: datetime) -> Plan:
    changes = _pay(seen, seen.record, seen.record.deletion_policy)
    if changes:
        return Plan(tuple(changes), Verdict(Reason.Restoring, "The number is being given back."))
    let_go = (RemoveFinalizer(),) if seen.finalizer else ()
    trouble = next((debt for debt in seen.debts.values() if isinstance(debt, ChannelError)), None)
    if trouble is None:
        settled = (DropRecord(_left(seen)),) if seen.stored else ()
        return Plan((*settled, *let_go), Verdict(Reason.Restoring, "The number is given back."))
    message = f"The number is not given back yet: {trouble}"
    if seen.deadline_over:
        return Plan((WriteOff(seen.record, str(trouble)), *let_go), Verdict(Reason.RestoreFailed, message))
    reason = Reason.RestoreFailed if isinstance(trouble, Refused | Unreadable) else Reason.Restoring
    if not seen.grace_over:
        return Plan((), Verdict(reason, message))
    owed: tuple[Change, ...] = ()
    if seen.record.entries and seen.record.owed_since is None:  # with the policy that the channel has now
        owed = (SaveRecord(seen.record.model_copy(update={"owed_since": now})),)
    return Plan((*owed, *let_go), Verdict(reason, message))


def _left(seen: Observed) -> tuple[str, ...]:
    """The numbers that still have our webhook, though Restore was asked for."""
    if seen.record.deletion_policy is not DeletionPolicy.RESTORE:
        return ()
    return tuple(
        entry.phone_number
        for entry in seen.record.entries
        if isinstance(debt := seen.debts.get(entry.number_sid), Number)
        and entry.previous is None
        and entry.points_at_us(debt.webhook)
    )


def _pay(seen: Observed, record: Record, policy: DeletionPolicy) -> list[Change]:
    """Give back what still points at us; what is settled leaves the ledger."""
    give_back: list[Change] = []
    settled: list[str] = []
    for number_sid, debt in seen.debts.items():
        entry = record.entry(number_sid)
        if entry is None or isinstance(debt, ChannelError):
            continue
        webhook = _owed(entry, policy)
        if debt is None or webhook in {None, debt.webhook} or not entry.points_at_us(debt.webhook):
            settled.append(number_sid)
        else:
            give_back.append(GiveBack(entry, webhook))
    if give_back:
        return give_back
    remaining = record.without(settled)
    return [SaveRecord(remaining)] if settled and remaining.entries else []


def _owed(entry: Entry, policy: DeletionPolicy) -> Webhook | None:
    """The webhook that the number gets back; None where it is left as it is."""
    match policy:
        case DeletionPolicy.RETAIN:
            return None
        case DeletionPolicy.CLEAR:
            return Webhook(url="", method="POST")
        case DeletionPolicy.RESTORE:
            return entry.previous
