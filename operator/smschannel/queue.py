"""The work queue: decides which key a worker gets next. Modelled on client-go's, with fair queuing between flows.

- A key waits at most once, however often it is added, and never runs in two workers: a key that is added while it
  runs is queued again when it is done.
- A key has at most one scheduled requeue; the last call decides when. Adding the key for now leaves it scheduled.
- Failures back off exponentially with full jitter between a floor and a ceiling.
- Keys belong to flows (Twilio accounts), and flows to groups (namespaces). Groups are served round-robin, and so are
  the flows within each. Each flow's concurrency limit starts at 4, rises by one per success and drops to one after a
  failure, so that hanging accounts cannot starve the others.
- Groups leave workers free for each other, see `leaves_room`.
- Unverified flows, whose credentials may be invented, get every other key of their group and a small share of the
  workers.
- A flow can be paused: Twilio's 429 with Retry-After is about the account, not about one of its channels.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from cachetools import LRUCache

from smschannel.core.shares import leaves_room

_INITIAL_LIMIT = 4
_REMEMBERED_LIMITS = 65_536
_NEVER = float("-inf")

Key = TypeVar("Key", bound=Hashable)


def flow_limit(workers: int, concurrency: int) -> int:
    """Return how many of `workers` one flow may occupy, where its credentials allow `concurrency` calls to Twilio.

    Twice `concurrency`: while some reconciles wait for Twilio, as many others are busy with Kubernetes. More would
    only queue for the same calls, and be missing elsewhere while the account hangs.
    """
    return max(1, min(workers // 2, 2 * concurrency))


def unverified_limit(workers: int) -> int:
    """Return how many of `workers` unverified flows may occupy, all together."""
    return max(1, workers // 4)


@dataclass(slots=True)
class _Group:
    """The flows of a group that have waiting keys and are not paused, by whether they are verified.

    The insertion order is the round-robin order. `unverified` of its `running` keys belong to unverified flows.
    """

    name: Hashable
    ready: dict[bool, OrderedDict[Hashable, None]] = field(
        default_factory=lambda: {True: OrderedDict(), False: OrderedDict()}
    )
    verified_next: bool = True
    running: int = 0
    unverified: int = 0


@dataclass(slots=True)
class _Flow(Generic[Key]):
    """A flow with keys that wait or run, or with a pause that is not over yet."""

    group: _Group
    is_verified: bool
    keys: OrderedDict[Key, float] = field(default_factory=OrderedDict)
    """The keys that wait, the oldest first, and since when."""
    running: int = 0
    paused_until: float = _NEVER

    def take(self, key: Key, now: float) -> float:
        """Remove a waiting key and return since when it could have run: the flow's last pause does not count."""
        return max(self.keys.pop(key), min(now, self.paused_until))


class WorkQueue(Generic[Key]):
    """A queue for the workers of one event loop. Delays and times are seconds of `clock` (default: the loop's).

    `flow_of` names the flow of a key; it is called whenever the key is added. `flow_limit` is the most keys of one
    flow that run at a time. Backoffs lie between `retry_floor` and `retry_ceiling`.

    `group_of` names the group of a flow and `is_verified` says whether its credentials are known to work, which is
    asked when the flow is new. At most `unverified_limit` keys of unverified flows run at a time (default: no limit).
    `workers` is their number if groups are to leave some of them to each other; None if not.
    """

    def __init__(
        self,
        *,
        flow_of: Callable[[Key], Hashable],
        flow_limit: int,
        retry_floor: float,
        retry_ceiling: float,
        group_of: Callable[[Hashable], Hashable] = lambda flow: None,
        is_verified: Callable[[Hashable], bool] = lambda flow: True,
        unverified_limit: int | None = None,
        workers: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._flow_of = flow_of
        self._group_of = group_of
        self._is_verified = is_verified
        self._unverified_limit = unverified_limit
        self._workers = workers
        self._flow_limit = flow_limit
        self._floor, self._ceiling = retry_floor, retry_ceiling
        self._clock = clock or asyncio.get_running_loop().time
        self._flows: dict[Hashable, _Flow[Key]] = {}
        self._groups: dict[Hashable, _Group] = {}  # there are few, and they are never discarded
        self._ready: OrderedDict[Hashable, _Group] = OrderedDict()  # those with ready flows, in round-robin order
        self._unverified = 0  # keys of unverified flows that run
        self._limits: LRUCache[Hashable, int] = LRUCache(_REMEMBERED_LIMITS)  # they outlive the flow's keys
        self._waiting: dict[Key, Hashable] = {}  # the flow in which the key waits
        self._running: dict[Key, Hashable] = {}  # the flow whose limit the key counts against
        self._dirty: set[Key] = set()  # keys that were added while they ran
        self._scheduled: dict[Key, float] = {}  # when the key is due
        self._failures: dict[Key, int] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []  # a heap; the number breaks ties
        self._timers_made = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._idle: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        """Count the keys that wait for a worker, without those of paused flows. Scheduled keys do not wait yet."""
        flows = (name for group in self._ready.values() for ready in group.ready.values() for name in ready)
        return sum(len(self._flows[name].keys) for name in flows)

    def add(self, key: Key) -> None:
        """Queue a key as soon as possible; a key that waits already keeps its place, unless its flow has changed."""
        if key in self._running:
            self._dirty.add(key)
            return
        name, now = self._flow_of(key), self._clock()
        since = now
        if key in self._waiting:
            if self._waiting[key] == name:
                return
            since = self._remove(key, now)
        self._waiting[key] = name
        flow = self._flow(name)
        flow.keys[key] = since
        if flow.paused_until <= now:
            self._set_ready(name, flow)
            self._wake()

    def add_after(self, key: Key, delay: float, *, keep_earlier: bool = False) -> None:
        """Schedule a key in `delay` seconds, in place of its schedule before; with `keep_earlier`, if that is later."""
        due = self._clock() + delay
        if keep_earlier and self._scheduled.get(key, due) < due:
            return
        self._scheduled[key] = due
        self._at(due, partial(self._add_scheduled, key, due))

    def add_rate_limited(self, key: Key, at_least: float | None = None, at_most: float | None = None) -> float:
        """Count a failure and schedule the key after its next backoff. Return the delay in seconds.

        The delay is `at_least` where the backoff is shorter (even beyond the ceiling), and no longer than `at_most`
        or the floor, whichever is longer.
        """
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        limit = min(self._ceiling, self._floor * 2 ** min(failures, 32))
        delay = max(random.uniform(self._floor, limit), at_least or 0)  # noqa: S311  (not used for secrets)
        if at_most is not None:
            delay = min(delay, max(at_most, self._floor))
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """Reset the failure count: the next backoff starts at the floor. A scheduled requeue stays scheduled."""
        self._failures.pop(key, None)

    def cancel(self, key: Key) -> None:
        """Drop the scheduled requeue and the failure count. A key that waits or runs is not affected."""
        self._scheduled.pop(key, None)
        self._failures.pop(key, None)

    def is_scheduled(self, key: Key) -> bool:
        """Return whether a requeue of the key is scheduled and not due yet."""
        return key in self._scheduled

    def pause(self, flow: Hashable, seconds: float) -> None:
        """Hand out no key of the flow for `seconds`. Its keys keep their places; those that run are not affected.

        A second pause can extend the first, never shorten it.
        """
        now = self._clock()
        until = now + seconds
        known = self._flows.get(flow)
        if until <= max(now, known.paused_until if known else _NEVER):
            return
        state = self._flow(flow)
        state.paused_until = until
        self._unset_ready(flow, state)
        self._at(until, partial(self._resume, flow))

    def verify(self, flow: Hashable) -> None:
        """Count a flow as verified from now on, and its keys that run already: its credentials are known to work."""
        state = self._flows.get(flow)
        if state is None or state.is_verified:
            return
        is_ready = flow in state.group.ready[False]
        self._unset_ready(flow, state)
        state.is_verified = True
        state.group.unverified -= state.running
        self._unverified -= state.running
        if is_ready:
            self._set_ready(flow, state)
        self._wake(state.running + 1)

    def close(self) -> None:
        """Drop all schedules and pauses: else the event loop's timer would keep the queue and what it refers to."""
        self._timers.clear()
        if self._alarm:
            self._alarm.cancel()

    async def get(self) -> tuple[Key, float]:
        """Wait for the next key. Return it with the seconds that it waited since it was due and its flow not paused.

        The caller must call `done` afterwards.
        """
        while (taken := self._next()) is None:
            idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(idle)
            try:
                await idle
            except asyncio.CancelledError:
                if idle.done() and not idle.cancelled():
                    self._wake()  # this worker was woken and cannot take the key: another one must
                raise
        return taken

    def done(self, key: Key, *, succeeded: bool = True) -> None:
        """Mark a key as done. Pass `succeeded=False` when its flow is to blame (its account hangs): the limit drops."""
        name = self._running.pop(key)
        self._limits[name] = min(self._limit(name) + 1, self._flow_limit) if succeeded else 1
        self._count(self._flows[name], -1)
        if key in self._dirty:
            self._dirty.remove(key)
            self.add(key)
        self._discard_if_unused(name)
        if self._ready:
            self._wake(2)  # one place is free, and the limit may have risen by one

    def _next(self) -> tuple[Key, float] | None:
        """Take the oldest key of the first flow that may run another one; None if there is none."""
        for group in self._ready.values():
            name = self._next_flow(group)
            if name is not None:
                flow, now = self._flows[name], self._clock()
                key = next(iter(flow.keys))
                self._count(flow, 1)
                self._running[key] = name
                self._ready.move_to_end(group.name)
                group.ready[flow.is_verified].move_to_end(name)
                group.verified_next = not flow.is_verified
                return key, now - self._remove(key, now)
        return None

    def _next_flow(self, group: _Group) -> Hashable | None:
        """Return the first flow of a group that may run another key. It passes only those at their limit: few."""
        if self._workers is not None and not leaves_room(group.running, self._workers - len(self._running)):
            return None
        for verified in (group.verified_next, not group.verified_next):
            if verified or self._may_run_unverified(group):
                for name in group.ready[verified]:
                    if self._flows[name].running < self._limit(name):
                        return name
        return None

    def _may_run_unverified(self, group: _Group) -> bool:
        if self._unverified_limit is None:
            return True
        free = self._unverified_limit - self._unverified
        return free > 0 and (self._workers is None or leaves_room(group.unverified, free))

    def _count(self, flow: _Flow[Key], step: int) -> None:
        """Count a key of the flow that begins to run (1) or ends (-1)."""
        flow.running += step
        flow.group.running += step
        if not flow.is_verified:
            flow.group.unverified += step
            self._unverified += step

    # Flows

    def _flow(self, name: Hashable) -> _Flow[Key]:
        """Return a flow, a new one if need be."""
        flow = self._flows.get(name)
        if flow is None:
            group = self._group_of(name)
            state = self._groups.setdefault(group, _Group(group))
            flow = self._flows[name] = _Flow(state, self._is_verified(name))
        return flow

    def _set_ready(self, name: Hashable, flow: _Flow[Key]) -> None:
        flow.group.ready[flow.is_verified].setdefault(name)
        self._ready.setdefault(flow.group.name, flow.group)

    def _unset_ready(self, name: Hashable, flow: _Flow[Key]) -> None:
        group = flow.group
        group.ready[flow.is_verified].pop(name, None)
        if not any(group.ready.values()):
            self._ready.pop(group.name, None)

    def _remove(self, key: Key, now: float) -> float:
        """Remove a key that waits and return since when it could have run."""
        name = self._waiting.pop(key)
        flow = self._flows[name]
        since = flow.take(key, now)
        if not flow.keys:
            self._unset_ready(name, flow)
            self._discard_if_unused(name)
        return since

    def _discard_if_unused(self, name: Hashable) -> None:
        flow = self._flows[name]
        if not flow.keys and not flow.running and flow.paused_until <= self._clock():
            del self._flows[name]

    def _limit(self, name: Hashable) -> int:
        return self._limits.get(name, min(_INITIAL_LIMIT, self._flow_limit))

    def _wake(self, workers: int = 1) -> None:
        while self._idle and workers > 0:
            idle = self._idle.popleft()
            if not idle.done():
                idle.set_result(None)
                workers -= 1

    # Timers

    def _add_scheduled(self, key: Key, due: float) -> None:
        if self._scheduled.get(key) == due:  # else it was cancelled, or scheduled for another time
            del self._scheduled[key]
            self.add(key)

    def _resume(self, name: Hashable) -> None:
        flow = self._flows.get(name)
        if flow is None or flow.paused_until > self._clock():  # extended meanwhile: a later timer resumes it
            return
        if flow.keys:
            self._set_ready(name, flow)
            self._wake(min(len(flow.keys), self._limit(name) - flow.running))
        self._discard_if_unused(name)

    def _at(self, due: float, action: Callable[[], None]) -> None:
        self._timers_made += 1
        heapq.heappush(self._timers, (due, self._timers_made, action))
        if self._timers[0][1] == self._timers_made:
            self._set_alarm()

    def _set_alarm(self) -> None:
        """Set the event loop's timer to the earliest entry."""
        if self._alarm:
            self._alarm.cancel()
        delay = max(0.0, self._timers[0][0] - self._clock())
        self._alarm = asyncio.get_running_loop().call_later(delay, self._run_timers)

    def _run_timers(self) -> None:
        self._alarm = None
        while self._timers and self._timers[0][0] <= self._clock():
            _, _, action = heapq.heappop(self._timers)
            action()
        if self._timers:
            self._set_alarm()
