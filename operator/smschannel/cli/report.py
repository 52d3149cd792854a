"""`kubectl sms report`: a support bundle without secrets."""

from __future__ import annotations

import asyncio
import io
import os
import platform
import tarfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smschannel.api.errors import ChannelError, KubernetesRefused, NotConnected
from smschannel.api.names import (
    FINGERPRINT,
    NAMESPACES,
    OPERATOR,
    PACKAGE,
    PUBLIC_KEY_CONFIGMAP,
    RELEASE,
    SETTINGS_CONFIGMAP,
    channels_path,
    core_path,
    is_lease,
    leases_path,
)
from smschannel.api.ownership import REST_MANAGER
from smschannel.cli.options import cluster, cluster_options

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient, Object
    from smschannel.cli.masking import Mask

_LOG_LINES = 2000
_PROGRAMS = f"app.kubernetes.io/part-of={OPERATOR}"


@click.command()
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write. Default: sms-report-TIME.tar.gz. An existing file is never overwritten.",
)
@cluster_options
def report(path: Path | None, kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """Write a support bundle without secrets: a tar.gz file, to be attached to a request for help.

    It has what kubectl sms doctor says, and settings, pods, channels, records, Events and logs, as far as you may read
    them. No token is in it, whether sealed or not, and no contents of Secrets; numbers and accounts have names such as
    number-1, the same one everywhere; URLs are cut after the host. Its README.txt says what each file has. Look through
    it before you send it.

    \b
      kubectl sms report
      tar xzf sms-report-*.tar.gz
    """
    target = path or Path(f"sms-report-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.tar.gz")

    async def run() -> dict[str, bytes]:
        async with cluster(kubeconfig, context) as api:
            return await _Collector(api, operator_namespace).collect()

    files = asyncio.run(run())
    _write(target, files)
    click.echo(f"Wrote {target}:")
    for name, content in files.items():
        click.echo(f"  {name:<24} {len(content):>9,} bytes")
    missing = files["not-read.txt"].decode().splitlines()
    if missing:
        click.echo(f"Could not be read, and is missing ({len(missing)}):", err=True)
        for each in missing:
            click.echo(f"  {each}", err=True)


class _Collector:
    """Reads what goes into the bundle, with the rights of the user. It asks for no contents of Secrets."""

    def __init__(self, api: KubeClient, operator_namespace: str) -> None:
        from smschannel.cli.masking import Mask

        self._api = api
        self._namespace = operator_namespace
        self._mask: Mask = Mask([operator_namespace, PACKAGE, OPERATOR, REST_MANAGER])
        self._not_read: list[str] = []

    async def collect(self) -> dict[str, bytes]:
        from smschannel.cli import bundle

        await self._api.request("GET", "/version")  # without a cluster there is nothing to report
        public = await self._data(PUBLIC_KEY_CONFIGMAP)
        self._mask.know(*_fingerprints(public))
        everywhere = await self._read("channels", self._list(channels_path("")))
        pods = await self._read("pods", self._list(core_path(self._namespace, "pods"), labelSelector=_PROGRAMS))
        parts: dict[str, Any] = {"channels": [bundle.channel(each, self._mask) for each in everywhere or ()]}
        parts["operator"] = await self._operator(public, pods or [])
        parts["records"] = [bundle.record(each["metadata"], self._mask) for each in await self._records()]
        namespaces = {self._namespace, *public.get(NAMESPACES, "").split()}
        parts["events"] = [bundle.event(each, self._mask) for each in await self._events(sorted(namespaces))]
        parts["versions"] = await self._versions()
        parts["doctor"] = await self._doctor()
        logs = await self._logs([each["metadata"]["name"] for each in pods or ()])
        return bundle.files(parts, logs, self._not_read, self._mask)

    async def _read(self, what: str, reading: Any) -> Any:
        """Return what was read; None if it could not be, which the bundle says."""
        try:
            return await reading
        except (NotConnected, KubernetesRefused) as error:
            if isinstance(error, NotConnected) or error.status == 401:
                raise
            self._not_read.append(f"{what}: {error}")
        except (ChannelError, click.ClickException) as error:
            self._not_read.append(f"{what}: {error}")
        return None

    async def _list(self, path: str, *, metadata_only: bool = False, **params: str) -> list[Object]:
        return [each async for each in self._api.pages(path, params, metadata_only=metadata_only)]

    async def _data(self, configmap: str) -> dict[str, str]:
        path = core_path(self._namespace, "configmaps", configmap)
        found = await self._read(f"ConfigMap {configmap}", self._api.request("GET", path))
        return dict((found or {}).get("data") or {})

    async def _operator(self, public: dict[str, str], pods: list[Object]) -> dict[str, Any]:
        from smschannel.cli import bundle

        deployments = f"/apis/apps/v1/namespaces/{self._namespace}/deployments"
        leases = await self._read("Leases", self._list(leases_path(self._namespace))) or []
        found = await self._read("Deployments", self._list(deployments, labelSelector=_PROGRAMS))
        return {
            "pods": [bundle.pod(each, self._mask) for each in pods],
            "deployments": [bundle.deployment(each, self._mask) for each in found or ()],
            "settings": self._mask.value(await self._data(SETTINGS_CONFIGMAP)),
            "publicKey": next(iter(_fingerprints(public)), None),
            "namespaces": self._mask.value(public.get(NAMESPACES, "").split()),
            "leaders": self._mask.value([_leader(each) for each in leases if is_lease(each["metadata"]["name"])]),
        }

    async def _records(self) -> list[Object]:
        from smschannel.core.record import RECORD_LABEL

        path = core_path(self._namespace, "secrets")
        return await self._read("records", self._list(path, metadata_only=True, labelSelector=RECORD_LABEL)) or []

    async def _events(self, namespaces: list[str]) -> list[Object]:
        found: list[Object] = []
        for namespace in namespaces:
            path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
            found += await self._read(f"Events of {namespace}", self._list(path)) or []
        return found

    async def _versions(self) -> dict[str, Any]:
        server = await self._read("version of the cluster", self._api.request("GET", "/version"))
        return {
            "kubectlSms": version(PACKAGE),
            "operator": self._mask.value((await self._data(SETTINGS_CONFIGMAP)).get(RELEASE)),
            "kubernetes": (server or {}).get("gitVersion"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        }

    async def _doctor(self) -> Any:
        from smschannel.cli.doctor import examine

        found = await self._read("doctor", examine(self._api, self._namespace))
        return [self._mask.value(each._asdict()) for each in found or ()]

    async def _logs(self, pods: list[str]) -> dict[str, str]:
        logs: dict[str, str] = {}
        for name in pods:
            path = core_path(self._namespace, "pods", f"{name}/log")
            text = await self._read(f"log of pod {name}", self._api.text(path, {"tailLines": str(_LOG_LINES)}))
            if text is not None:
                logs[name] = text
        return logs


def _fingerprints(public: dict[str, str]) -> list[str]:
    import re

    return [each for each in [public.get(FINGERPRINT, "")] if re.fullmatch("[0-9a-f]{16}", each)]


def _write(target: Path, files: dict[str, bytes]) -> None:
    """Write a tar.gz that only its owner may read. Raises `click.ClickException`, also if the file exists."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"sms-report/{name}")
            member.size, member.mode, member.mtime = len(content), 0o600, int(datetime.now(UTC).timestamp())
            archive.addfile(member, io.BytesIO(content))
    try:
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(buffer.getvalue())
    except OSError as error:
        raise click.ClickException(f"{target} cannot be written: {error.strerror}. Name another with -o.") from None


def _leader(lease: Object) -> dict[str, Any]:
    """Return of a Lease what the bundle has, with its name: each shard has one."""
    spec = lease.get("spec") or {}
    kept = ("holderIdentity", "renewTime", "acquireTime", "leaseTransitions")
    return {"name": lease["metadata"]["name"], **{name: spec.get(name) for name in kept}}
