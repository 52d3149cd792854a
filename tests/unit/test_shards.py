"""Shards: several operators share the namespaces, the records and the keyring, and do not get in each other's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from smschannel.api.errors import Conflict, KeyringLost
from smschannel.api.kube_client import KubeClient
from smschannel.api.names import (
    KEYRING_SECRET,
    NAMESPACES,
    PUBLIC_KEY,
    PUBLIC_KEY_CONFIGMAP,
    RELEASE,
    SETTINGS_CONFIGMAP,
    is_lease,
    lease_of,
)
from smschannel.api.resource import GROUP
from smschannel.api.sealing import SealingKey
from smschannel.core.record import NAMESPACE_LABEL
from smschannel.kube_store import KubeStore
from tests.unit.memory import (
    BEFORE,
    NAMESPACE,
    OPERATOR_NAMESPACE,
    MemoryApi,
    MemoryTwilio,
    Operator,
    instance,
    sid_of,
    url_of,
    virtual_clock,
)
from tests.unit.virtual_time import virtually

N1, N2 = "+61400000001", "+61400000002"
OTHER = "team-b"


def api_with_secrets() -> MemoryApi:
    """Both namespaces have the Secret of the account."""
    api = MemoryApi()
    secret = api.objects["secrets", NAMESPACE, "twilio"]
    api._store("secrets", {**secret, "metadata": {**secret["metadata"], "namespace": OTHER}})
    return api


@asynccontextmanager
async def shards(api: MemoryApi, twilio: MemoryTwilio, **options: Any) -> AsyncIterator[tuple[Operator, Operator]]:
    """Run one operator for each of the two namespaces. Each sees the events of its own only, as from its watches."""
    first = Operator(api, twilio, namespaces=(NAMESPACE,), others=(OTHER,), **options)
    second = Operator(api, twilio, namespaces=(OTHER,), others=(NAMESPACE,), **options)
    async with AsyncExitStack() as stack:
        for operator, namespace in ((first, NAMESPACE), (second, OTHER)):
            await operator.start()
            stack.push_async_callback(operator.stop)
            _deliver_own_events(operator, namespace)
        yield first, second


def _deliver_own_events(operator: Operator, namespace: str) -> None:
    deliver = operator.controller.on_channel

    def on_channel(kind: str, body: Any) -> None:
        if body["metadata"]["namespace"] == namespace:
            deliver(kind, body)

    operator.controller.on_channel = on_channel  # type: ignore[method-assign]


def alarms(api: MemoryApi) -> list[str]:
    return [each["regarding"]["name"] for each in api.events if each["reason"] == "ForeignChange"]


@virtually
async def test_each_shard_configures_and_indexes_its_own_channels_only() -> None:
    """Memory grows with the shard, not with the installation."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1, N2)
    async with shards(api, twilio, resync=60) as (first, second):
        api.apply(1, N1)
        api.apply(2, N2, namespace=OTHER)
        await asyncio.sleep(200)
        assert (api.reason(1), api.reason(2, OTHER)) == ("Configured", "Configured")
        assert [each.phone_number for each in first.kube.claims] == [N1]
        assert [each.phone_number for each in second.kube.claims] == [N2]
        assert [len(each.channels) for each in (first, second)] == [1, 1]
        assert twilio.writes == [(N1, url_of(1)), (N2, url_of(2, OTHER))]


@virtually
async def test_records_of_other_shards_are_not_asked_for() -> None:
    """A shard lists its records by a label, so a list costs no more than the shard has."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio) as (first, second):
        api.apply(1, N1)
        await asyncio.sleep(5)
        [record] = [body for place, body in api.objects.items() if place[2] == sid_of(N1).lower()]
        assert record["metadata"]["labels"][NAMESPACE_LABEL] == NAMESPACE
        sent, selected = list[Any](), api._selected
        api._selected = lambda *asked: sent.extend(selected(*asked)) or selected(*asked)  # type: ignore[method-assign, func-returns-value]
        assert [each.phone_number async for each in first.kube.records()] == [N1]
        assert sent == [record]
        assert [each.phone_number async for each in second.kube.records()] == []
        assert sent == [record], "nothing more was sent"
        # a record from before there was the label is filtered by its annotation
        del record["metadata"]["labels"][NAMESPACE_LABEL]
        assert [each.phone_number async for each in first.kube.records()] == [N1]
        assert [each.phone_number async for each in second.kube.records()] == []


@virtually
async def test_channels_of_other_shards_are_no_orphans() -> None:
    """Their channel is in no cache here: that must not look as if it were gone, also after a start, nor be reported."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio, resync=60) as (_, second):
        api.apply(1, N1)
        await asyncio.sleep(5)
        written = list(twilio.writes)
        with capture_logs() as logs:
            await second.stop()
            await second.start()
            await asyncio.sleep(1000)
        assert twilio.writes == written
        assert api.reason(1) == "Configured"
        assert second.channels.pending_restores() == 0
        assert [each["event"] for each in logs if each["log_level"] in {"warning", "error"}] == []


@virtually
async def test_number_of_another_shard_is_in_use_until_the_next_check_after_it_was_freed() -> None:
    """No event of the other shard wakes the waiter: it takes the number at its own next check, within 36 minutes."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio, resync=60) as (_, second):
        api.apply(1, N1)
        await asyncio.sleep(5)
        api.apply(2, N1, namespace=OTHER)
        await asyncio.sleep(1000)
        assert api.reason(2, OTHER) == "NumberInUse"
        assert len(second.kube.claims) == 0, "it is not for this shard to look after"
        assert second.channels.pending_restores() == 0
        assert twilio.webhook(N1) == url_of(1)
        api.delete(1)
        await asyncio.sleep(10)
        assert twilio.webhook(N1) == BEFORE
        assert api.reason(2, OTHER) == "NumberInUse"
        await asyncio.sleep(1800 * 1.2)
        assert (api.reason(2, OTHER), twilio.webhook(N1)) == ("Configured", url_of(2, OTHER))
        assert alarms(api) == []
        api.delete(2, namespace=OTHER)
        await asyncio.sleep(10)
        assert twilio.webhook(N1) == BEFORE


@virtually
async def test_contest_of_two_shards_has_one_winner() -> None:
    """Both see the number free, and both want it: the API server decides."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio):
        api.apply(1, N1)
        api.apply(2, N1, namespace=OTHER)
        await asyncio.sleep(60)
        assert sorted((api.reason(1), api.reason(2, OTHER))) == ["Configured", "NumberInUse"]
        holder = url_of(1) if api.reason(1) == "Configured" else url_of(2, OTHER)
        assert twilio.webhook(N1) == holder


@virtually
async def test_number_that_passed_to_another_shard_is_no_foreign_change() -> None:
    """The record is another one by the next list of the shard that had it: it was not tampered with."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio) as (first, _):
        api.apply(1, N1)
        await asyncio.sleep(5)
        [had] = list(first.kube.claims)
        api.delete(1)
        await asyncio.sleep(5)
        api.apply(2, N1, namespace=OTHER)
        await asyncio.sleep(5)
        first.kube.claims.put(had)  # as if its deletion had not been noticed
        with capture_logs() as logs:
            await first.controller.resync()
        assert logs == []
        assert list(first.kube.claims) == []
        await asyncio.sleep(60)
        assert (api.reason(2, OTHER), twilio.webhook(N1)) == ("Configured", url_of(2, OTHER))
        assert alarms(api) == []


@virtually
async def test_altered_record_is_put_right_by_its_own_shard_only() -> None:
    """By its plain metadata it belongs to the first one; what is sealed says otherwise."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio, resync=1e9) as (first, second):
        api.apply(1, N1, namespace=OTHER)
        await asyncio.sleep(5)
        record = api.objects["secrets", OPERATOR_NAMESPACE, sid_of(N1).lower()]
        notes = {**record["metadata"]["annotations"], f"{GROUP}/channel": f"{NAMESPACE}/{instance(1)}"}
        labels = {**record["metadata"]["labels"], NAMESPACE_LABEL: NAMESPACE}
        api._store("secrets", {**record, "metadata": {**record["metadata"], "annotations": notes, "labels": labels}})
        await first.controller.resync()
        await asyncio.sleep(5)
        assert (alarms(api), list(first.kube.claims)) == ([], [])
        await second.controller.resync()
        assert alarms(api) == [sid_of(N1).lower()]
        assert api.records()[N1].namespace == OTHER


@virtually
async def test_record_from_before_there_was_the_label_is_no_foreign_change() -> None:
    """It gets the label when it is written for another reason."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio, resync=60) as (first, _):
        api.apply(1, N1)
        await asyncio.sleep(5)
        record = api.objects["secrets", OPERATOR_NAMESPACE, sid_of(N1).lower()]
        labels = {name: value for name, value in record["metadata"]["labels"].items() if name != NAMESPACE_LABEL}
        api._store("secrets", {**record, "metadata": {**record["metadata"], "labels": labels}})
        await asyncio.sleep(1000)
        assert alarms(api) == []
        assert [each.phone_number for each in first.kube.claims] == [N1]


@virtually
async def test_written_off_records_are_sealed_again_by_their_own_shard_only() -> None:
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio) as (first, second):
        api.apply(1, N1)
        await asyncio.sleep(5)
        [record] = first.kube.claims
        await first.kube.write_off(record, "for the test")
        assert [each.phone_number async for each in first.kube.written_off()] == [N1]
        assert [each.phone_number async for each in second.kube.written_off()] == []


@virtually
async def test_damaged_record_that_passed_to_another_shard_is_reported_by_that_one_only() -> None:
    api, twilio = api_with_secrets(), MemoryTwilio(N1)
    async with shards(api, twilio, resync=1e9) as (first, _):
        api.apply(1, N1)
        await asyncio.sleep(5)
        [had] = list(first.kube.claims)
        api.delete(1)
        await asyncio.sleep(5)
        api.apply(2, N1, namespace=OTHER)
        await asyncio.sleep(5)
        api.edit_record(N1, {"record": "AAAA"})
        first.kube.claims.put(had)  # as if its deletion had not been noticed
        await first.controller.resync()
        assert alarms(api) == []


@virtually
async def test_namespace_moves_between_shards_while_both_work_on_it() -> None:
    """In an upgrade the old leader of one shard and the new one of the other may overlap. Nothing is written twice."""
    api, twilio = api_with_secrets(), MemoryTwilio(N1, N2)
    former = Operator(api, twilio, namespaces=(NAMESPACE, OTHER), resync=60)
    await former.start()
    api.apply(1, N1)
    api.apply(2, N2, namespace=OTHER)
    await asyncio.sleep(5)
    written = list(twilio.writes)
    async with shards(api, twilio, resync=60):
        await asyncio.sleep(300)
        assert twilio.writes == written
        api.apply(2, N1, namespace=OTHER)  # both see it, and N1 is taken
        await asyncio.sleep(60)
        assert api.reason(2, OTHER) == "NumberInUse"
        await former.stop()
        api.delete(1)
        await asyncio.sleep(1800 * 1.2)
        assert api.reason(2, OTHER) == "Configured"
        assert (twilio.webhook(N1), twilio.webhook(N2)) == (url_of(2, OTHER), BEFORE)
    assert [record.phone_number for record in api.records().values()] == [N1]


# The keyring and what is published


def store(api: MemoryApi, others: str = OTHER) -> KubeStore:
    return KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE, others=frozenset([others]))


async def opened(api: MemoryApi, others: str = OTHER) -> KubeStore:
    kube = store(api, others)
    await kube.open_keyring([NAMESPACE, OTHER])
    await kube.publish_settings({RELEASE: "1"})
    return kube


def age_key(api: MemoryApi) -> None:
    """Let the only key be too old."""
    api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]["metadata"]["creationTimestamp"] = "2025-01-01T00:00:00Z"


@virtually
async def test_two_leaders_renew_the_keyring_once_and_seal_their_own_records_again() -> None:
    api, twilio = api_with_secrets(), MemoryTwilio(N1, N2)
    age_key(api)
    with capture_logs() as logs:
        async with shards(api, twilio, keyring_check=15, resync=20) as (first, second):
            api.apply(1, N1)
            api.apply(2, N2, namespace=OTHER)
            await asyncio.sleep(120)
            keys = first.kube.keys.keyring.fingerprints
            assert len(keys) == 2, "one renewal, although both found that it was due"
            assert second.kube.keys.keyring.fingerprints == keys
            assert {each.sealed_with for each in api.records().values()} == {keys[-1]}
            published = api.objects["configmaps", OPERATOR_NAMESPACE, PUBLIC_KEY_CONFIGMAP]["data"]
            assert published[PUBLIC_KEY] == first.kube.keys.keyring.current.public.encoded
    assert [each["event"] for each in logs].count("key renewed") == 1
    assert [each for each in logs if each["log_level"] in {"warning", "error"}] == []
    assert alarms(api) == []


@virtually
async def test_renewal_that_loses_the_race_uses_the_winners_key() -> None:
    api = MemoryApi()
    first, second = await opened(api), await opened(api, NAMESPACE)
    await first.renew_keyring(virtual_clock())
    with pytest.raises(Conflict):
        await second.renew_keyring(virtual_clock())
    await second.check_own_objects()
    assert second.keys.keyring.fingerprints == first.keys.keyring.fingerprints
    assert alarms(api) == [], "the published key is not that of this shard, but of the keyring"


@virtually
async def test_first_start_of_two_shards_makes_one_keyring() -> None:
    """However they interleave: here the first one has published its key before the second looks why there is none."""
    api = MemoryApi()
    del api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]
    first, second = store(api), store(api, NAMESPACE)
    is_first = True

    async def on_call(method: str, path: str) -> None:
        nonlocal is_first
        if is_first and method == "GET" and path.endswith(PUBLIC_KEY_CONFIGMAP):
            is_first = False
            await first.open_keyring([NAMESPACE, OTHER])

    api.on_call = on_call
    await second.open_keyring([NAMESPACE, OTHER])
    assert second.keys.keyring.fingerprints == first.keys.keyring.fingerprints
    del api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]
    with pytest.raises(KeyringLost):
        await store(api).open_keyring([NAMESPACE])


def _newer(data: dict[str, str]) -> dict[str, str]:
    return {**data, RELEASE: "2"} if RELEASE in data else {**data, NAMESPACES: f"{NAMESPACE} {OTHER} team-c"}


@pytest.mark.parametrize("name", [SETTINGS_CONFIGMAP, PUBLIC_KEY_CONFIGMAP])
def test_what_a_newer_shard_publishes_is_an_alarm_only_if_it_stays(name: str) -> None:
    """During an upgrade the shards differ for a minute: they must neither fight nor cry wolf."""

    @virtually
    async def story() -> None:
        api = MemoryApi()
        kube, place = await opened(api), ("configmaps", OPERATOR_NAMESPACE, name)
        before = dict(api.objects[place]["data"])
        api.objects[place]["data"] = _newer(before)
        await kube.check_own_objects()
        assert (alarms(api), api.objects[place]["data"]) == ([], _newer(before))
        api.objects[place]["data"] = before
        await kube.check_own_objects()
        api.objects[place]["data"] = _newer(before)
        await kube.check_own_objects()
        assert alarms(api) == [], "it was right in between"
        await kube.check_own_objects()
        assert (alarms(api), api.objects[place]["data"]) == ([name], before)

    story()


@pytest.mark.parametrize("change", [{PUBLIC_KEY: SealingKey.generate().public.encoded}, None])
def test_foreign_public_key_is_an_alarm_at_once(change: dict[str, str] | None) -> None:
    """No shard ever publishes a key that the keyring does not have, and tokens would be sealed with it."""

    @virtually
    async def story() -> None:
        api = MemoryApi()
        kube, place = await opened(api), ("configmaps", OPERATOR_NAMESPACE, PUBLIC_KEY_CONFIGMAP)
        before = dict(api.objects[place]["data"])
        if change is None:
            del api.objects[place]
        else:
            api.objects[place]["data"] = {**before, **change}
        await kube.check_own_objects()
        assert (alarms(api), api.objects[place]["data"]) == ([PUBLIC_KEY_CONFIGMAP], before)

    story()


@pytest.mark.parametrize("label", [OTHER, "nonsense"])
def test_record_whose_label_says_another_shard_is_put_right(label: str) -> None:
    """Its own shard would no longer list it."""

    @virtually
    async def story() -> None:
        api, twilio = api_with_secrets(), MemoryTwilio(N1)
        async with shards(api, twilio, resync=60):
            api.apply(1, N1)
            await asyncio.sleep(5)
            meta = api.objects["secrets", OPERATOR_NAMESPACE, sid_of(N1).lower()]["metadata"]
            meta["labels"][NAMESPACE_LABEL] = label
            meta["resourceVersion"] = "7000"
            await asyncio.sleep(1000)
            meta = api.objects["secrets", OPERATOR_NAMESPACE, sid_of(N1).lower()]["metadata"]
            assert meta["labels"][NAMESPACE_LABEL] == NAMESPACE
            assert alarms(api) == [sid_of(N1).lower()]
            assert api.reason(1) == "Configured"

    story()


def test_leases_are_named_by_shard() -> None:
    assert [lease_of(""), lease_of("a")] == ["sms-channel-operator", "sms-channel-operator-a"]
    assert [is_lease(each) for each in (lease_of(""), lease_of("a"), "sms-channel-operators", "other")] == [
        True,
        True,
        False,
        False,
    ]
