"""Leader election: of several operators one works and the others stand by, by a Lease as in client-go.

    decide     pure: what a candidate does about the Lease that it has just read
    Elector    reads and writes the Lease, and knows until when this process leads

client-go's rules hold: a process believes its own clock only, a Lease is free when its holder released it or did not
renew it for its whole duration, and the API server arbitrates by resourceVersion. Beyond them:

- A lease runs from when its renewal was sent, and is given up `MARGIN` seconds before it ends, so that the work has
  stopped when another process may begin.
- `outlasts` says whether a write to Twilio, which knows no leader, may still begin.
- A holder that released the Lease, or lost it, may lead again in the same process. Whoever uses an elector drops
  everything that it has in memory then: another process may have worked in between.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, Self, TypeVar

import structlog

from smschannel import metrics
from smschannel.api.errors import ChannelError, Conflict, KubernetesRefused, NotFound
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.names import LEASE, leases_path

log = structlog.get_logger()

Result = TypeVar("Result")

MARGIN = 3.0
"""Seconds before the end of a lease at which its holder stops: for what a call takes to end after its timeout."""
DURATION = 30
"""The usual duration of a lease in seconds: two calls to Twilio fit in, and others need not wait long after a crash."""
LONGEST = 600
"""The longest duration of a lease, in seconds."""

_RENEWALS = 6  # per duration
_CALLS = 3  # a call to the API server may take this part of the duration, so that one that hangs can be repeated
_LOOKS = 30  # of standbys, per duration
_RELEASES = 3
_NEVER = float("-inf")
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_POD = "authentication.kubernetes.io/pod-name"
_SELF = "/apis/authentication.k8s.io/v1/selfsubjectreviews"


def boottime() -> float:
    """Return seconds that nobody can set, and that also pass while the machine is suspended."""
    return time.clock_gettime(_CLOCK)


@dataclass(frozen=True)
class Lease:
    """The spec of a Lease. Times are the holder's own, and are only compared with what was read before."""

    holder: str = ""
    transitions: int = 0
    acquired: str = ""
    renewed: str = ""
    seconds: float = 0

    @classmethod
    def of(cls, body: Object) -> Self:
        """Parse a Lease that anybody may have written: what is missing or makes no sense is empty or 0."""
        spec = body.get("spec") or {}
        return cls(
            holder=str(spec.get("holderIdentity") or ""),
            transitions=int(spec.get("leaseTransitions") or 0),
            acquired=str(spec.get("acquireTime") or ""),
            renewed=str(spec.get("renewTime") or ""),
            seconds=float(spec.get("leaseDurationSeconds") or 0),
        )

    @property
    def term(self) -> tuple[str, int, str]:
        """What tells one acquisition from another, also by the same identity."""
        return self.holder, self.transitions, self.acquired


@dataclass(frozen=True)
class View:
    """What a candidate knows. Times are seconds of its own clock.

    `seen` is the Lease as read last (None: there was none), unchanged since `since`. `is_first` until it was read once.
    `own` is what this process wrote last, even if no answer came; it leads until `ends`.
    """

    identity: str
    duration: float
    is_first: bool = True
    seen: Lease | None = None
    since: float = _NEVER
    own: Lease | None = None
    ends: float = _NEVER

    def after(self, lease: Lease | None, now: float) -> View:
        """Return the view after the Lease was read. One that was deleted stays in sight until it would have ended."""
        if lease is None or (lease == self.seen and not self.is_first):
            return replace(self, is_first=False)
        return replace(self, is_first=False, seen=lease, since=now)

    @property
    def lease_ends(self) -> float:
        """When others may take over from the holder that was seen last."""
        if self.seen is None or not self.seen.holder:
            return _NEVER
        return self.since + max(self.duration, min(self.seen.seconds, LONGEST))


@dataclass(frozen=True)
class Claim:
    """Write a new term into the Lease."""


@dataclass(frozen=True)
class Renew:
    """Write the present term again."""


@dataclass(frozen=True)
class Wait:
    """Stand by: `holder` leads, and the Lease is free at `until` unless it is renewed."""

    holder: str
    until: float


@dataclass(frozen=True)
class Lost:
    """Stop all work now."""

    why: str


Decision = Claim | Renew | Wait | Lost


def decide(lease: Lease | None, view: View, now: float) -> Decision:
    """Return what to do about the Lease as it was just read (None: there is none); `view` is from before that.

    | the Lease              | while leading          | otherwise                                                   |
    |------------------------|------------------------|-------------------------------------------------------------|
    | own lease has ended    | Lost                   |                                                             |
    | is missing             | Renew (create it)      | Claim; Wait if a holder was seen whose lease has not ended  |
    | is held by nobody      | Lost                   | Claim                                                       |
    | is this process's term | Renew                  | Renew: nobody led in between                                |
    | has its identity only  | Lost                   | Claim at the first look: that process of the pod has ended  |
    | is held by another     | Lost                   | Wait; Claim when it was not renewed for its duration        |
    """
    is_own = lease is not None and view.own is not None and lease.term == view.own.term
    if view.ends != _NEVER:
        if now >= view.ends - MARGIN:
            return Lost("it could not be renewed in time")
        if lease is None or is_own:
            return Renew()
        if lease.holder == view.identity:
            return Lost(f"another process took it with the same identity, {view.identity}")
        return Lost(f"it was taken by {lease.holder}" if lease.holder else "somebody removed its holder")
    if is_own:
        return Renew()
    if lease is not None and (not lease.holder or (view.is_first and lease.holder == view.identity)):
        return Claim()
    after = view.after(lease, now)
    if now >= after.lease_ends:
        return Claim()
    return Wait(after.seen.holder if after.seen else "", after.lease_ends)


class Elector:
    """A candidate for the Lease of the operators of one namespace, or of one shard of them: `lease` is its name.

    `api` must have connections of its own, so that no other call keeps a renewal waiting, and the timeout that
    `call_timeout` returns. `duration` is how many seconds a lease lasts without being renewed. `on_look` is called at
    each look at the Lease. `lost` is set while this process does not lead.
    """

    def __init__(
        self,
        api: KubeClient,
        namespace: str,
        identity: str,
        *,
        lease: str = LEASE,
        duration: float = DURATION,
        clock: Callable[[], float] = boottime,
        on_look: Callable[[], None] = lambda: None,
    ) -> None:
        self.identity = identity
        self.lost = asyncio.Event()
        self.lost.set()
        self._api = api
        self._path = leases_path(namespace)
        self._own_path = f"{self._path}/{lease}"
        self._meta = {"name": lease, "namespace": namespace}
        self._duration = duration
        self._clock = clock
        self._on_look = on_look
        self._view = View(identity, duration)
        self._body: Object | None = None  # what was written last, while it is probably still there
        self._renewing: asyncio.Task[None] | None = None

    @property
    def is_leading(self) -> bool:
        return self._clock() < self._view.ends

    def outlasts(self, seconds: float) -> bool:
        """Return whether this process leads for longer than `seconds` and the margin from now on."""
        return self._view.ends - self._clock() > seconds + MARGIN

    async def look(self) -> Decision:
        """Read the Lease and do what `decide` says. Raises Kubernetes' errors; `Conflict` if another one was faster."""
        self._on_look()
        body, self._body = self._body, None
        if body is None:
            with suppress(NotFound):
                body = await self._api.request("GET", self._own_path)
        lease = Lease.of(body) if body else None
        now = self._clock()
        decision = decide(lease, self._view, now)
        self._view = self._view.after(lease, now)
        if isinstance(decision, Claim):
            transitions = (lease.transitions + 1) % 2**31 if lease else 0
            await self._write(body, Lease(self.identity, transitions, acquired=_stamp()))
        elif isinstance(decision, Renew):
            assert self._view.own, "there is a term to renew"
            await self._write(body, self._view.own)
        return decision

    async def campaign(self, on_wait: Callable[[Wait], object] = lambda wait: None) -> None:
        """Stand by until this process leads; from then on the lease is renewed. `on_wait` is called at each look."""
        reported = ""
        while True:
            try:
                decision = await self.look()
            except Conflict:
                decision = None  # another candidate was faster
            except ChannelError as error:
                decision = None
                if str(error) != reported:
                    log.warning("cannot stand by for the lease", error=str(error), hint=_hint(error))
                reported = str(error)
            if isinstance(decision, Claim | Renew):
                break
            if isinstance(decision, Wait):
                if decision.holder != reported:
                    log.info("standing by", leader=decision.holder)
                reported = decision.holder
                on_wait(decision)
            await asyncio.sleep(self._duration / _LOOKS * random.uniform(0.9, 1.1))  # noqa: S311
        metrics.LEASE_ACQUIRED.inc()
        log.info("leading", identity=self.identity)
        self.lost.clear()
        self._renewing = asyncio.create_task(self._keep())

    async def release(self) -> None:
        """Stop leading, and let others begin at once; the work must have ended. Does nothing to a Lease of others."""
        self._view = replace(self._view, ends=_NEVER)  # first: whatever is about to begin must not
        self.lost.set()
        if self._renewing:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
        for _ in range(_RELEASES):
            try:
                await self._release()
                break
            except Conflict:  # with a renewal that was under way
                continue
            except ChannelError as error:
                log.warning("cannot release the lease, it ends by itself", error=str(error), seconds=self._duration)
                break

    async def _release(self) -> None:
        body, self._body = self._body, None
        if self._view.own is None:
            return
        with suppress(NotFound):
            body = body or await self._api.request("GET", self._own_path)
            if Lease.of(body).term == self._view.own.term:
                await self._put(body, {"holderIdentity": None, "leaseDurationSeconds": 1, "renewTime": _stamp()})
                log.info("lease released")

    async def _keep(self) -> None:
        """Renew the lease until it is lost."""
        try:
            why = await self._renew_until_lost()
            log.warning("lease lost, all work stops", why=why)
        except Exception:
            log.exception("lease lost, all work stops")
        finally:
            self._view = replace(self._view, ends=_NEVER)
            self.lost.set()

    async def _renew_until_lost(self) -> str:
        """Return why it was lost."""
        due = self._view.ends - self._duration + self._duration / _RENEWALS
        while True:
            stops = self._view.ends - MARGIN
            await asyncio.sleep(max(0, min(due, stops) - self._clock()))
            began = self._clock()
            if began >= stops:
                return "it could not be renewed in time"
            due = began + self._duration / _LOOKS
            try:
                async with asyncio.timeout(min(stops - began, self._duration / _CALLS)):
                    decision = await self.look()
            except (Conflict, NotFound):  # somebody wrote into the Lease or deleted it: the next look reads it
                due = began
            except (ChannelError, TimeoutError) as error:
                metrics.LEASE_RENEW_FAILURES.inc()
                why, left = str(error) or "no answer in time", stops - self._clock()
                log.warning("cannot renew the lease", error=why, seconds_left=round(left, 1))
            else:
                if isinstance(decision, Lost):
                    return decision.why
                due = began + self._duration / _RENEWALS

    async def _write(self, body: Object | None, term: Lease) -> None:
        """Write a term into the Lease that was read (None: create it). It runs from now on, if it is accepted."""
        now = self._clock()
        self._view = replace(self._view, own=term)
        spec = {
            "holderIdentity": term.holder,
            "leaseDurationSeconds": int(self._duration),
            "acquireTime": term.acquired,
            "renewTime": _stamp(),
            "leaseTransitions": term.transitions,
        }
        self._body = await self._put(body, spec)
        self._view = replace(self._view, ends=now + self._duration)

    async def _put(self, body: Object | None, spec: Object) -> Object:
        """Create the Lease, or replace these fields if it is still what was read. Raises `Conflict` otherwise."""
        if body is None:
            new = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": self._meta, "spec": spec}
            return await self._api.request("POST", self._path, new)
        changed = {**body, "spec": {**(body.get("spec") or {}), **spec}}
        return await self._api.request("PUT", self._own_path, changed)


class Identity(NamedTuple):
    """What a holder of the Lease is called. `is_pod`: by the name of the pod that its token is bound to."""

    name: str
    is_pod: bool


async def identify(api: KubeClient) -> Identity:
    """Return this process's identity. Raises Kubernetes' errors.

    The API server itself names the pod of the token, which is what a fence compares. Processes elsewhere get a new
    identity at each start, so after a crash they wait until the lease of the former process has ended.
    """
    review = await api.request("POST", _SELF, {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"})
    extra = ((review.get("status") or {}).get("userInfo") or {}).get("extra") or {}
    if pods := extra.get(_POD):
        return Identity(str(pods[0]), is_pod=True)
    return Identity(f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}", is_pod=False)


async def unless(work: Coroutine[Any, Any, Result], *events: asyncio.Event) -> Result | None:
    """Return the result of `work`, or None if one of the events is set before there is one.

    In any case the work has ended then, also if the caller is cancelled: a lease may be released.
    """
    task, ends = asyncio.create_task(work), [asyncio.create_task(each.wait()) for each in events]
    try:
        await asyncio.wait({task, *ends}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in ends:
            each.cancel()
        is_done = task.done()
        if not is_done:
            task.cancel()
            await asyncio.wait({task})
    return await task if is_done else None


def call_timeout(duration: float) -> float:
    """Return how many seconds one call about the Lease may take: so few that one that hangs can be repeated in time."""
    return duration / _CALLS


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _hint(error: ChannelError) -> str:
    if isinstance(error, KubernetesRefused) and error.status == 403:
        return (
            "apply this release's deploy/manifests/operator-rbac.yaml: the operator gets, creates and updates its Lease"
        )
    return ""
