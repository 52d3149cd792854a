"""What the shim says at start-up about settings that it cannot use."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from api_shim.__main__ import main
from api_shim.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SMSSHIM_HTTP_PORT", "x", "SMSSHIM_HTTP_PORT: Input should be a valid integer"),
        ("SMSSHIM_CHANNEL_NAMESPACE", "Not A Name", "e.g. sms-channels"),
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
