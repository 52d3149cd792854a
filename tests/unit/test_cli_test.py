"""What `kubectl sms test` makes of a webhook's answer, and how it signs."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from smschannel.cli.deliveries import judge
from smschannel.cli.http import Delivery, deliver, origin_of, probe
from smschannel.cli.main import cli
from smschannel.twilio.messages import inbound_form, signature
from tests.manifests import ACCOUNT_SID, INSTANCE, PHONE_NUMBER, TOKEN
from tests.twin.inbound import signature as twilios
from tests.unit.network import serving

URL = "https://sms.example.com/v1"


def answer(status: int | None, content_type: str = "text/xml", body: bytes = b"<Response/>") -> Delivery:
    return Delivery(status, 0.5, content_type, body, "no such host")


@pytest.mark.parametrize(
    ("given", "signed", "good", "text"),
    [
        pytest.param(answer(200), True, True, "text/xml: delivered", id="TwiML"),
        pytest.param(answer(204, "application/octet-stream", b""), True, True, "empty: delivered", id="empty"),
        pytest.param(answer(200, "text/plain", b"hi"), True, True, "as a reply", id="text is sent as a reply"),
        pytest.param(answer(200, "text/html", b"<html>"), True, False, "error 12300", id="a page for browsers"),
        pytest.param(answer(403), True, False, "it rejects the signature", id="another token, or another URL"),
        pytest.param(answer(403), False, True, "as it should", id="nobody signed it"),
        pytest.param(answer(401), False, True, "as it should", id="nobody signed it, 401"),
        pytest.param(answer(200), False, False, "it accepts a message without a signature", id="anybody may post"),
        pytest.param(answer(302), True, False, "a redirect", id="redirect"),
        pytest.param(answer(404), True, False, "HTTP 404", id="no such path"),
        pytest.param(answer(500), True, False, "HTTP 500", id="it is broken"),
        pytest.param(answer(None), True, False, "does not answer: no such host", id="nobody answers"),
    ],
)
def test_answer_is_judged(given: Delivery, signed: bool, good: bool, text: str) -> None:
    verdict = judge(given, signed=signed, url=URL)
    assert verdict.good is good
    assert text in verdict.text
    assert bool(verdict.remedy) is not good, "what is not good says what to do"


@given(st.text(max_size=200), st.sampled_from([URL, f"{URL}?a=b", "https://sms.example.com:8443/x"]))
def test_signature_is_twilios(body: str, url: str) -> None:
    """Compared with the implementation of the Twilio twin, which was made apart from the SDK."""
    form = inbound_form(ACCOUNT_SID, "+15005550006", PHONE_NUMBER, body)
    assert signature(SecretStr(TOKEN), url, form) == twilios(TOKEN, url, form)


async def test_message_arrives_as_twilio_posts_it() -> None:
    seen: dict[str, Any] = {}

    async def webhook(request: web.Request) -> web.Response:
        seen.update({"form": dict(await request.post()), "headers": dict(request.headers)})
        return web.Response(text="<Response/>", content_type="text/xml")

    form = inbound_form(ACCOUNT_SID, "+15005550006", PHONE_NUMBER, "Gr\u00fc\u00dfe & more")
    async with serving(webhook) as port:
        got = await deliver(f"http://127.0.0.1:{port}/in", form, {"X-Twilio-Signature": "s"}, None)
    assert (got.status, got.content_type, got.body) == (200, "text/xml", b"<Response/>")
    assert seen["form"] == form
    assert seen["headers"]["X-Twilio-Signature"] == "s"


async def test_redirects_are_not_followed_and_answers_are_bounded() -> None:
    async def webhook(request: web.Request) -> web.Response:
        if request.path == "/long":
            return web.Response(body=b"x" * 1_000_000)
        raise web.HTTPFound("/long")

    async with serving(webhook) as port:
        assert (await deliver(f"http://127.0.0.1:{port}/in", {}, {}, None)).status == 302
        assert len((await deliver(f"http://127.0.0.1:{port}/long", {}, {}, None)).body) <= 64 * 1024
        assert (await probe(f"http://127.0.0.1:{port}/", None)).status == 302


async def test_nobody_there_is_no_exception() -> None:
    async def webhook(request: web.Request) -> web.Response:
        return web.Response()

    async with serving(webhook) as port:
        pass
    assert (await deliver(f"http://127.0.0.1:{port}/", {}, {}, None)).problem
    assert (await probe(f"http://127.0.0.1:{port}/", None)).problem


def test_origin_has_no_password() -> None:
    assert origin_of("https://u:p@sms.example.com:8443/v1/{instance_id}") == "https://sms.example.com:8443"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--send"], "--send needs --from"),
        (["--send", "--from", PHONE_NUMBER, "--unsigned"], "leave out --send"),
        (["--from", "0400"], "digits only and in quotes"),
    ],
)
def test_usage_is_explained(options: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["test", INSTANCE, *options])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
