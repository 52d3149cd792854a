"""A reverse proxy between the operator and both of its servers: it records each call, and breaks those it is asked to.

    with Proxy(kubernetes=Upstream(url, tls), twilio=Upstream(url)) as proxy:
        proxy.kubernetes_url, proxy.twilio_url   # plain HTTP on loopback
        proxy.trace                              # every call, in order of arrival
        proxy.add(Match(account=name, path="^PATCH smschannels/status$"), Action(kind="reset", after=True))

Faults are described as for the twin (tests/twin/faults.py). Here `path` is searched in a call's kind, such as
"POST secrets(record)" or "POST number", and `account` is the channel that the call is about. A `hang` also holds a call
at one exact moment, before it takes effect or `after`: see `wait_held`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import aiohttp
from aiohttp import web

from tests.twin.api import locate
from tests.twin.faults import Action, Faults, Match, Rule

Side = Literal["kubernetes", "twilio"]

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_RESOURCE = re.compile(
    r"/apis?/(?:[^/]+/)?v1/(?:namespaces/(?P<namespace>[^/]+)/)?(?P<resource>[a-z]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>\w+))?)?"
)
_ACCOUNT = re.compile(r"AC[0-9a-f]{32}")
_RECORD = re.compile(r"pn[0-9a-f]{32}")
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "accept-encoding", "upgrade"}
_REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}
_HTML = "<html><body>Down for maintenance</body></html>"


@dataclass(frozen=True)
class Upstream:
    """Where calls go; `tls` is needed for an https URL."""

    url: str
    tls: ssl.SSLContext | None = None


@dataclass
class Call:
    """One call of the operator. `status` is what the upstream answered, None if it was not asked or did not answer.

    `about` is the channel's name, empty for calls about no channel (lists, watches, start). `occurrence` counts
    the calls of one kind about one channel since `Proxy.forget`, from 1.
    """

    at: float
    side: Side
    kind: str
    about: str
    occurrence: int
    status: int | None = None
    fault: Action | None = None

    @property
    def point(self) -> tuple[str, int]:
        """How a call is found again in another run, which may order concurrent calls differently."""
        return self.kind, self.occurrence


@dataclass(eq=False)
class _Watch:
    request: web.Request
    response: web.StreamResponse
    kind: str


class Proxy:
    """Serves in a thread of its own. All public methods may be called from the test's thread."""

    def __init__(self, *, kubernetes: Upstream, twilio: Upstream) -> None:
        self._upstreams: Mapping[Side, Upstream] = {"kubernetes": kubernetes, "twilio": twilio}
        self.urls: dict[Side, str] = {}
        self.trace: list[Call] = []
        self.on_status: Callable[[Mapping[str, Any]], None] = lambda channel: None
        self._faults = Faults()
        self._held: dict[Rule, Call] = {}
        self._names: dict[str, str] = {}  # the channel's name by what calls about it contain
        self._seen: Counter[tuple[str, str]] = Counter()
        self._watches: set[_Watch] = set()
        self.away: set[Side] = set()  # the servers that are down: calls to them are reset
        self._cut_every: float | None = None
        self.changed = threading.Condition()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="faults-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(20):
            raise TimeoutError("the proxy did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    # For tests

    def add(self, match: Match, action: Action) -> Rule:
        with self.changed:
            return self._faults.add(match, action)

    def clear(self) -> None:
        """Remove all faults. A call that hangs goes on hanging."""
        with self.changed:
            self._faults.clear()

    def forget(self) -> None:
        """Start a new trace; occurrences count from 1 again."""
        with self.changed:
            self.trace.clear()
            self._seen.clear()

    def introduce(self, name: str, account_sid: str, number_sids: Iterable[str]) -> None:
        """Attribute calls about this account, and about the records of these numbers, to the channel `name`."""
        with self.changed:
            for each in (name, account_sid, *(sid.lower() for sid in number_sids)):
                self._names[each] = name

    def calls_about(self, name: str) -> list[Call]:
        with self.changed:
            return [call for call in self.trace if call.about == name]

    def wait_called(self, names: Iterable[str], side: Side, timeout: float) -> None:
        """Wait until a call to this server was made about each of the channels. Raises `TimeoutError`."""
        missing = set(names)

        def called() -> bool:
            missing.difference_update(call.about for call in self.trace if call.side == side)
            return not missing

        with self.changed:
            if not self.changed.wait_for(called, timeout):
                raise TimeoutError(f"no call to {side} about {sorted(missing)}")

    def wait_held(self, rules: frozenset[int], *, quiet: float) -> frozenset[int]:
        """Wait until each of the rules holds a call, or `quiet` seconds passed without a new one; the rules that do."""
        with self.changed:
            while True:
                before = frozenset(rule.id for rule in self._held)
                if rules <= before:
                    return before
                if not self.changed.wait_for(lambda now=before: {r.id for r in self._held} != now, quiet):  # type: ignore[misc]
                    return before

    def wait_released(self, timeout: float) -> None:
        """Wait until no call is held or delayed. Raises `TimeoutError`."""
        with self.changed:
            if not self.changed.wait_for(lambda: not self._held, timeout):
                raise TimeoutError("a call is still held")

    def cut_watches(self, *, every: float | None = None, expired: bool = False) -> None:
        """Reset all watches now, and again `every` that many seconds (None: not again).

        `expired` ends them as an API server does that no longer has the events: with an ERROR of code 410.
        """
        self._cut_every = every
        asyncio.run_coroutine_threadsafe(self._cut(expired), self._loop).result(20)

    # The proxy's thread

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        runners = []
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=5),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=["Accept-Encoding", "User-Agent", "Content-Type"],
            read_bufsize=2**22,
        ) as session:
            self._session = session
            cutting = asyncio.create_task(self._cut_regularly())
            try:
                for side in self._upstreams:
                    app = web.Application(client_max_size=2**24)
                    app.router.add_route("*", "/{path:.*}", partial(self._serve, side))
                    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
                    runners.append(runner)
                    await runner.setup()
                    await web.TCPSite(runner, "127.0.0.1", 0).start()
                    self.urls[side] = f"http://127.0.0.1:{runner.addresses[0][1]}"
                self._started.set()
                await self._stop.wait()
            finally:
                cutting.cancel()
                for runner in runners:
                    await runner.cleanup()

    async def _serve(self, side: Side, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        call, rule = self._note(side, request, body)
        action = call.fault
        if side in self.away:
            return _reset(request)
        try:
            if action and not action.after and action.kind != "truncate":
                disturbed = await self._disturb(request, call, rule)
                if disturbed is not None:
                    return disturbed
            if call.kind.startswith("WATCH"):
                return await self._stream(side, request, call)
            status, headers, answer = await self._forward(side, request, body)
            with self._changing():
                call.status = status
                self._learn(call, body, answer)
            if action and action.kind == "truncate":
                return await _truncate(request, status, headers, answer)
            if action and action.after:
                disturbed = await self._disturb(request, call, rule)
                if disturbed is not None:
                    return disturbed
            return web.Response(status=status, headers=headers, body=answer)
        except (aiohttp.ClientError, OSError):  # the upstream is down, so this behaves as if it were down, too
            return _reset(request)

    def _note(self, side: Side, request: web.Request, body: bytes) -> tuple[Call, Rule | None]:
        kind = _kubernetes_kind(request, body) if side == "kubernetes" else _twilio_kind(request)
        with self._changing():
            about = "" if kind.startswith(("LIST", "WATCH")) else self._about(side, request, body)
            self._seen[about, kind] += 1
            call = Call(time.monotonic(), side, kind, about, self._seen[about, kind])
            rule = self._faults.strike(request.method, kind, (about,))
            call.fault = rule.action if rule else None
            self.trace.append(call)
        return call, rule

    def _about(self, side: Side, request: web.Request, body: bytes) -> str:
        texts = [request.path]
        if side == "kubernetes":
            texts.append(body.decode(errors="replace"))
            patterns = [_UUID, _RECORD]
        else:
            texts.append(base64.b64decode(request.headers["Authorization"].partition(" ")[2]).decode())
            patterns = [_ACCOUNT]
        found = (self._names.get(each) for text in texts for pattern in patterns for each in pattern.findall(text))
        return next((name for name in found if name), "")

    def _learn(self, call: Call, body: bytes, answer: bytes) -> None:
        """Note the uids of listed channels, and report the statuses that the API server accepted."""
        if call.kind == "LIST smschannels" and call.status == 200:
            for item in json.loads(answer)["items"] or ():
                self._meet(item["metadata"])
        elif call.kind == "PATCH smschannels/status" and call.status == 200:
            self.on_status(json.loads(body))

    def _meet(self, meta: Mapping[str, Any]) -> None:
        self._names[meta["uid"]] = self._names[meta["name"]] = meta["name"]

    async def _forward(self, side: Side, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        async with self._upstream(side, request, body) as response:
            answer = await response.read()
        return response.status, _passed_on(response.headers), answer

    def _upstream(self, side: Side, request: web.Request, body: bytes) -> Any:
        upstream = self._upstreams[side]
        return self._session.request(
            request.method,
            upstream.url + request.raw_path,
            data=body or None,
            headers=_passed_on(request.headers),
            ssl=upstream.tls or True,
            allow_redirects=False,
        )

    async def _stream(self, side: Side, request: web.Request, call: Call) -> web.StreamResponse:
        async with self._upstream(side, request, b"") as upstream:
            call.status = upstream.status
            response = web.StreamResponse(status=upstream.status, headers=_passed_on(upstream.headers))
            await response.prepare(request)
            watch = _Watch(request, response, call.kind)
            self._watches.add(watch)
            try:
                async for line in upstream.content:
                    if call.kind == "WATCH smschannels":
                        with self._changing():
                            self._meet_event(line)
                    await response.write(line)
            finally:
                self._watches.discard(watch)
            await response.write_eof()
            return response

    def _meet_event(self, line: bytes) -> None:
        event = json.loads(line)
        if event["type"] in {"ADDED", "MODIFIED"}:
            self._meet(event["object"]["metadata"])

    async def _disturb(self, request: web.Request, call: Call, rule: Rule | None) -> web.StreamResponse | None:
        """The fault's own answer, or None if the call was only delayed."""
        action = call.fault
        assert action
        assert rule
        match action.kind:
            case "delay" | "hang":
                try:
                    with self._changing():
                        self._held[rule] = call
                    await (asyncio.sleep(action.seconds) if action.kind == "delay" else asyncio.Event().wait())
                finally:
                    with self._changing():
                        self._held.pop(rule, None)
                return None
            case "reset":
                return _reset(request)
            case "html200" | "html":
                status = 200 if action.kind == "html200" else action.status
                return web.Response(status=status, text=_HTML, content_type="text/html")
        document = _kubernetes_status(action) if call.side == "kubernetes" else _twilio_error(action)
        headers = {} if action.retry_after is None else {"Retry-After": str(action.retry_after)}
        return web.json_response(document, status=action.status, headers=headers)

    async def _cut_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._cut_every or 0.1)
            if self._cut_every:
                await self._cut(expired=False)

    async def _cut(self, expired: bool) -> None:
        for watch in list(self._watches):
            if expired:
                event = {"type": "ERROR", "object": _kubernetes_status(Action(kind="status", status=410))}
                with suppress(OSError):
                    await watch.response.write(json.dumps(event).encode() + b"\n")
            _reset(watch.request, abruptly=not expired)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self.changed:
            yield
            self.changed.notify_all()


def _kubernetes_kind(request: web.Request, body: bytes) -> str:
    found = _RESOURCE.fullmatch(request.path)
    if found is None:
        return f"{request.method} {request.path}"
    resource, name = found["resource"], found["name"]
    if resource == "secrets":
        resource = f"secrets({_secret_kind(found['namespace'], name or '', request.query_string, body)})"
    if found["sub"]:
        resource = f"{resource}/{found['sub']}"
    verb = request.method
    if verb == "GET" and not name:
        verb = "WATCH" if request.query.get("watch") else "LIST"
    return f"{verb} {resource}"


def _secret_kind(namespace: str, name: str, query: str, body: bytes) -> str:
    if namespace == "sms-channels":
        return "token"
    if b'"written-off"' in body:
        return "written-off"
    is_record = _RECORD.fullmatch(name) or b"/record" in body or "record" in query
    return "record" if is_record else "keyring"


def _twilio_kind(request: web.Request) -> str:
    kind = locate(request.path).kind
    if kind == "numbers" and "PhoneNumber" not in request.query:
        kind = "numbers(page)"
    return f"{request.method} {kind}"


def _kubernetes_status(action: Action) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "Injected by the proxy",
        "reason": _REASONS.get(action.status, "InternalError"),
        "code": action.status,
    }


def _twilio_error(action: Action) -> dict[str, Any]:
    code = action.code or {401: 20003}.get(action.status, 20000 + action.status)
    return {
        "code": code,
        "message": "Injected by the proxy",
        "more_info": f"https://www.twilio.com/docs/errors/{code}",
        "status": action.status,
    }


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}


def _reset(request: web.Request, *, abruptly: bool = True) -> web.StreamResponse:
    transport = request.transport
    if transport is not None:
        if abruptly:
            # Lingering for zero seconds turns the close into a RST, which is what a crashed peer looks like.
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            transport.abort()
        else:
            transport.close()
    return web.Response()


async def _truncate(request: web.Request, status: int, headers: Mapping[str, str], answer: bytes) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = len(answer)
    await response.prepare(request)
    await response.write(answer[: len(answer) // 2])
    return _reset(request, abruptly=False)
