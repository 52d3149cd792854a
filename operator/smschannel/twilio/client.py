"""The client for Twilio: reads numbers and Messaging Services, and sets a number's `SmsUrl` and `SmsMethod`.

Requests are built by twilio-python and sent over shared connections, with timeouts (the library's own have no
effect), never follows a redirect, and turns Twilio's error answers into this project's errors before the library
sees them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
from twilio.base.exceptions import TwilioException
from twilio.http import AsyncHttpClient
from twilio.http.response import Response
from twilio.rest import Client
from twilio.rest.api.v2010.account.incoming_phone_number import IncomingPhoneNumberInstance

from smschannel.api.causes import in_words
from smschannel.api.egress import proxy_for, public_tls
from smschannel.api.errors import (
    ChannelError,
    LeaseEndsSoon,
    NotFound,
    Refused,
    TwilioThrottled,
    TwilioTimeout,
    TwilioUnavailable,
    retry_after_seconds,
)
from smschannel.api.http import AnswerTooLarge, HttpClient
from smschannel.api.reasons import Reason
from smschannel.api.text import unsendable
from smschannel.core.plan import Number
from smschannel.core.record import Login, Webhook
from smschannel.metrics import TWILIO_SECONDS
from smschannel.twilio.answers import MOST_BYTES, check_number, json_object, text_of, too_large
from smschannel.twilio.limits import Limiter, Origin

_NO_ENVIRONMENT = {"": ""}
"""Not empty: else twilio-python reads TWILIO_* from the process's environment, another token or another host."""

_SUSPENDED = {20005, 20403, 10001}
_WEBHOOK_REFUSED = {21402, 21403}
_HEADERS = (("Accept", "application/json"), ("Accept-Encoding", "gzip"), ("User-Agent", "sms-channel-operator"))
_MOST_CONNECTIONS = 1000  # the limiter has narrower ones
_PAGE_SIZE = 1000
_MOST_PAGES = 1000
_LACKS_SMS = {21407}
_FIRST_CODE = 10_000
"""Twilio's error codes have five digits; a gateway's JSON may repeat the HTTP status as its `code`."""


class TwilioClient:
    """Calls Twilio within the limits of `limiter`; an async context manager that owns the connections.

    Reads never modify anything, and `set_webhook` is idempotent. Every method raises `TwilioUnavailable` where a later
    retry can help, and `Refused` where it cannot unless something changes; without a call where the limiter knows
    the result. `timeout` is the seconds that one call may take; `ca_bundle` a file of CA certificates (PEM) that are
    trusted beside the system's. Calls go through the proxy that HTTPS_PROXY names. Entering the context raises
    `EgressError` if one of these cannot be used.

    `lease_outlasts` says whether this process leads for so many seconds more. Twilio cannot tell the leader from a
    former one, so a request that writes is not sent, and raises `LeaseEndsSoon`, unless it must have ended before
    another process may lead.
    """

    def __init__(
        self,
        limiter: Limiter,
        *,
        api_origin: str,
        messaging_origin: str,
        timeout: float,
        lease_outlasts: Callable[[float], bool],
        ca_bundle: Path | None = None,
    ) -> None:
        self._limiter = limiter
        self._origins = {
            "https://api.twilio.com": api_origin,
            "https://messaging.twilio.com": messaging_origin,
        }
        self._timeout = timeout
        self._lease_outlasts = lease_outlasts
        self._ca_bundle = ca_bundle
        self._transport: _Transport | None = None

    async def __aenter__(self) -> Self:
        self._transport = _Transport(self._origins, self._timeout, self._lease_outlasts, self._ca_bundle)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._transport:
            await self._transport.close()

    def forget_refusal(self, login: Login, account_sid: str, *, older_than: float = 0) -> None:
        """Make the next call with these credentials although Twilio refused them, because a person asked for it.

        A refusal that is not `older_than` seconds old is kept.
        """
        self._limiter.forget_refusal(login, account_sid, older_than=older_than)

    def trust(self, login: Login, account_sid: str) -> None:
        """Count these credentials as accepted before: a record contains them."""
        self._limiter.trust(login, account_sid)

    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None:
        """Find the account's number that is exactly `phone_number`; None if it has none."""
        numbers = self._account(login, account_sid).incoming_phone_numbers
        try:
            async with self._limiter.call(login, account_sid):
                with _parsing():  # one page: an exact match is among the first, and a list may lead back to itself
                    page = await numbers.page_async(phone_number=phone_number, page_size=_PAGE_SIZE)
                    found = [_number(each, account_sid) for each in page]
                return next((each for each in found if each.phone_number == phone_number), None)  # it matches parts too
        except NotFound:
            return None

    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None:
        """Fetch the number with this SID; None if the account does not have it any more."""
        number = self._account(login, account_sid).incoming_phone_numbers(number_sid)
        try:
            async with self._limiter.call(login, account_sid):
                with _parsing():
                    return _number(await number.fetch_async(), account_sid, number_sid)
        except NotFound:
            return None

    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number:
        """Set the number's webhook. Return the number as Twilio's answer shows it; also raises `NotFound`."""
        number = self._account(login, account_sid).incoming_phone_numbers(number_sid)
        async with self._limiter.call(login, account_sid):
            with _parsing():
                changed = await number.update_async(sms_url=webhook.url, sms_method=webhook.method)
                return _number(changed, account_sid, number_sid)

    async def number_pages(self, login: Login, account_sid: str) -> AsyncIterator[list[Number]]:
        """Iterate over the account's numbers, up to 1,000 per call; over none if the login cannot see the account."""
        numbers = self._account(login, account_sid).incoming_phone_numbers
        try:
            async for page in self._pages(login, account_sid, "api", numbers):
                with _parsing():
                    here = [_number(each, account_sid) for each in page]
                yield here
        except NotFound:
            return

    async def overriding_services(self, login: Login, account_sid: str) -> dict[str, str]:
        """Return the numbers whose messages go to a Messaging Service, as {number SID: service SID}.

        Costs one call per 1,000 services, and for each service that does not leave its messages to the number's own
        webhook one call per 1,000 of its numbers.
        """
        services = self._client(login, account_sid).messaging.v1.services
        overridden: dict[str, str] = {}
        async for page in self._pages(login, account_sid, "messaging", services):
            for service in page:
                # The API answers with the services of the account that logs in, which may be the parent account.
                if service.use_inbound_webhook_on_number or service.account_sid != account_sid:
                    continue
                members = services(service.sid).phone_numbers
                async for numbers in self._pages(login, account_sid, "messaging", members):
                    overridden.update((str(each.sid), str(service.sid)) for each in numbers)
        return overridden

    async def _pages(self, login: Login, account_sid: str, origin: Origin, resource: Any) -> AsyncIterator[list[Any]]:
        """Iterate over the pages of one of twilio-python's lists, as a call of the limiter each.

        Raises `TwilioUnavailable` if the list leads back to itself, or does not end.
        """
        page: Any = None
        is_last = False
        links: set[str] = set()
        while not is_last:
            async with self._limiter.call(login, account_sid, origin=origin):
                with _parsing():
                    page = await (page.next_page_async() if page else resource.page_async(page_size=_PAGE_SIZE))
                    here, is_last = list(page), not page.next_page_url
            if page.next_page_url in links or len(links) >= _MOST_PAGES:
                raise TwilioUnavailable("Twilio's list does not end: its pages lead back to earlier ones.")
            links.add(page.next_page_url)
            yield here

    def _client(self, login: Login, account_sid: str) -> Any:
        """Return twilio-python's client. Building one per call is cheap, and no token is kept."""
        token = login.token.get_secret_value()
        _check_sendable(token)
        return Client(login.sid, token, account_sid, http_client=self._transport, environment=_NO_ENVIRONMENT)

    def _account(self, login: Login, account_sid: str) -> Any:
        return self._client(login, account_sid).api.v2010.accounts(account_sid)


def _check_sendable(token: str) -> None:
    """Raise `Refused` for a token with a character that HTTP basic authentication cannot carry, and no token has.

    Editors and word processors add such characters, mostly invisible ones: the message names the first.
    """
    if wrong := unsendable(token):
        raise Refused(
            Reason.AuthenticationFailed,
            f"The token contains {wrong}. Twilio's tokens and secrets contain no such character: copy the token again,"
            " as plain text in one line.",
        )


@contextmanager
def _parsing() -> Iterator[None]:
    """Turn the library's errors about unexpected JSON into `TwilioUnavailable`: the answer is wrong, not our code."""
    try:
        yield
    except (TwilioException, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise TwilioUnavailable("Twilio's answer lacks what it should contain, or has it in another form.") from None


class _Transport(AsyncHttpClient):  # type: ignore[misc]  # twilio-python has no types
    """The HTTP client that twilio-python calls: sends each request over the shared session."""

    def __init__(
        self,
        origins: Mapping[str, str],
        timeout: float,
        lease_outlasts: Callable[[float], bool],
        ca_bundle: Path | None,
    ) -> None:
        # The base class is not initialised: it makes a session of its own and a logger that prints phone numbers.
        self.is_async = True
        tls = public_tls(ca_bundle)
        self._proxies = {origin: proxy_for(origin) for origin in origins.values()}
        self._clients = {
            origin: HttpClient(
                origin, tls, timeout=timeout, limit=_MOST_CONNECTIONS, most_bytes=MOST_BYTES, proxy=proxy
            )
            for origin, proxy in self._proxies.items()
        }
        self._origins = origins
        self._timeout = timeout
        self._lease_outlasts = lease_outlasts

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()

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
        assert auth, "twilio-python always has credentials here"
        origin, path = self._configured(url)
        status, answer, retry_after = await self._send(method, origin, path, params or {}, data, auth)
        if status < 300:
            return Response(status, answer)
        raise twilio_error(status, answer, retry_after)

    def _configured(self, url: str) -> tuple[str, str]:
        """Return the configured origin in place of Twilio's, and the rest of the URL.

        Links to further pages come from answers. Raises `TwilioUnavailable` for one that leads to another origin, so
        that credentials are sent nowhere else.
        """
        for known, configured in self._origins.items():
            for origin in (known, configured):
                if url.startswith(f"{origin}/"):
                    return configured, url.removeprefix(origin)
        raise TwilioUnavailable("Twilio's answer links to a further page that is not at Twilio.")

    async def _send(
        self,
        method: str,
        origin: str,
        path: str,
        params: Mapping[str, object],
        form: Mapping[str, object] | None,
        auth: tuple[str, str],
    ) -> tuple[int, str, float | None]:
        """Send one request. Return status, body and Retry-After in seconds; below 300 the body is a JSON object.

        Raises `TwilioTimeout` when no answer came in time, else `TwilioUnavailable`; and `LeaseEndsSoon`.
        """
        kind = _kind(method, path, params)
        if method != "GET" and not self._lease_outlasts(self._timeout):
            raise LeaseEndsSoon("The write to Twilio was not sent: this process may not lead until it ends.")
        headers = [("Authorization", aiohttp.encode_basic_auth(*auth)), *_HEADERS]
        body = b""
        if form is not None:
            headers.append(("Content-Type", "application/x-www-form-urlencoded"))
            body = urlencode(form).encode()
        target = f"{path}?{urlencode(params)}" if params else path
        started = time.perf_counter()
        outcome = "error"
        try:
            found = await self._clients[origin].request(method, target, headers, body)
            answer = text_of(found)
            outcome = str(found.status)
        except AnswerTooLarge:
            raise too_large() from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if isinstance(error, TimeoutError):  # whether to connect or to answer: one message, for a stable status
                raise TwilioTimeout("Twilio does not answer in time.") from None
            raise TwilioUnavailable(f"Cannot reach Twilio: {in_words(error, self._proxies[origin])}.") from None
        finally:
            TWILIO_SECONDS.labels(kind, outcome).observe(time.perf_counter() - started)
        if found.status < 300:
            _object(answer, found.status)
        return found.status, answer, retry_after_seconds(found.headers.get("retry-after"))


def _kind(method: str, path: str, params: Mapping[str, object]) -> str:
    """Return the name of the call for the metrics."""
    if method == "POST":
        return "set_webhook"
    if "/v1/Services" in path:
        return "read_services"
    if "PhoneNumber" in params:
        return "find_number"
    return "fetch_number" if "/IncomingPhoneNumbers/PN" in path else "list_numbers"


def twilio_error(status: int, body: str, retry_after: float | None = None) -> ChannelError:
    """Map an error answer to an error of this project, by HTTP status and the code in the body, never by its text."""
    code = _code(body)
    answer = f"Twilio answers HTTP {status}" + (f", code {code}" if code else "")
    if status == 429:
        return TwilioThrottled(f"{answer}.", retry_after)
    if status >= 500:
        return TwilioUnavailable(f"{answer}.", retry_after)
    if code in _SUSPENDED:
        return Refused(Reason.AccountSuspended, f"The Twilio account is suspended or closed ({answer}).")
    if code == 20008:
        return Refused(Reason.AuthenticationFailed, f"These are test credentials, which have no numbers ({answer}).")
    if status in {401, 403} and code:
        return Refused(Reason.AuthenticationFailed, f"Twilio refuses the credentials ({answer}).")
    if code in _LACKS_SMS:
        return Refused(Reason.NumberLacksSms, f"The number cannot receive SMS ({answer}).")
    if code == 21406:
        message = (
            f"Twilio does not clear the webhook of a number with a fallback URL: remove that URL first ({answer})."
        )
        return Refused(Reason.WebhookRefused, message)
    if code in _WEBHOOK_REFUSED:
        return Refused(Reason.WebhookRefused, f"Twilio refuses the webhook ({answer}).")
    if code == 20404:  # a 404 without it comes from a proxy or a wrong URL, and does not mean that a number is gone
        return NotFound(f"{answer}.")
    if code:
        return TwilioUnavailable(f"{answer}, which is an unexpected error.")
    return TwilioUnavailable(
        f"The answer with HTTP {status} is not Twilio's: a proxy or gateway on the way to Twilio seems to have sent it."
    )


def _code(body: str) -> int:
    """Return Twilio's error code; 0 if the body is not an error of Twilio's."""
    try:
        code = int(_object(body, 0).get("code") or 0)
    except (TwilioUnavailable, TypeError, ValueError, OverflowError):
        return 0
    return code if code >= _FIRST_CODE else 0


def _object(body: str, status: int) -> dict[str, Any]:
    document = json_object(body)
    if document is not None:
        return document
    raise TwilioUnavailable(
        f"The answer with HTTP {status} is not a JSON object, so it is not Twilio's: a proxy or gateway on the way to"
        " Twilio seems to have sent it."
    )


def _number(instance: IncomingPhoneNumberInstance, account_sid: str, number_sid: str = "") -> Number:
    check_number(instance, account_sid, number_sid)
    capabilities: Any = instance.capabilities or {}
    return Number(
        sid=str(instance.sid),
        phone_number=str(instance.phone_number),
        webhook=Webhook(url=instance.sms_url or "", method=instance.sms_method or "POST"),
        application_sid=instance.sms_application_sid or "",
        receives_sms=bool(capabilities.get("sms", True)),
    )
