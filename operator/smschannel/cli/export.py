"""`kubectl sms export`: the manifest of a channel, for Git."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import click

from smschannel.api.ownership import owned_by_rest
from smschannel.api.resource import KIND
from smschannel.cli.channels import DENIED, read_channel
from smschannel.cli.manifests import manifest_of
from smschannel.cli.options import INSTANCE, channel_namespace, cluster, instance_options, kubeconfig_options
from smschannel.cli.output import encoded


@click.command("export")
@click.argument("instance", type=INSTANCE)
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@instance_options
@kubeconfig_options
def export(instance: str, output: str, namespace: str | None, kubeconfig: str | None, context: str | None) -> None:
    """Print the channel of INSTANCE as a manifest that is safe in Git.

    It prints a channel that the REST API or anybody else made, without status and defaults, and changes nothing. The
    token stays sealed, or in the Secret that the channel names, which is not exported. To hand the channel over to Git,
    so that REST no longer changes it, use kubectl sms adopt.

    \b
      kubectl sms export 497f6eca-6276-4993-bfeb-53cbbbba6f08 > channel.yaml
    """
    where = channel_namespace(namespace, kubeconfig, context)

    async def run() -> None:
        async with cluster(kubeconfig, context, denied=DENIED) as api:
            channel = await read_channel(api, where, instance)
            for note in _notes(channel):
                click.echo(note, err=True)
            click.echo(encoded(manifest_of(channel), output))

    asyncio.run(run())


def _notes(channel: Mapping[str, Any]) -> list[str]:
    """Return what somebody must know who applies the manifest."""
    notes = []
    meta, spec = channel["metadata"], channel["spec"]
    named = f"{KIND} {meta['namespace']}/{meta['name']}"
    if owned_by_rest(channel):
        notes.append(
            f"{named} belongs to the REST API. To hand it over to Git: kubectl sms adopt {meta['name']} -n"
            f" {meta['namespace']} --for git --force"
        )
    if reference := spec["credentials"].get("secretKeyRef"):
        notes.append(f"The token is in Secret {meta['namespace']}/{reference['name']}, which is not part of this.")
    if "deletionTimestamp" in meta:
        notes.append(f"{named} is being deleted.")
    return notes
