"""Conditions: the status of every reason keeps the rules, moves its times correctly, and is written only once."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from smschannel.api.errors import Refused
from smschannel.api.reasons import Effective, Reason
from smschannel.api.status import condition, reason_of, rest_status, was_effective
from smschannel.core.conditions import next_status, status_while_refused, status_while_unavailable, violations
from smschannel.core.plan import Verdict

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)
EARLIER = NOW - timedelta(minutes=1)
STAMP, LATER_STAMP = "2026-01-02T03:04:05Z", "2026-01-02T03:05:05Z"
URL = "https://sms.example.com/1"
FRESH: dict[str, Any] = {"observedGeneration": -1}
WORKS = Verdict(Reason.Configured, "It works.", "PN1")
MISSING = Verdict(Reason.SecretNotFound, "It is not there.", "PN1", degraded=True)

Status = dict[str, Any]


def report(
    verdict: Verdict, before: Status | None = None, *, generation: int = 1, check_now: str = "", now: datetime = NOW
) -> Status:
    return next_status(before or FRESH, verdict, generation=generation, webhook_url=URL, check_now=check_now, now=now)


def of(reason: Reason) -> Verdict:
    effective = {Reason.WebhookForeign, Reason.WebhookDrifted, Reason.WebhookOverridden}
    return Verdict(reason, "As it is.", effective=Effective.URL_MISMATCH if reason in effective else None)


def kinds(status: Status) -> dict[str, str]:
    return {each["type"]: each["status"] for each in status["conditions"]}


def part(status: Status, kind: str) -> dict[str, Any]:
    found = condition(status, kind)
    assert found is not None
    return dict(found)


CONFIGURED = report(WORKS)


# The rules


def a_condition(kind: str, status: str = "True", reason: str = "Configured", since: str = STAMP) -> Status:
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": since}


@pytest.mark.parametrize(
    ("before", "after", "broken", "reason"),
    [
        ([], [a_condition("Ready")], [], "Ready alone is a correct status"),
        (
            [],
            [a_condition("Ready", reason="TokenRejected"), a_condition("Stalled")],
            [],
            "a rejected token stalls a channel that works",
        ),
        (
            [a_condition("Ready")],
            [a_condition("Ready", "False", since=LATER_STAMP)],
            [],
            "status and time moved together",
        ),
        ([], [], ["Ready is missing"], "kubectl wait for Ready would wait forever"),
        (
            [],
            [a_condition("Ready", "False"), a_condition("Reconciling"), a_condition("Stalled")],
            ["Reconciling and Stalled stand together"],
            "kstatus cannot distinguish InProgress from Failed",
        ),
        (
            [],
            [a_condition("Ready", "False"), a_condition("Reconciling", "False")],
            ["Reconciling is there without being True"],
            "kstatus expects it only while it is True",
        ),
        (
            [],
            [a_condition("Ready", "False"), a_condition("Stalled", "Unknown")],
            ["Stalled is there without being True"],
            "kstatus expects it only while it is True",
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
            ["Stalled beside a Ready that does not name the credentials"],
            "a channel that works is not stalled",
        ),
        (
            [],
            [a_condition("Ready", reason="AuthenticationFailed"), a_condition("Stalled")],
            ["Stalled beside a Ready that does not name the credentials"],
            "a channel that no login works for is not ready",
        ),
        (
            [],
            [a_condition("Ready", reason="SecretNotFound"), a_condition("Stalled")],
            [],
            "the Secret is missing, and the recorded login works",
        ),
    ],
)
def test_each_broken_rule_is_found(before: list[Status], after: list[Status], broken: list[str], reason: str) -> None:
    assert violations({"conditions": before}, {"conditions": after}) == broken, reason


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_step_between_two_reasons_keeps_the_rules(reason: Reason) -> None:
    for earlier in Reason:
        before = report(of(earlier))
        after = report(of(reason), before, now=LATER)
        assert violations(FRESH, before) == []
        assert violations(before, after) == [], f"{earlier.name} to {reason.name}"


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_status_follows_the_table_of_reasons(reason: Reason) -> None:
    status = report(of(reason), generation=4)
    assert part(status, "Ready")["status"] == reason.ready
    assert {"Reconciling", "Stalled"} & set(kinds(status)) == ({reason.progress} if reason.progress else set())
    assert reason_of(status) is reason
    assert status["observedGeneration"] == 4
    assert {each["observedGeneration"] for each in status["conditions"]} == {4}
    assert status["webhookUrl"] == URL
    assert (reason.remedy in part(status, "Ready")["message"]) is (
        reason.ready != "True" or reason is Reason.TokenRejected
    ), "the message has the remedy"


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_status_is_equal_if_nothing_changed(reason: Reason) -> None:
    status = report(of(reason))
    assert report(of(reason), status, now=LATER) == status


def test_new_generation_is_reported_and_moves_no_time() -> None:
    after = report(WORKS, CONFIGURED, generation=2, now=LATER)
    assert {each["observedGeneration"] for each in after["conditions"]} == {2}
    assert {each["lastTransitionTime"] for each in after["conditions"]} == {STAMP}


def test_new_reason_for_the_same_status_moves_no_time() -> None:
    before = report(of(Reason.SecretNotFound))
    after = report(of(Reason.SecretKeyMissing), before, now=LATER)
    assert part(after, "Ready")["lastTransitionTime"] == STAMP
    assert part(after, "Ready")["reason"] == "SecretKeyMissing"


def test_only_a_changed_status_moves_its_time() -> None:
    after = report(of(Reason.WebhookDrifted), CONFIGURED, now=LATER)
    assert {each["type"]: each["lastTransitionTime"] for each in after["conditions"]} == {
        "Ready": LATER_STAMP,
        "Stalled": LATER_STAMP,
        "CredentialsValid": STAMP,
        "WebhookEffective": LATER_STAMP,
    }


def test_condition_that_comes_back_starts_again() -> None:
    stalled = report(of(Reason.NumberNotFound))
    repeated = report(of(Reason.NumberNotFound), report(WORKS, stalled, now=NOW), now=LATER)
    assert part(repeated, "Stalled")["lastTransitionTime"] == LATER_STAMP


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_slow_clock_moves_no_transition_time_back(reason: Reason) -> None:
    """This happens after a restart on a node whose clock is a minute behind."""
    for earlier in Reason:
        before = report(of(earlier))
        after = report(of(reason), before, now=EARLIER)
        assert violations(before, after) == [], f"{earlier.name} to {reason.name}"
        assert part(after, "Ready")["lastTransitionTime"] == STAMP


def test_slow_clock_moves_no_transition_time_back_while_unavailable() -> None:
    trying = status_while_unavailable(CONFIGURED, "HTTP 503", generation=2, now=LATER)
    assert trying is not None
    after = status_while_unavailable(trying, "HTTP 503", generation=2, now=NOW)
    assert after == trying


def test_times_are_utc_in_every_timezone() -> None:
    east = NOW.astimezone(timezone(timedelta(hours=10)))
    assert report(WORKS, now=east) == CONFIGURED


def test_message_fits_into_a_condition() -> None:
    status = report(Verdict(Reason.Configured, "x" * 40000))
    assert len(part(status, "Ready")["message"]) == 32768


@pytest.mark.parametrize(
    ("verdict", "credentials", "webhook", "reason"),
    [
        (WORKS, "True", "True", "Twilio accepts the login and has our webhook"),
        (of(Reason.TokenRejected), "False", "True", "the newer token is refused, the messages go on"),
        (
            replace(of(Reason.WebhookDrifted), rejected=Refused(Reason.TokenRejected, "Refused.")),
            "False",
            "False",
            "a newer token that is not used is reported beside what is worse",
        ),
        (MISSING, "False", "True", "the Secret is missing, the messages go on"),
        (of(Reason.AuthenticationFailed), "False", "Unknown", "without a login no webhook is read"),
        (of(Reason.SecretNotFound), "False", "Unknown", "without a token there is no login"),
        (of(Reason.TokenUnreadable), "False", "Unknown", "without a token there is no login"),
        (of(Reason.NumberNotFound), "True", "Unknown", "a login that works does not find the number"),
        (of(Reason.WebhookDrifted), "True", "False", "a foreign webhook gets the messages"),
        (of(Reason.WebhookOverridden), "True", "False", "something else gets the messages"),
        (of(Reason.Pending), "Unknown", "Unknown", "nothing was read yet"),
        (of(Reason.TwilioUnavailable), "Unknown", "Unknown", "Twilio answered nothing about either"),
        (of(Reason.RecordUnreadable), "Unknown", "Unknown", "Twilio was not asked"),
    ],
)
def test_credentials_and_webhook_are_reported_as_far_as_they_were_checked(
    verdict: Verdict, credentials: str, webhook: str, reason: str
) -> None:
    found = kinds(report(verdict))
    assert (found["CredentialsValid"], found["WebhookEffective"]) == (credentials, webhook), reason


def test_former_conditions_stay_while_twilio_is_unavailable() -> None:
    after = report(of(Reason.TwilioUnavailable), CONFIGURED, now=LATER)
    for kind in ("CredentialsValid", "WebhookEffective"):
        assert part(after, kind) == part(CONFIGURED, kind), "it is checked again as soon as Twilio answers"
    assert after["phoneNumberSid"] == "PN1"


@pytest.mark.parametrize(
    ("verdict", "credentials", "reason"),
    [
        (of(Reason.Suspended), "Unknown", "a suspended channel is not checked"),
        (of(Reason.Restoring), "Unknown", "a channel that is being deleted is not checked"),
        (of(Reason.RestoreFailed), "Unknown", "a channel that is being deleted is not checked"),
        (of(Reason.RecordUnreadable), "Unknown", "Twilio is not asked without the record"),
        (of(Reason.KubernetesRefused), "Unknown", "the operator does not get that far"),
        (of(Reason.AuthenticationFailed), "False", "no login reads the number"),
        (of(Reason.AccountSuspended), "False", "no login reads the number"),
        (of(Reason.SecretNotFound), "False", "no login reads the number"),
        (of(Reason.TokenUnreadable), "False", "no login reads the number"),
    ],
)
def test_what_nothing_looks_at_is_unknown(verdict: Verdict, credentials: str, reason: str) -> None:
    """The reason keeps that the webhook had been set: another one after that is drift."""
    after = report(verdict, CONFIGURED, now=LATER)
    assert kinds(after)["CredentialsValid"] == credentials, reason
    effective = part(after, "WebhookEffective")
    assert (effective["status"], effective["reason"]) == ("Unknown", "NoLongerChecked"), reason
    assert violations(CONFIGURED, after) == []
    assert was_effective(report(verdict, after, now=LATER))
    assert not was_effective(report(verdict)), "a webhook that was never set is only not checked"
    assert after["phoneNumberSid"] == "PN1"


@pytest.mark.parametrize(
    "reason", [Reason.SecretNotFound, Reason.SecretKeyMissing, Reason.SecretNotLabelled, Reason.TokenUnreadable]
)
def test_channel_that_works_without_its_credentials_is_ready_stalled_and_degraded(reason: Reason) -> None:
    after = report(Verdict(reason, "As it is.", "PN1", degraded=True), CONFIGURED, now=LATER)
    assert kinds(after) == {"Ready": "True", "Stalled": "True", "CredentialsValid": "False", "WebhookEffective": "True"}
    assert part(after, "Ready")["lastTransitionTime"] == STAMP
    assert reason.remedy in part(after, "Ready")["message"]
    assert violations(CONFIGURED, after) == []
    assert rest_status(after) == "degraded"
    broken = report(Verdict(reason, "As it is."), after, now=LATER)
    assert (kinds(broken)["Ready"], rest_status(broken)) == ("False", reason.rest_status)
    assert violations(after, broken) == []
    assert status_while_unavailable(after, "HTTP 503", generation=1, now=LATER) == after


@pytest.mark.parametrize(
    ("effective", "unknown", "status", "reason"),
    [
        (None, "", "True", "Effective"),
        (None, "Why.", "Unknown", "MessagingServicesUnreadable"),
        (Effective.URL_MISMATCH, "", "False", "UrlMismatch"),
        (Effective.FOREIGN_URL, "Why.", "False", "ForeignUrl"),
    ],
)
def test_reason_of_webhook_effective(effective: Effective | None, unknown: str, status: str, reason: str) -> None:
    found = part(report(replace(WORKS, effective=effective, unknown=unknown)), "WebhookEffective")
    assert (found["status"], found["reason"]) == (status, reason)
    assert type(found["reason"]) is str, "a status is plain JSON"


def test_record_that_cannot_be_opened_stalls_the_channel() -> None:
    after = report(Verdict(Reason.RecordUnreadable, "Secret pn1 cannot be opened."), CONFIGURED, now=LATER)
    assert kinds(after) == {
        "Ready": "False",
        "Stalled": "True",
        "CredentialsValid": "Unknown",
        "WebhookEffective": "Unknown",
    }, "Twilio is not asked"
    assert violations(CONFIGURED, after) == []
    assert after["phoneNumberSid"] == "PN1"


# The check-now annotation


def test_status_without_check_now_has_no_handled_value() -> None:
    assert "lastHandledCheckNow" not in CONFIGURED


def test_handled_check_now_is_reported_and_moves_no_time() -> None:
    after = report(WORKS, CONFIGURED, check_now="1", now=LATER)
    assert after == {**CONFIGURED, "lastHandledCheckNow": "1"}
    assert report(WORKS, after, check_now="1", now=LATER) == after


def test_newer_check_now_replaces_the_handled_one() -> None:
    before = report(WORKS, check_now="1")
    assert report(WORKS, before, check_now="2")["lastHandledCheckNow"] == "2"


def test_handled_check_now_stays_after_the_annotation_is_removed() -> None:
    """Otherwise the same value, applied again by GitOps, would be a new request."""
    before = report(WORKS, check_now="1")
    assert report(WORKS, before, now=LATER) == before


@pytest.mark.parametrize("generation", [1, 2])
def test_check_now_is_not_handled_while_twilio_is_unavailable(generation: int) -> None:
    before = report(WORKS, check_now="1")
    after = status_while_unavailable(before, "HTTP 503", generation=generation, now=LATER)
    assert after is not None
    assert after["lastHandledCheckNow"] == "1"


# The number and the reason


def test_number_is_named_once_it_is_known() -> None:
    assert "phoneNumberSid" not in report(of(Reason.NumberNotFound))
    assert report(Verdict(Reason.Configured, "", "PN2"), CONFIGURED)["phoneNumberSid"] == "PN2"


@pytest.mark.parametrize(
    ("status", "known", "reason"),
    [
        (FRESH, None, "nothing was reported yet"),
        ({}, None, "there is no status at all"),
        ({"conditions": [a_condition("Ready", reason="OfALaterRelease")]}, None, "another release has more reasons"),
        (CONFIGURED, Reason.Configured, "Ready carries it"),
    ],
)
def test_reason_of_a_status(status: Status, known: Reason | None, reason: str) -> None:
    assert reason_of(status) is known, reason


# While Twilio is unavailable


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (FRESH, "it never worked: TwilioUnavailable is its reason"),
        (report(of(Reason.NumberNotFound)), "it does not work: TwilioUnavailable is its reason now"),
        (report(of(Reason.Pending)), "it is Unknown whether it works"),
    ],
)
def test_channel_that_does_not_work_has_no_ready_to_keep(before: Status, reason: str) -> None:
    assert status_while_unavailable(before, "HTTP 503", generation=1, now=LATER) is None, reason


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (Reason.Configured, "a channel that works stays Ready"),
        (Reason.TokenRejected, "a channel that works and is stalled stays so"),
        (Reason.Suspended, "a suspended channel is left as it is"),
    ],
)
def test_generation_that_works_is_not_reported_as_broken(reason: Reason, why: str) -> None:
    before = report(of(reason))
    assert status_while_unavailable(before, "HTTP 503", generation=1, now=LATER) == before, why


@pytest.mark.parametrize("reason", [Reason.Configured, Reason.TokenRejected, Reason.Suspended])
def test_newer_generation_keeps_ready_and_is_reported_as_reconciling(reason: Reason) -> None:
    before = report(of(reason))
    after = status_while_unavailable(before, "HTTP 503", generation=2, now=LATER)
    assert after is not None
    assert violations(before, after) == []
    assert part(after, "Ready") == part(before, "Ready")
    assert after["observedGeneration"] == 1, "or kubectl wait would take the old success for the new one"
    trying = part(after, "Reconciling")
    assert (trying["status"], trying["reason"], trying["observedGeneration"]) == ("True", "TwilioUnavailable", 2)
    assert trying["lastTransitionTime"] == LATER_STAMP
    assert "Stalled" not in kinds(after), "Reconciling and Stalled exclude each other"


def test_outage_is_reported_once() -> None:
    first = status_while_unavailable(CONFIGURED, "HTTP 503", generation=2, now=NOW)
    assert first is not None
    assert status_while_unavailable(first, "HTTP 503", generation=2, now=LATER) == first


def test_success_ends_reconciling() -> None:
    trying = status_while_unavailable(CONFIGURED, "HTTP 503", generation=2, now=NOW)
    assert trying is not None
    after = report(WORKS, trying, generation=2, now=LATER)
    assert violations(trying, after) == []
    assert "Reconciling" not in kinds(after)
    assert after["observedGeneration"] == 2


# While Kubernetes refuses


@pytest.mark.parametrize("before", [FRESH, report(of(Reason.NumberNotFound)), report(of(Reason.Pending))])
def test_channel_that_does_not_work_has_no_ready_to_keep_while_kubernetes_refuses(before: Status) -> None:
    assert status_while_refused(before, "forbidden", generation=1, now=LATER) is None


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("before", [CONFIGURED, report(MISSING), report(of(Reason.Suspended))])
def test_channel_that_works_stays_ready_for_the_first_minute_of_a_refusal(before: Status, generation: int) -> None:
    """An API server that has just started refuses everything for some seconds."""
    first = status_while_refused(before, "forbidden", generation=generation, now=LATER)
    assert first is not None
    assert violations(before, first) == []
    assert part(first, "Ready") == part(before, "Ready")
    trying = part(first, "Reconciling")
    assert (trying["reason"], trying["message"], trying["lastTransitionTime"]) == (
        "KubernetesRefused",
        "forbidden",
        LATER_STAMP,
    )
    almost = LATER + timedelta(seconds=59)
    assert status_while_refused(first, "forbidden", generation=generation, now=almost) == first, "nothing is written"
    assert status_while_refused(first, "forbidden", generation=generation, now=LATER + timedelta(minutes=1)) is None
    after = report(of(Reason.KubernetesRefused), first, generation=generation, now=LATER + timedelta(minutes=1))
    assert violations(first, after) == []
    assert kinds(after)["Ready"] == "False"
