"""The work queue: one turn at a time for a key, its last word on later turns, and lanes that leave room for others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smschannel.queue import WorkQueue
from tests.unit.virtual_time import VirtualTime, now, virtually

FLOOR, CEILING = 1.0, 60.0

Queue = WorkQueue[str]


def queue(share: int = 10, lane_of: Callable[[str], str] = lambda key: key[0]) -> Queue:
    """A key's lane is its first letter."""
    return WorkQueue(lane_of=lane_of, lane_share=share, retry_floor=FLOOR, retry_ceiling=CEILING)


async def take(waiting: Queue) -> str:
    key, _ = await waiting.get()
    return key


async def is_idle(waiting: Awaitable[object], seconds: float = 1000) -> bool:
    """Whether nothing comes of it for so long."""
    try:
        await asyncio.wait_for(waiting, seconds)
    except TimeoutError:
        return True
    return False


# A key's turns


@virtually
async def test_a_key_is_in_the_queue_once() -> None:
    waiting = queue()
    for _ in range(3):
        waiting.add("a")
    assert len(waiting) == 1
    assert await take(waiting) == "a"
    waiting.done("a")
    assert await is_idle(waiting.get())


@virtually
async def test_keys_of_a_lane_come_in_turn() -> None:
    waiting = queue()
    for key in ("a1", "a2", "a3"):
        waiting.add(key)
    assert [await take(waiting) for _ in range(3)] == ["a1", "a2", "a3"]


@virtually
async def test_it_is_told_how_long_a_key_waited() -> None:
    waiting = queue()
    waiting.add("a")
    assert await is_idle(asyncio.get_running_loop().create_future(), 5)
    waiting.add("a")
    assert await waiting.get() == ("a", 5)


@virtually
async def test_what_is_added_during_a_turn_gets_one_more_afterwards() -> None:
    waiting = queue()
    waiting.add("a")
    await take(waiting)
    waiting.add("a")
    waiting.add("a")
    assert len(waiting) == 0, "it is in a worker's hands"
    assert await is_idle(waiting.get()), "never in two workers' hands"
    waiting.done("a")
    assert await take(waiting) == "a"
    waiting.done("a")
    assert await is_idle(waiting.get()), "one more, however often it was added"


@virtually
async def test_no_key_is_in_two_workers_hands_and_none_is_forgotten() -> None:
    """Eight workers, keys added all the time from everywhere: a turn follows each add."""
    waiting, chance = queue(share=3), random.Random(7)  # noqa: S311
    busy: set[str] = set()
    added: dict[str, int] = {}
    seen: dict[str, int] = {}

    async def work() -> None:
        while True:
            key = await take(waiting)
            assert key not in busy
            busy.add(key)
            seen[key] = added[key]
            await asyncio.sleep(chance.random())
            busy.remove(key)
            waiting.done(key)

    async def feed() -> None:
        for count in range(500):
            key = chance.choice("abc") + chance.choice("123")
            added[key] = count
            if chance.random() < 0.3:
                waiting.add_after(key, chance.random())
            else:
                waiting.add(key)
            await asyncio.sleep(chance.random() / 10)

    workers = [asyncio.ensure_future(work()) for _ in range(8)]
    await feed()
    await asyncio.wait(workers, timeout=1000)
    assert not any(worker.done() for worker in workers), "no worker failed"
    assert seen == added
    assert len(waiting) == 0
    for worker in workers:
        worker.cancel()
    await asyncio.wait(workers)


# Later turns


@virtually
async def test_a_later_turn_comes_when_it_is_due() -> None:
    waiting = queue()
    waiting.add_after("late", 20)
    waiting.add_after("soon", 10)
    assert len(waiting) == 0
    assert (await take(waiting), now()) == ("soon", 10)
    assert (await take(waiting), now()) == ("late", 20)


@virtually
async def test_the_last_word_on_a_later_turn_counts() -> None:
    waiting = queue()
    waiting.add_after("a", 10)
    waiting.add_after("a", 30)
    waiting.add_after("b", 30)
    waiting.add_after("b", 10)
    assert (await take(waiting), now()) == ("b", 10)
    assert (await take(waiting), now()) == ("a", 30)
    waiting.done("a")
    waiting.done("b")
    assert await is_idle(waiting.get()), "there was one later turn each"


@virtually
async def test_a_later_turn_stays_when_the_key_is_added_for_now() -> None:
    waiting = queue()
    waiting.add_after("a", 10)
    assert waiting.planned("a")
    waiting.add("a")
    assert (await take(waiting), now()) == ("a", 0)
    waiting.done("a")
    assert waiting.planned("a")
    assert (await take(waiting), now()) == ("a", 10)
    assert not waiting.planned("a")


@virtually
async def test_a_dropped_key_has_no_later_turn() -> None:
    waiting = queue()
    waiting.add_after("a", 10)
    waiting.drop("a")
    assert not waiting.planned("a")
    assert await is_idle(waiting.get())


@virtually
async def test_a_dropped_key_that_waits_has_its_turn() -> None:
    waiting = queue()
    waiting.add("a")
    waiting.drop("a")
    assert await take(waiting) == "a"


@virtually
async def test_a_dropped_key_may_be_planned_again() -> None:
    waiting = queue()
    waiting.add_after("a", 10)
    waiting.drop("a")
    waiting.add_after("a", 30)
    assert (await take(waiting), now()) == ("a", 30)


@virtually
async def test_a_later_turn_that_comes_during_a_turn_follows_it() -> None:
    waiting = queue()
    waiting.add("a")
    await take(waiting)
    waiting.add_after("a", 10)
    assert await is_idle(waiting.get(), 20)
    waiting.done("a")
    assert (await take(waiting), now()) == ("a", 20)


def test_a_clock_of_ones_own_tells_when_turns_are_due() -> None:
    async def story() -> None:
        clock = {"now": 100.0}
        waiting: Queue = WorkQueue(
            lane_of=lambda key: key, lane_share=1, retry_floor=1, retry_ceiling=1, clock=lambda: clock["now"]
        )
        waiting.add_after("a", 10)
        assert await is_idle(waiting.get(), 9)
        clock["now"] = 111.0
        assert await take(waiting) == "a"

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(story())


# Backoff


@virtually
async def test_a_backoff_doubles_between_floor_and_ceiling() -> None:
    waiting = queue()
    for failures in range(1, 100):
        delay = waiting.retry("a")
        assert FLOOR <= delay <= min(CEILING, FLOOR * 2**failures)
    delays = [waiting.retry("a") for _ in range(200)]
    assert max(delays) > CEILING / 2, "it grows to the ceiling"
    assert min(delays) < CEILING / 2, "full jitter: those that failed together do not come back together"


@virtually
async def test_an_error_plans_the_turn_that_it_says() -> None:
    waiting = queue()
    delay = waiting.retry("a")
    assert waiting.planned("a")
    assert await take(waiting) == "a"
    assert now() == pytest.approx(delay)


@virtually
async def test_twilio_may_ask_for_more_than_the_backoff_never_for_less() -> None:
    waiting = queue()
    assert waiting.retry("a", at_least=500) == 500, "even beyond the ceiling"
    assert waiting.retry("b", at_least=0) >= FLOOR


@virtually
async def test_what_is_forgiven_or_dropped_begins_at_the_floor_again() -> None:
    waiting = queue()
    for again in (waiting.forgive, waiting.drop):
        for _ in range(20):
            waiting.retry("a")
        again("a")
        assert waiting.retry("a") <= 2 * FLOOR
        again("a")


@settings(deadline=None)
@given(floor=st.floats(0.001, 10), factor=st.floats(1, 1000), failures=st.integers(1, 2000))
def test_every_backoff_lies_between_floor_and_ceiling(floor: float, factor: float, failures: int) -> None:
    async def story() -> None:
        waiting: Queue = WorkQueue(
            lane_of=lambda key: key, lane_share=1, retry_floor=floor, retry_ceiling=floor * factor
        )
        delays = [waiting.retry("a") for _ in range(failures)]
        assert floor <= delays[-1] <= floor * factor * 1.000001

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(story())


# Lanes


@virtually
async def test_a_lane_holds_only_its_share_and_the_others_go_on() -> None:
    waiting = queue(share=2)
    for key in ("a1", "a2", "a3", "b1"):
        waiting.add(key)
    assert {await take(waiting) for _ in range(3)} == {"a1", "a2", "b1"}
    assert await is_idle(waiting.get()), "a3 waits for its lane"
    waiting.add("c1")
    assert await take(waiting) == "c1"
    waiting.done("b1")
    assert await is_idle(waiting.get()), "another lane's end is no room in this one"
    waiting.done("a2")
    assert await take(waiting) == "a3"


@virtually
async def test_lanes_take_turns() -> None:
    waiting = queue()
    for key in ("a1", "a2", "a3", "b1", "c1"):
        waiting.add(key)
    assert [await take(waiting) for _ in range(5)] == ["a1", "b1", "c1", "a2", "a3"]


@virtually
async def test_room_in_a_lane_wakes_a_worker_that_waits() -> None:
    waiting = queue(share=1)
    waiting.add("a1")
    waiting.add("a2")
    await take(waiting)
    worker = asyncio.ensure_future(take(waiting))
    await asyncio.sleep(0)
    waiting.done("a1")
    assert await worker == "a2"


@virtually
async def test_a_key_that_changes_its_lane_during_a_turn_gives_back_the_place_it_took() -> None:
    lanes = {"x": "old", "y": "old"}
    waiting = queue(share=1, lane_of=lanes.__getitem__)
    waiting.add("x")
    await take(waiting)
    waiting.add("y")
    lanes["x"] = "new"
    waiting.add("x")
    waiting.done("x")
    assert {await take(waiting), await take(waiting)} == {"x", "y"}
    waiting.done("x")
    waiting.done("y")
    waiting.add("y")
    assert await take(waiting) == "y"


# A lane earns its share


async def held(waiting: Queue, lane: str) -> list[str]:
    """Takes all that the lane may have now."""
    taken = []
    while not await is_idle(key := asyncio.ensure_future(take(waiting)), 1):
        assert key.result().startswith(lane)
        taken.append(key.result())
    return taken


def fill(waiting: Queue, lane: str, count: int = 100) -> None:
    for number in range(count):
        waiting.add(f"{lane}{number}")


@virtually
async def test_a_lane_begins_with_a_few_turns_and_each_that_went_well_earns_one_more() -> None:
    """Nothing is known of an account at first: it must not have half of the workers to hang on to."""
    waiting = queue(share=8)
    fill(waiting, "a")
    taken = await held(waiting, "a")
    assert len(taken) == 4
    for most in (5, 6, 7, 8, 8, 8):
        waiting.done(taken.pop(0))
        taken += await held(waiting, "a")
        assert len(taken) == most, "one for the turn that ended, one more, and never more than the share"


@virtually
async def test_a_lane_whose_turn_did_not_go_well_has_one_turn_at_a_time() -> None:
    """Those under way are let end; none is begun until they have."""
    waiting = queue(share=8)
    fill(waiting, "a")
    first, *others = await held(waiting, "a")
    waiting.done(first, well=False)
    for key in others[:-1]:
        assert await held(waiting, "a") == []
        waiting.done(key, well=False)
    waiting.done(others[-1], well=False)
    for _ in range(3):
        [only] = await held(waiting, "a")
        waiting.done(only, well=False)


@virtually
async def test_a_lane_that_recovers_earns_its_share_again() -> None:
    waiting = queue(share=8)
    fill(waiting, "a")
    taken = await held(waiting, "a")
    for key in taken:
        waiting.done(key, well=False)
    taken = []
    for most in (1, 2, 3, 4, 5, 6, 7, 8, 8):
        taken += await held(waiting, "a")
        assert len(taken) == most
        waiting.done(taken.pop(0))


@virtually
async def test_one_bad_turn_takes_back_what_was_earned_before_it() -> None:
    """Turns that began in better times and end well after it earn anew from one."""
    waiting = queue(share=8)
    fill(waiting, "a")
    taken = await held(waiting, "a")
    for _ in range(4):
        waiting.done(taken.pop(0))
        taken += await held(waiting, "a")
    assert len(taken) == 8
    waiting.done(taken.pop(0), well=False)
    for _ in range(3):
        waiting.done(taken.pop(0))
    assert await held(waiting, "a") == [], "four are under way, and four is what it has earned"
    waiting.done(taken.pop(0))
    assert len(await held(waiting, "a")) == 2


@virtually
async def test_what_a_lane_earned_or_lost_is_its_own() -> None:
    waiting = queue(share=8)
    for lane in "ab":
        waiting.add(f"{lane}0")
        key = await take(waiting)
        waiting.done(key, well=lane == "a")
    for lane, most in (("a", 5), ("b", 1), ("c", 4)):
        fill(waiting, lane)
        assert len(await held(waiting, lane)) == most


@pytest.mark.parametrize("share", [1, 2, 3])
def test_a_share_may_be_smaller_than_what_a_lane_begins_with(share: int) -> None:
    """With two workers in all, half of them is one."""

    @virtually
    async def story() -> None:
        waiting = queue(share=share)
        fill(waiting, "a")
        for _ in range(3):
            taken = await held(waiting, "a")
            assert len(taken) == share
            for key in taken:
                waiting.done(key)

    story()


@virtually
async def test_a_turn_that_earned_one_more_wakes_two_workers() -> None:
    """The one that ended its turn may be busy elsewhere by then."""
    waiting = queue(share=8)
    fill(waiting, "a")
    taken = await held(waiting, "a")
    workers = [asyncio.ensure_future(take(waiting)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting.done(taken[0])
    await asyncio.sleep(1)
    assert [worker.done() for worker in workers] == [True, True, False]
    workers[2].cancel()


class Workers:
    """Workers whose turns take as long, and end as well, as their lane does."""

    def __init__(self, waiting: Queue, count: int, turns: dict[str, tuple[float, bool]]) -> None:
        self.ended: dict[str, list[float]] = {}
        self._waiting, self._turns = waiting, turns
        self._tasks = [asyncio.ensure_future(self._work()) for _ in range(count)]

    async def _work(self) -> None:
        while True:
            key = await take(self._waiting)
            seconds, well = self._turns[key[0]]
            await asyncio.sleep(seconds)
            self._waiting.done(key, well=well)
            self.ended.setdefault(key[0], []).append(now())

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


@virtually
async def test_many_accounts_that_hang_leave_workers_for_the_others() -> None:
    """Three of four accounts hang, with hundreds of turns that were there first. Sixteen workers, of which they have
    twelve at first and three from the first time-out on: the fourth account never has less than its own four.
    """
    waiting = queue(share=8)
    hanging = dict.fromkeys("abc", (15.0, False))
    for lane in hanging:
        fill(waiting, lane, 300)
    fill(waiting, "d", 200)
    workers = Workers(waiting, 16, {**hanging, "d": (1.0, True)})
    await asyncio.sleep(100)
    assert len(workers.ended["d"]) == 200
    assert workers.ended["d"][-1] <= 50, "no slower than with four workers of its own"
    assert [len(workers.ended[lane]) for lane in hanging] == [4 + 5] * 3, "one turn at a time after the first four"
    await workers.stop()


@virtually
async def test_every_key_has_its_turns_however_they_end() -> None:
    """Shares come and go at random: no lane stands still with keys in it while workers are idle."""
    waiting, chance = queue(share=6), random.Random(11)  # noqa: S311
    added: dict[str, int] = {}
    seen: dict[str, int] = {}

    async def work() -> None:
        while True:
            key = await take(waiting)
            seen[key] = added[key]
            await asyncio.sleep(chance.random())
            waiting.done(key, well=chance.random() < 0.7)

    workers = [asyncio.ensure_future(work()) for _ in range(12)]
    for count in range(1000):
        key = chance.choice("abcd") + chance.choice("123456789")
        added[key] = count
        waiting.add(key)
        await asyncio.sleep(chance.random() / 20)
    await asyncio.wait(workers, timeout=1000)
    assert seen == added
    assert len(waiting) == 0
    for worker in workers:
        worker.cancel()
    await asyncio.wait(workers)


# Workers that go away


@virtually
async def test_a_cancelled_get_loses_no_wake_up() -> None:
    """Cancelled in the very moment between its wake-up and its run: the other worker must have the key."""
    waiting = queue()
    first = asyncio.ensure_future(take(waiting))
    second = asyncio.ensure_future(take(waiting))
    await asyncio.sleep(0)
    waiting.add("a")  # wakes the first
    first.cancel()
    assert await second == "a"
    assert first.cancelled()


@virtually
async def test_a_get_cancelled_before_is_not_woken() -> None:
    waiting = queue()
    first = asyncio.ensure_future(take(waiting))
    second = asyncio.ensure_future(take(waiting))
    await asyncio.sleep(0)
    first.cancel()
    waiting.add("a")
    assert await second == "a"


@virtually
async def test_a_cancelled_get_takes_no_key_with_it() -> None:
    waiting = queue()
    only = asyncio.ensure_future(take(waiting))
    await asyncio.sleep(0)
    waiting.add("a")
    only.cancel()
    await asyncio.wait({only})
    assert await take(waiting) == "a"
