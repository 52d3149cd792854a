"""Lists and answers of the API server cost bounded memory, however large the objects are that tenants store."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration

from smschannel.api.errors import KubernetesUnavailable
from smschannel.api.kube_client import KubeClient
from smschannel.api.paging import MAX_ANSWER_BYTES, next_limit

KB, MB = 1000, 1_000_000
PATH = "/api/v1/namespaces/x/secrets"


class Lists:
    """An API server with objects of these sizes. `limits` are those that it was asked for."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.limits: list[int] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        limit, start = int(request.query["limit"]), int(request.query.get("continue", "0"))
        assert request.query["labelSelector"] == "a=b,c in (d)", "other parameters stay as they are"
        self.limits.append(limit)
        end = min(start + limit, len(self.sizes))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        more = {"continue": str(end)} if end < len(self.sizes) else {}
        await response.write(json.dumps({"metadata": more}).encode()[:-1] + b', "items": [')
        for number in range(start, end):
            body = json.dumps({"number": number, "content": "x" * self.sizes[number]}).encode()
            await response.write((b", " if number > start else b"") + body)
        await response.write(b"]}")
        return response


@asynccontextmanager
async def client_of(handler: Any) -> AsyncIterator[KubeClient]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with KubeClient(configuration) as api:
            yield api
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("sizes", "limits", "why"),
    [
        ([0] * 3, [20], "a short list is one call"),
        ([3 * KB] * 1000, [20, 100, 500, 500], "ordinary objects: the pages soon have what was asked for"),
        ([MB] * 14, [20, *[2] * 7], "twenty of them are refused; then two, which is what a page should have"),
        ([0] * 130 + [MB] * 30, [20, 100, 500, 62, 7, 35, 4, 8, *[2] * 11], "large ones behind small ones: fewer"),
        ([MB] * 4 + [0] * 30, [20, 10, 50], "one page of large objects does not make all others small"),
    ],
)
async def test_pages_have_a_bounded_size(sizes: list[int], limits: list[int], why: str) -> None:
    server = Lists(*sizes)
    async with client_of(server.answer) as api:
        found = [each["number"] async for each in api.pages(PATH, {"labelSelector": "a=b,c in (d)"})]
    assert found == list(range(len(sizes))), "each object once, in order"
    assert server.limits == limits, why


async def test_each_list_begins_with_a_small_page() -> None:
    """What the last one was like says nothing about what tenants store now."""
    server = Lists(*[0] * 40)
    async with client_of(server.answer) as api:
        for _ in range(2):
            assert len([each async for each in api.pages(PATH, {"labelSelector": "a=b,c in (d)"})]) == 40
    assert server.limits == [20, 100] * 2


async def test_answer_above_the_cap_is_refused_while_it_is_read() -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while True:
            await response.write(b"x" * 2**16)
            sent += 2**16

    async with client_of(endless) as api:
        for call in (api.request("GET", PATH), anext(api.pages(PATH))):
            with pytest.raises(KubernetesUnavailable, match="the answer is larger than 12 MiB"):
                await call
    assert sent < 20 * MAX_ANSWER_BYTES


async def test_event_above_the_cap_breaks_the_watch() -> None:
    async def event(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"object": "' + b"x" * 2 * MAX_ANSWER_BYTES + b'"}\n')
        return response

    async with client_of(event) as api:
        with pytest.raises(KubernetesUnavailable, match="an event is too large"):
            await anext(api.watch(PATH, {}))


async def test_largest_object_fits_into_an_event() -> None:
    """etcd stores at most 1.5 MiB of an object, which escaped as JSON is up to six times as long."""

    async def event(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(
            b'{"type": "ADDED", "object": {"metadata": {"resourceVersion": "' + b"\\u003c" * 1_500_000 + b'"}}}\n'
        )
        return response

    async with client_of(event) as api:
        received = await anext(api.watch(PATH, {}))
        assert received == {"type": "ADDED", "object": {"metadata": {"resourceVersion": "<" * 1_500_000}}}


@pytest.mark.parametrize(
    ("limit", "size", "following", "why"),
    [
        (20, 100 * KB, 100, "five times as many at most"),
        (20, 2 * 2**20, 20, "the page had the size that it should have"),
        (20, 20 * 2**20, 2, "ten times too large"),
        (1, 9 * 2**20, 1, "one object at least, or the list never ends"),
        (500, 0, 2500, "the request's own limit is the most, not this"),
    ],
)
def test_next_limit(limit: int, size: int, following: int, why: str) -> None:
    assert next_limit(limit, size) == following, why
