"""The aims of the benchmarks, all in this place, and results beside them. Ratios are of figures of one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Aim:
    """`value` is the least that is aimed at, or with `at_most` the most. `unit` is written behind the numbers."""

    what: str
    value: float
    unit: str = ""
    at_most: bool = False

    def is_met(self, result: float) -> bool:
        return result <= self.value if self.at_most else result >= self.value

    def written(self, number: float) -> str:
        digits = 0 if float(number).is_integer() and float(self.value).is_integer() else 2
        while number != self.value and round(number, digits) == self.value:  # it must not look met, or missed
            digits += 1
        return f"{number:,.{digits}f}{self.unit and ' ' + self.unit}"


TO_READY_EQUAL = Aim("to Ready, equal writes, x peer", 1.0)
TO_READY_AT_BIRTH = Aim("to Ready, finalizer at birth, x peer with equal writes", 1.3)
TO_FLOOR = Aim("to Ready, x floor", 0.7)
TO_FLOOR_AT_BIRTH = Aim("to Ready, finalizer at birth, x floor", 0.75)
TO_IDIOMATIC = Aim("to Ready, x idiomatic", 2.0)
CPU = Aim("operator's CPU per channel, create and delete together", 3.0, "ms", at_most=True)
ALONE = Aim("one channel alone, create to Ready, x peer", 1.2, at_most=True)
WRITES = Aim("Kubernetes writes per channel", 3, at_most=True)
WRITES_AT_BIRTH = Aim("Kubernetes writes per channel, finalizer at birth", 2, at_most=True)
IDLE_WRITES = Aim("other writes of checks that find nothing changed", 0, at_most=True)

DRIFT_CPU = Aim("drift check of 10,000 healthy channels, operator's CPU per interval", 2, "s", at_most=True)
DRIFT_READS = Aim("drift check, reads of numbers per page of an account", 1, at_most=True)
DRIFT_KUBERNETES = Aim("drift check, Kubernetes calls per channel", 0, at_most=True)
DRIFT_RECONCILED = Aim("drift check, share of the channels checked in an interval", 0.75)

START = Aim("start with Ready channels, of the time allowed: 3 x a raw LIST + 10 s", 1.0, at_most=True)
START_WRITES = Aim("start with Ready channels, writes", 0, at_most=True)
START_TWILIO = Aim("start with Ready channels, Twilio calls", 0, at_most=True)
MEMORY = Aim("memory per channel", 4.0, "KiB", at_most=True)

REST_GET = Aim("GET through the shim, x the bare Kubernetes GET", 0.8)
REST_POST = Aim("POST through the shim, x the bare Kubernetes calls", 0.85)
REST_REVIEWS = Aim("reviews at the API server for a cached token", 0, at_most=True)
REST_MEMORY = Aim("the shim's memory after all requests, x at first", 1.1, at_most=True)

SLOWER_BESIDE_HANGING = Aim("fairness: other accounts' p99 while one account hangs, x without", 1.2, at_most=True)


@dataclass(frozen=True)
class Result:
    """What was measured of an aim; `of` says of what, if there are several."""

    aim: Aim
    value: float
    of: str = ""

    @property
    def met(self) -> bool:
        return self.aim.is_met(self.value)


def show_results(console: Console, results: Iterable[Result]) -> None:
    """Print a table of aims and results; missed aims are marked."""
    table = Table(title="Aims")
    for heading in ("what", "of", "aim", "result", ""):
        table.add_column(heading, justify="right" if heading in {"aim", "result"} else "left")
    for each in results:
        bound = f"{'at most' if each.aim.at_most else 'at least'} {each.aim.written(each.aim.value)}"
        verdict = "[green]met[/]" if each.met else "[bold red]MISSED[/]"
        table.add_row(each.aim.what, each.of, bound, each.aim.written(each.value), verdict)
    console.print(table)
