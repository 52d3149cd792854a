"""The life of a channel on the real API server, against the Twilio twin."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client

from deploy.local.stack import CHANNELS, OPERATOR, Stack, StackError, ready_reason
from tests.cluster.steps import (
    api_token_secret,
    before,
    check_now,
    name_of,
    take_finalizers_off,
    wait_event,
    wait_reason,
    wait_record_gone,
)

Numbers = Callable[[int], list[str]]


def test_configures_and_restores(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    stack.apply(manifest)
    channel = wait_reason(stack, name_of(manifest), "Configured")
    conditions = {each["type"]: each["status"] for each in channel["status"]["conditions"]}
    assert conditions == {"Ready": "True", "CredentialsValid": "True", "WebhookEffective": "True"}
    assert stack.number(number)["sms_url"] == channel["status"]["webhookUrl"]
    assert channel["metadata"]["uid"] in stack.records()

    stack.delete(name_of(manifest))
    stack.wait_gone(name_of(manifest))
    assert stack.number(number)["sms_url"] == before(number)
    assert channel["metadata"]["uid"] not in stack.records()


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        pytest.param("Clear", lambda number, ours: "", id="Clear empties the webhook"),
        pytest.param("Retain", lambda number, ours: ours, id="Retain leaves it as it is"),
    ],
)
def test_other_deletion_policies(stack: Stack, number: str, policy: str, left: Callable[[str, str], str]) -> None:
    manifest = stack.manifest(number, deletionPolicy=policy)
    stack.apply(manifest)
    ours = wait_reason(stack, name_of(manifest), "Configured")["status"]["webhookUrl"]
    stack.delete(name_of(manifest))
    stack.wait_gone(name_of(manifest))
    assert (stack.number(number)["sms_url"] or "") == left(number, ours)


def test_a_webhook_that_somebody_else_set_since_is_left_alone_on_delete(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    theirs = "https://theirs.example.com/sms"
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": theirs})
    stack.delete(name_of(manifest))
    stack.wait_gone(name_of(manifest))
    assert stack.number(number)["sms_url"] == theirs


def test_a_changed_number_moves_over_and_gives_the_old_one_back(stack: Stack, numbers: Numbers) -> None:
    old, new = numbers(2)
    manifest = stack.manifest(old)
    stack.apply(manifest)
    url = wait_reason(stack, name_of(manifest), "Configured")["status"]["webhookUrl"]
    manifest["spec"]["phoneNumber"] = new
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    assert stack.number(new)["sms_url"] == url
    assert stack.number(old)["sms_url"] == before(old)
    stack.delete(name_of(manifest))
    stack.wait_gone(name_of(manifest))
    assert stack.number(new)["sms_url"] == before(new)


def test_drift_is_corrected_at_the_next_check(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    stack.apply(manifest)
    url = wait_reason(stack, name_of(manifest), "Configured")["status"]["webhookUrl"]
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    check_now(stack, manifest)
    wait_event(stack, name_of(manifest), "DriftCorrected")
    assert stack.number(number)["sms_url"] == url


def look_by_pages(stack: Stack, manifest: Any) -> None:
    """A turn that nobody asked to look anew, as a drift check is: a finalizer that is taken off calls for one."""
    take_finalizers_off(stack, name_of(manifest))


def test_to_check_now_is_not_forgotten_over_an_outage(stack: Stack, account: dict[str, Any]) -> None:
    """What was read of the account before would say that all is well."""
    number = account["phone_numbers"][0]
    manifest = stack.manifest(number, account=account)
    stack.apply(manifest)
    url = wait_reason(stack, name_of(manifest), "Configured")["status"]["webhookUrl"]
    look_by_pages(stack, manifest)
    stack.wait_until(lambda each: bool(each["metadata"].get("finalizers")), name_of(manifest))

    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    down = {"match": {"account": account["account_sid"], "count": 1}, "action": {"kind": "status", "status": 503}}
    stack.twin_call("POST", "/faults", down)
    check_now(stack, manifest)
    wait_event(stack, name_of(manifest), "DriftCorrected")
    assert stack.number(number)["sms_url"] == url


def test_a_correction_that_twilio_fails_again_and_again_is_no_fight(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    stack.apply(manifest)
    url = wait_reason(stack, name_of(manifest), "Configured")["status"]["webhookUrl"]
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    down = {"match": {"method": "POST", "count": 4}, "action": {"kind": "status", "status": 503, "code": 20503}}
    stack.twin_call("POST", "/faults", down)
    check_now(stack, manifest)
    wait_event(stack, name_of(manifest), "DriftCorrected")
    assert stack.number(number)["sms_url"] == url
    assert ready_reason(stack.channels.get(name=name_of(manifest), namespace=CHANNELS).to_dict())[1] == "Configured"


def test_drift_is_only_reported_where_that_is_asked_for(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number, driftPolicy="Report")
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    check_now(stack, manifest)
    channel = wait_reason(stack, name_of(manifest), "WebhookDrifted")
    effective = next(each for each in channel["status"]["conditions"] if each["type"] == "WebhookEffective")
    assert (effective["status"], effective["reason"]) == ("False", "UrlMismatch")
    assert stack.number(number)["sms_url"] == "https://drift.example.com/"


def test_a_report_of_drift_outlives_an_outage(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number, driftPolicy="Report")
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    check_now(stack, manifest)
    wait_reason(stack, name_of(manifest), "WebhookDrifted")
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}})
    check_now(stack, manifest)
    wait_reason(stack, name_of(manifest), "TwilioUnavailable")
    stack.twin_call("DELETE", "/faults")
    wait_reason(stack, name_of(manifest), "WebhookDrifted")
    assert stack.number(number)["sms_url"] == "https://drift.example.com/", "it is reported, never corrected"


def test_a_deletion_tries_the_token_of_today(stack: Stack) -> None:
    [account] = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": 1, "first": "+61497000000"})["accounts"]
    [number], sid = account["phone_numbers"], account["account_sid"]
    secret = f"twilio-{uuid.uuid4().hex[:8]}"
    api_token_secret(stack, secret, {"auth_token": account["auth_token"]})
    reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
    manifest = stack.manifest(number, account=account, credentials=reference)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    manifest["spec"]["suspend"] = True  # so that the new token is not tried before the deletion
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Suspended")
    newer = stack.twin_call("POST", f"/accounts/{sid}/tokens/secondary")["auth_token"]
    stack.twin_call("POST", f"/accounts/{sid}/tokens/promote")
    api_token_secret(stack, secret, {"auth_token": newer})
    stack.delete(name_of(manifest))
    stack.wait_gone(name_of(manifest))
    assert stack.number(number)["sms_url"] == "https://demo.twilio.com/welcome/sms/reply"


def test_a_foreign_webhook_is_not_taken_over_if_unused_is_asked_for(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number, takeoverPolicy="IfUnused")
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "WebhookForeign")
    assert stack.number(number)["sms_url"] == before(number)


def test_an_application_that_overrides_the_webhook_is_named(stack: Stack, number: str) -> None:
    account = stack.twin["account_sid"]
    application = stack.twin_call("POST", f"/accounts/{account}/applications", {"sms_url": "https://app.example.com/"})
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_application_sid": application["sid"]})
    manifest = stack.manifest(number)
    stack.apply(manifest)
    channel = wait_reason(stack, name_of(manifest), "WebhookOverridden")
    assert application["sid"] in ready_reason(channel)[2]


def test_an_application_that_comes_later_is_found_by_the_drift_check(stack: Stack, account: dict[str, Any]) -> None:
    """The number still points at us, and so it looks well at the first glance."""
    number = account["phone_numbers"][0]
    manifest = stack.manifest(number, account=account)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    to = {"sms_url": "https://app.example.com/"}
    application = stack.twin_call("POST", f"/accounts/{account['account_sid']}/applications", to)
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_application_sid": application["sid"]})
    look_by_pages(stack, manifest)
    wait_reason(stack, name_of(manifest), "WebhookOverridden")


def test_suspend_leaves_twilio_alone_and_keeps_the_number(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    stack.apply(manifest)
    url = wait_reason(stack, name_of(manifest), "Configured")["status"]["webhookUrl"]
    manifest["spec"]["suspend"] = True
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Suspended")
    assert stack.number(number)["sms_url"] == url
    other = stack.manifest(number)
    stack.apply(other)
    wait_reason(stack, name_of(other), "NumberInUse")


def test_the_loser_of_a_number_takes_over_by_itself_and_restores_what_was_there_first(
    stack: Stack, number: str
) -> None:
    first, second = stack.manifest(number), stack.manifest(number)
    stack.apply(first)
    wait_reason(stack, name_of(first), "Configured")
    stack.apply(second)
    refused = wait_reason(stack, name_of(second), "NumberInUse")
    assert name_of(first) not in str(refused["status"]), "the loser learns nothing about the holder"
    stack.delete(name_of(first))
    wait_reason(stack, name_of(second), "Configured")
    stack.delete(name_of(second))
    stack.wait_gone(name_of(second))
    assert stack.number(number)["sms_url"] == before(number)


def test_a_secret_is_followed_at_every_step(stack: Stack, number: str) -> None:
    secret = f"twilio-{uuid.uuid4().hex[:8]}"
    manifest = stack.manifest(number, credentials={"secretKeyRef": {"name": secret, "key": "auth_token"}})
    stack.apply(manifest)
    name = name_of(manifest)
    assert secret in ready_reason(wait_reason(stack, name, "SecretNotFound"))[2]

    api_token_secret(stack, secret, {"wrong_key": "x"})
    assert "auth_token" in ready_reason(wait_reason(stack, name, "SecretKeyMissing"))[2]

    api_token_secret(stack, secret, {"auth_token": "0" * 32})
    assert "20003" in ready_reason(wait_reason(stack, name, "AuthenticationFailed"))[2]

    api_token_secret(stack, secret, {"auth_token": stack.twin["auth_token"]})
    wait_reason(stack, name, "Configured")

    api_token_secret(stack, secret, {"auth_token": "1" * 32})
    wait_reason(stack, name, "TokenRejected")

    api_token_secret(stack, secret, {"auth_token": stack.twin["auth_token"]})
    wait_reason(stack, name, "Configured")

    # The Secret goes first, as when a whole directory is deleted: that must not keep the channel from being removed.
    client.CoreV1Api(stack.api.client).delete_namespaced_secret(secret, CHANNELS)
    wait_reason(stack, name, "SecretNotFound")
    stack.delete(name)
    stack.wait_gone(name)
    assert stack.number(number)["sms_url"] == before(number)


def test_a_secret_without_the_label_is_not_used_until_it_has_it(stack: Stack, number: str) -> None:
    secret = f"twilio-{uuid.uuid4().hex[:8]}"
    api_token_secret(stack, secret, {"auth_token": stack.twin["auth_token"]}, labelled=False)
    manifest = stack.manifest(number, credentials={"secretKeyRef": {"name": secret, "key": "auth_token"}})
    stack.apply(manifest)
    refused = wait_reason(stack, name_of(manifest), "SecretNotLabelled")
    assert "kubectl label secret" in ready_reason(refused)[2]
    api_token_secret(stack, secret, {"auth_token": stack.twin["auth_token"]})
    wait_reason(stack, name_of(manifest), "Configured")


def test_a_sealed_value_copied_to_another_channel_opens_nothing(stack: Stack, number: str) -> None:
    original, copy = stack.manifest(number), stack.manifest(number)
    copy["spec"]["credentials"] = original["spec"]["credentials"]
    stack.apply(copy)
    refused = wait_reason(stack, name_of(copy), "TokenUnreadable")
    assert "kubectl sms seal" in ready_reason(refused)[2]


def test_a_number_that_the_account_does_not_have(stack: Stack) -> None:
    manifest = stack.manifest("+15005550199")
    stack.apply(manifest)
    assert "+15005550199" in ready_reason(wait_reason(stack, name_of(manifest), "NumberNotFound"))[2]


def test_a_number_without_sms(stack: Stack) -> None:
    account = stack.twin["account_sid"]
    mute = f"+4420{uuid.uuid4().int % 10**8:08}"
    stack.twin_call("POST", f"/accounts/{account}/numbers", {"phone_number": mute, "sms": False})
    manifest = stack.manifest(mute)
    stack.apply(manifest)
    refused = wait_reason(stack, name_of(manifest), "NumberLacksSms")
    assert "Use a number that can receive SMS" in ready_reason(refused)[2]


def test_a_suspended_account_is_told_apart_from_a_wrong_token(stack: Stack) -> None:
    [account] = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": 1, "first": "+61499000000"})["accounts"]
    stack.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "suspended"})
    manifest = stack.manifest(account["phone_numbers"][0], account=account)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "AccountSuspended")


@pytest.mark.parametrize(
    "action",
    [
        pytest.param({"kind": "status", "status": 503, "code": 20503}, id="Twilio is down"),
        pytest.param({"kind": "status", "status": 429, "code": 20429, "retry_after": 1}, id="too many requests"),
        pytest.param({"kind": "reset"}, id="the connection breaks"),
        pytest.param({"kind": "html200"}, id="a proxy answers in Twilio's place"),
        pytest.param({"kind": "truncate"}, id="an answer is cut"),
    ],
)
def test_an_unreachable_twilio_is_pending_and_heals_by_itself(
    stack: Stack, number: str, action: dict[str, Any]
) -> None:
    stack.twin_call("POST", "/faults", {"match": {"path": ".*IncomingPhoneNumbers.*"}, "action": action})
    manifest = stack.manifest(number)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "TwilioUnavailable")
    stack.twin_call("DELETE", "/faults")
    wait_reason(stack, name_of(manifest), "Configured")


def test_a_refused_webhook_says_so(stack: Stack, number: str) -> None:
    refuse = {"match": {"method": "POST"}, "action": {"kind": "status", "status": 400, "code": 21402}}
    stack.twin_call("POST", "/faults", refuse)
    manifest = stack.manifest(number)
    stack.apply(manifest)
    assert "21402" in ready_reason(wait_reason(stack, name_of(manifest), "WebhookRefused"))[2]


def test_deleting_while_twilio_is_down_ends_after_the_grace_and_the_debt_is_paid_later(
    stack: Stack, number: str
) -> None:
    manifest = stack.manifest(number)
    stack.apply(manifest)
    channel = wait_reason(stack, name_of(manifest), "Configured")
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}})
    stack.delete(name_of(manifest))
    stack.wait_gone(name_of(manifest))
    assert channel["metadata"]["uid"] in stack.records(), "the debt outlives the channel"
    stack.twin_call("DELETE", "/faults")
    wait_record_gone(stack, channel["metadata"]["uid"])
    assert stack.number(number)["sms_url"] == before(number)


def test_a_finalizer_taken_off_by_force_does_not_lose_the_number(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    stack.apply(manifest)
    channel = wait_reason(stack, name_of(manifest), "Configured")
    stack.stop_process("operator", kill=True)
    stack.delete(name_of(manifest))
    take_finalizers_off(stack, name_of(manifest))
    stack.wait_gone(name_of(manifest))
    stack.start_operator()
    wait_record_gone(stack, channel["metadata"]["uid"])
    assert stack.number(number)["sms_url"] == before(number)


def test_nothing_is_written_and_nothing_asked_when_nothing_changed(stack: Stack) -> None:
    [account] = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": 4, "first": "+61498000000"})["accounts"]
    *manifests, marker = [stack.manifest(number, account=account) for number in account["phone_numbers"]]
    stack.apply(*manifests)
    names = [name_of(each) for each in manifests]
    stack.wait_ready(*names)
    versions = {name: stack.channels.get(name=name, namespace=CHANNELS).metadata.resourceVersion for name in names}
    stack.twin_call("DELETE", "/journal")
    stack.stop_process("operator")
    stack.start_operator()
    stack.apply(marker)
    stack.wait_ready(name_of(marker))  # the operator is at work: what it wanted to do to the others is done
    for name in names:
        assert stack.channels.get(name=name, namespace=CHANNELS).metadata.resourceVersion == versions[name]
    calls = stack.twin_call("GET", f"/journal?account={account['account_sid']}")["entries"]
    asked = [call["kind"] for call in calls]
    assert asked == ["numbers", "services", "number"], "only the new channel's two calls, and one for its account"


def test_a_lost_keyring_is_not_replaced(stack: Stack) -> None:
    core = client.CoreV1Api(stack.api.client)
    keyring = core.read_namespaced_secret("smschannel-keyring", OPERATOR)
    core.delete_namespaced_secret("smschannel-keyring", OPERATOR)
    stack.stop_process("operator")
    try:
        with pytest.raises(StackError, match="ended with status 1"):
            stack.start_operator()
        assert "restore it from its backup" in (stack.logs / "operator.log").read_text()
    finally:
        assert keyring.metadata
        keyring.metadata.resource_version = keyring.metadata.uid = None
        core.create_namespaced_secret(OPERATOR, keyring)
        stack.start_operator()
