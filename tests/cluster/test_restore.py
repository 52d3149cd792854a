"""Restore: a number gets back what it pointed at, whatever happened to settings, clusters and databases meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Options, Stack, ready_reason
from smschannel.core.plan import CONTESTED_AFTER
from tests.cluster.steps import (
    DEMO_WEBHOOK,
    check_now,
    configured,
    delete,
    expect_event,
    seed_account,
    wait_checked,
    wait_event,
    wait_reason,
    wait_record_gone,
)
from tests.conftest import running, take_number

WITH_PASSWORD = "https://user:pass@before.example.com/sms?x=1#rc=2&rp=all"
SETTINGS = {
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "3600",
    "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "1",
    "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
}
NEW_TEMPLATE = "https://new.example.com/{instance_id}"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: its settings and its database change, and it shares Twilio with other clusters."""
    with running(tmp_path_factory.mktemp("restore"), Options(numbers=40, operator_settings=SETTINGS)) as started:
        yield started


@pytest.fixture
def number(stack: Stack) -> str:
    """A number whose webhook has a password, a fragment and the method GET: all of them must be restored."""
    phone_number = take_number(stack)
    stack.twin_call("PATCH", f"/numbers/{phone_number}", {"sms_url": WITH_PASSWORD, "sms_method": "GET"})
    return phone_number


def new_channel(stack: Stack, number: str, **spec: Any) -> dict[str, Any]:
    return configured(stack, stack.manifest(number, **spec))


def pointed_at(stack: Stack, number: str) -> tuple[str, str]:
    found = stack.number(number)
    return found["sms_url"], found["sms_method"]


def another_cluster(stack: Stack, home: Path, template: str = "") -> Stack:
    """A second cluster that manages numbers of the same Twilio accounts."""
    options = Options(
        twilio_url=stack.twilio_url,
        webhook_url_template=template or stack.options.webhook_url_template,
        operator_settings=SETTINGS,
    )
    other = Stack(home, options)
    other.logs.mkdir(parents=True)
    other.start_control_plane()
    other.install()
    other.start_operator()
    other.twin = stack.twin
    return other


def test_fragment_password_and_method_are_restored_after_many_changes(stack: Stack, number: str) -> None:
    name = new_channel(stack, number)["metadata"]["name"]
    for spec in ({"driftPolicy": "Report"}, {"suspend": True}, {"suspend": False}):
        stack.apply(stack.manifest(number, name=name, **spec))
    wait_reason(stack, name, "Configured")
    stack.stop_process("operator", kill=True)
    stack.start_operator()
    delete(stack, name)
    assert pointed_at(stack, number) == (WITH_PASSWORD, "GET")


def test_changed_template_moves_channels_and_keeps_their_previous_webhooks(stack: Stack, number: str) -> None:
    name = new_channel(stack, number)["metadata"]["name"]
    former = stack.options.webhook_url_template
    stack.stop_process("operator")
    stack.options = Options(numbers=40, operator_settings=SETTINGS, webhook_url_template=NEW_TEMPLATE)
    stack.start_operator()
    ours = NEW_TEMPLATE.format(instance_id=name)
    stack.wait_until(lambda each: each["status"]["webhookUrl"] == ours, name)
    assert pointed_at(stack, number) == (ours, "POST")
    delete(stack, name)
    assert pointed_at(stack, number) == (WITH_PASSWORD, "GET")
    stack.stop_process("operator")
    stack.options = Options(numbers=40, operator_settings=SETTINGS, webhook_url_template=former)
    stack.start_operator()


def test_policy_edited_right_before_the_deletion_counts(stack: Stack, number: str) -> None:
    channel = new_channel(stack, number, deletionPolicy="Restore")
    name = channel["metadata"]["name"]
    stack.apply(stack.manifest(number, name=name, deletionPolicy="Retain"))
    stack.delete(name)
    stack.wait_gone(name)
    assert pointed_at(stack, number) == (channel["status"]["webhookUrl"], "POST")


def test_clear_fails_with_a_message_if_the_number_has_a_fallback(stack: Stack, number: str) -> None:
    """Twilio allows no fallback URL without a webhook, and the operator does not touch the fallback."""
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_fallback_url": "https://fallback.example.com/"})
    name = new_channel(stack, number, deletionPolicy="Clear")["metadata"]["name"]
    stack.delete(name)
    refused = wait_reason(stack, name, "RestoreFailed")
    assert "fallback" in str(refused["status"])
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_fallback_url": ""})
    stack.wait_gone(name)
    assert pointed_at(stack, number)[0] in ("", None)


def test_number_of_a_former_account_is_restored_with_that_accounts_token(stack: Stack, number: str) -> None:
    account = seed_account(stack, "+61491000000")
    channel = new_channel(stack, number)
    name = channel["metadata"]["name"]
    stack.apply(stack.manifest(account["phone_numbers"][0], name=name, account=account))
    moved = wait_reason(stack, name, "Configured")
    stack.wait_until(lambda _: pointed_at(stack, number) == (WITH_PASSWORD, "GET"), name)
    assert pointed_at(stack, account["phone_numbers"][0])[0] == moved["status"]["webhookUrl"]


def test_former_number_that_cannot_be_restored_stays_pending_while_the_new_one_works(stack: Stack, number: str) -> None:
    first = seed_account(stack, "+61491100000")
    old = first["phone_numbers"][0]
    channel = new_channel(stack, old, account=first)
    name, uid = channel["metadata"]["name"], channel["metadata"]["uid"]
    stack.twin_call("PATCH", f"/accounts/{first['account_sid']}", {"status": "suspended"})
    stack.apply(stack.manifest(number, name=name))
    pending = stack.wait_until(lambda each: old in str(each["status"]["conditions"]), name)[name]
    assert "is not restored yet" in str(pending["status"]["conditions"])
    stack.twin_call("PATCH", f"/accounts/{first['account_sid']}", {"status": "active"})
    check_now(stack, pending)
    stack.wait_until(lambda each: old not in str(each["status"]["conditions"]), name)
    assert pointed_at(stack, old)[0] == DEMO_WEBHOOK
    assert stack.records().count(uid) == 1, "the former number is free, the new one is held"


def test_retained_number_is_adopted_by_another_cluster_with_its_previous_webhook_unknown(
    stack: Stack, number: str, tmp_path: Path
) -> None:
    """How to migrate: Retain here, apply there. Messages arrive without interruption."""
    name = new_channel(stack, number, deletionPolicy="Retain")["metadata"]["name"]
    delete(stack, name)
    other = another_cluster(stack, tmp_path)
    try:
        stack.twin_call("DELETE", "/journal")
        adopted = new_channel(other, number, name=name)
        writes = [each for each in stack.twin_call("GET", "/journal")["entries"] if each["method"] == "POST"]
        assert writes == [], "it points at the instance's webhook already"
        other.delete(name)
        wait_event(other, name, "PreviousUnknown")
        other.wait_gone(name)
        assert pointed_at(stack, number) == (adopted["status"]["webhookUrl"], "POST"), (
            "left as it is, since the previous one is unknown"
        )
    finally:
        other.stop()


def test_two_clusters_with_one_template_do_not_overwrite_each_other(stack: Stack, number: str, tmp_path: Path) -> None:
    """The first that deletes restores the number; the other one sees drift and corrects it."""
    first = new_channel(stack, number)
    name, ours = first["metadata"]["name"], first["status"]["webhookUrl"]
    other = another_cluster(stack, tmp_path)
    try:
        new_channel(other, number, name=name)
        delete(stack, name)
        assert pointed_at(stack, number) == (WITH_PASSWORD, "GET")
        with expect_event(other, name, "DriftCorrected"):
            check_now(other, first)
        assert pointed_at(stack, number) == (ours, "POST")
    finally:
        other.stop()


def test_two_clusters_with_two_templates_report_a_contest(stack: Stack, number: str, tmp_path: Path) -> None:
    first = new_channel(stack, number)
    name = first["metadata"]["name"]
    other = another_cluster(stack, tmp_path, NEW_TEMPLATE)
    try:
        theirs = new_channel(other, number, name=name)["status"]["webhookUrl"]
        for _ in range(CONTESTED_AFTER):
            wait_checked(other, first)
            assert pointed_at(stack, number) == (theirs, "POST")
            contested = wait_checked(stack, first)
            assert pointed_at(stack, number) == (first["status"]["webhookUrl"], "POST")
        wait_event(stack, name, "DriftCorrected")
        wait_event(other, name, "DriftCorrected")
        assert ready_reason(contested)[1] == "WebhookContested"
        assert "Find out who" in str(contested["status"]["conditions"])
        other.stop_process("operator")
        assert ready_reason(wait_checked(stack, first))[1] == "Configured"
    finally:
        other.stop()


def test_database_backup_brings_a_deleted_channel_back_with_its_record(
    stack: Stack, number: str, tmp_path: Path
) -> None:
    channel = new_channel(stack, number)
    name, uid, ours = channel["metadata"]["name"], channel["metadata"]["uid"], channel["status"]["webhookUrl"]
    backup = tmp_path / "backup"
    stack.stop_process("operator")
    stack.restart_control_plane(lambda etcd_dir: shutil.copytree(etcd_dir, backup))
    stack.start_operator()
    delete(stack, name)
    assert pointed_at(stack, number) == (WITH_PASSWORD, "GET")

    stack.stop_process("operator")
    stack.restart_control_plane(lambda etcd_dir: shutil.copytree(backup, etcd_dir, dirs_exist_ok=True))
    stack.start_operator()
    with expect_event(stack, name, "DriftCorrected"):
        check_now(stack, channel)
    assert pointed_at(stack, number)[0] == ours
    assert uid in stack.records()
    delete(stack, name)
    assert pointed_at(stack, number) == (WITH_PASSWORD, "GET"), "the record of the backup still has it"


def test_cluster_rebuilt_without_its_records_leaves_numbers_as_they_are(
    stack: Stack, number: str, tmp_path: Path
) -> None:
    """The manifests come from Git, but keyring and records are lost: tokens must be sealed again."""
    channel = new_channel(stack, number)
    name = channel["metadata"]["name"]
    stack.stop_process("operator", kill=True)
    other = another_cluster(stack, tmp_path)
    try:
        old_seal = stack.manifest(number, name=name)
        other.apply(old_seal)
        wait_reason(other, name, "TokenUnreadable")
        new_channel(other, number, name=name)
        other.delete(name)
        wait_event(other, name, "PreviousUnknown")
        other.wait_gone(name)
    finally:
        other.stop()
    stack.start_operator()
    delete(stack, name)
    wait_record_gone(stack, channel["metadata"]["uid"])
    assert pointed_at(stack, number) == (WITH_PASSWORD, "GET")
