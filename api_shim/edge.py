"""Where HTTP comes in: every request gets an id, a time limit and an answer in JSON, and is counted.

Refusals and errors become answers here and nowhere else. Nothing that was sent is quoted, neither to the client nor
in the log: it could be a token.
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

from api_shim.auth import Caller, LoginFailed
from api_shim.clients import Network, client_of
from api_shim.metrics import FAILED_LOGINS, IN_HAND, count
from api_shim.schemas import Refusal
from smschannel.api.errors import KubernetesRefused, NoKindMatch, NotFound, Retryable

BODY_BYTES = 64 * 1024
_HEAD_SECONDS = 10
_KEEPALIVE_SECONDS = 75  # longer than proxies keep theirs: who closes first should be they
_REQUEST_ID = re.compile(r"[-._~+/=:@a-zA-Z0-9]{1,128}")
_HUNG_UP = 499  # as nginx has it; nobody is there to read it
_METHODS = {"GET", "POST", "DELETE"}
_PROBES = {"/healthz", "/readyz", "/metrics"}
_DETAILS = {
    400: "This is no well-formed HTTP/1.1 request: look at how its body is encoded, and at its head, which may have"
    " 128 headers, and lines of 8190 bytes.",
    404: "There is nothing at this path. The calls are at /v1/instances/{instance_id}/channels/sms.",
    405: "This path does not take this method; the Allow header says which it takes.",
    417: "The only expectation that is met is 100-continue.",
    413: f"The body may have at most {BODY_BYTES} bytes.",
}

CALLER = web.RequestKey("caller", Caller)
INSTANCE = web.RequestKey("instance", str)
TIME_LIMIT = web.RequestKey("time_limit", asyncio.Timeout)
_ID = web.RequestKey("id", str)

log = structlog.get_logger()


class Edge:
    """`application` is what routes are added to; `runner` serves it."""

    def __init__(self, *, max_requests: int, request_seconds: float, trusted: Sequence[Network]) -> None:
        self._max_requests = max_requests
        self._seconds = request_seconds
        self._trusted = trusted
        self._in_hand = 0
        IN_HAND.set_function(lambda: self._in_hand)
        self.retiring = False
        self.application = web.Application(middlewares=[self._counted], client_max_size=BODY_BYTES)
        self.application.on_response_prepare.append(self._common_headers)

    def runner(self, shutdown_seconds: float) -> web.AppRunner:
        return _Runner(
            self.application,
            access_log=None,
            shutdown_timeout=shutdown_seconds,
            keepalive_timeout=_KEEPALIVE_SECONDS,
            handler_cancellation=True,  # who hangs up does not go on waiting
        )

    def client(self, request: web.Request) -> str:
        return client_of(request.remote, request.headers.getall("X-Forwarded-For", ()), self._trusted)

    @web.middleware
    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        start = perf_counter()
        request[_ID] = _request_id(request)
        status = _HUNG_UP
        self._in_hand += 1
        try:
            response = await self._answered(request, handler)
            status = response.status
            return response
        finally:
            self._in_hand -= 1
            self._account(request, status, perf_counter() - start)

    def _account(self, request: web.Request, status: int, seconds: float) -> None:
        resource = request.match_info.route.resource
        route = resource.canonical if resource else "other"
        method = request.method if request.method in _METHODS else "other"
        count(route, method, status, seconds)
        if CALLER in request and request.method != "GET":
            log.info(
                "asked to change a channel",
                method=request.method,
                who=str(request[CALLER]),
                client=self.client(request),
                instance=request.get(INSTANCE),
                status=status,
                request_id=request[_ID],
            )

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._in_hand > self._max_requests and request.path not in _PROBES:
            return _rendered(Refusal(503, "Too many requests at once. Try again.", Retry_After="1"))
        try:
            async with asyncio.timeout(self._seconds) as request[TIME_LIMIT]:
                return await handler(request)
        except Exception as error:
            refusal = _as_refusal(error, request)
            if isinstance(refusal, LoginFailed):
                FAILED_LOGINS.inc()
                log.info("login failed", client=self.client(request), why=str(refusal.detail), request_id=request[_ID])
            return _rendered(refusal)

    async def _common_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Request-Id"] = request.get(_ID) or _request_id(request)
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.popall("Server", None)  # which version of what this is, is nobody's business
        if self.retiring:  # the client's next request then goes to another replica
            response.headers["Connection"] = "close"
            response.force_close()


def _as_refusal(error: Exception, request: web.Request) -> Refusal:
    match error:
        case Refusal():
            return error
        case web.HTTPException():
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return Refusal(error.status, _DETAILS.get(error.status, error.reason), **allow)
        case KubernetesRefused() | NotFound():  # a missing right, namespace or CRD, or a policy that objects
            hint = "is the CRD installed? kubectl apply -f crds/" if isinstance(error, NoKindMatch) else None
            log.error("Kubernetes refuses", error=str(error), hint=hint, request_id=request[_ID])
            detail = "Kubernetes refuses this; the service's log says why, under the request id."
            return Refusal(503, detail, Retry_After="30")
        case Retryable():
            log.warning("Kubernetes is not available", error=str(error), request_id=request[_ID])
            seconds = max(1, round(error.retry_after or 5))
            return Refusal(503, "Kubernetes does not answer. Try again.", Retry_After=f"{seconds}")
        case TimeoutError():
            log.warning("Kubernetes is too slow", request_id=request[_ID])
            return Refusal(503, "Kubernetes takes too long. Try again.", Retry_After="5")
        case RequestPayloadError() | ClientError() | ConnectionError():  # of the client; those of Kubernetes are above
            return Refusal(400, "The body was cut or is malformed.")
    # Without the error's text, which could quote what was sent.
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("a mistake in this program", error=type(error).__name__, trace=trace, request_id=request[_ID])
    return Refusal(500, "Something went wrong here; the service's log says what, under the request id.")


def _rendered(refusal: Refusal) -> web.Response:
    response = web.json_response({"detail": refusal.detail}, status=refusal.status, headers=refusal.headers)
    if refusal.status in {408, 413}:  # what is left of the body is not read
        response.force_close()
    return response


def _request_id(request: web.BaseRequest) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if given and _REQUEST_ID.fullmatch(given) else _new_id()


def _new_id() -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


class _Connection(RequestHandler):
    """Bounds how long a client may take to say what it wants, and answers what is no HTTP as JSON, too."""

    __slots__ = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Until the first request's head is there, aiohttp waits for as long as between two requests.
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
        log.info("malformed request", status=status, error=type(exc).__name__)
        count("malformed", "other", status, 0)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        body = json.dumps({"detail": _DETAILS.get(status, HTTPStatus(status).phrase)})
        headers = {"X-Request-Id": _new_id(), "Server": "sms-channels"}  # without a name aiohttp tells its own
        response = web.Response(status=status, text=body, content_type="application/json", headers=headers)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """aiohttp's errors of a broken body quote it."""
        log.info("broken connection", error=type(kw.get("exc_info")).__name__)


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made = await super()._make_server()

        async def handle(request: Any) -> web.StreamResponse:
            try:
                return await made.request_handler(request)
            except web.HTTPException as error:  # of what comes before the middleware: the Expect header
                refused = _rendered(_as_refusal(error, request))
                refused.headers.update({"X-Request-Id": _new_id(), "Server": "sms-channels"})
                return refused

        return _Server(
            handle,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )
