"""One cluster for the whole story, whose steps follow each other; at the end a table, and nothing is left behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console
from rich.table import Table

from deploy.build import Narrator
from deploy.kind.engine import ROOT
from deploy.kind.environment import Environment
from tests.kind import host
from tests.kind.pods import Pods

HOME = ROOT / ".local/kind-test"
TAG = "story"
_rows: list[tuple[str, float, str]] = []


@pytest.fixture(scope="session")
def environment() -> Iterator[Environment]:
    """A place for engine and cluster; at the end all of it is removed, and the machine is as it was before."""
    environment = Environment(HOME, Narrator(sys.stderr))
    with environment.locked():
        environment.down()  # what is left of a run that was killed
        before = host.snapshot()
        try:
            yield environment
        finally:
            started = time.monotonic()
            environment.down()
            left = host.differences(before, host.snapshot())
            remark = f"{len(left)} differences on the machine"
            _rows.append(("Remove everything", time.monotonic() - started, remark))
        assert left == [], "the machine is as it was before"


@pytest.fixture(scope="session")
def pods(environment: Environment) -> Pods:
    """The product with pods, and an account and a client to use it."""
    started = time.monotonic()
    access = environment.start()
    _rows.append(("Engine and cluster of two nodes, Ready", time.monotonic() - started, ""))
    started = time.monotonic()
    environment.load_images(TAG)
    _rows.append(("Images of the product and the twin", time.monotonic() - started, ""))
    started = time.monotonic()
    environment.install(access, TAG)
    _rows.append(("helm install, all pods Ready", time.monotonic() - started, ""))
    pods = Pods(environment, access, TAG)
    pods.start_client((environment.home / "shim-ca.crt").read_text())
    return pods


@pytest.fixture
def note() -> Callable[[str], None]:
    """Add a remark to the step's row in the table."""
    return lambda text: _notes.append(text)


_notes: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    _notes.clear()
    started = time.monotonic()
    try:
        yield
    finally:
        what = item.name.removeprefix("test_").replace("_", " ").capitalize()
        _rows.append((what, time.monotonic() - started, "; ".join(_notes)))


def pytest_terminal_summary() -> None:
    table = Table("", "step", "seconds", "seen", title="Real pods")
    for number, (what, seconds, seen) in enumerate(_rows):
        table.add_row(str(number), what, f"{seconds:.1f}", seen)
    Console(file=sys.stdout, width=150).print(table)
