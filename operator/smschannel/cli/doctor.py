"""`kubectl sms doctor`: is the installation well, and if not, what is to be done?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from importlib.metadata import version
from typing import TYPE_CHECKING

import click

from smschannel.api.errors import ChannelError, KubernetesRefused, NoKindMatch, NotConnected, NotFound
from smschannel.api.names import (
    KEYRING_SECRET,
    LEASE,
    NAMESPACES,
    PACKAGE,
    PUBLIC_KEY,
    PUBLIC_KEY_CONFIGMAP,
    RELEASE,
    SETTINGS_CONFIGMAP,
    channels_path,
    core_path,
    leases_path,
)
from smschannel.api.ownership import REST_MANAGER
from smschannel.cli import findings
from smschannel.cli.findings import Finding, Level, Right
from smschannel.cli.options import cluster, cluster_options
from smschannel.cli.output import encoded, printable

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient, Object
    from smschannel.settings import Settings

_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_REVIEWS = 8  # at once: a busy API server answers more of them too late
_RENEWALS = 3  # of this part of the lease at least one must be seen: the leader renews it six times per duration


@click.command()
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@cluster_options
def doctor(output: str, kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """Check the installation: each line is good, or says what to do.

    It checks the CRD, admission policies, the operator's rights, leader, keyring, published key, versions, pods,
    quotas, channels, and whether this machine reaches the webhook's host and Twilio. It changes nothing, and sends no
    credentials to anybody but the API server. It takes some seconds, since it waits for the leader to renew its Lease.

    It ends with 0 if all is good, 1 if something is bad, and 3 if nothing bad was seen, but not everything could be
    read: run it with the rights of an administrator then.

    \b
      kubectl sms doctor
      kubectl sms doctor -o json
    """

    async def run() -> list[Finding]:
        async with cluster(kubeconfig, context) as api:
            return await examine(api, operator_namespace)

    found = asyncio.run(run())
    if output == "json":
        click.echo(encoded({"findings": [each._asdict() for each in found]}, "json"))
    else:
        for each in found:
            click.echo(f"{each.level:<8}  {each.check:<10}  {printable(each.text)}")
            if each.remedy and each.level is not Level.GOOD:
                click.echo(f"{'':<22}What to do: {printable(each.remedy)}")
    raise click.exceptions.Exit(findings.exit_status(found))


async def examine(api: KubeClient, operator_namespace: str) -> list[Finding]:
    """Make all checks at the same time; return what they found, in a fixed order. Raises errors of the connection."""
    await api.request("GET", "/version")  # no check is worth anything if this fails
    read = _Reader(api, operator_namespace)
    checks: dict[str, Callable[[_Reader], Awaitable[Iterable[Finding]]]] = {
        "CRD": _crd,
        "Policies": _policies,
        "RBAC": _rights,
        "Leader": _leader,
        "Pods": _pods,
        "Versions": _versions,
        "Public key": _published,
        "Keyring": _keyring,
        "Quotas": _quotas,
        "Channels": _channels,
        "Webhook": _webhook,
        "Twilio": _twilio,
    }
    try:
        # An error of one check ends the others, before the connection is closed.
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(_checked(name, check(read))) for name, check in checks.items()]
    except* (NotConnected, KubernetesRefused) as errors:
        raise errors.exceptions[0] from None
    return [each for task in running for each in task.result()]


async def _checked(name: str, check: Awaitable[Iterable[Finding]]) -> list[Finding]:
    """Return what a check found; what could not be read is a finding too."""
    try:
        return list(await check)
    except (NotConnected, KubernetesRefused) as error:
        if isinstance(error, NotConnected) or error.status == 401:
            raise
        return [findings.not_read(name, f"{error}", forbidden=error.status == 403)]
    except (ChannelError, click.ClickException) as error:
        return [findings.not_read(name, error.message if isinstance(error, click.ClickException) else str(error))]


class _Reader:
    """What the checks read, with the rights of the user. Raises what `KubeClient` raises."""

    def __init__(self, api: KubeClient, operator_namespace: str) -> None:
        self.api = api
        self.namespace = operator_namespace
        self._settings: asyncio.Future[Settings] | None = None
        self._operators: asyncio.Future[list[str]] | None = None

    async def get(self, path: str) -> Object | None:
        """Return an object; None if it does not exist."""
        try:
            return await self.api.request("GET", path)
        except NotFound:
            return None

    async def data(self, configmap: str) -> dict[str, str] | None:
        found = await self.get(core_path(self.namespace, "configmaps", configmap))
        return None if found is None else dict(found.get("data") or {})

    async def watched(self) -> list[str]:
        """Return the namespaces that the operator publishes as watched; none if it has published none."""
        return ((await self.data(PUBLIC_KEY_CONFIGMAP)) or {}).get(NAMESPACES, "").split()

    async def operators(self) -> list[str]:
        """Return the names of the operators, which are read once."""
        from smschannel.cli.admin_store import operators

        if self._operators is None:
            self._operators = asyncio.ensure_future(operators(self.api, self.namespace))
        return await self._operators

    async def settings(self) -> Settings:
        """Return the operator's settings, which are read once. Raises `click.ClickException` if they are incomplete."""
        from smschannel.cli.admin_store import AdminStore
        from smschannel.cli.options import settings_of

        if self._settings is None:
            reading = settings_of(AdminStore(self.api, self.namespace), sends_logins=False)
            self._settings = asyncio.ensure_future(reading)
        return await self._settings


async def _crd(read: _Reader) -> Iterable[Finding]:
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{findings.CRD}"
    return [findings.crd(await read.get(path))]


async def _policies(read: _Reader) -> Iterable[Finding]:
    installed = [each async for each in read.api.pages(f"{_ADMISSION}/validatingadmissionpolicies")]
    bindings = [each async for each in read.api.pages(f"{_ADMISSION}/validatingadmissionpolicybindings")]
    return findings.policies(installed, bindings)


async def _rights(read: _Reader) -> Iterable[Finding]:
    places = {"everywhere": [""], "own": [read.namespace], "channels": await read.watched() or ["sms-channels"]}
    operators = await read.operators()
    questions = [
        (operator, right, verb, operator if name == LEASE else name, namespace)
        for operator in operators
        for right in findings.OPERATOR_RIGHTS
        for verb in right.verbs
        for name in right.names
        for namespace in places[right.where]
    ]
    few = asyncio.Semaphore(_REVIEWS)
    allowed = await asyncio.gather(*(_is_allowed(read, few, *each) for each in questions))
    granted: dict[str, bool] = {}
    for (operator, right, *asked), yes in zip(questions, allowed, strict=True):
        # In a namespace for channels one shard needs the rights; any other right is needed by each of them.
        what = _described(right, *asked)
        if len(operators) > 1 and right.where != "channels":
            what = f"{what} ({operator})"
        granted[what] = granted.get(what, False) or yes
    return [findings.rights([what for what, yes in granted.items() if not yes], len(granted))]


async def _is_allowed(
    read: _Reader, few: asyncio.Semaphore, operator: str, right: Right, verb: str, name: str, namespace: str
) -> bool:
    resource, _, subresource = right.resource.partition("/")
    asked = {"namespace": namespace, "verb": verb, "group": right.group, "resource": resource}
    asked |= {"subresource": subresource, "name": name}
    groups = ["system:authenticated", "system:serviceaccounts", f"system:serviceaccounts:{read.namespace}"]
    user = f"system:serviceaccount:{read.namespace}:{operator}"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "groups": groups, "resourceAttributes": asked},
    }
    async with few:
        answer = await read.api.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return (answer.get("status") or {}).get("allowed") is True


def _described(right: Right, verb: str, name: str, namespace: str) -> str:
    where = f"in namespace {namespace}" if namespace else "in all namespaces"
    return f"{verb} {f'{right.resource} {name}'.strip()} {where}"


async def _leader(read: _Reader) -> Iterable[Finding]:
    operators = await read.operators()
    return await asyncio.gather(*(_leader_of(read, each, is_only=len(operators) == 1) for each in operators))


async def _leader_of(read: _Reader, name: str, *, is_only: bool) -> Finding:
    lease = await read.get(f"{leases_path(read.namespace)}/{name}")
    spec, seconds = (lease or {}).get("spec") or {}, None
    if lease is not None and spec.get("holderIdentity"):
        seconds = await _renewed(read, name, lease, float(spec.get("leaseDurationSeconds") or 0) / _RENEWALS)
    return findings.leader(name, lease, renewed_within=seconds, is_only=is_only)


async def _renewed(read: _Reader, name: str, lease: Object, patience: float) -> float | None:
    """Return after how many seconds the Lease was renewed; None if it was not. No clock but this machine's counts."""
    began = time.monotonic()
    version = {"fieldSelector": f"metadata.name={name}", "resourceVersion": lease["metadata"]["resourceVersion"]}
    try:
        watch = read.api.watch(leases_path(read.namespace), version)
        async with asyncio.timeout(patience), aclosing(watch) as events:
            async for event in events:
                spec = (event.get("object") or {}).get("spec") or {}
                if event.get("type") == "MODIFIED" and spec.get("renewTime") != lease["spec"].get("renewTime"):
                    return time.monotonic() - began
    except TimeoutError:
        pass
    return None


async def _pods(read: _Reader) -> Iterable[Finding]:
    path = f"/apis/apps/v1/namespaces/{read.namespace}/deployments"
    names = (*await read.operators(), REST_MANAGER)
    return [findings.deployment(name, await read.get(f"{path}/{name}")) for name in names]


async def _versions(read: _Reader) -> Iterable[Finding]:
    return [findings.versions(version(PACKAGE), ((await read.data(SETTINGS_CONFIGMAP)) or {}).get(RELEASE))]


async def _published(read: _Reader) -> Iterable[Finding]:
    return [findings.published(await read.data(PUBLIC_KEY_CONFIGMAP))]


async def _keyring(read: _Reader) -> Iterable[Finding]:
    from smschannel.api.errors import KeyringLost
    from smschannel.cli.admin_store import AdminStore

    if await read.get(core_path(read.namespace, "secrets", KEYRING_SECRET)) is None:
        return [findings.keyring(False, has_published=None)]
    try:
        ring = await AdminStore(read.api, read.namespace).read_keyring()
    except KeyringLost as error:
        return [Finding("Keyring", Level.BAD, f"{error}.", "See 'Back up the keyring' in docs/operations.md.")]
    key = ((await read.data(PUBLIC_KEY_CONFIGMAP)) or {}).get(PUBLIC_KEY)
    return [findings.keyring(True, has_published=ring.has(key) if key else None)]


async def _quotas(read: _Reader) -> Iterable[Finding]:
    found: list[Object] = []
    for namespace in dict.fromkeys([read.namespace, *await read.watched()]):
        found += [each async for each in read.api.pages(core_path(namespace, "resourcequotas"))]
    return findings.quotas(found)


async def _channels(read: _Reader) -> Iterable[Finding]:
    from smschannel.cli.channel_text import summary

    try:
        found = [summary(each) async for each in read.api.pages(channels_path(""))]
    except NoKindMatch:
        return [findings.not_read("Channels", "There is no CRD.")]
    return findings.channels(found, await read.watched())


async def _webhook(read: _Reader) -> Iterable[Finding]:
    from smschannel.cli.http import origin_of, probe

    settings = await read.settings()
    origin = origin_of(settings.webhook_url_template)
    return [findings.webhook(origin, await probe(f"{origin}/", settings.ca_bundle))]


async def _twilio(read: _Reader) -> Iterable[Finding]:
    from smschannel.cli.http import probe

    settings = await read.settings()
    if foreign := settings.foreign_origin(await read.data(SETTINGS_CONFIGMAP) or {}):
        return [findings.not_read("Twilio", f"The operator calls it elsewhere: set {foreign[0]} here as it is there.")]
    origins = dict.fromkeys((settings.api_origin, settings.messaging_origin))
    return [findings.twilio(each, await probe(f"{each}/", settings.ca_bundle)) for each in origins]
