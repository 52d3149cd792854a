"""`Prefer: wait=N`: requests that wait for the operator. All share one watch, which runs only while somebody waits."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from api_shim.channels import Channels
from api_shim.schemas import being_removed, is_observed
from smschannel.api.errors import ChannelError, Expired, Retryable
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.names import channels_path
from smschannel.api.status import condition

_RETRY_SECONDS = 1.0

log = structlog.get_logger()


def is_settled(channel: Object | None) -> bool:
    """Whether the operator is done with the channel as it is now: Ready, Stalled, or on its way out."""
    if channel is None or being_removed(channel):
        return True
    status = channel.get("status", {})
    done = (condition(status, "Ready"), condition(status, "Stalled"))
    return is_observed(channel) and any(each is not None and each["status"] == "True" for each in done)


class Waiting:
    """An event of the watch only wakes up who waits for that channel; what it is like then, they read themselves.

    So nothing is missed: the watch begins at or before what a waiter reads first, and any later change wakes it.
    """

    def __init__(self, api: KubeClient, channels: Channels, *, most: int) -> None:
        self._api = api
        self._channels = channels
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._watch: asyncio.Task[None] | None = None
        self._most = most
        self._taken = 0
        self._stopped = False

    @contextmanager
    def place(self) -> Iterator[bool]:
        """Whether one more may wait; then the place is taken until this is left."""
        free = not self._stopped and self._taken < self._most
        self._taken += free
        try:
            yield free
        finally:
            self._taken -= free

    async def until(self, channel: Object, done: Callable[[Object | None], bool], deadline: float) -> Object | None:
        """The channel when it is `done`, or as it was last seen at `deadline` (loop time); None when it is gone."""
        name, seen = channel["metadata"]["name"], channel
        with self._registered(name, channel["metadata"]["resourceVersion"]) as woken:
            try:
                async with asyncio.timeout_at(deadline):
                    while not self._stopped:
                        try:
                            now = await self._channels.read(name)
                        except Retryable:
                            await asyncio.sleep(_RETRY_SECONDS)
                            continue
                        if now is None or done(now):
                            return now
                        seen = now
                        await woken.wait()
                        woken.clear()
            except TimeoutError:
                pass
        return seen

    def stop(self) -> None:
        """Everybody gets the answer as it stands."""
        self._stopped = True
        self._wake_all()

    @contextmanager
    def _registered(self, name: str, version: str) -> Iterator[asyncio.Event]:
        woken = asyncio.Event()
        self._waiters[name].add(woken)
        if self._watch is None:
            self._watch = asyncio.create_task(self._follow(version))
        try:
            yield woken
        finally:
            self._waiters[name].discard(woken)
            if not self._waiters[name]:
                del self._waiters[name]
            if not self._waiters:
                self._watch.cancel()
                self._watch = None

    async def _follow(self, version: str) -> None:
        while True:
            try:
                version = await self._follow_once(version)
            except Expired:
                version = ""  # too old: from now on, which begins with an event for every channel there is
            except ChannelError as error:
                log.warning("the watch for waiting requests broke", error=str(error))
            except Exception:
                log.exception("the watch for waiting requests broke")
            self._wake_all()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _follow_once(self, version: str) -> str:
        params = {"resourceVersion": version} if version else {}
        async for event in self._api.watch(channels_path(self._channels.namespace), params):
            meta = event["object"]["metadata"]  # of an ERROR, the last event of a stream, it is empty
            version = meta.get("resourceVersion", "")
            for woken in self._waiters.get(meta.get("name", ""), ()):
                woken.set()
        return version

    def _wake_all(self) -> None:
        for waiters in self._waiters.values():
            for woken in waiters:
                woken.set()
