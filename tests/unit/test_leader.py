"""Leader election: what a candidate does about each Lease, and that nobody writes to Twilio after another has begun."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from smschannel.api.errors import ChannelError, Conflict, KubernetesRefused, KubernetesUnavailable, NotFound
from smschannel.api.kube_client import KubeClient, Object
from smschannel.leader import (
    DURATION,
    LONGEST,
    MARGIN,
    Claim,
    Decision,
    Elector,
    Lease,
    Lost,
    Renew,
    View,
    Wait,
    boottime,
    decide,
    identify,
    unless,
)
from tests.unit.virtual_time import now, virtually

NOW = 1000.0
OWN = Lease("me", 3, "mine", "r1", 30)
OTHER = Lease("other", 4, "theirs", "r1", 30)
LEADING = View("me", 30, is_first=False, seen=OWN, since=NOW - 5, own=OWN, ends=NOW + 25)
STANDING_BY = View("me", 30, is_first=False, seen=OTHER, since=NOW - 10)
FRESH = View("me", 30)

ROWS: list[tuple[str, Lease | None, View, Decision]] = [
    ("the first operator creates the Lease", None, FRESH, Claim()),
    ("a released Lease is free at once", Lease("", 3, "a", "r2", 1), FRESH, Claim()),
    ("also for one that saw its holder before", Lease("", 4, "theirs", "r2", 1), STANDING_BY, Claim()),
    ("another holder is observed for a whole duration, whatever its times say", OTHER, FRESH, Wait("other", NOW + 30)),
    ("a holder that was not renewed yet has the rest of its duration", OTHER, STANDING_BY, Wait("other", NOW + 20)),
    (
        "a renewal begins the duration again",
        Lease("other", 4, "theirs", "r2", 30),
        STANDING_BY,
        Wait("other", NOW + 30),
    ),
    (
        "a holder that was silent for its duration is dead",
        OTHER,
        View("me", 30, is_first=False, seen=OTHER, since=NOW - 30),
        Claim(),
    ),
    (
        "a holder with a longer duration has that time",
        Lease("other", 4, "theirs", "r1", 90),
        FRESH,
        Wait("other", NOW + 90),
    ),
    (
        "a shorter one is not believed: somebody else may have written it",
        Lease("other", 4, "theirs", "r1", 1),
        FRESH,
        Wait("other", NOW + 30),
    ),
    (
        "nor is one that would block everybody for years",
        Lease("other", 4, "theirs", "r1", 10**9),
        FRESH,
        Wait("other", NOW + LONGEST),
    ),
    (
        "a pod's container that starts again goes on: its former process has ended",
        Lease("me", 3, "earlier", "r1", 30),
        FRESH,
        Claim(),
    ),
    (
        "but later the same identity is another process of this pod",
        Lease("me", 3, "earlier", "r1", 30),
        View("me", 30, is_first=False, seen=Lease("me", 3, "earlier", "r1", 30), since=NOW - 10),
        Wait("me", NOW + 20),
    ),
    (
        "a claim whose answer was lost is there after all",
        OWN,
        View("me", 30, is_first=False, own=OWN),
        Renew(),
    ),
    (
        "a Lease that was deleted is not free while its holder may not know that",
        None,
        STANDING_BY,
        Wait("other", NOW + 20),
    ),
    (
        "it is when the holder's time is over",
        None,
        View("me", 30, is_first=False, seen=OTHER, since=NOW - 31),
        Claim(),
    ),
    ("the leader renews", OWN, LEADING, Renew()),
    ("also if somebody changed the times", Lease("me", 3, "mine", "r9", 1), LEADING, Renew()),
    ("and creates a Lease that was deleted", None, LEADING, Renew()),
    ("a leader that finds another one stops", OTHER, LEADING, Lost("it was taken by other")),
    (
        "a leader whose name somebody removed stops",
        Lease("", 3, "mine", "r2", 1),
        LEADING,
        Lost("somebody removed its holder"),
    ),
    (
        "a leader that finds its own name in another term is one of two processes with that name",
        Lease("me", 4, "later", "r1", 30),
        LEADING,
        Lost("another process took it with the same identity, me"),
    ),
    (
        "a leader whose time is over stops without asking, as after SIGSTOP",
        OWN,
        View("me", 30, is_first=False, seen=OWN, since=NOW - 40, own=OWN, ends=NOW - 10),
        Lost("it could not be renewed in time"),
    ),
    (
        "and does so before others may begin",
        OWN,
        View("me", 30, is_first=False, seen=OWN, since=NOW - 27, own=OWN, ends=NOW + MARGIN),
        Lost("it could not be renewed in time"),
    ),
]


@pytest.mark.parametrize(("lease", "view", "right"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_decision(lease: Lease | None, view: View, right: Decision) -> None:
    assert decide(lease, view, NOW) == right


@pytest.mark.parametrize(
    ("body", "right", "reason"),
    [
        ({}, Lease(), "a Lease without a spec says nothing"),
        ({"spec": None}, Lease(), "null is nothing"),
        ({"spec": {"holderIdentity": None, "leaseTransitions": None, "renewTime": None}}, Lease(), "as in each field"),
        ({"spec": {"holderIdentity": "a", "strategy": "OldestEmulationVersion"}}, Lease("a"), "others are ignored"),
    ],
)
def test_lease_of_anybody_can_be_read(body: Object, right: Lease, reason: str) -> None:
    assert Lease.of(body) == right, reason


def test_clock_goes_on_while_the_machine_sleeps() -> None:
    """And nobody can set it: it is not the clock of the day."""
    first = boottime()
    assert 0 < boottime() - first < 60


class MemoryLease:
    """A `KubeClient` with one Lease. Calls take `latency` seconds; `on_call` may delay a call or make it fail."""

    def __init__(self) -> None:
        self.body: Object | None = None
        self.latency = 0.01
        self.on_call: Callable[[str], Awaitable[None]] = self._at_once
        self.calls: list[str] = []
        self._version = 0

    async def _at_once(self, method: str) -> None:
        """Neither delay the call nor fail."""

    async def request(self, method: str, path: str, body: Object | None = None, **_: Any) -> Object:
        self.calls.append(method)
        await asyncio.sleep(self.latency / 2)
        await self.on_call(method)
        answer = self._answer(method, body)
        await asyncio.sleep(self.latency / 2)
        return answer

    def _answer(self, method: str, body: Object | None) -> Object:
        if method != "POST" and self.body is None:
            raise NotFound("not found", "sms-channel-operator")
        if method == "POST" and self.body is not None:
            raise Conflict("already exists")
        if method == "PUT" and body and body["metadata"]["resourceVersion"] != self.version:
            raise Conflict("the object has been modified")
        if method != "GET":
            self.write(body or {})
        return copy.deepcopy(self.body or {})

    @property
    def version(self) -> str:
        return str((self.body or {}).get("metadata", {}).get("resourceVersion"))

    def write(self, body: Object) -> None:
        """Store the Lease as it is given, whoever writes it."""
        self._version += 1
        self.body = {**body, "metadata": {**body.get("metadata", {}), "resourceVersion": str(self._version)}}

    def edit(self, **spec: Any) -> None:
        """As an administrator does with kubectl."""
        assert self.body
        self.write({**self.body, "spec": {**self.body["spec"], **spec}})

    @property
    def spec(self) -> Object:
        assert self.body
        return cast(Object, self.body["spec"])


def elector(api: MemoryLease, name: str, clock: Callable[[], float] = now) -> Elector:
    return Elector(cast(KubeClient, api), "sms-operator", name, clock=clock)


async def hang(method: str) -> None:
    await asyncio.sleep(10**6)


@virtually
async def test_one_leads_and_the_other_takes_over_within_a_second_of_the_release() -> None:
    api = MemoryLease()
    first, second = elector(api, "first"), elector(api, "second")
    await first.campaign()
    standby = asyncio.create_task(second.campaign())
    await asyncio.sleep(300)
    assert first.is_leading
    assert not second.is_leading
    released = now()
    await first.release()
    assert not first.is_leading
    assert first.lost.is_set()
    await standby
    assert now() - released <= 1.2
    assert (api.spec["holderIdentity"], api.spec["leaseTransitions"]) == ("second", 1)
    await second.release()
    assert api.spec["holderIdentity"] is None
    assert api.spec["leaseTransitions"] == 1, "the count of transitions is kept"


@virtually
async def test_dead_leader_is_replaced_when_its_lease_has_ended() -> None:
    api = MemoryLease()
    first, second = elector(api, "first"), elector(api, "second")
    await first.campaign()
    standby = asyncio.create_task(second.campaign())
    await asyncio.sleep(100)
    assert first._renewing
    first._renewing.cancel()  # as kill -9 ends it
    died = now()
    await standby
    assert DURATION - 6 <= now() - died <= DURATION + 2.2  # two looks: at its last renewal, and at its end
    await second.release()


@virtually
async def test_restarted_process_of_a_pod_leads_at_once() -> None:
    api = MemoryLease()
    await elector(api, "pod").campaign()
    again = elector(api, "pod")
    started = now()
    await again.campaign()
    assert now() - started < 0.1
    assert api.spec["leaseTransitions"] == 1
    await again.release()


@virtually
async def test_two_processes_with_one_name_do_not_both_lead() -> None:
    """The later one goes on; the earlier one stops at its next renewal, and does not take the lease back."""
    api = MemoryLease()
    earlier, later = elector(api, "pod"), elector(api, "pod")
    await earlier.campaign()
    await later.campaign()
    await asyncio.sleep(5.1)
    assert earlier.lost.is_set()
    standby = asyncio.create_task(earlier.campaign())
    await asyncio.sleep(300)
    assert later.is_leading
    assert not earlier.is_leading
    standby.cancel()
    await later.release()


class PausedClock:
    """A process's clock; while the process is stopped it cannot look at it, and afterwards it has gone on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return now() + self.ahead


@virtually
async def test_process_that_was_stopped_for_longer_than_its_lease_writes_nothing() -> None:
    """SIGSTOP and SIGCONT: whatever code runs first after it, `outlasts` is False at once."""
    api, clock = MemoryLease(), PausedClock()
    stopped = elector(api, "stopped", clock)
    await stopped.campaign()
    assert stopped.outlasts(15)
    clock.ahead = 60
    assert not stopped.outlasts(0)
    assert not stopped.is_leading
    await asyncio.wait_for(stopped.lost.wait(), 5.1)
    await stopped.release()


@virtually
async def test_write_begins_only_while_it_must_end_before_another_may_lead() -> None:
    """However the API server fails: whoever takes over does so after the last write could have ended."""
    api = MemoryLease()
    first, second = elector(api, "first"), elector(api, "second")
    await first.campaign()
    standby = asyncio.create_task(second.campaign())
    await asyncio.sleep(42)

    async def only_second(method: str) -> None:
        if asyncio.current_task() not in {standby, second._renewing}:
            await hang(method)

    api.on_call = only_second
    last_write = 0.0
    while not standby.done():
        if first.outlasts(15):
            last_write = now()
        await asyncio.sleep(0.05)
    assert last_write > 0
    assert now() - last_write >= 15 + MARGIN, "a call that began at the last moment has timed out"
    assert first.lost.is_set(), "and the former leader has stopped"
    assert second.outlasts(15)
    api.on_call = api._at_once
    await second.release()


@pytest.mark.parametrize(("latency", "writable"), [(0.01, 1.0), (1, 1.0), (5, 1.0), (9, 0.3)])
def test_slow_api_server_costs_nobody_the_lease(latency: float, writable: float) -> None:
    """Renewals that take 9 seconds are in time; writes to Twilio then have to wait, up to 6 seconds each."""

    @virtually
    async def story() -> None:
        api = MemoryLease()
        slow, standby = elector(api, "slow"), elector(api, "standby")
        await slow.campaign()
        api.latency = latency
        waiting = asyncio.create_task(standby.campaign())
        could = 0
        for _ in range(600):
            await asyncio.sleep(1)
            could += slow.outlasts(15)
        assert slow.is_leading
        assert not standby.is_leading
        assert could / 600 >= writable
        waiting.cancel()
        await slow.release()

    story()


@virtually
async def test_call_that_hangs_is_repeated_in_time() -> None:
    api = MemoryLease()
    leader = elector(api, "leader")
    await leader.campaign()
    hangs = 2

    async def hang_twice(method: str) -> None:
        nonlocal hangs
        if hangs:
            hangs -= 1
            await hang(method)

    api.on_call = hang_twice
    await asyncio.sleep(120)
    assert leader.is_leading
    await leader.release()


@virtually
async def test_leader_without_an_answer_stops_before_its_lease_ends_and_leads_again_later() -> None:
    api = MemoryLease()
    leader = elector(api, "leader")
    await leader.campaign()
    began = now()
    api.on_call = hang
    await leader.lost.wait()
    assert now() - began <= DURATION - MARGIN
    standby = asyncio.create_task(leader.campaign())
    await asyncio.sleep(100)
    api.on_call = api._at_once
    back = now()
    standby.cancel()
    await leader.campaign()
    assert now() - back < 0.1, "nobody led in between, so the lease is still its own"
    assert api.spec["leaseTransitions"] == 0
    await leader.release()


@virtually
async def test_lease_that_an_administrator_deletes_changes_no_leader() -> None:
    api = MemoryLease()
    leader, standby = elector(api, "leader"), elector(api, "standby")
    await leader.campaign()
    waiting = asyncio.create_task(standby.campaign())
    await asyncio.sleep(11)
    api.body = None
    await asyncio.sleep(60)
    assert leader.is_leading
    assert not standby.is_leading
    waiting.cancel()
    await leader.release()


@virtually
async def test_lease_that_an_administrator_gives_to_somebody_else_stops_the_leader() -> None:
    """It comes back when that somebody does not renew it."""
    api = MemoryLease()
    leader = elector(api, "leader")
    await leader.campaign()
    api.edit(holderIdentity="nobody-of-that-name")
    given = now()
    await leader.lost.wait()
    assert now() - given <= 6
    await leader.campaign()
    assert DURATION <= now() - given <= DURATION + 8
    await leader.release()


@virtually
async def test_edit_that_does_not_concern_the_holder_costs_one_more_read() -> None:
    api = MemoryLease()
    leader = elector(api, "leader")
    await leader.campaign()
    for _ in range(20):
        api.edit(renewTime="2001-01-01T00:00:00.000000Z", leaseDurationSeconds=1)
        await asyncio.sleep(7)
        assert leader.is_leading
    await leader.release()


@virtually
async def test_claim_whose_answer_is_lost_is_not_waited_for() -> None:
    """Else the process would wait for its own lease to end."""
    api = MemoryLease()
    leader = elector(api, "leader")
    lose = True

    async def lose_answer(method: str) -> None:
        nonlocal lose
        if lose and method == "POST":
            lose = False
            api.write({"metadata": {}, "spec": written[-1]})
            raise KubernetesUnavailable("the API server does not answer")

    written: list[Object] = []
    request = api.request

    async def note(method: str, path: str, body: Object | None = None, **other: Any) -> Object:
        if body:
            written.append(body["spec"])
        return await request(method, path, body, **other)

    api.request = note  # type: ignore[method-assign]
    api.on_call = lose_answer
    await leader.campaign()
    assert now() < 3
    assert leader.is_leading
    await leader.release()


@virtually
async def test_release_waits_for_no_renewal_that_is_under_way() -> None:
    api = MemoryLease()
    leader = elector(api, "leader")
    await leader.campaign()
    api.latency = 2
    await asyncio.sleep(6)  # a renewal has begun
    await leader.release()
    assert api.spec["holderIdentity"] is None


@virtually
async def test_release_does_not_touch_the_lease_of_another() -> None:
    api = MemoryLease()
    leader = elector(api, "leader")
    await leader.campaign()
    api.edit(holderIdentity="other", leaseTransitions=1)
    await leader.release()
    assert api.spec["holderIdentity"] == "other"


@virtually
async def test_count_of_transitions_cannot_overflow() -> None:
    api = MemoryLease()
    api.write({"metadata": {}, "spec": {"leaseTransitions": 2**31 - 1}})
    leader = elector(api, "leader")
    await leader.campaign()
    assert api.spec["leaseTransitions"] == 0
    await leader.release()


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (
            KubernetesRefused(403, "leases.coordination.k8s.io is forbidden"),
            "deploy/manifests/operator-rbac.yaml",
        ),
        (KubernetesUnavailable("the API server does not answer"), '"hint": ""'),
    ],
)
def test_standby_that_cannot_read_the_lease_says_so_once(
    error: ChannelError, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from smschannel.api.logs import log_to_stderr

    log_to_stderr("INFO", "json")

    @virtually
    async def story() -> None:
        api = MemoryLease()

        async def refuse(method: str) -> None:
            raise error

        api.on_call = refuse
        standby = asyncio.create_task(elector(api, "standby").campaign())
        await asyncio.sleep(60)
        standby.cancel()

    story()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(error) in lines[0]
    assert hint in lines[0]


@pytest.mark.parametrize(
    ("user", "is_pod", "reason"),
    [
        ({"extra": {"authentication.kubernetes.io/pod-name": ["operator-x"]}}, True, "as a fence will compare it"),
        ({"username": "admin"}, False, "a token that is bound to no pod"),
        ({"extra": {"authentication.kubernetes.io/pod-name": []}}, False, "an empty list names none"),
    ],
)
async def test_identity_is_the_pod_that_the_api_server_sees(user: Object, is_pod: bool, reason: str) -> None:
    class Api:
        async def request(self, *_: Any) -> Object:
            return {"status": {"userInfo": user}}

    first, second = [await identify(cast(KubeClient, Api())) for _ in range(2)]
    assert first.is_pod == is_pod, reason
    assert (first.name == "operator-x") == is_pod
    assert (first == second) == is_pod, "processes outside of pods have different names"


# Work that ends with the lease


async def _busy(ended: list[str]) -> str:
    """Work for 10 seconds, and need one more to end when cancelled."""
    try:
        await asyncio.sleep(10)
    finally:
        await asyncio.sleep(1)
        ended.append("work")
    return "done"


@virtually
async def test_work_returns_its_result_unless_an_event_comes_first() -> None:
    assert await unless(_busy([]), asyncio.Event()) == "done"
    event, ended = asyncio.Event(), list[str]()
    asyncio.get_running_loop().call_later(5, event.set)
    assert await unless(_busy(ended), asyncio.Event(), event) is None
    assert ended == ["work"]


@virtually
async def test_work_has_ended_when_its_cancelled_caller_goes_on() -> None:
    """Ctrl-C cancels the command's main task alone, which then releases the lease."""
    ended: list[str] = []

    async def command() -> None:
        try:
            await unless(_busy(ended), asyncio.Event())
        finally:
            ended.append("lease released")

    running = asyncio.create_task(command())
    await asyncio.sleep(5)
    running.cancel()
    await asyncio.wait({running})
    assert ended == ["work", "lease released"]
