"""What the operator does when others change its own objects: it says so, and puts right what it can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from smschannel.api.errors import Conflict, KubernetesRefused
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.names import KEYRING_SECRET, NAMESPACES, PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP, SETTINGS_CONFIGMAP
from smschannel.api.resource import GROUP
from smschannel.api.sealing import SealingKey
from smschannel.core.record import Key, Record
from smschannel.kube_store import KubeStore
from tests.unit.memory import KEYRING, OPERATOR_NAMESPACE, MemoryApi, MemoryTwilio, instance, raising, running, sid_of
from tests.unit.virtual_time import virtually

N = "+61400000001"
OWN = KEYRING.current.public.encoded
FOREIGN = SealingKey.generate().public.encoded
SETTINGS = {"SMSCHANNEL_CHANNEL_NAMESPACES": "sms-channels"}
SEAL_AGAIN = "replace them at Twilio, and seal them again"


def place(name: str) -> tuple[str, str, str]:
    return "configmaps", OPERATOR_NAMESPACE, name


def record_of(api: MemoryApi, phone: str) -> Object:
    return api.objects["secrets", OPERATOR_NAMESPACE, sid_of(phone).lower()]


def edit(api: MemoryApi, body: Object, **metadata: Any) -> None:
    """Change metadata as somebody with kubectl would."""
    api._store("secrets", {**body, "metadata": {**body["metadata"], **metadata}})


def annotated(body: Object, **changes: str) -> dict[str, str]:
    return {**body["metadata"]["annotations"], **{f"{GROUP}/{name}": value for name, value in changes.items()}}


def alarms(api: MemoryApi) -> list[tuple[str, str]]:
    return [
        (each["regarding"]["name"], each["note"])
        for each in api.events
        if each["reason"] == "ForeignChange" and each["regarding"]["namespace"] == OPERATOR_NAMESPACE
    ]


def counted(what: str) -> float:
    return REGISTRY.get_sample_value("smschannel_foreign_changes_total", {"object": what}) or 0


async def started(api: MemoryApi) -> KubeStore:
    store = KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE)
    await store.open_keyring(["sms-channels", "team-b"])
    await store.publish_settings(SETTINGS)
    return store


@virtually
async def test_unchanged_objects_raise_no_alarm_and_are_not_written() -> None:
    api = MemoryApi()
    store = await started(api)
    versions = {name: body["metadata"]["resourceVersion"] for name, body in api.objects.items()}
    await store.check_own_objects()
    assert alarms(api) == []
    assert {name: body["metadata"]["resourceVersion"] for name, body in api.objects.items()} == versions


@virtually
async def test_namespaces_are_published_beside_the_key() -> None:
    """Every user may read them there: they are no secret, and 'kubectl sms seal' and the policy need them."""
    api = MemoryApi()
    await started(api)
    assert api.objects[place(PUBLIC_KEY_CONFIGMAP)]["data"][NAMESPACES] == "sms-channels team-b"


@pytest.mark.parametrize(
    ("name", "data", "what", "advice"),
    [
        pytest.param(PUBLIC_KEY_CONFIGMAP, {PUBLIC_KEY: FOREIGN}, "public_key", SEAL_AGAIN, id="another public key"),
        pytest.param(PUBLIC_KEY_CONFIGMAP, None, "public_key", SEAL_AGAIN, id="public key deleted"),
        pytest.param(SETTINGS_CONFIGMAP, {"SMSCHANNEL_TWILIO_URL": "https://e.example"}, "settings", "", id="settings"),
        pytest.param(SETTINGS_CONFIGMAP, {**SETTINGS, "more": "x"}, "settings", "", id="one key more"),
        pytest.param(SETTINGS_CONFIGMAP, None, "settings", "", id="settings deleted"),
    ],
)
def test_changed_configmap_is_an_alarm_and_put_right(name: str, data: Any, what: str, advice: str) -> None:
    @virtually
    async def story() -> None:
        api = MemoryApi()
        store = await started(api)
        published = dict(api.objects[place(name)]["data"])
        if data is None:
            del api.objects[place(name)]
        else:
            api.objects[place(name)]["data"] = data
        before = counted(what)
        with capture_logs() as logs:
            await store.check_own_objects()
        assert api.objects[place(name)]["data"] == published
        [(about, note)] = alarms(api)
        assert about == name
        assert advice in note
        assert counted(what) == before + 1
        assert [each["log_level"] for each in logs] == ["error"]
        assert FOREIGN not in str(logs), "what others wrote is not repeated"
        await store.check_own_objects()
        assert len(alarms(api)) == 1, "once it is right there is no alarm"

    story()


@pytest.mark.parametrize(
    ("key", "expected"),
    [(FOREIGN, 1), (OWN, 0), ("", 1)],
    ids=["another's key", "the operator's own", "an empty key"],
)
def test_public_key_found_at_start_must_be_one_of_the_keyring(key: str, expected: int) -> None:
    """It was changed while the operator was down, and tokens may have been sealed with it."""

    @virtually
    async def story() -> None:
        api = MemoryApi()
        await started(api)
        api.objects[place(PUBLIC_KEY_CONFIGMAP)]["data"] = {PUBLIC_KEY: key}
        await started(api)
        assert api.objects[place(PUBLIC_KEY_CONFIGMAP)]["data"][PUBLIC_KEY] == OWN
        assert len(alarms(api)) == expected

    story()


@pytest.mark.parametrize("path", ["configmaps", "events"])
def test_refused_repair_or_event_does_not_end_the_resync(path: str) -> None:
    """Somebody may make a ConfigMap immutable. The resync goes on, with the channels and records."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        async with running(api, twilio) as operator:
            api.objects[place(PUBLIC_KEY_CONFIGMAP)]["data"] = {PUBLIC_KEY: FOREIGN}
            api.drops_events = True
            api.apply(1, N)

            async def refuse(method: str, its_path: str) -> None:
                if method != "GET" and method != "LIST" and path in its_path:
                    raise KubernetesRefused(422, "field is immutable when `immutable` is set")

            api.on_call = refuse
            with capture_logs() as logs:
                await operator.controller.resync()
            await asyncio.sleep(5)
            assert operator.channels.get(Key("sms-channels", instance(1))), "the watch had missed it"
            assert "object of the operator was changed by others" in str(logs)

    story()


@virtually
async def test_deleted_record_is_an_alarm() -> None:
    """With it the webhook is lost that the number had before; the channel goes on."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(5)
        del api.objects["secrets", OPERATOR_NAMESPACE, sid_of(N).lower()]
        await operator.controller.resync()
        [(about, note)] = alarms(api)
        assert about == sid_of(N).lower()
        assert "It was deleted" in note
        await asyncio.sleep(5)
        assert N in api.records(), "the channel claims its number again"


@virtually
async def test_record_that_its_channel_gives_up_during_the_list_is_no_alarm() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(5)

        async def delete_meanwhile(method: str, path: str) -> None:
            if method == "LIST" and path.endswith("/secrets"):
                api.delete(1)
                await asyncio.sleep(5)

        api.on_call = delete_meanwhile
        await operator.controller.resync()
        assert (api.records(), alarms(api)) == ({}, [])


@virtually
async def test_record_without_its_label_still_holds_the_number_of_a_suspended_channel() -> None:
    """The list of records does not show it, and nothing else would read it before the channel is deleted."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(5)
        api.apply(1, N, suspend=True)
        await asyncio.sleep(5)
        edit(api, record_of(api, N), labels={})
        await operator.controller.resync()
        assert [about for about, _ in alarms(api)] == [sid_of(N).lower()]
        assert record_of(api, N)["metadata"]["labels"]
        assert operator.kube.claims.holder(sid_of(N))


@virtually
async def test_record_that_an_incomplete_list_does_not_show_still_holds_its_number() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(5)

        async def nothing() -> AsyncIterator[Record]:
            return
            yield

        operator.kube.records = nothing  # type: ignore[method-assign]
        await operator.controller.resync()
        assert operator.kube.claims.holder(sid_of(N))
        assert alarms(api) == []


@virtually
async def test_keyring_that_was_deleted_or_damaged_is_written_again() -> None:
    api = MemoryApi()
    store = await started(api)
    keyring = api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]
    del api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]
    await store.check_own_objects()
    written = api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]["data"]
    assert written["keyring"] == keyring["data"]["keyring"]
    there = api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]
    api._store("secrets", {**there, "data": {"keyring": "b3RoZXI="}})
    await store.check_own_objects()
    written = api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]["data"]
    assert written["keyring"] == keyring["data"]["keyring"]
    assert [about for about, _ in alarms(api)] == [KEYRING_SECRET] * 2


@virtually
async def test_refused_repair_of_the_keyring_does_not_end_the_resync() -> None:
    api = MemoryApi()
    store = await started(api)
    del api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]
    api.on_call = raising(KubernetesRefused(403, "exceeded quota"), method="POST")
    await store.check_own_objects()
    assert counted("keyring")


@virtually
async def test_repair_that_another_operator_was_faster_with_does_not_end_the_resync() -> None:
    """Of the keyring or of a record: what comes after it is looked at all the same, and the next check reads again."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(5)
        edit(api, record_of(api, N), annotations=annotated(record_of(api, N), channel=f"team-b/{instance(7)}"))
        keyring = api.objects["secrets", OPERATOR_NAMESPACE, KEYRING_SECRET]
        api._store("secrets", {**keyring, "data": {"keyring": "b3RoZXI="}})
        api.on_call = raising(Conflict("the object has been modified"), method="PATCH", path="/secrets/")
        await operator.controller.resync()
        assert [name for name, _ in alarms(api)] == [KEYRING_SECRET, sid_of(N).lower()]


@virtually
async def test_refused_repair_of_a_record_does_not_end_the_resync() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(5)
        record = record_of(api, N)
        edit(api, record, annotations=annotated(record, channel=f"team-b/{instance(7)}"))

        async def refuse(method: str, its_path: str) -> None:
            if method == "PATCH" and "/secrets/" in its_path:
                raise KubernetesRefused(422, "field is immutable when `immutable` is set")

        api.on_call = refuse
        await operator.controller.resync()
        assert alarms(api)


@virtually
async def test_new_settings_at_start_are_no_alarm() -> None:
    api = MemoryApi()
    store = await started(api)
    await store.publish_settings({**SETTINGS, "SMSCHANNEL_TWILIO_URL": "https://twilio.example"})
    assert alarms(api) == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"channel": f"team-b/{instance(7)}"}, id="another channel"),
        pytest.param({"phone-number": "+61400999999"}, id="another number"),
        pytest.param({"account-sid": "AC" + "9" * 32}, id="another account"),
    ],
)
def test_changed_metadata_of_a_record_is_restored_from_its_contents(change: dict[str, str]) -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        async with running(api, twilio) as operator:
            api.apply(1, N)
            await asyncio.sleep(1)
            before = record_of(api, N)
            edit(api, before, annotations=annotated(before, **change))
            await operator.controller.resync()
            assert record_of(api, N)["metadata"]["annotations"] == before["metadata"]["annotations"]
            assert [name for name, _ in alarms(api)] == [sid_of(N).lower()]
            api.calls.clear()
            await operator.controller.resync()
            await asyncio.sleep(5)
            assert [path for _, path in api.calls if "/events" in path] == [], "it was put right, and is no news"
            assert api.reason(1) == "Configured"
            api.delete(1)
            await asyncio.sleep(5)
        assert api.records() == {}
        assert twilio.webhook(N).startswith("https://before")

    story()


@virtually
async def test_record_without_its_label_is_labelled_again_when_it_is_opened() -> None:
    """The list does not show it, but its name still holds the number."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    async with running(api, twilio) as operator:
        api.apply(1, N)
        await asyncio.sleep(1)
        edit(api, record_of(api, N), labels={})
        await operator.controller.resync()
        await asyncio.sleep(5)
        await operator.controller.resync()
        assert record_of(api, N)["metadata"]["labels"][f"{GROUP}/record"] == "true"
        assert [name for name, _ in alarms(api)] == [sid_of(N).lower()]
        assert api.reason(1) == "Configured"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda api, body: api.edit_record(N, {"record": "AAAA"}), id="contents"),
        pytest.param(
            lambda api, body: edit(api, body, annotations=annotated(body, **{"channel-uid": "another"})), id="uid"
        ),
    ],
)
def test_record_that_cannot_be_opened_is_an_alarm(damage: Any) -> None:
    """It is not put right: nobody knows what is. Its number stays claimed."""

    @virtually
    async def story() -> None:
        api = MemoryApi()
        async with running(api, MemoryTwilio(N)) as operator:
            api.apply(1, N)
            await asyncio.sleep(1)
            damage(api, record_of(api, N))
            damaged = dict(record_of(api, N)["data"])
            await operator.controller.resync()
            [(name, note)] = alarms(api)
            assert name == sid_of(N).lower()
            assert "cannot be opened" in note
            assert record_of(api, N)["data"] == damaged
            assert operator.kube.claims.holder(sid_of(N))

    story()
