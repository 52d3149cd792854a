"""What the speed benchmark measures, and the result of one measurement."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.bench import gopeer

VARIANTS = ("floor", "idiomatic", "peer", "ours")
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
        files = gopeer.PEER.sources() if self.variant == "peer" else sorted(root.rglob("*.py"))
        for file in files:
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
class Phase:
    """What the creations of a batch took, or its deletions. Times are seconds.

    `times` has each channel's, until it was Ready or gone. `kubernetes_calls` (by "VERB resource", watches left out)
    and `twilio_calls` (by "METHOD kind") are per channel. `cpu_seconds` are by process. `elsewhere` is the share of
    this machine's CPU time that other programs, or other guests of the hypervisor, used meanwhile.
    """

    seconds: float
    times: tuple[float, ...]
    kubernetes_calls: Mapping[str, float]
    twilio_calls: Mapping[str, float]
    cpu_seconds: Mapping[str, float]
    elsewhere: float

    @property
    def per_second(self) -> float:
        return len(self.times) / self.seconds

    @property
    def writes(self) -> float:
        """Return the Kubernetes writes per channel."""
        return sum(count for call, count in self.kubernetes_calls.items() if not is_read(call))

    @property
    def reads(self) -> float:
        """Return the Kubernetes reads per channel."""
        return sum(count for call, count in self.kubernetes_calls.items() if is_read(call))

    @property
    def all_cpu_seconds(self) -> float:
        return sum(self.cpu_seconds.values())

    def cpu_milliseconds(self, process: str) -> float:
        """Return the CPU time of a process per channel."""
        return self.cpu_seconds[process] * 1000 / len(self.times)


def is_read(call: str) -> bool:
    """Return whether a "VERB resource" reads."""
    return call.startswith(("GET ", "LIST "))


def percentile(times: tuple[float, ...], percent: float) -> float:
    """Return the time that `percent` of the times do not exceed."""
    return sorted(times)[min(len(times) - 1, int(len(times) * percent / 100))]


@dataclass(frozen=True)
class Run:
    """One measurement of one case. Times are seconds.

    `alone_ready` and `alone_gone` are the times of channels created, and deleted, one after another while nothing else
    happens, before the batch. `idle_writes` counts the writes of 200 checks that found nothing changed, without those
    that ask for a check and acknowledge it; None if the variant has no checks. `code` is a digest of the source, which
    may be edited while the benchmark runs.
    """

    case: str
    round: int
    code: str
    create: Phase
    delete: Phase
    alone_ready: tuple[float, ...]
    alone_gone: tuple[float, ...]
    max_rss: int
    idle_writes: int | None

    @property
    def cpu_milliseconds(self) -> float:
        """Return the operator's CPU time per channel, its creation and its deletion together."""
        return self.create.cpu_milliseconds("subject") + self.delete.cpu_milliseconds("subject")

    @property
    def elsewhere(self) -> float:
        return statistics.fmean((self.create.elsewhere, self.delete.elsewhere))
