"""Why a request got no answer, in words for people."""

from __future__ import annotations

import os
import ssl

import aiohttp

from smschannel.api.egress import shown_proxy
from smschannel.api.http import NotHttp, UnknownHost

_EXPIRED, _NOT_YET_VALID, _REVOKED = 10, 9, 23  # OpenSSL's verify codes
_UNKNOWN_CA = {2, 18, 19, 20, 21}
_WRONG_HOST = {62, 64}
_LONGEST = 200  # characters of a library's text


def in_words(error: BaseException, proxy: str | None = None) -> str:
    """Return why a request got no answer, for people: never a class of Python, an address with a password, or a token.

    `proxy` is the proxy that the request used.
    """
    via = f"the proxy {shown_proxy(proxy)}" if proxy else "the proxy"
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return _certificate(error.certificate_error)
        case aiohttp.ClientHttpProxyError(status=407):
            return f"{via} asks for a user and password (HTTP 407): write them into its URL"
        case aiohttp.ClientHttpProxyError():
            return f"{via} answers HTTP {error.status} instead of connecting"
        case aiohttp.ClientProxyConnectionError():
            return f"{via} cannot be reached: {_reason(error.os_error)}"
        case UnknownHost():
            return f"the host name {error} cannot be resolved"
        case NotHttp():
            return "the answer is not valid HTTP"
        case aiohttp.ClientConnectorDNSError():
            return f"the host name {error.host} cannot be resolved"
        case aiohttp.ClientConnectorError():
            return in_words(error.os_error, proxy) if error.os_error is not error else _reason(error)
        case aiohttp.ServerDisconnectedError():
            return "the connection was closed before an answer came"
        case aiohttp.ClientPayloadError():
            return "the answer was cut off"
        case aiohttp.ClientResponseError():
            return "the answer is not valid HTTP"
        case aiohttp.InvalidURL():
            return "the URL is not valid"
        case TimeoutError():
            return "no answer in time"
        case ssl.SSLCertVerificationError():
            return _certificate(error)
        case ssl.SSLError():
            return _tls(error)
        case OSError():
            return _reason(error)
        case UnicodeDecodeError():
            return "the answer is not text"
    return "the connection broke"


def _certificate(error: BaseException) -> str:
    code = getattr(error, "verify_code", None)
    text = str(getattr(error, "verify_message", "") or "")
    if code == _EXPIRED:
        return "its TLS certificate, or that of its CA, has expired"
    if code == _NOT_YET_VALID:
        return "its TLS certificate is not valid yet: is this machine's clock right?"
    if code == _REVOKED:
        return "its TLS certificate is revoked"
    if code in _UNKNOWN_CA:
        return f"its TLS certificate is signed by an unknown CA ({text[:_LONGEST]})"
    if code in _WRONG_HOST:
        return f"its TLS certificate is for another host name ({text[:_LONGEST].rstrip('.')})"
    return f"its TLS certificate is refused ({text[:_LONGEST] or 'no reason given'})"


def _tls(error: ssl.SSLError) -> str:
    reason = (error.reason or "").replace("_", " ").lower()
    if reason in {"wrong version number", "http request", "record layer failure"}:
        return "the server does not speak TLS on this port"
    if "alert" in reason and "certificate" in reason:
        return f"the server refuses the client certificate ({reason})"
    return f"TLS fails: {reason or 'no reason given'}"


def _reason(error: BaseException) -> str:
    """Return the operating system's text for an error."""
    number = getattr(error, "errno", None)
    if isinstance(error, ConnectionError) and number is None:
        return "the connection was closed before an answer came"
    if isinstance(error, OSError) and isinstance(number, int) and number > 0 and not isinstance(error, ssl.SSLError):
        return os.strerror(number).lower()
    return "the connection broke"
