"""Edge cases of the contract over HTTP: every answer is documented, and none quotes what was sent."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDictProxy

import api_shim.connections
import api_shim.routes
import api_shim.server
from api_shim.openapi import document
from tests.contract.test_rest import GOOD, NOT_CONFIGURED
from tests.unit.test_shim_app import MALFORMED
from tests.unit.test_shim_kubernetes import CALL, INSTANCE, Kubernetes, shim

SECRET = "5ecret"
ANSWERS = document()["paths"]["/v1/instances/{instance_id}/channels/sms"]


@pytest.fixture
async def kubernetes() -> AsyncIterator[Kubernetes]:
    fake = Kubernetes()
    async with fake.running():
        yield fake


@pytest.fixture
async def client(kubernetes: Kubernetes) -> AsyncIterator[aiohttp.ClientSession]:
    async with shim(kubernetes) as (_, session):
        yield session


async def ask(
    client: aiohttp.ClientSession, method: str, path: str, **options: Any
) -> tuple[int, Any, CIMultiDictProxy[str]]:
    async with client.request(method, path, **options) as response:
        content = await response.text()
        assert response.content_type == "application/json"
        assert SECRET not in content + str(response.headers), "the input is not echoed"
        assert response.headers["X-Request-Id"]
        if path == CALL and method in {"GET", "POST", "DELETE"}:
            assert str(response.status) in ANSWERS[method.lower()]["responses"], "every answer is documented"
        body = json.loads(content)
        assert set(body) == ({"detail"} if response.status >= 400 else set(NOT_CONFIGURED))
        return response.status, body.get("detail", body), response.headers


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Any:
    return lambda: caplog.text + "".join(capfd.readouterr())


# -- path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "segment",
    [SECRET, "%FF", "%00", "a%2Fb", "..%2f", "%20", "%E2%80%AE", INSTANCE[:-1], INSTANCE + "0", "%7B" + INSTANCE, "é"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_invalid_uuid_is_422(client: aiohttp.ClientSession, method: str, segment: str) -> None:
    status, detail, _ = await ask(client, method, f"/v1/instances/{segment}/channels/sms")
    assert (status, [each["loc"] for each in detail]) == (422, [["path", "instance_id"]])
    assert [each["type"] for each in detail] == ["uuid_parsing"]
    assert set(detail[0]) == {"loc", "msg", "type"}


@pytest.mark.parametrize(
    "written", [INSTANCE.upper(), INSTANCE.replace("-", ""), f"%7B{INSTANCE}%7D", f"urn:uuid:{INSTANCE}"]
)
async def test_rights_apply_to_the_normalised_uuid(kubernetes: Kubernetes, written: str) -> None:
    """A key for one instance allows every form of its UUID, and no other instance."""
    own = kubernetes.make_key(instances=[INSTANCE])
    other = kubernetes.make_key(instances=["00000000-6276-4993-bfeb-53cbbbba6f08"])
    async with shim(kubernetes) as (_, client):
        path = f"/v1/instances/{written}/channels/sms"
        assert (await ask(client, "GET", path, headers={"X-Api-Key": own}))[0] == 200
        assert kubernetes.calls[f"GET {INSTANCE}"] == 1
        assert (await ask(client, "GET", path, headers={"X-Api-Key": other}))[0] == 403
        assert kubernetes.calls[f"GET {INSTANCE}"] == 1, "the channel was not even read"


@pytest.mark.parametrize("path", ["/", "/v1", CALL + "/", CALL + f"/{SECRET}", "/V1" + CALL[3:], "/openapi"])
async def test_unknown_paths_are_404(client: aiohttp.ClientSession, path: str) -> None:
    status, detail, _ = await ask(client, "GET", path)
    assert status == 404
    assert "/v1/instances/{instance_id}/channels/sms" in detail, "the message names the path of the calls"


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE"])
async def test_wrong_methods_are_405(client: aiohttp.ClientSession, method: str) -> None:
    status, _, headers = await ask(client, method, CALL)
    assert (status, headers["Allow"]) == (405, "DELETE,GET,POST")


async def test_query_string_is_ignored(client: aiohttp.ClientSession) -> None:
    assert (await ask(client, "GET", f"{CALL}?token={SECRET}"))[1] == NOT_CONFIGURED


# -- body ----------------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
DEEP = b'{"a":' * 10_000 + b"1" + b"}" * 10_000


@pytest.mark.parametrize(
    ("body", "headers", "status", "kinds"),
    [
        pytest.param(b"", JSON, 422, ["missing"], id="empty"),
        pytest.param(b"null", JSON, 422, ["missing"], id="null"),
        pytest.param(SECRET.encode(), JSON, 422, ["json_invalid"], id="not JSON"),
        pytest.param(f"auth_token={SECRET}".encode(), JSON, 422, ["json_invalid"], id="a form declared as JSON"),
        pytest.param(b'{"auth_token": "' + SECRET.encode() + b'\xff"}', JSON, 422, ["json_invalid"], id="broken UTF-8"),
        pytest.param(json.dumps(GOOD).encode("utf-16"), JSON, 422, ["json_invalid"], id="UTF-16"),
        pytest.param(b"[" * 60_000, JSON, 422, ["json_invalid"], id="deep"),
        pytest.param(DEEP, JSON, 422, ["json_invalid"], id="deep and complete"),
        pytest.param(b'{"a": ' + b"9" * 60_000 + b"}", JSON, 422, ["json_invalid"], id="a huge number"),
        pytest.param(b"[]", JSON, 422, ["model_attributes_type"], id="a list"),
        pytest.param(b'"' + SECRET.encode() + b'"', JSON, 422, ["model_attributes_type"], id="a string"),
        pytest.param(b"{}", JSON, 422, ["missing"] * 3, id="an empty object"),
        pytest.param(b"\xef\xbb\xbf{}", JSON, 422, ["missing"] * 3, id="with a byte order mark"),
        pytest.param(b"{}", {"Content-Type": ""}, 422, ["missing"] * 3, id="without a content type, JSON is assumed"),
        pytest.param(b"{}", {"Content-Type": "application/vnd.x+json"}, 422, ["missing"] * 3, id="a kind of JSON"),
        pytest.param(b"{}", {"Content-Type": "text/plain"}, 415, None, id="text"),
        pytest.param(b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415, None, id="a form"),
        pytest.param(b"{}", {"Content-Type": SECRET}, 415, None, id="not a media type"),
        pytest.param(b" " * 65_537, JSON, 413, None, id="huge"),
        pytest.param(
            gzip.compress(b" " * 9_000_000), {**JSON, "Content-Encoding": "gzip"}, 413, None, id="huge when unpacked"
        ),
        pytest.param(b"\x1f\x8b" + b"x" * 50, {**JSON, "Content-Encoding": "gzip"}, 400, None, id="not gzip"),
    ],
)
async def test_bodies_get_the_documented_answer(
    client: aiohttp.ClientSession,
    kubernetes: Kubernetes,
    body: bytes,
    headers: dict[str, str],
    status: int,
    kinds: list[str] | None,
    logged: Any,
) -> None:
    skip = ["Content-Type"] if not headers["Content-Type"] else []
    sent = {name: value for name, value in headers.items() if value}
    answer, detail, _ = await ask(client, "POST", CALL, data=body, headers=sent, skip_auto_headers=skip)
    assert answer == status
    if kinds:
        assert [each["type"] for each in detail] == kinds
        assert all(set(each) == {"loc", "msg", "type"} and each["loc"][0] == "body" for each in detail)
    assert kubernetes.channel is None, "nothing was written"
    assert SECRET not in logged()


@pytest.mark.parametrize(
    ("change", "written"),
    [
        ({"phone_number": "+61 400-111-222"}, "+61400111222"),
        ({"phone_number": " +61 (400) 111.222 "}, "+61400111222"),
        ({"account_sid": f"\t{GOOD['account_sid']}\n"}, "+61400111222"),
        ({"auth_token": f" {GOOD['auth_token']} "}, "+61400111222"),
        ({"friendly_name": SECRET, "enabled": [None]}, "+61400111222"),
    ],
    ids=["dashes and spaces", "brackets and dots", "a SID with white space", "a token with spaces", "extra fields"],
)
async def test_fields_are_normalised(
    client: aiohttp.ClientSession, kubernetes: Kubernetes, change: dict[str, Any], written: str
) -> None:
    status, body, _ = await ask(client, "POST", CALL, json={**GOOD, **change})
    assert (status, body["phone_number"], body["status"]) == (201, written, "pending")
    assert kubernetes.channel
    spec = kubernetes.channel["spec"]
    assert (spec["phoneNumber"], spec["accountSid"]) == (written, GOOD["account_sid"])
    assert set(spec) == {"accountSid", "phoneNumber", "credentials"}
    assert GOOD["auth_token"] not in json.dumps(kubernetes.channel)


@pytest.mark.parametrize("field", GOOD)
@pytest.mark.parametrize("value", [None, 61400111222, True, [], {}, f"{SECRET} {SECRET}", SECRET * 100, "\x00"])
async def test_invalid_fields_are_422(
    client: aiohttp.ClientSession, kubernetes: Kubernetes, field: str, value: Any
) -> None:
    status, detail, _ = await ask(client, "POST", CALL, json={**GOOD, field: value})
    assert (status, [each["loc"] for each in detail]) == (422, [["body", field]])
    assert kubernetes.channel is None


# -- headers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("wait=1", "wait=1"),
        ("respond-async, WAIT = 1", "wait=1"),
        ('wait="1"; foo', "wait=1"),
        ("wait=999999999", "wait=2"),
        ("wait=0", None),
        ("wait=-1", None),
        ("wait=1.5", None),
        (f"wait={SECRET}", None),
        ("wait=99999999999999999999", None),
        ("await=1", None),
        ("wait=1_0", None),
        ("wait=+1", None),
    ],
)
async def test_prefer_wait_is_parsed(kubernetes: Kubernetes, prefer: str, applied: str | None) -> None:
    """An invalid preference is ignored and is not an error: RFC 7240."""
    async with shim(kubernetes, wait_limit_seconds=2) as (_, client):
        request = asyncio.create_task(ask(client, "POST", CALL, json=GOOD, headers={"Prefer": prefer}))
        await kubernetes.applied.wait()
        assert kubernetes.channel
        kubernetes.channel["metadata"]["deletionTimestamp"] = (
            "2026-01-01T00:00:00Z"  # so that there is nothing to wait for
        )
        status, _, headers = await request
    assert (status, headers.get("Preference-Applied")) == (201, applied)


@pytest.mark.parametrize("given", ["mine-1", "a" * 128, "0af7651916cd43dd8448eb211c80319c/b7ad6b7169203331:1@x"])
async def test_valid_request_id_is_kept(client: aiohttp.ClientSession, given: str) -> None:
    assert (await ask(client, "GET", CALL, headers={"X-Request-Id": given}))[2]["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, f"{SECRET} with spaces", f'"{SECRET}"', "é"])
async def test_invalid_request_id_is_replaced(client: aiohttp.ClientSession, given: str) -> None:
    answered = (await ask(client, "GET", CALL, headers={"X-Request-Id": given}))[2]["X-Request-Id"]
    assert re.fullmatch("[0-9a-f-]{36}", answered)


async def test_answers_do_not_name_the_server_software(client: aiohttp.ClientSession) -> None:
    headers = (await ask(client, "GET", CALL))[2]
    assert "Server" not in headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "many",
    [{f"X-{number}": "x" for number in range(200)}, {"X-Long": SECRET * 2_000}, {"X-Api-Key": SECRET * 2_000}],
    ids=["many", "long", "a long key"],
)
async def test_huge_headers_are_400(client: aiohttp.ClientSession, many: dict[str, str], logged: Any) -> None:
    async with client.get(CALL, headers=many) as response:
        assert (response.status, await response.json()) == (400, {"detail": MALFORMED})
    assert SECRET not in logged()


async def test_huge_path_is_400(client: aiohttp.ClientSession) -> None:
    async with client.get(f"/v1/instances/{SECRET * 2_000}/channels/sms") as response:
        assert (response.status, await response.json()) == (400, {"detail": MALFORMED})


# -- slow clients --------------------------------------------------------------------------------------------


async def test_slow_body_is_408(client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_shim.routes, "_BODY_SECONDS", 0.2)

    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    status, detail, headers = await ask(client, "POST", CALL, data=drip(), headers=JSON)
    assert (status, detail) == (408, "The body did not arrive within 0.2 seconds.")
    assert headers["Connection"] == "close"


async def test_body_announced_as_too_large_is_413_at_once(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (service, client):
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        head = f"POST {CALL} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {client.headers['X-Api-Key']}\r\n"
        writer.write(f"{head}Content-Length: 65537\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.readuntil(b"}"), 2)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"Connection: close" in answer
        writer.close()


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half a head"])
async def test_slow_request_head_closes_the_connection(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(api_shim.connections, "_HEAD_SECONDS", 0.2)
    async with shim(kubernetes) as (service, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(head)
        assert await asyncio.wait_for(reader.read(), 2) == b"", "the connection is closed"
        writer.close()
