"""Give every request an ID, a time limit and a JSON answer; count it, and log writes.

Errors become answers here and nowhere else. Neither answers nor logs quote what a client sent: it could be a token.
"""

from __future__ import annotations

import asyncio
import random
import re
import traceback
import uuid
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import structlog
from aiohttp import ClientError, web
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from api_shim.auth import Caller, Unauthenticated
from api_shim.clients import Network, Shares, client_of
from api_shim.connections import Connection, ConnectionLimits
from api_shim.metrics import AUTHENTICATION_FAILURES, IN_FLIGHT, count
from api_shim.schemas import HttpError
from smschannel.api.errors import KubernetesRefused, NoKindMatch, NotFound, Retryable

BODY_BYTES = 64 * 1024
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


class TooManyOfCaller(HttpError):
    """429: the caller, or before its authentication its address, has all of its share of requests in flight."""

    def __init__(self) -> None:
        super().__init__(
            429, "You have too many concurrent requests. Try again when some are answered.", Retry_After="1"
        )


class _Place:
    """A request's place among those in flight: of its address, and of its caller once that is known."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._holder: str | None = None

    def move(self, holder: str) -> None:
        """Give back the place, and take one of `holder`. Raises `TooManyOfCaller`."""
        self.leave()
        if not self._shares.take(holder):
            raise TooManyOfCaller
        self._holder = holder

    def leave(self) -> None:
        """Give back the place, if there is one."""
        if self._holder is not None:
            self._shares.give_back(self._holder)
            self._holder = None


CALLER = web.RequestKey("caller", Caller)
INSTANCE = web.RequestKey("instance", str)
TIME_LIMIT = web.RequestKey("time_limit", asyncio.Timeout)
WRITTEN = web.RequestKey("written", dict[str, Any])
_ID = web.RequestKey("id", str)
_PLACE = web.RequestKey("place", _Place)

log = structlog.get_logger()


class HttpServer:
    """Add routes to `application`, and run `runner`. `namespace` is that of the channels, for the log."""

    def __init__(
        self,
        *,
        namespace: str,
        max_requests: int,
        max_requests_per_caller: int,
        connections: ConnectionLimits,
        request_seconds: float,
        trusted_proxies: Sequence[Network],
    ) -> None:
        self._namespace = namespace
        self._max_requests = max_requests
        self._shares = Shares(max_requests_per_caller)
        self._connections = connections
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
            self._connections,
            access_log=None,
            shutdown_timeout=shutdown_seconds,
            keepalive_timeout=_KEEPALIVE_SECONDS,
            handler_cancellation=True,  # a client that disconnects ends its waiting
        )

    def client(self, request: web.Request) -> str:
        """Return the address of the request's client, as `clients.client_of` does."""
        return client_of(request.remote, request.headers.getall("X-Forwarded-For", ()), self._trusted_proxies)

    def identify(self, request: web.Request, caller: Caller) -> None:
        """Count the request for its caller from now on. Raises `HttpError` (429) if the caller has too many."""
        request[_PLACE].move(caller.share)
        request[CALLER] = caller

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
                **request.get(WRITTEN, {}),
            )

    async def _respond(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _PROBES:
            return await self._answer(request, handler)
        if self._in_flight > self._max_requests:
            return _response(HttpError(503, "Too many concurrent requests. Try again.", Retry_After="1"))
        place = request[_PLACE] = _Place(self._shares)
        try:
            place.move(f"address:{self.client(request)}")
            return await self._answer(request, handler)
        except TooManyOfCaller as error:
            return _response(error)
        finally:
            place.leave()

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
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
        pipelined = isinstance(request.protocol, Connection) and request.protocol.has_read_ahead
        if self.draining or pipelined:  # the client's next request then goes to another replica, or another connection
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


class _Server(web.Server):
    """Create a `Connection` for each connection."""

    limits: ConnectionLimits

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, limits=self.limits, messages=_MESSAGES, **self._kwargs)


class _Runner(web.AppRunner):
    """Run a `_Server`, which aiohttp offers no option for."""

    def __init__(self, application: web.Application, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(application, **options)
        self._limits = limits

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()

        async def handle(request: Any) -> web.StreamResponse:
            try:
                return await made.request_handler(request)
            except web.HTTPException as error:  # raised before the middleware runs: the Expect header
                response = _response(_http_error(error, request))
                response.headers.update({"X-Request-Id": _new_id(), "Server": "sms-channels"})
                return response

        server = _Server(
            handle,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )
        server.limits = self._limits
        return server
