"""`kubectl sms seal` and `public-key`: what anybody may do who writes channels.

A token comes from a hidden prompt or from standard input, never from an argument or the environment, which others
may see. Standard output carries the result and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import click
import yaml
from pydantic import SecretStr

from smschannel.api.errors import NotFound
from smschannel.api.resource import API_VERSION, KIND
from smschannel.api.sealing import Binding, PublicKey
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

_LONGEST_TOKEN = 512
_OFFLINE = "Without a cluster: --public-key FILE, with what 'kubectl sms public-key' printed."


@click.command()
@click.argument("instance", type=INSTANCE)
@click.option("--account-sid", type=ACCOUNT_SID, required=True, help="The Twilio account that owns the number.")
@click.option("-n", "--namespace", type=NAMESPACE, help="The channel's; the context's, else sms-channels by default.")
@click.option("--phone-number", type=PHONE_NUMBER, help="Write a whole SmsChannel for this number, +61400111222.")
@click.option("--login-sid", type=LOGIN_SID, help="Whose token it is, if not the account's: an API key, a parent.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["value", "yaml", "json"]),
    help="The sealed value alone, or an SmsChannel. With --phone-number, yaml by default.",
)
@click.option(
    "--public-key",
    "key_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Seal offline, with the key that 'kubectl sms public-key' printed into this file.",
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

    The result opens only for this instance, namespace and account, and only for the operator. The token is asked
    for, or read from standard input; it cannot be given as an argument, where others would see it.

    \b
    Ask for the token and write a manifest:
      kubectl sms seal 497f6eca-6276-4993-bfeb-53cbbbba6f08 --account-sid AC... \\
        --phone-number +61400111222 > channel.yaml
      kubectl apply -f channel.yaml

    \b
    The value for spec.credentials.sealed alone, the token from a password manager:
      pass twilio/token | kubectl sms seal 497f6eca-... --account-sid AC... -n sms-channels

    \b
    Where there is no cluster, as in CI:
      kubectl sms public-key > sealing.key
      kubectl sms seal 497f6eca-... --account-sid AC... -n sms-channels --public-key sealing.key < token
    """
    output = output or ("yaml" if phone_number else "value")
    if output != "value" and not phone_number:
        raise click.UsageError(f"-o {output} writes a whole SmsChannel: give --phone-number, too")
    if login_sid and output == "value":
        raise click.UsageError("--login-sid is written into an SmsChannel: give --phone-number and -o yaml, too")
    namespace = namespace or context_namespace(kubeconfig, context) or "sms-channels"
    key = _public_key(key_file) if key_file else _published_key(kubeconfig, context, operator_namespace)
    binding = Binding(namespace, instance, account_sid)
    token = _read_token(login_sid or account_sid)
    try:
        sealed = key.seal(token, binding)
    except ValueError as error:
        raise click.ClickException(f"The public key is damaged: {error}. Fetch it again.") from None
    if output == "value":
        click.echo(f"Sealed for namespace {namespace}, instance {instance}, account {account_sid} only.", err=True)
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

    It is no secret. What it sealed can be opened as long as the operator keeps the key's private half.

    \b
      kubectl sms public-key > sealing.key
      kubectl sms seal ... --public-key sealing.key
    """
    click.echo(_published_key(kubeconfig, context, operator_namespace).encoded)


def _read_token(login: str) -> SecretStr:
    """Once is enough, even where nobody sees it: the operator tries it at Twilio before it counts."""
    if sys.stdin is not None and sys.stdin.isatty():
        given: str = click.prompt(
            f"Token of {login} (not shown)", hide_input=True, err=True, default="", show_default=False
        )
    else:
        given = _from_stdin()
    token = given.strip()
    if not token:
        raise click.ClickException(
            "There is no token. Type it at the prompt, or give it on standard input: kubectl sms seal ... < FILE"
        )
    if len(token) > _LONGEST_TOKEN:
        raise click.ClickException(
            f"This is no token: it has {len(token)} characters or more, where Twilio's have 32. Is it sealed already?"
        )
    if not re.fullmatch("[!-~]+", token):
        raise click.ClickException(
            "This is no token: there are spaces, line ends or letters in it that no token has. Give the token alone,"
            " as the Twilio console shows it."
        )
    if re.fullmatch("(AC|SK)[0-9a-f]{32}", token):
        raise click.ClickException(
            "This is a SID, not a token. The token stands below it in the Twilio console: 'Auth Token', or an API"
            " key's 'Secret'."
        )
    return SecretStr(token)


def _from_stdin() -> str:
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read(16 * _LONGEST_TOKEN).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise click.ClickException("This is no token: it is not text. Give the token alone.") from None


def _public_key(file: Path) -> PublicKey:
    try:
        return PublicKey.decode(file.read_text("utf-8-sig").strip())
    except ValueError as error:
        raise click.ClickException(
            f"{file} holds no public key: {error}. Make it with: kubectl sms public-key > {file}"
        ) from None


def _published_key(kubeconfig: str | None, context: str | None, operator_namespace: str) -> PublicKey:
    return asyncio.run(_fetch_key(kubeconfig, context, operator_namespace))


async def _fetch_key(kubeconfig: str | None, context: str | None, operator_namespace: str) -> PublicKey:
    async with cluster(kubeconfig, context, without=_OFFLINE) as api:
        from smschannel.api.errors import KubernetesRefused
        from smschannel.api.names import PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP

        what = f"ConfigMap {operator_namespace}/{PUBLIC_KEY_CONFIGMAP}"
        try:
            published = await api.request(
                "GET", f"/api/v1/namespaces/{operator_namespace}/configmaps/{PUBLIC_KEY_CONFIGMAP}"
            )
        except NotFound:
            raise click.ClickException(
                f"The cluster at {api.configuration.host} has no {what}. Is the operator installed there, and has it"
                " started once? If it runs in another namespace: --operator-namespace"
            ) from None
        except KubernetesRefused as error:
            if error.status == 401:
                raise
            raise click.ClickException(
                f"The cluster at {api.configuration.host} does not let you read {what}: {error}. The Role"
                f" sms-sealing-key-reader allows it to all who are logged in: is it installed? {_OFFLINE}"
            ) from None
    try:
        return PublicKey.decode(published["data"][PUBLIC_KEY])
    except (KeyError, TypeError, ValueError):
        raise click.ClickException(
            f"{what} holds no public key. The operator writes it anew when it is restarted."
        ) from None
