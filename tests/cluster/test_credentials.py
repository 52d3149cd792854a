"""Rotation is safe: a new token is verified before it replaces the one that works, whichever way it comes in."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from deploy.local.stack import Stack, ready_reason
from tests.cluster.steps import api_token_secret, check_now, name_of, told, wait_reason, written_record


class _Sealed:
    """The token stands sealed in the channel."""

    def __init__(self, stack: Stack, account: dict[str, Any]) -> None:
        self.stack = stack
        self.manifest = stack.manifest(account["phone_numbers"][0], account=account)
        self.account = account
        stack.apply(self.manifest)

    def rotate(self, token: str) -> None:
        again = self.stack.manifest(
            self.manifest["spec"]["phoneNumber"],
            name=name_of(self.manifest),
            account={**self.account, "auth_token": token},
        )
        self.stack.apply(again)


class _Referenced:
    """The token stands in a Secret."""

    def __init__(self, stack: Stack, account: dict[str, Any]) -> None:
        self.stack = stack
        self.secret = f"twilio-{uuid.uuid4().hex[:8]}"
        self.rotate(account["auth_token"])
        reference = {"secretKeyRef": {"name": self.secret, "key": "auth_token"}}
        self.manifest = stack.manifest(account["phone_numbers"][0], account=account, credentials=reference)
        stack.apply(self.manifest)

    def rotate(self, token: str) -> None:
        api_token_secret(self.stack, self.secret, {"auth_token": token})


@pytest.mark.parametrize("source", [_Sealed, _Referenced])
def test_a_rotation_as_twilio_has_it(
    stack: Stack, account: dict[str, Any], source: type[_Sealed | _Referenced]
) -> None:
    """A secondary token is made, given to the channel, then promoted: the old one dies, and nobody notices."""
    channel = source(stack, account)
    name, sid = name_of(channel.manifest), account["account_sid"]
    wait_reason(stack, name, "Configured")
    newer = stack.twin_call("POST", f"/accounts/{sid}/tokens/secondary")["auth_token"]
    before = stack.channels.get(name=name, namespace="sms-channels").to_dict()
    with written_record(stack, before["metadata"]["uid"]):
        channel.rotate(newer)
    stack.twin_call("POST", f"/accounts/{sid}/tokens/promote")
    stack.twin_call("PATCH", f"/numbers/{account['phone_numbers'][0]}", {"sms_url": "https://drift.example.com/"})
    with told(stack, name, "DriftCorrected"):
        check_now(stack, channel.manifest)
    ours = before["status"]["webhookUrl"]
    assert stack.number(account["phone_numbers"][0])["sms_url"] == ours
    stack.delete(name)
    stack.wait_gone(name)
    assert stack.number(account["phone_numbers"][0])["sms_url"] != ours, "the new token gives it back, too"


@pytest.mark.parametrize("source", [_Sealed, _Referenced])
def test_a_bad_token_leaves_the_channel_working_until_the_old_one_dies_too(
    stack: Stack, account: dict[str, Any], source: type[_Sealed | _Referenced]
) -> None:
    channel = source(stack, account)
    name, sid = name_of(channel.manifest), account["account_sid"]
    wait_reason(stack, name, "Configured")
    channel.rotate("0" * 32)
    degraded = wait_reason(stack, name, "TokenRejected")
    assert ready_reason(degraded)[0] == "True"
    assert "20003" in ready_reason(degraded)[2]

    newer = stack.twin_call("POST", f"/accounts/{sid}/tokens/secondary")["auth_token"]
    stack.twin_call("POST", f"/accounts/{sid}/tokens/promote")
    check_now(stack, channel.manifest)
    wait_reason(stack, name, "AuthenticationFailed")

    channel.rotate(newer)
    wait_reason(stack, name, "Configured")


def test_an_api_key_works_and_its_end_is_noticed(stack: Stack, account: dict[str, Any]) -> None:
    key = stack.twin_call("POST", f"/accounts/{account['account_sid']}/keys", {})
    manifest = stack.manifest(account["phone_numbers"][0], account={**account, "auth_token": key["secret"]})
    manifest["spec"]["credentials"]["sid"] = key["sid"]
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    stack.twin_call("DELETE", f"/keys/{key['sid']}")
    check_now(stack, manifest)
    wait_reason(stack, name_of(manifest), "AuthenticationFailed")


def test_a_stranger_with_a_wrong_token_changes_nothing_for_the_owner(stack: Stack, account: dict[str, Any]) -> None:
    """Right account, wrong token, again and again: the owner is neither refused nor slowed."""
    own, theirs = account["phone_numbers"][:2]
    strangers = [
        stack.manifest(number, account={**account, "auth_token": f"{i:032x}"})
        for i, number in enumerate([own, theirs] * 20)
    ]
    stack.apply(*strangers)
    manifest = stack.manifest(own, account=account)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    for stranger in strangers:
        wait_reason(stack, name_of(stranger), "AuthenticationFailed")
    check_now(stack, manifest)
    second = stack.manifest(theirs, account=account)
    stack.apply(second)
    wait_reason(stack, name_of(second), "Configured")


def test_many_channels_with_one_refused_token_cost_a_handful_of_calls(stack: Stack, account: dict[str, Any]) -> None:
    stack.twin_call("DELETE", "/journal")
    refused = {**account, "auth_token": "f" * 32}
    wrong = [stack.manifest(account["phone_numbers"][0], account=refused) for _ in range(50)]
    stack.apply(*wrong)
    for manifest in wrong:
        wait_reason(stack, name_of(manifest), "AuthenticationFailed")
    calls = stack.twin_call("GET", f"/journal?account={account['account_sid']}")["entries"]
    assert len(calls) == 1, "the answer is known after the first"
