"""Servers on loopback for tests of connections: certificates, an HTTPS server, and an HTTP CONNECT proxy."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Authority:
    """A CA. Without `identifiers` its certificates lack the key identifiers, as those of some clusters do."""

    def __init__(self, folder: Path, name: str = "ca", *, identifiers: bool = True) -> None:
        self._folder, self._name, self._identifiers = folder, name, identifiers
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.pem = self._sign(self._subject, self._key, None).decode()
        self.file = folder / f"{name}.pem"
        self.file.write_text(self.pem)

    def issue(self, *hosts: str, days: float = 1, begins: float = -0.5) -> tuple[Path, Path]:
        """Write a certificate for hosts (none: a client's) and its key; it ends in `days`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, hosts[0] if hosts else "client")])
        pem = self._sign(subject, key, hosts, begins=begins, days=days)
        number = len(list(self._folder.iterdir()))
        certificate, private = self._folder / f"{number}.crt", self._folder / f"{number}.key"
        certificate.write_bytes(pem)
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, private

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        hosts: tuple[str, ...] | None,
        *,
        begins: float = -1,
        days: float = 1,
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=min(begins, days - 1)))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=hosts is None, path_length=None), critical=True)
        )
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if self._identifiers:
            subject_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
            issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
            builder = builder.add_extension(subject_id, critical=False).add_extension(issuer_id, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


@asynccontextmanager
async def serving(
    handler: Handler, pair: tuple[Path, Path] | None = None, *, clients: Authority | None = None
) -> AsyncIterator[int]:
    """Serve every request with `handler`, over TLS if there is a `pair`; `clients` signs their certificates."""
    context = None
    if pair:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*pair)
        if clients:
            context.load_verify_locations(clients.file)
            context.verify_mode = ssl.CERT_REQUIRED
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@dataclass
class Proxy:
    """An HTTP proxy that opens tunnels to one port here, whatever name is asked for, and notes what it was asked."""

    target: int
    credentials: str = ""
    port: int = 0
    asked: list[str] = field(default_factory=list)
    refuse_with: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.asked.append(head.split("\r\n", 1)[0].rsplit(" ", 1)[0])
            needed = f"Proxy-Authorization: Basic {base64.b64encode(self.credentials.encode()).decode()}"
            status = self.refuse_with or (407 if self.credentials and needed not in head else 200)
            length = "" if status == 200 else "Content-Length: 0\r\n"
            writer.write(f"HTTP/1.1 {status} Answer\r\n{length}\r\n".encode())
            await writer.drain()
            if status == 200:
                there, back = await asyncio.open_connection("127.0.0.1", self.target)
                await asyncio.gather(_pipe(reader, back), _pipe(there, writer))
        writer.close()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def proxying(target: int, credentials: str = "") -> AsyncIterator[Proxy]:
    """Run a proxy whose tunnels all lead to the port `target` of this machine."""
    proxy = Proxy(target, credentials)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
