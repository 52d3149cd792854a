"""The port to Twilio against the twin, over real HTTP: pages, Messaging Services, and where a login is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from smschannel.api.errors import NotFound, Refused, TwilioThrottled, TwilioTimeout, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.core.plan import Number
from smschannel.core.record import Login, Webhook
from smschannel.twilio.client import TwilioClient
from smschannel.twilio.limits import Limiter
from tests.twin import DEMO_URL, Account, Action, Match
from tests.twin.sdk import Stage, open_stage, until


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage() as opened:
        yield opened


@pytest.fixture
async def port(stage: Stage) -> AsyncIterator[TwilioClient]:
    async with open_port(stage.url) as opened:
        yield opened


@asynccontextmanager
async def open_port(api: str, messaging: str | None = None, patience: float = 10) -> AsyncIterator[TwilioClient]:
    limiter = Limiter(concurrency=4, refusal_memory=60)
    async with TwilioClient(limiter, api_origin=api, messaging_origin=messaging or api, timeout=patience) as port:
        yield port


def login_of(account: Account) -> Login:
    return Login(sid=account.sid, token=SecretStr(account.auth_token))


async def pages(port: TwilioClient, login: Login, account_sid: str) -> list[list[Number]]:
    return [page async for page in port.number_pages(login, account_sid)]


# -- pages of numbers ----------------------------------------------------------------------------------------


async def test_an_account_of_a_page_is_read_with_one_call(stage: Stage, port: TwilioClient) -> None:
    [page] = await pages(port, login_of(stage.account), stage.account.sid)
    assert [each.phone_number for each in page] == [each.phone_number for each in stage.numbers]
    assert page[0] == Number(
        sid=stage.numbers[0].sid,
        phone_number=stage.numbers[0].phone_number,
        webhook=Webhook(url=DEMO_URL, method="POST"),
        application_sid="",
        receives_sms=True,
    )
    assert stage.twin.journal.counts == {"GET numbers": 1}


async def test_a_page_shows_what_a_look_at_the_number_shows(stage: Stage, port: TwilioClient) -> None:
    """Else a channel would be found well here and changed there, for ever."""
    login, sid = login_of(stage.account), stage.account.sid
    stage.numbers[0].change({"sms_url": "", "sms_method": "GET"}, stage.twin.now())
    stage.numbers[1].change({"sms_application_sid": "AP1", "sms_url": "https://a.example/#rc=2"}, stage.twin.now())
    stage.twin.add_number(stage.account, "+61400999999", sms=False)
    [page] = await pages(port, login, sid)
    for each in page:
        assert each == await port.find_number(login, sid, each.phone_number)
        assert each == await port.fetch_number(login, sid, each.sid)
    assert [each.receives_sms for each in page] == [True] * 7 + [False]


async def test_a_large_account_is_read_in_pages_of_a_thousand(port: TwilioClient, stage: Stage) -> None:
    """Twilio's links to further pages are relative to its own host, and the configured one is asked."""
    [account] = stage.twin.seed(accounts=1, numbers=2001)
    read = await pages(port, login_of(account), account.sid)
    assert [len(page) for page in read] == [1000, 1000, 1]
    assert {each.sid for page in read for each in page} == {each.sid for each in account.numbers}
    assert stage.twin.journal.counts == {"GET numbers": 3}


async def test_a_full_page_that_is_the_last_is_not_followed_by_an_empty_one(stage: Stage, port: TwilioClient) -> None:
    [account] = stage.twin.seed(accounts=1, numbers=1000)
    assert [len(page) for page in await pages(port, login_of(account), account.sid)] == [1000]
    assert stage.twin.journal.counts == {"GET numbers": 1}


async def test_an_account_without_numbers_is_an_empty_page(stage: Stage, port: TwilioClient) -> None:
    account = stage.twin.add_account()
    assert await pages(port, login_of(account), account.sid) == [[]]


async def test_a_parents_login_reads_its_subaccounts_pages(stage: Stage, port: TwilioClient) -> None:
    sub = stage.twin.add_account(parent=stage.account)
    stage.twin.add_number(sub, "+61400999999")
    [page] = await pages(port, login_of(stage.account), sub.sid)
    assert [each.phone_number for each in page] == ["+61400999999"]


async def test_an_account_out_of_reach_has_no_pages_as_it_has_no_numbers(stage: Stage, port: TwilioClient) -> None:
    """Twilio answers 404 for the whole account, as for a number; who then asks for the number learns the same."""
    [stranger] = stage.twin.seed(accounts=1, numbers=1)
    login = login_of(stage.account)
    assert await port.find_number(login, stranger.sid, next(iter(stranger.numbers)).phone_number) is None
    assert await pages(port, login, stranger.sid) == []


async def test_pages_are_read_one_call_at_a_time_with_room_for_others_between(stage: Stage) -> None:
    """A login's only place is free while nobody waits for the next page."""
    [account] = stage.twin.seed(accounts=1, numbers=1001)
    limiter = Limiter(concurrency=1, refusal_memory=60)
    async with TwilioClient(limiter, api_origin=stage.url, messaging_origin=stage.url, timeout=10) as port:
        reading = port.number_pages(login_of(account), account.sid)
        first = await anext(reading)
        async with asyncio.timeout(5):
            assert await port.fetch_number(login_of(account), account.sid, first[0].sid) == first[0]
        assert len(await anext(reading)) == 1


@pytest.mark.parametrize(
    ("action", "error", "reason"),
    [
        (Action(kind="status", status=503), TwilioUnavailable, "an outage"),
        (Action(kind="status", status=429, retry_after=7), TwilioThrottled, "a pause is asked for"),
        (Action(kind="html200"), TwilioUnavailable, "a proxy's page is no page of numbers"),
        (Action(kind="truncate"), TwilioUnavailable, "half of a page is none"),
        (Action(kind="reset"), TwilioUnavailable, "a connection that breaks"),
    ],
)
async def test_a_second_page_that_fails_is_an_error_not_the_end(
    stage: Stage, port: TwilioClient, action: Action, error: type[Exception], reason: str
) -> None:
    """Whoever took it for the end would think that the account has no more numbers."""
    [account] = stage.twin.seed(accounts=1, numbers=1001)
    stage.twin.faults.add(Match(nth=2), action)
    reading = port.number_pages(login_of(account), account.sid)
    assert len(await anext(reading)) == 1000
    with pytest.raises(error):
        await anext(reading)


# -- where a login is sent -----------------------------------------------------------------------------------


@asynccontextmanager
async def elsewhere() -> AsyncIterator[tuple[str, list[str]]]:
    """A server that is not Twilio: its origin, and the Authorization headers that reached it."""
    received: list[str] = []

    async def take(request: web.Request) -> web.Response:
        received.append(request.headers.get("Authorization", ""))
        return web.json_response({"incoming_phone_numbers": [], "meta": {"key": "services"}, "services": []})

    async with served(take) as origin:
        yield origin, received


@asynccontextmanager
async def served(handler: Any) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def answering(document: Mapping[str, Any]) -> AsyncIterator[tuple[TwilioClient, list[str]]]:
    """A Twilio whose first answer is `document`; a port to it, and the paths that it was asked for."""
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        empty = {"incoming_phone_numbers": [], "meta": {"key": "services"}, "services": []}
        return web.json_response(empty if len(asked) > 1 else document)

    async with served(handler) as origin, open_port(origin) as port:
        yield port, asked


LOGIN = Login(sid="AC1", token=SecretStr("token"))


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("{there}/2010-04-01/next", "another host"),
        ("https://api.twilio.com.evil.example/next", "a host that begins like Twilio's"),
        ("https://api.twilio.com@{host}/next", "Twilio's name as a user at another host"),
        ("https://api.twilio.com:8443/next", "another port"),
        ("http://api.twilio.com/next", "not encrypted"),
        ("//{host}/next", "whatever scheme"),
        ("/v1/Services?Page=1", "no host: the Messaging API's links are whole URLs"),
        ("https://api.twilio.com", "Twilio's host and no page"),
        ("HTTPS://API.TWILIO.COM/next", "not as Twilio writes it: refused is safe"),
    ],
)
async def test_a_link_to_elsewhere_is_not_followed(link: str, reason: str) -> None:
    """Messaging answers with whole URLs. Whoever could write one would be sent the account's token."""
    async with elsewhere() as (there, received):
        link = link.format(there=there, host=there.removeprefix("http://"))
        document = {"meta": {"key": "services", "next_page_url": link}, "services": []}
        async with answering(document) as (port, asked):
            with pytest.raises(TwilioUnavailable, match="not at Twilio"):
                await port.overriding_services(LOGIN, "AC1")
        assert len(asked) == 1
        assert received == [], reason


@pytest.mark.parametrize(
    "uri", ["//{host}/next", "@{host}/next", "http://{host}/next", "\\\\{host}/next", "..//{host}/"]
)
async def test_a_relative_link_stays_at_twilio_whatever_it_says(uri: str) -> None:
    """The API of 2010 answers with paths, to which Twilio's host is put in front."""
    async with elsewhere() as (there, received):
        document = {"incoming_phone_numbers": [], "next_page_uri": uri.format(host=there.removeprefix("http://"))}
        async with answering(document) as (port, asked):
            assert await pages(port, LOGIN, "AC1") == [[], []]
        assert len(asked) == 2
        assert received == []


async def test_a_link_to_the_configured_origin_or_to_twilios_own_is_followed(stage: Stage) -> None:
    """A proxy in front of Twilio passes Twilio's links on as they are; one that stands for it writes its own."""
    for link in ("https://messaging.twilio.com/v1/Services?Page=1", "{origin}/v1/Services?Page=1"):
        asked: list[str] = []

        async def handler(request: web.Request, link: str = link, asked: list[str] = asked) -> web.Response:
            asked.append(request.path_qs)
            following = link.format(origin=f"http://{request.host}") if len(asked) == 1 else None
            return web.json_response({"meta": {"key": "services", "next_page_url": following}, "services": []})

        async with served(handler) as messaging, open_port(stage.url, messaging) as port:
            assert await port.overriding_services(LOGIN, "AC1") == {}
        assert asked == ["/v1/Services?PageSize=1000", "/v1/Services?Page=1"]


async def test_a_redirect_is_not_followed() -> None:
    async with elsewhere() as (there, received):

        async def handler(_: web.Request) -> web.Response:
            raise web.HTTPTemporaryRedirect(there)

        async with served(handler) as origin, open_port(origin) as port:
            with pytest.raises(TwilioUnavailable):
                await pages(port, LOGIN, "AC1")
        assert received == []


async def test_each_api_has_its_own_origin(stage: Stage) -> None:
    async with elsewhere() as (there, received), open_port(stage.url, there) as port:
        login = login_of(stage.account)
        assert await pages(port, login, stage.account.sid)
        assert received == []
        assert await port.overriding_services(login, stage.account.sid) == {}
        assert len(received) == 1
    assert stage.twin.journal.counts == {"GET numbers": 1}


# -- Messaging Services --------------------------------------------------------------------------------------


async def test_who_is_answered_for_by_a_messaging_service(stage: Stage, port: TwilioClient) -> None:
    """A service takes its numbers' messages, unless it leaves them to the number's own webhook."""
    taken, left, dropped, alone = stage.numbers[:4]
    takes = stage.twin.add_service(stage.account, inbound_request_url="https://service.example/")
    leaves = stage.twin.add_service(
        stage.account, inbound_request_url="https://service.example/", use_inbound_webhook_on_number=True
    )
    drops = stage.twin.add_service(stage.account)
    for number, service in ((taken, takes), (left, leaves), (dropped, drops)):
        stage.twin.join_service(number, service)
    overriding = await port.overriding_services(login_of(stage.account), stage.account.sid)
    assert overriding == {taken.sid: takes.sid, dropped.sid: drops.sid}
    assert alone.sid not in overriding
    routes = {
        each.sid: (await stage.control("GET", f"/numbers/{each.sid}")).document["route"] for each in stage.numbers
    }
    assert all((each.sid in overriding) is (DEMO_URL not in str(routes[each.sid])) for each in stage.numbers), (
        "as the twin routes messages"
    )
    assert stage.twin.journal.counts == {"GET services": 1, "GET service_numbers": 2}, "none for who leaves them"


async def test_no_service_costs_one_call(stage: Stage, port: TwilioClient) -> None:
    assert await port.overriding_services(login_of(stage.account), stage.account.sid) == {}
    assert stage.twin.journal.counts == {"GET services": 1}


async def test_a_number_that_leaves_a_service_is_its_own_again(stage: Stage, port: TwilioClient) -> None:
    service, number = stage.twin.add_service(stage.account), stage.numbers[0]
    stage.twin.join_service(number, service)
    login, sid = login_of(stage.account), stage.account.sid
    assert await port.overriding_services(login, sid) == {number.sid: service.sid}
    service.use_inbound_webhook_on_number = True
    assert await port.overriding_services(login, sid) == {}
    service.use_inbound_webhook_on_number = False
    stage.twin.leave_service(number)
    assert await port.overriding_services(login, sid) == {}


async def test_many_services_and_many_numbers_come_in_pages(stage: Stage, port: TwilioClient) -> None:
    [account] = stage.twin.seed(accounts=1, numbers=1001)
    for _ in range(1000):
        stage.twin.add_service(account, use_inbound_webhook_on_number=True)
    service = stage.twin.add_service(account)
    for number in account.numbers:
        stage.twin.join_service(number, service)
    overriding = await port.overriding_services(login_of(account), account.sid)
    assert overriding == {number.sid: service.sid for number in account.numbers}
    assert stage.twin.journal.counts == {"GET services": 2, "GET service_numbers": 2}


async def test_services_of_another_account_say_nothing_of_this_one(stage: Stage, port: TwilioClient) -> None:
    """The Messaging API shows the services of who logs in: a parent's login would show the parent's."""
    sub = stage.twin.add_account(parent=stage.account)
    service = stage.twin.add_service(stage.account)
    stage.twin.join_service(stage.numbers[0], service)
    assert await port.overriding_services(login_of(stage.account), sub.sid) == {}
    assert stage.twin.journal.counts == {"GET services": 1}, "nor are their numbers read"


async def test_an_api_key_reads_its_accounts_services(stage: Stage, port: TwilioClient) -> None:
    key, service = stage.twin.add_key(stage.account), stage.twin.add_service(stage.account)
    stage.twin.join_service(stage.numbers[0], service)
    login = Login(sid=key.sid, token=SecretStr(key.secret))
    assert await port.overriding_services(login, stage.account.sid) == {stage.numbers[0].sid: service.sid}


async def test_one_accounts_services_that_hang_hold_up_no_others(stage: Stage, port: TwilioClient) -> None:
    """First readings of accounts that were never read before, such as all of them after a restart."""
    [other] = stage.twin.seed(accounts=1, numbers=1)
    fault = stage.twin.faults.add(Match(path="^/v1/", account=stage.account.sid), Action(kind="hang"))
    hanging = asyncio.ensure_future(port.overriding_services(login_of(stage.account), stage.account.sid))
    await until(lambda: fault.hit == 1)
    async with asyncio.timeout(5):
        assert await port.overriding_services(login_of(other), other.sid) == {}
    stage.twin.faults.clear()
    hanging.cancel()
    await asyncio.wait({hanging})


async def test_what_messaging_refuses_is_no_refusal_of_the_numbers(stage: Stage, port: TwilioClient) -> None:
    """A key may be restricted to one of the two; and asked anew, both are."""
    login, sid = login_of(stage.account), stage.account.sid
    fault = stage.twin.faults.add(Match(path="^/v1/"), Action(kind="status", status=401, code=20003))
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            await port.overriding_services(login, sid)
        assert refused.value.reason is Reason.AuthenticationFailed
    assert fault.hit == 1, "remembered"
    assert await pages(port, login, sid)
    stage.twin.faults.clear()
    port.forget_refusal(login, sid)
    assert await port.overriding_services(login, sid) == {}


# -- one number ----------------------------------------------------------------------------------------------


async def test_a_number_is_found_by_all_of_its_digits(stage: Stage, port: TwilioClient) -> None:
    """Twilio's filter matches parts."""
    login, sid = login_of(stage.account), stage.account.sid
    longer = stage.twin.add_number(stage.account, f"{stage.numbers[0].phone_number}0")
    for number in (stage.numbers[0], longer):
        found = await port.find_number(login, sid, number.phone_number)
        assert found
        assert found.sid == number.sid
    assert await port.find_number(login, sid, longer.phone_number[:-2]) is None


async def test_a_number_that_is_gone_is_none_to_look_at_and_an_error_to_set(stage: Stage, port: TwilioClient) -> None:
    login, sid, gone = login_of(stage.account), stage.account.sid, stage.numbers[0]
    stage.twin.release(gone)
    assert await port.find_number(login, sid, gone.phone_number) is None
    assert await port.fetch_number(login, sid, gone.sid) is None
    with pytest.raises(NotFound):
        await port.set_webhook(login, sid, gone.sid, Webhook(url="https://a.example/", method="POST"))


async def test_setting_a_webhook_sends_two_fields_and_returns_what_twilio_keeps(
    stage: Stage, port: TwilioClient
) -> None:
    number, webhook = stage.numbers[0], Webhook(url="https://a.example/#rc=2", method="GET")
    set_ = await port.set_webhook(login_of(stage.account), stage.account.sid, number.sid, webhook)
    assert set_.webhook == webhook
    assert stage.twin.journal.entries[-1].parameters == ("SmsMethod", "SmsUrl")
    cleared = Webhook(url="", method="POST")
    assert (await port.set_webhook(login_of(stage.account), stage.account.sid, number.sid, cleared)).webhook == cleared
    assert stage.twin.journal.violations == []


async def test_a_call_that_hangs_ends_with_the_time_out(stage: Stage) -> None:
    stage.twin.faults.add(Match(), Action(kind="hang"))
    async with open_port(stage.url, patience=0.2) as port, asyncio.timeout(5):
        with pytest.raises(TwilioTimeout, match="does not answer"):
            await port.find_number(login_of(stage.account), stage.account.sid, stage.numbers[0].phone_number)
