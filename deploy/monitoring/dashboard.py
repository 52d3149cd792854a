"""Writes the Grafana dashboard that the chart can install: `python -m deploy.monitoring.dashboard`.

Its queries are plain PromQL but for `$__rate_interval`, which Grafana replaces, and `$namespace`, the operator's.
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).parents[1] / "helm/files/dashboard.json"

_API = 'route=~"/v1/.*"'
_OF = 'namespace="$namespace"'
_COLUMNS, _HEIGHT = 24, 7


class Panel(NamedTuple):
    """A chart, or one figure if `width` is small. `queries` are pairs of PromQL and the legend."""

    title: str
    description: str
    unit: str
    width: int
    queries: tuple[tuple[str, str], ...]


def _quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    chosen = f"{_OF},{by}" if by else _OF
    return tuple(
        (
            f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{chosen}}}[$__rate_interval])))",
            f"{share:.0%}",
        )
        for share in (0.5, 0.95, 0.99)
    )


def _rate(metric: str, by: str, more: str = "") -> tuple[tuple[str, str], ...]:
    chosen = f"{_OF},{more}" if more else _OF
    return ((f"sum by ({by}) (rate({metric}{{{chosen}}}[$__rate_interval]))", f"{{{{{by}}}}}"),)


PANELS = (
    Panel(
        "Leader",
        "How many operators lead. It must be 1, or one of each shard; the legend names the pod.",
        "short",
        4,
        ((f"sum by (pod) (smschannel_leader{{{_OF}}}) > 0", "{{pod}}"),),
    ),
    Panel(
        "Configured",
        "Channels that work.",
        "short",
        4,
        ((f'sum(smschannel_channels{{{_OF},reason="Configured"}})', "channels"),),
    ),
    Panel(
        "Would change",
        "Channels that the operator would change if it did not only observe.",
        "short",
        4,
        ((f'sum(smschannel_channels{{{_OF},reason="ObserveOnly"}})', "channels"),),
    ),
    Panel(
        "Numbers held", "Numbers that channels hold.", "short", 4, ((f"max(smschannel_claims{{{_OF}}})", "numbers"),)
    ),
    Panel(
        "Pending restores",
        "Numbers that wait for their former webhook.",
        "short",
        4,
        ((f"max(smschannel_pending_restores{{{_OF}}})", "numbers"),),
    ),
    Panel(
        "Age of the watch",
        "Seconds since the API server last answered a watch; up to 270 while nothing changes.",
        "s",
        4,
        ((f"max(smschannel_watch_age_seconds{{{_OF}}})", "age"),),
    ),
    Panel(
        "Channels by reason",
        "What Ready says of all channels.",
        "short",
        12,
        ((f"sum by (reason) (smschannel_channels{{{_OF}}}) > 0", "{{reason}}"),),
    ),
    Panel(
        "Reconciles per second",
        "By result: a reason, or how they failed.",
        "ops",
        12,
        _rate("smschannel_reconciles_total", "result"),
    ),
    Panel(
        "Reconcile duration",
        "Calls to Twilio and Kubernetes included.",
        "s",
        8,
        _quantiles("smschannel_reconcile_duration_seconds"),
    ),
    Panel(
        "Queue",
        "Channels that wait for a worker.",
        "short",
        8,
        ((f"max(smschannel_queue_depth{{{_OF}}})", "depth"),),
    ),
    Panel("Time in the queue", "From due to begun.", "s", 8, _quantiles("smschannel_queue_wait_seconds")),
    Panel(
        "Calls to Twilio per second",
        "By outcome: the HTTP status, or error.",
        "ops",
        8,
        _rate("smschannel_twilio_call_duration_seconds_count", "outcome"),
    ),
    Panel(
        "Duration of calls to Twilio",
        "All kinds together.",
        "s",
        8,
        _quantiles("smschannel_twilio_call_duration_seconds"),
    ),
    Panel(
        "Writes to Kubernetes per second",
        "By kind. There are none while nothing changes.",
        "ops",
        8,
        _rate("smschannel_kubernetes_writes_total", "kind"),
    ),
    Panel(
        "Trouble",
        "Increase within five minutes of what should not happen.",
        "short",
        12,
        (
            (f"sum(increase(smschannel_resync_failures_total{{{_OF}}}[5m]))", "failed resyncs"),
            (f"sum(increase(smschannel_lease_renew_failures_total{{{_OF}}}[5m]))", "late renewals"),
            (f"sum(increase(smschannel_lease_acquired_total{{{_OF}}}[5m]))", "changes of leader"),
            (f"sum(increase(smschannel_foreign_changes_total{{{_OF}}}[5m]))", "foreign changes"),
            (f"sum(increase(smschannel_written_off_total{{{_OF}}}[5m]))", "written off"),
        ),
    ),
    Panel("Drift per second", "Webhooks that others changed.", "ops", 12, _rate("smschannel_drift_total", "action")),
    Panel(
        "Keys",
        "Keys of the keyring, and records that the newest one does not seal yet.",
        "short",
        12,
        (
            (f"max(smschannel_keyring_keys{{{_OF}}})", "keys"),
            (f"max(smschannel_records_to_reseal{{{_OF}}})", "records to seal again"),
        ),
    ),
    Panel(
        "Age of the newest key",
        "A renewed key is younger than the interval of renewal.",
        "s",
        12,
        (
            (f"time() - max(smschannel_keyring_newest_key_created_timestamp_seconds{{{_OF}}} > 0)", "age"),
            (f"max(smschannel_keyring_renewal_due_timestamp_seconds{{{_OF}}} > 0) - time()", "until the renewal"),
        ),
    ),
    Panel(
        "REST requests per second",
        "By status of the answer.",
        "reqps",
        8,
        _rate("smsshim_requests_total", "status", _API),
    ),
    Panel(
        "Duration of GETs", "They never wait.", "s", 8, _quantiles("smsshim_request_seconds", f'{_API},method="GET"')
    ),
    Panel(
        "REST connections",
        "Open connections, requests in flight, and what is refused per second.",
        "short",
        8,
        (
            (f"sum(smsshim_connections{{{_OF}}})", "connections"),
            (f"sum(smsshim_requests_in_flight{{{_OF}}})", "in flight"),
            (f"sum(rate(smsshim_connections_refused_total{{{_OF}}}[$__rate_interval]))", "refused"),
            (f"sum(rate(smsshim_authentication_failures_total{{{_OF}}}[$__rate_interval]))", "not authenticated"),
        ),
    ),
)

_SOURCE = {"type": "prometheus", "uid": "$datasource"}
_VARIABLES = [
    {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
    {
        "name": "namespace",
        "label": "Operator's namespace",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(smschannel_leader, namespace)", "refId": "namespace"},
        "refresh": 2,
    },
]


def queries() -> list[str]:
    """Return all queries as Prometheus gets them from Grafana."""
    found = [query for panel in PANELS for query, _ in panel.queries]
    return [each.replace("$__rate_interval", "5m").replace("$namespace", "sms-operator") for each in found]


def _panel(number: int, panel: Panel, end: int) -> dict[str, Any]:
    """Return Grafana's panel; `end` is the sum of the widths up to this one, of which each row has 24."""
    start = end - panel.width
    targets = [
        {"refId": chr(ord("A") + position), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
        for position, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "type": "stat" if panel.width == 4 else "timeseries",
        "datasource": _SOURCE,
        "gridPos": {"x": start % _COLUMNS, "y": start // _COLUMNS * _HEIGHT, "w": panel.width, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def text() -> str:
    """Return the dashboard as Grafana imports it."""
    ends = accumulate(panel.width for panel in PANELS)
    dashboard = {
        "uid": "sms-channel-operator",
        "title": "SMS Channel Operator",
        "tags": ["sms-channel-operator"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": _VARIABLES},
        "panels": [_panel(number, each, end) for number, (each, end) in enumerate(zip(PANELS, ends, strict=True), 1)],
    }
    return json.dumps(dashboard, indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text())
