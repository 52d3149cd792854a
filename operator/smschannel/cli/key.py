"""`kubectl sms key`: create, list and revoke API keys of the REST API.

A key is printed once, to standard output; the cluster stores only its SHA-256. The shim follows every change within
seconds.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click
from pydantic import AwareDatetime, TypeAdapter, ValidationError

from smschannel.api.api_keys import KEY_PREFIX, ApiKey, NewKey, Verb, decode_key, encode_key, make_key, secret_of
from smschannel.api.errors import Conflict, NotFound
from smschannel.api.names import API_KEYS_SECRET, core_path
from smschannel.api.text import clean, unexpected
from smschannel.cli.options import cluster, cluster_options

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient, Object

_ATTEMPTS = 5
_ID = re.compile(r"[a-zA-Z0-9][-.a-zA-Z0-9]{0,62}")
_DURATION = re.compile(r"([1-9][0-9]{0,4})([dh])")

Result = TypeVar("Result")


class KeyStore:
    """The Secret of API keys, read and written with the rights of the user who runs the command."""

    def __init__(self, api: KubeClient, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._path = core_path(namespace, "secrets", API_KEYS_SECRET)

    async def entries(self) -> dict[str, str]:
        """Return the Secret's `data`: one encoded entry per key ID; empty if there is no Secret."""
        secret = await self._read()
        return (secret or {}).get("data") or {}

    async def add(self, new: NewKey) -> None:
        """Add a key; create the Secret for the first one. Raises `click.ClickException` if the ID is taken."""
        for _ in range(_ATTEMPTS):
            secret = await self._read()
            if secret is not None and new.key_id in (secret.get("data") or {}):
                raise click.ClickException(
                    f"A key with the ID {new.key_id} already exists: choose another --id, or revoke it first"
                )
            try:
                if secret is None:
                    await self._api.request(
                        "POST", core_path(self._namespace, "secrets"), secret_of(new, self._namespace)
                    )
                else:
                    version = {"resourceVersion": secret["metadata"]["resourceVersion"]}
                    await self._patch({"metadata": version, "data": {new.key_id: encode_key(new.entry)}})
            except Conflict:
                continue  # another client changed the keys since they were read
            return
        raise click.ClickException("Other clients keep changing the API keys. Try again.")

    async def remove(self, key_ids: Iterable[str]) -> None:
        """Remove all of these keys, or none and raise `click.ClickException` if one does not exist."""
        existing = await self.entries()
        unknown = [each for each in key_ids if each not in existing]
        if any(KEY_PREFIX in each for each in unknown):
            raise click.ClickException(
                "This is a key and not its ID, which is the part between its two underscores. Revoke that ID: others"
                " may have seen the key on the command line."
            )
        if unknown:
            raise click.ClickException(
                f"No key has the ID {', '.join(unknown)}. The IDs are: {', '.join(sorted(existing)) or 'none'}"
            )
        await self._patch({"data": dict.fromkeys(key_ids)})

    async def _read(self) -> Object | None:
        try:
            return await self._api.request("GET", self._path)
        except NotFound:
            return None

    async def _patch(self, change: Object) -> None:
        from smschannel.api.kube_client import MERGE_PATCH

        await self._api.request("PATCH", self._path, change, content_type=MERGE_PATCH)


class _List(click.ParamType[tuple[str, ...]]):
    """A comma-separated list. `convert_item` raises `ValueError` for an invalid item; the user then gets `message`."""

    def __init__(self, name: str, convert_item: Callable[[str], str], message: str) -> None:
        self.name = name
        self._convert_item = convert_item
        self._message = message

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            items = tuple(dict.fromkeys(self._convert_item(clean(item)) for item in value.split(",")))
        except ValueError:
            self.fail(self._message, param, ctx)
        return items


class _Expiry(click.ParamType[datetime | None]):
    """A time in the future, given as days, hours or RFC 3339; None means never."""

    name = "90d|12h|TIME|never"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime | None:
        if value is None or isinstance(value, datetime):
            return value
        value = clean(value)
        if value == "never":
            return None
        now = datetime.now(UTC)
        if span := _DURATION.fullmatch(value):
            return now + timedelta(**{{"d": "days", "h": "hours"}[span[2]]: int(span[1])})
        try:
            expires: datetime = TypeAdapter(AwareDatetime).validate_python(value)
        except ValidationError:
            self.fail(
                "use days (90d), hours (12h), a time with its time zone (2027-01-31T00:00:00Z), or never", param, ctx
            )
        if expires <= now:
            self.fail("this time is in the past", param, ctx)
        return expires


def _key_id(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    value = clean(value) if value is not None else None
    if value is not None and not _ID.fullmatch(value):
        wrong = unexpected(value)
        expected = "an ID has at most 63 letters, digits, dashes and dots, and no underscore"
        raise click.BadParameter(f"it contains {wrong}; {expected}" if wrong else expected)
    return value


_INSTANCES = _List(
    "UUID,...|*",
    lambda item: item if item == "*" else str(UUID(item)),
    "use comma-separated UUIDs, or '*' for all instances",
)
_VERBS = _List("VERB,...", lambda item: Verb(item).value, "use get, post and delete, separated by commas")


@click.group()
def key() -> None:
    """Manage the API keys of the REST API."""


@key.command()
@click.option("--instances", type=_INSTANCES, required=True, help="The instances that the key is for; '*' for all.")
@click.option("--verbs", type=_VERBS, default="get,post,delete", show_default=True, help="The calls that it allows.")
@click.option(
    "--expires",
    type=_Expiry(),
    metavar="90d|12h|TIME|never",
    default="never",
    show_default=True,
    help="When the key expires.",
)
@click.option("--id", "key_id", callback=_key_id, help="The key's ID in logs and in 'list'. Default: random.")
@cluster_options
def create(
    instances: tuple[str, ...],
    verbs: tuple[str, ...],
    expires: datetime | None,
    key_id: str | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Create a key and print it. It cannot be printed again.

    To replace a key, create a new one, switch the client to it, and then revoke the old one; both work meanwhile.

    \b
      kubectl sms key create --instances '*'
      kubectl sms key create --instances 497f6eca-6276-4993-bfeb-53cbbbba6f08 --verbs get --expires 90d
    """
    new = make_key(instances, verbs, expires=expires, key_id=key_id)
    _run(kubeconfig, context, operator_namespace, lambda store: store.add(new))
    until = f"until {expires.isoformat(timespec='seconds')}" if expires else "until it is revoked"
    click.echo(
        f"Key {new.key_id} allows {', '.join(verbs)} for {' '.join(instances)}, {until}. It is printed only once.",
        err=True,
    )
    click.echo(new.key.get_secret_value())


@key.command("list")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@cluster_options
def list_keys(output: str, kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """List the keys, what they allow, and when they expire. The keys themselves are not stored.

    \b
      kubectl sms key list
    """
    entries = _run(kubeconfig, context, operator_namespace, lambda store: store.entries())
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


def _row(key_id: str, encoded: str, now: datetime) -> dict[str, Any]:
    try:
        entry: ApiKey = decode_key(encoded)
    except ValueError as error:
        return {"id": key_id, "state": f"unusable: {error}", "verbs": [], "expires": None, "instances": []}
    return {
        "id": key_id,
        "state": "expired" if entry.is_expired(now) else "live",
        "verbs": [each.value for each in Verb if each in entry.verbs],
        "expires": entry.expires.isoformat(timespec="seconds") if entry.expires else None,
        "instances": [str(each) for each in entry.instances],
    }


@key.command()
@click.argument("key_ids", metavar="ID...", nargs=-1, required=True)
@cluster_options
def revoke(key_ids: tuple[str, ...], kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """Revoke keys by their IDs; they stop working within seconds.

    \b
      kubectl sms key list
      kubectl sms key revoke 0123abcd
    """
    _run(kubeconfig, context, operator_namespace, lambda store: store.remove(key_ids))
    click.echo(f"Revoked: {', '.join(key_ids)}", err=True)


def _run(
    kubeconfig: str | None, context: str | None, namespace: str, work: Callable[[KeyStore], Awaitable[Result]]
) -> Result:
    """Connect to the cluster, run `work`, and return its result."""

    async def connected() -> Result:
        denied = (
            f"Managing API keys needs the rights to get and patch the Secret {namespace}/{API_KEYS_SECRET}, and to"
            " create it for the first key."
        )
        async with cluster(kubeconfig, context, denied=denied) as api:
            try:
                return await work(KeyStore(api, namespace))
            except NotFound:
                raise click.ClickException(
                    f"The cluster at {api.configuration.host} has no namespace {namespace}. If the operator runs in"
                    " another namespace, name it with --operator-namespace."
                ) from None

    return asyncio.run(connected())
