"""What is asked of Twilio: numbers, one by one or in pages, and Messaging Services are read; a number's `SmsUrl` and
`SmsMethod` are set. Nothing else.

Requests are twilio-python's; they travel over one shared session that has real time-outs, never follows a
redirect, and turns Twilio's answers into this package's errors before the library sees them.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import aiohttp
from twilio.base.exceptions import TwilioException
from twilio.http import AsyncHttpClient
from twilio.http.response import Response
from twilio.rest import Client
from twilio.rest.api.v2010.account.incoming_phone_number import IncomingPhoneNumberInstance

from smschannel.api.errors import (
    ChannelError,
    NotFound,
    Refused,
    TwilioThrottled,
    TwilioTimeout,
    TwilioUnavailable,
    retry_after_seconds,
)
from smschannel.api.reasons import Reason
from smschannel.core.plan import Number
from smschannel.core.record import Login, Webhook
from smschannel.metrics import TWILIO_SECONDS
from smschannel.twilio.limits import Gate

_NO_ENVIRONMENT = {"": ""}
"""Not empty, or twilio-python would read TWILIO_* of the process: another's token, or another host."""

_SUSPENDED = {20005, 20403, 10001}
_WEBHOOK_REFUSED = {21402, 21403}
_PAGE = 1000
_LACKS_SMS = {21407}


class TwilioClient:
    """Observing never modifies; setting a webhook twice is the same as once.

    Raises `TwilioUnavailable`, or `Refused` where trying again alone mends nothing; at once, without a call, where
    the gate knows the answer.
    """

    def __init__(self, gate: Gate, *, api_origin: str, messaging_origin: str, timeout: float) -> None:
        self._gate = gate
        self._origins = {
            "https://api.twilio.com": api_origin,
            "https://messaging.twilio.com": messaging_origin,
        }
        self._timeout = timeout
        self._transport: _Transport | None = None

    async def __aenter__(self) -> Self:
        self._transport = _Transport(self._origins, self._timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._transport:
            await self._transport.session.close()

    def forget_refusal(self, login: Login, account_sid: str) -> None:
        """What is asked next is asked, whatever was answered before: somebody says that it may go better now."""
        for whose in (account_sid, _services_of(account_sid)):
            self._gate.forget_refusal(login, whose)

    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None:
        """The number of the account that is exactly `phone_number`; None where it has none."""
        numbers = self._account(login, account_sid).incoming_phone_numbers
        try:
            async with self._gate.call(login, account_sid):
                with _understood():
                    found = await numbers.list_async(phone_number=phone_number)  # matches parts of numbers too
                    return next((_number(each) for each in found if each.phone_number == phone_number), None)
        except NotFound:
            return None

    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None:
        """The number with this SID; None where it is gone from the account."""
        number = self._account(login, account_sid).incoming_phone_numbers(number_sid)
        try:
            async with self._gate.call(login, account_sid):
                with _understood():
                    return _number(await number.fetch_async())
        except NotFound:
            return None

    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number:
        """Returns the number as it is afterwards, from Twilio's answer. Raises `NotFound` too."""
        number = self._account(login, account_sid).incoming_phone_numbers(number_sid)
        async with self._gate.call(login, account_sid):
            with _understood():
                return _number(await number.update_async(sms_url=webhook.url, sms_method=webhook.method))

    async def number_pages(self, login: Login, account_sid: str) -> AsyncIterator[list[Number]]:
        """The account's numbers, up to 1,000 with each call; none where the login does not reach the account."""
        numbers = self._account(login, account_sid).incoming_phone_numbers
        page: Any = None
        while True:
            try:
                async with self._gate.call(login, account_sid):
                    with _understood():
                        page = await (page.next_page_async() if page else numbers.page_async(page_size=_PAGE))
                        here = [_number(each) for each in page or ()]
            except NotFound:
                return
            yield here
            if not page or not page.next_page_url:
                return

    async def overriding_services(self, login: Login, account_sid: str) -> dict[str, str]:
        """Which of the account's numbers a Messaging Service answers for, as {number SID: service SID}.

        A page of services costs one call; each service that does not leave its messages to the number's webhook,
        one more for 1,000 numbers of its own.
        """
        messaging = self._client(login, account_sid).messaging.v1
        overridden: dict[str, str] = {}
        async with self._gate.call(login, _services_of(account_sid)):
            with _understood():
                for service in await messaging.services.list_async(page_size=_PAGE):
                    if service.use_inbound_webhook_on_number or service.account_sid != account_sid:
                        continue
                    members = messaging.services(service.sid).phone_numbers
                    for member in await members.list_async(page_size=_PAGE):
                        overridden[str(member.sid)] = str(service.sid)
        return overridden

    def _client(self, login: Login, account_sid: str) -> Any:
        return Client(
            login.sid,
            login.token.get_secret_value(),
            account_sid,
            http_client=self._transport,
            environment=_NO_ENVIRONMENT,
        )

    def _account(self, login: Login, account_sid: str) -> Any:
        return self._client(login, account_sid).api.v2010.accounts(account_sid)


def _services_of(account_sid: str) -> str:
    """For the gate: who is refused by one of Twilio's APIs, or waits for it, may be welcome at the other."""
    return f"services of {account_sid}"


@contextmanager
def _understood() -> Iterator[None]:
    """JSON of another shape than Twilio's must not look like a mistake of ours."""
    try:
        yield
    except (TwilioException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TwilioUnavailable(f"Twilio's answer is not understood ({type(error).__name__}).") from None


class _Transport(AsyncHttpClient):  # type: ignore[misc]  # twilio-python has no types
    """twilio-python's seam, one method wide."""

    def __init__(self, origins: Mapping[str, str], timeout: float) -> None:
        self.is_async = True  # the base class would keep a logger that prints SIDs and phone numbers
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=timeout, connect=5),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._origins = origins

    async def request(
        self,
        method: str,
        url: str,
        params: Mapping[str, object] | None = None,
        data: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  (the base class's signature)
        allow_redirects: bool = False,
    ) -> Response:
        assert auth, "twilio-python was given a login"
        url = self._configured(url)
        status, answer, retry_after = await self._send(method, url, params, data, aiohttp.encode_basic_auth(*auth))
        if status < 300:
            return Response(status, answer)
        raise twilio_error(status, answer, retry_after)

    def _configured(self, url: str) -> str:
        """Twilio's origin exchanged for the configured one. Links to further pages come from answers: a login is
        sent nowhere else, whatever they say.
        """
        for known, configured in self._origins.items():
            for origin in (known, configured):
                if url.startswith(f"{origin}/"):
                    return configured + url.removeprefix(origin)
        raise TwilioUnavailable("Twilio's answer names a further page that is not at Twilio.")

    async def _send(
        self,
        method: str,
        url: str,
        params: Mapping[str, object] | None,
        form: Mapping[str, object] | None,
        authorization: str,
    ) -> tuple[int, str, float | None]:
        """Status, body (JSON, checked) and Retry-After in seconds."""
        kind = _kind(method, url, params or {})
        query = {name: str(value) for name, value in (params or {}).items()}
        started = time.perf_counter()
        outcome = "error"
        try:
            async with self.session.request(
                method,
                url,
                params=query,
                data=form,
                headers={"Authorization": authorization, "Accept": "application/json"},
                allow_redirects=False,
            ) as response:
                answer = await response.text()
                outcome = str(response.status)
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeDecodeError) as error:
            kind_of = TwilioTimeout if isinstance(error, TimeoutError) else TwilioUnavailable
            raise kind_of(f"Twilio does not answer ({type(error).__name__}).") from None
        finally:
            TWILIO_SECONDS.labels(kind, outcome).observe(time.perf_counter() - started)
        if response.status < 300:
            _object(answer, response.status)
        return response.status, answer, retry_after_seconds(response.headers.get("Retry-After"))


def _kind(method: str, url: str, params: Mapping[str, object]) -> str:
    """For the metrics."""
    if method == "POST":
        return "set_webhook"
    if "/v1/Services" in url:
        return "read_services"
    if "PhoneNumber" in params:
        return "find_number"
    return "fetch_number" if "/IncomingPhoneNumbers/PN" in url else "list_numbers"


def twilio_error(status: int, body: str, retry_after: float | None = None) -> ChannelError:
    """Twilio's refusal as one of our errors: from the HTTP status and the code in the body, never from its words."""
    try:
        code = int(_object(body, status).get("code") or 0)
    except (TwilioUnavailable, TypeError, ValueError, OverflowError):
        code = 0
    told = f"Twilio answers HTTP {status}" + (f", code {code}" if code else "")
    if status == 429:
        return TwilioThrottled(f"{told}.", retry_after)
    if status >= 500:
        return TwilioUnavailable(f"{told}.", retry_after)
    if code in _SUSPENDED:
        return Refused(Reason.AccountSuspended, f"The Twilio account is suspended or closed ({told}).")
    if code == 20008:
        return Refused(Reason.AuthenticationFailed, f"These are test credentials, which own no numbers ({told}).")
    if status in {401, 403}:
        return Refused(Reason.AuthenticationFailed, f"Twilio refuses the credentials ({told}).")
    if code in _LACKS_SMS:
        return Refused(Reason.NumberLacksSms, f"The number cannot receive SMS ({told}).")
    if code == 21406:
        message = f"Twilio does not clear the webhook of a number that has a fallback URL: remove that first ({told})."
        return Refused(Reason.WebhookRefused, message)
    if code in _WEBHOOK_REFUSED:
        return Refused(Reason.WebhookRefused, f"Twilio refuses the webhook ({told}).")
    if code == 20404:  # a 404 without it is a proxy's or a wrong URL's: nothing may be written off for that
        return NotFound(f"{told}.")
    return TwilioUnavailable(f"{told}, which is not known here.")


def _object(body: str, status: int) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if isinstance(document, dict):
        return document
    raise TwilioUnavailable(f"Twilio answers HTTP {status} with something that is not its JSON.")


def _number(instance: IncomingPhoneNumberInstance) -> Number:
    capabilities: Any = instance.capabilities or {}
    return Number(
        sid=str(instance.sid),
        phone_number=str(instance.phone_number),
        webhook=Webhook(url=instance.sms_url or "", method=instance.sms_method or "POST"),
        application_sid=instance.sms_application_sid or "",
        receives_sms=bool(capabilities.get("sms", True)),
    )
