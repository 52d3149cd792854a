"""A plan in plain words, and as JSON, for whoever looks before the operator acts. No I/O.

URLs found at Twilio may embed a password, and text for a terminal: neither is shown.
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
    Debt,
    DropRecord,
    GiveBack,
    Number,
    Observed,
    Plan,
    RemoveFinalizer,
    SaveRecord,
    SetWebhook,
    WriteOff,
)
from smschannel.core.record import Entry, Record, Webhook


@dataclass(frozen=True)
class Outlook:
    """What was seen of a channel, and all that would be done about it."""

    seen: Observed
    plan: Plan
    policy: DeletionPolicy

    @property
    def stuck(self) -> bool:
        """Whether what is asked for would not be had at the end."""
        reason = self.plan.verdict.reason
        if reason is Reason.Restoring:
            return any(isinstance(debt, ChannelError) for debt in self.seen.debts.values())
        return reason.ready != "True"

    @property
    def verdict(self) -> str:
        """Reason, message and remedy, and what could not be seen; empty where the changes say it all."""
        verdict = self.plan.verdict
        reason = verdict.reason
        written_off = any(isinstance(change, WriteOff) for change in self.plan.changes)
        if reason is Reason.Restoring and (written_off or not self.stuck):
            return ""
        remedy = reason.remedy if reason is not Reason.Configured else ""
        return " ".join(filter(None, (f"{reason.name}.", verdict.message, remedy, verdict.unknown)))

    def changes(self) -> Iterator[tuple[Change, str]]:
        """Each change, and what it is in words that go on after "would"."""
        record = self.seen.record
        for change in self.plan.changes:
            match change:
                case AddFinalizer():
                    yield change, f"add the finalizer {FINALIZER}"
                case SaveRecord(after):
                    yield change, _recorded(record, after)
                    record = after
                case SetWebhook() | GiveBack():
                    verb = "write" if isinstance(change, SetWebhook) else "give back"
                    yield change, f"{verb} {self.moved(change)}"
                case DropRecord():
                    yield change, "drop the operator's record of the channel"
                case WriteOff():
                    yield change, "give up: write off what is still owed, and keep the record for people to look at"
                case RemoveFinalizer():
                    yield change, "remove the finalizer, so that the channel can go"

    def moved(self, change: SetWebhook | GiveBack) -> str:
        before, after = self._number(change).webhook, change.webhook
        moves = [("SmsUrl", shown(before.url), shown(after.url))] if before.url != after.url else []
        if before.method != after.method:
            moves.append(("SmsMethod", before.method, after.method))
        phone_number, number_sid = self._number(change).phone_number, self._number(change).sid
        return f"{phone_number} ({number_sid}): " + ", ".join(f"{name} {was} -> {will}" for name, was, will in moves)

    def left(self) -> Iterator[tuple[Entry, str]]:
        """The numbers that are not wanted any more and are not given back either, and why."""
        given_back = {change.entry.number_sid for change in self.plan.changes if isinstance(change, GiveBack)}
        for number_sid, debt in self.seen.debts.items():
            entry = self.seen.record.entry(number_sid)
            if entry and number_sid not in given_back:
                yield entry, f"{entry.phone_number} ({number_sid}) {_why_left(entry, debt, self.policy)}"

    def document(self) -> dict[str, Any]:
        """For machines; the texts are those that people read."""
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
            "left": [
                {"accountSid": entry.account_sid, "numberSid": entry.number_sid, "text": text}
                for entry, text in self.left()
            ],
        }

    def _fields(self, change: Change) -> dict[str, Any]:
        if not isinstance(change, SetWebhook | GiveBack):
            return {}
        number = self._number(change)
        account_sid = change.account_sid if isinstance(change, SetWebhook) else change.entry.account_sid
        return {
            "accountSid": account_sid,
            "numberSid": number.sid,
            "phoneNumber": number.phone_number,
            "from": _fields(number.webhook),
            "to": _fields(change.webhook),
        }

    def _number(self, change: SetWebhook | GiveBack) -> Number:
        number = self.seen.number if isinstance(change, SetWebhook) else self.seen.debts[change.entry.number_sid]
        assert isinstance(number, Number), "nothing is written that was not seen"
        return number


def shown(url: str) -> str:
    """The URL without its user and password, and without what a terminal would obey."""
    open_to_all = re.sub(r"^((?:[^:/?#@]*:)?/+)?[^/?#]*@", r"\1***@", url)
    return "".join(each if each.isprintable() else "?" for each in open_to_all) or "(empty)"


def _fields(webhook: Webhook) -> dict[str, str]:
    return {"smsUrl": shown(webhook.url) if webhook.url else "", "smsMethod": webhook.method}


def _recorded(before: Record, after: Record) -> str:
    new = [entry for entry in after.entries if before.entry(entry.number_sid) is None]
    gone = [entry for entry in before.entries if after.entry(entry.number_sid) is None]
    told = [f"record what {entry.phone_number} ({entry.number_sid}) points at now: {_previous(entry)}" for entry in new]
    told += [f"strike {entry.phone_number} ({entry.number_sid}) off the record" for entry in gone]
    if before.deletion_policy is not after.deletion_policy:
        told.append(f"record the deletion policy {after.deletion_policy}")
    kept = [(entry, was) for entry in after.entries if (was := before.entry(entry.number_sid))]
    if any(entry.login != was.login for entry, was in kept) or (kept and before.source != after.source):
        told.append("record the credentials that Twilio accepts")
    if after.owed_since and not before.owed_since:
        told.append("record since when this is owed")
    told += [f"record that {shown(url)} is ours" for entry, was in kept for url in entry.wrote if url not in was.wrote]
    return ", ".join(told) or "write the record"


def _previous(entry: Entry) -> str:
    return shown(entry.previous.url) if entry.previous else "not known, for it is already a webhook of this operator"


def _why_left(entry: Entry, debt: Debt, policy: DeletionPolicy) -> str:
    if isinstance(debt, ChannelError):
        return f"cannot be given back: {debt}"
    if policy is DeletionPolicy.RETAIN:
        return "is left as it is: the deletion policy is Retain"
    if debt is None:
        return f"is not in account {entry.account_sid} any more: there is nothing to give back"
    if not entry.points_at_us(debt.webhook):
        return f"is left as it is: somebody pointed it elsewhere since, at {shown(debt.webhook.url)}"
    if policy is DeletionPolicy.RESTORE and entry.previous is None:
        return "is left as it is: what it pointed at before is not known"
    return "is left as it is: it points there already"
