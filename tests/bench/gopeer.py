"""The binary of the Go peer (`peer/`): built with the local control plane's tools, then taken from the same cache.

python -m tests.bench.gopeer          # prints its path
python -m tests.bench.gopeer --vet    # checks the sources instead
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.local import build
from deploy.local.build import BuildError, Narrator, Progress

MODULE = Path(__file__).parent / "peer"
_FLAGS = ["-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"]


def sources() -> list[Path]:
    """Return the files that the binary is made of."""
    return sorted([MODULE / "go.mod", MODULE / "go.sum", *MODULE.glob("*.go")])


def ensure_peer(progress: Progress) -> Path:
    """Return the binary's path, building it first if it is not in the cache. Raises BuildError."""
    cache = build._cache()
    cache.mkdir(parents=True, exist_ok=True)
    binary = cache / _name()
    if not binary.exists():
        progress("Building the Go peer: about 800 packages, of which the control plane has built most.")
        # On the cache's own file system: the last step is a rename, so other processes see a complete binary or none.
        with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as draft:
            _go("build", progress, "-o", f"{draft}/peer")
            Path(draft, "peer").replace(binary)
    return binary


def vet(progress: Progress) -> None:
    """Check the sources with `go vet`. Raises BuildError with what it found."""
    _go("vet", progress)


def _go(command: str, progress: Progress, *options: str) -> None:
    done = subprocess.run(
        [build._go(progress), command, *_FLAGS, *options, "."],
        cwd=MODULE,
        env=build._environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(f"`go {command}` of {MODULE} failed. {build._remedy(done.stderr)}\n{done.stderr.strip()}")


def _name() -> str:
    digest = hashlib.sha256(repr((_FLAGS, sys.platform, platform.machine())).encode())
    for source in sources():
        content = source.read_bytes()
        digest.update(f"{source.name} {len(content)}\n".encode() + content)
    return f"peer-{digest.hexdigest()[:16]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the Go peer unless it is cached, and print its path.")
    parser.add_argument("--vet", action="store_true", help="check its sources with `go vet` instead")
    narrator = Narrator(sys.stderr)
    try:
        if parser.parse_args().vet:
            vet(narrator)
        else:
            print(ensure_peer(narrator))
    except BuildError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
