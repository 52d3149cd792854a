"""`/healthz`: what must go on is found when it does not; an outage and a busy moment are not taken for that."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import aiohttp
import pytest

from smschannel.api.errors import Retryable
from smschannel.api.kube_client import KubeClient
from smschannel.health import Heartbeats, serve
from smschannel.leader import Elector


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("passed", "silent", "reason"),
    [
        (0, [], "it was expected only now, and has all of its time to begin"),
        (10, [], "the limit itself is still within it"),
        (10.1, ["watch"], "it did not begin again in time"),
    ],
)
def test_activity_is_silent_after_its_limit(passed: float, silent: list[str], reason: str) -> None:
    clock = Clock()
    beats = Heartbeats(clock)
    beats.expect("watch", 10)
    clock.now += passed
    assert beats.silent() == silent, reason


def test_each_activity_has_its_own_limit_and_beat() -> None:
    clock = Clock()
    beats = Heartbeats(clock)
    beats.expect("watch", 10)
    beats.expect("election", 100)
    clock.now += 11
    assert beats.silent() == ["watch"]
    assert beats.age() == 11
    beats.beat("watch")
    assert beats.silent() == []
    assert beats.age() == 11, "that of the election, which is the oldest now"
    beats.forget("election")
    assert beats.age() == 0


def test_what_is_not_expected_is_not_judged() -> None:
    """A replica that stands by does not watch, and a request that ends late must not bring its watch back."""
    clock = Clock()
    beats = Heartbeats(clock)
    beats.beat("watch")
    clock.now += 1e6
    assert (beats.silent(), beats.age()) == ([], 0)


async def get(runner: Any, path: str) -> tuple[int, str]:
    host, port = runner.addresses[0]
    async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}{path}") as answer:
        return answer.status, await answer.text()


async def test_healthz_names_what_is_silent_and_readyz_stays_apart() -> None:
    dead: list[str] = []
    runner = await serve("127.0.0.1", 0, lambda: True, lambda: dead)
    try:
        assert await get(runner, "/healthz") == (200, "ok\n")
        dead += ["leader election", "/api/v1/namespaces/sms-channels/secrets"]
        status, text = await get(runner, "/healthz")
        assert status == 503
        assert text == "silent for too long: leader election, /api/v1/namespaces/sms-channels/secrets\n"
        assert (await get(runner, "/readyz"))[0] == 200
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("outage", [False, True], ids=["API server answers", "API server is away"])
async def test_standby_is_judged_by_its_looks_and_not_by_their_success(outage: bool) -> None:
    """An election whose task has died looks no more; one whose API server is away looks and fails."""
    looks = asyncio.Semaphore(0)
    held = {"spec": {"holderIdentity": "other", "leaseDurationSeconds": 30, "renewTime": "now"}}

    class Api:
        async def request(self, *_: Any, **__: Any) -> Any:
            if outage:
                raise Retryable("connection refused")
            return held

    clock = Clock()
    beats = Heartbeats(clock)
    beats.expect("leader election", 70)

    def on_look() -> None:
        beats.beat("leader election")
        looks.release()

    elector = Elector(cast(KubeClient, Api()), "sms-operator", "this", duration=0.3, on_look=on_look)
    campaign = asyncio.create_task(elector.campaign())
    await looks.acquire()
    clock.now += 71
    await looks.acquire()
    assert beats.silent() == []
    campaign.cancel()
    await asyncio.wait({campaign})
    clock.now += 71
    assert beats.silent() == ["leader election"]
