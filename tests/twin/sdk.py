"""A twin set up for a test: served, seeded, and called through Twilio's own SDK, raw HTTP and the control API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
from aiohttp import encode_basic_auth
from twilio.http.response import Response
from twilio.rest import Client

from tests.twin.app import twin_server
from tests.twin.state import Account, Number, Twin

_TWILIO_HOSTS = ("https://api.twilio.com", "https://messaging.twilio.com")


class Reply(NamedTuple):
    """A raw answer; `document` is its JSON, or None without a body."""

    status: int
    headers: Mapping[str, str]
    document: Any


class Transport:
    """The SDK's HTTP client, with Twilio's hosts mapped to the twin's.

    It does not derive from the SDK's AsyncTwilioHttpClient, which ignores its timeout and uses what aiohttp
    3.14 deprecates; `is_async` and `request` are all that the SDK needs.
    """

    is_async = True

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session = session
        self._base_url = base_url

    async def request(
        self,
        method: str,
        url: str,
        params: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (the SDK's signature)
        allow_redirects: bool = False,
    ) -> Response:
        for host in _TWILIO_HOSTS:
            url = url.replace(host, self._base_url, 1)
        sent = dict(headers or {})
        if auth is not None:
            sent["Authorization"] = encode_basic_auth(*auth)
        async with self._session.request(
            method, url, params=params, data=data, headers=sent, allow_redirects=allow_redirects
        ) as answer:
            return Response(answer.status, await answer.text(), answer.headers)


def sdk_client(
    session: aiohttp.ClientSession, url: str, username: str, password: str, account_sid: str | None = None
) -> Client:
    """Return Twilio's Client for the twin. `account_sid` is the account to use, if not the one that logs in."""
    return Client(
        username,
        password,
        account_sid,
        http_client=Transport(session, url),
        # Not empty: an empty mapping is falsy, and the SDK would read TWILIO_* from the environment.
        environment={"TWILIO": "twin"},
    )


@dataclass(frozen=True, slots=True)
class Stage:
    """A served twin with one seeded account."""

    twin: Twin
    account: Account
    url: str
    session: aiohttp.ClientSession

    @property
    def numbers(self) -> list[Number]:
        return list(self.account.numbers)

    @property
    def path(self) -> str:
        """Return the path of the account's resources in the 2010 API."""
        return f"/2010-04-01/Accounts/{self.account.sid}"

    def client(self, account_sid: str | None = None) -> Client:
        return sdk_client(self.session, self.url, self.account.sid, self.account.auth_token, account_sid)

    async def call(
        self,
        method: str,
        path: str,
        *,
        form: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Make a raw call of Twilio's API, as the account itself unless `auth` or `headers` are given."""
        username, password = auth or (self.account.sid, self.account.auth_token)
        sent = headers if headers is not None else {"Authorization": encode_basic_auth(username, password)}
        return await self._send(method, path, data=form, headers=sent)

    async def control(self, method: str, path: str, body: object = None) -> Reply:
        """Call the control API; `path` is the part after /_twin."""
        return await self._send(method, f"/_twin{path}", json=body)

    async def _send(self, method: str, path: str, **content: Any) -> Reply:
        async with self.session.request(method, self.url + path, **content) as answer:
            text = await answer.text()
            return Reply(answer.status, answer.headers, json.loads(text) if text else None)


@asynccontextmanager
async def open_stage(twin: Twin | None = None, numbers: int = 7) -> AsyncIterator[Stage]:
    """Serve `twin` (a new one by default) with one more account, of `numbers` numbers."""
    twin = twin or Twin()
    [account] = twin.seed(accounts=1, numbers=numbers)
    async with twin_server(twin) as url, aiohttp.ClientSession() as session:
        yield Stage(twin, account, url, session)


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until `condition` holds; TimeoutError after ten seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (there is no event for this state)
            await asyncio.sleep(0)
