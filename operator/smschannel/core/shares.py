"""How tenants share what the operator has few of: a part of it stays free for others, and requests are spaced out.

No I/O; the time is an argument, in seconds of any clock.
"""

from __future__ import annotations

from collections.abc import Hashable

_TIMES_THE_REST = 3


def leaves_room(taken: int, free: int) -> bool:
    """Return whether somebody who has `taken` places may take one of the `free` ones.

    Nobody has more than about three times as many as are free then: alone three quarters, the next one three quarters
    of the rest, and so on. So a newcomer finds a place at once, whatever the others do with theirs.
    """
    return taken < _TIMES_THE_REST * free


class Pace:
    """Spaces requests out: each owner may make `burst` at once, and then `per_second`."""

    def __init__(self, burst: int, per_second: float) -> None:
        self._interval = 1 / per_second
        self._burst_seconds = (burst - 1) * self._interval
        self._full_at: dict[Hashable, float] = {}

    def delay(self, owner: Hashable, now: float) -> float:
        """Count a request of `owner` and return for how many seconds it has to wait."""
        before = max(now, self._full_at.get(owner, now))
        self._full_at[owner] = before + self._interval
        return max(0.0, before - self._burst_seconds - now)
