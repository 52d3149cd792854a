"""How programs leave the machine: through which proxy, and trusting which certificates.

Proxies follow the usual variables as Go's programs read them (kubectl is one): HTTPS_PROXY, HTTP_PROXY and NO_PROXY, in
upper or lower case. aiohttp's own support is not used: it also reads passwords from ~/.netrc.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from smschannel.api.errors import EgressError
from smschannel.api.text import TextError, clean_line, decode

_PORTS = {"http": 80, "https": 443}
_PARTIAL_CHAIN = 0x80000  # ssl.VERIFY_X509_PARTIAL_CHAIN: any certificate that is trusted ends the chain


def proxy_for(url: str, environment: Mapping[str, str] | None = None) -> str | None:
    """Return the proxy's URL for `url`, None for a direct connection. Raises `EgressError` if a variable is invalid."""
    environment = os.environ if environment is None else environment
    parts = urlsplit(url)
    name = f"{parts.scheme}_proxy"
    variable = next((each for each in (name.upper(), name) if environment.get(each)), None)
    host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)
    if variable is None or _is_local(host):
        return None
    exceptions = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    if any(_matches(each, host, port) for each in exceptions.replace(",", " ").lower().split()):
        return None
    return checked_proxy(environment[variable], variable)


def checked_proxy(value: str, source: str) -> str:
    """Return the URL of an HTTP proxy in full. Raises `EgressError`, which names `source` and never the value.

    The URL may contain a password.
    """
    try:
        value = clean_line(value)
        parts = urlsplit(value if "://" in value else f"http://{value}")
        valid = bool(parts.hostname) and (parts.port or 1) > 0
    except TextError as error:
        raise EgressError(f"{source} {error}") from None
    except ValueError:
        valid = False
    if not valid:
        raise EgressError(f"{source} is not the URL of a proxy; write for example http://proxy.example.com:3128")
    if parts.scheme not in _PORTS:
        raise EgressError(f"{source} names a {parts.scheme} proxy: only http and https proxies can be used")
    return parts.geturl()


class _NamedContext(ssl.SSLContext):
    """Asks every server for the certificate of one name, whatever the URL says; also behind a proxy."""

    name: str

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False, *_: Any, **__: Any
    ) -> ssl.SSLObject:
        return super().wrap_bio(incoming, outgoing, server_side, self.name)


def tls_context(
    ca_file: str | Path | None = None, ca_data: bytes | None = None, *, server_name: str | None = None
) -> ssl.SSLContext:
    """Return a context that verifies servers as Go's programs do; without CAs given, with the system's.

    `ssl.create_default_context` is stricter from Python 3.13 on: it rejects CAs without key identifiers, which many
    clusters and proxies have. `server_name` replaces the URL's host in the TLS handshake. Raises `EgressError` if the
    CAs cannot be read.
    """
    kind = _NamedContext if server_name else ssl.SSLContext
    context = kind(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificates and host names
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= _PARTIAL_CHAIN
    if isinstance(context, _NamedContext):
        context.name = server_name or ""
    try:
        if ca_file or ca_data:
            context.load_verify_locations(ca_file, cadata=_certificates(ca_data) if ca_data else None)
        else:
            ca_file = os.environ.get("SSL_CERT_FILE")  # OpenSSL ignores one that it cannot read, and trusts nobody
            if ca_file:
                context.load_verify_locations(ca_file)
            context.load_default_certs()
    except (ssl.SSLError, ValueError):
        raise EgressError(f"{ca_file or 'the CA data'} has no valid CA certificate in PEM form") from None
    except OSError as error:
        raise EgressError(f"the CA certificates {ca_file} cannot be read: {error.strerror}") from None
    return context


def _certificates(pem: bytes) -> str:
    """Return the certificates without the text around them, which need not be ASCII. Raises `ValueError` for none."""
    blocks = re.findall("-----BEGIN CERTIFICATE-----[!-~\\s]+?-----END CERTIFICATE-----", decode(pem))
    if not blocks:
        raise ValueError("no certificate")
    return "\n".join(blocks)


def public_tls(ca_bundle: Path | None) -> ssl.SSLContext:
    """Return a context with the system's CAs (SSL_CERT_FILE replaces them) and those of `ca_bundle`.

    Raises `EgressError` if one of the files cannot be used.
    """
    context = tls_context()
    if ca_bundle:
        tls_context(ca_bundle)
        context.load_verify_locations(ca_bundle)
    return context


def shown_proxy(proxy: str) -> str:
    """Return host and port of a proxy, without user and password."""
    parts = urlsplit(proxy)
    return f"{parts.hostname}:{parts.port or _PORTS.get(parts.scheme, 0)}"


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _matches(entry: str, host: str, port: int) -> bool:
    """Return whether a NO_PROXY entry means this host: *, an address, a network, a domain, with a port or not."""
    if entry == "*":
        return True
    if "/" in entry:
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    try:
        return ipaddress.ip_address(entry.strip("[]")) == ipaddress.ip_address(host)
    except ValueError:
        pass
    name, only_port = _split_port(entry)
    if only_port and only_port != port:
        return False
    domain = name.removeprefix("*").removeprefix(".")
    return bool(domain) and ((host == domain and not name.startswith((".", "*."))) or host.endswith(f".{domain}"))


def _split_port(entry: str) -> tuple[str, int]:
    name, _, port = entry.rpartition(":")
    return (name, int(port)) if name and port.isdecimal() else (entry, 0)
