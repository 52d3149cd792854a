"""The metrics at `/metrics`. No label names a caller or an instance."""

from __future__ import annotations

from functools import cache

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, of no use here

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

REQUESTS = Counter("smsshim_requests", "Requests answered.", ["route", "method", "status"], registry=REGISTRY)
SECONDS = Histogram(
    "smsshim_request_seconds",
    "Seconds from a request to its answer, 'Prefer: wait' included.",
    ["route", "method"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=REGISTRY,
)
IN_FLIGHT = Gauge("smsshim_requests_in_flight", "Requests in flight.", registry=REGISTRY)
CONNECTIONS = Gauge("smsshim_connections", "Open connections.", registry=REGISTRY)
CONNECTIONS_REFUSED = Counter(
    "smsshim_connections_refused",
    "Connections that were closed early: too_many in all or of a client, or the client did not read (unread).",
    ["reason"],
    registry=REGISTRY,
)
AUTHENTICATION_FAILURES = Counter(
    "smsshim_authentication_failures", "Requests with an invalid API key or bearer token.", registry=REGISTRY
)

_requests = cache(REQUESTS.labels)  # a few dozen label sets: looking them up costs more than counting
_seconds = cache(SECONDS.labels)


def count(route: str, method: str, status: int, seconds: float) -> None:
    """Count one request that was answered `seconds` after it arrived."""
    _requests(route, method, status).inc()
    _seconds(route, method).observe(seconds)
