"""Invalid settings are reported by name with what to write instead; the value itself never appears."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from smschannel.__main__ import main
from smschannel.api.environment import explain
from smschannel.settings import Settings

TEMPLATE = "https://sms.example.com/v1/instances/{instance_id}/channels/sms/webhook"
SECRET = "5e5c0ffee5e5c0ffee"


@pytest.fixture(autouse=True)
def _only_required_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SMSCHANNEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE", TEMPLATE)


@pytest.mark.parametrize(
    ("name", "value", "message", "reason"),
    [
        ("WEBHOOK_URL_TEMPLATE", "", "is not set", "an empty variable is an unset one"),
        (
            "WEBHOOK_URL_TEMPLATE",
            f"https://sms.example.com/{SECRET}",
            "exactly once; write for example https://sms.example.com/",
            "all instances would share one webhook",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            f"https://{SECRET}.example.com/{{instance_id}}/{{instance_id}}",
            "exactly once; write for example https://sms.example.com/",
            "the second one is a mistake",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            f"https://{{instance_id}}.{SECRET}.com/",
            "must have {instance_id} and {namespace} after the host; write for example https://sms.example.com/",
            "an instance must not choose a host",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            f"/{SECRET}/{{instance_id}}",
            "must be a URL with a host",
            "Twilio needs an absolute URL",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            f"http://{SECRET}.example.com/{{instance_id}}",
            "must be https (http is for loopback addresses only); write for example https://sms.example.com/",
            "messages would travel in the clear",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            f"https://user:{SECRET}@sms.example.com/{{instance_id}}",
            "must not hold a user or password; write for example https://sms.example.com/",
            "it would be in every channel's status",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            f"https://[{SECRET}]/{{instance_id}}",
            "must be a URL with a host; write for example https://sms.example.com/",
            "an invalid address must not be shown either",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            f"ftp://{SECRET}/{{instance_id}}",
            "must be https",
            "Twilio supports no other schemes",
        ),
        (
            "FORMER_WEBHOOK_URL_TEMPLATES",
            f"{TEMPLATE} https://{SECRET}.example.com/",
            "exactly once; write for example https://sms.example.com/",
            "each of several templates is checked",
        ),
        (
            "TWILIO_API_URL",
            f"http://{SECRET}.example.com",
            "must be https (http is for loopback addresses only); write for example https://api.twilio.com",
            "tokens would travel in the clear",
        ),
        (
            "TWILIO_MESSAGING_URL",
            f"https://{SECRET}.example.com/v1",
            "must be an origin without a path; write for example https://api.twilio.com",
            "the path would be doubled",
        ),
        (
            "TWILIO_URL",
            f"https://:{SECRET}@api.twilio.com",
            "must not hold a user or password; write for example https://api.twilio.com",
            "logins come from channels",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            "https://{namespace}.example.com/{instance_id}",
            "must have {instance_id} and {namespace} after the host",
            "a namespace must not choose a host",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            "https://sms.example.com/a-{namespace}/{instance_id}",
            "must have {namespace} between slashes or other delimiters; write for example https://",
            "namespaces 'b' and 'a-b' could have a webhook in common",
        ),
        (
            "WEBHOOK_URL_TEMPLATE",
            "https://sms.example.com/{namespace}/{namespace}/{instance_id}",
            "must contain {namespace} at most once",
            "one place is enough",
        ),
        (
            "TWILIO_URL",
            f"http://127.0.0.1.{SECRET}.example.com",
            "must be https (http is for loopback addresses only)",
            "a name that begins like a loopback address is not one",
        ),
        ("DELETION_GRACE_SECONDS", "999999999999999", "less than or equal to", "times in the far future overflow"),
        ("RESTORE_DEADLINE_SECONDS", "1e12", "less than or equal to", "times in the far future overflow"),
        ("DRIFT_INTERVAL_SECONDS", "1e12", "less than or equal to", "times in the far future overflow"),
        ("SLOW_INTERVAL_SECONDS", "1e12", "less than or equal to", "times in the far future overflow"),
        ("RESYNC_INTERVAL_SECONDS", "1e12", "less than or equal to", "times in the far future overflow"),
        ("RETRY_FLOOR_SECONDS", "1e12", "less than or equal to", "times in the far future overflow"),
        ("RETRY_CEILING_SECONDS", "1e12", "less than or equal to", "times in the far future overflow"),
        ("TWILIO_URL", SECRET, "must be a URL with a host", "a host without a scheme is not an origin"),
        ("TWILIO_URL", f"https://api.twilio.com#{SECRET}", "must be an origin", "a fragment is never sent"),
        ("TWILIO_URL", "https://api.twilio.com:99999", "must be a URL with a host", "the port is out of range"),
        ("CHANNEL_NAMESPACES", f"sms-channels {SECRET.upper()}", "separated by spaces", "namespaces are lower-case"),
        ("DRIFT_INTERVAL_SECONDS", "inf", "finite number", "drift would never be checked"),
        ("TWILIO_TIMEOUT_SECONDS", "0", "greater than 0", "no call would ever succeed"),
        ("TWILIO_TIMEOUT_SECONDS", SECRET, "valid number", "it is a number"),
        ("TWILIO_CONCURRENCY", "0", "greater than or equal to 1", "no call would ever begin"),
        ("WORKERS", "1.5", "valid integer", "workers are counted"),
        ("DRIFT_INTERVAL_SECONDS", "0", "greater than or equal to 1", "it would run all the time"),
        ("SLOW_INTERVAL_SECONDS", "-1", "greater than or equal to 1", "it would run all the time"),
        ("RESYNC_INTERVAL_SECONDS", "0.5", "greater than or equal to 1", "it would run all the time"),
        ("RETRY_FLOOR_SECONDS", "0", "greater than 0", "it would run all the time"),
        ("RETRY_CEILING_SECONDS", "0", "greater than 0", "it would run all the time"),
        ("DELETION_GRACE_SECONDS", "-1", "greater than or equal to 0", "a duration is not negative"),
        ("RESTORE_DEADLINE_SECONDS", "-1", "greater than or equal to 0", "a duration is not negative"),
        ("HTTP_PORT", "65536", "less than or equal to 65535", "the port is out of range"),
        ("LOG_LEVEL", SECRET, "'DEBUG', 'INFO', 'WARNING' or 'ERROR'", "unknown level"),
        ("LOG_FORMAT", SECRET, "'json' or 'console'", "unknown format"),
    ],
)
def test_invalid_setting_is_named_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str, reason: str
) -> None:
    monkeypatch.setenv(f"SMSCHANNEL_{name}", value)
    result = CliRunner().invoke(main)
    assert result.exit_code == 1, reason
    assert "The settings cannot be used:" in result.output
    assert f"SMSCHANNEL_{name}: " in result.output
    assert message in result.output, reason
    assert str(Settings.model_fields[name.lower()].description) in result.output, "the setting is explained"
    assert SECRET not in result.output, "the value may be a token in the wrong place"


def test_all_invalid_settings_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE")
    monkeypatch.setenv("SMSCHANNEL_WORKERS", SECRET)
    monkeypatch.setenv("SMSCHANNEL_TWILIO_URL", SECRET)
    with pytest.raises(ValidationError) as refused:
        Settings()
    message = explain(refused.value, Settings)
    for name in ("WEBHOOK_URL_TEMPLATE", "WORKERS", "TWILIO_URL"):
        assert f"SMSCHANNEL_{name}: " in message
    assert SECRET not in message


def test_help_lists_every_setting() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name, field in Settings.model_fields.items():
        assert f"SMSCHANNEL_{name.upper()} (" in result.output
        assert field.description, name
        assert " ".join(field.description.split()) in " ".join(result.output.split()), name


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WEBHOOK_URL_TEMPLATE", "http://localhost:8080/{instance_id}", "loopback traffic never leaves the machine"),
        ("WEBHOOK_URL_TEMPLATE", "http://127.0.0.1:8080/{instance_id}", "loopback traffic never leaves the machine"),
        ("WEBHOOK_URL_TEMPLATE", "http://[::1]:8080/{instance_id}", "loopback traffic never leaves the machine"),
        ("WEBHOOK_URL_TEMPLATE", "https://sms.example.com/?id={instance_id}", "a query comes after the host, too"),
        ("TWILIO_URL", "https://twilio.example.com/", "a trailing slash is not a path"),
        ("TWILIO_URL", "", "an empty variable is an unset one"),
    ],
)
def test_valid_setting_is_accepted(monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str) -> None:
    monkeypatch.setenv(f"SMSCHANNEL_{name}", value)
    assert Settings(), reason


def test_twilio_url_replaces_both_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings().api_origin, Settings().messaging_origin) == (
        "https://api.twilio.com",
        "https://messaging.twilio.com",
    )
    monkeypatch.setenv("SMSCHANNEL_TWILIO_URL", "http://127.0.0.1:9000/")
    assert {Settings().api_origin, Settings().messaging_origin} == {"http://127.0.0.1:9000"}


def test_former_templates_are_separated_by_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    former = ("https://old.example.com/{instance_id}", "https://older.example.com/{instance_id}")
    monkeypatch.setenv("SMSCHANNEL_FORMER_WEBHOOK_URL_TEMPLATES", "  ".join(former))
    assert Settings().template.former == former
    assert Settings().template.template == TEMPLATE


def test_default_host_is_loopback() -> None:
    assert Settings().http_host == "127.0.0.1"


# Settings published for 'kubectl sms'

GIVEN = {
    "WEBHOOK_URL_TEMPLATE": TEMPLATE,
    "FORMER_WEBHOOK_URL_TEMPLATES": "https://a.example.com/{instance_id} https://b.example.com/{instance_id}",
    "TWILIO_URL": "http://127.0.0.1:4010",
    "DELETION_GRACE_SECONDS": "7.5",
}


def test_published_settings_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GIVEN.items():
        monkeypatch.setenv(f"SMSCHANNEL_{name}", value)
    settings = Settings()
    content = settings.published()
    assert {f"SMSCHANNEL_{name}": value for name, value in GIVEN.items()}.items() <= content.items()
    for name in GIVEN:
        monkeypatch.delenv(f"SMSCHANNEL_{name}")
    assert Settings.from_published(content) == settings, "an administrator's machine has none of these variables"


def test_environment_overrides_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"SMSCHANNEL_WEBHOOK_URL_TEMPLATE": TEMPLATE, "SMSCHANNEL_TWILIO_URL": "https://published.example.com"}
    monkeypatch.setenv("smschannel_twilio_url", "https://here.example.com")
    assert Settings.from_published(content).twilio_url == "https://here.example.com", "in any spelling"
    monkeypatch.setenv("smschannel_twilio_url", "")
    assert Settings.from_published(content).twilio_url == "https://published.example.com", "empty is unset"


def test_published_settings_are_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE")
    with pytest.raises(ValidationError) as refused:
        Settings.from_published({"SMSCHANNEL_WEBHOOK_URL_TEMPLATE": f"https://{SECRET}.example.com/"})
    explained = explain(refused.value, Settings)
    assert "SMSCHANNEL_WEBHOOK_URL_TEMPLATE: must contain {instance_id} exactly once" in explained
    assert SECRET not in explained


def test_unknown_published_settings_are_ignored() -> None:
    assert Settings.from_published({"SMSCHANNEL_FROM_A_NEWER_RELEASE": "1"}).webhook_url_template == TEMPLATE


def test_several_namespaces_need_webhooks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a channel in one namespace could take the webhook of an instance in another."""
    monkeypatch.setenv("SMSCHANNEL_CHANNEL_NAMESPACES", "sms-channels team-b")
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert "SMSCHANNEL_WEBHOOK_URL_TEMPLATE must contain {namespace}" in result.output
    template = "https://sms.example.com/{namespace}/{instance_id}"
    assert Settings(webhook_url_template=template).webhook_url_template == template
