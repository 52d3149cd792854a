"""The shim while Kubernetes is unreachable: it still answers errors and probes, and fails closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from kubernetes.aio.client.configuration import Configuration

from api_shim.app import serve
from api_shim.settings import Settings
from smschannel.api.kube_client import KubeClient

MALFORMED = (
    "Malformed HTTP request: check the encoding of the body, and the head, which may have 128 headers and lines of"
    " 8190 bytes."
)
_NOT_A_BEARER_TOKEN = "Not authenticated: the Authorization header is not 'Bearer TOKEN'."
CALL = "/v1/instances/497f6eca-6276-4993-bfeb-53cbbbba6f08/channels/sms"


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A running shim whose API server refuses connections."""
    configuration = Configuration()
    configuration.host = "http://127.0.0.1:9"
    async with KubeClient(configuration) as api, serve(Settings(http_port=0), api) as service:
        yield service.port


@pytest.fixture
async def client(port: int) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session


async def send(port: int, raw: bytes) -> tuple[str, Any]:
    """Send raw bytes; return the status line and the JSON answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    assert b"X-Request-Id" in head
    assert b"aiohttp" not in head, "the answer does not reveal the software"
    return head.split(b"\r\n")[0].decode(), json.loads(body)


async def test_authentication_is_checked_first(client: aiohttp.ClientSession) -> None:
    for method, path in (("GET", CALL), ("POST", CALL), ("DELETE", CALL), ("GET", CALL.replace("497f", "nope"))):
        async with client.request(method, path) as response:
            assert response.status == 401
            assert "Bearer" in response.headers["WWW-Authenticate"]
            assert await response.json() == {
                "detail": "Not authenticated: send an X-Api-Key header, or Authorization: Bearer TOKEN."
            }


@pytest.mark.parametrize(
    ("headers", "status", "detail"),
    [
        ([("X-Api-Key", "smsch_one_x")], 503, "The API keys cannot be read at the moment. Try again."),
        ([("Authorization", "Bearer x")], 503, "Kubernetes is not available. Try again."),
        ([("Authorization", "Basic eDp5")], 401, _NOT_A_BEARER_TOKEN),
        ([("Authorization", "Bearer")], 401, _NOT_A_BEARER_TOKEN),
        ([("Authorization", "Bearer \u00e9")], 401, _NOT_A_BEARER_TOKEN),
        ([("X-Api-Key", "a"), ("X-Api-Key", "b")], 401, "Not authenticated: send only one X-Api-Key header."),
        (
            [("Authorization", "Bearer a"), ("Authorization", "Bearer b")],
            401,
            "Not authenticated: send only one Authorization header.",
        ),
    ],
)
async def test_authentication_fails_closed(
    client: aiohttp.ClientSession, headers: list[tuple[str, str]], status: int, detail: str
) -> None:
    async with client.get(CALL, headers=headers) as response:
        assert (response.status, await response.json()) == (status, {"detail": detail})
        assert ("Retry-After" in response.headers) is (status == 503)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "HEAD", "OPTIONS"])
async def test_other_methods_are_405(client: aiohttp.ClientSession, method: str) -> None:
    async with client.request(method, CALL) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "DELETE,GET,POST"
        assert response.content_type == "application/json"


@pytest.mark.parametrize("path", ["/", "/v1", CALL + "/", CALL + "/webhook", "/v1/instances//channels/sms", "/docs/x"])
async def test_other_paths_are_404(client: aiohttp.ClientSession, path: str) -> None:
    async with client.get(path) as response:
        assert response.status == 404
        assert list(await response.json()) == ["detail"]


async def test_probes_answer_without_kubernetes(client: aiohttp.ClientSession) -> None:
    async with client.get("/healthz") as response:
        assert response.status == 200
    async with client.get("/readyz") as response:
        assert (response.status, await response.json()) == (503, {"detail": "The API keys have not been read yet."})


async def test_request_id_is_returned(client: aiohttp.ClientSession) -> None:
    async with client.get(CALL, headers={"X-Request-Id": "mine-1"}) as response:
        assert response.headers["X-Request-Id"] == "mine-1"
    async with client.get("/nowhere", headers={"X-Request-Id": "no id { }"}) as response:
        assert len(response.headers["X-Request-Id"]) == 36
    async with client.get(CALL) as one, client.get(CALL) as two:
        assert one.headers["X-Request-Id"] != two.headers["X-Request-Id"]


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\r\n\r\n",
        b"GET " + CALL.encode() + b" HTTP/1.1\r\nHost: x\r\nX-Api-Key: " + b"5ecret" * 2000 + b"\r\n\r\n",
        b"GET " + CALL.encode() + b" HTTP/1.1\r\nHost: x\r\nX-Api-Key: 5ecret\x00\r\n\r\n",
        b"POST " + CALL.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 5ecret\r\n\r\n",
    ],
    ids=["TLS", "long header", "NUL in a header", "bad length"],
)
async def test_malformed_http_is_answered_without_quoting_it(
    port: int, raw: bytes, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    status, answer = await send(port, raw)
    assert " 400 " in status
    assert answer == {"detail": MALFORMED}
    assert "5ecret" not in caplog.text + "".join(capsys.readouterr())


async def test_unknown_expectation_is_417(port: int) -> None:
    status, answer = await send(port, b"GET / HTTP/1.1\r\nHost: x\r\nExpect: 5ecret\r\nConnection: close\r\n\r\n")
    assert " 417 " in status
    assert answer == {"detail": "The only supported expectation is 100-continue."}


@pytest.mark.parametrize(
    ("headers", "rest"),
    [
        (b"Transfer-Encoding: chunked", b"5ecret\r\n\r\n"),
        (b"Content-Length: 6\r\nContent-Encoding: gzip", b"5ecret"),
        (b"Content-Length: 60\r\nConnection: close", b"5ecret"),
    ],
    ids=["chunk", "gzip", "cut"],
)
async def test_broken_body_is_never_quoted(
    port: int, headers: bytes, rest: bytes, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST " + CALL.encode() + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n")
    await asyncio.sleep(0.1)  # by then the server has read the head
    writer.write(rest)
    await asyncio.sleep(0.1)
    writer.write_eof()
    assert b"5ecret" not in await asyncio.wait_for(reader.read(), 15)
    writer.close()
    assert "Traceback" not in caplog.text, "a traceback of aiohttp would quote the body"
    assert "5ecret" not in caplog.text + "".join(capfd.readouterr())
