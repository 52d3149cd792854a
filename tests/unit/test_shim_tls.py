"""TLS from files: certificates are served, renewed while running, and rejected with a clear message."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kubernetes.aio.client.configuration import Configuration
from structlog.testing import capture_logs

import api_shim.connections
import api_shim.tls
from api_shim.__main__ import main
from api_shim.app import serve
from api_shim.settings import Settings
from api_shim.tls import ServerTls, TlsError
from smschannel.api.kube_client import KubeClient


def write_pair(folder: Path, name: str, passphrase: bytes | None = None) -> tuple[Path, Path]:
    """Write a certificate for localhost with the subject `name`, and its key; swap both at once, as Kubernetes does."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    real = folder / f"..{name}"
    real.mkdir()
    (real / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (real / "tls.key").write_bytes(pem)
    (folder / "next").symlink_to(real.name)
    (folder / "next").replace(folder / "mounted")
    return folder / "mounted/tls.crt", folder / "mounted/tls.key"


async def served_name(port: int) -> str:
    """Return the subject of the certificate that a new connection gets."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    (name,) = x509.load_der_x509_certificate(der).subject
    return str(name.value)


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    write_pair(tmp_path, "first")
    return tmp_path


@pytest.fixture
async def port(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(api_shim.tls, "_POLL_SECONDS", 0.05)
    async with serving(mounted) as port:
        yield port


@asynccontextmanager
async def serving(mounted: Path) -> AsyncIterator[int]:
    """A shim with this certificate, whose API server refuses connections; the port."""
    configuration = Configuration()
    configuration.host = "http://127.0.0.1:9"
    settings = Settings(
        http_host="0.0.0.0",  # noqa: S104  (allowed with TLS)
        http_port=0,
        tls_cert_file=mounted / "mounted/tls.crt",
        tls_key_file=mounted / "mounted/tls.key",
    )
    async with KubeClient(configuration) as api, serve(settings, api) as service:
        yield service.port


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_client_that_does_not_finish_the_handshake_is_disconnected(
    mounted: Path, monkeypatch: pytest.MonkeyPatch, loop_factory: Any
) -> None:
    """Such a connection is not counted yet: only its time is limited."""
    monkeypatch.setattr(api_shim.connections, "_TLS_SECONDS", 0.3)

    async def connect() -> None:
        async with serving(mounted) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await asyncio.wait_for(reader.read(), 3) == b""
            writer.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(connect())


async def test_renewed_certificate_is_served_without_restart(port: int, mounted: Path) -> None:
    assert await served_name(port) == "first"
    write_pair(mounted, "second")
    async with asyncio.timeout(5):
        while await served_name(port) != "second":  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.05)


def _about_certificates(logs: list[Any]) -> list[str]:
    """Return these events: the shim has no API server here, and says so now and then."""
    return [each["event"] for each in logs if "certificate" in each["event"]]


async def test_unusable_certificate_keeps_the_previous_one(port: int, mounted: Path) -> None:
    broken = mounted / "mounted/tls.crt"
    content = broken.read_bytes()
    with capture_logs() as logs:
        broken.write_bytes(b"not PEM")
        async with asyncio.timeout(5):
            while not (seen := _about_certificates(logs)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
    assert seen == _about_certificates(logs) == ["cannot load certificate, still serving the previous one"]
    assert await served_name(port) == "first"
    broken.write_bytes(content)
    assert await served_name(port) == "first"


async def test_files_that_change_during_loading_are_loaded_again(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a renewal came between testing the new files and loading them."""
    monkeypatch.setattr(api_shim.tls, "_POLL_SECONDS", 0.05)
    tls = ServerTls(mounted / "mounted/tls.crt", mounted / "mounted/tls.key")
    used, load = asyncio.Event(), tls.context.load_cert_chain
    failing = iter([True, False])

    def load_cert_chain(certificate: Path, key: Path, password: Any = None) -> None:
        if next(failing):
            raise ssl.SSLError(1, "KEY_VALUES_MISMATCH")
        load(certificate, key, password)
        used.set()

    monkeypatch.setattr(tls, "context", SimpleNamespace(load_cert_chain=load_cert_chain))
    following = asyncio.create_task(tls.follow())
    write_pair(mounted, "second")
    with capture_logs() as logs:
        await asyncio.wait_for(used.wait(), 5)
    following.cancel()
    events = [each["event"] for each in logs]
    assert events == ["cannot load certificate, still serving the previous one", "loaded certificate"]


async def test_plain_http_is_not_answered_on_the_tls_port(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"ok" not in await asyncio.wait_for(reader.read(), 5)
    writer.close()


@pytest.mark.parametrize(
    ("certificate", "key", "error"),
    [
        ("mounted/tls.crt", "nowhere.key", "nowhere.key cannot be read: No such file or directory"),
        (
            "mounted/tls.key",
            "mounted/tls.crt",
            "they must be a certificate chain and its private key without a passphrase",
        ),
        ("mounted/tls.crt", "other/mounted/tls.key", "(KEY_VALUES_MISMATCH)"),
        ("locked/mounted/tls.crt", "locked/mounted/tls.key", "without a passphrase"),
    ],
    ids=["missing", "swapped", "another's key", "with a passphrase"],
)
def test_unusable_pair_is_explained(mounted: Path, certificate: str, key: str, error: str) -> None:
    for name, passphrase in (("other", None), ("locked", b"x")):
        (mounted / name).mkdir()
        write_pair(mounted / name, name, passphrase)
    with pytest.raises(TlsError) as caught:
        ServerTls(mounted / certificate, mounted / key)
    assert error in str(caught.value)


def test_shim_does_not_start_with_an_unusable_pair(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig = mounted / "kubeconfig"
    kubeconfig.write_text(
        "{clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}], users: [{name: a, user: {token: x}}],"
        " contexts: [{name: a, context: {cluster: a, user: a}}], current-context: a}"
    )
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.setenv("SMSSHIM_TLS_CERT_FILE", str(mounted / "nowhere.crt"))
    monkeypatch.setenv("SMSSHIM_TLS_KEY_FILE", str(mounted / "mounted/tls.key"))
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert "nowhere.crt cannot be read: No such file or directory" in result.output
