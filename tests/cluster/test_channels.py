"""The life of a channel on the real API server, against the Twilio twin."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client

from deploy.local.stack import CHANNELS, OPERATOR, Stack, StackError, ready_reason
from tests.cluster.steps import (
    DEMO_WEBHOOK,
    TWILIO_DOWN,
    apply_secret,
    before,
    check_now,
    configured,
    delete,
    expect_event,
    name_of,
    remove_finalizers,
    rotate_token,
    seed_account,
    wait_event,
    wait_for,
    wait_reason,
    wait_record_gone,
    webhook,
)

Numbers = Callable[[int], list[str]]


def test_channel_is_configured_and_restored(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    channel = configured(stack, manifest)
    conditions = {each["type"]: each["status"] for each in channel["status"]["conditions"]}
    assert conditions == {"Ready": "True", "CredentialsValid": "True", "WebhookEffective": "True"}
    assert webhook(stack, number) == channel["status"]["webhookUrl"]
    assert channel["metadata"]["uid"] in stack.records()

    delete(stack, name_of(manifest))
    assert webhook(stack, number) == before(number)
    assert channel["metadata"]["uid"] not in stack.records()


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        pytest.param("Clear", lambda number, ours: "", id="Clear"),
        pytest.param("Retain", lambda number, ours: ours, id="Retain"),
    ],
)
def test_deletion_policy_decides_what_is_left(
    stack: Stack, number: str, policy: str, left: Callable[[str, str], str]
) -> None:
    manifest = stack.manifest(number, deletionPolicy=policy)
    ours = configured(stack, manifest)["status"]["webhookUrl"]
    delete(stack, name_of(manifest))
    assert webhook(stack, number) == left(number, ours)


def test_webhook_set_by_somebody_else_survives_the_deletion(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    configured(stack, manifest)
    theirs = "https://theirs.example.com/sms"
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": theirs})
    delete(stack, name_of(manifest))
    assert webhook(stack, number) == theirs


def test_change_of_number_restores_the_former_one(stack: Stack, numbers: Numbers) -> None:
    old, new = numbers(2)
    manifest = stack.manifest(old)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    manifest["spec"]["phoneNumber"] = new
    configured(stack, manifest)
    assert webhook(stack, new) == url
    assert webhook(stack, old) == before(old)
    delete(stack, name_of(manifest))
    assert webhook(stack, new) == before(new)


def test_drift_is_corrected_at_the_next_check(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    check_now(stack, manifest)
    wait_event(stack, name_of(manifest), "DriftCorrected")
    assert webhook(stack, number) == url


def reconcile_with_cache(stack: Stack, manifest: Any) -> None:
    """Cause a reconcile that uses the account cache, as a drift check does: a removed finalizer must be added again."""
    remove_finalizers(stack, name_of(manifest))


def test_check_now_survives_an_outage(stack: Stack, account: dict[str, Any]) -> None:
    """By the account cache alone all would be well."""
    number = account["phone_numbers"][0]
    manifest = stack.manifest(number, account=account)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    reconcile_with_cache(stack, manifest)
    stack.wait_until(lambda each: bool(each["metadata"].get("finalizers")), name_of(manifest))

    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    down = {"match": {"account": account["account_sid"], "count": 1}, "action": {"kind": "status", "status": 503}}
    stack.twin_call("POST", "/faults", down)
    check_now(stack, manifest)
    wait_event(stack, name_of(manifest), "DriftCorrected")
    assert webhook(stack, number) == url


def test_failing_correction_is_not_taken_for_a_contest(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    down = {"match": {"method": "POST", "count": 4}, "action": {"kind": "status", "status": 503, "code": 20503}}
    stack.twin_call("POST", "/faults", down)
    check_now(stack, manifest)
    wait_event(stack, name_of(manifest), "DriftCorrected")
    assert webhook(stack, number) == url
    assert ready_reason(stack.channels.get(name=name_of(manifest), namespace=CHANNELS).to_dict())[1] == "Configured"


def test_drift_is_only_reported_if_the_policy_says_so(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number, driftPolicy="Report")
    configured(stack, manifest)
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    check_now(stack, manifest)
    channel = wait_reason(stack, name_of(manifest), "WebhookDrifted")
    effective = next(each for each in channel["status"]["conditions"] if each["type"] == "WebhookEffective")
    assert (effective["status"], effective["reason"]) == ("False", "UrlMismatch")
    assert webhook(stack, number) == "https://drift.example.com/"


def test_reported_drift_outlives_an_outage(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number, driftPolicy="Report")
    configured(stack, manifest)
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    check_now(stack, manifest)
    wait_reason(stack, name_of(manifest), "WebhookDrifted")
    stack.twin_call("POST", "/faults", TWILIO_DOWN)
    check_now(stack, manifest)
    wait_reason(stack, name_of(manifest), "TwilioUnavailable")
    stack.twin_call("DELETE", "/faults")
    wait_reason(stack, name_of(manifest), "WebhookDrifted")
    assert webhook(stack, number) == "https://drift.example.com/", "it is reported, never corrected"


def test_deletion_tries_the_current_token(stack: Stack) -> None:
    account = seed_account(stack, "+61497000000")
    [number] = account["phone_numbers"]
    secret = f"twilio-{uuid.uuid4().hex[:8]}"
    apply_secret(stack, secret, {"auth_token": account["auth_token"]})
    reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
    manifest = stack.manifest(number, account=account, credentials=reference)
    configured(stack, manifest)
    manifest["spec"]["suspend"] = True  # so that the new token is not tried before the deletion
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Suspended")
    apply_secret(stack, secret, {"auth_token": rotate_token(stack, account)})
    delete(stack, name_of(manifest))
    assert webhook(stack, number) == DEMO_WEBHOOK


def test_foreign_webhook_is_left_alone_with_if_unused(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number, takeoverPolicy="IfUnused")
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "WebhookForeign")
    assert webhook(stack, number) == before(number)


def test_overriding_application_is_named(stack: Stack, number: str) -> None:
    account = stack.twin["account_sid"]
    application = stack.twin_call("POST", f"/accounts/{account}/applications", {"sms_url": "https://app.example.com/"})
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_application_sid": application["sid"]})
    manifest = stack.manifest(number)
    stack.apply(manifest)
    channel = wait_reason(stack, name_of(manifest), "WebhookOverridden")
    assert application["sid"] in ready_reason(channel)[2]


def test_overriding_application_is_found_by_the_drift_check(stack: Stack, account: dict[str, Any]) -> None:
    """The number still points at the instance's webhook, so the URL alone does not show it."""
    number = account["phone_numbers"][0]
    manifest = stack.manifest(number, account=account)
    configured(stack, manifest)
    to = {"sms_url": "https://app.example.com/"}
    application = stack.twin_call("POST", f"/accounts/{account['account_sid']}/applications", to)
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_application_sid": application["sid"]})
    reconcile_with_cache(stack, manifest)
    wait_reason(stack, name_of(manifest), "WebhookOverridden")


def test_suspended_channel_keeps_its_number_and_webhook(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    manifest["spec"]["suspend"] = True
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Suspended")
    assert webhook(stack, number) == url
    other = stack.manifest(number)
    stack.apply(other)
    wait_reason(stack, name_of(other), "NumberInUse")


def test_waiter_takes_over_and_restores_the_first_previous_webhook(stack: Stack, number: str) -> None:
    first, second = stack.manifest(number), stack.manifest(number)
    stack.apply(first)
    wait_reason(stack, name_of(first), "Configured")
    stack.apply(second)
    refused = wait_reason(stack, name_of(second), "NumberInUse")
    assert name_of(first) not in str(refused["status"]), "waiters learn nothing about the holder"
    stack.delete(name_of(first))
    wait_reason(stack, name_of(second), "Configured")
    stack.delete(name_of(second))
    stack.wait_gone(name_of(second))
    assert webhook(stack, number) == before(number)


def test_changes_of_the_secret_are_followed(stack: Stack, number: str) -> None:
    secret = f"twilio-{uuid.uuid4().hex[:8]}"
    manifest = stack.manifest(number, credentials={"secretKeyRef": {"name": secret, "key": "auth_token"}})
    stack.apply(manifest)
    name = name_of(manifest)
    assert secret in ready_reason(wait_reason(stack, name, "SecretNotFound"))[2]

    apply_secret(stack, secret, {"wrong_key": "x"})
    assert "auth_token" in ready_reason(wait_reason(stack, name, "SecretKeyMissing"))[2]

    apply_secret(stack, secret, {"auth_token": "0" * 32})
    assert "20003" in ready_reason(wait_reason(stack, name, "AuthenticationFailed"))[2]

    apply_secret(stack, secret, {"auth_token": stack.twin["auth_token"]})
    wait_reason(stack, name, "Configured")

    apply_secret(stack, secret, {"auth_token": "1" * 32})
    wait_reason(stack, name, "TokenRejected")

    apply_secret(stack, secret, {"auth_token": stack.twin["auth_token"]})
    wait_reason(stack, name, "Configured")

    # The Secret is deleted first, as with "kubectl delete -f dir/": the deletion of the channel must not depend on it.
    client.CoreV1Api(stack.api.client).delete_namespaced_secret(secret, CHANNELS)
    degraded = wait_reason(stack, name, "SecretNotFound")
    assert ready_reason(degraded)[0] == "True", "the recorded login works"
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    with expect_event(stack, name, "DriftCorrected"):
        check_now(stack, manifest)
    assert webhook(stack, number) == degraded["status"]["webhookUrl"]
    delete(stack, name)
    assert webhook(stack, number) == before(number)


def test_secret_is_not_used_without_the_label(stack: Stack, number: str) -> None:
    secret = f"twilio-{uuid.uuid4().hex[:8]}"
    apply_secret(stack, secret, {"auth_token": stack.twin["auth_token"]}, labelled=False)
    manifest = stack.manifest(number, credentials={"secretKeyRef": {"name": secret, "key": "auth_token"}})
    stack.apply(manifest)
    refused = wait_reason(stack, name_of(manifest), "SecretNotLabelled")
    assert "kubectl label secret" in ready_reason(refused)[2]
    apply_secret(stack, secret, {"auth_token": stack.twin["auth_token"]})
    wait_reason(stack, name_of(manifest), "Configured")


def test_missing_right_is_the_reason_in_kubernetes_words(stack: Stack, number: str) -> None:
    """Somebody forgot the RoleBinding of a channel namespace; the operator goes on as soon as it is there."""
    secret, where = f"twilio-{uuid.uuid4().hex[:8]}", "team-b"
    apply_secret(stack, secret, {"auth_token": stack.twin["auth_token"]}, namespace=where)
    reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
    manifest = stack.manifest(number, namespace=where, credentials=reference)
    rbac: Any = client.RbacAuthorizationV1Api(stack.api.client)
    binding = rbac.read_namespaced_role_binding("sms-channel-operator", where)
    rbac.delete_namespaced_role_binding("sms-channel-operator", where)
    try:
        wait_for(lambda: not _may_read_secrets(stack, where), "the API server knows that the right is gone")
        stack.apply(manifest)
        refused = wait_reason(stack, name_of(manifest), "KubernetesRefused", namespace=where)
    finally:
        binding.metadata = client.V1ObjectMeta(name=binding.metadata.name, namespace=where)
        rbac.create_namespaced_role_binding(where, binding)
    status, _, message = ready_reason(refused)
    assert status == "False"
    assert f'secrets "{secret}" is forbidden' in message
    wait_reason(stack, name_of(manifest), "Configured", namespace=where)
    delete(stack, name_of(manifest), namespace=where)


def _may_read_secrets(stack: Stack, namespace: str) -> bool:
    attributes = {"verb": "get", "resource": "secrets", "namespace": namespace}
    user = f"system:serviceaccount:{OPERATOR}:sms-channel-operator"
    review = {"spec": {"user": user, "resourceAttributes": attributes}}
    reviews: Any = client.AuthorizationV1Api(stack.api.client)
    return bool(reviews.create_subject_access_review(review).status.allowed)


def test_sealed_token_opens_for_its_own_channel_only(stack: Stack, number: str) -> None:
    original, copy = stack.manifest(number), stack.manifest(number)
    copy["spec"]["credentials"] = original["spec"]["credentials"]
    stack.apply(copy)
    refused = wait_reason(stack, name_of(copy), "TokenUnreadable")
    assert "kubectl sms seal" in ready_reason(refused)[2]


def test_number_of_another_account_is_not_found(stack: Stack) -> None:
    manifest = stack.manifest("+15005550199")
    stack.apply(manifest)
    assert "+15005550199" in ready_reason(wait_reason(stack, name_of(manifest), "NumberNotFound"))[2]


def test_number_without_sms_is_refused(stack: Stack) -> None:
    account = stack.twin["account_sid"]
    mute = f"+4420{uuid.uuid4().int % 10**8:08}"
    stack.twin_call("POST", f"/accounts/{account}/numbers", {"phone_number": mute, "sms": False})
    manifest = stack.manifest(mute)
    stack.apply(manifest)
    refused = wait_reason(stack, name_of(manifest), "NumberLacksSms")
    assert "Use a number that can receive SMS" in ready_reason(refused)[2]


def test_suspended_account_is_not_taken_for_a_wrong_token(stack: Stack) -> None:
    account = seed_account(stack, "+61499000000")
    stack.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "suspended"})
    manifest = stack.manifest(account["phone_numbers"][0], account=account)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "AccountSuspended")


@pytest.mark.parametrize(
    "action",
    [
        pytest.param({"kind": "status", "status": 503, "code": 20503}, id="503"),
        pytest.param({"kind": "status", "status": 429, "code": 20429, "retry_after": 1}, id="429"),
        pytest.param({"kind": "reset"}, id="connection reset"),
        pytest.param({"kind": "html200"}, id="HTML with status 200"),
        pytest.param({"kind": "truncate"}, id="truncated answer"),
    ],
)
def test_channel_is_configured_after_an_outage(stack: Stack, number: str, action: dict[str, Any]) -> None:
    stack.twin_call("POST", "/faults", {"match": {"path": ".*IncomingPhoneNumbers.*"}, "action": action})
    manifest = stack.manifest(number)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "TwilioUnavailable")
    stack.twin_call("DELETE", "/faults")
    wait_reason(stack, name_of(manifest), "Configured")


def test_refused_webhook_is_reported_with_twilios_code(stack: Stack, number: str) -> None:
    refuse = {"match": {"method": "POST"}, "action": {"kind": "status", "status": 400, "code": 21402}}
    stack.twin_call("POST", "/faults", refuse)
    manifest = stack.manifest(number)
    stack.apply(manifest)
    assert "21402" in ready_reason(wait_reason(stack, name_of(manifest), "WebhookRefused"))[2]


def test_deletion_during_an_outage_ends_after_the_grace_and_the_number_is_restored_later(
    stack: Stack, number: str
) -> None:
    manifest = stack.manifest(number)
    channel = configured(stack, manifest)
    stack.twin_call("POST", "/faults", TWILIO_DOWN)
    delete(stack, name_of(manifest))
    assert channel["metadata"]["uid"] in stack.records(), "the record outlives the channel"
    stack.twin_call("DELETE", "/faults")
    wait_record_gone(stack, channel["metadata"]["uid"])
    assert webhook(stack, number) == before(number)


def test_number_is_restored_whose_finalizer_was_removed_while_the_operator_was_down(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    channel = configured(stack, manifest)
    stack.stop_process("operator", kill=True)
    stack.delete(name_of(manifest))
    remove_finalizers(stack, name_of(manifest))
    stack.wait_gone(name_of(manifest))
    stack.start_operator()
    wait_record_gone(stack, channel["metadata"]["uid"])
    assert webhook(stack, number) == before(number)


def test_restart_writes_nothing_and_asks_twilio_nothing_about_unchanged_channels(stack: Stack) -> None:
    account = seed_account(stack, "+61498000000", 4)
    *manifests, marker = [stack.manifest(number, account=account) for number in account["phone_numbers"]]
    stack.apply(*manifests)
    names = [name_of(each) for each in manifests]
    stack.wait_ready(*names)
    versions = {name: stack.channels.get(name=name, namespace=CHANNELS).metadata.resourceVersion for name in names}
    stack.twin_call("DELETE", "/journal")
    stack.stop_process("operator")
    stack.start_operator()
    stack.apply(marker)
    stack.wait_ready(name_of(marker))  # whatever the operator does at a start about the others comes before this one
    for name in names:
        assert stack.channels.get(name=name, namespace=CHANNELS).metadata.resourceVersion == versions[name]
    calls = stack.twin_call("GET", f"/journal?account={account['account_sid']}")["entries"]
    asked = [call["kind"] for call in calls]
    assert asked == ["numbers", "services", "number"], "only for the new channel and its account"


def test_lost_keyring_is_not_replaced(stack: Stack) -> None:
    core = client.CoreV1Api(stack.api.client)
    keyring = core.read_namespaced_secret("smschannel-keyring", OPERATOR)
    core.delete_namespaced_secret("smschannel-keyring", OPERATOR)
    stack.stop_process("operator")
    try:
        with pytest.raises(StackError, match="ended with status 1"):
            stack.start_operator()
        assert "Restore it: kubectl sms keys restore BACKUP" in (stack.logs / "operator.log").read_text()
    finally:
        assert keyring.metadata
        keyring.metadata.resource_version = keyring.metadata.uid = None
        core.create_namespaced_secret(OPERATOR, keyring)
        stack.start_operator()
