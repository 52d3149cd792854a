"""Answers of Twilio, or of what stands before it, that are too large, too deep, endless, or about something else.

Each is an outage, with a message in words; none is a bug in a log, a refusal, or a call that never ends.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from smschannel.api.errors import TwilioUnavailable
from smschannel.core.record import Login, Webhook
from tests.contract.test_twilio_client import open_client, pages, served

ACCOUNT, SID, PHONE = "AC" + "0" * 32, "PN" + "1" * 32, "+61400111222"
LOGIN = Login(sid=ACCOUNT, token=SecretStr("token"))
DEEP = '{"a":' * 100_000
Handler = Callable[[web.Request], Awaitable[web.Response]]


def number(**fields: Any) -> dict[str, Any]:
    return {"sid": SID, "account_sid": ACCOUNT, "phone_number": PHONE, "sms_url": "https://a.example/", **fields}


def page(*numbers: Any, more: str | None = None) -> str:
    return json.dumps({"incoming_phone_numbers": numbers, "next_page_uri": more, "page": 0, "page_size": 1000})


def says(content: str | bytes, status: int = 200, encoding: str = "identity") -> Handler:
    async def handler(_: web.Request) -> web.Response:
        body = content.encode() if isinstance(content, str) else content
        headers = {"Content-Encoding": encoding}
        return web.Response(status=status, body=body, content_type="application/json", headers=headers)

    return handler


async def test_answer_about_the_number_is_read() -> None:
    """The cases below differ from this one."""
    async with served(says(page(number()))) as origin, open_client(origin) as client:
        found = await client.find_number(LOGIN, ACCOUNT, PHONE)
        assert found
        assert (found.sid, found.webhook) == (SID, Webhook(url="https://a.example/", method="POST"))


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        pytest.param(says(DEEP), "not a JSON object", id="nested too deep"),
        pytest.param(says(DEEP, 401), "is not Twilio's", id="an error, nested too deep"),
        pytest.param(says('{"a":' + "9" * 5000 + "}"), "not a JSON object", id="a number of 5,000 digits"),
        pytest.param(says(page(number(sid="PN/../../secrets/x"))), "no phone number", id="a SID that is a path"),
        pytest.param(says(page(number(sid=5))), "no phone number", id="a SID that is a number"),
        pytest.param(says(page(number(account_sid="AC" + "9" * 32))), "another number", id="another account"),
        pytest.param(says(page(number(sms_url="\ud800"))), "in another form", id="a lone surrogate as URL"),
        pytest.param(says(page(number(sms_url=5))), "in another form", id="a number as URL"),
        pytest.param(says(page(number(capabilities=[1]))), "in another form", id="a list of capabilities"),
        pytest.param(says('{"x": 1}'), "in another form", id="another object"),
        pytest.param(says(page("x")), "in another form", id="a list of strings"),
        pytest.param(says(b"no gzip", encoding="gzip"), "damaged", id="no gzip, as it says"),
        pytest.param(
            says(gzip.compress(page(number()).encode())[:-9], encoding="gzip"),
            "cut off",
            id="gzip that was cut off",
        ),
        pytest.param(says(page(number()).encode("utf-16")), "not a JSON object", id="UTF-16"),
        pytest.param(says("teapot", 418), "is not Twilio's", id="status 418"),
    ],
)
async def test_wrong_answer_is_an_outage_in_words(handler: Handler, words: str) -> None:
    async with served(handler) as origin, open_client(origin) as client:
        with pytest.raises(TwilioUnavailable) as raised:
            await client.find_number(LOGIN, ACCOUNT, PHONE)
    assert words in str(raised.value)
    assert "Error" not in str(raised.value), "no Python class"


async def test_answer_about_another_number_is_not_believed() -> None:
    """A cache on the way could otherwise have a webhook recorded, or restored, that is another number's."""
    other = json.dumps(number(sid="PN" + "2" * 32, phone_number="+15550000"))
    async with served(says(other)) as origin, open_client(origin) as client:
        with pytest.raises(TwilioUnavailable, match="another number"):
            await client.fetch_number(LOGIN, ACCOUNT, SID)
        with pytest.raises(TwilioUnavailable, match="another number"):
            await client.set_webhook(LOGIN, ACCOUNT, SID, Webhook(url="https://a.example/", method="POST"))


async def test_list_that_leads_back_to_itself_ends() -> None:
    """It would occupy a worker, and a call of the limiter, forever."""
    uri = f"/2010-04-01/Accounts/{ACCOUNT}/IncomingPhoneNumbers.json?Page=1"
    async with served(says(page(number(), more=uri))) as origin, open_client(origin) as client, asyncio.timeout(10):
        with pytest.raises(TwilioUnavailable, match="does not end"):
            await pages(client, LOGIN, ACCOUNT)
        assert await client.find_number(LOGIN, ACCOUNT, PHONE), "one page is enough"
        assert await client.find_number(LOGIN, ACCOUNT, "+614001112223") is None


async def test_list_of_services_that_leads_back_to_itself_ends() -> None:
    async def handler(request: web.Request) -> web.Response:
        meta = {"key": "services", "next_page_url": str(request.url.origin()) + "/v1/Services?Page=1", "page": 0}
        return web.json_response({"services": [], "meta": {**meta, "page_size": 1, "url": "x", "first_page_url": "x"}})

    async with served(handler) as origin, open_client(origin) as client, asyncio.timeout(10):
        with pytest.raises(TwilioUnavailable, match="does not end"):
            await client.overriding_services(LOGIN, ACCOUNT)


@pytest.mark.parametrize("compressed", [False, True])
async def test_answer_without_an_end_is_cut_off(compressed: bool) -> None:
    """A compressed one of 200 KB, or one that goes on and on, does not fill the memory."""
    chunk = b" " * 2**20

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Encoding": "gzip"} if compressed else {})
        await response.prepare(request)
        packer = zlib.compressobj(wbits=31)
        for _ in range(200):
            await response.write(packer.compress(chunk) if compressed else chunk)
        await response.write(packer.flush() if compressed else b"")
        return response

    async with served(handler) as origin, open_client(origin) as client:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(TwilioUnavailable, match="larger than 32 MB"):
            await client.find_number(LOGIN, ACCOUNT, PHONE)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024
