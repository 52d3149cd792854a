"""The cache of channels keeps what the operator reads of them, and nothing that users may make large."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from smschannel.api.resource import CHECK_NOW_ANNOTATION, FINALIZER, SmsChannel, trimmed
from smschannel.channel_cache import ChannelCache, Trigger, key_of
from smschannel.core.claims import Claims
from tests.manifests import good

LARGE = "x" * 250_000


def channel(**metadata: Any) -> dict[str, Any]:
    body = copy.deepcopy(good())
    body["metadata"] |= {
        "uid": "u1",
        "resourceVersion": "7",
        "generation": 1,
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "finalizers": [FINALIZER],
        **metadata,
    }
    return {**body, "status": {"observedGeneration": 1}}


@pytest.mark.parametrize(
    "metadata",
    [
        {"annotations": {"example.com/note": LARGE}},
        {"labels": {f"label-{n}": "x" * 63 for n in range(4000)}},
        {"managedFields": [{"manager": "kubectl", "fieldsV1": {f"f:{n}": {} for n in range(4000)}}]},
        {"ownerReferences": [{"name": LARGE}]},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_metadata_that_the_operator_does_not_read_is_not_cached(metadata: Any) -> None:
    cache = ChannelCache(Claims())
    body = channel(**metadata)
    assert cache.observe(body)
    cached = cache.get(key_of(body))
    assert cached
    assert cached.body
    assert len(str(cached.body)) < 4000
    assert SmsChannel.model_validate(cached.body) == SmsChannel.model_validate(channel())


@pytest.mark.parametrize(
    "body",
    [
        channel(finalizers=[f"example.com/{n}" for n in range(4000)]),
        {**channel(), "status": {"conditions": [{"type": "Ready", "reason": "Configured", "message": LARGE}]}},
        channel(annotations={CHECK_NOW_ANNOTATION: LARGE}),
    ],
    ids=["finalizers", "status", "check-now"],
)
def test_body_that_is_large_all_the_same_is_read_by_the_reconcile(body: dict[str, Any]) -> None:
    cache = ChannelCache(Claims())
    assert cache.observe(body)
    cached = cache.get(key_of(body))
    assert cached
    assert cached.body is None


def test_trigger_keeps_as_much_of_check_now_as_the_status_does() -> None:
    assert len(str(Trigger.of(channel(annotations={CHECK_NOW_ANNOTATION: LARGE})))) < 400


def test_trimmed_channel_is_the_same_to_the_operator() -> None:
    body = channel(annotations={CHECK_NOW_ANNOTATION: "now", "other": "x"}, deletionTimestamp="2026-01-02T03:04:06Z")
    small = trimmed(body)
    assert small["metadata"]["annotations"] == {CHECK_NOW_ANNOTATION: "now"}
    before, after = SmsChannel.model_validate(body), SmsChannel.model_validate(small)
    assert after.model_copy(update={"metadata": before.metadata}) == before
    assert Trigger.of(small) == Trigger.of(body)


def test_event_during_a_write_of_the_status_does_not_hide_that_status() -> None:
    """Else the next reconcile would write the status as if there had been none, with a new lastTransitionTime."""
    cache = ChannelCache(Claims())
    cached = cache.put(channel())
    cached.body, cached.last_reconciled = None, Trigger.of(channel())
    assert cache.observe(channel(generation=2, resourceVersion="8"))  # somebody edits the spec meanwhile
    cache.written(channel(generation=2, resourceVersion="9"))
    assert cached.body is None
    assert cached.unseen == "9"
