"""Whoever may write the keyring's Secret and knows no key of it makes the operator lose none, and changes no seal.

It may be an attacker, or a careless restore of an older Secret.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from smschannel.api import sealing
from smschannel.api.errors import Conflict, KeyringLost, KubernetesUnavailable
from smschannel.api.kube_client import KubeClient
from smschannel.api.sealing import MOST_KEYS, Keyring, SealingKey
from smschannel.cli import keys as command
from smschannel.cli.admin_store import AdminStore
from smschannel.cli.main import cli
from smschannel.keyring_store import KeyringStore, authenticated
from tests.unit.memory import OPERATOR_NAMESPACE, START, MemoryApi, MemoryTwilio, Operator, raising, virtual_clock
from tests.unit.test_keyring import (
    KEYRING_PLACE,
    N,
    alarms,
    changed,
    published,
    replaced,
    store_of,
    stored_keyring,
    with_keys,
    write_key,
    writes,
)
from tests.unit.virtual_time import virtually

A, B, C, FOREIGN = (SealingKey.generate(START - timedelta(days=age)) for age in (90, 60, 30, 0))
DEEP = "[" * 200_000
MANY = [SealingKey.generate(START) for _ in range(MOST_KEYS)]


def data_of(api: MemoryApi) -> dict[str, str]:
    return dict(api.objects[KEYRING_PLACE]["data"])


def put(api: MemoryApi, data: Mapping[str, str]) -> None:
    """Replace the data of the Secret, as 'kubectl replace' or a restore does."""
    api._store("secrets", {**api.objects[KEYRING_PLACE], "data": dict(data)})


def put_text(api: MemoryApi, **texts: str) -> None:
    put(api, {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()})


def proven(by: Keyring, keyring: str, created: str, generation: int) -> dict[str, str]:
    """Return the fields of the Secret, as a command that has these keys writes them."""
    proof = by.authenticate(authenticated(keyring, created, generation))
    return {"keyring": keyring, "created": created, "generation": str(generation), "proof": proof}


def raised(api: MemoryApi) -> int:
    """How many alarms there were; the Event of a repeated one is only counted up."""
    return len([path for _, path in api.calls if "/events" in path])


def fingerprints(*keys: SealingKey) -> tuple[str, ...]:
    return tuple(key.fingerprint for key in keys)


# Older keyrings


@virtually
async def test_older_keyring_loses_no_newer_key() -> None:
    """Its proof is still valid: a backup tool puts back the Secret of last week."""
    api = with_keys(A)
    store = await store_of(api)
    await changed(api, A, B)
    await store.follow_keyring()
    last_week = data_of(api)
    await changed(api, A, B, C)
    await store.follow_keyring()
    put(api, last_week)
    await store.follow_keyring()
    assert store.keys.keyring.fingerprints == fingerprints(A, B, C)
    assert stored_keyring(api).fingerprints == fingerprints(A, B, C), "also in the Secret, for the next start"
    assert published(api) == C.public.encoded
    assert raised(api) == 1
    await store.follow_keyring()
    assert raised(api) == 1, "it is right again"


@virtually
async def test_older_keyring_does_not_repeat_a_retirement() -> None:
    """A was retired, and then restored since something in Git needed it: the retirement is over."""
    api = with_keys(A, B)
    store = await store_of(api)
    await changed(api, B)
    await store.follow_keyring()
    retired = data_of(api)
    await changed(api, A, B)
    await store.follow_keyring()
    put(api, retired)
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(A, B)
    assert raised(api) == 1


@virtually
async def test_keyring_from_before_a_loss_takes_no_key_away() -> None:
    """A was retired. Then the keyring was lost, and a backup restored that still had A: generations began again."""
    api = with_keys(A, B)
    await changed(api, B)
    before_the_loss = data_of(api)
    del api.objects[KEYRING_PLACE]
    await changed(api, A, B)
    store = await store_of(api)
    put(api, before_the_loss)
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(A, B)
    assert raised(api) == 1


@virtually
async def test_same_keys_with_an_older_generation_do_not_make_old_ones_new() -> None:
    """Else two steps would do what one cannot: first the generation goes back, then the keys."""
    api = with_keys(A)
    store = await store_of(api)
    await changed(api, A, B)
    await store.follow_keyring()
    two_keys = data_of(api)
    await changed(api, B)
    await store.follow_keyring()
    one_key = data_of(api)
    await changed(api, A, B)
    await store.follow_keyring()
    for old in (two_keys, one_key):
        put(api, old)
        await store.follow_keyring()
        assert stored_keyring(api).fingerprints == fingerprints(A, B)
    assert raised(api) == 2


@virtually
async def test_backup_restored_into_a_keyring_that_was_just_deleted_retires_nothing() -> None:
    """The command found no keyring, so it could not know what was in it."""
    api = with_keys(A, B)
    store = await store_of(api)
    del api.objects[KEYRING_PLACE]
    await changed(api, B)
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(A, B)


@virtually
async def test_keyring_that_is_written_again_is_newer_than_all_before() -> None:
    """Also if an administrator's clock was ahead once: else a Secret from before the deletion would count as newer."""
    api = with_keys(A, B)
    store = await store_of(api)
    ring = Keyring([A, B])
    put_text(api, **proven(ring, ring.dump(), ring.dump_dates(), 2**40))
    await store.follow_keyring()
    del api.objects[KEYRING_PLACE]
    await store.follow_keyring()
    assert int(base64.b64decode(data_of(api)["generation"])) == 2**40 + 1


@virtually
async def test_interrupted_repair_is_made_good_by_the_next_check() -> None:
    """The API server fails, or others write in between. The alarm comes first: a restart would lose the keys."""
    api = with_keys(A)
    store = await store_of(api)
    old = data_of(api)
    await changed(api, A, B)
    await store.follow_keyring()
    for error in (KubernetesUnavailable("gone"), Conflict("changed")):
        put(api, old)
        api.on_call = raising(error, method="PATCH")
        with pytest.raises(type(error)):
            await store.follow_keyring()
        assert stored_keyring(api).fingerprints == fingerprints(A)
        assert alarms(api)
        api.on_call = raising(error, method="none")
        await store.follow_keyring()
        assert stored_keyring(api).fingerprints == fingerprints(A, B)


@virtually
async def test_late_answer_does_not_bring_back_an_older_keyring() -> None:
    """The resync and the regular check follow the keyring at the same time, and one's answer is slow."""
    api = with_keys(A)
    store = await store_of(api)
    api.latency = 10
    slow = asyncio.create_task(store.follow_keyring())
    await asyncio.sleep(15)  # the API server has read the Secret, and its answer is on its way
    api.latency = 0.005
    await changed(api, A, B)
    await asyncio.gather(slow, store.follow_keyring())
    assert store.keys.keyring.fingerprints == fingerprints(A, B)
    assert published(api) == B.public.encoded


@virtually
async def test_late_answer_does_not_undo_a_renewal() -> None:
    api = with_keys(A)
    store = await store_of(api)

    async def answer_writes_at_once(method: str, path: str) -> None:
        if method == "PATCH":
            api.latency = 0

    api.on_call = answer_writes_at_once
    slow = asyncio.create_task(store.keys.follow())
    await asyncio.sleep(0)
    key = await store.keys.renew(virtual_clock())
    await slow
    assert store.keys.keyring.current.fingerprint == key.fingerprint


@virtually
async def test_operator_that_takes_over_after_the_repair_has_all_keys_and_accepts_a_retirement() -> None:
    """The other replica knows only what is stored."""
    api = with_keys(A)
    first = await store_of(api)
    old = data_of(api)
    await changed(api, A, B)
    await first.follow_keyring()
    put(api, old)
    await first.follow_keyring()
    second = await store_of(api)
    assert second.keys.keyring.fingerprints == fingerprints(A, B)
    await changed(api, B)
    for each in (second, first):
        await each.follow_keyring()
        assert each.keys.keyring.fingerprints == fingerprints(B)
    assert raised(api) == 1


# Foreign keys


@virtually
async def test_foreign_key_that_was_merged_proves_nothing() -> None:
    """It opens only; else whoever added it could prove the next change with it, which drops the others."""
    api = with_keys(A, B)
    store = await store_of(api)
    replaced(api, FOREIGN)
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(FOREIGN, A, B)
    only = Keyring([FOREIGN])
    put_text(api, **proven(only, only.dump(), only.dump_dates(), 10**17))
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(FOREIGN, A, B)
    assert published(api) == B.public.encoded
    assert raised(api) == 2


@pytest.mark.parametrize("generation", ["9" * 18, "9" * 30, "9" * 10_000, "-1", "x", "\N{ARABIC-INDIC DIGIT ONE}"])
async def test_invented_generation_changes_nothing(generation: str) -> None:
    """It is a part of what is proven; afterwards the command still works, and its changes are followed."""
    api = with_keys(A, B)
    store = await store_of(api)
    data = data_of(api)
    put(api, {**data, "generation": base64.b64encode(generation.encode()).decode()})
    await changed(api, A, B, C)
    await store.follow_keyring()
    assert set(stored_keyring(api).fingerprints) == set(fingerprints(A, B, C))
    await changed(api, *stored_keyring(api), FOREIGN)
    await store.follow_keyring()
    assert published(api) == FOREIGN.public.encoded


@virtually
async def test_foreign_dates_do_not_postpone_the_renewal() -> None:
    api = with_keys(A)
    store = await store_of(api)
    dates = json.dumps({A.fingerprint: "2999-01-01T00:00:00Z"})
    put(api, {**data_of(api), "created": base64.b64encode(dates.encode()).decode()})
    await store.follow_keyring()
    assert store.keys.keyring.current.created == A.created
    assert raised(api) == 1


# Garbage


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({}, id="no data"),
        pytest.param({"keyring": ""}, id="empty"),
        pytest.param({"keyring": "gIGC"}, id="bytes that are no text"),
        pytest.param({"keyring": base64.b64encode(b"not JSON").decode()}, id="text"),
        pytest.param({"keyring": base64.b64encode(b'{"seeds": []}').decode()}, id="no keys"),
        pytest.param({"keyring": base64.b64encode(b'{"seeds": [["AA=="]]}').decode()}, id="a list as a key"),
        pytest.param({"keyring": base64.b64encode(DEEP.encode()).decode()}, id="nested too deeply"),
        pytest.param({"keyring": base64.b64encode(b'{"seeds": ["AA=="], "more": 1}').decode()}, id="newer"),
    ],
)
async def test_damaged_keyring_is_written_again(data: dict[str, str]) -> None:
    """The operator that runs has the keys, and the next one would have none. This is not proven."""
    api = with_keys(A, B)
    store = await store_of(api)
    put(api, data)
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(A, B)
    assert raised(api) == 1
    assert (await store_of(api)).keys.keyring.fingerprints == fingerprints(A, B)


@pytest.mark.parametrize("name", ["created", "generation", "proof"])
async def test_what_is_beside_the_keys_may_be_nested_deeply(name: str) -> None:
    """Python's parser gives up with a RecursionError, which is no ValueError."""
    api = with_keys(A)
    store = await store_of(api)
    put_text(api, **{"keyring": Keyring([FOREIGN]).dump(), name: DEEP})
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(FOREIGN, A)
    put_text(api, **{"keyring": Keyring([FOREIGN, A]).dump(), name: DEEP})
    assert (await store_of(api)).keys.keyring.fingerprints == fingerprints(FOREIGN, A)


@virtually
async def test_keyring_of_a_newer_release_is_left_alone_if_that_is_proven() -> None:
    """Its command had the keys of this keyring; to write the older format would take away what it added."""
    api = with_keys(A)
    store = await store_of(api)
    newer = proven(Keyring([A]), '{"seeds": ["AA=="], "more": 1}', "{}", 2**40)
    put_text(api, **newer)
    before = data_of(api)
    await store.follow_keyring()
    assert data_of(api) == before
    assert "run the release that wrote it, or a newer one" in alarms(api)[0]
    put_text(api, **{**newer, "created": "[]"})
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(A), "the proof is for another text"


def test_text_that_is_proven_never_changes() -> None:
    """Operators of earlier releases check it, to tell a newer release's keyring from damage."""
    assert authenticated('{"seeds": []}', "{}", 7) == b'["{\\"seeds\\": []}", "{}", 7]'


# Too many keys


def test_keys_beyond_the_bound_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a computation in the event loop, of which thousands block it for seconds."""

    def compute(*_: object) -> None:
        raise AssertionError("a key was computed")

    monkeypatch.setattr(sealing, "SealingKey", compute)
    seeds = json.dumps({"seeds": ["AA=="] * (MOST_KEYS + 1)})
    with pytest.raises(ValueError, match="not a keyring"):
        Keyring.load(seeds)


def test_as_many_keys_as_a_keyring_has_are_read() -> None:
    assert len(Keyring.load(Keyring(MANY).dump())) == MOST_KEYS


@virtually
async def test_secret_with_too_many_keys_is_replaced_by_the_keys_in_use() -> None:
    """With whatever else is in it: a Secret has 1 MiB at most, and a patch keeps what it does not name."""
    api = with_keys(A, B)
    store = await store_of(api)
    seeds = [base64.b64encode(os.urandom(96)).decode() for _ in range(MOST_KEYS + 1)]
    put_text(api, keyring=json.dumps({"seeds": seeds}), more="x" * 500_000)
    await store.follow_keyring()
    assert stored_keyring(api).fingerprints == fingerprints(A, B)
    assert set(data_of(api)) == {"keyring", "created", "generation", "proof"}
    assert raised(api) == 1


@pytest.mark.parametrize(("own", "others", "expected"), [(2, 98, 100), (2, 99, 2), (150, 0, 150), (150, 1, 150)])
async def test_others_leave_room_for_the_renewal(own: int, others: int, expected: int) -> None:
    """A keyring that is full cannot be renewed, and nothing could be sealed with a new key."""
    ours, theirs = MANY[:own], MANY[own : own + others]
    api = with_keys(*ours)
    store = await store_of(api)
    replaced(api, *theirs, ours[0])
    await store.follow_keyring()
    assert len(stored_keyring(api)) == expected
    assert set(fingerprints(*ours)) <= set(stored_keyring(api).fingerprints)
    assert raised(api) == 1


@virtually
async def test_full_keyring_is_not_renewed_and_everything_else_goes_on() -> None:
    """One key more could not be read by anybody, so that all would be lost."""
    keys = [SealingKey(each.seed, START - timedelta(days=31)) for each in MANY]
    api = with_keys(*keys)
    operator = Operator(api, MemoryTwilio(N), keyring_check=15)
    with capture_logs() as logs:
        await operator.start()
        api.apply(1, N)
        await asyncio.sleep(40)
        await operator.stop()
    assert api.reason(1) == "Configured"
    assert len(stored_keyring(api)) == MOST_KEYS
    assert [each for each in logs if "the keyring is full, retire keys" in each["event"]]
    assert not [path for method, path in writes(api) if path.endswith("smschannel-keyring")]
    due = REGISTRY.get_sample_value("smschannel_keyring_renewal_due_timestamp_seconds")
    assert due == (START - timedelta(days=1)).timestamp(), "and SmsChannelKeyNotRenewed fires"


def test_commands_refuse_one_key_too_many_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = with_keys(*MANY)
    _in_memory(monkeypatch, api)
    backup = tmp_path / "backup.age"
    content = json.dumps({"keyring": json.loads(Keyring([A]).dump()), "created": {}})
    backup.write_bytes(command._sealed(content.encode(), "correct horse battery staple"))
    restore = ["keys", "restore", str(backup), "--passphrase-file", "-"]
    for arguments, stdin in ((["keys", "renew"], ""), (restore, "correct horse battery staple")):
        result = CliRunner().invoke(cli, arguments, input=stdin)
        assert result.exit_code == 1
        assert "Nothing was changed: a keyring has at most 200 keys" in " ".join(result.output.split())
    assert len(stored_keyring(api)) == MOST_KEYS


def _in_memory(monkeypatch: pytest.MonkeyPatch, api: MemoryApi) -> None:
    @asynccontextmanager
    async def admin(*_: object) -> AsyncIterator[AdminStore]:
        yield AdminStore(cast(KubeClient, api), OPERATOR_NAMESPACE)

    monkeypatch.setattr(command, "_admin", admin)


async def test_too_many_files_stop_a_start_and_change_nothing_for_an_operator_that_runs(tmp_path: Path) -> None:
    api = MemoryApi()
    write_key(tmp_path, "a.key", A)
    store = await store_of(api, tmp_path)
    (tmp_path / "b.key").write_text(Keyring(MANY).dump())
    await store.follow_keyring()
    assert store.keys.keyring.fingerprints == fingerprints(A)
    assert raised(api) == 1
    with pytest.raises(KeyringLost, match="at most 200 keys"):
        await store_of(api, tmp_path)


# A start, when nothing is in memory


@virtually
async def test_start_with_a_keyring_that_lacks_the_published_key_is_an_alarm() -> None:
    """Nothing else remembers the keys. It may be a restore that is meant, so the operator starts, and says it."""
    api = with_keys(A, B)
    await store_of(api)
    replaced(api, FOREIGN)
    await store_of(api)
    [alarm] = alarms(api)
    assert "is not in the keyring" in alarm
    assert "kubectl sms keys restore" in alarm


@virtually
async def test_start_with_a_renewed_keyring_is_no_alarm() -> None:
    """Whoever wrote a keyring with the published key had its private half."""
    api = with_keys(A, B)
    await store_of(api)
    await changed(api, A, B, C)
    await store_of(api)
    assert published(api) == C.public.encoded
    assert alarms(api) == []


@virtually
async def test_damaged_keyring_stops_a_start_and_says_how_to_restore_it() -> None:
    api = with_keys(A)
    put(api, {"keyring": ""})
    store = KeyringStore(cast(KubeClient, api), OPERATOR_NAMESPACE)
    with pytest.raises(KeyringLost, match="delete it and restore its backup: kubectl sms keys restore BACKUP"):
        await store.read()
