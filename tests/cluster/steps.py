"""Steps that many cluster tests share: what users do through the API server, and waiting for what follows from it."""

from __future__ import annotations

import base64
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kubernetes import client, watch
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.stack import CHANNELS, OPERATOR, Stack, ready_reason
from smschannel.api.kube_client import MERGE_PATCH
from smschannel.api.sealing import Keyring
from smschannel.core.record import Contents, Record
from tests.conftest import check_status

_RECORDS = "channels.hydracore.io/record=true"
_PATIENCE = 30  # seconds

TWILIO_DOWN = {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}}
DEMO_WEBHOOK = "https://demo.twilio.com/welcome/sms/reply"
"""What the twin's new numbers point at."""


def name_of(manifest: Any) -> str:
    return str(manifest["metadata"]["name"])


def wait_reason(
    stack: Stack, name: str, reason: str, *, namespace: str = CHANNELS, timeout: int = 30
) -> dict[str, Any]:
    """Wait until Ready carries `reason` for the current generation; returns the channel, its status checked."""
    channel = stack.wait_until(
        lambda each: ready_reason(each)[1] == reason, name, namespace=namespace, timeout=timeout
    )[name]
    check_status(channel["status"])
    return channel


def configured(stack: Stack, manifest: Any) -> dict[str, Any]:
    """Apply a channel and wait until it works; returns it."""
    stack.apply(manifest)
    return wait_reason(stack, name_of(manifest), "Configured", namespace=manifest["metadata"]["namespace"])


def delete(stack: Stack, *names: str, namespace: str = CHANNELS) -> None:
    """Delete channels and wait until they are gone."""
    stack.delete(*names, namespace=namespace)
    stack.wait_gone(*names, namespace=namespace)


def before(number: str) -> str:
    """What `take_number` lets a number point at before anybody claims it."""
    return f"https://before.example.com/{number[1:]}"


def webhook(stack: Stack, number: str) -> str:
    """The SmsUrl of a number as it is at Twilio; empty if it has none."""
    return str(stack.number(number)["sms_url"] or "")


def seed_account(stack: Stack, first: str, numbers: int = 1) -> dict[str, Any]:
    """A new Twilio account whose numbers count up from `first`."""
    seeded = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": numbers, "first": first})
    return dict(seeded["accounts"][0])


def rotate_token(stack: Stack, account: dict[str, Any]) -> str:
    """Revoke the account's token at Twilio; returns the one that is valid from now on."""
    tokens = f"/accounts/{account['account_sid']}/tokens"
    newer = stack.twin_call("POST", f"{tokens}/secondary")["auth_token"]
    stack.twin_call("POST", f"{tokens}/promote")
    return str(newer)


def apply_secret(
    stack: Stack, name: str, content: dict[str, str], *, labelled: bool = True, namespace: str = CHANNELS
) -> None:
    """A user's Secret with a token in it."""
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"channels.hydracore.io/credentials": "true"} if labelled else {},
        },
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in content.items()},
    }
    stack.apply(secret)


def patch(stack: Stack, name: str, body: Any) -> None:
    stack.channels.patch(name=name, namespace=CHANNELS, body=body, content_type=MERGE_PATCH)


def remove_finalizers(stack: Stack, name: str) -> None:
    """Remove all finalizers by force, as somebody does who is tired of waiting."""
    patch(stack, name, {"metadata": {"finalizers": None}})


def check_now(stack: Stack, manifest: Any) -> None:
    annotations = {"channels.hydracore.io/check-now": uuid.uuid4().hex}
    patch(stack, name_of(manifest), {"metadata": {"annotations": annotations}})


def wait_checked(stack: Stack, manifest: Any) -> dict[str, Any]:
    """Ask for a check and wait until a reconcile has taken care of it; returns the channel as it is then."""
    name, asked = name_of(manifest), uuid.uuid4().hex
    patch(stack, name, {"metadata": {"annotations": {"channels.hydracore.io/check-now": asked}}})
    return stack.wait_until(lambda each: each["status"].get("lastHandledCheckNow") == asked, name)[name]


def wait_for(check: Callable[[], bool], what: str) -> None:
    """Wait for something that cannot be watched."""
    give_up = time.monotonic() + _PATIENCE
    while not check():
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {_PATIENCE} s: {what}")
        time.sleep(0.05)


def delay_twilio(stack: Stack, account: dict[str, Any], seconds: float) -> Callable[[], bool]:
    """Delay the next call with an account; returns whether the call has arrived."""
    rule = {"match": {"account": account["account_sid"], "count": 1}, "action": {"kind": "delay", "seconds": seconds}}
    added = stack.twin_call("POST", "/faults", rule)["id"]

    def arrived() -> bool:
        rules = stack.twin_call("GET", "/faults")["faults"]
        return any(each["id"] == added and each["hit"] for each in rules)

    return arrived


# Events


def wait_event(stack: Stack, name: str, reason: str, *, namespace: str = CHANNELS) -> Any:
    """Wait until there is an Event about a channel, posted at any time; returns it."""
    return _watch_event(stack, name, reason, namespace, since=None)


@contextmanager
def expect_event(stack: Stack, name: str, reason: str) -> Iterator[None]:
    """Wait at the end of the block until an Event was posted, or counted again, since its beginning."""
    listed = client.EventsV1Api(stack.api.client).list_namespaced_event(CHANNELS).metadata
    yield
    _watch_event(stack, name, reason, CHANNELS, since=listed and listed.resource_version)


def _watch_event(stack: Stack, name: str, reason: str, namespace: str, *, since: Any) -> Any:
    events = client.EventsV1Api(stack.api.client)
    begin = {"resource_version": since} if since else {}
    for event in watch.Watch().stream(events.list_namespaced_event, namespace, timeout_seconds=_PATIENCE, **begin):
        if event["object"].reason == reason and event["object"].regarding.name == name:
            return event["object"]
    raise AssertionError(f"no Event {reason} for {name} within {_PATIENCE} s")


# Records


def records(stack: Stack) -> dict[str, Record]:
    """The operator's records by phone number, unopened."""
    listed = client.CoreV1Api(stack.api.client).list_namespaced_secret(OPERATOR, label_selector=_RECORDS)
    return {record.phone_number: record for record in map(_record_of, listed.items)}


def read_record(stack: Stack, number: str) -> Any:
    """The Secret that is the record of a number. Raises an API exception if there is none."""
    return client.CoreV1Api(stack.api.client).read_namespaced_secret(stack.record_name(number), OPERATOR)


def damage_record(stack: Stack, number: str) -> str:
    """Overwrite a record's sealed contents; returns what they were, for `repair_record`."""
    sealed = read_record(stack, number).data["record"]
    _write_record(stack, number, "AAAA")
    return str(sealed)


def repair_record(stack: Stack, number: str, sealed: str) -> None:
    _write_record(stack, number, sealed)


def contents_of(stack: Stack, secret: Any) -> Contents:
    """The sealed contents of a record, or of the copy of a written-off one, opened with the operator's keyring."""
    keyring: Any = client.CoreV1Api(stack.api.client).read_namespaced_secret("smschannel-keyring", OPERATOR)
    notes = secret.metadata.annotations
    sid = "PN" + secret.metadata.name.removeprefix("written-off-")[2:34]
    binding = f"{sid}/{notes['channels.hydracore.io/channel-uid']}"
    sealed = base64.b64decode(secret.data["record"])
    return Contents.decode(Keyring.load(base64.b64decode(keyring.data["keyring"]).decode()).unwrap(sealed, binding))


def _write_record(stack: Stack, number: str, sealed: str) -> None:
    body = {"data": {"record": sealed}}
    client.CoreV1Api(stack.api.client).patch_namespaced_secret(stack.record_name(number), OPERATOR, body)


def wait_record_gone(stack: Stack, uid: str) -> None:
    """Wait until no record belongs to the channel of this uid."""
    listed: Any = client.CoreV1Api(stack.api.client).list_namespaced_secret(OPERATOR, label_selector=_RECORDS)
    held = {each.metadata.name for each in listed.items if _record_of(each).uid == uid}

    def gone(event: Any) -> bool:
        name = event["object"].metadata.name
        if event["type"] != "DELETED" and _record_of(event["object"]).uid == uid:
            held.add(name)
        else:
            held.discard(name)
        return not held

    if held:
        _watch_records(stack, listed, gone, f"a record of channel {uid} is still there")


@contextmanager
def expect_record_written(stack: Stack, uid: str) -> Iterator[None]:
    """Wait at the end of the block until a record of this channel was written since its beginning."""
    listed = client.CoreV1Api(stack.api.client).list_namespaced_secret(OPERATOR, label_selector=_RECORDS)
    yield

    def written(event: Any) -> bool:
        return event["type"] in {"ADDED", "MODIFIED"} and _record_of(event["object"]).uid == uid

    _watch_records(stack, listed, written, f"no record of channel {uid} was written")


def _watch_records(stack: Stack, listed: Any, found: Callable[[Any], bool], complaint: str) -> None:
    stream = watch.Watch().stream(
        client.CoreV1Api(stack.api.client).list_namespaced_secret,
        OPERATOR,
        label_selector=_RECORDS,
        resource_version=listed.metadata.resource_version,
        timeout_seconds=_PATIENCE,
    )
    if not any(found(event) for event in stream):
        raise AssertionError(f"{complaint} within {_PATIENCE} s")


def _record_of(secret: Any) -> Record:
    meta = secret.metadata
    return Record.from_metadata(
        {"name": meta.name, "annotations": meta.annotations, "resourceVersion": meta.resource_version}
    )


# Metrics


def metric(operator: Stack | str, name: str, **labels: str) -> float:
    """A figure of an operator's /metrics, summed over other labels; 0 for what was never counted."""
    url = operator if isinstance(operator, str) else operator.operator_url
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:  # noqa: S310  (a loopback URL of ours)
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = (sample for family in families for sample in family.samples)
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())
