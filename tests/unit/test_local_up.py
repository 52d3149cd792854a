"""`make up` refuses Twilio URLs that it cannot use."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from deploy.local.__main__ import main


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "an empty URL must not mean the real Twilio"),
        ("/", "a slash alone must not mean it either"),
        ("127.0.0.1:8080", "a scheme is missing"),
        ("http://twilio.example.com", "tokens would cross the network unencrypted"),
        ("http://127.0.0.1:8080/2010-04-01", "the path would be doubled"),
    ],
)
def test_wrong_twilio_url_is_refused_before_anything_starts(url: str, reason: str) -> None:
    result = CliRunner().invoke(main, ["up", "--twilio-url", url])
    assert result.exit_code == 2, reason
    assert "write for example https://api.twilio.com" in result.output
