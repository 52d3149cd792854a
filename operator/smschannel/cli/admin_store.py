"""What an administrator's commands ask of Kubernetes beyond what the operator itself does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from smschannel.api.errors import KeyringLost, KubernetesRefused, NoKindMatch, NotFound
from smschannel.api.kube_client import APPLY_PATCH, KubeClient, Object
from smschannel.api.names import (
    LEASE,
    PUBLIC_KEY,
    PUBLIC_KEY_CONFIGMAP,
    SETTINGS_CONFIGMAP,
    channels_path,
    core_path,
    is_lease,
    leases_path,
)
from smschannel.api.ownership import REST_FIELDS, REST_LABELS, REST_MANAGER
from smschannel.api.resource import API_VERSION, FINALIZER, KIND
from smschannel.api.sealing import Keyring, PublicKey
from smschannel.core.record import RECORD_LABEL
from smschannel.kube_store import KubeStore

KEYRING_DIR = "SMSCHANNEL_KEYRING_DIR"


async def operators(api: KubeClient, namespace: str) -> list[str]:
    """Return the names of the operators of a namespace: one, or one for each shard.

    Their Leases, Deployments and ServiceAccounts are called so. A shard that never started has no Lease, and one that
    was removed no Deployment.
    """
    names = {each["metadata"]["name"] async for each in api.pages(leases_path(namespace), metadata_only=True)}
    with contextlib.suppress(KubernetesRefused):  # whoever detaches may lack the right
        deployments = api.pages(f"/apis/apps/v1/namespaces/{namespace}/deployments", metadata_only=True)
        names |= {each["metadata"]["name"] async for each in deployments}
    return sorted(filter(is_lease, names)) or [LEASE]


class AdminStore(KubeStore):
    """A `KubeStore` with the rights of the user who runs the command. Raises what `KubeClient` raises.

    It reads the keyring from files if this environment names their directory, as the operator's pod does.
    """

    def __init__(self, api: KubeClient, operator_namespace: str) -> None:
        directory = os.environ.get(KEYRING_DIR)
        super().__init__(api, operator_namespace, Path(directory) if directory else None)

    async def read_keyring(self) -> Keyring:
        """Read the keyring, without creating one. Raises `KeyringLost` if there is none."""
        stored = await self.keys.store.read()
        if stored is None:
            content = await self.published_settings()
            if elsewhere := content.get(KEYRING_DIR):
                raise KeyringLost(
                    f"the operator reads its keys from files in {elsewhere}: run this command in its pod, or where the"
                    f" same files are, with {KEYRING_DIR} set"
                )
            raise KeyringLost(f"there is no {self.keys.store.place}: it was lost, or no operator has started there yet")
        self.keys.use(stored)
        return self.keys.keyring

    async def published_settings(self) -> dict[str, str]:
        """Return the settings that the operator published, by environment variable; empty if there are none."""
        try:
            published = await self._api.request("GET", core_path(self.namespace, "configmaps", SETTINGS_CONFIGMAP))
        except NotFound:
            return {}
        return dict(published.get("data") or {})

    async def is_namespace_absent(self, name: str) -> bool:
        """Return whether the cluster has no namespace of this name; False, too, for users who may not ask."""
        try:
            await self._api.request("GET", f"/api/v1/namespaces/{name}")
        except NotFound:
            return True
        except KubernetesRefused:
            pass
        return False

    async def load_claims(self) -> None:
        """Bring `claims` up to date from a list of all records."""
        before = tuple(self.claims)
        self.claims.update_from_list([record async for record in self.records()], before)

    async def all_channels(self, namespace: str | None) -> AsyncIterator[Object]:
        """Return the channels of one namespace, or of all; none if the CRD is not installed."""
        with contextlib.suppress(NoKindMatch):
            async for body in self._api.pages(channels_path(namespace or "")):
                yield body

    async def sealed_records(self) -> AsyncIterator[tuple[str, str]]:
        """Yield the name and the sealed contents (base64) of each record, written-off ones included."""
        async for secret in self._api.pages(core_path(self.namespace, "secrets"), {"labelSelector": RECORD_LABEL}):
            yield secret["metadata"]["name"], (secret.get("data") or {}).get("record") or ""

    async def published_key(self) -> PublicKey | None:
        """Return the public key that seals; None if none is published."""
        try:
            path = core_path(self.namespace, "configmaps", PUBLIC_KEY_CONFIGMAP)
            return PublicKey.decode((await self._api.request("GET", path))["data"][PUBLIC_KEY])
        except (NotFound, KeyError, TypeError, ValueError):
            return None

    async def apply_as_rest(self, body: Object) -> None:
        """Apply the three fields that REST owns again, with `spec.credentials` as they are in `body`.

        Raises `Conflict` if the channel was changed since it was read, or if somebody else owns one of the fields.
        """
        meta = body["metadata"]
        path = channels_path(meta["namespace"], meta["name"])
        own = {name: meta[name] for name in ("name", "uid", "resourceVersion")}
        applied = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {**own, "labels": REST_LABELS, "finalizers": [FINALIZER]},
            "spec": {name: body["spec"][name] for name in REST_FIELDS},
        }
        parameters = {"fieldManager": REST_MANAGER}
        await self._api.request("PATCH", path, applied, params=parameters, content_type=APPLY_PATCH)
