"""Metrics: each figure moves with what it counts, and no label names a user."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.local.stack import Options, Stack
from tests.cluster.steps import check_now, configured, delete, expect_event, metric, name_of, wait_record_gone
from tests.conftest import running
from tests.unit.test_monitoring import QUERIES

SETTINGS = {"SMSCHANNEL_DELETION_GRACE_SECONDS": "2", "SMSCHANNEL_RETRY_CEILING_SECONDS": "1"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: no other test moves its figures."""
    with running(tmp_path_factory.mktemp("metrics"), Options(operator_settings=SETTINGS)) as started:
        yield started


def test_channel_life_is_counted(stack: Stack, account: dict[str, Any]) -> None:
    def counted() -> dict[str, float]:
        return {
            "configured": metric(stack, "smschannel_channels", reason="Configured"),
            "reconciles": metric(stack, "smschannel_reconciles_total", result="Configured"),
            "durations": metric(stack, "smschannel_reconcile_duration_seconds_count"),
            "waits": metric(stack, "smschannel_queue_wait_seconds_count"),
            "webhooks": metric(
                stack, "smschannel_twilio_call_duration_seconds_count", kind="set_webhook", outcome="200"
            ),
            "refused": metric(
                stack, "smschannel_twilio_call_duration_seconds_count", kind="fetch_number", outcome="503"
            ),
            "records": metric(stack, "smschannel_kubernetes_writes_total", kind="record"),
            "drift": metric(stack, "smschannel_drift_total", action="corrected"),
            "claims": metric(stack, "smschannel_claims"),
            "pending": metric(stack, "smschannel_pending_restores"),
        }

    def moved(since: dict[str, float]) -> dict[str, float]:
        return {name: value - since[name] for name, value in counted().items() if value != since[name]}

    number = account["phone_numbers"][0]
    manifest = stack.manifest(number, account=account)
    since = counted()
    uid = configured(stack, manifest)["metadata"]["uid"]
    with expect_event(stack, name_of(manifest), "DriftCorrected"):  # after it, all of the first reconcile is counted
        stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
        check_now(stack, manifest)
    change = moved(since)
    assert {name: change[name] for name in ("configured", "webhooks", "records", "drift", "claims")} == {
        "configured": 1,
        "webhooks": 2,
        "records": 1,
        "drift": 1,
        "claims": 1,
    }
    assert change["reconciles"] >= 1
    assert change["durations"] >= 1
    assert change["waits"] >= 2

    down = {"match": {"account": account["account_sid"]}, "action": {"kind": "status", "status": 503}}
    stack.twin_call("POST", "/faults", down)
    delete(stack, name_of(manifest))
    change = moved(since)
    assert change["pending"] == 1
    assert change["refused"] >= 1
    assert "configured" not in change

    stack.twin_call("DELETE", "/faults")
    wait_record_gone(stack, uid)
    configured(stack, manifest)
    assert "pending" not in moved(since)

    with urllib.request.urlopen(f"{stack.operator_url}/metrics", timeout=10) as answer:  # noqa: S310  (loopback)
        page = answer.read().decode()
    users = (name_of(manifest), uid, number, account["account_sid"], "sms-channels", "secret")
    assert [each for each in users if each in page] == [], "no label grows with users"


def test_each_query_of_alerts_and_dashboard_names_a_metric_of_a_running_program(stack: Stack) -> None:
    pages = ""
    for url in (stack.operator_url, stack.api_url):
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:  # noqa: S310  (loopback)
            pages += answer.read().decode()
    served = set(re.findall(r"^# TYPE (\w+) ", pages, re.MULTILINE))
    for query in QUERIES:
        for name in re.findall(r"\bsms\w+", re.sub(r'"[^"]*"', "", query)):
            assert re.sub("_(bucket|count|sum)$", "", name) in served, query
