"""A watch that does not end: it continues after every end, error and restart of the API server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import structlog

from smschannel.api.errors import ChannelError, Expired
from smschannel.api.kube_client import KubeClient, Object

log = structlog.get_logger()

SERVER_SECONDS = 240
"""The server ends each watch after this time, so that a broken connection is noticed."""

_FIRST_DELAY = 0.5
_EVENTS_AT_ONCE = 4
"""Then other tasks run: beside 2,000 edits, reconciles of others took two and a half times as long with 32."""


async def follow(
    api: KubeClient,
    path: str,
    version: str = "",
    *,
    longest_delay: float = 15,
    on_request: Callable[[], object] = lambda: None,
    on_answer: Callable[[], object] = lambda: None,
) -> AsyncIterator[Object | None]:
    """Yield the events (`type`, `object`) of a list's objects from a resourceVersion on, until the caller stops.

    Without a version, or when it is too old, an ADDED event for every object comes first. In the latter case objects
    may have been deleted meanwhile: None comes at once, and again when the new watch has begun. Retries all errors of
    Kubernetes, with a delay that doubles up to `longest_delay` seconds. `on_request` is called before each request, and
    `on_answer` for each event and bookmark.
    """
    clock, delay, count, is_behind = asyncio.get_running_loop().time, _FIRST_DELAY, 0, False
    while True:
        params = {"timeoutSeconds": str(SERVER_SECONDS), **({"resourceVersion": version} if version else {})}
        began = clock()
        on_request()
        try:
            async for event in api.watch(path, params):
                delay = _FIRST_DELAY
                on_answer()
                if is_behind:
                    is_behind = False
                    yield None
                if version or event["type"] != "ADDED":  # else others may come whose versions are older
                    version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    yield event
                count += 1
                if count % _EVENTS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # many may have arrived at once: others have work, too
            if clock() - began > delay:
                continue  # the usual end
        except Expired:
            version, is_behind = "", True
            yield None
        except ChannelError as error:
            log.warning("watch broken, retrying", path=path, error=str(error))
        await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311
        delay = min(2 * delay, longest_delay)
