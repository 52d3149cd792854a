"""`kubectl sms validate` and `kubectl sms reseal`: manifests with sealed tokens, without showing a token."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from pydantic import ValidationError

from smschannel.api.errors import Conflict, KeyringLost, KubernetesRefused, Unreadable
from smschannel.api.ownership import owned_by_rest
from smschannel.api.resource import SmsChannel
from smschannel.api.text import decode
from smschannel.cli.manifests import Manifest, read_channels
from smschannel.cli.options import NAMESPACE, cluster, cluster_options, context_namespace

if TYPE_CHECKING:
    from smschannel.api.sealing import Binding, Keyring, PublicKey

_RIGHT = (
    "This needs the right to get the Secret smschannel-keyring in the operator's namespace, which can open every token:"
    " run it as an administrator, or as kubectl-sms in the operator's pod."
)


def _files_option(*, required: bool) -> Callable[..., Any]:
    return click.option(
        "-f",
        "--filename",
        "files",
        type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
        multiple=True,
        required=required,
        help="A manifest, which may hold several documents; - for standard input. May be given several times.",
    )


_namespace_option = click.option(
    "-n",
    "--namespace",
    type=NAMESPACE,
    help="The namespace of manifests that name none. Default: the context's, or else sms-channels.",
)


class _Found(NamedTuple):
    """An SmsChannel of a file; `sealed` is empty if its token is in a Secret."""

    source: str
    name: str
    namespace: str
    manifest: Manifest

    @property
    def sealed(self) -> str:
        credentials = (self.manifest.get("spec") or {}).get("credentials") or {}
        return str(credentials.get("sealed") or "") if isinstance(credentials, dict) else ""

    @property
    def binding(self) -> Binding:
        from smschannel.api.sealing import Binding

        return Binding(self.namespace, self.name, str(self.manifest["spec"].get("accountSid")))

    def wrong(self) -> str:
        """Return which rules of the resource the manifest breaks; empty if none."""
        made = {"namespace": self.namespace, "uid": "none", "resourceVersion": "0", "generation": 1}
        meta = {"creationTimestamp": "2026-01-01T00:00:00Z", **self.manifest["metadata"], **made}
        try:
            SmsChannel.model_validate({"metadata": meta, "spec": self.manifest.get("spec")})
        except ValidationError as error:
            found = error.errors(include_input=False, include_context=False, include_url=False)
            return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found)
        return ""


@click.command()
@_files_option(required=True)
@_namespace_option
@cluster_options
@click.pass_context
def validate(
    ctx: click.Context,
    files: tuple[Path, ...],
    namespace: str | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Check manifests: the rules of the resource, and whether the operator can open the sealed token.

    No token is shown. Whether a token opens can only be said with the right to read the operator's keyring; without it,
    the command says whether the token is sealed with the key that the operator publishes now. Exits with 1 if a
    manifest would not work.

    \b
      kubectl sms validate -f channel.yaml
    """
    found = [each for file in files for each in _channels(file, _content(file), namespace, kubeconfig, context)]
    if not found:
        raise click.ClickException("There is no SmsChannel in these files.")
    keyring, published = asyncio.run(_keys(kubeconfig, context, operator_namespace))
    results = [_checked(each, keyring, published) for each in found]
    for each, (is_good, text) in zip(found, results, strict=True):
        click.echo(f"{each.source}: {each.namespace}/{each.name}: {'' if is_good else 'ERROR: '}{text}")
    ctx.exit(0 if all(is_good for is_good, _ in results) else 1)


def _checked(found: _Found, keyring: Keyring | None, published: PublicKey | None) -> tuple[bool, str]:
    """Return whether a manifest is good, and the text about it."""
    from smschannel.api.sealing import fingerprint_of

    if wrong := found.wrong():
        return False, wrong
    if not found.sealed:
        return True, "the token is in a Secret"
    key = fingerprint_of(found.sealed)
    if keyring is None:
        if not key:
            return False, "the sealed value was truncated or altered"
        current = published.fingerprint.hex() if published else ""
        age = "the key that the operator publishes" if key == current else f"key {key}, which is not the published one"
        return True, f"sealed with {age}; whether it opens cannot be said without the keyring"
    try:
        keyring.unseal(found.sealed, found.binding)
    except Unreadable as error:
        return False, f"{error}"
    is_newest = key == keyring.current.fingerprint
    return True, f"opens, with key {key}" + ("" if is_newest else ", which is not the newest: kubectl sms reseal")


@click.command()
@_files_option(required=False)
@click.option("-i", "--in-place", is_flag=True, help="Write the files again, instead of printing one.")
@click.option("--rest", is_flag=True, help="Re-seal the channels in the cluster that the REST API made.")
@_namespace_option
@cluster_options
def reseal(
    files: tuple[Path, ...],
    in_place: bool,
    rest: bool,
    namespace: str | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Seal the tokens of manifests with the operator's newest key, before an older one is retired.

    Only the sealed values change: comments and layout stay, tokens that the newest key seals already stay as they are,
    and no token is shown. It needs the right to read the operator's keyring.

    Channels that the REST API made have no manifest: --rest re-seals them in the cluster, and they stay REST's.

    \b
      kubectl sms reseal -f channel.yaml > resealed.yaml
      kubectl sms reseal --in-place -f east/a.yaml -f east/b.yaml
      kubectl sms reseal --rest
    """
    if rest == bool(files):
        raise click.UsageError("give manifests with -f FILE, or --rest")
    if rest and in_place:
        raise click.UsageError("--in-place is for files")
    if len(files) > 1 and not in_place:
        raise click.UsageError("several files are re-sealed with --in-place only")
    if in_place and Path("-") in files:
        raise click.UsageError("--in-place cannot write standard input")
    if rest:
        asyncio.run(_reseal_rest(namespace, kubeconfig, context, operator_namespace))
        return
    contents = {file: _content(file) for file in files}
    found = {file: _channels(file, contents[file], namespace, kubeconfig, context) for file in files}
    keyring, _ = asyncio.run(_keys(kubeconfig, context, operator_namespace, required=True))
    assert keyring, "required"
    _write(in_place, found, {file: _resealed(file, contents[file], found[file], keyring) for file in files})


def _write(in_place: bool, found: Mapping[Path, list[_Found]], resealed: Mapping[Path, tuple[str, int]]) -> None:
    """Write the files again, or print the only one, and say what changed. All of them were re-sealed before."""
    for file, (text, count) in resealed.items():
        if in_place and count:
            file.write_text(text, encoding="utf-8", newline="")
        elif not in_place:
            click.echo(text, nl=False)
        click.echo(f"{file}: {count} of {len(found[file])} re-sealed", err=True)


def _resealed(file: Path, content: bytes, found: Iterable[_Found], keyring: Keyring) -> tuple[str, int]:
    """Return the text of a file with newer sealed values, and how many there are. Raises `click.ClickException`."""
    text, count = decode(content), 0
    for each in found:
        try:
            newer = _newer(each.sealed, each.binding, keyring) if each.sealed else None
        except Unreadable as error:
            raise click.ClickException(f"{file}: {each.namespace}/{each.name}: {error}. Nothing was written.") from None
        if newer is None:
            continue
        if text.count(each.sealed) != 1:
            raise click.ClickException(
                f"{file}: {each.namespace}/{each.name}: write the sealed value on one line, and once only."
            )
        text, count = text.replace(each.sealed, newer), count + 1
    return text, count


def _newer(sealed: str, binding: Binding, keyring: Keyring) -> str | None:
    """Seal a value again; None if the newest key sealed it. Raises `Unreadable`, also for those of the newest key."""
    from smschannel.api.sealing import fingerprint_of

    token = keyring.unseal(sealed, binding)
    if fingerprint_of(sealed) == keyring.current.fingerprint:
        return None
    return keyring.current.public.seal(token, binding)


async def _reseal_rest(namespace: str | None, kubeconfig: str | None, context: str | None, operator: str) -> None:
    denied = f"{_RIGHT} It also needs the rights to list and patch SmsChannels."
    async with cluster(kubeconfig, context, denied=denied) as api:
        from smschannel.api.sealing import Binding
        from smschannel.cli.admin_store import AdminStore

        kube = AdminStore(api, operator)
        keyring, count, failed = await kube.read_keyring(), 0, 0
        async for body in kube.all_channels(namespace):
            meta, credentials = body["metadata"], body["spec"].get("credentials") or {}
            if not credentials.get("sealed") or "deletionTimestamp" in meta or not owned_by_rest(body):
                continue
            binding = Binding(meta["namespace"], meta["name"], body["spec"]["accountSid"])
            try:
                newer = _newer(credentials["sealed"], binding, keyring)
                if newer is not None:
                    body["spec"]["credentials"] = {**_given(credentials), "sealed": newer}
                    await kube.apply_as_rest(body)
                    count += 1
            except (Unreadable, Conflict) as error:
                failed += 1
                click.echo(f"{meta['namespace']}/{meta['name']}: {error}", err=True)
        click.echo(f"{count} channels of the REST API re-sealed with {keyring.current.fingerprint}", err=True)
        if failed:
            raise click.ClickException(f"{failed} were not re-sealed. Repeat the command to try again.")


def _given(credentials: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in credentials.items() if value}


def _content(file: Path) -> bytes:
    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}.") from None


def _channels(
    file: Path, content: bytes, namespace: str | None, kubeconfig: str | None, context: str | None
) -> list[_Found]:
    found = []
    for name, manifest in read_channels(str(file), content):
        written = manifest["metadata"].get("namespace")
        place = written or namespace or context_namespace(kubeconfig, context) or "sms-channels"
        found.append(_Found(str(file), name, place, manifest))
    return found


async def _keys(
    kubeconfig: str | None, context: str | None, operator_namespace: str, *, required: bool = False
) -> tuple[Keyring | None, PublicKey | None]:
    """Return the keyring, None without the right to read it unless it is `required`, and the published key."""
    async with cluster(kubeconfig, context, denied=_RIGHT) as api:
        from smschannel.cli.admin_store import AdminStore

        kube = AdminStore(api, operator_namespace)
        try:
            return await kube.read_keyring(), None
        except (KubernetesRefused, KeyringLost) as error:
            if required or getattr(error, "status", 0) == 401:
                raise
            return None, await kube.published_key()
