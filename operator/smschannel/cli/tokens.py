"""Read a token from a hidden prompt or from standard input, never from an argument or the environment.

Other users of the machine may see those.
"""

from __future__ import annotations

import re
import sys

import click
from pydantic import SecretStr

from smschannel.api.text import TextError, clean, decode, unsendable

_MAX_TOKEN_LENGTH = 512


def read_token(login: str) -> SecretStr:
    """Read and validate the token of `login`. It is not asked for twice: the operator verifies it with Twilio.

    Raises `click.ClickException`; the message never contains the token.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        given: str = click.prompt(
            f"Token of {login} (not shown)", hide_input=True, err=True, default="", show_default=False
        )
    else:
        given = _from_stdin()
    token = clean(given)
    if not token:
        raise click.ClickException(
            "The token is empty. Type it at the prompt, or give it on standard input: kubectl sms ... < FILE"
        )
    if len(token) > _MAX_TOKEN_LENGTH:
        raise click.ClickException(
            f"This is not a token: it has at least {len(token)} characters, and Twilio's tokens have 32. Is it already"
            " sealed?"
        )
    if wrong := unsendable(token):
        raise click.ClickException(
            f"This is not a token: it contains spaces, quotes, line breaks or non-ASCII characters, first {wrong}."
            " Give the token alone, as the Twilio console shows it."
        )
    if re.fullmatch("(AC|SK)[0-9a-f]{32}", token):
        raise click.ClickException(
            "This is a SID, not a token. The Twilio console shows the token below it: 'Auth Token', or 'Secret' for an"
            " API key."
        )
    return SecretStr(token)


def _from_stdin() -> str:
    if sys.stdin is None:
        return ""
    try:
        return decode(sys.stdin.buffer.read(16 * _MAX_TOKEN_LENGTH))
    except TextError as error:
        raise click.ClickException(f"This is not a token: it {error}. Give the token alone.") from None
