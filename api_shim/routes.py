"""The three calls. Each asks in the same order: who (401), path (422), may they (403), media type (415), body (422)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from api_shim.auth import Gate
from api_shim.channels import BeingRemoved, Channels
from api_shim.edge import BODY_BYTES, CALLER, INSTANCE, TIME_LIMIT, Edge
from api_shim.schemas import ChannelStatus, Refusal, Setup, instance_id
from api_shim.waiting import Waiting, is_settled
from smschannel.api.api_keys import Verb
from smschannel.api.kube_client import Object

PATH = "/v1/instances/{instance_id:[^/]+}/channels/sms"
_JSON = re.compile(r"application/(json|[^;\s]+\+json)\s*(;.*)?", re.IGNORECASE)
_WAIT = re.compile(r'(?:^|,)\s*wait\s*=\s*"?(\d{1,9})"?\s*(?=[,;]|$)', re.IGNORECASE)
_BODY_SECONDS = 10

Written = TypeVar("Written")


class Routes:
    """A client that hangs up at once still gets its write, unless others write at that time; waiting ends with it."""

    def __init__(self, edge: Edge, gate: Gate, channels: Channels, waiting: Waiting, *, wait_limit: int) -> None:
        self._edge = edge
        self._gate = gate
        self._channels = channels
        self._waiting = waiting
        self._wait_limit = wait_limit

    def table(self) -> list[web.RouteDef]:
        return [
            web.get(PATH, self.get, allow_head=False),
            web.post(PATH, self.post),
            web.delete(PATH, self.delete),
        ]

    async def get(self, request: web.Request) -> web.Response:
        name = await self._admitted(request, Verb.GET)
        return _answer(200, await self._channels.read(name))

    async def post(self, request: web.Request) -> web.Response:
        name = await self._admitted(request, Verb.POST)
        setup = Setup.parse(await _body(request))
        with self._wait(request) as (seconds, deadline):
            try:
                channel, created = await self._written(request, partial(self._channels.apply, name, setup))
            except BeingRemoved as refusal:
                if not seconds or not await self._removed(refusal.channel, deadline):
                    raise
                channel, created = await self._written(request, partial(self._channels.apply, name, setup))
            now = await self._waiting.until(channel, is_settled, deadline) if seconds else channel
        return _answer(201 if created else 200, now, seconds)

    async def delete(self, request: web.Request) -> web.Response:
        name = await self._admitted(request, Verb.DELETE)
        with self._wait(request) as (seconds, deadline):
            channel = await self._written(request, partial(self._channels.delete, name))
            waited_in_vain = channel is not None and seconds and not await self._removed(channel, deadline)
        return web.Response(status=202 if waited_in_vain else 204, headers=_applied(seconds))

    async def _admitted(self, request: web.Request, verb: Verb) -> str:
        caller = request[CALLER] = await self._gate.identify(request.headers, lambda: self._edge.client(request))
        name = request[INSTANCE] = instance_id(request.match_info["instance_id"])
        await self._gate.admit(caller, verb, name)
        return name

    async def _written(
        self, request: web.Request, write: Callable[[asyncio.Event], Coroutine[Any, Any, Written]]
    ) -> Written:
        left = asyncio.Event()
        writing = asyncio.create_task(write(left))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            left.set()
            if request[TIME_LIMIT].expired():  # the answer is 503: what comes next is the client's to say
                writing.cancel()
            raise

    async def _removed(self, channel: Object, deadline: float) -> bool:
        uid = channel["metadata"]["uid"]

        def is_another(now: Object | None) -> bool:
            return now is None or now["metadata"]["uid"] != uid

        return is_another(await self._waiting.until(channel, is_another, deadline))

    @contextmanager
    def _wait(self, request: web.Request) -> Iterator[tuple[int, float]]:
        """For how many seconds the client prefers to wait, as far as it may, and until when (loop time)."""
        found = _WAIT.search(",".join(request.headers.getall("Prefer", ())))
        seconds = min(int(found[1]), self._wait_limit) if found else 0
        with self._waiting.place() if seconds else nullcontext(False) as may_wait:
            if not may_wait:
                seconds = 0
            limit = request[TIME_LIMIT]
            before = limit.when()
            if seconds and before is not None:
                limit.reschedule(before + seconds)
            yield seconds, asyncio.get_running_loop().time() + seconds


async def _body(request: web.Request) -> bytes:
    sent_as = request.headers.get("Content-Type", "")
    if sent_as and not _JSON.fullmatch(sent_as.strip()):
        raise Refusal(415, "Send the body as JSON, with Content-Type: application/json.", Accept="application/json")
    if (size := request.content_length or 0) > BODY_BYTES:  # without waiting for it
        raise web.HTTPRequestEntityTooLarge(max_size=BODY_BYTES, actual_size=size)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise Refusal(408, f"The body did not arrive within {_BODY_SECONDS} seconds.") from None


def _answer(status: int, channel: Object | None, waited: int = 0) -> web.Response:
    body = ChannelStatus.of(channel).model_dump_json()
    return web.Response(status=status, text=body, content_type="application/json", headers=_applied(waited))


def _applied(seconds: int) -> dict[str, str]:
    return {"Preference-Applied": f"wait={seconds}"} if seconds else {}
