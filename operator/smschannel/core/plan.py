"""Decides what to do: desired state and observation in, changes and a verdict out. No I/O; the clock is an argument.

`plan` is called again after its changes are applied, until it returns none. One table, mirrored by
tests/unit/test_plan.py:

    channel                       number at Twilio               changes, in the safe order
    desired, no record            points elsewhere               finalizer, record (the claim); then webhook
    desired, record               points elsewhere               webhook (drift), or only a report of it
    desired, overwritten often    points elsewhere               webhook, but seldom: WebhookContested
    desired, record               points at us                   none
    desired, number was changed   the new one points at us       restore the old one; then delete its record
    desired, number was changed   its holder waits for ours      restore the old one first; then delete its record
    desired, refused for an hour  a waiter's login sees it       restore with that login; then delete the record
    being deleted                 points at us                   restore
    being deleted                 points elsewhere, or is gone   delete the record; finally remove the finalizer
    being deleted                 cannot be read                 wait; after the grace period remove the finalizer only
    gone for long                 cannot be read                 write the record off, which keeps a copy of it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from smschannel.api.errors import ChannelError, Refused, Unreadable
from smschannel.api.reasons import Effective, Reason, Recheck
from smschannel.api.resource import DeletionPolicy, DriftPolicy, SmsChannel, TakeoverPolicy
from smschannel.core.record import Contents, Key, Login, Record, Webhook, WebhookTemplate

CONTESTED_AFTER = 3
"""Once our webhook was found overwritten this often in a row, it counts as contested."""


@dataclass(frozen=True)
class Desired:
    """What the channel's author and the operator's settings ask for, and for which channel."""

    namespace: str
    name: str
    uid: str
    account_sid: str
    phone_number: str
    webhook: Webhook
    suspend: bool
    takeover_policy: TakeoverPolicy
    drift_policy: DriftPolicy
    deletion_policy: DeletionPolicy


@dataclass(frozen=True)
class Number:
    """A phone number as Twilio has it. If `application_sid` is set, Twilio ignores the webhook."""

    sid: str
    phone_number: str
    webhook: Webhook
    application_sid: str
    receives_sms: bool


@dataclass(frozen=True)
class Routing:
    """The Messaging Service that receives a number's messages instead of its webhook, if there is one.

    `unknown` is the reason why that could not be read; empty if it was.
    """

    service_sid: str = ""
    unknown: str = ""


@dataclass(frozen=True)
class Waiter:
    """A channel that waits for a number, and its login, which Twilio accepts: it sees `number` as it is now.

    `unused_only`: it takes the number only if its webhook is not in use then.
    """

    key: Key
    uid: str
    account_sid: str
    login: Login
    number: Number
    unused_only: bool = False


Current = Number | ChannelError | None
"""A number to be restored: as it is at Twilio, why it could not be read, or None if the account no longer has it."""


@dataclass(frozen=True)
class Observed:
    """What was read in this reconcile.

    `records` are those of this channel (or of one that is gone), by number SID; `to_restore` are the numbers among them
    that are no longer desired. `number` is the desired number, or why it cannot be used. `login` found it, read from
    `source`; `rejected` is why newer credentials cannot be used, if the recorded login is used instead.

    `was_configured`: the status reports that this number points at this URL; `was_named`: the status is about this
    number. `corrections` counts how often in a row our webhook was found overwritten. `claimed`: this reconcile has
    created the number's record. `deleted_at` is None for a channel that is gone: then no deletion waits for it. Records
    of a deleted channel that are not in `to_restore` were not read, since its deletion has waited long enough.

    `unseen`, by number SID: whether Twilio shows a number that the channel holds to none of its own logins, because it
    refuses them or the account has lost it; numbers of which that is not known are missing. `waiters` are channels that
    wait for such numbers. `lost`: the number that the status names serves another channel.
    """

    records: Mapping[str, Record] = field(default_factory=dict)
    to_restore: Mapping[str, Current] = field(default_factory=dict)
    finalizer: bool = False
    deleted_at: datetime | None = None
    login: Login | None = None
    source: str = ""
    number: Number | Refused | None = None
    rejected: Refused | None = None
    routing: Routing = Routing()
    was_configured: bool = False
    was_named: bool = False
    unseen: Mapping[str, bool] = field(default_factory=dict)
    waiters: Mapping[str, Waiter] = field(default_factory=dict)
    lost: bool = False
    corrections: int = 0
    claimed: bool = False


@dataclass(frozen=True)
class Rules:
    """The settings that decisions depend on: `deletion_grace` is how long a deletion waits for the restore,
    `restore_deadline` how long a restore is tried after that before it is written off, `holder_patience` how long a
    number that none of its holder's logins sees is kept from a channel that waits for it.
    """

    template: WebhookTemplate
    deletion_grace: timedelta
    restore_deadline: timedelta
    holder_patience: timedelta = timedelta(hours=1)


@dataclass(frozen=True)
class AddFinalizer:
    pass


@dataclass(frozen=True)
class CreateRecord:
    """Claim the number. Refused with NumberInUse if another channel's record is there."""

    record: Record


@dataclass(frozen=True)
class UpdateRecord:
    record: Record


@dataclass(frozen=True)
class SetWebhook:
    """Point the desired number at the instance's webhook."""

    login: Login
    account_sid: str
    number_sid: str
    webhook: Webhook


@dataclass(frozen=True)
class RestoreWebhook:
    """Set a number that is no longer desired back to what it was, or clear it."""

    record: Record
    webhook: Webhook


@dataclass(frozen=True)
class DeleteRecord:
    """Free the number. `orphaned`: it keeps our webhook, since its previous webhook is not recorded.

    `yielded_to` is the channel that waits for it, if the holder loses it to that.
    """

    record: Record
    orphaned: bool = False
    yielded_to: Waiter | None = None


@dataclass(frozen=True)
class WriteOff:
    """Give up restoring the number; `why` is for people."""

    record: Record
    why: str


@dataclass(frozen=True)
class RemoveFinalizer:
    pass


Change = (
    AddFinalizer | CreateRecord | UpdateRecord | SetWebhook | RestoreWebhook | DeleteRecord | WriteOff | RemoveFinalizer
)


@dataclass(frozen=True)
class Verdict:
    """What to report.

    `number_sid` is the number that the verdict is about, empty if none was found. `effective` is what keeps Twilio from
    using the webhook, None if nothing does; `unknown` is why that cannot be read; `rejected` is why the channel's newer
    credentials are not used. `degraded`: the channel works with the recorded ones, so that Ready stays True.
    """

    reason: Reason
    message: str
    number_sid: str = ""
    effective: Effective | None = None
    unknown: str = ""
    rejected: Refused | None = None
    degraded: bool = False

    @property
    def ready(self) -> str:
        """Return the status of Ready."""
        return "True" if self.degraded else self.reason.ready

    @property
    def progress(self) -> str | None:
        """Return the condition that is True beside Ready: Reconciling, Stalled or none."""
        return "Stalled" if self.degraded else self.reason.progress

    @property
    def recheck(self) -> Recheck:
        """Return when the channel is reconciled again although nothing changed."""
        return Recheck.DRIFT if self.degraded and self.reason.ready != "True" else self.reason.recheck


@dataclass(frozen=True)
class Plan:
    """The next changes, in order, and what to report once they are applied."""

    changes: tuple[Change, ...]
    verdict: Verdict


def desired(channel: SmsChannel, template: WebhookTemplate) -> Desired | None:
    """Return the desired state; None while the channel is being deleted: then everything is restored."""
    if channel.deleting:
        return None
    spec, meta = channel.spec, channel.metadata
    return Desired(
        namespace=meta.namespace,
        name=meta.name,
        uid=meta.uid,
        account_sid=spec.account_sid,
        phone_number=spec.phone_number,
        webhook=Webhook(url=template.url(meta.namespace, meta.name), method="POST"),
        suspend=spec.suspend,
        takeover_policy=spec.takeover_policy,
        drift_policy=spec.drift_policy,
        deletion_policy=spec.deletion_policy,
    )


def plan(desired: Desired | None, observed: Observed, rules: Rules, now: datetime) -> Plan:
    """Return the next changes, and what to report if they succeed. Call it again until there are no changes."""
    if desired is None:
        return _plan_restore(observed, rules, now)
    return _plan_configure(desired, observed, rules, now)


def foresee(desired: Desired | None, observed: Observed, rules: Rules, now: datetime) -> Plan:
    """Return all changes that `plan` would return, one after the other, if each succeeded. For `kubectl sms plan`."""
    changes: list[Change] = []
    while (step := plan(desired, observed, rules, now)).changes:
        for change in step.changes:
            observed = _after(change, observed)
        changes += step.changes
    return Plan(tuple(changes), step.verdict)


_NAMES = {
    CreateRecord: "claim {}",
    SetWebhook: "set its webhook",
    RestoreWebhook: "restore another number's webhook",
    DeleteRecord: "free another number",
}


def withheld(desired: Desired | None, observed: Observed, rules: Rules, now: datetime) -> Verdict:
    """Return the verdict on a channel whose changes the operator only reports: what it would do."""
    if desired is None:
        return Verdict(Reason.Restoring, "The operator only observes, so the number is not restored.")
    changes = foresee(desired, observed, rules, now).changes
    names = dict.fromkeys(name for change in changes if (name := _NAMES.get(type(change))))
    todo = ", ".join(names).format(desired.phone_number) or "protect the channel with its finalizer"
    message = f"The operator only observes. It would: {todo}."
    number = observed.number
    if not isinstance(number, Number):
        return Verdict(Reason.ObserveOnly, message)
    differs = number.webhook != desired.webhook
    return Verdict(
        Reason.ObserveOnly, message, number.sid, _mismatch(number.webhook, desired.webhook) if differs else None
    )


def _after(change: Change, observed: Observed) -> Observed:
    """Return what would be observed after a change that succeeds."""
    match change:
        case AddFinalizer() | RemoveFinalizer():
            return replace(observed, finalizer=isinstance(change, AddFinalizer))
        case CreateRecord(record) | UpdateRecord(record):
            return with_record(observed, record)
        case DeleteRecord(record) | WriteOff(record):
            return without_record(observed, record)
        case SetWebhook(webhook=webhook):
            assert isinstance(observed.number, Number)
            return replace(observed, number=replace(observed.number, webhook=webhook))
        case RestoreWebhook(record, webhook):
            waiter = observed.waiters.get(record.number_sid)
            current = observed.to_restore.get(record.number_sid, waiter.number if waiter else None)
            assert isinstance(current, Number)
            return with_current(observed, record, replace(current, webhook=webhook))


def with_record(observed: Observed, record: Record) -> Observed:
    """Return what is observed once a record was created or updated."""
    return replace(observed, records={**observed.records, record.number_sid: record})


def without_record(observed: Observed, record: Record) -> Observed:
    """Return what is observed once a record was deleted."""
    sid = record.number_sid
    return replace(
        observed,
        records={each: other for each, other in observed.records.items() if each != sid},
        to_restore={each: current for each, current in observed.to_restore.items() if each != sid},
    )


def with_current(observed: Observed, record: Record, current: Current) -> Observed:
    """Return what is observed once the restore of a record's number was tried."""
    return replace(observed, to_restore={**observed.to_restore, record.number_sid: current})


def _plan_configure(desired: Desired, observed: Observed, rules: Rules, now: datetime) -> Plan:
    template = rules.template
    policies = _update_policies(desired, observed)
    if desired.suspend:
        return Plan(policies, Verdict(Reason.Suspended, "Twilio is left as it is: spec.suspend is true."))
    number, login = observed.number, observed.login
    if isinstance(number, Refused):
        # What is to be restored here is what the holder of the desired number waits for.
        changes = (
            policies
            or _note_unseen(observed, now)
            or _yield(observed, desired.deletion_policy, rules, now)
            or _mark_first(_restore(observed, desired.deletion_policy), now)
        )
        message = str(number)
        lost = observed.lost or any(number_sid not in observed.records for number_sid in observed.waiters)
        if lost and number.reason is not Reason.NumberInUse:  # whose own message says so
            message += " The number that it had serves another channel now."
        return Plan(changes, Verdict(number.reason, message))
    if number is None or login is None:
        return Plan((), Verdict(Reason.Pending, "The number has not been read yet."))

    record = observed.records.get(number.sid)
    rejected = observed.rejected
    refusal = _refusal(desired, observed, number, template)
    if record is None and refusal:
        return Plan(policies, replace(refusal, rejected=rejected))
    finalizer: tuple[Change, ...] = () if observed.finalizer else (AddFinalizer(),)
    if record is None:
        claim = CreateRecord(_new_record(desired, observed, number, login, template))
        return Plan((*finalizer, claim), Verdict(Reason.Pending, "The number is being claimed.", number.sid))

    writes: tuple[Change, ...] = ()
    if not refusal and number.webhook != desired.webhook:
        writes = (SetWebhook(login, desired.account_sid, number.sid, desired.webhook),)
        record = _with_previous(record, number, template)
    records = {**observed.records, number.sid: record}
    updates = [
        UpdateRecord(new)
        for number_sid, old in observed.records.items()
        if (new := _updated(desired, observed, records[number_sid])) != old
    ]
    changes = (*finalizer, *updates, *writes) or _restore(observed, desired.deletion_policy)
    return Plan(changes, replace(refusal or _configured(number, observed), rejected=rejected))


def _refusal(desired: Desired, observed: Observed, number: Number, template: WebhookTemplate) -> Verdict | None:
    """Return why the webhook of the desired number is left as it is; None if it may be set."""
    record = observed.records.get(number.sid)
    if record and record.contents is None:
        message = f"The operator's record of {record.phone_number}, Secret {record.secret_name}, cannot be opened."
        return Verdict(Reason.RecordUnreadable, message, number.sid)
    if not number.receives_sms:
        return Verdict(Reason.NumberLacksSms, f"{number.phone_number} cannot receive SMS.", number.sid)
    if record is None and desired.takeover_policy is TakeoverPolicy.IF_UNUSED and is_used(number.webhook.url, template):
        message = "The number already points elsewhere, and spec.takeoverPolicy is IfUnused."
        return Verdict(Reason.WebhookForeign, message, number.sid, Effective.FOREIGN_URL)
    if record is None or record.contents is None or desired.drift_policy is DriftPolicy.CORRECT:
        return None
    changed = observed.was_named and _changed_since(record.contents, number.webhook, template)
    if number.webhook != desired.webhook and (observed.was_configured or changed):
        message = "The number's webhook was changed at Twilio, and spec.driftPolicy is Report."
        return Verdict(Reason.WebhookDrifted, message, number.sid, _mismatch(number.webhook, desired.webhook))
    return None


def _changed_since(contents: Contents, webhook: Webhook, template: WebhookTemplate) -> bool:
    """Return whether a webhook is neither the previous one nor any of ours. The status has only the current URL."""
    return webhook != contents.previous and not contents.points_at_us(webhook) and not template.made(webhook.url)


def _mismatch(found: Webhook, desired: Webhook) -> Effective:
    if not found.url:
        return Effective.NOT_SET
    return Effective.METHOD_MISMATCH if found.url == desired.url else Effective.URL_MISMATCH


def is_used(url: str, template: WebhookTemplate) -> bool:
    """Return whether a webhook is in use: neither empty, nor this operator's, nor the demo URL of new numbers."""
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    return bool(url) and host != "demo.twilio.com" and not template.made(url)


def _new_record(
    desired: Desired, observed: Observed, number: Number, login: Login, template: WebhookTemplate
) -> Record:
    previous = None if template.made(number.webhook.url) else number.webhook
    return Record(
        number_sid=number.sid,
        phone_number=number.phone_number,
        account_sid=desired.account_sid,
        namespace=desired.namespace,
        name=desired.name,
        uid=desired.uid,
        source=observed.source,
        deletion_policy=desired.deletion_policy,
        contents=Contents(login=login, previous=previous, wrote=(desired.webhook.url,)),
    )


def _with_previous(record: Record, number: Number, template: WebhookTemplate) -> Record:
    """The record of a number whose webhook is overwritten next.

    The number may have been read before its last holder restored it, and claimed afterwards. So as long as its previous
    webhook is unknown, the first foreign one that is overwritten is recorded, whatever crashed in between.
    """
    contents, webhook = record.contents, number.webhook
    if contents is None or contents.previous or contents.points_at_us(webhook) or template.made(webhook.url):
        return record
    return record.with_contents(previous=webhook)


def _updated(desired: Desired, observed: Observed, record: Record) -> Record:
    """Return a record of this channel as it should be.

    A newly accepted login is recorded for all numbers of its account: the one before may be revoked at any time.
    """
    record = replace(record, deletion_policy=desired.deletion_policy, restore_since=None, unseen_since=None)
    contents = record.contents
    if contents is None:
        return record
    assert isinstance(observed.number, Number)
    if record.number_sid == observed.number.sid:
        # A number keeps its SID when Twilio moves it to another account: it is restored where it is now.
        record = replace(record, account_sid=desired.account_sid)
        if desired.webhook.url not in contents.wrote:
            record = record.with_contents(wrote=(*contents.wrote, desired.webhook.url))
    if record.account_sid == desired.account_sid:
        record = record.with_contents(login=observed.login)
        if not observed.rejected:
            record = replace(record, source=observed.source)
    return record


def _update_policies(desired: Desired, observed: Observed) -> tuple[Change, ...]:
    """Return updates of the deletion policy alone, so that it applies even if the channel cannot be configured.

    While the channel is suspended its logins are not tried, so that a break in what was seen of them begins, too.
    """
    changes: list[Change] = []
    for record in observed.records.values():
        unseen_since = None if desired.suspend else record.unseen_since
        new = replace(record, deletion_policy=desired.deletion_policy, unseen_since=unseen_since)
        if new != record:
            changes.append(UpdateRecord(new))
    return tuple(changes)


def _note_unseen(observed: Observed, now: datetime) -> tuple[Change, ...]:
    """Record since when none of the channel's own logins sees a number that it holds, or that one does again."""
    changes: list[Change] = []
    for number_sid, unseen in observed.unseen.items():
        if record := observed.records.get(number_sid):
            noted = now.replace(microsecond=0)  # the clock may have been ahead when the record was written
            since = min(record.unseen_since or noted, noted) if unseen else None
            if since != record.unseen_since:
                changes.append(UpdateRecord(replace(record, unseen_since=since)))
    return tuple(changes)


def _yield(observed: Observed, policy: DeletionPolicy, rules: Rules, now: datetime) -> tuple[Change, ...]:
    """Restore with a waiter's login what none of the holder's has seen for long, and free it for the waiter."""
    changes: list[Change] = []
    for number_sid, waiter in observed.waiters.items():
        record = observed.records.get(number_sid)
        if record is None or record.contents is None or not observed.unseen.get(number_sid):
            continue
        if record.unseen_since is None or now - record.unseen_since < rules.holder_patience:
            continue
        current = observed.to_restore.get(number_sid, waiter.number)
        if isinstance(current, ChannelError) and not _is_webhook_refused(current):
            continue  # the restore failed just now
        webhook = webhook_to_restore(record.contents, policy)
        points_at_us = isinstance(current, Number) and record.contents.points_at_us(current.webhook)
        left = webhook if webhook and points_at_us else waiter.number.webhook
        if waiter.unused_only and is_used(left.url, rules.template):
            continue  # it would not take the number, which would then serve nobody
        if webhook and isinstance(current, Number) and points_at_us and webhook != current.webhook:
            tried = replace(record.with_contents(login=waiter.login), account_sid=waiter.account_sid)
            changes.append(RestoreWebhook(tried, webhook))
        else:
            changes.append(DeleteRecord(record, yielded_to=waiter))
    return tuple(changes)


def _is_webhook_refused(current: Current) -> bool:
    """Return whether Twilio refuses the webhook to restore: then the waiter, which sets its own, need not wait."""
    return isinstance(current, Refused) and current.reason is Reason.WebhookRefused


def _configured(number: Number, observed: Observed) -> Verdict:
    """Return the verdict once nothing is left to do."""
    if number.application_sid:
        message = (
            f"The TwiML application {number.application_sid} receives this number's messages."
            " Take the number out of it."
        )
        return Verdict(Reason.WebhookOverridden, message, number.sid, Effective.OVERRIDDEN_BY_APPLICATION)
    if observed.routing.service_sid:
        message = (
            f"The Messaging Service {observed.routing.service_sid} receives this number's messages. With \"Defer to"
            " sender's webhook\" in its integration settings (UseInboundWebhookOnNumber) it leaves them to the number,"
            " which can stay in it."
        )
        return Verdict(Reason.WebhookOverridden, message, number.sid, Effective.OVERRIDDEN_BY_MESSAGING_SERVICE)
    if observed.corrections >= CONTESTED_AFTER:
        message = "The webhook is overwritten again and again; it is corrected less often now."
        return Verdict(Reason.WebhookContested, message, number.sid, Effective.URL_MISMATCH)
    unknown = observed.routing.unknown
    if observed.rejected:
        refused = observed.rejected.reason is Reason.AuthenticationFailed
        reason = Reason.TokenRejected if refused else observed.rejected.reason
        return Verdict(reason, str(observed.rejected), number.sid, unknown=unknown, degraded=True)
    message = "The number points at the instance's webhook."
    for number_sid, current in observed.to_restore.items():
        if isinstance(current, Refused | Unreadable):
            phone_number = observed.records[number_sid].phone_number
            message += f" {phone_number}, which it used before, is not restored yet: {current}"
    return Verdict(Reason.Configured, message, number.sid, unknown=unknown)


def _plan_restore(observed: Observed, rules: Rules, now: datetime) -> Plan:
    changes = _restore(observed, None)
    if changes:
        return Plan(changes, Verdict(Reason.Restoring, "The number is being restored."))
    finish: tuple[Change, ...] = (RemoveFinalizer(),) if observed.finalizer else ()
    unread = [record for number_sid, record in observed.records.items() if number_sid not in observed.to_restore]
    if unread:
        marks = tuple(_marked(record, now) for record in unread if record.restore_since is None)
        return Plan((*marks, *finish), Verdict(Reason.Restoring, "The number is restored when the channel is gone."))
    pending = _pending(observed)
    if not pending:
        return Plan(finish, Verdict(Reason.Restoring, "The number is restored."))
    refused = [why for why in pending.values() if isinstance(why, Refused | Unreadable)]
    reason = Reason.RestoreFailed if refused else Reason.Restoring
    verdict = Verdict(reason, f"The number is not restored yet: {[*refused, *pending.values()][0]}")
    if observed.deleted_at is not None and now - observed.deleted_at < rules.deletion_grace:
        return Plan((), verdict)
    late: list[Change] = []
    for number_sid, why in pending.items():
        record = observed.records[number_sid]
        if record.restore_since is None:
            late.append(_marked(record, now))
        elif now - record.restore_since >= rules.restore_deadline:
            late.append(WriteOff(record, str(why)))
    return Plan((*late, *finish), verdict)


def _mark_first(changes: tuple[Change, ...], now: datetime) -> tuple[Change, ...]:
    """Return updates that write down what is to be restored, as long as they are missing, and then the changes.

    Once a number is restored it must be freed, even if the channel that waited for it no longer does.
    """
    records = [change.record for change in changes if isinstance(change, RestoreWebhook)]
    return tuple(_marked(record, now) for record in records if record.restore_since is None) or changes


def _marked(record: Record, now: datetime) -> UpdateRecord:
    return UpdateRecord(replace(record, restore_since=now.replace(microsecond=0)))


def _pending(observed: Observed) -> dict[str, ChannelError]:
    """Return the numbers that are not restored yet, and why. Those whose record cannot be opened never are."""
    pending: dict[str, ChannelError] = {}
    for number_sid, current in observed.to_restore.items():
        if isinstance(current, ChannelError):
            pending[number_sid] = current
        elif observed.records[number_sid].contents is None:
            pending[number_sid] = Unreadable("its record cannot be opened")
    return pending


def _restore(observed: Observed, policy: DeletionPolicy | None) -> tuple[Change, ...]:
    """Restore what still points at us, and free what is restored. `policy` None means that of each record."""
    changes: list[Change] = []
    for number_sid, current in observed.to_restore.items():
        record = observed.records[number_sid]
        contents = record.contents
        if isinstance(current, ChannelError) or contents is None:
            continue
        webhook = webhook_to_restore(contents, policy or record.deletion_policy)
        points_at_us = current is not None and contents.points_at_us(current.webhook)
        if webhook and current and points_at_us and webhook != current.webhook:
            changes.append(RestoreWebhook(record, webhook))
        else:
            policy_is_restore = (policy or record.deletion_policy) is DeletionPolicy.RESTORE
            changes.append(DeleteRecord(record, orphaned=policy_is_restore and webhook is None and points_at_us))
    return tuple(changes)


def webhook_to_restore(contents: Contents, policy: DeletionPolicy) -> Webhook | None:
    """Return the webhook to restore; None if the number is left as it is."""
    match policy:
        case DeletionPolicy.RETAIN:
            return None
        case DeletionPolicy.CLEAR:
            return Webhook(url="", method="POST")
        case DeletionPolicy.RESTORE:
            return contents.previous
