"""The table of reasons: each row is sound. That the documents have the same table is in test_documents.py."""

from __future__ import annotations

import re

import pytest

from smschannel.api.reasons import NOT_CONFIGURED, REST_STATUSES, Effective, Reason, Recheck


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_row_is_consistent(reason: Reason) -> None:
    assert reason.ready in {"True", "False", "Unknown"}
    assert reason.progress in {"Reconciling", "Stalled", None}, "one of them at most: they exclude each other"
    assert (reason.progress is None) <= (reason.ready == "True"), "what is not Ready is either Reconciling or Stalled"
    assert re.fullmatch("[A-Z][A-Za-z]+", reason.name), "Kubernetes expects reasons in CamelCase"
    assert re.fullmatch("[a-z]+(_[a-z]+)*", reason.rest_status)
    assert reason.remedy.strip() == reason.remedy
    assert reason.remedy, "each reason has a remedy"
    assert "|" not in reason.remedy, "it is part of a markdown table"
    assert "\n" not in reason.remedy, "it is part of a markdown table"
    assert reason.recheck in Recheck


def test_not_configured_is_for_instances_without_a_channel() -> None:
    assert NOT_CONFIGURED not in {reason.rest_status for reason in Reason}


@pytest.mark.parametrize(
    ("status", "names", "reason"),
    [
        (
            "pending",
            {
                "Pending",
                "TwilioUnavailable",
                "SecretNotFound",
                "SecretKeyMissing",
                "SecretNotLabelled",
                "KubernetesRefused",
            },
            "a REST client can only wait for these",
        ),
        ("removing", {"Restoring", "RestoreFailed"}, "a client that removed the channel need not distinguish them"),
        ("active", {"Configured"}, "only a channel without any problem is active"),
        ("degraded", {"TokenRejected"}, "it works, and its last change failed"),
    ],
)
def test_which_reasons_share_a_rest_status(status: str, names: set[str], reason: str) -> None:
    assert {each.name for each in Reason if each.rest_status == status} == names, reason


def test_reasons_with_equal_rows_would_be_one_reason() -> None:
    assert len({reason.value for reason in Reason}) == len(Reason.__members__)


def test_rest_statuses_are_a_closed_list_without_duplicates() -> None:
    assert set(REST_STATUSES) == {reason.rest_status for reason in Reason} | {NOT_CONFIGURED}
    assert len(REST_STATUSES) == len(set(REST_STATUSES))


@pytest.mark.parametrize(
    ("recheck", "names", "reason"),
    [
        (
            Recheck.DRIFT,
            {"Configured", "WebhookForeign", "WebhookDrifted", "WebhookOverridden", "ObserveOnly"},
            "the webhook or its routing may be changed at Twilio",
        ),
        (
            Recheck.BACKOFF,
            {"Pending", "TwilioUnavailable", "Restoring", "RestoreFailed", "KubernetesRefused"},
            "the operator has not finished",
        ),
    ],
)
def test_which_reasons_are_checked_more_often_than_slowly(recheck: Recheck, names: set[str], reason: str) -> None:
    assert {each.name for each in Reason if each.recheck is recheck} == names, reason


def test_record_that_cannot_be_opened_stalls_the_channel() -> None:
    row = Reason.RecordUnreadable
    assert (row.ready, row.progress, row.rest_status) == ("False", "Stalled", "record_unreadable")


@pytest.mark.parametrize("effective", Effective)
def test_reason_of_webhook_effective_is_camel_case(effective: Effective) -> None:
    assert re.fullmatch("[A-Z][A-Za-z]+", effective.value), "Kubernetes expects reasons in CamelCase"


def test_stalled_beside_ready_is_for_a_rejected_token_only() -> None:
    assert [reason for reason in Reason if reason.ready == "True" and reason.progress] == [Reason.TokenRejected]
