"""Drift by pages: what it costs to compare every number with Twilio once in a drift interval, when nothing changed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from deploy.local.build import Progress
from deploy.local.stack import Stack
from tests.bench.gauges import metric, settled_writes, twilio_calls, writes
from tests.bench.load import Channels
from tests.bench.report import Aim
from tests.bench.run import counted, manifests, operator, staged

ACCOUNTS = 10
_WHEN = ("after a restart", "from then on")
_TURNS = "smschannel_reconciles_total"
_READS_AT_MOST = 2
"""Readings of an account in an interval: what was read is good for half of it. Of 1,000 numbers, each is one call."""


@dataclass(frozen=True)
class Period:
    """What was counted over one drift interval of `seconds`; `looks` is how many channels were looked at in it."""

    when: str
    channels: int
    seconds: float
    looks: int
    twilio_calls: dict[str, int]
    writes: int
    cpu_seconds: float
    control_plane_cpu_seconds: float
    max_rss: int
    elsewhere: float

    @property
    def number_reads(self) -> int:
        return self.twilio_calls.get("GET numbers", 0) + self.twilio_calls.get("GET number", 0)

    @property
    def service_reads(self) -> int:
        return sum(count for kind, count in self.twilio_calls.items() if "service" in kind)


async def measure(numbers: int, seconds: float, workers: int, seed: int, home: Path, say: Progress) -> list[Period]:
    """`numbers` channels in each of the accounts: the first interval after a restart, and the next."""
    settings = {"SMSCHANNEL_WORKERS": str(workers), "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}
    channels = numbers * ACCOUNTS
    async with staged(home, ACCOUNTS, numbers, say) as (stack, session):
        made = dict(manifests(stack.public_key(), stack.twin["accounts"], random.Random(seed)))  # noqa: S311
        with operator(stack, settings):
            async with Channels.watched(session) as watched:
                await watched.create(made)
                await watched.until(watched.ready, made, 60 + channels / 10)
            await settled_writes(session)
        say(f"drift  {channels} channels are Ready; now {seconds:.0f} s of drift checks, twice")
        with operator(stack, {**settings, "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": str(seconds)}) as process:
            return [await _period(when, channels, seconds, stack, session, process) for when in _WHEN]


async def _period(
    when: str, channels: int, seconds: float, stack: Stack, session: aiohttp.ClientSession, process: psutil.Process
) -> Period:
    turns = await metric(session, stack.operator_url, _TURNS)
    calls = Counter[str]()
    async with counted(stack, session, process) as spent:
        written = await writes(session)
        calls.subtract(await twilio_calls(session, stack.twilio_url))
        await asyncio.sleep(seconds)
        calls.update(await twilio_calls(session, stack.twilio_url))
        written = await writes(session) - written
        turns = await metric(session, stack.operator_url, _TURNS) - turns
    return Period(
        when=when,
        channels=channels,
        seconds=seconds,
        looks=int(turns),
        twilio_calls={kind: count for kind, count in sorted(calls.items()) if count},
        writes=written.total(),
        cpu_seconds=spent.processes.cpu_seconds["contender"],
        control_plane_cpu_seconds=spent.processes.cpu_seconds["control plane"],
        max_rss=spent.processes.max_rss,
        elsewhere=spent.processes.elsewhere,
    )


def aims(periods: Sequence[Period]) -> list[Aim]:
    found = []
    for each in periods:
        most = _READS_AT_MOST * ACCOUNTS * -(-each.channels // ACCOUNTS // 1000)
        what = f"drift, {each.when}: at most {most} number reads in an interval ({each.number_reads})"
        found.append(Aim(what, each.number_reads <= most))
        found.append(Aim(f"drift, {each.when}: no write ({each.writes})", not each.writes))
        what = f"drift, {each.when}: nearly every channel looked at, +-20 % ({each.looks} of {each.channels})"
        found.append(Aim(what, each.looks >= 0.75 * each.channels))
    return found


def show(console: Console, periods: Sequence[Period]) -> None:
    table = Table(title=f"Drift: {periods[0].channels} channels, {ACCOUNTS} accounts, {periods[0].seconds:.0f} s")
    for heading in ("", *(each.when for each in periods)):
        table.add_column(heading, justify="right" if heading else "left")
    for label, cells in (
        ("channels looked at", [f"{each.looks}" for each in periods]),
        ("number reads at Twilio", [f"[bold]{each.number_reads}[/]" for each in periods]),
        ("Messaging Services reads", [f"{each.service_reads}" for each in periods]),
        ("Kubernetes writes", [f"{each.writes}" for each in periods]),
        ("its CPU", [f"{each.cpu_seconds:.1f} s, {each.cpu_seconds / each.seconds:.0%}" for each in periods]),
        ("its CPU per look", [f"{each.cpu_seconds / max(1, each.looks) * 1000:.2f} ms" for each in periods]),
        ("API server's CPU", [f"{each.control_plane_cpu_seconds:.1f} s" for each in periods]),
        ("its memory, at most", [f"{each.max_rss / 1e6:.0f} MB" for each in periods]),
        ("CPU that others had meanwhile", [f"{each.elsewhere:.0%}" for each in periods]),
    ):
        table.add_row(label, *cells)
    console.print(table)
