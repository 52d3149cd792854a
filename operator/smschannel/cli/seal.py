"""`kubectl sms seal` and `kubectl sms public-key`: encrypt a Twilio token so that only the operator can read it.

The token is read from a hidden prompt or from standard input, never from an argument or the environment, which other
users of the machine may see. Standard output carries the result and nothing else.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
import yaml

from smschannel.api.errors import KubernetesRefused, NotFound
from smschannel.api.names import NAMESPACES, PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP, core_path
from smschannel.api.resource import API_VERSION, KIND
from smschannel.api.text import TextError, clean, decode
from smschannel.cli.options import (
    ACCOUNT_SID,
    INSTANCE,
    LOGIN_SID,
    NAMESPACE,
    PHONE_NUMBER,
    cluster,
    cluster_options,
    context_namespace,
)
from smschannel.cli.tokens import read_token

if TYPE_CHECKING:
    from smschannel.api.sealing import PublicKey

_OFFLINE = "Without a cluster: --public-key FILE, with the output of 'kubectl sms public-key'."


class _Seal(click.Command):
    """Does not repeat an argument that it does not expect: it may be the token."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if "extra argument" not in error.message:
                raise
            raise click.UsageError(
                "Give one INSTANCE and no other argument. The token is asked for, or read from standard input. If you"
                " wrote it on the command line, others may have seen it: replace it at Twilio.",
                ctx,
            ) from None


@click.command(cls=_Seal)
@click.argument("instance", type=INSTANCE)
@click.option("--account-sid", type=ACCOUNT_SID, required=True, help="The Twilio account that owns the number.")
@click.option(
    "-n", "--namespace", type=NAMESPACE, help="The channel's namespace. Default: the context's, or else sms-channels."
)
@click.option(
    "--phone-number", type=PHONE_NUMBER, help="Print a whole SmsChannel for this number, such as +61400111222."
)
@click.option(
    "--login-sid", type=LOGIN_SID, help="The API key or parent account of the token, if it is not the account's."
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["value", "yaml", "json"]),
    help="The sealed value alone, or an SmsChannel. Default: value; yaml with --phone-number.",
)
@click.option(
    "--public-key",
    "key_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Seal offline with this file, the output of 'kubectl sms public-key'.",
)
@cluster_options
def seal(
    instance: str,
    account_sid: str,
    namespace: str | None,
    phone_number: str | None,
    login_sid: str | None,
    output: str | None,
    key_file: Path | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Seal the Twilio token of INSTANCE, so that it is safe in Git.

    Only the operator can open the result, and only for this instance, namespace and account. The command prompts for
    the token, or reads it from standard input; an argument would be visible to other users of this machine.

    \b
    Enter the token at the prompt, and write a manifest:
      kubectl sms seal 497f6eca-6276-4993-bfeb-53cbbbba6f08 --account-sid AC... \\
        --phone-number +61400111222 > channel.yaml
      kubectl apply -f channel.yaml

    \b
    Print only the value for spec.credentials.sealed, with the token from a password manager:
      pass twilio/token | kubectl sms seal 497f6eca-... --account-sid AC... -n sms-channels

    \b
    Seal without a cluster, as in CI:
      kubectl sms public-key > sealing.key
      kubectl sms seal 497f6eca-... --account-sid AC... -n sms-channels --public-key sealing.key < token
    """
    from smschannel.api.sealing import Binding

    output = output or ("yaml" if phone_number else "value")
    if output != "value" and not phone_number:
        raise click.UsageError(f"-o {output} prints a whole SmsChannel: add --phone-number")
    if login_sid and output == "value":
        raise click.UsageError("--login-sid is a field of an SmsChannel: add --phone-number and -o yaml")
    namespace = namespace or context_namespace(kubeconfig, context) or "sms-channels"
    if key_file:
        key = _public_key(key_file)
    else:
        key, watched = asyncio.run(_published(kubeconfig, context, operator_namespace))
        if watched and namespace not in watched:
            click.echo(
                f"Warning: the operator does not watch namespace {namespace}, so the channel would not work. It watches"
                f" {', '.join(watched)}: name one with -n.",
                err=True,
            )
    binding = Binding(namespace, instance, account_sid)
    token = read_token(login_sid or account_sid)
    try:
        sealed = key.seal(token, binding)
    except ValueError as error:
        raise click.ClickException(f"The public key is damaged: {error}. Run 'kubectl sms public-key' again.") from None
    click.echo(f"Sealed for namespace {namespace}, instance {instance}, account {account_sid} only.", err=True)
    if output == "value":
        click.echo(sealed)
        return
    manifest = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": instance, "namespace": namespace},
        "spec": {
            "accountSid": account_sid,
            "phoneNumber": phone_number,
            "credentials": {**({"sid": login_sid} if login_sid else {}), "sealed": sealed},
        },
    }
    written = json.dumps(manifest, indent=2) if output == "json" else yaml.safe_dump(manifest, sort_keys=False)
    click.echo(written.rstrip())


@click.command("public-key")
@cluster_options
def public_key(kubeconfig: str | None, context: str | None, operator_namespace: str) -> None:
    """Print the operator's public key, for sealing offline.

    The public key may be published. Values sealed with it stay readable as long as the operator has the private key.

    \b
      kubectl sms public-key > sealing.key
      kubectl sms seal ... --public-key sealing.key
    """
    key, _ = asyncio.run(_published(kubeconfig, context, operator_namespace))
    click.echo(key.encoded)


def _public_key(file: Path) -> PublicKey:
    from smschannel.api.sealing import PublicKey

    try:
        return PublicKey.decode(clean(decode(file.read_bytes())))
    except TextError as error:
        raise click.ClickException(f"{file} {error}") from None
    except ValueError as error:
        raise click.ClickException(
            f"{file} is not a public key: {error}. Create it with: kubectl sms public-key > {file}"
        ) from None


async def _published(
    kubeconfig: str | None, context: str | None, operator_namespace: str
) -> tuple[PublicKey, tuple[str, ...]]:
    """Return the public key and the namespaces that the operator watches; none if it is older and publishes none."""
    from smschannel.api.sealing import PublicKey

    async with cluster(kubeconfig, context, without=_OFFLINE) as api:
        where, what = (
            f"The cluster at {api.configuration.host}",
            f"ConfigMap {operator_namespace}/{PUBLIC_KEY_CONFIGMAP}",
        )
        try:
            published = await api.request("GET", core_path(operator_namespace, "configmaps", PUBLIC_KEY_CONFIGMAP))
        except NotFound:
            raise click.ClickException(
                f"{where} has no {what}. Is the operator installed there, and has it started once? If it runs in"
                " another namespace, name it with --operator-namespace."
            ) from None
        except KubernetesRefused as error:
            if error.status == 401:
                raise
            raise click.ClickException(
                f"{where} does not let you read {what}: {error}. The Role sms-sealing-key-reader allows it to all"
                f" authenticated users: is it installed? {_OFFLINE}"
            ) from None
    try:
        key = PublicKey.decode(clean(published["data"][PUBLIC_KEY]))
        return key, tuple(published["data"].get(NAMESPACES, "").split())
    except (KeyError, TypeError, ValueError):
        raise click.ClickException(
            f"{what} has no valid public key. Restart the operator: it publishes the key again."
        ) from None
