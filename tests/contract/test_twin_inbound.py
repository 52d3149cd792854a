"""Test that an inbound SMS reaches the effective webhook, with a signature that Twilio's own validator accepts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from twilio.request_validator import RequestValidator

from tests.twin.sdk import Reply, Stage, open_stage


@dataclass
class Hook:
    """A webhook that records what it receives: (method, URL as received, form, headers)."""

    url: str = ""
    calls: list[tuple[str, str, dict[str, str], dict[str, str]]] = field(default_factory=list)

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        form = {name: str(value) for name, value in (await request.post()).items()}
        received = f"http://{request.host}{request.raw_path}"
        self.calls.append((request.method, received, form, dict(request.headers)))
        return web.Response(text="<Response/>", content_type="text/xml", status=202)


@asynccontextmanager
async def _listening() -> AsyncIterator[Hook]:
    hook = Hook()
    runner = web.ServerRunner(web.Server(hook), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        hook.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield hook
    finally:
        await runner.cleanup()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage() as opened:
        yield opened


@pytest.fixture
async def hook() -> AsyncIterator[Hook]:
    async with _listening() as listening:
        yield listening


async def _send(stage: Stage, body: str = "Grüße & +1=2") -> Reply:
    message = {"to": stage.numbers[0].phone_number, "from": "+61491570006", "body": body}
    return await stage.control("POST", "/inbound", message)


def _point(stage: Stage, **settings: str) -> None:
    stage.numbers[0].change(settings, stage.twin.now())


@pytest.mark.parametrize(
    ("query", "method", "reason"),
    [
        ("", "POST", "the usual webhook"),
        ("?a=1&b=%20x", "POST", "the query is signed too"),
        ("#rc=2&rp=all", "POST", "connection overrides are neither sent nor signed"),
        ("", "GET", "GET signs the whole query and no form"),
        ("?a=1#rc=2", "GET", "GET extends the query of the URL"),
    ],
)
async def test_message_is_delivered_with_a_valid_signature(
    stage: Stage, hook: Hook, query: str, method: str, reason: str
) -> None:
    _point(stage, sms_url=f"{hook.url}/sms{query}", sms_method=method)
    reply = await _send(stage)
    assert (reply.document["outcome"], reply.document["status"]) == ("delivered", 202), reason
    assert reply.document["body"] == "<Response/>"
    assert reply.document["url"] == f"{hook.url}/sms{query}"

    [(verb, url, form, headers)] = hook.calls
    assert verb == method
    assert "#" not in url
    validator = RequestValidator(stage.account.auth_token)
    assert validator.validate(url, form, headers["X-Twilio-Signature"]), reason
    assert not RequestValidator("another token").validate(url, form, headers["X-Twilio-Signature"])
    if method == "POST":
        assert form["Body"] == "Grüße & +1=2"
        assert (form["To"], form["AccountSid"]) == (stage.numbers[0].phone_number, stage.account.sid)
        assert form["MessageSid"] == reply.document["message_sid"]


async def test_primary_token_signs(stage: Stage, hook: Hook) -> None:
    old, new = stage.account.auth_token, stage.twin.create_secondary_token(stage.account)
    _point(stage, sms_url=f"{hook.url}/")
    await _send(stage)
    stage.twin.promote(stage.account)
    await _send(stage)
    for (_, url, form, headers), token in zip(hook.calls, (old, new), strict=True):
        assert RequestValidator(token).validate(url, form, headers["X-Twilio-Signature"])


async def test_password_of_the_webhook_is_sent_and_not_signed(stage: Stage, hook: Hook) -> None:
    _point(stage, sms_url=f"{hook.url.replace('//', '//me:pw@')}/")
    assert (await _send(stage)).document["outcome"] == "delivered"
    [(_, url, form, headers)] = hook.calls
    assert headers["Authorization"].startswith("Basic ")
    assert RequestValidator(stage.account.auth_token).validate(url, form, headers["X-Twilio-Signature"])


@pytest.mark.parametrize(
    ("application", "service", "number", "via", "reason"),
    [
        (None, None, True, "number", "nothing else: the number's own URL"),
        (True, None, True, "application", "an application overrides the number"),
        (False, None, True, "no SMS URL", "even one that has no URL"),
        (None, "url", True, "service", "a messaging service overrides the number"),
        (None, "nothing", True, "no inbound_request_url", "even one that drops everything"),
        (None, "defer", True, "number", "unless it leaves messages to the number"),
        (None, "defer", False, "no SMS URL", "which then needs a URL"),
        (True, "url", True, "application", "an application overrides both"),
        (None, None, False, "no SMS URL", "the message is dropped"),
    ],
)
async def test_effective_webhook_is_that_of_the_table(
    stage: Stage, hook: Hook, application: bool | None, service: str | None, number: bool, via: str, reason: str
) -> None:
    _point(stage, sms_url=f"{hook.url}/number" if number else "")
    if application is not None:
        made = stage.twin.add_application(stage.account, sms_url=f"{hook.url}/application" if application else "")
        _point(stage, sms_application_sid=made.sid)
    if service is not None:
        pool = stage.twin.add_service(
            stage.account,
            inbound_request_url=f"{hook.url}/service" if service != "nothing" else None,
            use_inbound_webhook_on_number=service == "defer",
        )
        stage.twin.join_service(stage.numbers[0], pool)

    outcome = (await _send(stage)).document
    if outcome["outcome"] == "dropped":
        assert via in outcome["reason"], reason
        assert hook.calls == []
    else:
        assert outcome["via"] == via, reason
        [(_, url, form, _)] = hook.calls
        assert url == f"{hook.url}/{via}", reason
        assert ("MessagingServiceSid" in form) == (service is not None and via != "application")


@pytest.mark.parametrize(
    ("change", "text", "reason"),
    [
        ("released", "number not found", "a released number"),
        ("suspended", "the account is suspended", "a suspended account"),
        ("voice only", "cannot receive SMS", "a number without SMS"),
        ("demo", "not part of the twin", "the demo page is on the real internet"),
    ],
)
async def test_message_is_dropped(stage: Stage, hook: Hook, change: str, text: str, reason: str) -> None:
    number = stage.numbers[0]
    message = {"to": number.phone_number}
    if change != "demo":
        _point(stage, sms_url=hook.url)
    if change == "released":
        stage.twin.release(number)
    if change == "suspended":
        stage.account.own_status = "suspended"
    if change == "voice only":
        number.sms = False
    outcome = (await stage.control("POST", "/inbound", message)).document
    assert outcome["outcome"] == "dropped"
    assert text in outcome["reason"], reason
    assert hook.calls == []


async def test_webhook_that_does_not_answer_is_reported_as_failed(stage: Stage) -> None:
    async with _listening() as gone:
        _point(stage, sms_url=gone.url)
    outcome = (await _send(stage)).document
    assert (outcome["outcome"], outcome["reason"]) == ("failed", "ClientConnectorError")
