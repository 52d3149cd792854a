"""One number, one channel; one instance, one namespace: whoever came first stays, and the others wait their turn."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from deploy.local.stack import Stack, ready_reason
from tests.cluster.steps import api_token_secret, before, check_now, metric, name_of, wait_reason

Numbers = Callable[[int], list[str]]


def test_a_number_is_one_channels_across_namespaces(stack: Stack, number: str) -> None:
    first, second = stack.manifest(number), stack.manifest(number, namespace="team-b")
    stack.apply(first)
    wait_reason(stack, name_of(first), "Configured")
    stack.apply(second)
    refused = wait_reason(stack, name_of(second), "NumberInUse", namespace="team-b")
    told = str(refused["status"])
    assert name_of(first) not in told, "the loser learns nothing about the holder"
    assert "sms-channels" not in told.replace(refused["status"]["webhookUrl"], "")
    stack.delete(name_of(first))
    wait_reason(stack, name_of(second), "Configured", namespace="team-b")
    stack.delete(name_of(second), namespace="team-b")
    stack.wait_gone(name_of(second), namespace="team-b")
    assert stack.number(number)["sms_url"] == before(number), "taken over after it was given back"


def test_an_instance_is_one_namespaces(stack: Stack, numbers: Numbers) -> None:
    """Else anyone could point a number of their own at another instance's webhook."""
    theirs, mine = numbers(2)
    instance = str(uuid.uuid4())
    first = stack.manifest(theirs, name=instance)
    second = stack.manifest(mine, name=instance, namespace="team-b")
    stack.apply(first)
    wait_reason(stack, instance, "Configured")
    stack.apply(second)
    wait_reason(stack, instance, "InstanceInUse", namespace="team-b")
    assert stack.number(mine)["sms_url"] == before(mine), "nothing was written"
    stack.delete(instance)
    wait_reason(stack, instance, "Configured", namespace="team-b")


def test_a_bogus_resource_claims_nothing(stack: Stack, account: dict[str, Any]) -> None:
    """Older than the right one, for the same number: but its token was never any good."""
    number = account["phone_numbers"][0]
    bogus = stack.manifest(number, account={**account, "auth_token": "b" * 32})
    stack.apply(bogus)
    wait_reason(stack, name_of(bogus), "AuthenticationFailed")
    right = stack.manifest(number, account=account)
    stack.apply(right)
    wait_reason(stack, name_of(right), "Configured")


def test_an_older_resource_that_becomes_right_does_not_displace_the_holder(
    stack: Stack, account: dict[str, Any]
) -> None:
    number = account["phone_numbers"][0]
    older = stack.manifest(number, account={**account, "auth_token": "b" * 32})
    stack.apply(older)
    wait_reason(stack, name_of(older), "AuthenticationFailed")
    holder = stack.manifest(number, account=account)
    stack.apply(holder)
    wait_reason(stack, name_of(holder), "Configured")
    stack.apply(stack.manifest(number, name=name_of(older), account=account))
    wait_reason(stack, name_of(older), "NumberInUse")
    check_now(stack, holder)
    wait_reason(stack, name_of(holder), "Configured")


def test_of_those_that_came_while_the_operator_was_away_the_eldest_gets_the_number(
    stack: Stack, account: dict[str, Any]
) -> None:
    number = account["phone_numbers"][0]
    manifests = [stack.manifest(number, account=account) for _ in range(6)]
    stack.stop_process("operator")
    stack.apply(*manifests)
    made = [stack.channels.get(name=name_of(each), namespace="sms-channels").metadata for each in manifests]
    eldest = min(made, key=lambda meta: (meta.creationTimestamp, meta.uid)).name
    stack.start_operator()
    wait_reason(stack, eldest, "Configured")
    for manifest in manifests:
        if name_of(manifest) != eldest:
            wait_reason(stack, name_of(manifest), "NumberInUse")


@pytest.mark.parametrize("count", [2, 3])
def test_channels_may_swap_their_numbers(stack: Stack, numbers: Numbers, count: int) -> None:
    """As one commit in Git does it. Nobody could let go after the new number works: one of them lets go first."""
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
        assert name in stack.number(number)["sms_url"]
    stack.delete(*names)
    stack.wait_gone(*names)
    for number in wanted:
        assert stack.number(number)["sms_url"] == before(number), "and not what another channel wrote"


def test_channels_that_fight_over_one_number_are_told_once(stack: Stack, account: dict[str, Any]) -> None:
    """And when the holder goes, one of them is called, not all. It holds for thousands as for hundreds."""
    number, count, where = account["phone_numbers"][0], 300, "team-c"
    holder = stack.manifest(number, account=account)
    stack.apply(holder)
    wait_reason(stack, name_of(holder), "Configured")
    api_token_secret(stack, "twilio", {"auth_token": account["auth_token"]}, namespace=where)
    fighters = [_fighter(number, account, "twilio") for _ in range(count)]
    names = [name_of(each) for each in fighters]
    stack.twin_call("DELETE", "/journal")
    written = metric(stack, "smschannel_kubernetes_writes_total", kind="status")
    stack.apply(*fighters)
    stack.wait_until(lambda each: ready_reason(each)[1] == "NumberInUse", *names, namespace=where, timeout=120)
    assert metric(stack, "smschannel_kubernetes_writes_total", kind="status") - written == count, "one status each"
    assert _calls(stack, account) <= count + 2, "and one look"

    stack.twin_call("DELETE", "/journal")
    stack.delete(name_of(holder))
    stack.wait_ready(*names, namespace=where, enough=1)
    assert _calls(stack, account) < 20, "the eldest was called, not two thousand"


def _fighter(number: str, account: dict[str, Any], secret: str) -> dict[str, Any]:
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


def test_who_waits_for_a_number_that_nobody_can_give_back_any_more_brings_the_login_for_it(
    stack: Stack, account: dict[str, Any]
) -> None:
    """Its token was revoked, then the channel deleted: the debt must not keep the number from whoever can pay it."""
    number = account["phone_numbers"][0]
    gone = stack.manifest(number, account=account)
    stack.apply(gone)
    uid = wait_reason(stack, name_of(gone), "Configured")["metadata"]["uid"]
    newer = stack.twin_call("POST", f"/accounts/{account['account_sid']}/tokens/secondary")["auth_token"]
    stack.twin_call("POST", f"/accounts/{account['account_sid']}/tokens/promote")
    stack.delete(name_of(gone))
    stack.wait_gone(name_of(gone))
    assert uid in stack.records()

    successor = stack.manifest(number, account={**account, "auth_token": newer})
    stack.apply(successor)
    wait_reason(stack, name_of(successor), "Configured")
    assert uid not in stack.records()
    stack.delete(name_of(successor))
    stack.wait_gone(name_of(successor))
    assert stack.number(number)["sms_url"] == "https://demo.twilio.com/welcome/sms/reply", "as the first one found it"


def test_who_waited_and_is_gone_does_not_keep_the_call_from_the_next(stack: Stack, account: dict[str, Any]) -> None:
    number = account["phone_numbers"][0]
    holder, elder, younger = (stack.manifest(number, account=account) for _ in range(3))
    stack.apply(holder)
    wait_reason(stack, name_of(holder), "Configured")
    for waiting in (elder, younger):
        stack.apply(waiting)
        wait_reason(stack, name_of(waiting), "NumberInUse")
    stack.delete(name_of(elder))
    stack.wait_gone(name_of(elder))
    stack.delete(name_of(holder))
    wait_reason(stack, name_of(younger), "Configured")
