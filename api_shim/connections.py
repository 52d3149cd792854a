"""Limit what one connection, one client's connections, and all connections may use, before anybody is authenticated.

aiohttp reads 32 requests of a connection ahead, and waits forever for a client that does not read its answers. Here a
connection is closed after an answer if the client did not wait for it before its next request, has at most 64 KiB of a
head, and is aborted if an answer is not read in time.
"""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any, cast

import structlog
from aiohttp import web, web_protocol
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from api_shim.clients import Network, Shares, client_of, is_trusted
from api_shim.metrics import CONNECTIONS, CONNECTIONS_REFUSED, count

HEAD_BYTES = 64 * 1024
_HEAD_SECONDS = 10  # from the first byte of a request's head, or from the connection, to its last
_TLS_SECONDS = 10  # for a handshake, and for the end of a TLS connection; asyncio's are 60 and 30
_UNREAD_SECONDS = 10  # answers are small: a client that has not read one for so long is not going to
_SOCKET_BYTES = 64 * 1024  # the kernel's buffers count as this process's memory in a container
_BODY = json.dumps({"detail": "Too many connections. Close some, or try again."})
_REFUSED = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nRetry-After: 5\r\n"
    f"Cache-Control: no-store\r\nConnection: close\r\nContent-Length: {len(_BODY)}\r\n\r\n{_BODY}"
).encode()

log = structlog.get_logger()

web_protocol.MAX_MSG_QUEUE_SIZE = 2  # requests of one connection that are read ahead; aiohttp has no option for it


class ConnectionLimits:
    """Admit at most `total` connections, and `per_client` of each address that is not a trusted proxy's."""

    def __init__(self, total: int, per_client: int, trusted_proxies: Sequence[Network]) -> None:
        self._total = total
        self._shares = Shares(per_client)
        self._trusted = trusted_proxies
        self._open = 0
        CONNECTIONS.set_function(lambda: self._open)

    def admit(self, peer: str | None) -> bool:
        """Return whether a connection from this address may stay; if so, `release` it at its end."""
        if self._open >= self._total or not (self._is_exempt(peer) or self._shares.take(client_of(peer, (), ()))):
            CONNECTIONS_REFUSED.labels("too_many").inc()
            return False
        self._open += 1
        return True

    def release(self, peer: str | None) -> None:
        """Count a connection no more that `admit` returned True for."""
        self._open -= 1
        if not self._is_exempt(peer):
            self._shares.give_back(client_of(peer, (), ()))

    def _is_exempt(self, peer: str | None) -> bool:
        return is_trusted(peer, self._trusted)


class Connection(RequestHandler):
    """One connection: limited in number, time and memory; it answers malformed HTTP in JSON too."""

    __slots__ = ("_admitted", "_body", "_head_bytes", "_limits", "_messages_of", "_peer", "_unread")

    def __init__(self, *args: Any, limits: ConnectionLimits, messages: dict[int, str], **options: Any) -> None:
        """`messages` are the texts of errors by status."""
        super().__init__(*args, **options)
        self._limits = limits
        self._messages_of = messages
        self._peer: str | None = None
        self._admitted = False
        self._head_bytes = 0  # of the head that is being received
        self._body: Any = EMPTY_PAYLOAD  # of the request that was received last
        self._unread: asyncio.TimerHandle | None = None

    @property
    def has_read_ahead(self) -> bool:
        """Return whether the client sent another request before this one was answered (pipelining).

        Such a connection is closed after the answer, as HTTP allows: nobody gets more turns than one per connection.
        """
        return bool(self._messages)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else None
        self._admitted = self._limits.admit(self._peer)
        if not self._admitted:
            self._force_close = True  # what the client sends is dropped
            if transport.get_extra_info("sslcontext"):
                transport.abort()  # closing TLS would wait for the client
            else:
                transport.write(_REFUSED)
                transport.close()
            return
        transport.set_write_buffer_limits(high=1, low=0)  # whatever the kernel does not take pauses this connection
        if connected := transport.get_extra_info("socket"):
            with suppress(OSError):
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        super().connection_made(transport)
        self._expect_head()  # by default, aiohttp waits for the first request as long as between two requests

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self._admitted:
            return
        self._admitted = False
        self._limits.release(self._peer)
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Limit the size of a head, and the time until it is complete."""
        received = self._request_count
        in_body = not self._body.is_eof()
        super().data_received(data)
        if self._request_count != received:
            self._head_bytes = 0
            if self._messages:
                self._body = self._messages[-1][1]
        elif data and not in_body and not self._messages and not self._force_close:
            if self._waiter is not None and self._next_keepalive_close_time > self._loop.time() + _HEAD_SECONDS:
                self._expect_head()  # the next request of a connection that was kept alive
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse_head()

    def _expect_head(self) -> None:
        """Close the connection unless a request's head is complete in time."""
        if self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
        self._next_keepalive_close_time = self._loop.time() + _HEAD_SECONDS
        self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)

    def _refuse_head(self) -> None:
        """Answer 400, and drop what follows."""
        self._close = True
        self._messages.append((_ErrInfo(status=400, exc=BadHttpMessage("head"), message=""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self._unread = self._loop.call_later(_UNREAD_SECONDS, self._abort, self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _abort(self, transport: asyncio.Transport) -> None:
        """Drop the connection with what was not read; closing it would wait for the client."""
        CONNECTIONS_REFUSED.labels("unread").inc()
        log.info("aborted connection, its client does not read", client=client_of(self._peer, (), ()))
        transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        log.info("rejected malformed request", status=status, error=type(exc).__name__)
        count("malformed", "other", status, 0)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer was sent in part")
        body = json.dumps({"detail": self._messages_of.get(status, HTTPStatus(status).phrase)})
        # without a Server header, aiohttp adds its own
        headers = {"X-Request-Id": str(uuid.uuid4()), "Server": "sms-channels"}
        response = web.Response(status=status, text=body, content_type="application/json", headers=headers)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log an error without its text: aiohttp's errors about a malformed body quote it."""
        log.info("connection failed", error=type(kw.get("exc_info")).__name__)


class Site(web.TCPSite):
    """A TCPSite with time limits for TLS, for which aiohttp has no option."""

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        tls_seconds = _TLS_SECONDS if self._ssl_context else None  # None is the only value without TLS
        listening = await asyncio.get_running_loop().create_server(
            server,
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=tls_seconds,
            ssl_shutdown_timeout=tls_seconds,
        )
        self._server = listening
        self._bound_port = listening.sockets[0].getsockname()[1]
