"""Kubernetes API errors become this project's errors. A wrong `NotFound` would restore numbers of living channels."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration

from smschannel.api.errors import (
    ChannelError,
    Conflict,
    Expired,
    Fenced,
    KubernetesRefused,
    KubernetesUnavailable,
    NoKindMatch,
    NotFound,
)
from smschannel.api.kube_client import KubeClient, kubernetes_error

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def status(**details: str) -> bytes:
    return json.dumps({"kind": "Status", "message": "a message", "details": details}).encode()


def gateway(**body: Any) -> bytes:
    return json.dumps(body).encode()


def fence(text: str) -> bytes:
    policy = "ValidatingAdmissionPolicy 'sms-channel-operator-fence' with binding 'x'"
    return gateway(kind="Status", message=f'secrets "pn1" is forbidden: {policy} {text}')


@pytest.mark.parametrize(
    ("code", "answer", "becomes", "reason"),
    [
        (404, status(name="x", kind="secrets"), NotFound, "the API server names the missing object"),
        (404, status(), NoKindMatch, "the group is served, the kind is not"),
        (404, b"404 page not found\n", NoKindMatch, "the group is not served at all"),
        (404, b"<html>", KubernetesUnavailable, "a proxy's HTML page is not an answer of the API server"),
        (404, b"404 page not found: /apis", KubernetesUnavailable, "only the API server's exact words count"),
        (404, b"", KubernetesUnavailable, "an empty body is not an answer of the API server"),
        (404, b"[]", KubernetesUnavailable, "JSON of another shape is not an answer of the API server"),
        (404, gateway(message="no Route matched"), KubernetesUnavailable, "a gateway's JSON is not a Status"),
        (
            404,
            gateway(message="no Route matched", details={"name": "x"}),
            KubernetesUnavailable,
            "a gateway may name something too, and still is not the API server",
        ),
        (404, gateway(kind="Error", message="not found"), KubernetesUnavailable, "another kind is not a Status"),
        (404, gateway(kind="Status"), KubernetesUnavailable, "a Status has a message"),
        (404, b'{"a":' * 100_000, KubernetesUnavailable, "JSON that is nested too deep is nobody's Status"),
        (403, fence("denied request: held by b"), Fenced, "another operator leads, which is no fault of the channel"),
        (422, fence("denied request: failed to configure binding"), Fenced, "the fence cannot read the Lease"),
        (
            403,
            gateway(kind="Status", message="ValidatingAdmissionPolicy 'quota' denied request"),
            KubernetesRefused,
            "another policy is not the fence",
        ),
        (409, status(name="x"), Conflict, "another client wrote first"),
        (410, status(), Expired, "the list or watch is too old"),
        (429, status(), KubernetesUnavailable, "too many requests: retry later"),
        (500, b"", KubernetesUnavailable, "an internal error: retry later"),
        (503, b"upstream connect error", KubernetesUnavailable, "a proxy cannot reach the API server: retry later"),
        (401, status(), KubernetesRefused, "the token is not accepted"),
        (403, status(name="x"), KubernetesRefused, "a right is missing"),
        (422, status(name="x"), KubernetesRefused, "the object is invalid"),
        (302, b"", KubernetesRefused, "a redirect is not followed"),
    ],
)
def test_each_status_becomes_its_error(code: int, answer: bytes, becomes: type[ChannelError], reason: str) -> None:
    assert type(kubernetes_error(code, answer)) is becomes, reason


def test_retry_after_is_kept() -> None:
    error = kubernetes_error(429, status(), 7.0)
    assert isinstance(error, KubernetesUnavailable)
    assert error.retry_after == 7.0


@asynccontextmanager
async def api_server(answer: Handler) -> AsyncIterator[KubeClient]:
    """A client of a server that answers every request with `answer`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        configuration = Configuration()
        configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with KubeClient(configuration) as api:
            yield api
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE", "WATCH"])
async def test_redirects_are_not_followed(code: int, method: str) -> None:
    """The target could be another host, which would get the request, or be believed to be the API server."""
    paths: list[str] = []

    async def redirect(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        return web.Response(status=code, headers={"Location": "/elsewhere"})

    async def watch() -> None:
        async for _ in api.watch("/api", {}):
            pass

    async with api_server(redirect) as api:
        call = watch() if method == "WATCH" else api.request(method, "/api", {} if method == "PATCH" else None)
        with pytest.raises(KubernetesRefused, match=rf"answers with a redirect \(HTTP {code}\), which is not followed"):
            await call
    assert paths == ["/api"]


@pytest.mark.parametrize(
    "answer",
    [{}, {"items": []}, {"metadata": {}}, {"items": [], "metadata": None}, {"items": {"a": 1}, "metadata": {}}],
)
async def test_list_of_another_shape_is_unavailable(answer: Any) -> None:
    """An empty list would mean that all channels are gone."""

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response(answer)

    async with api_server(handler) as api:
        with pytest.raises(KubernetesUnavailable, match="the API server's answer is not a list"):
            _ = [item async for item in api.pages("/api")]


async def test_empty_list_of_metadata_may_be_null() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response({"items": None, "metadata": {}})

    async with api_server(handler) as api:
        assert [item async for item in api.pages("/api", metadata_only=True)] == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"[]", "the API server's answer is not a JSON object"),
        (b'{"items": [', "the API server's answer is not valid JSON, or was truncated"),
        (b"<html>", "the API server's answer is not valid JSON"),
        (b'{"a":' * 100_000, "the API server's answer is not valid JSON"),
    ],
)
async def test_success_of_another_shape_is_unavailable(answer: bytes, message: str) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=answer)

    async with api_server(handler) as api:
        with pytest.raises(KubernetesUnavailable, match=message):
            await api.request("GET", "/api")


async def watch_of(*lines: bytes) -> list[Any]:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=b"\n".join(lines))

    async with api_server(handler) as api:
        return [event async for event in api.watch("/api", {})]


EVENT = {"type": "ADDED", "object": {"metadata": {"resourceVersion": "1"}}}


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}}, Expired),
        ({"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "etcd"}}, KubernetesUnavailable),
        ({"type": "ERROR", "object": {"kind": "Status", "code": "x"}}, KubernetesUnavailable),
        ({"type": "ERROR", "object": None}, KubernetesUnavailable),
        ({"type": "ADDED", "object": {"metadata": {"resourceVersion": ""}}}, KubernetesUnavailable),
        ({"type": "ADDED", "object": {"metadata": "x"}}, KubernetesUnavailable),
        ({"type": "ADDED", "object": {}}, KubernetesUnavailable),
        ({"type": "ADDED"}, KubernetesUnavailable),
        ({"type": 1, "object": EVENT["object"]}, KubernetesUnavailable),
        ({"object": EVENT["object"]}, KubernetesUnavailable),
        ([], KubernetesUnavailable),
    ],
    ids=str,
)
async def test_watch_event_of_another_shape_breaks_the_watch(event: Any, error: type[ChannelError]) -> None:
    """Which is then retried; any other exception would end the process."""
    assert await watch_of(json.dumps(EVENT).encode()) == [EVENT]
    with pytest.raises(error):
        await watch_of(json.dumps(EVENT).encode(), json.dumps(event).encode())


async def test_watch_through_a_silent_proxy_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would wait without end for the proxy's answer to CONNECT."""
    monkeypatch.setattr("smschannel.api.kube_client._CONNECT_SECONDS", 0.2)
    over = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    proxy = await asyncio.start_server(silent, "127.0.0.1", 0)
    configuration = Configuration()
    configuration.host = "https://api.example.com"
    configuration.proxy = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    async with KubeClient(configuration) as api, asyncio.timeout(30):
        with pytest.raises(KubernetesUnavailable):
            await anext(api.watch("/api", {}))
    over.set()
    proxy.close()


async def test_list_that_leads_back_to_itself_ends() -> None:
    """It would fill the memory, and the operator would never start."""

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response({"items": [], "metadata": {"continue": "again"}})

    async with api_server(handler) as api:
        with pytest.raises(KubernetesUnavailable, match="does not end"):
            _ = [item async for item in api.pages("/api")]
