"""Test the account cache: which callers share a read, for how long, and how many calls it costs."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator

import pytest
from pydantic import SecretStr

from smschannel.api.errors import Refused, TwilioThrottled, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.core.plan import Number, Routing
from smschannel.core.record import Login, Webhook
from smschannel.twilio.account_cache import AccountCache
from tests.unit.virtual_time import now, virtually

ACCOUNT, ANOTHER = "AC1", "AC2"
MAX_AGE = 300.0
OWN = "https://own.example/"
LOGIN = Login(sid=ACCOUNT, token=SecretStr("right"))
GUESS = Login(sid=ACCOUNT, token=SecretStr("wrong"))
REFUSED = Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")
DOWN = TwilioUnavailable("Twilio does not answer.")


def number(phone_number: str, url: str = OWN) -> Number:
    webhook = Webhook(url=url, method="POST")
    return Number(
        sid=f"PN{phone_number}", phone_number=phone_number, webhook=webhook, application_sid="", receives_sms=True
    )


class Reader:
    """Accounts whose pages hold `page_size` numbers. A read takes `seconds` and ends with `error`, if any."""

    def __init__(self, count: int = 10, page_size: int = 1000) -> None:
        self.numbers = [number(f"+{index}") for index in range(count)]
        self.page_size = page_size
        self.services: dict[str, str] = {}
        self.seconds = 0.0
        self.error: Exception | None = None
        self.pages_read = 0
        self.services_read = 0

    def change(self, phone_number: str, url: str) -> None:
        self.numbers = [
            number(phone_number, url) if each.phone_number == phone_number else each for each in self.numbers
        ]

    async def number_pages(self, login: Login, account_sid: str) -> AsyncIterator[list[Number]]:
        numbers = self.numbers
        for start in range(0, max(1, len(numbers)), self.page_size):
            self.pages_read += 1
            await self._answer(login)
            yield numbers[start : start + self.page_size]

    async def overriding_services(self, login: Login, account_sid: str) -> dict[str, str]:
        self.services_read += 1
        services = dict(self.services)
        await self._answer(login)
        return services

    async def _answer(self, login: Login) -> None:
        error = REFUSED if login == GUESS else self.error
        await asyncio.sleep(self.seconds)
        if error:
            raise error


def new_cache(reader: Reader) -> AccountCache:
    return AccountCache(reader, is_own_url=OWN.__eq__, max_age=MAX_AGE, clock=now)


async def urls(cache: AccountCache, *phone_numbers: str, login: Login = LOGIN, account: str = ACCOUNT) -> list[str]:
    """Request numbers one after another. Return their URLs; "" for one that the caller must read itself."""
    found = [await cache.number(login, account, each) for each in phone_numbers]
    return [each.webhook.url if each else "" for each in found]


# Numbers


@virtually
async def test_concurrent_callers_share_one_page() -> None:
    reader = Reader(1000)
    reader.seconds = 1
    cache = new_cache(reader)
    found = await asyncio.gather(*(cache.number(LOGIN, ACCOUNT, each.phone_number) for each in reader.numbers))
    assert found == reader.numbers
    assert reader.pages_read == 1


@virtually
async def test_page_is_used_until_max_age_and_then_read_again() -> None:
    """The next read returns a change at Twilio."""
    reader = Reader()
    cache = new_cache(reader)
    assert await urls(cache, "+1") == [OWN]
    reader.change("+1", "https://theirs.example/")
    await asyncio.sleep(MAX_AGE)
    assert await urls(cache, "+1") == [OWN]
    await asyncio.sleep(0.001)
    assert await urls(cache, "+1") == [""], "the caller reads it itself"
    assert reader.pages_read == 2


@virtually
async def test_age_of_an_entry_counts_from_the_start_of_its_read() -> None:
    """A slow answer is old when it comes: it describes the time when Twilio received the request."""
    reader = Reader()
    reader.seconds = 200
    cache = new_cache(reader)
    await urls(cache, "+1")
    await asyncio.sleep(99)
    await urls(cache, "+1")
    assert reader.pages_read == 1
    await asyncio.sleep(2)
    await urls(cache, "+1")
    assert reader.pages_read == 2


@virtually
async def test_number_that_the_account_lacks_is_left_to_the_caller() -> None:
    """None never means that it is gone. Requesting it again reads nothing."""
    reader = Reader()
    cache = new_cache(reader)
    assert await urls(cache, "+1", "+404", "+404") == [OWN, "", ""]
    assert reader.pages_read == 1


@virtually
async def test_account_without_numbers_costs_one_page() -> None:
    reader = Reader(0)
    cache = new_cache(reader)
    assert await urls(cache, "+1", "+2") == ["", ""]
    assert reader.pages_read == 1


@virtually
async def test_pages_are_read_only_while_cheaper_than_single_numbers() -> None:
    """One channel in an account of twenty pages: after two pages it is clear that one call is cheaper."""
    reader = Reader(200, page_size=10)
    cache = new_cache(reader)
    assert await urls(cache, "+199") == [""]
    for _ in range(5):
        await asyncio.sleep(MAX_AGE + 1)
        assert await urls(cache, "+199") == [""]
    assert reader.pages_read == 2


@virtually
async def test_all_pages_are_read_once_enough_numbers_are_requested() -> None:
    """Each read goes further, until as many numbers are requested as the account has pages."""
    reader = Reader(50, page_size=10)
    cache = new_cache(reader)
    requested = [f"+{index}" for index in range(0, 50, 10)]
    await urls(cache, *requested)
    await asyncio.sleep(MAX_AGE + 1)
    before = reader.pages_read
    assert await urls(cache, *requested) == [OWN] * 5
    assert reader.pages_read - before == 5
    assert await urls(cache, *requested) == [OWN] * 5
    assert reader.pages_read - before == 5


@virtually
async def test_numbers_that_are_not_requested_any_more_cause_no_page_reads() -> None:
    """Twenty channels, of which nineteen are deleted: their account's twenty pages are too many for the last one."""
    reader = Reader(200, page_size=10)
    cache = new_cache(reader)
    for _ in range(2):
        await urls(cache, *(f"+{index}" for index in range(0, 200, 10)))
        await asyncio.sleep(MAX_AGE + 1)
    before = reader.pages_read
    for _ in range(6):
        await urls(cache, "+0")
        await asyncio.sleep(MAX_AGE + 1)
    assert reader.pages_read - before <= 3 * 20, "for 3 * max_age they may still be requested"
    before = reader.pages_read
    for _ in range(6):
        assert await urls(cache, "+0") == [""]
        await asyncio.sleep(MAX_AGE + 1)
    assert reader.pages_read == before


@virtually
async def test_first_request_for_a_number_uses_the_page_that_was_read() -> None:
    """After a restart the first requests of an account's channels are spread over a whole drift interval. The page that
    the first of them read contains the numbers of all.
    """
    reader = Reader(1000)
    cache = new_cache(reader)
    for each in reader.numbers:
        assert await urls(cache, each.phone_number) == [OWN]
        await asyncio.sleep(2 * MAX_AGE / 1000)
    assert reader.pages_read == 2


@virtually
async def test_check_learns_how_old_is_what_it_saw() -> None:
    """So that the next one comes an interval after the read, with those of the other channels."""
    reader = Reader()
    cache = new_cache(reader)
    snapshot = cache.snapshot(LOGIN, ACCOUNT, reader.numbers[1], Routing())
    assert await cache.age_if_unchanged(snapshot) == 0
    await asyncio.sleep(100)
    assert await cache.age_if_unchanged(snapshot) == 100


# Sharing


@virtually
async def test_logins_and_accounts_have_entries_of_their_own() -> None:
    """A wrong token for the account must neither get the right one's result, nor replace it by an error."""
    reader = Reader()
    cache = new_cache(reader)
    await urls(cache, "+1")
    with pytest.raises(Refused):
        await urls(cache, "+1", login=GUESS)
    assert await urls(cache, "+1") == [OWN]
    assert reader.pages_read == 2
    await urls(cache, "+1", account=ANOTHER)
    assert reader.pages_read == 3


@virtually
async def test_hanging_account_does_not_delay_another() -> None:
    reader = Reader()
    reader.seconds = 15
    cache = new_cache(reader)
    hanging = asyncio.ensure_future(urls(cache, "+1"))
    await asyncio.sleep(0)
    reader.seconds = 1
    assert await urls(cache, "+1", account=ANOTHER)
    assert now() == 1
    await hanging


@virtually
async def test_error_is_shared_by_the_callers_that_waited_only() -> None:
    """The next caller reads again, and an entry that was read before the error stays in use."""
    reader = Reader()
    reader.seconds, reader.error = 1, TwilioThrottled("429", 7)
    cache = new_cache(reader)
    ended = await asyncio.gather(*(urls(cache, f"+{each}") for each in range(5)), return_exceptions=True)
    assert [getattr(each, "retry_after", None) for each in ended] == [7] * 5
    assert reader.pages_read == 1
    reader.error = None
    assert await urls(cache, "+1") == [OWN]
    reader.error = DOWN
    assert await urls(cache, "+1") == [OWN], "nothing is read"
    await asyncio.sleep(MAX_AGE + 1)
    with pytest.raises(TwilioUnavailable):
        await urls(cache, "+1")


@virtually
async def test_error_on_a_later_page_changes_nothing() -> None:
    """Half of an account must not be taken for all of it."""
    reader = Reader(20, page_size=10)
    cache = new_cache(reader)
    await urls(cache, "+1", "+2")
    reader.change("+1", "https://theirs.example/")
    await asyncio.sleep(MAX_AGE + 1)
    pages = reader.number_pages

    async def broken(login: Login, account_sid: str) -> AsyncIterator[list[Number]]:
        async for page in pages(login, account_sid):
            yield page
            raise DOWN

    reader.number_pages = broken  # type: ignore[method-assign]
    with pytest.raises(TwilioUnavailable):
        await urls(cache, "+1")
    reader.number_pages = pages  # type: ignore[method-assign]
    assert await urls(cache, "+1") == [""], "it is read again, not taken from the broken read"


@virtually
async def test_cancelled_caller_does_not_cancel_the_read() -> None:
    """Not even the caller that started it: others may be waiting."""
    reader = Reader()
    reader.seconds = 2
    cache = new_cache(reader)
    first, second, third = (asyncio.ensure_future(urls(cache, f"+{each}")) for each in range(3))
    await asyncio.sleep(1)
    first.cancel()
    second.cancel()
    assert await third == [OWN]
    assert now() == 2
    assert await urls(cache, "+1") == [OWN]
    assert reader.pages_read == 1


@virtually
async def test_error_without_a_waiting_caller_is_not_logged() -> None:
    """Otherwise asyncio logs "exception was never retrieved", with the exception."""
    logged: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    reader = Reader()
    reader.seconds, reader.error = 2, DOWN
    cache = new_cache(reader)
    only = asyncio.ensure_future(urls(cache, "+1"))
    await asyncio.sleep(1)
    only.cancel()
    await asyncio.sleep(2)
    gc.collect()
    assert logged == []


@virtually
async def test_entry_that_is_not_requested_any_more_expires() -> None:
    """Each rotated token leaves an entry behind: a token, and up to a thousand numbers per page."""
    reader = Reader()
    cache = new_cache(reader)
    await urls(cache, "+1")
    shown = weakref.ref(reader.numbers[1])
    del reader.numbers[1]
    gc.collect()
    assert shown(), "it is cached for now"
    await asyncio.sleep(10 * MAX_AGE)
    await urls(cache, "+1", account=ANOTHER)
    gc.collect()
    assert not shown()


# Routing


@virtually
async def test_one_read_of_the_services_serves_all_numbers_of_the_account() -> None:
    reader = Reader()
    reader.seconds, reader.services = 1, {"PN+1": "MG1"}
    cache = new_cache(reader)
    found = await asyncio.gather(*(cache.routing(LOGIN, ACCOUNT, each) for each in ("PN+1", "PN+2", "PN+3")))
    assert found == [Routing(service_sid="MG1"), Routing(), Routing()]
    assert reader.services_read == 1


@virtually
async def test_services_are_read_again_if_older_than_the_callers_max_age() -> None:
    """A drift check accepts an old entry, a check that a user requests bypasses it."""
    reader = Reader()
    cache = new_cache(reader)
    assert await cache.routing(LOGIN, ACCOUNT, "PN+1") == Routing()
    reader.services = {"PN+1": "MG1"}
    await asyncio.sleep(6)
    assert await cache.routing(LOGIN, ACCOUNT, "PN+1") == Routing()
    assert await cache.routing(LOGIN, ACCOUNT, "PN+1", max_age=5) == Routing(service_sid="MG1")
    reader.services = {}
    await asyncio.sleep(MAX_AGE)
    assert await cache.routing(LOGIN, ACCOUNT, "PN+1") == Routing(service_sid="MG1")
    await asyncio.sleep(1)
    assert await cache.routing(LOGIN, ACCOUNT, "PN+1") == Routing()


@virtually
async def test_services_are_not_read_with_another_accounts_login() -> None:
    """The Messaging API has no account in its paths: to the parent account it shows the parent's services."""
    reader = Reader()
    routing = await new_cache(reader).routing(Login(sid="AC0", token=SecretStr("parent")), ACCOUNT, "PN+1")
    assert "another account's" in routing.unknown
    assert reader.services_read == 0


@virtually
async def test_api_key_reads_the_services_of_its_account() -> None:
    reader = Reader()
    reader.services = {"PN+1": "MG1"}
    key = Login(sid="SK1", token=SecretStr("secret"))
    assert await new_cache(reader).routing(key, ACCOUNT, "PN+1") == Routing(service_sid="MG1")


@virtually
async def test_services_that_cannot_be_read_are_unknown_until_max_age() -> None:
    """Reported in the condition, never raised; the next read is due when it would be after a success."""
    reader = Reader()
    reader.error = DOWN
    cache = new_cache(reader)
    for _ in range(3):
        assert "does not answer" in (await cache.routing(LOGIN, ACCOUNT, "PN+1")).unknown
    assert reader.services_read == 1
    reader.error, reader.services = None, {"PN+1": "MG1"}
    await asyncio.sleep(MAX_AGE + 1)
    assert await cache.routing(LOGIN, ACCOUNT, "PN+1") == Routing(service_sid="MG1")


@virtually
async def test_retryable_failure_keeps_the_last_result() -> None:
    """During a short outage of Twilio the number's service has hardly changed."""
    reader = Reader()
    reader.services = {"PN+1": "MG1"}
    cache = new_cache(reader)
    await cache.routing(LOGIN, ACCOUNT, "PN+1")
    reader.error = DOWN
    await asyncio.sleep(MAX_AGE + 1)
    assert await cache.routing(LOGIN, ACCOUNT, "PN+1") == Routing(service_sid="MG1")


@virtually
async def test_refusal_discards_the_last_result() -> None:
    """Credentials that may not read the services any more do not show what has become of them."""
    reader = Reader()
    reader.services = {"PN+1": "MG1"}
    cache = new_cache(reader)
    await cache.routing(LOGIN, ACCOUNT, "PN+1")
    reader.error = REFUSED
    await asyncio.sleep(MAX_AGE + 1)
    routing = await cache.routing(LOGIN, ACCOUNT, "PN+1")
    assert routing.service_sid == ""
    assert "refuses the credentials" in routing.unknown


@virtually
async def test_numbers_and_services_are_read_concurrently() -> None:
    reader = Reader()
    reader.seconds = 1
    cache = new_cache(reader)
    await asyncio.gather(cache.number(LOGIN, ACCOUNT, "+1"), cache.routing(LOGIN, ACCOUNT, "PN+1"))
    assert now() == 1
