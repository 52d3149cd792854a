"""The binary of the Go peer (`peer/`): built like the local control plane, then taken from the same cache.

python -m tests.bench.gopeer          # prints its path
python -m tests.bench.gopeer --vet    # checks the sources instead
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.build import BuildError, GoProgram, Narrator, Progress

MODULE = Path(__file__).parent / "peer"
PEER = GoProgram(
    name="peer",
    title="the Go peer",
    module=MODULE,
    announcement="Building the Go peer: about 800 packages, of which the control plane has built most.",
)


def sources() -> list[Path]:
    """Return the files that the binary is made of."""
    return sorted([MODULE / "go.mod", MODULE / "go.sum", *MODULE.glob("*.go")])


def ensure_peer(progress: Progress) -> Path:
    """Return the binary's path, building it first if it is not in the cache. Raises BuildError."""
    return PEER.ensure(progress)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the Go peer unless it is cached, and print its path.")
    parser.add_argument("--vet", action="store_true", help="check its sources with `go vet` instead")
    narrator = Narrator(sys.stderr)
    try:
        if parser.parse_args().vet:
            PEER.vet(narrator)
        else:
            print(ensure_peer(narrator))
    except BuildError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
