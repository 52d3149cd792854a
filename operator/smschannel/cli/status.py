"""`kubectl sms status`: a channel, who receives its messages, and what to do; or a list of channels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from smschannel.api.names import channels_path
from smschannel.api.resource import GROUP
from smschannel.cli import channel_text
from smschannel.cli.channels import DENIED, changes, read_around, read_channel
from smschannel.cli.options import INSTANCE, channel_namespace, cluster, cluster_options, instance_options
from smschannel.cli.output import columns, encoded

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient

_KIND = f"smschannel.{GROUP}"


@click.command()
@click.argument("instance", type=INSTANCE, required=False)
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="List the channels of all namespaces.")
@click.option("-w", "--watch", "follow", is_flag=True, help="Print it again at every change, until Ctrl-C.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "wide", "json", "yaml", "name"]),
    default="text",
    show_default=True,
    help="wide: a table with more columns.",
)
@instance_options
@cluster_options
def status(
    instance: str | None,
    everywhere: bool,
    follow: bool,
    output: str,
    namespace: str | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Show the channel of INSTANCE: who receives its messages, what is wrong, and what to do about it.

    Without INSTANCE it lists the channels of the namespace. It shows what the operator saw at its last check; a star
    beside READY means that the newest change was not checked yet. It needs the right to get and list SmsChannels;
    what else may not be read is named, and never guessed.

    \b
    One channel, with its conditions, Events and the key that sealed its token:
      kubectl sms status 497f6eca-6276-4993-bfeb-53cbbbba6f08

    \b
    All channels of the cluster, and one as it changes:
      kubectl sms status -A
      kubectl sms status 497f6eca-6276-4993-bfeb-53cbbbba6f08 --watch
    """
    if everywhere and (instance or namespace):
        raise click.UsageError("--all-namespaces lists all channels: leave out INSTANCE and --namespace")
    where = "" if everywhere else channel_namespace(namespace, kubeconfig, context)

    async def run() -> None:
        async with cluster(kubeconfig, context, denied=DENIED) as api:
            show = _One(api, output, operator_namespace) if instance else _List(output)
            if follow:
                await _follow(api, show, where, instance)
            elif instance:
                click.echo(await show.channel(await read_channel(api, where, instance)))
            else:
                _list([each async for each in api.pages(channels_path(where))], where, output)

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None


def _list(channels: list[dict[str, Any]], where: str, output: str) -> None:
    channels.sort(key=lambda each: (each["metadata"]["namespace"], each["metadata"]["name"]))
    if output == "name":
        for each in channels:
            click.echo(_name(each))
    elif output in {"json", "yaml"}:
        click.echo(encoded({"items": [channel_text.row_document(each) for each in channels]}, output))
    elif not channels:
        click.echo(f"No channels in namespace {where}." if where else "No channels in any namespace.", err=True)
    else:
        for line in _table(channels, wide=output == "wide"):
            click.echo(line)


def _table(channels: list[dict[str, Any]], *, wide: bool, heading: bool = True) -> Iterator[str]:
    now = datetime.now(UTC)
    rows = [channel_text.row(channel_text.row_document(each), now, wide=wide) for each in channels]
    table = list(columns([*channel_text.HEADER, *(channel_text.WIDE if wide else ())], rows))
    yield from table if heading else table[1:]


def _name(channel: Mapping[str, Any]) -> str:
    return f"{_KIND}/{channel['metadata']['name']}"


class _One:
    """Prints a single channel in full."""

    def __init__(self, api: KubeClient, output: str, operator_namespace: str) -> None:
        self._api, self._output, self._operator_namespace = api, output, operator_namespace

    async def channel(self, channel: dict[str, Any]) -> str:
        if self._output == "name":
            return _name(channel)
        if self._output == "wide":
            return "\n".join(_table([channel], wide=True))
        found = channel_text.document(await read_around(self._api, channel, self._operator_namespace))
        if self._output == "text":
            return "\n".join(channel_text.lines(found, datetime.now(UTC)))
        return encoded(found, self._output)


class _List:
    """Prints a line for each change of one of several channels."""

    def __init__(self, output: str) -> None:
        self._output, self._heading = output, True

    async def channel(self, channel: dict[str, Any]) -> str:
        if self._output == "name":
            return _name(channel)
        if self._output in {"json", "yaml"}:
            return encoded(channel_text.row_document(channel), self._output)
        lines = _table([channel], wide=self._output == "wide", heading=self._heading)
        self._heading = False
        return "\n".join(lines)


async def _follow(api: KubeClient, show: _One | _List, where: str, instance: str | None) -> None:
    """Print channels at every change; end when the one that is followed is deleted."""
    if instance:
        await read_channel(api, where, instance)  # its error says what to do
    async for kind, channel in changes(api, where, instance or ""):
        if kind != "DELETED":
            click.echo(await show.channel(channel))
            continue
        meta = channel["metadata"]
        click.echo(f"SmsChannel {meta['namespace']}/{meta['name']} is gone.", err=True)
        if instance:
            return
