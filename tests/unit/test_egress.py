"""Proxies, CA bundles, and what people read when a connection fails."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from aiohttp import web
from pydantic import SecretStr

from smschannel.api.causes import in_words
from smschannel.api.egress import proxy_for
from smschannel.api.errors import EgressError, TwilioTimeout, TwilioUnavailable
from smschannel.core.record import Login
from smschannel.twilio.client import TwilioClient
from smschannel.twilio.limits import Limiter
from tests.manifests import ACCOUNT_SID, PHONE_NUMBER
from tests.unit.network import Authority, proxying, serving

SECRET = "5e5c0ffee5e5c0ffee"
PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper() in {"HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "ALL_PROXY"}:
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("https://api.twilio.com", {}, None),
        ("https://api.twilio.com", {"HTTPS_PROXY": PROXY}, PROXY),
        ("https://api.twilio.com", {"https_proxy": PROXY}, PROXY),
        ("https://api.twilio.com", {"HTTPS_PROXY": "", "https_proxy": PROXY}, PROXY),
        ("https://api.twilio.com", {"HTTPS_PROXY": "proxy.example:3128"}, PROXY),
        ("https://api.twilio.com", {"HTTPS_PROXY": f" {PROXY}\r\n"}, PROXY),
        ("https://api.twilio.com", {"HTTP_PROXY": PROXY}, None),
        ("http://10.0.0.1", {"HTTP_PROXY": PROXY}, PROXY),
        ("https://localhost:8443", {"HTTPS_PROXY": PROXY}, None),
        ("https://127.0.0.1", {"HTTPS_PROXY": PROXY}, None),
        ("https://[::1]:1", {"HTTPS_PROXY": PROXY}, None),
        ("https://api.twilio.com", {"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, None),
        ("https://api.twilio.com", {"HTTPS_PROXY": PROXY, "NO_PROXY": "a.com, twilio.com"}, None),
        ("https://api.twilio.com", {"HTTPS_PROXY": PROXY, "no_proxy": ".TWILIO.com"}, None),
        ("https://api.twilio.com", {"HTTPS_PROXY": PROXY, "NO_PROXY": "*.twilio.com"}, None),
        ("https://twilio.com", {"HTTPS_PROXY": PROXY, "NO_PROXY": ".twilio.com"}, PROXY),
        ("https://nottwilio.com", {"HTTPS_PROXY": PROXY, "NO_PROXY": "twilio.com"}, PROXY),
        ("https://api.twilio.com", {"HTTPS_PROXY": PROXY, "NO_PROXY": "twilio.com:443"}, None),
        ("https://api.twilio.com", {"HTTPS_PROXY": PROXY, "NO_PROXY": "twilio.com:8443"}, PROXY),
        ("https://10.96.0.1:443", {"HTTPS_PROXY": PROXY, "NO_PROXY": "10.96.0.0/12"}, None),
        ("https://10.96.0.1:443", {"HTTPS_PROXY": PROXY, "NO_PROXY": "10.96.0.1"}, None),
        ("https://10.96.0.1:443", {"HTTPS_PROXY": PROXY, "NO_PROXY": "10.96.0.1:443"}, None),
        ("https://[fd00::1]", {"HTTPS_PROXY": PROXY, "NO_PROXY": "fd00::/8"}, None),
        ("https://[fd00::1]", {"HTTPS_PROXY": PROXY, "NO_PROXY": "10.0.0.0/8,nonsense/99,,[fd00::1]"}, None),
        ("https://10.97.0.1", {"HTTPS_PROXY": PROXY, "NO_PROXY": "10.96.0.1"}, PROXY),
    ],
)
def test_proxy_variables_are_read_as_go_reads_them(url: str, environment: dict[str, str], expected: str | None) -> None:
    assert proxy_for(url, environment) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            f"socks5://u:{SECRET}@proxy:1080",
            "names a socks5 proxy: only http and https proxies can be used",
        ),
        (f"http://u:{SECRET}@:3128", "HTTPS_PROXY is not the URL of a proxy"),
        (f"http://u:{SECRET}@proxy:port", "HTTPS_PROXY is not the URL of a proxy"),
        (f"http://u:{SECRET}@pro\u200bxy", "HTTPS_PROXY contains U+200B (zero width space)"),
    ],
)
def test_unusable_proxy_is_refused_without_its_password(value: str, message: str) -> None:
    with pytest.raises(EgressError) as error:
        proxy_for("https://api.twilio.com", {"HTTPS_PROXY": value})
    assert message in str(error.value)
    assert SECRET not in str(error.value)


async def no_numbers(request: web.Request) -> web.StreamResponse:
    assert request.headers["Authorization"].startswith("Basic ")
    assert "Proxy-Authorization" not in request.headers, "the proxy's password is for the proxy"
    return web.json_response({"incoming_phone_numbers": [], "next_page_uri": None})


async def find(origin: str, ca_bundle: Path | None = None) -> None:
    client = TwilioClient(
        Limiter(concurrency=4, refusal_memory=1),
        api_origin=origin,
        messaging_origin=origin,
        timeout=3,
        lease_outlasts=lambda _: True,
        ca_bundle=ca_bundle,
    )
    login = Login(sid=ACCOUNT_SID, token=SecretStr(SECRET))
    async with client:
        assert await client.find_number(login, ACCOUNT_SID, PHONE_NUMBER) is None


async def trouble(origin: str, ca_bundle: Path | None = None) -> str:
    with pytest.raises(TwilioUnavailable) as error:
        await find(origin, ca_bundle)
    assert SECRET not in str(error.value)
    assert "Error" not in str(error.value), "no class of Python"
    return str(error.value)


@pytest.mark.parametrize("identifiers", [True, False])
async def test_twilio_is_reached_through_the_proxy_with_a_ca_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, identifiers: bool
) -> None:
    """As behind a firewall whose proxy decrypts TLS with a CA of its own."""
    ca = Authority(tmp_path, identifiers=identifiers)
    async with serving(no_numbers, ca.issue("twilio.example")) as port, proxying(port, f"u:{SECRET}") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:{SECRET}@127.0.0.1:{proxy.port}")
        await find("https://twilio.example", ca.file)
        assert proxy.asked == ["CONNECT twilio.example:443"]
        assert "signed by an unknown CA" in await trouble("https://twilio.example")
        monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
        await find("https://twilio.example")
        assert len(proxy.asked) == 3
        monkeypatch.setenv("NO_PROXY", "twilio.example")
        assert "the host name twilio.example cannot be resolved" in await trouble("https://twilio.example")
        assert len(proxy.asked) == 3


async def test_trouble_of_the_proxy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxying(9, f"u:{SECRET}") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        asks = await trouble("https://twilio.example")
        assert f"the proxy 127.0.0.1:{proxy.port} asks for a user and password (HTTP 407)" in asks
        proxy.refuse_with = 403
        answers = await trouble("https://twilio.example")
        assert f"the proxy 127.0.0.1:{proxy.port} answers HTTP 403 instead of connecting" in answers
    monkeypatch.setenv("HTTPS_PROXY", f"http://u:{SECRET}@127.0.0.1:9")
    assert "the proxy 127.0.0.1:9 cannot be reached: connection refused" in await trouble("https://twilio.example")


async def test_unusable_files_of_certificates_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL ignores a missing SSL_CERT_FILE, and then trusts nobody."""
    with pytest.raises(EgressError, match=r"ca\.pem cannot be read: No such file"):
        await find("https://twilio.example", tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.pem"))
    with pytest.raises(EgressError, match=r"system\.pem cannot be read: No such file"):
        await find("https://twilio.example")


async def test_twilio_trouble_is_in_words(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    async with serving(no_numbers, ca.issue("other.example")) as port:
        assert "its TLS certificate is for another host name" in await trouble(f"https://127.0.0.1:{port}", ca.file)
    async with serving(no_numbers) as port:
        assert "does not speak TLS on this port" in await trouble(f"https://127.0.0.1:{port}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert "connection refused" in await trouble(f"https://127.0.0.1:{free.getsockname()[1]}")


async def test_server_that_says_nothing_is_a_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TwilioTimeout, match=r"Twilio does not answer in time\."):
            await find(f"https://127.0.0.1:{silent.getsockname()[1]}")


def test_unknown_errors_have_words_too() -> None:
    assert in_words(RuntimeError(SECRET)) == "the connection broke"
    assert in_words(OSError(SECRET)) == "the connection broke"
    assert in_words(ConnectionResetError(104, SECRET)) == "connection reset by peer"
