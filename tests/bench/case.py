"""What the speed benchmark measures, and the result of one measurement."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIANTS = ("floor", "idiomatic", "ours")
AT_BIRTH = ", finalizer at birth"


@dataclass(frozen=True)
class Case:
    """A variant to measure; `at_birth`: with the admission policy that adds the finalizer to new channels.

    `source` is a source root of the operator; None means this tree's.
    """

    variant: str
    at_birth: bool = False
    label: str = ""
    source: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.label or self.variant}{AT_BIRTH if self.at_birth else ''}"

    def code(self) -> str:
        """Return a digest of the source that is measured."""
        digest = hashlib.sha256()
        own = Path(__file__).parent
        root = own if self.variant != "ours" else (self.source or own.parents[1] / "operator") / "smschannel"
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:12]

    @property
    def floor(self) -> str:
        """Return the name of the case that makes the same writes and nothing else."""
        return Case("floor", self.at_birth).name


@dataclass(frozen=True)
class Load:
    """The options that all runs have in common."""

    channels: int
    rounds: int
    accounts: int
    workers: int
    seed: int


@dataclass(frozen=True)
class Run:
    """One measurement of one case. Times are seconds; `writes` and `twilio_calls` are per channel, by kind.

    `alone` is the median time to Ready of a single channel while nothing else happens, at the start of the run.
    `idle_writes` counts the writes of 200 checks that found nothing changed, without those that ask for a check and
    acknowledge it; None if the variant has no checks. `code` is a digest of the source, which may be edited while the
    benchmark runs. `cpu_seconds` are those of the batch, by process. `elsewhere` is the share of this machine's CPU
    time that other programs, or other guests of the hypervisor, used during the batch.
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
