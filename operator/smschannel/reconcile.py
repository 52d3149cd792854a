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
from cachetools import TTLCache
from pydantic import SecretStr

from smschannel.api.errors import ChannelError, NotFound, Refused, Retryable, TwilioUnavailable, Unreadable
from smschannel.api.reasons import Look, Reason
from smschannel.api.resource import CREDENTIALS_LABEL, DeletionPolicy, DriftPolicy, SmsChannel
from smschannel.api.sealing import Binding, Keyring
from smschannel.api.status import condition, reason_of, was_well
from smschannel.core.conditions import UNREADABLE, next_status, still_trying
from smschannel.core.plan import (
    CONTESTED_AFTER,
    AddFinalizer,
    Change,
    Debt,
    Desired,
    DropRecord,
    GiveBack,
    Number,
    Observed,
    Plan,
    RemoveFinalizer,
    Routing,
    SaveRecord,
    SetWebhook,
    Verdict,
    WriteOff,
    desired,
    foresee,
    plan,
)
from smschannel.core.record import Age, Claims, Entry, Login, Record, Webhook, WebhookTemplate
from smschannel.metrics import DRIFT, WRITTEN_OFF

log = structlog.get_logger()


class Key(NamedTuple):
    """A channel; or, with `uid`, a record whose channel is gone."""

    namespace: str
    name: str
    uid: str = ""


class Twilio(Protocol):
    def forget_refusal(self, login: Login, account_sid: str) -> None: ...
    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None: ...
    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None: ...
    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number: ...


class Accounts(Protocol):
    """What is known of whole accounts: see `inventory`."""

    async def number(self, login: Login, account_sid: str, phone_number: str) -> Number | None: ...
    async def routing(
        self, login: Login, account_sid: str, number_sid: str, *, max_age: float | None = None
    ) -> Routing: ...


class Kube(Protocol):
    async def secret(self, namespace: str, name: str) -> dict[str, Any] | None: ...
    async def load_record(self, uid: str) -> Record | None: ...
    async def save_record(self, record: Record) -> None: ...
    async def drop_record(self, uid: str) -> None: ...
    async def write_off(self, record: Record, why: str) -> None: ...
    async def add_finalizer(self, channel: SmsChannel) -> None: ...
    async def remove_finalizer(self, channel: SmsChannel) -> None: ...
    async def write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None: ...
    async def post_event(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None: ...


@dataclass(frozen=True)
class Intervals:
    """Seconds until a channel is looked at again; how long a deletion waits for the give-back, and how long what is
    owed after it is tried before it is written off.
    """

    drift: float
    slow: float
    deletion_grace: float
    restore_deadline: float


@dataclass(frozen=True)
class Outcome:
    """What a turn came to. `again` is seconds until the next look; None asks for a backoff between `at_least` and
    `at_most`.

    `gone` says that nothing is left to look after; `record` is what is remembered now, if `stored`; `owed` counts the
    numbers that could not be given back yet; `unreachable` says that Twilio did not do its part; `kept` is the reason
    that Ready goes on to carry, where that is not the verdict's.
    """

    verdict: Verdict
    record: Record
    stored: bool
    again: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    gone: bool = False
    owed: int = 0
    unreachable: bool = False
    kept: Reason | None = None


_ROUNDS = 5
"""How often a plan may ask for more: three are enough, and a Twilio that does not keep what it is told needs an end."""
_OFFERS = 65_536


class Reconciler:
    def __init__(
        self,
        kube: Kube,
        twilio: Twilio,
        accounts: Accounts,
        *,
        keyring: Keyring,
        template: WebhookTemplate,
        claims: Claims[Key],
        intervals: Intervals,
        clock: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._twilio = twilio
        self._accounts = accounts
        self._keyring = keyring
        self._template = template
        self._claims = claims
        self._intervals = intervals
        self._clock = clock
        # Verified logins of those who wait, by account and number; a little longer than until they are looked at again.
        self._offers: TTLCache[tuple[str, str], Login] = TTLCache(_OFFERS, 2 * intervals.slow)
        self._corrections: dict[str, int] = {}  # checks in a row that put a channel's webhook right

    async def reconcile(self, key: Key, channel: SmsChannel | None, *, fresh: bool = False) -> Outcome:
        """One turn; `channel` is None for a record whose channel is gone. `fresh` asks Twilio for everything anew.

        Raises what Kubernetes refuses.
        """
        turn = _Turn(key, channel, desired(channel, self._template) if channel else None, fresh)
        await self._load(turn)
        for entry in turn.seen.record.entries if fresh else ():
            self._twilio.forget_refusal(entry.login, entry.account_sid)
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

    async def preview(self, key: Key, channel: SmsChannel | None) -> tuple[Observed, Plan]:
        """What is found, and all that a turn would do about it if Twilio plays along: nothing is written.

        Raises `TwilioUnavailable`, and what Kubernetes refuses.
        """
        turn = _Turn(key, channel, desired(channel, self._template) if channel else None, fresh=True)
        await self._load(turn)
        await self._observe(turn)
        return turn.seen, foresee(turn.want, turn.seen, self._template, self._clock())

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
            grace_over=meta is None or self._over(meta.deletion_timestamp, self._intervals.deletion_grace),
            deadline_over=self._over(record.owed_since if record else None, self._intervals.restore_deadline),
        )
        if turn.channel and turn.channel.deleting:
            policy = turn.channel.spec.deletion_policy
            turn.seen = replace(turn.seen, record=turn.seen.record.model_copy(update={"deletion_policy": policy}))

    def _over(self, since: datetime | None, seconds: float) -> bool:
        return since is not None and self._clock() - since > timedelta(seconds=seconds)

    async def _observe(self, turn: _Turn) -> None:
        seen, channel, want = turn.seen, turn.channel, turn.want
        self._claims.stop_waiting(turn.uid)
        if channel is None or want is None:
            debts = await self._debts(seen.record.entries, seen.record.deletion_policy)
            if any(_login_refused(debt) for debt in debts.values()):
                for account_sid, login in await self._other_logins(channel, seen.record):
                    seen, debts = await self._with_login(account_sid, login, seen, debts)
            turn.seen = replace(seen, debts={**seen.debts, **debts})
            return
        if want.suspend:
            return
        if seen.debts:  # the record itself
            error = next(iter(seen.debts.values()))
            remedy = f"its Secret {turn.uid} must be restored, or deleted in the operator's namespace"
            message = f"The operator's own record of this channel cannot be used ({error}): {remedy}."
            turn.seen = replace(seen, number=Refused(Reason.TokenUnreadable, message))
            return
        try:
            login, source = await self._login(channel)
            login, number, rejected = await self._number(turn, channel, want, login, source)
            if number.receives_sms:
                try:
                    self._claim(self._claims.reserve, turn, channel, number)
                except Refused:
                    self._offers[want.account_sid, number.sid] = login
                    raise
        except Refused as refused:
            # Those who want each other's numbers would wait for ever: one of them lets go of its own first.
            held = seen.record.entries if self._claims.in_circle(turn.uid) else ()
            turn.seen = replace(seen, number=refused, debts=await self._debts(held, want.deletion_policy))
            return
        others = [entry for entry in seen.record.entries if entry.number_sid != number.sid]
        was_named = channel.status.get("phoneNumberSid") == number.sid
        was_configured = was_named and _was_configured(channel.status, want)
        max_age = 0.0 if turn.fresh else None
        turn.seen = replace(
            seen,
            login=login,
            source=source,
            number=number,
            rejected=rejected,
            routing=await self._accounts.routing(login, want.account_sid, number.sid, max_age=max_age),
            was_configured=was_configured,
            was_named=was_named,
            corrections=self._corrected(channel, was_configured and number.webhook != want.webhook),
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

    async def _number(
        self, turn: _Turn, channel: SmsChannel, want: Desired, login: Login, source: str
    ) -> tuple[Login, Number, Refused | None]:
        """The wanted number and the login that found it; with the refusal of a newer login, if an older one did."""
        rejected = None
        known = turn.seen.record.login_for(want.account_sid)
        if turn.fresh:
            self._twilio.forget_refusal(login, want.account_sid)
        elif source == turn.seen.record.source and was_well(
            channel.status, generation=channel.metadata.generation, webhook_url=want.webhook.url
        ):
            number = await self._confirmed(want, login)
            if number:
                return login, number, None
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
        return login, number, rejected

    async def _confirmed(self, want: Desired, login: Login) -> Number | None:
        """The number, where the account's pages show that all is well; whatever else they show is looked at itself."""
        try:
            number = await self._accounts.number(login, want.account_sid, want.phone_number)
        except Refused:
            return None
        well = number and number.webhook == want.webhook and number.receives_sms and not number.application_sid
        return number if well else None

    def _claim(
        self, claim: Callable[[str, Age, str, Key], bool], turn: _Turn, channel: SmsChannel, number: Number
    ) -> None:
        """The number is this channel's, and the instance this namespace's; or `Refused`, which names no holder."""
        meta = channel.metadata
        age = Age(meta.creation_timestamp, meta.uid)
        if not claim(number.sid, age, meta.uid, turn.key):
            raise Refused(Reason.NumberInUse, f"{number.phone_number} already serves another channel.")
        if not claim(meta.name, age, meta.namespace, turn.key):
            raise Refused(Reason.InstanceInUse, "This instance already has a channel in another namespace.")

    def _corrected(self, channel: SmsChannel, overwritten: bool) -> int:
        """How many checks in a row found the webhook overwritten, this one among them."""
        uid = channel.metadata.uid
        if not overwritten or channel.spec.drift_policy is not DriftPolicy.CORRECT:
            self._corrections.pop(uid, None)
            return 0
        contested = reason_of(channel.status) is Reason.WebhookContested  # before a restart
        return 1 + self._corrections.get(uid, CONTESTED_AFTER if contested else 0)

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

    async def _other_logins(self, channel: SmsChannel | None, record: Record) -> list[tuple[str, Login]]:
        """Who may still pay, with the account, where a recorded token is refused: it may have been rotated since. That
        is the channel's credentials of today; or, where the channel is gone, those of who waits for the number.
        """
        if channel is None:
            offers = (self._offers.get((entry.account_sid, entry.number_sid)) for entry in record.entries)
            return [(entry.account_sid, offer) for entry, offer in zip(record.entries, offers, strict=True) if offer]
        try:
            login, _ = await self._login(channel)
        except ChannelError:  # also where the namespace is going, and with it the right to read its Secrets
            return []
        return [(channel.spec.account_sid, login)]

    async def _with_login(
        self, account_sid: str, login: Login, seen: Observed, debts: dict[str, Debt]
    ) -> tuple[Observed, dict[str, Debt]]:
        """What is seen with another login for the account, where that one is refused less."""
        record = seen.record.with_login(account_sid, login)
        if record == seen.record:
            return seen, debts
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
                if channel and turn.want and isinstance(seen.number, Number):
                    self._claim(self._claims.keep, turn, channel, seen.number)
                await self._kube.save_record(record)
                return replace(seen, record=record, stored=True)
            case DropRecord(left):
                if left:
                    await self._tell_left(turn, left)
                await self._kube.drop_record(turn.uid)
                return replace(seen, record=seen.record.model_copy(update={"entries": ()}), stored=False)
            case WriteOff(record, why):
                await self._kube.write_off(record, why)
                WRITTEN_OFF.inc(len(record.entries))
                owed = ", ".join(entry.phone_number for entry in record.entries)
                log.error("written off", channel=record.name, namespace=record.namespace, numbers=owed, why=why)
                return replace(seen, record=record.model_copy(update={"entries": ()}), stored=False, debts={})
            case SetWebhook(login, account_sid, number_sid, webhook):
                try:
                    number = await self._twilio.set_webhook(login, account_sid, number_sid, webhook)
                except NotFound:
                    raise TwilioUnavailable("The number vanished while it was configured.") from None
                turn.drifted = seen.was_configured
                if seen.corrections:
                    self._corrections[turn.uid] = seen.corrections
                return replace(seen, number=number)
            case GiveBack(entry, webhook):
                debt: Debt
                try:
                    debt = await self._twilio.set_webhook(entry.login, entry.account_sid, entry.number_sid, webhook)
                    if debt.webhook != webhook and entry.points_at_us(debt.webhook):  # asking again would never end
                        debt = TwilioUnavailable("Twilio does not keep the webhook that it is told.")
                except NotFound:
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
                return Outcome(
                    verdict,
                    turn.seen.record,
                    turn.seen.stored,
                    at_least=error.retry_after,
                    unreachable=True,
                    kept=reason_of(kept),
                )
        return replace(await self._report(turn, verdict), again=None, at_least=error.retry_after, unreachable=True)

    async def _report(self, turn: _Turn, verdict: Verdict) -> Outcome:
        owed = [debt for debt in turn.seen.debts.values() if isinstance(debt, ChannelError)]
        later = [debt for debt in owed if isinstance(debt, Retryable)]
        asked = [debt.retry_after for debt in later if debt.retry_after]
        outcome = Outcome(
            verdict,
            turn.seen.record,
            turn.seen.stored,
            again=None if owed else self._again(verdict.reason),
            at_least=max(asked, default=None),
            at_most=self._grace_left(turn.channel),
            owed=len(owed),
            unreachable=bool(later),
        )
        channel = turn.channel
        if channel is None or (channel.deleting and not turn.seen.finalizer):
            self._corrections.pop(turn.uid, None)
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
        told = reason_of(before)
        if turn.drifted:
            DRIFT.labels("corrected").inc()
            if verdict.reason is not Reason.WebhookContested:
                note = "Somebody changed the number's webhook at Twilio; it is put right."
                await self._tell(channel, warning=True, reason="DriftCorrected", note=note)
        elif verdict.reason is Reason.WebhookDrifted and told is not verdict.reason:
            DRIFT.labels("reported").inc()
        if verdict.reason is not told and not (told is None and verdict.reason is Reason.Configured):
            warning = verdict.reason.ready == "False" and verdict.reason is not Reason.Restoring
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
            with contextlib.suppress(NotFound):
                await self._kube.write_status(channel, status)

    async def _tell_left(self, turn: _Turn, left: tuple[str, ...]) -> None:
        note = f"What {', '.join(left)} pointed at before is not known, so it keeps pointing at the instance's webhook."
        log.warning("left as it is", channel=turn.key.name, numbers=", ".join(left))
        if turn.channel:
            await self._tell(turn.channel, warning=True, reason="PreviousUnknown", note=note)

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
    fresh: bool
    drifted: bool = False

    def __post_init__(self) -> None:
        self.uid = self.channel.metadata.uid if self.channel else self.key.uid
        self.seen = Observed(Record(uid=self.uid, namespace=self.key.namespace, name=self.key.name))


def _login_refused(debt: Debt) -> bool:
    return isinstance(debt, Refused) and debt.reason is Reason.AuthenticationFailed


def secret_source(name: str, resource_version: str) -> str:
    """How a record remembers from which version of which Secret its token came."""
    return f"secret/{name}@{resource_version}"


def _was_configured(status: Mapping[str, Any], want: Desired) -> bool:
    """Whether the number that the status names was pointed at this URL, so that another one now is drift."""
    effective = condition(status, "WebhookEffective")  # unlike Ready it outlives what has nothing to do with it
    return (
        effective is not None
        and (effective["status"] == "True" or effective["reason"] in _MISMATCHES)
        and status.get("webhookUrl") == want.webhook.url
    )


_MISMATCHES = {
    "NotSet",
    "UrlMismatch",
    "MethodMismatch",
    "OverriddenByApplication",
    "OverriddenByMessagingService",
    UNREADABLE,
}
