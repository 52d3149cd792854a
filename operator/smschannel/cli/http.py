"""Call a webhook, or see whether a server answers at all, from this machine. Redirects are never followed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from smschannel.api.causes import in_words
from smschannel.api.egress import proxy_for, public_tls
from smschannel.api.errors import EgressError
from smschannel.cli.findings import Probe

_PROBE_SECONDS = 10
_WEBHOOK_SECONDS = 15  # Twilio's own limit
_LONGEST_ANSWER = 64 * 1024


@dataclass(frozen=True)
class Delivery:
    """What a webhook answered, after `seconds`. Without an answer `status` is None, and `problem` says why."""

    status: int | None
    seconds: float
    content_type: str = ""
    body: bytes = b""
    problem: str = ""


def origin_of(url: str) -> str:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


async def probe(url: str, ca_bundle: Path | None) -> Probe:
    """Return how a server answers a HEAD request without credentials."""
    try:
        async with (
            _session(ca_bundle, _PROBE_SECONDS) as session,
            session.head(url, proxy=proxy_for(url), allow_redirects=False) as response,
        ):
            return Probe(response.status)
    except EgressError as error:
        return Probe(None, str(error))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        return Probe(None, in_words(error, proxy_for(url)))


async def deliver(url: str, form: Mapping[str, str], headers: Mapping[str, str], ca_bundle: Path | None) -> Delivery:
    """POST a form to a webhook, as Twilio does. Raises `EgressError` if a proxy or certificate cannot be used."""
    proxy, began = proxy_for(url), time.monotonic()
    try:
        async with (
            _session(ca_bundle, _WEBHOOK_SECONDS) as session,
            session.post(
                URL(url, encoded=True), data=dict(form), headers=dict(headers), proxy=proxy, allow_redirects=False
            ) as response,
        ):
            body = await response.content.read(_LONGEST_ANSWER)
            return Delivery(response.status, time.monotonic() - began, response.content_type, body)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        return Delivery(None, time.monotonic() - began, problem=in_words(error, proxy))


@contextlib.asynccontextmanager
async def _session(ca_bundle: Path | None, seconds: float) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=public_tls(ca_bundle)),
        timeout=aiohttp.ClientTimeout(total=seconds),
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        yield session
