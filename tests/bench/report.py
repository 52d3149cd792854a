"""Results of the speed benchmark: medians and ratios, as a table and as JSON with every run."""

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

from tests.bench import aims
from tests.bench.aims import Result
from tests.bench.case import AT_BIRTH, Case, Load, Run, percentile

_PACKAGES = ("aiohttp", "kopf", "kubernetes", "pydantic", "twilio", "uvloop")
BUSY = 0.15


@dataclass(frozen=True)
class Summary:
    """Medians of a case's rounds. A ratio is the median of each round's ratio; None if the other case was not measured.

    `to_peer` compares with the peer without the finalizer policy. The ratios `by_cpu` compare the CPU time of all
    processes together, API server and load generator included, instead of the rate: if all cores are busy this is the
    same ratio, but other programs influence it less. Milliseconds of CPU are per channel; other times are seconds.
    """

    case: str
    channels_per_second: float
    to_floor: float | None
    to_peer: float | None
    to_idiomatic: float | None
    to_floor_by_cpu: float | None
    to_peer_by_cpu: float | None
    ready_median: float
    ready_p99: float
    alone_ready: tuple[float, float]
    alone_ready_to_peer: float | None
    writes: float
    reads: float
    twilio_calls: float
    cpu_create: float
    cpu_delete: float
    cpu_together: float
    control_plane_create: float
    control_plane_delete: float
    max_rss_mb: float
    idle_writes: float | None
    deletions_per_second: float
    deletions_to_peer: float | None
    deletion_reads: float
    deletion_writes: float
    deletion_twilio_calls: float
    alone_gone: tuple[float, float]
    elsewhere: float
    same_code: bool


def summarize(runs: Sequence[Run], cases: Sequence[Case]) -> list[Summary]:
    measured = {run.case for run in runs}
    return [_summary(case, runs) for case in cases if case.name in measured]


def _summary(case: Case, runs: Sequence[Run]) -> Summary:
    own = [run for run in runs if run.case == case.name]

    def median(of: Callable[[Run], float]) -> float:
        return statistics.median(map(of, own))

    def ratio(other: str, of: Callable[[Run], float]) -> float | None:
        others = {run.round: of(run) for run in runs if run.case == other}
        ratios = [of(run) / others[run.round] for run in own if run.round in others]
        return statistics.median(ratios) if ratios else None

    def p50_p90(of: Callable[[Run], tuple[float, ...]]) -> tuple[float, float]:
        return median(lambda run: percentile(of(run), 50)), median(lambda run: percentile(of(run), 90))

    def rate(run: Run) -> float:
        return run.create.per_second

    def per_cpu_second(run: Run) -> float:
        return 1 / run.create.all_cpu_seconds

    idle = [run.idle_writes for run in own if run.idle_writes is not None]
    return Summary(
        case=case.name,
        channels_per_second=median(rate),
        to_floor=ratio(case.floor, rate),
        to_peer=ratio("peer", rate),
        to_idiomatic=ratio("idiomatic", rate),
        to_floor_by_cpu=ratio(case.floor, per_cpu_second),
        to_peer_by_cpu=ratio("peer", per_cpu_second),
        ready_median=median(lambda run: percentile(run.create.times, 50)),
        ready_p99=median(lambda run: percentile(run.create.times, 99)),
        alone_ready=p50_p90(lambda run: run.alone_ready),
        alone_ready_to_peer=ratio("peer", lambda run: percentile(run.alone_ready, 50)),
        writes=median(lambda run: run.create.writes),
        reads=median(lambda run: run.create.reads),
        twilio_calls=median(lambda run: sum(run.create.twilio_calls.values())),
        cpu_create=median(lambda run: run.create.cpu_milliseconds("subject")),
        cpu_delete=median(lambda run: run.delete.cpu_milliseconds("subject")),
        cpu_together=median(lambda run: run.cpu_milliseconds),
        control_plane_create=median(lambda run: run.create.cpu_milliseconds("control plane")),
        control_plane_delete=median(lambda run: run.delete.cpu_milliseconds("control plane")),
        max_rss_mb=median(lambda run: run.max_rss) / 1e6,
        idle_writes=max(idle) if idle else None,
        deletions_per_second=median(lambda run: run.delete.per_second),
        deletions_to_peer=ratio("peer", lambda run: run.delete.per_second),
        deletion_reads=median(lambda run: run.delete.reads),
        deletion_writes=median(lambda run: run.delete.writes),
        deletion_twilio_calls=median(lambda run: sum(run.delete.twilio_calls.values())),
        alone_gone=p50_p90(lambda run: run.alone_gone),
        elsewhere=median(lambda run: run.elsewhere),
        same_code=len({run.code for run in own}) == 1 and "later" not in own[0].code,
    )


def results(summaries: Sequence[Summary]) -> list[Result]:
    """Return the aims of the cases that were measured, with their results."""
    found = []
    for each in summaries:
        if each.case.split(",")[0] in {"floor", "idiomatic", "peer"}:
            continue
        at_birth = each.case.endswith(AT_BIRTH)
        values = [
            (aims.TO_READY_AT_BIRTH if at_birth else aims.TO_READY_EQUAL, each.to_peer),
            (aims.TO_FLOOR_AT_BIRTH if at_birth else aims.TO_FLOOR, each.to_floor),
            (aims.TO_IDIOMATIC, each.to_idiomatic),
            (aims.CPU, each.cpu_together),
            (aims.ALONE, each.alone_ready_to_peer),
            (aims.WRITES_AT_BIRTH if at_birth else aims.WRITES, each.writes),
            (aims.IDLE_WRITES, each.idle_writes),
        ]
        found += [Result(aim, value, each.case) for aim, value in values if value is not None]
    return found


def show(console: Console, summaries: Sequence[Summary], load: Load) -> None:
    table = Table(title=f"{load.channels} channels, {load.accounts} accounts, medians of {load.rounds}")
    table.add_column("")
    for each in summaries:
        table.add_column(each.case.replace(", ", "\n"), justify="right")
    rows: list[tuple[str, Callable[[Summary], str]]] = [
        ("channels per second to Ready", lambda s: f"[bold]{s.channels_per_second:.0f}[/]"),
        ("x floor", lambda s: _number(s.to_floor)),
        ("x floor, by CPU time of all", lambda s: _number(s.to_floor_by_cpu)),
        ("x peer", lambda s: _number(s.to_peer)),
        ("x peer, by CPU time of all", lambda s: _number(s.to_peer_by_cpu)),
        ("x idiomatic", lambda s: _number(s.to_idiomatic)),
        ("Kubernetes writes, reads", lambda s: f"{s.writes:.2f}, {s.reads:.2f}"),
        ("Twilio calls", lambda s: f"{s.twilio_calls:.2f}"),
        ("time to Ready, median and p99", lambda s: f"{s.ready_median:.2f}, {s.ready_p99:.2f} s"),
        ("alone to Ready, p50 and p90", lambda s: _milliseconds(s.alone_ready)),
        ("other writes of a check", lambda s: _number(s.idle_writes, "{:.0f}")),
        ("deletions per second", lambda s: f"[bold]{s.deletions_per_second:.0f}[/]"),
        ("x peer", lambda s: _number(s.deletions_to_peer)),
        ("Kubernetes writes, reads", lambda s: f"{s.deletion_writes:.2f}, {s.deletion_reads:.2f}"),
        ("Twilio calls", lambda s: f"{s.deletion_twilio_calls:.2f}"),
        ("alone to gone, p50 and p90", lambda s: _milliseconds(s.alone_gone)),
        ("CPU ms: create + delete", lambda s: f"{s.cpu_create:.2f} + {s.cpu_delete:.2f}"),
        ("together", lambda s: f"[bold]{s.cpu_together:.2f}[/]"),
        ("API server's: create + delete", lambda s: f"{s.control_plane_create:.2f} + {s.control_plane_delete:.2f}"),
        ("memory, at most", lambda s: f"{s.max_rss_mb:.0f} MB"),
        ("CPU used by other programs", lambda s: f"{s.elsewhere:.0%}"),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(each) for each in summaries))
    console.print(table)
    for each in summaries:
        if not each.same_code:
            console.print(
                f"[red]{each.case}: its source was edited during the benchmark, so these figures cannot be compared.[/]"
            )
    if any(each.elsewhere > BUSY for each in summaries):
        console.print("Other programs used the CPU: rely on CPU times and their ratios, not on the rates.")


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _milliseconds(p50_p90: tuple[float, float]) -> str:
    return ", ".join(f"{seconds * 1000:.0f}" for seconds in p50_p90) + " ms"


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
        "results": [{**asdict(each), "met": each.met} for each in results(summaries)],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
