"""A plan as text and as JSON, for people to read before the operator acts. No I/O.

URLs found at Twilio may contain a password or control characters: neither is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from smschannel.api.errors import ChannelError
from smschannel.api.reasons import Reason
from smschannel.api.resource import FINALIZER, DeletionPolicy
from smschannel.core.plan import (
    AddFinalizer,
    Change,
    CreateRecord,
    Current,
    DeleteRecord,
    Number,
    Observed,
    Plan,
    RemoveFinalizer,
    RestoreWebhook,
    SetWebhook,
    UpdateRecord,
    WriteOff,
)
from smschannel.core.record import Record, Webhook


@dataclass(frozen=True)
class Outlook:
    """What one pass observed, and everything that it would do: of a channel, or of records that earlier ones left.

    `policy` is the deletion policy that the channel has now; None means that of each record.
    """

    observed: Observed
    plan: Plan
    policy: DeletionPolicy | None = None

    @property
    def stuck(self) -> bool:
        """Return whether the desired state would not be reached."""
        verdict = self.plan.verdict
        return bool(self._pending()) if verdict.reason is Reason.Restoring else verdict.ready != "True"

    @property
    def verdict(self) -> str:
        """Return reason, message, remedy, and what could not be read; empty if the changes contain it all."""
        verdict = self.plan.verdict
        reason = verdict.reason
        written_off = {change.record.number_sid for change in self.plan.changes if isinstance(change, WriteOff)}
        if reason is Reason.Restoring and self._pending() <= written_off:
            return ""
        remedy = reason.remedy if reason is not Reason.Configured else ""
        return " ".join(filter(None, (f"{reason.name}.", verdict.message, remedy, verdict.unknown)))

    def changes(self) -> Iterator[tuple[Change, str]]:
        """Return each change with a text that follows "would"."""
        records = dict(self.observed.records)
        for change in self.plan.changes:
            match change:
                case AddFinalizer():
                    yield change, f"add the finalizer {FINALIZER}"
                case CreateRecord(record):
                    yield change, f"claim {_named(record)}, and record what it points at now: {_previous(record)}"
                    records[record.number_sid] = record
                case UpdateRecord(record):
                    yield change, f"record for {_named(record)}: {_updates(records[record.number_sid], record)}"
                    records[record.number_sid] = record
                case SetWebhook() | RestoreWebhook():
                    verb = "set" if isinstance(change, SetWebhook) else "restore"
                    yield change, f"{verb} the webhook of {self.moved(change)}"
                case DeleteRecord(record):
                    yield change, f"free {_named(record)}: delete the operator's record of it"
                case WriteOff(record):
                    yield (
                        change,
                        f"write off {_named(record)}: stop trying to restore it, and keep a copy of its record",
                    )
                case RemoveFinalizer():
                    yield change, "remove the finalizer, so that the channel can go"

    def moved(self, change: SetWebhook | RestoreWebhook) -> str:
        """Return the number, and its webhook before and after."""
        number = self._number(change)
        before, after = number.webhook, change.webhook
        moves = [("SmsUrl", shown(before.url), shown(after.url))] if before.url != after.url else []
        if before.method != after.method:
            moves.append(("SmsMethod", before.method, after.method))
        return f"{_named(number)}: " + ", ".join(f"{name} {was} -> {will}" for name, was, will in moves)

    def not_restored(self) -> Iterator[tuple[Record, str]]:
        """Return the numbers that are no longer desired and would not be restored, and why."""
        restored = {change.record.number_sid for change in self.plan.changes if isinstance(change, RestoreWebhook)}
        for number_sid, current in self.observed.to_restore.items():
            if number_sid not in restored:
                record = self.observed.records[number_sid]
                policy = self.policy or record.deletion_policy
                yield record, f"{_named(record)} {_why_not_restored(record, current, policy)}"

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON, with the same texts."""
        verdict = self.plan.verdict
        return {
            "reason": verdict.reason.name,
            "message": verdict.message,
            "remedy": verdict.reason.remedy,
            "unknown": verdict.unknown,
            "stuck": self.stuck,
            "changes": [
                {"change": type(change).__name__, "text": text, **self._fields(change)}
                for change, text in self.changes()
            ],
            "notRestored": [{**_number_fields(record), "text": text} for record, text in self.not_restored()],
        }

    def _pending(self) -> set[str]:
        """Return the numbers that could not be read, and therefore would not be restored."""
        current = self.observed.to_restore
        return {number_sid for number_sid in current if isinstance(current[number_sid], ChannelError)}

    def _fields(self, change: Change) -> dict[str, Any]:
        match change:
            case AddFinalizer() | RemoveFinalizer():
                return {}
            case SetWebhook(account_sid=account_sid):
                number = self._number(change)
                about = {"accountSid": account_sid, "numberSid": number.sid, "phoneNumber": number.phone_number}
                return {**about, "from": _webhook_fields(number.webhook), "to": _webhook_fields(change.webhook)}
            case RestoreWebhook(record, webhook):
                found = self._number(change).webhook
                return {**_number_fields(record), "from": _webhook_fields(found), "to": _webhook_fields(webhook)}
            case CreateRecord(record) | UpdateRecord(record) | DeleteRecord(record) | WriteOff(record):
                return _number_fields(record)

    def _number(self, change: SetWebhook | RestoreWebhook) -> Number:
        if isinstance(change, SetWebhook):
            assert isinstance(self.observed.number, Number), "no webhook is set that was not read"
            return self.observed.number
        number_sid = change.record.number_sid
        waiter = self.observed.waiters.get(number_sid)
        current = self.observed.to_restore.get(number_sid, waiter.number if waiter else None)
        assert isinstance(current, Number), "no webhook is restored that was not read"
        return current


def shown(url: str) -> str:
    """Return the URL without user and password, and without control characters, which a terminal would interpret."""
    public = re.sub(r"^((?:[^:/?#@]*:)?/+)?[^/?#]*@", r"\1***@", url)
    return "".join(each if each.isprintable() else "?" for each in public) or "(empty)"


def _named(number: Record | Number) -> str:
    return f"{number.phone_number} ({number.number_sid if isinstance(number, Record) else number.sid})"


def _number_fields(record: Record) -> dict[str, str]:
    return {"accountSid": record.account_sid, "numberSid": record.number_sid, "phoneNumber": record.phone_number}


def _webhook_fields(webhook: Webhook) -> dict[str, str]:
    return {"smsUrl": shown(webhook.url) if webhook.url else "", "smsMethod": webhook.method}


def _previous(record: Record) -> str:
    previous = record.contents.previous if record.contents else None
    return shown(previous.url) if previous else "not known, since it is already a webhook of this operator"


def _updates(before: Record, after: Record) -> str:
    """Return the text about the fields that an update of a record changes."""
    updates = []
    if before.deletion_policy is not after.deletion_policy:
        updates.append(f"deletion policy {after.deletion_policy}")
    if before.account_sid != after.account_sid:
        updates.append(f"account {after.account_sid}")
    old, new = before.contents, after.contents
    if before.source != after.source or (old and new and old.login != new.login):
        updates.append("the credentials that Twilio accepts")
    if old and new:
        updates += [f"{shown(url)} as a URL of ours" for url in new.wrote if url not in old.wrote]
    if after.restore_since and not before.restore_since:
        updates.append(f"to be restored since {after.restore_since:%Y-%m-%dT%H:%M:%SZ}")
    if before.restore_since and not after.restore_since:
        updates.append("no longer to be restored")
    if after.unseen_since and not before.unseen_since:
        updates.append(f"not accessible to the channel's credentials since {after.unseen_since:%Y-%m-%dT%H:%M:%SZ}")
    if before.unseen_since and not after.unseen_since:
        updates.append("accessible to the channel's credentials")
    return ", ".join(updates) or "no change"


def _why_not_restored(record: Record, current: Current, policy: DeletionPolicy) -> str:
    contents = record.contents
    if isinstance(current, ChannelError):
        return f"cannot be restored: {current}"
    if contents is None:
        return "cannot be restored: its record cannot be opened"
    if policy is DeletionPolicy.RETAIN:
        return "is left as it is: the deletion policy is Retain"
    if current is None:
        return f"is no longer in account {record.account_sid}: there is nothing to restore"
    if not contents.points_at_us(current.webhook):
        return f"is left as it is: somebody pointed it elsewhere since, at {shown(current.webhook.url)}"
    if policy is DeletionPolicy.RESTORE and contents.previous is None:
        return "is left as it is: what it pointed at before is not known"
    return "is left as it is: it points there already"
