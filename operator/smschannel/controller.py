"""What is looked at, and when: watch events, Secrets, resync and later looks become turns of the work queue.

Level-triggered: an event only says where to look. What is remembered of a channel here is for leaving out turns
that could not find anything new; losing all of it costs one look at each channel.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog
from pydantic import ValidationError

from smschannel.api.errors import ChannelError, Conflict, NoKindMatch, Retryable
from smschannel.api.reasons import Reason
from smschannel.api.resource import CHECK_NOW_ANNOTATION, FINALIZER, SmsChannel
from smschannel.api.status import reason_of, was_well
from smschannel.core.record import Claims, Record, WebhookTemplate
from smschannel.kube_store import KubeStore
from smschannel.metrics import CHANNELS, CLAIMS, DEBTS, QUEUE_DEPTH, QUEUE_WAIT_SECONDS, RECONCILE_SECONDS, RECONCILES
from smschannel.queue import WorkQueue, flow_limit
from smschannel.reconcile import Key, Outcome, Reconciler, secret_source

log = structlog.get_logger()

Body = Mapping[str, Any]


class _Face(NamedTuple):
    """What of a channel calls for a turn when it changes. Our own writes change none of it."""

    generation: int
    deleting: bool
    check_now: str | None


class _Remembered(NamedTuple):
    """What is remembered of a record."""

    key: Key
    source: str
    account_sid: str


@dataclass
class _Known:
    """What is remembered of a channel; a body only between an event and its turn."""

    uid: str
    version: str = ""
    account_sid: str = ""
    secret: str = ""
    finalizer: bool = False
    attended: _Face | None = None  # the face that a turn has seen: what is due since then is in the queue
    latest: Body | None = None
    forced: bool = False  # a turn was asked for whatever the face
    fresh: bool = False  # somebody asked for Twilio to be looked at now
    reason: Reason | None = None


class Controller:
    """For one event loop: `load`, then `run` until it is cancelled; events may come at any time after `load`."""

    def __init__(
        self,
        kube: KubeStore,
        reconciler: Reconciler,
        claims: Claims[Key],
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
        self._reconciler = reconciler
        self._claims = claims
        claims.on_free = self.look
        self._namespaces = namespaces
        self._template = template
        self._workers = workers
        self._resync_interval = resync_interval
        self._drift_interval = drift_interval
        self._known: dict[Key, _Known] = {}
        self._secret_users: dict[tuple[str, str], set[Key]] = {}
        self._secret_versions: dict[tuple[str, str], str] = {}
        self._records: dict[str, _Remembered] = {}  # of these namespaces, by uid
        self._owed: dict[str, int] = {}  # by uid
        self.has_crd = True
        self._crd_missing = False  # at the last resync
        self._turning: set[str] = set()  # uids of the channels whose turn is under way
        self._queue: WorkQueue[Key] = WorkQueue(
            flow_of=self._flow_of,
            flow_limit=flow_limit(workers, concurrency),
            retry_floor=retry_floor,
            retry_ceiling=retry_ceiling,
        )
        QUEUE_DEPTH.set_function(lambda: len(self._queue))
        CLAIMS.set_function(lambda: len(claims))
        DEBTS.set_function(lambda: sum(self._owed.values()))

    async def load(self) -> None:
        """Read the records, which say who holds which number, then the channels. `NoKindMatch` without a CRD."""
        await self._load_records()
        fresh = []
        for namespace in self._namespaces:
            async for body in self._kube.channels(namespace):
                if self._take_in(body):
                    meta = body["metadata"]
                    fresh.append((meta["creationTimestamp"], meta["uid"], Key(namespace, meta["name"])))
        for _, _, key in sorted(fresh):  # the eldest first: of those that want the same number, they get it
            self._queue.add(key)
        self._find_orphans(frozenset(self._records), {known.uid for known in self._known.values()})
        log.info("loaded", channels=len(self._known), records=len(self._records))

    async def load_without_crd(self) -> None:
        """For a CRD that is gone for good: only what is owed is left to do."""
        self.has_crd = False
        await self._load_records()
        self._find_orphans(frozenset(self._records), set())
        log.warning("no CRD: giving back what the records say", records=len(self._records))

    async def _load_records(self) -> None:
        async for record in self._kube.records():
            if isinstance(record, ChannelError):
                log.error("record cannot be read", error=str(record))
                continue
            self._claims.hold_only(record.uid, record)
            if record.namespace in self._namespaces:
                self._remember(record)
            else:  # whether its channel lives cannot be seen from here: its numbers stay claimed
                log.warning("record of another namespace", namespace=record.namespace, channel=record.name)

    def _flow_of(self, key: Key) -> object:
        """Channels whose credentials were never verified are kept apart, by namespace: anyone may name any account."""
        known, uid = self._known.get(key), key.uid
        if known:
            if known.uid not in self._records:
                return key.namespace, known.account_sid
            uid = known.uid
        return self._records[uid].account_sid if uid in self._records else ""

    # What calls for a turn

    def look(self, key: Key) -> None:
        """A turn, whatever is remembered."""
        if known := self._known.get(key):
            known.forced = True
            self._queue.add(key)

    def on_channel(self, kind: str | None, body: Body) -> None:
        """A channel as the watch, a list or a read shows it; `kind` is the watch event's type."""
        meta = body["metadata"]
        key, uid = Key(meta["namespace"], meta["name"]), meta["uid"]
        if kind == "DELETED":
            self._forget(key, uid)
        elif self._take_in(body):
            self._queue.add(key)

    def _take_in(self, body: Body) -> bool:
        """Remember a channel as it is now; whether that calls for a turn."""
        meta = body["metadata"]
        key, uid = Key(meta["namespace"], meta["name"]), meta["uid"]
        known = self._known.get(key)
        if known is None or known.uid != uid:
            if known:
                self._forget(key, known.uid)
            known = self._known[key] = _Known(uid)
            self._attended_before(key, known, body)
        finalizer = FINALIZER in meta.get("finalizers", ())
        if known.finalizer and not finalizer:
            known.attended = None  # somebody took it off
        known.finalizer = finalizer
        known.version = meta["resourceVersion"]
        known.account_sid = str(body["spec"].get("accountSid"))
        self._uses_secret(key, known, _secret_name(body))
        if known.attended == _face(body):
            return False
        known.latest = body
        return True

    def on_secret(self, kind: str | None, body: Body) -> None:
        """A labelled Secret, or one that lost its label (which a watch with a selector shows as DELETED)."""
        meta = body["metadata"]
        secret, version = (meta["namespace"], meta["name"]), meta["resourceVersion"]
        if kind == "DELETED":
            self._secret_versions.pop(secret, None)
        else:
            self._secret_versions[secret] = version
        for key in self._secret_users.get(secret, ()):
            if kind == "DELETED" or self._source(self._known[key].uid) != secret_source(meta["name"], version):
                self.look(key)

    def _attended_before(self, key: Key, known: _Known, body: Body) -> None:
        """After a restart: a channel whose status and record agree needs no turn, only its next drift check."""
        meta, status = body["metadata"], body.get("status") or {}
        self._count(known, reason_of(status))
        source, secret = self._source(known.uid), _secret_name(body)
        version = self._secret_versions.get((key.namespace, secret))
        changed = version is not None and source != secret_source(secret, version)
        if (
            was_well(status, generation=meta["generation"], webhook_url=self._template.url(meta["name"]))
            and source
            and not changed
            and FINALIZER in meta.get("finalizers", ())
            and "deletionTimestamp" not in meta
        ):
            known.attended = _face(body)
            self._queue.add_after(key, random.uniform(0, self._drift_interval))  # noqa: S311

    def _uses_secret(self, key: Key, known: _Known, secret: str) -> None:
        if secret == known.secret:
            return
        users = self._secret_users.get((key.namespace, known.secret), set())
        users.discard(key)
        if not users:
            self._secret_users.pop((key.namespace, known.secret), None)
        known.secret = secret
        if secret:
            self._secret_users.setdefault((key.namespace, secret), set()).add(key)

    def _forget(self, key: Key, uid: str) -> None:
        known = self._known.get(key)
        if known and known.uid == uid:
            self._uses_secret(key, known, "")
            self._count(known, None)
            del self._known[key]
            self._queue.cancel(key)
            self._claims.leave(uid)
        if uid in self._records or self._claims.holds(uid):
            self._queue.add(Key(key.namespace, key.name, uid))

    def _remember(self, record: Record) -> None:
        account_sid = record.entries[-1].account_sid if record.entries else ""
        self._records[record.uid] = _Remembered(Key(record.namespace, record.name), record.source, account_sid)

    def _source(self, uid: str) -> str:
        return self._records[uid].source if uid in self._records else ""

    def _count(self, known: _Known, reason: Reason | None) -> None:
        for each, step in ((known.reason, -1), (reason, 1)):
            if each:
                CHANNELS.labels(each.name).inc(step)
        known.reason = reason

    # Turns

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._resync_for_ever())
            for _ in range(self._workers):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        while True:
            key, waited = await self._queue.get()
            QUEUE_WAIT_SECONDS.observe(waited)
            started = time.perf_counter()
            turn, well = asyncio.ensure_future(self._turn(key)), True
            try:
                well = await asyncio.shield(turn)
            except asyncio.CancelledError:
                await asyncio.wait({turn}, timeout=10)  # what has begun may end: less to do for the next process
                raise
            finally:
                self._queue.done(key, succeeded=well)
                RECONCILE_SECONDS.observe(time.perf_counter() - started)

    async def _turn(self, key: Key) -> bool:
        """Whether Twilio did its part."""
        try:
            outcome = await (self._orphan_turn(key) if key.uid else self._channel_turn(key))
        except ChannelError as error:
            RECONCILES.labels(type(error).__name__).inc()
            delay = self._queue.add_rate_limited(key, error.retry_after if isinstance(error, Retryable) else None)
            if not isinstance(error, Conflict):
                log.warning("reconcile failed", channel=key.name, error=str(error), retry_seconds=round(delay, 1))
        except Exception:
            RECONCILES.labels("Bug").inc()
            log.exception(
                "reconcile failed", channel=key.name, retry_seconds=round(self._queue.add_rate_limited(key), 1)
            )
        else:
            if outcome:
                self._conclude(key, outcome)
                return not outcome.unreachable
        return True

    async def _orphan_turn(self, key: Key) -> Outcome | None:
        """A record whose channel is gone: its numbers are given back all the same."""
        if key.uid in self._turning:
            return None  # the channel's own turn calls again when it ends
        return await self._reconciler.reconcile(key, None)

    async def _channel_turn(self, key: Key) -> Outcome | None:
        known = self._known.get(key)
        if known is None:
            return None
        body, forced = known.latest, known.forced
        known.latest, known.forced = None, False
        if body and not forced and known.attended == _face(body) and self._queue.is_scheduled(key):
            return None  # the echo of our own write
        if body is None or self._kube.is_outdated(body):
            body = await self._kube.channel(key.namespace, key.name)
            if body is None:
                self._forget(key, known.uid)
                return None
            if body["metadata"]["uid"] != known.uid:
                self.on_channel("ADDED", body)
                return None
        face = _face(body)
        known.fresh |= known.attended is not None and known.attended.check_now != face.check_now
        known.attended = face
        try:
            channel = SmsChannel.model_validate(body)
        except ValidationError as error:
            # The CRD refuses such objects; this one is older than its rules.
            if "deletionTimestamp" in body["metadata"] and known.finalizer:
                await self._kube.take_finalizer_off(body)  # what is owed is in its record, which outlives it
                return None
            wrong = "; ".join(each["msg"] for each in error.errors())
            raise ChannelError(f"not a valid SmsChannel: {wrong}") from None
        self._turning.add(known.uid)
        try:
            outcome = await self._reconciler.reconcile(key, channel, fresh=known.fresh)
            known.fresh &= outcome.verdict.reason is Reason.TwilioUnavailable  # then it was not looked at yet
            return outcome
        finally:
            self._turning.discard(known.uid)
            if self._known.get(key) is not known:
                self._forget(key, known.uid)  # deleted during its turn: what it took meanwhile is owed

    def _conclude(self, key: Key, outcome: Outcome) -> None:
        RECONCILES.labels(outcome.verdict.reason.name).inc()
        uid = outcome.record.uid
        self._owed.pop(uid, None)
        if outcome.owed:
            self._owed[uid] = outcome.owed
        if outcome.stored:
            self._remember(outcome.record)
        else:
            self._records.pop(uid, None)
        known = self._known.get(key)
        if outcome.stored and not key.uid and (known is None or known.uid != uid):
            self._queue.add(Key(key.namespace, key.name, uid))  # it was deleted by force during its turn
        ready, message = outcome.kept or outcome.verdict.reason, outcome.verdict.message
        if outcome.kept:
            log.warning("the channel is left as it works", channel=key.name, error=message)
        elif known and known.uid == uid and known.reason is not ready:
            log.info("channel", channel=key.name, reason=ready.name, message=message)
        if known and known.uid == uid:
            self._count(known, ready)
        if outcome.gone:
            self._queue.cancel(key)
        elif outcome.again is None:
            self._queue.add_rate_limited(key, outcome.at_least, outcome.at_most)
        else:
            self._queue.forget(key)
            self._queue.add_after(key, outcome.again)

    # Resync

    async def _resync_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._resync_interval * random.uniform(0.9, 1.1))  # noqa: S311
            try:
                await self.resync()
            except ChannelError as error:
                log.warning("resync failed", error=str(error))
            except Exception:
                log.exception("resync failed")

    async def resync(self) -> None:
        """Find what the watch missed: by resourceVersion, so that only what differs is read."""
        records, known = frozenset(self._records), {key: each.uid for key, each in self._known.items()}
        uids = set()
        for namespace in self._namespaces:
            async for meta in self._listed(namespace):
                uids.add(meta["uid"])
                key = Key(meta["namespace"], meta["name"])
                here = self._known.get(key)
                known.pop(key, None)
                if here is None or here.version != meta["resourceVersion"]:
                    body = await self._kube.channel(*key[:2])
                    if body:
                        self.on_channel("MODIFIED", body)
        for key, uid in known.items():
            if self._crd_missing or await self._kube.channel(*key[:2]) is None:
                self._forget(key, uid)
        self._find_orphans(records, uids)

    async def _listed(self, namespace: str) -> AsyncIterator[Mapping[str, Any]]:
        """Metadata of the channels; of none where the CRD is gone, and all channels with it. One such answer may be a
        proxy's: it is believed at the second resync.
        """
        try:
            async for meta in self._kube.channel_metadata(namespace):
                yield meta
            self._crd_missing = False
        except NoKindMatch:
            if not self._crd_missing:
                self._crd_missing = True
                raise

    def _find_orphans(self, records: frozenset[str], uids: set[str]) -> None:
        for uid in records - uids:
            if uid in self._records:
                namespace, name, _ = self._records[uid].key
                self._queue.add(Key(namespace, name, uid))


def _face(body: Body) -> _Face:
    meta = body["metadata"]
    check_now = (meta.get("annotations") or {}).get(CHECK_NOW_ANNOTATION)
    return _Face(meta.get("generation", 0), "deletionTimestamp" in meta, check_now)


def _secret_name(body: Body) -> str:
    return str((body["spec"].get("credentials") or {}).get("secretKeyRef", {}).get("name", ""))
