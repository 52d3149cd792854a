"""Results of the speed benchmark: medians, ratios and targets, as a table and as JSON with every run."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.bench.case import Case, Load, Run

_PACKAGES = ("aiohttp", "kopf", "kubernetes", "pydantic", "twilio", "uvloop")
BUSY = 0.15


@dataclass(frozen=True)
class Summary:
    """Medians of a case's rounds. A ratio is the median of each round's ratio; None if the other case was not measured.

    `by_cpu` compares the CPU time of all processes together, API server and load generator included, instead of the
    rate: if all cores are busy this is the same ratio, but other programs influence it less.
    """

    case: str
    channels_per_second: float
    to_floor: float | None
    to_idiomatic: float | None
    to_floor_by_cpu: float | None
    to_idiomatic_by_cpu: float | None
    ready_median: float
    ready_p99: float
    alone: float
    writes: float
    twilio_calls: float
    cpu_milliseconds: float
    control_plane_milliseconds: float
    all_cpu_milliseconds: float
    max_rss_mb: float
    idle_writes: float | None
    deletions_per_second: float
    elsewhere: float
    same_code: bool


@dataclass(frozen=True)
class Target:
    """A target of the product with the measured value, and whether it was met."""

    what: str
    met: bool


def summarize(runs: Sequence[Run], cases: Sequence[Case], channels: int) -> list[Summary]:
    measured = {run.case for run in runs}
    return [_summary(case, runs, channels) for case in cases if case.name in measured]


def _summary(case: Case, runs: Sequence[Run], channels: int) -> Summary:
    own = [run for run in runs if run.case == case.name]

    def median(of: Callable[[Run], float]) -> float:
        return statistics.median(map(of, own))

    def ratio(other: str, of: Callable[[Run], float]) -> float | None:
        others = {run.round: of(run) for run in runs if run.case == other}
        ratios = [of(run) / others[run.round] for run in own if run.round in others]
        return statistics.median(ratios) if ratios else None

    def rate(run: Run) -> float:
        return run.channels_per_second

    def per_cpu_second(run: Run) -> float:
        return 1 / run.all_cpu_seconds

    idle = [run.idle_writes for run in own if run.idle_writes is not None]
    return Summary(
        case=case.name,
        channels_per_second=median(lambda run: run.channels_per_second),
        to_floor=ratio(case.floor, rate),
        to_idiomatic=ratio("idiomatic", rate),
        to_floor_by_cpu=ratio(case.floor, per_cpu_second),
        to_idiomatic_by_cpu=ratio("idiomatic", per_cpu_second),
        ready_median=median(lambda run: statistics.median(run.time_to_ready)),
        ready_p99=median(lambda run: sorted(run.time_to_ready)[int(len(run.time_to_ready) * 0.99)]),
        alone=median(lambda run: run.alone),
        writes=median(lambda run: sum(run.writes.values())),
        twilio_calls=median(lambda run: sum(run.twilio_calls.values())),
        cpu_milliseconds=median(lambda run: run.cpu_seconds["subject"]) * 1000 / channels,
        control_plane_milliseconds=median(lambda run: run.cpu_seconds["control plane"]) * 1000 / channels,
        all_cpu_milliseconds=median(lambda run: run.all_cpu_seconds) * 1000 / channels,
        max_rss_mb=median(lambda run: run.max_rss) / 1e6,
        idle_writes=max(idle) if idle else None,
        deletions_per_second=median(lambda run: run.deletions_per_second),
        elsewhere=median(lambda run: run.elsewhere),
        same_code=len({run.code for run in own}) == 1 and "later" not in own[0].code,
    )


def targets(summaries: Sequence[Summary]) -> list[Target]:
    """Return the targets of the cases that were measured."""
    found = []
    for each in summaries:
        if not each.case.startswith("ours"):
            continue
        most = 2 if each.case.endswith("at birth") else 3
        found.append(Target(f"{each.case}: at most {most} writes per channel ({each.writes:.2f})", each.writes <= most))
        if each.idle_writes is not None:
            found.append(
                Target(f"{each.case}: no other write when nothing changed ({each.idle_writes})", not each.idle_writes)
            )
        if each.to_idiomatic is not None:
            what = f"{each.case}: at least twice the idiomatic operator ({each.to_idiomatic:.2f})"
            found.append(Target(what, each.to_idiomatic >= 2))
        if each.to_floor is not None:
            what = f"{each.case}: at least 0.7 of the floor ({each.to_floor:.2f})"
            found.append(Target(what, each.to_floor >= 0.7))
    return found


def show(console: Console, summaries: Sequence[Summary], load: Load) -> None:
    table = Table(title=f"{load.channels} channels, {load.accounts} accounts, medians of {load.rounds}")
    table.add_column("")
    for each in summaries:
        table.add_column(each.case.replace(", ", "\n"), justify="right")
    rows: list[tuple[str, Callable[[Summary], str]]] = [
        ("channels per second", lambda s: f"[bold]{s.channels_per_second:.0f}[/]"),
        ("x floor", lambda s: _number(s.to_floor)),
        ("x floor, by CPU time", lambda s: _number(s.to_floor_by_cpu)),
        ("x idiomatic", lambda s: _number(s.to_idiomatic)),
        ("x idiomatic, by CPU time", lambda s: _number(s.to_idiomatic_by_cpu)),
        ("Kubernetes writes per channel", lambda s: f"{s.writes:.2f}"),
        ("other writes of a check without changes", lambda s: _number(s.idle_writes, "{:.0f}")),
        ("Twilio calls per channel", lambda s: f"{s.twilio_calls:.2f}"),
        ("time to Ready, median", lambda s: f"{s.ready_median:.2f} s"),
        ("time to Ready, p99", lambda s: f"{s.ready_p99:.2f} s"),
        ("time to Ready, a single channel", lambda s: f"{s.alone * 1000:.0f} ms"),
        ("deletions per second", lambda s: f"{s.deletions_per_second:.0f}"),
        ("CPU per channel", lambda s: f"{s.cpu_milliseconds:.2f} ms"),
        ("API server's CPU per channel", lambda s: f"{s.control_plane_milliseconds:.2f} ms"),
        ("CPU of all processes per channel", lambda s: f"{s.all_cpu_milliseconds:.2f} ms"),
        ("memory, at most", lambda s: f"{s.max_rss_mb:.0f} MB"),
        ("CPU used by other programs", lambda s: f"{s.elsewhere:.0%}"),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(each) for each in summaries))
    console.print(table)
    show_targets(console, targets(summaries))
    for each in summaries:
        if not each.same_code:
            console.print(
                f"[red]{each.case}: its source was edited during the benchmark, so these figures cannot be compared.[/]"
            )
    if any(each.elsewhere > BUSY for each in summaries):
        console.print("Other programs used the CPU: rely on the ratios by CPU time, not on the rates.")


def show_targets(console: Console, targets: Sequence[Target]) -> None:
    for target in targets:
        console.print(f"[{'green' if target.met else 'red'}]{'met   ' if target.met else 'MISSED'}[/] {target.what}")


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def write(path: Path, load: Load, summaries: Sequence[Summary], runs: Sequence[Run]) -> None:
    document: dict[str, Any] = {
        "load": asdict(load),
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "memory_mb": psutil.virtual_memory().total // 10**6,
        },
        "versions": {name: version(name) for name in _PACKAGES},
        "summaries": [asdict(each) for each in summaries],
        "targets": [asdict(each) for each in targets(summaries)],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
