"""Test that Twilio's error answers are mapped by HTTP status and code, never by their text."""

from __future__ import annotations

import json

import pytest

from smschannel.api.errors import ChannelError, NotFound, Refused, Retryable, TwilioThrottled, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.twilio.client import twilio_error

TEXT = "5e5c0ffee5e5c0ffee5e5c0ffee5e5c0 is not a token"


def body(code: object = None) -> str:
    return json.dumps({"code": code, "message": TEXT, "more_info": TEXT, "status": 400})


@pytest.mark.parametrize(
    ("status", "answer", "becomes", "reason"),
    [
        (429, body(20429), TwilioThrottled, "too many requests: a retry helps"),
        (429, body(20003), TwilioThrottled, "a rate limit, even if the code is about the credentials"),
        (500, body(20500), TwilioUnavailable, "an internal error: a retry helps"),
        (503, "upstream connect error", TwilioUnavailable, "the text of a proxy"),
        (401, body(20003), Reason.AuthenticationFailed, "a wrong token"),
        (403, body(20003), Reason.AuthenticationFailed, "an API key without the right"),
        (401, body("20003"), Reason.AuthenticationFailed, "the code as a string"),
        (401, "<html>", TwilioUnavailable, "a proxy's page does not speak of Twilio's credentials"),
        (403, "<html>", TwilioUnavailable, "a proxy's page does not speak of Twilio's credentials"),
        (401, "", TwilioUnavailable, "nothing was said"),
        (403, body(), TwilioUnavailable, "a gateway's JSON has no code of Twilio's"),
        (403, body(403), TwilioUnavailable, "a gateway repeats the HTTP status as its code"),
        (401, body(16), TwilioUnavailable, "the code of a gateway that speaks gRPC"),
        (401, body("UNAUTHENTICATED"), TwilioUnavailable, "a code in words"),
        (403, body(True), TwilioUnavailable, "a code that is no number"),
        (407, "<html>", TwilioUnavailable, "a proxy wants credentials of its own"),
        (451, "<html>", TwilioUnavailable, "a filter"),
        (403, body(20008), Reason.AuthenticationFailed, "test credentials have no numbers"),
        (401, body(20005), Reason.AccountSuspended, "the account is not active"),
        (403, body(20403), Reason.AccountSuspended, "the account may not do anything"),
        (400, body(10001), Reason.AccountSuspended, "another code for an account that is not active"),
        (400, body(21407), Reason.NumberLacksSms, "an SMS webhook for a number without SMS"),
        (400, body(21402), Reason.WebhookRefused, "the URL is not valid"),
        (400, body(21403), Reason.WebhookRefused, "the method is not valid"),
        (400, body(21406), Reason.WebhookRefused, "a fallback URL without an SMS URL"),
        (400, body("21406"), Reason.WebhookRefused, "the code as a string"),
        (404, body(20404), NotFound, "the number is not in the account"),
        (404, "<html>", TwilioUnavailable, "the 404 of a proxy does not mean that the number is gone"),
        (404, body(20005), Reason.AccountSuspended, "a suspended account hides its numbers, which are not gone"),
        (400, body(99999), TwilioUnavailable, "an unknown error must not stop a channel for good"),
        (400, body("many"), TwilioUnavailable, "a code that is not a number is ignored"),
        (400, body([1]), TwilioUnavailable, "a code that is not a number is ignored"),
        (400, "[]", TwilioUnavailable, "JSON that is not an object has no code"),
        (302, "", TwilioUnavailable, "a redirect is not followed: the token stays with Twilio"),
    ],
)
def test_answer_becomes_the_error_of_the_table(
    status: int, answer: str, becomes: type[ChannelError] | Reason, reason: str
) -> None:
    error = twilio_error(status, answer)
    if isinstance(becomes, Reason):
        assert isinstance(error, Refused), reason
        assert error.reason is becomes, reason
    else:
        assert type(error) is becomes, reason
    assert f"HTTP {status}" in str(error), "Twilio's support asks for it"
    assert TEXT not in str(error), "Twilio may repeat what it was sent"
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize(("status", "answer"), [(401, "<html>"), (403, body(403)), (404, "<html>"), (407, "")])
def test_message_says_that_the_answer_was_not_twilios(status: int, answer: str) -> None:
    assert f"HTTP {status} is not Twilio's" in str(twilio_error(status, answer))


@pytest.mark.parametrize(
    ("status", "retry_after", "reason"),
    [
        (429, 7.0, "Retry-After is given"),
        (503, 7.0, "a service that is down may send Retry-After, too"),
        (429, None, "there is no Retry-After"),
    ],
)
def test_retry_after_is_kept(status: int, retry_after: float | None, reason: str) -> None:
    error = twilio_error(status, body(), retry_after)
    assert isinstance(error, Retryable), reason
    assert error.retry_after == retry_after, reason


def test_message_names_the_code_if_there_is_one() -> None:
    assert "code 21406" in str(twilio_error(400, body(21406)))
    assert "code" not in str(twilio_error(400, body()))
