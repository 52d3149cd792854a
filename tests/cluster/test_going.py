"""However a channel goes, it goes: its deletion ends by itself; what is owed is paid, kept or loudly written off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kubernetes import client, watch

from deploy.local.stack import CHANNELS, OPERATOR, Options, Stack
from tests.cluster.steps import before, name_of, take_finalizers_off, wait_reason, wait_record_gone
from tests.conftest import running, take_number

DEMO = "https://demo.twilio.com/welcome/sms/reply"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: namespaces and the CRD are deleted in it. Hours are seconds here."""
    options = Options(
        numbers=80,
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


def configured(stack: Stack, number: str, **how: Any) -> tuple[str, str]:
    """Name and uid of a channel that works."""
    manifest = stack.manifest(number, **how)
    stack.apply(manifest)
    namespace = manifest["metadata"]["namespace"]
    channel = wait_reason(stack, name_of(manifest), "Configured", namespace=namespace)
    return name_of(manifest), channel["metadata"]["uid"]


def wait_written_off(stack: Stack, uid: str) -> str:
    """Why."""
    core = client.CoreV1Api(stack.api.client)
    for event in watch.Watch().stream(
        core.list_namespaced_secret, OPERATOR, field_selector=f"metadata.name={uid}", timeout_seconds=40
    ):
        meta = event["object"].metadata
        if (meta.labels or {}).get("channels.hydracore.io/record") == "written-off":
            return str(meta.annotations["channels.hydracore.io/written-off"])
    raise AssertionError("not written off within 40 s")


@contextmanager
def waiting_for_the_end(listing: Callable[..., Any], name: str) -> Iterator[None]:
    """What is named must be there at first, and be gone within 60 s of the block's end."""
    selected = {"field_selector": f"metadata.name={name}"}
    since = listing(**selected).metadata.resource_version
    yield
    for event in watch.Watch().stream(listing, **selected, resource_version=since, timeout_seconds=60):
        if event["type"] == "DELETED":
            return
    raise AssertionError(f"{name} is still there after 60 s")


@contextmanager
def crd_deleted(stack: Stack) -> Iterator[None]:
    """NotFound at the end of the block, which may help."""
    crds, name = client.ApiextensionsV1Api(stack.api.client), "smschannels.channels.hydracore.io"
    with waiting_for_the_end(crds.list_custom_resource_definition, name):
        crds.delete_custom_resource_definition(name)
        yield


def test_a_number_that_was_released_at_twilio_owes_nothing(stack: Stack, account: dict[str, Any]) -> None:
    name, uid = configured(stack, account["phone_numbers"][0], account=account)
    stack.twin_call("DELETE", f"/numbers/{account['phone_numbers'][0]}")
    stack.delete(name)
    stack.wait_gone(name)
    wait_record_gone(stack, uid)


@pytest.mark.parametrize("status", ["suspended", "closed"])
def test_an_account_that_is_not_active_delays_the_deletion_and_then_pays(
    stack: Stack, account: dict[str, Any], status: str
) -> None:
    name, uid = configured(stack, account["phone_numbers"][0], account=account)
    stack.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": status})
    stack.delete(name)
    stack.wait_gone(name)
    assert uid in stack.records(), "the debt outlives the channel"
    stack.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "active"})
    wait_record_gone(stack, uid)
    assert stack.number(account["phone_numbers"][0])["sms_url"] == DEMO


def test_a_revoked_token_is_written_off_in_the_end_and_people_find_out_what_was_left(
    stack: Stack, account: dict[str, Any]
) -> None:
    number, sid = account["phone_numbers"][0], account["account_sid"]
    name, uid = configured(stack, number, account=account)
    stack.twin_call("POST", f"/accounts/{sid}/tokens/secondary")
    stack.twin_call("POST", f"/accounts/{sid}/tokens/promote")
    stack.delete(name)
    wait_reason(stack, name, "RestoreFailed")
    stack.wait_gone(name)
    why = wait_written_off(stack, uid)
    assert number in why
    assert sid in why
    assert "20003" in why
    events = client.EventsV1Api(stack.api.client).list_namespaced_event(OPERATOR)
    told = [each.regarding for each in events.items if each.reason == "WrittenOff"]
    assert uid in [each.name for each in told if each]


def test_a_record_that_cannot_be_read_does_not_wedge_the_deletion(stack: Stack, number: str) -> None:
    name, uid = configured(stack, number)
    core = client.CoreV1Api(stack.api.client)
    core.patch_namespaced_secret(uid, OPERATOR, {"data": {"record": "AAAA"}})
    stack.delete(name)
    wait_reason(stack, name, "RestoreFailed")
    stack.wait_gone(name)
    assert core.read_namespaced_secret(uid, OPERATOR).data == {"record": "AAAA"}, "kept for whoever finds the key"
    core.delete_namespaced_secret(uid, OPERATOR)


@pytest.mark.parametrize("how", ["Foreground", "Background", "Orphan"])
def test_every_kind_of_deletion_ends(stack: Stack, number: str, how: str) -> None:
    name, uid = configured(stack, number)
    stack.channels.delete(name=name, namespace=CHANNELS, body={"propagationPolicy": how})
    stack.wait_gone(name)
    wait_record_gone(stack, uid)
    assert stack.number(number)["sms_url"] == before(number)


def test_a_namespace_can_be_deleted_with_its_channels(stack: Stack) -> None:
    """The user's Secrets and the operator's RoleBinding go with it, in any order."""
    numbers = [take_number(stack) for _ in range(4)]
    made = [configured(stack, number, namespace="going") for number in numbers]
    core = client.CoreV1Api(stack.api.client)
    with waiting_for_the_end(core.list_namespace, "going"):
        core.delete_namespace("going")
    for number, (_, uid) in zip(numbers, made, strict=True):
        wait_record_gone(stack, uid)
        assert stack.number(number)["sms_url"] == before(number)


def test_a_namespace_is_deleted_while_twilio_is_down(stack: Stack) -> None:
    number = take_number(stack)
    _, uid = configured(stack, number, namespace="gone")
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}})
    core = client.CoreV1Api(stack.api.client)
    with waiting_for_the_end(core.list_namespace, "gone"):
        core.delete_namespace("gone")
    assert uid in stack.records()
    stack.twin_call("DELETE", "/faults")
    wait_record_gone(stack, uid)
    assert stack.number(number)["sms_url"] == before(number)


def test_many_deletions_do_not_wait_for_one_another_while_twilio_hangs(stack: Stack) -> None:
    """One after the other they would wait for 30 time-outs."""
    numbers = [take_number(stack) for _ in range(30)]
    manifests = [stack.manifest(number) for number in numbers]
    names = [name_of(each) for each in manifests]
    stack.apply(*manifests)
    stack.wait_ready(*names)
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "hang"}})
    stack.delete(*names)
    stack.wait_gone(*names, timeout=30)


def test_a_finalizer_taken_off_by_force_is_noticed_at_once(stack: Stack, number: str) -> None:
    name, uid = configured(stack, number)
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}})
    stack.delete(name)
    take_finalizers_off(stack, name)
    stack.wait_gone(name)
    stack.twin_call("DELETE", "/faults")
    wait_record_gone(stack, uid)
    assert stack.number(number)["sms_url"] == before(number)


def test_a_deleted_crd_takes_its_channels_along_and_may_come_back(stack: Stack, number: str) -> None:
    _, uid = configured(stack, number)
    with crd_deleted(stack):
        pass
    wait_record_gone(stack, uid)
    assert stack.number(number)["sms_url"] == before(number)
    stack.install_crd()
    configured(stack, number)


def test_what_a_crd_left_owing_while_the_operator_was_away_is_paid(stack: Stack, number: str) -> None:
    _, uid = configured(stack, number)
    stack.stop_process("operator", kill=True)
    with crd_deleted(stack):
        for each in stack.channels.get(namespace=CHANNELS).items:
            take_finalizers_off(stack, each.metadata.name)
    stack.start_operator()
    wait_record_gone(stack, uid)
    assert stack.number(number)["sms_url"] == before(number)
    stack.install_crd()
    configured(stack, number)
