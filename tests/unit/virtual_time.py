"""An event loop in virtual time: it jumps to the next timer, and fails when there is none and nothing else to run."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class Jump(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]  # an alias for the platform's
    """Advance the clock instead of waiting."""

    now = 0.0
    iterations = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready now, or else pass `timeout` seconds of virtual time."""
        self.iterations += 1
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not ready:
            assert timeout is not None, "every task waits, and no timer is left"
            self.now += max(0.0, timeout)
        return ready


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock starts at 0 and is advanced by its selector."""

    def __init__(self) -> None:
        self.selector = Jump()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def virtually(story: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Make a test of a coroutine function, which runs in virtual time."""

    def test() -> None:
        with asyncio.Runner(loop_factory=VirtualTime) as runner:
            runner.run(story())

    test.__name__, test.__doc__ = story.__name__, story.__doc__
    return test


def now() -> float:
    """Return the seconds of virtual time that have passed."""
    return asyncio.get_running_loop().time()


def iterations() -> int:
    """Return how often the running loop has gone round: a busy loop shows in it."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTime)
    return loop.selector.iterations
