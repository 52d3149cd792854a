"""Handle the three calls of the API.

Each checks in this order: authentication (401), path (422), authorization (403), media type (415), body (422).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from api_shim.auth import Auth
from api_shim.channels import Channels, RemovalInProgress
from api_shim.schemas import ChannelStatus, HttpError, Setup, instance_id
from api_shim.server import BODY_BYTES, CALLER, INSTANCE, TIME_LIMIT, WRITTEN, HttpServer
from api_shim.waiting import ChannelWaiter, is_settled
from smschannel.api.api_keys import Verb
from smschannel.api.kube_client import Object

PATH = "/v1/instances/{instance_id:[^/]+}/channels/sms"
_JSON = re.compile(r"application/(json|[^;\s]+\+json)\s*(;.*)?", re.IGNORECASE)
_WAIT = re.compile(r'(?:^|,)\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(?=[,;]|$)', re.IGNORECASE)
_BODY_SECONDS = 10

Result = TypeVar("Result")


class Routes:
    """The handlers of GET, POST and DELETE. A write is completed even if the client disconnects meanwhile."""

    def __init__(
        self, server: HttpServer, auth: Auth, channels: Channels, waiter: ChannelWaiter, *, wait_limit: int
    ) -> None:
        """`wait_limit` is the maximum of `Prefer: wait=N`, in seconds."""
        self._server = server
        self._auth = auth
        self._channels = channels
        self._waiter = waiter
        self._wait_limit = wait_limit

    def table(self) -> list[web.RouteDef]:
        return [
            web.get(PATH, self.get, allow_head=False),
            web.post(PATH, self.post),
            web.delete(PATH, self.delete),
        ]

    async def get(self, request: web.Request) -> web.Response:
        """Answer the status of the channel."""
        name = await self._authorized_instance(request, Verb.GET)
        return _answer(200, await self._channels.read(name))

    async def post(self, request: web.Request) -> web.Response:
        """Create or change the channel, and answer its status."""
        name = await self._authorized_instance(request, Verb.POST)
        setup = Setup.parse(await _body(request))
        with self._wait_slot(request) as (seconds, deadline):
            try:
                channel, created = await self._write(request, partial(self._channels.apply, name, setup))
            except RemovalInProgress as error:
                if not seconds or not await self._wait_for_removal(error.channel, deadline):
                    raise
                channel, created = await self._write(request, partial(self._channels.apply, name, setup))
            request[WRITTEN] = _version(channel)
            latest = await self._waiter.wait_until(channel, is_settled, deadline) if seconds else channel
        return _answer(201 if created else 200, latest, seconds)

    async def delete(self, request: web.Request) -> web.Response:
        """Delete the channel. Answer 202 if the client waited and the channel is not gone yet, else 204."""
        name = await self._authorized_instance(request, Verb.DELETE)
        with self._wait_slot(request) as (seconds, deadline):
            channel = await self._write(request, partial(self._channels.delete, name))
            if channel is not None:
                request[WRITTEN] = _version(channel)
            timed_out = channel is not None and seconds and not await self._wait_for_removal(channel, deadline)
        return web.Response(status=202 if timed_out else 204, headers=_preference_applied(seconds))

    async def _authorized_instance(self, request: web.Request, verb: Verb) -> str:
        """Return the normalised instance ID of the path, once the caller is allowed `verb` on it."""
        caller = await self._auth.authenticate(request.headers, lambda: self._server.client(request))
        self._server.identify(request, caller)
        name = request[INSTANCE] = instance_id(request.match_info["instance_id"])
        await self._auth.authorize(caller, verb, name)
        return name

    async def _write(
        self, request: web.Request, write: Callable[[asyncio.Event], Coroutine[Any, Any, Result]]
    ) -> Result:
        """Run `write`, and let it finish if the client disconnects; then its argument is set, and it must not retry.

        If the time limit expires, `write` is cancelled: the answer is 503, and the client decides whether to repeat.
        """
        disconnected = asyncio.Event()
        writing = asyncio.create_task(write(disconnected))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            disconnected.set()
            if request[TIME_LIMIT].expired():
                writing.cancel()
            raise

    async def _wait_for_removal(self, channel: Object, deadline: float) -> bool:
        """Return whether this channel (by uid) was gone by `deadline`."""
        uid = channel["metadata"]["uid"]

        def is_gone(current: Object | None) -> bool:
            return current is None or current["metadata"]["uid"] != uid

        return is_gone(await self._waiter.wait_until(channel, is_gone, deadline))

    @contextmanager
    def _wait_slot(self, request: web.Request) -> Iterator[tuple[int, float]]:
        """Yield how many seconds the request may wait, and until when (loop time); extend its time limit by that.

        The seconds are 0 without `Prefer: wait=N`, or if too many requests are waiting already, in all or of the
        caller.
        """
        found = _WAIT.search(",".join(request.headers.getall("Prefer", ())))
        seconds = min(int(found[1]), self._wait_limit) if found else 0
        with self._waiter.slot(request[CALLER].share) if seconds else nullcontext(False) as may_wait:
            if not may_wait:
                seconds = 0
            limit = request[TIME_LIMIT]
            before = limit.when()
            if seconds and before is not None:
                limit.reschedule(before + seconds)
            yield seconds, asyncio.get_running_loop().time() + seconds


def _version(channel: Object) -> dict[str, Any]:
    """Return what the operator's log lines about this version of a channel have, too."""
    return {field: channel["metadata"].get(field) for field in ("uid", "generation")}


async def _body(request: web.Request) -> bytes:
    media_type = request.headers.get("Content-Type", "")
    if media_type and not _JSON.fullmatch(media_type.strip()):
        raise HttpError(415, "The body must be JSON: send Content-Type: application/json.", Accept="application/json")
    if (size := request.content_length or 0) > BODY_BYTES:  # rejected before it is received
        raise web.HTTPRequestEntityTooLarge(max_size=BODY_BYTES, actual_size=size)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise HttpError(408, f"The body did not arrive within {_BODY_SECONDS} seconds.") from None


def _answer(status: int, channel: Object | None, waited: int = 0) -> web.Response:
    body = ChannelStatus.of(channel).model_dump_json()
    headers = _preference_applied(waited)
    return web.Response(status=status, text=body, content_type="application/json", headers=headers)


def _preference_applied(seconds: int) -> dict[str, str]:
    return {"Preference-Applied": f"wait={seconds}"} if seconds else {}
