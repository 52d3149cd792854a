"""`kubectl sms wait` and `kubectl sms check`: wait for what the operator does about one channel."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from smschannel.api.errors import NotFound
from smschannel.api.names import channels_path
from smschannel.api.resource import CHECK_NOW_ANNOTATION, KIND
from smschannel.cli import channel_text
from smschannel.cli.channels import DENIED, changes, read_around, read_channel
from smschannel.cli.options import (
    INSTANCE,
    channel_namespace,
    cluster,
    cluster_options,
    instance_options,
    timeout_option,
)

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient, Object

_MAY_PATCH = "You need the rights to get, list, watch and patch SmsChannels there."


@click.command()
@click.argument("instance", type=INSTANCE)
@click.option(
    "--for",
    "goal",
    type=click.Choice(["ready", "gone"]),
    default="ready",
    show_default=True,
    help="ready: it works as its newest change says. gone: it was deleted, and its number was restored.",
)
@timeout_option(120)
@instance_options
@cluster_options
def wait(
    instance: str,
    goal: str,
    timeout: int,
    namespace: str | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Wait until the channel of INSTANCE is ready, or gone.

    Unlike kubectl wait, it ends at once if only a person can make the channel ready, and says what to do. It ends with
    0 when the goal is reached, and with 1 otherwise, also at the timeout.

    \b
      kubectl apply -f channel.yaml
      kubectl sms wait 497f6eca-6276-4993-bfeb-53cbbbba6f08

    \b
      kubectl delete -f channel.yaml --wait=false
      kubectl sms wait 497f6eca-6276-4993-bfeb-53cbbbba6f08 --for gone
    """
    where = channel_namespace(namespace, kubeconfig, context)

    async def run() -> None:
        async with cluster(kubeconfig, context, denied=DENIED) as api:
            if goal == "ready":
                await _wait_ready(api, await read_channel(api, where, instance), timeout, operator_namespace)
            else:
                await _wait_gone(api, where, instance, timeout, operator_namespace)

    asyncio.run(run())


@click.command()
@click.argument("instance", type=INSTANCE)
@timeout_option(60)
@instance_options
@cluster_options
def check(
    instance: str,
    timeout: int,
    namespace: str | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Have the operator check the channel of INSTANCE at Twilio now, and show what it found.

    The operator then uses no cached answer, and tries a login again that Twilio has rejected. It ends with 0 if the
    channel is ready, and with 1 if it is not, or the operator has not checked it before the timeout.

    \b
    After something was changed at Twilio:
      kubectl sms check 497f6eca-6276-4993-bfeb-53cbbbba6f08
    """
    where = channel_namespace(namespace, kubeconfig, context)

    async def run() -> None:
        async with cluster(kubeconfig, context, denied=_MAY_PATCH) as api:
            channel = await read_channel(api, where, instance)  # its error says what to do
            asked = await _ask(api, where, instance)
            ending = await _until(api, channel, lambda each: _handled(each) == asked, timeout)
            text = await _text(api, ending.channel, operator_namespace)
            if not ending.is_reached:
                unhandled = f"The operator has not checked it within {timeout} s: is it running? kubectl sms doctor"
                raise click.ClickException(f"{unhandled}\n{text}")
            click.echo(text)
            if not channel_text.is_ready(channel_text.summary(ending.channel)):
                raise click.exceptions.Exit(1)

    asyncio.run(run())


class _Ending(NamedTuple):
    """A channel as it was seen last, and whether that is what was waited for."""

    channel: Object
    is_reached: bool


async def _wait_ready(api: KubeClient, channel: Object, seconds: int, operator_namespace: str) -> None:
    ending = await _until(api, channel, _is_decided, seconds)
    found = channel_text.summary(ending.channel)
    if channel_text.is_ready(found):
        click.echo(f"{_named(ending.channel)} is ready.")
        return
    why = "Only a person can make it ready." if ending.is_reached else f"It is not ready after {seconds} s."
    raise click.ClickException(f"{why}\n{await _text(api, ending.channel, operator_namespace)}")


async def _wait_gone(api: KubeClient, where: str, instance: str, seconds: int, operator_namespace: str) -> None:
    try:
        channel = await api.request("GET", channels_path(where, instance))
    except NotFound:
        click.echo(f"{KIND} {where}/{instance} is gone.")
        return
    try:
        ending = await _until(api, channel, lambda each: False, seconds)
    except _Gone:
        click.echo(f"{_named(channel)} is gone.")
        return
    asked = "" if "deletionTimestamp" in ending.channel["metadata"] else " Nobody has deleted it."
    text = await _text(api, ending.channel, operator_namespace)
    raise click.ClickException(f"It is still there after {seconds} s.{asked}\n{text}")


class _Gone(click.ClickException):
    """The channel was deleted meanwhile."""


async def _until(
    api: KubeClient, channel: Object, done: Callable[[Mapping[str, Any]], bool], seconds: float
) -> _Ending:
    """Follow a channel until it is `done`, or `seconds` are over. Raises `_Gone` when it is deleted."""
    namespace, instance = channel["metadata"]["namespace"], channel["metadata"]["name"]
    if done(channel):
        return _Ending(channel, True)
    try:
        seen = changes(api, namespace, instance, known=channel)
        async with asyncio.timeout(seconds), aclosing(seen):
            async for kind, now in seen:
                if kind == "DELETED":
                    raise _Gone(f"{_named(channel)} was deleted meanwhile.")
                channel = now
                if done(channel):
                    return _Ending(channel, True)
    except TimeoutError:
        pass
    return _Ending(channel, False)


async def _ask(api: KubeClient, namespace: str, instance: str) -> str:
    """Ask for a check; return the value that the status shows once it is done."""
    from smschannel.api.kube_client import MERGE_PATCH

    asked = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {uuid.uuid4().hex[:8]}"
    change = {"metadata": {"annotations": {CHECK_NOW_ANNOTATION: asked}}}
    try:
        await api.request("PATCH", channels_path(namespace, instance), change, content_type=MERGE_PATCH)
    except NotFound:
        raise _Gone(f"{KIND} {namespace}/{instance} was deleted meanwhile.") from None
    return asked


def _handled(channel: Mapping[str, Any]) -> object:
    return (channel.get("status") or {}).get("lastHandledCheckNow")


def _is_decided(channel: Mapping[str, Any]) -> bool:
    found = channel_text.summary(channel)
    return channel_text.is_ready(found) or channel_text.is_stuck(found)


async def _text(api: KubeClient, channel: Object, operator_namespace: str) -> str:
    found = channel_text.document(await read_around(api, channel, operator_namespace))
    return "\n".join(channel_text.lines(found, datetime.now(UTC)))


def _named(channel: Mapping[str, Any]) -> str:
    return f"{KIND} {channel['metadata']['namespace']}/{channel['metadata']['name']}"
