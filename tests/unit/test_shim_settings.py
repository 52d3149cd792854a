"""What the shim says at start-up about settings that it cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from api_shim.__main__ import main
from api_shim.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SMSSHIM_HTTP_PORT", "x", "SMSSHIM_HTTP_PORT: Input should be a valid integer"),
        ("SMSSHIM_CHANNEL_NAMESPACE", "Not A Name", "e.g. sms-channels"),
        ("SMSSHIM_TRUSTED_PROXIES", "ingress", "must be addresses or networks, separated by spaces; write for example"),
        ("SMSSHIM_REQUEST_SECONDS", "nan", "SMSSHIM_REQUEST_SECONDS: Input should be a finite number"),
        ("SMSSHIM_TLS_CERT_FILE", "/tls.crt", "SMSSHIM_TLS_CERT_FILE and SMSSHIM_TLS_KEY_FILE: give both, or neither"),
        ("SMSSHIM_HTTP_HOST", "10.0.0.7", "Write SMSSHIM_TLS_CERT_FILE and SMSSHIM_TLS_KEY_FILE to serve TLS, or"),
        ("SMSSHIM_LOG_LEVEL", "LOUD", "SMSSHIM_LOG_LEVEL: Input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert "The settings cannot be used:" in result.output
    assert message in result.output


def test_help_names_every_setting() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    for name in Settings.model_fields:
        assert f"SMSSHIM_{name.upper()} (default: " in output


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    assert Settings().http_host == "127.0.0.1"


@pytest.mark.parametrize("host", ["::", "10.0.0.7", "shim.example.com", "127.0.0.1.example.com"])
def test_keys_do_not_cross_the_network_in_the_clear(host: str) -> None:
    with pytest.raises(ValidationError, match="SMSSHIM_PLAIN_HTTP=true if a proxy in front speaks TLS"):
        Settings(http_host=host)
    assert Settings(http_host=host, plain_http=True).http_host == host, "unless somebody says that they do not"
    assert Settings(http_host=host, tls_cert_file=Path("a"), tls_key_file=Path("b")).http_host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_nothing_has_to_be_said(host: str) -> None:
    assert Settings(http_host=host).http_host == host


def test_trusted_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().trusted_proxies == (), "nobody by default"
    monkeypatch.setenv("SMSSHIM_TRUSTED_PROXIES", "10.0.0.0/8 192.0.2.1 fd00::/8")
    assert [str(each) for each in Settings().trusted_proxies] == ["10.0.0.0/8", "192.0.2.1/32", "fd00::/8"]
