"""The cost of drift checks: comparing every number with Twilio once per drift interval when nothing changed."""

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
from tests.bench.report import Target
from tests.bench.run import counted, manifests, operator, staged

ACCOUNTS = 10
_WHEN = ("after a restart", "the next interval")
_RECONCILES = "smschannel_reconciles_total"
_READS_AT_MOST = 2
"""Reads of an account per interval: the account cache expires after half of it. A page has 1,000 numbers."""


@dataclass(frozen=True)
class Period:
    """What was counted during one drift interval of `seconds`."""

    when: str
    channels: int
    seconds: float
    reconciles: int
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


async def measure(
    numbers: int, seconds: float, workers: int, seed: int, home: Path, progress: Progress
) -> list[Period]:
    """Measure `numbers` channels in each account: the first interval of `seconds` after a restart, and the next."""
    settings = {"SMSCHANNEL_WORKERS": str(workers), "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}
    channels = numbers * ACCOUNTS
    async with staged(home, ACCOUNTS, numbers, progress) as (stack, session):
        made = dict(manifests(stack.public_key(), stack.twin["accounts"], random.Random(seed)))  # noqa: S311
        with operator(stack, settings):
            async with Channels.watched(session) as watched:
                await watched.create(made)
                await watched.until(watched.ready, made, 60 + channels / 10)
            await settled_writes(session)
        progress(f"drift  {channels} channels are Ready; measuring two intervals of {seconds:.0f} s")
        with operator(stack, {**settings, "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": str(seconds)}) as process:
            return [await _period(when, channels, seconds, stack, session, process) for when in _WHEN]


async def _period(
    when: str, channels: int, seconds: float, stack: Stack, session: aiohttp.ClientSession, process: psutil.Process
) -> Period:
    reconciles = await metric(session, stack.operator_url, _RECONCILES)
    calls = Counter[str]()
    async with counted(stack, session, process) as spent:
        written = await writes(session)
        calls.subtract(await twilio_calls(session, stack.twilio_url))
        await asyncio.sleep(seconds)
        calls.update(await twilio_calls(session, stack.twilio_url))
        written = await writes(session) - written
        reconciles = await metric(session, stack.operator_url, _RECONCILES) - reconciles
    return Period(
        when=when,
        channels=channels,
        seconds=seconds,
        reconciles=int(reconciles),
        twilio_calls={kind: count for kind, count in sorted(calls.items()) if count},
        writes=written.total(),
        cpu_seconds=spent.processes.cpu_seconds["subject"],
        control_plane_cpu_seconds=spent.processes.cpu_seconds["control plane"],
        max_rss=spent.processes.max_rss,
        elsewhere=spent.processes.elsewhere,
    )


def targets(periods: Sequence[Period]) -> list[Target]:
    found = []
    for each in periods:
        most = _READS_AT_MOST * ACCOUNTS * -(-each.channels // ACCOUNTS // 1000)
        what = f"drift, {each.when}: at most {most} number reads in an interval ({each.number_reads})"
        found.append(Target(what, each.number_reads <= most))
        found.append(Target(f"drift, {each.when}: no write ({each.writes})", not each.writes))
        what = f"drift, {each.when}: at least 75 % of the channels reconciled ({each.reconciles} of {each.channels})"
        found.append(Target(what, each.reconciles >= 0.75 * each.channels))
    return found


def show(console: Console, periods: Sequence[Period]) -> None:
    table = Table(title=f"Drift: {periods[0].channels} channels, {ACCOUNTS} accounts, {periods[0].seconds:.0f} s")
    for heading in ("", *(each.when for each in periods)):
        table.add_column(heading, justify="right" if heading else "left")
    for label, cells in (
        ("reconciles", [f"{each.reconciles}" for each in periods]),
        ("number reads at Twilio", [f"[bold]{each.number_reads}[/]" for each in periods]),
        ("Messaging Services reads", [f"{each.service_reads}" for each in periods]),
        ("Kubernetes writes", [f"{each.writes}" for each in periods]),
        ("operator's CPU", [f"{each.cpu_seconds:.1f} s, {each.cpu_seconds / each.seconds:.0%}" for each in periods]),
        ("CPU per reconcile", [f"{each.cpu_seconds / max(1, each.reconciles) * 1000:.2f} ms" for each in periods]),
        ("API server's CPU", [f"{each.control_plane_cpu_seconds:.1f} s" for each in periods]),
        ("operator's memory, at most", [f"{each.max_rss / 1e6:.0f} MB" for each in periods]),
        ("CPU used by other programs", [f"{each.elsewhere:.0%}" for each in periods]),
    ):
        table.add_row(label, *cells)
    console.print(table)
