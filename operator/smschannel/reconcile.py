"""The data path: observe, plan, apply, report. Everything that happens to a channel happens here.

    desired(channel)    what is asked for; None while it is being deleted
    observe             reads: record, credentials, Twilio
    plan                pure: changes and a verdict; asked again with what the changes brought about
    apply               writes, in the safe order the plan gives
    report              status and Event, only where something is new

The two ports are all that is known of the world outside.
"""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol

import structlog
from pydantic import SecretStr

from smschannel.conditions import condition, next_status, reason_of, still_trying
from smschannel.errors import ChannelError, Gone, Refused, Retryable, TwilioUnavailable, Unreadable
from smschannel.ledger import Claims, Entry, Login, Record, Webhook, WebhookTemplate
from smschannel.metrics import DRIFT
from smschannel.plan import (
    AddFinalizer,
    Change,
    Debt,
    Desired,
    DropRecord,
    GiveBack,
    Number,
    Observed,
    RemoveFinalizer,
    SaveRecord,
    SetWebhook,
    Verdict,
    desired,
    plan,
)
from smschannel.reasons import Look, Reason
from smschannel.resource import CREDENTIALS_LABEL, DeletionPolicy, SmsChannel
from smschannel.sealing import Binding, Keyring

log = structlog.get_logger()


class Key(NamedTuple):
    """A channel; or, with `uid`, a record whose channel is gone."""

    namespace: str
    name: str
    uid: str = ""


class Twilio(Protocol):
    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None: ...
    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None: ...
    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number: ...


class Kube(Protocol):
    async def secret(self, namespace: str, name: str) -> dict[str, Any] | None: ...
    async def load_record(self, uid: str) -> Record | None: ...
    async def save_record(self, record: Record) -> None: ...
    async def drop_record(self, uid: str) -> None: ...
    async def add_finalizer(self, channel: SmsChannel) -> None: ...
    async def remove_finalizer(self, channel: SmsChannel) -> None: ...
    async def write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None: ...
    async def post_event(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None: ...


@dataclass(frozen=True)
class Intervals:
    """Seconds until a channel is looked at again, and how long a deletion waits for the give-back."""

    drift: float
    slow: float
    deletion_grace: float


@dataclass(frozen=True)
class Outcome:
    """What a turn came to. `again` is seconds until the next look; None asks for a backoff between `at_least` and
    `at_most`.

    `gone` says that nothing is left to look after; `record` is what is remembered now, if `stored`.
    """

    verdict: Verdict
    record: Record
    stored: bool
    again: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    gone: bool = False


_ROUNDS = 5
"""How often a plan may ask for more: three are enough, and a Twilio that does not keep what it is told needs an end."""


class Reconciler:
    def __init__(
        self,
        kube: Kube,
        twilio: Twilio,
        *,
        keyring: Keyring,
        template: WebhookTemplate,
        claims: Claims[Key],
        intervals: Intervals,
        clock: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._twilio = twilio
        self._keyring = keyring
        self._template = template
        self._claims = claims
        self._intervals = intervals
        self._clock = clock

    async def reconcile(self, key: Key, channel: SmsChannel | None) -> Outcome:
        """One turn; `channel` is None for a record whose channel is gone. Raises what Kubernetes refuses."""
        turn = _Turn(key, channel, desired(channel, self._template) if channel else None)
        await self._load(turn)
        try:
            await self._observe(turn)
            verdict = await self._converge(turn)
        except TwilioUnavailable as error:
            self._claims.hold_only(turn.uid, turn.seen.record)
            return await self._unavailable(turn, error)
        except Refused as refused:
            verdict = Verdict(refused.reason, str(refused))
        # Not after an error of Kubernetes: whether the record was written is then not known, so the claim stays.
        self._claims.hold_only(turn.uid, turn.seen.record)
        return await self._report(turn, verdict)

    # Observe: reads only

    async def _load(self, turn: _Turn) -> None:
        meta = turn.channel.metadata if turn.channel else None
        record, debts = None, dict[str, Debt]()
        try:
            record = await self._kube.load_record(turn.uid)
        except Unreadable as error:
            debts = {"": error}
        empty = Record(uid=turn.uid, namespace=turn.key.namespace, name=turn.key.name)
        turn.seen = Observed(
            record=record or empty,
            stored=record is not None,
            finalizer=turn.channel.has_finalizer if turn.channel else False,
            debts=debts,
            grace_over=bool(
                meta
                and meta.deletion_timestamp
                and self._clock() - meta.deletion_timestamp > timedelta(seconds=self._intervals.deletion_grace)
            ),
        )
        if turn.channel and turn.channel.deleting:
            policy = turn.channel.spec.deletion_policy
            turn.seen = replace(turn.seen, record=turn.seen.record.model_copy(update={"deletion_policy": policy}))

    async def _observe(self, turn: _Turn) -> None:
        seen, channel, want = turn.seen, turn.channel, turn.want
        if channel is None or want is None:
            debts = await self._debts(seen.record.entries, seen.record.deletion_policy)
            if channel and any(_login_refused(debt) for debt in debts.values()):
                seen, debts = await self._with_present_login(channel, seen, debts)
            turn.seen = replace(seen, debts={**seen.debts, **debts})
            return
        if want.suspend:
            return
        if seen.debts:  # the record itself
            turn.seen = replace(seen, number=Refused(Reason.TokenUnreadable, f"{next(iter(seen.debts.values()))}."))
            return
        try:
            login, source = await self._login(channel)
            login, number, rejected = await self._number(turn, want, login)
        except Refused as refused:
            turn.seen = replace(seen, number=refused)
            return
        others = [entry for entry in seen.record.entries if entry.number_sid != number.sid]
        turn.seen = replace(
            seen,
            login=login,
            source=source,
            number=number,
            rejected=rejected,
            was_configured=_was_configured(channel, want, number),
            debts=await self._debts(others, want.deletion_policy),
        )

    async def _login(self, channel: SmsChannel) -> tuple[Login, str]:
        """Who logs in, and from which version of the credentials. `Refused` says what is wrong with them."""
        spec, meta = channel.spec, channel.metadata
        sid = spec.credentials.sid or spec.account_sid
        if spec.credentials.sealed:
            binding = Binding(meta.namespace, meta.name, spec.account_sid)
            try:
                return Login(sid=sid, token=self._keyring.unseal(spec.credentials.sealed, binding)), "sealed"
            except Unreadable as error:
                raise Refused(Reason.TokenUnreadable, f"{str(error).capitalize()}.") from None
        ref = spec.credentials.secret_key_ref
        assert ref, "the model allows exactly one source"
        secret = await self._kube.secret(meta.namespace, ref.name)
        if secret is None:
            raise Refused(Reason.SecretNotFound, f"Secret {ref.name} does not exist in namespace {meta.namespace}.")
        if (secret["metadata"].get("labels") or {}).get(CREDENTIALS_LABEL) != "true":
            raise Refused(Reason.SecretNotLabelled, f'Secret {ref.name} lacks the label {CREDENTIALS_LABEL}: "true".')
        try:
            token = base64.b64decode((secret.get("data") or {})[ref.key]).decode().strip()
        except (KeyError, ValueError):
            token = ""
        if not token:
            raise Refused(Reason.SecretKeyMissing, f"Secret {ref.name} has no token under the key {ref.key}.")
        return Login(sid=sid, token=SecretStr(token)), secret_source(ref.name, secret["metadata"]["resourceVersion"])

    async def _number(self, turn: _Turn, want: Desired, login: Login) -> tuple[Login, Number, Refused | None]:
        """The wanted number and the login that found it; with the refusal of a newer login, if an older one did."""
        rejected = None
        known = turn.seen.record.login_for(want.account_sid)
        try:
            number = await self._twilio.find_number(login, want.account_sid, want.phone_number)
        except Refused as refused:
            if refused.reason is not Reason.AuthenticationFailed or known in {None, login}:
                raise
            try:
                number = await self._twilio.find_number(known, want.account_sid, want.phone_number)
            except Refused:
                raise refused from None
            login, rejected = known, Refused(Reason.TokenRejected, f"The newer token is not used: {refused}")
        if number is None:
            message = f"Account {want.account_sid} has no number {want.phone_number}."
            raise Refused(Reason.NumberNotFound, message)
        if number.receives_sms and not self._claims.reserve(number.sid, turn.uid, turn.key):
            raise Refused(Reason.NumberInUse, f"{want.phone_number} already serves another channel.")
        return login, number, rejected

    async def _debts(self, entries: Iterable[Entry], policy: DeletionPolicy) -> dict[str, Debt]:
        """What became of the numbers that are not wanted any more; nobody is asked for what may stay as it is."""
        debts: dict[str, Debt] = {}
        for entry in entries:
            debt: Debt = None
            if policy is not DeletionPolicy.RETAIN:
                try:
                    debt = await self._twilio.fetch_number(entry.login, entry.account_sid, entry.number_sid)
                except ChannelError as error:
                    debt = error
            debts[entry.number_sid] = debt
        return debts

    async def _with_present_login(
        self, channel: SmsChannel, seen: Observed, debts: dict[str, Debt]
    ) -> tuple[Observed, dict[str, Debt]]:
        """The token may have been rotated since it was recorded: the channel's credentials of today may still pay."""
        try:
            login, _ = await self._login(channel)
        except Refused:
            return seen, debts
        record = seen.record.with_login(channel.spec.account_sid, login)
        tried = await self._debts(record.entries, record.deletion_policy)
        if sum(map(_login_refused, tried.values())) < sum(map(_login_refused, debts.values())):
            return replace(seen, record=record), tried
        return seen, debts

    # Plan and apply

    async def _converge(self, turn: _Turn) -> Verdict:
        for _ in range(_ROUNDS):
            step = plan(turn.want, turn.seen, self._template, self._clock())
            if not step.changes:
                return step.verdict
            for change in step.changes:
                turn.seen = await self._apply(change, turn)
        raise TwilioUnavailable("Twilio does not keep the webhook that it is told.")

    async def _apply(self, change: Change, turn: _Turn) -> Observed:
        """Make one change; what was observed, with what it brought about."""
        seen, channel = turn.seen, turn.channel
        match change:
            case AddFinalizer() if channel:
                await self._kube.add_finalizer(channel)
                return replace(seen, finalizer=True)
            case RemoveFinalizer() if channel:
                await self._kube.remove_finalizer(channel)
                return replace(seen, finalizer=False)
            case SaveRecord(record):
                await self._kube.save_record(record)
                return replace(seen, record=record, stored=True)
            case DropRecord():
                await self._kube.drop_record(turn.uid)
                return replace(seen, record=seen.record.model_copy(update={"entries": ()}), stored=False)
            case SetWebhook(login, account_sid, number_sid, webhook):
                try:
                    number = await self._twilio.set_webhook(login, account_sid, number_sid, webhook)
                except Gone:
                    raise TwilioUnavailable("The number vanished while it was configured.") from None
                turn.drifted = seen.was_configured
                return replace(seen, number=number)
            case GiveBack(entry, webhook):
                debt: Debt
                try:
                    debt = await self._twilio.set_webhook(entry.login, entry.account_sid, entry.number_sid, webhook)
                except Gone:
                    debt = None
                except ChannelError as error:
                    debt = error
                return replace(seen, debts={**seen.debts, entry.number_sid: debt})
        raise AssertionError(f"{change} without a channel")

    # Report

    async def _unavailable(self, turn: _Turn, error: TwilioUnavailable) -> Outcome:
        verdict = Verdict(Reason.TwilioUnavailable, str(error))
        if turn.channel and turn.want:
            generation = turn.channel.metadata.generation
            kept = still_trying(turn.channel.status, str(error), generation=generation, now=self._clock())
            if kept is not None:
                await self._write_status(turn.channel, kept)
                return Outcome(verdict, turn.seen.record, turn.seen.stored, at_least=error.retry_after)
        return replace(await self._report(turn, verdict), again=None, at_least=error.retry_after)

    async def _report(self, turn: _Turn, verdict: Verdict) -> Outcome:
        owed = [debt for debt in turn.seen.debts.values() if isinstance(debt, ChannelError)]
        asked = [debt.retry_after for debt in owed if isinstance(debt, Retryable) and debt.retry_after]
        outcome = Outcome(
            verdict,
            turn.seen.record,
            turn.seen.stored,
            again=None if owed else self._again(verdict.reason),
            at_least=max(asked, default=None),
            at_most=self._grace_left(turn.channel),
        )
        channel = turn.channel
        if channel is None or (channel.deleting and not turn.seen.finalizer):
            return replace(outcome, gone=not turn.seen.stored)
        before = channel.status
        after = next_status(
            before,
            verdict,
            generation=channel.metadata.generation,
            webhook_url=self._template.url(channel.metadata.name),
            now=self._clock(),
        )
        await self._write_status(channel, after)
        if turn.drifted:
            DRIFT.labels("corrected").inc()
            note = "Somebody changed the number's webhook at Twilio; it is put right."
            await self._tell(channel, warning=True, reason="DriftCorrected", note=note)
        told = reason_of(before)
        if verdict.reason is not told and not (told is None and verdict.reason is Reason.Configured):
            warning = verdict.reason.ready == "False" and verdict.reason is not Reason.Releasing
            warning = warning or verdict.reason is Reason.TokenRejected
            note = next(each["message"] for each in after["conditions"] if each["type"] == "Ready")
            await self._tell(channel, warning=warning, reason=verdict.reason.name, note=note)
        return outcome

    def _grace_left(self, channel: SmsChannel | None) -> float | None:
        """Seconds until a deletion is let go; None where none waits for that."""
        since = channel.metadata.deletion_timestamp if channel else None
        if since is None:
            return None
        left = self._intervals.deletion_grace - (self._clock() - since).total_seconds()
        return left if left > 0 else None

    async def _write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None:
        if status != channel.status:
            with contextlib.suppress(Gone):
                await self._kube.write_status(channel, status)

    async def _tell(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None:
        """Events are a courtesy: where they are refused, the conditions still say it."""
        try:
            await self._kube.post_event(channel, warning=warning, reason=reason, note=note)
        except ChannelError as error:
            log.warning("event refused", channel=channel.metadata.name, reason=reason, error=str(error))

    def _again(self, reason: Reason) -> float | None:
        """Jitter of a fifth keeps channels that began together from coming back together."""
        if reason.look in {Look.BACKOFF, Look.AT_ONCE}:
            return None
        seconds = self._intervals.drift if reason.look is Look.DRIFT else self._intervals.slow
        return seconds * random.uniform(0.8, 1.2)  # noqa: S311  (no secret is made of it)


@dataclass
class _Turn:
    """What one reconcile knows so far."""

    key: Key
    channel: SmsChannel | None
    want: Desired | None
    drifted: bool = False

    def __post_init__(self) -> None:
        self.uid = self.channel.metadata.uid if self.channel else self.key.uid
        self.seen = Observed(Record(uid=self.uid, namespace=self.key.namespace, name=self.key.name))


def _login_refused(debt: Debt) -> bool:
    return isinstance(debt, Refused) and debt.reason is Reason.AuthenticationFailed


def secret_source(name: str, resource_version: str) -> str:
    """How a record remembers from which version of which Secret its token came."""
    return f"secret/{name}@{resource_version}"


def _was_configured(channel: SmsChannel, want: Desired, number: Number) -> bool:
    """Whether this number was pointed at this URL before, so that another one now is drift."""
    status = channel.status
    effective = condition(status, "WebhookEffective")  # unlike Ready it outlives what has nothing to do with it
    return (
        effective is not None
        and (effective["status"] == "True" or effective["reason"] in _MISMATCHES)
        and status.get("phoneNumberSid") == number.sid
        and status.get("webhookUrl") == want.webhook.url
    )


_MISMATCHES = {"UrlMismatch", "MethodMismatch", "OverriddenByApplication"}
