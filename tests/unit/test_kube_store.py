"""What the store writes, with which preconditions, and what it knows of records afterwards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from pydantic import SecretStr

from smschannel.api.errors import (
    ChannelError,
    Conflict,
    KubernetesRefused,
    KubernetesUnavailable,
    NotFound,
    Refused,
)
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.reasons import Reason
from smschannel.api.resource import DeletionPolicy, SmsChannel
from smschannel.core.record import Contents, Login, Record, Webhook
from smschannel.kube_store import KubeStore
from tests.unit.memory import ACCOUNT, NAMESPACE, OPERATOR_NAMESPACE, START, MemoryApi, instance, raising, sid_of
from tests.unit.virtual_time import virtually

N = "+61400000001"
TOKEN, PASSWORD = "very-secret-token", "hunter2"
RECORD = Record(
    number_sid=sid_of(N),
    phone_number=N,
    account_sid=ACCOUNT,
    namespace=NAMESPACE,
    name=instance(1),
    uid="uid-of-1",
    source="sealed",
    contents=Contents(
        login=Login(sid=ACCOUNT, token=SecretStr(TOKEN)),
        previous=Webhook(url=f"https://owner:{PASSWORD}@before.example.com/", method="GET"),
        wrote=("https://sms.example.com/1",),
    ),
)
SECRETS = f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/secrets"


class Recorder(MemoryApi):
    """Records the bodies of writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[tuple[str, str, Object]] = []

    async def request(self, method: str, path: str, body: Object | None = None, **options: Any) -> Object:
        if method != "GET":
            self.bodies.append((method, path, body or {}))
        return await super().request(method, path, body, **options)


async def opened(api: MemoryApi) -> KubeStore:
    store = KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE)
    await store.open_keyring([NAMESPACE])
    return store


@virtually
async def test_record_is_read_back_unchanged_and_shows_no_secret() -> None:
    api = Recorder()
    store = await opened(api)
    created = await store.create_record(RECORD)
    assert created.version
    found = await store.open_record(created)
    assert found == created
    [secret] = [body for place, body in api.objects.items() if place[2] == sid_of(N).lower()]
    assert TOKEN not in str(secret)
    assert PASSWORD not in str(secret)
    assert store.claims.holder(sid_of(N)) is not None
    assert store.claims.holder(sid_of(N)).contents is None  # type: ignore[union-attr]  # the index keeps no token


@virtually
async def test_second_creation_for_the_same_channel_returns_the_record() -> None:
    """After a crash the record has the previous webhook, which must not be overwritten."""
    store = await opened(MemoryApi())
    first = await store.create_record(RECORD)
    second = await store.create_record(RECORD.with_contents(previous=None))
    assert second == first


@virtually
async def test_creation_for_another_channel_is_refused() -> None:
    store = await opened(MemoryApi())
    await store.create_record(RECORD)
    with pytest.raises(Refused) as refused:
        await store.create_record(replace(RECORD, name=instance(2), uid="uid-of-2"))
    assert refused.value.reason is Reason.NumberInUse
    assert RECORD.name not in str(refused.value), "whose it is may be another tenant's secret"


@virtually
async def test_creation_without_an_answer_counts_as_a_claim() -> None:
    """The record may exist: if the channel is deleted now, its record must be restored."""
    api = MemoryApi()
    store = await opened(api)
    api.on_call = raising(KubernetesUnavailable("no answer"), method="POST")
    with pytest.raises(KubernetesUnavailable):
        await store.create_record(RECORD)
    assert store.claims.of(RECORD.key)
    api.on_call = raising(KubernetesUnavailable("never"), method="never")
    assert await store.open_record(RECORD) is None
    assert not store.claims.of(RECORD.key)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda store, record: store.update_record(record.with_contents(previous=None)), id="update"),
        pytest.param(lambda store, record: store.delete_record(record), id="delete"),
    ],
)
def test_write_with_an_old_version_conflicts_and_updates_the_index(
    write: Callable[[KubeStore, Record], Awaitable[object]],
) -> None:
    @virtually
    async def story() -> None:
        api = MemoryApi()
        store, other = await opened(api), await opened(api)
        old = await store.create_record(RECORD)
        newer = await other.update_record(replace(old, source="secret/twilio@7"))
        with pytest.raises(Conflict):
            await write(store, old)
        assert len(api.records()) == 1
        cached = store.claims.holder(sid_of(N))
        assert cached
        assert (cached.version, cached.source) == (newer.version, "secret/twilio@7")

    story()


@virtually
async def test_update_of_an_unopened_record_leaves_its_contents() -> None:
    store = await opened(MemoryApi())
    created = await store.create_record(RECORD)
    unopened = replace(created, contents=None, deletion_policy=DeletionPolicy.RETAIN)
    await store.update_record(unopened)
    found = await store.open_record(created)
    assert found
    assert (found.contents, found.deletion_policy) == (RECORD.contents, DeletionPolicy.RETAIN)


@virtually
async def test_removed_restore_since_leaves_no_annotation() -> None:
    api = MemoryApi()
    store = await opened(api)
    created = await store.create_record(RECORD)
    pending = await store.update_record(replace(created, restore_since=START))
    assert api.records()[N].restore_since == START
    await store.update_record(replace(pending, restore_since=None))
    assert api.records()[N].restore_since is None


@virtually
async def test_status_names_the_uid_so_that_no_successor_is_written() -> None:
    api = Recorder()
    store = await opened(api)
    channel = SmsChannel.model_validate(api.apply(1, N))
    written: list[Object] = []
    store.on_written = written.append
    await store.write_status(channel, {"observedGeneration": 1})
    assert api.bodies[-1][2] == {
        "metadata": {"uid": channel.metadata.uid},
        "status": {"observedGeneration": 1},
    }
    assert [each["metadata"]["name"] for each in written] == [instance(1)]
    api.delete(1)
    api.apply(1, N)
    with pytest.raises(Conflict):
        await store.write_status(channel, {"observedGeneration": 2})


@virtually
async def test_404_that_names_something_else_is_not_a_missing_channel() -> None:
    """Numbers are restored when a channel is gone: an answer about another object proves nothing."""
    api = MemoryApi()
    store = await opened(api)
    assert await store.channel(NAMESPACE, instance(1)) is None
    api.on_call = raising(NotFound('namespaces "sms-channels" not found', NAMESPACE), method="GET")
    with pytest.raises(KubernetesUnavailable):
        await store.channel(NAMESPACE, instance(1))


@pytest.mark.parametrize(
    ("error", "is_freed", "reason"),
    [
        (None, True, "the Event comes first: once the record is gone, no reconcile would report it"),
        (KubernetesUnavailable("away"), False, "the record waits, so that it is reported at the next try"),
        (KubernetesRefused(403, "forbidden"), True, "if Events are refused, the copy's annotation has the reason"),
    ],
)
def test_write_off_is_reported_before_the_record_is_deleted(
    error: ChannelError | None, is_freed: bool, reason: str
) -> None:
    @virtually
    async def story() -> None:
        api = Recorder()
        store = await opened(api)
        record = await store.create_record(RECORD)
        api.bodies.clear()
        if error:
            api.on_call = raising(error, path="/events")
        try:
            await store.write_off(record, "the token was revoked")
        except KubernetesUnavailable:
            assert not is_freed, reason
        assert (api.records() == {}) is is_freed, reason
        copies = [body for place, body in api.objects.items() if place[2].startswith("written-off-")]
        assert len(copies) == 1
        assert "the token was revoked" in str(copies[0]["metadata"]["annotations"])
        kinds = [path.rpartition("/")[2].partition("-")[0] for _, path, _ in api.bodies]
        assert kinds[:2] == ["secrets", "events"], reason
        if error and not is_freed:
            api.on_call = raising(error, path="never")
            await store.write_off(record, "the token was revoked")
            assert api.records() == {}, "the copy of the first try is not in the way"

    story()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"kind": "Status", "status": "Failure", "code": 403, "message": "no"}, id="a Status with 200"),
        pytest.param({"metadata": None}, id="no metadata"),
        pytest.param(
            {"metadata": {"namespace": NAMESPACE, "name": instance(2), "uid": "2", "resourceVersion": "2"}},
            id="another object",
        ),
        pytest.param({"metadata": {"namespace": NAMESPACE, "name": instance(1)}}, id="no uid"),
    ],
)
async def test_answer_that_is_not_the_object_proves_nothing(answer: Any) -> None:
    """An object of another uid would mean that the channel is gone, and its number would be restored."""
    api = MemoryApi()
    store = await opened(api)

    async def request(*_: Any, **__: Any) -> Object:
        return cast(Object, answer)

    api.request = request  # type: ignore[method-assign]
    for call in (store.channel(NAMESPACE, instance(1)), store.secret(NAMESPACE, instance(1))):
        with pytest.raises(KubernetesUnavailable, match="something else"):
            await call
