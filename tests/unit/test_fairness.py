"""Test that an account whose calls hang delays no other: the work queue and the limiter together, in virtual time.

`python -m tests.bench --parts fairness` measures the same with real processes; here there is no noise. 64 workers,
9 healthy accounts, and others whose calls end with a timeout of 15 seconds.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from pydantic import SecretStr

from smschannel.api.errors import TwilioThrottled, TwilioTimeout
from smschannel.core.record import Login
from smschannel.queue import WorkQueue, flow_limit
from smschannel.twilio.limits import Limiter
from tests.unit.virtual_time import now, virtually

WORKERS, CONCURRENCY = 64, 4
HEALTHY, THEIRS = 9, 300
TIMEOUT = 15.0
KUBERNETES = 0.02
"""Seconds that a reconcile spends at the API server: one half before each of its two calls to Twilio."""

Key = tuple[int, int]
"""The number of the account and the number of the channel."""


@dataclass(frozen=True)
class Load:
    """`channels` per healthy account, created at once or at `rate` per second; calls to Twilio take `call` seconds."""

    channels: int = 100
    call: float = 0.03
    rate: float | None = None


class Operator:
    """The workers of an operator. Calls of the `hanging` accounts time out while `is_down`, and are refused with 429
    until `throttled_until`.
    """

    def __init__(self, load: Load, hanging: int) -> None:
        self.load = load
        self.ready: dict[Key, float] = {}
        self.hanging = range(HEALTHY, HEALTHY + hanging)
        self.is_down = False
        self.throttled_until = 0.0
        self.reconciles = 0
        self._queue: WorkQueue[Key] = WorkQueue(
            flow_of=lambda key: key[0],
            flow_limit=flow_limit(WORKERS, CONCURRENCY),
            retry_floor=1,
            retry_ceiling=300,
        )
        self._limiter = Limiter(concurrency=CONCURRENCY, refusal_memory=450, clock=now)
        self.workers = [asyncio.ensure_future(self._work()) for _ in range(WORKERS)]

    async def _work(self) -> None:
        while True:
            key, _ = await self._queue.get()
            self._queue.done(key, succeeded=await self._reconcile(key))

    async def _reconcile(self, key: Key) -> bool:
        self.reconciles += 1
        try:
            for _ in range(2):
                await asyncio.sleep(KUBERNETES / 2)
                await self._call(key[0])
        except TwilioTimeout:
            self._queue.add_rate_limited(key)
            return False
        except TwilioThrottled as throttled:
            self._queue.add_rate_limited(key, throttled.retry_after)
            self._queue.pause(key[0], throttled.retry_after or 1)
            return True
        self.ready[key] = now()
        return True

    async def _call(self, account: int) -> None:
        sid = f"AC{account}"
        async with self._limiter.call(Login(sid=sid, token=SecretStr("token")), sid):
            if self.is_down and account in self.hanging:
                await asyncio.sleep(TIMEOUT)
                raise TwilioTimeout("Twilio does not answer.")
            await asyncio.sleep(self.load.call)
            if account in self.hanging and now() < self.throttled_until:
                raise TwilioThrottled("429", self.throttled_until - now())

    def enqueue_hanging(self) -> None:
        """Add all channels of the hanging accounts."""
        for account in self.hanging:
            for number in range(THEIRS):
                self._queue.add((account, number))

    async def serve(self) -> list[float]:
        """Create the channels of the healthy accounts. Return the seconds until each was Ready, the longest last."""
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


async def p99(load: Load, hanging: int, *, ready: bool) -> float:
    """Return the 99th percentile of the seconds until Ready.

    With `ready`, the hanging accounts answered until the outage began: their channels are Ready and their limits high.
    """
    operator = Operator(load, hanging)
    if ready:
        operator.enqueue_hanging()
        await asyncio.sleep(60)
    operator.is_down = True
    operator.enqueue_hanging()
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
        pytest.param(Load(call=0.3), id="a burst, and a slow Twilio"),
        pytest.param(Load(rate=100), id="single channels"),
    ],
)


@LOADS
@pytest.mark.parametrize("ready", [False, True], ids=["never answered", "answered until the outage"])
def test_one_hanging_account_slows_the_others_by_less_than_a_fifth(load: Load, ready: bool) -> None:
    @virtually
    async def story() -> None:
        baseline = await p99(load, 0, ready=ready)
        assert await p99(load, 1, ready=ready) < 1.2 * baseline

    story()


@pytest.mark.parametrize("ready", [False, True], ids=["never answered", "answered until the outage"])
def test_six_hanging_accounts_leave_room_for_single_channels(ready: bool) -> None:
    """They occupy eight workers each until their first timeout: only a burst of the others would need those."""

    @virtually
    async def story() -> None:
        load = Load(rate=100)
        baseline = await p99(load, 0, ready=ready)
        assert await p99(load, 6, ready=ready) < 1.2 * baseline

    story()


def test_account_alone_uses_all_calls_it_may_have_in_flight() -> None:
    """A higher flow limit would only queue for the four calls that one credential may have in flight."""

    @virtually
    async def story() -> None:
        operator = Operator(Load(call=0.03), 1)
        operator.enqueue_hanging()
        while len(operator.ready) < THEIRS:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert now() < 1.1 * THEIRS * 2 * 0.03 / CONCURRENCY
        for worker in operator.workers:
            worker.cancel()
        await asyncio.wait(operator.workers)

    story()


def test_throttled_account_finds_out_once_and_the_others_go_on() -> None:
    """Its 300 channels wait for the end of the pause together, instead of failing one after another."""

    @virtually
    async def story() -> None:
        operator = Operator(Load(rate=100), 1)
        operator.throttled_until = 60
        operator.enqueue_hanging()
        await asyncio.sleep(30)
        assert operator.reconciles <= 4, "those that were in flight when the first 429 came"
        times = await operator.serve()
        assert times[-1] < 1
        operator.reconciles = 0
        while len(operator.ready) < THEIRS + 100 * HEALTHY:  # noqa: ASYNC110  (virtual)
            await asyncio.sleep(0.05)
        assert now() < 70
        assert operator.reconciles <= THEIRS
        for worker in operator.workers:
            worker.cancel()
        await asyncio.wait(operator.workers)

    story()
