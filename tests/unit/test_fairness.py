"""An account whose calls hang delays no other: the work queue and the gate together, in virtual time.

What `python -m tests.bench --parts fairness` measures with real processes, here without a machine's noise: 64 workers,
9 healthy accounts, and others whose calls end with a time-out of 15 seconds.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from pydantic import SecretStr

from smschannel.api.errors import TwilioTimeout
from smschannel.controller import lane_share
from smschannel.core.record import Login
from smschannel.queue import WorkQueue
from smschannel.twilio.limits import Gate
from tests.unit.virtual_time import now, virtually

WORKERS, CONCURRENCY = 64, 4
HEALTHY, THEIRS = 9, 300
TIME_OUT = 15.0
KUBERNETES = 0.02
"""Seconds that a turn spends there: half of it before and after, half between its two calls to Twilio."""

Key = tuple[int, int]
"""Account and channel."""


@dataclass(frozen=True)
class Load:
    """`channels` of each healthy account, all at once or `rate` in a second, with calls to Twilio of `call` seconds."""

    channels: int = 100
    call: float = 0.03
    rate: float | None = None


class Operator:
    def __init__(self, load: Load, hanging: int) -> None:
        self.load = load
        self.ready: dict[Key, float] = {}
        self.hanging = range(HEALTHY, HEALTHY + hanging)
        self.is_down = False
        self._queue: WorkQueue[Key] = WorkQueue(
            lane_of=lambda key: key[0],
            lane_share=lane_share(WORKERS, CONCURRENCY),
            retry_floor=1,
            retry_ceiling=300,
        )
        self._gate = Gate(concurrency=CONCURRENCY, refusal_memory=450, clock=now)
        self.workers = [asyncio.ensure_future(self._work()) for _ in range(WORKERS)]

    async def _work(self) -> None:
        while True:
            key, _ = await self._queue.get()
            self._queue.done(key, well=await self._turn(key))

    async def _turn(self, key: Key) -> bool:
        try:
            for _ in range(2):
                await asyncio.sleep(KUBERNETES / 2)
                await self._call(key[0])
        except TwilioTimeout:
            self._queue.retry(key)
            return False
        self.ready[key] = now()
        return True

    async def _call(self, account: int) -> None:
        sid = f"AC{account}"
        async with self._gate.call(Login(sid=sid, token=SecretStr("token")), sid):
            if self.is_down and account in self.hanging:
                await asyncio.sleep(TIME_OUT)
                raise TwilioTimeout("Twilio does not answer.")
            await asyncio.sleep(self.load.call)

    def look_at_theirs(self) -> None:
        for account in self.hanging:
            for number in range(THEIRS):
                self._queue.add((account, number))

    async def serve(self) -> list[float]:
        """Times to Ready of the healthy accounts' channels, the longest last."""
        created = {}
        for number in range(self.load.channels):
            for account in range(HEALTHY):
                key = (account, number)
                created[key] = now()
                self._queue.add(key)
                await asyncio.sleep(1 / self.load.rate if self.load.rate else 0)
        while not created.keys() <= self.ready.keys():  # noqa: ASYNC110  (virtual)
            await asyncio.sleep(0.05)
        return sorted(self.ready[key] - created[key] for key in created)


async def p99(load: Load, hanging: int, *, known: bool) -> float:
    """`known`: their channels were Ready, and have earned their share of the workers, when they are looked at again."""
    operator = Operator(load, hanging)
    if known:
        operator.look_at_theirs()
        await asyncio.sleep(60)
    operator.is_down = True
    operator.look_at_theirs()
    await asyncio.sleep(0.5)
    times = await operator.serve()
    for worker in operator.workers:
        worker.cancel()
    await asyncio.wait(operator.workers)
    return times[int(len(times) * 0.99)]


LOADS = pytest.mark.parametrize(
    "load",
    [
        pytest.param(Load(), id="a burst that keeps all workers busy"),
        pytest.param(Load(call=0.3), id="a burst that waits for a slow Twilio"),
        pytest.param(Load(rate=100), id="channels that come one by one"),
    ],
)


@LOADS
@pytest.mark.parametrize("known", [False, True], ids=["never answered", "answered until now"])
def test_one_account_that_hangs_makes_the_others_wait_hardly_longer(load: Load, known: bool) -> None:
    @virtually
    async def story() -> None:
        alone = await p99(load, 0, known=known)
        assert await p99(load, 1, known=known) < 1.2 * alone

    story()


@pytest.mark.parametrize("known", [False, True], ids=["never answered", "answered until now"])
def test_six_accounts_that_hang_together_leave_room_for_channels_that_come_one_by_one(known: bool) -> None:
    """They hold eight workers each until their first time-out: only a burst of the others would miss them."""

    @virtually
    async def story() -> None:
        load = Load(rate=100)
        alone = await p99(load, 0, known=known)
        assert await p99(load, 6, known=known) < 1.2 * alone

    story()


def test_an_account_alone_is_as_fast_as_twilio_lets_it() -> None:
    """A larger share would only wait for the login's four calls in flight."""

    @virtually
    async def story() -> None:
        operator = Operator(Load(call=0.03), 1)
        operator.look_at_theirs()
        while len(operator.ready) < THEIRS:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert now() < 1.1 * THEIRS * 2 * 0.03 / CONCURRENCY
        for worker in operator.workers:
            worker.cancel()
        await asyncio.wait(operator.workers)

    story()
