"""The data path: observe, plan, apply, report. Everything that happens to a channel happens here.

    desired(channel)    what is asked for; None while the channel is being deleted
    observe             reads: records, credentials, Twilio
    plan                pure: changes and a verdict; asked again with what the changes brought about
    apply               writes, in the safe order that the plan gives
    report              status and Event, only if something changed

One key stands for a name. What earlier channels of that name left is restored before its channel claims anything.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

import structlog
from cachetools import TTLCache
from pydantic import SecretStr

from smschannel.api.errors import (
    ChannelError,
    NotFound,
    Refused,
    Retryable,
    TwilioThrottled,
    TwilioUnavailable,
    Unreadable,
)
from smschannel.api.reasons import Effective, Reason, Recheck
from smschannel.api.resource import CHECK_NOW_ANNOTATION, CREDENTIALS_LABEL, DeletionPolicy, DriftPolicy, SmsChannel
from smschannel.api.sealing import Binding, Keyring
from smschannel.api.status import condition, reason_of, was_well
from smschannel.core.claims import Claims
from smschannel.core.conditions import next_status, status_while_unavailable
from smschannel.core.plan import (
    CONTESTED_AFTER,
    AddFinalizer,
    Change,
    CreateRecord,
    Current,
    DeleteRecord,
    Desired,
    Number,
    Observed,
    Plan,
    RemoveFinalizer,
    RestoreWebhook,
    Routing,
    Rules,
    SetWebhook,
    UpdateRecord,
    Verdict,
    WriteOff,
    desired,
    foresee,
    plan,
    with_current,
    with_record,
    without_record,
)
from smschannel.core.record import Key, Login, Record, Webhook, secret_source
from smschannel.metrics import DRIFT, WRITTEN_OFF

log = structlog.get_logger()

_MOST_ROUNDS = 8
"""How often a plan may ask for more. Five are enough; a Twilio that does not keep what it is told needs an end."""
_MOST_FALLBACKS = 65_536
_LONGEST_CHECK_NOW = 256


class Twilio(Protocol):
    def forget_refusal(self, login: Login, account_sid: str) -> None: ...
    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None: ...
    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None: ...
    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number: ...


class Accounts(Protocol):
    """Whole accounts, read in pages and cached: see `twilio.account_cache`."""

    async def number(self, login: Login, account_sid: str, phone_number: str) -> Number | None: ...
    async def routing(
        self, login: Login, account_sid: str, number_sid: str, *, max_age: float | None = None
    ) -> Routing: ...


class Kube(Protocol):
    claims: Claims

    async def secret(self, namespace: str, name: str) -> dict[str, Any] | None: ...
    async def holder(self, number_sid: str) -> Record | None: ...
    async def open_record(self, record: Record) -> Record | None: ...
    async def create_record(self, record: Record) -> Record: ...
    async def update_record(self, record: Record) -> Record: ...
    async def delete_record(self, record: Record) -> None: ...
    async def write_off(self, record: Record, why: str) -> None: ...
    async def add_finalizer(self, channel: SmsChannel) -> None: ...
    async def remove_finalizer(self, channel: SmsChannel) -> None: ...
    async def write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None: ...
    async def post_event(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None: ...


class Orphans(Protocol):
    async def is_gone(self, record: Record) -> bool:
        """Whether it is proven that the channel which holds this record no longer exists."""


class Channels(Protocol):
    """The other channels: see `channel_cache`."""

    def set_awaited(self, key: Key, number_sid: str) -> None: ...
    def is_swap(self, key: Key) -> bool: ...


@dataclass(frozen=True)
class Intervals:
    """Seconds between checks of a channel that nothing happened to; a fifth of jitter is added or taken off."""

    drift: float
    slow: float


@dataclass(frozen=True)
class RequeueAfter:
    seconds: float


@dataclass(frozen=True)
class RequeueRateLimited:
    """After the next backoff, but at least `at_least` and at most `at_most` seconds."""

    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of one reconcile.

    `ready` is the reason that Ready carries now, None if there is no channel to report on; during an outage it may
    differ from the verdict's. `requeue` None: nothing is left to do. `twilio_failed` says that Twilio did not do its
    part, `pause` for how many seconds it asked not to be called.
    """

    verdict: Verdict
    ready: Reason | None = None
    requeue: RequeueAfter | RequeueRateLimited | None = None
    twilio_failed: bool = False
    pause: float | None = None


@dataclass(frozen=True)
class _Subject:
    """Whose records a pass is about: a channel's own, or, without a channel, those that earlier ones left."""

    key: Key
    channel: SmsChannel | None = None
    desired: Desired | None = None

    @property
    def bypass_cache(self) -> bool:
        """Whether Twilio is asked for everything, whatever is cached."""
        return self.channel is not None and wants_check(self.channel.metadata.annotations, self.channel.status)


def wants_check(annotations: Mapping[str, str], status: Mapping[str, Any]) -> bool:
    """Whether the check-now annotation asks for a check that no reconcile has taken care of yet."""
    asked = _check_now(annotations)
    return bool(asked) and asked != status.get("lastHandledCheckNow")


def _check_now(annotations: Mapping[str, str]) -> str:
    return annotations.get(CHECK_NOW_ANNOTATION, "")[:_LONGEST_CHECK_NOW]


class Reconciler:
    def __init__(
        self,
        kube: Kube,
        twilio: Twilio,
        accounts: Accounts,
        orphans: Orphans,
        channels: Channels,
        *,
        keyring: Keyring,
        rules: Rules,
        intervals: Intervals,
        clock: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._twilio = twilio
        self._accounts = accounts
        self._orphans = orphans
        self._channels = channels
        self._keyring = keyring
        self._rules = rules
        self._template = rules.template
        self._intervals = intervals
        self._clock = clock
        # Verified logins of channels that wait for a number, by account and number: longer than until their next check.
        self._waiting_logins: TTLCache[tuple[str, str], Login] = TTLCache(_MOST_FALLBACKS, 2 * intervals.slow)
        self._corrections: dict[str, int] = {}  # by uid: checks in a row that corrected the channel's webhook

    async def reconcile(self, key: Key, channel: SmsChannel | None) -> Outcome:
        """Reconcile a name; `channel` is None if there is no channel of that name. Raises Kubernetes' errors."""
        former = await self._restore_former(key, channel)
        if channel is None:
            return former
        outcome = await self._reconcile_channel(_Subject(key, channel, desired(channel, self._template)))
        if former.requeue and not isinstance(outcome.requeue, RequeueRateLimited):
            failed = outcome.twilio_failed or former.twilio_failed
            outcome = replace(outcome, requeue=former.requeue, twilio_failed=failed)
        return outcome

    async def preview(self, key: Key, channel: SmsChannel | None) -> list[tuple[Observed, Plan]]:
        """What was read, and what a reconcile would do about it if every change succeeded; writes nothing.

        First for the records that earlier channels of the name left, if there are any, then for the channel itself.
        Raises `TwilioUnavailable`, and Kubernetes' errors.
        """
        passes: list[tuple[Observed, Plan]] = []
        if records := await self._former(key, channel):
            observed = await self._observe_restore(_Subject(key), records, await self._login_or_none(channel))
            passes.append((observed, foresee(None, observed, self._rules, self._clock())))
        if channel:
            subject = _Subject(key, channel, desired(channel, self._template))
            observed = await self._observe(subject)
            passes.append((observed, foresee(subject.desired, observed, self._rules, self._clock())))
        return passes

    # What earlier channels of the name left

    async def _restore_former(self, key: Key, channel: SmsChannel | None) -> Outcome:
        outcome = Outcome(Verdict(Reason.Restoring, "Nothing is left to restore."))
        gone = await self._former(key, channel)
        if gone:
            subject = _Subject(key)
            observed = await self._observe_restore(subject, gone, await self._login_or_none(channel))
            try:
                observed, verdict = await self._converge(subject, observed)
            except TwilioUnavailable as error:
                return Outcome(_unavailable(error), requeue=RequeueRateLimited(error.retry_after), twilio_failed=True)
            outcome = self._outcome(subject, observed, verdict)
        uid = channel.metadata.uid if channel else None
        if outcome.requeue is None and any(record.uid != uid for record in self._kube.claims.of(key)):
            outcome = replace(outcome, requeue=RequeueRateLimited())
        return outcome

    async def _former(self, key: Key, channel: SmsChannel | None) -> list[Record]:
        """The records of this name whose channel is proven to be gone."""
        uid = channel.metadata.uid if channel else None
        others = [record for record in self._kube.claims.of(key) if record.uid != uid]
        return [record for record in others if await self._orphans.is_gone(record)]

    async def _login_or_none(self, channel: SmsChannel | None) -> tuple[str, Login] | None:
        """The channel's account and current login; None also if its namespace, and the right to read Secrets, goes."""
        if channel is None:
            return None
        try:
            login, _ = await self._login(channel)
        except ChannelError:
            return None
        return channel.spec.account_sid, login

    # The channel

    async def _reconcile_channel(self, subject: _Subject) -> Outcome:
        try:
            first = await self._observe(subject)
            observed, verdict = await self._converge(subject, first)
        except TwilioUnavailable as error:
            return await self._report_unavailable(subject, error)
        except Refused as refused:
            verdict = Verdict(refused.reason, str(refused))
            return await self._report(subject, self._outcome(subject, Observed(), verdict))
        outcome = self._outcome(subject, observed, verdict)
        if subject.desired is None and not observed.finalizer:
            assert subject.channel
            self._corrections.pop(subject.channel.metadata.uid, None)
            return outcome  # the channel is gone, or other finalizers keep it
        corrected = subject.desired is not None and _was_corrected(subject.desired, first, observed)
        return await self._report(subject, outcome, corrected=corrected)

    # Observe: reads only

    async def _observe(self, subject: _Subject) -> Observed:
        channel, want, claims = subject.channel, subject.desired, self._kube.claims
        assert channel, "records without a channel are observed by _observe_restore"
        meta = channel.metadata
        own = [record for record in claims.of(subject.key) if record.uid == meta.uid]
        if want is None:
            observed = await self._observe_restore(subject, own, None)
            return replace(observed, finalizer=channel.has_finalizer, deleted_at=meta.deletion_timestamp)
        records, unreadable = await self._open(subject, own)
        observed = Observed(records=records, finalizer=channel.has_finalizer)
        if want.suspend:
            return observed
        login = None
        try:
            for number_sid, error in unreadable.items():
                if records[number_sid].phone_number == want.phone_number:
                    raise _record_unreadable(records[number_sid], error)
            login, source = await self._login(channel)
            login, number, rejected = await self._number(subject, channel, want, records, login, source)
            if number.sid in unreadable:
                raise _record_unreadable(records[number.sid], unreadable[number.sid])
            if number.receives_sms and number.sid not in records:
                await self._refuse_if_held(subject, number, login)
        except Refused as refused:
            # Channels that wait for each other's numbers would wait forever: one of them restores its own first.
            held = records.values() if self._channels.is_swap(subject.key) else ()
            return replace(observed, number=refused, to_restore=await self._read_all(held, want.deletion_policy))
        others = [record for record in records.values() if record.number_sid != number.sid]
        was_named = channel.status.get("phoneNumberSid") == number.sid
        was_configured = was_named and _was_configured(channel.status, want)
        max_age = 0.0 if subject.bypass_cache else None
        return replace(
            observed,
            login=login,
            source=source,
            number=number,
            rejected=rejected,
            routing=await self._accounts.routing(login, want.account_sid, number.sid, max_age=max_age),
            was_configured=was_configured,
            was_named=was_named,
            corrections=self._corrected(channel, was_configured and number.webhook != want.webhook),
            to_restore={**await self._read_all(others, want.deletion_policy), **_other(unreadable, number.sid)},
        )

    async def _open(
        self, subject: _Subject, records: Iterable[Record]
    ) -> tuple[dict[str, Record], dict[str, Unreadable]]:
        """The records with their contents, and why some cannot be opened."""
        opened: dict[str, Record] = {}
        unreadable: dict[str, Unreadable] = {}
        for record in records:
            try:
                found = await self._kube.open_record(record)
            except Unreadable as error:
                unreadable[record.number_sid] = error
                found = self._kube.claims.holder(record.number_sid)  # its plain metadata as it is now
            if found is None or found.uid != record.uid:
                continue
            opened[record.number_sid] = found
            if subject.bypass_cache and found.contents:
                self._twilio.forget_refusal(found.contents.login, found.account_sid)
        return opened, unreadable

    async def _observe_restore(
        self, subject: _Subject, records: Iterable[Record], fallback: tuple[str, Login] | None
    ) -> Observed:
        """Everything is to be restored. `fallback` is an account and a login to try if a recorded one is refused."""
        opened, unreadable = await self._open(subject, records)
        channel = subject.channel
        if channel:  # the policy that it has now counts; it is written down if the record outlives the channel
            policy = channel.spec.deletion_policy
            opened = {number_sid: replace(each, deletion_policy=policy) for number_sid, each in opened.items()}
            fallback = fallback or await self._login_or_none(channel)
        to_restore: dict[str, Current] = dict(unreadable)
        for number_sid, record in list(opened.items()):
            if number_sid not in unreadable:
                opened[number_sid], to_restore[number_sid] = await self._read_with_fallback(record, fallback)
        return Observed(records=opened, to_restore=to_restore)

    async def _read_with_fallback(self, record: Record, fallback: tuple[str, Login] | None) -> tuple[Record, Current]:
        """A number to restore, and its record with the login that reads it.

        A recorded token may have been rotated since. Then the channel's current login is tried, or that of a channel
        that waits for this number.
        """
        current = await self._read(record, record.deletion_policy)
        waiting = self._waiting_logins.get((record.account_sid, record.number_sid))
        logins = [login for account, login in [fallback] if account == record.account_sid] if fallback else []
        for login in [*logins, *([waiting] if waiting else [])]:
            if not _is_login_refused(current):
                break
            tried = record.with_contents(login=login)
            answer = await self._read(tried, record.deletion_policy)
            if not _is_login_refused(answer):
                record, current = tried, answer
        return record, current

    async def _read_all(self, records: Iterable[Record], policy: DeletionPolicy) -> dict[str, Current]:
        return {each.number_sid: await self._read(each, policy) for each in records if each.contents}

    async def _read(self, record: Record, policy: DeletionPolicy) -> Current:
        """The number as it is at Twilio. Nothing is asked if it may stay as it is."""
        if policy is DeletionPolicy.RETAIN:
            return None
        assert record.contents, "unopened records are not read"
        try:
            return await self._twilio.fetch_number(record.contents.login, record.account_sid, record.number_sid)
        except ChannelError as error:
            return error

    async def _login(self, channel: SmsChannel) -> tuple[Login, str]:
        """The channel's login, and which version of the credentials it was read from.

        Raises `Refused` with what is wrong with them.
        """
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
        self,
        subject: _Subject,
        channel: SmsChannel,
        want: Desired,
        records: Mapping[str, Record],
        login: Login,
        source: str,
    ) -> tuple[Login, Number, Refused | None]:
        """The desired number and the login that found it; with the refusal of a newer login, if an older one did.

        A recorded login stands in for a refused one only for the number that this channel's record is about.
        """
        place = want.account_sid, want.phone_number
        record = next((each for each in records.values() if (each.account_sid, each.phone_number) == place), None)
        if subject.bypass_cache:
            self._twilio.forget_refusal(login, want.account_sid)
        elif (
            record
            and source == record.source
            and was_well(channel.status, generation=channel.metadata.generation, webhook_url=want.webhook.url)
        ):
            number = await self._confirmed(want, login)
            if number and number.sid == record.number_sid:
                return login, number, None
        try:
            number = await self._twilio.find_number(login, want.account_sid, want.phone_number)
        except Refused as refused:
            recorded = record.contents.login if record and record.contents else None
            if refused.reason is not Reason.AuthenticationFailed or recorded is None or recorded == login:
                raise
            number = await self._found_with(recorded, want)
            if number is None or record is None or number.sid != record.number_sid:
                raise
            return recorded, number, Refused(Reason.TokenRejected, f"The newer token is not used: {refused}")
        if number is None:
            message = f"Account {want.account_sid} has no number {want.phone_number}."
            raise Refused(Reason.NumberNotFound, message)
        return login, number, None

    async def _found_with(self, login: Login, want: Desired) -> Number | None:
        """The desired number, or None if it cannot be found with this login either."""
        try:
            return await self._twilio.find_number(login, want.account_sid, want.phone_number)
        except Refused:
            return None

    async def _confirmed(self, want: Desired, login: Login) -> Number | None:
        """The number, if the account cache shows that nothing changed; None if it must be read itself."""
        try:
            number = await self._accounts.number(login, want.account_sid, want.phone_number)
        except Refused:
            return None
        fine = number and number.webhook == want.webhook and number.receives_sms and not number.application_sid
        return number if fine else None

    async def _refuse_if_held(self, subject: _Subject, number: Number, login: Login) -> None:
        """Raise `Refused` if another channel holds the number. The index may be out of date, so the record is read."""
        assert subject.channel
        uid = subject.channel.metadata.uid
        holder = self._kube.claims.holder(number.sid)
        if holder is None or holder.uid == uid:
            return
        holder = await self._kube.holder(number.sid)
        if holder is not None and holder.uid != uid:
            raise self._in_use(subject, number, login)

    def _in_use(self, subject: _Subject, number: Number, login: Login) -> Refused:
        """Register the channel as waiting. The message names no holder: it may be another tenant's."""
        assert subject.desired
        self._waiting_logins[subject.desired.account_sid, number.sid] = login
        self._channels.set_awaited(subject.key, number.sid)
        holder = self._kube.claims.holder(number.sid)
        if holder and holder.key == subject.key:
            message = f"{number.phone_number} is still held by an earlier channel of this name until it is restored."
        else:
            message = f"{number.phone_number} already serves another channel."
        return Refused(Reason.NumberInUse, message)

    def _corrected(self, channel: SmsChannel, overwritten: bool) -> int:
        """How many checks in a row found the webhook overwritten, this one included."""
        uid = channel.metadata.uid
        if not overwritten or channel.spec.drift_policy is not DriftPolicy.CORRECT:
            self._corrections.pop(uid, None)
            return 0
        contested = reason_of(channel.status) is Reason.WebhookContested  # before a restart
        return 1 + self._corrections.get(uid, CONTESTED_AFTER if contested else 0)

    # Plan and apply

    async def _converge(self, subject: _Subject, observed: Observed) -> tuple[Observed, Verdict]:
        """Plan and apply until nothing is left to do; what is observed then."""
        for _ in range(_MOST_ROUNDS):
            step = plan(subject.desired, observed, self._rules, self._clock())
            if not step.changes:
                return observed, step.verdict
            for change in step.changes:
                observed = await self._apply(change, subject, observed)
        raise TwilioUnavailable("Twilio does not keep the webhook that was set.")

    async def _apply(self, change: Change, subject: _Subject, observed: Observed) -> Observed:
        """Make one change; what is observed after it."""
        channel = subject.channel
        match change:
            case AddFinalizer() if channel:
                await self._kube.add_finalizer(channel)
                return replace(observed, finalizer=True)
            case RemoveFinalizer() if channel:
                await self._kube.remove_finalizer(channel)
                return replace(observed, finalizer=False)
            case CreateRecord(record):
                return await self._create_record(record, subject, observed)
            case UpdateRecord(record):
                return with_record(observed, await self._kube.update_record(record))
            case DeleteRecord(record, orphaned):
                if orphaned:
                    await self._report_orphaned(channel, record)
                await self._kube.delete_record(record)
                return without_record(observed, record)
            case WriteOff(record, why):
                await self._kube.write_off(record, why)
                WRITTEN_OFF.inc()
                log.error("record written off", **_about(record), why=why)
                return without_record(observed, record)
            case SetWebhook(login, account_sid, number_sid, webhook):
                try:
                    number = await self._twilio.set_webhook(login, account_sid, number_sid, webhook)
                except NotFound:
                    raise TwilioUnavailable("The number vanished while it was being configured.") from None
                if observed.corrections and channel:
                    self._corrections[channel.metadata.uid] = observed.corrections
                return replace(observed, number=number)
            case RestoreWebhook(record, webhook):
                return with_current(observed, record, await self._restore(record, webhook))
        raise AssertionError(f"{change} without a channel")

    async def _create_record(self, record: Record, subject: _Subject, observed: Observed) -> Observed:
        number, login = observed.number, observed.login
        assert isinstance(number, Number)
        assert login
        try:
            record = await self._kube.create_record(record)
        except Refused:
            raise self._in_use(subject, number, login) from None
        except Unreadable as error:
            raise _record_unreadable(record, error) from None
        if record.contents and record.contents.previous is None:
            # The number pointed at one of our webhooks. Its holder may have been restoring it: now that the number is
            # ours nobody else writes it, so what it points at now is what it pointed at before.
            current = await self._twilio.fetch_number(login, record.account_sid, record.number_sid)
            observed = replace(observed, number=current or number)
        return with_record(observed, record)

    async def _restore(self, record: Record, webhook: Webhook) -> Current:
        assert record.contents, "unopened records are not restored"
        try:
            login = record.contents.login
            current = await self._twilio.set_webhook(login, record.account_sid, record.number_sid, webhook)
        except NotFound:
            return None
        except ChannelError as error:
            return error
        if current.webhook != webhook and record.contents.points_at_us(current.webhook):
            return TwilioUnavailable("Twilio does not keep the webhook that was set.")  # else it is tried forever
        return current

    # Report

    def _outcome(self, subject: _Subject, observed: Observed, verdict: Verdict) -> Outcome:
        errors = [current for current in observed.to_restore.values() if isinstance(current, ChannelError)]
        retryable = [error for error in errors if isinstance(error, Retryable)]
        asked = [error.retry_after for error in retryable if error.retry_after]
        throttled = [error.retry_after for error in retryable if isinstance(error, TwilioThrottled)]
        requeue: RequeueAfter | RequeueRateLimited | None = None
        if errors or (verdict.reason.recheck is Recheck.BACKOFF and (subject.channel and observed.finalizer)):
            requeue = RequeueRateLimited(max(asked, default=None), self._grace_left(subject.channel))
        elif subject.channel and subject.desired:
            seconds = self._intervals.drift if verdict.reason.recheck is Recheck.DRIFT else self._intervals.slow
            requeue = RequeueAfter(seconds * random.uniform(0.8, 1.2))  # noqa: S311  (not a secret)
        return Outcome(
            verdict,
            requeue=requeue,
            twilio_failed=bool(retryable),
            pause=max((each for each in throttled if each), default=None),
        )

    async def _report_unavailable(self, subject: _Subject, error: TwilioUnavailable) -> Outcome:
        """Report that Twilio is unavailable. A channel that worked before is not reported as broken."""
        channel = subject.channel
        outcome = Outcome(
            _unavailable(error),
            requeue=RequeueRateLimited(error.retry_after, self._grace_left(channel)),
            twilio_failed=True,
            pause=error.retry_after if isinstance(error, TwilioThrottled) else None,
        )
        if channel and subject.desired:
            generation = channel.metadata.generation
            status = status_while_unavailable(channel.status, str(error), generation=generation, now=self._clock())
            if status is not None:
                await self._write_status(channel, status)
                return replace(outcome, ready=reason_of(status))
        return await self._report(subject, outcome)

    async def _report(self, subject: _Subject, outcome: Outcome, *, corrected: bool = False) -> Outcome:
        channel, verdict = subject.channel, outcome.verdict
        assert channel
        before, meta = channel.status, channel.metadata
        checked = verdict.reason is not Reason.TwilioUnavailable
        after = next_status(
            before,
            verdict,
            generation=meta.generation,
            webhook_url=self._template.url(meta.namespace, meta.name),
            check_now=_check_now(meta.annotations) if checked else "",
            now=self._clock(),
        )
        await self._write_status(channel, after)
        reported = reason_of(before)
        if corrected:
            DRIFT.labels("corrected").inc()
            if verdict.reason is not Reason.WebhookContested:
                note = "The number's webhook was changed at Twilio; it is corrected."
                await self._post_event(channel, warning=True, reason="DriftCorrected", note=note)
        elif verdict.reason is Reason.WebhookDrifted and reported is not verdict.reason:
            DRIFT.labels("reported").inc()
        if verdict.reason is not reported and not (reported is None and verdict.reason is Reason.Configured):
            warning = verdict.reason.ready == "False" and verdict.reason is not Reason.Restoring
            warning = warning or verdict.reason is Reason.TokenRejected
            ready = condition(after, "Ready")
            note = ready["message"] if ready else verdict.message
            await self._post_event(channel, warning=warning, reason=verdict.reason.name, note=note)
        return replace(outcome, ready=verdict.reason)

    def _grace_left(self, channel: SmsChannel | None) -> float | None:
        """Seconds until a deletion no longer waits for the restore; None if nothing waits."""
        since = channel.metadata.deletion_timestamp if channel else None
        if since is None:
            return None
        return max(0.0, (since + self._rules.deletion_grace - self._clock()).total_seconds())

    async def _write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None:
        if status != channel.status:
            await self._kube.write_status(channel, status)

    async def _report_orphaned(self, channel: SmsChannel | None, record: Record) -> None:
        log.warning("number left as it is: previous webhook unknown", **_about(record))
        if channel:
            unknown = f"What {record.phone_number} pointed at before is not known"
            note = f"{unknown}, so it keeps pointing at the instance's webhook."
            await self._post_event(channel, warning=True, reason="PreviousUnknown", note=note)

    async def _post_event(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None:
        """Post an Event. If it is refused, the conditions still say the same."""
        try:
            await self._kube.post_event(channel, warning=warning, reason=reason, note=note)
        except ChannelError as error:
            meta = channel.metadata
            log.warning("cannot post event", namespace=meta.namespace, name=meta.name, reason=reason, error=str(error))


def _unavailable(error: TwilioUnavailable) -> Verdict:
    return Verdict(Reason.TwilioUnavailable, str(error))


def _record_unreadable(record: Record, error: Unreadable) -> Refused:
    message = f"The operator's record of {record.phone_number}, Secret {record.secret_name}, cannot be opened: {error}."
    return Refused(Reason.RecordUnreadable, message)


def _is_login_refused(current: Current) -> bool:
    return isinstance(current, Refused) and current.reason is Reason.AuthenticationFailed


def _other(errors: Mapping[str, Unreadable], number_sid: str) -> dict[str, Current]:
    return {each: error for each, error in errors.items() if each != number_sid}


def _about(record: Record) -> dict[str, str]:
    """What a log line about a record names."""
    return {"namespace": record.namespace, "name": record.name, "number": record.number_sid}


def _was_corrected(want: Desired, before: Observed, after: Observed) -> bool:
    """Whether a webhook that had been configured was found changed, and is ours again."""
    return (
        before.was_configured
        and isinstance(before.number, Number)
        and isinstance(after.number, Number)
        and before.number.webhook != want.webhook == after.number.webhook
    )


def _was_configured(status: Mapping[str, Any], want: Desired) -> bool:
    """Whether the number that the status names was pointed at this URL, so that another one now is drift."""
    effective = condition(status, "WebhookEffective")  # unlike Ready, it is not changed by unrelated trouble
    return (
        effective is not None
        and (effective["status"] == "True" or effective["reason"] in _CONFIGURED_BUT_NOT_EFFECTIVE)
        and status.get("webhookUrl") == want.webhook.url
    )


_CONFIGURED_BUT_NOT_EFFECTIVE = {
    Effective.NOT_SET,
    Effective.URL_MISMATCH,
    Effective.METHOD_MISMATCH,
    Effective.OVERRIDDEN_BY_APPLICATION,
    Effective.OVERRIDDEN_BY_MESSAGING_SERVICE,
    Effective.MESSAGING_SERVICES_UNREADABLE,
}
