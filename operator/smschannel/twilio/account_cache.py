"""What a Twilio account holds, read once for all its channels: its numbers in pages, and who overrides their webhooks.

There is one reader for each login at each account. What it found is good for `max_age` seconds: enough to confirm
that nothing changed, never enough to act upon. So only numbers that point at us are kept: those of channels that will
ask for the first time too. Whoever finds nothing here looks at the number itself.
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


class Reader(Protocol):
    def number_pages(self, login: Login, account_sid: str) -> AsyncIterator[list[Number]]: ...
    async def overriding_services(self, login: Login, account_sid: str) -> dict[str, str]: ...


@dataclass
class _Account:
    """What one login was shown of one account."""

    asked: dict[str, float] = field(default_factory=dict)  # numbers that are asked for, and when they last were
    pages: int = 0  # at least as many does the account have
    numbers: dict[str, Number] = field(default_factory=dict)
    numbers_at: float = _NEVER
    overriding: dict[str, str] = field(default_factory=dict)
    unknown: str = ""
    routing_at: float = _NEVER
    reading: dict[str, asyncio.Task[None]] = field(default_factory=dict)


class AccountCache:
    """For one event loop; times are seconds of `clock`. `ours` tells whether a webhook's URL is this operator's."""

    def __init__(
        self,
        twilio: Reader,
        *,
        ours: Callable[[str], bool],
        max_age: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._twilio = twilio
        self._ours = ours
        self._max_age = max_age
        self._clock = clock
        self._accounts: TTLCache[tuple[Login, str], _Account] = TTLCache(_REMEMBERED, 3 * max_age, timer=clock)

    async def number(self, login: Login, account_sid: str, phone_number: str) -> Number | None:
        """The number as it was at most `max_age` ago. None where it was not seen to point at us, or is cheaper to read
        alone.

        Raises what reading the account's pages raises.
        """
        account, now = self._account(login, account_sid), self._clock()
        account.asked[phone_number] = now
        if now - account.numbers_at > self._max_age:
            # Each channel asks about twice in three times `max_age`, which is half the interval of drift checks.
            account.asked = {each: at for each, at in account.asked.items() if now - at < 3 * self._max_age}
            if len(account.asked) < account.pages:
                return None
            await self._once(account, "numbers", lambda: self._read_numbers(account, login, account_sid))
        return account.numbers.get(phone_number)

    async def routing(
        self, login: Login, account_sid: str, number_sid: str, *, max_age: float | None = None
    ) -> Routing:
        """Who answers for the number. What cannot be read is told as `unknown`, never raised."""
        if login.sid.startswith("AC") and login.sid != account_sid:
            return Routing(
                unknown="The credentials are another account's, which do not show this account's Messaging Services."
            )
        account = self._account(login, account_sid)
        if self._clock() - account.routing_at > (self._max_age if max_age is None else max_age):
            await self._once(account, "routing", lambda: self._read_routing(account, login, account_sid))
        return Routing(service_sid=account.overriding.get(number_sid, ""), unknown=account.unknown)

    def _account(self, login: Login, account_sid: str) -> _Account:
        """Forgotten when nobody asks for long: a token was rotated, or the last channel is gone."""
        door = (login, account_sid)
        account = self._accounts[door] = self._accounts.get(door) or _Account()
        return account

    async def _once(self, account: _Account, what: str, read: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """All who ask while a reading is under way share it, and its error."""
        reading = account.reading.get(what)
        if reading is None:
            reading = account.reading[what] = asyncio.ensure_future(read())
            reading.add_done_callback(lambda done: (account.reading.pop(what), done.cancelled() or done.exception()))
        await asyncio.shield(reading)

    async def _read_numbers(self, account: _Account, login: Login, account_sid: str) -> None:
        """At most as many pages as numbers are asked for: beyond that, each alone is cheaper."""
        started, pages, numbers = self._clock(), 0, dict[str, Number]()
        async for page in self._twilio.number_pages(login, account_sid):
            pages += 1
            numbers.update((each.phone_number, each) for each in page if self._ours(each.webhook.url))
            if pages > len(account.asked):
                break
        account.pages, account.numbers, account.numbers_at = pages, numbers, started

    async def _read_routing(self, account: _Account, login: Login, account_sid: str) -> None:
        try:
            account.overriding, account.unknown = await self._twilio.overriding_services(login, account_sid), ""
        except Retryable as error:
            if account.routing_at == _NEVER:  # else what was seen last is the better guess
                account.unknown = f"The account's Messaging Services cannot be read now: {error}"
        except ChannelError as error:
            account.overriding, account.unknown = {}, f"The account's Messaging Services cannot be read: {error}"
        account.routing_at = self._clock()
