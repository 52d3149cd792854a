"""A watch that does not end: what is asked of the API server again, and what the receiver learns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, cast

from smschannel.api.errors import ChannelError, Expired, KubernetesUnavailable
from smschannel.api.follow import follow
from smschannel.api.kube_client import KubeClient, Object
from tests.unit.virtual_time import now, virtually


def event(kind: str, name: str, version: str) -> Object:
    return {"type": kind, "object": {"metadata": {"name": name, "resourceVersion": version}}}


class Api:
    """Answers each watch with the next of `watches`: events, errors to raise, and seconds in which nothing happens.

    `versions` is from where each watch began, and `pauses` how many seconds after the end of the one before.
    """

    def __init__(self, *watches: list[Object | ChannelError | int]) -> None:
        self._watches = list(watches)
        self._ended = 0.0
        self.versions: list[str | None] = []
        self.pauses: list[float] = []

    async def watch(self, path: str, params: Mapping[str, str]) -> AsyncIterator[Object]:
        self.versions.append(params.get("resourceVersion"))
        self.pauses.append(now() - self._ended)
        for each in self._watches.pop(0) if self._watches else ():
            if isinstance(each, int):
                await asyncio.sleep(each)
            self._ended = now()
            if isinstance(each, ChannelError):
                raise each
            if isinstance(each, dict):
                yield each
        if not self._watches:
            raise asyncio.CancelledError


async def seen(api: Api, version: str = "10") -> list[str | None]:
    """Return the names of the events, and None where they begin again."""
    found: list[Any] = []
    with suppress(asyncio.CancelledError):
        async for each in follow(cast(KubeClient, api), "/x", version, longest_delay=3):
            found.append(each and each["object"]["metadata"]["name"])
    return found


@virtually
async def test_receiver_learns_twice_that_it_is_behind() -> None:
    """What is deleted between its resync and the new watch is in no event. A bookmark comes if nothing else does."""
    api = Api([Expired("old")], [event("BOOKMARK", "", "20")])
    assert await seen(api) == [None, None]


@virtually
async def test_first_events_without_a_version_are_not_in_their_order() -> None:
    """They come by name: to go on from the version of one would leave out others that are older."""
    api = Api([Expired("old")], [event("ADDED", "a", "100"), KubernetesUnavailable("cut")], [event("ADDED", "b", "50")])
    assert await seen(api) == [None, None, "a", "b"]
    assert api.versions == ["10", None, None]


@virtually
async def test_watch_goes_on_from_the_last_event() -> None:
    """After an unversioned start from the first bookmark, or change."""
    api = Api([event("MODIFIED", "a", "11"), KubernetesUnavailable("cut")], [event("BOOKMARK", "", "15")], [])
    assert await seen(api) == ["a"]
    assert api.versions == ["10", "11", "15"]
    api = Api([event("ADDED", "a", "100"), event("BOOKMARK", "", "101")], [])
    assert await seen(api, "") == ["a"]
    assert api.versions == [None, "101"]


@virtually
async def test_api_server_that_is_away_is_asked_less_and_less_often() -> None:
    """And at once again after an event: each pause is between half of the delay and the delay."""
    away = KubernetesUnavailable("away")
    api = Api([away], [away], [away], [away], [event("MODIFIED", "a", "11"), away], [away], [])
    await seen(api)
    for pause, delay in zip(api.pauses[1:], [0.5, 1, 2, 3, 0.5, 1], strict=True):
        assert delay / 2 <= pause <= delay


@virtually
async def test_watch_that_ends_as_usual_goes_on_at_once() -> None:
    """The API server ends each one after some minutes. One that ends right away is not repeated without a pause."""
    api = Api([240], [240], [0], [])
    await seen(api)
    assert api.pauses[1:3] == [0, 0]
    assert 0.25 <= api.pauses[3] <= 0.5


@virtually
async def test_other_tasks_run_between_the_events_of_a_watch() -> None:
    """Thousands that a hostile namespace causes at once arrive in one piece, while others have reconciles to do."""
    runs = 0

    async def others() -> None:
        nonlocal runs
        while True:
            await asyncio.sleep(0)
            runs += 1

    other = asyncio.create_task(others())
    await seen(Api([event("MODIFIED", "a", str(version)) for version in range(11, 411)]))
    other.cancel()
    assert runs >= 50
