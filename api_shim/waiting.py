"""`Prefer: wait=N`: let requests wait for the operator. They share one watch, which runs only while one waits."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from api_shim.channels import Channels
from api_shim.clients import Shares
from api_shim.schemas import is_being_deleted, is_observed
from smschannel.api.errors import Retryable
from smschannel.api.follow import follow
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.names import channels_path
from smschannel.api.status import condition

_RETRY_SECONDS = 1.0


def is_settled(channel: Object | None) -> bool:
    """Return whether the operator is done with the current generation (Ready or Stalled), or the channel is removed."""
    if channel is None or is_being_deleted(channel):
        return True
    status = channel.get("status", {})
    done = (condition(status, "Ready"), condition(status, "Stalled"))
    return is_observed(channel) and any(each is not None and each["status"] == "True" for each in done)


class ChannelWaiter:
    """Lets requests wait for changes of their channels.

    A watch event wakes the requests that wait for that channel, and each reads the channel again. No change is missed:
    the watch starts at or before what a request read first.
    """

    def __init__(self, api: KubeClient, channels: Channels, *, max_waiting: int, per_caller: int) -> None:
        self._api = api
        self._channels = channels
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._watch: asyncio.Task[None] | None = None
        self._max_waiting = max_waiting
        self._slots_taken = 0
        self._shares = Shares(per_caller)
        self._stopped = False

    @contextmanager
    def slot(self, caller: str) -> Iterator[bool]:
        """Take a slot while the context is open; yield False if none is free, or the caller has all of its share."""
        free = not self._stopped and self._slots_taken < self._max_waiting and self._shares.take(caller)
        self._slots_taken += free
        try:
            yield free
        finally:
            if free:
                self._slots_taken -= 1
                self._shares.give_back(caller)

    async def wait_until(
        self, channel: Object, done: Callable[[Object | None], bool], deadline: float
    ) -> Object | None:
        """Return the channel once it is `done`, or as last read at `deadline` (loop time); None if it is gone.

        Faults of Kubernetes are retried: the write that the request asked for has been made.
        """
        name, last = channel["metadata"]["name"], channel
        with self._registered(name, channel["metadata"]["resourceVersion"]) as changed:
            try:
                async with asyncio.timeout_at(deadline):
                    while not self._stopped:
                        try:
                            current = await self._channels.read(name)
                        except Retryable:
                            await asyncio.sleep(_RETRY_SECONDS)
                            continue
                        if current is None or done(current):
                            return current
                        last = current
                        await changed.wait()
                        changed.clear()
            except TimeoutError:
                pass
        return last

    def stop(self) -> None:
        """End all waiting at once; requests are answered with the channel as last read."""
        self._stopped = True
        self._wake_all()

    @contextmanager
    def _registered(self, name: str, version: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set when the channel changes; run the watch, from `version`, while it is needed."""
        changed = asyncio.Event()
        self._waiting[name].add(changed)
        if self._watch is None:
            self._watch = asyncio.create_task(self._follow(version))
        try:
            yield changed
        finally:
            self._waiting[name].discard(changed)
            if not self._waiting[name]:
                del self._waiting[name]
            if not self._waiting:
                self._watch.cancel()
                self._watch = None

    async def _follow(self, version: str) -> None:
        path = channels_path(self._channels.namespace)
        async for event in follow(self._api, path, version, longest_delay=_RETRY_SECONDS):
            if event is None:
                self._wake_all()  # deletions may have been missed
            else:
                for changed in self._waiting.get(event["object"]["metadata"].get("name", ""), ()):
                    changed.set()

    def _wake_all(self) -> None:
        for events in self._waiting.values():
            for changed in events:
                changed.set()
