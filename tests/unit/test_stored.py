"""Test that what earlier releases stored is read, and that what a newer one stored is left alone."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from smschannel.api.api_keys import Verb, decode_key, find_key
from smschannel.api.errors import KeyringLost
from smschannel.api.kube_client import KubeClient
from smschannel.api.names import API_KEYS_SECRET, KEYRING_SECRET, PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP, SETTINGS_CONFIGMAP
from smschannel.api.reasons import Reason
from smschannel.api.resource import SmsChannel
from smschannel.api.sealing import Binding, Keyring, PublicKey
from smschannel.api.status import reason_of, rest_status
from smschannel.core.record import Contents, Record, Webhook
from smschannel.kube_store import KubeStore
from smschannel.settings import Settings
from tests.stored import VERSIONS, expected, stored
from tests.unit import memory
from tests.unit.memory import (
    KEYRING,
    NAMESPACE,
    OPERATOR_NAMESPACE,
    MemoryApi,
    MemoryTwilio,
    instance,
    running,
    sid_of,
    url_of,
)
from tests.unit.virtual_time import virtually

N = "+61400111222"
every_version = pytest.mark.parametrize("version", VERSIONS)


def operators(version: str, name: str) -> dict[str, str]:
    """Return the data of one of the operator's objects."""
    (found,) = [each for each in stored(version, "operator") if each["metadata"]["name"] == name]
    return cast("dict[str, str]", found["data"])


def keyring_of(version: str) -> Keyring:
    return Keyring.load(base64.b64decode(operators(version, KEYRING_SECRET)["keyring"]).decode())


def cluster_of(version: str) -> MemoryApi:
    """Return a cluster with everything that a release stored."""
    api = MemoryApi()
    for body in stored(version, "operator") + stored(version, "records") + stored(version, "channels"):
        plural = "smschannels" if body["kind"] == "SmsChannel" else f"{body['kind'].lower()}s"
        api.objects[plural, body["metadata"]["namespace"], body["metadata"]["name"]] = body
    return api


# What earlier releases stored


def test_there_are_versions() -> None:
    assert "v0" in VERSIONS


@every_version
def test_channel_of_each_reason_is_read(version: str) -> None:
    seen = set()
    for body in stored(version, "channels"):
        channel = SmsChannel.model_validate(body)
        reason = reason_of(channel.status)
        assert reason, "a reason that is no longer known would be reported as none"
        seen.add(reason)
        assert rest_status(channel.status) == expected(version)["restStatuses"][channel.metadata.name]
        assert channel.has_finalizer, "else nothing would be restored"
        written = channel.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        assert written == body["spec"], "every field means what it did"
    assert len(seen) > 20


@every_version
def test_sealed_tokens_open(version: str) -> None:
    keyring = keyring_of(version)
    sealed = [each for each in stored(version, "channels") if "sealed" in each["spec"]["credentials"]]
    assert len(sealed) > 10
    for body in sealed:
        binding = Binding(NAMESPACE, body["metadata"]["name"], body["spec"]["accountSid"])
        token = keyring.unseal(body["spec"]["credentials"]["sealed"], binding)
        assert token.get_secret_value() == expected(version)["token"]


@every_version
async def test_records_are_opened(version: str) -> None:
    kube = KubeStore(cast(KubeClient, cluster_of(version)), OPERATOR_NAMESPACE)
    await kube.open_keyring([NAMESPACE])
    found = {}
    async for record in kube.records():
        opened = await kube.open_record(record)
        assert opened
        assert opened.contents
        plain = {name: value for name, value in asdict(replace(opened, contents=None)).items() if value is not None}
        del plain["version"], plain["sealed_with"], plain["secret"]
        contents = opened.contents.model_dump(mode="json", context="reveal")
        found[opened.secret_name] = {**plain, "contents": contents}
    assert found == expected(version)["records"]


@every_version
def test_published_key_is_the_keyrings(version: str) -> None:
    published = PublicKey.decode(operators(version, PUBLIC_KEY_CONFIGMAP)[PUBLIC_KEY])
    assert published == keyring_of(version).current.public


@every_version
def test_published_settings_are_read(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE", raising=False)
    settings = Settings.from_published(operators(version, SETTINGS_CONFIGMAP))
    assert settings == Settings(webhook_url_template="https://sms.example.com/{instance_id}")


@every_version
def test_api_keys_are_accepted(version: str) -> None:
    keys = {key_id: decode_key(entry) for key_id, entry in operators(version, API_KEYS_SECRET).items()}
    given = expected(version)["apiKeys"]
    limited = find_key(keys, given["0a1b2c3d"], datetime(2026, 2, 1, tzinfo=UTC))
    assert limited
    assert limited[1].allows(Verb.GET, instance(0))
    assert not limited[1].allows(Verb.DELETE, instance(0))
    assert not limited[1].allows(Verb.GET, instance(1))
    assert not find_key(keys, given["0a1b2c3d"], datetime(2027, 2, 1, tzinfo=UTC)), "it has expired"
    everything = find_key(keys, given["4e5f6a7b"], datetime(2040, 1, 1, tzinfo=UTC))
    assert everything
    assert everything[1].allows(Verb.DELETE, instance(1))


def test_upgrade_writes_nothing_to_twilio_and_a_deletion_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    @virtually
    async def story() -> None:
        api, twilio = cluster_of("v0"), MemoryTwilio("+61400111200", "+61400111201")
        for n in range(2):
            owner, number = twilio.numbers[sid_of(f"+614001112{n:02d}")]
            pointing_at_us = replace(number, webhook=Webhook(url=url_of(n), method="POST"))
            twilio.numbers[number.sid] = owner, pointing_at_us
        for place in [each for each in api.objects if each[0] == "smschannels" and each[2] > instance(1)]:
            del api.objects[place]
        monkeypatch.setattr(memory, "KEYRING", keyring_of("v0"))
        async with running(api, twilio):
            await asyncio.sleep(60)
            assert (api.reason(0), api.reason(1)) == ("Configured", "Configured")
            assert twilio.writes == []
            api.delete(0)
            await asyncio.sleep(60)
            assert api.channel(0) is None
            _, number = twilio.numbers[sid_of("+61400111200")]
            assert number.webhook == Webhook(url="https://user:password@before.example.com/sms#rc=2", method="GET")

    story()


# What a newer release stored


def with_new_field(sealed: bytes, binding: str) -> bytes:
    """Return a record as a release writes it that remembers something more."""
    contents = json.loads(KEYRING.unwrap(sealed, binding))
    return KEYRING.wrap(json.dumps({**contents, "voice": {"url": "https://before.example.com/"}}).encode(), binding)


def with_new_nested_field(sealed: bytes, binding: str) -> bytes:
    contents = json.loads(KEYRING.unwrap(sealed, binding))
    contents["previous"]["fallback"] = "https://before.example.com/"
    return KEYRING.wrap(json.dumps(contents).encode(), binding)


def in_new_envelope(sealed: bytes, binding: str) -> bytes:
    return b"\x02" + sealed[1:]


newer_records = pytest.mark.parametrize("newer", [with_new_field, with_new_nested_field, in_new_envelope])


def make_newer(api: MemoryApi, newer: Callable[[bytes, str], bytes]) -> dict[str, str]:
    """Replace the record of N by one of a newer release. Return its data."""
    place = "secrets", OPERATOR_NAMESPACE, sid_of(N).lower()
    body = api.objects[place]
    record = Record.from_metadata(body["metadata"])
    data = {"record": base64.b64encode(newer(base64.b64decode(body["data"]["record"]), record.binding)).decode()}
    api.edit_record(N, data)
    api.objects[place]["metadata"]["annotations"]["channels.hydracore.io/of-a-newer-release"] = "kept"
    return data


@newer_records
def test_newer_record_is_reported_and_left_alone(newer: Callable[[bytes, str], bytes]) -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        async with running(api, twilio):
            api.apply(1, N)
            await asyncio.sleep(1)
        data, writes = make_newer(api, newer), list(twilio.writes)
        async with running(api, twilio):
            api.apply(2, N, day=2)
            await asyncio.sleep(10_000)
            assert (api.reason(1), api.reason(2)) == ("RecordUnreadable", "NumberInUse")
            status = (api.channel(1) or {})["status"]
            assert "newer release" in next(each["message"] for each in status["conditions"] if each["type"] == "Ready")
        place = "secrets", OPERATOR_NAMESPACE, sid_of(N).lower()
        assert api.objects[place]["data"] == data
        assert twilio.writes == writes

    story()


@newer_records
def test_deletion_with_a_newer_record_ends_and_loses_nothing(newer: Callable[[bytes, str], bytes]) -> None:
    """The finalizer does not wait forever; the record keeps what the newer release needs to restore the number."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        async with running(api, twilio):
            api.apply(1, N)
            await asyncio.sleep(1)
        data, writes = make_newer(api, newer), list(twilio.writes)
        async with running(api, twilio):
            await asyncio.sleep(1)
            api.delete(1)
            await asyncio.sleep(3600)
            assert api.channel(1) is None
            record = api.objects["secrets", OPERATOR_NAMESPACE, sid_of(N).lower()]
            assert record["data"] == data
            assert record["metadata"]["annotations"]["channels.hydracore.io/of-a-newer-release"] == "kept"
            await asyncio.sleep(8 * 86_400)
        (copy,) = [body for place, body in api.objects.items() if place[2].startswith("written-off-")]
        assert copy["data"] == data, "what is written off can be restored by hand"
        assert copy["metadata"]["annotations"]["channels.hydracore.io/of-a-newer-release"] == "kept"
        assert twilio.writes == writes

    story()


@pytest.mark.parametrize("more", [{"retired": ["c2VlZA=="]}, {"version": 2}])
async def test_newer_keyring_stops_the_operator_and_stays_as_it_is(more: dict[str, Any]) -> None:
    """If it were rewritten, the keys that only the newer release knows would be lost."""
    api = MemoryApi()
    place = "secrets", OPERATOR_NAMESPACE, KEYRING_SECRET
    newer = json.dumps({**json.loads(KEYRING.dump()), **more}).encode()
    api.objects[place]["data"] = {"keyring": base64.b64encode(newer).decode()}
    before = json.dumps(api.objects[place])
    with pytest.raises(KeyringLost, match="run the release that wrote it, or a newer one"):
        await KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE).open_keyring([NAMESPACE])
    assert json.dumps(api.objects[place]) == before


def test_api_key_with_unknown_limits_is_refused() -> None:
    """A newer release may have limited it in a way that this one would not enforce."""
    entry = json.loads(base64.b64decode(operators("v0", API_KEYS_SECRET)["4e5f6a7b"]))
    with pytest.raises(ValueError, match="addresses"):
        decode_key(base64.b64encode(json.dumps({**entry, "addresses": ["192.0.2.1"]}).encode()).decode())


def test_unknown_reason_in_a_status_is_no_reason() -> None:
    status = {"conditions": [{"type": "Ready", "status": "False", "reason": "OfANewerRelease", "message": ""}]}
    assert reason_of(status) is None
    assert rest_status(status) == Reason.Pending.rest_status


def test_value_of_a_newer_crd_leaves_channel_and_number_alone() -> None:
    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(N)
        async with running(api, twilio):
            api.apply(1, N)
            await asyncio.sleep(1)
            writes = list(twilio.writes)
            api.apply(1, N, deletionPolicy="Forward")
            await asyncio.sleep(3600)
            channel = api.channel(1)
            assert channel
            assert reason_of(channel["status"]) is Reason.InvalidSpec
            assert twilio.writes == writes
            assert N in api.records()

    story()


def test_contents_of_a_newer_release_name_no_token() -> None:
    with pytest.raises(ValueError, match="voice") as caught:
        Contents.decode(b'{"login": {"sid": "AC", "token": "5e5c0ffee"}, "previous": null, "wrote": [], "voice": 1}')
    assert "5e5c0ffee" not in str(caught.value)
