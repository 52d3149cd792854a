"""The shim's settings, and the error messages for invalid ones."""

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
        ("SMSSHIM_CHANNEL_NAMESPACE", "sms-operator", "SMSSHIM_OPERATOR_NAMESPACE must be two namespaces"),
        ("SMSSHIM_TOKEN_AUDIENCE", "sms\u200bapi", "SMSSHIM_TOKEN_AUDIENCE: contains U+200B (zero width space)"),
        ("SMSSHIM_REQUEST_SECONDS", "nan", "SMSSHIM_REQUEST_SECONDS: Input should be a finite number"),
        ("SMSSHIM_TLS_CERT_FILE", "/tls.crt", "SMSSHIM_TLS_CERT_FILE and SMSSHIM_TLS_KEY_FILE: set both, or neither"),
        ("SMSSHIM_HTTP_HOST", "10.0.0.7", "Set SMSSHIM_TLS_CERT_FILE and SMSSHIM_TLS_KEY_FILE to serve TLS, or"),
        ("SMSSHIM_LOG_LEVEL", "LOUD", "SMSSHIM_LOG_LEVEL: Input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ],
)
def test_invalid_setting_is_explained(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert "The settings cannot be used:" in result.output
    assert message in result.output


def test_help_lists_every_setting() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    for name in Settings.model_fields:
        assert f"SMSSHIM_{name.upper()} (default: " in output


def test_default_host_is_loopback() -> None:
    assert Settings().http_host == "127.0.0.1"


@pytest.mark.parametrize("host", ["::", "10.0.0.7", "shim.example.com", "127.0.0.1.example.com"])
def test_plain_http_beyond_loopback_needs_consent(host: str) -> None:
    with pytest.raises(ValidationError, match="SMSSHIM_PLAIN_HTTP=true behind a proxy that serves TLS"):
        Settings(http_host=host)
    assert Settings(http_host=host, plain_http=True).http_host == host, "with SMSSHIM_PLAIN_HTTP it is allowed"
    assert Settings(http_host=host, tls_cert_file=Path("a"), tls_key_file=Path("b")).http_host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_plain_http_on_loopback_is_allowed(host: str) -> None:
    assert Settings(http_host=host).http_host == host


def test_trusted_proxies_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().trusted_proxies == (), "none by default"
    monkeypatch.setenv("SMSSHIM_TRUSTED_PROXIES", "10.0.0.0/8 192.0.2.1 fd00::/8")
    assert [str(each) for each in Settings().trusted_proxies] == ["10.0.0.0/8", "192.0.2.1/32", "fd00::/8"]


def test_invisible_characters_around_a_setting_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMSSHIM_CHANNEL_NAMESPACE", "\ufeffteam-a\r\n")
    monkeypatch.setenv("SMSSHIM_TRUSTED_PROXIES", "\u200b10.0.0.0/8 \n")
    monkeypatch.setenv("SMSSHIM_PLAIN_HTTP", " true\n")
    settings = Settings()
    assert settings.channel_namespace == "team-a"
    assert [str(each) for each in settings.trusted_proxies] == ["10.0.0.0/8"]
    assert settings.plain_http


def test_unknown_variable_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(_: Settings) -> None:
        pass

    monkeypatch.setattr("api_shim.__main__.run", stop)
    monkeypatch.setenv("SMSSHIM_PLAINHTTP", "true")
    monkeypatch.setenv("SMSSHIM_LOG_FORMAT", "json")
    result = CliRunner().invoke(main)
    assert "SMSSHIM_PLAINHTTP is not a setting; did you mean SMSSHIM_PLAIN_HTTP?" in result.output
