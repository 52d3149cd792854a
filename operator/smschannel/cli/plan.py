"""`kubectl sms plan`: what the operator would do, without doing it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import click
from pydantic import ValidationError

from smschannel.api.errors import TwilioUnavailable
from smschannel.api.resource import API_VERSION, KIND, SmsChannel
from smschannel.cli.manifests import Manifest, read_channels
from smschannel.cli.options import INSTANCE, NAMESPACE, cluster, cluster_options, context_namespace, settings_of

if TYPE_CHECKING:
    from smschannel.cli.admin_store import AdminStore
    from smschannel.cli.plan_text import Outlook
    from smschannel.core.record import Key
    from smschannel.settings import Settings

_CHANGES = 2


class _Plan(click.Command):
    """A command whose usage errors exit with 1, since 2 means that there are changes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.show()
            raise click.exceptions.Exit(1) from None


@click.command(cls=_Plan)
@click.argument("instance", type=INSTANCE, required=False)
@click.option("-f", "--filename", "file", type=click.File("rb"), help="A manifest, not applied yet; - to read it.")
@click.option("--delete", is_flag=True, help="What deleting the channel would do.")
@click.option("-n", "--namespace", type=NAMESPACE, help="The channel's; the context's, else the operator's by default.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@cluster_options
@click.pass_context
def plan(
    ctx: click.Context,
    instance: str | None,
    file: BinaryIO | None,
    delete: bool,
    namespace: str | None,
    output: str,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Show what the operator would do about INSTANCE, without doing it.

    It reads the channel, the operator's records of it and Twilio, and decides as the operator does; it writes nothing.
    It needs the operator's keyring and records: run it with the rights of an administrator, or in the operator's pod.

    Ends with 0 if there is nothing to do, 2 if there are changes, and 1 if the desired state cannot be reached, or
    something could not be read.

    \b
    What is about to happen, or why nothing does:
      kubectl sms plan 497f6eca-6276-4993-bfeb-53cbbbba6f08

    \b
    Before it is applied, and before it is deleted:
      kubectl sms plan -f channel.yaml
      kubectl sms plan 497f6eca-6276-4993-bfeb-53cbbbba6f08 --delete

    \b
    Without the rights of an administrator:
      kubectl -n sms-operator exec deploy/sms-channel-operator -- kubectl-sms plan 497f6eca-...
    """
    if file and delete:
        raise click.ClickException("--delete is about a channel that is there: name the INSTANCE, without -f")
    manifest = _manifest(file, instance) if file else {}
    meta = manifest.get("metadata", {})
    name, written = instance or meta.get("name"), meta.get("namespace")
    if not name:
        raise click.ClickException("name the INSTANCE, or give a manifest: -f FILE")
    if namespace and written and namespace != written:
        raise click.ClickException(f"the manifest is for namespace {written}, and not for {namespace}")
    namespace = namespace or written or context_namespace(kubeconfig, context)
    asked = _Asked(name, namespace, manifest, delete)
    key, outlooks = asyncio.run(_read(asked, kubeconfig, context, operator_namespace))
    click.echo(json.dumps(_document(key, outlooks), indent=2) if output == "json" else "\n".join(_lines(key, outlooks)))
    stuck, changes = any(outlook.stuck for outlook in outlooks), any(outlook.plan.changes for outlook in outlooks)
    ctx.exit(1 if stuck else _CHANGES if changes else 0)


class _Asked(NamedTuple):
    """What to plan for; a namespace of None is the operator's first one."""

    instance: str
    namespace: str | None
    manifest: Manifest
    delete: bool


def _lines(key: Key, outlooks: list[Outlook]) -> Iterator[str]:
    changes = [f"  would {text}" for outlook in outlooks for _, text in outlook.changes()]
    nothing = "would change nothing" if any(outlook.stuck for outlook in outlooks) else "nothing to do"
    count = nothing if not changes else "1 change" if len(changes) == 1 else f"{len(changes)} changes"
    yield f"SmsChannel {key.namespace}/{key.name}: {count}"
    yield from changes
    yield from (f"  {text}" for outlook in outlooks for _, text in outlook.not_restored())
    for outlook in outlooks:
        if outlook.verdict:
            yield ("Then: " if changes and not outlook.stuck else "") + outlook.verdict


def _document(key: Key, outlooks: list[Outlook]) -> dict[str, Any]:
    """Return the JSON document. The verdict is the channel's; changes about deleted channels of the name come first."""
    documents = [outlook.document() for outlook in outlooks]
    lists = {name: [each for document in documents for each in document[name]] for name in ("changes", "notRestored")}
    return {"namespace": key.namespace, "name": key.name, **documents[-1], **lists}


def _manifest(file: BinaryIO, instance: str | None) -> Manifest:
    """Return the only SmsChannel of the file, or the one that is named."""
    source = getattr(file, "name", "<stdin>")
    named = read_channels(source, file.read())
    found = [each for name, each in named if instance in {None, name}]
    if len(found) > 1:
        names = ", ".join(name for name, _ in named)
        raise click.ClickException(f"{source} holds {len(found)} of them: name one of {names}")
    if not found:
        which = f" that is named {instance}" if instance else ""
        raise click.ClickException(f"{source} holds no {KIND} of {API_VERSION}{which}")
    return found[0]


async def _read(
    asked: _Asked, kubeconfig: str | None, context: str | None, operator_namespace: str
) -> tuple[Key, list[Outlook]]:
    denied = (
        "'plan' reads the operator's keyring and records, as an administrator may; without that right, in the"
        f" operator's own pod: kubectl -n {operator_namespace} exec deploy/sms-channel-operator -- kubectl-sms plan ..."
    )
    async with cluster(kubeconfig, context, denied=denied) as api:
        from smschannel.cli.admin_store import AdminStore
        from smschannel.wiring import twilio_client

        kube = AdminStore(api, operator_namespace)
        settings = await settings_of(kube)
        async with twilio_client(settings, lambda seconds: False) as twilio:  # it never writes
            try:
                return await _preview(asked, kube, twilio, settings)
            except TwilioUnavailable as error:
                raise click.ClickException(f"{error} The number cannot be read now: try again.") from None


async def _preview(asked: _Asked, kube: AdminStore, twilio: Any, settings: Settings) -> tuple[Key, list[Outlook]]:
    import time

    from smschannel.channel_cache import ChannelCache
    from smschannel.cli.plan_text import Outlook
    from smschannel.core.record import Key
    from smschannel.orphans import Orphans
    from smschannel.wiring import reconciler

    key = Key(asked.namespace or settings.channel_namespaces[0], asked.instance)
    await kube.read_keyring()
    await kube.load_claims()
    channel = await _channel(asked, kube, key.namespace)
    if channel is None and not kube.claims.of(key):
        if await kube.is_namespace_absent(key.namespace):
            raise click.ClickException(f"There is no namespace {key.namespace}.")
        raise click.ClickException(
            f"There is no channel {key.name} in namespace {key.namespace}, nor a record of one. To see what a manifest"
            " would do before it is applied: -f FILE"
        )
    if channel and key.namespace not in settings.channel_namespaces:
        watched = ", ".join(settings.channel_namespaces)
        raise click.ClickException(f"The operator watches the namespaces {watched} only, not {key.namespace}.")
    channels, orphans = ChannelCache(kube.claims), Orphans(kube, time.monotonic)
    passes = await reconciler(settings, kube, twilio, channels, orphans).preview(key, channel)
    outlooks = [Outlook(observed, plan) for observed, plan in passes]
    if channel:
        outlooks[-1] = replace(outlooks[-1], policy=channel.spec.deletion_policy)
    return key, outlooks


async def _channel(asked: _Asked, kube: AdminStore, namespace: str) -> SmsChannel | None:
    """Return the channel as it is, as it would be with the manifest applied, or as if deleted."""
    body = await kube.channel(namespace, asked.instance)
    now = datetime.now(UTC)
    if asked.manifest:
        created = {"name": asked.instance, "namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": now}
        body = {"metadata": created, **(body or {}), "spec": asked.manifest.get("spec")}
    if body is None:
        return None
    try:
        channel = SmsChannel.model_validate(body)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise click.ClickException(f"This is not a valid {KIND}: {wrong}") from None
    return channel.as_deleted(now) if asked.delete and not channel.deleting else channel
