"""Invalid settings are reported by name with what to write instead; the value itself never appears."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from smschannel.__main__ import main
from smschannel.api.environment import explain, unknown_variables
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
            f"https://{SECRET}.example.com/{{instance_id}}/{{name_space}}",
            "no other braces than {instance_id} and {namespace}; write for example https://sms.example.com/",
            "a misspelt name would be part of every webhook",
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
        ("LEASE_DURATION_SECONDS", "0", "greater than or equal to 5", "a Lease must last"),
        ("LEASE_DURATION_SECONDS", "1e12", "integer", "nobody would ever take over"),
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
        ("RETRY_FLOOR_SECONDS", "0", "greater than or equal to 0.01", "it would run all the time"),
        ("RETRY_FLOOR_SECONDS", "1e-320", "greater than or equal to 0.01", "it would run nearly all the time"),
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
    here = Settings.from_published(content)  # an administrator's machine has none of these variables
    assert here == settings.model_copy(update={"twilio_url": None})


def test_environment_overrides_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"SMSCHANNEL_WEBHOOK_URL_TEMPLATE": TEMPLATE, "SMSCHANNEL_DELETION_GRACE_SECONDS": "7"}
    monkeypatch.setenv("smschannel_deletion_grace_seconds", "8")
    assert Settings.from_published(content).deletion_grace_seconds == 8, "in any spelling"
    monkeypatch.setenv("smschannel_deletion_grace_seconds", "")
    assert Settings.from_published(content).deletion_grace_seconds == 7, "empty is unset"


@pytest.mark.parametrize("variable", ["TWILIO_URL", "TWILIO_API_URL", "TWILIO_MESSAGING_URL"])
def test_published_twilio_urls_are_never_followed(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    content = {f"SMSCHANNEL_{variable}": "https://attacker.example.com"}
    settings = Settings.from_published(content)
    assert (settings.api_origin, settings.messaging_origin) == (
        "https://api.twilio.com",
        "https://messaging.twilio.com",
    )
    assert settings.foreign_origin(content) == (f"SMSCHANNEL_{variable}", "https://attacker.example.com")
    monkeypatch.setenv(f"SMSCHANNEL_{variable}", "https://gateway.example.com")
    named = Settings.from_published(content)
    assert named.foreign_origin(content) is None, "who runs the command names it"
    assert "https://gateway.example.com" in {named.api_origin, named.messaging_origin}


def test_published_urls_of_twilio_itself_are_no_difference() -> None:
    assert Settings().foreign_origin(Settings().published()) is None
    assert Settings().foreign_origin({"SMSCHANNEL_TWILIO_API_URL": "https://api.twilio.com/\n"}) is None


def test_one_url_named_here_does_not_excuse_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMSCHANNEL_TWILIO_API_URL", "https://gateway.example.com")
    content = {
        "SMSCHANNEL_TWILIO_API_URL": "https://gateway.example.com",
        "SMSCHANNEL_TWILIO_MESSAGING_URL": "https://attacker.example.com",
    }
    found = Settings.from_published(content).foreign_origin(content)
    assert found == ("SMSCHANNEL_TWILIO_MESSAGING_URL", "https://attacker.example.com")


@pytest.mark.parametrize("around", ["\n", " ", "\u200b", "\ufeff", "\r\n", "\u00a0", "\u202c", "\u2028"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WEBHOOK_URL_TEMPLATE", TEMPLATE),
        ("TWILIO_URL", "https://twilio.example.com"),
        ("OPERATOR_NAMESPACE", "ops"),
        ("HTTP_HOST", "127.0.0.2"),
        ("HTTP_PORT", "8088"),
        ("DRIFT_INTERVAL_SECONDS", "77.0"),
        ("LOG_LEVEL", "DEBUG"),
    ],
)
def test_invisible_characters_around_a_setting_are_dropped(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, around: str
) -> None:
    monkeypatch.setenv(f"SMSCHANNEL_{name}", f"{around}{value}{around}")
    assert str(getattr(Settings(), name.lower())) == value


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("WEBHOOK_URL_TEMPLATE", TEMPLATE.replace("/v1", "/v\u200b1"), "U+200B (zero width space)"),
        ("WEBHOOK_URL_TEMPLATE", TEMPLATE.replace("/v1", "/v\n1"), "U+000A (line feed)"),
        ("WEBHOOK_URL_TEMPLATE", TEMPLATE.replace("-", "\u2011").replace("sms.", "s\u2011ms."), "U+2011 (non-breaking"),
        ("WEBHOOK_URL_TEMPLATE", TEMPLATE.replace("/v1", "/v 1"), "contains a space"),
        ("FORMER_WEBHOOK_URL_TEMPLATES", f"{TEMPLATE}\u00a0{TEMPLATE}", "U+00A0 (no-break space)"),
        ("TWILIO_URL", "https://api\u00ad.twilio.com", "U+00AD (soft hyphen)"),
        ("CHANNEL_NAMESPACES", "team\u200d-a", "U+200D (zero width joiner)"),
        ("HTTP_HOST", "127.0.\u200e0.1", "U+200E (left-to-right mark)"),
    ],
)
def test_invisible_character_inside_a_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str
) -> None:
    monkeypatch.setenv(f"SMSCHANNEL_{name}", value)
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert f"SMSCHANNEL_{name}: contains " in result.output
    assert named in result.output


def test_unknown_variable_is_named_with_the_nearest_setting() -> None:
    environment = {
        "SMSCHANNEL_WEBHOOK_URL_TEMPLATES": "https://s3cret.example.com",
        "smschannel_worker": "3",
        "SMSCHANNEL_ZZZ": "",
        "SMSCHANNEL_WORKERS": "3",
        "PATH": "/bin",
        # as Kubernetes sets them for a Service "smschannel" and a Service "smschannel-metrics"
        "SMSCHANNEL_SERVICE_HOST": "10.0.0.1",
        "SMSCHANNEL_SERVICE_PORT": "80",
        "SMSCHANNEL_PORT": "tcp://10.0.0.1:80",
        "SMSCHANNEL_PORT_80_TCP": "tcp://10.0.0.1:80",
        "SMSCHANNEL_PORT_80_TCP_ADDR": "10.0.0.1",
        "SMSCHANNEL_METRICS_SERVICE_PORT_HTTP": "80",
    }
    assert list(unknown_variables(Settings, environment)) == [
        "SMSCHANNEL_WEBHOOK_URL_TEMPLATES is not a setting; did you mean SMSCHANNEL_WEBHOOK_URL_TEMPLATE?",
        "SMSCHANNEL_ZZZ is not a setting",
        "smschannel_worker is not a setting; did you mean SMSCHANNEL_WORKERS?",
    ]
    port = {"SMSCHANNEL_PORT": "8080"}
    assert "did you mean SMSCHANNEL_HTTP_PORT?" in next(unknown_variables(Settings, port)), "a person wrote this one"


def test_unknown_variable_is_a_warning_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(_: Settings) -> None:
        pass

    monkeypatch.setattr("smschannel.__main__.run", stop)
    monkeypatch.setenv("SMSCHANNEL_WORKER", SECRET)
    result = CliRunner().invoke(main)
    assert result.exit_code == 0
    assert "SMSCHANNEL_WORKER is not a setting; did you mean SMSCHANNEL_WORKERS?" in result.output
    assert SECRET not in result.output


def test_operator_namespace_holds_no_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMSCHANNEL_CHANNEL_NAMESPACES", "sms-operator")
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert "SMSCHANNEL_CHANNEL_NAMESPACES must not contain the operator's own namespace" in result.output
    monkeypatch.setenv("SMSCHANNEL_OPERATOR_NAMESPACE", "ops")
    assert Settings().channel_namespaces == ("sms-operator",)


def test_operator_namespace_of_the_command_line_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"SMSCHANNEL_CHANNEL_NAMESPACES": "sms-operator"}
    assert Settings.from_published(content, "ops").operator_namespace == "ops"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read: No such file"), (b"no PEM", "has no valid CA certificate")]
)
def test_unusable_ca_bundle_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, message: str
) -> None:
    bundle = tmp_path / "ca.pem"
    if content is not None:
        bundle.write_bytes(content)
    monkeypatch.setenv("SMSCHANNEL_CA_BUNDLE", str(bundle))
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert message in result.output


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


@pytest.mark.parametrize(
    ("timeout", "duration", "shortest"), [("20", "30", "35"), ("15", "26", "27"), ("120", "30", "185"), ("1", "5", "6")]
)
def test_lease_outlasts_the_calls_to_twilio(
    monkeypatch: pytest.MonkeyPatch, timeout: str, duration: str, shortest: str
) -> None:
    """Otherwise another replica could lead before a call has timed out, or no write would ever begin."""
    monkeypatch.setenv("SMSCHANNEL_TWILIO_TIMEOUT_SECONDS", timeout)
    monkeypatch.setenv("SMSCHANNEL_LEASE_DURATION_SECONDS", duration)
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert f"SMSCHANNEL_LEASE_DURATION_SECONDS must be at least {shortest}, since" in result.output
    assert f"SMSCHANNEL_TWILIO_TIMEOUT_SECONDS is {timeout}: a write" in result.output
    monkeypatch.setenv("SMSCHANNEL_LEASE_DURATION_SECONDS", shortest)
    assert Settings().lease_duration_seconds == int(shortest)


SHARED = {
    "CHANNEL_NAMESPACES": "team-a team-b team-c",
    "WEBHOOK_URL_TEMPLATE": "https://a.example/{namespace}/{instance_id}",
}


def given(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in {**SHARED, **variables}.items():
        monkeypatch.setenv(f"SMSCHANNEL_{name}", value)


def test_shard_has_its_own_namespaces_and_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    assert (Settings().own_namespaces, Settings().other_namespaces) == (("team-a", "team-b", "team-c"), frozenset())
    assert Settings().lease == "sms-channel-operator"
    alone = Settings().published()
    given(monkeypatch, SHARD="b", SHARD_NAMESPACES="team-b team-c")
    assert (Settings().own_namespaces, Settings().other_namespaces) == (("team-b", "team-c"), frozenset({"team-a"}))
    assert Settings().lease == "sms-channel-operator-b"
    assert Settings().published() == alone, "the shards would put each other's right again and again"


def test_namespace_that_is_written_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its channels would be listed and watched twice."""
    given(monkeypatch, CHANNEL_NAMESPACES="team-a team-b team-a", SHARD="a", SHARD_NAMESPACES="team-a team-a")
    assert Settings().channel_namespaces == ("team-a", "team-b")
    assert Settings().own_namespaces == ("team-a",)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SHARD": "a"}, "SMSCHANNEL_SHARD_NAMESPACES must be set, since SMSCHANNEL_SHARD is a: write those of"),
        ({"SHARD_NAMESPACES": "team-a"}, "SMSCHANNEL_SHARD must be set, since SMSCHANNEL_SHARD_NAMESPACES is"),
        ({"SHARD": "a", "SHARD_NAMESPACES": "team-a team-x"}, "SMSCHANNEL_CHANNEL_NAMESPACES lacks team-x of"),
        ({"SHARD": "A", "SHARD_NAMESPACES": "team-a"}, "a shard's name is at most 42 lower-case letters"),
        ({"SHARD": "a" * 43, "SHARD_NAMESPACES": "team-a"}, "a shard's name is at most 42 lower-case letters"),
        ({"SHARD": "-a", "SHARD_NAMESPACES": "team-a"}, "a shard's name is at most 42 lower-case letters"),
    ],
)
def test_shard_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    given(monkeypatch, **variables)
    result = CliRunner().invoke(main)
    assert result.exit_code == 1
    assert message in result.output
