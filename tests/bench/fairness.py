"""One account hangs: what the channels of the others notice of it, from their creation to Ready."""

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

from deploy.local.build import Progress
from deploy.local.stack import Stack
from tests.bench.case import Load
from tests.bench.gauges import metric
from tests.bench.load import Channels, sweep
from tests.bench.report import BUSY, Aim
from tests.bench.run import counted, manifests, operator, staged

HEALTHY = 9
_WARM_UP = 90
_SLOWER_AT_MOST = 1.2

NOBODY, NEW, KNOWN = "nobody hangs", "new channels hang", "known channels hang"
CASES = (NOBODY, NEW, KNOWN)
"""What the tenth account's channels are at when the others' are created: they are Ready, and at rest; they were created
a moment ago, and Twilio has never answered for them; they were Ready, had earned their share of the workers, and all
are looked at again.
"""


@dataclass(frozen=True)
class Run:
    """Times to Ready of the healthy accounts' channels, in seconds."""

    case: str
    round: int
    time_to_ready: tuple[float, ...]
    elsewhere: float

    @property
    def median(self) -> float:
        return statistics.median(self.time_to_ready)

    @property
    def p99(self) -> float:
        return sorted(self.time_to_ready)[int(len(self.time_to_ready) * 0.99)]


async def measure(load: Load, hanging: int, home: Path, say: Progress) -> list[Run]:
    """Every case once a round, in an order that the seed shuffles; `hanging` channels belong to the tenth account."""
    numbers = max(hanging, -(-(load.channels + _WARM_UP) // HEALTHY))
    chance = random.Random(load.seed)  # noqa: S311  (no secret is made of it)
    runs = []
    async with staged(home, HEALTHY + 1, numbers, say) as (stack, session):
        for number in range(1, load.rounds + 1):
            for case in chance.sample(CASES, len(CASES)):
                runs.append(await _run(case, number, load, hanging, chance, stack, session))
                say(f"round {number}  {case:<20} p99 {runs[-1].p99:5.2f} s  {runs[-1].elsewhere:4.0%} elsewhere")
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
    theirs = dict(islice(manifests(public, [tenth], chance), hanging))
    settings = {"SMSCHANNEL_WORKERS": str(load.workers), "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}
    # What hangs would be waited for.
    with operator(stack, settings, kill=True) as process:
        async with Channels.watched(session) as channels:
            await channels.create(warm_up)
            await channels.until(channels.ready, warm_up)
            if case != NEW:
                await channels.create(theirs)
                await channels.until(channels.ready, theirs)
            if case != NOBODY:
                await _hang(tenth, stack)
                await (channels.look_again(theirs) if case == KNOWN else channels.create(theirs))
                await _hung(stack, session)
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


async def _hung(stack: Stack, session: aiohttp.ClientSession) -> None:
    """Returns when a call hangs, and the operator has taken in all that is to be done behind it."""
    depth = -1.0
    async with asyncio.timeout(30):
        while True:
            before, depth = depth, await metric(session, stack.operator_url, "smschannel_queue_depth")
            [rule] = (await asyncio.to_thread(stack.twin_call, "GET", "/faults"))["faults"]
            if rule["hit"] and depth == before:
                return
            await asyncio.sleep(0.3)


def ratios(runs: Sequence[Run], case: str, of: Callable[[Run], float]) -> list[float]:
    """Of each round's run of `case` to the one in which nobody hangs."""
    alone = {run.round: of(run) for run in runs if run.case == NOBODY}
    return [of(run) / alone[run.round] for run in runs if run.case == case]


def aims(runs: Sequence[Run]) -> list[Aim]:
    found = []
    for case in (NEW, KNOWN):
        slower = statistics.median(ratios(runs, case, lambda run: run.p99))
        what = f"an account's {case}: the others' p99 is less than 20 % later ({slower:.2f})"
        found.append(Aim(what, slower < _SLOWER_AT_MOST))
    return found


def show(console: Console, runs: Sequence[Run], load: Load, hanging: int) -> None:
    title = (
        f"One account hangs: {load.channels} channels of {HEALTHY} others, {hanging} of its own, {load.rounds} rounds"
    )
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
    compared("x nobody hangs, median", lambda run: run.median)
    compared("x nobody hangs, p99", lambda run: run.p99)
    row("CPU that others had meanwhile", lambda run: run.elsewhere, "{:.0%}")
    console.print(table)
    if any(run.elsewhere > BUSY for run in runs):
        console.print(
            "Others kept this machine busy meanwhile: believe tests/unit/test_fairness.py, whose time is virtual."
        )
