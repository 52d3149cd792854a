"""Test the Twilio client against the twin over real HTTP: pages, Messaging Services, where credentials are sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from smschannel.api.errors import LeaseEndsSoon, NotFound, Refused, TwilioThrottled, TwilioTimeout, TwilioUnavailable
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
async def client(stage: Stage) -> AsyncIterator[TwilioClient]:
    async with open_client(stage.url) as opened:
        yield opened


@asynccontextmanager
async def open_client(
    api: str, messaging: str | None = None, seconds: float = 10, lease: float = 1e9
) -> AsyncIterator[TwilioClient]:
    limiter = Limiter(concurrency=4, refusal_memory=60)
    async with TwilioClient(
        limiter,
        api_origin=api,
        messaging_origin=messaging or api,
        timeout=seconds,
        lease_outlasts=lambda asked: asked < lease,
    ) as client:
        yield client


def login_of(account: Account) -> Login:
    return Login(sid=account.sid, token=SecretStr(account.auth_token))


async def pages(client: TwilioClient, login: Login, account_sid: str) -> list[list[Number]]:
    return [page async for page in client.number_pages(login, account_sid)]


# -- pages of numbers ----------------------------------------------------------------------------------------


async def test_account_of_one_page_is_read_with_one_call(stage: Stage, client: TwilioClient) -> None:
    [page] = await pages(client, login_of(stage.account), stage.account.sid)
    assert [each.phone_number for each in page] == [each.phone_number for each in stage.numbers]
    assert page[0] == Number(
        sid=stage.numbers[0].sid,
        phone_number=stage.numbers[0].phone_number,
        webhook=Webhook(url=DEMO_URL, method="POST"),
        application_sid="",
        receives_sms=True,
    )
    assert stage.twin.journal.counts == {"GET numbers": 1}


async def test_page_shows_numbers_as_single_reads_do(stage: Stage, client: TwilioClient) -> None:
    """Otherwise a channel would be found unchanged by one and changed by the other, over and over."""
    login, sid = login_of(stage.account), stage.account.sid
    stage.numbers[0].change({"sms_url": "", "sms_method": "GET"}, stage.twin.now())
    stage.numbers[1].change({"sms_application_sid": "AP1", "sms_url": "https://a.example/#rc=2"}, stage.twin.now())
    stage.twin.add_number(stage.account, "+61400999999", sms=False)
    [page] = await pages(client, login, sid)
    for each in page:
        assert each == await client.find_number(login, sid, each.phone_number)
        assert each == await client.fetch_number(login, sid, each.sid)
    assert [each.receives_sms for each in page] == [True] * 7 + [False]


async def test_large_account_is_read_in_pages_of_a_thousand(client: TwilioClient, stage: Stage) -> None:
    """Twilio's links to further pages are relative to its own host; the client calls the configured one."""
    [account] = stage.twin.seed(accounts=1, numbers=2001)
    read = await pages(client, login_of(account), account.sid)
    assert [len(page) for page in read] == [1000, 1000, 1]
    assert {each.sid for page in read for each in page} == {each.sid for each in account.numbers}
    assert stage.twin.journal.counts == {"GET numbers": 3}


async def test_full_last_page_is_not_followed_by_an_empty_one(stage: Stage, client: TwilioClient) -> None:
    [account] = stage.twin.seed(accounts=1, numbers=1000)
    assert [len(page) for page in await pages(client, login_of(account), account.sid)] == [1000]
    assert stage.twin.journal.counts == {"GET numbers": 1}


async def test_account_without_numbers_is_one_empty_page(stage: Stage, client: TwilioClient) -> None:
    account = stage.twin.add_account()
    assert await pages(client, login_of(account), account.sid) == [[]]


async def test_parent_account_reads_pages_of_its_subaccount(stage: Stage, client: TwilioClient) -> None:
    sub = stage.twin.add_account(parent=stage.account)
    stage.twin.add_number(sub, "+61400999999")
    [page] = await pages(client, login_of(stage.account), sub.sid)
    assert [each.phone_number for each in page] == ["+61400999999"]


async def test_account_that_the_login_cannot_see_has_no_pages(stage: Stage, client: TwilioClient) -> None:
    """Twilio answers 404 for the whole account, as for a number: a single read finds nothing either."""
    [other] = stage.twin.seed(accounts=1, numbers=1)
    login = login_of(stage.account)
    assert await client.find_number(login, other.sid, next(iter(other.numbers)).phone_number) is None
    assert await pages(client, login, other.sid) == []


async def test_slot_is_free_between_two_pages(stage: Stage) -> None:
    """A reader that is busy with one page keeps no other call with the same credentials waiting."""
    [account] = stage.twin.seed(accounts=1, numbers=1001)
    limiter = Limiter(concurrency=1, refusal_memory=60)
    async with TwilioClient(
        limiter, api_origin=stage.url, messaging_origin=stage.url, timeout=10, lease_outlasts=lambda _: True
    ) as client:
        reading = client.number_pages(login_of(account), account.sid)
        first = await anext(reading)
        async with asyncio.timeout(5):
            assert await client.fetch_number(login_of(account), account.sid, first[0].sid) == first[0]
        assert len(await anext(reading)) == 1


@pytest.mark.parametrize(
    ("action", "error", "reason"),
    [
        (Action(kind="status", status=503), TwilioUnavailable, "an outage"),
        (Action(kind="status", status=429, retry_after=7), TwilioThrottled, "Twilio asks for a pause"),
        (Action(kind="html200"), TwilioUnavailable, "an HTML page of a proxy"),
        (Action(kind="truncate"), TwilioUnavailable, "half of a page"),
        (Action(kind="reset"), TwilioUnavailable, "a broken connection"),
    ],
)
async def test_failed_second_page_is_an_error_and_not_the_end(
    stage: Stage, client: TwilioClient, action: Action, error: type[Exception], reason: str
) -> None:
    """Taken for the end, it would mean that the account has no more numbers."""
    [account] = stage.twin.seed(accounts=1, numbers=1001)
    stage.twin.faults.add(Match(nth=2), action)
    reading = client.number_pages(login_of(account), account.sid)
    assert len(await anext(reading)) == 1000
    with pytest.raises(error):
        await anext(reading)


# -- where credentials are sent -----------------------------------------------------------------------------------


@asynccontextmanager
async def elsewhere() -> AsyncIterator[tuple[str, list[str]]]:
    """Serve a server that is not Twilio. Yield its origin and the Authorization headers that it received."""
    received: list[str] = []

    async def take(request: web.Request) -> web.Response:
        received.append(request.headers.get("Authorization", ""))
        return web.json_response({"incoming_phone_numbers": [], "meta": {"key": "services"}, "services": []})

    async with served(take) as origin:
        yield origin, received


@asynccontextmanager
async def served(handler: Any) -> AsyncIterator[str]:
    """Serve every path with `handler`. Yield the origin."""
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
    """Serve a Twilio whose first answer is `document`. Yield a client for it and the paths of the calls."""
    paths: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        paths.append(request.path_qs)
        empty = {"incoming_phone_numbers": [], "meta": {"key": "services"}, "services": []}
        return web.json_response(empty if len(paths) > 1 else document)

    async with served(handler) as origin, open_client(origin) as client:
        yield client, paths


LOGIN = Login(sid="AC1", token=SecretStr("token"))


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("{there}/2010-04-01/next", "another host"),
        ("https://api.twilio.com.evil.example/next", "a host that begins like Twilio's"),
        ("https://api.twilio.com@{host}/next", "Twilio's name as a user at another host"),
        ("https://api.twilio.com:8443/next", "another client"),
        ("http://api.twilio.com/next", "not encrypted"),
        ("//{host}/next", "any scheme"),
        ("/v1/Services?Page=1", "no host: the Messaging API's links are absolute URLs"),
        ("https://api.twilio.com", "Twilio's host without a path"),
        ("HTTPS://API.TWILIO.COM/next", "upper case, which Twilio does not write"),
    ],
)
async def test_link_to_another_origin_is_not_followed(link: str, reason: str) -> None:
    """The Messaging API answers with absolute URLs: a forged one must not receive the account's token."""
    async with elsewhere() as (there, received):
        link = link.format(there=there, host=there.removeprefix("http://"))
        document = {"meta": {"key": "services", "next_page_url": link}, "services": []}
        async with answering(document) as (client, paths):
            with pytest.raises(TwilioUnavailable, match="not at Twilio"):
                await client.overriding_services(LOGIN, "AC1")
        assert len(paths) == 1
        assert received == [], reason


@pytest.mark.parametrize(
    "uri", ["//{host}/next", "@{host}/next", "http://{host}/next", "\\\\{host}/next", "..//{host}/"]
)
async def test_relative_link_stays_at_twilio_whatever_it_contains(uri: str) -> None:
    """The API of 2010 answers with paths, which twilio-python appends to Twilio's host."""
    async with elsewhere() as (there, received):
        document = {"incoming_phone_numbers": [], "next_page_uri": uri.format(host=there.removeprefix("http://"))}
        async with answering(document) as (client, paths):
            assert await pages(client, LOGIN, "AC1") == [[], []]
        assert len(paths) == 2
        assert received == []


async def test_link_to_the_configured_origin_or_to_twilio_is_followed(stage: Stage) -> None:
    """A proxy in front of Twilio passes Twilio's links on as they are; a stand-in for it writes its own."""
    for link in ("https://messaging.twilio.com/v1/Services?Page=1", "{origin}/v1/Services?Page=1"):
        paths: list[str] = []

        async def handler(request: web.Request, link: str = link, paths: list[str] = paths) -> web.Response:
            paths.append(request.path_qs)
            following = link.format(origin=f"http://{request.host}") if len(paths) == 1 else None
            return web.json_response({"meta": {"key": "services", "next_page_url": following}, "services": []})

        async with served(handler) as messaging, open_client(stage.url, messaging) as client:
            assert await client.overriding_services(LOGIN, "AC1") == {}
        assert paths == ["/v1/Services?PageSize=1000", "/v1/Services?Page=1"]


async def test_redirect_is_not_followed() -> None:
    async with elsewhere() as (there, received):

        async def handler(_: web.Request) -> web.Response:
            raise web.HTTPTemporaryRedirect(there)

        async with served(handler) as origin, open_client(origin) as client:
            with pytest.raises(TwilioUnavailable):
                await pages(client, LOGIN, "AC1")
        assert received == []


async def test_each_api_has_its_own_origin(stage: Stage) -> None:
    async with elsewhere() as (there, received), open_client(stage.url, there) as client:
        login = login_of(stage.account)
        assert await pages(client, login, stage.account.sid)
        assert received == []
        assert await client.overriding_services(login, stage.account.sid) == {}
        assert len(received) == 1
    assert stage.twin.journal.counts == {"GET numbers": 1}


# -- Messaging Services --------------------------------------------------------------------------------------


async def test_numbers_of_a_service_that_receives_their_messages_are_returned(
    stage: Stage, client: TwilioClient
) -> None:
    """A service takes its numbers' messages, unless it leaves them to the number's own webhook."""
    taken, unused, dropped, alone = stage.numbers[:4]
    takes = stage.twin.add_service(stage.account, inbound_request_url="https://service.example/")
    leaves = stage.twin.add_service(
        stage.account, inbound_request_url="https://service.example/", use_inbound_webhook_on_number=True
    )
    drops = stage.twin.add_service(stage.account)
    for number, service in ((taken, takes), (unused, leaves), (dropped, drops)):
        stage.twin.join_service(number, service)
    overriding = await client.overriding_services(login_of(stage.account), stage.account.sid)
    assert overriding == {taken.sid: takes.sid, dropped.sid: drops.sid}
    assert alone.sid not in overriding
    routes = {
        each.sid: (await stage.control("GET", f"/numbers/{each.sid}")).document["route"] for each in stage.numbers
    }
    assert all((each.sid in overriding) is (DEMO_URL not in str(routes[each.sid])) for each in stage.numbers), (
        "as the twin routes messages"
    )
    assert stage.twin.journal.counts == {"GET services": 1, "GET service_numbers": 2}, (
        "none for the service that leaves messages to the number"
    )


async def test_account_without_services_costs_one_call(stage: Stage, client: TwilioClient) -> None:
    assert await client.overriding_services(login_of(stage.account), stage.account.sid) == {}
    assert stage.twin.journal.counts == {"GET services": 1}


async def test_number_that_left_its_service_is_not_returned(stage: Stage, client: TwilioClient) -> None:
    service, number = stage.twin.add_service(stage.account), stage.numbers[0]
    stage.twin.join_service(number, service)
    login, sid = login_of(stage.account), stage.account.sid
    assert await client.overriding_services(login, sid) == {number.sid: service.sid}
    service.use_inbound_webhook_on_number = True
    assert await client.overriding_services(login, sid) == {}
    service.use_inbound_webhook_on_number = False
    stage.twin.leave_service(number)
    assert await client.overriding_services(login, sid) == {}


async def test_services_and_their_numbers_are_read_in_pages(stage: Stage, client: TwilioClient) -> None:
    [account] = stage.twin.seed(accounts=1, numbers=1001)
    for _ in range(1000):
        stage.twin.add_service(account, use_inbound_webhook_on_number=True)
    service = stage.twin.add_service(account)
    for number in account.numbers:
        stage.twin.join_service(number, service)
    overriding = await client.overriding_services(login_of(account), account.sid)
    assert overriding == {number.sid: service.sid for number in account.numbers}
    assert stage.twin.journal.counts == {"GET services": 2, "GET service_numbers": 2}


async def test_services_of_another_account_are_ignored(stage: Stage, client: TwilioClient) -> None:
    """The Messaging API shows the services of the account that logs in: those of the parent for its credentials."""
    sub = stage.twin.add_account(parent=stage.account)
    service = stage.twin.add_service(stage.account)
    stage.twin.join_service(stage.numbers[0], service)
    assert await client.overriding_services(login_of(stage.account), sub.sid) == {}
    assert stage.twin.journal.counts == {"GET services": 1}, "their numbers are not read either"


async def test_api_key_reads_services_of_its_account(stage: Stage, client: TwilioClient) -> None:
    key, service = stage.twin.add_key(stage.account), stage.twin.add_service(stage.account)
    stage.twin.join_service(stage.numbers[0], service)
    login = Login(sid=key.sid, token=SecretStr(key.secret))
    assert await client.overriding_services(login, stage.account.sid) == {stage.numbers[0].sid: service.sid}


async def test_hanging_services_of_one_account_do_not_delay_another(stage: Stage, client: TwilioClient) -> None:
    """Neither account is verified yet, as after a restart."""
    [other] = stage.twin.seed(accounts=1, numbers=1)
    fault = stage.twin.faults.add(Match(path="^/v1/", account=stage.account.sid), Action(kind="hang"))
    hanging = asyncio.ensure_future(client.overriding_services(login_of(stage.account), stage.account.sid))
    await until(lambda: fault.hit == 1)
    async with asyncio.timeout(5):
        assert await client.overriding_services(login_of(other), other.sid) == {}
    stage.twin.faults.clear()
    hanging.cancel()
    await asyncio.wait({hanging})


async def test_refusal_by_one_api_does_not_affect_the_other(stage: Stage, client: TwilioClient) -> None:
    """A key may be restricted to one of them. `forget_refusal` forgets both."""
    login, sid = login_of(stage.account), stage.account.sid
    fault = stage.twin.faults.add(Match(path="^/v1/"), Action(kind="status", status=401, code=20003))
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            await client.overriding_services(login, sid)
        assert refused.value.reason is Reason.AuthenticationFailed
    assert fault.hit == 1, "the second fails without a call"
    assert await pages(client, login, sid)
    stage.twin.faults.clear()
    client.forget_refusal(login, sid)
    assert await client.overriding_services(login, sid) == {}


# -- tokens that cannot be sent ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "named", "reason"),
    [
        (
            "\ufeff" + "a" * 32,
            r"U\+FEFF \(zero width no-break space\) at position 1\.",
            "a byte order mark of an editor",
        ),
        ("a" * 31 + "\u2013", r"U\+2013 \(en dash\) at position 32\.", "a dash of a word processor"),
        ("a" * 16 + "\n" + "a" * 16, r"U\+000A \(line feed\) at position 17\.", "two lines"),
        ("a" * 31 + "\x00", r"U\+0000 \(null\) at position 32\.", "a NUL"),
        ("a" * 16 + " " + "a" * 15, r"U\+0020 \(space\) at position 17\.", "a blank between two words"),
        ("\u00e4" * 32, r"U\+00E4 \(latin small letter a with diaeresis\) at position 1\.", "a letter beyond ASCII"),
        ("a\ud800", r"U\+D800", "half of a surrogate pair"),
    ],
)
async def test_token_that_cannot_be_sent_is_refused_without_a_call(
    stage: Stage, client: TwilioClient, token: str, named: str, reason: str
) -> None:
    """It would look like an outage of Twilio, which users wait for, instead of a mistake to fix."""
    login, sid = Login(sid=stage.account.sid, token=SecretStr(token)), stage.account.sid
    number = stage.numbers[0]
    calls = [
        client.find_number(login, sid, number.phone_number),
        client.fetch_number(login, sid, number.sid),
        client.set_webhook(login, sid, number.sid, Webhook(url="https://a.example/", method="POST")),
        pages(client, login, sid),
        client.overriding_services(login, sid),
    ]
    for call in calls:
        with pytest.raises(Refused, match=named) as refused:
            await call
        assert refused.value.reason is Reason.AuthenticationFailed, reason
        assert token not in str(refused.value)
        assert "aa" not in str(refused.value)
    assert stage.twin.journal.counts == {}


async def test_wrong_token_that_can_be_sent_is_refused_by_twilio(stage: Stage, client: TwilioClient) -> None:
    login = Login(sid=stage.account.sid, token=SecretStr("!~" + "a" * 30))
    with pytest.raises(Refused, match="code 20003"):
        await client.find_number(login, stage.account.sid, stage.numbers[0].phone_number)
    assert stage.twin.journal.counts == {"GET numbers": 1}


# -- one number ----------------------------------------------------------------------------------------------


async def test_number_is_found_by_all_of_its_digits(stage: Stage, client: TwilioClient) -> None:
    """Twilio's filter matches parts of numbers."""
    login, sid = login_of(stage.account), stage.account.sid
    longer = stage.twin.add_number(stage.account, f"{stage.numbers[0].phone_number}0")
    for number in (stage.numbers[0], longer):
        found = await client.find_number(login, sid, number.phone_number)
        assert found
        assert found.sid == number.sid
    assert await client.find_number(login, sid, longer.phone_number[:-2]) is None


async def test_deleted_number_reads_as_none_and_cannot_be_set(stage: Stage, client: TwilioClient) -> None:
    login, sid, gone = login_of(stage.account), stage.account.sid, stage.numbers[0]
    stage.twin.release(gone)
    assert await client.find_number(login, sid, gone.phone_number) is None
    assert await client.fetch_number(login, sid, gone.sid) is None
    with pytest.raises(NotFound):
        await client.set_webhook(login, sid, gone.sid, Webhook(url="https://a.example/", method="POST"))


async def test_setting_a_webhook_sends_two_fields_and_returns_the_result(stage: Stage, client: TwilioClient) -> None:
    number, webhook = stage.numbers[0], Webhook(url="https://a.example/#rc=2", method="GET")
    set_ = await client.set_webhook(login_of(stage.account), stage.account.sid, number.sid, webhook)
    assert set_.webhook == webhook
    assert stage.twin.journal.entries[-1].parameters == ("SmsMethod", "SmsUrl")
    cleared = Webhook(url="", method="POST")
    assert (
        await client.set_webhook(login_of(stage.account), stage.account.sid, number.sid, cleared)
    ).webhook == cleared
    assert stage.twin.journal.violations == []


@pytest.mark.parametrize(
    ("lease", "is_sent", "reason"),
    [
        (10.1, True, "the call has ended, in time or by its timeout, before another process may lead"),
        (10, False, "it may end later"),
        (-1, False, "another process may lead already"),
    ],
)
async def test_write_is_sent_only_while_the_lease_outlasts_its_timeout(
    stage: Stage, lease: float, is_sent: bool, reason: str
) -> None:
    """Reads are not limited: they change nothing, and whatever comes of them is a write."""
    account, number = stage.account, stage.numbers[0]
    async with open_client(stage.url, lease=lease) as client:
        assert await client.find_number(login_of(account), account.sid, number.phone_number)
        writing = client.set_webhook(
            login_of(account), account.sid, number.sid, Webhook(url="https://a.example/", method="POST")
        )
        if is_sent:
            await writing
        else:
            with pytest.raises(LeaseEndsSoon):
                await writing
    assert [each.method for each in stage.twin.journal.entries].count("POST") == is_sent, reason


async def test_write_that_waited_for_its_turn_is_not_sent_when_the_lease_has_ended_meanwhile(stage: Stage) -> None:
    """The lease is looked at when the request is sent, and not before it waits for others."""
    account, number = stage.account, stage.numbers[0]
    stage.twin.faults.add(Match(count=1), Action(kind="delay", seconds=0.5))
    ends = time.monotonic() + 10.2
    limiter = Limiter(concurrency=1, refusal_memory=60)
    limiter.trust(login_of(account), account.sid)
    async with TwilioClient(
        limiter,
        api_origin=stage.url,
        messaging_origin=stage.url,
        timeout=10,
        lease_outlasts=lambda seconds: ends - time.monotonic() > seconds,
    ) as client:
        first = asyncio.create_task(client.fetch_number(login_of(account), account.sid, number.sid))
        await asyncio.sleep(0)
        with pytest.raises(LeaseEndsSoon):
            await client.set_webhook(
                login_of(account), account.sid, number.sid, Webhook(url="https://a.example/", method="POST")
            )
        assert first.done()
    assert [each.method for each in stage.twin.journal.entries] == ["GET"]


async def test_write_that_was_not_sent_says_nothing_about_twilio(stage: Stage) -> None:
    """It is no answer, which would close the circuit breakers, and no timeout, which would open them."""
    account, number = stage.account, stage.numbers[0]
    stage.twin.faults.add(Match(count=2), Action(kind="hang"))
    async with open_client(stage.url, seconds=0.2, lease=0) as client:
        for _ in range(2):
            with pytest.raises(TwilioTimeout):
                await client.fetch_number(login_of(account), account.sid, number.sid)
        with pytest.raises(TwilioTimeout):  # open after two timeouts
            await client.set_webhook(
                login_of(account), account.sid, number.sid, Webhook(url="https://a.example/", method="POST")
            )
        await asyncio.sleep(0.25)
        for _ in range(3):
            with pytest.raises(LeaseEndsSoon):
                await client.set_webhook(
                    login_of(account), account.sid, number.sid, Webhook(url="https://a.example/", method="POST")
                )


async def test_hanging_call_ends_with_a_timeout(stage: Stage) -> None:
    stage.twin.faults.add(Match(), Action(kind="hang"))
    async with open_client(stage.url, seconds=0.2) as client, asyncio.timeout(5):
        with pytest.raises(TwilioTimeout, match=r"^Twilio does not answer in time\.$"):
            await client.find_number(login_of(stage.account), stage.account.sid, stage.numbers[0].phone_number)


# -- answers that are not Twilio's ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (200, "<html>Log in to the guest network</html>"),
        (200, "{}"),
        (200, '{"error": "access denied", "code": 20003}'),
        (200, "[]"),
        (200, '{"incoming_phone_numbers": [{}]}'),
        (200, '{"incoming_phone_numbers": null}'),
        (204, ""),
        (401, "<html>"),
        (403, '{"message": "forbidden by policy"}'),
        (404, "<html>"),
        (407, "<html>"),
    ],
)
async def test_answer_of_a_proxy_is_an_outage_and_neither_a_refusal_nor_a_missing_number(
    status: int, answer: str
) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=status, text=answer, content_type="text/html")

    async with served(handler) as origin, open_client(origin) as client:
        number_sid = "PN" + "0" * 32
        with pytest.raises(TwilioUnavailable):
            await client.find_number(LOGIN, "AC1", "+61400999999")
        with pytest.raises(TwilioUnavailable):
            await client.fetch_number(LOGIN, "AC1", number_sid)
        with pytest.raises(TwilioUnavailable):
            await client.set_webhook(LOGIN, "AC1", number_sid, Webhook(url="https://a.example/", method="POST"))
        with pytest.raises(TwilioUnavailable):
            await pages(client, LOGIN, "AC1")
        if "incoming_phone_numbers" not in answer:
            with pytest.raises(TwilioUnavailable):
                await client.overriding_services(LOGIN, "AC1")
