"""Events, resyncs and reconciles in every order that a watch and a network may give: a controller in virtual time."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from smschannel import metrics
from smschannel.api.errors import Expired, KubernetesUnavailable, Refused, TwilioThrottled, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.api.resource import CHECK_NOW_ANNOTATION, FINALIZER
from smschannel.core.record import Key
from tests.unit.memory import (
    BEFORE,
    NAMESPACE,
    OPERATOR_NAMESPACE,
    MemoryApi,
    MemoryTwilio,
    Operator,
    instance,
    raising,
    running,
    sid_of,
    url_of,
)
from tests.unit.virtual_time import virtually

L, M, N = "+61400000003", "+61400000002", "+61400000001"


class Held:
    """Blocks the next call to Twilio of one kind until the test lets it continue."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.arrived = asyncio.Event()
        self.let_through = asyncio.Event()

    async def __call__(self, kind: str, _: str) -> None:
        if kind == self.kind and not self.arrived.is_set():
            self.arrived.set()
            await self.let_through.wait()


# Ordinary life


@virtually
async def test_channel_claims_its_number_and_restores_it() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        assert api.reason(1) == "Configured"
        assert twilio.webhook(N) == url_of(1)
        assert api.records()[N].name == instance(1)
        api.delete(1)
        await asyncio.sleep(1)
        assert api.channel(1) is None
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})
    assert twilio.writes == [(N, url_of(1)), (N, BEFORE)]


@virtually
async def test_new_channel_costs_three_writes_and_one_reconcile() -> None:
    """The events of our own writes must not cause reconciles."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.calls.clear()
        before = metrics.RECONCILES.labels("Configured")._value.get()
        api.apply(1, N)
        await asyncio.sleep(60)
        writes = [method for method, _ in api.calls if method not in {"GET", "LIST"}]
        assert writes == ["PATCH", "POST", "PATCH"], "finalizer, record, status"
        assert metrics.RECONCILES.labels("Configured")._value.get() == before + 1


@virtually
async def test_healthy_channel_is_not_reconciled_at_start() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
    api.calls.clear()
    twilio.calls = 0
    operator = Operator(api, twilio)
    await operator.start()
    await asyncio.sleep(0)
    await operator.stop()
    assert twilio.calls == 0
    assert {method for method, _ in api.calls} == {"GET", "LIST"}, "nothing is written"


@virtually
async def test_restart_configures_what_was_missed() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N, M)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
    api.delete(1)
    api.apply(2, M)
    async with running(api, twilio):
        await asyncio.sleep(1)
        assert api.channel(1) is None
        assert api.reason(2) == "Configured"
    assert twilio.webhook(N) == BEFORE


@virtually
async def test_changed_number_restores_the_old_one_after_the_new_one_works() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N, M)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        api.apply(1, M)
        await asyncio.sleep(1)
        assert api.reason(1) == "Configured"
    assert twilio.writes == [(N, url_of(1)), (M, url_of(1)), (N, BEFORE)]
    assert api.records().keys() == {M}


# Waiting for a number


@virtually
async def test_freed_number_goes_to_the_oldest_waiter_and_the_next_one_keeps_waiting() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N, day=1)
        await asyncio.sleep(1)
        api.apply(3, N, day=3)
        await asyncio.sleep(1)
        api.apply(2, N, day=2)
        await asyncio.sleep(1)
        api.delete(1)
        await asyncio.sleep(10)
        assert (api.reason(2), api.reason(3)) == ("Configured", "NumberInUse")
        api.delete(2)
        await asyncio.sleep(10)
        assert api.reason(3) == "Configured"
        api.delete(3)
        await asyncio.sleep(10)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


@virtually
async def test_oldest_channel_found_at_start_gets_the_number_although_twilio_answers_it_late() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    for n in (2, 1, 3):
        api.apply(n, N, day=n)
    twilio.on_call = held = Held("find")
    async with running(api, twilio):
        await held.arrived.wait()
        await asyncio.sleep(1)
        held.let_through.set()
        await asyncio.sleep(10)
        assert [api.reason(n) for n in (1, 2, 3)] == ["Configured", "NumberInUse", "NumberInUse"]


@virtually
async def test_deleted_waiter_does_not_keep_a_living_one_waiting() -> None:
    """A channel without finalizer is deleted during its own reconcile, and must not stay among the waiters."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N, day=1)
        await asyncio.sleep(1)
        twilio.on_call = held = Held("find")
        api.apply(2, N, day=2)
        await held.arrived.wait()
        api.delete(2)
        held.let_through.set()
        await asyncio.sleep(1)
        api.apply(3, N, day=3)
        await asyncio.sleep(1)
        assert api.reason(3) == "NumberInUse"
        api.delete(1)
        await asyncio.sleep(5)
        assert api.reason(3) == "Configured"


@virtually
async def test_deleted_waiter_does_not_prevent_a_swap() -> None:
    """An older waiter that was deleted would count as the next holder, so the two would wait for each other forever."""
    api, twilio = MemoryApi(), MemoryTwilio(N, M)
    async with running(api, twilio):
        api.apply(1, N, day=5)
        api.apply(2, M, day=6)
        await asyncio.sleep(1)
        twilio.on_call = held = Held("find")
        api.apply(9, M, day=1)
        await held.arrived.wait()
        api.delete(9)
        held.let_through.set()
        await asyncio.sleep(1)
        api.apply(1, M)
        api.apply(2, N)
        await asyncio.sleep(60)
        assert (api.reason(1), api.reason(2)) == ("Configured", "Configured")
        assert (twilio.webhook(N), twilio.webhook(M)) == (url_of(2), url_of(1))
        for n in (1, 2):
            api.delete(n)
        await asyncio.sleep(60)
    assert (twilio.webhook(N), twilio.webhook(M), api.records()) == (BEFORE, BEFORE, {})


@virtually
async def test_channel_with_a_new_number_no_longer_waits_for_the_first() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N, M)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(1)
        api.apply(2, N)
        await asyncio.sleep(1)
        assert operator.channels.waiters(sid_of(N)) == [Key(NAMESPACE, instance(2))]
        api.apply(2, M)
        await asyncio.sleep(1)
        assert api.reason(2) == "Configured"
        assert operator.channels.waiters(sid_of(N)) == []


@virtually
async def test_ring_of_three_swaps() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N, M, "+61400000003")
    phones = [N, M, "+61400000003"]
    async with running(api, twilio):
        for n, phone in enumerate(phones):
            api.apply(n, phone)
        await asyncio.sleep(1)
        for n in range(3):
            api.apply(n, phones[(n + 1) % 3])
        await asyncio.sleep(120)
        assert [api.reason(n) for n in range(3)] == ["Configured"] * 3
        assert [twilio.webhook(phones[(n + 1) % 3]) for n in range(3)] == [url_of(n) for n in range(3)]


@pytest.mark.parametrize("restart", [False, True], ids=["while it runs", "across a restart"])
def test_unreadable_record_still_holds_its_number(restart: bool) -> None:
    """A record that cannot be opened for a while changes neither the number's holder nor its webhook."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        operator = Operator(api, twilio)
        await operator.start()
        api.apply(1, N, day=1)
        await asyncio.sleep(1)
        api.apply(2, N, day=2)
        await asyncio.sleep(1)
        good = api.edit_record(N, {"record": "AAAA"})
        if restart:
            await operator.stop()
            operator = Operator(api, twilio)
            await operator.start()
        await asyncio.sleep(1500)
        assert (api.reason(1), api.reason(2)) == ("RecordUnreadable", "NumberInUse")
        assert twilio.webhook(N) == url_of(1)
        api.edit_record(N, good)
        await asyncio.sleep(700)
        assert (api.reason(1), api.reason(2)) == ("Configured", "NumberInUse"), "the next resync sees the repair"
        for n in (1, 2):
            api.delete(n)
            await asyncio.sleep(400)
        assert (twilio.webhook(N), api.records()) == (BEFORE, {})
        await operator.stop()

    story()


# Events in any order


@virtually
async def test_late_events_of_a_predecessor_do_not_hide_its_successor() -> None:
    """Reads and resyncs overtake the watch, so that its events may be about a channel that was replaced since."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9) as operator:
        api.drops_events = True
        old = api.apply(1, N)
        edited = copy.deepcopy(old)
        edited["metadata"]["generation"] = 2
        api.delete(1)
        new = api.apply(1, N)
        api.drops_events = False
        for kind, event in (("MODIFIED", old), ("ADDED", new), ("MODIFIED", edited), ("DELETED", edited)):
            operator.controller.on_channel(kind, copy.deepcopy(event))
        await asyncio.sleep(5)
        assert api.reason(1) == "Configured"
        cached = operator.channels.get(Key(NAMESPACE, instance(1)))
        assert cached
        assert cached.uid == new["metadata"]["uid"]
        operator.controller.on_channel("DELETED", old)
        assert operator.channels.get(Key(NAMESPACE, instance(1))) is cached, "later, too"


@virtually
async def test_late_answer_to_a_resync_does_not_restore_a_deleted_channel_to_the_cache() -> None:
    """A list that was answered before the deletion, and arrives after it, must not take the number again."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9) as operator:
        api.apply(1, N)
        await asyncio.sleep(1)
        listed, arrives = asyncio.Event(), asyncio.Event()
        pages = api.pages

        async def late_pages(path: str, *args: Any, **options: Any) -> Any:
            found = [each async for each in pages(path, *args, **options)]
            if "smschannels" in path:
                listed.set()
                await arrives.wait()
            for each in found:
                yield each

        api.pages = late_pages  # type: ignore[method-assign]
        api.drops_events = True
        api.annotate(1, note="an edit that the watch missed")
        api.drops_events = False
        resync = asyncio.create_task(operator.controller.resync())
        await listed.wait()
        api.delete(1)
        await asyncio.sleep(1)
        assert (api.channel(1), twilio.webhook(N)) == (None, BEFORE)
        twilio.writes.clear()
        arrives.set()
        await resync
        await asyncio.sleep(600)
    assert (twilio.writes, api.records()) == ([], {})


@virtually
async def test_resync_finds_what_the_watch_missed() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N, M, L)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(1)
        api.apply(3, L)
        await asyncio.sleep(1)
        api.drops_events = True
        api.apply(2, M)
        api.apply(3, L, deletionPolicy="Retain")
        api.delete(1)
        await operator.controller.resync()
        await asyncio.sleep(10)
        assert (api.channel(3) or {})["status"]["observedGeneration"] == 2
        assert api.channel(1) is None
        assert api.reason(2) == "Configured"
    assert (twilio.webhook(N), twilio.webhook(M)) == (BEFORE, url_of(2))


@virtually
async def test_channel_deleted_during_its_reconcile_leaves_nothing_behind() -> None:
    """What it claimed meanwhile is restored at once, not at the next resync."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9):
        twilio.on_call = held = Held("set")
        api.apply(1, N)
        await held.arrived.wait()
        api.delete(1, force=True)
        held.let_through.set()
        await asyncio.sleep(30)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


@virtually
async def test_channel_deleted_during_a_check_that_changes_nothing_leaves_nothing_behind() -> None:
    """Its record had been deleted by hand, so the check claims again, and no status write notices the deletion."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9):
        api.apply(1, N)
        await asyncio.sleep(1)
        del api.objects["secrets", OPERATOR_NAMESPACE, sid_of(N).lower()]
        twilio.on_call = held = Held("find")
        await held.arrived.wait()  # the drift check
        api.delete(1, force=True)
        held.let_through.set()
        await asyncio.sleep(30)
    assert api.records() == {}


@virtually
async def test_channel_deleted_by_force_is_restored_at_once() -> None:
    """Its deletion is the only event, and the resync may be far."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio, resync=1e9):
        api.apply(1, N)
        await asyncio.sleep(1)
        api.delete(1, force=True)
        await asyncio.sleep(5)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


@virtually
async def test_deleted_channel_is_not_read_again() -> None:
    """It has no number and no finalizer, so that its check is still scheduled when it is gone."""
    api = MemoryApi()
    async with running(api, MemoryTwilio(), resync=1e9):
        api.apply(1, N)
        await asyncio.sleep(5)
        assert api.reason(1) == "NumberNotFound"
        api.delete(1)
        api.calls.clear()
        await asyncio.sleep(1800 * 1.3)
    assert [path for _, path in api.calls if path.endswith(instance(1))] == []


@virtually
async def test_finalizer_removed_while_the_operator_was_down_is_added_again() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
    there = api.channel(1)
    assert there
    api._store("smschannels", {**there, "metadata": {**there["metadata"], "finalizers": []}})
    async with running(api, twilio):
        await asyncio.sleep(5)
        there = api.channel(1)
        assert there
        assert there["metadata"]["finalizers"] == [FINALIZER]


@virtually
async def test_removed_finalizer_is_added_again() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        there = api.channel(1)
        assert there
        api._store("smschannels", {**there, "metadata": {**there["metadata"], "finalizers": []}}, "MODIFIED")
        await asyncio.sleep(5)
        there = api.channel(1)
        assert there
        assert there["metadata"]["finalizers"] == [FINALIZER]


# Records


@virtually
async def test_record_repaired_after_its_channel_went_is_restored() -> None:
    """It is found while the operator runs, without a restart."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        good = api.edit_record(N, {"record": "AAAA"})
        api.delete(1)
        await asyncio.sleep(500)
        assert api.channel(1) is None, "the grace period is over"
        assert api.records()[N].restore_since, "the record has the time since when it is to be restored"
        api.edit_record(N, good)
        await asyncio.sleep(700)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


@virtually
async def test_record_found_at_resync_only_is_restored() -> None:
    """A record that this process never saw: another operator's, or one from a restored backup."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
    records = {place: body for place, body in api.objects.items() if place[2] == sid_of(N).lower()}
    async with running(api, twilio):
        api.delete(1)
        await asyncio.sleep(1)
        await twilio.set_webhook(*_anything(), number_sid=sid_of(N), webhook=_webhook(url_of(1)))
        api.objects.update(records)  # etcd was restored
        await asyncio.sleep(700)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


def _anything() -> tuple[Any, Any]:
    return None, ""


def _webhook(url: str) -> Any:
    from smschannel.core.record import Webhook

    return Webhook(url=url, method="POST")


@virtually
async def test_successor_waits_until_its_predecessors_number_is_restored() -> None:
    """One key reconciles the channel and the numbers of its predecessor, so that the previous webhook is never lost."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        twilio.on_call = raising(TwilioUnavailable("Twilio answers HTTP 503."), method="fetch")
        api.delete(1, force=True)
        api.apply(1, N)
        await asyncio.sleep(30)
        assert api.reason(1) == "NumberInUse"
        assert "earlier channel" in str(api.channel(1))
        twilio.on_call = _no_failure
        await asyncio.sleep(300)
        assert api.reason(1) == "Configured"
        api.delete(1)
        await asyncio.sleep(1)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


async def _no_failure(*_: str) -> None:
    """Twilio works again."""


# Metrics and memory follow the truth


def _gauge(gauge: Any) -> float:
    samples = gauge.collect()[0].samples
    [value] = [each.value for each in samples if each.labels in ({}, {"reason": "Configured"})]
    return float(value)


@virtually
async def test_load_that_is_retried_counts_its_channels_once() -> None:
    """A list that expires between two pages is started again, by a new controller."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
    api.on_call = raising(Expired("The provided continue parameter is too old"), method="LIST", path="smschannels")
    with pytest.raises(Expired):
        await Operator(api, twilio).start()
    api.on_call = _no_failure
    async with running(api, twilio):
        assert _gauge(metrics.CHANNELS) == 1


@virtually
async def test_check_now_set_while_the_operator_was_down_is_handled_once() -> None:
    """The status has the last handled request, so nothing needs to be remembered."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
    api.annotate(1, **{CHECK_NOW_ANNOTATION: "now"})
    twilio.calls = 0
    async with running(api, twilio):
        await asyncio.sleep(5)
        assert twilio.calls > 0
        status = (api.channel(1) or {})["status"]
        assert status["lastHandledCheckNow"] == "now"
    twilio.calls = 0
    operator = Operator(api, twilio)
    await operator.start()
    await asyncio.sleep(0)
    await operator.stop()
    assert twilio.calls == 0


@virtually
async def test_check_now_during_an_outage_is_handled_afterwards() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        twilio.on_call = raising(TwilioUnavailable("Twilio answers HTTP 503."))
        api.annotate(1, **{CHECK_NOW_ANNOTATION: "now"})
        await asyncio.sleep(60)
        assert "lastHandledCheckNow" not in (api.channel(1) or {})["status"]
        twilio.on_call = _no_failure
        await asyncio.sleep(600)
        assert (api.channel(1) or {})["status"]["lastHandledCheckNow"] == "now"


@virtually
async def test_check_now_of_a_new_channel_during_an_outage_is_handled_afterwards() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        twilio.on_call = raising(TwilioUnavailable("Twilio answers HTTP 503."))
        api.apply(1, N)
        api.annotate(1, **{CHECK_NOW_ANNOTATION: "now"})
        await asyncio.sleep(60)
        assert api.reason(1) == "TwilioUnavailable"
        assert "lastHandledCheckNow" not in (api.channel(1) or {})["status"]


@virtually
async def test_failing_reconciles_of_deleted_channels_leave_nothing_in_the_queue() -> None:
    """50 channels, each deleted during its own first reconcile."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        for n in range(50):
            twilio.on_call = held = Held("find")
            api.apply(n, N)
            await held.arrived.wait()
            api.delete(n)
            held.let_through.set()
            await asyncio.sleep(0.1)
        await asyncio.sleep(7200)
        queue = operator.controller._queue
        assert (queue._failures, queue._scheduled) == ({}, {})
        assert len(operator.channels) == 0
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})


@virtually
async def test_pending_restores_are_counted_during_an_outage() -> None:
    """A number that Twilio refuses to restore is pending, whatever the results of the next reconciles."""
    api, twilio = MemoryApi(), MemoryTwilio(N, M)
    refused = Refused(Reason.WebhookRefused, "Twilio refuses the webhook.")
    async with running(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(1)
        twilio.on_call = raising(refused, method="set", path=BEFORE)
        api.apply(1, M)
        await asyncio.sleep(20)
        assert (api.reason(1), _gauge(metrics.PENDING_RESTORES)) == ("Configured", 1)
        twilio.on_call = raising(TwilioUnavailable("Twilio answers HTTP 503."))
        await asyncio.sleep(700)
        assert _gauge(metrics.PENDING_RESTORES) == 1
        twilio.on_call = _no_failure
        await asyncio.sleep(700)
        assert _gauge(metrics.PENDING_RESTORES) == 0


# Checks that are asked for are spaced out within a namespace


def _handled(api: MemoryApi, n: int, namespace: str = NAMESPACE) -> str:
    return str((api.channel(n, namespace) or {})["status"].get("lastHandledCheckNow", ""))


@asynccontextmanager
async def _many(count: int) -> AsyncIterator[tuple[MemoryApi, MemoryTwilio, Operator]]:
    """Run an operator with `count` configured channels."""
    numbers = [f"+6140000{n:04d}" for n in range(count)]
    api, twilio = MemoryApi(), MemoryTwilio(*numbers)
    async with running(api, twilio, workers=64) as operator:
        for n, number in enumerate(numbers):
            api.apply(n, number)
        await asyncio.sleep(30)
        assert {api.reason(n) for n in range(count)} == {"Configured"}
        yield api, twilio, operator


@virtually
async def test_checks_beyond_the_burst_are_delayed_and_never_lost() -> None:
    async with _many(400) as (api, _, operator):
        for n in range(400):
            api.annotate(n, **{CHECK_NOW_ANNOTATION: "now"})
        await asyncio.sleep(5)
        handled = sum(_handled(api, n) == "now" for n in range(400))
        assert 300 <= handled <= 300 + 5 * 10
        assert not any(cached.body for _, cached in operator.channels), "those that wait are read when they are due"
        await asyncio.sleep(7)
        assert all(_handled(api, n) == "now" for n in range(400))


@virtually
async def test_check_asked_for_again_while_it_waits_keeps_its_place() -> None:
    """Otherwise a loop that touches all channels would push them, and all others of the namespace, back forever."""
    async with _many(400) as (api, _, _):
        for n in range(400):
            api.annotate(n, **{CHECK_NOW_ANNOTATION: "0"})
        for second in range(1, 10):
            await asyncio.sleep(1)
            for n in range(350, 400):
                api.annotate(n, **{CHECK_NOW_ANNOTATION: str(second)})
        await asyncio.sleep(3)
        first = [_handled(api, n) for n in range(350, 400)]
        assert "" not in first, "each was handled once, in the ten seconds that the first round takes"
        await asyncio.sleep(10)
        assert {_handled(api, n) for n in range(350, 400)} == {"9"}, "and the last request of each is handled, too"


@virtually
async def test_edit_does_not_wait_for_a_check_that_does() -> None:
    async with _many(400) as (api, _, _):
        for n in range(400):
            api.annotate(n, **{CHECK_NOW_ANNOTATION: "now"})
        api.apply(399, "+61400000399", driftPolicy="Report")
        await asyncio.sleep(2)
        assert _handled(api, 399) == "now", "one reconcile does both"
        assert (api.channel(399) or {})["status"]["observedGeneration"] == 2
        assert _handled(api, 398) == ""
        api.delete(398)
        await asyncio.sleep(1)
        assert api.channel(398) is None, "nor does a deletion"


@virtually
async def test_check_asked_for_during_a_reconcile_is_not_lost_if_it_must_wait() -> None:
    """The reconcile schedules the next drift check when it ends, which must not replace the check."""
    async with _many(400) as (api, twilio, _):
        twilio.on_call = held = Held("find")
        for n in range(1, 400):
            api.annotate(n, **{CHECK_NOW_ANNOTATION: "now"})
        await asyncio.sleep(30)
        twilio.on_call = held = Held("find")
        for n in range(400):
            api.annotate(n, **{CHECK_NOW_ANNOTATION: "again"})
        await held.arrived.wait()
        api.annotate(0, **{CHECK_NOW_ANNOTATION: "during its own reconcile"})
        held.let_through.set()
        await asyncio.sleep(60)
        assert _handled(api, 0) == "during its own reconcile"


# Outages


@virtually
async def test_pause_requested_by_twilio_pauses_the_whole_account() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(*(f"+6140000{n:04d}" for n in range(50)))
    async with running(api, twilio):
        for n in range(50):
            api.apply(n, f"+6140000{n:04d}")
        await asyncio.sleep(5)
        throttled = raising(TwilioThrottled("Twilio answers HTTP 429.", 100))
        twilio.on_call, twilio.calls = throttled, 0
        for n in range(50):
            api.annotate(n, **{CHECK_NOW_ANNOTATION: "now"})
        await asyncio.sleep(90)
        assert twilio.calls <= 2 * 8, "what ran already; the others wait in the queue"
        twilio.on_call = _no_failure
        await asyncio.sleep(120)
        handled = [(api.channel(n) or {})["status"].get("lastHandledCheckNow") for n in range(50)]
        assert handled == ["now"] * 50


@pytest.mark.parametrize("hang", [5.0, 15.0])
def test_deletion_ends_with_the_grace_period_and_one_timeout(hang: float) -> None:
    """A reconcile that starts before the grace period ends, and ends after it, removes the finalizer."""
    took: list[float] = []

    async def story(offset: float) -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)

        async def hanging(*_: str) -> None:
            await asyncio.sleep(hang)
            raise TwilioUnavailable("Twilio does not answer.")

        async with running(api, twilio):
            api.apply(1, N)
            await asyncio.sleep(1 + offset)
            twilio.on_call = hanging
            started = asyncio.get_running_loop().time()
            api.delete(1)
            while api.channel(1) is not None:  # noqa: ASYNC110  (virtual)
                await asyncio.sleep(0.1)
            took.append(asyncio.get_running_loop().time() - started)

    for offset in range(20):
        virtually(lambda offset=offset: story(offset / 3))()  # type: ignore[misc]
    assert max(took) <= 120 + hang + 2, f"{max(took):.0f} s"


@virtually
async def test_kubernetes_outage_is_survived() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio):
        api.on_call = raising(KubernetesUnavailable("the API server does not answer"))
        api.apply(1, N)
        await asyncio.sleep(100)
        api.on_call = _no_failure
        await asyncio.sleep(400)
        assert api.reason(1) == "Configured"
        api.delete(1)
        await asyncio.sleep(1)
    assert (twilio.webhook(N), api.records()) == (BEFORE, {})
