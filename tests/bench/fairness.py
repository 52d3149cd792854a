"""Fairness: how much longer channels take to become Ready while the calls of another account hang."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from deploy.build import Progress
from deploy.local.stack import Stack
from tests.bench import aims
from tests.bench.aims import Result
from tests.bench.case import Load, percentile
from tests.bench.gauges import metric
from tests.bench.load import Channels, sweep
from tests.bench.report import BUSY
from tests.bench.run import counted, manifests, operator, staged

HEALTHY = 9
_WARM_UP = 90

BASELINE, NEW, READY = "nothing hangs", "new channels hang", "Ready channels hang"
CASES = (BASELINE, NEW, READY)
"""The state of the tenth account's channels when those of the nine others are created.

nothing hangs        they are Ready, and Twilio answers
new channels hang    they were just created: Twilio has never answered for this account, so its concurrency limit is low
Ready channels hang  they were Ready, so the account's concurrency limit is high, and all of them are checked again
"""


@dataclass(frozen=True)
class Run:
    """One measurement: the healthy accounts' times to Ready, in seconds."""

    case: str
    round: int
    time_to_ready: tuple[float, ...]
    elsewhere: float

    @property
    def median(self) -> float:
        return statistics.median(self.time_to_ready)

    @property
    def p99(self) -> float:
        return percentile(self.time_to_ready, 99)


async def measure(load: Load, hanging: int, home: Path, progress: Progress) -> list[Run]:
    """Measure every case once per round, in an order shuffled by the seed. The tenth account has `hanging` channels."""
    numbers = max(hanging, -(-(load.channels + _WARM_UP) // HEALTHY))
    chance = random.Random(load.seed)  # noqa: S311  (not used for secrets)
    runs = []
    async with staged(home, HEALTHY + 1, numbers, progress) as (stack, session):
        for number in range(1, load.rounds + 1):
            for case in chance.sample(CASES, len(CASES)):
                runs.append(await _run(case, number, load, hanging, chance, stack, session))
                progress(f"round {number}  {case:<20} p99 {runs[-1].p99:5.2f} s  {runs[-1].elsewhere:4.0%} elsewhere")
    return runs


async def _run(
    case: str,
    number: int,
    load: Load,
    hanging: int,
    chance: random.Random,
    stack: Stack,
    session: aiohttp.ClientSession,
) -> Run:
    *healthy, tenth = stack.twin["accounts"]
    public = stack.public_key()
    made = manifests(public, healthy, chance)
    warm_up, batch = dict(islice(made, _WARM_UP)), dict(islice(made, load.channels))
    tenths = dict(islice(manifests(public, [tenth], chance), hanging))
    settings = {"SMSCHANNEL_WORKERS": str(load.workers), "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}
    # Killed, because a graceful stop waits for the calls that hang.
    with operator(stack, settings, kill=True) as process:
        async with Channels.watched(session) as channels:
            await channels.create(warm_up)
            await channels.until(channels.ready, warm_up)
            if case != NEW:
                await channels.create(tenths)
                await channels.until(channels.ready, tenths)
            if case != BASELINE:
                await _hang(tenth, stack)
                await (channels.check_now(tenths) if case == READY else channels.create(tenths))
                await _until_hanging(stack, session)
            async with counted(stack, session, process) as spent:
                await channels.create(batch)
                await channels.until(channels.ready, batch)
            times = tuple(channels.ready[name] - channels.created[name] for name in batch)
    stack.twin_call("DELETE", "/faults")
    await sweep(session)
    return Run(case, number, times, spent.processes.elsewhere)


async def _hang(account: Mapping[str, Any], stack: Stack) -> None:
    rule = {"match": {"account": account["account_sid"]}, "action": {"kind": "hang"}}
    await asyncio.to_thread(stack.twin_call, "POST", "/faults", rule)


async def _until_hanging(stack: Stack, session: aiohttp.ClientSession) -> None:
    """Wait until a call hangs and the depth of the operator's queue no longer changes."""
    depth = -1.0
    async with asyncio.timeout(30):
        while True:
            before, depth = depth, await metric(session, stack.operator_url, "smschannel_queue_depth")
            [rule] = (await asyncio.to_thread(stack.twin_call, "GET", "/faults"))["faults"]
            if rule["hit"] and depth == before:
                return
            await asyncio.sleep(0.3)


def ratios(runs: Sequence[Run], case: str, of: Callable[[Run], float]) -> list[float]:
    """Return, for each round, the value of `case` divided by that of the baseline."""
    baseline = {run.round: of(run) for run in runs if run.case == BASELINE}
    return [of(run) / baseline[run.round] for run in runs if run.case == case]


def results(runs: Sequence[Run]) -> list[Result]:
    return [
        Result(aims.SLOWER_BESIDE_HANGING, statistics.median(ratios(runs, case, lambda run: run.p99)), case)
        for case in (NEW, READY)
    ]


def show(console: Console, runs: Sequence[Run], load: Load, hanging: int) -> None:
    title = f"One account hangs ({hanging} channels) beside {HEALTHY} others ({load.channels}); {load.rounds} rounds"
    table = Table(title=title)
    for heading in ("", *CASES):
        table.add_column(heading, justify="right" if heading else "left")

    def row(label: str, of: Callable[[Run], float], form: str) -> None:
        each = ([of(run) for run in runs if run.case == case] for case in CASES)
        table.add_row(label, *(form.format(statistics.median(values)) for values in each))

    def compared(label: str, of: Callable[[Run], float]) -> None:
        cells = []
        for case in CASES:
            found = ratios(runs, case, of)
            cells.append(f"[bold]{statistics.median(found):.2f}[/] ({min(found):.2f} to {max(found):.2f})")
        table.add_row(label, *cells)

    row("time to Ready, median", lambda run: run.median, "{:.2f} s")
    row("time to Ready, p99", lambda run: run.p99, "{:.2f} s")
    compared("x baseline, median", lambda run: run.median)
    compared("x baseline, p99", lambda run: run.p99)
    row("CPU used by other programs", lambda run: run.elsewhere, "{:.0%}")
    console.print(table)
    if any(run.elsewhere > BUSY for run in runs):
        console.print("Other programs used the CPU: rely on tests/unit/test_fairness.py, which runs in virtual time.")
