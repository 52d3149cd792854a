"""Serve TLS with a certificate from files, and load it again when they change, as a mounted Secret does on renewal."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from pathlib import Path

import structlog

_POLL_SECONDS = 5.0

log = structlog.get_logger()


class TlsError(Exception):
    """The certificate or key cannot be used; the message says which file, and what it must contain."""


class ServerTls:
    """`context` is the server's TLS context. New connections get the certificate that was loaded last."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Load the certificate chain and its private key. Raises `TlsError`."""
        self._certificate = certificate
        self._key = key
        self._loaded: bytes | None = self._fingerprint()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._load(self.context)

    async def follow(self) -> None:
        """Follow the files until cancelled. An unusable certificate is logged once; the previous one stays in use."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                found = self._fingerprint()
                if found == self._loaded:
                    continue
                self._loaded = found
                # Test the pair in another context, so that `context` never gets a certificate without its key.
                self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
                self._loaded = None  # if the files change before the next line and it fails, try again
                self._load(self.context)
                self._loaded = found
                log.info("loaded certificate", file=str(self._certificate))
            except TlsError as error:
                log.error(  # noqa: TRY400
                    "cannot load certificate, still serving the previous one",
                    file=str(self._certificate),
                    error=str(error),
                )

    def _fingerprint(self) -> bytes:
        """Return a hash of both files. Their times are of no use: Kubernetes swaps a symbolic link."""
        try:
            return hashlib.sha256(self._certificate.read_bytes() + b"\0" + self._key.read_bytes()).digest()
        except OSError as error:
            raise TlsError(f"{error.filename} cannot be read: {error.strerror}") from None

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except OSError as error:  # includes ssl.SSLError
            why = getattr(error, "reason", None) or "not PEM"
            raise TlsError(
                f"{self._certificate} and {self._key} cannot be used ({why}): they must be a certificate chain and its"
                " private key without a passphrase, both PEM"
            ) from None
