"""The REST contract as constants; tests/cluster/test_shim.py tests it over the network."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api_shim.schemas import ChannelStatus, ErrorItem, HttpError, Setup, instance_id
from api_shim.waiting import is_settled
from smschannel.api.reasons import REST_STATUSES, Reason

SID = "AC" + "0a" * 16
TOKEN = "5ecret" * 5
GOOD = {"account_sid": SID, "auth_token": TOKEN, "phone_number": "+61400111222"}
NOT_CONFIGURED = {"enabled": False, "phone_number": None, "status": "not_configured", "webhook_url": None}
WEBHOOK = "https://sms.example.com/v1/instances/497f6eca-6276-4993-bfeb-53cbbbba6f08/channels/sms/webhook"

STATUSES = (
    "not_configured",
    "pending",
    "active",
    "token_unreadable",
    "authentication_failed",
    "degraded",
    "account_suspended",
    "number_not_found",
    "number_lacks_sms",
    "number_in_use",
    "webhook_foreign",
    "webhook_drifted",
    "webhook_overridden",
    "webhook_contested",
    "webhook_refused",
    "observe_only",
    "suspended",
    "removing",
    "record_unreadable",
    "invalid",
)


def channel(reason: Reason | None, *, observed: int = 3, suspend: bool = False, deleting: bool = False) -> Any:
    conditions = [{"type": "Ready", "status": reason.ready, "reason": reason.name, "message": ""}] if reason else []
    if reason and reason.progress:
        conditions.append({"type": reason.progress, "status": "True", "reason": reason.name, "message": ""})
    return {
        "metadata": {"generation": 3, **({"deletionTimestamp": "2026-01-01T00:00:00Z"} if deleting else {})},
        "spec": {"phoneNumber": "+61400111222", "suspend": suspend},
        "status": {"observedGeneration": observed, "webhookUrl": WEBHOOK, "conditions": conditions},
    }


def answer(given: Any) -> dict[str, Any]:
    return ChannelStatus.of(given).model_dump()


def errors(body: Any) -> list[ErrorItem]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(HttpError) as caught:
        Setup.parse(content)
    assert caught.value.status == 422
    detail = caught.value.detail
    assert not isinstance(detail, str)
    assert all(set(each) == {"loc", "msg", "type"} for each in detail)
    return list(detail)


def error(body: Any) -> tuple[list[str | int], str]:
    (only,) = errors(body)
    return only["loc"], only["type"]


# -- answers -------------------------------------------------------------------------------------------------


def test_rest_statuses_are_a_closed_list() -> None:
    assert REST_STATUSES == STATUSES


def test_instance_without_a_channel_is_not_configured() -> None:
    assert answer(None) == NOT_CONFIGURED


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_its_rest_status(reason: Reason) -> None:
    assert answer(channel(reason)) == {
        "enabled": True,
        "phone_number": "+61400111222",
        "status": reason.rest_status,
        "webhook_url": WEBHOOK,
    }


@pytest.mark.parametrize("reason", [each for each in Reason if each.ready == "False"])
def test_channel_that_is_ready_all_the_same_is_degraded(reason: Reason) -> None:
    """Its Secret is gone, for example, and the recorded login works."""
    given = channel(reason)
    given["status"]["conditions"][0]["status"] = "True"
    assert answer(given)["status"] == "degraded"


@pytest.mark.parametrize(
    ("given", "status", "enabled"),
    [
        (channel(None, observed=-1), "pending", True),
        (channel(Reason.Configured, observed=2), "pending", True),
        (channel(Reason.Configured, observed=2, suspend=True), "suspended", False),
        (channel(Reason.Suspended, suspend=True), "suspended", False),
        (channel(Reason.Configured, deleting=True), "removing", False),
        (channel(Reason.Suspended, suspend=True, deleting=True), "removing", False),
    ],
    ids=["new", "changed", "just suspended", "suspended", "being removed", "suspended and being removed"],
)
def test_spec_overrides_the_observed_status(given: Any, status: str, enabled: bool) -> None:
    assert (answer(given)["status"], answer(given)["enabled"]) == (status, enabled)


@pytest.mark.parametrize("reason", Reason)
def test_channel_is_settled_when_ready_stalled_or_removed(reason: Reason) -> None:
    """For the current generation only: a status of an earlier one is not a result."""
    done = reason.ready == "True" or reason.progress == "Stalled"
    for given, settled in (
        (channel(reason), done),
        (channel(reason, observed=2), False),
        (channel(reason, observed=2, deleting=True), True),
    ):
        assert is_settled(given) is settled


def test_unobserved_channel_is_pending() -> None:
    created = channel(None, observed=-1)
    created["status"] = {"observedGeneration": -1}
    assert answer(created)["webhook_url"] is None
    del created["status"]
    assert answer(created)["status"] == "pending"


# -- path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        "497f6eca-6276-4993-bfeb-53cbbbba6f08",
        "497F6ECA-6276-4993-BFEB-53CBBBBA6F08",
        "497f6eca62764993bfeb53cbbbba6f08",
        "{497f6eca-6276-4993-bfeb-53cbbbba6f08}",
        "urn:uuid:497f6eca-6276-4993-bfeb-53cbbbba6f08",
    ],
)
def test_every_form_of_a_uuid_is_the_same_instance(written: str) -> None:
    assert instance_id(written) == "497f6eca-6276-4993-bfeb-53cbbbba6f08"


@pytest.mark.parametrize("written", ["nope", "497f6eca-6276-4993-bfeb-53cbbbba6f0", " ", "..", "497f6eca_6276"])
def test_invalid_uuid_is_422(written: str) -> None:
    with pytest.raises(HttpError) as caught:
        instance_id(written)
    message = "Input should be a valid UUID, such as 497f6eca-6276-4993-bfeb-53cbbbba6f08"
    assert caught.value.status == 422
    assert caught.value.detail == [{"loc": ["path", "instance_id"], "msg": message, "type": "uuid_parsing"}]


# -- body ----------------------------------------------------------------------------------------------------


def test_body_is_normalised() -> None:
    setup = Setup.parse(
        json.dumps(
            {
                "account_sid": f" {SID}\n",
                "auth_token": f"\t{TOKEN} ",
                "phone_number": "+61 (400) 111-2.22",
                "friendly_name": "ignored",
            }
        ).encode()
    )
    assert (setup.account_sid, setup.phone_number) == (SID, "+61400111222")
    assert setup.auth_token.get_secret_value() == TOKEN
    assert TOKEN not in repr(setup)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("account_sid", None, "string_type"),
        ("account_sid", 7, "string_type"),
        ("account_sid", "", "string_pattern_mismatch"),
        ("account_sid", SID + "0", "string_pattern_mismatch"),
        ("account_sid", SID.upper(), "string_pattern_mismatch"),
        ("account_sid", "SK" + SID[2:], "string_pattern_mismatch"),
        ("account_sid", SID + "\n\n.", "string_pattern_mismatch"),
        ("auth_token", None, "string_type"),
        ("auth_token", ["a"], "string_type"),
        ("auth_token", "  ", "string_pattern_mismatch"),
        ("auth_token", "x" * 513, "string_too_long"),
        ("auth_token", "two words", "string_pattern_mismatch"),
        ("auth_token", "t\u00f6ken", "string_pattern_mismatch"),
        ("auth_token", "\ud800", "string_unicode"),
        ("phone_number", None, "string_type"),
        ("phone_number", 61400111222, "string_type"),
        ("phone_number", "", "string_pattern_mismatch"),
        ("phone_number", "0400111222", "string_pattern_mismatch"),
        ("phone_number", "+0400111222", "string_pattern_mismatch"),
        ("phone_number", "+6140011122233445", "string_pattern_mismatch"),
        ("phone_number", "\uff0b61400111222", "string_pattern_mismatch"),
        ("phone_number", "+61 400 111 222" + " " * 16, "string_too_long"),
    ],
)
def test_invalid_field_is_named_and_not_quoted(field: str, value: Any, kind: str) -> None:
    (only,) = errors({**GOOD, field: value})
    assert (only["loc"], only["type"]) == (["body", field], kind)
    assert TOKEN not in str(only)
    assert not isinstance(value, str) or not value.strip() or value not in str(only)


KEY_SID = "SK" + "0a" * 16


@pytest.mark.parametrize("more", [{}, {"api_key_sid": None}])
def test_api_key_sid_is_optional(more: dict[str, Any]) -> None:
    assert Setup.parse(json.dumps({**GOOD, **more}).encode()).api_key_sid is None


def test_api_key_sid_is_the_login() -> None:
    assert Setup.parse(json.dumps({**GOOD, "api_key_sid": f" {KEY_SID}\n"}).encode()).api_key_sid == KEY_SID


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (7, "string_type"),
        ([KEY_SID], "string_type"),
        ("", "string_pattern_mismatch"),
        (KEY_SID[:-1], "string_pattern_mismatch"),
        (KEY_SID.upper(), "string_pattern_mismatch"),
        (SID, "string_pattern_mismatch"),
        (KEY_SID[:9] + "\u200b" + KEY_SID[9:], "string_pattern_mismatch"),
        (TOKEN, "string_pattern_mismatch"),
    ],
)
def test_invalid_api_key_sid_is_named_and_not_quoted(value: Any, kind: str) -> None:
    """An account's SID is not accepted: the login of another account is a matter for the owner of the cluster."""
    (only,) = errors({**GOOD, "api_key_sid": value})
    assert (only["loc"], only["type"]) == (["body", "api_key_sid"], kind)
    assert kind == "string_type" or 'api_key_sid is "SK" and 32 of the digits 0-9 and a-f;' in only["msg"]
    assert ("it contains U+200B (zero width space) at position 10" in only["msg"]) == ("\u200b" in str(value))
    assert TOKEN not in str(only)


@pytest.mark.parametrize("field", GOOD)
def test_missing_field_is_named(field: str) -> None:
    assert error({name: value for name, value in GOOD.items() if name != field}) == (["body", field], "missing")


def test_all_invalid_fields_are_named_at_once() -> None:
    assert [each["loc"] for each in errors({})] == [["body", name] for name in GOOD]


def test_messages_say_what_is_expected() -> None:
    messages = [each["msg"] for each in errors({"account_sid": "x", "auth_token": "a b", "phone_number": "x"})]
    assert messages == [
        'account_sid is "AC" and 32 of the digits 0-9 and a-f, as the Twilio console shows it',
        "auth_token has letters, digits and punctuation only, no spaces within, and is not empty",
        'phone_number is in E.164: "+", the country code and the number, such as +61400111222',
    ]


@pytest.mark.parametrize(
    ("body", "loc", "kind"),
    [
        (b"", ["body"], "missing"),
        (b"null", ["body"], "missing"),
        (b"[]", ["body"], "model_attributes_type"),
        (b'"text"', ["body"], "model_attributes_type"),
        (b"1", ["body"], "model_attributes_type"),
        (b'{"a": 1,}', ["body", 8], "json_invalid"),
        (b" ", ["body", 1], "json_invalid"),
        (b"auth_token=x", ["body", 0], "json_invalid"),
        (b'{"auth_token": "\xff"}', ["body", 16], "json_invalid"),
        (b"[" * 60_000, ["body", 0], "json_invalid"),
        (b'{"phone_number": "+61400111222", "phone_number": "+61400999999"}', ["body"], "json_invalid"),
        (b'{"a": ' + b"9" * 5_000 + b"}", ["body", 0], "json_invalid"),
    ],
    ids=[
        "empty",
        "null",
        "list",
        "string",
        "number",
        "comma",
        "space",
        "form",
        "no UTF-8",
        "deep",
        "twice",
        "huge number",
    ],
)
def test_body_that_is_not_a_json_object_is_422(body: bytes, loc: list[str | int], kind: str) -> None:
    if body == b'{"a": 1,}':  # the position depends on the json module, and changed in Python 3.13
        assert error(body)[1] == kind
    else:
        assert error(body) == (loc, kind)


@pytest.mark.parametrize(
    ("field", "pasted", "taken"),
    [
        ("phone_number", "\u202a+61\u00a0400\u2009111\u202f222\u202c\n", "+61400111222"),
        ("phone_number", "\u200b+61\u2011400\u2013111\u2212222", "+61400111222"),
        ("account_sid", f"\ufeff{SID}\u200b\r\n", SID),
        ("auth_token", f"\ufeff{TOKEN}\u2060\r\n", TOKEN),
    ],
)
def test_invisible_characters_around_a_field_are_dropped(field: str, pasted: str, taken: str) -> None:
    value = getattr(Setup.parse(json.dumps({**GOOD, field: pasted}).encode()), field)
    assert (value.get_secret_value() if field == "auth_token" else value) == taken


@pytest.mark.parametrize(
    ("field", "pasted", "named"),
    [
        (
            "phone_number",
            "+61\u00a0400\u200b111222",
            "it contains U+200B (zero width space) at position 7;",
        ),
        ("phone_number", "+61400\n111222", "it contains U+000A (line feed) at position 7; phone_number is in E.164"),
        ("phone_number", "\uff0b61400111222", "it contains U+FF0B (fullwidth plus sign) at position 1; phone_number"),
        ("account_sid", f"AC{SID[2:9]}\u00ad{SID[9:]}", "it contains U+00AD (soft hyphen) at position 10; account_sid"),
        ("auth_token", f"{TOKEN[:5]}\u2011{TOKEN[5:]}", "it contains U+2011 (non-breaking hyphen) at position 6;"),
    ],
)
def test_invisible_character_inside_a_field_is_named(field: str, pasted: str, named: str) -> None:
    [error] = errors({**GOOD, field: pasted})
    assert error["msg"].startswith(named)
    assert error["type"] == "string_pattern_mismatch"
    assert TOKEN not in json.dumps(error)
