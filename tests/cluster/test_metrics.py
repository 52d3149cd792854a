"""What /metrics says follows what happens: each figure moves with its event, and no label names a user."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.local.stack import Options, Stack
from tests.cluster.steps import check_now, metric, name_of, told, wait_reason, wait_record_gone
from tests.conftest import running

SETTINGS = {"SMSCHANNEL_DELETION_GRACE_SECONDS": "2", "SMSCHANNEL_RETRY_CEILING_SECONDS": "1"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: nobody else moves its figures."""
    with running(tmp_path_factory.mktemp("metrics"), Options(operator_settings=SETTINGS)) as started:
        yield started


def test_a_channels_life_is_counted(stack: Stack, account: dict[str, Any]) -> None:
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
            "debts": metric(stack, "smschannel_debts"),
        }

    def moved(since: dict[str, float]) -> dict[str, float]:
        return {name: value - since[name] for name, value in counted().items() if value != since[name]}

    number = account["phone_numbers"][0]
    manifest = stack.manifest(number, account=account)
    since = counted()
    stack.apply(manifest)
    uid = wait_reason(stack, name_of(manifest), "Configured")["metadata"]["uid"]
    with told(stack, name_of(manifest), "DriftCorrected"):  # behind it, all of the first turn is counted
        stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
        check_now(stack, manifest)
    seen = moved(since)
    assert {name: seen[name] for name in ("configured", "webhooks", "records", "drift", "claims")} == {
        "configured": 1,
        "webhooks": 2,
        "records": 1,
        "drift": 1,
        "claims": 2,
    }
    assert seen["reconciles"] >= 1
    assert seen["durations"] >= 1
    assert seen["waits"] >= 2

    down = {"match": {"account": account["account_sid"]}, "action": {"kind": "status", "status": 503}}
    stack.twin_call("POST", "/faults", down)
    stack.delete(name_of(manifest))
    stack.wait_gone(name_of(manifest))
    seen = moved(since)
    assert seen["debts"] == 1
    assert seen["refused"] >= 1
    assert "configured" not in seen

    stack.twin_call("DELETE", "/faults")
    wait_record_gone(stack, uid)
    stack.apply(manifest)  # it waits for the number until the turn that gave it back is over
    wait_reason(stack, name_of(manifest), "Configured")
    assert "debts" not in moved(since)

    with urllib.request.urlopen(f"{stack.operator_url}/metrics", timeout=10) as answer:  # noqa: S310  (loopback)
        page = answer.read().decode()
    users = (name_of(manifest), uid, number, account["account_sid"], "sms-channels", "secret")
    assert [each for each in users if each in page] == [], "no label grows with users"
