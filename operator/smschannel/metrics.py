"""Prometheus metrics. No label grows with users: no account, number, namespace or instance is one."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside each counter that nobody reads

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

RECONCILES = Counter("smschannel_reconciles", "Reconciles by result: a reason, or how they failed.", ["result"])
RECONCILE_SECONDS = Histogram("smschannel_reconcile_duration_seconds", "One reconcile.", buckets=_FAST)
QUEUE_DEPTH = Gauge("smschannel_queue_depth", "Channels that wait for a worker.")
QUEUE_WAIT_SECONDS = Histogram("smschannel_queue_wait_seconds", "From due to a worker's hands.", buckets=_FAST)
TWILIO_SECONDS = Histogram(
    "smschannel_twilio_call_duration_seconds",
    "Calls to Twilio by kind and outcome (HTTP status, or error).",
    ["kind", "outcome"],
    buckets=_FAST,
)
KUBERNETES_WRITES = Counter("smschannel_kubernetes_writes", "Writes to the Kubernetes API by kind.", ["kind"])
CHANNELS = Gauge("smschannel_channels", "Channels by the reason that Ready carries.", ["reason"])
DRIFT = Counter("smschannel_drift", "Webhooks found changed behind our back, by what was done.", ["action"])
CLAIMS = Gauge("smschannel_claims", "Numbers and instances that are held.")
DEBTS = Gauge("smschannel_debts", "Numbers that should have been given back and could not be yet.")
WRITTEN_OFF = Counter("smschannel_written_off", "Numbers that were never given back: their records say why.")
