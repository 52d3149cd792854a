"""An SMS arrives: which webhook is in force, what is sent there, and how it is signed.

Deciding and signing are pure; only `deliver` talks to the network. Not reproduced: the fallback URL, redirects,
and the retries that a `#rc=` fragment asks for.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlencode, urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, Field
from yarl import URL

from tests.twin.state import DEMO_URL, Account, Number, Twin

PATIENCE_SECONDS = 15.0  # what Twilio grants a webhook
LONGEST_BODY = 64 * 1024


class Message(BaseModel):
    """`{"to", "from", "body"}`: an SMS on its way to one of the twin's numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    to: str
    sender: Annotated[str, Field(alias="from")] = "+61491570006"
    body: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """The webhook in force, and who decides it."""

    via: Literal["application", "service", "number"]
    url: str
    method: str
    service_sid: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """Nobody is told of the message."""

    reason: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the webhook answered."""

    via: str
    url: str
    method: str
    message_sid: str
    status: int
    body: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The webhook gave no HTTP answer."""

    via: str
    url: str
    method: str
    message_sid: str
    reason: str


def route(twin: Twin, number: Number) -> Route | Dropped:
    """Application, then messaging service (unless it leaves it to the number), then the number's own SmsUrl."""
    account = twin.accounts[number.account_sid]
    if account.status != "active":
        return Dropped(f"the account is {account.status}")
    if not number.sms:
        return Dropped("the number cannot receive SMS")
    if application_sid := number.settings["sms_application_sid"]:
        application = account.applications.get(application_sid)
        if application is None or not application.sms_url:
            return Dropped("the number's application has no SMS URL")
        return Route("application", application.sms_url, application.sms_method)
    if number.service_sid is not None:
        service = account.services[number.service_sid]
        if not service.use_inbound_webhook_on_number:
            if not service.inbound_request_url:
                return Dropped("the messaging service has no inbound_request_url")
            return Route("service", service.inbound_request_url, service.inbound_method, service.sid)
    if not number.settings["sms_url"]:
        return Dropped("the number has no SMS URL")
    return Route("number", number.settings["sms_url"], number.settings["sms_method"], number.service_sid)


def parameters(twin: Twin, account: Account, message: Message, way: Route) -> dict[str, str]:
    """The form that Twilio sends for a plain text message."""
    sid = twin.new_sid("SM")
    form = {
        "MessageSid": sid,
        "SmsSid": sid,
        "SmsMessageSid": sid,
        "AccountSid": account.sid,
        "From": message.sender,
        "To": message.to,
        "Body": message.body,
        "NumMedia": "0",
        "NumSegments": "1",
        "SmsStatus": "received",
        "ApiVersion": "2010-04-01",
    }
    return form if way.service_sid is None else {**form, "MessagingServiceSid": way.service_sid}


def signature(token: str, url: str, form: Mapping[str, str]) -> str:
    """X-Twilio-Signature: base64(HMAC-SHA1(token, url + sorted names and values))."""
    signed = url + "".join(name + form[name] for name in sorted(form))
    return base64.b64encode(hmac.digest(token.encode(), signed.encode(), "sha1")).decode()


def wire_url(url: str) -> str:
    """Without the fragment: connection overrides (`#rc=2`) are for Twilio, not for the webhook."""
    return urlsplit(url)._replace(fragment="").geturl()


async def deliver(session: aiohttp.ClientSession, twin: Twin, message: Message) -> Delivered | Failed | Dropped:
    """Sends one signed message to the webhook in force. Never raises for what the webhook does."""
    number = twin.numbers.get(message.to)
    if number is None:
        return Dropped("no such number")
    way = route(twin, number)
    if isinstance(way, Dropped):
        return way
    if way.url == DEMO_URL:
        return Dropped("Twilio's demo webhook would answer, and it is not part of the twin")
    account = twin.accounts[number.account_sid]
    form = parameters(twin, account, message, way)
    url = wire_url(way.url)
    if way.method == "GET":
        url = f"{url}{'&' if urlsplit(url).query else '?'}{urlencode(form)}"
    sent: dict[str, str] = {} if way.method == "GET" else form
    headers = {
        "User-Agent": "TwilioProxy/1.1",
        "I-Twilio-Idempotency-Token": twin.new_sid(""),
        # The webhook sees user:password as a header, never in its URL, so it cannot be part of what is signed.
        "X-Twilio-Signature": signature(account.auth_token, _without_userinfo(url), sent),
    }
    try:
        async with session.request(
            way.method,
            URL(url, encoded=True),
            data=sent or None,
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS),
        ) as response:
            body = (await response.content.read(LONGEST_BODY)).decode(errors="replace")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return Failed(way.via, way.url, way.method, form["MessageSid"], type(error).__name__)
    return Delivered(way.via, way.url, way.method, form["MessageSid"], response.status, body)


def _without_userinfo(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
