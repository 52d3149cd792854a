"""Share one call among all concurrent callers that ask for the same thing (single-flight)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")


class SingleFlight(Generic[Key, Answer]):
    """Run at most one call per key at a time; callers that join get the same answer, or the same error.

    A caller that is cancelled does not cancel the call. A call that takes longer than `seconds` ends with
    `TimeoutError`, so that no caller joins one that hangs.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._in_flight: dict[Key, asyncio.Future[Answer]] = {}

    def __contains__(self, key: Key) -> bool:
        """Return whether a call for `key` is in flight."""
        return key in self._in_flight

    async def run(self, key: Key, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return the answer of the call in flight for `key`; start `call` if there is none."""
        task = self._in_flight.get(key)
        if task is None:
            task = self._in_flight[key] = asyncio.create_task(self._bounded(call))
            task.add_done_callback(lambda _: self._in_flight.pop(key))
            # If every caller was cancelled, no one reads the exception, and asyncio would log it.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _bounded(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        async with asyncio.timeout(self._seconds):
            return await call()
