"""Equal questions at the same time are asked once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")


class Merged(Generic[Key, Answer]):
    """Who gives up waiting leaves the answer to the others; an error is everybody's.

    A question that takes longer than `seconds` ends in `TimeoutError`: nobody joins one that hangs for ever.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._under_way: dict[Key, asyncio.Future[Answer]] = {}

    def __contains__(self, key: Key) -> bool:
        """Whether it is being asked."""
        return key in self._under_way

    async def ask(self, key: Key, question: Callable[[], Awaitable[Answer]]) -> Answer:
        asked = self._under_way.get(key)
        if asked is None:
            asked = self._under_way[key] = asyncio.create_task(self._bounded(question))
            asked.add_done_callback(lambda _: self._under_way.pop(key))
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to read it
        return await asyncio.shield(asked)

    async def _bounded(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        async with asyncio.timeout(self._seconds):
            return await question()
