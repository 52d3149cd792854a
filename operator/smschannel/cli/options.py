"""What the commands of `kubectl sms` share: argument types, cluster options, and the connection to the cluster.

Every command is imported to print `--help`, so modules of `cli` import what is slow (the Kubernetes client, HTTP,
cryptography, the operator itself) inside the functions that need it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click
from pydantic import TypeAdapter, ValidationError

from smschannel.api.errors import ChannelError, KubeconfigError, KubernetesUnavailable, NotConnected
from smschannel.api.resource import AccountSid, InstanceId, LoginSid, Namespace, PhoneNumber
from smschannel.api.text import clean, clean_phone_number, unexpected

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient
    from smschannel.cli.admin_store import AdminStore
    from smschannel.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


class _Checked(click.ParamType[str]):
    """An argument that is cleaned and then validated by a type of the resource; the error message is that type's."""

    def __init__(self, name: str, kind: Any, cleaned: Callable[[str], str] = clean) -> None:
        self.name = name
        self.rule: TypeAdapter[str] = TypeAdapter(kind)
        self._cleaned = cleaned

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        value = self._cleaned(value)
        try:
            return self.rule.validate_python(value)
        except ValidationError as error:
            wrong = unexpected(value)
            expected = error.errors(include_input=False)[0]["msg"]
            self.fail(f"it contains {wrong}; {expected}" if wrong else expected, param, ctx)


class _Instance(_Checked):
    """An instance ID in any form of a UUID: upper case, without dashes, in braces."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        with contextlib.suppress(ValidationError):
            value = str(TypeAdapter(UUID).validate_python(clean(value)))
        return super().convert(value, param, ctx)


INSTANCE = _Instance("uuid", InstanceId)
ACCOUNT_SID = _Checked("AC...", AccountSid)
LOGIN_SID = _Checked("SK...|AC...", LoginSid)
PHONE_NUMBER = _Checked("E.164", PhoneNumber, clean_phone_number)
NAMESPACE = _Checked("namespace", Namespace)


def instance_options(command: Command) -> Command:
    """Add -n, --namespace for the namespace of a channel; `channel_namespace` gives it its default."""
    text = "The channel's namespace. Default: the context's, or else sms-channels."
    return click.option("-n", "--namespace", type=NAMESPACE, help=text)(command)


def channel_namespace(namespace: str | None, kubeconfig: str | None, context: str | None) -> str:
    """Return the namespace of a channel that -n names, or else the context's, or else sms-channels."""
    return namespace or context_namespace(kubeconfig, context) or "sms-channels"


def timeout_option(seconds: int) -> Callable[[Command], Command]:
    """Add --timeout in seconds to a command."""
    return click.option(
        "--timeout", type=click.IntRange(1, 86_400), default=seconds, show_default=True, help="Seconds to wait."
    )


def cluster_options(command: Command) -> Command:
    """Add --kubeconfig, --context and --operator-namespace to a command."""
    return kubeconfig_options(
        click.option(
            "--operator-namespace",
            type=NAMESPACE,
            envvar="SMSCHANNEL_OPERATOR_NAMESPACE",
            default="sms-operator",
            show_default=True,
            help="The operator's namespace, which has its records, keys and settings.",
        )(command)
    )


def kubeconfig_options(command: Command) -> Command:
    """Add --kubeconfig and --context to a command that needs nothing of the operator's namespace."""
    for option in (
        click.option("--context", help="A context of the kubeconfig; the current one by default."),
        click.option(
            "--kubeconfig",
            type=click.Path(exists=True, dir_okay=False),
            help="$KUBECONFIG or ~/.kube/config by default.",
        ),
    ):
        command = option(command)
    return command


def context_namespace(kubeconfig: str | None, context: str | None) -> str | None:
    """Return the namespace of the context that kubectl would use, or None if the context names none.

    `kubeconfig` None means $KUBECONFIG, or else ~/.kube/config; `context` None means the current one. As in kubectl,
    the first file that sets a value wins. Raises `click.ClickException`.
    """
    from smschannel.api.kubeconfig import Kubeconfig

    try:
        return Kubeconfig(kubeconfig).namespace(context)
    except KubeconfigError as error:
        raise click.ClickException(f"{error}. Name another with --kubeconfig or --context.") from None


@contextlib.asynccontextmanager
async def cluster(
    kubeconfig: str | None, context: str | None, *, without: str = "", denied: str = ""
) -> AsyncIterator[KubeClient]:
    """Connect to the API server, and turn its errors into `click.ClickException`s that say what to do.

    `without` is a sentence about working without a cluster, added where none can be reached; `denied` one about the
    rights that are needed, added where one is missing.
    """
    from smschannel.api.errors import KubernetesRefused, NoKindMatch
    from smschannel.api.kube_client import KubeClient

    async with contextlib.AsyncExitStack() as stack:
        try:
            api = await stack.enter_async_context(await KubeClient.connect(kubeconfig, context))
        except KubeconfigError as error:
            raise _error(
                f"The kubeconfig cannot be used: {error}. Name another with --kubeconfig or --context.", without
            ) from None
        where = f"The cluster at {api.configuration.host}"
        try:
            yield api
        except NotConnected as error:
            raise _error(f"{where} cannot be reached: {error}.", without) from None
        except KubernetesUnavailable as error:
            raise _error(
                f"{where} cannot be reached: {error}. Is it running, and is this the right --context?", without
            ) from None
        except NoKindMatch:
            raise _error(f"{where} has no kind SmsChannel: is the CRD installed? kubectl apply -f crds/") from None
        except KubernetesRefused as error:
            if error.status == 401:
                raise _error(
                    f"{where} does not accept your credentials: log in again, or name another --context.", without
                ) from None
            raise _error(f"{where} refuses this: {str(error).rstrip('.')}.", denied) from None
        except ChannelError as error:
            raise _error(f"{str(error).rstrip('.')}.") from None


async def settings_of(kube: AdminStore, *, sends_logins: bool = True) -> Settings:
    """Return the operator's settings: from this environment, or else as the operator published them.

    Twilio's URLs come from this environment or are Twilio's own, since logins are sent there, and others may be able to
    write what is published. Raises `click.ClickException` if the published ones differ and the command `sends_logins`,
    or settings are incomplete or invalid.
    """
    from smschannel.api.environment import explain, unknown_variables
    from smschannel.cli.plan_text import shown
    from smschannel.settings import Settings

    for unknown in unknown_variables(Settings, os.environ):
        click.echo(f"Warning: {unknown}", err=True)
    content = await kube.published_settings()
    try:
        settings = Settings.from_published(content, kube.namespace)
    except ValidationError as error:
        hint = (
            f"\nThe operator has published none in namespace {kube.namespace}: has it started once? If it runs in"
            " another namespace, name it with --operator-namespace. Or set the same variables here."
        )
        raise click.ClickException(explain(error, Settings) + ("" if content else hint)) from None
    if sends_logins and (foreign := settings.foreign_origin(content)):
        variable, value = foreign
        raise click.ClickException(
            f"The operator's published settings name another Twilio: {variable}={shown(value)}. Logins are sent there,"
            " and others may have written that, so this command does not follow it. If you know that this is the"
            f" operator's own setting, set it here: export {variable}=..."
        )
    return settings


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone, unless the user has said --yes; end the command on no."""
    if yes:
        return
    if not sys.stdin.isatty():  # it may be a token, and is not an answer
        raise click.ClickException(f"{question} This is asked at a terminal: add --yes where there is none.")
    click.confirm(question, abort=True, err=True)


def _error(*sentences: str) -> click.ClickException:
    return click.ClickException(" ".join(filter(None, sentences)))
