"""What N channels in S shards and A accounts need, computed from measured unit costs.

    python -m tests.bench.simulate
    python -m tests.bench.simulate --channels 1000000 --shards 10 --accounts 1000

Each unit cost is a constant below, with where it comes from. The figures are for planning: they say which limit comes
first and how far away the others are, to within a factor of two. Whatever is not in the list is not in them: other
users of the cluster, the audit log, replication of etcd, and clients who read channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

KB, MB, GB = 1e3, 1e6, 1e9
KIB, MIB, GIB = 2.0**10, 2.0**20, 2.0**30
HOUR = 3600.0

# docs/performance.md, "How many channels" and "Results"
MEMORY_PER_CHANNEL = 3.2 * KIB
CHANNEL_BYTES = 4.1 * KB
RECORD_BYTES = 1.8 * KB
WRITES_OF_CREATION = 3  # of the operator: finalizer, record, status; 2 with the finalizer at birth
TWILIO_CALLS_OF_CREATION = 2  # find the number, set the webhook
PAGE = 1000  # numbers in one answer of Twilio's
# docs/performance.md, "What was tried": as it was, three writes, milliseconds of the API server and the operator
API_SERVER_CPU_OF_CREATION = 9.9e-3
OPERATOR_CPU_OF_CREATION = 3.6e-3
# deploy/helm/values.yaml: memory of an operator without channels, and its limit
MEMORY_WITHOUT_CHANNELS = 92 * MIB
MEMORY_LIMIT = 512 * MIB
# 2026-11-30, loaded and slow machine, `python -m tests.bench --parts scale --ready 10000`: 8.3 s for 10,000 channels
OPERATOR_CPU_OF_DRIFT_CHECK = 8.3 / 10_000
# 2026-11-30, loaded machine, CPU time of 10,000: lists of the API server parsed, cached and indexed; without HTTP, TLS
OPERATOR_CPU_OF_LOADING = 0.25e-3
# The same lists: metadata of a record, and of a channel (its object without sealed token, other fields and status)
RECORD_METADATA_BYTES = 1.2 * KB
CHANNEL_METADATA_BYTES = 1.9 * KB
# smschannel.settings: the defaults
DRIFT_INTERVAL = 600.0
RESYNC_INTERVAL = 600.0
TWILIO_CONCURRENCY = 4
LEASE = 30.0
ACCOUNT_CACHE_SECONDS = DRIFT_INTERVAL / 2  # smschannel.wiring
# smschannel.rotation: records sealed again per second and shard
RESEALS_PER_SECOND = 75 / (15 + 75 * 0.2)
RENEWAL_DAYS = 30
# etcd's documentation: the quota by default, and the largest that it suggests; revisions are kept until kube-apiserver
# compacts them, every five minutes
ETCD_QUOTA = 2 * GIB
ETCD_LARGEST_QUOTA = 8 * GIB
COMPACTION_SECONDS = 300.0
# Assumptions, to be replaced with your own: cores of the API servers, and seconds of a call to Twilio
API_SERVER_CORES = 8
TWILIO_SECONDS = 0.2


class Need(NamedTuple):
    """One line: what is needed, how much of what there is, and what the limit is. `limit` is None if there is none."""

    what: str
    value: float
    unit: str
    limit: float | None = None
    of: str = ""

    @property
    def share(self) -> float:
        """Return what part of the limit is used; 0 without one."""
        return self.value / self.limit if self.limit else 0


class Installation(NamedTuple):
    """Channels, spread evenly over shards and accounts. Every account belongs to one shard."""

    channels: int
    shards: int
    accounts: int

    @property
    def per_shard(self) -> float:
        return self.channels / self.shards

    def created_per_second(self) -> float:
        """Return how fast all channels become Ready, if they are created at once."""
        api_server = API_SERVER_CORES / API_SERVER_CPU_OF_CREATION
        operators = self.shards / OPERATOR_CPU_OF_CREATION
        twilio = self.accounts * TWILIO_CONCURRENCY / (TWILIO_CALLS_OF_CREATION * TWILIO_SECONDS)
        return min(api_server, operators, twilio)

    def etcd_bytes(self) -> float:
        return self.channels * (CHANNEL_BYTES + RECORD_BYTES)

    def etcd_peak(self) -> float:
        """Return the bytes while all are created: revisions of a channel are kept until they are compacted."""
        recent = min(self.channels, self.created_per_second() * COMPACTION_SECONDS)
        former = WRITES_OF_CREATION - 1  # of a channel: as it was applied, and with the finalizer
        return self.etcd_bytes() + recent * former * CHANNEL_BYTES

    def twilio_per_hour(self) -> float:
        """Return the most reads of all accounts: their pages, and one of their Messaging Services."""
        pages = math.ceil(self.channels / self.accounts / PAGE)
        return self.accounts * (pages + 1) * HOUR / ACCOUNT_CACHE_SECONDS

    def needs(self) -> Iterator[Need]:
        """Yield the lines of the table."""
        mine, rate = self.per_shard, self.created_per_second()
        resync = mine * (CHANNEL_METADATA_BYTES + RECORD_METADATA_BYTES)
        loading = mine * OPERATOR_CPU_OF_LOADING
        yield Need("etcd, Ready channels", self.etcd_bytes() / GIB, "GiB", ETCD_QUOTA / GIB, "default quota")
        yield Need(
            "etcd, while all are created", self.etcd_peak() / GIB, "GiB", ETCD_LARGEST_QUOTA / GIB, "largest quota"
        )
        memory = MEMORY_WITHOUT_CHANNELS + mine * MEMORY_PER_CHANNEL
        yield Need("memory of a shard's leader", memory / MIB, "MiB", MEMORY_LIMIT / MIB, "the chart's limit")
        yield Need("start of a shard's leader, its CPU", loading, "s", 2 * LEASE, "two leases")
        drift = mine * OPERATOR_CPU_OF_DRIFT_CHECK / DRIFT_INTERVAL
        yield Need("drift checks, CPU of a shard's leader", 100 * drift, "%", 50, "half a core")
        yield Need("resync, a shard's lists", resync / MB, "MB")
        yield Need("resync, all lists", self.shards * resync / RESYNC_INTERVAL / MB, "MB/s")
        yield Need("start of all shards, lists", self.channels * (CHANNEL_BYTES + RECORD_METADATA_BYTES) / GB, "GB")
        yield Need("Twilio, reads of all accounts, at most", self.twilio_per_hour(), "an hour")
        yield Need("Twilio, reads of an account, at most", self.twilio_per_hour() / self.accounts, "an hour")
        yield Need("created per second, at most", rate, "channels")
        yield Need("all created, at least", self.channels / rate / 60, "minutes")
        yield Need("watch traffic of that", rate * WRITES_OF_CREATION * CHANNEL_BYTES / MB, "MB/s")
        resealed = mine / RESEALS_PER_SECOND / HOUR
        yield Need("records sealed again after a renewal", resealed, "hours", RENEWAL_DAYS * 24, "renewal of the key")

    def first_limit(self) -> Need:
        """Return the need that comes closest to its limit, or goes furthest beyond it."""
        return max(self.needs(), key=lambda need: need.share)


def most_channels(shards: int, accounts: int = 1000, *, but: tuple[str, ...] = ()) -> int:
    """Return with how many channels in so many shards the first limit is reached, leaving out the needs in `but`."""
    one = Installation(1_000_000, shards, accounts)
    low, high = 0, 100_000_000
    while high - low > 1:
        middle = (low + high) // 2
        needs = one._replace(channels=middle).needs()
        low, high = (low, middle) if any(each.share > 1 for each in needs if each.what not in but) else (middle, high)
    return low


def rows(*installations: Installation) -> list[list[str]]:
    """Return the rows of a table: what is needed, how much by each installation, and the limit."""
    return [
        [
            each[0].what,
            *map(_needed, each),
            f"{each[0].limit:,.4g} {each[0].unit}: {each[0].of}" if each[0].limit else "",
        ]
        for each in zip(*(each.needs() for each in installations), strict=True)
    ]


def _needed(need: Need) -> str:
    number = f"{need.value:,.0f}" if need.value >= 100 else f"{need.value:.2g}"
    return f"{number} {need.unit}" + (f" ({need.share:.0%})" if need.limit else "")


def show(console: Console, installation: Installation) -> None:
    """Print the table of an installation."""
    given = f"{installation.channels:,} channels, {installation.shards:,} shards, {installation.accounts:,} accounts"
    table = Table(title=given)
    for heading in ("what", "needed", "limit"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows(installation):
        table.add_row(*row)
    console.print(table)


@click.command(help=__doc__.replace("\n    ", "\n\n\b\n    ") if __doc__ else None)
@click.option("--channels", type=click.IntRange(1), default=1_000_000, show_default=True)
@click.option("--shards", type=click.IntRange(1), default=10, show_default=True)
@click.option("--accounts", type=click.IntRange(1), default=1_000, show_default=True, help="Twilio accounts.")
def main(channels: int, shards: int, accounts: int) -> None:
    console = Console(width=120)
    if accounts < shards:
        raise click.UsageError(f"write at least --accounts {shards}: namespaces that share an account are in one shard")
    show(console, Installation(channels, shards, accounts))
    for count in sorted({1, shards}):
        most = most_channels(count, accounts)
        first = Installation(most, count, accounts).first_limit()
        name = "one operator" if count == 1 else f"{count} shards"
        console.print(f"With {name} the first limit is at {most:,} channels: {first.what} ({first.of}).")


if __name__ == "__main__":
    main()
