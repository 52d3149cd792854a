"""The command line of the benchmarks: `python -m tests.bench`, which `make bench` runs."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import click
import uvloop
from rich.console import Console

from deploy.build import BuildError, Narrator
from deploy.local.cluster import ControlPlaneError
from deploy.local.stack import StackError
from tests.bench import fairness, gopeer, report, scale, shim
from tests.bench.aims import Result, show_results
from tests.bench.case import VARIANTS, Case, Load, Run
from tests.bench.load import LoadError
from tests.bench.run import measure

PARTS = ("speed", "scale", "fairness", "rest")


def _parts(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    chosen = [each.strip() for each in value.split(",") if each.strip()]
    if not chosen or set(chosen) - set(PARTS):
        raise click.BadParameter(f"choose from {', '.join(PARTS)}, separated by commas")
    return [each for each in PARTS if each in chosen]


def _variants(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    chosen = [each.strip() for each in value.split(",") if each.strip()]
    if not chosen or set(chosen) - set(VARIANTS):
        raise click.BadParameter(f"choose from {', '.join(VARIANTS)}, separated by commas")
    return [each for each in VARIANTS if each in chosen]


def _sources(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    sources = {}
    for value in values:
        name, _separator, root = value.partition("=")
        if not name or not (Path(root) / "smschannel/__main__.py").is_file():
            raise click.BadParameter(f"{value}: write NAME=DIR, where DIR/smschannel is the operator's package")
        sources[name] = Path(root).absolute()
    return sources


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--parts", callback=_parts, default=",".join(PARTS), help="Measure only these.")
@click.option("--channels", type=click.IntRange(1), default=1000, help="Channels in a batch.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, help="How often everything is measured; the output has medians."
)
@click.option("--accounts", type=click.IntRange(1), default=40, help="Twilio accounts the channels are spread over.")
@click.option(
    "--workers", type=click.IntRange(1, 1000), default=64, help="How many channels each variant reconciles at a time."
)
@click.option("--seed", type=int, default=1, help="For the instances' IDs and the order of the variants.")
@click.option("--variants", callback=_variants, default=",".join(VARIANTS), help="Measure only these.")
@click.option(
    "--finalizer-policy/--no-finalizer-policy",
    default=True,
    help="Measure all but idiomatic also with deploy/manifests/finalizer-policy.yaml, which saves one of three writes.",
)
@click.option(
    "--also",
    "sources",
    metavar="NAME=DIR",
    multiple=True,
    callback=_sources,
    help="Measure the operator of another source root too, such as old=/tmp/old/operator; it must know the Lease."
    " May be repeated.",
)
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Speed: write every run, the seed and all versions to this file, after each run.",
)
@click.option("--ready", type=click.IntRange(1), default=10_000, help="Scale: how many Ready channels there are.")
@click.option(
    "--period", type=click.FloatRange(10), default=60, help="Scale: the interval of drift checks, in seconds."
)
@click.option(
    "--hanging", type=click.IntRange(1), default=300, help="Fairness: channels of the account whose calls hang."
)
@click.option(
    "--logs", type=click.Path(file_okay=False, path_type=Path), help="Keep the programs' logs in this directory."
)
def main(
    channels: int,
    rounds: int,
    accounts: int,
    workers: int,
    seed: int,
    variants: list[str],
    finalizer_policy: bool,
    sources: dict[str, Path],
    path: Path | None,
    ready: int,
    period: float,
    hanging: int,
    logs: Path | None,
    parts: list[str],
) -> None:
    """Measure how fast channels become Ready, what many Ready ones cost, and whether accounts slow each other down.

    Each part starts a control plane and a Twilio twin of its own. The last table has every aim with its result.

    Speed compares the operator with the usual ways to write one, and with the floor. In every round, each variant is
    started, has sixty channels created, and deleted, one after another (to warm up, and for the latency of a single
    channel), then the batch: the time runs from the first create to the last Ready that a watch shows. Then 200
    channels are checked again (only by ours), and the batch is deleted.

    \b
    floor      only the Kubernetes writes that ours makes: nothing in Python is faster
    idiomatic  an operator written as kopf's documentation recommends: tests/bench/idiomatic.py
    peer       an operator in Go, written with controller-runtime, that makes the same calls as ours: tests/bench/peer
    ours       the operator

    Scale makes Ready channels without the operator, starts it beside them, and measures the start, the memory, an
    interval of drift checks, and how long new channels take meanwhile. Fairness measures the channels of nine accounts
    while the calls of a tenth hang. Rest is `python -m tests.bench.shim`, which has options of its own.

    All processes share this machine's cores: compare ratios, not rates of different machines.

    \b
    Try it:
      python -m tests.bench --parts speed --channels 200 --rounds 1
      python -m tests.bench --parts speed --variants peer,ours --no-finalizer-policy --json bench.json
      python -m tests.bench --parts scale --ready 1000 --period 20
      git worktree add /tmp/old HEAD~1
      python -m tests.bench --parts speed --variants ours --also old=/tmp/old/operator
    """
    load = Load(channels=channels, rounds=rounds, accounts=accounts, workers=workers, seed=seed)
    cases = [Case(variant) for variant in variants]
    if "ours" in variants:
        cases += [Case("ours", label=name, source=source) for name, source in sources.items()]
    if finalizer_policy:
        cases += [Case(each.variant, True, each.label, each.source) for each in cases if each.variant != "idiomatic"]

    def save(runs: list[Run]) -> None:
        if path:
            report.write(path, load, report.summarize(runs, cases), runs)

    console, progress = Console(width=150), Narrator(sys.stderr)
    if "peer" in variants and "speed" in parts:
        gopeer.PEER.ensure(progress)
    results: list[Result] = []
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="smschannel-bench-") as temporary:
            home = (logs or Path(temporary)).absolute() / part
            if part == "scale":
                measured = uvloop.run(scale.measure(ready, period, workers, seed, home, progress))
                scale.show(console, measured)
                results += scale.results(measured)
            elif part == "fairness":
                waits = uvloop.run(fairness.measure(load, hanging, home, progress))
                fairness.show(console, waits, load, hanging)
                results += fairness.results(waits)
            elif part == "rest":
                served = uvloop.run(shim.everything(home, progress))
                shim.show(console, served)
                results += shim.aims_of(served)
            else:
                summaries = report.summarize(uvloop.run(measure(load, cases, home, progress, save)), cases)
                report.show(console, summaries, load)
                results += report.results(summaries)
    show_results(console, results)


if __name__ == "__main__":
    try:
        main()
    except asyncio.CancelledError:
        sys.exit("\nStopped; nothing is left running.")
    except (BuildError, ControlPlaneError, LoadError, StackError) as error:
        sys.exit(f"\n{error}")
