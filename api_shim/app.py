"""The whole, put together: what is served, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api_shim import docs
from api_shim.auth import ApiKeys, Gate, Reviews
from api_shim.channels import Channels, PublishedKey
from api_shim.clients import FailedLogins
from api_shim.edge import Edge
from api_shim.metrics import REGISTRY
from api_shim.routes import Routes
from api_shim.schemas import Refusal
from api_shim.settings import Settings
from api_shim.tls import ServerTls
from api_shim.waiting import Waiting
from smschannel.api.kube_client import KubeClient

_SHUTDOWN_SECONDS = 20
_PROBE_SECONDS = 3
_PROBED_LATELY = 2  # so that asking for /readyz again and again costs Kubernetes nothing


class Service:
    """What runs between entering and leaving `serve`."""

    def __init__(self, port: int, edge: Edge) -> None:
        self.port = port
        self._edge = edge

    def retire(self) -> None:
        """Everything is still answered, but `/readyz` says no, and connections are not kept."""
        self._edge.retiring = True


@asynccontextmanager
async def serve(settings: Settings, api: KubeClient) -> AsyncIterator[Service]:
    """Listens until left; then what is under way is answered. Raises `TlsError` and `OSError`."""
    tls = None
    if settings.tls_cert_file and settings.tls_key_file:
        tls = ServerTls(settings.tls_cert_file, settings.tls_key_file)
    keys = ApiKeys(api, settings.operator_namespace)
    seconds = settings.request_seconds
    reviews = Reviews(api, namespace=settings.channel_namespace, audience=settings.token_audience, seconds=seconds)
    gate = Gate(keys, reviews, FailedLogins(settings.failed_logins_per_minute))
    sealing_key = PublishedKey(api, settings.operator_namespace, seconds)
    channels = Channels(api, settings.channel_namespace, sealing_key)
    waiting = Waiting(api, channels, most=settings.max_waiting)
    edge = Edge(max_requests=settings.max_requests, request_seconds=seconds, trusted=settings.trusted_proxies)
    routes = Routes(edge, gate, channels, waiting, wait_limit=settings.wait_limit_seconds)

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if edge.retiring:
            raise Refusal(503, "This replica is stopping.")
        if not keys.known:
            raise Refusal(503, "The API keys were not read yet.")
        async with asyncio.timeout(_PROBE_SECONDS):
            await sealing_key.current(_PROBED_LATELY)
        return web.Response(text="ok\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    probes = [web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)]
    edge.application.add_routes([*routes.table(), *probes, *docs.table()])
    background = [asyncio.create_task(keys.follow()), *([asyncio.create_task(tls.follow())] if tls else [])]
    runner = edge.runner(_SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        context = tls.context if tls else None
        await web.TCPSite(runner, settings.http_host, settings.http_port, ssl_context=context).start()
        yield Service(runner.addresses[0][1], edge)
    finally:
        edge.retiring = True
        waiting.stop()
        await runner.cleanup()
        for task in background:
            task.cancel()
        await asyncio.wait(background)
