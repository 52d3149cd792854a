"""Read channels and what is around them, with the rights of the user who runs the command.

What may not be read is never guessed: it is named in `Reading.not_read`, with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from smschannel.api.errors import (
    ChannelError,
    Expired,
    KubernetesRefused,
    KubernetesUnavailable,
    NotConnected,
    NotFound,
)
from smschannel.api.names import PUBLIC_KEY_CONFIGMAP, channels_path, core_path
from smschannel.cli.channel_text import Reading

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient, Object

_PAUSE = 1.0  # seconds
DENIED = "You need the right to get and list SmsChannels there: ask whoever administers the namespace."


async def read_channel(api: KubeClient, namespace: str, instance: str) -> Object:
    """Read a channel. Raises `click.ClickException` if there is none, and then says where one of this name is."""
    try:
        return await api.request("GET", channels_path(namespace, instance))
    except NotFound:
        raise click.ClickException(await _missing(api, namespace, instance)) from None


async def _missing(api: KubeClient, namespace: str, instance: str) -> str:
    try:
        same = [each async for each in api.pages(channels_path(""), {"fieldSelector": f"metadata.name={instance}"})]
    except ChannelError:
        same = None
    if same:
        found = " and ".join(sorted(str(each["metadata"]["namespace"]) for each in same))
        return f"Namespace {namespace} has no SmsChannel {instance}, but namespace {found} has: name it with -n."
    try:
        await api.request("GET", f"/api/v1/namespaces/{namespace}")
    except NotFound:
        return f"There is no namespace {namespace}: name the channel's namespace with -n."
    except ChannelError:
        pass  # whoever may not ask reads the rest of the message
    if same is None:
        return f"Namespace {namespace} has no SmsChannel {instance}: name its namespace with -n."
    return f"No namespace has an SmsChannel {instance}. To see all of them: kubectl sms status -A"


async def read_around(api: KubeClient, channel: Object, operator_namespace: str) -> Reading:
    """Read what a channel's status is explained with: its Events, and the key and namespaces that are published."""
    meta = channel["metadata"]
    not_read = []
    events: list[Object] | None = None
    selector = f"involvedObject.name={meta['name']},involvedObject.uid={meta['uid']}"
    try:
        path = core_path(meta["namespace"], "events")
        events = [each async for each in api.pages(path, {"fieldSelector": selector})]
    except (ChannelError, Expired) as error:
        _raise_unless_about_one_object(error)
        not_read.append(f"Events of namespace {meta['namespace']}: {error}")
    published: dict[str, str] | None = None
    try:
        published = await read_published(api, operator_namespace)
    except ChannelError as error:
        _raise_unless_about_one_object(error)
        not_read.append(f"ConfigMap {operator_namespace}/{PUBLIC_KEY_CONFIGMAP}: {error}")
    return Reading(channel, events, published, tuple(not_read))


async def read_published(api: KubeClient, operator_namespace: str) -> dict[str, str]:
    """Return what the operator publishes for everybody; empty if it has published nothing there."""
    try:
        found = await api.request("GET", core_path(operator_namespace, "configmaps", PUBLIC_KEY_CONFIGMAP))
    except NotFound:
        return {}
    return dict(found.get("data") or {})


def _raise_unless_about_one_object(error: ChannelError) -> None:
    """Raise errors that every further call would meet too: no connection, or a login that is not accepted."""
    if isinstance(error, NotConnected) or (isinstance(error, KubernetesRefused) and error.status == 401):
        raise error


async def changes(
    api: KubeClient, namespace: str, instance: str = "", known: Object | None = None
) -> AsyncGenerator[tuple[str, Object]]:
    """Yield the channels of a namespace ("": of all), or one of them, as they are now and then at every change.

    Each comes with the type of its event: ADDED, MODIFIED or DELETED. Never ends: a watch that ends is started again
    from a new list. A channel that is `known` is not yielded before it changes. Raises what `KubeClient` raises.
    """
    selector = {"fieldSelector": f"metadata.name={instance}"} if instance else {}
    path = channels_path(namespace)
    seen = {str(known["metadata"]["uid"]): known} if known else {}
    while True:
        versions: list[str] = []
        pages = api.pages(path, selector, on_version=versions.append)
        now = {str(each["metadata"]["uid"]): each async for each in pages}
        for uid in seen.keys() - now.keys():
            yield "DELETED", seen[uid]
        for uid, each in now.items():
            if each != seen.get(uid):
                yield "MODIFIED" if uid in seen else "ADDED", each
        seen = now
        try:
            async with aclosing(api.watch(path, {**selector, "resourceVersion": versions[0]})) as events:
                async for event in events:
                    if (found := _changed(event, seen)) is not None:
                        yield event["type"], found
        except (Expired, KubernetesUnavailable) as error:
            if isinstance(error, NotConnected):
                raise
            if not isinstance(error, Expired):
                await asyncio.sleep(_PAUSE)  # then list again: an error of the list ends the command


def _changed(event: Object, known: dict[str, Object]) -> Object | None:
    """Return the channel of a watch event, None for a bookmark, and update `known`."""
    kind, found = event["type"], event["object"]
    if kind not in {"ADDED", "MODIFIED", "DELETED"}:
        return None
    uid = str(found["metadata"]["uid"])
    if kind == "DELETED":
        known.pop(uid, None)
    else:
        known[uid] = dict(found)
    return dict(found)
