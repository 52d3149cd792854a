"""The informer: passes watch events of channels and labelled Secrets to the controller.

kopf runs the watches of Secrets, of which it receives the metadata only, so that tenants' tokens are never in its
memory. The events of channels do not go through kopf: a task, a logger and a diff for each of them cost a fifth of the
operator's CPU, and half of it when a namespace writes its channels in a loop.
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

from smschannel.api.follow import SERVER_SECONDS, follow
from smschannel.api.kube_client import METADATA_OF_LIST, METADATA_OF_ONE, KubeClient
from smschannel.api.names import channels_path, core_path
from smschannel.api.resource import CREDENTIALS_LABEL
from smschannel.controller import Controller
from smschannel.health import Heartbeats

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

    A watch that ends by a bug ends all of them, and is raised. `requests` and `answers` learn when each watch last sent
    a request, and when it last got what it asked for.
    """
    watches = [asyncio.create_task(_watch_channels(api, controller, each, requests, answers)) for each in namespaces]
    for each in watches:
        each.add_done_callback(lambda _: over.set())
    try:
        with _expected(namespaces, requests, answers):
            await _run_kopf(_secrets(api, controller, requests, answers), namespaces, stop, over)
    finally:
        for each in watches:
            each.cancel()
        ended = await asyncio.gather(*watches, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


async def _watch_channels(
    api: KubeClient, controller: Controller, namespace: str, requests: Heartbeats, answers: Heartbeats
) -> None:
    path = channels_path(namespace)
    async for event in follow(
        api,
        path,
        controller.listed(namespace),
        on_request=lambda: requests.beat(path),
        on_answer=lambda: answers.beat(path),
    ):
        if event is None:
            controller.resync_soon()  # deletions may have been missed
        else:
            controller.on_channel(event["type"], event["object"])


def _secrets(
    api: KubeClient, controller: Controller, requests: Heartbeats, answers: Heartbeats
) -> kopf.OperatorRegistry:
    """Return kopf's handlers: of the login, and of events of labelled Secrets."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        noting = _noting(URL(api.configuration.host).path.rstrip("/"), requests, answers)
        session = api.new_session(noting, _secrets_as_metadata)
        return kopf.AiohttpSession(server=api.configuration.host, aiohttp_session=session)

    @kopf.on.event("v1", "secrets", registry=registry)
    async def secret(event: Mapping[str, Any], **_: Any) -> None:
        controller.on_secret(event["type"], event["object"])  # a PartialObjectMetadata

    return registry


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
    settings.watching.server_timeout = SERVER_SECONDS
    settings.watching.client_timeout = _CLIENT_SECONDS
    settings.watching.connect_timeout = 5
    settings.queueing.idle_timeout = 0.1
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = _EndlessBackoff()
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
