"""`kubectl sms test`: does a message to the number arrive at the instance?"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import SecretStr

from smschannel.api.errors import ChannelError, KubernetesRefused, NotFound
from smschannel.api.names import core_path
from smschannel.api.resource import CREDENTIALS_LABEL
from smschannel.api.text import clean
from smschannel.cli.channels import DENIED, read_channel
from smschannel.cli.options import (
    INSTANCE,
    PHONE_NUMBER,
    channel_namespace,
    cluster,
    cluster_options,
    confirm,
    instance_options,
    settings_of,
)
from smschannel.cli.output import printable
from smschannel.cli.tokens import read_token

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient, Object
    from smschannel.settings import Settings
    from smschannel.twilio.messages import Messages, Sent, Way

_NOBODY = "+15005550006"
"""Twilio's number for tests: it belongs to nobody."""
_FOLLOW_SECONDS = 30


@dataclass(frozen=True)
class Options:
    """What the user asked for; `sender` is empty if none was named."""

    sender: str
    body: str
    unsigned: bool
    yes: bool


@click.command("test")
@click.argument("instance", type=INSTANCE)
@click.option(
    "--send", "really", is_flag=True, help="Send a real SMS through Twilio. It asks first, and says the price."
)
@click.option("--from", "sender", type=PHONE_NUMBER, help="The sender; with --send another number of the same account.")
@click.option("--body", default="Test of the SMS channel", show_default=True, help="The text of the message.")
@click.option("--unsigned", is_flag=True, help="Deliver without a signature: the webhook must answer 403.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@instance_options
@cluster_options
def test(
    instance: str,
    really: bool,
    sender: str | None,
    body: str,
    unsigned: bool,
    yes: bool,
    namespace: str | None,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Deliver a test message to the webhook of INSTANCE, and say what came back.

    The message goes from this machine straight to the webhook, as Twilio would post it; Twilio is not involved, and the
    instance handles it like any message. Only the account's auth token makes a valid signature: it is read from the
    channel's Secret if you may read that, and else asked for, or read from standard input. It is sent to nobody.

    With --send, Twilio sends a real SMS from another number of the account to the channel's number, which costs
    money. That needs the login of the channel.

    It ends with 0 if the webhook did what it should, and with 1 otherwise.

    \b
    Is the webhook reachable, and does it accept what Twilio signs?
      kubectl sms test 497f6eca-6276-4993-bfeb-53cbbbba6f08

    \b
    Does it reject what nobody signed? And the whole way, with a real SMS:
      kubectl sms test 497f6eca-6276-4993-bfeb-53cbbbba6f08 --unsigned
      kubectl sms test 497f6eca-6276-4993-bfeb-53cbbbba6f08 --send --from +61400111333
    """
    if really and unsigned:
        raise click.UsageError("--unsigned is about a message that Twilio does not send: leave out --send")
    if really and not sender:
        raise click.UsageError("--send needs --from: another number of the same account, which sends the SMS")
    where = channel_namespace(namespace, kubeconfig, context)
    options = Options(sender or "", body, unsigned, yes)

    async def run() -> None:
        async with cluster(kubeconfig, context, denied=DENIED) as api:
            channel = await read_channel(api, where, instance)
            settings = await _settings(api, operator_namespace, sends_logins=really)
            if really:
                await _send(api, channel, settings, options)
            else:
                await _deliver(api, channel, settings, options)

    asyncio.run(run())


async def _settings(api: KubeClient, operator_namespace: str, *, sends_logins: bool) -> Settings | None:
    """Return the operator's settings; None for users who may not read them."""
    from smschannel.cli.admin_store import AdminStore

    try:
        return await settings_of(AdminStore(api, operator_namespace), sends_logins=sends_logins)
    except KubernetesRefused as error:
        if error.status != 403:
            raise
        return None


async def _deliver(api: KubeClient, channel: Object, settings: Settings | None, options: Options) -> None:
    from smschannel.api.errors import EgressError
    from smschannel.cli.deliveries import judge
    from smschannel.cli.http import deliver
    from smschannel.twilio.messages import inbound_form, signature

    spec = channel["spec"]
    url = _webhook_url(channel, settings, options)
    for note in _routing_notes(channel):
        click.echo(f"Note: {printable(note)}", err=True)
    form = inbound_form(spec["accountSid"], options.sender or _NOBODY, spec["phoneNumber"], options.body)
    headers = {"User-Agent": "TwilioProxy/1.1", "Accept": "*/*"}
    if options.unsigned:
        click.echo(f"Delivering to {printable(url)} without a signature.", err=True)
    else:
        token, source = await _signing_token(api, channel)
        headers["X-Twilio-Signature"] = signature(token, url, form)
        click.echo(f"Delivering to {printable(url)}, signed with the auth token {source}.", err=True)
    try:
        answer = await deliver(url, form, headers, _way_to_twilio(settings).ca_bundle)
    except EgressError as error:
        raise click.ClickException(str(error)) from None
    verdict = judge(answer, signed=not options.unsigned, url=printable(url))
    click.echo(printable(verdict.text))
    if not verdict.good:
        click.echo(f"What to do: {verdict.remedy}", err=True)
        raise click.exceptions.Exit(1)


def _webhook_url(channel: Mapping[str, Any], settings: Settings | None, options: Options) -> str:
    """Return the webhook as the operator derives it.

    Whoever may not read the operator's settings is asked first: the channel's status has it, but others might have
    written that.
    """
    meta, reported = channel["metadata"], (channel.get("status") or {}).get("webhookUrl") or ""
    if settings is not None:
        return settings.template.url(meta["namespace"], meta["name"])
    if not reported:
        raise click.ClickException("The operator has reported no webhook for this channel yet: kubectl sms status")
    if not reported.startswith(("https://", "http://")):
        raise click.ClickException("The webhook in the channel's status is not a URL: somebody else has written it.")
    click.echo("You may not read the operator's settings, so this is the webhook that the status has.", err=True)
    confirm(f"Deliver to {printable(reported)} ?", yes=options.yes)
    return str(reported)


def _routing_notes(channel: Mapping[str, Any]) -> list[str]:
    """Return what keeps real messages from taking this way."""
    from smschannel.cli.channel_text import summary

    routing = summary(channel)["routing"]
    if routing["effective"] == "True":
        return []
    what = "Twilio does not deliver" if routing["effective"] == "False" else "It is not known whether Twilio delivers"
    return [f"{what} real messages to this webhook: {routing['message'] or 'no operator has reported it yet.'}"]


async def _signing_token(api: KubeClient, channel: Mapping[str, Any]) -> tuple[SecretStr, str]:
    """Return the account's auth token, and where it is from. Twilio signs with it, and never with an API key."""
    spec = channel["spec"]
    account, login = spec["accountSid"], spec["credentials"].get("sid") or spec["accountSid"]
    if login == account and (token := await _token_of_secret(api, channel)):
        return token, f"in Secret {spec['credentials']['secretKeyRef']['name']}"
    return _asked(account), "that you gave"


async def _token_of_secret(api: KubeClient, channel: Mapping[str, Any]) -> SecretStr | None:
    """Return the token of the channel's Secret; None if it has none, or the user may not read it."""
    reference = channel["spec"]["credentials"].get("secretKeyRef")
    if not reference:
        return None
    try:
        secret = await api.request("GET", core_path(channel["metadata"]["namespace"], "secrets", reference["name"]))
    except (NotFound, KubernetesRefused):
        return None
    if (secret["metadata"].get("labels") or {}).get(CREDENTIALS_LABEL) != "true":
        return None  # the operator does not use it either
    with contextlib.suppress(KeyError, ValueError):
        return SecretStr(clean(base64.b64decode(secret["data"][reference["key"]]).decode()))
    return None


def _asked(login: str) -> SecretStr:
    try:
        return read_token(login)
    except click.ClickException as error:
        hint = "To see that the webhook rejects what nobody signed: --unsigned"
        raise click.ClickException(f"{error.message} {hint}") from None


async def _send(api: KubeClient, channel: Object, settings: Settings | None, options: Options) -> None:
    from smschannel.core.record import Login
    from smschannel.twilio.messages import Messages

    spec = channel["spec"]
    sid = spec["credentials"].get("sid") or spec["accountSid"]
    login = Login(sid=sid, token=await _token_of_secret(api, channel) or read_token(sid))
    try:
        async with Messages(login, spec["accountSid"], _way_to_twilio(settings)) as messages:
            price = await _price(messages, spec["phoneNumber"])
            click.echo(f"One SMS from {options.sender} to {spec['phoneNumber']}. {price}", err=True)
            confirm("Send it?", yes=options.yes)
            await _follow(messages, await messages.send(options.sender, spec["phoneNumber"], options.body))
    except ChannelError as error:
        raise click.ClickException(str(error)) from None


def _way_to_twilio(settings: Settings | None) -> Way:
    """Return how to reach Twilio: as the settings say, or as this environment does if they may not be read."""
    from smschannel.twilio.messages import Way

    if settings:
        return Way(settings.twilio_url, settings.api_origin, settings.ca_bundle)
    bundle = os.environ.get("SMSCHANNEL_CA_BUNDLE")
    return Way(os.environ.get("SMSCHANNEL_TWILIO_URL") or None, ca_bundle=Path(bundle) if bundle else None)


async def _price(messages: Messages, receiver: str) -> str:
    """Return what Twilio says that it costs; that it could not be read is said, and not guessed."""
    try:
        price = await messages.price(receiver)
    except ChannelError as error:
        return f"Its price could not be read ({error}) See https://www.twilio.com/sms/pricing"
    amount = price.least if price.least == price.most else f"{price.least} to {price.most}"
    return f"Twilio lists {amount} {price.currency} for an SMS to {price.country}; receiving it may cost as well."


async def _follow(messages: Messages, sent: Sent) -> None:
    """Print what becomes of a message, for some seconds."""
    from smschannel.twilio.messages import FINAL

    click.echo(f"Twilio took message {sent.sid}: {sent.status}.")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FOLLOW_SECONDS):
            while sent.status not in FINAL:
                await asyncio.sleep(1)  # Twilio offers no event to wait for
                sent = await messages.fetch(sent.sid)
    if sent.error_code or sent.status in {"failed", "undelivered", "canceled"}:
        raise click.ClickException(
            f"The message is {sent.status}, code {sent.error_code}: see"
            f" https://www.twilio.com/docs/api/errors/{sent.error_code}"
        )
    click.echo(f"It is {sent.status}. Now look whether the instance shows it.")
