"""Build the service from its parts, serve it, and shut it down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api_shim import docs
from api_shim.auth import ApiKeys, Auth, Reviews
from api_shim.channels import Channels, SealingKeyCache
from api_shim.clients import FailureLimiter
from api_shim.connections import ConnectionLimits, Site
from api_shim.metrics import REGISTRY
from api_shim.routes import Routes
from api_shim.schemas import HttpError
from api_shim.server import HttpServer
from api_shim.settings import Settings
from api_shim.tls import ServerTls
from api_shim.waiting import ChannelWaiter
from smschannel.api.kube_client import KubeClient

log = structlog.get_logger()

_SHUTDOWN_SECONDS = 20
_PROBE_SECONDS = 3  # the time limit of /readyz
_UNWATCHED = (
    "The operator does not watch namespace {namespace}, so no channel would work: correct SMSSHIM_CHANNEL_NAMESPACE"
    " here, or SMSCHANNEL_CHANNEL_NAMESPACES of the operator."
)
_PROBE_CACHE_SECONDS = 2  # however often /readyz is called, Kubernetes gets one call in this time


class Service:
    """The running service. `port` is the port that it listens on."""

    def __init__(self, port: int, server: HttpServer) -> None:
        self.port = port
        self._server = server

    def start_draining(self) -> None:
        """Keep answering, but make `/readyz` fail and close connections, so that clients move to other replicas."""
        self._server.draining = True


def _probes(server: HttpServer, keys: ApiKeys, sealing_key: SealingKeyCache, namespace: str) -> list[web.RouteDef]:
    """Return the routes of `/healthz`, `/readyz` and `/metrics`."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if server.draining:
            raise HttpError(503, "This replica is shutting down.")
        if not keys.is_current:
            raise HttpError(503, "The API keys have not been read yet.")
        async with asyncio.timeout(_PROBE_SECONDS):
            await sealing_key.get(_PROBE_CACHE_SECONDS)
        if sealing_key.watched is not None and namespace not in sealing_key.watched:
            log.error("the operator does not watch this namespace", namespace=namespace, watched=sealing_key.watched)
            raise HttpError(503, _UNWATCHED.format(namespace=namespace))
        return web.Response(text="ok\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return [web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)]


@asynccontextmanager
async def serve(settings: Settings, api: KubeClient) -> AsyncIterator[Service]:
    """Listen while the context is open; at its end, finish the requests in flight. Raises `TlsError` and `OSError`."""
    tls = None
    if settings.tls_cert_file and settings.tls_key_file:
        tls = ServerTls(settings.tls_cert_file, settings.tls_key_file)
    keys = ApiKeys(api, settings.operator_namespace)
    seconds = settings.request_seconds
    reviews = Reviews(api, namespace=settings.channel_namespace, audience=settings.token_audience, seconds=seconds)
    auth = Auth(keys, reviews, FailureLimiter(settings.authentication_failures_per_minute))
    sealing_key = SealingKeyCache(api, settings.operator_namespace, seconds)
    channels = Channels(api, settings.channel_namespace, sealing_key)
    waiter = ChannelWaiter(api, channels, max_waiting=settings.max_waiting, per_caller=settings.max_waiting_per_caller)
    connections = ConnectionLimits(
        settings.max_connections, settings.max_connections_per_client, settings.trusted_proxies
    )
    server = HttpServer(
        namespace=settings.channel_namespace,
        max_requests=settings.max_requests,
        max_requests_per_caller=settings.max_requests_per_caller,
        connections=connections,
        request_seconds=seconds,
        trusted_proxies=settings.trusted_proxies,
    )
    routes = Routes(server, auth, channels, waiter, wait_limit=settings.wait_limit_seconds)

    server.application.add_routes(
        [*routes.table(), *_probes(server, keys, sealing_key, settings.channel_namespace), *docs.table()]
    )
    background = [asyncio.create_task(keys.follow()), *([asyncio.create_task(tls.follow())] if tls else [])]
    runner = server.runner(_SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        context = tls.context if tls else None
        await Site(runner, settings.http_host, settings.http_port, ssl_context=context).start()
        yield Service(runner.addresses[0][1], server)
    finally:
        server.draining = True
        waiter.stop()
        await runner.cleanup()
        for task in background:
            task.cancel()
        await asyncio.wait(background)
