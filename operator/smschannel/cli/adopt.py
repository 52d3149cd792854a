"""`kubectl sms adopt`: hand a channel over to the REST API, or to Git or kubectl, without touching its number."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from smschannel.api.errors import Conflict
from smschannel.api.ownership import REST_FIELDS, REST_MANAGER, adopted_by, other_owners
from smschannel.cli.channels import read_channel
from smschannel.cli.manifests import manifest_of
from smschannel.cli.options import INSTANCE, channel_namespace, cluster, instance_options, kubeconfig_options
from smschannel.cli.output import encoded

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient, Object

_ATTEMPTS = 8  # the operator writes the status of a new channel several times, and each write may be a conflict
_MANAGER = re.compile(r"[!-~]{1,128}")


@click.command()
@click.argument("instance", type=INSTANCE)
@click.option(
    "--for",
    "owner",
    type=click.Choice(["rest", "git"]),
    required=True,
    help="rest: the REST API. git: Git, kubectl, or whatever applies manifests.",
)
@click.option(
    "--manager",
    help="With --for git: the field manager that will own the channel, such as argocd-controller or"
    " kustomize-controller (Flux). Default: kubectl.",
)
@click.option("--force", is_flag=True, help="Take the fields from their owners, which this command prints without it.")
@instance_options
@kubeconfig_options
def adopt(
    instance: str,
    owner: str,
    manager: str | None,
    force: bool,
    namespace: str | None,
    kubeconfig: str | None,
    context: str | None,
) -> None:
    """Hand the channel of INSTANCE over to the REST API, or to Git or kubectl.

    REST changes and deletes a channel only if it alone owns accountSid, phoneNumber and credentials; other fields of
    spec may belong to anybody. Whoever else owns one of the three makes REST answer 409. That is so for every channel
    that Git, kubectl or a restored backup made.

    The command changes who owns the three fields, and nothing else: no value, no generation, nothing at Twilio. The
    number keeps receiving messages. If somebody owns the fields, the command prints who, and stops; take them with
    --force once the former owner no longer writes the channel.

    \b
    Hand a channel over to REST. First take its manifest out of Git without deleting the channel:
    annotate it with argocd.argoproj.io/sync-options: Prune=false (Argo CD) or
    kustomize.toolkit.fluxcd.io/prune: disabled (Flux) before. Then:
      kubectl sms adopt 497f6eca-6276-4993-bfeb-53cbbbba6f08 --for rest
      kubectl sms adopt 497f6eca-6276-4993-bfeb-53cbbbba6f08 --for rest --force

    \b
    Hand a channel over to Git. Standard output is its manifest, in which the token is sealed:
      kubectl sms adopt 497f6eca-... --for git --manager argocd-controller --force > channel.yaml
    """
    if manager is not None and owner == "rest":
        raise click.UsageError(f"--manager is for --for git: that of the REST API is always {REST_MANAGER}")
    manager = REST_MANAGER if owner == "rest" else "kubectl" if manager is None else manager
    if not _MANAGER.fullmatch(manager):
        raise click.UsageError("--manager: a field manager has 1 to 128 printable characters and no spaces")
    if owner == "git" and manager == REST_MANAGER:
        raise click.UsageError(f"--manager: {REST_MANAGER} is the field manager of the REST API; use --for rest")
    namespace = channel_namespace(namespace, kubeconfig, context)
    channel = asyncio.run(_adopt(instance, namespace, manager, force, kubeconfig, context))
    if owner == "git":
        click.echo(encoded(manifest_of(channel), "yaml"))


async def _adopt(
    instance: str, namespace: str, manager: str, force: bool, kubeconfig: str | None, context: str | None
) -> Object:
    """Make `manager` the only owner of `REST_FIELDS`; return the channel. Raises `click.ClickException`."""
    from smschannel.api.names import channels_path

    denied = "You need the rights to get and patch SmsChannels there."
    async with cluster(kubeconfig, context, denied=denied) as api:
        path = channels_path(namespace, instance)
        for _ in range(_ATTEMPTS):
            channel = await read_channel(api, namespace, instance)
            if "deletionTimestamp" in channel["metadata"]:
                raise click.ClickException(f"SmsChannel {namespace}/{instance} is being removed.")
            owners = other_owners(channel, manager)
            if owners and not force:
                raise click.ClickException(_owned(f"{namespace}/{instance}", owners))
            try:
                channel = await _write(api, path, channel, manager)
            except Conflict:
                continue  # somebody else wrote the channel: its owners may be others now
            click.echo(_done(f"{namespace}/{instance}", manager, owners), err=True)
            return channel
    raise click.ClickException(f"SmsChannel {namespace}/{instance} keeps being changed by others. Try again.")


async def _write(api: KubeClient, path: str, channel: Object, manager: str) -> Object:
    from smschannel.api.kube_client import MERGE_PATCH

    meta = channel["metadata"]
    precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
    change = {"metadata": {**precondition, "managedFields": adopted_by(channel, manager, datetime.now(UTC))}}
    return await api.request("PATCH", path, change, content_type=MERGE_PATCH)


def _owned(channel: str, owners: dict[str, tuple[str, ...]]) -> str:
    lines = "\n".join(f"  {name}: {', '.join(fields)}" for name, fields in owners.items())
    return (
        f"SmsChannel {channel} has these owners:\n{lines}\nNothing was changed. See to it that they no longer write the"
        " channel, or they take it back; then repeat the command with --force."
    )


def _done(channel: str, manager: str, owners: dict[str, tuple[str, ...]]) -> str:
    before = f" It belonged to {', '.join(owners)}." if owners else ""
    return f"{', '.join(REST_FIELDS)} of SmsChannel {channel} belong to {manager} now.{before} No value was changed."
