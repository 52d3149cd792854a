"""The operator's records, one Secret per number: they arbitrate claims, and outlive what happens to channels."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from deploy.local.stack import CHANNELS, OPERATOR, Options, Stack
from tests.cluster.steps import (
    DEMO_WEBHOOK,
    apply_secret,
    before,
    configured,
    contents_of,
    damage_record,
    delay_twilio,
    delete,
    expect_record_written,
    name_of,
    patch,
    read_record,
    records,
    remove_finalizers,
    repair_record,
    wait_checked,
    wait_event,
    wait_for,
    wait_reason,
    wait_record_gone,
    webhook,
)
from tests.conftest import running

PREFIX = "channels.hydracore.io/"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: resyncs come every second, and channels are created without a finalizer."""
    options = Options(
        numbers=40,
        finalizer_policy=False,
        operator_settings={
            "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "3600",
            "SMSCHANNEL_SLOW_INTERVAL_SECONDS": "3600",
            "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "1",
            "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
            "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
            "SMSCHANNEL_DELETION_GRACE_SECONDS": "2",
        },
    )
    with running(tmp_path_factory.mktemp("records"), options) as started:
        yield started


# Contents


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed token", "token in a Secret"])
def test_record_names_its_holder_and_shows_neither_token_nor_url(stack: Stack, number: str, sealed: bool) -> None:
    token, source = stack.twin["auth_token"], "sealed"
    manifest = stack.manifest(number, deletionPolicy="Retain")
    if not sealed:
        name = f"twilio-{uuid.uuid4().hex[:8]}"
        apply_secret(stack, name, {"auth_token": token})
        version = client.CoreV1Api(stack.api.client).read_namespaced_secret(name, CHANNELS).metadata
        assert version
        source = f"secret/{name}@{version.resource_version}"
        manifest["spec"]["credentials"] = {"secretKeyRef": {"name": name, "key": "auth_token"}}
    uid = configured(stack, manifest)["metadata"]["uid"]

    secret = read_record(stack, number)
    meta = secret.metadata
    assert meta.name == stack.number(number)["sid"].lower()
    assert meta.labels == {
        PREFIX + "record": "true",
        PREFIX + "channel-namespace": CHANNELS,
        "app.kubernetes.io/managed-by": "sms-channel-operator",
    }
    assert meta.annotations == {
        PREFIX + "channel": f"{CHANNELS}/{name_of(manifest)}",
        PREFIX + "channel-uid": uid,
        PREFIX + "phone-number": number,
        PREFIX + "account-sid": stack.twin["account_sid"],
        PREFIX + "credentials-source": source,
        PREFIX + "deletion-policy": "Retain",
        PREFIX + "sealed-with": stack.public_key().fingerprint.hex(),
    }
    assert meta.owner_references is None, "it outlives the deletion of its channel and its namespace"
    assert set(secret.data) == {"record"}
    document = json.dumps(stack.api.client.sanitize_for_serialization(secret)) + base64.b64decode(
        secret.data["record"]
    ).decode("latin-1")
    assert [each for each in (token, base64.b64encode(token.encode()).decode(), "https://") if each in document] == []

    contents = contents_of(stack, secret)
    assert contents.login.token.get_secret_value() == token
    assert contents.previous
    assert (contents.previous.url, contents.wrote) == (before(number), (stack.webhook_url(name_of(manifest)),))


# Claims


@pytest.mark.parametrize("complete", [True, False], ids=["complete metadata", "no metadata"])
def test_record_of_an_unknown_channel_holds_its_number_until_it_is_deleted(
    stack: Stack, number: str, complete: bool
) -> None:
    """The API server arbitrates, whoever created it, and a record of an unwatched namespace restores nothing."""
    notes = {
        PREFIX + "channel": f"elsewhere/{uuid.uuid4()}",
        PREFIX + "channel-uid": str(uuid.uuid4()),
        PREFIX + "phone-number": number,
        PREFIX + "account-sid": stack.twin["account_sid"],
    }
    foreign = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": stack.record_name(number),
            "namespace": OPERATOR,
            "labels": {PREFIX + "record": "true"},
            "annotations": notes if complete else {},
        },
    }
    stack.apply(foreign)
    manifest = stack.manifest(number)
    stack.apply(manifest)
    refused = wait_reason(stack, name_of(manifest), "NumberInUse")
    assert "elsewhere" not in str(refused["status"])
    wait_checked(stack, manifest)
    wait_reason(stack, name_of(manifest), "NumberInUse")
    assert webhook(stack, number) == before(number)
    assert read_record(stack, number).data is None

    client.CoreV1Api(stack.api.client).delete_namespaced_secret(stack.record_name(number), OPERATOR)
    wait_reason(stack, name_of(manifest), "Configured")
    delete(stack, name_of(manifest))
    assert webhook(stack, number) == before(number)


def test_channel_whose_record_was_deleted_by_hand_claims_its_number_again(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    channel = configured(stack, manifest)
    uid, ours = channel["metadata"]["uid"], channel["status"]["webhookUrl"]
    with expect_record_written(stack, uid):
        client.CoreV1Api(stack.api.client).delete_namespaced_secret(stack.record_name(number), OPERATOR)
    other = stack.manifest(number)
    stack.apply(other)
    wait_reason(stack, name_of(other), "NumberInUse")
    delete(stack, name_of(other))
    delete(stack, name_of(manifest))
    wait_event(stack, name_of(manifest), "PreviousUnknown")
    assert webhook(stack, number) == ours, "what it pointed at before went with the record"


def test_channel_deleted_during_its_reconcile_does_not_keep_the_number_from_a_waiter(
    stack: Stack, account: dict[str, Any]
) -> None:
    """Without a finalizer it is gone at once, and its reconcile ends as if it still waited for the number."""
    number = account["phone_numbers"][0]
    holder, ghost, waiter = (stack.manifest(number, account=account) for _ in range(3))
    configured(stack, holder)
    called = delay_twilio(stack, account, 2)
    stack.apply(ghost)
    wait_for(called, "the ghost's reconcile asks Twilio")
    delete(stack, name_of(ghost))
    stack.apply(waiter)
    wait_reason(stack, name_of(waiter), "NumberInUse")
    wait_for(lambda: _calls_answered(stack, account, 3), "the ghost's reconcile is over")
    delete(stack, name_of(holder))
    wait_reason(stack, name_of(waiter), "Configured")
    delete(stack, name_of(waiter))
    assert webhook(stack, number) == DEMO_WEBHOOK


def _calls_answered(stack: Stack, account: dict[str, Any], count: int) -> bool:
    """Whether `count` searches for the number were answered: the holder's, the ghost's and the waiter's."""
    calls = stack.twin_call("GET", f"/journal?account={account['account_sid']}")["entries"]
    return [each["kind"] for each in calls].count("numbers") >= count


# Records that cannot be opened


@pytest.mark.parametrize("restart", [False, True], ids=["while it runs", "across a restart"])
def test_unreadable_record_holds_its_number_and_restores_it_once_repaired(
    stack: Stack, number: str, restart: bool
) -> None:
    holder, waiter = stack.manifest(number), stack.manifest(number)
    ours = configured(stack, holder)["status"]["webhookUrl"]
    stack.apply(waiter)
    wait_reason(stack, name_of(waiter), "NumberInUse")
    sealed = damage_record(stack, number)
    if restart:
        stack.stop_process("operator")
        stack.start_operator()
    wait_checked(stack, holder)
    refused = wait_reason(stack, name_of(holder), "RecordUnreadable")
    assert stack.record_name(number) in str(refused["status"]["conditions"]), "it names the Secret to restore"
    wait_checked(stack, waiter)
    wait_reason(stack, name_of(waiter), "NumberInUse")
    assert webhook(stack, number) == ours

    repair_record(stack, number, sealed)
    wait_reason(stack, name_of(holder), "Configured")
    assert webhook(stack, number) == ours
    delete(stack, name_of(holder))
    wait_reason(stack, name_of(waiter), "Configured")
    delete(stack, name_of(waiter))
    assert webhook(stack, number) == before(number)


def test_record_repaired_after_its_channel_was_deleted_is_restored_without_a_restart(stack: Stack, number: str) -> None:
    process = stack.process("operator").pid
    manifest = stack.manifest(number)
    uid = configured(stack, manifest)["metadata"]["uid"]
    sealed = damage_record(stack, number)
    delete(stack, name_of(manifest))
    record = records(stack)[number]
    assert (record.uid, record.name) == (uid, name_of(manifest))
    assert record.restore_since, "it says since when it is to be restored"
    repair_record(stack, number, sealed)
    wait_record_gone(stack, uid)
    assert webhook(stack, number) == before(number)
    assert stack.process("operator").pid == process


# Channels that come back under the same name


@pytest.mark.parametrize("force", [False, True], ids=["ordinary deletions", "finalizers removed by force"])
def test_burst_of_deletions_and_creations_keeps_the_previous_webhook(stack: Stack, number: str, force: bool) -> None:
    """Each successor claims only after what its predecessor left was restored."""
    manifest = stack.manifest(number)
    name = name_of(manifest)
    uids = [configured(stack, manifest)["metadata"]["uid"]]
    for _ in range(5):
        if force:
            patch(stack, name, {"metadata": {"finalizers": ["example.com/hold"]}})
            stack.delete(name)
            remove_finalizers(stack, name)
            stack.wait_gone(name)
        else:
            delete(stack, name)
        stack.apply(manifest)
        uids.append(str(stack.channels.get(name=name, namespace=CHANNELS).metadata.uid))
    assert len(set(uids)) == 6
    channel = wait_reason(stack, name, "Configured")
    assert channel["metadata"]["uid"] == uids[-1]
    assert webhook(stack, number) == channel["status"]["webhookUrl"]
    assert stack.records().count(uids[-1]) == 1
    previous = contents_of(stack, read_record(stack, number)).previous
    assert previous
    assert previous.url == before(number)
    delete(stack, name)
    assert webhook(stack, number) == before(number)
    assert number not in records(stack)
