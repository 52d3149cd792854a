"""kopf as the informer: passes watch events of channels and labelled Secrets to the controller.

kopf's change handlers, timers and annotations are not used: a change that was handled, but whose status could not be
written, would be lost. Where kopf keeps state, it is given stores that keep none. Of Secrets it receives the metadata
only, so that tenants' tokens are never in its memory.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
import kopf
from yarl import URL

from smschannel.api.kube_client import METADATA_OF_LIST, METADATA_OF_ONE, KubeClient
from smschannel.api.names import channels_path, core_path
from smschannel.api.resource import CREDENTIALS_LABEL, GROUP, PLURAL, VERSION
from smschannel.controller import Controller
from smschannel.health import Heartbeats

_SERVER_SECONDS = 240
_CLIENT_SECONDS = 270
# A watch that lives sends a request when the last one has ended, and repeats it after errors: within its timeout, that
# of a list, and a pause between the two.
_SILENT_SECONDS = _CLIENT_SECONDS + 30 + 60
# For kopf's peering, which is not used. By default kopf asks for the user's name, and fails if the user's id has none,
# as in a container. The type is Any, because kopf does not export its own.
_IDENTITY: Any = "smschannel"


async def watch(
    api: KubeClient,
    controller: Controller,
    namespaces: Collection[str],
    *,
    stop: asyncio.Event,
    over: asyncio.Event,
    requests: Heartbeats,
    answers: Heartbeats,
) -> None:
    """Watch until `over` is set. SIGTERM and SIGINT set `stop`. Raises `RuntimeError` if kopf ends by itself.

    `requests` and `answers` learn when each watch last sent a request, and when it last got what it asked for.
    """
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        noting = _noting(URL(api.configuration.host).path.rstrip("/"), requests, answers)
        session = api.new_session(0, noting, _secrets_as_metadata)  # each watch needs a connection
        return kopf.AiohttpSession(server=api.configuration.host, aiohttp_session=session)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def channel(event: Mapping[str, Any], **_: Any) -> None:
        controller.on_channel(event["type"], event["object"])

    @kopf.on.event("v1", "secrets", registry=registry)
    async def secret(event: Mapping[str, Any], **_: Any) -> None:
        controller.on_secret(event["type"], event["object"])  # a PartialObjectMetadata

    with _expected(namespaces, requests, answers):
        await _run_kopf(registry, namespaces, stop, over)


async def _run_kopf(
    registry: kopf.OperatorRegistry, namespaces: Collection[str], stop: asyncio.Event, over: asyncio.Event
) -> None:
    tasks = await kopf.spawn_tasks(
        registry=registry,
        settings=_settings(),
        standalone=True,
        namespaces=namespaces,
        stop_flag=over,
        identity=_IDENTITY,
    )
    for each in (signal.SIGTERM, signal.SIGINT):  # kopf has just put its own handlers there
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    others = asyncio.all_tasks() - set(tasks)
    await kopf.run_tasks(tasks, ignored=others)
    if not over.is_set():
        raise RuntimeError("kopf ended by itself")


@contextmanager
def _expected(namespaces: Collection[str], *heartbeats: Heartbeats) -> Iterator[None]:
    """Expect all watches to go on in this block. They are named by the paths of their requests."""
    paths = [path for each in namespaces for path in (channels_path(each), core_path(each, "secrets"))]
    for each in heartbeats:
        for path in paths:
            each.expect(path, _SILENT_SECONDS)
    try:
        yield
    finally:
        for each in heartbeats:
            for path in paths:
                each.forget(path)


def _noting(prefix: str, requests: Heartbeats, answers: Heartbeats) -> aiohttp.ClientMiddlewareType:
    """Return a middleware that notes requests and their success; `prefix` is that of the API server's own URL."""

    async def noting(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        path = request.url.path.removeprefix(prefix)
        requests.beat(path)
        response = await send(request)
        if response.status == 200:
            answers.beat(path)
        return response

    return noting


async def _secrets_as_metadata(
    request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Ask for the metadata of Secrets, and nothing else. An API server that cannot send that answers 406.

    It writes the items of an empty list of metadata as null, on which kopf would end: they become an empty list.
    """
    if not request.url.path.endswith("/secrets"):
        return await send(request)
    is_watch = request.url.query.get("watch") == "true"
    request.headers["Accept"] = METADATA_OF_ONE if is_watch else METADATA_OF_LIST
    response = await send(request)
    if not is_watch and response.status == 200:
        response._body = (await response.read()).replace(b'"items":null', b'"items":[]')
    return response


def _settings() -> kopf.OperatorSettings:
    """Return settings that make kopf an informer only: it posts no Events, keeps no state and never gives up.

    Its watches end after four minutes and start again, so that a broken connection is noticed. Times are seconds.
    """
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.chunk_size = 500
    settings.watching.label_selectors["secrets"] = f"{CREDENTIALS_LABEL}=true"
    settings.watching.server_timeout = _SERVER_SECONDS
    settings.watching.client_timeout = _CLIENT_SECONDS
    settings.watching.connect_timeout = 5
    settings.queueing.idle_timeout = 0.1
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _EndlessBackoff()
    settings.persistence.finalizer = f"{GROUP}/unused-by-kopf"
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.persistence.progress_storage = _NoProgress()
    for name in ("kopf", "kopf.objects", "kopf.activities"):
        logging.getLogger(name).setLevel(logging.WARNING)  # at DEBUG it prints bodies and patches
    return settings


class _EndlessBackoff:
    """An endless list of backoffs, in seconds: kopf gives up a request when the list ends."""

    def __iter__(self) -> Iterator[float]:
        delay = 0.5
        while True:
            yield delay
            delay = min(delay * 2, 15)


class _NoDiffBase(kopf.DiffBaseStorage):
    """Stores nothing; by default kopf keeps the last handled spec in an annotation."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        pass


class _NoProgress(kopf.ProgressStorage):
    """Stores nothing; by default kopf keeps the progress of handlers in annotations."""

    def fetch(self, **_: Any) -> kopf.ProgressRecord | None:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence
