"""What an administrator's commands ask of Kubernetes beyond what the operator itself does."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from smschannel.api.errors import KeyringLost, KubernetesRefused, NoKindMatch, NotFound
from smschannel.api.kube_client import Object
from smschannel.api.names import KEYRING_SECRET, SETTINGS_CONFIGMAP, channels_path, core_path
from smschannel.api.sealing import Keyring
from smschannel.kube_store import KubeStore


class AdminStore(KubeStore):
    """A `KubeStore` with the rights of the user who runs the command. Raises what `KubeClient` raises."""

    async def read_keyring(self) -> Keyring:
        """Read the keyring, without creating one. Raises `KeyringLost` if there is none."""
        secret = await self.secret(self.namespace, KEYRING_SECRET)
        if secret is None:
            raise KeyringLost(
                f"there is no Secret {self.namespace}/{KEYRING_SECRET}: it was lost, or no operator has started there"
                " yet"
            )
        return self._loaded(secret)

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
