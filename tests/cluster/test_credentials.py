"""Credentials: a new token is verified before it replaces the one that works, sealed or from a Secret."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from deploy.local.stack import CHANNELS, Stack, ready_reason
from tests.cluster.steps import (
    apply_secret,
    check_now,
    configured,
    delete,
    expect_event,
    expect_record_written,
    name_of,
    rotate_token,
    wait_checked,
    wait_reason,
    webhook,
)


class _Sealed:
    """A channel with a sealed token."""

    def __init__(self, stack: Stack, account: dict[str, Any]) -> None:
        self.stack = stack
        self.manifest = stack.manifest(account["phone_numbers"][0], account=account)
        self.account = account
        stack.apply(self.manifest)

    def rotate(self, token: str) -> None:
        changed = self.stack.manifest(
            self.manifest["spec"]["phoneNumber"],
            name=name_of(self.manifest),
            account={**self.account, "auth_token": token},
        )
        self.stack.apply(changed)


class _Referenced:
    """A channel whose token is in a Secret."""

    def __init__(self, stack: Stack, account: dict[str, Any]) -> None:
        self.stack = stack
        self.secret = f"twilio-{uuid.uuid4().hex[:8]}"
        self.rotate(account["auth_token"])
        reference = {"secretKeyRef": {"name": self.secret, "key": "auth_token"}}
        self.manifest = stack.manifest(account["phone_numbers"][0], account=account, credentials=reference)
        stack.apply(self.manifest)

    def rotate(self, token: str) -> None:
        apply_secret(self.stack, self.secret, {"auth_token": token})


@pytest.mark.parametrize("source", [_Sealed, _Referenced])
def test_rotation_by_secondary_token_interrupts_nothing(
    stack: Stack, account: dict[str, Any], source: type[_Sealed | _Referenced]
) -> None:
    """As Twilio documents it: a secondary token is created, given to the channel, then promoted; the old one ends."""
    channel = source(stack, account)
    name, sid = name_of(channel.manifest), account["account_sid"]
    wait_reason(stack, name, "Configured")
    newer = stack.twin_call("POST", f"/accounts/{sid}/tokens/secondary")["auth_token"]
    before = stack.channels.get(name=name, namespace=CHANNELS).to_dict()
    with expect_record_written(stack, before["metadata"]["uid"]):
        channel.rotate(newer)
    stack.twin_call("POST", f"/accounts/{sid}/tokens/promote")
    stack.twin_call("PATCH", f"/numbers/{account['phone_numbers'][0]}", {"sms_url": "https://drift.example.com/"})
    with expect_event(stack, name, "DriftCorrected"):
        check_now(stack, channel.manifest)
    ours = before["status"]["webhookUrl"]
    assert webhook(stack, account["phone_numbers"][0]) == ours
    delete(stack, name)
    assert webhook(stack, account["phone_numbers"][0]) != ours, "it is restored with the new token"


@pytest.mark.parametrize("source", [_Sealed, _Referenced])
def test_rejected_token_leaves_the_channel_working_until_the_recorded_one_ends_too(
    stack: Stack, account: dict[str, Any], source: type[_Sealed | _Referenced]
) -> None:
    channel = source(stack, account)
    name = name_of(channel.manifest)
    wait_reason(stack, name, "Configured")
    channel.rotate("0" * 32)
    degraded = wait_reason(stack, name, "TokenRejected")
    assert ready_reason(degraded)[0] == "True"
    assert "20003" in ready_reason(degraded)[2]

    newer = rotate_token(stack, account)
    check_now(stack, channel.manifest)
    wait_reason(stack, name, "AuthenticationFailed")

    channel.rotate(newer)
    wait_reason(stack, name, "Configured")


def test_revoked_api_key_is_noticed(stack: Stack, account: dict[str, Any]) -> None:
    key = stack.twin_call("POST", f"/accounts/{account['account_sid']}/keys", {})
    manifest = stack.manifest(account["phone_numbers"][0], account={**account, "auth_token": key["secret"]})
    manifest["spec"]["credentials"]["sid"] = key["sid"]
    configured(stack, manifest)
    stack.twin_call("DELETE", f"/keys/{key['sid']}")
    check_now(stack, manifest)
    wait_reason(stack, name_of(manifest), "AuthenticationFailed")


@pytest.mark.parametrize(
    "action",
    [
        pytest.param({"kind": "status", "status": 401, "code": 20003}, id="Twilio refuses a token that it accepted"),
        pytest.param({"kind": "status", "status": 401, "code": 20005}, id="Twilio says that the account is suspended"),
        pytest.param({"kind": "html", "status": 403}, id="a proxy's page with 403"),
        pytest.param({"kind": "html", "status": 401}, id="a proxy's page with 401"),
        pytest.param({"kind": "html200"}, id="a login page with 200"),
    ],
)
def test_one_wrong_answer_changes_no_channel(stack: Stack, account: dict[str, Any], action: dict[str, Any]) -> None:
    manifests = [stack.manifest(number, account=account) for number in account["phone_numbers"][:2]]
    before = [configured(stack, manifest)["status"]["conditions"] for manifest in manifests]
    match = {"account": account["account_sid"], "count": 1}
    added = stack.twin_call("POST", "/faults", {"match": match, "action": action})["id"]
    after = [wait_checked(stack, manifest)["status"]["conditions"] for manifest in manifests]
    rules = stack.twin_call("GET", "/faults")["faults"]
    assert [each["hit"] for each in rules if each["id"] == added] == [1]
    assert after == before


def test_unverified_credentials_change_nothing_for_the_owner(stack: Stack, account: dict[str, Any]) -> None:
    """Forty channels with the right account and wrong tokens: the owner's are neither refused nor slowed down."""
    own, theirs = account["phone_numbers"][:2]
    unverified = [
        stack.manifest(number, account={**account, "auth_token": f"{i:032x}"})
        for i, number in enumerate([own, theirs] * 20)
    ]
    stack.apply(*unverified)
    manifest = stack.manifest(own, account=account)
    configured(stack, manifest)
    for each in unverified:
        wait_reason(stack, name_of(each), "AuthenticationFailed")
    check_now(stack, manifest)
    second = stack.manifest(theirs, account=account)
    configured(stack, second)


def test_many_channels_with_one_refused_token_cost_one_call(stack: Stack, account: dict[str, Any]) -> None:
    stack.twin_call("DELETE", "/journal")
    refused = {**account, "auth_token": "f" * 32}
    wrong = [stack.manifest(account["phone_numbers"][0], account=refused) for _ in range(50)]
    stack.apply(*wrong)
    for manifest in wrong:
        wait_reason(stack, name_of(manifest), "AuthenticationFailed")
    calls = stack.twin_call("GET", f"/journal?account={account['account_sid']}")["entries"]
    assert len(calls) == 1, "the refusal is cached"
