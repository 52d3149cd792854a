"""Reads Twilio's answers, or what a proxy sends in their place, within bounds: size, nesting, what they are about."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

import aiohttp

from smschannel.api.errors import TwilioUnavailable

_MOST_BYTES = 32 * 2**20
"""Ten times a page of 1,000 numbers."""
_NUMBER_SID = re.compile("PN[0-9a-fA-F]{32}", re.ASCII)


async def read_text(response: aiohttp.ClientResponse) -> str:
    """Read the body of an answer that aiohttp does not decompress. Raises `TwilioUnavailable` if it is too large."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(2**16):
        body += chunk
        if len(body) > _MOST_BYTES:
            raise _too_large(response.status)
    if response.headers.get("Content-Encoding", "").lower() in {"gzip", "x-gzip"}:
        return _unzipped(bytes(body), response.status).decode(errors="replace")
    return body.decode(errors="replace")


def _unzipped(body: bytes, status: int) -> bytes:
    unzip = zlib.decompressobj(wbits=31)
    try:
        unzipped = unzip.decompress(body, _MOST_BYTES + 1)
    except zlib.error:
        raise TwilioUnavailable(f"The answer with HTTP {status} is damaged: it is not gzip, as it says.") from None
    if len(unzipped) > _MOST_BYTES:
        raise _too_large(status)
    if not unzip.eof:
        raise TwilioUnavailable(f"The answer with HTTP {status} was cut off.")
    return unzipped


def _too_large(status: int) -> TwilioUnavailable:
    size = f"larger than {_MOST_BYTES >> 20} MB"
    return TwilioUnavailable(f"The answer with HTTP {status} is {size}, so it is not Twilio's.")


def json_object(body: str) -> dict[str, Any] | None:
    """Return the JSON object that `body` is; None if it is none."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def check_number(given: Any, account_sid: str, number_sid: str = "") -> None:
    """Raise `TwilioUnavailable` if an answer describes no number of the account, or another one than was asked for.

    The SID becomes part of URLs and of a Secret's name. Raises `ValueError` for a URL that cannot be written again.
    """
    sid, owner = str(given.sid or ""), given.account_sid or account_sid
    str(given.sms_url or "").encode()  # a lone surrogate, which JSON may contain, could not be recorded
    if not _NUMBER_SID.fullmatch(sid) or not given.phone_number:
        raise TwilioUnavailable("Twilio's answer describes no phone number.")
    if owner != account_sid or (number_sid and sid.lower() != number_sid.lower()):
        raise TwilioUnavailable("Twilio's answer is about another number or account than it was asked for.")
