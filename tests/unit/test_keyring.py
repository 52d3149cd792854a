"""A keyring for life: renewed, followed, merged and retired, and what was sealed stays readable."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr
from structlog.testing import capture_logs

from smschannel.api.errors import Conflict, KeyringLost, KubernetesRefused, KubernetesUnavailable
from smschannel.api.kube_client import KubeClient
from smschannel.api.names import KEYRING_SECRET, PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP
from smschannel.api.resource import GROUP
from smschannel.api.sealing import Binding, Keyring, SealingKey, fingerprint_of, parse_keys
from smschannel.keyring_store import KeyringStore
from smschannel.kube_store import KubeStore
from smschannel.rotation import CHECK_SECONDS
from tests.unit.memory import (
    ACCOUNT,
    NAMESPACE,
    OPERATOR_NAMESPACE,
    START,
    MemoryApi,
    MemoryTwilio,
    Operator,
    instance,
    raising,
    running,
    sid_of,
    virtual_clock,
)
from tests.unit.virtual_time import virtually

N, M = "+61400000001", "+61400000002"
KEYRING_PLACE = "secrets", OPERATOR_NAMESPACE, KEYRING_SECRET
SEALED_WITH = f"{GROUP}/sealed-with"
TOKEN = SecretStr("5e5c0ffee5e5c0ffee5e5c0ffee5e5c0")
NEW, OTHER = SealingKey.generate(START), SealingKey.generate(START - timedelta(days=90))
ALMOST_30_DAYS_OLD = SealingKey.generate(START - timedelta(days=30) + timedelta(seconds=400))


def stored_keyring(api: MemoryApi) -> Keyring:
    data = api.objects[KEYRING_PLACE]["data"]
    return Keyring.load(base64.b64decode(data["keyring"]).decode())


def published(api: MemoryApi) -> str:
    return str(api.objects["configmaps", OPERATOR_NAMESPACE, PUBLIC_KEY_CONFIGMAP]["data"][PUBLIC_KEY])


def sealed_with(api: MemoryApi, phone: str) -> str:
    """The fingerprint in a record's first bytes, which its annotation must repeat."""
    secret = api.objects["secrets", OPERATOR_NAMESPACE, sid_of(phone).lower()]
    found = fingerprint_of(secret["data"]["record"])
    assert secret["metadata"]["annotations"][SEALED_WITH] == found
    return found


def alarms(api: MemoryApi) -> list[str]:
    return [each["note"] for each in api.events if each["reason"] == "ForeignChange"]


def writes(api: MemoryApi) -> list[tuple[str, str]]:
    return [(method, path) for method, path in api.calls if method not in {"GET", "LIST"}]


def with_keys(*keys: SealingKey, created: datetime | None = None) -> MemoryApi:
    """A cluster with these keys, the newest last."""
    api = MemoryApi()
    ring = Keyring(replace(key, created=key.created or created) for key in keys)
    data = {"keyring": ring.dump(), "created": ring.dump_dates()}
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in data.items()}
    api._store("secrets", {**api.objects[KEYRING_PLACE], "data": encoded})
    return api


def replaced(api: MemoryApi, *keys: SealingKey) -> None:
    """Write a keyring as somebody with kubectl would: without a proof."""
    data = {"keyring": base64.b64encode(Keyring(keys).dump().encode()).decode()}
    api._store("secrets", {**api.objects[KEYRING_PLACE], "data": data})


async def changed(api: MemoryApi, *keys: SealingKey) -> None:
    """Write a keyring as 'kubectl sms keys' does."""
    store = KeyringStore(cast(KubeClient, api), OPERATOR_NAMESPACE)
    await store.write(Keyring(keys), await store.read())


def started(api: MemoryApi, twilio: MemoryTwilio) -> AbstractAsyncContextManager[Operator]:
    """An operator that checks its keyring as often as the real one."""
    return running(api, twilio, keyring_check=CHECK_SECONDS)


async def store_of(api: MemoryApi, directory: Path | None = None) -> KubeStore:
    store = KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE, directory)
    await store.open_keyring([NAMESPACE])
    return store


def sealed(n: int, key: SealingKey) -> dict[str, Any]:
    return {"credentials": {"sealed": key.public.seal(TOKEN, Binding(NAMESPACE, instance(n), ACCOUNT))}}


# The keyring as a value


def test_dates_survive_storing_and_releases_with_one_key_read_the_seeds() -> None:
    ring = Keyring([OTHER, NEW])
    again = Keyring.load(ring.dump(), ring.dump_dates())
    assert again == ring
    assert [key.created for key in again] == [OTHER.created, NEW.created]
    assert json.loads(ring.dump()).keys() == {"seeds"}, "the field that every release so far reads"


@pytest.mark.parametrize("dates", ["", "[]", "{", '{"x": 1}', '{"x": "yesterday"}', "null"])
def test_damaged_dates_are_no_dates(dates: str) -> None:
    """They are for people and for the renewal; the keys are what matters."""
    ring = Keyring([OTHER, NEW])
    assert [key.created for key in Keyring.load(ring.dump(), dates)] == [None, None]


@pytest.mark.parametrize(
    ("days", "created", "expected"),
    [
        pytest.param(30, START, START + timedelta(days=30), id="by the newest key"),
        pytest.param(0, START, None, id="0 means never"),
        pytest.param(30, None, None, id="unknown age"),
        pytest.param(30, datetime.max.replace(tzinfo=UTC), None, id="a made-up date"),
    ],
)
def test_renewal_is_due_by_the_age_of_the_newest_key(
    days: int, created: datetime | None, expected: datetime | None
) -> None:
    assert Keyring([OTHER, NEW.dated(created)]).renewal_due(timedelta(days=days)) == expected


def test_key_of_unknown_age_counts_as_made_with_the_secret() -> None:
    """The keyring of an earlier release has no dates: it is renewed like any other."""
    ring = Keyring([SealingKey.generate()])
    assert ring.renewal_due(timedelta(days=30)) is None
    assert ring.dated(START).renewal_due(timedelta(days=30)) == START + timedelta(days=30)


def test_merging_keeps_what_seals_and_loses_nothing() -> None:
    ring = Keyring([NEW]).merged(Keyring([OTHER, NEW]))
    assert ring.fingerprints == (OTHER.fingerprint, NEW.fingerprint)
    assert ring.merged(ring) == ring


def test_only_who_had_the_key_that_seals_can_prove_it() -> None:
    before = Keyring([NEW, OTHER])
    assert before.is_authentic(b"after", before.authenticate(b"after"))
    assert before.is_authentic(b"after", Keyring([OTHER]).authenticate(b"after"))
    assert not before.is_authentic(b"after", Keyring([NEW]).authenticate(b"after")), "it may be another's key"
    assert not before.is_authentic(b"after", before.authenticate(b"before")), "for another content"


@pytest.mark.parametrize("given", ["", None, 1, [], "\u00e9", "\ud800", "0" * 64, {}])
def test_forged_proofs_prove_nothing(given: object) -> None:
    ring = Keyring([OTHER])
    for forged in (json.dumps({OTHER.fingerprint: given}), json.dumps(given), "[" * 100_000):
        assert not ring.is_authentic(b"after", forged)


@pytest.mark.parametrize("text", ["", "key", base64.b64encode(bytes(95)).decode(), "{}", '{"seeds": []}'])
def test_what_is_no_key_is_refused_without_being_quoted(text: str) -> None:
    with pytest.raises(ValueError, match="96 random bytes") as caught:
        parse_keys(text)
    assert text not in str(caught.value) or len(text) < 4


def test_key_of_openssl_and_keyring_are_read() -> None:
    """'openssl rand -base64 96' breaks its output into lines."""
    lines = base64.encodebytes(bytes(range(96))).decode()
    assert "\n" in lines.strip()
    assert parse_keys(lines)[0].seed == bytes(range(96))
    assert [key.seed for key in parse_keys(Keyring([OTHER, NEW]).dump())] == [OTHER.seed, NEW.seed]


@pytest.mark.parametrize("damaged", ["", "AQ", "not base64!", "AAECAwQFBgcICQ=="])
def test_damaged_envelope_names_no_key(damaged: str) -> None:
    assert fingerprint_of(damaged) == ""


# Renewal


@virtually
async def test_renewal_stores_the_key_before_it_is_published() -> None:
    """A crash in between loses nothing: the next start publishes what is stored."""
    api = with_keys(SealingKey.generate(), created=START - timedelta(days=31))
    async with started(api, MemoryTwilio(N)):
        await asyncio.sleep(CHECK_SECONDS + 1)
    keyring, public = (f"/{KEYRING_SECRET}", f"/{PUBLIC_KEY_CONFIGMAP}")
    order = [path for _, path in writes(api) if path.endswith((keyring, public))]
    assert [path.endswith(keyring) for path in order] == [True, False]
    assert published(api) == stored_keyring(api).current.public.encoded
    assert len(stored_keyring(api)) == 2
    assert [each["reason"] for each in api.events] == ["KeyRenewed"]


@virtually
async def test_crash_between_storing_and_publishing_is_made_good() -> None:
    api = with_keys(SealingKey.generate(), created=START - timedelta(days=31))
    api.on_call = raising(KubernetesUnavailable("gone"), method="PATCH", path=PUBLIC_KEY_CONFIGMAP)
    operator = Operator(api, MemoryTwilio(N), keyring_check=CHECK_SECONDS)
    await operator.start()
    await asyncio.sleep(CHECK_SECONDS + 1)
    assert published(api) != stored_keyring(api).current.public.encoded
    api.on_call = raising(KubernetesUnavailable("gone"), method="none")
    await asyncio.sleep(CHECK_SECONDS + 1)
    assert published(api) == stored_keyring(api).current.public.encoded, "the running operator makes it good"
    await operator.stop()


@virtually
async def test_key_is_renewed_after_30_days_and_all_records_follow() -> None:
    api, twilio = with_keys(ALMOST_30_DAYS_OLD), MemoryTwilio(N, M)
    async with started(api, twilio):
        api.apply(1, N)
        api.apply(2, M, **sealed(2, ALMOST_30_DAYS_OLD))
        await asyncio.sleep(5)
        before = list(twilio.writes)
        assert sealed_with(api, N) == ALMOST_30_DAYS_OLD.fingerprint
        await asyncio.sleep(300)
        assert len(stored_keyring(api)) == 1
        await asyncio.sleep(200)
        newest = stored_keyring(api).current.fingerprint
        assert newest != ALMOST_30_DAYS_OLD.fingerprint
        assert {sealed_with(api, N), sealed_with(api, M)} == {newest}
        assert twilio.writes == before, "Twilio is not touched"
        assert (api.reason(1), api.reason(2)) == ("Configured", "Configured")
        assert alarms(api) == []
    assert REGISTRY.get_sample_value("smschannel_keyring_keys") == 2
    assert REGISTRY.get_sample_value("smschannel_keyring_renewal_due_timestamp_seconds") == pytest.approx(
        (START + timedelta(days=30, seconds=400)).timestamp(), abs=2 * CHECK_SECONDS
    )
    assert REGISTRY.get_sample_value("smschannel_records_to_reseal") == 0


@virtually
async def test_key_is_renewed_although_somebody_annotated_the_keyring() -> None:
    """That is no change of the keyring, but the Secret has another version now."""
    api = with_keys(NEW)
    store = await store_of(api)
    there = api.objects[KEYRING_PLACE]
    api._store("secrets", {**there, "metadata": {**there["metadata"], "annotations": {"note": "ours"}}})
    await store.follow_keyring()
    await store.renew_keyring(virtual_clock())
    assert len(stored_keyring(api)) == 2


@virtually
async def test_lost_race_for_a_renewal_makes_no_second_key() -> None:
    """'kubectl sms keys renew' was faster: the operator takes that key."""
    old = SealingKey.generate(START - timedelta(days=31))
    api = with_keys(old)
    store = await store_of(api)
    await changed(api, old, NEW)
    with pytest.raises(Conflict):
        await store.renew_keyring(START)
    await store.follow_keyring()
    assert published(api) == NEW.public.encoded
    assert stored_keyring(api).fingerprints == (old.fingerprint, NEW.fingerprint)


@virtually
async def test_lost_race_is_nothing_to_warn_of() -> None:
    """Shards and 'kubectl sms keys' share the keyring, and the next check reads it again."""
    api = with_keys(SealingKey.generate(START - timedelta(days=31)))
    async with started(api, MemoryTwilio()):
        api.on_call = raising(Conflict("the object has been modified"), method="PATCH")
        with capture_logs() as logs:
            await asyncio.sleep(CHECK_SECONDS + 2)
    assert [each["log_level"] for each in logs] == ["info"]


# Following


@virtually
async def test_changes_by_the_command_are_followed_without_an_alarm() -> None:
    api = with_keys(OTHER)
    async with started(api, MemoryTwilio(N)):
        api.apply(1, N)
        await asyncio.sleep(5)
        await changed(api, OTHER, NEW)
        await asyncio.sleep(CHECK_SECONDS + 1)
        assert published(api) == NEW.public.encoded
        assert sealed_with(api, N) == NEW.fingerprint
        await changed(api, NEW)
        await asyncio.sleep(CHECK_SECONDS + 1)
        assert alarms(api) == [], "retiring a key is not tampering"
        api.apply(1, N, deletionPolicy="Clear")
        await asyncio.sleep(5)
        assert api.reason(1) == "Configured"
    assert stored_keyring(api).fingerprints == (NEW.fingerprint,)


@virtually
async def test_two_changes_between_two_checks_are_followed() -> None:
    """The proof is by every key there was, so that the operator knows one of them."""
    api = with_keys(OTHER)
    store, third = await store_of(api), SealingKey.generate(START)
    await changed(api, OTHER, NEW)
    await changed(api, OTHER, NEW, third)
    await store.follow_keyring()
    assert published(api) == third.public.encoded
    assert alarms(api) == []


@virtually
async def test_backup_restored_by_hand_is_merged_with_an_alarm() -> None:
    """F23: an operator without the keyring made a new one; then the old Secret was applied with kubectl."""
    api = with_keys(NEW)
    async with started(api, MemoryTwilio(N, M)):
        api.apply(1, N, **sealed(1, OTHER))
        api.apply(2, M, **sealed(2, NEW))
        await asyncio.sleep(5)
        assert (api.reason(1), api.reason(2)) == ("TokenUnreadable", "Configured")
        replaced(api, OTHER)
        await asyncio.sleep(CHECK_SECONDS + 2)
        assert (api.reason(1), api.reason(2)) == ("Configured", "Configured"), "nobody touched them"
        assert stored_keyring(api).fingerprints == (OTHER.fingerprint, NEW.fingerprint)
        assert published(api) == NEW.public.encoded, "what seals is never taken from others"
        assert len(alarms(api)) == 1


@virtually
async def test_record_that_lacked_its_key_is_opened_once_the_key_is_back() -> None:
    api, twilio = with_keys(OTHER), MemoryTwilio(N)
    async with started(api, twilio):
        api.apply(1, N)
        await asyncio.sleep(5)
    api._store("secrets", {**api.objects[KEYRING_PLACE], "data": with_keys(NEW).objects[KEYRING_PLACE]["data"]})
    writes_before = list(twilio.writes)
    async with started(api, twilio):
        api.apply(1, N, deletionPolicy="Clear")
        await asyncio.sleep(5)
        assert api.reason(1) == "RecordUnreadable"
        await asyncio.sleep(2 * CHECK_SECONDS)
        await changed(api, OTHER, NEW)
        await asyncio.sleep(CHECK_SECONDS + 2)
        assert api.reason(1) == "Configured"
        assert sealed_with(api, N) == NEW.fingerprint
    assert twilio.writes == writes_before, "Twilio worked all the time"


@virtually
async def test_working_channel_that_uses_its_recorded_login_is_looked_at_as_well() -> None:
    """Its Ready is True, so its reason does not show that its token lacks a key."""
    api = with_keys(OTHER, NEW)
    async with started(api, MemoryTwilio(N)):
        api.apply(1, N, **sealed(1, NEW))
        await asyncio.sleep(5)
        lost = SealingKey.generate(START)
        api.apply(1, N, **sealed(1, lost))
        await asyncio.sleep(5)
        assert _credentials(api) == "TokenUnreadable"
        await changed(api, lost, OTHER, NEW)
        await asyncio.sleep(CHECK_SECONDS + 2)
        assert _credentials(api) == "Verified"


@virtually
async def test_deleted_channel_waits_for_no_key() -> None:
    """Else channels that are created and deleted in a loop would fill the memory."""
    api = with_keys(NEW)
    async with started(api, MemoryTwilio(N)) as operator:
        api.apply(1, N, **sealed(1, OTHER))
        await asyncio.sleep(5)
        assert operator.kube.keys.lacking
        api.delete(1)
        await asyncio.sleep(5)
        assert operator.kube.keys.lacking == set()


def _credentials(api: MemoryApi) -> str:
    channel = api.channel(1)
    assert channel
    return next(str(each["reason"]) for each in channel["status"]["conditions"] if each["type"] == "CredentialsValid")


@virtually
async def test_keyring_that_nobody_can_read_is_an_alarm_and_the_operator_goes_on() -> None:
    api = with_keys(NEW)
    async with started(api, MemoryTwilio(N)):
        api._store("secrets", {**api.objects[KEYRING_PLACE], "data": {"keyring": "b3RoZXI="}})
        await asyncio.sleep(CHECK_SECONDS + 1)
        api.apply(1, N, **sealed(1, NEW))
        await asyncio.sleep(5)
        assert api.reason(1) == "Configured"
        assert len(alarms(api)) == 1


# Sealing records again


@virtually
async def test_one_key_needs_no_new_seal_whatever_the_records_say() -> None:
    """An upgrade writes nothing: with one key, whatever opens was sealed with it."""
    api = with_keys(NEW)
    async with started(api, MemoryTwilio(N)):
        api.apply(1, N)
        await asyncio.sleep(5)
    place = "secrets", OPERATOR_NAMESPACE, sid_of(N).lower()
    meta = api.objects[place]["metadata"]
    notes = {name: value for name, value in meta["annotations"].items() if name != SEALED_WITH}
    api._store("secrets", {**api.objects[place], "metadata": {**meta, "annotations": notes}})
    api.calls.clear()
    async with started(api, MemoryTwilio(N)):
        await asyncio.sleep(3 * CHECK_SECONDS)
    assert writes(api) == []


@virtually
async def test_seals_are_renewed_at_a_bounded_rate() -> None:
    phones = [f"+614000010{n:02d}" for n in range(30)]
    api = with_keys(OTHER)
    async with started(api, MemoryTwilio(*phones)):
        for n, phone in enumerate(phones):
            api.apply(n, phone)
        await asyncio.sleep(10)
        moments = list[float]()

        async def note(method: str, path: str) -> None:
            if method == "PATCH" and "/secrets/pn" in path:
                moments.append(asyncio.get_running_loop().time())

        api.on_call = note
        await changed(api, OTHER, NEW)
        await asyncio.sleep(CHECK_SECONDS + 60)
    assert {sealed_with(api, phone) for phone in phones} == {NEW.fingerprint}
    assert min(later - earlier for earlier, later in pairwise(moments)) >= 0.19


@virtually
async def test_written_off_records_are_sealed_again_too() -> None:
    """They are the only witness of what a number pointed at: retiring their key must not close them."""
    api = with_keys(OTHER)
    store = await store_of(api)
    async with started(api, MemoryTwilio(N)):
        api.apply(1, N)
        await asyncio.sleep(5)
    async for record in store.records():
        await store.write_off(record, "the account is closed")
    await changed(api, OTHER, NEW)
    async with started(api, MemoryTwilio(N)):
        await asyncio.sleep(CHECK_SECONDS + 2)
    [copy] = [body for place, body in api.objects.items() if place[2].startswith("written-off-")]
    assert fingerprint_of(copy["data"]["record"]) == NEW.fingerprint
    uid = copy["metadata"]["annotations"][f"{GROUP}/channel-uid"]
    contents = Keyring([NEW]).unwrap(base64.b64decode(copy["data"]["record"]), f"{sid_of(N)}/{uid}")
    assert b"before.example.com" in contents


@virtually
async def test_record_that_no_key_opens_is_tried_once_and_left_alone() -> None:
    api = with_keys(OTHER)
    async with started(api, MemoryTwilio(N)):
        api.apply(1, N)
        await asyncio.sleep(5)
        api.edit_record(N, {"record": base64.b64encode(b"damaged").decode()})
        await changed(api, OTHER, NEW)
        await asyncio.sleep(CHECK_SECONDS + 1)
        api.calls.clear()
        await asyncio.sleep(4 * CHECK_SECONDS)
        assert not [path for _, path in api.calls if "/secrets/pn" in path]


@virtually
async def test_record_that_cannot_be_written_keeps_no_other_from_being_sealed_again() -> None:
    """Nor the key from being renewed: one record was made immutable."""
    api = with_keys(ALMOST_30_DAYS_OLD)
    async with started(api, MemoryTwilio(N, M)):
        api.apply(1, N)
        api.apply(2, M)
        await asyncio.sleep(5)
        first = min(sid_of(N), sid_of(M)).lower()
        api.on_call = raising(KubernetesRefused(422, "field is immutable"), method="PATCH", path=f"/secrets/{first}")
        await changed(api, ALMOST_30_DAYS_OLD, replace(NEW, created=ALMOST_30_DAYS_OLD.created))
        await asyncio.sleep(500)
        newest = stored_keyring(api).current.fingerprint
        assert newest != NEW.fingerprint
        assert sorted([sealed_with(api, N) == newest, sealed_with(api, M) == newest]) == [False, True]


# Files


def write_key(directory: Path, name: str, key: SealingKey) -> None:
    (directory / name).write_text(base64.encodebytes(key.seed).decode())


def test_keys_in_files_are_followed_and_never_renewed(tmp_path: Path) -> None:
    """A CSI driver or vault agent changes them: the last by name seals."""
    write_key(tmp_path, "2026-01.key", OTHER)
    (tmp_path / "..data").mkdir()
    due = "smschannel_keyring_renewal_due_timestamp_seconds"

    @virtually
    async def story() -> None:
        api = MemoryApi()
        del api.objects[KEYRING_PLACE]
        operator = Operator(api, MemoryTwilio(N), keyring_dir=tmp_path, keyring_check=CHECK_SECONDS)
        await operator.start()
        assert published(api) == OTHER.public.encoded
        api.apply(1, N)
        await asyncio.sleep(1000)
        assert published(api) == OTHER.public.encoded
        assert REGISTRY.get_sample_value(due) == 0, "no alert, since the operator does not renew it"
        write_key(tmp_path, "2026-02.key", NEW)
        await asyncio.sleep(CHECK_SECONDS + 2)
        assert published(api) == NEW.public.encoded
        assert sealed_with(api, N) == NEW.fingerprint
        for name in ("2026-01.key", "2026-02.key"):
            (tmp_path / name).unlink()
        await asyncio.sleep(CHECK_SECONDS + 2)
        assert published(api) == NEW.public.encoded, "a volume that is away for a moment changes nothing"
        assert KEYRING_PLACE not in api.objects, "the keys are in the files only"
        await operator.stop()

    story()


@pytest.mark.parametrize("content", [None, "not a key", b"\xff\xfe\x00"])
async def test_files_without_a_key_stop_the_start_in_words(tmp_path: Path, content: str | bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.key").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KeyringLost, match=r"has no files with keys|is not a sealing key") as caught:
        await store_of(MemoryApi(), tmp_path)
    assert "not a key" not in str(caught.value)


def test_no_log_and_no_event_has_a_seed() -> None:
    @virtually
    async def story() -> None:
        api = with_keys(SealingKey.generate(), created=START - timedelta(days=31))
        with capture_logs() as logs:
            async with started(api, MemoryTwilio(N)):
                await asyncio.sleep(CHECK_SECONDS + 1)
                replaced(api, OTHER)
                await asyncio.sleep(CHECK_SECONDS + 1)
        assert logs
        shown = str(logs) + str(api.events)
        for key in (*stored_keyring(api), OTHER):
            assert base64.b64encode(key.seed).decode() not in shown
            assert key.seed.hex() not in shown

    story()
