"""What only a watch that missed something brings about: the controller, and an API server that does as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from smschannel.__main__ import _load
from smschannel.api.errors import Conflict, NoKindMatch
from smschannel.api.sealing import Keyring, SealingKey
from smschannel.controller import Controller
from smschannel.core.record import Claims, Record, WebhookTemplate
from smschannel.kube_store import KubeStore
from smschannel.reconcile import Key, Outcome, Reconciler
from smschannel.settings import Settings
from smschannel.twilio.client import TwilioClient

INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
CHANNEL: dict[str, Any] = {
    "metadata": {
        "name": INSTANCE,
        "namespace": "sms-channels",
        "generation": 1,
        "uid": "uid-1",
        "resourceVersion": "7",
        "creationTimestamp": "2026-01-02T03:04:05Z",
    },
    "spec": {"accountSid": "AC" + "0" * 32},
}


class _WithoutCrd:
    """One channel and its record; then the CRD is gone, and no watch has told."""

    gone = False

    async def records(self) -> AsyncIterator[Record]:
        yield Record(uid="uid-1", namespace="sms-channels", name=INSTANCE)

    async def channels(self, _: str) -> AsyncIterator[dict[str, Any]]:
        yield CHANNEL

    async def channel_metadata(self, _: str) -> AsyncIterator[dict[str, Any]]:
        if self.gone:
            raise NoKindMatch(404, "404 page not found")
        yield CHANNEL["metadata"]

    async def channel(self, *_: str) -> dict[str, Any]:
        raise NoKindMatch(404, "404 page not found")


class _Orphans:
    def __init__(self) -> None:
        self.first: asyncio.Future[Key] = asyncio.get_running_loop().create_future()

    async def reconcile(self, key: Key, channel: object, **_: bool) -> Outcome:
        if not self.first.done():
            self.first.set_result(key)
        raise NoKindMatch(404, "404 page not found")


async def test_a_deleted_crd_counts_at_the_second_resync_also_where_no_watch_told_of_its_channels() -> None:
    kube, orphans = _WithoutCrd(), _Orphans()
    controller = Controller(
        cast(KubeStore, kube),
        cast(Reconciler, orphans),
        Claims(),
        namespaces=("sms-channels",),
        template=WebhookTemplate("https://sms.example.com/{instance_id}"),
        workers=1,
        concurrency=1,
        retry_floor=1,
        retry_ceiling=300,
        resync_interval=600,
        drift_interval=600,
    )
    await controller.load()
    await controller.resync()
    kube.gone = True
    with pytest.raises(NoKindMatch):
        await controller.resync()  # a proxy's answer, perhaps
    await controller.resync()
    running = asyncio.create_task(controller.run())
    key = await asyncio.wait_for(orphans.first, 5)
    assert key == Key("sms-channels", INSTANCE, "uid-1"), "what its record says is given back"
    running.cancel()
    await asyncio.wait({running})


class _Expiring:
    """A list that expires once between two of its pages: a database that was compacted meanwhile answers 410."""

    lists = 0

    async def open_keyring(self) -> Keyring:
        return Keyring([SealingKey.generate()])

    async def publish_settings(self, _: object) -> None:
        pass

    async def records(self) -> AsyncIterator[Record]:
        return
        yield

    async def channels(self, _: str) -> AsyncIterator[dict[str, Any]]:
        self.lists += 1
        yield CHANNEL
        if self.lists == 1:
            raise Conflict("The provided continue parameter is too old")


async def test_a_list_that_expires_at_the_start_is_begun_anew() -> None:
    kube = _Expiring()
    settings = Settings(webhook_url_template="https://sms.example.com/{instance_id}")
    await _load(settings, cast(KubeStore, kube), cast(TwilioClient, None))
    assert kube.lists == 2
