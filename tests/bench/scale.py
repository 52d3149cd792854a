"""What many Ready channels cost: starting beside them, their memory, their drift checks, and what new channels notice.

The Ready channels are seeded, in accounts of 1,000 numbers, which is a page at Twilio. The times of new channels are
those of some that arrive at a steady rate, in nine accounts of their own: alone (quiet), while all Ready channels are
checked once per interval (drift checks), and while a tenth account creates 2,000 at once (burst).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from deploy.build import Progress
from deploy.local.stack import Stack
from tests.bench import aims
from tests.bench.aims import Result
from tests.bench.case import is_read, percentile
from tests.bench.gauges import kubernetes_calls, metric, twilio_calls
from tests.bench.load import PATH, RECORDS, Channels
from tests.bench.run import counted, manifests, operator, staged
from tests.bench.seeding import seed

PAGE = 1000
_NEW_ACCOUNTS = 9
_BURST = 2000
_PER_SECOND, _TRICKLE_SECONDS = 10, 15
_SETTLE_SECONDS = 5
_RECONCILES = "smschannel_reconciles_total"
QUIET, CHECKED, BURST = "quiet", "drift checks", "burst of 2,000"


@dataclass(frozen=True)
class Start:
    """A start of the operator beside Ready channels. `seconds` are until /readyz; `list_seconds` those of a raw LIST
    of channels and records; memory is in bytes, `empty_rss` that without channels.
    """

    seconds: float
    list_seconds: float
    cpu_seconds: float
    writes: int
    twilio_calls: int
    rss: int
    empty_rss: int


@dataclass(frozen=True)
class Interval:
    """What was counted during one drift interval of `seconds`."""

    seconds: float
    reconciles: int
    kubernetes_calls: Mapping[str, int]
    twilio_calls: Mapping[str, int]
    cpu_seconds: float
    control_plane_cpu_seconds: float
    max_rss: int
    elsewhere: float

    @property
    def number_reads(self) -> int:
        return self.twilio_calls.get("GET numbers", 0) + self.twilio_calls.get("GET number", 0)

    @property
    def other_twilio_calls(self) -> int:
        return sum(self.twilio_calls.values()) - self.number_reads

    @property
    def kubernetes_reads(self) -> int:
        return sum(count for call, count in self.kubernetes_calls.items() if is_read(call))

    @property
    def kubernetes_writes(self) -> int:
        return sum(self.kubernetes_calls.values()) - self.kubernetes_reads


@dataclass(frozen=True)
class Scale:
    """The results for `ready` Ready channels; `latencies` are the times to Ready of new channels, in seconds."""

    ready: int
    seeding_seconds: float
    start: Start
    interval: Interval
    latencies: Mapping[str, tuple[float, ...]]


async def measure(ready: int, seconds: float, workers: int, number: int, home: Path, progress: Progress) -> Scale:
    """Measure with `ready` Ready channels and drift intervals of `seconds`; `number` seeds names and IDs."""
    chance = random.Random(number)  # noqa: S311  (not used for secrets)
    accounts = -(-ready // PAGE)
    settings = {"SMSCHANNEL_WORKERS": str(workers), "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}
    latencies: dict[str, tuple[float, ...]] = {}
    async with staged(home, 1, 1, progress) as (stack, session):
        with operator(stack, settings) as process:
            await asyncio.sleep(_SETTLE_SECONDS)
            empty_rss = process.memory_info().rss
        seeding = await seed(stack, session, accounts, -(-ready // accounts), chance)
        progress(f"scale  {ready} Ready channels made in {seeding:.0f} s, {ready / seeding:.0f} a second")
        start = await measure_start(stack, session, settings, empty_rss)
        progress(f"scale  started in {start.seconds:.1f} s; a raw LIST takes {start.list_seconds:.1f} s")
        with operator(stack, {**settings, "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": str(seconds)}) as process:
            await asyncio.sleep(seconds)  # the first checks after a start read more
            interval = await measure_interval(seconds, stack, session, process)
            progress(f"scale  a drift interval took {interval.cpu_seconds:.1f} s of CPU")
            latencies[CHECKED] = await _trickle(stack, session, chance)
        with operator(stack, settings):
            latencies[QUIET] = await _trickle(stack, session, chance)
            latencies[BURST] = await _trickle_beside_burst(stack, session, chance)
    return Scale(ready, seeding, start, interval, latencies)


async def measure_start(
    stack: Stack, session: aiohttp.ClientSession, settings: Mapping[str, str], empty_rss: int
) -> Start:
    """Start the operator, stop it, and return what the start took."""
    list_seconds = await _raw_list(session)
    calls, at_twilio = await kubernetes_calls(session), await twilio_calls(session, stack.twilio_url)
    began = perf_counter()
    with operator(stack, settings) as process:
        seconds = perf_counter() - began
        await asyncio.sleep(_SETTLE_SECONDS)
        calls = await kubernetes_calls(session) - calls
        return Start(
            seconds=seconds,
            list_seconds=list_seconds,
            cpu_seconds=sum(process.cpu_times()[:2]),
            writes=sum(count for call, count in calls.items() if not is_read(call)),
            twilio_calls=(await twilio_calls(session, stack.twilio_url) - at_twilio).total(),
            rss=process.memory_info().rss,
            empty_rss=empty_rss,
        )


async def _raw_list(session: aiohttp.ClientSession) -> float:
    """Return the seconds that listing takes what a start has to know: all channels, and the records' metadata."""
    metadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
    began = perf_counter()
    for path, accept in ((PATH, "application/json"), (RECORDS, metadata)):
        query = {"limit": "500"}
        while True:
            async with session.get(path, params=query, headers={"Accept": accept}) as answer:
                answer.raise_for_status()
                more = json.loads(await answer.read())["metadata"].get("continue")
            if not more:
                break
            query = {"limit": "500", "continue": more}
    return perf_counter() - began


async def measure_interval(
    seconds: float, stack: Stack, session: aiohttp.ClientSession, process: psutil.Process
) -> Interval:
    # The first check of a channel after a start is a reconcile; the next ones are what an interval usually costs.
    await asyncio.sleep(1.2 * seconds)
    reconciles = await metric(session, stack.operator_url, _RECONCILES)
    async with counted(stack, session, process) as spent:
        await asyncio.sleep(seconds)
        reconciles = await metric(session, stack.operator_url, _RECONCILES) - reconciles
    return Interval(
        seconds=seconds,
        reconciles=int(reconciles),
        kubernetes_calls=_counts(spent.kubernetes_calls),
        twilio_calls=_counts(spent.twilio_calls),
        cpu_seconds=spent.processes.cpu_seconds["subject"],
        control_plane_cpu_seconds=spent.processes.cpu_seconds["control plane"],
        max_rss=spent.processes.max_rss,
        elsewhere=spent.processes.elsewhere,
    )


def _counts(counted: Counter[str]) -> dict[str, int]:
    return {what: count for what, count in sorted(counted.items()) if count}


def _new(stack: Stack, accounts: int, numbers: int, chance: random.Random) -> dict[str, bytes]:
    """Return manifests of new channels in new accounts."""
    made: list[dict[str, Any]] = stack.twin_call("POST", "/seed", {"accounts": accounts, "numbers": numbers})[
        "accounts"
    ]
    return dict(manifests(stack.public_key(), made, chance))


async def _trickle(
    stack: Stack,
    session: aiohttp.ClientSession,
    chance: random.Random,
    *,
    beside: Mapping[str, bytes] | None = None,
) -> tuple[float, ...]:
    """Create channels at a steady rate and return their times to Ready; `beside` are created at once meanwhile."""
    numbers = -(-_PER_SECOND * _TRICKLE_SECONDS // _NEW_ACCOUNTS)
    made = _new(stack, _NEW_ACCOUNTS, numbers, chance)
    async with Channels.watched(session, empty=False) as channels, asyncio.TaskGroup() as tasks:
        if beside:
            tasks.create_task(channels.create(beside))
        began = perf_counter()
        for position, (name, manifest) in enumerate(made.items()):
            await asyncio.sleep(began + position / _PER_SECOND - perf_counter())
            tasks.create_task(channels.create({name: manifest}))
        await channels.until(channels.ready, {**made, **(beside or {})})
        return tuple(channels.ready[name] - channels.created[name] for name in made)


async def _trickle_beside_burst(
    stack: Stack, session: aiohttp.ClientSession, chance: random.Random
) -> tuple[float, ...]:
    burst = dict(islice(_new(stack, 1, _BURST, chance).items(), _BURST))
    return await _trickle(stack, session, chance, beside=burst)


def results(scale: Scale) -> list[Result]:
    of, start = f"{scale.ready:,} Ready channels", scale.start
    found = [
        Result(aims.START, start.seconds / (3 * start.list_seconds + 10), of),
        Result(aims.START_WRITES, start.writes, of),
        Result(aims.START_TWILIO, start.twilio_calls, of),
        Result(aims.MEMORY, (start.rss - start.empty_rss) / scale.ready / 1024, of),
    ]
    interval, pages = scale.interval, -(-scale.ready // PAGE)
    found += [
        Result(aims.DRIFT_READS, interval.number_reads / pages, of),
        # Rounded: the keyring is read every 15 seconds, however many channels there are.
        Result(aims.DRIFT_KUBERNETES, round(sum(interval.kubernetes_calls.values()) / scale.ready, 2), of),
        Result(aims.DRIFT_RECONCILED, interval.reconciles / scale.ready, of),
    ]
    if scale.ready == 10_000:
        found.append(Result(aims.DRIFT_CPU, interval.cpu_seconds, of))
    return found


def show(console: Console, scale: Scale) -> None:
    table = Table(title=f"{scale.ready:,} Ready channels, seeded in {scale.seeding_seconds:.0f} s", show_header=False)
    start = scale.start
    rows = [
        ("start, until ready", f"{start.seconds:.2f} s"),
        ("a raw LIST of the same", f"{start.list_seconds:.2f} s"),
        ("CPU of the start", f"{start.cpu_seconds:.2f} s"),
        ("writes, Twilio calls of the start", f"{start.writes}, {start.twilio_calls}"),
        ("memory after it, and without channels", f"{start.rss / 1e6:.0f} MB, {start.empty_rss / 1e6:.0f} MB"),
    ]
    each = scale.interval
    rows += [
        (f"drift interval of {each.seconds:.0f} s: reconciles", f"{each.reconciles}"),
        (
            "operator's CPU",
            f"{each.cpu_seconds:.2f} s, {each.cpu_seconds / max(1, each.reconciles) * 1000:.2f} ms each",
        ),
        ("API server's CPU", f"{each.control_plane_cpu_seconds:.2f} s"),
        ("reads of numbers, other Twilio calls", f"{each.number_reads}, {each.other_twilio_calls}"),
        ("Kubernetes reads, writes", f"{each.kubernetes_reads}, {each.kubernetes_writes}"),
        ("memory, at most", f"{each.max_rss / 1e6:.0f} MB"),
        ("CPU used by other programs", f"{each.elsewhere:.0%}"),
    ]
    for case, times in scale.latencies.items():
        p50, p99 = (percentile(times, percent) * 1000 for percent in (50, 99))
        rows.append((f"new channel to Ready, {case}: p50, p99", f"{p50:.0f}, {p99:.0f} ms"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
