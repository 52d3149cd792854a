"""Sends HTTP/1.1 requests to one server over keep-alive connections, with little overhead.

aiohttp's client takes a third of the operator's CPU time per channel, most of it for features that are not used here.
So requests are written, and answers parsed by llhttp (httptools), in one protocol. Through a proxy aiohttp is used.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast
from urllib.parse import quote, urlsplit

import aiohttp
import httptools
from aiohappyeyeballs import start_connection
from multidict import CIMultiDict

Headers = Sequence[tuple[str, str]]
"""Names and values; a name may come several times."""

_CONNECT_SECONDS = 5
_KEEP_ALIVE_SECONDS = 30  # servers end idle connections, and a request that meets that end is lost
_NEXT_ADDRESS_SECONDS = 0.25  # the host's next address is tried beside a silent one
_REPEATABLE = {"GET", "PUT", "DELETE"}
_NOT_ESCAPED = "/:@!$&'()*+,;=%?"
_NO_BODY = {204, 304}
_MOST_HEADERS = 200  # with trailers
_MOST_HEADER_BYTES = 2**18


class AnswerTooLarge(aiohttp.ClientPayloadError):
    """The answer was refused before all of it was read."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"the answer is larger than {most_bytes // 2**20} MiB")


class NotHttp(aiohttp.ClientError):
    """The answer is not HTTP."""


class UnknownHost(OSError):
    """The host's name cannot be resolved; the message is the name."""


class Answer(NamedTuple):
    """`headers` are by lower-case name; the last of several with the same name counts. `body` is as it was sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """A client for the server of one URL, whose path comes before that of each request.

    A request takes at most `timeout` seconds, with the time that it waits while `limit` others are in flight.
    Redirects are not followed and bodies are not decompressed.
    """

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext | None,
        *,
        timeout: float,
        limit: int,
        most_bytes: int,
        proxy: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._prefix = parts.path.rstrip("/")
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._timeout = timeout
        self._host = parts.hostname or ""
        self._is_tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._name = parts.netloc.rpartition("@")[2]
        self._tls = tls or ssl.create_default_context() if self._is_tls else None
        self._most_bytes = most_bytes
        self._slots = asyncio.Semaphore(limit)
        self._idle: list[_Connection] = []
        self._connections: set[_Connection] = set()
        self._is_closed = False
        self._proxy = proxy
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections. Requests in flight fail, and so do later ones."""
        self._is_closed = True
        self._idle.clear()
        for connection in tuple(self._connections):
            connection.abort()
            await connection.closed.wait()
        if self._session:
            await self._session.close()

    async def request(self, method: str, target: str, headers: Headers, body: bytes = b"") -> Answer:
        """Send a request and return the answer; `target` is the path with the query.

        Raises `TimeoutError`, `OSError` (also TLS errors) and `aiohttp.ClientError`.
        """
        target = quote(self._prefix + target, safe=_NOT_ESCAPED)
        async with asyncio.timeout(self._timeout), self._slots:
            if self._proxy:
                return await self._through_proxy(method, target, headers, body)
            request = self._encoded(method, target, headers, body)
            if (connection := self._take_idle()) is not None:
                try:
                    return await self._exchange(connection, request)
                except (aiohttp.ServerDisconnectedError, ConnectionError):
                    # The server may have ended the idle connection. If it did not begin to answer, it has perhaps
                    # received the request all the same, so only a request that may be repeated is sent again, once.
                    if connection.has_begun or method not in _REPEATABLE:
                        raise
            return await self._exchange(await self._connect(), request)

    def _encoded(self, method: str, target: str, headers: Headers, body: bytes) -> bytes:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._name}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body or method not in {"GET", "DELETE"}:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise NotHttp("a header contains a line break")
        return head.encode() + b"\r\n\r\n" + body

    async def _exchange(self, connection: _Connection, request: bytes) -> Answer:
        answer = await connection.exchange(request)
        if connection.is_reusable:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.abort()
        return answer

    def _take_idle(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - _KEEP_ALIVE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        if self._is_closed:
            raise aiohttp.ServerDisconnectedError("the client is closed")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                plain = await start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_SECONDS)
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._connections, self._most_bytes),
                    sock=plain,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except socket.gaierror:
            raise UnknownHost(self._host) from None
        # Not before: uvloop does not report the end of a connection whose making was cancelled.
        if connection.is_open:
            self._connections.add(connection)
        if self._is_closed:
            connection.abort()
        return connection

    async def _through_proxy(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls or True, limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
                timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("Accept-Encoding", "User-Agent", "Content-Type"),
                auto_decompress=False,
            )
        async with self._session.request(
            method,
            f"{self._origin}{target}",
            headers=CIMultiDict(headers),
            data=body or None,
            allow_redirects=False,
            proxy=self._proxy,
        ) as response:
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > self._most_bytes:
                    raise AnswerTooLarge(self._most_bytes)
            names = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, names, bytes(content))


class _Connection(asyncio.Protocol):
    """One connection: sends one request after another and parses the answers. Ends at anything unexpected."""

    def __init__(self, connections: set[_Connection], most_bytes: int) -> None:
        """`connections` has this one while it is open."""
        self.closed = asyncio.Event()
        self.idle_since = 0.0
        self.is_open = False
        self.has_begun = False
        """Whether bytes of the last answer have arrived."""
        self._connections = connections
        self._most_bytes = most_bytes
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._reset()

    @property
    def is_reusable(self) -> bool:
        return self.is_open and self._keeps_alive

    async def exchange(self, request: bytes) -> Answer:
        assert self._transport, "connected"
        self._reset()
        self._size, self.has_begun, self._keeps_alive = 0, False, False
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:
            self.abort()
            raise
        finally:
            self._answer = None

    def abort(self) -> None:
        self.is_open = False
        if self._transport:
            self._transport.abort()

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.abort()  # nothing was asked
            return
        self.has_begun = True
        self._size += len(data)
        if self._size > self._most_bytes:
            self._fail(AnswerTooLarge(self._most_bytes))
            return
        try:
            self._parser.feed_data(data)
            if not self._has_headers and self._size > _MOST_HEADER_BYTES:
                self._fail(AnswerTooLarge(_MOST_HEADER_BYTES))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._answer.done():
                self._fail(NotHttp("not HTTP"))
            else:
                self.abort()  # more than the answer was sent

    def connection_lost(self, error: Exception | None) -> None:
        self.abort()  # asyncio counts a TLS connection that the server closed as open
        self._connections.discard(self)
        self.closed.set()
        if self._answer is None or self._answer.done():
            return
        if self._ends_with_connection and error is None:
            self.on_message_complete()
        elif self.has_begun:
            self._fail(aiohttp.ClientPayloadError("cut off"))
        else:
            self._fail(error or aiohttp.ServerDisconnectedError())

    def _fail(self, error: Exception) -> None:
        self.is_open = False
        assert self._answer
        self._answer.set_exception(error)

    # httptools

    def on_message_begin(self) -> None:
        if self._answer is not None and self._answer.done():
            self._keeps_alive = self.is_open = False  # more than one answer was sent
            self._reset()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        if self._header_count > _MOST_HEADERS:
            raise NotHttp("too many headers")  # httptools raises an error of its own then
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status, self._has_headers = self._parser.get_status_code(), True
        has_length = "content-length" in self._headers or "transfer-encoding" in self._headers
        self._ends_with_connection = not has_length and status not in _NO_BODY

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # the answer follows
            self._reset()
        elif self._answer is not None and not self._answer.done():
            self._keeps_alive = self._parser.should_keep_alive() and not self._ends_with_connection
            self._answer.set_result(Answer(status, self._headers, bytes(self._body)))

    def _reset(self) -> None:
        self._headers: dict[str, str] = {}
        self._header_count = 0
        self._has_headers = False
        self._body = bytearray()
        self._ends_with_connection = False
