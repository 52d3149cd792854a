"""Give every request an ID, a time limit and a JSON answer; count it, and log writes.

Errors become answers here and nowhere else. Neither answers nor logs quote what a client sent: it could be a token.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import traceback
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from time import perf_counter
from typing import Any

import structlog
from aiohttp import ClientError, web
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from api_shim.auth import Caller, Unauthenticated
from api_shim.clients import Network, client_of
from api_shim.metrics import AUTHENTICATION_FAILURES, IN_FLIGHT, count
from api_shim.schemas import HttpError
from smschannel.api.errors import KubernetesRefused, NoKindMatch, NotFound, Retryable

BODY_BYTES = 64 * 1024
_HEAD_SECONDS = 10
_KEEPALIVE_SECONDS = 75  # longer than proxies keep connections: the proxy closes first, and never uses a closed one
_REQUEST_ID = re.compile(r"[-._~+/=:@a-zA-Z0-9]{1,128}")
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for logs and metrics; it is never sent
_METHODS = {"GET", "POST", "DELETE"}
_PROBES = {"/healthz", "/readyz", "/metrics"}
_MESSAGES = {
    400: "Malformed HTTP request: check the encoding of the body, and the head, which may have 128 headers and lines of"
    " 8190 bytes.",
    404: "Not found. The calls of this API are at /v1/instances/{instance_id}/channels/sms.",
    405: "Method not allowed. The Allow header lists the methods of this path.",
    413: f"The body is larger than {BODY_BYTES} bytes.",
    417: "The only supported expectation is 100-continue.",
}

CALLER = web.RequestKey("caller", Caller)
INSTANCE = web.RequestKey("instance", str)
TIME_LIMIT = web.RequestKey("time_limit", asyncio.Timeout)
_ID = web.RequestKey("id", str)

log = structlog.get_logger()


class HttpServer:
    """Add routes to `application`, and run `runner`. `namespace` is that of the channels, for the log."""

    def __init__(
        self, *, namespace: str, max_requests: int, request_seconds: float, trusted_proxies: Sequence[Network]
    ) -> None:
        self._namespace = namespace
        self._max_requests = max_requests
        self._seconds = request_seconds
        self._trusted_proxies = trusted_proxies
        self._in_flight = 0
        IN_FLIGHT.set_function(lambda: self._in_flight)
        self.draining = False
        self.application = web.Application(middlewares=[self._measure], client_max_size=BODY_BYTES)
        self.application.on_response_prepare.append(self._add_headers)

    def runner(self, shutdown_seconds: float) -> web.AppRunner:
        """Return a runner that, at cleanup, gives requests in flight `shutdown_seconds` to finish."""
        return _Runner(
            self.application,
            access_log=None,
            shutdown_timeout=shutdown_seconds,
            keepalive_timeout=_KEEPALIVE_SECONDS,
            handler_cancellation=True,  # a client that disconnects ends its waiting
        )

    def client(self, request: web.Request) -> str:
        """Return the address of the request's client, as `clients.client_of` does."""
        return client_of(request.remote, request.headers.getall("X-Forwarded-For", ()), self._trusted_proxies)

    @web.middleware
    async def _measure(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        start = perf_counter()
        request[_ID] = _request_id(request)
        status = _CLIENT_CLOSED_REQUEST
        self._in_flight += 1
        try:
            response = await self._respond(request, handler)
            status = response.status
            return response
        finally:
            self._in_flight -= 1
            self._record(request, status, perf_counter() - start)

    def _record(self, request: web.Request, status: int, seconds: float) -> None:
        """Count the request, and log it if it is an authenticated write."""
        resource = request.match_info.route.resource
        route = resource.canonical if resource else "other"
        method = request.method if request.method in _METHODS else "other"
        count(route, method, status, seconds)
        if CALLER in request and request.method != "GET":
            log.info(
                "handled write request",
                method=request.method,
                namespace=self._namespace,
                name=request.get(INSTANCE),
                status=status,
                caller=str(request[CALLER]),
                client=self.client(request),
                request_id=request[_ID],
            )

    async def _respond(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._in_flight > self._max_requests and request.path not in _PROBES:
            return _response(HttpError(503, "Too many concurrent requests. Try again.", Retry_After="1"))
        try:
            async with asyncio.timeout(self._seconds) as request[TIME_LIMIT]:
                return await handler(request)
        except Exception as error:
            answer = _http_error(error, request)
            if isinstance(answer, Unauthenticated):
                AUTHENTICATION_FAILURES.inc()
                log.info(
                    "rejected credentials",
                    client=self.client(request),
                    reason=str(answer.detail),
                    request_id=request[_ID],
                )
            return _response(answer)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Request-Id"] = request.get(_ID) or _request_id(request)
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.popall("Server", None)  # does not reveal the software and its version
        if self.draining:  # the client's next request then goes to another replica
            response.headers["Connection"] = "close"
            response.force_close()


def _http_error(error: Exception, request: web.Request) -> HttpError:
    """Return the answer to a request that failed with `error`, and log what an administrator must know."""
    match error:
        case HttpError():
            return error
        case web.HTTPException():
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return HttpError(error.status, _MESSAGES.get(error.status, error.reason), **allow)
        case KubernetesRefused() | NotFound():  # a missing right, namespace or CRD, or an admission policy
            hint = "is the CRD installed? kubectl apply -f crds/" if isinstance(error, NoKindMatch) else None
            log.error("Kubernetes refused a call", error=str(error), hint=hint, request_id=request[_ID])
            detail = "Kubernetes refuses this request; the service's log has the reason under the request ID."
            return HttpError(503, detail, Retry_After="30")
        case Retryable():
            log.warning("Kubernetes is not available", error=str(error), request_id=request[_ID])
            seconds = max(1, round(error.retry_after or 5))
            return HttpError(503, "Kubernetes is not available. Try again.", Retry_After=f"{seconds}")
        case TimeoutError():
            log.warning("Kubernetes did not answer in time", request_id=request[_ID])
            return HttpError(503, "Kubernetes did not answer in time. Try again.", Retry_After="5")
        case RequestPayloadError() | ClientError() | ConnectionError():  # of the client; Kubernetes' are above
            return HttpError(400, "The body is incomplete or malformed.")
    # The traceback without the error's text, which could quote what the client sent.
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("unexpected error", error=type(error).__name__, trace=trace, request_id=request[_ID])
    return HttpError(500, "Internal server error; the service's log has the details under the request ID.")


def _response(error: HttpError) -> web.Response:
    response = web.json_response({"detail": error.detail}, status=error.status, headers=error.headers)
    if error.status in {408, 413}:  # the rest of the body is not read
        response.force_close()
    return response


def _request_id(request: web.BaseRequest) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if given and _REQUEST_ID.fullmatch(given) else _new_id()


def _new_id() -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


class _Connection(RequestHandler):
    """Limit the time until the first request of a connection, and answer malformed HTTP in JSON too."""

    __slots__ = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # By default, aiohttp waits for the first request as long as between two requests.
        if self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
        self._next_keepalive_close_time = self._loop.time() + _HEAD_SECONDS
        self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)

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
        body = json.dumps({"detail": _MESSAGES.get(status, HTTPStatus(status).phrase)})
        headers = {"X-Request-Id": _new_id(), "Server": "sms-channels"}  # without a Server header, aiohttp adds its own
        response = web.Response(status=status, text=body, content_type="application/json", headers=headers)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log an error without its text: aiohttp's errors about a malformed body quote it."""
        log.info("connection failed", error=type(kw.get("exc_info")).__name__)


class _Server(web.Server):
    """Create a `_Connection` for each connection."""

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    """Run a `_Server`, which aiohttp offers no option for."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()

        async def handle(request: Any) -> web.StreamResponse:
            try:
                return await made.request_handler(request)
            except web.HTTPException as error:  # raised before the middleware runs: the Expect header
                response = _response(_http_error(error, request))
                response.headers.update({"X-Request-Id": _new_id(), "Server": "sms-channels"})
                return response

        return _Server(
            handle,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )
