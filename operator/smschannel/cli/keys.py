"""`kubectl sms keys`: the private keys that open sealed tokens and records, for as long as the operator is used.

No key is ever printed, and none is an argument. A backup is an age file (https://age-encryption.org) that a passphrase
opens, with this program or with any other that knows age.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smschannel.api.errors import Conflict, NotFound
from smschannel.api.text import TextError, decode
from smschannel.cli.options import cluster, cluster_options

if TYPE_CHECKING:
    from smschannel.api.sealing import Keyring, SealingKey
    from smschannel.cli.admin_store import AdminStore
    from smschannel.keyring_store import Stored

_ATTEMPTS = 5
_MOST_LISTED = 20
_SHORTEST_PASSPHRASE = 12
_LARGEST_FILE = 2**20
# A shim may seal with the key before for half a minute after a renewal. This is much longer, to be safe.
_STILL_SEALS = timedelta(minutes=10)

Result = TypeVar("Result")


@click.group()
def keys() -> None:
    """Manage the keys that open sealed tokens and the operator's records.

    The newest key seals; each of them opens what it sealed. The operator follows every change within half a minute,
    without a restart. These commands need the rights of an administrator in the operator's namespace; docs/sealing.md
    says which.
    """


@dataclass
class _Uses:
    """What needs a key: names of records, and of channels with a token that was sealed with it."""

    records: list[str] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.records or self.channels)

    def __str__(self) -> str:
        return f"{len(self.records)} records, {len(self.channels)} channels"

    def lines(self) -> list[str]:
        names = [f"Secret {each}" for each in self.records] + [f"SmsChannel {each}" for each in self.channels]
        more = len(names) - _MOST_LISTED
        return [f"  {each}" for each in names[:_MOST_LISTED]] + ([f"  and {more} more"] if more > 0 else [])


# list


@keys.command("list")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@cluster_options
def list_keys(output: str, kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """List the keys, the newest first: when they were made, and how much needs them.

    Keys in state "missing" are needed and not there: restore them from a backup. Manifests that are not in the cluster
    are not counted.

    \b
      kubectl sms keys list
    """

    async def work(kube: AdminStore) -> list[dict[str, Any]]:
        return _rows(await kube.read_keyring(), await _uses(kube))

    rows = _run(kubeconfig, context, operator_namespace, work)
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
        return
    columns = ("fingerprint", "state", "created", "records", "channels")
    lines = [[each.upper() for each in columns], *([_cell(row[each]) for each in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: str | int | None) -> str:
    return "unknown" if value is None else str(value)


def _rows(keyring: Keyring, uses: dict[str, _Uses]) -> list[dict[str, Any]]:
    known = {key.fingerprint: key for key in reversed(list(keyring))}
    missing = sorted(name for name in uses if name and name not in known)
    rows = []
    for name in (*known, *missing):
        key, use = known.get(name), uses.get(name) or _Uses()
        state = "missing" if key is None else "seals" if key is keyring.current else "opens"
        created = key.created.isoformat().replace("+00:00", "Z") if key and key.created else None
        rows.append(
            {
                "fingerprint": name,
                "state": state,
                "created": created,
                "records": len(use.records),
                "channels": len(use.channels),
            }
        )
    return rows


# renew, import, retire


@keys.command()
@click.option(
    "--without-backup",
    is_flag=True,
    help="Start again with a new key although the keyring was lost: what was sealed before stays closed.",
)
@cluster_options
def renew(without_backup: bool, kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """Make a new key, which seals from now on. The others still open what they sealed.

    The operator does this by itself every 30 days (SMSCHANNEL_KEY_RENEWAL_DAYS). Records are sealed again with the new
    key in the background; for manifests in Git there is 'kubectl sms reseal'. Make a new backup afterwards.

    If the keyring and all backups of it are lost, --without-backup makes a new keyring. Numbers keep working as they
    are at Twilio. Each channel then says what it lacks: detach it with --orphan, and seal its token again.

    \b
      kubectl sms keys renew
    """
    from smschannel.api.sealing import SealingKey

    new = SealingKey.generate(datetime.now(UTC))
    _add_newest(kubeconfig, context, operator_namespace, [new], without_backup=without_backup)


@keys.command("import")
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--without-backup", is_flag=True, help="Start with this key although the keyring was lost.")
@cluster_options
def import_key(
    file: Any, without_backup: bool, kubeconfig: str | None, context: str | None, operator_namespace: str
) -> None:
    """Add a key of your own from FILE or standard input; it seals from now on.

    A key is 96 random bytes in base64, from a generator that you trust. Before the first start of the operator it
    becomes the only key.

    \b
      openssl rand -base64 96 | kubectl sms keys import
    """
    from smschannel.api.sealing import parse_keys

    try:
        added = parse_keys(decode(file.read(_LARGEST_FILE)))
    except (TextError, ValueError) as error:
        raise click.ClickException(f"This is not a key: {error}.") from None
    _add_newest(kubeconfig, context, operator_namespace, added, without_backup=without_backup)


def _add_newest(
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
    added: Iterable[SealingKey],
    *,
    without_backup: bool,
) -> None:
    from smschannel.api.sealing import Keyring

    now = datetime.now(UTC).replace(microsecond=0)
    dated = [key.dated(key.created or now) for key in added]

    async def work(kube: AdminStore) -> Keyring:
        async def change(stored: Stored | None) -> Keyring:
            if stored is None:
                await _refuse_second(kube, without_backup)
                return Keyring(dated)
            try:
                return stored.opened.with_newest(dated)
            except ValueError as error:
                raise click.ClickException(f"Nothing was changed: {error}.") from None

        return await _change(kube, change)

    keyring = _run(kubeconfig, context, operator_namespace, work)
    click.echo(
        f"Key {keyring.current.fingerprint} seals from now on; {len(keyring)} in all. Make a new backup: kubectl sms"
        " keys backup FILE",
        err=True,
    )


async def _refuse_second(kube: AdminStore, without_backup: bool) -> None:
    if not without_backup and (witness := await kube.keys.store.lost_witness()):
        raise click.ClickException(
            f"{kube.keys.store.place} is gone, but {witness} made with it are there. Restore it: kubectl sms keys"
            " restore BACKUP. Only if there is no backup, repeat this with --without-backup."
        )


@keys.command()
@click.argument("fingerprints", metavar="FINGERPRINT...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@cluster_options
def retire(
    fingerprints: tuple[str, ...], yes: bool, kubeconfig: str | None, context: str | None, operator_namespace: str
) -> None:
    """Delete keys that nothing needs any more. 'kubectl sms keys list' shows their fingerprints.

    It is refused, with the list, while a record or a channel in the cluster needs the key. Manifests in Git cannot be
    seen from here: re-seal them first (kubectl sms reseal), or they can never be opened again. A backup still has the
    key.

    \b
      kubectl sms keys retire 3164a69de2dd004a
    """

    async def work(kube: AdminStore) -> Keyring:
        async def change(stored: Stored | None) -> Keyring:
            if stored is None:
                await kube.read_keyring()  # says what is missing
            assert stored
            await _refuse_needed(kube, stored.opened, fingerprints)
            return stored.opened.without(fingerprints)

        if not yes:
            await _refuse_needed(kube, await kube.read_keyring(), fingerprints)
            question = "Whatever is sealed with them elsewhere, as in Git, is lost. Delete them?"
            click.confirm(question, abort=True, err=True)
        return await _change(kube, change)

    keyring = _run(kubeconfig, context, operator_namespace, work)
    click.echo(f"Retired: {', '.join(fingerprints)}. Keys left: {len(keyring)}.", err=True)


async def _refuse_needed(kube: AdminStore, keyring: Keyring, fingerprints: tuple[str, ...]) -> None:
    """Raise `click.ClickException` if one of the keys is unknown, seals, may still seal, or is needed."""
    known = keyring.fingerprints
    if unknown := [each for each in fingerprints if each not in known]:
        raise click.ClickException(f"No key has the fingerprint {', '.join(unknown)}. There are: {', '.join(known)}")
    if keyring.current.fingerprint in fingerprints:
        raise click.ClickException(f"{keyring.current.fingerprint} is the key that seals: renew it first.")
    if (created := keyring.current.created) and datetime.now(UTC) - created < _STILL_SEALS:
        raise click.ClickException(
            f"The newest key is so young that others may still seal with the one before: try again after"
            f" {created + _STILL_SEALS:%Y-%m-%dT%H:%M:%SZ}."
        )
    uses = await _uses(kube)
    needed = {name: uses[name] for name in fingerprints if uses.get(name)}
    if not needed:
        return
    lines = [line for name, use in needed.items() for line in (f"{name} is needed by {use}:", *use.lines())]
    lines.append(
        "Nothing was changed. The operator seals records again by itself, 5 each second. Re-seal manifests with"
        " 'kubectl sms reseal' and apply them; channels of the REST API with 'kubectl sms reseal --rest'."
    )
    raise click.ClickException("\n".join(lines))


# backup, restore


def _passphrase_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--passphrase-file",
        type=click.File("rb"),
        help="Read the passphrase from this file; - for standard input. Default: it is asked for.",
    )(command)


@keys.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_passphrase_option
@cluster_options
def backup(
    file: Path, passphrase_file: Any, kubeconfig: str | None, context: str | None, operator_namespace: str
) -> None:
    """Write all keys into FILE, sealed with a passphrase.

    FILE is in the age format: 'age -d FILE' opens it, too. Whoever has it and the passphrase can open every token that
    was sealed so far. Make a new backup after each renewal.

    \b
      kubectl sms keys backup keyring.age
    """
    passphrase = _passphrase(passphrase_file, confirm=True)

    async def work(kube: AdminStore) -> Keyring:
        return await kube.read_keyring()

    keyring = _run(kubeconfig, context, operator_namespace, work)
    content = json.dumps({"keyring": json.loads(keyring.dump()), "created": json.loads(keyring.dump_dates())})
    _write_private(file, _sealed(content.encode(), passphrase))
    older = f", and {len(keyring) - 1} older" if len(keyring) > 1 else ""
    click.echo(f"{file} has key {keyring.current.fingerprint}{older}.", err=True)


@keys.command()
@click.argument("file", type=click.File("rb"))
@_passphrase_option
@cluster_options
def restore(
    file: Any, passphrase_file: Any, kubeconfig: str | None, context: str | None, operator_namespace: str
) -> None:
    """Add the keys of a backup to the keyring, and say what becomes readable.

    Nothing is lost: keys that are there stay, and what seals stays the same. It works before the operator's first start
    as well as while it runs; channels that lacked a key are reconciled within half a minute.

    \b
      kubectl sms keys restore keyring.age
    """
    sealed = file.read(_LARGEST_FILE)
    backup_of = _opened(sealed, _passphrase(passphrase_file, confirm=False))

    async def work(kube: AdminStore) -> tuple[set[str], dict[str, _Uses]]:
        before: set[str] = set()

        async def change(stored: Stored | None) -> Keyring:
            before.clear()
            before.update(stored.opened.fingerprints if stored else ())
            try:
                return stored.opened.merged(backup_of) if stored else backup_of
            except ValueError as error:
                raise click.ClickException(f"Nothing was changed: {error}.") from None

        keyring = await _change(kube, change)
        return set(keyring.fingerprints) - before, await _uses(kube)

    added, uses = _run(kubeconfig, context, operator_namespace, work)
    click.echo(_restored(added, len(backup_of), uses))


def _restored(added: set[str], found: int, uses: dict[str, _Uses]) -> str:
    if not added:
        return f"All {found} keys of the backup are in the keyring already. Nothing was changed."
    readable = [(name, uses.get(name) or _Uses()) for name in sorted(added)]
    lines = [f"{len(added)} of the backup's {found} keys were added:"]
    for name, use in readable:
        lines += [f"{name} opens {use}", *use.lines()]
    if any(use for _, use in readable):
        lines.append("The operator looks at these channels again within half a minute.")
    return "\n".join(lines)


def _passphrase(file: Any, *, confirm: bool) -> str:
    if file is None:
        if not (sys.stdin is not None and sys.stdin.isatty()):
            raise click.ClickException("No terminal to ask for the passphrase: use --passphrase-file FILE or -.")
        given = str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True))
    else:
        try:
            given = decode(file.read(_LARGEST_FILE)).rstrip("\r\n")
        except TextError as error:
            raise click.ClickException(f"The passphrase {error}.") from None
    if confirm and len(given) < _SHORTEST_PASSPHRASE:
        raise click.ClickException(
            f"The passphrase has fewer than {_SHORTEST_PASSPHRASE} characters: take several random words."
        )
    return given


def _sealed(content: bytes, passphrase: str) -> bytes:
    import pyrage

    sealed: bytes = pyrage.passphrase.encrypt(content, passphrase)
    return sealed


def _opened(sealed: bytes, passphrase: str) -> Keyring:
    """Return the keyring of a backup. Raises `click.ClickException`, without content."""
    import pyrage

    from smschannel.api.sealing import Keyring

    try:
        content = json.loads(pyrage.passphrase.decrypt(sealed, passphrase))
        return Keyring.load(json.dumps(content["keyring"]), json.dumps(content["created"]))
    except pyrage.DecryptError:
        raise click.ClickException(
            "The passphrase does not open this file, or it is not a backup of 'kubectl sms keys backup', or damaged."
        ) from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise click.ClickException(
            "The file was opened, but holds no keyring that this release can read: use the release that wrote it."
        ) from None


def _write_private(file: Path, content: bytes) -> None:
    """Write a new file that only its owner can read. An existing one, perhaps an older backup, is not replaced."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise click.ClickException(f"{file} exists already: name another file, or remove it.") from None
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}.") from None
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(content)


# What needs which key


async def _uses(kube: AdminStore) -> dict[str, _Uses]:
    """Return what needs each key, by its fingerprint: all records, also written-off ones, and the watched channels."""
    from smschannel.api.sealing import fingerprint_of

    uses: dict[str, _Uses] = {}
    async for name, sealed in kube.sealed_records():
        uses.setdefault(fingerprint_of(sealed), _Uses()).records.append(name)
    async for body in kube.all_channels(None):
        if token := (body["spec"].get("credentials") or {}).get("sealed"):
            name = f"{body['metadata']['namespace']}/{body['metadata']['name']}"
            uses.setdefault(fingerprint_of(token), _Uses()).channels.append(name)
    return uses


async def _change(kube: AdminStore, change: Callable[[Stored | None], Awaitable[Keyring]]) -> Keyring:
    """Replace the keyring by what `change` makes of it, as often as somebody else was faster."""
    await _refuse_files(kube)
    for _ in range(_ATTEMPTS):
        stored = await kube.keys.store.read()
        keyring = await change(stored)
        if stored and keyring == stored.keyring:
            return keyring
        try:
            await kube.keys.store.write(keyring, stored)
        except Conflict:
            continue
        return keyring
    raise click.ClickException("Others keep changing the keyring. Try again.")


async def _refuse_files(kube: AdminStore) -> None:
    from smschannel.cli.admin_store import KEYRING_DIR

    directory = kube.keys.store.directory or (await kube.published_settings()).get(KEYRING_DIR)
    if directory:
        raise click.ClickException(
            f"The operator reads its keys from files in {directory}: whoever provides them adds and removes keys"
            " there. A key is 96 random bytes in base64 (openssl rand -base64 96), and the last file by name seals."
        )


def _run(
    kubeconfig: str | None, context: str | None, namespace: str, work: Callable[[AdminStore], Awaitable[Result]]
) -> Result:
    """Connect to the cluster, run `work`, and return its result."""

    async def connected() -> Result:
        async with _admin(kubeconfig, context, namespace) as kube:
            return await work(kube)

    return asyncio.run(connected())


@asynccontextmanager
async def _admin(kubeconfig: str | None, context: str | None, namespace: str) -> AsyncIterator[AdminStore]:
    denied = (
        f"Managing keys needs the rights to get, list, create and patch Secrets in {namespace}, to create and update"
        f" operatorobjects.channels.hydracore.io there, and to list SmsChannels in all namespaces."
    )
    async with cluster(kubeconfig, context, denied=denied) as api:
        from smschannel.api.logs import log_to_stderr
        from smschannel.cli.admin_store import AdminStore

        log_to_stderr("ERROR", "console")
        try:
            yield AdminStore(api, namespace)
        except NotFound:
            raise click.ClickException(
                f"The cluster at {api.configuration.host} has no namespace {namespace}: create it first, or name the"
                " operator's namespace with --operator-namespace."
            ) from None
