"""One number, one channel, whatever namespace it is in: the first verified claim wins, and the others wait."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from deploy.local.stack import Stack, ready_reason
from tests.cluster.steps import (
    DEMO_WEBHOOK,
    apply_secret,
    before,
    check_now,
    configured,
    delete,
    metric,
    name_of,
    rotate_token,
    wait_reason,
    webhook,
)

Numbers = Callable[[int], list[str]]


def test_number_serves_one_channel_across_namespaces(stack: Stack, number: str) -> None:
    first, second = stack.manifest(number), stack.manifest(number, namespace="team-b")
    configured(stack, first)
    stack.apply(second)
    refused = wait_reason(stack, name_of(second), "NumberInUse", namespace="team-b")
    shown = str(refused["status"])
    assert name_of(first) not in shown, "waiters learn nothing about the holder"
    assert "sms-channels" not in shown.replace(refused["status"]["webhookUrl"], "")
    stack.delete(name_of(first))
    wait_reason(stack, name_of(second), "Configured", namespace="team-b")
    delete(stack, name_of(second), namespace="team-b")
    assert webhook(stack, number) == before(number), "it was restored before it was taken over"


def test_same_instance_in_two_namespaces_has_two_webhooks(stack: Stack, numbers: Numbers) -> None:
    """Nobody can point a number at the webhook of another namespace's instance, nor keep an instance id from it."""
    victims, attackers = numbers(2)
    instance = str(uuid.uuid4())
    configured(stack, stack.manifest(attackers, name=instance, namespace="team-b"))
    configured(stack, stack.manifest(victims, name=instance))
    urls = stack.webhook_url(instance), stack.webhook_url(instance, "team-b")
    assert urls[0] != urls[1]
    assert (webhook(stack, victims), webhook(stack, attackers)) == urls
    delete(stack, instance)
    assert (webhook(stack, victims), webhook(stack, attackers)) == (before(victims), urls[1])
    delete(stack, instance, namespace="team-b")
    assert webhook(stack, attackers) == before(attackers)


def test_unverified_credentials_claim_nothing(stack: Stack, account: dict[str, Any]) -> None:
    """Not even for a channel that is older than the one with the right token."""
    number = account["phone_numbers"][0]
    unverified = stack.manifest(number, account={**account, "auth_token": "b" * 32})
    stack.apply(unverified)
    wait_reason(stack, name_of(unverified), "AuthenticationFailed")
    right = stack.manifest(number, account=account)
    configured(stack, right)


def test_holder_is_not_displaced_by_an_older_channel_that_is_verified_later(
    stack: Stack, account: dict[str, Any]
) -> None:
    number = account["phone_numbers"][0]
    older = stack.manifest(number, account={**account, "auth_token": "b" * 32})
    stack.apply(older)
    wait_reason(stack, name_of(older), "AuthenticationFailed")
    holder = stack.manifest(number, account=account)
    configured(stack, holder)
    stack.apply(stack.manifest(number, name=name_of(older), account=account))
    wait_reason(stack, name_of(older), "NumberInUse")
    check_now(stack, holder)
    wait_reason(stack, name_of(holder), "Configured")


def test_oldest_of_those_created_while_the_operator_was_down_gets_the_number(
    stack: Stack, account: dict[str, Any]
) -> None:
    number = account["phone_numbers"][0]
    manifests = [stack.manifest(number, account=account) for _ in range(3)]
    stack.stop_process("operator")
    stack.apply(*manifests)
    made = [stack.channels.get(name=name_of(each), namespace="sms-channels").metadata for each in manifests]
    oldest = min(made, key=lambda meta: (meta.creationTimestamp, meta.uid)).name
    stack.start_operator()
    wait_reason(stack, oldest, "Configured")
    for manifest in manifests:
        if name_of(manifest) != oldest:
            wait_reason(stack, name_of(manifest), "NumberInUse")


@pytest.mark.parametrize("count", [2, 3])
def test_channels_swap_their_numbers(stack: Stack, numbers: Numbers, count: int) -> None:
    """As one commit in Git does. None can have its new number before another has restored its own."""
    wanted = numbers(count)
    manifests = [stack.manifest(each) for each in wanted]
    names = [name_of(each) for each in manifests]
    stack.apply(*manifests)
    stack.wait_ready(*names)
    moved = dict(zip(names, wanted[1:] + wanted[:1], strict=True))
    stack.apply(*(stack.manifest(number, name=name) for name, number in moved.items()))
    sids = {name: stack.number(number)["sid"] for name, number in moved.items()}
    stack.wait_until(
        lambda each: ready_reason(each)[0] == "True" and each["status"]["phoneNumberSid"] == sids[name_of(each)], *names
    )
    for name, number in moved.items():
        assert webhook(stack, number) == stack.webhook_url(name)
    delete(stack, *names)
    assert [webhook(stack, number) for number in wanted] == [before(number) for number in wanted]


def test_many_waiters_cost_one_status_and_one_call_each(stack: Stack, account: dict[str, Any]) -> None:
    """When the holder is deleted, one of them is reconciled and not all."""
    number, count, where = account["phone_numbers"][0], 300, "team-c"
    holder = stack.manifest(number, account=account)
    configured(stack, holder)
    apply_secret(stack, "twilio", {"auth_token": account["auth_token"]}, namespace=where)
    waiters = [_waiter(number, account, "twilio") for _ in range(count)]
    names = [name_of(each) for each in waiters]
    stack.twin_call("DELETE", "/journal")
    written = metric(stack, "smschannel_kubernetes_writes_total", kind="status")
    stack.apply(*waiters)
    stack.wait_until(lambda each: ready_reason(each)[1] == "NumberInUse", *names, namespace=where, timeout=120)
    assert metric(stack, "smschannel_kubernetes_writes_total", kind="status") - written == count, "one status each"
    assert _calls(stack, account) <= count + 2, "one call each, and two for the account"

    stack.twin_call("DELETE", "/journal")
    stack.delete(name_of(holder))
    stack.wait_ready(*names, namespace=where, enough=1)
    assert _calls(stack, account) < 20, "the oldest was reconciled, not all of them"


def _waiter(number: str, account: dict[str, Any], secret: str) -> dict[str, Any]:
    return {
        "apiVersion": "channels.hydracore.io/v1",
        "kind": "SmsChannel",
        "metadata": {"name": str(uuid.uuid4()), "namespace": "team-c"},
        "spec": {
            "accountSid": account["account_sid"],
            "phoneNumber": number,
            "credentials": {"secretKeyRef": {"name": secret, "key": "auth_token"}},
        },
    }


def _calls(stack: Stack, account: dict[str, Any]) -> int:
    return len(stack.twin_call("GET", f"/journal?account={account['account_sid']}")["entries"])


def test_waiter_brings_the_login_to_restore_a_number_whose_recorded_token_was_revoked(
    stack: Stack, account: dict[str, Any]
) -> None:
    """Else what a deleted channel left would keep the number from the only one who can restore it."""
    number = account["phone_numbers"][0]
    gone = stack.manifest(number, account=account)
    uid = configured(stack, gone)["metadata"]["uid"]
    newer = rotate_token(stack, account)
    delete(stack, name_of(gone))
    assert uid in stack.records()

    successor = stack.manifest(number, account={**account, "auth_token": newer})
    configured(stack, successor)
    assert uid not in stack.records()
    delete(stack, name_of(successor))
    assert webhook(stack, number) == DEMO_WEBHOOK, "as the first one found it"


def test_deleted_waiter_does_not_keep_the_number_from_the_next(stack: Stack, account: dict[str, Any]) -> None:
    number = account["phone_numbers"][0]
    holder, older, younger = (stack.manifest(number, account=account) for _ in range(3))
    configured(stack, holder)
    for waiting in (older, younger):
        stack.apply(waiting)
        wait_reason(stack, name_of(waiting), "NumberInUse")
    delete(stack, name_of(older))
    stack.delete(name_of(holder))
    wait_reason(stack, name_of(younger), "Configured")
