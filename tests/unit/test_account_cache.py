"""What a Twilio account holds, read once for all its channels: who shares a reading, how long, and what it costs."""

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
OURS = "https://ours.example/"
LOGIN = Login(sid=ACCOUNT, token=SecretStr("right"))
STRANGER = Login(sid=ACCOUNT, token=SecretStr("wrong"))
REFUSED = Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")
DOWN = TwilioUnavailable("Twilio does not answer.")


def number(phone_number: str, url: str = OURS) -> Number:
    webhook = Webhook(url=url, method="POST")
    return Number(
        sid=f"PN{phone_number}", phone_number=phone_number, webhook=webhook, application_sid="", receives_sms=True
    )


class Reader:
    """Accounts whose pages hold `page_size` numbers; a page or the services take `seconds`, or end with `error`."""

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
        error = REFUSED if login == STRANGER else self.error
        await asyncio.sleep(self.seconds)
        if error:
            raise error


def inventory(reader: Reader) -> AccountCache:
    return AccountCache(reader, ours=OURS.__eq__, max_age=MAX_AGE, clock=now)


async def ask(known: AccountCache, *phone_numbers: str, login: Login = LOGIN, account: str = ACCOUNT) -> list[str]:
    """The URLs of the numbers, asked for one after another; "" where one must be looked at alone."""
    found = [await known.number(login, account, each) for each in phone_numbers]
    return [each.webhook.url if each else "" for each in found]


# Numbers


@virtually
async def test_one_page_answers_for_all_who_ask_at_once() -> None:
    reader = Reader(1000)
    reader.seconds = 1
    known = inventory(reader)
    found = await asyncio.gather(*(known.number(LOGIN, ACCOUNT, each.phone_number) for each in reader.numbers))
    assert found == reader.numbers
    assert reader.pages_read == 1


@virtually
async def test_a_page_answers_for_a_while_and_then_is_read_again() -> None:
    """What changes at Twilio is seen at the next reading."""
    reader = Reader()
    known = inventory(reader)
    assert await ask(known, "+1") == [OURS]
    reader.change("+1", "https://theirs.example/")
    await asyncio.sleep(MAX_AGE)
    assert await ask(known, "+1") == [OURS]
    await asyncio.sleep(0.001)
    assert await ask(known, "+1") == [""], "it is looked at alone"
    assert reader.pages_read == 2


@virtually
async def test_a_reading_is_as_old_as_its_beginning() -> None:
    """A slow answer is old when it comes: the age is of what Twilio looked at."""
    reader = Reader()
    reader.seconds = 200
    known = inventory(reader)
    await ask(known, "+1")
    await asyncio.sleep(99)
    await ask(known, "+1")
    assert reader.pages_read == 1
    await asyncio.sleep(2)
    await ask(known, "+1")
    assert reader.pages_read == 2


@virtually
async def test_a_number_that_the_account_lacks_is_looked_at_alone() -> None:
    """None never means that it is gone; and asking for it again reads nothing again."""
    reader = Reader()
    known = inventory(reader)
    assert await ask(known, "+1", "+404", "+404") == [OURS, "", ""]
    assert reader.pages_read == 1


@virtually
async def test_an_account_without_numbers_is_one_page() -> None:
    reader = Reader(0)
    known = inventory(reader)
    assert await ask(known, "+1", "+2") == ["", ""]
    assert reader.pages_read == 1


@virtually
async def test_pages_are_read_no_further_than_looking_at_each_number_would_cost() -> None:
    """One channel in an account of twenty pages: two tell that it is cheaper alone, and that is remembered."""
    reader = Reader(200, page_size=10)
    known = inventory(reader)
    assert await ask(known, "+199") == [""]
    for _ in range(5):
        await asyncio.sleep(MAX_AGE + 1)
        assert await ask(known, "+199") == [""]
    assert reader.pages_read == 2


@virtually
async def test_pages_are_read_once_enough_numbers_are_asked_for() -> None:
    """The account turns out longer with each reading, until all of it is read for as many numbers as it has pages."""
    reader = Reader(50, page_size=10)
    known = inventory(reader)
    wanted = [f"+{index}" for index in range(0, 50, 10)]
    await ask(known, *wanted)
    await asyncio.sleep(MAX_AGE + 1)
    before = reader.pages_read
    assert await ask(known, *wanted) == [OURS] * 5
    assert reader.pages_read - before == 5
    assert await ask(known, *wanted) == [OURS] * 5
    assert reader.pages_read - before == 5


@virtually
async def test_numbers_that_nobody_asks_for_any_more_pay_for_no_pages() -> None:
    """Twenty channels, of which nineteen are deleted: their account's twenty pages are too many for the last one."""
    reader = Reader(200, page_size=10)
    known = inventory(reader)
    for _ in range(2):
        await ask(known, *(f"+{index}" for index in range(0, 200, 10)))
        await asyncio.sleep(MAX_AGE + 1)
    before = reader.pages_read
    for _ in range(6):
        await ask(known, "+0")
        await asyncio.sleep(MAX_AGE + 1)
    assert reader.pages_read - before <= 3 * 20, "for three times as long as a reading counts they may still come"
    before = reader.pages_read
    for _ in range(6):
        assert await ask(known, "+0") == [""]
        await asyncio.sleep(MAX_AGE + 1)
    assert reader.pages_read == before


@virtually
async def test_channels_that_were_not_there_yet_find_their_numbers_on_the_page() -> None:
    """After a restart each channel asks for the first time, at a time of its own, over a whole drift interval: one by
    one they would cost a call each. The page has shown their numbers already.
    """
    reader = Reader(1000)
    known = inventory(reader)
    for each in reader.numbers:
        assert await ask(known, each.phone_number) == [OURS]
        await asyncio.sleep(2 * MAX_AGE / 1000)
    assert reader.pages_read == 2


# Who shares what


@virtually
async def test_logins_and_accounts_share_nothing() -> None:
    """A wrong token for the account must neither see what the right one was shown nor spoil it."""
    reader = Reader()
    known = inventory(reader)
    await ask(known, "+1")
    with pytest.raises(Refused):
        await ask(known, "+1", login=STRANGER)
    assert await ask(known, "+1") == [OURS]
    assert reader.pages_read == 2
    await ask(known, "+1", account=ANOTHER)
    assert reader.pages_read == 3


@virtually
async def test_an_account_that_hangs_holds_up_no_other() -> None:
    reader = Reader()
    reader.seconds = 15
    known = inventory(reader)
    hanging = asyncio.ensure_future(ask(known, "+1"))
    await asyncio.sleep(0)
    reader.seconds = 1
    assert await ask(known, "+1", account=ANOTHER)
    assert now() == 1
    await hanging


@virtually
async def test_an_error_is_shared_by_all_who_waited_and_by_nobody_else() -> None:
    """The next to ask has another try, and what was read before the error still counts for its time."""
    reader = Reader()
    reader.seconds, reader.error = 1, TwilioThrottled("429", 7)
    known = inventory(reader)
    ended = await asyncio.gather(*(ask(known, f"+{each}") for each in range(5)), return_exceptions=True)
    assert [getattr(each, "retry_after", None) for each in ended] == [7] * 5
    assert reader.pages_read == 1
    reader.error = None
    assert await ask(known, "+1") == [OURS]
    reader.error = DOWN
    assert await ask(known, "+1") == [OURS], "nothing is read"
    await asyncio.sleep(MAX_AGE + 1)
    with pytest.raises(TwilioUnavailable):
        await ask(known, "+1")


@virtually
async def test_an_error_on_a_later_page_leaves_what_was_known() -> None:
    """Half an account must not be taken for the whole."""
    reader = Reader(20, page_size=10)
    known = inventory(reader)
    await ask(known, "+1", "+2")
    reader.change("+1", "https://theirs.example/")
    await asyncio.sleep(MAX_AGE + 1)
    pages = reader.number_pages

    async def broken(login: Login, account_sid: str) -> AsyncIterator[list[Number]]:
        async for page in pages(login, account_sid):
            yield page
            raise DOWN

    reader.number_pages = broken  # type: ignore[method-assign]
    with pytest.raises(TwilioUnavailable):
        await ask(known, "+1")
    reader.number_pages = pages  # type: ignore[method-assign]
    assert await ask(known, "+1") == [""], "it is read again, not taken from the broken reading"


@virtually
async def test_who_gives_up_takes_the_reading_from_nobody() -> None:
    """Also the one who began it: a turn that ends with the operator's shutdown, or a caller with a time-out."""
    reader = Reader()
    reader.seconds = 2
    known = inventory(reader)
    first, second, third = (asyncio.ensure_future(ask(known, f"+{each}")) for each in range(3))
    await asyncio.sleep(1)
    first.cancel()
    second.cancel()
    assert await third == [OURS]
    assert now() == 2
    assert await ask(known, "+1") == [OURS]
    assert reader.pages_read == 1


@virtually
async def test_an_error_that_nobody_waits_for_any_more_is_not_complained_about() -> None:
    """Else asyncio logs "exception was never retrieved", with the exception in it."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    reader = Reader()
    reader.seconds, reader.error = 2, DOWN
    known = inventory(reader)
    only = asyncio.ensure_future(ask(known, "+1"))
    await asyncio.sleep(1)
    only.cancel()
    await asyncio.sleep(2)
    gc.collect()
    assert complaints == []


@virtually
async def test_what_nobody_asks_for_any_more_is_forgotten() -> None:
    """Each rotated token leaves what it was shown behind: a token, and up to a thousand numbers a page."""
    reader = Reader()
    known = inventory(reader)
    await ask(known, "+1")
    shown = weakref.ref(reader.numbers[1])
    del reader.numbers[1]
    gc.collect()
    assert shown(), "it is remembered for now"
    await asyncio.sleep(10 * MAX_AGE)
    await ask(known, "+1", account=ANOTHER)
    gc.collect()
    assert not shown()


# Routing


@virtually
async def test_one_reading_of_the_services_answers_for_all_the_accounts_numbers() -> None:
    reader = Reader()
    reader.seconds, reader.services = 1, {"PN+1": "MG1"}
    known = inventory(reader)
    found = await asyncio.gather(*(known.routing(LOGIN, ACCOUNT, each) for each in ("PN+1", "PN+2", "PN+3")))
    assert found == [Routing(service_sid="MG1"), Routing(), Routing()]
    assert reader.services_read == 1


@virtually
async def test_services_are_read_again_when_the_reading_is_older_than_asked_for() -> None:
    """A check asks for what is not too old, a person for what is as good as new."""
    reader = Reader()
    known = inventory(reader)
    assert await known.routing(LOGIN, ACCOUNT, "PN+1") == Routing()
    reader.services = {"PN+1": "MG1"}
    await asyncio.sleep(6)
    assert await known.routing(LOGIN, ACCOUNT, "PN+1") == Routing()
    assert await known.routing(LOGIN, ACCOUNT, "PN+1", max_age=5) == Routing(service_sid="MG1")
    reader.services = {}
    await asyncio.sleep(MAX_AGE)
    assert await known.routing(LOGIN, ACCOUNT, "PN+1") == Routing(service_sid="MG1")
    await asyncio.sleep(1)
    assert await known.routing(LOGIN, ACCOUNT, "PN+1") == Routing()


@virtually
async def test_another_accounts_login_is_not_tried_at_the_services() -> None:
    """The Messaging API has no account in its paths: a parent's login would be shown the parent's services."""
    reader = Reader()
    routing = await inventory(reader).routing(Login(sid="AC0", token=SecretStr("parent")), ACCOUNT, "PN+1")
    assert "another account's" in routing.unknown
    assert reader.services_read == 0


@virtually
async def test_an_api_key_is_its_accounts_login() -> None:
    reader = Reader()
    reader.services = {"PN+1": "MG1"}
    key = Login(sid="SK1", token=SecretStr("secret"))
    assert await inventory(reader).routing(key, ACCOUNT, "PN+1") == Routing(service_sid="MG1")


@virtually
async def test_services_that_cannot_be_read_are_unknown_for_a_while_and_hold_up_nobody() -> None:
    """Told in the condition, never raised; the next reading is due when one that went well would be."""
    reader = Reader()
    reader.error = DOWN
    known = inventory(reader)
    for _ in range(3):
        assert "does not answer" in (await known.routing(LOGIN, ACCOUNT, "PN+1")).unknown
    assert reader.services_read == 1
    reader.error, reader.services = None, {"PN+1": "MG1"}
    await asyncio.sleep(MAX_AGE + 1)
    assert await known.routing(LOGIN, ACCOUNT, "PN+1") == Routing(service_sid="MG1")


@virtually
async def test_a_failure_leaves_what_was_seen_last() -> None:
    """Twilio is down for a moment: the number's service has hardly changed meanwhile."""
    reader = Reader()
    reader.services = {"PN+1": "MG1"}
    known = inventory(reader)
    await known.routing(LOGIN, ACCOUNT, "PN+1")
    reader.error = DOWN
    await asyncio.sleep(MAX_AGE + 1)
    assert await known.routing(LOGIN, ACCOUNT, "PN+1") == Routing(service_sid="MG1")


@virtually
async def test_a_refusal_takes_back_what_was_seen_last() -> None:
    """Who may not read the services any more does not know what has become of them."""
    reader = Reader()
    reader.services = {"PN+1": "MG1"}
    known = inventory(reader)
    await known.routing(LOGIN, ACCOUNT, "PN+1")
    reader.error = REFUSED
    await asyncio.sleep(MAX_AGE + 1)
    routing = await known.routing(LOGIN, ACCOUNT, "PN+1")
    assert routing.service_sid == ""
    assert "refuses the credentials" in routing.unknown


@virtually
async def test_numbers_and_services_are_read_side_by_side() -> None:
    reader = Reader()
    reader.seconds = 1
    known = inventory(reader)
    await asyncio.gather(known.number(LOGIN, ACCOUNT, "+1"), known.routing(LOGIN, ACCOUNT, "PN+1"))
    assert now() == 1
