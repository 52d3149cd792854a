"""`kubectl sms key`: make, list and revoke API keys.

A key is shown once, on standard output; the cluster gets its SHA-256 only. What is changed here the shim follows
within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import click
import yaml
from kubernetes.aio.config import ConfigException
from pydantic import AwareDatetime, TypeAdapter, ValidationError

from smschannel.api.api_keys import ApiKey, Entry, Made, Verb, encode_key, make_key, read_entry, secret_of
from smschannel.api.errors import ChannelError, Conflict, KubernetesRefused, NotFound
from smschannel.api.kube_client import MERGE_PATCH, KubeClient, Object
from smschannel.api.names import API_KEYS_SECRET

_ATTEMPTS = 5
_ID = re.compile(r"[a-zA-Z0-9][-.a-zA-Z0-9]{0,62}")
_DURATION = re.compile(r"([1-9][0-9]{0,4})([dh])")

Result = TypeVar("Result")


class Store:
    """The Secret of hashed keys, as an administrator writes it."""

    def __init__(self, api: KubeClient, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._all = f"/api/v1/namespaces/{namespace}/secrets"
        self._path = f"{self._all}/{API_KEYS_SECRET}"

    async def entries(self) -> dict[str, Entry]:
        secret = await self._read()
        return {key_id: read_entry(value) for key_id, value in ((secret or {}).get("data") or {}).items()}

    async def add(self, made: Made) -> None:
        """Never over a key that is there. Raises `click.ClickException`."""
        for _ in range(_ATTEMPTS):
            there = await self._read()
            if there is not None and made.key_id in (there.get("data") or {}):
                raise click.ClickException(
                    f"There is a key {made.key_id} already: choose another --id, or revoke it first"
                )
            try:
                if there is None:
                    await self._api.request("POST", self._all, secret_of(made, self._namespace))
                else:
                    await self._patch(there, {made.key_id: encode_key(made.entry)})
            except Conflict:
                continue  # somebody made or revoked another key meanwhile
            return
        raise click.ClickException("The API keys are being changed by others at the same time. Try again.")

    async def remove(self, key_ids: Iterable[str]) -> None:
        """All of them, or, where one is unknown, none. Raises `click.ClickException`."""
        there = await self._read()
        known = (there or {}).get("data") or {}
        unknown = [each for each in key_ids if each not in known]
        if there is None or unknown:
            raise click.ClickException(
                f"There is no key {', '.join(unknown)}. The keys are: {', '.join(sorted(known)) or 'none'}"
            )
        await self._patch({"metadata": {}}, dict.fromkeys(key_ids))

    async def _read(self) -> Object | None:
        try:
            return await self._api.request("GET", self._path)
        except NotFound:
            return None

    async def _patch(self, there: Object, content: dict[str, Any]) -> None:
        version = {"metadata": {"resourceVersion": each}} if (each := there["metadata"].get("resourceVersion")) else {}
        await self._api.request("PATCH", self._path, {**version, "data": content}, content_type=MERGE_PATCH)


class _Words(click.ParamType[tuple[str, ...]]):
    """Words with commas between them, each kept to a rule."""

    def __init__(self, name: str, check: Callable[[str], str], rule: str) -> None:
        self.name = name
        self._check = check
        self._rule = rule

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            words = tuple(dict.fromkeys(self._check(word.strip()) for word in value.split(",")))
        except ValueError:
            self.fail(self._rule, param, ctx)
        return words


class _Expiry(click.ParamType[datetime | None]):
    name = "90d|12h|TIME|never"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime | None:
        if value is None or isinstance(value, datetime) or value == "never":
            return None if value == "never" else value
        now = datetime.now(UTC)
        if span := _DURATION.fullmatch(value):
            return now + timedelta(**{{"d": "days", "h": "hours"}[span[2]]: int(span[1])})
        try:
            expires: datetime = TypeAdapter(AwareDatetime).validate_python(value)
        except ValidationError:
            self.fail(
                "write days (90d), hours (12h), a time with its zone (2027-01-31T00:00:00Z), or never", param, ctx
            )
        if expires <= now:
            self.fail("this is over already", param, ctx)
        return expires


def _key_id(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not _ID.fullmatch(value):
        raise click.BadParameter("an id has letters, digits, dashes and dots, at most 63, and no underscore")
    return value


_INSTANCES = _Words(
    "UUID,...|*",
    lambda word: word if word == "*" else str(UUID(word)),
    "write UUIDs with commas between them, or '*' for all instances",
)
_VERBS = _Words("VERB,...", lambda word: Verb(word).value, "choose from get, post and delete, with commas between them")


def _cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--operator-namespace", default="sms-operator", show_default=True, help="Where the shim reads its keys."
        ),
        click.option("--context", help="A context of the kubeconfig; the current one by default."),
        click.option(
            "--kubeconfig",
            type=click.Path(exists=True, dir_okay=False),
            help="$KUBECONFIG or ~/.kube/config by default.",
        ),
    ):
        command = option(command)
    return command


@click.group()
def key() -> None:
    """API keys of the REST API."""


@key.command()
@click.option("--instances", type=_INSTANCES, required=True, help="The instances it may touch; '*' for all.")
@click.option("--verbs", type=_VERBS, default="get,post,delete", show_default=True, help="What it may do with them.")
@click.option(
    "--expires",
    type=_Expiry(),
    metavar="90d|12h|TIME|never",
    default="never",
    show_default=True,
    help="When it ends by itself.",
)
@click.option("--id", "key_id", callback=_key_id, help="By which logs and 'list' call it; random by default.")
@_cluster_options
def create(
    instances: tuple[str, ...],
    verbs: tuple[str, ...],
    expires: datetime | None,
    key_id: str | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Make a key, and print it: it is shown this once.

    To replace a key, make the new one, hand it over, and only then revoke the old one: both work meanwhile.

    \b
      kubectl sms key create --instances '*'
      kubectl sms key create --instances 497f6eca-6276-4993-bfeb-53cbbbba6f08 --verbs get --expires 90d
    """
    made = make_key(instances, verbs, expires=expires, key_id=key_id)
    _in_cluster(kubeconfig, context, operator_namespace, lambda store: store.add(made))
    until = f"until {expires.isoformat(timespec='seconds')}" if expires else "until it is revoked"
    click.echo(f"Key {made.key_id} may {', '.join(verbs)} {' '.join(instances)}, {until}. It is shown once.", err=True)
    click.echo(made.key.get_secret_value())


@key.command("list")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@_cluster_options
def list_keys(output: str, kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """Show the keys there are, what they may do, and until when. No key can be shown again."""
    entries = _in_cluster(kubeconfig, context, operator_namespace, lambda store: store.entries())
    now = datetime.now(UTC)
    rows = [_row(key_id, entry, now) for key_id, entry in sorted(entries.items())]
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    columns = ("id", "state", "verbs", "expires", "instances")
    lines = [[each.upper() for each in columns], *([_cell(row[each]) for each in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: str | list[str] | None) -> str:
    return "never" if value is None else value if isinstance(value, str) else ",".join(value)


def _row(key_id: str, entry: Entry, now: datetime) -> dict[str, Any]:
    if isinstance(entry, ApiKey):
        return {
            "id": key_id,
            "state": "expired" if entry.expired(now) else "live",
            "verbs": [each.value for each in Verb if each in entry.verbs],
            "expires": entry.expires.isoformat(timespec="seconds") if entry.expires else None,
            "instances": [str(each) for each in entry.instances],
        }
    return {"id": key_id, "state": f"unusable: {entry}", "verbs": [], "expires": None, "instances": []}


@key.command()
@click.argument("key_ids", metavar="ID...", nargs=-1, required=True)
@_cluster_options
def revoke(key_ids: tuple[str, ...], kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """End keys by their ids, within seconds. The others go on."""
    _in_cluster(kubeconfig, context, operator_namespace, lambda store: store.remove(key_ids))
    click.echo(f"Revoked: {', '.join(key_ids)}", err=True)


def _in_cluster(
    kubeconfig: str | None, context: str | None, namespace: str, work: Callable[[Store], Awaitable[Result]]
) -> Result:
    result: Result = asyncio.run(_connected(kubeconfig, context, namespace, work))
    return result


async def _connected(
    kubeconfig: str | None, context: str | None, namespace: str, work: Callable[[Store], Awaitable[Result]]
) -> Result:
    async with contextlib.AsyncExitStack() as open_until_done:
        try:
            api = await open_until_done.enter_async_context(await KubeClient.connect(kubeconfig, context))
        except (ConfigException, KeyError, TypeError, ValueError, OSError, yaml.YAMLError) as error:
            raise click.ClickException(
                f"The kubeconfig cannot be used: {error}. Name another with --kubeconfig or --context."
            ) from None
        cluster = f"The cluster at {api.configuration.host}"
        try:
            return await work(Store(api, namespace))
        except NotFound:
            raise click.ClickException(
                f"{cluster} has no namespace {namespace}. If the operator is in another: --operator-namespace"
            ) from None
        except KubernetesRefused as error:
            raise click.ClickException(
                f"{cluster} does not know you: log in again, or name another --context."
                if error.status == 401
                else f"{cluster} does not let you: {error}. Who makes keys needs get and patch on the Secret"
                f" {namespace}/{API_KEYS_SECRET}, and create for the first key."
            ) from None
        except ChannelError as error:
            raise click.ClickException(f"{cluster} cannot be reached: {error}. Is this the right --context?") from None
