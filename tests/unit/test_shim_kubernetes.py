"""The shim and its Kubernetes: how often it asks, and what it answers when Kubernetes is slow, gone or says no.

The API server is a small stand-in on a real port, since a real one cannot be made to answer 429 or to hang.
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
    """One channel's worth of an API server. `faults` go before it: by "METHOD last-part-of-a-path"."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.paths: set[str] = set()
        self.faults: dict[str, Fault] = {}
        self.channel: dict[str, Any] | None = None
        self.preconditions: list[dict[str, str]] = []
        self.applied = asyncio.Event()
        self.keys: dict[str, Any] = {"data": {}}
        self.right_tokens = {"right"}
        self.delay = 0.0
        self._public = SealingKey.generate().public.encoded
        self.port = 0

    def make_key(self, **options: Any) -> str:
        made = make_key(options.pop("instances", ["*"]), options.pop("verbs", ["get", "post", "delete"]), **options)
        self.keys["data"] |= secret_of(made, "sms-operator")["data"]
        return made.key.get_secret_value()

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
                right = (await request.json())["spec"]["token"] in self.right_tokens
                user = {"user": {"username": "somebody"}, "audiences": [AUDIENCE]} if right else {}
                return web.json_response({"status": {"authenticated": right, **user}})
            case "POST subjectaccessreviews":
                return web.json_response({"status": {"allowed": True}})
        if self.channel is None and request.method != "PATCH":
            return not_found(last)
        if request.method in {"PATCH", "DELETE"}:
            sent = json.loads(await request.text())
            said = sent["metadata"] if request.method == "PATCH" else sent["preconditions"]
            self.preconditions.append({each: said[each] for each in ("uid", "resourceVersion") if each in said})
        if request.method == "PATCH":
            self.channel = json.loads(await request.text())
            managed = {"manager": "sms-api-shim", "fieldsV1": {"f:spec": {}}}
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
    stand_in = Kubernetes()
    async with stand_in.running():
        yield stand_in


@asynccontextmanager
async def shim(
    kubernetes: Kubernetes, below: str = "", **settings: Any
) -> AsyncIterator[tuple[Service, aiohttp.ClientSession]]:
    """A running shim that has read its API keys, and a client with the key that may do everything."""
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
        while await status(client, "GET", path, **options) != expected:  # noqa: ASYNC110  (another process' event)
            await asyncio.sleep(0.02)


async def called(kubernetes: Kubernetes, what: str, times: int) -> None:
    """Ends when it was called so often, or fails after five seconds."""
    async with asyncio.timeout(5):
        while kubernetes.calls[what] < times:  # noqa: ASYNC110  (another process' event)
            await asyncio.sleep(0.01)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def without_key(client: aiohttp.ClientSession) -> AsyncIterator[aiohttp.ClientSession]:
    assert client._base_url
    async with aiohttp.ClientSession(client._base_url) as bare:
        yield bare


# -- how often Kubernetes is asked ---------------------------------------------------------------------------


async def test_an_api_key_costs_no_question(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        before = kubernetes.calls.total()
        for _ in range(20):
            assert await status(client, "GET", CALL) == 200
        assert kubernetes.calls.total() - before == 20, "one read of the channel for each"


async def test_an_api_server_below_a_path(kubernetes: Kubernetes) -> None:
    """As where one server stands for many clusters: the kubeconfig's URL has a path."""
    async with shim(kubernetes, below="/k8s/clusters/c-1/") as (_, client):
        assert await status(client, "GET", CALL) == 200
    assert all(path.startswith("/k8s/clusters/c-1/api") for path in kubernetes.paths)


async def test_a_token_is_reviewed_once_in_a_while(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        for _ in range(20):
            assert await status(bare, "GET", CALL, headers=bearer("right")) == 200
        assert (kubernetes.calls["POST tokenreviews"], kubernetes.calls["POST subjectaccessreviews"]) == (1, 1)
        assert kubernetes.calls[f"GET {INSTANCE}"] == 20, "the channel itself is never kept"


async def test_equal_questions_at_once_are_asked_once(kubernetes: Kubernetes) -> None:
    kubernetes.delay = 0.1
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        answers = await asyncio.gather(
            *(status(bare, "GET", CALL, headers=bearer("right")) for _ in range(30)),
            *(status(bare, "GET", CALL, headers=bearer("wrong")) for _ in range(30)),
        )
    assert sorted(answers) == [200] * 30 + [401] * 30
    assert kubernetes.calls["POST tokenreviews"] == 2, "one for the right token, one for the wrong one"
    assert kubernetes.calls["POST subjectaccessreviews"] == 1


async def test_who_hangs_up_leaves_the_answer_to_the_others(kubernetes: Kubernetes) -> None:
    kubernetes.delay = 0.3
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        impatient = asyncio.create_task(status(bare, "GET", CALL, headers=bearer("right")))
        await asyncio.sleep(0.1)
        patient = asyncio.create_task(status(bare, "GET", CALL, headers=bearer("right")))
        await asyncio.sleep(0.1)
        impatient.cancel()
        assert await patient == 200
    assert kubernetes.calls["POST tokenreviews"] == 1


async def test_a_token_that_was_judged_for_another_audience_is_none(kubernetes: Kubernetes) -> None:
    """An authenticator that knows no audiences says only that the token is right, for the API server."""

    async def right_for(*audiences: str) -> int:
        async def review(_: web.Request) -> web.StreamResponse:
            found = {"authenticated": True, "user": {"username": "somebody"}}
            return web.json_response({"status": {**found, "audiences": audiences} if audiences else found})

        kubernetes.faults["POST tokenreviews"] = review
        return await status(bare, "GET", CALL, headers=bearer("right"))

    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        assert [await right_for(), await right_for("another"), await right_for("another", AUDIENCE)] == [401, 401, 200]


async def test_a_denial_goes_before_a_permission(kubernetes: Kubernetes) -> None:
    async def denied(_: web.Request) -> web.StreamResponse:
        return web.json_response({"status": {"allowed": True, "denied": True}})

    kubernetes.faults["POST subjectaccessreviews"] = denied
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        assert await status(bare, "GET", CALL, headers=bearer("right")) == 403


# -- failed logins -------------------------------------------------------------------------------------------


async def test_a_client_that_is_wrong_too_often_is_slowed(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, failed_logins_per_minute=5) as (_, client), without_key(client) as bare:
        for number in range(5):
            assert await status(bare, "GET", CALL, headers=bearer(f"wrong-{number}")) == 401
        asked = kubernetes.calls["POST tokenreviews"]
        for headers in (bearer("another"), bearer("right"), {"X-Api-Key": "smsch_no_no"}):
            async with bare.get(CALL, headers=headers) as response:
                assert response.status == 429
                assert 0 < int(response.headers["Retry-After"]) <= 12, "five a minute are one every 12 seconds"
                assert list(await response.json()) == ["detail"]
        assert kubernetes.calls["POST tokenreviews"] == asked, "nobody asks Kubernetes for it"
        assert await status(client, "GET", CALL) == 200, "a right key is never slowed"


async def test_who_was_right_a_moment_ago_is_not_slowed(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, failed_logins_per_minute=1) as (_, client), without_key(client) as bare:
        assert await status(bare, "GET", CALL, headers=bearer("right")) == 200
        assert await status(bare, "GET", CALL, headers=bearer("wrong")) == 401
        assert await status(bare, "GET", CALL, headers=bearer("wrong")) == 429
        assert await status(bare, "GET", CALL, headers=bearer("right")) == 200


async def test_who_was_right_within_the_hour_is_not_slowed(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a stranger behind the same proxy would lock everybody out as soon as no answer is kept any more."""
    monkeypatch.setattr(api_shim.auth, "_CACHE_SECONDS", 0.1)
    async with shim(kubernetes, failed_logins_per_minute=1) as (_, client), without_key(client) as bare:
        assert await status(bare, "GET", CALL, headers=bearer("right")) == 200
        await asyncio.sleep(0.2)
        assert await status(bare, "GET", CALL, headers=bearer("wrong")) == 401
        assert await status(bare, "GET", CALL, headers=bearer("right")) == 200
        assert kubernetes.calls["POST tokenreviews"] == 3, "it was asked about again"
        kubernetes.right_tokens.clear()
        await asyncio.sleep(0.2)
        assert await status(bare, "GET", CALL, headers=bearer("right")) == 401, "and it is revoked as any other"
        assert await status(bare, "GET", CALL, headers=bearer("right")) == 429
        assert kubernetes.calls["POST tokenreviews"] == 4


@pytest.mark.parametrize("hang_up", [False, True])
async def test_many_wrong_tokens_at_once_are_slowed_as_well(kubernetes: Kubernetes, hang_up: bool) -> None:
    async with shim(kubernetes, failed_logins_per_minute=5) as (_, client), without_key(client) as bare:
        kubernetes.delay = 0.3
        asked = [asyncio.create_task(status(bare, "GET", CALL, headers=bearer(f"wrong-{each}"))) for each in range(20)]
        if hang_up:
            await called(kubernetes, "POST tokenreviews", 5)
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            assert await status(bare, "GET", CALL, headers=bearer("one more")) == 429
        else:
            assert sorted(await asyncio.gather(*asked)) == [401] * 5 + [429] * 15
        assert kubernetes.calls["POST tokenreviews"] == 5


async def test_right_tokens_and_errors_cost_nothing(kubernetes: Kubernetes) -> None:
    kubernetes.right_tokens = {f"right-{each}" for each in range(10)}
    async with shim(kubernetes, failed_logins_per_minute=2) as (_, client), without_key(client) as bare:
        kubernetes.faults["POST tokenreviews"] = says(500)
        for token in kubernetes.right_tokens:
            assert await status(bare, "GET", CALL, headers=bearer(token)) == 503
        kubernetes.faults.clear()
        for token in kubernetes.right_tokens:
            assert await status(bare, "GET", CALL, headers=bearer(token)) == 200


@pytest.mark.parametrize(
    ("trusted", "second"),
    [
        pytest.param((), 429, id="nobody is trusted: what the header says is the client's own word"),
        pytest.param("127.0.0.1", 401, id="behind a proxy each client has its own count"),
    ],
)
async def test_clients_behind_a_proxy(kubernetes: Kubernetes, trusted: Any, second: int) -> None:
    settings = {"failed_logins_per_minute": 1, "trusted_proxies": trusted}
    async with shim(kubernetes, **settings) as (_, client), without_key(client) as bare:
        for client_address, expected in (("192.0.2.1", 401), ("192.0.2.1", 429), ("192.0.2.2", second)):
            headers = {**bearer("wrong"), "X-Forwarded-For": f"spoofed, {client_address}"}
            assert await status(bare, "GET", CALL, headers=headers) == expected


async def test_a_failed_login_is_logged_without_what_was_sent(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        with capture_logs() as logs:
            await status(bare, "GET", CALL, headers={**bearer("5ecret"), "X-Request-Id": "find-me"})
    (line,) = [each for each in logs if each["event"] == "login failed"]
    assert (line["client"], line["request_id"]) == ("127.0.0.1", "find-me")
    assert "5ecret" not in str(logs)


async def test_an_expired_key_is_none(kubernetes: Kubernetes) -> None:
    soon = kubernetes.make_key(expires=datetime.now(UTC) + timedelta(seconds=0.5))
    async with shim(kubernetes) as (_, client), without_key(client) as bare:
        assert await status(bare, "GET", CALL, headers={"X-Api-Key": soon}) == 200
        await until(bare, CALL, 401, headers={"X-Api-Key": soon})


async def test_a_revoked_key_ends_though_the_watch_is_silent(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's watch tells nothing, as one whose connection has died unseen."""
    monkeypatch.setattr(api_shim.auth, "_REREAD_SECONDS", 0.2)
    async with shim(kubernetes) as (_, client):
        assert await status(client, "GET", CALL) == 200
        kubernetes.keys["data"] = {}
        await until(client, CALL, 401)


async def test_a_malformed_key_is_told_once(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not each time that the keys are read again."""
    monkeypatch.setattr(api_shim.auth, "_REREAD_SECONDS", 0.05)
    kubernetes.keys["data"]["broken"] = "e30="
    with capture_logs() as logs:
        async with shim(kubernetes), asyncio.timeout(5):
            await called(kubernetes, "GET smschannel-api-keys", 4)
            kubernetes.keys["data"]["broken"] = "e30K"
            read = kubernetes.calls["GET smschannel-api-keys"]
            await called(kubernetes, "GET smschannel-api-keys", read + 3)
    told = [each["key_id"] for each in logs if each["event"] == "an API key cannot be used"]
    assert told == ["broken", "broken"], "once for each that was written"


async def test_an_answer_of_another_shape_does_not_end_the_following(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_shim.auth, "_REREAD_SECONDS", 0.05)
    async with shim(kubernetes) as (_, client):
        kubernetes.keys["data"] = ["no mapping"]
        read = kubernetes.calls["GET smschannel-api-keys"]
        await called(kubernetes, "GET smschannel-api-keys", read + 2)
        assert await status(client, "GET", CALL) == 200, "what was read last counts for a while"
        kubernetes.keys["data"] = {}
        await until(client, CALL, 401)


async def test_the_keys_end_with_their_secret(kubernetes: Kubernetes) -> None:
    removed = asyncio.Event()

    async def watch(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await removed.wait()
        await response.write(json.dumps({"type": "DELETED", "object": kubernetes.keys}).encode() + b"\n")
        await asyncio.sleep(3600)
        return response

    kubernetes.faults["WATCH secrets"] = watch
    async with shim(kubernetes) as (_, client):
        assert await status(client, "GET", CALL) == 200
        removed.set()
        await until(client, CALL, 401)


async def test_keys_that_could_not_be_read_for_long_open_nothing(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have been revoked meanwhile."""
    monkeypatch.setattr(api_shim.auth, "_REREAD_SECONDS", 0.2)
    monkeypatch.setattr(api_shim.auth, "_STALE_SECONDS", 1)
    async with shim(kubernetes) as (_, client):
        kubernetes.faults["GET smschannel-api-keys"] = says(500)
        await until(client, CALL, 503)
        assert await status(client, "GET", "/readyz") == 503
        kubernetes.faults.clear()
        await until(client, CALL, 200)


# -- Kubernetes slow, gone, saying no ------------------------------------------------------------------------


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def cut(request: web.Request) -> web.StreamResponse:
    assert request.transport
    request.transport.close()
    return web.Response()


def says(code: int, **headers: str) -> Fault:
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
    "429": (says(429, Retry_After="7"), "7"),
    "429 without a time": (says(429), "5"),
    "a mistaken time": (says(503, Retry_After="999999"), "900"),
    "500": (says(500), "5"),
    "503": (says(503), "5"),
    "403, a right is missing": (says(403), "30"),
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
async def test_what_kubernetes_cannot_do_is_503_in_bounded_time(
    kubernetes: Kubernetes, method: str, breaks: str, fault: str
) -> None:
    """Never a hang, never "not_configured" or 204 where nobody can know, and nothing of the reason's text."""
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


async def test_the_login_breaks_with_503_too(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, request_seconds=0.4) as (_, client), without_key(client) as bare:
        for broken in ("POST tokenreviews", "POST subjectaccessreviews"):
            for fault in (hang, says(429), says(500), cut):
                kubernetes.faults = {broken: fault}
                assert await status(bare, "GET", CALL, headers=bearer("right")) == 503
        kubernetes.faults = {}
        assert await status(bare, "GET", CALL, headers=bearer("right")) == 200, "an error is not kept"


async def test_while_kubernetes_is_away_it_is_not_ready_and_afterwards_it_is(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        kubernetes.faults["GET smschannel-sealing-key"] = hang
        await until(client, "/readyz", 503)
        assert await status(client, "GET", "/healthz") == 200, "starting it again would help nobody"
        del kubernetes.faults["GET smschannel-sealing-key"]
        await until(client, "/readyz", 200)


@pytest.mark.parametrize(
    ("published", "detail"),
    [
        ({"data": {"public-key": "AAAA"}}, "The operator's sealing key cannot be used."),
        ({"data": {}}, "The operator's sealing key cannot be used."),
        (None, "The operator has not published its sealing key yet."),
    ],
)
async def test_it_is_not_ready_without_a_sealing_key(kubernetes: Kubernetes, published: Any, detail: str) -> None:
    async def fault(_: web.Request) -> web.StreamResponse:
        return not_found("smschannel-sealing-key") if published is None else web.json_response(published)

    async with shim(kubernetes) as (_, client):
        kubernetes.faults["GET smschannel-sealing-key"] = fault
        await until(client, "/readyz", 503)
        async with client.get("/readyz") as response:
            assert (response.status, await response.json()) == (503, {"detail": detail})
        kubernetes.faults = {}


async def test_probing_costs_kubernetes_nothing(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        before = kubernetes.calls.total()
        answers = await asyncio.gather(*(status(client, "GET", "/readyz") for _ in range(50)))
        assert answers == [200] * 50
        assert kubernetes.calls.total() - before <= 1


# -- limits and the end --------------------------------------------------------------------------------------


async def test_beyond_its_capacity_it_says_when_to_come_again(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_requests=3, request_seconds=5) as (_, client):
        kubernetes.delay = 0.5
        answers = await asyncio.gather(*(status(client, "GET", CALL) for _ in range(6)))
        assert sorted(answers) == [200] * 3 + [503] * 3
        assert await status(client, "GET", CALL) == 200
        kubernetes.delay = 0


async def test_beyond_its_capacity_a_probe_is_still_answered(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_requests=1, request_seconds=5) as (_, client):
        kubernetes.delay = 0.3
        busy = [asyncio.create_task(status(client, "GET", CALL)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert await status(client, "GET", "/healthz") == 200
        async with client.get(CALL) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert sorted(await asyncio.gather(*busy)) == [200, 503]
        kubernetes.delay = 0


async def test_who_would_be_one_too_many_to_wait_is_answered_at_once(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_waiting=1) as (_, client):
        first = asyncio.create_task(status(client, "POST", CALL, json=SETUP, headers={"Prefer": "wait=2"}))
        async with asyncio.timeout(2):
            await kubernetes.applied.wait()
        await asyncio.sleep(0.1)
        start = perf_counter()
        async with client.post(CALL, json=SETUP, headers={"Prefer": "wait=2"}) as second:
            assert second.status == 200
            assert "Preference-Applied" not in second.headers, "it says that it did not wait"
        assert perf_counter() - start < 1
        assert await first == 201


async def test_no_more_may_wait_however_many_ask_at_once(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, max_waiting=2) as (_, client):

        async def waited() -> bool:
            path = f"/v1/instances/{uuid.uuid4()}/channels/sms"
            async with client.post(path, json=SETUP, headers={"Prefer": "wait=2"}) as response:
                return "Preference-Applied" in response.headers

        kubernetes.delay = 0.1
        answers = await asyncio.gather(*(waited() for _ in range(10)))
        assert sorted(answers) == [False] * 8 + [True] * 2
        assert await waited(), "a place is free again"


async def test_all_who_wait_share_one_watch(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (_, client):
        instances = [str(uuid.uuid4()) for _ in range(20)]
        paths = [f"/v1/instances/{each}/channels/sms" for each in instances]
        waits = {"json": SETUP, "headers": {"Prefer": "wait=1"}}
        answers = await asyncio.gather(*(status(client, "POST", path, **waits) for path in paths))
        assert set(answers) <= {200, 201}
        assert kubernetes.calls["WATCH smschannels"] == 1
        read = sum(kubernetes.calls[f"GET {each}"] for each in instances)
        assert read == 40, "one to apply, one when the watch stands: nobody polls"


@pytest.mark.parametrize("in_the_stream", [False, True])
async def test_a_watch_that_began_too_long_ago_begins_anew(kubernetes: Kubernetes, in_the_stream: bool) -> None:
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
        assert perf_counter() - start < 5, "the event woke it, not the end of its time"
    assert begun == ["7", None]


async def test_who_waits_outlasts_a_fault_of_kubernetes(kubernetes: Kubernetes) -> None:
    """What was asked for is done, so the answer is not 503."""
    read = iter([not_found(INSTANCE), says(500), says(429), None])

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
    assert next(read, "all of it") == "all of it"


async def test_who_hangs_up_leaves_the_place_to_another(kubernetes: Kubernetes) -> None:
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


async def test_what_was_asked_for_is_done_though_the_client_hung_up(kubernetes: Kubernetes) -> None:
    kubernetes.delay = 0.2
    async with shim(kubernetes, request_seconds=5) as (_, client):
        with capture_logs() as logs:
            asked = asyncio.create_task(status(client, "POST", CALL, json=SETUP))
            await asyncio.sleep(0.1)  # it reads whether there is a channel
            asked.cancel()
            async with asyncio.timeout(5):
                await kubernetes.applied.wait()
    (line,) = [each for each in logs if each["event"] == "asked to change a channel"]
    assert line["status"] == 499


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("hangs_up", [True, False], ids=["hung up", "answered 503"])
async def test_what_was_given_up_does_not_write_over_what_came_after(
    kubernetes: Kubernetes, method: str, hangs_up: bool
) -> None:
    """A write that meets others is tried again, but not once its client is gone: that may have changed its mind."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slow_conflict(_: web.Request) -> web.StreamResponse:
        del kubernetes.faults[f"{verb} {INSTANCE}"]
        reached.set()
        await go_on.wait()
        return web.json_response({"kind": "Status", "message": "conflict"}, status=409)

    verb = {"POST": "PATCH"}.get(method, method)
    async with shim(kubernetes, request_seconds=20 if hangs_up else 1) as (_, client):
        assert await status(client, "POST", CALL, json=SETUP) == 201
        kubernetes.faults[f"{verb} {INSTANCE}"] = slow_conflict
        asked = asyncio.create_task(status(client, method, CALL, json=SETUP if method == "POST" else None))
        await reached.wait()
        if hangs_up:
            asked.cancel()
        else:
            assert await asked == 503
        later = {**SETUP, "phone_number": "+61400111333"}
        assert await status(client, "POST", CALL, json=later) == 200
        before = kubernetes.calls.copy()
        go_on.set()
        await asyncio.sleep(0.5)
        assert kubernetes.calls == before, "nothing more is asked of Kubernetes"
        assert kubernetes.channel
        assert kubernetes.channel["spec"]["phoneNumber"] == later["phone_number"]


async def test_every_write_is_held_to_what_was_read(kubernetes: Kubernetes) -> None:
    """Or it would hit what somebody else made, took over or replaced a moment before."""
    async with shim(kubernetes) as (_, client):
        for method, body in (("POST", SETUP), ("POST", SETUP), ("DELETE", None)):
            assert await status(client, method, CALL, json=body) < 300
    read = {"uid": "u", "resourceVersion": "7"}
    assert kubernetes.preconditions == [{"resourceVersion": "0"}, read, read]


async def test_what_nobody_is_known_to_own_is_not_touched(kubernetes: Kubernetes) -> None:
    """Somebody may have emptied managedFields: that makes the channel not ours."""
    async with shim(kubernetes) as (_, client):
        assert await status(client, "POST", CALL, json=SETUP) == 201
        assert kubernetes.channel
        kubernetes.channel["metadata"]["managedFields"] = []
        for method, body in (("POST", SETUP), ("DELETE", None)):
            async with client.request(method, CALL, json=body) as response:
                assert response.status == 409
                assert "by somebody who left no name:" in (await response.json())["detail"]
        assert (kubernetes.calls[f"PATCH {INSTANCE}"], kubernetes.calls[f"DELETE {INSTANCE}"]) == (1, 0)


async def test_a_removal_does_not_go_on_to_a_successor(kubernetes: Kubernetes) -> None:
    """Somebody else removed the channel and made another one meanwhile: that one is none of this call's."""

    async def replaced(_: web.Request) -> web.StreamResponse:
        assert kubernetes.channel
        kubernetes.channel["metadata"]["uid"] = "another"
        return web.json_response({"kind": "Status", "message": "the UID does not match"}, status=409)

    async with shim(kubernetes) as (_, client):
        assert await status(client, "POST", CALL, json=SETUP) == 201
        kubernetes.faults[f"DELETE {INSTANCE}"] = replaced
        assert await status(client, "DELETE", CALL) == 204
        assert kubernetes.calls[f"DELETE {INSTANCE}"] == 1


async def test_a_wait_is_longer_than_the_time_limit(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes, request_seconds=0.5) as (_, client):
        start = perf_counter()
        async with client.post(CALL, json=SETUP, headers={"Prefer": "wait=1"}) as response:
            assert (response.status, response.headers["Preference-Applied"]) == (201, "wait=1")
        assert 0.9 < perf_counter() - start < 1.5


async def test_draining_goes_on_answering_while_it_is_not_ready(kubernetes: Kubernetes) -> None:
    async with shim(kubernetes) as (service, client):
        service.retire()
        assert await status(client, "GET", "/readyz") == 503
        async with client.get(CALL) as response:
            assert (response.status, response.headers["Connection"]) == (200, "close")
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 2), "it is closed indeed"
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
        assert "smschannel_" not in text, "those are the operator's"
