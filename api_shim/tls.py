"""TLS from files, which may change at any time: a Secret that is mounted is swapped when it is renewed."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from pathlib import Path

import structlog

_LOOK_SECONDS = 5.0

log = structlog.get_logger()


class TlsError(Exception):
    """Certificate and key cannot be used; the text says which file and what to write."""


class ServerTls:
    """`context` is what the server listens with: new connections get the certificate that was there last."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises `TlsError`."""
        self._certificate = certificate
        self._key = key
        self._seen: bytes | None = self._fingerprint()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._load(self.context)

    async def follow(self) -> None:
        """For ever. What cannot be used leaves the former certificate in force, and is logged once."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                there = self._fingerprint()
                if there == self._seen:
                    continue
                self._seen = there
                # First elsewhere, so that a certificate without its key never gets into the context in use.
                self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
                self._seen = None  # if they change just now, look again
                self._load(self.context)
                self._seen = there
                log.info("serving a new certificate", file=str(self._certificate))
            except TlsError as error:
                log.error("the former certificate is served on", error=str(error))  # noqa: TRY400

    def _fingerprint(self) -> bytes:
        """By content: through symbolic links, as Kubernetes mounts them, times tell little."""
        try:
            return hashlib.sha256(self._certificate.read_bytes() + b"\0" + self._key.read_bytes()).digest()
        except OSError as error:
            raise TlsError(f"{error.filename} cannot be read: {error.strerror}") from None

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except OSError as error:  # ssl's errors are among them
            why = getattr(error, "reason", None) or "no PEM"
            raise TlsError(
                f"{self._certificate} and {self._key} cannot be used ({why}): give a certificate chain and its private"
                " key without a passphrase, both PEM"
            ) from None
