"""The table of reasons: each row is sound. That the documents have the same table is in test_documents.py."""

from __future__ import annotations

import re

import pytest

from smschannel.api.reasons import NOT_CONFIGURED, Look, Reason


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_a_row_is_sound(reason: Reason) -> None:
    assert reason.ready in {"True", "False", "Unknown"}
    assert reason.progress in {"Reconciling", "Stalled", None}, "one of them at most: they exclude each other"
    assert (reason.progress is None) <= (reason.ready == "True"), "what is not Ready either goes on or stands still"
    assert re.fullmatch("[A-Z][A-Za-z]+", reason.name), "Kubernetes wants reasons in CamelCase"
    assert re.fullmatch("[a-z]+(_[a-z]+)*", reason.rest_status)
    assert reason.remedy.strip() == reason.remedy
    assert reason.remedy, "a reason without a remedy leaves a person alone"
    assert "|" not in reason.remedy, "it stands in a markdown table"
    assert "\n" not in reason.remedy, "it stands in a markdown table"
    assert reason.look in Look


def test_not_configured_is_for_instances_without_a_channel() -> None:
    assert NOT_CONFIGURED not in {reason.rest_status for reason in Reason}


@pytest.mark.parametrize(
    ("status", "names", "reason"),
    [
        (
            "pending",
            {"Pending", "TwilioUnavailable", "SecretNotFound", "SecretKeyMissing", "SecretNotLabelled"},
            "a REST client can only wait for these",
        ),
        ("removing", {"Restoring", "RestoreFailed"}, "whether it stands still does not matter to who removed it"),
        ("active", {"Configured"}, "only a channel without any trouble is active"),
        ("degraded", {"TokenRejected"}, "it works, and its last change failed"),
    ],
)
def test_which_reasons_share_a_rest_status(status: str, names: set[str], reason: str) -> None:
    assert {each.name for each in Reason if each.rest_status == status} == names, reason


def test_reasons_with_equal_rows_would_be_one_reason() -> None:
    assert len({reason.value for reason in Reason}) == len(Reason.__members__)


def test_stalled_beside_ready_is_for_a_rejected_token_only() -> None:
    assert [reason for reason in Reason if reason.ready == "True" and reason.progress] == [Reason.TokenRejected]
