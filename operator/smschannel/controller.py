"""Decides which channels to reconcile, and when: events, resyncs and scheduled requeues add keys to the work queue.

Level-triggered, as with controller-runtime: an event only adds a key, and the reconcile reads the current state. A lost
event delays a reconcile until the next resync, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog
from pydantic import ValidationError

from smschannel import metrics
from smschannel.api.errors import ChannelError, Conflict, NoKindMatch, Retryable
from smschannel.api.resource import FINALIZER, SmsChannel
from smschannel.api.status import wants_check, was_well
from smschannel.channel_cache import ChannelCache, Trigger
from smschannel.core.record import Key, WebhookTemplate, secret_source
from smschannel.core.shares import Pace
from smschannel.kube_store import KubeStore
from smschannel.orphans import Orphans
from smschannel.queue import WorkQueue, flow_limit, unverified_limit
from smschannel.reconcile import Outcome, Reconciler, RequeueAfter, RequeueRateLimited
from smschannel.rotation import Rotation
from smschannel.twilio.account_cache import Snapshot
from smschannel.twilio.limits import TENANT

log = structlog.get_logger()

_SHUTDOWN_SECONDS = 10
# Channels that wait for the same number are reconciled this far apart: usually the first one gets it.
_STAGGER_SECONDS = 2.0
_LONGEST_STAGGER = 60.0
# The requests for a check now that a namespace has at once, and then per second. More of them wait.
_CHECKS_AT_ONCE = 300
_CHECKS_PER_SECOND = 10.0
# A channel to which nothing happens is reconciled after so many drift intervals at most, not only checked.
_CHECKS_PER_RECONCILE = 24
# The users of a Secret that is written in a loop are added again after so long for each: about a hundredth of the time.
_SECONDS_PER_USER = 0.001


class _Flow(NamedTuple):
    """`is_claimed`: its channels have records of this account, so that Twilio has accepted their credentials."""

    namespace: str
    account_sid: str
    is_claimed: bool
    is_deletion: bool


@dataclass(slots=True)
class _Secret:
    """A labelled Secret: its resourceVersion, empty if it is gone, and if it was written since its users were added.

    `next_time` is when these may be added again, on the event loop's clock; `waits`: that is scheduled already.
    """

    version: str = ""
    was_written: bool = False
    next_time: float = 0.0
    waits: bool = False


class _Configured(NamedTuple):
    """A channel that a reconcile found configured: what Twilio showed.

    `until` is the time of the event loop's clock at which it is to be reconciled again, whatever checks show.
    """

    snapshot: Snapshot
    until: float


class Controller:
    """Runs the reconciles of one event loop: call `load`, then `run`, and pass watch events at any time after `load`.

    `concurrency` is how many calls to Twilio one login may have in flight; `retry_floor`, `retry_ceiling` and the
    intervals are seconds. Creating a controller connects it with the claims, the store and the metrics.
    """

    def __init__(
        self,
        kube: KubeStore,
        reconciler: Reconciler,
        channels: ChannelCache,
        orphans: Orphans,
        rotation: Rotation,
        *,
        namespaces: tuple[str, ...],
        template: WebhookTemplate,
        workers: int,
        concurrency: int,
        retry_floor: float,
        retry_ceiling: float,
        resync_interval: float,
        drift_interval: float,
    ) -> None:
        self._kube = kube
        self._claims = kube.claims
        self._reconciler = reconciler
        self._channels = channels
        self._orphans = orphans
        self._rotation = rotation
        self._namespaces = namespaces
        self._template = template
        self._workers = workers
        self._resync_interval = resync_interval
        self._drift_interval = drift_interval
        self._secrets: dict[Key, _Secret] = {}
        self._configured: dict[Key, _Configured] = {}
        self._dirty: set[Key] = set()  # something happened to them since their last reconcile began
        self._clock = asyncio.get_running_loop().time
        self._checks = Pace(_CHECKS_AT_ONCE, _CHECKS_PER_SECOND)
        self._resync_now = asyncio.Event()
        self._in_flight: set[asyncio.Future[bool]] = set()
        self._patience = _SHUTDOWN_SECONDS
        self._queue: WorkQueue[Key] = WorkQueue(
            flow_of=self._flow_of,
            flow_limit=flow_limit(workers, concurrency),
            retry_floor=retry_floor,
            retry_ceiling=retry_ceiling,
            group_of=_namespace_of,
            is_verified=self._is_verified,
            unverified_limit=unverified_limit(workers),
            workers=workers if len(namespaces) > 1 else None,
        )
        kube.claims.on_free = self._wake_waiters
        kube.claims.on_change = self._add
        kube.claims.on_account = self._verify_flow
        kube.on_written = channels.written
        rotation.on_readable = self._add
        metrics.follow(
            queue_depth=lambda: len(self._queue),
            claims=lambda: len(self._claims),
            pending_restores=channels.pending_restores,
            channels=channels.reasons,
        )

    @property
    def has_crd(self) -> bool:
        """Return False only once it is proven that the CRD was deleted."""
        return not self._orphans.is_crd_gone

    def _add(self, key: Key) -> None:
        """Add a key to which something happened: it is reconciled, not only checked."""
        self._dirty.add(key)
        self._queue.add(key)

    # Start

    async def load(self) -> None:
        """List all records and channels. Raises `NoKindMatch` if there is no CRD, unless it is proven to be deleted."""
        await self._list_records()
        due: list[tuple[str, str, Key]] = []
        if self.has_crd:
            for namespace in self._namespaces:
                async for body in self._kube.channels(namespace):
                    cached = self._channels.put(body)
                    key = Key(namespace, body["metadata"]["name"])
                    if self._is_fine(key, body):
                        cached.last_reconciled = Trigger.of(body)
                        self._queue.add_after(key, self._drift_interval * random.uniform(0.2, 1))  # noqa: S311
                    else:
                        due.append((cached.created, cached.uid, key))
        self._add_oldest_first(key for _, _, key in sorted(due))
        orphans = self._orphaned_keys()
        self._orphans.require_two_looks(record.uid for key in orphans for record in self._claims.of(key))
        for key in self._orphans.confirm(orphans, len(self._claims)):
            self._add(key)
        log.info("channels loaded", channels=len(self._channels), records=len(self._claims), orphans=len(orphans))

    def _add_oldest_first(self, keys: Iterable[Key]) -> None:
        """Of new channels that want the same number the oldest goes first: the first verified claim wins."""
        rivals: Counter[tuple[str, str]] = Counter()
        for key in keys:
            cached = self._channels.get(key)
            if cached is None or cached.deleting or any(own.uid == cached.uid for own in self._claims.of(key)):
                self._add(key)
                continue
            number = cached.account_sid, cached.phone_number
            self._add_staggered(key, rivals[number])
            rivals[number] += 1

    def _add_staggered(self, key: Key, position: int) -> None:
        if position == 0:
            self._add(key)
        else:
            self._queue.add_after(key, min(position * _STAGGER_SECONDS, _LONGEST_STAGGER))

    def _is_fine(self, key: Key, body: Mapping[str, Any]) -> bool:
        """Return whether status and record agree, so that no reconcile is needed before the next drift check."""
        meta, status = body["metadata"], body.get("status") or {}
        return (
            any(record.uid == meta["uid"] for record in self._claims.of(key))
            and FINALIZER in meta.get("finalizers", ())
            and "deletionTimestamp" not in meta
            and not wants_check(meta.get("annotations") or {}, status)
            and was_well(status, generation=meta["generation"], webhook_url=self._template.url(*key))
        )

    def listed(self, namespace: str) -> str:
        """Return the resourceVersion of the list that was loaded, from which a watch continues; empty without one."""
        return self._kube.listed.get(namespace, "")

    # Events

    def on_channel(self, kind: str, body: Mapping[str, Any]) -> None:
        """Handle an event of a channel: `kind` is its type."""
        meta = body["metadata"]
        key, uid = Key(meta["namespace"], meta["name"]), meta["uid"]
        if kind != "DELETED":
            if self._channels.observe(body):
                self._add_changed(key)
            return
        cached = self._channels.get(key)
        if cached and cached.uid == uid:
            self._forget(key)
            self._queue.cancel(key)
        if any(record.uid == uid for record in self._claims.of(key)):  # its numbers must be restored
            self._add(key)

    def _add_changed(self, key: Key) -> None:
        """Add a key whose trigger changed. If a check is all that is asked for, it may have to wait, but once only."""
        cached = self._channels.get(key)
        if cached is None or not cached.is_check_only:
            self._add(key)
            return
        now = self._clock()
        if cached.check_due > now:  # it waits already, and will handle the newest request
            return
        delay = self._checks.delay(key.namespace, now)
        if delay == 0:
            self._add(key)
            return
        self._dirty.add(key)
        cached.check_due = now + delay
        cached.body = None  # it may be old by then
        self._queue.add_after(key, delay, keep_earlier=True)

    def on_secret(self, kind: str | None, body: Mapping[str, Any]) -> None:
        """Handle an event of a labelled Secret. The watch also shows one that lost its label as DELETED."""
        meta = body["metadata"]
        name = Key(meta["namespace"], meta["name"])
        secret = self._secrets.setdefault(name, _Secret())
        version = "" if kind == "DELETED" else meta["resourceVersion"]
        secret.was_written |= kind is not None and secret.version != version
        secret.version = version
        if secret.waits:  # its users are about to be added, and will see this version
            return
        secret.waits = True
        delay = secret.next_time - self._clock()
        if delay > 0:
            asyncio.get_running_loop().call_later(delay, self._add_users, name, secret)
        else:
            self._add_users(name, secret)

    def _add_users(self, name: Key, secret: _Secret) -> None:
        """Add the channels that use a Secret and whose records are of another version of it."""
        users = self._channels.users_of(name)
        for key in users:
            sources = {record.source for record in self._claims.of(key)}
            if secret_source(name.name, secret.version) not in sources:
                if secret.was_written and (cached := self._channels.get(key)):
                    cached.secret_changed = True
                self._add(key)
        secret.was_written = secret.waits = False
        secret.next_time = self._clock() + len(users) * _SECONDS_PER_USER
        if not secret.version:  # not before that time: it may be deleted and created in a loop
            asyncio.get_running_loop().call_at(secret.next_time, self._forget_secret, name, secret)

    def _forget_secret(self, name: Key, secret: _Secret) -> None:
        if not secret.version and not secret.waits and self._secrets.get(name) is secret:
            del self._secrets[name]

    def _forget(self, key: Key) -> None:
        """Remove a channel that is gone. The next one that waits for the same number may swap with its holder now."""
        cached = self._channels.get(key)
        awaited = cached.awaited if cached else ""
        self._channels.remove(key)
        self._configured.pop(key, None)
        self._dirty.discard(key)
        self._kube.keys.lacking.discard(key)
        if awaited:
            self._wake_next(awaited)

    def _wake_next(self, number_sid: str) -> None:
        for key in self._channels.waiters(number_sid)[:1]:
            self._add(key)

    def _wake_waiters(self, number_sid: str) -> None:
        """Add the channels that wait for a number that became free, one after the other, the oldest first."""
        for position, key in enumerate(self._channels.waiters(number_sid)):
            self._add_staggered(key, position)

    def _flow_of(self, key: Key) -> _Flow:
        """Return the flow of a key: its namespace and Twilio account, with a flow of its own for deletions.

        A pause that Twilio requests for an account therefore does not delay deletions. Channels without a record, whose
        credentials may be wrong, do not share a flow with the others: any user may name any account in a spec.
        """
        cached, records = self._channels.get(key), self._claims.of(key)
        if cached is None:
            return _Flow(key.namespace, records[0].account_sid if records else "", is_claimed=True, is_deletion=True)
        own = [record.account_sid for record in records if record.uid == cached.uid]
        if cached.deleting and own:
            return _Flow(key.namespace, own[0], is_claimed=True, is_deletion=True)
        return _Flow(key.namespace, cached.account_sid, cached.account_sid in own, cached.deleting)

    def _is_verified(self, flow: Hashable) -> bool:
        """Return whether the credentials of a flow are known to work, or not needed.

        New channels of an account of which the namespace has others already count as verified. A deletion logs in with
        what is recorded.
        """
        assert isinstance(flow, _Flow)
        return flow.is_claimed or flow.is_deletion or self._claims.has_account(flow.namespace, flow.account_sid)

    def _verify_flow(self, namespace: str, account_sid: str) -> None:
        self._queue.verify(_Flow(namespace, account_sid, is_claimed=False, is_deletion=False))

    # Workers

    async def run(self) -> None:
        """Run the workers, the periodic resync and the care for the keyring until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._resync_periodically())
            tasks.create_task(self._rotation.run())
            for _ in range(self._workers):
                tasks.create_task(self._work())

    def close(self) -> None:
        """Drop all timers, when the controller has ended or was never run: they would keep it in memory."""
        self._queue.close()

    def abort(self) -> None:
        """Cancel the reconciles in flight at once; call it when `run` is cancelled, which alone lets them end."""
        self._patience = 0
        for reconcile in self._in_flight:
            reconcile.cancel()

    async def _work(self) -> None:
        while True:
            key, waited = await self._queue.get()
            metrics.QUEUE_WAIT_SECONDS.observe(waited)
            started = time.perf_counter()
            reconcile, succeeded = asyncio.ensure_future(self._reconcile_or_retry(key)), True
            self._in_flight.add(reconcile)
            try:
                # Shielded: at shutdown a reconcile in flight gets some seconds to end.
                succeeded = await asyncio.shield(reconcile)
            except asyncio.CancelledError:
                await asyncio.wait({reconcile}, timeout=self._patience)
                reconcile.cancel()
                await asyncio.wait({reconcile})
                raise
            finally:
                self._in_flight.discard(reconcile)
                self._queue.done(key, succeeded=succeeded)
                metrics.RECONCILE_SECONDS.observe(time.perf_counter() - started)

    async def _reconcile_or_retry(self, key: Key) -> bool:
        """Reconcile a key and schedule its requeue, also after errors. Return False if Twilio failed or hung."""
        succeeded = True
        if len(self._namespaces) > 1:
            TENANT.set(key.namespace)
        try:
            outcome = await self._reconcile(key)
        except ChannelError as error:
            metrics.RECONCILES.labels(type(error).__name__).inc()
            delay = self._queue.add_rate_limited(key, error.retry_after if isinstance(error, Retryable) else None)
            if not isinstance(error, Conflict):
                log.warning("reconcile failed", **_named(key), error=str(error), retry_seconds=round(delay, 1))
        except Exception:
            metrics.RECONCILES.labels("Bug").inc()
            log.exception("reconcile failed", **_named(key), retry_seconds=round(self._queue.add_rate_limited(key), 1))
        else:
            self._conclude(key, outcome)
            succeeded = not outcome.twilio_failed
        cached = self._channels.get(key)
        if cached and (left := cached.check_due - self._clock()) > 0:  # asked for during this reconcile
            self._queue.add_after(key, left, keep_earlier=True)
        return succeeded

    async def _reconcile(self, key: Key) -> Outcome:
        """Reconcile the newest version of a channel, unless a check shows that nothing changed.

        Raises `ChannelError` if it is invalid.
        """
        if checked := await self._check(key):
            return checked
        self._configured.pop(key, None)
        self._dirty.discard(key)
        body = await self._newest(key)
        if body is None:
            return await self._reconciler.reconcile(key, None)
        cached = self._channels.get(key)
        awaited = cached.awaited if cached else ""
        self._channels.set_awaited(key, "")  # the reconcile sets it again if the channel still waits
        try:
            return await self._reconcile_channel(key, body)
        finally:
            if awaited and cached and cached.awaited != awaited:
                self._wake_next(awaited)

    async def _check(self, key: Key) -> Outcome | None:
        """Check a channel to which nothing happened since it was reconciled. None if it must be reconciled."""
        before, cached = self._configured.get(key), self._channels.get(key)
        if key in self._dirty or before is None or cached is None:
            return None
        if cached.version != cached.reconciled_version or self._clock() >= before.until:
            return None
        holder = self._claims.holder(before.snapshot.number.sid)
        if holder is None or holder.uid != cached.uid:
            return None
        return await self._reconciler.check(before.snapshot)

    async def _reconcile_channel(self, key: Key, body: Mapping[str, Any]) -> Outcome:
        try:
            channel = SmsChannel.model_validate(body)
        except ValidationError as error:
            # The CRD refuses such objects today; this one was created before its current rules.
            wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            if "deletionTimestamp" in body["metadata"]:
                if FINALIZER in body["metadata"].get("finalizers", ()):
                    await self._kube.remove_finalizer_from(body)  # its numbers are restored from the records
                raise ChannelError(f"not a valid SmsChannel: {wrong}") from None
            return await self._reconciler.reconcile_invalid(SmsChannel.unvalidated(body), wrong)
        return await self._reconciler.reconcile(key, channel)

    async def _newest(self, key: Key) -> Mapping[str, Any] | None:
        """Return the channel as it is now, from the last event or by a GET; None if the API server has none."""
        cached = self._channels.get(key)
        body = cached.body if cached else None
        if body is None:
            try:
                body = await self._kube.channel(*key)
            except NoKindMatch:
                if self.has_crd:
                    raise
            if body is None:
                self._forget(key)
                return None
            cached = self._channels.put(body)
        assert cached
        meta = body["metadata"]  # each reconcile is a task of its own, so this is for its lines only
        structlog.contextvars.bind_contextvars(uid=meta["uid"], generation=meta.get("generation", 0))
        cached.body = None
        cached.last_reconciled = Trigger.of(body)
        cached.reconciled_version = meta["resourceVersion"]
        cached.check_due = 0
        return body

    def _conclude(self, key: Key, outcome: Outcome) -> None:
        """Count and log the outcome of a reconcile, and schedule the requeue that it asks for."""
        verdict = outcome.verdict
        metrics.RECONCILES.labels(verdict.reason.name).inc()
        cached = self._channels.get(key)
        if outcome.ready and cached is None:  # deleted during the reconcile: what it claimed meanwhile is restored
            self._add(key)
            return
        if outcome.ready:
            if outcome.ready is not verdict.reason:
                log.warning("cannot check channel, left as it is", **_named(key), error=verdict.message)
            elif cached and cached.reason is not outcome.ready:
                log.info("status changed", **_named(key), reason=outcome.ready.name, message=verdict.message)
            self._channels.set_reason(key, outcome.ready)
        if outcome.snapshot:
            until = self._clock() + _CHECKS_PER_RECONCILE * self._drift_interval * random.uniform(0.5, 1)  # noqa: S311
            self._configured[key] = _Configured(outcome.snapshot, until)
        if outcome.pause:  # never of deletions: they end in time whatever Twilio asks for
            self._queue.pause(self._flow_of(key)._replace(is_deletion=False), outcome.pause)
        match outcome.requeue:
            case None:
                self._queue.cancel(key)
            case RequeueAfter(seconds):
                self._queue.forget(key)
                self._queue.add_after(key, seconds)
            case RequeueRateLimited(at_least, at_most):
                self._queue.add_rate_limited(key, at_least, at_most)

    # Resync

    async def _resync_periodically(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._resync_now.wait(),
                    self._resync_interval * random.uniform(0.9, 1.1),  # noqa: S311
                )
            self._resync_now.clear()
            try:
                await self.resync()
            except ChannelError as error:
                metrics.RESYNC_FAILURES.inc()
                log.warning("resync failed", error=str(error))
            except Exception:
                metrics.RESYNC_FAILURES.inc()
                log.exception("resync failed")

    def resync_soon(self) -> None:
        """Resync now instead of at the next interval: a watch missed events."""
        self._resync_now.set()

    async def resync(self) -> None:
        """List all channels and records, and add the keys whose events the watch missed.

        The listed objects are not used otherwise: a list may be older than an event. Raises Kubernetes' errors.
        """
        changed = await self._list_records()
        await self._kube.check_own_objects(changed)
        self._orphans.forget_others({record.uid for record in self._claims})
        for key in changed:
            if key.namespace in self._namespaces:
                self._add(key)
        cached = {key: each.version for key, each in self._channels}
        missing = {key for key in cached if key.namespace in self._namespaces}
        absent: list[NoKindMatch] = []
        for namespace in self._namespaces:
            listed: set[Key] = set()
            try:
                async for meta in self._kube.channel_metadata(namespace):
                    key = Key(namespace, meta["name"])
                    listed.add(key)
                    if cached.get(key) != meta["resourceVersion"]:
                        self._read_again(key)
            except NoKindMatch as error:
                absent.append(error)
            missing -= listed
        # Without the CRD, lists are answered with `NoKindMatch`, in all namespaces alike. If only some are, the API
        # server is just learning or losing the kind, and the next resync decides.
        if len(absent) == len(self._namespaces):
            if not await self._orphans.look_for_crd():
                raise absent[0]
            missing = set(cached)
        elif absent:
            raise absent[0]
        else:
            self._orphans.crd_is_there()
        for key in self._orphaned_keys():
            if not self._queue.is_scheduled(key):
                self._add(key)
        for key in missing if not self.has_crd else self._orphans.confirm(missing, len(cached)):
            self._read_again(key)

    def _read_again(self, key: Key) -> None:
        """Add a key whose cached body may be out of date: its reconcile reads the channel."""
        if cached := self._channels.get(key):
            cached.body = None
        self._add(key)

    async def _list_records(self) -> set[Key]:
        """List all records and update the claims. Return the keys whose records differ from the claims before."""
        before = tuple(self._claims)
        listed = [record async for record in self._kube.records()]
        shown = {record.number_sid for record in listed}
        for record in before:
            if record.number_sid not in shown and self._claims.holder(record.number_sid) == record:
                found = await self._kube.find_unlisted(record)
                listed += [found] if found else []
        for record in listed:
            if not record.uid:
                log.error("record has damaged metadata, its number stays claimed", number=record.number_sid)
            elif record.namespace not in self._namespaces:  # its channel cannot be read
                log.warning("record belongs to a namespace that is not watched", **_named(record.key))
        return self._claims.update_from_list(listed, before)

    def _orphaned_keys(self) -> set[Key]:
        """Return the keys with a record whose channel is not in the cache: perhaps it was deleted."""
        orphans = (record.key for record in self._claims if not self._channels.is_holder_alive(record))
        return {key for key in orphans if key.namespace in self._namespaces}


def _namespace_of(flow: Hashable) -> str:
    assert isinstance(flow, _Flow)
    return flow.namespace


def _named(key: Key) -> dict[str, str]:
    return {"namespace": key.namespace, "name": key.name}
