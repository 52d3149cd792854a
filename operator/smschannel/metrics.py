"""The operator's Prometheus metrics. No label grows with users: no account, number, namespace or instance is one."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable
from functools import partial

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from smschannel.api.reasons import Reason

disable_created_metrics()  # type: ignore[no-untyped-call]  # an extra series beside each counter

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

RECONCILES = Counter("smschannel_reconciles", "Reconciles by result: a reason, or the kind of failure.", ["result"])
RECONCILE_SECONDS = Histogram("smschannel_reconcile_duration_seconds", "Duration of a reconcile.", buckets=_FAST)
QUEUE_DEPTH = Gauge("smschannel_queue_depth", "Channels waiting for a worker.")
QUEUE_WAIT_SECONDS = Histogram(
    "smschannel_queue_wait_seconds", "Time from when a channel is due until a worker takes it.", buckets=_FAST
)
TWILIO_SECONDS = Histogram(
    "smschannel_twilio_call_duration_seconds",
    "Calls to Twilio by kind and outcome (HTTP status, or error).",
    ["kind", "outcome"],
    buckets=_FAST,
)
KUBERNETES_WRITES = Counter("smschannel_kubernetes_writes", "Writes to the Kubernetes API by kind.", ["kind"])
CHANNELS = Gauge("smschannel_channels", "Channels by the reason that Ready carries.", ["reason"])
DRIFT = Counter("smschannel_drift", "Webhooks found changed at Twilio, by action.", ["action"])
CLAIMS = Gauge("smschannel_claims", "Numbers that are held by a channel.")
PENDING_RESTORES = Gauge("smschannel_pending_restores", "Numbers that are no longer desired and not restored yet.")
FOREIGN_CHANGES = Counter(
    "smschannel_foreign_changes", "Objects of the operator's own that others changed or deleted, by kind.", ["object"]
)
LEADER = Gauge("smschannel_leader", "1 while this process leads, 0 while it stands by.")
NAMESPACES = Gauge("smschannel_namespaces", "Namespaces whose channels are managed, by whatever shard.")
NAMESPACES_LED = Gauge("smschannel_namespaces_led", "Those that this process manages: those of its shard, if it leads.")
LEASE_ACQUIRED = Counter("smschannel_lease_acquired", "How often this process became the leader.")
LEASE_RENEW_FAILURES = Counter("smschannel_lease_renew_failures", "Renewals of the lease that failed or took too long.")
WATCH_AGE_SECONDS = Gauge(
    "smschannel_watch_age_seconds",
    "Seconds since the API server last answered the watch that is oldest; 0 if this process does not watch.",
)
RESYNC_FAILURES = Counter("smschannel_resync_failures", "Resyncs that failed: what the watch misses is not found.")
OBSERVE_ONLY = Gauge("smschannel_observe_only", "1 if this process only observes, and writes nothing to Twilio.")
WRITTEN_OFF = Counter("smschannel_written_off", "Numbers that were never restored: their records say why.")
KEYS = Gauge("smschannel_keyring_keys", "Keys of the keyring: the newest seals, all open.")
NEWEST_KEY_CREATED = Gauge(
    "smschannel_keyring_newest_key_created_timestamp_seconds",
    "When the newest key of the keyring was created, in Unix time; 0 if that is not known.",
)
KEY_RENEWAL_DUE = Gauge(
    "smschannel_keyring_renewal_due_timestamp_seconds",
    "When the newest key is to be renewed, in Unix time; 0 if the operator does not renew it.",
)
RECORDS_TO_RESEAL = Gauge("smschannel_records_to_reseal", "Records that are not sealed with the newest key yet.")


for _kind in ("keyring", "public_key", "settings", "record"):  # from 0 on, so that the first increase can be seen
    FOREIGN_CHANGES.labels(_kind)
RECONCILES.labels("Bug")


def follow(
    *,
    queue_depth: Callable[[], int],
    claims: Callable[[], int],
    pending_restores: Callable[[], int],
    channels: Counts[Reason],
) -> None:
    """Read the gauges from what they are about whenever they are scraped, in place of what was followed before."""
    QUEUE_DEPTH.set_function(queue_depth)
    CLAIMS.set_function(claims)
    PENDING_RESTORES.set_function(pending_restores)
    for reason in Reason:
        CHANNELS.labels(reason.name).set_function(partial(channels.__getitem__, reason))


def unfollow() -> None:
    """Let the gauges show 0: this process works on no channels."""
    follow(queue_depth=lambda: 0, claims=lambda: 0, pending_restores=lambda: 0, channels=Counts())
    for gauge in (KEYS, NEWEST_KEY_CREATED, KEY_RENEWAL_DUE, RECORDS_TO_RESEAL):
        gauge.set(0)
