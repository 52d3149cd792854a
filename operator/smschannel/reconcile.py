"""The data path: observe, plan, apply, report. Everything that happens to a channel happens here.

    desired             what the spec asks for; None while the channel is being deleted
    observe             reads: records, credentials, Twilio
    plan                pure: changes and a verdict; called again after its changes are applied, until there are none
    apply               writes, in the safe order that the plan gives
    report              status and Events, only if something changed

A key is a namespace and a name. Numbers that deleted channels of that name held are restored first: its current channel
can claim such a number only after that.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

import structlog

from smschannel.api.errors import (
    ChannelError,
    Conflict,
    KubernetesRefused,
    LeaseEndsSoon,
    NoKindMatch,
    NotFound,
    Refused,
    Retryable,
    SuspectedRefusal,
    TwilioThrottled,
    TwilioUnavailable,
    Unreadable,
)
from smschannel.api.reasons import Reason, Recheck
from smschannel.api.resource import SmsChannel, TakeoverPolicy
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
    foresee,
    is_used,
    plan,
    webhook_to_restore,
    with_current,
    with_record,
    withheld,
    without_record,
)
from smschannel.core.plan import desired as desired_of
from smschannel.core.record import Key, Login, Record, Webhook
from smschannel.kube_store import KubeStore
from smschannel.metrics import WRITTEN_OFF
from smschannel.observe import Observer, Twilio, record_unreadable
from smschannel.orphans import Orphans
from smschannel.report import Reporter
from smschannel.twilio.account_cache import Snapshot

log = structlog.get_logger()

_MOST_ROUNDS = 8
"""Limit of plans per reconcile. Five are enough, unless Twilio does not keep what was written."""

_STILL_CONFIGURED = Verdict(Reason.Configured, "")


@dataclass(frozen=True)
class Intervals:
    """Seconds between checks of a channel that nothing happened to; up to a fifth of jitter is added or taken off."""

    drift: float
    slow: float


@dataclass(frozen=True)
class RequeueAfter:
    """After `seconds`; the backoff starts at its floor again."""

    seconds: float


@dataclass(frozen=True)
class RequeueRateLimited:
    """After the next backoff, but at least `at_least` and at most `at_most` seconds."""

    at_least: float | None = None
    at_most: float | None = None


Requeue = RequeueAfter | RequeueRateLimited | None


@dataclass(frozen=True)
class Outcome:
    """The result of one reconcile.

    `ready` is the reason that Ready carries now, None if there is no channel to report on; during an outage it may
    differ from the verdict's. `requeue` is None if nothing is left to do. `twilio_failed`: Twilio failed or hung;
    `pause`: for how many seconds Twilio asked not to be called, None if it did not ask. `snapshot`: what the next check
    must see again to find that nothing changed, None if that takes a reconcile.
    """

    verdict: Verdict
    ready: Reason | None = None
    requeue: Requeue = None
    twilio_failed: bool = False
    pause: float | None = None
    snapshot: Snapshot | None = None


class Reconciler:
    """Reconciles one key at a time; safe to call for different keys concurrently. `clock` returns the current time.

    `observe_only`: nothing is written to Twilio, and no number is claimed or freed; the status says what would be done.
    """

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
        observe_only: bool = False,
    ) -> None:
        self._kube = kube
        self._twilio = twilio
        self._observe = observer
        self._report = reporter
        self._orphans = orphans
        self._rules = rules
        self._intervals = intervals
        self._clock = clock
        self._observe_only = observe_only

    async def reconcile(self, key: Key, channel: SmsChannel | None) -> Outcome:
        """Reconcile a name; `channel` is None if there is no channel of that name. Raises Kubernetes' errors.

        What Kubernetes refuses is reported on the channel, if there is one.
        """
        if channel is None:
            return await self._restore_former(key, None)
        try:
            former = await self._restore_former(key, channel)
            outcome = await self._reconcile_channel(channel)
        except NoKindMatch:
            raise
        except KubernetesRefused as error:
            return await self._refused_by_kubernetes(channel, error)
        requeue = _sooner(outcome.requeue, former.requeue)
        return replace(
            outcome,
            requeue=requeue,
            snapshot=outcome.snapshot if isinstance(requeue, RequeueAfter) else None,  # else something is left to do
            twilio_failed=outcome.twilio_failed or former.twilio_failed,
            pause=max(outcome.pause or 0, former.pause or 0) or None,
        )

    async def reconcile_invalid(self, channel: SmsChannel, wrong: str) -> Outcome:
        """Report that a channel breaks the rules; `wrong` says how. It keeps its number. Raises Kubernetes' errors."""
        meta = channel.metadata
        former = await self._restore_former(Key(meta.namespace, meta.name), channel)
        verdict = Verdict(Reason.InvalidSpec, f"Not a valid SmsChannel: {wrong}.")
        ours = RequeueAfter(self._intervals.slow * random.uniform(0.8, 1.2))  # noqa: S311  (not a secret)
        try:
            ready = await self._report.report(channel, verdict)
        except KubernetesRefused as error:
            return await self._refused_by_kubernetes(channel, error)
        return Outcome(verdict, ready=ready, requeue=_sooner(ours, former.requeue))

    async def preview(self, key: Key, channel: SmsChannel | None) -> list[tuple[Observed, Plan]]:
        """Return what a reconcile observes, and what it would do if every change succeeded; writes nothing.

        The first pass is about records of deleted channels of the name, if there are any; the last about the channel.
        Raises `TwilioUnavailable`, and Kubernetes' errors.
        """
        passes: list[tuple[Observed, Plan]] = []
        if records := await self._former(key, channel):
            observed = await self._observe.records(records, channel)
            passes.append((observed, foresee(None, observed, self._rules, self._clock())))
        if channel:
            desired = desired_of(channel, self._rules.template)
            observed = await self._observe.channel(channel, desired)
            passes.append((observed, foresee(desired, observed, self._rules, self._clock())))
        return passes

    async def _restore_former(self, key: Key, channel: SmsChannel | None) -> Outcome:
        """Restore the numbers that deleted channels of this name held."""
        outcome = Outcome(Verdict(Reason.Restoring, "Nothing is left to restore."))
        if records := await self._former(key, channel):
            for record in records:
                self._observe.corrected(record.uid, 0)
            observed = await self._observe.records(records, channel)
            try:
                observed, verdict = await self._converge(None, None, observed)
            except TwilioUnavailable as error:
                return self._unavailable(None, error)
            outcome = self._outcome(None, observed, verdict)
        uid = channel.metadata.uid if channel else None
        # Records remain that could not be restored, or whose channel is not proven to be gone yet: check later.
        if outcome.requeue is None and any(record.uid != uid for record in self._kube.claims.of(key)):
            outcome = replace(outcome, requeue=RequeueRateLimited())
        return outcome

    async def _former(self, key: Key, channel: SmsChannel | None) -> list[Record]:
        """Return the records of this name whose channel is proven to be gone."""
        uid = channel.metadata.uid if channel else None
        others = [record for record in self._kube.claims.of(key) if record.uid != uid]
        return [record for record in others if await self._orphans.is_gone(record)]

    async def _reconcile_channel(self, channel: SmsChannel) -> Outcome:
        desired = desired_of(channel, self._rules.template)
        first = observed = Observed()
        try:
            if channel.has_finalizer and self._grace_left(channel) == 0:
                first = self._observe.unread(channel)  # Twilio may hang: the numbers are restored from the records
            else:
                first = await self._observe.channel(channel, desired)
            observed, verdict = await self._converge(channel, desired, first)
        except TwilioUnavailable as error:
            outcome = self._unavailable(channel, error)
            if desired is None:
                return replace(outcome, ready=await self._report.report(channel, outcome.verdict))
            suspected = isinstance(error, SuspectedRefusal)
            ready = await self._report.report_unavailable(channel, outcome.verdict, suspected=suspected)
            return replace(outcome, ready=ready)
        except Refused as refused:
            verdict = Verdict(refused.reason, str(refused))
        outcome = self._outcome(channel, observed, verdict)
        if desired is None and not observed.finalizer:
            self._observe.corrected(channel.metadata.uid, 0)
            return outcome  # the channel is gone, or only other finalizers keep it
        corrected = desired is not None and _was_corrected(desired, first, observed)
        ready = await self._report.report(channel, verdict, corrected=corrected)
        snapshot = None
        if desired and ready is verdict.reason is Reason.Configured:
            snapshot = self._observe.snapshot(desired, observed)
        return replace(outcome, ready=ready, snapshot=snapshot)

    async def check(self, snapshot: Snapshot) -> Outcome | None:
        """Check a channel to which nothing happened in Kubernetes since a reconcile returned this; None: reconcile it.

        Kubernetes is not called, and Twilio for whole accounts only: all channels of one are checked soon after its
        numbers were read, and again an interval later.
        """
        age = await self._observe.age_if_unchanged(snapshot)
        if age is None:
            return None
        seconds = self._intervals.drift * random.uniform(1, 1.2) - age  # noqa: S311  (not a secret)
        return Outcome(_STILL_CONFIGURED, Reason.Configured, RequeueAfter(seconds))

    # Plan and apply

    async def _converge(
        self, channel: SmsChannel | None, desired: Desired | None, observed: Observed
    ) -> tuple[Observed, Verdict]:
        """Plan and apply until nothing is left to do; `channel` is None for records whose channel is gone.

        Return what is observed then, and the verdict. Raises `Refused` and `TwilioUnavailable`.
        """
        for _ in range(_MOST_ROUNDS):
            step = plan(desired, observed, self._rules, self._clock())
            if not step.changes:
                return observed, step.verdict
            for change in step.changes:
                # A claim without its write to Twilio is worth nothing. Deletions end all the same.
                if self._observe_only and not isinstance(change, UpdateRecord | RemoveFinalizer):
                    return observed, withheld(desired, observed, self._rules, self._clock())
                observed = await self._apply(change, channel, desired, observed)
        raise TwilioUnavailable("Twilio does not keep the webhook that was set.")

    async def _apply(
        self, change: Change, channel: SmsChannel | None, desired: Desired | None, observed: Observed
    ) -> Observed:
        """Make one change and return what is observed after it."""
        match change:
            case AddFinalizer() if channel:
                await self._kube.add_finalizer(channel)
                return replace(observed, finalizer=True)
            case RemoveFinalizer() if channel:
                await self._kube.remove_finalizer(channel)
                return replace(observed, finalizer=False)
            case CreateRecord(record) if desired:
                return await self._claim(record, desired, observed)
            case UpdateRecord(record):
                return with_record(observed, await self._kube.update_record(record))
            case DeleteRecord(record, orphaned, yielded_to):
                if yielded_to and channel:  # Events first: once the record is deleted, no reconcile would post them
                    log.warning("number lost to another channel", **_about(record), to=str(yielded_to.key))
                    await self._report.yielded(channel, record, yielded_to)
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
            case SetWebhook(login, account_sid, number_sid, webhook) if desired:
                try:
                    number = await self._twilio.set_webhook(login, account_sid, number_sid, webhook)
                except NotFound:
                    raise TwilioUnavailable("The number vanished while it was being configured.") from None
                if not observed.claimed:  # else it was written just now, which saves a read for every new channel
                    await self._undo_if_freed(observed.records[number_sid], login)
                if observed.corrections:
                    self._observe.corrected(desired.uid, observed.corrections)
                return replace(observed, number=number)
            case RestoreWebhook(record, webhook):
                return with_current(observed, record, await self._restore(record, webhook))
        raise AssertionError(f"{type(change).__name__} is not for records whose channel is gone")

    async def _claim(self, record: Record, desired: Desired, observed: Observed) -> Observed:
        number, login = observed.number, observed.login
        assert isinstance(number, Number)
        assert login
        try:
            record = await self._kube.create_record(record)
        except Refused:
            raise self._observe.in_use(desired, number, login) from None
        except Unreadable as error:
            raise record_unreadable(record, error) from None
        if record.contents and record.contents.previous is None:
            # When it was read, the number pointed at one of our webhooks: perhaps its last holder was just restored.
            # It is ours now, so the webhook that it has now is the previous one.
            current = await self._twilio.fetch_number(login, record.account_sid, record.number_sid) or number
            observed = replace(observed, number=current)
            unused_only = desired.takeover_policy is TakeoverPolicy.IF_UNUSED
            if unused_only and is_used(current.webhook.url, self._rules.template):
                await self._kube.delete_record(record)
                return observed
        return replace(with_record(observed, record), claimed=True)

    async def _undo_if_freed(self, record: Record, login: Login) -> None:
        """Undo the webhook just set if the number no longer belongs to the channel. Raise `Conflict` then.

        Another operator, which knows a newer spec, may have restored and freed the number since it was read here.
        """
        holder = await self._kube.holder(record.number_sid)
        if holder is not None and holder.uid == record.uid:
            return
        if holder is not None:
            webhook: Webhook | None = Webhook(url=self._rules.template.url(*holder.key), method="POST")
        else:
            webhook = webhook_to_restore(record.contents, record.deletion_policy) if record.contents else None
        log.warning("number was freed while it was configured, undoing", **_about(record))
        if webhook is not None:
            await self._twilio.set_webhook(login, record.account_sid, record.number_sid, webhook)
        raise Conflict("the number was freed while it was being configured")

    async def _restore(self, record: Record, webhook: Webhook) -> Current:
        """Set a number's webhook back. Return the number after that, or why it failed; None if it is gone."""
        assert record.contents, "unopened records are not restored"
        try:
            login = record.contents.login
            current = await self._twilio.set_webhook(login, record.account_sid, record.number_sid, webhook)
        except NotFound:
            return None
        except LeaseEndsSoon:  # says nothing about the number
            raise
        except ChannelError as error:
            return error
        if current.webhook != webhook and record.contents.points_at_us(current.webhook):
            return TwilioUnavailable(
                "Twilio does not keep the webhook that was set."
            )  # otherwise the plan would set it again at once
        return current

    # Outcomes

    def _outcome(self, channel: SmsChannel | None, observed: Observed, verdict: Verdict) -> Outcome:
        """Return the outcome with its requeue; `channel` is None for records whose channel is gone."""
        errors = [current for current in observed.to_restore.values() if isinstance(current, ChannelError)]
        retryable = [error for error in errors if isinstance(error, Retryable)]
        asked = max((error.retry_after for error in retryable if error.retry_after), default=None)
        throttled = any(isinstance(error, TwilioThrottled) for error in retryable)
        requeue: Requeue = None
        if errors:
            requeue = RequeueRateLimited(asked, self._grace_left(channel) if observed.finalizer else None)
        elif channel and channel.deleting and observed.records:
            # What is left is restored when the channel is gone.
            requeue = RequeueRateLimited(at_most=self._grace_left(channel) if observed.finalizer else None)
        elif channel and not channel.deleting:
            seconds = self._intervals.drift if verdict.recheck is Recheck.DRIFT else self._intervals.slow
            seconds *= random.uniform(0.8, 1.2)  # noqa: S311  (not a secret)
            requeue = RequeueAfter(min([seconds, *self._patience_left(observed)]))
        failed = any(not isinstance(error, TwilioThrottled | SuspectedRefusal) for error in retryable)
        return Outcome(verdict, requeue=requeue, twilio_failed=failed, pause=asked if throttled else None)

    def _patience_left(self, observed: Observed) -> list[float]:
        """Return the seconds until each number that none of the channel's own logins sees may be lost to a waiter."""
        now = self._clock()
        due = [
            each.unseen_since + self._rules.holder_patience for each in observed.records.values() if each.unseen_since
        ]
        return [(at - now).total_seconds() + 1 for at in due if at > now]

    def _unavailable(self, channel: SmsChannel | None, error: TwilioUnavailable) -> Outcome:
        """Return the outcome of a reconcile that Twilio's outage or throttling ended."""
        throttled = isinstance(error, TwilioThrottled)
        return Outcome(
            Verdict(Reason.TwilioUnavailable, str(error)),
            requeue=RequeueRateLimited(
                error.retry_after, self._grace_left(channel) if channel and channel.has_finalizer else None
            ),
            twilio_failed=not isinstance(error, TwilioThrottled | SuspectedRefusal),
            pause=error.retry_after if throttled else None,
        )

    async def _refused_by_kubernetes(self, channel: SmsChannel, error: KubernetesRefused) -> Outcome:
        """Report that Kubernetes refused a call, in its own words, and return the outcome: a later retry may help."""
        verdict = Verdict(Reason.KubernetesRefused, f"Kubernetes refuses what the operator has to do: {error}")
        if not verdict.message.endswith("."):
            verdict = replace(verdict, message=f"{verdict.message}.")
        requeue = RequeueRateLimited(at_most=self._grace_left(channel) or None)
        return Outcome(verdict, ready=await self._report.report_refused(channel, verdict, error), requeue=requeue)

    def _grace_left(self, channel: SmsChannel | None) -> float | None:
        """Return the seconds until a deletion no longer waits for the restore; None if the channel is not deleted."""
        since = channel.metadata.deletion_timestamp if channel else None
        if since is None:
            return None
        return max(0.0, (since + self._rules.deletion_grace - self._clock()).total_seconds())


def _sooner(ours: Requeue, formers: Requeue) -> Requeue:
    """When to reconcile again: a retry comes before a check of a channel that nothing happened to."""
    return formers if formers and not isinstance(ours, RequeueRateLimited) else ours


def _about(record: Record) -> dict[str, str]:
    """Return the fields of a log line about a record."""
    return {"namespace": record.namespace, "name": record.name, "number": record.number_sid}


def _was_corrected(desired: Desired, before: Observed, after: Observed) -> bool:
    """Return whether a webhook that had been configured was found changed, and was corrected."""
    return (
        before.was_configured
        and isinstance(before.number, Number)
        and isinstance(after.number, Number)
        and before.number.webhook != desired.webhook == after.number.webhook
    )
