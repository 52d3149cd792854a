"""Twilio's refusals become ours by status and code, never by their words, which may say anything."""

from __future__ import annotations

import json

import pytest

from smschannel.api.errors import ChannelError, NotFound, Refused, Retryable, TwilioThrottled, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.twilio.client import twilio_error

WORDS = "5e5c0ffee5e5c0ffee5e5c0ffee5e5c0 is not a token"


def body(code: object = None) -> str:
    return json.dumps({"code": code, "message": WORDS, "more_info": WORDS, "status": 400})


@pytest.mark.parametrize(
    ("status", "answer", "becomes", "reason"),
    [
        (429, body(20429), TwilioThrottled, "too many requests is a matter of time"),
        (429, body(20003), TwilioThrottled, "a limit is no judgement of the credentials, whatever the code says"),
        (500, body(20500), TwilioUnavailable, "an internal error is a matter of time"),
        (503, "upstream connect error", TwilioUnavailable, "a proxy's words are not Twilio's"),
        (401, body(20003), Reason.AuthenticationFailed, "a wrong token"),
        (403, body(20003), Reason.AuthenticationFailed, "an API key without the right"),
        (401, "<html>", Reason.AuthenticationFailed, "401 alone says it"),
        (403, body(20008), Reason.AuthenticationFailed, "test credentials own no numbers"),
        (401, body(20005), Reason.AccountSuspended, "the account is not active"),
        (403, body(20403), Reason.AccountSuspended, "the account may not do anything"),
        (400, body(10001), Reason.AccountSuspended, "the account is not active, said in another way"),
        (400, body(21407), Reason.NumberLacksSms, "an SMS webhook for a number without SMS"),
        (400, body(21402), Reason.WebhookRefused, "the URL is not valid"),
        (400, body(21403), Reason.WebhookRefused, "the method is not valid"),
        (400, body(21406), Reason.WebhookRefused, "the SMS URL is not valid"),
        (400, body("21406"), Reason.WebhookRefused, "a code in quotes is a code"),
        (404, body(20404), NotFound, "the number is not in the account"),
        (404, "<html>", TwilioUnavailable, "a proxy's 404 is not Twilio's: nothing may be written off for it"),
        (404, body(20005), Reason.AccountSuspended, "a suspended account hides its numbers, and nothing is gone"),
        (400, body(99999), TwilioUnavailable, "what is not known must not stop a channel for good"),
        (400, body("many"), TwilioUnavailable, "a code that is no number is no code"),
        (400, body([1]), TwilioUnavailable, "a code that is no number is no code"),
        (400, "[]", TwilioUnavailable, "JSON of another shape has no code"),
        (302, "", TwilioUnavailable, "a redirect is not followed: the token stays with Twilio"),
    ],
)
def test_the_table(status: int, answer: str, becomes: type[ChannelError] | Reason, reason: str) -> None:
    error = twilio_error(status, answer)
    if isinstance(becomes, Reason):
        assert isinstance(error, Refused), reason
        assert error.reason is becomes, reason
    else:
        assert type(error) is becomes, reason
    assert f"HTTP {status}" in str(error), "support will ask for it"
    assert WORDS not in str(error), "Twilio may repeat what it was sent"
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize(
    ("status", "retry_after", "reason"),
    [
        (429, 7.0, "Twilio said when"),
        (503, 7.0, "a service that is down may say when, too"),
        (429, None, "Twilio did not say when"),
    ],
)
def test_it_is_told_when_to_come_back(status: int, retry_after: float | None, reason: str) -> None:
    error = twilio_error(status, body(), retry_after)
    assert isinstance(error, Retryable), reason
    assert error.retry_after == retry_after, reason


def test_a_code_is_named_where_there_is_one() -> None:
    assert "code 21406" in str(twilio_error(400, body(21406)))
    assert "code" not in str(twilio_error(400, body()))
