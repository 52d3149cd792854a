"""The work queue: which channel is looked at next, and when.

- A key is in the queue once, however often it is added, and never in two workers' hands: what is added while
  its turn is under way gets one more turn afterwards.
- A key has at most one later turn; the last word on it counts. It stays when the key is added for now.
- Errors back off exponentially with full jitter between a floor and a ceiling.
- Keys belong to lanes (Twilio accounts), which take turns. A lane earns its share of the workers: it begins with a
  few, gets one more for each turn that went well, and falls back to one where a turn did not. So many accounts
  whose calls hang leave workers for the others.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

_FIRST_SHARE = 4

Key = TypeVar("Key", bound=Hashable)


class WorkQueue(Generic[Key]):
    """For one event loop. Delays and times are seconds; `clock` is the loop's unless a test brings its own."""

    def __init__(
        self,
        *,
        lane_of: Callable[[Key], Hashable],
        lane_share: int,
        retry_floor: float,
        retry_ceiling: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._lane_of = lane_of
        self._lane_share = lane_share
        self._floor, self._ceiling = retry_floor, retry_ceiling
        self._clock = clock or asyncio.get_running_loop().time
        self._lanes: dict[Hashable, deque[Key]] = {}  # with keys that wait; insertion order is whose turn it is
        self._busy: dict[Hashable, int] = {}
        self._earned: LRUCache[Hashable, int] = LRUCache(65_536)
        self._waiting: dict[Key, float] = {}  # since when
        self._running: dict[Key, Hashable] = {}
        self._again: set[Key] = set()
        self._later: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._sequence = 0
        self._failures: dict[Key, int] = {}
        self._wake: asyncio.TimerHandle | None = None
        self._idle: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Key) -> None:
        """A turn as soon as a worker is free."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting[key] = self._clock()
            self._lanes.setdefault(self._lane_of(key), deque()).append(key)
            self._rouse()

    def add_after(self, key: Key, delay: float) -> None:
        """One turn after `delay` seconds, unless another call says otherwise until then."""
        due = self._clock() + delay
        self._later[key] = due
        self._sequence += 1
        heapq.heappush(self._heap, (due, self._sequence, key))
        if self._heap[0][1] == self._sequence:
            self._set_alarm()

    def retry(self, key: Key, at_least: float | None = None, at_most: float | None = None) -> float:
        """A turn after the next backoff, or `at_least` if that is longer, but no later than `at_most` (and the
        floor); returns the delay.
        """
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        limit = min(self._ceiling, self._floor * 2 ** min(failures, 32))
        delay = max(random.uniform(self._floor, limit), at_least or 0)  # noqa: S311  (no secret is made of it)
        if at_most is not None:
            delay = min(delay, max(at_most, self._floor))
        self.add_after(key, delay)
        return delay

    def forgive(self, key: Key) -> None:
        """The next error begins at the floor again."""
        self._failures.pop(key, None)

    def drop(self, key: Key) -> None:
        """No later turn; one that is waiting or under way still happens."""
        self._later.pop(key, None)
        self._failures.pop(key, None)

    def planned(self, key: Key) -> bool:
        """Whether a later turn is to come."""
        return key in self._later

    async def get(self) -> tuple[Key, float]:
        """The next key and how long it waited. `done` must follow."""
        while True:
            key = self._next()
            if key is not None:
                return key, self._clock() - self._waiting.pop(key)
            idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(idle)
            try:
                await idle
            except asyncio.CancelledError:
                if idle.done() and not idle.cancelled():
                    self._rouse()  # the wake-up was ours and another worker must have it
                raise

    def done(self, key: Key, *, well: bool = True) -> None:
        """`well` says whether what the lane stands for did its part."""
        lane = self._running.pop(key)
        self._earned[lane] = min(self._share(lane) + 1, self._lane_share) if well else 1
        self._busy[lane] -= 1
        if not self._busy[lane]:
            del self._busy[lane]
        if key in self._again:
            self._again.remove(key)
            self.add(key)
        if lane in self._lanes:
            self._rouse()
            self._rouse()  # the share may have grown

    def _next(self) -> Key | None:
        for lane, keys in self._lanes.items():
            if self._busy.get(lane, 0) < self._share(lane):
                key = keys.popleft()
                del self._lanes[lane]
                if keys:
                    self._lanes[lane] = keys  # at the end: the others come first
                self._busy[lane] = self._busy.get(lane, 0) + 1
                self._running[key] = lane
                return key
        return None

    def _share(self, lane: Hashable) -> int:
        return self._earned.get(lane, min(_FIRST_SHARE, self._lane_share))

    def _rouse(self) -> None:
        while self._idle:
            idle = self._idle.popleft()
            if not idle.done():
                idle.set_result(None)
                return

    def _set_alarm(self) -> None:
        if self._wake:
            self._wake.cancel()
        loop = asyncio.get_running_loop()
        self._wake = loop.call_later(max(0.0, self._heap[0][0] - self._clock()), self._ring)

    def _ring(self) -> None:
        self._wake = None
        while self._heap and self._heap[0][0] <= self._clock():
            due, _, key = heapq.heappop(self._heap)
            if self._later.get(key) == due:
                del self._later[key]
                self.add(key)
        if self._heap:
            self._set_alarm()
