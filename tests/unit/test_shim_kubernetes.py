"""The shim's calls to Kubernetes, and its answers while Kubernetes is slow, unreachable or refuses calls.

The API server is a small fake on a real port, since a real one cannot be made to answer 429 or to hang.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration
from structlog.testing import capture_logs

import api_shim.auth
from api_shim.app import Service, serve
from api_shim.settings import Settings
from smschannel.api.api_keys import make_key, secret_of
from smschannel.api.kube_client import KubeClient
from smschannel.api.sealing import SealingKey

INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
CALL = f"/v1/instances/{INSTANCE}/channels/sms"
SETUP = {"account_sid": "AC" + "0a" * 16, "auth_token": "5ecret" * 5, "phone_number": "+61400111222"}
AUDIENCE = "sms-channels-api"

Fault = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Kubernetes:
    """A fake API server with one channel. `faults` answer in its place, by "METHOD last-segment-of-the-path"."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.paths: set[str] = set()
        self.faults: dict[str, Fault] = {}
        self.channel: dict[str, Any] | None = None
        self.preconditions: list[dict[str, str]] = []
        self.applied = asyncio.Event()
        self.keys: dict[str, Any] = {"data": {}}
        self.valid_tokens = {"valid"}
        self.delay = 0.0
        self._public = SealingKey.generate().public.encoded
        self.port = 0

    def make_key(self, **options: Any) -> str:
        new = make_key(options.pop("instances", ["*"]), options.pop("verbs", ["get", "post", "delete"]), **options)
        self.keys["data"] |= secret_of(new, "sms-operator")["data"]
        return new.key.get_secret_value()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            self.port = runner.addresses[0][1]
            yield
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.paths.add(request.path)
        last = request.path.rsplit("/", 1)[1]
        if "watch" in request.query:
            self.calls[f"WATCH {last}"] += 1
            if fault := self.faults.get(f"WATCH {last}"):
                return await fault(request)
            response = web.StreamResponse()
            await response.prepare(request)
            await asyncio.sleep(3600)
        called = f"{request.method} {last}"
        self.calls[called] += 1
        await asyncio.sleep(self.delay)
        if fault := self.faults.get(called):
            return await fault(request)
        match called:
            case "GET smschannel-api-keys":
                return web.json_response(self.keys)
            case "GET smschannel-sealing-key":
                return web.json_response({"data": {"public-key": self._public}})
            case "POST tokenreviews":
                valid = (await request.json())["spec"]["token"] in self.valid_tokens
                user = {"user": {"username": "alice"}, "audiences": [AUDIENCE]} if valid else {}
                return web.json_response({"status": {"authenticated": valid, **user}})
            case "POST subjectaccessreviews":
                return web.json_response({"status": {"allowed": True}})
        if self.channel is None and request.method != "PATCH":
            return not_found(last)
        if request.method in {"PATCH", "DELETE"}:
            sent = json.loads(await request.text())
            condition = sent["metadata"] if request.method == "PATCH" else sent["preconditions"]
            self.preconditions.append(
                {each: condition[each] for each in ("uid", "resourceVersion") if each in condition}
            )
        if request.method == "PATCH":
            self.channel = json.loads(await request.text())
            fields: dict[str, Any] = {f"f:{field}": {} for field in self.channel["spec"]}
            managed = {"manager": "sms-api-shim", "operation": "Apply", "fieldsV1": {"f:spec": fields}}
            self.channel["metadata"] |= {
                "generation": 1,
                "resourceVersion": "7",
                "uid": "u",
                "managedFields": [managed],
            }
            self.applied.set()
        return web.json_response(self.channel)


def not_found(name: str) -> web.Response:
    details = {"name": name, "group": "channels.hydracore.io", "kind": "smschannels"}
    return web.json_response({"kind": "Status", "message": f'"{name}" not found', "details": details}, status=404)


@pytest.fixture
async def kubernetes() -> AsyncIterator[Kubernetes]:
    fake = Kubernetes()
    async with fake.running():
        yield fake


@asynccontextmanager
async def shim(
    kubernetes: Kubernetes, below: str = "", **settings: Any
) -> AsyncIterator[tuple[Service, aiohttp.ClientSession]]:
    """A running shim that has read its API keys, and a client with a key that allows everything."""
    key = kubernetes.make_key()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{kubernetes.port}{below}"
    defaults = {"http_port": 0, "request_seconds": 1.0}
    async with (
        KubeClient(configuration) as api,
        serve(Settings(**{**defaults, **settings}), api) as service,
        aiohttp.ClientSession(f"http://127.0.0.1:{service.port}", headers={"X-Api-Key": key}) as client,
    ):
        await until(client, "/readyz", 200)
        yield service, client


async def status(client: aiohttp.ClientSession, method: str, path: str, **options: Any) -> int:
    async with client.request(method, path, **options) as response:
        await response.read()
        return response.status


async def until(client: aiohttp.ClientSession, path: str, expected: int, **options: Any) -> None:
    async with asyncio.timeout(5):
        while await status(client, "GET", path, **options) != expected:  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.02)


async def called(kubernetes: Kubernetes, call: str, times: int) -> None:
    """Wait until this was called `times` times; fail after five seconds."""
    async with asyncio.timeout(5):
        while kubernetes.calls[call] < times:  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.01)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def without_key(client: aiohttp.ClientSession) -> AsyncIterator[aiohttp.ClientSession]:
    assert client._base_url
    async with aiohttp.ClientSession(client._base_url) as bare:
        yield bare


# -- number of calls to Kubernetes ---------------------------------------------------------------------------


async def test_api_key_needs_no_call_to_kubernetes(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        before = kubernetes.calls.total()
        for _ in range(20):
            assert await status(client, "GET", CALL) == 200
        assert kubernetes.calls.total() - before == 20, "one read of the channel per request"


async def test_api_server_url_may_have_a_path(kubernetes: Kubernetes) -> None:
    """Some proxies serve many clusters below different paths; the kubeconfig's URL then has a path."""
    async with shim(kubernetes, below="/k8s/clusters/c-1/") as (_, client):
        assert await status(client, "GET", CALL) == 200
    assert all(path.startswith("/k8s/clusters/c-1/api") for path in kubernetes.paths)


async def test_token_review_is_cached(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        for _ in range(20):
            assert await status(bare, "GET", CALL, headers=bearer("valid")) == 200
        assert (kubernetes.calls["POST tokenreviews"], kubernetes.calls["POST subjectaccessreviews"]) == (1, 1)
        assert kubernetes.calls[f"GET {INSTANCE}"] == 20, "the channel itself is never cached"


async def test_concurrent_equal_reviews_are_sent_once(kubernetes: Kubernetes) -> None:
    kubernetes.delay = 0.1
    async with shim(kubernetes, request_seconds=10.0) as (_, client), without_key(client) as bare:
        answers = await asyncio.gather(
            *(status(bare, "GET", CALL, headers=bearer("valid")) for _ in range(30)),
            *(status(bare, "GET", CALL, headers=bearer("invalid")) for _ in range(30)),
        )
    assert sorted(answers) == [200] * 30 + [401] * 30
    assert kubernetes.calls["POST tokenreviews"] == 2, "one per token"
    assert kubernetes.calls["POST subjectaccessreviews"] == 1


async def test_disconnected_client_does_not_cancel_a_shared_review(kubernetes: Kubernetes) -> None:
    kubernetes.delay = 0.3
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        impatient = asyncio.create_task(status(bare, "GET", CALL, headers=bearer("valid")))
        await asyncio.sleep(0.1)
        patient = asyncio.create_task(status(bare, "GET", CALL, headers=bearer("valid")))
        await asyncio.sleep(0.1)
        impatient.cancel()
        assert await patient == 200
    assert kubernetes.calls["POST tokenreviews"] == 1


async def test_token_reviewed_for_another_audience_is_rejected(kubernetes: Kubernetes) -> None:
    """An authenticator without audiences only confirms that the token is valid for the API server."""

    async def status_for(*audiences: str) -> int:
        async def review(_: web.Request) -> web.StreamResponse:
            found = {"authenticated": True, "user": {"username": "alice"}}
            return web.json_response({"status": {**found, "audiences": audiences} if audiences else found})

        kubernetes.faults["POST tokenreviews"] = review
        return await status(bare, "GET", CALL, headers=bearer("valid"))

    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        assert [await status_for(), await status_for("another"), await status_for("another", AUDIENCE)] == [
            401,
            401,
            200,
        ]


async def test_denied_overrides_allowed(kubernetes: Kubernetes) -> None:
    async def denied(_: web.Request) -> web.StreamResponse:
        return web.json_response({"status": {"allowed": True, "denied": True}})

    kubernetes.faults["POST subjectaccessreviews"] = denied
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        assert await status(bare, "GET", CALL, headers=bearer("valid")) == 403


# -- authentication failures ---------------------------------------------------------------------------------


async def test_client_with_too_many_failures_gets_429(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, authentication_failures_per_minute=5) as (_, client), without_key(client) as bare:
        for number in range(5):
            assert await status(bare, "GET", CALL, headers=bearer(f"invalid-{number}")) == 401
        sent = kubernetes.calls["POST tokenreviews"]
        for headers in (bearer("another"), bearer("valid"), {"X-Api-Key": "smsch_no_no"}):
            async with bare.get(CALL, headers=headers) as response:
                assert response.status == 429
                assert 0 < int(response.headers["Retry-After"]) <= 12, "five per minute are one every 12 seconds"
                assert list(await response.json()) == ["detail"]
        assert kubernetes.calls["POST tokenreviews"] == sent, "no TokenReview is sent"
        assert await status(client, "GET", CALL) == 200, "a valid key is never limited"


async def test_cached_token_is_never_rate_limited(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, authentication_failures_per_minute=1) as (_, client), without_key(client) as bare:
        assert await status(bare, "GET", CALL, headers=bearer("valid")) == 200
        assert await status(bare, "GET", CALL, headers=bearer("invalid")) == 401
        assert await status(bare, "GET", CALL, headers=bearer("invalid")) == 429
        assert await status(bare, "GET", CALL, headers=bearer("valid")) == 200


async def test_token_valid_within_the_hour_is_never_rate_limited(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise another client behind the same proxy could lock it out once the cached review expires."""
    monkeypatch.setattr(api_shim.auth, "_CACHE_SECONDS", 0.1)
    async with shim(kubernetes, authentication_failures_per_minute=1) as (_, client), without_key(client) as bare:
        assert await status(bare, "GET", CALL, headers=bearer("valid")) == 200
        await asyncio.sleep(0.2)
        assert await status(bare, "GET", CALL, headers=bearer("invalid")) == 401
        assert await status(bare, "GET", CALL, headers=bearer("valid")) == 200
        assert kubernetes.calls["POST tokenreviews"] == 3, "it was reviewed again"
        kubernetes.valid_tokens.clear()
        await asyncio.sleep(0.2)
        assert await status(bare, "GET", CALL, headers=bearer("valid")) == 401, "a revoked token is rejected"
        assert await status(bare, "GET", CALL, headers=bearer("valid")) == 429
        assert kubernetes.calls["POST tokenreviews"] == 4


@pytest.mark.parametrize("disconnect", [False, True])
async def test_concurrent_wrong_tokens_are_rate_limited(kubernetes: Kubernetes, disconnect: bool) -> None:
    async with shim(kubernetes, authentication_failures_per_minute=5) as (_, client), without_key(client) as bare:
        kubernetes.delay = 0.3
        requests = [
            asyncio.create_task(status(bare, "GET", CALL, headers=bearer(f"invalid-{each}"))) for each in range(20)
        ]
        if disconnect:
            await called(kubernetes, "POST tokenreviews", 5)
            for each in requests:
                each.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            assert await status(bare, "GET", CALL, headers=bearer("one-more")) == 429
        else:
            assert sorted(await asyncio.gather(*requests)) == [401] * 5 + [429] * 15
        assert kubernetes.calls["POST tokenreviews"] == 5


async def test_valid_tokens_and_kubernetes_errors_are_not_failures(kubernetes: Kubernetes) -> None:
    kubernetes.valid_tokens = {f"valid-{each}" for each in range(10)}
    async with shim(kubernetes, authentication_failures_per_minute=2) as (_, client), without_key(client) as bare:
        kubernetes.faults["POST tokenreviews"] = answering(500)
        for token in kubernetes.valid_tokens:
            assert await status(bare, "GET", CALL, headers=bearer(token)) == 503
        kubernetes.faults.clear()
        for token in kubernetes.valid_tokens:
            assert await status(bare, "GET", CALL, headers=bearer(token)) == 200


@pytest.mark.parametrize(
    ("trusted", "second"),
    [
        pytest.param((), 429, id="without trusted proxies, the header is ignored"),
        pytest.param("127.0.0.1", 401, id="behind a trusted proxy, each client has its own limit"),
    ],
)
async def test_clients_behind_a_trusted_proxy_are_counted_separately(
    kubernetes: Kubernetes, trusted: Any, second: int
) -> None:
    settings = {"authentication_failures_per_minute": 1, "trusted_proxies": trusted}
    async with shim(kubernetes, **settings) as (_, client), without_key(client) as bare:
        for client_address, expected in (("192.0.2.1", 401), ("192.0.2.1", 429), ("192.0.2.2", second)):
            headers = {**bearer("invalid"), "X-Forwarded-For": f"spoofed, {client_address}"}
            assert await status(bare, "GET", CALL, headers=headers) == expected


async def test_write_is_logged_with_its_request_and_what_it_wrote(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        with capture_logs() as logs:
            assert await status(client, "POST", CALL, json=SETUP, headers={"X-Request-Id": "find-me"}) == 201
    (line,) = [each for each in logs if each["event"] == "handled write request"]
    assert line["request_id"] == "find-me"
    assert {"uid", "generation"} <= line.keys(), "the operator's lines have the same two"
    assert line["uid"]


async def test_authentication_failure_is_logged_without_the_token(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        with capture_logs() as logs:
            await status(bare, "GET", CALL, headers={**bearer("5ecret"), "X-Request-Id": "find-me"})
    (line,) = [each for each in logs if each["event"] == "rejected credentials"]
    assert (line["client"], line["request_id"]) == ("127.0.0.1", "find-me")
    assert "5ecret" not in str(logs)


async def test_expired_key_is_rejected(kubernetes: Kubernetes) -> None:
    soon = kubernetes.make_key(expires=datetime.now(UTC) + timedelta(seconds=0.5))
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        assert await status(bare, "GET", CALL, headers={"X-Api-Key": soon}) == 200
        await until(bare, CALL, 401, headers={"X-Api-Key": soon})


async def test_revoked_key_is_rejected_even_if_the_watch_is_silent(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake's watch sends nothing, like one whose connection broke unnoticed."""
    monkeypatch.setattr(api_shim.auth, "_RELIST_SECONDS", 0.2)
    async with shim(kubernetes) as (_, client):
        assert await status(client, "GET", CALL) == 200
        kubernetes.keys["data"] = {}
        await until(client, CALL, 401)


async def test_malformed_key_is_logged_once(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each time that the keys are read again."""
    monkeypatch.setattr(api_shim.auth, "_RELIST_SECONDS", 0.05)
    kubernetes.keys["data"]["broken"] = "e30="
    with capture_logs() as logs:
        async with shim(kubernetes), asyncio.timeout(5):
            await called(kubernetes, "GET smschannel-api-keys", 4)
            kubernetes.keys["data"]["broken"] = "e30K"
            read = kubernetes.calls["GET smschannel-api-keys"]
            await called(kubernetes, "GET smschannel-api-keys", read + 3)
    logged = [each["key_id"] for each in logs if each["event"] == "cannot use API key"]
    assert logged == ["broken", "broken"], "once for each version of the entry"


async def test_secret_of_another_shape_does_not_end_the_watch_loop(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_shim.auth, "_RELIST_SECONDS", 0.05)
    async with shim(kubernetes) as (_, client):
        kubernetes.keys["data"] = ["not a mapping"]
        read = kubernetes.calls["GET smschannel-api-keys"]
        await called(kubernetes, "GET smschannel-api-keys", read + 2)
        assert await status(client, "GET", CALL) == 200, "the keys read last are still valid"
        kubernetes.keys["data"] = {}
        await until(client, CALL, 401)


async def test_deleting_the_secret_revokes_all_keys(kubernetes: Kubernetes) -> None:
    removed = asyncio.Event()

    async def watch(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await removed.wait()
        gone = {**kubernetes.keys, "metadata": {"resourceVersion": "9"}}
        await response.write(json.dumps({"type": "DELETED", "object": gone}).encode() + b"\n")
        await asyncio.sleep(3600)
        return response

    kubernetes.faults["WATCH secrets"] = watch
    async with shim(kubernetes) as (_, client):
        assert await status(client, "GET", CALL) == 200
        removed.set()
        await until(client, CALL, 401)


async def test_stale_keys_are_rejected(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have been revoked since."""
    monkeypatch.setattr(api_shim.auth, "_RELIST_SECONDS", 0.2)
    monkeypatch.setattr(api_shim.auth, "_STALE_SECONDS", 1)
    async with shim(kubernetes) as (_, client):
        kubernetes.faults["GET smschannel-api-keys"] = answering(500)
        await until(client, CALL, 503)
        assert await status(client, "GET", "/readyz") == 503
        kubernetes.faults.clear()
        await until(client, CALL, 200)


# -- faults of Kubernetes ------------------------------------------------------------------------------------


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def cut(request: web.Request) -> web.StreamResponse:
    assert request.transport
    request.transport.close()
    return web.Response()


def answering(code: int, **headers: str) -> Fault:
    async def fault(_: web.Request) -> web.StreamResponse:
        body = {"kind": "Status", "message": "5ecret"}
        return web.json_response(body, status=code, headers={name.replace("_", "-"): headers[name] for name in headers})

    return fault


async def no_such_kind(_: web.Request) -> web.StreamResponse:
    return web.Response(status=404, text="404 page not found\n")


async def half_an_answer(_: web.Request) -> web.StreamResponse:
    return web.Response(text='{"metadata": {"name"', content_type="application/json")


FAULTS = {
    "hangs": (hang, "5"),
    "429": (answering(429, Retry_After="7"), "7"),
    "429 without a time": (answering(429), "5"),
    "an excessive Retry-After": (answering(503, Retry_After="999999"), "900"),
    "500": (answering(500), "5"),
    "503": (answering(503), "5"),
    "403, a right is missing": (answering(403), "30"),
    "404, the CRD is missing": (no_such_kind, "30"),
    "cuts the connection": (cut, "5"),
    "half an answer": (half_an_answer, "5"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("method", "breaks"),
    [
        ("GET", f"GET {INSTANCE}"),
        ("POST", f"GET {INSTANCE}"),
        ("POST", f"PATCH {INSTANCE}"),
        ("DELETE", f"GET {INSTANCE}"),
        ("DELETE", f"DELETE {INSTANCE}"),
    ],
    ids=["GET", "POST, reading", "POST, writing", "DELETE, reading", "DELETE, deleting"],
)
async def test_kubernetes_fault_is_503_in_bounded_time(
    kubernetes: Kubernetes, method: str, breaks: str, fault: str
) -> None:
    """Never a hang, never "not_configured" or 204 without knowing, and the error's text is not repeated."""
    async with shim(kubernetes, request_seconds=0.4) as (_, client):
        if method == "DELETE":
            assert await status(client, "POST", CALL, json=SETUP) == 201
        breaking, retry_after = FAULTS[fault]
        kubernetes.faults[breaks] = breaking
        start = perf_counter()
        async with client.request(method, CALL, json=SETUP if method == "POST" else None) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, retry_after)
            content = await response.text()
        assert perf_counter() - start < 2
        assert list(json.loads(content)) == ["detail"]
        assert "5ecret" not in content


async def test_kubernetes_fault_during_authentication_is_503(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, request_seconds=0.4) as (_, client), without_key(client) as bare:
        for broken in ("POST tokenreviews", "POST subjectaccessreviews"):
            for fault in (hang, answering(429), answering(500), cut):
                kubernetes.faults = {broken: fault}
                assert await status(bare, "GET", CALL, headers=bearer("valid")) == 503
        kubernetes.faults = {}
        assert await status(bare, "GET", CALL, headers=bearer("valid")) == 200, "errors are not cached"


async def test_readiness_follows_kubernetes(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        kubernetes.faults["GET smschannel-sealing-key"] = hang
        await until(client, "/readyz", 503)
        assert await status(client, "GET", "/healthz") == 200, "a restart would not help"
        del kubernetes.faults["GET smschannel-sealing-key"]
        await until(client, "/readyz", 200)


@pytest.mark.parametrize(
    ("published", "detail"),
    [
        ({"data": {"public-key": "AAAA"}}, "The operator's sealing key is invalid."),
        ({"data": {}}, "The operator's sealing key is invalid."),
        (None, "The operator has not published its sealing key yet."),
    ],
)
async def test_not_ready_without_a_sealing_key(kubernetes: Kubernetes, published: Any, detail: str) -> None:
    async def fault(_: web.Request) -> web.StreamResponse:
        return not_found("smschannel-sealing-key") if published is None else web.json_response(published)

    async with shim(kubernetes) as (_, client):
        kubernetes.faults["GET smschannel-sealing-key"] = fault
        await until(client, "/readyz", 503)
        async with client.get("/readyz") as response:
            assert (response.status, await response.json()) == (503, {"detail": detail})
        kubernetes.faults = {}


async def test_not_ready_for_a_namespace_that_the_operator_does_not_watch(kubernetes: Kubernetes) -> None:
    """Else its channels would be accepted, and never work."""
    published = {"data": {"public-key": SealingKey.generate().public.encoded, "namespaces": "team-a team-b"}}

    async def fault(_: web.Request) -> web.StreamResponse:
        return web.json_response(published)

    async with shim(kubernetes) as (_, client):
        kubernetes.faults["GET smschannel-sealing-key"] = fault
        await until(client, "/readyz", 503)
        async with client.get("/readyz") as response:
            assert "does not watch namespace sms-channels" in (await response.json())["detail"]
        published["data"]["namespaces"] = "team-a sms-channels"
        await until(client, "/readyz", 200)


async def test_probes_are_cached(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        before = kubernetes.calls.total()
        answers = await asyncio.gather(*(status(client, "GET", "/readyz") for _ in range(50)))
        assert answers == [200] * 50
        assert kubernetes.calls.total() - before <= 1


# -- limits, waiting, writes and draining --------------------------------------------------------------------


async def test_excess_requests_are_503_with_retry_after(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_requests=3, request_seconds=5) as (_, client):
        kubernetes.delay = 0.5
        answers = await asyncio.gather(*(status(client, "GET", CALL) for _ in range(6)))
        assert sorted(answers) == [200] * 3 + [503] * 3
        assert await status(client, "GET", CALL) == 200
        kubernetes.delay = 0


async def test_probes_are_answered_at_full_capacity(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_requests=1, request_seconds=5) as (_, client):
        kubernetes.delay = 0.3
        busy = [asyncio.create_task(status(client, "GET", CALL)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert await status(client, "GET", "/healthz") == 200
        async with client.get(CALL) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert sorted(await asyncio.gather(*busy)) == [200, 503]
        kubernetes.delay = 0


async def test_request_beyond_max_waiting_is_answered_at_once(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_waiting=1) as (_, client):
        first = asyncio.create_task(status(client, "POST", CALL, json=SETUP, headers={"Prefer": "wait=2"}))
        async with asyncio.timeout(2):
            await kubernetes.applied.wait()
        await asyncio.sleep(0.1)
        start = perf_counter()
        async with client.post(CALL, json=SETUP, headers={"Prefer": "wait=2"}) as second:
            assert second.status == 200
            assert "Preference-Applied" not in second.headers, "the answer shows that it did not wait"
        assert perf_counter() - start < 1
        assert await first == 201


async def test_max_waiting_holds_for_concurrent_requests(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_waiting=2) as (_, client):

        async def waited() -> bool:
            path = f"/v1/instances/{uuid.uuid4()}/channels/sms"
            async with client.post(path, json=SETUP, headers={"Prefer": "wait=2"}) as response:
                return "Preference-Applied" in response.headers

        kubernetes.delay = 0.1
        answers = await asyncio.gather(*(waited() for _ in range(10)))
        assert sorted(answers) == [False] * 8 + [True] * 2
        assert await waited(), "a slot is free again"


async def test_waiting_requests_share_one_watch(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        instances = [str(uuid.uuid4()) for _ in range(20)]
        paths = [f"/v1/instances/{each}/channels/sms" for each in instances]
        waits = {"json": SETUP, "headers": {"Prefer": "wait=1"}}
        answers = await asyncio.gather(*(status(client, "POST", path, **waits) for path in paths))
        assert set(answers) <= {200, 201}
        assert kubernetes.calls["WATCH smschannels"] == 1
        read = sum(kubernetes.calls[f"GET {each}"] for each in instances)
        assert read == 40, "one to apply, one when the watch has started: no polling"


@pytest.mark.parametrize("in_the_stream", [False, True])
async def test_expired_watch_is_restarted(kubernetes: Kubernetes, in_the_stream: bool) -> None:
    begun: list[str | None] = []

    async def watch(request: web.Request) -> web.StreamResponse:
        begun.append(request.query.get("resourceVersion"))
        too_old = {"kind": "Status", "metadata": {}, "message": "too old", "code": 410}
        if len(begun) == 1 and not in_the_stream:
            return web.json_response(too_old, status=410)
        assert kubernetes.channel
        event = {"type": "ERROR", "object": too_old}
        if len(begun) > 1:
            ready = {"type": "Ready", "status": "True", "reason": "Configured"}
            kubernetes.channel["status"] = {"observedGeneration": 1, "conditions": [ready]}
            event = {"type": "ADDED", "object": kubernetes.channel}
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(json.dumps(event).encode() + b"\n")
        await asyncio.sleep(0 if event["type"] == "ERROR" else 3600)
        return response

    kubernetes.faults["WATCH smschannels"] = watch
    async with shim(kubernetes) as (_, client):
        start = perf_counter()
        async with client.post(CALL, json=SETUP, headers={"Prefer": "wait=10"}) as response:
            assert (response.status, (await response.json())["status"]) == (201, "active")
        assert perf_counter() - start < 5, "the event ended the wait, not its deadline"
    assert begun == ["7", None]


async def test_waiting_request_survives_kubernetes_faults(kubernetes: Kubernetes) -> None:
    """The write was made, so the answer is not 503."""
    read = iter([not_found(INSTANCE), answering(500), answering(429), None])

    async def sometimes(request: web.Request) -> web.StreamResponse:
        answer = next(read)
        if answer is None:
            assert kubernetes.channel
            kubernetes.channel["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            return web.json_response(kubernetes.channel)
        return answer if isinstance(answer, web.Response) else await answer(request)

    kubernetes.faults[f"GET {INSTANCE}"] = sometimes
    async with shim(kubernetes) as (_, client):
        assert await status(client, "POST", CALL, json=SETUP, headers={"Prefer": "wait=10"}) == 201
    assert next(read, "all read") == "all read"


async def test_disconnected_client_frees_its_waiting_slot(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_waiting=1) as (_, client):
        waits = {"json": SETUP, "headers": {"Prefer": "wait=30"}}
        first = asyncio.create_task(status(client, "POST", CALL, **waits))
        async with asyncio.timeout(2):
            await called(kubernetes, "WATCH smschannels", 1)
        first.cancel()
        async with asyncio.timeout(5):
            while True:
                async with client.post(CALL, json=SETUP, headers={"Prefer": "wait=1"}) as second:
                    if "Preference-Applied" in second.headers:
                        break


async def test_write_is_completed_after_the_client_disconnects(kubernetes: Kubernetes) -> None:
    kubernetes.delay = 0.2
    async with shim(kubernetes, request_seconds=5) as (_, client):
        with capture_logs() as logs:
            request_task = asyncio.create_task(status(client, "POST", CALL, json=SETUP))
            await asyncio.sleep(0.1)  # the shim is reading the channel
            request_task.cancel()
            async with asyncio.timeout(5):
                await kubernetes.applied.wait()
    (line,) = [each for each in logs if each["event"] == "handled write request"]
    assert (line["method"], line["namespace"], line["name"]) == ("POST", "sms-channels", INSTANCE)
    assert line["status"] == 499


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("disconnects", [True, False], ids=["disconnected", "answered 503"])
async def test_abandoned_write_is_not_retried_over_a_later_one(
    kubernetes: Kubernetes, method: str, disconnects: bool
) -> None:
    """A write that conflicts is retried, but not after its client disconnected: it may have sent another request."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slow_conflict(_: web.Request) -> web.StreamResponse:
        del kubernetes.faults[f"{verb} {INSTANCE}"]
        reached.set()
        await go_on.wait()
        return web.json_response({"kind": "Status", "message": "conflict"}, status=409)

    verb = {"POST": "PATCH"}.get(method, method)
    async with shim(kubernetes, request_seconds=20 if disconnects else 1) as (_, client):
        assert await status(client, "POST", CALL, json=SETUP) == 201
        kubernetes.faults[f"{verb} {INSTANCE}"] = slow_conflict
        request_task = asyncio.create_task(status(client, method, CALL, json=SETUP if method == "POST" else None))
        await reached.wait()
        if disconnects:
            request_task.cancel()
        else:
            assert await request_task == 503
        later = {**SETUP, "phone_number": "+61400111333"}
        assert await status(client, "POST", CALL, json=later) == 200
        before = kubernetes.calls.copy()
        go_on.set()
        await asyncio.sleep(0.5)
        assert kubernetes.calls == before, "no further call to Kubernetes"
        assert kubernetes.channel
        assert kubernetes.channel["spec"]["phoneNumber"] == later["phone_number"]


async def test_api_key_sid_becomes_the_login(kubernetes: Kubernetes) -> None:
    """Leaving it out later removes it: the next token is the account's again."""
    key_sid = "SK" + "0a" * 16
    async with shim(kubernetes) as (_, client):
        for more, login in (({"api_key_sid": key_sid}, key_sid), ({"api_key_sid": None}, None), ({}, None)):
            assert await status(client, "POST", CALL, json={**SETUP, **more}) in {200, 201}
            assert kubernetes.channel
            assert kubernetes.channel["spec"]["credentials"].get("sid") == login


async def test_every_write_carries_a_precondition(kubernetes: Kubernetes) -> None:
    """Otherwise it could change a channel that another client just created, took over or replaced."""
    async with shim(kubernetes) as (_, client):
        for method, body in (("POST", SETUP), ("POST", SETUP), ("DELETE", None)):
            assert await status(client, method, CALL, json=body) < 300
    read = {"uid": "u", "resourceVersion": "7"}
    assert kubernetes.preconditions == [{"resourceVersion": "0"}, read, read]


async def test_channel_without_field_managers_is_not_written(kubernetes: Kubernetes) -> None:
    """If managedFields were emptied, the owner is unknown, so the channel is not the shim's."""
    async with shim(kubernetes) as (_, client):
        assert await status(client, "POST", CALL, json=SETUP) == 201
        assert kubernetes.channel
        kubernetes.channel["metadata"]["managedFields"] = []
        for method, body in (("POST", SETUP), ("DELETE", None)):
            async with client.request(method, CALL, json=body) as response:
                assert response.status == 409
                assert "by an unknown field manager:" in (await response.json())["detail"]
        assert (kubernetes.calls[f"PATCH {INSTANCE}"], kubernetes.calls[f"DELETE {INSTANCE}"]) == (1, 0)


async def test_delete_does_not_hit_a_successor(kubernetes: Kubernetes) -> None:
    """Another client deleted the channel and created a new one meanwhile: this request must not delete that one."""

    async def replaced(_: web.Request) -> web.StreamResponse:
        assert kubernetes.channel
        kubernetes.channel["metadata"]["uid"] = "another"
        return web.json_response({"kind": "Status", "message": "the UID does not match"}, status=409)

    async with shim(kubernetes) as (_, client):
        assert await status(client, "POST", CALL, json=SETUP) == 201
        kubernetes.faults[f"DELETE {INSTANCE}"] = replaced
        assert await status(client, "DELETE", CALL) == 204
        assert kubernetes.calls[f"DELETE {INSTANCE}"] == 1


async def test_wait_extends_the_time_limit(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, request_seconds=0.5) as (_, client):
        start = perf_counter()
        async with client.post(CALL, json=SETUP, headers={"Prefer": "wait=1"}) as response:
            assert (response.status, response.headers["Preference-Applied"]) == (201, "wait=1")
        assert 0.9 < perf_counter() - start < 1.5


async def test_draining_shim_still_answers(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (service, client):
        service.start_draining()
        assert await status(client, "GET", "/readyz") == 503
        async with client.get(CALL) as response:
            assert (response.status, response.headers["Connection"]) == (200, "close")
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 2), "the connection is closed"
        writer.close()


async def test_requests_are_counted_by_route_method_and_status(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):

        async def counted() -> Counter[tuple[str, ...]]:
            async with client.get("/metrics") as response:
                sample = r'^smsshim_requests_total{method="(.*)",route="(.*)",status="(.*)"} (\S+)$'
                found = re.findall(sample, await response.text(), re.MULTILINE)
            return Counter({tuple(each[:3]): int(float(each[3])) for each in found})

        before = await counted()
        for method, path in (("GET", CALL), ("GET", CALL.upper()), ("PUT", CALL), ("DELETE", CALL), ("GET", "/5ecret")):
            await status(client, method, path)
        more = await counted() - before
        route = "/v1/instances/{instance_id}/channels/sms"
        expected = {("GET", route, "200"): 1, ("DELETE", route, "204"): 1, ("other", "other", "405"): 1}
        expected |= {("GET", "other", "404"): 2, ("GET", "/metrics", "200"): 1}
        assert more == expected
        async with client.get("/metrics") as response:
            text = await response.text()
        assert "5ecret" not in text
        assert INSTANCE not in text
        assert "smschannel_" not in text, "there are no metrics of the operator"
