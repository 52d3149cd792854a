"""The binary of the Go peer (`peer/`): built like the local control plane, then taken from the same cache.

python -m tests.bench.gopeer          # prints its path
python -m tests.bench.gopeer --vet    # checks the sources instead
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.build import GoProgram, command_line

PEER = GoProgram(
    name="peer",
    title="the Go peer",
    module=Path(__file__).parent / "peer",
    announcement="Building the Go peer: about 800 packages, of which the control plane has built most.",
)


if __name__ == "__main__":
    sys.exit(command_line(PEER))
