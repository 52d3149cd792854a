"""Every deletion ends by itself; its number is restored then or later, or written off with a notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kubernetes import client, watch

from deploy.local.stack import CHANNELS, OPERATOR, Options, Stack
from tests.cluster.steps import (
    DEMO_WEBHOOK,
    TWILIO_DOWN,
    before,
    configured,
    contents_of,
    damage_record,
    delete,
    name_of,
    read_record,
    remove_finalizers,
    rotate_token,
    wait_reason,
    wait_record_gone,
    webhook,
)
from tests.conftest import running, take_number

TEMPLATE = "https://sms.example.com/{namespace}/instances/{instance_id}/channels/sms/webhook"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: namespaces and the CRD are deleted in it. Deadlines are seconds."""
    options = Options(
        numbers=80,
        webhook_url_template=TEMPLATE,
        more_namespaces=("going", "gone"),
        operator_settings={
            "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "3600",
            "SMSCHANNEL_SLOW_INTERVAL_SECONDS": "2",
            "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "1",
            "SMSCHANNEL_TWILIO_TIMEOUT_SECONDS": "3",
            "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
            "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
            "SMSCHANNEL_DELETION_GRACE_SECONDS": "2",
            "SMSCHANNEL_RESTORE_DEADLINE_SECONDS": "12",
        },
    )
    with running(tmp_path_factory.mktemp("going"), options) as started:
        yield started


def new_channel(stack: Stack, number: str, **options: Any) -> tuple[str, str]:
    """Name and uid of a channel that works."""
    meta = configured(stack, stack.manifest(number, **options))["metadata"]
    return meta["name"], meta["uid"]


def wait_written_off(stack: Stack, number: str) -> Any:
    """Wait until the record of a number was written off; returns its copy."""
    core = client.CoreV1Api(stack.api.client)
    labelled = "channels.hydracore.io/record=written-off"
    prefix = f"written-off-{stack.record_name(number)}-"
    for event in watch.Watch().stream(
        core.list_namespaced_secret, OPERATOR, label_selector=labelled, timeout_seconds=40
    ):
        if event["object"].metadata.name.startswith(prefix):
            return event["object"]
    raise AssertionError("not written off within 40 s")


@contextmanager
def expect_deletion(listing: Callable[..., Any], name: str) -> Iterator[None]:
    """Wait at the end of the block until an object is deleted that was there at its beginning."""
    selected = {"field_selector": f"metadata.name={name}"}
    since = listing(**selected).metadata.resource_version
    yield
    for event in watch.Watch().stream(listing, **selected, resource_version=since, timeout_seconds=60):
        if event["type"] == "DELETED":
            return
    raise AssertionError(f"{name} is still there after 60 s")


@contextmanager
def crd_deleted(stack: Stack) -> Iterator[None]:
    """Delete the CRD; the block may do what its deletion waits for."""
    crds, name = client.ApiextensionsV1Api(stack.api.client), "smschannels.channels.hydracore.io"
    with expect_deletion(crds.list_custom_resource_definition, name):
        crds.delete_custom_resource_definition(name)
        yield


def test_number_released_at_twilio_needs_no_restore(stack: Stack, account: dict[str, Any]) -> None:
    name, uid = new_channel(stack, account["phone_numbers"][0], account=account)
    stack.twin_call("DELETE", f"/numbers/{account['phone_numbers'][0]}")
    delete(stack, name)
    wait_record_gone(stack, uid)


@pytest.mark.parametrize("status", ["suspended", "closed"])
def test_number_of_an_inactive_account_is_restored_once_the_account_is_active(
    stack: Stack, account: dict[str, Any], status: str
) -> None:
    name, uid = new_channel(stack, account["phone_numbers"][0], account=account)
    stack.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": status})
    stack.delete(name)
    stack.wait_gone(name)
    assert uid in stack.records(), "the record outlives the channel"
    stack.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "active"})
    wait_record_gone(stack, uid)
    assert webhook(stack, account["phone_numbers"][0]) == DEMO_WEBHOOK


def test_written_off_record_frees_its_number_and_leaves_a_copy(stack: Stack, account: dict[str, Any]) -> None:
    """Its token was revoked, so nobody can restore the number; another channel may use it all the same."""
    number, sid = account["phone_numbers"][0], account["account_sid"]
    name, uid = new_channel(stack, number, account=account)
    newer = rotate_token(stack, account)
    stack.delete(name)
    wait_reason(stack, name, "RestoreFailed")
    stack.wait_gone(name)

    copy = wait_written_off(stack, number)
    wait_record_gone(stack, uid)
    previous = contents_of(stack, copy).previous
    assert previous
    assert previous.url == DEMO_WEBHOOK, "whoever has the keyring can still read what it pointed at"
    notes = copy.metadata.annotations
    why = notes["channels.hydracore.io/written-off"]
    assert all(each in why for each in (number, sid, "20003")), why
    assert notes["channels.hydracore.io/channel"] == f"{CHANNELS}/{name}"
    assert notes["channels.hydracore.io/channel-uid"] == uid
    events = client.EventsV1Api(stack.api.client).list_namespaced_event(OPERATOR)
    reported = [each.regarding for each in events.items if each.reason == "WrittenOff"]
    assert copy.metadata.name in [each.name for each in reported if each]

    ours = stack.webhook_url(name)
    assert webhook(stack, number) == ours
    successor = configured(stack, stack.manifest(number, account={**account, "auth_token": newer}))
    assert webhook(stack, number) == successor["status"]["webhookUrl"] != ours
    core = client.CoreV1Api(stack.api.client)
    assert core.read_namespaced_secret(copy.metadata.name, OPERATOR).data == copy.data


def test_unreadable_record_does_not_block_the_deletion_and_is_written_off_unopened(stack: Stack, number: str) -> None:
    name, uid = new_channel(stack, number)
    damage_record(stack, number)
    stack.delete(name)
    wait_reason(stack, name, "RestoreFailed")
    stack.wait_gone(name)
    assert read_record(stack, number).data == {"record": "AAAA"}, "it may be repaired until the deadline"
    copy = wait_written_off(stack, number)
    wait_record_gone(stack, uid)
    assert copy.data == {"record": "AAAA"}, "kept for whoever finds the key"
    assert webhook(stack, number) == stack.webhook_url(name), "left as it was"


@pytest.mark.parametrize("how", ["Foreground", "Background", "Orphan"])
def test_every_propagation_policy_restores_the_number(stack: Stack, number: str, how: str) -> None:
    name, uid = new_channel(stack, number)
    stack.channels.delete(name=name, namespace=CHANNELS, body={"propagationPolicy": how})
    stack.wait_gone(name)
    wait_record_gone(stack, uid)
    assert webhook(stack, number) == before(number)


def test_deleted_namespace_restores_its_numbers(stack: Stack) -> None:
    """The user's Secrets and the operator's RoleBinding go with it, in any order."""
    numbers = [take_number(stack) for _ in range(4)]
    made = [new_channel(stack, number, namespace="going") for number in numbers]
    core = client.CoreV1Api(stack.api.client)
    with expect_deletion(core.list_namespace, "going"):
        core.delete_namespace("going")
    for number, (_, uid) in zip(numbers, made, strict=True):
        wait_record_gone(stack, uid)
        assert webhook(stack, number) == before(number)


def test_namespace_deletion_ends_during_an_outage(stack: Stack) -> None:
    number = take_number(stack)
    _, uid = new_channel(stack, number, namespace="gone")
    stack.twin_call("POST", "/faults", TWILIO_DOWN)
    core = client.CoreV1Api(stack.api.client)
    with expect_deletion(core.list_namespace, "gone"):
        core.delete_namespace("gone")
    assert uid in stack.records()
    stack.twin_call("DELETE", "/faults")
    wait_record_gone(stack, uid)
    assert webhook(stack, number) == before(number)


def test_deletions_do_not_wait_for_one_another_while_twilio_hangs(stack: Stack) -> None:
    """One after the other they would wait for 30 timeouts."""
    numbers = [take_number(stack) for _ in range(30)]
    manifests = [stack.manifest(number) for number in numbers]
    names = [name_of(each) for each in manifests]
    stack.apply(*manifests)
    stack.wait_ready(*names)
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "hang"}})
    stack.delete(*names)
    stack.wait_gone(*names, timeout=30)


def test_number_is_restored_whose_finalizer_was_removed_by_force(stack: Stack, number: str) -> None:
    name, uid = new_channel(stack, number)
    stack.twin_call("POST", "/faults", TWILIO_DOWN)
    stack.delete(name)
    remove_finalizers(stack, name)
    stack.wait_gone(name)
    stack.twin_call("DELETE", "/faults")
    wait_record_gone(stack, uid)
    assert webhook(stack, number) == before(number)


def test_deleted_crd_restores_its_numbers_and_may_be_installed_again(stack: Stack, number: str) -> None:
    _, uid = new_channel(stack, number)
    with crd_deleted(stack):
        pass
    wait_record_gone(stack, uid)
    assert webhook(stack, number) == before(number)
    stack.install_crd()
    new_channel(stack, number)


def test_numbers_are_restored_whose_crd_was_deleted_while_the_operator_was_down(stack: Stack, number: str) -> None:
    _, uid = new_channel(stack, number)
    stack.stop_process("operator", kill=True)
    with crd_deleted(stack):
        for each in stack.channels.get(namespace=CHANNELS).items:
            remove_finalizers(stack, each.metadata.name)
    stack.start_operator()
    wait_record_gone(stack, uid)
    assert webhook(stack, number) == before(number)
    stack.install_crd()
    new_channel(stack, number)
