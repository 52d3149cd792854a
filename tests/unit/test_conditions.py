"""Conditions: every reason's status keeps to the rules, moves its times rightly, and is told only once."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from smschannel.api.reasons import Reason
from smschannel.api.status import condition, reason_of
from smschannel.core.conditions import next_status, still_trying, violations
from smschannel.core.plan import Verdict

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)
STAMP, LATER_STAMP = "2026-01-02T03:04:05Z", "2026-01-02T03:05:05Z"
URL = "https://sms.example.com/1"
FRESH: dict[str, Any] = {"observedGeneration": -1}
WORKS = Verdict(Reason.Configured, "It works.", "PN1")

Status = dict[str, Any]


def told(verdict: Verdict, before: Status | None = None, *, generation: int = 1, now: datetime = NOW) -> Status:
    return next_status(before or FRESH, verdict, generation=generation, webhook_url=URL, now=now)


def of(reason: Reason) -> Verdict:
    effective = {Reason.WebhookForeign, Reason.WebhookDrifted, Reason.WebhookOverridden}
    return Verdict(reason, "As it is.", effective="UrlMismatch" if reason in effective else "")


def kinds(status: Status) -> dict[str, str]:
    return {each["type"]: each["status"] for each in status["conditions"]}


def part(status: Status, kind: str) -> dict[str, Any]:
    found = condition(status, kind)
    assert found is not None
    return dict(found)


CONFIGURED = told(WORKS)


# The rules


def a_condition(kind: str, status: str = "True", reason: str = "Configured", since: str = STAMP) -> Status:
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": since}


@pytest.mark.parametrize(
    ("before", "after", "broken", "reason"),
    [
        ([], [a_condition("Ready")], [], "a lone Ready is a right status"),
        (
            [],
            [a_condition("Ready", reason="TokenRejected"), a_condition("Stalled")],
            [],
            "a rejected token is the one thing that stalls a channel that works",
        ),
        (
            [a_condition("Ready")],
            [a_condition("Ready", "False", since=LATER_STAMP)],
            [],
            "status and time moved together",
        ),
        ([], [], ["Ready is missing"], "whoever waits for Ready would wait for ever"),
        (
            [],
            [a_condition("Ready", "False"), a_condition("Reconciling"), a_condition("Stalled")],
            ["Reconciling and Stalled stand together"],
            "kstatus cannot tell InProgress from Failed",
        ),
        (
            [],
            [a_condition("Ready", "False"), a_condition("Reconciling", "False")],
            ["Reconciling is there without being True"],
            "kstatus wants it away when it is not True",
        ),
        (
            [],
            [a_condition("Ready", "False"), a_condition("Stalled", "Unknown")],
            ["Stalled is there without being True"],
            "kstatus wants it away when it is not True",
        ),
        (
            [a_condition("Ready")],
            [a_condition("Ready", since=LATER_STAMP)],
            ["Ready moved its status and its lastTransitionTime apart"],
            "the time moved without the status",
        ),
        (
            [a_condition("Ready", since=LATER_STAMP)],
            [a_condition("Ready", "False")],
            ["Ready moved its status and its lastTransitionTime apart"],
            "the time moved back",
        ),
        (
            [a_condition("Ready")],
            [a_condition("Ready", "False")],
            [],
            "the status may move twice within a second",
        ),
        (
            [],
            [a_condition("Ready"), a_condition("Stalled")],
            ["Stalled beside a Ready that is not TokenRejected"],
            "a channel that works is not stalled",
        ),
    ],
)
def test_each_broken_rule_is_seen(before: list[Status], after: list[Status], broken: list[str], reason: str) -> None:
    assert violations({"conditions": before}, {"conditions": after}) == broken, reason


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_step_between_two_reasons_keeps_to_the_rules(reason: Reason) -> None:
    for earlier in Reason:
        before = told(of(earlier))
        after = told(of(reason), before, now=LATER)
        assert violations(FRESH, before) == []
        assert violations(before, after) == [], f"{earlier.name} to {reason.name}"


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_a_status_says_what_the_table_of_reasons_says(reason: Reason) -> None:
    status = told(of(reason), generation=4)
    assert part(status, "Ready")["status"] == reason.ready
    assert {"Reconciling", "Stalled"} & set(kinds(status)) == ({reason.progress} if reason.progress else set())
    assert reason_of(status) is reason
    assert status["observedGeneration"] == 4
    assert {each["observedGeneration"] for each in status["conditions"]} == {4}
    assert status["webhookUrl"] == URL
    assert (reason.remedy in part(status, "Ready")["message"]) is (
        reason.ready != "True" or reason is Reason.TokenRejected
    ), "who must do something reads what"


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_a_status_is_equal_when_there_is_nothing_new(reason: Reason) -> None:
    status = told(of(reason))
    assert told(of(reason), status, now=LATER) == status


def test_a_new_generation_is_news_and_moves_no_time() -> None:
    after = told(WORKS, CONFIGURED, generation=2, now=LATER)
    assert {each["observedGeneration"] for each in after["conditions"]} == {2}
    assert {each["lastTransitionTime"] for each in after["conditions"]} == {STAMP}


def test_a_new_reason_for_the_same_status_moves_no_time() -> None:
    before = told(of(Reason.SecretNotFound))
    after = told(of(Reason.SecretKeyMissing), before, now=LATER)
    assert part(after, "Ready")["lastTransitionTime"] == STAMP
    assert part(after, "Ready")["reason"] == "SecretKeyMissing"


def test_only_what_changed_its_status_moves_its_time() -> None:
    after = told(of(Reason.WebhookDrifted), CONFIGURED, now=LATER)
    assert {each["type"]: each["lastTransitionTime"] for each in after["conditions"]} == {
        "Ready": LATER_STAMP,
        "Stalled": LATER_STAMP,
        "CredentialsValid": STAMP,
        "WebhookEffective": LATER_STAMP,
    }


def test_a_condition_that_comes_back_begins_anew() -> None:
    stalled = told(of(Reason.NumberNotFound))
    again = told(of(Reason.NumberNotFound), told(WORKS, stalled, now=NOW), now=LATER)
    assert part(again, "Stalled")["lastTransitionTime"] == LATER_STAMP


def test_times_are_utc_whatever_the_clock_says() -> None:
    east = NOW.astimezone(timezone(timedelta(hours=10)))
    assert told(WORKS, now=east) == CONFIGURED


def test_a_message_fits_into_a_condition() -> None:
    status = told(Verdict(Reason.Configured, "x" * 40000))
    assert len(part(status, "Ready")["message"]) == 32768


@pytest.mark.parametrize(
    ("verdict", "credentials", "webhook", "reason"),
    [
        (WORKS, "True", "True", "Twilio took the login and has our webhook"),
        (of(Reason.TokenRejected), "False", "True", "the newer token is refused, the messages go on"),
        (
            replace(of(Reason.WebhookDrifted), rejected="Refused."),
            "False",
            "False",
            "a newer token that is not used is told beside what is worse",
        ),
        (of(Reason.AuthenticationFailed), "False", "Unknown", "who cannot log in sees no webhook"),
        (of(Reason.SecretNotFound), "False", "Unknown", "without a token nobody logs in"),
        (of(Reason.TokenUnreadable), "False", "Unknown", "without a token nobody logs in"),
        (of(Reason.NumberNotFound), "True", "Unknown", "a login that works does not find the number"),
        (of(Reason.WebhookDrifted), "True", "False", "a foreign webhook gets the messages"),
        (of(Reason.WebhookOverridden), "True", "False", "something else gets the messages"),
        (of(Reason.Pending), "Unknown", "Unknown", "nobody looked yet"),
        (of(Reason.TwilioUnavailable), "Unknown", "Unknown", "Twilio said nothing about either"),
    ],
)
def test_what_is_known_of_credentials_and_webhook(
    verdict: Verdict, credentials: str, webhook: str, reason: str
) -> None:
    known = kinds(told(verdict))
    assert (known["CredentialsValid"], known["WebhookEffective"]) == (credentials, webhook), reason


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (of(Reason.Suspended), "a suspended channel is not looked at"),
        (of(Reason.TwilioUnavailable), "Twilio said nothing new"),
        (of(Reason.Restoring), "a channel on its way out is not looked at"),
        (of(Reason.RestoreFailed), "a channel on its way out is not looked at"),
    ],
)
def test_what_was_known_stays_where_nobody_looked(verdict: Verdict, reason: str) -> None:
    after = told(verdict, CONFIGURED, now=LATER)
    for kind in ("CredentialsValid", "WebhookEffective"):
        assert part(after, kind) == part(CONFIGURED, kind), reason
    assert after["phoneNumberSid"] == "PN1", reason


def test_a_number_is_named_once_it_is_known() -> None:
    assert "phoneNumberSid" not in told(of(Reason.NumberNotFound))
    assert told(Verdict(Reason.Configured, "", "PN2"), CONFIGURED)["phoneNumberSid"] == "PN2"


@pytest.mark.parametrize(
    ("status", "known", "reason"),
    [
        (FRESH, None, "nobody reported on it yet"),
        ({}, None, "there is no status at all"),
        ({"conditions": [a_condition("Ready", reason="OfALaterRelease")]}, None, "another release knew more reasons"),
        (CONFIGURED, Reason.Configured, "Ready carries it"),
    ],
)
def test_the_reason_of_a_status(status: Status, known: Reason | None, reason: str) -> None:
    assert reason_of(status) is known, reason


# While Twilio cannot be reached


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (FRESH, "it never worked: TwilioUnavailable is its reason"),
        (told(of(Reason.NumberNotFound)), "it does not work: TwilioUnavailable is its reason now"),
        (told(of(Reason.Pending)), "it is Unknown whether it works"),
    ],
)
def test_a_channel_that_does_not_work_has_nothing_to_keep(before: Status, reason: str) -> None:
    assert still_trying(before, "HTTP 503", generation=1, now=LATER) is None, reason


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (Reason.Configured, "what works, works on"),
        (Reason.TokenRejected, "what works and is stalled stays so"),
        (Reason.Suspended, "it is left alone"),
    ],
)
def test_the_generation_that_works_works_on(reason: Reason, why: str) -> None:
    before = told(of(reason))
    assert still_trying(before, "HTTP 503", generation=1, now=LATER) == before, why


@pytest.mark.parametrize("reason", [Reason.Configured, Reason.TokenRejected, Reason.Suspended])
def test_a_newer_generation_keeps_ready_and_is_not_there_yet(reason: Reason) -> None:
    before = told(of(reason))
    after = still_trying(before, "HTTP 503", generation=2, now=LATER)
    assert after is not None
    assert violations(before, after) == []
    assert part(after, "Ready") == part(before, "Ready")
    assert after["observedGeneration"] == 1, "or kubectl wait would take the old success for the new one"
    trying = part(after, "Reconciling")
    assert (trying["status"], trying["reason"], trying["observedGeneration"]) == ("True", "TwilioUnavailable", 2)
    assert trying["lastTransitionTime"] == LATER_STAMP
    assert "Stalled" not in kinds(after), "Reconciling and Stalled exclude each other"


def test_trying_on_is_told_once() -> None:
    first = still_trying(CONFIGURED, "HTTP 503", generation=2, now=NOW)
    assert first is not None
    assert still_trying(first, "HTTP 503", generation=2, now=LATER) == first


def test_success_ends_the_trying() -> None:
    trying = still_trying(CONFIGURED, "HTTP 503", generation=2, now=NOW)
    assert trying is not None
    after = told(WORKS, trying, generation=2, now=LATER)
    assert violations(trying, after) == []
    assert "Reconciling" not in kinds(after)
    assert after["observedGeneration"] == 2
