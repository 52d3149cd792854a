"""Channels in Kubernetes: read, applied, deleted; and refused where they belong to somebody else.

Whose a channel is, its managedFields say: the shim writes a channel only while it alone owns what is under `spec`.
The API server holds it to what was read: every write carries the resourceVersion, and a creation carries "0", which
creates but never changes (a plain apply would also change what somebody made a moment before).
"""

from __future__ import annotations

import asyncio
import random

import structlog
from pydantic import SecretStr

from api_shim.merging import Merged
from api_shim.schemas import Refusal, Setup, being_removed
from smschannel.api.errors import Conflict, KubernetesRefused, NotFound
from smschannel.api.kube_client import APPLY_PATCH, KubeClient, Object
from smschannel.api.names import PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP, channels_path
from smschannel.api.resource import API_VERSION, FINALIZER, KIND
from smschannel.api.sealing import Binding, PublicKey

FIELD_MANAGER = "sms-api-shim"
LABELS = {"app.kubernetes.io/created-by": FIELD_MANAGER}
_ATTEMPTS = 8  # the operator writes a new channel two or three times, and each may come in between
_KEY_SECONDS = 30

log = structlog.get_logger()


class BeingRemoved(Refusal):
    """Nothing can be written onto a channel that is going: the API server would take it, and then drop it."""

    def __init__(self, channel: Object) -> None:
        super().__init__(
            409,
            "The channel of this instance is still being removed. Try again later, or send 'Prefer: wait=60'.",
            Retry_After="5",
        )
        self.channel = channel


class PublishedKey:
    """The operator's public sealing key. An old one still opens, so it is read anew only now and then."""

    def __init__(self, api: KubeClient, namespace: str, seconds: float) -> None:
        self._api = api
        self._path = f"/api/v1/namespaces/{namespace}/configmaps/{PUBLIC_KEY_CONFIGMAP}"
        self._key: PublicKey | None = None
        self._read_at = 0.0
        self._reads: Merged[str, PublicKey] = Merged(seconds)

    async def current(self, max_age: float = _KEY_SECONDS) -> PublicKey:
        """As it was at most `max_age` seconds ago."""
        if self._key is None or asyncio.get_running_loop().time() - self._read_at > max_age:
            return await self._reads.ask("", self._read)
        return self._key

    async def _read(self) -> PublicKey:
        try:
            published = await self._api.request("GET", self._path)
            self._key = PublicKey.decode(published["data"][PUBLIC_KEY])
        except NotFound:
            raise Refusal(503, "The operator has not published its sealing key yet.", Retry_After="5") from None
        except (KeyError, TypeError, ValueError):
            log.error("the ConfigMap holds no sealing key: start the operator again", path=self._path)  # noqa: TRY400
            raise Refusal(503, "The operator's sealing key cannot be used.", Retry_After="30") from None
        self._read_at = asyncio.get_running_loop().time()
        return self._key


class Channels:
    """The channels of one namespace; `name` is an instance id."""

    def __init__(self, api: KubeClient, namespace: str, sealing_key: PublishedKey) -> None:
        self._api = api
        self.namespace = namespace
        self._sealing_key = sealing_key

    async def read(self, name: str) -> Object | None:
        try:
            return await self._api.request("GET", channels_path(self.namespace, name))
        except NotFound:
            return None

    async def apply(self, name: str, setup: Setup, left: asyncio.Event) -> tuple[Object, bool]:
        """The channel as it is then, and whether it is new; where others write, too, only until the client has `left`.

        What it sent since then, to whichever replica, must not be written over.
        """
        key = await self._sealing_key.current()
        token = SecretStr(setup.auth_token.get_secret_value())
        sealed = key.seal(token, Binding(self.namespace, name, setup.account_sid))
        wanted = {
            "accountSid": setup.account_sid,
            "phoneNumber": setup.phone_number,
            "credentials": {"sealed": sealed},
        }
        for attempt in range(_ATTEMPTS):
            if attempt and left.is_set():
                break
            there = await self.read(name)
            if there is not None:
                if being_removed(there):
                    raise BeingRemoved(there)
                self._must_be_ours(there)
            try:
                return await self._apply(name, wanted, there), there is None
            except Conflict:
                await _stand_back(attempt)
            except KubernetesRefused as error:
                came_between = there is None and error.status == 422 and await self.read(name) is not None
                if not came_between:
                    raise
        raise _contested()

    async def _apply(self, name: str, spec: Object, there: Object | None) -> Object:
        if there is None:
            precondition = {"resourceVersion": "0"}
        else:
            meta = there["metadata"]
            precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        # What an apply leaves out it takes away, so label and finalizer are in each. The operator takes the finalizer
        # off channels that are being removed only, and those are never applied to.
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": name, "labels": LABELS, "finalizers": [FINALIZER], **precondition},
            "spec": spec,
        }
        return await self._api.request(
            "PATCH",
            channels_path(self.namespace, name),
            body,
            params={"fieldManager": FIELD_MANAGER},
            content_type=APPLY_PATCH,
        )

    async def delete(self, name: str, left: asyncio.Event) -> Object | None:
        """The channel that is now being removed; None if there is none any more. `left` as for `apply`."""
        uid = None
        for attempt in range(_ATTEMPTS):
            if attempt and left.is_set():
                break
            there = await self.read(name)
            if there is None or uid not in {None, there["metadata"]["uid"]}:  # a successor is none of this call's
                return None
            if being_removed(there):
                return there
            self._must_be_ours(there)
            uid = there["metadata"]["uid"]
            precondition = {"uid": uid, "resourceVersion": there["metadata"]["resourceVersion"]}
            options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": precondition}
            try:
                await self._api.request("DELETE", channels_path(self.namespace, name), options)
            except NotFound:
                return None
            except Conflict:
                await _stand_back(attempt)
            else:
                return there
        raise _contested()

    def _must_be_ours(self, channel: Object) -> None:
        owners = spec_owners(channel)
        others = sorted(owners - {FIELD_MANAGER})
        if others or not owners:
            name, whose = channel["metadata"]["name"], ", ".join(others) or "somebody who left no name"
            raise Refusal(
                409,
                f"This channel is managed in Kubernetes, by {whose}: change or remove it there. To hand it over to"
                f" this API, delete it there first (kubectl -n {self.namespace} delete smschannel {name}), then POST.",
            )


def spec_owners(channel: Object) -> set[str]:
    """The field managers that wrote anything under `spec`."""
    return {
        entry.get("manager", "")
        for entry in channel["metadata"].get("managedFields", ())
        if not entry.get("subresource") and "f:spec" in entry.get("fieldsV1", {})
    }


async def _stand_back(attempt: int) -> None:
    await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311


def _contested() -> Refusal:
    return Refusal(409, "The channel is being changed by others at the same time. Try again.", Retry_After="1")
