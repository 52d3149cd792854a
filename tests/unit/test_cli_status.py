"""What `kubectl sms status` makes of a channel: the same in text and JSON, and nothing that was not read."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from smschannel.api.reasons import Effective, Reason
from smschannel.cli.channel_text import HEADER, Reading, document, is_ready, is_stuck, lines, row, row_document
from smschannel.cli.output import age, columns, encoded, printable
from smschannel.core.conditions import next_status
from smschannel.core.plan import Verdict
from tests.manifests import ACCOUNT_SID, INSTANCE, PHONE_NUMBER

NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
URL = f"https://sms.example.com/v1/instances/{INSTANCE}/channels/sms/webhook"
KEY = "00112233aabbccdd"
SEALED = base64.b64encode(b"\x01" + bytes.fromhex(KEY) + b"x" * 1200).decode()
PUBLISHED = {"public-key": "...", "fingerprint": KEY, "namespaces": "sms-channels team-b"}


def channel(verdict: Verdict | None = None, **spec: Any) -> dict[str, Any]:
    """A channel as the operator reported it two hours ago; without a verdict, one that no operator has seen."""
    status: dict[str, Any] = {"observedGeneration": -1}
    if verdict:
        status = next_status({}, verdict, generation=1, webhook_url=URL, now=NOW - timedelta(hours=2))
    given = {"accountSid": ACCOUNT_SID, "phoneNumber": PHONE_NUMBER, "credentials": {"sealed": SEALED}}
    meta = {"namespace": "sms-channels", "name": INSTANCE, "generation": 1, "creationTimestamp": "2026-11-29T00:00:00Z"}
    return {"metadata": meta, "spec": {**given, **spec}, "status": status}


def text(reading: Reading) -> str:
    return "\n".join(lines(document(reading), NOW))


def configured() -> dict[str, Any]:
    return channel(Verdict(Reason.Configured, "All is well.", "PN" + "0" * 32))


def test_working_channel_is_one_screen() -> None:
    shown = text(Reading(configured(), [], PUBLISHED))
    assert shown.splitlines() == [
        f"SmsChannel sms-channels/{INSTANCE}",
        f"  Number     {PHONE_NUMBER} (PN{'0' * 32}) of account {ACCOUNT_SID}",
        f"  Messages   go to {URL}, for 2h",
        f"  Token      of {ACCOUNT_SID}, sealed with key {KEY}, the newest",
        "  Ready      True, Configured, for 2h",
        "  ├─ Ready True, Configured, for 2h",
        "  │    All is well.",
        "  ├─ CredentialsValid True, Verified, for 2h",
        "  │    Twilio accepts the credentials.",
        "  └─ WebhookEffective True, Effective, for 2h",
        "       The number points at status.webhookUrl, and no application or Messaging Service overrides it.",
        "Events: none. Kubernetes keeps them for a limited time, usually an hour.",
    ]


@pytest.mark.parametrize("reason", list(Reason))
def test_remedy_of_each_reason_is_said_once(reason: Reason) -> None:
    """The operator appends it to the message of several conditions."""
    shown = text(Reading(channel(Verdict(reason, "This is so.")), [], PUBLISHED))
    is_trouble = reason.ready != "True" or reason.progress is not None
    assert shown.count(reason.remedy) == int(is_trouble)
    assert shown.count(f"What to do: {reason.remedy}") == int(is_trouble)
    assert "This is so." in shown


@pytest.mark.parametrize("reason", list(Reason))
def test_document_is_plain_json_and_yaml(reason: Reason) -> None:
    found = document(Reading(channel(Verdict(reason, "")), None, None, ("Events: forbidden",)))
    assert json.loads(encoded(found, "json")) == found == yaml.safe_load(encoded(found, "yaml"))
    assert found["restStatus"] == reason.rest_status
    assert is_ready(found) == (reason.ready == "True")
    assert not (is_ready(found) and is_stuck(found))


def test_overridden_webhook_says_who_gets_the_messages() -> None:
    message = "Messaging Service MG0 receives the number's messages."
    verdict = Verdict(Reason.WebhookOverridden, message, effective=Effective.OVERRIDDEN_BY_MESSAGING_SERVICE)
    shown = text(Reading(channel(verdict), [], PUBLISHED))
    assert f"  Messages   go elsewhere, for 2h: {message}" in shown


def test_unset_webhook_says_that_nothing_arrives() -> None:
    verdict = Verdict(Reason.WebhookDrifted, "The webhook is empty.", effective=Effective.NOT_SET)
    assert "  Messages   do not arrive, for 2h: The webhook is empty." in text(Reading(channel(verdict), []))


def test_what_was_not_read_is_named_and_not_guessed() -> None:
    shown = text(Reading(configured(), None, None, ("Events of namespace a: forbidden",)))
    assert "Not read: Events of namespace a: forbidden" in shown
    assert f"sealed with key {KEY}; which key is the newest could not be read" in shown
    assert "Events: none" not in shown


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        pytest.param(None, "is the operator running? kubectl sms doctor", id="nothing may be read"),
        pytest.param({}, "is it installed, or in another namespace (--operator-namespace)?", id="nothing is published"),
        pytest.param(PUBLISHED, "is the operator running? kubectl sms doctor", id="it watches the namespace"),
        pytest.param({"namespaces": "team-b"}, "does not watch namespace sms-channels. It watches team-b.", id="not"),
        pytest.param({"public-key": "x"}, "is the operator running?", id="an older operator names no namespaces"),
    ],
)
def test_channel_that_nobody_reconciled_is_explained(published: dict[str, str] | None, expected: str) -> None:
    shown = text(Reading(channel(), [], published))
    assert expected in shown
    assert "it is not known where they go: No operator has reconciled this channel yet." in shown


def test_newer_generation_is_not_called_ready() -> None:
    """The conditions are about what was there before the change."""
    body = configured()
    body["metadata"]["generation"] = 2
    found = document(Reading(body, [], PUBLISHED))
    assert not is_ready(found)
    assert not is_stuck(found)
    assert "The newest change was not reconciled yet." in text(Reading(body, [], PUBLISHED))
    assert row(row_document(body), NOW)[3] == "True*"


@pytest.mark.parametrize(
    ("credentials", "expected"),
    [
        ({"secretKeyRef": {"name": "twilio", "key": "auth_token"}}, "in Secret twilio under auth_token"),
        ({"sealed": SEALED, "sid": "SK" + "1" * 32}, f"of SK{'1' * 32}, sealed with key {KEY}, the newest"),
        ({"sealed": base64.b64encode(b"\x01" + b"a" * 1200).decode()}, f"key {'61' * 8}; the newest is {KEY}"),
        ({"sealed": "!"}, "sealed, but the value is damaged"),
        ({"sealed": base64.b64encode(b"\x07" + b"a" * 1200).decode()}, "sealed, but the value is damaged"),
    ],
)
def test_token_is_never_shown_but_which_key_sealed_it(credentials: Any, expected: str) -> None:
    shown = text(Reading(channel(Verdict(Reason.Configured, ""), credentials=credentials), [], PUBLISHED))
    assert expected in shown
    assert SEALED not in shown


def event(minutes: int, reason: str, **more: Any) -> dict[str, Any]:
    time = f"{NOW - timedelta(minutes=minutes):%Y-%m-%dT%H:%M:%S.%fZ}"
    return {"metadata": {}, "eventTime": time, "type": "Warning", "reason": reason, "message": "It was so.", **more}


def test_events_are_counted_and_newest_first() -> None:
    newest = {"series": {"count": 3, "lastObservedTime": f"{NOW:%Y-%m-%dT%H:%M:%SZ}"}}
    events = [event(50, "Old"), event(59, "Series", **newest), event(1, "New"), *(event(55, "More") for _ in range(20))]
    shown = [line for line in text(Reading(configured(), events)).splitlines() if "It was so." in line]
    assert shown[0] == "    0s ago  Warning  Series (3 times): It was so."
    assert shown[1] == "    1m ago  Warning  New: It was so."
    assert len(shown) == 10


def test_text_of_others_cannot_control_the_terminal() -> None:
    evil = event(1, "Evil", message="\x1b[2J\nFake line\u202e")
    shown = text(Reading(configured(), [evil]))
    assert "\x1b" not in shown
    assert "?[2J Fake line?" in shown


def test_table_has_a_row_for_each_channel() -> None:
    table = list(columns(HEADER, [row(row_document(configured()), NOW), row(row_document(channel()), NOW)]))
    assert table[1].split() == ["sms-channels", INSTANCE, PHONE_NUMBER, "True", "Configured", "Effective", "2h"]
    assert table[2].split() == ["sms-channels", INSTANCE, PHONE_NUMBER, "Unknown*", "-", "-", "-"]
    wide = row(row_document(configured()), NOW, wide=True)
    assert wide[-4:] == [ACCOUNT_SID, "sealed", URL, "All is well."]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("2026-11-30T11:59:01Z", "59s"),
        ("2026-11-30T11:58:00Z", "2m"),
        ("2026-11-30T10:59:00Z", "1h"),
        ("2026-11-01T00:00:00Z", "29d"),
        ("2026-11-30T12:00:05Z", "0s"),
        ("2026-11-30T11:59:59", "1s"),
        ("yesterday", "unknown"),
        (None, "unknown"),
    ],
)
def test_age_is_as_kubectl_shows_it(written: str | None, expected: str) -> None:
    assert age(written, NOW) == expected


def test_printable_keeps_words() -> None:
    assert printable("Gr\u00fc\u00dfe\tan\u0000dich\n!") == "Gr\u00fc\u00dfe?an?dich !"
