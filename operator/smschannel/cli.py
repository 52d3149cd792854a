"""`kubectl sms`: the command line of the product. kubectl finds it as `kubectl-sms`; it works without kubectl, too.

A token comes from a hidden prompt or from standard input, never from an argument or the environment, which others
may see. Standard output carries the result and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar
from uuid import UUID

import click
import yaml
from pydantic import SecretStr, TypeAdapter, ValidationError

from smschannel.errors import Gone, KubernetesUnavailable
from smschannel.resource import API_VERSION, KIND, AccountSid, InstanceId, LoginSid, PhoneNumber, Rule
from smschannel.sealing import Binding, PublicKey

_LONGEST_TOKEN = 512
_OFFLINE = "Without a cluster: --public-key FILE, with what 'kubectl sms public-key' printed."

Command = TypeVar("Command", bound=Callable[..., Any])


class _Checked(click.ParamType[str]):
    """An argument that keeps to a rule of the resource, and is refused in the rule's words."""

    def __init__(self, name: str, kind: Any) -> None:
        self.name = name
        self._kind: TypeAdapter[str] = TypeAdapter(kind)

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return self._kind.validate_python(value)
        except ValidationError as error:
            self.fail(error.errors(include_input=False)[0]["msg"], param, ctx)


class _Instance(_Checked):
    """An instance's id as people have it: with capitals, without dashes, in braces."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        with contextlib.suppress(ValidationError):
            value = str(TypeAdapter(UUID).validate_python(value))
        return super().convert(value, param, ctx)


_INSTANCE = _Instance("uuid", InstanceId)
_ACCOUNT_SID = _Checked("AC...", AccountSid)
_LOGIN_SID = _Checked("SK...|AC...", LoginSid)
_PHONE_NUMBER = _Checked("E.164", PhoneNumber)
_NAMESPACE = _Checked(
    "namespace",
    Annotated[
        str,
        Rule(
            "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
            "a namespace is at most 63 lower-case letters, digits and dashes, such as sms-channels",
        ),
    ],
)


def _cluster_options(command: Command) -> Command:
    for option in (
        click.option(
            "--operator-namespace",
            type=_NAMESPACE,
            default="sms-operator",
            show_default=True,
            help="Where the operator publishes its key.",
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sms-channel-operator", message="%(version)s")
def cli() -> None:
    """SMS channels of HydraCore instances on Kubernetes."""


@cli.command()
@click.argument("instance", type=_INSTANCE)
@click.option("--account-sid", type=_ACCOUNT_SID, required=True, help="The Twilio account that owns the number.")
@click.option("-n", "--namespace", type=_NAMESPACE, help="The channel's; the context's, else sms-channels by default.")
@click.option("--phone-number", type=_PHONE_NUMBER, help="Write a whole SmsChannel for this number, +61400111222.")
@click.option("--login-sid", type=_LOGIN_SID, help="Whose token it is, if not the account's: an API key, a parent.")
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
@_cluster_options
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
    namespace = namespace or _context_namespace(kubeconfig, context) or "sms-channels"
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


@cli.command("public-key")
@_cluster_options
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
    from kubernetes.aio.config import ConfigException  # a second that --help and offline sealing need not wait for

    try:
        return asyncio.run(_fetch_key(kubeconfig, context, operator_namespace))
    except (ConfigException, KeyError, TypeError, ValueError, OSError, yaml.YAMLError) as error:
        raise click.ClickException(
            f"The kubeconfig cannot be used: {error}. Name another with --kubeconfig or --context. {_OFFLINE}"
        ) from None


async def _fetch_key(kubeconfig: str | None, context: str | None, operator_namespace: str) -> PublicKey:
    from smschannel.kube_api import KubeApi, KubernetesRefused
    from smschannel.kube_port import PUBLIC_KEY, PUBLIC_KEY_CONFIGMAP

    what = f"ConfigMap {operator_namespace}/{PUBLIC_KEY_CONFIGMAP}"
    async with await KubeApi.connect(kubeconfig, context) as api:
        cluster = f"The cluster at {api.configuration.host}"
        path = f"/api/v1/namespaces/{operator_namespace}/configmaps/{PUBLIC_KEY_CONFIGMAP}"
        try:
            published = await api.request("GET", path)
        except Gone:
            raise click.ClickException(
                f"{cluster} has no {what}. Is the operator installed there, and has it started once? If it runs in"
                " another namespace: --operator-namespace"
            ) from None
        except KubernetesUnavailable as error:
            raise click.ClickException(
                f"{cluster} cannot be reached: {error}. Is it up, and this the right --context? {_OFFLINE}"
            ) from None
        except KubernetesRefused as error:
            raise click.ClickException(
                f"{cluster} does not know you: log in again, or name another --context. {_OFFLINE}"
                if error.status == 401
                else f"{cluster} does not let you read {what}: {error}. The Role sms-sealing-key-reader allows it to"
                f" all who are logged in: is it installed? {_OFFLINE}"
            ) from None
    try:
        return PublicKey.decode(published["data"][PUBLIC_KEY])
    except (KeyError, TypeError, ValueError):
        raise click.ClickException(
            f"{what} holds no public key. The operator writes it anew when it is restarted."
        ) from None


def _context_namespace(kubeconfig: str | None, context: str | None) -> str | None:
    """The namespace kubectl would use, if one is named. As kubectl has it, the first file that says something wins."""
    files = kubeconfig or os.environ.get("KUBECONFIG") or str(Path.home() / ".kube/config")
    try:
        configs = [
            yaml.safe_load(file.read_text()) or {} for file in map(Path, files.split(os.pathsep)) if file.is_file()
        ]
        current = context or next((each["current-context"] for each in configs if each.get("current-context")), None)
        known = {named["name"]: named["context"] for each in reversed(configs) for named in each.get("contexts") or ()}
        found: str | None = known.get(current, {}).get("namespace")
    except (AttributeError, KeyError, TypeError, ValueError, OSError, yaml.YAMLError):
        raise click.ClickException(f"{files} is no kubeconfig: name another with --kubeconfig") from None
    if context and context not in known:
        raise click.ClickException(f"There is no context {context} in {files}, but: {', '.join(known) or 'none'}")
    return found


def main() -> None:
    cli(prog_name="kubectl sms")


if __name__ == "__main__":
    main()
