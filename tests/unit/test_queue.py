"""Test the work queue: one worker per key, one scheduled requeue per key, fair flows, and pauses."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smschannel.queue import WorkQueue, flow_limit
from tests.unit.virtual_time import VirtualTime, iterations, now, virtually

FLOOR, CEILING = 1.0, 60.0

Queue = WorkQueue[str]


def new_queue(limit: int = 10, flow_of: Callable[[str], str] = lambda key: key[0]) -> Queue:
    """Return a queue in which the flow of a key is its first letter."""
    return WorkQueue(flow_of=flow_of, flow_limit=limit, retry_floor=FLOOR, retry_ceiling=CEILING)


async def take(queue: Queue) -> str:
    """Wait for the next key."""
    key, _ = await queue.get()
    return key


async def is_idle(waiting: Awaitable[object], seconds: float = 1000) -> bool:
    """Return whether no key is handed out within `seconds`."""
    try:
        await asyncio.wait_for(waiting, seconds)
    except TimeoutError:
        return True
    return False


@virtually
async def test_closed_queue_is_not_kept_in_memory() -> None:
    """An operator that lost its lease leaves a queue with schedules of many minutes, and with it a whole cache."""
    queue = new_queue()
    queue.add_after("a", 1000)
    queue.pause("a flow", 1000)
    left = weakref.ref(queue)
    queue.close()
    del queue
    await asyncio.sleep(0)
    gc.collect()
    assert left() is None


# Keys


@virtually
async def test_key_added_three_times_is_handed_out_once() -> None:
    queue = new_queue()
    for _ in range(3):
        queue.add("a")
    assert len(queue) == 1
    assert await take(queue) == "a"
    queue.done("a")
    assert await is_idle(queue.get())


@virtually
async def test_keys_of_a_flow_keep_their_order() -> None:
    queue = new_queue()
    for key in ("a1", "a2", "a3"):
        queue.add(key)
    assert [await take(queue) for _ in range(3)] == ["a1", "a2", "a3"]


@virtually
async def test_get_returns_how_long_the_key_waited() -> None:
    queue = new_queue()
    queue.add("a")
    assert await is_idle(asyncio.get_running_loop().create_future(), 5)
    queue.add("a")
    assert await queue.get() == ("a", 5)


@virtually
async def test_key_added_while_it_runs_is_queued_again_once() -> None:
    queue = new_queue()
    queue.add("a")
    await take(queue)
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0, "it runs"
    assert await is_idle(queue.get()), "it never runs in two workers"
    queue.done("a")
    assert await take(queue) == "a"
    queue.done("a")
    assert await is_idle(queue.get()), "once, however often it was added"


@virtually
async def test_no_key_runs_twice_at_a_time_and_none_is_lost() -> None:
    """Eight workers, and keys added all the time: each add is followed by a run."""
    queue, chance = new_queue(limit=3), random.Random(7)  # noqa: S311
    busy: set[str] = set()
    added: dict[str, int] = {}
    processed: dict[str, int] = {}

    async def work() -> None:
        while True:
            key = await take(queue)
            assert key not in busy
            busy.add(key)
            processed[key] = added[key]
            await asyncio.sleep(chance.random())
            busy.remove(key)
            queue.done(key)

    async def feed() -> None:
        for count in range(500):
            key = chance.choice("abc") + chance.choice("123")
            added[key] = count
            if chance.random() < 0.3:
                queue.add_after(key, chance.random())
            else:
                queue.add(key)
            await asyncio.sleep(chance.random() / 10)

    workers = [asyncio.ensure_future(work()) for _ in range(8)]
    await feed()
    await asyncio.wait(workers, timeout=1000)
    assert not any(worker.done() for worker in workers), "no worker failed"
    assert processed == added
    assert len(queue) == 0
    for worker in workers:
        worker.cancel()
    await asyncio.wait(workers)


# Scheduled requeues


@virtually
async def test_scheduled_keys_come_when_they_are_due() -> None:
    queue = new_queue()
    queue.add_after("late", 20)
    queue.add_after("soon", 10)
    assert len(queue) == 0
    assert (await take(queue), now()) == ("soon", 10)
    assert (await take(queue), now()) == ("late", 20)


@virtually
async def test_last_schedule_of_a_key_counts() -> None:
    queue = new_queue()
    queue.add_after("a", 10)
    queue.add_after("a", 30)
    queue.add_after("b", 30)
    queue.add_after("b", 10)
    assert (await take(queue), now()) == ("b", 10)
    assert (await take(queue), now()) == ("a", 30)
    queue.done("a")
    queue.done("b")
    assert await is_idle(queue.get()), "each was scheduled once"


@virtually
async def test_key_added_for_now_stays_scheduled() -> None:
    queue = new_queue()
    queue.add_after("a", 10)
    assert queue.is_scheduled("a")
    queue.add("a")
    assert (await take(queue), now()) == ("a", 0)
    queue.done("a")
    assert queue.is_scheduled("a")
    assert (await take(queue), now()) == ("a", 10)
    assert not queue.is_scheduled("a")


@virtually
async def test_cancelled_key_is_not_scheduled() -> None:
    queue = new_queue()
    queue.add_after("a", 10)
    queue.cancel("a")
    assert not queue.is_scheduled("a")
    assert await is_idle(queue.get())


@virtually
async def test_cancelled_key_that_waits_is_handed_out() -> None:
    queue = new_queue()
    queue.add("a")
    queue.cancel("a")
    assert await take(queue) == "a"


@virtually
async def test_cancelled_key_can_be_scheduled_again() -> None:
    queue = new_queue()
    queue.add_after("a", 10)
    queue.cancel("a")
    queue.add_after("a", 30)
    assert (await take(queue), now()) == ("a", 30)


@virtually
async def test_key_that_becomes_due_while_it_runs_is_queued_again() -> None:
    queue = new_queue()
    queue.add("a")
    await take(queue)
    queue.add_after("a", 10)
    assert await is_idle(queue.get(), 20)
    queue.done("a")
    assert (await take(queue), now()) == ("a", 20)


def test_injected_clock_decides_what_is_due() -> None:
    async def story() -> None:
        clock = {"now": 100.0}
        queue: Queue = WorkQueue(
            flow_of=lambda key: key, flow_limit=1, retry_floor=1, retry_ceiling=1, clock=lambda: clock["now"]
        )
        queue.add_after("a", 10)
        assert await is_idle(queue.get(), 9)
        clock["now"] = 111.0
        assert await take(queue) == "a"

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(story())


# Backoff


@virtually
async def test_backoff_doubles_between_floor_and_ceiling() -> None:
    queue = new_queue()
    for failures in range(1, 100):
        delay = queue.add_rate_limited("a")
        assert FLOOR <= delay <= min(CEILING, FLOOR * 2**failures)
    delays = [queue.add_rate_limited("a") for _ in range(200)]
    assert max(delays) > CEILING / 2, "it grows to the ceiling"
    assert min(delays) < CEILING / 2, "full jitter: keys that failed together do not come back together"


@virtually
async def test_failure_schedules_the_key_after_the_returned_delay() -> None:
    queue = new_queue()
    delay = queue.add_rate_limited("a")
    assert queue.is_scheduled("a")
    assert await take(queue) == "a"
    assert now() == pytest.approx(delay)


@virtually
async def test_at_least_lengthens_the_backoff_and_never_shortens_it() -> None:
    queue = new_queue()
    assert queue.add_rate_limited("a", at_least=500) == 500, "even beyond the ceiling"
    assert queue.add_rate_limited("b", at_least=0) >= FLOOR


@virtually
async def test_forget_and_cancel_reset_the_backoff() -> None:
    queue = new_queue()
    for reset in (queue.forget, queue.cancel):
        for _ in range(20):
            queue.add_rate_limited("a")
        reset("a")
        assert queue.add_rate_limited("a") <= 2 * FLOOR
        reset("a")


@settings(deadline=None)
@given(floor=st.floats(0.001, 10), factor=st.floats(1, 1000), failures=st.integers(1, 2000))
def test_every_backoff_lies_between_floor_and_ceiling(floor: float, factor: float, failures: int) -> None:
    async def story() -> None:
        queue: Queue = WorkQueue(flow_of=lambda key: key, flow_limit=1, retry_floor=floor, retry_ceiling=floor * factor)
        delays = [queue.add_rate_limited("a") for _ in range(failures)]
        assert floor <= delays[-1] <= floor * factor * 1.000001

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(story())


# Flows


@pytest.mark.parametrize(
    ("workers", "concurrency", "limit"), [(64, 4, 8), (10, 4, 5), (2, 4, 1), (1, 4, 1), (64, 1, 2)]
)
def test_flow_limit_is_twice_the_calls_and_at_most_half_the_workers(workers: int, concurrency: int, limit: int) -> None:
    assert flow_limit(workers, concurrency) == limit


@virtually
async def test_flow_at_its_limit_leaves_workers_to_the_others() -> None:
    queue = new_queue(limit=2)
    for key in ("a1", "a2", "a3", "b1"):
        queue.add(key)
    assert {await take(queue) for _ in range(3)} == {"a1", "a2", "b1"}
    assert await is_idle(queue.get()), "a3 waits: its flow is at its limit"
    queue.add("c1")
    assert await take(queue) == "c1"
    queue.done("b1")
    assert await is_idle(queue.get()), "another flow's place is of no use to this one"
    queue.done("a2")
    assert await take(queue) == "a3"


@virtually
async def test_flows_are_served_round_robin() -> None:
    queue = new_queue()
    for key in ("a1", "a2", "a3", "b1", "c1"):
        queue.add(key)
    assert [await take(queue) for _ in range(5)] == ["a1", "b1", "c1", "a2", "a3"]


@virtually
async def test_free_place_in_a_flow_wakes_a_worker() -> None:
    queue = new_queue(limit=1)
    queue.add("a1")
    queue.add("a2")
    await take(queue)
    worker = asyncio.ensure_future(take(queue))
    await asyncio.sleep(0)
    queue.done("a1")
    assert await worker == "a2"


@virtually
async def test_key_that_changes_its_flow_while_it_runs_frees_the_place_it_took() -> None:
    flows = {"x": "old", "y": "old"}
    queue = new_queue(limit=1, flow_of=flows.__getitem__)
    queue.add("x")
    await take(queue)
    queue.add("y")
    flows["x"] = "new"
    queue.add("x")
    queue.done("x")
    assert {await take(queue), await take(queue)} == {"x", "y"}
    queue.done("x")
    queue.done("y")
    queue.add("y")
    assert await take(queue) == "y"


# Concurrency limits


async def take_all(queue: Queue, flow: str) -> list[str]:
    """Take keys until the flow is at its limit."""
    taken = []
    while not await is_idle(key := asyncio.ensure_future(take(queue)), 1):
        assert key.result().startswith(flow)
        taken.append(key.result())
    return taken


def fill(queue: Queue, flow: str, count: int = 100) -> None:
    """Add `count` keys to the flow."""
    for number in range(count):
        queue.add(f"{flow}{number}")


@virtually
async def test_limit_starts_at_four_and_rises_by_one_per_success() -> None:
    """Nothing is known about a new account: it must not be able to hang half of the workers."""
    queue = new_queue(limit=8)
    fill(queue, "a")
    taken = await take_all(queue, "a")
    assert len(taken) == 4
    for most in (5, 6, 7, 8, 8, 8):
        queue.done(taken.pop(0))
        taken += await take_all(queue, "a")
        assert len(taken) == most, "one for the place that is free, one more, and never more than the flow limit"


@virtually
async def test_failure_drops_the_limit_to_one() -> None:
    """Keys that run already may end; no other key is handed out until then."""
    queue = new_queue(limit=8)
    fill(queue, "a")
    first, *others = await take_all(queue, "a")
    queue.done(first, succeeded=False)
    for key in others[:-1]:
        assert await take_all(queue, "a") == []
        queue.done(key, succeeded=False)
    queue.done(others[-1], succeeded=False)
    for _ in range(3):
        [only] = await take_all(queue, "a")
        queue.done(only, succeeded=False)


@virtually
async def test_limit_rises_again_after_failures() -> None:
    queue = new_queue(limit=8)
    fill(queue, "a")
    taken = await take_all(queue, "a")
    for key in taken:
        queue.done(key, succeeded=False)
    taken = []
    for most in (1, 2, 3, 4, 5, 6, 7, 8, 8):
        taken += await take_all(queue, "a")
        assert len(taken) == most
        queue.done(taken.pop(0))


@virtually
async def test_one_failure_drops_the_limit_whatever_succeeded_before() -> None:
    """Keys that were running before it and succeed after it raise the limit from one again."""
    queue = new_queue(limit=8)
    fill(queue, "a")
    taken = await take_all(queue, "a")
    for _ in range(4):
        queue.done(taken.pop(0))
        taken += await take_all(queue, "a")
    assert len(taken) == 8
    queue.done(taken.pop(0), succeeded=False)
    for _ in range(3):
        queue.done(taken.pop(0))
    assert await take_all(queue, "a") == [], "four run, and four is the limit"
    queue.done(taken.pop(0))
    assert len(await take_all(queue, "a")) == 2


@virtually
async def test_limit_of_one_flow_is_not_another_flows() -> None:
    queue = new_queue(limit=8)
    for flow in "ab":
        queue.add(f"{flow}0")
        key = await take(queue)
        queue.done(key, succeeded=flow == "a")
    for flow, most in (("a", 5), ("b", 1), ("c", 4)):
        fill(queue, flow)
        assert len(await take_all(queue, flow)) == most


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_flow_limit_below_four_is_kept(limit: int) -> None:
    """Half of two workers is one."""

    @virtually
    async def story() -> None:
        queue = new_queue(limit=limit)
        fill(queue, "a")
        for _ in range(3):
            taken = await take_all(queue, "a")
            assert len(taken) == limit
            for key in taken:
                queue.done(key)

    story()


@virtually
async def test_success_that_raises_the_limit_wakes_two_workers() -> None:
    """The worker that is done may take a key of another flow."""
    queue = new_queue(limit=8)
    fill(queue, "a")
    taken = await take_all(queue, "a")
    workers = [asyncio.ensure_future(take(queue)) for _ in range(3)]
    await asyncio.sleep(0)
    queue.done(taken[0])
    await asyncio.sleep(1)
    assert [worker.done() for worker in workers] == [True, True, False]
    workers[2].cancel()


class Workers:
    """Workers whose keys take as long, and succeed or fail, as `results` says for the flow."""

    def __init__(self, queue: Queue, count: int, results: dict[str, tuple[float, bool]]) -> None:
        self.ended: dict[str, list[float]] = {}
        self._queue, self._results = queue, results
        self._tasks = [asyncio.ensure_future(self._work()) for _ in range(count)]

    async def _work(self) -> None:
        while True:
            key = await take(self._queue)
            seconds, succeeded = self._results[key[0]]
            await asyncio.sleep(seconds)
            self._queue.done(key, succeeded=succeeded)
            self.ended.setdefault(key[0], []).append(now())

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


@virtually
async def test_hanging_accounts_leave_workers_to_the_others() -> None:
    """Three of four accounts hang, and their hundreds of keys were added first. Of sixteen workers they occupy twelve
    until their first timeout and three from then on: the fourth account always has at least its own four.
    """
    queue = new_queue(limit=8)
    hanging = dict.fromkeys("abc", (15.0, False))
    for flow in hanging:
        fill(queue, flow, 300)
    fill(queue, "d", 200)
    workers = Workers(queue, 16, {**hanging, "d": (1.0, True)})
    await asyncio.sleep(100)
    assert len(workers.ended["d"]) == 200
    assert workers.ended["d"][-1] <= 50, "no slower than with four workers of its own"
    assert [len(workers.ended[flow]) for flow in hanging] == [4 + 5] * 3, "one at a time after the first four"
    await workers.stop()


@virtually
async def test_every_key_is_handed_out_however_keys_end() -> None:
    """Limits change at random: no flow is stuck with waiting keys while workers are idle."""
    queue, chance = new_queue(limit=6), random.Random(11)  # noqa: S311
    added: dict[str, int] = {}
    processed: dict[str, int] = {}

    async def work() -> None:
        while True:
            key = await take(queue)
            processed[key] = added[key]
            await asyncio.sleep(chance.random())
            queue.done(key, succeeded=chance.random() < 0.7)

    workers = [asyncio.ensure_future(work()) for _ in range(12)]
    for count in range(1000):
        key = chance.choice("abcd") + chance.choice("123456789")
        added[key] = count
        queue.add(key)
        await asyncio.sleep(chance.random() / 20)
    await asyncio.wait(workers, timeout=1000)
    assert processed == added
    assert len(queue) == 0
    for worker in workers:
        worker.cancel()
    await asyncio.wait(workers)


# Pauses


@virtually
async def test_paused_flow_is_not_handed_out_and_keeps_its_order() -> None:
    queue = new_queue()
    fill(queue, "a", 3)
    queue.pause("a", 30)
    assert len(queue) == 0, "keys of a paused flow do not count"
    assert await is_idle(queue.get(), 29)
    queue.add("a0")
    queue.add("a3")
    assert [await take(queue) for _ in range(4)] == ["a0", "a1", "a2", "a3"]
    assert now() == 30


@virtually
async def test_pause_before_the_first_key_counts() -> None:
    queue = new_queue()
    queue.pause("a", 30)
    queue.add("a")
    queue.add_after("a1", 5)
    assert [await take(queue), await take(queue)] == ["a", "a1"]
    assert now() == 30


@virtually
async def test_pause_leaves_other_flows_alone() -> None:
    queue = new_queue()
    for key in ("a", "b1"):
        queue.add(key)
    queue.pause("a", 30)
    queue.add("b2")
    assert len(queue) == 2
    assert [await take(queue), await take(queue)] == ["b1", "b2"]
    assert now() == 0
    assert (await take(queue), now()) == ("a", 30)


@virtually
async def test_end_of_a_pause_wakes_as_many_workers_as_the_limit_allows() -> None:
    queue = new_queue()
    workers = [asyncio.ensure_future(take(queue)) for _ in range(6)]
    await asyncio.sleep(0)
    queue.pause("a", 30)
    fill(queue, "a", 10)
    await asyncio.sleep(29)
    assert not any(worker.done() for worker in workers)
    await asyncio.sleep(2)
    assert [worker.done() for worker in workers] == [True] * 4 + [False] * 2
    for worker in workers[4:]:
        worker.cancel()


@pytest.mark.parametrize(
    ("pauses", "ends"),
    [((10, 30), 30), ((30, 10), 30), ((30, 0), 30), ((30, -1), 30), ((0,), 0), ((-1,), 0)],
)
def test_second_pause_extends_and_never_shortens(pauses: tuple[float, ...], ends: float) -> None:
    @virtually
    async def story() -> None:
        queue = new_queue()
        queue.add("a")
        for seconds in pauses:
            queue.pause("a", seconds)
        assert (await take(queue), now()) == ("a", ends)

    story()


@virtually
async def test_pause_does_not_touch_keys_that_run() -> None:
    queue = new_queue()
    fill(queue, "a", 2)
    await take(queue)
    queue.pause("a", 30)
    queue.add("a0")
    queue.done("a0")
    assert [await take(queue), await take(queue)] == ["a1", "a0"]
    assert now() == 30


@virtually
async def test_pause_is_no_failure_of_the_flow() -> None:
    """The limit is what it was before the pause."""
    queue = new_queue(limit=8)
    fill(queue, "a")
    for key in await take_all(queue, "a"):
        queue.done(key)
    queue.pause("a", 30)
    assert await take_all(queue, "a") == []
    await asyncio.sleep(30)
    assert len(await take_all(queue, "a")) == 8


@virtually
async def test_key_that_changes_its_flow_leaves_a_paused_one() -> None:
    """A channel that is being deleted does not wait for the pause of those that are not."""
    flows = {"x": "paused", "y": "paused"}
    queue = new_queue(flow_of=lambda key: flows[key])
    for key in flows:
        queue.add(key)
    queue.pause("paused", 30)
    await asyncio.sleep(5)
    flows["x"] = "deleted"
    assert await is_idle(queue.get(), 2), "the queue cannot know until the key is added"
    queue.add("x")
    assert len(queue) == 1
    assert await queue.get() == ("x", 0)
    queue.done("x")
    assert await queue.get() == ("y", 0)
    assert now() == 30
    queue.done("y")
    assert await is_idle(queue.get()), "each was handed out once"


@virtually
async def test_key_that_changes_its_flow_joins_the_pause_of_the_new_one() -> None:
    flows = {"x": "old"}
    queue = new_queue(flow_of=lambda key: flows[key])
    queue.add("x")
    await asyncio.sleep(3)
    flows["x"] = "paused"
    queue.pause("paused", 30)
    queue.add("x")
    assert len(queue) == 0
    assert await queue.get() == ("x", 0)
    assert now() == 33


@virtually
async def test_key_that_changes_its_flow_keeps_the_time_it_waited() -> None:
    flows = {"x": "old"}
    queue = new_queue(flow_of=lambda key: flows[key])
    queue.add("x")
    await asyncio.sleep(3)
    flows["x"] = "new"
    queue.add("x")
    await asyncio.sleep(1)
    assert await queue.get() == ("x", 4)


@virtually
async def test_time_in_a_pause_does_not_count_as_waiting() -> None:
    queue = new_queue()
    queue.pause("a", 30)
    queue.add("a")
    await asyncio.sleep(34)
    assert await queue.get() == ("a", 4)


@virtually
async def test_pause_of_an_unused_flow_is_forgotten_afterwards() -> None:
    """Flows are named by account SIDs, which any user can write into a channel."""
    queue = new_queue()
    for number in range(100):
        queue.pause(number, 30)
        queue.add(f"{number}")
        queue.done(await take(queue))
    await asyncio.sleep(31)
    assert queue._flows == {}


@virtually
async def test_paused_flow_costs_no_time_while_it_waits() -> None:
    """A worker waits for one timer; it does not poll."""
    queue = new_queue()
    fill(queue, "a", 50)
    for _ in range(50):
        queue.pause("a", 1000)
    worker = asyncio.ensure_future(take(queue))
    before = iterations()
    assert await worker == "a0"
    assert iterations() - before < 10


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_whatever_is_paused_moved_or_cancelled(seed: int) -> None:
    """Keys are added and moved, flows are paused and workers cancelled at random.

    No key of a paused flow is handed out, no key runs twice at a time, limits hold, and each add is followed by a run.
    """

    @virtually
    async def story() -> None:
        chance = random.Random(seed)  # noqa: S311
        flows = {f"{number}": chance.choice("abc") for number in range(30)}
        joined = dict(flows)  # the flow that a key had when it was last added
        queue = new_queue(limit=3, flow_of=flows.__getitem__)
        paused: dict[str, float] = {}
        running: dict[str, str] = {}
        added: dict[str, int] = {}
        processed: dict[str, int] = {}

        async def work() -> None:
            while True:
                key = await take(queue)
                assert key not in running
                assert paused.get(joined[key], 0) <= now()
                running[key] = joined[key]
                assert list(running.values()).count(running[key]) <= 3
                processed[key] = added[key]
                await asyncio.sleep(chance.random())
                if flows[key] != joined[key]:
                    joined[key] = flows[key]  # it is queued again below, if it was added meanwhile
                del running[key]
                queue.done(key, succeeded=chance.random() < 0.8)

        workers = [asyncio.ensure_future(work()) for _ in range(8)]
        for count in range(1000):
            key, what = chance.choice(list(flows)), chance.random()
            if what < 0.1:
                flow, seconds = chance.choice("abc"), 3 * chance.random()
                queue.pause(flow, seconds)
                paused[flow] = max(paused.get(flow, 0), now() + seconds)
            else:
                if what < 0.3:
                    flows[key] = chance.choice("abc")
                added[key] = count
                queue.add(key)
                if key not in running:
                    joined[key] = flows[key]
            if what > 0.95:
                waiter = asyncio.ensure_future(take(queue))
                await asyncio.sleep(0)
                if waiter.done():
                    queue.done(waiter.result())
                    processed[waiter.result()] = added[waiter.result()]
                waiter.cancel()
            await asyncio.sleep(chance.random() / 10)
        await asyncio.wait(workers, timeout=1000)
        assert not any(worker.done() for worker in workers), "no worker failed"
        assert processed == added
        assert queue._flows == {}
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)

    story()


# Groups and unverified flows: a key is group, account and number; accounts in upper case are unverified


def shared_queue(workers: int | None = None, unverified: int | None = None, limit: int = 100) -> Queue:
    """Return a queue in which the group of a key is its first letter and the flow its first two."""
    return WorkQueue(
        flow_of=lambda key: key[:2],
        group_of=lambda flow: str(flow)[0],
        is_verified=lambda flow: str(flow)[1].islower(),
        flow_limit=limit,
        unverified_limit=unverified,
        workers=workers,
        retry_floor=FLOOR,
        retry_ceiling=CEILING,
    )


async def take_what_may_run(queue: Queue) -> list[str]:
    taken = []
    while not await is_idle(key := asyncio.ensure_future(take(queue)), 1):
        taken.append(key.result())
    return taken


@virtually
async def test_groups_take_turns_and_then_the_flows_within_each() -> None:
    """Three accounts of one namespace do not make it be served three times as often."""
    queue = shared_queue()
    for key in ("xa1", "xb1", "xc1", "xa2", "ya1", "ya2", "ya3", "ya4"):
        queue.add(key)
    assert [await take(queue) for _ in range(8)] == ["xa1", "ya1", "xb1", "ya2", "xc1", "ya3", "xa2", "ya4"]


@virtually
async def test_group_leaves_workers_to_others() -> None:
    """However many accounts it has: nobody knows how long their calls will take."""
    queue = shared_queue(workers=16)
    for account in "abcdefgh":
        fill(queue, f"x{account}", 4)
    assert len(await take_what_may_run(queue)) == 12, "three quarters"
    fill(queue, "ya", 4)
    assert len(await take_what_may_run(queue)) == 3, "three quarters of the rest"
    queue.add("za")
    assert await take_what_may_run(queue) == ["za"]


@virtually
async def test_places_of_a_group_come_back() -> None:
    queue = shared_queue(workers=4)
    fill(queue, "xa", 8)
    taken = await take_what_may_run(queue)
    assert len(taken) == 3
    for rest in (5, 4, 3, 2, 1, 0):
        queue.done(taken.pop(0))
        taken += await take_what_may_run(queue)
        assert len(queue) == max(0, rest - 1)
        if rest == 0:
            assert len(taken) == 2


@virtually
async def test_one_worker_serves_every_group() -> None:
    """With few workers nothing can be left free, and nothing may get stuck."""
    queue = shared_queue(workers=1, unverified=1)
    for key in ("xa", "xA", "ya", "yA"):
        queue.add(key)
    served = []
    for _ in range(4):
        served += [await take(queue)]
        assert await is_idle(queue.get())
        queue.done(served[-1])
    assert sorted(served) == ["xA", "xa", "yA", "ya"]


@virtually
async def test_unverified_flows_have_a_small_share() -> None:
    queue = shared_queue(unverified=2)
    for number in range(100):
        queue.add(f"x{chr(0x391 + number % 24)}{number}")  # upper case
    queue.add("xa1")
    queue.add("xb1")
    taken = await take_what_may_run(queue)
    assert taken[0] == "xa1", "a hundred unverified keys were there before it"
    assert {"xa1", "xb1"} < set(taken)
    assert len(taken) == 4
    first = next(key for key in taken if key[1].isupper())
    queue.done(first)
    assert len(await take_what_may_run(queue)) == 1, "one place, one key"


@virtually
async def test_unverified_share_is_shared_by_the_groups() -> None:
    queue = shared_queue(workers=64, unverified=16)
    for account in "ABCDEFGHIJ":
        fill(queue, f"x{account}", 4)
        fill(queue, f"y{account}", 4)
    queue.add("zA")
    taken = await take_what_may_run(queue)
    assert "zA" in taken
    assert len(taken) < 16, "what is left is for one more group"
    queue.add("wA")
    assert await take_what_may_run(queue) == ["wA"]


@virtually
async def test_verified_and_unverified_flows_of_a_group_alternate() -> None:
    """A new channel does not wait for a thousand checks of old ones, nor these for a thousand new ones."""
    queue = shared_queue()
    for key in ("xa1", "xa2", "xa3", "xA1", "xA2", "xA3"):
        queue.add(key)
    assert [await take(queue) for _ in range(6)] == ["xa1", "xA1", "xa2", "xA2", "xa3", "xA3"]


@virtually
async def test_flow_that_is_verified_leaves_the_small_share_at_once() -> None:
    """With the keys that run: the first channel of a new account proves the credentials of the others."""
    queue = shared_queue(unverified=2)
    fill(queue, "xA", 10)
    fill(queue, "xB", 10)
    first = await take_what_may_run(queue)
    assert sorted(first) == ["xA0", "xB0"]
    queue.verify("xA")
    taken = await take_what_may_run(queue)
    assert [key[:2] for key in taken].count("xA") == 3, "its own limit is four at first"
    assert [key[:2] for key in taken].count("xB") == 1, "the place that it left"
    for key in (*first, *taken):
        queue.done(key)
    assert queue._unverified == 0


@virtually
async def test_key_that_is_scheduled_earlier_stays_so_if_asked() -> None:
    queue = new_queue()
    queue.add_after("a", 10)
    queue.add_after("a", 30, keep_earlier=True)
    queue.add_after("b", 30)
    queue.add_after("b", 20, keep_earlier=True)
    assert (await take(queue), now()) == ("a", 10)
    assert (await take(queue), now()) == ("b", 20)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_between_groups(seed: int) -> None:
    """Keys of three groups are added, flows verified and paused at random; limits hold, and each add is run."""

    @virtually
    async def story() -> None:
        chance = random.Random(seed)  # noqa: S311
        queue = shared_queue(workers=8, unverified=3, limit=3)
        verified: set[str] = set()
        running: list[str] = []
        added: dict[str, int] = {}
        processed: dict[str, int] = {}

        async def work() -> None:
            while True:
                key = await take(queue)
                running.append(key)
                assert sum(each[1].isupper() and each[:2] not in verified for each in running) <= 3
                assert all(sum(each[0] == group for each in running) <= 6 for group in "xyz")
                processed[key] = added[key]
                await asyncio.sleep(chance.random())
                running.remove(key)
                queue.done(key, succeeded=chance.random() < 0.8)

        workers = [asyncio.ensure_future(work()) for _ in range(8)]
        for count in range(1000):
            key = chance.choice("xyz") + chance.choice("abAB") + chance.choice("123")
            added[key] = count
            queue.add(key)
            if chance.random() < 0.05:
                queue.pause(key[:2], chance.random())
            if chance.random() < 0.01 and key[:2] in queue._flows:
                queue.verify(key[:2])
                verified.add(key[:2])
            await asyncio.sleep(chance.random() / 10)
        await asyncio.wait(workers, timeout=1000)
        assert not any(worker.done() for worker in workers), "no worker failed"
        assert processed == added
        assert (queue._flows, queue._unverified, queue._ready) == ({}, 0, {})
        assert all((each.running, each.unverified) == (0, 0) for each in queue._groups.values())
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)

    story()


@virtually
async def test_thousands_of_flows_that_may_not_run_cost_no_time() -> None:
    """Where the small share is full, the flows that wait for it are not looked at one by one."""
    queue = shared_queue(workers=64, unverified=1)
    queue._flow_of = lambda key: key
    for number in range(2000):
        queue.add(f"xA{number}")
    assert await take(queue) == "xA0"
    asked: list[object] = []
    limit = queue._limit

    def counted(name: object) -> int:
        asked.append(name)
        return limit(name)

    queue._limit = counted  # type: ignore[method-assign]
    queue.add("xa")
    assert await take(queue) == "xa"
    assert len(asked) == 1


# Cancelled workers


@virtually
async def test_cancelled_get_passes_its_wake_up_on() -> None:
    """It is cancelled after it was woken and before it runs: the other worker must get the key."""
    queue = new_queue()
    first = asyncio.ensure_future(take(queue))
    second = asyncio.ensure_future(take(queue))
    await asyncio.sleep(0)
    queue.add("a")  # wakes the first
    first.cancel()
    assert await second == "a"
    assert first.cancelled()


@virtually
async def test_get_cancelled_earlier_is_not_woken() -> None:
    queue = new_queue()
    first = asyncio.ensure_future(take(queue))
    second = asyncio.ensure_future(take(queue))
    await asyncio.sleep(0)
    first.cancel()
    queue.add("a")
    assert await second == "a"


@virtually
async def test_cancelled_get_takes_no_key() -> None:
    queue = new_queue()
    only = asyncio.ensure_future(take(queue))
    await asyncio.sleep(0)
    queue.add("a")
    only.cancel()
    await asyncio.wait({only})
    assert await take(queue) == "a"
