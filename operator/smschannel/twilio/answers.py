"""Reads Twilio's answers, or what a proxy sends in their place, within bounds: size, nesting, what they are about."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

from smschannel.api.errors import TwilioUnavailable
from smschannel.api.http import Answer

MOST_BYTES = 32 * 2**20
"""Ten times a page of 1,000 numbers."""
_NUMBER_SID = re.compile("PN[0-9a-fA-F]{32}", re.ASCII)


def text_of(answer: Answer) -> str:
    """Return the body of an answer, decompressed. Raises `TwilioUnavailable` if it is too large then, or damaged."""
    body = answer.body
    if answer.headers.get("content-encoding", "").lower() in {"gzip", "x-gzip"}:
        body = _unzipped(body, answer.status)
    return body.decode(errors="replace")


def _unzipped(body: bytes, status: int) -> bytes:
    unzip = zlib.decompressobj(wbits=31)
    try:
        unzipped = unzip.decompress(body, MOST_BYTES + 1)
    except zlib.error:
        raise TwilioUnavailable(f"The answer with HTTP {status} is damaged: it is not gzip, as it says.") from None
    if len(unzipped) > MOST_BYTES:
        raise too_large()
    if not unzip.eof:
        raise TwilioUnavailable(f"The answer with HTTP {status} was cut off.")
    return unzipped


def too_large() -> TwilioUnavailable:
    """Return the error for an answer of more than `MOST_BYTES`."""
    return TwilioUnavailable(f"The answer is larger than {MOST_BYTES >> 20} MB, so it is not Twilio's.")


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
