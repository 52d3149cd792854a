"""What `kubectl sms test` asks of Twilio: signatures of inbound messages, prices, and sending one SMS.

The operator never imports this: it sends no messages.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import SecretStr
from twilio.base.exceptions import TwilioException
from twilio.request_validator import RequestValidator
from twilio.rest import Client

from smschannel.api.errors import ChannelError, TwilioUnavailable
from smschannel.core.record import Login
from smschannel.twilio.client import NO_ENVIRONMENT, Transport, check_sendable

FINAL = {"delivered", "failed", "undelivered", "sent", "canceled"}
"""The statuses of an outbound message after which little changes."""

_REFUSALS = {
    21211: "the receiver is not a number that can be sent to",
    21266: "a number cannot send to itself: name another one with --from",
    21408: "the account may not send to that country: permit it in the Twilio console under Geo permissions",
    21606: "the sender is not a number of this account that can send SMS: name another one with --from",
    21608: "a trial account sends to verified numbers only",
    21610: "the receiver has opted out of messages from this sender",
    21659: "the sender is not a number of this account: name another one with --from",
}


_TIMEOUT = 15.0  # seconds for one call


class Way(NamedTuple):
    """How to reach Twilio: `url` is an origin in place of all of Twilio's, `api_url` of its API; None means its own."""

    url: str | None = None
    api_url: str | None = None
    ca_bundle: Path | None = None


class Price(NamedTuple):
    """What an SMS costs: to a country, per message segment, in a currency. `most` differs by the receiver's carrier."""

    country: str
    least: str
    most: str
    currency: str


class Sent(NamedTuple):
    """A message at Twilio. `error_code` is 0 unless it failed."""

    sid: str
    status: str
    error_code: int = 0


class MessageRefused(ChannelError):
    """Twilio refuses to send; the message says what to do."""


def inbound_form(account_sid: str, sender: str, receiver: str, body: str) -> dict[str, str]:
    """Return the form that Twilio posts to a webhook for a plain text message, with a random SID."""
    sid = f"SM{secrets.token_hex(16)}"
    return {
        "MessageSid": sid,
        "SmsSid": sid,
        "SmsMessageSid": sid,
        "AccountSid": account_sid,
        "From": sender,
        "To": receiver,
        "Body": body,
        "NumMedia": "0",
        "NumSegments": "1",
        "SmsStatus": "received",
        "ApiVersion": "2010-04-01",
    }


def signature(token: SecretStr, url: str, form: Mapping[str, str]) -> str:
    """Return the X-Twilio-Signature of a form that is posted to `url`."""
    signed: str = RequestValidator(token.get_secret_value()).compute_signature(url, dict(form))
    return signed


class Messages:
    """Sends messages with one login; an async context manager. Methods raise `TwilioUnavailable` and `Refused`.

    `twilio` says where Twilio is.
    """

    def __init__(self, login: Login, account_sid: str, twilio: Way) -> None:
        origins = {name: twilio.url or f"https://{name}.twilio.com" for name in ("api", "lookups", "pricing")}
        origins["api"] = twilio.api_url or origins["api"]
        self._origins = {f"https://{name}.twilio.com": origin for name, origin in origins.items()}
        self._login, self._account_sid, self._twilio = login, account_sid, twilio
        self._transport: Transport | None = None

    async def __aenter__(self) -> Self:
        self._transport = Transport(self._origins, _TIMEOUT, lambda seconds: True, self._twilio.ca_bundle)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._transport:
            await self._transport.close()

    async def price(self, receiver: str) -> Price:
        """Return the price of one message segment to a number, as Twilio lists it for this account."""
        client = self._client()
        with _parsing():
            found = await client.lookups.v2.phone_numbers(receiver).fetch_async()
            country = str(found.country_code or "")
            if not country.isalpha():
                raise TwilioUnavailable("Twilio knows no country for that number.")
            listed = await client.pricing.v1.messaging.countries(country).fetch_async()
            prices = [
                (float(price["current_price"]), str(price["current_price"]))
                for carrier in listed.outbound_sms_prices or ()
                for price in carrier["prices"]
            ]
            if not prices:
                raise TwilioUnavailable(f"Twilio lists no price for {country}.")
            return Price(country, min(prices)[1], max(prices)[1], str(listed.price_unit or ""))

    async def send(self, sender: str, receiver: str, body: str) -> Sent:
        """Send one message. Raises `MessageRefused`, which says what to do."""
        with _parsing():
            return _sent(await self._resource.create_async(to=receiver, from_=sender, body=body))

    async def fetch(self, sid: str) -> Sent:
        """Read what became of a message."""
        with _parsing():
            return _sent(await self._resource(sid).fetch_async())

    @property
    def _resource(self) -> Any:
        return self._client().api.v2010.accounts(self._account_sid).messages

    def _client(self) -> Any:
        token = self._login.token.get_secret_value()
        check_sendable(token)
        return Client(
            self._login.sid, token, self._account_sid, http_client=self._transport, environment=NO_ENVIRONMENT
        )


def _sent(message: Any) -> Sent:
    return Sent(str(message.sid), str(message.status), int(message.error_code or 0))


def explained(code: int) -> str:
    """Return what Twilio's error code means for a message, and what to do; "" if it is none that is known."""
    return _REFUSALS.get(code, "")


@contextmanager
def _parsing() -> Iterator[None]:
    """Turn errors about unexpected JSON into `TwilioUnavailable`, and refusals of a message into `MessageRefused`."""
    try:
        yield
    except TwilioUnavailable as error:
        if meaning := explained(error.code):
            raise MessageRefused(f"Twilio refuses to send (code {error.code}): {meaning}.") from None
        raise
    except (TwilioException, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise TwilioUnavailable("Twilio's answer lacks what it should contain, or has it in another form.") from None
