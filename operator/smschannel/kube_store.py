"""What a reconcile reads and writes in Kubernetes: channels, Secrets, Events, and the operator's records and keyring.

Reads never modify anything. Every write is idempotent or has a precondition that the API server checks.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from cachetools import TTLCache

from smschannel.api.errors import (
    Conflict,
    Fenced,
    KubernetesRefused,
    KubernetesUnavailable,
    NoKindMatch,
    NotFound,
    Refused,
    Unreadable,
)
from smschannel.api.kube_client import MERGE_PATCH, METADATA_OF_ONE, KubeClient, Object
from smschannel.api.names import (
    FENCE_PROBE,
    KEYRING_SECRET,
    MANAGED,
    NAMESPACES,
    PUBLIC_KEY,
    PUBLIC_KEY_CONFIGMAP,
    SETTINGS_CONFIGMAP,
    channels_path,
    core_path,
)
from smschannel.api.reasons import Reason
from smschannel.api.resource import API_VERSION, FINALIZER, GROUP, KIND, Metadata, SmsChannel, trimmed
from smschannel.api.sealing import Keyring
from smschannel.core.claims import Claims
from smschannel.core.record import NAMESPACE_LABEL, RECORD_LABEL, SEALED_WITH, Key, Record
from smschannel.keyring_store import KeyringStore, Keys
from smschannel.metrics import FOREIGN_CHANGES, KUBERNETES_WRITES

log = structlog.get_logger()

_WRITTEN_OFF_RECORDS = {"labelSelector": f"{RECORD_LABEL}=written-off"}
_WRITTEN_OFF_PREFIX = "written-off-"
_SID_LENGTH = 34
_WRITTEN_OFF = f"{GROUP}/written-off"
_EVENT_SERIES_SECONDS = 360
_RESEAL = (
    "The public key is the operator's own again. Tokens that were sealed meanwhile may be known to whoever changed it:"
    " replace them at Twilio, and seal them again."
)
_UNKNOWN_AT_START = (
    "The operator publishes its own again. The one that it found at its start is not in the keyring. That is expected"
    " after the keyring was lost, or restored from before the last renewal: then restore the newest backup (kubectl sms"
    " keys restore), or seal again what was sealed since. Otherwise somebody replaced this ConfigMap, or the Secret"
    f" {KEYRING_SECRET}, while no operator led: tokens that were sealed meanwhile may be known. See docs/sealing.md."
)
_LARGE_READS = 16  # at once, of objects that tenants write: each may have megabytes


def _identity(meta: Metadata) -> Object:
    """Return the metadata that identifies an object and its version."""
    return {
        "namespace": meta.namespace,
        "name": meta.name,
        "uid": meta.uid,
        "resourceVersion": meta.resource_version,
    }


def _regarding(namespace: str, name: str, uid: str) -> dict[str, str]:
    return {"apiVersion": API_VERSION, "kind": KIND, "namespace": namespace, "name": name, "uid": uid}


def _asked_for(body: Object, namespace: str, name: str) -> Object:
    """Return the object that was asked for. Raises `KubernetesUnavailable` for anything else, whoever sent it."""
    found = body.get("metadata")
    meta: Object = found if isinstance(found, dict) else {}
    is_it = (meta.get("namespace"), meta.get("name")) == (namespace, name)
    if is_it and meta.get("uid") and meta.get("resourceVersion"):
        return body
    raise KubernetesUnavailable(f"asked for {name}, the API server answers with something else")


class KubeStore:
    """Reads and writes objects. `claims` is the index of the records, updated by every read and write of a record here.

    `on_written` is called with each channel that was written, as the API server returned it. `keys` is the keyring,
    which is read from the files of `keyring_dir` if that is given. `others` are the namespaces of other shards, whose
    records are not in `claims`.
    """

    def __init__(
        self,
        api: KubeClient,
        operator_namespace: str,
        keyring_dir: Path | None = None,
        *,
        others: frozenset[str] = frozenset(),
    ) -> None:
        self._api = api
        self.namespace = operator_namespace
        self.claims = Claims()
        self.on_written: Callable[[Object], object] = lambda channel: None
        self.listed: dict[str, str] = {}  # resourceVersions by namespace
        self.keys = Keys(KeyringStore(api, operator_namespace, keyring_dir), self._report_keyring)
        self._namespaces: tuple[str, ...] = ()
        self._others = others
        self._of_another_shard: dict[str, Mapping[str, str]] = {}  # what ConfigMaps had at the last check, by name
        self._altered: dict[str, Record] = {}  # as they were sealed, by number
        self._published: dict[str, tuple[str, Mapping[str, str]]] = {}
        self._large_reads = asyncio.Semaphore(_LARGE_READS)
        self._events: TTLCache[tuple[object, ...], tuple[str, int]] = TTLCache(10_000, ttl=_EVENT_SERIES_SECONDS)

    # Channels

    async def channel(self, namespace: str, name: str) -> Object | None:
        """Read a channel. None only if the API server's 404 names it; raises `KubernetesUnavailable` for other 404s.

        Also raises it for an answer that is another object: it would prove that this one is gone.
        """
        try:
            async with self._large_reads:
                found = await self._api.request("GET", channels_path(namespace, name))
            return trimmed(_asked_for(found, namespace, name))
        except NotFound as error:
            if error.name != name:
                raise KubernetesUnavailable(f"asked for {name}, the API server answers: {error}") from None
            return None

    async def channels(self, namespace: str) -> AsyncIterator[Object]:
        """Yield all channels of a namespace. `listed` has the list's resourceVersion afterwards."""

        def note(version: str) -> None:
            self.listed[namespace] = version

        async for body in self._api.pages(channels_path(namespace), on_version=note):
            yield trimmed(body)

    async def channel_metadata(self, namespace: str) -> AsyncIterator[Object]:
        """Yield the metadata of all channels of a namespace."""
        async for item in self._api.pages(channels_path(namespace), metadata_only=True):
            yield item["metadata"]

    async def is_crd_absent(self) -> bool:
        """Return whether API discovery lacks SmsChannel. A 404 alone proves nothing: it may be a proxy's."""
        groups = await self._api.request("GET", "/apis")
        if groups.get("kind") != "APIGroupList":
            return False
        if GROUP not in {each.get("name") for each in groups.get("groups") or ()}:
            return True
        try:
            kinds = await self._api.request("GET", f"/apis/{API_VERSION}")
        except NoKindMatch:
            return True
        found = {each.get("kind") for each in kinds.get("resources") or ()}
        return kinds.get("kind") == "APIResourceList" and KIND not in found

    async def add_finalizer(self, channel: SmsChannel) -> None:
        """Add the finalizer. Raises `Conflict` if the channel changed since it was read."""
        meta = channel.metadata
        await self._set_finalizers("finalizer_add", _identity(meta), [*meta.finalizers, FINALIZER])

    async def remove_finalizer(self, channel: SmsChannel) -> None:
        """Remove the finalizer. Raises `Conflict` if the channel changed since it was read."""
        meta = channel.metadata
        await self.remove_finalizer_from({"metadata": {**_identity(meta), "finalizers": meta.finalizers}})

    async def remove_finalizer_from(self, body: Mapping[str, Any]) -> None:
        """Remove the finalizer from an object, also from one that the current validation rules refuse."""
        meta = body["metadata"]
        with contextlib.suppress(NotFound):
            others = [each for each in meta["finalizers"] if each != FINALIZER]
            await self._set_finalizers("finalizer_remove", meta, others)

    async def _set_finalizers(self, kind: str, meta: Mapping[str, Any], finalizers: list[str]) -> None:
        precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        patch = {"metadata": {**precondition, "finalizers": finalizers}}
        self.on_written(await self._write(kind, "PATCH", channels_path(meta["namespace"], meta["name"]), patch))

    async def write_status(self, channel: SmsChannel, status: Mapping[str, Any]) -> None:
        """Write the status. Raises `NotFound` or `Conflict` if the channel is gone: the uid protects a newer one."""
        meta = channel.metadata
        body = {"metadata": {"uid": meta.uid}, "status": status}
        path = channels_path(meta.namespace, meta.name, "status")
        self.on_written(await self._write("status", "PATCH", path, body))

    async def post_event(self, channel: SmsChannel, *, warning: bool, reason: str, note: str) -> None:
        """Post an Event about a channel."""
        meta = channel.metadata
        await self._post_event(
            _regarding(meta.namespace, meta.name, meta.uid), warning=warning, reason=reason, note=note
        )

    async def post_event_about(self, key: Key, uid: str, *, reason: str, note: str) -> None:
        """Post an Event about a channel that is not reconciled now."""
        await self._post_event(_regarding(key.namespace, key.name, uid), warning=False, reason=reason, note=note)

    async def post_event_about_record(self, record: Record, *, reason: str, note: str) -> None:
        """Post an Event about a record, in the operator's namespace."""
        regarding = {"apiVersion": "v1", "kind": "Secret", "namespace": self.namespace, "name": record.secret_name}
        await self._post_event(regarding, warning=True, reason=reason, note=note)

    async def _post_event(self, regarding: Mapping[str, str], *, warning: bool, reason: str, note: str) -> None:
        """Post an Event; if the same one was posted within some minutes, count it as a series instead."""
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
        """Read a Secret; None if it does not exist."""
        try:
            async with self._large_reads:
                found = await self._api.request("GET", core_path(namespace, "secrets", name))
            return _asked_for(found, namespace, name)
        except NotFound:
            return None

    # Records

    async def records(self) -> AsyncIterator[Record]:
        """Yield all records but those of other shards, unopened, from their metadata. Does not update `claims`."""
        selector = f"{RECORD_LABEL}=true"
        if self._others:  # so that records without the label, or of namespaces that no shard manages, are there
            selector += f",{NAMESPACE_LABEL} notin ({','.join(sorted(self._others))})"
        path = core_path(self.namespace, "secrets")
        async for secret in self._api.pages(path, {"labelSelector": selector}, metadata_only=True):
            record = Record.from_metadata(secret["metadata"])
            if not self._is_of_another_shard(record):
                yield record

    def _is_of_another_shard(self, record: Record) -> bool:
        return record.namespace in self._others

    def _observe(self, record: Record) -> None:
        """Index a record that was read, unless it is another shard's, which changes it without our knowledge."""
        if self._is_of_another_shard(record):
            self.claims.remove(record.number_sid)
        else:
            self.claims.observe(record)

    async def open_record(self, record: Record) -> Record | None:
        """Read a record with its contents; None if it is gone. Raises `Unreadable`."""
        secret = await self.secret(self.namespace, record.secret_name)
        if secret is None:
            self.claims.remove(record.number_sid)
            return None
        return self._opened(secret)

    async def create_record(self, record: Record) -> Record:
        """Claim a number. Return the channel's record, which may exist already after a crash.

        Raises `Refused` with NumberInUse if another channel holds the number, and `Unreadable` if this one does but
        its record cannot be opened.
        """
        try:
            saved = await self._write("record", "POST", core_path(self.namespace, "secrets"), self._secret_of(record))
        except Conflict:
            found = await self.holder(record.number_sid)
            if found is None:
                raise
            if found.uid != record.uid:
                raise Refused(Reason.NumberInUse, f"{record.phone_number} already serves another channel.") from None
            opened = await self.open_record(record)
            if opened is None:
                raise
            return opened
        except KubernetesUnavailable:
            self.claims.put(record)  # no answer: it may have been created
            raise
        return self._saved(record, saved)

    async def holder(self, number_sid: str) -> Record | None:
        """Read the record of a number, without its contents; None if no channel holds it."""
        path = core_path(self.namespace, "secrets", number_sid.lower())
        while True:
            known = self.claims.holder(number_sid)
            try:
                secret = await self._api.request("GET", path, accept=METADATA_OF_ONE)
            except NotFound:
                self.claims.remove(number_sid)
                return None
            if self.claims.holder(number_sid) == known:
                record = Record.from_metadata(secret["metadata"])
                self._observe(record)
                return record
            # The record was written or deleted here during the call: its answer may be the older one.

    async def update_record(self, record: Record) -> Record:
        """Update a record; unopened contents stay as they are. Raises `Conflict` if it changed since it was read."""
        secret = self._secret_of(record)
        secret["metadata"]["resourceVersion"] = record.version
        path = core_path(self.namespace, "secrets", record.secret_name)
        try:
            saved = await self._write("record_update", "PATCH", path, secret)
        except (Conflict, NotFound) as error:
            await self.holder(record.number_sid)
            raise Conflict("the record was changed meanwhile") from error
        return self._saved(record, saved)

    async def delete_record(self, record: Record) -> None:
        """Delete a record, which frees its number. Raises `Conflict` if it changed since it was read."""
        await self._delete_secret("record_delete", record)
        self.claims.remove(record.number_sid)

    async def write_off(self, record: Record, why: str) -> None:
        """Free a number that was not restored. A copy of its record under another name remains for people to read."""
        secret = await self.secret(self.namespace, record.secret_name)
        if secret is None:
            self.claims.remove(record.number_sid)
            return
        meta = secret["metadata"]
        note = f"{record.phone_number} ({record.number_sid}) of {record.account_sid} was not restored: {why}"
        name = f"{_WRITTEN_OFF_PREFIX}{record.secret_name}-{meta['uid'][:8]}"
        notes = {**(meta.get("annotations") or {}), _WRITTEN_OFF: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {note}"}
        copy = self._own_object("Secret", name, secret.get("data") or {})
        copy["metadata"] |= {"labels": {**MANAGED, RECORD_LABEL: "written-off"}, "annotations": notes}
        with contextlib.suppress(Conflict):  # it exists already, from before a crash
            await self._write("record_write_off", "POST", core_path(self.namespace, "secrets"), copy)
        # The Event comes first: once the record is deleted, no reconcile would post it after a crash.
        regarding = {"apiVersion": "v1", "kind": "Secret", "namespace": self.namespace, "name": name}
        with contextlib.suppress(NotFound, KubernetesRefused):
            await self._post_event(regarding, warning=True, reason="WrittenOff", note=note)
        await self.delete_record(replace(record, version=meta["resourceVersion"]))

    async def _delete_secret(self, kind: str, record: Record) -> None:
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if record.version:
            options["preconditions"] = {"resourceVersion": record.version}
        try:
            await self._write(kind, "DELETE", core_path(self.namespace, "secrets", record.secret_name), options)
        except NotFound:
            pass
        except Conflict as error:
            await self.holder(record.number_sid)
            raise Conflict("the record was changed meanwhile") from error

    def _opened(self, secret: Object) -> Record:
        record = Record.from_metadata(secret["metadata"])
        try:
            sealed = base64.b64decode(secret["data"]["record"])
            opened = record.opened(self.keys.keyring.unwrap(sealed, record.binding))
        except (KeyError, TypeError, ValueError):
            self._observe(record)
            raise Unreadable("the record is damaged, or was written by a newer release") from None
        except Unreadable:
            self._observe(record)
            raise
        is_listed = _is_listed(opened, secret["metadata"].get("labels") or {})
        if (replace(opened, contents=None) != record or not is_listed) and not self._is_of_another_shard(opened):
            self._altered[record.number_sid] = opened
        self._observe(opened)
        return opened

    def _secret_of(self, record: Record) -> Object:
        content = {}
        if record.contents:
            content = {"record": _encode(self.keys.keyring.wrap(record.document(), record.binding))}
            record = replace(record, sealed_with=self.keys.keyring.current.fingerprint)
        secret = self._own_object("Secret", record.secret_name, content)
        annotations = record.annotations()
        if not record.version:
            annotations = {name: value for name, value in annotations.items() if value is not None}
        secret["metadata"] |= {"labels": record.labels(), "annotations": annotations}
        return secret

    def _saved(self, record: Record, saved: Object) -> Record:
        meta = saved["metadata"]
        sealed_with = Record.from_metadata(meta).sealed_with
        record = replace(record, version=meta["resourceVersion"], sealed_with=sealed_with)
        self.claims.put(record)
        return record

    async def has_fence(self) -> bool | None:
        """Return whether the API server admits writes of the leader only; None if it does not say. Changes nothing."""
        probe = self._own_object("Secret", FENCE_PROBE, {})
        probe["metadata"]["labels"] = {**MANAGED, RECORD_LABEL: "true"}
        try:
            await self._api.request("POST", core_path(self.namespace, "secrets"), probe, params={"dryRun": "All"})
        except Fenced:
            return True
        except KubernetesRefused:
            return None
        return False

    # The keyring

    async def open_keyring(self, namespaces: Iterable[str]) -> Keyring:
        """Read the keyring and publish its public key; create it at the first start.

        `namespaces` are those that the operator watches. They are published, too, and as public: `kubectl sms seal` and
        the REST API warn of others. Raises `KeyringLost` if it is missing although there was one before.
        """
        self._namespaces = tuple(namespaces)
        keyring = await self.keys.open(datetime.now(UTC))
        former = await self._publish_key()
        if PUBLIC_KEY in former and not keyring.has(former[PUBLIC_KEY]):
            await self._report_change("public_key", "ConfigMap", PUBLIC_KEY_CONFIGMAP, _UNKNOWN_AT_START)
        return keyring

    async def follow_keyring(self) -> set[str]:
        """Use the keyring as it is stored now, and publish what seals. Return the fingerprints of added keys."""
        added = await self.keys.follow()
        await self._publish_newest_key()
        return added

    async def renew_keyring(self, now: datetime) -> None:
        """Add a key, and publish it once it is stored. Raises `Conflict` if others changed the keyring meanwhile."""
        key = await self.keys.renew(now)
        await self._publish_newest_key()
        regarding = {"apiVersion": "v1", "kind": "Secret", "namespace": self.namespace, "name": KEYRING_SECRET}
        note = f"Key {key.fingerprint} seals from now on. Earlier ones still open. Make a new backup of the keyring."
        with contextlib.suppress(KubernetesRefused):
            await self._post_event(regarding, warning=False, reason="KeyRenewed", note=note)

    async def _publish_newest_key(self) -> None:
        _, published = self._published[PUBLIC_KEY_CONFIGMAP]
        if published[PUBLIC_KEY] != self.keys.keyring.current.public.encoded:
            await self._publish_key()

    async def _publish_key(self) -> Mapping[str, str]:
        """Publish the newest key; return what was published before."""
        public = self.keys.keyring.current.public
        content = {
            PUBLIC_KEY: public.encoded,
            "fingerprint": public.fingerprint.hex(),
            NAMESPACES: " ".join(self._namespaces),
        }
        return await self._publish("public_key", PUBLIC_KEY_CONFIGMAP, content)

    async def _report_keyring(self, advice: str) -> None:
        await self._report_change("keyring", "Secret", KEYRING_SECRET, advice)

    async def written_off(self) -> AsyncIterator[Record]:
        """Yield the copies of records that were written off, unopened; not those of other shards."""
        path = core_path(self.namespace, "secrets")
        async for secret in self._api.pages(path, _WRITTEN_OFF_RECORDS, metadata_only=True):
            copy = _written_off(secret["metadata"])
            if not self._is_of_another_shard(copy):
                yield copy

    async def reseal_written_off(self, copy: Record) -> None:
        """Seal the copy of a written-off record with the newest key. Raises `Unreadable`, and `Conflict`."""
        path = core_path(self.namespace, "secrets", copy.secret_name)
        secret, keyring = await self._api.request("GET", path), self.keys.keyring
        binding = _written_off(secret["metadata"]).binding
        try:
            plaintext = keyring.unwrap(base64.b64decode(secret["data"]["record"]), binding)
        except (KeyError, TypeError, ValueError):
            raise Unreadable("the record is damaged") from None
        version = secret["metadata"]["resourceVersion"]
        meta = {"resourceVersion": version, "annotations": {SEALED_WITH: keyring.current.fingerprint}}
        patch = {"metadata": meta, "data": {"record": _encode(keyring.wrap(plaintext, binding))}}
        await self._write("record_update", "PATCH", path, patch)

    # Published settings

    async def publish_settings(self, content: Mapping[str, str]) -> None:
        """Publish the settings, so that `kubectl sms plan` shows what this operator would do."""
        await self._publish("settings", SETTINGS_CONFIGMAP, content)

    async def _publish(self, kind: str, name: str, content: Mapping[str, str]) -> Mapping[str, str]:
        """Make `content` the data of a ConfigMap; return what the data was before."""
        path = core_path(self.namespace, "configmaps")
        current = await self._data_of(name)
        if current is None:
            await self._write(kind, "POST", path, self._own_object("ConfigMap", name, content))
        elif current != content:
            await self._write(kind, "PATCH", f"{path}/{name}", {"data": {**dict.fromkeys(current), **content}})
        self._published[name] = kind, content
        return current or {}

    async def _data_of(self, name: str) -> Mapping[str, str] | None:
        try:
            configmap = await self._api.request("GET", core_path(self.namespace, "configmaps", name))
        except NotFound:
            return None
        return configmap.get("data") or {}

    # What others changed

    async def check_own_objects(self, changed: Iterable[Key] = ()) -> None:
        """Report what others changed in the operator's own objects, and put it right where that is possible.

        These are the ConfigMaps that it published, its keyring, and the records of the `changed` keys and of those that
        were opened since the last check. A record that cannot be opened is reported only, and so is another keyring.
        Raises Kubernetes' errors, but not if it refuses to let an object be restored.
        """
        if self.keys.is_open:  # first: whoever renewed the key published it, too
            with contextlib.suppress(Conflict):  # it is read again within seconds
                await self._restored("Secret", KEYRING_SECRET, self.follow_keyring())
        for name, (kind, content) in tuple(self._published.items()):
            if not self._is_as_published(name, await self._data_of(name), content):
                await self._report_change(kind, "ConfigMap", name, _RESEAL if kind == "public_key" else "")
                await self._restored("ConfigMap", name, self._publish(kind, name, content))
        for record in [each for key in changed for each in self.claims.of(key)]:
            try:
                await self.open_record(record)
            except Unreadable as error:
                await self._report_change("record", "Secret", record.secret_name, f"It cannot be opened: {error}.")
        for number_sid, record in tuple(self._altered.items()):
            del self._altered[number_sid]
            await self._report_change("record", "Secret", record.secret_name, "Restoring its metadata.")
            with contextlib.suppress(Conflict):  # it is read again by the next reconcile
                await self._restored("Secret", record.secret_name, self.update_record(record))

    def _is_as_published(self, name: str, found: Mapping[str, str] | None, content: Mapping[str, str]) -> bool:
        """Return whether a ConfigMap has what was published, or what another shard may have published since.

        During an upgrade those of the new release or with the new settings do, and this operator is about to be
        replaced. So another content counts as foreign only if two checks find it.
        """
        before = self._of_another_shard.pop(name, None)
        if found == content:
            return True
        if not self._others or found is None or found == before or found.get(PUBLIC_KEY) != content.get(PUBLIC_KEY):
            return False
        self._of_another_shard[name] = found
        return True

    async def find_unlisted(self, record: Record) -> Record | None:
        """Return a record that a list did not show, since it lost its label. None, with an alarm, if it was deleted.

        Also None if the number is another shard's by now.
        """
        secret = await self.secret(self.namespace, record.secret_name)
        if secret is None:
            lost = f"It was deleted, and with it the webhook that {record.phone_number} had before."
            await self._report_change("record", "Secret", record.secret_name, lost)
            return None
        try:
            found = replace(self._opened(secret), contents=None)
        except Unreadable as error:
            found = Record.from_metadata(secret["metadata"])
            if not self._is_of_another_shard(found):
                await self._report_change("record", "Secret", record.secret_name, f"It cannot be opened: {error}.")
        return None if self._is_of_another_shard(found) else found

    async def _restored(self, kind: str, name: str, repair: Awaitable[object]) -> None:
        """Await the repair of an object. If Kubernetes refuses it, the log says so, and whatever comes next goes on."""
        try:
            await repair
        except KubernetesRefused as error:  # somebody made the object immutable, for example
            log.error("cannot restore object, delete it", kind=kind, name=name, error=str(error))  # noqa: TRY400

    async def _report_change(self, what: str, kind: str, name: str, advice: str) -> None:
        """Raise an alarm about a foreign change: a log line, a metric and an Event in the operator's namespace."""
        FOREIGN_CHANGES.labels(what).inc()
        note = f"Somebody else changed this {kind}, which only the operator may write. {advice}".strip()
        log.error("object of the operator was changed by others", kind=kind, name=name, advice=advice)
        regarding = {"apiVersion": "v1", "kind": kind, "namespace": self.namespace, "name": name}
        try:
            await self._post_event(regarding, warning=True, reason="ForeignChange", note=note)
        except KubernetesRefused as error:  # the log and the metric say it as well
            log.warning("cannot post event", error=str(error))

    def _own_object(self, kind: str, name: str, content: Mapping[str, str]) -> Object:
        meta: Object = {"name": name, "namespace": self.namespace, "labels": MANAGED}
        return {"apiVersion": "v1", "kind": kind, "metadata": meta, **({"data": dict(content)} if content else {})}

    async def _write(self, kind: str, method: str, path: str, body: Object | None = None) -> Object:
        """Send a write. The answer has the metadata only."""
        KUBERNETES_WRITES.labels(kind).inc()
        content_type = MERGE_PATCH if method == "PATCH" else "application/json"
        return await self._api.request(method, path, body, content_type=content_type, accept=METADATA_OF_ONE)


def _is_listed(record: Record, labels: Mapping[str, str]) -> bool:
    """Return whether the operator that manages a record lists it, with these labels."""
    return labels.get(RECORD_LABEL) == "true" and labels.get(NAMESPACE_LABEL, record.namespace) == record.namespace


def _written_off(meta: Mapping[str, Any]) -> Record:
    """Return a written-off copy as a record: its contents are bound to the number and the channel of the original."""
    original = meta["name"].removeprefix(_WRITTEN_OFF_PREFIX)[:_SID_LENGTH]
    return replace(Record.from_metadata({**meta, "name": original}), secret=meta["name"])


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()
