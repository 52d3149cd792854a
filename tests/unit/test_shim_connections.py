"""Connections, and what one client or caller may use of the shim: limits that hold before anybody is authenticated."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import aiohttp
import pytest

import api_shim.connections
import api_shim.routes
from api_shim.app import Service
from api_shim.clients import Shares
from api_shim.connections import ConnectionLimits
from tests.unit.test_shim_kubernetes import CALL, SETUP, Kubernetes, bearer, called, shim, status, without_key

GET = f"GET {CALL} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.fixture
async def kubernetes() -> AsyncIterator[Kubernetes]:
    fake = Kubernetes()
    async with fake.running():
        yield fake


@asynccontextmanager
async def connected(
    service: Service, address: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, local_addr=(address, 0))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def is_open(reader: asyncio.StreamReader, seconds: float = 0.3) -> bool:
    """Return whether the server has not closed the connection within this time. It must not have sent anything."""
    try:
        return bool(await asyncio.wait_for(reader.read(1), seconds))
    except TimeoutError:
        return True
    except ConnectionError:
        return False


# -- clients that do not read, or send too much --------------------------------------------------------------


async def unread(service: Service, path: str, requests: int) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
    """Send requests with small receive buffers, and read nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1)
    assert isinstance(writer.transport, asyncio.Transport)
    writer.transport.pause_reading()
    with contextlib.suppress(ConnectionError):
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * requests)
    return writer, reader


async def test_client_that_does_not_read_is_aborted(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single large answer is enough: the rest of it is not kept."""
    monkeypatch.setattr(api_shim.connections, "_UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(api_shim.connections, "_SOCKET_BYTES", 1)  # the kernel's minimum
    monkeypatch.setattr("api_shim.app.generate_latest", lambda _: b"x" * 20_000_000)
    async with shim(kubernetes) as (service, client):
        writer, _ = await unread(service, "/metrics", 1)
        await asyncio.sleep(0.1)
        assert await open_connections(client) == 2
        async with asyncio.timeout(5):
            while await open_connections(client) > 1:  # noqa: ASYNC110  (there is no event to wait for)
                await asyncio.sleep(0.05)
        writer.transport.abort()


async def open_connections(client: aiohttp.ClientSession) -> int:
    """Return the gauge. It is made by the service, so that asking needs no patched `generate_latest`."""
    from api_shim.metrics import CONNECTIONS

    await status(client, "GET", "/healthz")
    [metric] = CONNECTIONS.collect()
    return int(metric.samples[0].value)


async def test_slow_reader_that_reads_is_served(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_shim.connections, "_UNREAD_SECONDS", 0.5)
    monkeypatch.setattr("api_shim.app.generate_latest", lambda _: b"x" * 2_000_000)
    async with shim(kubernetes) as (service, _), connected(service) as (reader, writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        while chunk := await asyncio.wait_for(reader.read(500_000), 2):
            received += len(chunk)
            await asyncio.sleep(0.05)
        assert received > 2_000_000


async def test_pipelining_client_gets_one_answer_and_no_backlog(kubernetes: Kubernetes) -> None:
    """It may send the rest again on another connection, as `Connection: close` says."""
    async with shim(kubernetes) as (service, _), connected(service) as (reader, writer):
        writer.write(GET * 40)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.count(b"HTTP/1.1 401 ") <= 1
        assert b"Connection: close" in answer or not answer
    assert kubernetes.calls["POST tokenreviews"] == 0


async def test_requests_one_after_the_other_keep_the_connection(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (service, _), connected(service) as (reader, writer):
        for _ in range(5):
            writer.write(GET)
            assert (await asyncio.wait_for(reader.readuntil(b"}"), 2)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("kept_alive", [False, True])
async def test_head_of_unlimited_size_is_400(kubernetes: Kubernetes, kept_alive: bool) -> None:
    """Each header is allowed; all of them together are too much to keep for a client that nobody knows."""
    async with shim(kubernetes) as (service, _), connected(service) as (reader, writer):
        if kept_alive:
            writer.write(GET)
            await asyncio.wait_for(reader.readuntil(b"}"), 2)
        writer.write(b"GET / HTTP/1.1\r\n")
        answer = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            for each in range(120):
                writer.write(b"A%d: %s\r\n" % (each, b"5ecret" * 1200))
                await writer.drain()
                await asyncio.sleep(0.002)
                if answer.done():
                    break
        with contextlib.suppress(ConnectionError):
            head, _, body = (await asyncio.wait_for(answer, 5)).partition(b"\r\n\r\n")
            if head:
                assert head.split()[1] == b"400"
                assert json.loads(body)["detail"].startswith("Malformed HTTP request")
        assert each < 60, "the connection was closed before everything was received"


async def test_second_head_has_a_time_limit_too(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is kept alive may be idle for longer, but not in the middle of a head."""
    monkeypatch.setattr(api_shim.connections, "_HEAD_SECONDS", 0.3)
    async with shim(kubernetes) as (service, _), connected(service) as (reader, writer):
        writer.write(GET)
        await asyncio.wait_for(reader.readuntil(b"}"), 2)
        assert await is_open(reader, 0.6), "idle between two requests"
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await asyncio.wait_for(reader.read(), 2) == b""


async def test_body_in_many_pieces_is_not_a_head(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (service, client), connected(service) as (reader, writer):
        body = json.dumps({**SETUP, "padding": "x" * 60_000}).encode()
        head = f"POST {CALL} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {client.headers['X-Api-Key']}\r\n"
        for _ in range(3):
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            for start in range(0, len(body), 6000):
                writer.write(body[start : start + 6000])
                await asyncio.sleep(0.002)
            answer = await asyncio.wait_for(reader.readuntil(b"}"), 2)
            assert answer.split()[1] in {b"200", b"201"}


# -- the number of connections -------------------------------------------------------------------------------


async def test_connections_are_limited_in_all(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_connections=3) as (service, client), contextlib.AsyncExitStack() as stack:
        for number in (2, 3):
            reader, _ = await stack.enter_async_context(connected(service, f"127.0.0.{number}"))
            assert await is_open(reader)
        reader, _ = await stack.enter_async_context(connected(service, "127.0.0.4"))
        answer = await asyncio.wait_for(reader.read(), 2)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 5" in answer
        assert list(json.loads(answer.partition(b"\r\n\r\n")[2])) == ["detail"]
        assert await status(client, "GET", CALL) == 200, "its connection was there before"


async def test_connections_are_limited_for_each_address(kubernetes: Kubernetes) -> None:
    settings: dict[str, Any] = {"max_connections_per_client": 2}
    async with shim(kubernetes, **settings) as (service, client), contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(connected(service, "127.0.0.2"))
        await stack.enter_async_context(connected(service, "127.0.0.2"))
        refused, _ = await stack.enter_async_context(connected(service, "127.0.0.2"))
        assert (await asyncio.wait_for(refused.read(), 2)).startswith(b"HTTP/1.1 503 ")
        assert await status(client, "GET", CALL) == 200, "another address is not concerned"
        first[1].transport.abort()
        await asyncio.sleep(0.1)
        again, _ = await stack.enter_async_context(connected(service, "127.0.0.2"))
        assert await is_open(again), "a place is free again"


async def test_trusted_proxies_are_not_one_client(kubernetes: Kubernetes) -> None:
    settings: dict[str, Any] = {"max_connections_per_client": 1, "trusted_proxies": "127.0.0.2"}
    async with shim(kubernetes, **settings) as (service, _), contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            reader, _ = await stack.enter_async_context(connected(service, "127.0.0.2"))
            assert await is_open(reader, 0.1)


def test_networks_of_ipv6_are_one_client() -> None:
    """One client has all addresses of a /64."""
    limits = ConnectionLimits(10, 1, ())
    assert limits.admit("2001:db8::1")
    assert not limits.admit("2001:db8::2")
    limits.release("2001:db8::1")
    assert limits.admit("2001:db8::2")
    assert limits.admit(None), "without an address there is one client more"
    assert not limits.admit(None)


def test_shares_need_no_memory_for_who_is_gone() -> None:
    shares = Shares(2)
    assert [shares.take("a"), shares.take("a"), shares.take("a"), shares.take("b")] == [True, True, False, True]
    for holder in "aab":
        shares.give_back(holder)
    assert not shares._taken


# -- the share of a caller -----------------------------------------------------------------------------------


async def begin_post(stack: contextlib.AsyncExitStack, service: Service, headers: dict[str, str]) -> Any:
    """Begin a POST whose body does not come."""
    reader, writer = await stack.enter_async_context(connected(service))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"POST {CALL} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: 9\r\n\r\n{{".encode())
    return reader


@pytest.mark.parametrize("kind", ["API key", "user"])
async def test_slow_bodies_of_one_caller_leave_places_for_others(kubernetes: Kubernetes, kind: str) -> None:
    slow = bearer("valid") if kind == "user" else {"X-Api-Key": kubernetes.make_key()}
    settings: dict[str, Any] = {"max_requests": 8, "max_requests_per_caller": 4, "request_seconds": 20}
    async with shim(kubernetes, **settings) as (service, client), contextlib.AsyncExitStack() as stack:
        readers = [await begin_post(stack, service, slow) for _ in range(20)]
        await asyncio.sleep(0.3)
        for _ in range(5):
            assert await status(client, "GET", CALL) == 200
        async with without_key(client) as bare, bare.get(CALL, headers=slow) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "1")
            assert await response.json() == {
                "detail": "You have too many concurrent requests. Try again when some are answered."
            }
        answered = [reader for reader in readers if reader._buffer]
        assert len(answered) == 16
        assert all(bytes(reader._buffer).startswith(b"HTTP/1.1 429 ") for reader in answered)


async def test_place_is_free_after_every_end_of_a_request(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answered, timed out, disconnected, refused: nothing is counted forever."""
    monkeypatch.setattr(api_shim.routes, "_BODY_SECONDS", 0.2)
    async with shim(kubernetes, max_requests_per_caller=1) as (service, client):
        key = {"X-Api-Key": client.headers["X-Api-Key"]}
        async with contextlib.AsyncExitStack() as stack:
            await begin_post(stack, service, key)
            await asyncio.sleep(0.05)
            assert await status(client, "GET", CALL) == 429
            await asyncio.sleep(0.4)
            assert await status(client, "GET", CALL) == 200, "the body did not come in time"
        async with contextlib.AsyncExitStack() as stack:
            await begin_post(stack, service, key)
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        assert await status(client, "GET", CALL) == 200, "the client disconnected"
        for path in ("/v1/instances/x/channels/sms", CALL):
            assert await status(client, "GET", path) in {200, 422}
        assert await status(client, "POST", CALL, data=b"{") == 415


async def test_unauthenticated_requests_of_one_address_are_limited(kubernetes: Kubernetes) -> None:
    """While their tokens are being reviewed; the limit is per address, since nobody knows yet who they are."""
    settings: dict[str, Any] = {"max_requests": 8, "max_requests_per_caller": 4, "request_seconds": 20}
    async with shim(kubernetes, **settings) as (_, client), without_key(client) as bare:
        kubernetes.delay = 0.5
        requests = [asyncio.create_task(status(bare, "GET", CALL, headers=bearer(f"no-{each}"))) for each in range(7)]
        await called(kubernetes, "POST tokenreviews", 4)
        kubernetes.delay = 0
        assert await status(bare, "GET", "/healthz") == 200
        assert sorted(await asyncio.gather(*requests)) == [401] * 4 + [429] * 3


async def test_clients_behind_a_trusted_proxy_have_shares_of_their_own(kubernetes: Kubernetes) -> None:
    settings: dict[str, Any] = {"max_requests_per_caller": 1, "trusted_proxies": "127.0.0.1", "request_seconds": 20}
    async with shim(kubernetes, **settings) as (_, client), without_key(client) as bare:
        kubernetes.delay = 0.3
        headers = [{**bearer(f"no-{each}"), "X-Forwarded-For": f"192.0.2.{each}"} for each in range(5)]
        assert await asyncio.gather(*(status(bare, "GET", CALL, headers=each) for each in headers)) == [401] * 5
        kubernetes.delay = 0


async def test_waiting_places_of_one_caller_leave_some_for_others(kubernetes: Kubernetes) -> None:
    greedy = {"X-Api-Key": kubernetes.make_key()}
    settings: dict[str, Any] = {"max_waiting": 4, "max_waiting_per_caller": 2}
    async with shim(kubernetes, **settings) as (_, client):

        async def waited(**headers: str) -> bool:
            sent = {"Prefer": "wait=2", **headers}
            async with client.post(CALL, json=SETUP, headers=sent) as response:
                return "Preference-Applied" in response.headers

        many = [asyncio.create_task(waited(**greedy)) for _ in range(10)]
        await called(kubernetes, "WATCH smschannels", 1)
        start = perf_counter()
        assert await waited(), "another caller may wait"
        assert perf_counter() - start > 1.5
        assert sorted(await asyncio.gather(*many)) == [False] * 8 + [True] * 2
