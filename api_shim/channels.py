"""Read, apply and delete SmsChannels; refuse (409) to write those that others own.

The managedFields of a channel say who owns it (`smschannel.api.ownership`): the shim writes a channel only while it
alone owns account, number and credentials. Other fields may belong to anybody, and an apply keeps them. Every write
carries the uid and resourceVersion that were read, so that the API server rejects it if the channel changed meanwhile.
A creation carries resourceVersion "0", with which an apply creates, but never changes.
"""

from __future__ import annotations

import asyncio
import random

import structlog
from pydantic import SecretStr

from api_shim.schemas import HttpError, Setup, is_being_deleted
from api_shim.single_flight import SingleFlight
from smschannel.api.errors import Conflict, KubernetesRefused, NotFound
from smschannel.api.kube_client import APPLY_PATCH, KubeClient, Object
from smschannel.api.names import NAMESPACES, PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP, channels_path, core_path
from smschannel.api.ownership import REST_LABELS, REST_MANAGER, other_owners, owned_by_rest
from smschannel.api.resource import API_VERSION, FINALIZER, KIND
from smschannel.api.sealing import Binding, PublicKey

_ATTEMPTS = 8  # the operator writes a new channel two or three times, and each write may be a conflict
_KEY_SECONDS = 30  # how long a public key is cached: an older one still seals readable values

log = structlog.get_logger()


class RemovalInProgress(HttpError):
    """409: the channel is being deleted. The API server would accept a write to it, and then drop it."""

    def __init__(self, channel: Object) -> None:
        super().__init__(
            409,
            "The channel of this instance is still being removed. Try again later, or send 'Prefer: wait=60'.",
            Retry_After="5",
        )
        self.channel = channel


class SealingKeyCache:
    """The operator's public sealing key, read from its ConfigMap. A read takes at most `seconds`.

    `watched` are the namespaces that the operator watches; None if they are not known.
    """

    def __init__(self, api: KubeClient, namespace: str, seconds: float) -> None:
        self.watched: tuple[str, ...] | None = None
        self._api = api
        self._namespace = namespace
        self._key: PublicKey | None = None
        self._read_at = 0.0
        self._reads: SingleFlight[str, PublicKey] = SingleFlight(seconds)

    async def get(self, max_age: float = _KEY_SECONDS) -> PublicKey:
        """Return the key as it was at most `max_age` seconds ago. Raises `HttpError` (503) without a valid key."""
        if self._key is None or asyncio.get_running_loop().time() - self._read_at > max_age:
            return await self._reads.run("", self._read)
        return self._key

    async def _read(self) -> PublicKey:
        try:
            published = await self._api.request("GET", core_path(self._namespace, "configmaps", PUBLIC_KEY_CONFIGMAP))
            self._key = PublicKey.decode(published["data"][PUBLIC_KEY])
            watched = published["data"].get(NAMESPACES)
            self.watched = None if watched is None else tuple(watched.split())
        except NotFound:
            raise HttpError(503, "The operator has not published its sealing key yet.", Retry_After="5") from None
        except (KeyError, TypeError, ValueError):
            log.error(  # noqa: TRY400
                "cannot read sealing key, restart the operator to publish it again",
                namespace=self._namespace,
                name=PUBLIC_KEY_CONFIGMAP,
            )
            raise HttpError(503, "The operator's sealing key is invalid.", Retry_After="30") from None
        self._read_at = asyncio.get_running_loop().time()
        return self._key


class Channels:
    """The SmsChannels of one namespace; `name` is an instance ID."""

    def __init__(self, api: KubeClient, namespace: str, sealing_key: SealingKeyCache) -> None:
        self._api = api
        self.namespace = namespace
        self._sealing_key = sealing_key

    async def read(self, name: str) -> Object | None:
        """Return the channel, or None if the instance has none."""
        try:
            return await self._api.request("GET", channels_path(self.namespace, name))
        except NotFound:
            return None

    async def apply(self, name: str, setup: Setup, disconnected: asyncio.Event) -> tuple[Object, bool]:
        """Create or change a channel. Return it as it is then, and whether it is new. Raises `HttpError` (409, 503).

        A conflict with another writer is retried, but not once the client is `disconnected`: the retry could overwrite
        a later request of the same client, to this or another replica.
        """
        key = await self._sealing_key.get()
        token = SecretStr(setup.auth_token.get_secret_value())
        sealed = key.seal(token, Binding(self.namespace, name, setup.account_sid))
        login = {"sid": setup.api_key_sid} if setup.api_key_sid else {}
        spec = {
            "accountSid": setup.account_sid,
            "phoneNumber": setup.phone_number,
            "credentials": {**login, "sealed": sealed},
        }
        for attempt in range(_ATTEMPTS):
            if attempt and disconnected.is_set():
                break
            current = await self.read(name)
            if current is not None:
                if is_being_deleted(current):
                    raise RemovalInProgress(current)
                self._check_ownership(current)
            try:
                return await self._apply(name, spec, current), current is None
            except Conflict:
                await _back_off(attempt)
            except KubernetesRefused as error:
                # With resourceVersion "0" the API server answers 422 if another client created the channel meanwhile.
                created_meanwhile = current is None and error.status == 422 and await self.read(name) is not None
                if not created_meanwhile:
                    raise
        raise _write_conflict()

    async def _apply(self, name: str, spec: Object, current: Object | None) -> Object:
        if current is None:
            precondition = {"resourceVersion": "0"}
        else:
            meta = current["metadata"]
            precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        # A field that an apply leaves out is removed, so every apply has the label and the finalizer. The operator
        # removes the finalizer only from channels that are being deleted, and those are never applied.
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": name, "labels": REST_LABELS, "finalizers": [FINALIZER], **precondition},
            "spec": spec,
        }
        return await self._api.request(
            "PATCH",
            channels_path(self.namespace, name),
            body,
            params={"fieldManager": REST_MANAGER},
            content_type=APPLY_PATCH,
        )

    async def delete(self, name: str, disconnected: asyncio.Event) -> Object | None:
        """Delete a channel. Return it while finalizers keep it; None if it is gone. Raises `HttpError` (409).

        Conflicts are retried as in `apply`.
        """
        uid = None
        for attempt in range(_ATTEMPTS):
            if attempt and disconnected.is_set():
                break
            current = await self.read(name)
            # A successor with another uid was created after this request and is not deleted by it.
            if current is None or uid not in {None, current["metadata"]["uid"]}:
                return None
            if is_being_deleted(current):
                return current
            self._check_ownership(current)
            uid = current["metadata"]["uid"]
            precondition = {"uid": uid, "resourceVersion": current["metadata"]["resourceVersion"]}
            options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": precondition}
            try:
                await self._api.request("DELETE", channels_path(self.namespace, name), options)
            except NotFound:
                return None
            except Conflict:
                await _back_off(attempt)
            else:
                return current
        raise _write_conflict()

    def _check_ownership(self, channel: Object) -> None:
        """Raise `HttpError` (409) unless REST owns the channel."""
        if not owned_by_rest(channel):
            name, names = channel["metadata"]["name"], ", ".join(other_owners(channel)) or "an unknown field manager"
            raise HttpError(
                409,
                f"This channel is managed in Kubernetes, by {names}: change or delete it there. An administrator can"
                f" hand it over to this API: kubectl sms adopt {name} --for rest -n {self.namespace}",
            )


async def _back_off(attempt: int) -> None:
    await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311


def _write_conflict() -> HttpError:
    return HttpError(409, "Other clients are changing the channel at the same time. Try again.", Retry_After="1")
