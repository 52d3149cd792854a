"""Who may call Twilio now: limits, pauses and refusals, each kept for one login at one account and no wider.

A door is (login SID, token, account), known by its digest. So a stranger with the right account SID and a wrong
token has a door of their own: they neither slow nor poison the owner. A door that Twilio never opened yet is not
verified; all such share a small pool, one call at a time for each account, so that guesses stay cheap for
everybody else.

Behind a door that is silent, each call would hang until its time-out. After two in a row everybody is told at once, for
as long as the last one hung: so the many who only want to know (deletions, above all) do not wait for one another.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from cachetools import LRUCache

from smschannel.api.errors import Refused, TwilioThrottled, TwilioTimeout
from smschannel.api.reasons import Reason
from smschannel.core.record import Login

_UNVERIFIED_AT_ONCE = 16
_REMEMBERED = 65_536
_PAUSE = 1.0
_NO_PAUSE = (0.0, "")
_HEARD = (0, 0.0, "")


class Gate:
    """For one event loop. `refusal_memory` is how many seconds a refused login is not tried again."""

    def __init__(self, *, concurrency: int, refusal_memory: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._concurrency = concurrency
        self._refusal_memory = refusal_memory
        self._clock = clock
        self._unverified = asyncio.Semaphore(_UNVERIFIED_AT_ONCE)
        self._slots: WeakValueDictionary[object, asyncio.Semaphore] = WeakValueDictionary()
        self._verified: LRUCache[bytes, bool] = LRUCache(_REMEMBERED)
        self._refused: LRUCache[bytes, tuple[float, Reason, str]] = LRUCache(_REMEMBERED)
        self._paused: LRUCache[bytes, tuple[float, str]] = LRUCache(_REMEMBERED)
        self._silent: LRUCache[bytes, tuple[int, float, str]] = LRUCache(_REMEMBERED)  # calls in a row, until, message

    @asynccontextmanager
    async def call(self, login: Login, account_sid: str) -> AsyncIterator[None]:
        """Around one call. Raises at once what the door is known to answer: `Refused`, `TwilioThrottled` while Twilio
        has asked for a pause, or `TwilioTimeout` while it does not answer at all.
        """
        door = _door(login, account_sid)
        self._answer_at_once(door)
        async with AsyncExitStack() as held:
            if door not in self._verified:
                await held.enter_async_context(self._slots_of(account_sid, 1))
                self._answer_at_once(door)
            if door in self._verified:  # while we waited, perhaps
                await held.aclose()
                await held.enter_async_context(self._slots_of(door, self._concurrency))
            else:
                await held.enter_async_context(self._unverified)
            self._answer_at_once(door)
            try:
                with self._listening(door):
                    yield
            except Refused as refused:
                if refused.reason in {Reason.AuthenticationFailed, Reason.AccountSuspended}:
                    self._verified.pop(door, None)
                    # Not the exception, which holds on to all the frames that it passes, and what is in them.
                    self._refused[door] = (self._clock() + self._refusal_memory, refused.reason, str(refused))
                else:
                    self._verified[door] = True
                raise
            except TwilioThrottled as error:
                until = self._clock() + (error.retry_after or _PAUSE)
                self._paused[door] = max((until, str(error)), self._paused.get(door, _NO_PAUSE))
                raise
            else:
                self._verified[door] = True
                self._refused.pop(door, None)  # a call that was under way at the same time got another answer

    @contextmanager
    def _listening(self, door: bytes) -> Iterator[None]:
        started = self._clock()
        try:
            yield
        except TwilioTimeout as silent:
            now, (in_a_row, *_) = self._clock(), self._silent.get(door, _HEARD)
            until = now + (now - started) if in_a_row else now
            self._silent[door] = in_a_row + 1, until, str(silent)
            raise
        except Exception:
            self._silent.pop(door, None)
            raise
        self._silent.pop(door, None)

    def forget_refusal(self, login: Login, account_sid: str) -> None:
        """The next call is made."""
        self._refused.pop(_door(login, account_sid), None)

    def _answer_at_once(self, door: bytes) -> None:
        now = self._clock()
        until, reason, message = self._refused.get(door, (now, Reason.AuthenticationFailed, ""))
        if now < until:
            raise Refused(reason, message)
        _, until, message = self._silent.get(door, _HEARD)
        if now < until:
            raise TwilioTimeout(message, until - now)
        until, message = self._paused.get(door, _NO_PAUSE)
        if now < until:  # in the same words: others would be written into the status each time
            raise TwilioThrottled(message, until - now)

    def _slots_of(self, whose: object, count: int) -> asyncio.Semaphore:
        slots = self._slots.get(whose)
        if slots is None:
            slots = self._slots[whose] = asyncio.Semaphore(count)
        return slots


def _door(login: Login, account_sid: str) -> bytes:
    content = "\0".join((login.sid, login.token.get_secret_value(), account_sid))
    return hashlib.sha256(content.encode()).digest()
