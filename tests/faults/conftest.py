"""One rig for all tests here, in each test worker. They try a sample, or everything if FAULTS=all (`make faults`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.table import Table

from deploy.build import Narrator
from tests.faults.life import Life
from tests.faults.rig import Rig, Row

EVERYTHING = os.environ.get("FAULTS") == "all"
_ROWS: list[Row] = []


@pytest.fixture(scope="package")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("faults"), Narrator(sys.stderr)) as running:
        yield running
        _ROWS.extend(running.rows)
        assert running.stack.twin_call("GET", "/violations")["violations"] == [], (
            "only SmsUrl and SmsMethod are written"
        )
        assert running.broken_rules == [], "every status keeps to the rules of conditions"
        assert running.leaks() == [], "no token is anywhere but in the users' own Secrets"
        assert running.written_off() == [], "no number is given up"
        assert running.bugs() == [], "no unexpected exception"


@pytest.fixture(scope="package")
def life(rig: Rig) -> Life:
    return Life(rig)


def pytest_terminal_summary() -> None:
    if not (EVERYTHING and _ROWS):
        return
    table = Table("scenario", "call", "fault", "outcome", "hits", "seconds", title="Faults")
    for row in _ROWS:
        table.add_row(row.scenario, row.call, row.fault, row.outcome, str(row.retries), f"{row.seconds:.1f}")
    Console(width=160).print(table)
