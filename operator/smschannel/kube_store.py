"""What a reconcile asks of Kubernetes: channels, Secrets, Events, and the operator's own records and keyring."""

from __future__ import annotations

import base64
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any

from cachetools import TTLCache

from smschannel.api.errors import (
    ChannelError,
    Conflict,
    KeyringLost,
    KubernetesRefused,
    KubernetesUnavailable,
    NotFound,
    Unreadable,
)
from smschannel.api.kube_client import MERGE_PATCH, KubeClient, Object
from smschannel.api.names import (
    KEYRING_SECRET,
    PUBLIC_KEY,
    PUBLIC_KEY_CONFIGMAP,
    SETTINGS_CONFIGMAP,
    channels_path,
    core_path,
)
from smschannel.api.resource import API_VERSION, FINALIZER, GROUP, KIND, Metadata, SmsChannel
from smschannel.api.sealing import Keyring, SealingKey
from smschannel.core.record import Record
from smschannel.metrics import KUBERNETES_WRITES

_SAME_EVENT = 360  # seconds
_WATCH_LAG = 600  # seconds that the watch may be behind, at most
_RECORD_LABEL = f"{GROUP}/record"
RECORDS = {"labelSelector": f"{_RECORD_LABEL}=true"}
CHANNEL_ANNOTATION = f"{GROUP}/channel"
_OURS = {"app.kubernetes.io/managed-by": "sms-channel-operator"}


def _identity(meta: Metadata) -> Object:
    """Which object, in which version, as Kubernetes spells it."""
    return {
        "namespace": meta.namespace,
        "name": meta.name,
        "uid": meta.uid,
        "resourceVersion": meta.resource_version,
    }


class KubeStore:
    """Every write is idempotent or refused by a precondition; reads never modify anything.

    The operator is the only writer of its records, so their versions are kept here ("" where one must be read first):
    a channel without a version has no record, which saves a read for each new channel.
    """

    def __init__(self, api: KubeClient, operator_namespace: str) -> None:
        self._api = api
        self._own = operator_namespace
        self._keyring: Keyring | None = None
        self._versions: dict[str, str] = {}
        self._statuses: TTLCache[str, int] = TTLCache(100_000, ttl=_WATCH_LAG)
        self._events: TTLCache[tuple[object, ...], tuple[str, int]] = TTLCache(10_000, ttl=_SAME_EVENT)

    # Channels

    async def channel(self, namespace: str, name: str) -> Object | None:
        try:
            return await self._api.request("GET", channels_path(namespace, name))
        except NotFound:
            return None

    def channels(self, namespace: str) -> AsyncIterator[Object]:
        return self._api.pages(channels_path(namespace))

    async def channel_metadata(self, namespace: str) -> AsyncIterator[Object]:
        async for item in self._api.pages(channels_path(namespace), metadata_only=True):
            yield item["metadata"]

    async def add_finalizer(self, channel: SmsChannel) -> None:
        meta = channel.metadata
        await self._finalizers("finalizer_add", _identity(meta), [*meta.finalizers, FINALIZER])

    async def remove_finalizer(self, channel: SmsChannel) -> None:
        meta = channel.metadata
        await self.take_finalizer_off({"metadata": {**_identity(meta), "finalizers": meta.finalizers}})

    async def take_finalizer_off(self, body: Mapping[str, Any]) -> None:
        """As `remove_finalizer`, also for an object that today's rules refuse."""
        meta = body["metadata"]
        with contextlib.suppress(NotFound):
            others = [each for each in meta["finalizers"] if each != FINALIZER]
            await self._finalizers("finalizer_remove", meta, others)

    async def _finalizers(self, kind: str, meta: Mapping[str, Any], finalizers: list[str]) -> None:
        precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        patch = {"metadata": {**precondition, "finalizers": finalizers}}
        await self._write(kind, "PATCH", channels_path(meta["namespace"], meta["name"]), patch)

    async def write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None:
        """The uid keeps a successor of the same name untouched."""
        meta = channel.metadata
        body = {"metadata": {"uid": meta.uid}, "status": status}
        path = channels_path(meta.namespace, meta.name, "status")
        written = await self._write("status", "PATCH", path, body)
        self._statuses[meta.uid] = int(written["metadata"]["resourceVersion"])

    def is_outdated(self, body: Mapping[str, Any]) -> bool:
        """Whether a status was written since the watch saw `body`: what follows from the old one may be wrong."""
        meta = body["metadata"]
        return int(meta["resourceVersion"]) < self._statuses.get(meta["uid"], 0)

    async def post_event(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None:
        meta = channel.metadata
        regarding = {"apiVersion": API_VERSION, "kind": KIND, "namespace": meta.namespace, "name": meta.name}
        await self._post_event({**regarding, "uid": meta.uid}, warning=warning, reason=reason, note=note)

    async def _post_event(self, regarding: Mapping[str, str], *, warning: bool, reason: str, note: str) -> None:
        """The same again within some minutes is counted on the Event that is there."""
        path = f"/apis/events.k8s.io/v1/namespaces/{regarding['namespace']}/events"
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        same = (regarding["name"], regarding.get("uid"), reason, note)
        name, count = self._events.get(same, (f"{regarding['name']}.{uuid.uuid4().hex[:16]}", 0))
        self._events[same] = name, count + 1
        if count:
            series = {"series": {"count": count + 1, "lastObservedTime": now}}
            with contextlib.suppress(NotFound):
                await self._write("event", "PATCH", f"{path}/{name}", series)
                return
        event = {
            "metadata": {"name": name, "namespace": regarding["namespace"]},
            "eventTime": now,
            "reportingController": f"{GROUP}/operator",
            "reportingInstance": socket.gethostname()[:128],
            "type": "Warning" if warning else "Normal",
            "action": "Reconcile",
            "reason": reason,
            "note": note[:1024],
            "regarding": regarding,
        }
        await self._write("event", "POST", path, event)

    # Tenants' Secrets

    async def secret(self, namespace: str, name: str) -> Object | None:
        try:
            return await self._api.request("GET", core_path(namespace, "secrets", name))
        except NotFound:
            return None

    # The keyring

    async def open_keyring(self) -> Keyring:
        """The keyring, made at the very first start. Raises `KeyringLost` where one was there before."""
        path = core_path(self._own, "secrets")
        secret = await self.secret(self._own, KEYRING_SECRET)
        if secret is None:
            await self._refuse_second_keyring()
            keyring = Keyring([SealingKey.generate()])
            made = self._own_object("Secret", KEYRING_SECRET, {"keyring": _encode(keyring.dump().encode())})
            try:
                secret = await self._write("keyring", "POST", path, made)
            except Conflict:  # another operator was faster: its keyring is the one
                secret = await self._api.request("GET", f"{path}/{KEYRING_SECRET}")
        keyring = self._loaded(secret)
        public = keyring.current.public
        content = {PUBLIC_KEY: public.encoded, "fingerprint": public.fingerprint.hex()}
        await self._publish("public_key", PUBLIC_KEY_CONFIGMAP, content)
        return keyring

    def _loaded(self, secret: Object) -> Keyring:
        try:
            self._keyring = Keyring.load(base64.b64decode(secret["data"]["keyring"]).decode())
        except (KeyError, TypeError, ValueError):
            raise KeyringLost(
                f"Secret {self._own}/{KEYRING_SECRET} holds no keyring: restore it from its backup"
            ) from None
        return self._keyring

    async def _refuse_second_keyring(self) -> None:
        try:
            await self._api.request("GET", core_path(self._own, "configmaps", PUBLIC_KEY_CONFIGMAP))
            witness = f"ConfigMap {PUBLIC_KEY_CONFIGMAP}"
        except NotFound:
            records = await self._api.request("GET", core_path(self._own, "secrets"), params={**RECORDS, "limit": "1"})
            if not records["items"]:
                return
            witness = "records of channels"
        raise KeyringLost(
            f"Secret {self._own}/{KEYRING_SECRET} is gone, but {witness} made with it are there: restore it from its "
            f"backup. Only if that is lost for good: delete them, and seal every token again with the new key"
        )

    # What everybody may know

    async def publish_settings(self, content: Mapping[str, str]) -> None:
        """For 'kubectl sms', so that it tells what this operator would do."""
        await self._publish("settings", SETTINGS_CONFIGMAP, content)

    async def _publish(self, kind: str, name: str, content: Mapping[str, str]) -> None:
        path = core_path(self._own, "configmaps")
        try:
            there = (await self._api.request("GET", f"{path}/{name}")).get("data") or {}
        except NotFound:
            await self._write(kind, "POST", path, self._own_object("ConfigMap", name, content))
            return
        if there != content:
            await self._write(kind, "PATCH", f"{path}/{name}", {"data": {**dict.fromkeys(there), **content}})

    # Records

    async def records(self) -> AsyncIterator[Record | ChannelError]:
        """All records, and an error for each that cannot be read."""
        async for secret in self._api.pages(core_path(self._own, "secrets"), RECORDS):
            try:
                yield self._opened(secret)
            except ChannelError as error:
                yield error

    async def load_record(self, uid: str) -> Record | None:
        """Raises `Unreadable` where the keyring does not open it."""
        if uid not in self._versions:
            return None
        secret = await self.secret(self._own, uid)
        if secret is None:
            del self._versions[uid]
            return None
        return self._opened(secret)

    def _opened(self, secret: Object) -> Record:
        uid = secret["metadata"]["name"]
        self._versions[uid] = secret["metadata"]["resourceVersion"]
        assert self._keyring
        try:
            return Record.decode(self._keyring.unwrap(base64.b64decode(secret["data"]["record"]), uid))
        except (KeyError, TypeError, ValueError):
            raise Unreadable("the record is damaged, or of a newer release") from None

    async def save_record(self, record: Record) -> None:
        """`Conflict` where somebody else wrote it: it is read again next time."""
        assert self._keyring
        content = {"record": _encode(self._keyring.wrap(record.encode(), record.uid))}
        secret = self._own_object("Secret", record.uid, content)
        meta = secret["metadata"]
        meta["labels"] = {**_OURS, _RECORD_LABEL: "true"}
        meta["annotations"] = {CHANNEL_ANNOTATION: f"{record.namespace}/{record.name}"}
        version = self._versions.get(record.uid)
        if version:
            meta["resourceVersion"] = version
        try:
            if version:
                saved = await self._write("record", "PUT", core_path(self._own, "secrets", record.uid), secret)
            else:
                saved = await self._write("record", "POST", core_path(self._own, "secrets"), secret)
        except (Conflict, NotFound) as error:
            self._versions[record.uid] = ""
            raise Conflict("the record was written by somebody else") from error
        except KubernetesUnavailable:
            self._versions[record.uid] = ""  # it may be there all the same: it is read before the next write
            raise
        self._versions[record.uid] = saved["metadata"]["resourceVersion"]

    async def write_off(self, record: Record, why: str) -> None:
        """Keep the record for people, out of the way: it is not read any more, and says what was left behind."""
        numbers = ", ".join(f"{entry.phone_number} of {entry.account_sid}" for entry in record.entries)
        note = f"{numbers}: not given back, since {why}"
        meta = {
            "labels": {_RECORD_LABEL: "written-off"},
            "annotations": {f"{GROUP}/written-off": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {note}"},
        }
        # The Event comes first: once the label is there, nobody comes back to tell. The label need not wait for it.
        regarding = {"apiVersion": "v1", "kind": "Secret", "namespace": self._own, "name": record.uid}
        with contextlib.suppress(NotFound, KubernetesRefused):
            await self._post_event(regarding, warning=True, reason="WrittenOff", note=note)
        with contextlib.suppress(NotFound):
            await self._write(
                "record_write_off", "PATCH", core_path(self._own, "secrets", record.uid), {"metadata": meta}
            )
        self._versions.pop(record.uid, None)

    async def drop_record(self, uid: str) -> None:
        with contextlib.suppress(NotFound):
            await self._write("record_drop", "DELETE", core_path(self._own, "secrets", uid))
        self._versions.pop(uid, None)

    def _own_object(self, kind: str, name: str, content: Mapping[str, str]) -> Object:
        meta = {"name": name, "namespace": self._own, "labels": _OURS}
        return {"apiVersion": "v1", "kind": kind, "metadata": meta, "data": dict(content)}

    async def _write(self, kind: str, method: str, path: str, body: Object | None = None) -> Object:
        KUBERNETES_WRITES.labels(kind).inc()
        content_type = MERGE_PATCH if method == "PATCH" else "application/json"
        return await self._api.request(method, path, body, content_type=content_type)


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()
