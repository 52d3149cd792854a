"""Inbound SMS: find the effective webhook, send the message there, and sign it.

Routing and signing are pure; only `deliver` does I/O. Not reproduced: the fallback URL, redirects, and the retries
that a `#rc=` fragment configures.
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

WEBHOOK_TIMEOUT_SECONDS = 15.0  # Twilio's own
LONGEST_BODY = 64 * 1024


class Message(BaseModel):
    """`{"to", "from", "body"}`: an SMS to one of the twin's numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    to: str
    sender: Annotated[str, Field(alias="from")] = "+61491570006"
    body: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """The effective webhook, and what it comes from."""

    via: Literal["application", "service", "number"]
    url: str
    method: str
    service_sid: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """The message is sent nowhere."""

    reason: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """The message was sent; the webhook's answer."""

    via: str
    url: str
    method: str
    message_sid: str
    status: int
    body: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The message was sent, and the webhook gave no HTTP answer."""

    via: str
    url: str
    method: str
    message_sid: str
    reason: str


def route(twin: Twin, number: Number) -> Route | Dropped:
    """Find the effective webhook: the application's, else the messaging service's, else the number's own.

    A service with `use_inbound_webhook_on_number` leaves messages to the number.
    """
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


def parameters(twin: Twin, account: Account, message: Message, webhook: Route) -> dict[str, str]:
    """Return the form that Twilio sends for a plain text message."""
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
    return form if webhook.service_sid is None else {**form, "MessagingServiceSid": webhook.service_sid}


def signature(token: str, url: str, form: Mapping[str, str]) -> str:
    """Return X-Twilio-Signature: base64(HMAC-SHA1(token, url + sorted names and values))."""
    signed = url + "".join(name + form[name] for name in sorted(form))
    return base64.b64encode(hmac.digest(token.encode(), signed.encode(), "sha1")).decode()


def wire_url(url: str) -> str:
    """Return the URL without its fragment: connection overrides (`#rc=2`) are for Twilio, not for the webhook."""
    return urlsplit(url)._replace(fragment="").geturl()


async def deliver(session: aiohttp.ClientSession, twin: Twin, message: Message) -> Delivered | Failed | Dropped:
    """Send one signed message to the effective webhook. Errors of the webhook are returned, never raised."""
    number = twin.numbers.get(message.to)
    if number is None:
        return Dropped("number not found")
    webhook = route(twin, number)
    if isinstance(webhook, Dropped):
        return webhook
    if webhook.url == DEMO_URL:
        return Dropped("Twilio's demo webhook is not part of the twin")
    account = twin.accounts[number.account_sid]
    form = parameters(twin, account, message, webhook)
    url = wire_url(webhook.url)
    if webhook.method == "GET":
        url = f"{url}{'&' if urlsplit(url).query else '?'}{urlencode(form)}"
    sent: dict[str, str] = {} if webhook.method == "GET" else form
    headers = {
        "User-Agent": "TwilioProxy/1.1",
        "I-Twilio-Idempotency-Token": twin.new_sid(""),
        # The webhook sees user:password as a header, never in its URL, so they are not signed.
        "X-Twilio-Signature": signature(account.auth_token, _without_userinfo(url), sent),
    }
    try:
        async with session.request(
            webhook.method,
            URL(url, encoded=True),
            data=sent or None,
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=WEBHOOK_TIMEOUT_SECONDS),
        ) as response:
            body = (await response.content.read(LONGEST_BODY)).decode(errors="replace")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return Failed(webhook.via, webhook.url, webhook.method, form["MessageSid"], type(error).__name__)
    return Delivered(webhook.via, webhook.url, webhook.method, form["MessageSid"], response.status, body)


def _without_userinfo(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
