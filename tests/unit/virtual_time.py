"""A loop whose time is virtual: it jumps to the next timer, and a wait that nothing would ever end fails at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class Jump(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]  # an alias for the platform's
    """Passes time instead of waiting for it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits, and nothing is to come"
            self.now += max(0.0, timeout)
        return ready


class VirtualTime(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def virtually(story: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that is run in virtual time."""

    def test() -> None:
        with asyncio.Runner(loop_factory=VirtualTime) as runner:
            runner.run(story())

    test.__name__, test.__doc__ = story.__name__, story.__doc__
    return test


def now() -> float:
    return asyncio.get_running_loop().time()
