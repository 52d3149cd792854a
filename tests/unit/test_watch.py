"""The informer: which requests are sent for channels and Secrets, and what becomes of the answers."""

from __future__ import annotations

import asyncio
import getpass
import json
from collections.abc import Iterable
from itertools import repeat
from typing import Any, NoReturn, cast

import pytest
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration

from smschannel.api.kube_client import KubeClient
from smschannel.api.names import channels_path, core_path
from smschannel.api.resource import CREDENTIALS_LABEL, GROUP, KIND, PLURAL, VERSION
from smschannel.controller import Controller
from smschannel.health import Heartbeats
from smschannel.watch import watch
from tests.manifests import NAMESPACE

PARTIAL = {"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata"}
VERBS = ["get", "list", "watch", "patch"]
CHANNELS_PATH, SECRETS_PATH = channels_path(NAMESPACE), core_path(NAMESPACE, "secrets")


def resource(kind: str, plural: str) -> dict[str, Any]:
    return {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": VERBS}


def secret(name: str, version: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": NAMESPACE, "uid": f"uid-{name}", "resourceVersion": version}}


class ApiServer:
    """An API server with two Secrets, one page each, or none. It sends one watch event of a Secret.

    Each watch of channels is answered with the next of `channel_events`, and then stays open; when there are no more,
    none is answered. `rounds` has the watches' paths.
    """

    def __init__(self, *, empty: bool = False, channel_events: Iterable[list[dict[str, Any]]] = ()) -> None:
        self._empty = empty
        self._channel_events = iter(channel_events)
        self.channel_versions: list[str | None] = []
        self.rounds: asyncio.Queue[str] = asyncio.Queue()
        self.accepted: list[tuple[bool, str]] = []
        self.queries: list[dict[str, str]] = []
        self.over = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = "/" + request.match_info["path"]
        documents: dict[str, Any] = {
            "/api": {"versions": ["v1"]},
            "/apis": {
                "groups": [
                    {"name": GROUP, "versions": [{"version": VERSION}], "preferredVersion": {"version": VERSION}}
                ]
            },
            "/api/v1": {"resources": [resource("Secret", "secrets"), resource("Namespace", "namespaces")]},
            f"/apis/{GROUP}/{VERSION}": {"resources": [resource(KIND, PLURAL)]},
        }
        if document := documents.get(path):
            return web.json_response(document)
        is_watch = request.query.get("watch") == "true"
        if not path.endswith("/secrets"):
            assert is_watch, "channels were listed when they were loaded"
            self.rounds.put_nowait(path)
            self.channel_versions.append(request.query.get("resourceVersion"))
            events = next(self._channel_events, None)
            return await self._stream(request, events or [], ends=events is not None)
        self.accepted.append((is_watch, request.headers["Accept"]))
        self.queries.append(dict(request.query))
        return await self._events(request) if is_watch else self._page(request)

    def _page(self, request: web.Request) -> web.Response:
        is_first = "continue" not in request.query and not self._empty
        items = [{**PARTIAL, **secret("one", "5")}] if is_first else [{**PARTIAL, **secret("other", "6")}]
        body = {
            "apiVersion": "meta.k8s.io/v1",
            "kind": "PartialObjectMetadataList",
            "metadata": {"resourceVersion": "7", **({"continue": "more"} if is_first else {})},
            "items": None if self._empty else items,
        }
        return web.Response(text=json.dumps(body, separators=(",", ":")), content_type="application/json")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self.rounds.put_nowait(SECRETS_PATH)
        bookmark = {"type": "BOOKMARK", "object": {**PARTIAL, "metadata": {"resourceVersion": "8"}}}
        return await self._stream(
            request, [bookmark, {"type": "MODIFIED", "object": {**PARTIAL, **secret("one", "9")}}]
        )

    async def _stream(
        self, request: web.Request, events: list[dict[str, Any]], *, ends: bool = False
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for event in events:
            await response.write(json.dumps(event).encode() + b"\n")
        if not ends:
            await self.over.wait()
        return response


class Events:
    """Receives events, as the controller does, until there are `count`. `now` is the clock of the heartbeats."""

    now = 0.0

    def __init__(self, count: int) -> None:
        self.seen: list[tuple[str | None, dict[str, Any]]] = []
        self.channels: list[tuple[str, str] | str] = []
        self.all = asyncio.Event()
        self.requests, self.answers = Heartbeats(lambda: self.now), Heartbeats(lambda: self.now)
        self._count = count

    def listed(self, namespace: str) -> str:
        return "41"

    def on_secret(self, kind: str | None, body: Any) -> None:
        self.seen.append((kind, dict(body)))
        self._count_down()

    def on_channel(self, kind: str, body: Any) -> None:
        self.channels.append((kind, body["metadata"]["name"]))
        self._count_down()

    def resync_soon(self) -> None:
        self.channels.append("resync")
        self._count_down()

    def _count_down(self) -> None:
        self._count -= 1
        if self._count == 0:
            self.all.set()


async def follow(server: ApiServer, events: Events, base: str = "") -> None:
    """Watch until all expected events have come. `base` is the path at which the API server is."""
    app = web.Application()
    app.router.add_get(base + "/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}{base}"
    stop, over = asyncio.Event(), asyncio.Event()
    try:
        async with KubeClient(configuration) as api, asyncio.timeout(60):
            watching = asyncio.create_task(
                watch(
                    api,
                    cast(Controller, events),
                    [NAMESPACE],
                    stop=stop,
                    over=over,
                    requests=events.requests,
                    answers=events.answers,
                )
            )
            await asyncio.wait(
                {watching, asyncio.ensure_future(events.all.wait())}, return_when=asyncio.FIRST_COMPLETED
            )
            over.set()
            await watching
    finally:
        server.over.set()
        await runner.cleanup()


def channel(kind: str, name: str, version: str) -> dict[str, Any]:
    return {"type": kind, "object": {"metadata": {"name": name, "resourceVersion": version}}}


async def test_channels_are_watched_from_their_list_on() -> None:
    """A watch goes on where the one before ended, also after a bookmark: no event is missed, none is sent again."""
    first = [channel("ADDED", "a", "42"), channel("MODIFIED", "a", "43")]
    bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "50"}}}
    server, events = ApiServer(channel_events=[first, [bookmark], [channel("DELETED", "a", "51")]]), Events(6)
    await follow(server, events)
    assert events.channels == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
    assert server.channel_versions[:3] == ["41", "43", "50"]


async def test_watch_that_is_too_old_begins_with_all_channels() -> None:
    """Channels may have been deleted meanwhile, which only a resync finds; also those deleted before the new watch."""
    expired = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old", "metadata": {}}}
    server, events = ApiServer(channel_events=[[expired], [channel("ADDED", "b", "90")]]), Events(6)
    await follow(server, events)
    assert events.channels == ["resync", "resync", ("ADDED", "b")]
    assert server.channel_versions[:2] == ["41", None]


async def test_bug_ends_all_watches() -> None:
    """Else the operator would go on without seeing changes, and keep its lease."""
    server, events = (
        ApiServer(channel_events=[[{"type": "ADDED", "object": {"metadata": {"resourceVersion": "1"}}}]]),
        Events(9),
    )
    with pytest.raises(KeyError, match="name"):
        await follow(server, events)


async def test_kopf_goes_on_when_there_is_no_secret() -> None:
    """The API server writes the items of an empty list of metadata as null."""
    events = Events(1)
    await follow(ApiServer(empty=True), events)
    assert [kind for kind, _ in events.seen] == ["MODIFIED"]


async def test_kopf_receives_the_metadata_of_secrets_and_nothing_else() -> None:
    server, events = ApiServer(), Events(3)
    await follow(server, events)
    assert sorted(
        (kind or "", each["metadata"]["name"], each["metadata"]["resourceVersion"]) for kind, each in events.seen
    ) == [
        ("", "one", "5"),
        ("", "other", "6"),
        ("MODIFIED", "one", "9"),
    ]
    listed, watched = (
        "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
        "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
    )
    assert set(server.accepted) == {(False, listed), (True, watched)}, "no other type is accepted instead"
    assert {each["labelSelector"] for each in server.queries} == {f"{CREDENTIALS_LABEL}=true"}
    assert server.queries[0]["limit"] == "20", "kopf's lists are paged as ours are"


async def test_kopf_starts_for_a_user_id_that_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the user's id has no entry in /etc/passwd, and asking for the user's name raises `KeyError`."""

    def no_name() -> NoReturn:
        raise KeyError("getpwuid(): uid not found: 65532")

    monkeypatch.setattr(getpass, "getuser", no_name)
    over = asyncio.Event()
    over.set()  # before kopf asks anything of the API server
    configuration = Configuration()
    configuration.host = "http://127.0.0.1:9"  # nobody listens there
    events = Events(1)
    async with KubeClient(configuration) as api:
        watching = watch(
            api,
            cast(Controller, events),
            [NAMESPACE],
            stop=asyncio.Event(),
            over=over,
            requests=events.requests,
            answers=events.answers,
        )
        await asyncio.wait_for(watching, 30)


@pytest.mark.parametrize("base", ["", "/k8s/clusters/c-1"], ids=["at the root", "behind a path"])
async def test_watch_that_hangs_is_silent(base: str) -> None:
    """The watch of Secrets neither ends nor fails, and that of channels goes on beside it.

    An API server may be reached behind a path. If its watches were not known there, each operator would be restarted.
    """
    server, events = ApiServer(channel_events=repeat([])), Events(-1)

    async def until(path: str) -> None:
        while await server.rounds.get() != path:
            pass

    following = asyncio.create_task(follow(server, events, base))
    async with asyncio.timeout(60):
        await until(SECRETS_PATH)
        await until(CHANNELS_PATH)
        assert events.requests.silent() == []
        events.now += 361
        await until(CHANNELS_PATH)
        assert events.requests.silent() == [SECRETS_PATH]
        assert events.answers.age() == 361
    events.all.set()
    await following
    assert events.requests.silent() == [], "a process that watches no more, such as a former leader, is not judged"
    assert events.answers.age() == 0
