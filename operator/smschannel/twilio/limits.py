"""Limits on calls to Twilio: how many at a time, and which fail immediately because their result is known already.

Limits, pauses (429) and refusals are kept per credential key: the digest of login SID, token, account and API. So
a client that knows an account SID and uses a wrong token has limits of its own, and neither slows down nor blocks the
owner. A credential that Twilio has not accepted yet is unverified: all such share a small pool, and have one call at
a time per tenant and account, so that guesses cost the others little. The pool is shared fairly between tenants.

A refusal of an unverified credential is remembered at once. That of a verified one is suspected to be a passing fault:
the caller is to try again later, other callers ask Twilio themselves, and only a refusal that comes some time after the
first, with no success in between, is remembered.

Two circuit breakers keep callers from waiting for a timeout each. Deletions in particular must end in time:

- per credential key: after two consecutive timeouts, calls with that credential fail immediately, for as long as the
  last one hung;
- per API (`_OriginBreaker`): when Twilio hangs for all accounts, timeouts of three credentials are enough.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Literal
from weakref import WeakValueDictionary

from cachetools import LRUCache

from smschannel.api.errors import LeaseEndsSoon, Refused, SuspectedRefusal, TwilioThrottled, TwilioTimeout
from smschannel.api.reasons import Reason
from smschannel.core.record import Login
from smschannel.core.shares import leaves_room

Origin = Literal["api", "messaging"]
"""Twilio's two APIs, https://api.twilio.com and https://messaging.twilio.com: one may work while the other hangs."""

TENANT: ContextVar[str] = ContextVar("TENANT", default="")
"""The namespace for whose channel this task calls Twilio; empty if there is only one."""

_UNVERIFIED_CALLS = 16
_TIMEOUTS_TO_OPEN = 2
_CREDENTIALS_TO_OPEN = 3
_REMEMBERED = 65_536
_SHORTEST_PAUSE = 1.0  # seconds
_NEVER = float("-inf")
_NOT_REFUSED = (_NEVER, Reason.AuthenticationFailed, "")
_NOT_PAUSED = (_NEVER, "")
_NO_TIMEOUTS = (0, _NEVER, "")


class Limiter:
    """Limits for the calls of one event loop.

    `concurrency` is how many calls a verified credential has in flight, `refusal_memory` for how many seconds a
    refused credential is not tried again, `confirm_after` how many seconds after the first refusal of a verified
    credential another one confirms it. Times are seconds of `clock`.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        refusal_memory: float,
        confirm_after: float = 60,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._concurrency = concurrency
        self._refusal_memory = refusal_memory
        self._confirm_after = confirm_after
        self._clock = clock
        self._breakers: dict[Origin, _OriginBreaker] = {
            "api": _OriginBreaker(clock),
            "messaging": _OriginBreaker(clock),
        }
        self._unverified = _SharedSlots(_UNVERIFIED_CALLS)
        self._slots: WeakValueDictionary[object, asyncio.Semaphore] = WeakValueDictionary()  # those in use
        # All by credential key.
        self._verified: LRUCache[bytes, bool] = LRUCache(_REMEMBERED)
        self._refused: LRUCache[bytes, tuple[float, Reason, str]] = LRUCache(_REMEMBERED)  # until, reason, message
        self._suspected: LRUCache[bytes, float] = LRUCache(_REMEMBERED)  # when a verified credential was refused first
        self._paused: LRUCache[bytes, tuple[float, str]] = LRUCache(_REMEMBERED)  # until, message
        self._timeouts: LRUCache[bytes, tuple[int, float, str]] = LRUCache(_REMEMBERED)  # in a row, until, message

    @asynccontextmanager
    async def call(self, login: Login, account_sid: str, *, origin: Origin = "api") -> AsyncIterator[None]:
        """Wait until one call may be made, and learn from how the block, which makes it, ends.

        Raises without a call: `Refused` for a while after Twilio refused the credential,
        `TwilioThrottled` during a pause that Twilio asked for, and `TwilioTimeout` while a circuit breaker is open.
        The message is that of the call that failed, so that a status that repeats it does not change. A refusal that is
        only suspected becomes `SuspectedRefusal`.
        """
        key = _credential_key(login, account_sid, origin)
        breaker = self._breakers[origin]
        self._raise_known(key)
        with breaker.admit(key, verified=key in self._verified) as is_probe:
            async with AsyncExitStack() as slots:
                await self._enter_slots(slots, key, (account_sid, origin), breaker, is_probe)
                with self._timeouts_counted(key, breaker), self._refusals_kept(key):
                    yield

    def forget_refusal(self, login: Login, account_sid: str, *, older_than: float = 0) -> None:
        """Let the next call with these credentials be made, although Twilio refused them `older_than` seconds ago."""
        for origin in self._breakers:
            key = _credential_key(login, account_sid, origin)
            until, reason, message = self._refused.get(key, _NOT_REFUSED)
            if self._clock() - (until - self._refusal_memory) >= older_than and key in self._refused:
                self._refused[key] = _NEVER, reason, message  # it stays there, so that a record does not verify it

    def trust(self, login: Login, account_sid: str) -> None:
        """Count a credential as verified because a record contains it, unless Twilio's last answer was a refusal."""
        key = _credential_key(login, account_sid, "api")
        if key not in self._refused:
            self._verified[key] = True

    def _raise_known(self, key: bytes) -> None:
        """Raise the error that a call with this credential would end with, if it is known."""
        now = self._clock()
        until, reason, message = self._refused.get(key, _NOT_REFUSED)
        if now < until:
            raise Refused(reason, message)
        _, until, message = self._timeouts.get(key, _NO_TIMEOUTS)
        if now < until:
            raise TwilioTimeout(message, until - now)
        until, message = self._paused.get(key, _NOT_PAUSED)
        if now < until:
            raise TwilioThrottled(message, until - now)

    # Slots

    async def _enter_slots(
        self, slots: AsyncExitStack, key: bytes, account: object, breaker: _OriginBreaker, is_probe: bool
    ) -> None:
        """Wait for the slots that a call needs, and leave them to `slots` to free. Raises as `call` does."""
        began, tenant = self._clock(), TENANT.get()

        async def enter(slot: AbstractAsyncContextManager[None], *, locked: bool) -> None:
            if is_probe and locked:
                raise breaker.error()  # do not wait for a slot while the breaker is open: the calls in flight may hang
            await slots.enter_async_context(slot)
            if not is_probe and breaker.is_hanging_since(began):
                raise breaker.error()
            self._raise_known(key)

        if key not in self._verified:
            slot = self._slots_of((tenant, account), 1)
            await enter(slot, locked=slot.locked())
        if key in self._verified:  # perhaps since a moment ago, by the call that held the account's slot
            await slots.aclose()
            slot = self._slots_of(key, self._concurrency)
            await enter(slot, locked=slot.locked())
        else:
            await enter(self._unverified.slot(tenant), locked=self._unverified.locked(tenant))

    def _slots_of(self, owner: object, count: int) -> asyncio.Semaphore:
        slots = self._slots.get(owner)
        if slots is None:
            slots = self._slots[owner] = asyncio.Semaphore(count)
        return slots

    # Results

    @contextmanager
    def _refusals_kept(self, key: bytes) -> Iterator[None]:
        try:
            yield
        except Refused as refused:
            if refused.reason in {Reason.AuthenticationFailed, Reason.AccountSuspended}:
                self._raise_if_only_suspected(key, refused)
                self._verified.pop(key, None)
                self._suspected.pop(key, None)
                # Not the exception: it would keep every frame that it passed alive, and the tokens in them.
                self._refused[key] = (self._clock() + self._refusal_memory, refused.reason, str(refused))
            else:
                self._accepted(key)  # Twilio checks the credentials before anything else
            raise
        except TwilioThrottled as error:
            until = self._clock() + (error.retry_after or _SHORTEST_PAUSE)
            self._paused[key] = max((until, str(error)), self._paused.get(key, _NOT_PAUSED))
            raise
        self._accepted(key)

    def _accepted(self, key: bytes) -> None:
        self._verified[key] = True
        self._suspected.pop(key, None)
        self._refused.pop(key, None)  # a call that was in flight at the same time was refused

    def _raise_if_only_suspected(self, key: bytes, refused: Refused) -> None:
        """Raise `SuspectedRefusal` if the credential is verified, and its first refusal is not long enough ago."""
        if key not in self._verified:
            return
        now = self._clock()
        since = self._suspected.setdefault(key, now)
        if (left := since + self._confirm_after - now) > 0:
            raise SuspectedRefusal(f"{refused} It accepted them before, so they are tried once more soon.", left)

    @contextmanager
    def _timeouts_counted(self, key: bytes, breaker: _OriginBreaker) -> Iterator[None]:
        """Count consecutive timeouts. Every other answer resets the count; a cancelled call does not count."""
        started = self._clock()
        try:
            yield
        except TwilioTimeout as timeout:
            now = self._clock()
            in_a_row = self._timeouts.get(key, _NO_TIMEOUTS)[0] + 1
            until = now + (now - started) if in_a_row >= _TIMEOUTS_TO_OPEN else _NEVER
            self._timeouts[key] = in_a_row, until, str(timeout)
            breaker.timed_out(key, started, str(timeout))
            raise
        except LeaseEndsSoon:  # nothing was sent, so nothing was answered
            raise
        except Exception:
            self._answered(key, breaker)
            raise
        self._answered(key, breaker)

    def _answered(self, key: bytes, breaker: _OriginBreaker) -> None:
        self._timeouts.pop(key, None)
        breaker.answered()


class _SharedSlots:
    """A semaphore that several tenants share: they leave slots to each other, and waiters are served round-robin.

    The tenant "" is alone, and may have all slots.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._taken: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def locked(self, tenant: str) -> bool:
        """Return whether the tenant would have to wait."""
        return tenant in self._waiting or not self._has_room(tenant)

    @asynccontextmanager
    async def slot(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a slot and hold it during the block."""
        if self.locked(tenant):
            await self._wait(tenant)
        else:
            self._take(tenant)
        try:
            yield
        finally:
            self._free_one(tenant)

    async def _wait(self, tenant: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free_one(tenant)  # it was given a slot, and cannot take it
            elif turn in self._waiting.get(tenant, ()):
                self._forget_turn(tenant, turn)
            raise

    def _forget_turn(self, tenant: str, turn: asyncio.Future[None]) -> None:
        self._waiting[tenant].remove(turn)
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def _has_room(self, tenant: str) -> bool:
        return self._free > 0 and (not tenant or leaves_room(self._taken[tenant], self._free))

    def _take(self, tenant: str) -> None:
        self._free -= 1
        self._taken[tenant] += 1

    def _free_one(self, tenant: str) -> None:
        self._free += 1
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]
        while (after := next((each for each in self._waiting if self._has_room(each)), None)) is not None:
            turn = self._waiting[after][0]
            self._forget_turn(after, turn)
            if after in self._waiting:
                self._waiting.move_to_end(after)
            if not turn.done():
                self._take(after)
                turn.set_result(None)


class _OriginBreaker:
    """Circuit breaker of one API.

    It opens when calls with three different credentials in a row have timed out without any answer since these
    calls began: hanging accounts cannot open it while others are answered. Open, calls fail immediately, but for one
    probe at a time; any answer closes it. After a timeout the next probe waits as long as that call hung, unless
    its credential is verified and has not timed out itself: then the others may be the ones that hang.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timed_out: set[bytes] = set()  # credential keys, since the last answer
        self._answered_at = _NEVER
        self._timed_out_at = _NEVER
        self._probing_since: float | None = None
        self._last_hang = 0.0
        self._open_until = _NEVER
        self._message = ""

    @property
    def is_open(self) -> bool:
        """Return whether calls fail immediately; a breaker that awaits the result of a probe counts as open."""
        return len(self._timed_out) >= _CREDENTIALS_TO_OPEN

    def is_hanging_since(self, began: float) -> bool:
        """Return whether a caller that has waited since `began` must give up.

        It must when the breaker has opened, and also when a call timed out meanwhile and none was answered: it has
        spent one timeout on waiting already.
        """
        return self.is_open or self._answered_at < began < self._timed_out_at

    @contextmanager
    def admit(self, key: bytes, *, verified: bool) -> Iterator[bool]:
        """Admit one call, which is the block, and yield whether it is a probe. Raise `TwilioTimeout` otherwise."""
        if not self.is_open:
            yield False
            return
        has_to_wait = key in self._timed_out or not verified
        if self._probing_since is not None or (has_to_wait and self._clock() < self._open_until):
            raise self.error()
        self._probing_since = self._clock()
        try:
            yield True
        finally:
            self._probing_since = None

    def answered(self) -> None:
        """Close the breaker: the API answers, whatever the answer is."""
        self._answered_at = self._clock()
        self._timed_out.clear()

    def timed_out(self, key: bytes, started: float, message: str) -> None:
        """Count a call that began at `started`, unless others were answered meanwhile."""
        if started < self._answered_at:
            return
        now = self._timed_out_at = self._clock()
        self._timed_out.add(key)
        self._last_hang = now - started
        self._open_until = now + self._last_hang
        self._message = message

    def error(self) -> TwilioTimeout:
        """Return the error of a call that is not made; `retry_after` is when the next probe is likely."""
        now = self._clock()
        probe_ends = _NEVER if self._probing_since is None else self._probing_since + self._last_hang
        return TwilioTimeout(self._message, max(_SHORTEST_PAUSE, self._open_until - now, probe_ends - now))


def _credential_key(login: Login, account_sid: str, origin: Origin) -> bytes:
    """Return a digest, so that no token is stored here."""
    content = "\0".join((login.sid, login.token.get_secret_value(), account_sid, origin))
    return hashlib.sha256(content.encode(errors="surrogatepass")).digest()
