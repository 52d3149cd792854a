"""Routing: an application or a Messaging Service that overrides the number's webhook is found and named."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.local.stack import Stack, ready_reason
from smschannel.api.status import condition
from tests.cluster.steps import check_now, name_of, wait_reason


def service_of(stack: Stack, account: dict[str, Any], *numbers: str, **settings: Any) -> str:
    service = stack.twin_call("POST", f"/accounts/{account['account_sid']}/services", settings)["sid"]
    for number in numbers:
        stack.twin_call("PUT", f"/services/{service}/numbers/{number}")
    return str(service)


def effective(channel: dict[str, Any]) -> tuple[str, str]:
    found = condition(channel["status"], "WebhookEffective")
    assert found
    return found["status"], found["reason"]


def test_overriding_messaging_service_is_named(stack: Stack, account: dict[str, Any]) -> None:
    number = account["phone_numbers"][0]
    service = service_of(stack, account, number)
    manifest = stack.manifest(number, account=account)
    stack.apply(manifest)
    channel = wait_reason(stack, name_of(manifest), "WebhookOverridden")
    assert service in ready_reason(channel)[2]
    assert effective(channel) == ("False", "OverriddenByMessagingService")

    stack.twin_call("DELETE", f"/services/{service}/numbers/{number}")
    check_now(stack, manifest)
    assert effective(wait_reason(stack, name_of(manifest), "Configured")) == ("True", "Effective")


def test_messaging_service_that_defers_to_the_numbers_webhook_overrides_nothing(
    stack: Stack, account: dict[str, Any]
) -> None:
    number = account["phone_numbers"][0]
    service_of(stack, account, number, use_inbound_webhook_on_number=True)
    manifest = stack.manifest(number, account=account)
    stack.apply(manifest)
    assert effective(wait_reason(stack, name_of(manifest), "Configured")) == ("True", "Effective")


def test_messaging_services_are_read_once_per_account(stack: Stack, account: dict[str, Any]) -> None:
    service_of(stack, account, account["phone_numbers"][0])
    manifests = [stack.manifest(number, account=account) for number in account["phone_numbers"]]
    stack.twin_call("DELETE", "/journal")
    stack.apply(*manifests)
    wait_reason(stack, name_of(manifests[0]), "WebhookOverridden")
    for manifest in manifests[1:]:
        wait_reason(stack, name_of(manifest), "Configured")
    calls = stack.twin_call("GET", f"/journal?account={account['account_sid']}")["entries"]
    asked = [call["kind"] for call in calls if call["kind"].startswith("service")]
    assert asked == ["services", "service_numbers"], "one page of services, one of that service's numbers"


@pytest.mark.parametrize(
    "action",
    [
        pytest.param({"kind": "status", "status": 403, "code": 20003}, id="key without the right"),
        pytest.param({"kind": "status", "status": 503, "code": 20503}, id="Messaging API unavailable"),
    ],
)
def test_unreadable_messaging_services_are_reported_as_unknown(
    stack: Stack, account: dict[str, Any], action: dict[str, Any]
) -> None:
    stack.twin_call("POST", "/faults", {"match": {"path": "/v1/Services.*"}, "action": action})
    manifest = stack.manifest(account["phone_numbers"][0], account=account)
    stack.apply(manifest)
    channel = wait_reason(stack, name_of(manifest), "Configured")
    assert effective(channel) == ("Unknown", "MessagingServicesUnreadable")
    stack.twin_call("DELETE", "/faults")
    check_now(stack, manifest)
    stack.wait_until(lambda each: effective(each) == ("True", "Effective"), name_of(manifest))


def test_parent_accounts_credentials_work_but_do_not_see_messaging_services(
    stack: Stack, account: dict[str, Any]
) -> None:
    child = stack.twin_call("POST", "/accounts", {"parent": account["account_sid"]})
    number = "+61495000000"
    stack.twin_call("POST", f"/accounts/{child['account_sid']}/numbers", {"phone_number": number})
    manifest = stack.manifest(number, account={**child, "auth_token": account["auth_token"]})
    manifest["spec"]["credentials"]["sid"] = account["account_sid"]
    stack.apply(manifest)
    channel = wait_reason(stack, name_of(manifest), "Configured")
    assert effective(channel) == ("Unknown", "MessagingServicesUnreadable")
    assert stack.number(number)["sms_url"] == channel["status"]["webhookUrl"]
