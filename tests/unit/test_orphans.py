"""Gone is proven: no incomplete list and no gateway's 404 restores the number of a living channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import pytest

from smschannel import __main__ as main
from smschannel.api.errors import KubernetesUnavailable, NoKindMatch
from smschannel.api.kube_client import Object
from smschannel.api.resource import API_VERSION
from smschannel.api.sealing import Keyring
from smschannel.controller import Controller
from smschannel.core.claims import Claims
from smschannel.leader import Identity
from smschannel.settings import Settings
from tests.unit.memory import BEFORE, KEYRING, NAMESPACE, MemoryApi, MemoryTwilio, instance, running
from tests.unit.virtual_time import virtually

N = "+61400000001"
NO_KIND = NoKindMatch(404, "404 page not found")


class Lists(MemoryApi):
    """`answers` replaces the next lists of channels: an error, or what an incomplete list has."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[NoKindMatch | list[Object]] = []

    async def pages(
        self, path: str, params: Any = None, *, metadata_only: bool = False, on_version: Any = None
    ) -> AsyncIterator[Object]:
        if self.answers and "smschannels" in path:
            answer = self.answers.pop(0)
            if isinstance(answer, NoKindMatch):
                raise answer
            for each in answer:
                yield each
            return
        async for each in super().pages(path, params, metadata_only=metadata_only):
            yield each


class WithoutCrd(Lists):
    """`is_gone`: the CRD was deleted, and API discovery confirms it."""

    is_gone = False

    def _answer(self, method: str, path: str, body: Object) -> Object:
        if self.is_gone and path == "/apis":
            return {"kind": "APIGroupList", "groups": [{"name": "apps"}]}
        if self.is_gone and f"/apis/{API_VERSION}" in path:
            raise NO_KIND
        return super()._answer(method, path, body)

    def delete_crd(self) -> None:
        """Its channels are deleted with it, and no watch shows that."""
        self.is_gone = True
        self.objects = {place: body for place, body in self.objects.items() if place[0] != "smschannels"}

    async def pages(
        self, path: str, params: Any = None, *, metadata_only: bool = False, on_version: Any = None
    ) -> AsyncIterator[Object]:
        if self.is_gone and "smschannels" in path:
            raise NO_KIND
        async for each in super().pages(path, params, metadata_only=metadata_only):
            yield each


async def configured(api: MemoryApi, twilio: MemoryTwilio) -> None:
    api.apply(1, N)
    await asyncio.sleep(1)
    assert api.reason(1) == "Configured"
    twilio.writes.clear()


@virtually
async def test_list_that_lacks_a_channel_does_not_restore_its_number() -> None:
    api, twilio = Lists(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9) as operator:
        await configured(api, twilio)
        api.answers = [[]]
        await operator.controller.resync()
        await asyncio.sleep(60)
        assert api.reason(1) == "Configured"
    assert twilio.writes == []


@virtually
async def test_list_at_start_that_lacks_a_channel_does_not_restore_its_number() -> None:
    api, twilio = Lists(), MemoryTwilio(N)
    async with running(api, twilio):
        await configured(api, twilio)
    api.answers = [[]]
    async with running(api, twilio):
        await asyncio.sleep(60)
    assert twilio.writes == []


@virtually
async def test_one_404_that_names_the_channel_is_not_enough_at_start() -> None:
    """Two checks: the first answer may come from an API server that is just starting, perhaps on an old backup."""
    api, twilio = Lists(), MemoryTwilio(N)
    async with running(api, twilio):
        await configured(api, twilio)
    place = "smschannels", NAMESPACE, instance(1)
    there = api.objects.pop(place)
    async with running(api, twilio):
        await asyncio.sleep(2)
        assert ("GET", f"/apis/{API_VERSION}/namespaces/{NAMESPACE}/smschannels/{instance(1)}") in api.calls
        api.objects[place] = there
        await asyncio.sleep(60)
        assert twilio.writes == []
        api.objects.pop(place)
        await asyncio.sleep(1200)
    assert twilio.writes == [(N, BEFORE)], "control: a channel that stays away is gone"


@virtually
async def test_channel_deleted_while_the_operator_was_down_is_restored_after_two_checks() -> None:
    api, twilio = Lists(), MemoryTwilio(N)
    async with running(api, twilio):
        await configured(api, twilio)
    api.delete(1, force=True)
    async with running(api, twilio):
        await asyncio.sleep(60)
    assert (twilio.writes, api.records()) == ([(N, BEFORE)], {})


@virtually
async def test_404_for_one_namespace_is_not_a_deleted_crd() -> None:
    api, twilio = Lists(), MemoryTwilio(N)
    async with running(api, twilio, namespaces=(NAMESPACE, "team-b"), resync=1e9) as operator:
        await configured(api, twilio)
        for _ in range(3):
            api.answers = [NO_KIND]
            with pytest.raises(NoKindMatch):
                await operator.controller.resync()
        await asyncio.sleep(60)
        assert api.reason(1) == "Configured"
    assert twilio.writes == []


@virtually
async def test_404_for_all_namespaces_is_not_a_deleted_crd_while_discovery_knows_it() -> None:
    api, twilio = Lists(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9) as operator:
        await configured(api, twilio)
        for _ in range(3):
            api.answers = [NO_KIND]
            with pytest.raises(NoKindMatch):
                await operator.controller.resync()
        await asyncio.sleep(60)
    assert twilio.writes == []


@virtually
async def test_deleted_crd_is_proven_at_the_second_resync() -> None:
    api, twilio = WithoutCrd(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9) as operator:
        await configured(api, twilio)
        api.delete_crd()
        with pytest.raises(NoKindMatch):
            await operator.controller.resync()
        await asyncio.sleep(60)
        assert twilio.writes == []
        await operator.controller.resync()
        await asyncio.sleep(60)
    assert (twilio.writes, api.records()) == ([(N, BEFORE)], {})


@virtually
async def test_crd_that_was_listed_in_between_is_not_proven_to_be_deleted() -> None:
    """An API server that starts may lack it for a moment, now and then."""
    api, twilio = WithoutCrd(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9) as operator:
        await configured(api, twilio)
        for is_gone in (True, False, True):
            api.is_gone = is_gone
            with pytest.raises(NoKindMatch) if is_gone else nullcontext():
                await operator.controller.resync()
        await asyncio.sleep(60)
        assert operator.controller.has_crd
    assert twilio.writes == []


@virtually
async def test_record_of_a_namespace_that_is_not_watched_is_left_alone() -> None:
    """Its channel cannot be read there, which says nothing about it."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        await configured(api, twilio)
    async with running(api, twilio, namespaces=("team-b",), resync=1e9) as operator:
        api.calls.clear()
        await operator.controller.resync()
        api.edit_record(N, {"record": "AAAA"})
        await operator.controller.resync()
        await asyncio.sleep(60)
    assert [path for _, path in api.calls if f"/{NAMESPACE}/" in path] == []


@virtually
async def test_many_channels_missing_at_once_wait_for_the_next_resync() -> None:
    """Each channel is read by a GET anyway; but an API server that lost its data must not be trusted at once."""
    phones = [f"+6140000{n:04d}" for n in range(30)]
    api, twilio = Lists(), MemoryTwilio(*phones)
    async with running(api, twilio, resync=1e9) as operator:
        for n, phone in enumerate(phones):
            api.apply(n, phone)
        await asyncio.sleep(5)
        twilio.writes.clear()
        there = {place: body for place, body in api.objects.items() if place[0] == "smschannels"}
        api.objects = {place: body for place, body in api.objects.items() if place[0] != "smschannels"}
        await operator.controller.resync()
        await asyncio.sleep(60)
        assert twilio.writes == [], "the data may come back"
        api.objects |= there
        await operator.controller.resync()
        await asyncio.sleep(60)
        assert twilio.writes == []
        api.objects = {place: body for place, body in api.objects.items() if place[0] != "smschannels"}
        for _ in range(2):
            await operator.controller.resync()
        await asyncio.sleep(60)
    assert sorted(twilio.writes) == [(phone, BEFORE) for phone in phones]


@virtually
async def test_many_orphans_at_start_wait_for_the_first_resync() -> None:
    phones = [f"+6140000{n:04d}" for n in range(30)]
    api, twilio = Lists(), MemoryTwilio(*phones)
    async with running(api, twilio):
        for n, phone in enumerate(phones):
            api.apply(n, phone)
        await asyncio.sleep(5)
    for n in range(30):
        api.delete(n, force=True)
    twilio.writes.clear()
    async with running(api, twilio, resync=300):
        await asyncio.sleep(200)
        assert twilio.writes == []
        await asyncio.sleep(200)
    assert sorted(twilio.writes) == [(phone, BEFORE) for phone in phones]


@virtually
async def test_answer_that_there_is_no_such_kind_proves_nothing_by_itself() -> None:
    api, twilio = WithoutCrd(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9) as operator:
        await configured(api, twilio)
        [record] = operator.kube.claims
        api.delete_crd()
        assert not await operator.orphans.is_gone(record)
        for expected in (False, True):
            assert await operator.orphans.look_for_crd() is expected
        assert await operator.orphans.is_gone(record)
        operator.orphans.crd_is_there()
        assert not await operator.orphans.is_gone(record)


class _Starting:
    """An API server that is unavailable first, then answers one 404, and works after that."""

    def __init__(self) -> None:
        self.not_found = 1
        self.answers: list[str] = []
        self.claims = Claims()

    async def open_keyring(self, _: object) -> Keyring:
        return KEYRING

    async def publish_settings(self, _: object) -> None:
        """Not used in this test."""

    async def is_crd_absent(self) -> bool:
        self.answers.append("discovery")
        return False

    async def has_fence(self) -> bool:
        return True

    async def records(self) -> AsyncIterator[Any]:
        return
        yield

    async def channels(self, _: str) -> AsyncIterator[Any]:
        if len(self.answers) < 3:
            self.answers.append("unavailable")
            raise KubernetesUnavailable("the API server does not answer")
        if self.not_found:
            self.not_found -= 1
            self.answers.append("404")
            raise NO_KIND
        self.answers.append("list")
        return
        yield


def test_one_404_after_a_long_outage_is_not_a_deleted_crd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "wait_random_exponential", lambda **_: lambda _state: 0.5)
    settings = Settings(webhook_url_template="https://sms.example.com/{instance_id}", resync_interval_seconds=1)
    kube, closed = _Starting(), list[Controller]()
    monkeypatch.setattr(Controller, "close", lambda controller: closed.append(controller))

    @virtually
    async def story() -> None:
        identity = Identity("operator", is_pod=True)
        controller = await main._load(settings, kube, None, identity)  # type: ignore[arg-type]
        assert controller.has_crd
        assert controller not in closed

    story()
    assert kube.answers[-1] == "list"
    attempts = len([each for each in kube.answers if each in {"unavailable", "404", "list"}])
    assert len(closed) == attempts - 1, "those of the other attempts would stay in memory"
