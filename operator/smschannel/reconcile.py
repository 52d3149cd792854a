"""The data path: observe, plan, apply, report. Everything that happens to a channel happens here.

    desired(channel)    what is asked for; None while the channel is being deleted
    observe             reads: records, credentials, Twilio
    plan                pure: changes and a verdict; asked again with what the changes brought about
    apply               writes, in the safe order that the plan gives
    report              status and Events, only if something changed

One key stands for a name. What earlier channels of that name left is restored before its channel claims anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

import structlog

from smschannel.api.errors import (
    ChannelError,
    NotFound,
    Refused,
    Retryable,
    TwilioThrottled,
    TwilioUnavailable,
    Unreadable,
)
from smschannel.api.reasons import Reason, Recheck
from smschannel.api.resource import SmsChannel
from smschannel.core.plan import (
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
from smschannel.core.record import Key, Record, Webhook
from smschannel.kube_store import KubeStore
from smschannel.metrics import WRITTEN_OFF
from smschannel.observe import Observer, Twilio, record_unreadable
from smschannel.orphans import Orphans
from smschannel.report import Reporter

log = structlog.get_logger()

_MOST_ROUNDS = 8
"""How often a plan may ask for more. Five are enough; a Twilio that does not keep what it is told needs an end."""


@dataclass(frozen=True)
class Intervals:
    """Seconds between checks of a channel that nothing happened to; up to a fifth of jitter is added or taken off."""

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
    differ from the verdict's. `requeue` None: nothing is left to do. `twilio_failed` says that Twilio failed or hung,
    `pause` for how many seconds it asked not to be called.
    """

    verdict: Verdict
    ready: Reason | None = None
    requeue: RequeueAfter | RequeueRateLimited | None = None
    twilio_failed: bool = False
    pause: float | None = None


class Reconciler:
    def __init__(
        self,
        kube: KubeStore,
        twilio: Twilio,
        observer: Observer,
        reporter: Reporter,
        orphans: Orphans,
        *,
        rules: Rules,
        intervals: Intervals,
        clock: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._twilio = twilio
        self._observe = observer
        self._report = reporter
        self._orphans = orphans
        self._rules = rules
        self._intervals = intervals
        self._clock = clock

    async def reconcile(self, key: Key, channel: SmsChannel | None) -> Outcome:
        """Reconcile a name; `channel` is None if there is no channel of that name. Raises Kubernetes' errors."""
        former = await self._restore_former(key, channel)
        if channel is None:
            return former
        outcome = await self._reconcile_channel(channel)
        if former.requeue and not isinstance(outcome.requeue, RequeueRateLimited):
            failed = outcome.twilio_failed or former.twilio_failed
            outcome = replace(outcome, requeue=former.requeue, twilio_failed=failed)
        return outcome

    async def preview(self, key: Key, channel: SmsChannel | None) -> list[tuple[Observed, Plan]]:
        """What is there, and what a reconcile would do about it if every change succeeded; writes nothing.

        First for the records that earlier channels of the name left, if there are any, then for the channel itself.
        Raises `TwilioUnavailable`, and Kubernetes' errors.
        """
        passes: list[tuple[Observed, Plan]] = []
        if records := await self._former(key, channel):
            observed = await self._observe.records(records, channel)
            passes.append((observed, foresee(None, observed, self._rules, self._clock())))
        if channel:
            want = desired(channel, self._rules.template)
            observed = await self._observe.channel(channel, want)
            passes.append((observed, foresee(want, observed, self._rules, self._clock())))
        return passes

    async def _restore_former(self, key: Key, channel: SmsChannel | None) -> Outcome:
        """Restore what earlier channels of the name left."""
        outcome = Outcome(Verdict(Reason.Restoring, "Nothing is left to restore."))
        if records := await self._former(key, channel):
            observed = await self._observe.records(records, channel)
            try:
                observed, verdict = await self._converge(None, None, observed)
            except TwilioUnavailable as error:
                return self._unavailable(None, error)
            outcome = self._outcome(None, observed, verdict)
        uid = channel.metadata.uid if channel else None
        if outcome.requeue is None and any(record.uid != uid for record in self._kube.claims.of(key)):
            outcome = replace(outcome, requeue=RequeueRateLimited())
        return outcome

    async def _former(self, key: Key, channel: SmsChannel | None) -> list[Record]:
        """The records of this name whose channel is proven to be gone."""
        uid = channel.metadata.uid if channel else None
        others = [record for record in self._kube.claims.of(key) if record.uid != uid]
        return [record for record in others if await self._orphans.is_gone(record)]

    async def _reconcile_channel(self, channel: SmsChannel) -> Outcome:
        want = desired(channel, self._rules.template)
        first = observed = Observed()
        try:
            first = await self._observe.channel(channel, want)
            observed, verdict = await self._converge(channel, want, first)
        except TwilioUnavailable as error:
            outcome = self._unavailable(channel, error)
            report = self._report.report_unavailable if want else self._report.report
            return replace(outcome, ready=await report(channel, outcome.verdict))
        except Refused as refused:
            verdict = Verdict(refused.reason, str(refused))
        outcome = self._outcome(channel, observed, verdict)
        if want is None and not observed.finalizer:
            self._observe.corrected(channel.metadata.uid, 0)
            return outcome  # the channel is gone, or only other finalizers keep it
        corrected = want is not None and _was_corrected(want, first, observed)
        return replace(outcome, ready=await self._report.report(channel, verdict, corrected=corrected))

    # Plan and apply

    async def _converge(
        self, channel: SmsChannel | None, want: Desired | None, observed: Observed
    ) -> tuple[Observed, Verdict]:
        """Plan and apply until nothing is left to do. Raises `Refused` and `TwilioUnavailable`."""
        for _ in range(_MOST_ROUNDS):
            step = plan(want, observed, self._rules, self._clock())
            if not step.changes:
                return observed, step.verdict
            for change in step.changes:
                observed = await self._apply(change, channel, want, observed)
        raise TwilioUnavailable("Twilio does not keep the webhook that was set.")

    async def _apply(
        self, change: Change, channel: SmsChannel | None, want: Desired | None, observed: Observed
    ) -> Observed:
        """Make one change; what is observed after it."""
        match change:
            case AddFinalizer() if channel:
                await self._kube.add_finalizer(channel)
                return replace(observed, finalizer=True)
            case RemoveFinalizer() if channel:
                await self._kube.remove_finalizer(channel)
                return replace(observed, finalizer=False)
            case CreateRecord(record) if want:
                return await self._claim(record, want, observed)
            case UpdateRecord(record):
                return with_record(observed, await self._kube.update_record(record))
            case DeleteRecord(record, orphaned):
                if orphaned:
                    log.warning("number left as it is, previous webhook unknown", **_about(record))
                    if channel:
                        await self._report.previous_unknown(channel, record.phone_number)
                await self._kube.delete_record(record)
                return without_record(observed, record)
            case WriteOff(record, why):
                await self._kube.write_off(record, why)
                WRITTEN_OFF.inc()
                log.error("record written off", **_about(record), why=why)
                return without_record(observed, record)
            case SetWebhook(login, account_sid, number_sid, webhook) if want:
                try:
                    number = await self._twilio.set_webhook(login, account_sid, number_sid, webhook)
                except NotFound:
                    raise TwilioUnavailable("The number vanished while it was being configured.") from None
                if observed.corrections:
                    self._observe.corrected(want.uid, observed.corrections)
                return replace(observed, number=number)
            case RestoreWebhook(record, webhook):
                return with_current(observed, record, await self._restore(record, webhook))
        raise AssertionError(f"{type(change).__name__} is not for records whose channel is gone")

    async def _claim(self, record: Record, want: Desired, observed: Observed) -> Observed:
        number, login = observed.number, observed.login
        assert isinstance(number, Number)
        assert login
        try:
            record = await self._kube.create_record(record)
        except Refused:
            raise self._observe.in_use(want, number, login) from None
        except Unreadable as error:
            raise record_unreadable(record, error) from None
        if record.contents and record.contents.previous is None:
            # When it was read, the number pointed at one of our webhooks: perhaps its holder was just being restored.
            # Nobody else writes it now, so what it points at is what it pointed at before.
            current = await self._twilio.fetch_number(login, record.account_sid, record.number_sid)
            if current and not self._rules.template.made(current.webhook.url):
                record = await self._kube.update_record(record.with_contents(previous=current.webhook))
                observed = replace(observed, number=current)
        return with_record(observed, record)

    async def _restore(self, record: Record, webhook: Webhook) -> Current:
        """Set a number's webhook back; the number as it is then, or why that failed."""
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

    # Outcomes

    def _outcome(self, channel: SmsChannel | None, observed: Observed, verdict: Verdict) -> Outcome:
        """`channel` is None for records whose channel is gone."""
        errors = [current for current in observed.to_restore.values() if isinstance(current, ChannelError)]
        retryable = [error for error in errors if isinstance(error, Retryable)]
        asked = max((error.retry_after for error in retryable if error.retry_after), default=None)
        throttled = any(isinstance(error, TwilioThrottled) for error in retryable)
        requeue: RequeueAfter | RequeueRateLimited | None = None
        if errors:
            requeue = RequeueRateLimited(asked, self._grace_left(channel))
        elif channel and not channel.deleting:
            seconds = self._intervals.drift if verdict.reason.recheck is Recheck.DRIFT else self._intervals.slow
            requeue = RequeueAfter(seconds * random.uniform(0.8, 1.2))  # noqa: S311  (not a secret)
        failed = any(not isinstance(error, TwilioThrottled) for error in retryable)
        return Outcome(verdict, requeue=requeue, twilio_failed=failed, pause=asked if throttled else None)

    def _unavailable(self, channel: SmsChannel | None, error: TwilioUnavailable) -> Outcome:
        throttled = isinstance(error, TwilioThrottled)
        return Outcome(
            Verdict(Reason.TwilioUnavailable, str(error)),
            requeue=RequeueRateLimited(error.retry_after, self._grace_left(channel)),
            twilio_failed=not throttled,
            pause=error.retry_after if throttled else None,
        )

    def _grace_left(self, channel: SmsChannel | None) -> float | None:
        """Seconds until a deletion no longer waits for the restore; None if nothing waits."""
        since = channel.metadata.deletion_timestamp if channel else None
        if since is None:
            return None
        return max(0.0, (since + self._rules.deletion_grace - self._clock()).total_seconds())


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
