"""What is measured, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIANTS = ("floor", "idiomatic", "ours")
AT_BIRTH = ", finalizer at birth"


@dataclass(frozen=True)
class Case:
    """A variant; `at_birth` with the admission policy that gives new channels their finalizer.

    `source` is another source root of the operator than this tree's.
    """

    variant: str
    at_birth: bool = False
    label: str = ""
    source: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.label or self.variant}{AT_BIRTH if self.at_birth else ''}"

    def code(self) -> str:
        """A digest of the source that is measured."""
        digest = hashlib.sha256()
        own = Path(__file__).parent
        root = own if self.variant != "ours" else (self.source or own.parents[1] / "operator") / "smschannel"
        for file in sorted(root.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:12]

    @property
    def floor(self) -> str:
        """The name of the case that makes the same writes and nothing else."""
        return Case("floor", self.at_birth).name


@dataclass(frozen=True)
class Load:
    """`--channels` and what else every run has in common."""

    channels: int
    rounds: int
    accounts: int
    workers: int
    seed: int


@dataclass(frozen=True)
class Run:
    """One measurement of one case. Times are seconds; what is per channel leaves the load generator out.

    `alone` is the median time to Ready of a channel with nothing else to do, in the run's first seconds.
    `idle_writes` is all writes of a round in which 200 channels were looked at and nothing had changed.
    `code` is a digest of the operator's source, which somebody may edit while the bench runs.
    `elsewhere` is the share of this machine's CPU time that none of our processes could have during the batch:
    other programs had it, or the hypervisor's other guests.
    """

    case: str
    round: int
    code: str
    seconds: float
    channels_per_second: float
    time_to_ready: tuple[float, ...]
    alone: float
    writes: Mapping[str, float]
    twilio_calls: Mapping[str, float]
    cpu_seconds: Mapping[str, float]
    max_rss: int
    idle_writes: int | None
    deletions_per_second: float
    elsewhere: float

    @property
    def all_cpu_seconds(self) -> float:
        return sum(self.cpu_seconds.values())
