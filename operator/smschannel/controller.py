"""What is looked at, and when: watch events, Secrets, resync and later looks become turns of the work queue.

Level-triggered: an event only says where to look. What is remembered of a channel here is for leaving out turns
that could not find anything new; losing all of it costs one look at each channel.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from pydantic import ValidationError

from smschannel.conditions import reason_of
from smschannel.errors import ChannelError, Conflict, Retryable
from smschannel.kube_port import KubePort
from smschannel.ledger import Claims, Record, WebhookTemplate
from smschannel.metrics import CHANNELS, DEBTS, QUEUE_DEPTH, QUEUE_WAIT_SECONDS, RECONCILE_SECONDS, RECONCILES
from smschannel.queue import WorkQueue
from smschannel.reasons import Reason
from smschannel.reconcile import Key, Outcome, Reconciler, secret_source
from smschannel.resource import CHECK_NOW_ANNOTATION, FINALIZER, SmsChannel

log = structlog.get_logger()

Body = Mapping[str, Any]


@dataclass
class _Known:
    """What is remembered of a channel; a body only between an event and its turn."""

    uid: str
    version: str = ""
    account_sid: str = ""
    secret: str = ""
    finalizer: bool = False
    attended: tuple[object, ...] | None = None  # the face that a turn has seen: what is due since then is in the queue
    latest: Body | None = None
    forced: bool = False  # a turn was asked for whatever the face
    reason: Reason | None = None


class Controller:
    """For one event loop: `load`, then `run` until it is cancelled; events may come at any time after `load`."""

    def __init__(
        self,
        kube: KubePort,
        reconciler: Reconciler,
        claims: Claims[Key],
        *,
        namespace: str,
        template: WebhookTemplate,
        workers: int,
        retry_floor: float,
        retry_ceiling: float,
        resync_interval: float,
        drift_interval: float,
    ) -> None:
        self._kube = kube
        self._reconciler = reconciler
        self._claims = claims
        claims.on_free = self.look
        self._namespace = namespace
        self._template = template
        self._workers = workers
        self._resync_interval = resync_interval
        self._drift_interval = drift_interval
        self._known: dict[Key, _Known] = {}
        self._secret_users: dict[str, set[Key]] = {}
        self._secret_versions: dict[str, str] = {}
        self._records: dict[str, tuple[str, str]] = {}  # of this namespace; uid: name, source
        self._turning: set[str] = set()  # uids of the channels whose turn is under way
        self._queue: WorkQueue[Key] = WorkQueue(
            lane_of=lambda key: known.account_sid if (known := self._known.get(key)) else "",
            lane_share=max(1, workers // 2),
            retry_floor=retry_floor,
            retry_ceiling=retry_ceiling,
        )
        QUEUE_DEPTH.set_function(lambda: len(self._queue))
        DEBTS.set_function(lambda: len(claims))

    async def load(self) -> None:
        """Read the records, which say who holds which number, then the channels."""
        async for record in self._kube.records():
            if isinstance(record, ChannelError):
                log.error("record cannot be read", error=str(record))
            else:
                self._claims.hold_only(record.uid, record)
                if record.namespace == self._namespace:
                    self._remember(record)
                else:  # whether its channel lives cannot be seen from here: its numbers stay claimed
                    log.warning("record of another namespace", namespace=record.namespace, channel=record.name)
        async for body in self._kube.channels(self._namespace):
            self.on_channel("ADDED", body)
        self._find_orphans(frozenset(self._records), {known.uid for known in self._known.values()})
        log.info("loaded", channels=len(self._known), records=len(self._records))

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
        known = self._known.get(key)
        if kind == "DELETED":
            self._forget(key, uid)
            return
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
        if known.attended != _face(body):
            known.latest = body
            self._queue.add(key)

    def on_secret(self, kind: str | None, body: Body) -> None:
        """A labelled Secret, or one that lost its label (which a watch with a selector shows as DELETED)."""
        name, version = body["metadata"]["name"], body["metadata"]["resourceVersion"]
        if kind == "DELETED":
            self._secret_versions.pop(name, None)
        else:
            self._secret_versions[name] = version
        for key in self._secret_users.get(name, ()):
            _, source = self._records.get(self._known[key].uid, ("", ""))
            if kind == "DELETED" or source != secret_source(name, version):
                self.look(key)

    def _attended_before(self, key: Key, known: _Known, body: Body) -> None:
        """After a restart: a channel whose status and record agree needs no turn, only its next drift check."""
        meta, status = body["metadata"], body.get("status") or {}
        self._count(known, reason_of(status))
        _, source = self._records.get(known.uid, ("", ""))
        secret = _secret_name(body)
        changed = secret in self._secret_versions and source != secret_source(secret, self._secret_versions[secret])
        if (
            known.reason is Reason.Configured
            and source
            and not changed
            and status.get("observedGeneration") == meta["generation"]
            and status.get("webhookUrl") == self._template.url(meta["name"])
            and FINALIZER in meta.get("finalizers", ())
            and "deletionTimestamp" not in meta
        ):
            known.attended = _face(body)
            self._queue.add_after(key, random.uniform(0, self._drift_interval))  # noqa: S311

    def _uses_secret(self, key: Key, known: _Known, secret: str) -> None:
        if secret == known.secret:
            return
        self._secret_users.get(known.secret, set()).discard(key)
        known.secret = secret
        if secret:
            self._secret_users.setdefault(secret, set()).add(key)

    def _forget(self, key: Key, uid: str) -> None:
        known = self._known.get(key)
        if known and known.uid == uid:
            self._uses_secret(key, known, "")
            self._count(known, None)
            del self._known[key]
            self._queue.drop(key)
        if uid in self._records or self._claims.holds(uid):
            self._queue.add(Key(key.namespace, key.name, uid))

    def _remember(self, record: Record) -> None:
        self._records[record.uid] = (record.name, record.source)

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
            turn = asyncio.ensure_future(self._turn(key))
            try:
                await asyncio.shield(turn)
            except asyncio.CancelledError:
                await asyncio.wait({turn}, timeout=10)  # what has begun may end: less to do for the next process
                raise
            finally:
                self._queue.done(key)
                RECONCILE_SECONDS.observe(time.perf_counter() - started)

    async def _turn(self, key: Key) -> None:
        try:
            outcome = await (self._orphan_turn(key) if key.uid else self._channel_turn(key))
        except ChannelError as error:
            RECONCILES.labels(type(error).__name__).inc()
            delay = self._queue.retry(key, error.retry_after if isinstance(error, Retryable) else None)
            if not isinstance(error, Conflict):
                log.warning("reconcile failed", channel=key.name, error=str(error), retry_seconds=round(delay, 1))
        except Exception:
            RECONCILES.labels("Bug").inc()
            log.exception("reconcile failed", channel=key.name, retry_seconds=round(self._queue.retry(key), 1))
        else:
            if outcome:
                self._conclude(key, outcome)

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
        if body and not forced and known.attended == _face(body) and self._queue.planned(key):
            return None  # the echo of our own write
        if body is None:
            body = await self._kube.channel(key.namespace, key.name)
            if body is None:
                self._forget(key, known.uid)
                return None
            if body["metadata"]["uid"] != known.uid:
                self.on_channel("ADDED", body)
                return None
        known.attended = _face(body)
        try:
            channel = SmsChannel.model_validate(body)
        except ValidationError as error:
            # The CRD refuses such objects; this one is older than its rules.
            if "deletionTimestamp" in body["metadata"] and known.finalizer:
                await self._kube.release_invalid(body)  # what is owed is in its record, which outlives it
                return None
            wrong = "; ".join(each["msg"] for each in error.errors())
            raise ChannelError(f"not a valid SmsChannel: {wrong}") from None
        self._turning.add(known.uid)
        try:
            return await self._reconciler.reconcile(key, channel)
        finally:
            self._turning.discard(known.uid)
            if self._known.get(key) is not known:
                self._forget(key, known.uid)  # deleted during its turn: what it took meanwhile is owed

    def _conclude(self, key: Key, outcome: Outcome) -> None:
        RECONCILES.labels(outcome.verdict.reason.name).inc()
        uid = outcome.record.uid
        if outcome.stored:
            self._remember(outcome.record)
        else:
            self._records.pop(uid, None)
        known = self._known.get(key)
        if outcome.stored and not key.uid and (known is None or known.uid != uid):
            self._queue.add(Key(key.namespace, key.name, uid))  # it was deleted by force during its turn
        if known and known.uid == uid and known.reason is not outcome.verdict.reason:
            self._count(known, outcome.verdict.reason)
            log.info("channel", channel=key.name, reason=outcome.verdict.reason.name, message=outcome.verdict.message)
        if outcome.gone:
            self._queue.drop(key)
        elif outcome.again is None:
            self._queue.retry(key, outcome.at_least, outcome.at_most)
        else:
            self._queue.forgive(key)
            self._queue.add_after(key, outcome.again)

    # Resync

    async def _resync_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._resync_interval * random.uniform(0.9, 1.1))  # noqa: S311
            try:
                await self.resync()
            except ChannelError as error:
                log.warning("resync failed", error=str(error))

    async def resync(self) -> None:
        """Find what the watch missed: by resourceVersion, so that only what differs is read."""
        records, known = frozenset(self._records), {key: each.uid for key, each in self._known.items()}
        uids = set()
        async for meta in self._kube.channel_metadata(self._namespace):
            uids.add(meta["uid"])
            key = Key(meta["namespace"], meta["name"])
            here = self._known.get(key)
            known.pop(key, None)
            if here is None or here.version != meta["resourceVersion"]:
                body = await self._kube.channel(*key[:2])
                if body:
                    self.on_channel("MODIFIED", body)
        for key, uid in known.items():
            if await self._kube.channel(*key[:2]) is None:
                self._forget(key, uid)
        self._find_orphans(records, uids)

    def _find_orphans(self, records: frozenset[str], uids: set[str]) -> None:
        for uid in records - uids:
            if uid in self._records:
                self._queue.add(Key(self._namespace, self._records[uid][0], uid))


def _face(body: Body) -> tuple[object, ...]:
    """What of a channel calls for a turn when it changes. Our own writes change none of it."""
    meta = body["metadata"]
    check_now = (meta.get("annotations") or {}).get(CHECK_NOW_ANNOTATION)
    return meta.get("generation"), "deletionTimestamp" in meta, check_now


def _secret_name(body: Body) -> str:
    return str((body["spec"].get("credentials") or {}).get("secretKeyRef", {}).get("name", ""))
