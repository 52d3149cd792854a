"""The aiohttp application: the calls, the probes, and the one place where refusals and errors become answers."""

from __future__ import annotations

import asyncio
import json
import re
import traceback
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import ClientError, web
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from api_shim.auth import ApiKeys, Gate, Reviews
from api_shim.channels import Channels, PublishedKey
from api_shim.routes import CALLER, INSTANCE, Routes
from api_shim.schemas import Refusal
from api_shim.settings import Settings
from api_shim.waiting import Waiting
from smschannel.errors import Gone, Retryable
from smschannel.kube_api import KubeApi, KubernetesRefused

_BODY_BYTES = 64 * 1024
_REQUEST_SECONDS = 25
_SHUTDOWN_SECONDS = 20
_REQUEST_ID = re.compile(r"[-._~+/=:@a-zA-Z0-9]{1,128}")
_ID = web.RequestKey("id", str)
_DETAILS = {
    404: "There is nothing at this path. The calls are at /v1/instances/{instance_id}/channels/sms.",
    405: "This path does not take this method; the Allow header says which it takes.",
    413: f"The body may have at most {_BODY_BYTES} bytes.",
}

log = structlog.get_logger()


@asynccontextmanager
async def serve(settings: Settings, api: KubeApi) -> AsyncIterator[int]:
    """Listens until left; then what is under way is answered. Yields the port."""
    keys = ApiKeys(api, settings.operator_namespace)
    reviews = Reviews(api, namespace=settings.channel_namespace, audience=settings.token_audience)
    sealing_key = PublishedKey(api, settings.operator_namespace)
    channels = Channels(api, settings.channel_namespace, sealing_key)
    waiting = Waiting(api, channels)
    routes = Routes(Gate(keys, reviews), channels, waiting, wait_limit=settings.wait_limit_seconds)
    stopping = asyncio.Event()

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if stopping.is_set() or not keys.known:
            raise Refusal(503, "stopping" if stopping.is_set() else "The API keys were not read yet.")
        await sealing_key.current()
        return web.Response(text="ok\n")

    app = web.Application(middlewares=[_answering(settings.wait_limit_seconds)], client_max_size=_BODY_BYTES)
    app.on_response_prepare.append(_common_headers)
    app.add_routes([*routes.table(), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    following = asyncio.create_task(keys.follow())
    runner = _Runner(app, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.http_host, settings.http_port).start()
        yield runner.addresses[0][1]
    finally:
        stopping.set()
        waiting.stop()
        await runner.cleanup()
        following.cancel()
        await asyncio.wait({following})


def _answering(wait_limit: int) -> Middleware:
    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[_ID] = _request_id(request)
        limit = _REQUEST_SECONDS + (wait_limit if "Prefer" in request.headers else 0)
        try:
            async with asyncio.timeout(limit):
                response = await handler(request)
        except Exception as error:
            response = _rendered(_as_refusal(error, request))
        if request.method != "GET" and CALLER in request:
            log.info(
                "asked to change a channel",
                method=request.method,
                who=str(request[CALLER]),
                instance=request.get(INSTANCE),
                status=response.status,
                request_id=request[_ID],
            )
        return response

    return answer


def _as_refusal(error: Exception, request: web.Request) -> Refusal:
    match error:
        case Refusal():
            return error
        case web.HTTPException():
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return Refusal(error.status, _DETAILS.get(error.status, error.reason), **allow)
        case KubernetesRefused() | Gone():  # a missing right, namespace or CRD, or a policy that objects
            log.error("Kubernetes refuses", error=str(error), request_id=request[_ID])
            detail = "Kubernetes refuses this; the service's log says why, under the request id."
            return Refusal(503, detail, Retry_After="30")
        case Retryable():
            log.warning("Kubernetes is not available", error=str(error), request_id=request[_ID])
            return Refusal(503, "Kubernetes does not answer. Try again.", Retry_After=f"{error.retry_after or 5:.0f}")
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
    return web.json_response({"detail": refusal.detail}, status=refusal.status, headers=refusal.headers)


def _request_id(request: web.BaseRequest) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())


async def _common_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = request.get(_ID) or _request_id(request)
    response.headers["Cache-Control"] = "no-store"


class _Connection(RequestHandler):
    """Answers what is no HTTP as JSON too, and quotes nothing of it, neither to the client nor in the log."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        log.info("malformed request", status=status, error=type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        body = json.dumps({"detail": HTTPStatus(status).phrase})
        response = web.Response(
            status=status, text=body, content_type="application/json", headers={"X-Request-Id": str(uuid.uuid4())}
        )
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
                return _rendered(_as_refusal(error, request))

        return _Server(handle, request_factory=made.request_factory, loop=made._loop, **made._kwargs)
