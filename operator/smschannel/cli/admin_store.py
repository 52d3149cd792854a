"""What an administrator's commands ask of Kubernetes beyond what the operator itself does."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import NamedTuple

from smschannel.api.errors import KeyringLost, NoKindMatch, NotFound
from smschannel.api.kube_client import Object
from smschannel.api.names import KEYRING_SECRET, OPERATOR, SETTINGS_CONFIGMAP, channels_path
from smschannel.api.resource import FINALIZER, GROUP, PLURAL, VERSION
from smschannel.api.sealing import Keyring
from smschannel.kube_store import CHANNEL_ANNOTATION, RECORDS, KubeStore


class Kept(NamedTuple):
    """A record as it can be seen without opening it."""

    uid: str
    namespace: str
    name: str


class AdminStore(KubeStore):
    """With the rights of whoever runs the command. Raises what `KubeClient` raises."""

    @property
    def namespace(self) -> str:
        """The operator's."""
        return self._own

    async def read_keyring(self) -> Keyring:
        """Never makes one. Raises `KeyringLost` where there is none."""
        secret = await self.secret(self._own, KEYRING_SECRET)
        if secret is None:
            raise KeyringLost(
                f"there is no Secret {self._own}/{KEYRING_SECRET}: it was lost, or no operator has started there yet"
            )
        return self._loaded(secret)

    async def published_settings(self) -> dict[str, str]:
        """What the operator published at its start, by its environment variables' names; empty if it never did."""
        path = f"/api/v1/namespaces/{self._own}/configmaps/{SETTINGS_CONFIGMAP}"
        try:
            return dict((await self._api.request("GET", path)).get("data") or {})
        except NotFound:
            return {}

    async def kept(self) -> AsyncIterator[Kept]:
        """All records, also those that no key opens; each can be loaded and dropped from then on."""
        path = f"/api/v1/namespaces/{self._own}/secrets"
        async for secret in self._api.pages(path, RECORDS, metadata_only=True):
            meta = secret["metadata"]
            self._versions.setdefault(meta["name"], "")
            namespace, _, name = (meta.get("annotations") or {}).get(CHANNEL_ANNOTATION, "").partition("/")
            yield Kept(meta["name"], namespace, name)

    async def all_channels(self, namespace: str | None) -> AsyncIterator[Object]:
        """Of one namespace, or of all; none where the CRD is not there."""
        with contextlib.suppress(NoKindMatch):
            async for body in self._api.pages(_channels(namespace)):
                yield body

    async def taken_again(self, uids: Collection[str], namespace: str | None, seconds: int) -> str | None:
        """The first of these channels that gets its finalizer back within `seconds`: an operator is at work."""
        with contextlib.suppress(NoKindMatch):  # it was deleted meanwhile, and nobody takes anything again
            async for event in self._api.watch(_channels(namespace), {"timeoutSeconds": str(seconds)}):
                meta = event["object"]["metadata"]
                if meta.get("uid") in uids and FINALIZER in meta.get("finalizers", ()):
                    return f"{meta['namespace']}/{meta['name']}"
        return None

    async def operators(self) -> list[str]:
        """What runs as the operator's ServiceAccount, or is going to; as kubectl names it."""
        found = []
        async for pod in self._api.pages(f"/api/v1/namespaces/{self._own}/pods"):
            ended = (pod.get("status") or {}).get("phase") in {"Succeeded", "Failed"}
            if pod["spec"].get("serviceAccountName") == OPERATOR and not ended:
                found.append(f"pod/{pod['metadata']['name']}")
        with contextlib.suppress(NotFound):
            path = f"/apis/apps/v1/namespaces/{self._own}/deployments/{OPERATOR}"
            if (await self._api.request("GET", path))["spec"].get("replicas", 1):
                found.append(f"deployment/{OPERATOR}")
        return found


def _channels(namespace: str | None) -> str:
    return channels_path(namespace) if namespace else f"/apis/{GROUP}/{VERSION}/{PLURAL}"
