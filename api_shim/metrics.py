"""What `/metrics` tells: requests by route, method and status. No label says who asked, or for which instance."""

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

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside each counter that nobody reads

REGISTRY = CollectorRegistry()  # of our own: what is imported from the operator registers its metrics, too
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

REQUESTS = Counter("smsshim_requests", "Requests answered.", ["route", "method", "status"], registry=REGISTRY)
SECONDS = Histogram(
    "smsshim_request_seconds",
    "How long answers took, waiting for the operator included.",
    ["route", "method"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=REGISTRY,
)
IN_HAND = Gauge("smsshim_requests_in_hand", "Requests being answered.", registry=REGISTRY)
FAILED_LOGINS = Counter("smsshim_failed_logins", "Wrong keys and tokens.", registry=REGISTRY)

_requests = cache(REQUESTS.labels)  # a few dozen: looking them up by label costs more than counting
_seconds = cache(SECONDS.labels)


def count(route: str, method: str, status: int, seconds: float) -> None:
    """One request answered, `seconds` after it came."""
    _requests(route, method, status).inc()
    _seconds(route, method).observe(seconds)
