"""A cache of what Twilio's accounts contain, so that drift checks cost a call per account and not per number.

For each pair of login and account it reads the account's numbers in pages of 1,000, and which of them a Messaging
Service takes the messages of. An entry is good for `max_age` seconds: enough to confirm that a channel is unchanged,
not enough to base a change on. So only numbers that point at this operator are kept; a caller that finds nothing here
reads the number itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from cachetools import TTLCache

from smschannel.api.errors import ChannelError, Retryable
from smschannel.core.plan import Number, Routing
from smschannel.core.record import Login

_REMEMBERED = 65_536
_NEVER = float("-inf")
_CHECK_AGE = 1.5  # x `max_age`, for a check: channels that are due at different times come to share a read
_NOT_SHOWN = Routing(
    unknown="The credentials are another account's, which do not show this account's Messaging Services."
)


class Reader(Protocol):
    """The part of `TwilioClient` that fills the cache."""

    def number_pages(self, login: Login, account_sid: str) -> AsyncIterator[list[Number]]: ...
    async def overriding_services(self, login: Login, account_sid: str) -> dict[str, str]: ...


@dataclass
class _Account:
    """What one login was shown of one account. Times are when the read began: that is what the answer describes."""

    login: Login
    sid: str
    requested: dict[str, float] = field(default_factory=dict)  # phone numbers, and when each was last requested
    pages: int = 0  # read last time; the account has at least as many
    numbers: dict[str, Number] = field(default_factory=dict)  # by phone number
    numbers_at: float = _NEVER
    overriding: dict[str, str] = field(default_factory=dict)  # service SID by number SID
    unknown: str = ""  # why `overriding` could not be read
    routing_at: float = _NEVER
    in_flight: dict[str, asyncio.Task[None]] = field(default_factory=dict)


@dataclass(slots=True)
class Snapshot:
    """A number and its routing as an account showed them to a login. `AccountCache.age_if_unchanged` compares them."""

    account: _Account
    number: Number
    routing: Routing


class AccountCache:
    """A cache for one event loop. Concurrent callers share a read (single-flight), and its error.

    `is_own_url` decides whether a webhook's URL is this operator's. `max_age` is how many seconds an entry may be
    used; times are seconds of `clock`.
    """

    def __init__(
        self,
        twilio: Reader,
        *,
        is_own_url: Callable[[str], bool],
        max_age: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._twilio = twilio
        self._is_own_url = is_own_url
        self._max_age = max_age
        self._clock = clock
        self._accounts: TTLCache[tuple[Login, str], _Account] = TTLCache(_REMEMBERED, 3 * max_age, timer=clock)

    async def number(self, login: Login, account_sid: str, phone_number: str) -> Number | None:
        """Return the number as it was at most `max_age` seconds ago.

        None means that the caller must read the number itself: it did not point at this operator, it is not in the
        account, or reading the account's pages would cost more calls. Raises what `number_pages` raises.
        """
        return await self._number(self._account(login, account_sid), phone_number, self._max_age)

    async def _number(self, account: _Account, phone_number: str, max_age: float) -> Number | None:
        now = self._clock()
        account.requested[phone_number] = now
        if now - account.numbers_at > max_age:
            # `max_age` is half the interval of drift checks: in 3 * max_age each channel requests its number once or
            # twice. What was not requested for that long belongs to no channel any more, and is not read in pages.
            account.requested = {each: at for each, at in account.requested.items() if now - at < 3 * self._max_age}
            if len(account.requested) < account.pages:
                return None
            await self._once(account, "numbers", lambda: self._read_numbers(account))
        return account.numbers.get(phone_number)

    async def routing(
        self, login: Login, account_sid: str, number_sid: str, *, max_age: float | None = None
    ) -> Routing:
        """Return whether a Messaging Service takes the number's messages, or in `Routing.unknown` why that is unknown.

        `max_age` lets the caller bypass the cache for entries older than that, in seconds; None is the cache's own
        limit. A read that is in flight already is shared whatever its age. Raises nothing of Twilio's.
        """
        if not _shows_services(login, account_sid):
            return _NOT_SHOWN
        limit = self._max_age if max_age is None else max_age
        return await self._routing(self._account(login, account_sid), number_sid, limit)

    async def _routing(self, account: _Account, number_sid: str, max_age: float) -> Routing:
        if self._clock() - account.routing_at > max_age:
            await self._once(account, "routing", lambda: self._read_routing(account))
        return Routing(service_sid=account.overriding.get(number_sid, ""), unknown=account.unknown)

    def snapshot(self, login: Login, account_sid: str, number: Number, routing: Routing) -> Snapshot:
        """Return what `age_if_unchanged` compares with what the account shows then."""
        return Snapshot(self._account(login, account_sid), number, routing)

    async def age_if_unchanged(self, snapshot: Snapshot) -> float | None:
        """Return how many seconds ago the account still showed this; None if it does not, or must be asked otherwise.

        Raises what `number_pages` raises.
        """
        account, max_age = snapshot.account, self._max_age * _CHECK_AGE
        if (number := await self._number(account, snapshot.number.phone_number, max_age)) != snapshot.number:
            return None
        assert number
        routing = _NOT_SHOWN
        if _shows_services(account.login, account.sid):
            routing = await self._routing(account, number.sid, max_age)
        if routing != snapshot.routing:
            return None
        snapshot.number, snapshot.routing = number, routing  # equal, and in memory once
        return self._clock() - account.numbers_at

    def _account(self, login: Login, account_sid: str) -> _Account:
        """Return the entry of one login at one account, a new one if need be.

        Entries that are not requested expire: their token was rotated, or the account's last channel deleted.
        """
        key = (login, account_sid)
        account = self._accounts[key] = self._accounts.get(key) or _Account(login, account_sid)
        return account

    async def _once(self, account: _Account, what: str, read: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for the read that is in flight, or start one. A caller that is cancelled does not cancel the read."""
        task = account.in_flight.get(what)
        if task is None:
            task = account.in_flight[what] = asyncio.ensure_future(read())
            # Fetching the exception keeps asyncio from logging it when every caller has been cancelled.
            task.add_done_callback(lambda done: (account.in_flight.pop(what), done.cancelled() or done.exception()))
        await asyncio.shield(task)

    async def _read_numbers(self, account: _Account) -> None:
        """Read pages, but no more than one beyond the numbers requested: then reading each number alone is cheaper."""
        self._accounts[account.login, account.sid] = account  # it is in use
        started, pages, numbers = self._clock(), 0, dict[str, Number]()
        async for page in self._twilio.number_pages(account.login, account.sid):
            pages += 1
            numbers.update((each.phone_number, each) for each in page if self._is_own_url(each.webhook.url))
            if pages > len(account.requested):
                break
        account.pages, account.numbers, account.numbers_at = pages, numbers, started

    async def _read_routing(self, account: _Account) -> None:
        """Read the services. A failure is kept for as long as a result: the next read is due at the same time."""
        started = self._clock()
        try:
            account.overriding, account.unknown = await self._twilio.overriding_services(account.login, account.sid), ""
        except Retryable as error:
            if account.routing_at == _NEVER:  # otherwise the last result is the better guess
                account.unknown = f"The account's Messaging Services cannot be read now: {error}"
        except ChannelError as error:
            account.overriding, account.unknown = {}, f"The account's Messaging Services cannot be read: {error}"
        account.routing_at = started


def _shows_services(login: Login, account_sid: str) -> bool:
    return not login.sid.startswith("AC") or login.sid == account_sid
