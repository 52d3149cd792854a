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
WRITTEN_OFF = Counter("smschannel_written_off", "Numbers that were never restored: their records say why.")


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
