"""What cluster tests do again and again: as a user would, through the API server and the twin's control API."""

from __future__ import annotations

import base64
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kubernetes import client, watch
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.stack import CHANNELS, OPERATOR, Stack, ready_reason
from smschannel.api.kube_client import MERGE_PATCH
from tests.conftest import check_status


def name_of(manifest: Any) -> str:
    return str(manifest["metadata"]["name"])


def wait_reason(
    stack: Stack, name: str, reason: str, *, namespace: str = CHANNELS, timeout: int = 30
) -> dict[str, Any]:
    """The channel once Ready carries `reason`; its status keeps to all rules."""
    channel = stack.wait_until(
        lambda each: ready_reason(each)[1] == reason, name, namespace=namespace, timeout=timeout
    )[name]
    check_status(channel["status"])
    return channel


def before(number: str) -> str:
    return f"https://before.example.com/{number[1:]}"


def api_token_secret(
    stack: Stack, name: str, content: dict[str, str], *, labelled: bool = True, namespace: str = CHANNELS
) -> None:
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


def take_finalizers_off(stack: Stack, name: str) -> None:
    """By force, as somebody who is tired of waiting does."""
    patch(stack, name, {"metadata": {"finalizers": None}})


def check_now(stack: Stack, manifest: Any) -> None:
    annotations = {"channels.hydracore.io/check-now": uuid.uuid4().hex}
    patch(stack, name_of(manifest), {"metadata": {"annotations": annotations}})


def wait_event(stack: Stack, name: str, reason: str) -> Any:
    events = client.EventsV1Api(stack.api.client)
    for event in watch.Watch().stream(events.list_namespaced_event, CHANNELS, timeout_seconds=30):
        if event["object"].reason == reason and event["object"].regarding.name == name:
            return event["object"]
    raise AssertionError(f"no Event {reason} for {name} within 30 s")


@contextmanager
def told(stack: Stack, name: str, reason: str) -> Iterator[None]:
    """Waits at the end until an Event was posted, or counted again, since the beginning."""
    events = client.EventsV1Api(stack.api.client)
    since = events.list_namespaced_event(CHANNELS).metadata
    yield
    for event in watch.Watch().stream(
        events.list_namespaced_event, CHANNELS, resource_version=since and since.resource_version, timeout_seconds=30
    ):
        if event["object"].reason == reason and event["object"].regarding.name == name:
            return
    raise AssertionError(f"no Event {reason} for {name} within 30 s")


def wait_record_gone(stack: Stack, uid: str) -> None:
    core = client.CoreV1Api(stack.api.client)
    listed = core.list_namespaced_secret(OPERATOR, field_selector=f"metadata.name={uid}")
    if listed.items and listed.metadata:
        _wait_record(stack, uid, "DELETED", str(listed.metadata.resource_version))


@contextmanager
def written_record(stack: Stack, uid: str) -> Iterator[None]:
    """Waits at the end until the record was written since the beginning."""
    core = client.CoreV1Api(stack.api.client)
    listed = core.list_namespaced_secret(OPERATOR, field_selector=f"metadata.name={uid}")
    assert listed.metadata
    yield
    _wait_record(stack, uid, "MODIFIED", str(listed.metadata.resource_version))


def _wait_record(stack: Stack, uid: str, kind: str, since: str) -> None:
    for event in watch.Watch().stream(
        client.CoreV1Api(stack.api.client).list_namespaced_secret,
        OPERATOR,
        field_selector=f"metadata.name={uid}",
        resource_version=since,
        timeout_seconds=30,
    ):
        if event["type"] == kind:
            return
    raise AssertionError(f"record {uid} was not {kind} within 30 s")


def metric(stack: Stack, name: str, **labels: str) -> float:
    """What the operator's /metrics says; 0 for what was never counted."""
    with urllib.request.urlopen(f"{stack.operator_url}/metrics", timeout=10) as answer:  # noqa: S310  (a loopback URL of ours)
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = (sample for family in families for sample in family.samples)
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())
