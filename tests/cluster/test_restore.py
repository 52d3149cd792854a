"""What a number pointed at before comes back, whatever happened to settings, clusters and databases in between."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Options, Stack
from tests.cluster.steps import check_now, name_of, told, wait_event, wait_reason, wait_record_gone
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
    """A stack of this module's own: its settings and its database change."""
    with running(tmp_path_factory.mktemp("restore"), Options(numbers=40, operator_settings=SETTINGS)) as started:
        yield started


@pytest.fixture
def number(stack: Stack) -> str:
    """It points somewhere with a password and a fragment, by GET: all of which must come back."""
    phone_number = take_number(stack)
    stack.twin_call("PATCH", f"/numbers/{phone_number}", {"sms_url": WITH_PASSWORD, "sms_method": "GET"})
    return phone_number


def configured(stack: Stack, number: str, **spec: Any) -> dict[str, Any]:
    manifest = stack.manifest(number, **spec)
    stack.apply(manifest)
    return wait_reason(stack, name_of(manifest), "Configured")


def delete(stack: Stack, name: str) -> None:
    stack.delete(name)
    stack.wait_gone(name)


def pointed_at(stack: Stack, number: str) -> tuple[str, str]:
    found = stack.number(number)
    return found["sms_url"], found["sms_method"]


def another_cluster(stack: Stack, home: Path, template: str = "") -> Stack:
    """A cluster of its own that manages numbers of the same Twilio accounts."""
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


def test_fragment_password_and_method_come_back_after_many_changes(stack: Stack, number: str) -> None:
    name = configured(stack, number)["metadata"]["name"]
    for spec in ({"driftPolicy": "Report"}, {"suspend": True}, {"suspend": False}):
        stack.apply(stack.manifest(number, name=name, **spec))
    wait_reason(stack, name, "Configured")
    stack.stop_process("operator", kill=True)
    stack.start_operator()
    delete(stack, name)
    assert pointed_at(stack, number) == (WITH_PASSWORD, "GET")


def test_a_changed_template_moves_every_channel_over_and_forgets_nothing(stack: Stack, number: str) -> None:
    name = configured(stack, number)["metadata"]["name"]
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


def test_an_edit_of_the_policy_that_is_followed_by_a_delete_at_once_counts(stack: Stack, number: str) -> None:
    channel = configured(stack, number, deletionPolicy="Restore")
    name = channel["metadata"]["name"]
    stack.apply(stack.manifest(number, name=name, deletionPolicy="Retain"))
    stack.delete(name)
    stack.wait_gone(name)
    assert pointed_at(stack, number) == (channel["status"]["webhookUrl"], "POST")


def test_clear_is_refused_for_a_number_with_a_fallback_and_says_so(stack: Stack, number: str) -> None:
    """Twilio keeps no fallback without a webhook, and the fallback is not ours to touch."""
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_fallback_url": "https://fallback.example.com/"})
    name = configured(stack, number, deletionPolicy="Clear")["metadata"]["name"]
    stack.delete(name)
    refused = wait_reason(stack, name, "RestoreFailed")
    assert "fallback" in str(refused["status"])
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_fallback_url": ""})
    stack.wait_gone(name)
    assert pointed_at(stack, number)[0] in ("", None)


def test_the_old_account_is_given_back_with_its_own_token(stack: Stack, number: str) -> None:
    seeded = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": 1, "first": "+61491000000"})
    account = seeded["accounts"][0]
    channel = configured(stack, number)
    name = channel["metadata"]["name"]
    stack.apply(stack.manifest(account["phone_numbers"][0], name=name, account=account))
    moved = wait_reason(stack, name, "Configured")
    stack.wait_until(lambda _: pointed_at(stack, number) == (WITH_PASSWORD, "GET"), name)
    assert pointed_at(stack, account["phone_numbers"][0])[0] == moved["status"]["webhookUrl"]


def test_a_refused_give_back_of_the_old_number_stays_owed_while_the_new_one_works(stack: Stack, number: str) -> None:
    first = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": 1, "first": "+61491100000"})["accounts"][0]
    old = first["phone_numbers"][0]
    channel = configured(stack, old, account=first)
    name, uid = channel["metadata"]["name"], channel["metadata"]["uid"]
    stack.twin_call("PATCH", f"/accounts/{first['account_sid']}", {"status": "suspended"})
    stack.apply(stack.manifest(number, name=name))
    told = stack.wait_until(lambda each: old in str(each["status"]["conditions"]), name)[name]
    assert "is not given back yet" in str(told["status"]["conditions"])
    stack.twin_call("PATCH", f"/accounts/{first['account_sid']}", {"status": "active"})
    check_now(stack, told)
    stack.wait_until(lambda each: old not in str(each["status"]["conditions"]), name)
    assert pointed_at(stack, old)[0] == "https://demo.twilio.com/welcome/sms/reply"
    assert uid in stack.records()


def test_a_retained_number_is_adopted_elsewhere_and_what_was_there_before_is_not_known(
    stack: Stack, number: str, tmp_path: Path
) -> None:
    """How to migrate: Retain here, apply there. Messages arrive all the while."""
    name = configured(stack, number, deletionPolicy="Retain")["metadata"]["name"]
    delete(stack, name)
    other = another_cluster(stack, tmp_path)
    try:
        stack.twin_call("DELETE", "/journal")
        adopted = configured(other, number, name=name)
        writes = [each for each in stack.twin_call("GET", "/journal")["entries"] if each["method"] == "POST"]
        assert writes == [], "it points at the instance's webhook already"
        other.delete(name)
        wait_event(other, name, "PreviousUnknown")
        other.wait_gone(name)
        assert pointed_at(stack, number) == (adopted["status"]["webhookUrl"], "POST"), "left, since nobody knows better"
    finally:
        other.stop()


def test_two_clusters_with_the_same_template_serve_the_same_webhook_and_do_not_fight(
    stack: Stack, number: str, tmp_path: Path
) -> None:
    """The first that deletes gives the number back; the other one sees drift and corrects it."""
    first = configured(stack, number)
    name, ours = first["metadata"]["name"], first["status"]["webhookUrl"]
    other = another_cluster(stack, tmp_path)
    try:
        configured(other, number, name=name)
        delete(stack, name)
        assert pointed_at(stack, number) == (WITH_PASSWORD, "GET")
        with told(other, name, "DriftCorrected"):
            check_now(other, first)
        assert pointed_at(stack, number) == (ours, "POST")
    finally:
        other.stop()


def test_two_clusters_with_different_templates_fight_and_are_told(stack: Stack, number: str, tmp_path: Path) -> None:
    first = configured(stack, number)
    name = first["metadata"]["name"]
    other = another_cluster(stack, tmp_path, NEW_TEMPLATE)
    try:
        configured(other, number, name=name)
        for each in (stack, other, stack, other):
            with told(each, name, "DriftCorrected"):
                check_now(each, first)
        check_now(stack, first)
        contested = wait_reason(stack, name, "WebhookContested")
        assert "Find out who" in str(contested["status"]["conditions"])
        check_now(stack, first)  # nobody has written it since
        wait_reason(stack, name, "Configured")
    finally:
        other.stop()


def test_a_database_restored_from_before_a_deletion_brings_the_channel_back_and_its_debt(
    stack: Stack, number: str, tmp_path: Path
) -> None:
    channel = configured(stack, number)
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
    with told(stack, name, "DriftCorrected"):
        check_now(stack, channel)
    assert pointed_at(stack, number)[0] == ours
    assert uid in stack.records()
    delete(stack, name)
    assert pointed_at(stack, number) == (WITH_PASSWORD, "GET"), "the restored record still knows"


def test_a_cluster_rebuilt_without_its_records_leaves_numbers_as_they_are(
    stack: Stack, number: str, tmp_path: Path
) -> None:
    """The manifests come from Git, keyring and records are lost: sealed tokens must be sealed again, and are."""
    channel = configured(stack, number)
    name = channel["metadata"]["name"]
    stack.stop_process("operator", kill=True)
    other = another_cluster(stack, tmp_path)
    try:
        old_seal = stack.manifest(number, name=name)
        other.apply(old_seal)
        wait_reason(other, name, "TokenUnreadable")
        configured(other, number, name=name)
        other.delete(name)
        wait_event(other, name, "PreviousUnknown")
        other.wait_gone(name)
    finally:
        other.stop()
    stack.start_operator()
    delete(stack, name)
    wait_record_gone(stack, channel["metadata"]["uid"])
    assert pointed_at(stack, number) == (WITH_PASSWORD, "GET")
