"""What is owed: tokens show in the sealed document only, templates know what they made, and holders stay."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from smschannel.ledger import Claims, Entry, Login, Record, Webhook, WebhookTemplate
from smschannel.resource import DeletionPolicy

TOKEN = "5e5c0ffee5e5c0ffee5e5c0ffee5e5c0"
PASSWORD = "hunter2"
ACCOUNT = "AC" + "0" * 32
OTHER_ACCOUNT = "AC" + "1" * 32
INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"

LOGIN = Login(sid=ACCOUNT, token=SecretStr(TOKEN))
NEWER = Login(sid=ACCOUNT, token=SecretStr("newer"))
ENTRY = Entry(
    account_sid=ACCOUNT,
    number_sid="PN1",
    phone_number="+61400111222",
    login=LOGIN,
    previous=Webhook(url=f"https://user:{PASSWORD}@before.example.com/", method="GET"),
    wrote=(f"https://user:{PASSWORD}@sms.example.com/1",),
    claimed_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)
RECORD = Record(
    uid="uid-1",
    namespace="sms-channels",
    name=INSTANCE,
    source="secret/twilio@7",
    deletion_policy=DeletionPolicy.CLEAR,
    entries=(ENTRY,),
)


def entry(sid: str, account: str = ACCOUNT, login: Login = LOGIN) -> Entry:
    return ENTRY.model_copy(update={"number_sid": sid, "account_sid": account, "login": login})


def record(*entries: Entry) -> Record:
    return RECORD.model_copy(update={"entries": entries})


# Records


@settings(deadline=None)
@given(token=st.text(), source=st.text(), policy=st.sampled_from(DeletionPolicy), unknown=st.booleans())
def test_what_is_encoded_decodes(token: str, source: str, policy: DeletionPolicy, unknown: bool) -> None:
    login = Login(sid=ACCOUNT, token=SecretStr(token))
    previous = None if unknown else ENTRY.previous
    kept = RECORD.model_copy(
        update={
            "source": source,
            "deletion_policy": policy,
            "entries": (ENTRY.model_copy(update={"login": login, "previous": previous}),),
        }
    )
    assert Record.decode(kept.encode()) == kept


def test_the_document_for_sealing_is_the_only_place_with_a_token() -> None:
    assert TOKEN.encode() in RECORD.encode()
    for shown in (
        repr(RECORD),
        str(RECORD),
        f"{RECORD}",
        RECORD.model_dump_json(),
        str(RECORD.model_dump()),
        str(RECORD.model_dump(mode="json")),
        repr(LOGIN),
        LOGIN.model_dump_json(),
        repr(ENTRY),
    ):
        assert TOKEN not in shown


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        (repr(RECORD), "a record is shown in logs and assertion errors"),
        (repr(ENTRY), "an entry is part of a planned change, which may be shown"),
        (repr(ENTRY.previous), "a found webhook may embed the password of somebody else's server"),
    ],
)
def test_urls_with_passwords_are_not_shown(shown: str, reason: str) -> None:
    assert PASSWORD not in shown, reason


def test_a_missing_source_or_policy_is_that_of_an_older_record() -> None:
    decoded = Record.decode(b'{"uid": "uid-1", "namespace": "sms-channels", "name": "x"}')
    assert (decoded.source, decoded.deletion_policy, decoded.entries) == ("", DeletionPolicy.RESTORE, ())


def test_a_broken_document_is_refused_without_a_word_of_it() -> None:
    broken = RECORD.encode().replace(b'"number_sid"', b'"nummer_sid"')
    with pytest.raises(ValidationError) as refused:
        Record.decode(broken)
    assert TOKEN not in str(refused.value)


def test_an_entry_replaces_the_one_of_the_same_number_and_becomes_the_last() -> None:
    changed = entry("PN1", login=NEWER)
    assert record(entry("PN1"), entry("PN2")).with_entry(changed) == record(entry("PN2"), changed)


@pytest.mark.parametrize(
    ("kept", "account", "login", "reason"),
    [
        (record(), ACCOUNT, None, "nothing is known of an account without entries"),
        (record(entry("PN1", OTHER_ACCOUNT)), ACCOUNT, None, "another account's login says nothing about this one"),
        (record(entry("PN1"), entry("PN2", login=NEWER)), ACCOUNT, NEWER, "the last entry has the last verified login"),
    ],
)
def test_the_last_accepted_login(kept: Record, account: str, login: Login | None, reason: str) -> None:
    assert kept.login_for(account) == login, reason


def test_a_new_login_pays_the_older_debts_of_its_account_only() -> None:
    kept = record(entry("PN1"), entry("PN2", OTHER_ACCOUNT)).with_login(ACCOUNT, NEWER)
    assert [each.login for each in kept.entries] == [NEWER, LOGIN]


def test_what_is_settled_leaves_the_record() -> None:
    kept = record(entry("PN1"), entry("PN2"))
    assert kept.without(["PN1", "PN9"]) == record(entry("PN2"))
    assert kept.entry("PN2") == entry("PN2")
    assert kept.entry("PN9") is None


def test_a_webhook_points_at_us_whatever_its_method() -> None:
    assert ENTRY.points_at_us(Webhook(url=ENTRY.wrote[0], method="GET"))
    assert not ENTRY.points_at_us(Webhook(url="", method="POST"))


# Templates

TEMPLATE = WebhookTemplate(
    "https://sms.example.com/v1/instances/{instance_id}/sms?v=1", ("https://old.example.com/{instance_id}",)
)


@pytest.mark.parametrize(
    ("url", "made", "reason"),
    [
        (TEMPLATE.url(INSTANCE), True, "it is this template's own URL"),
        (TEMPLATE.url("0" * 8 + "-0000-0000-0000-" + "0" * 12), True, "every instance's URL is ours"),
        (f"https://old.example.com/{INSTANCE}", True, "a former template made it"),
        (f"https://older.example.com/{INSTANCE}", False, "no template has this host"),
        (TEMPLATE.url("not-a-uuid"), False, "instances are UUIDs"),
        (TEMPLATE.url(INSTANCE.upper()), False, "names of channels are lower-case, so we never wrote this one"),
        (TEMPLATE.url(INSTANCE) + "&x=1", False, "somebody's addition makes it somebody's URL"),
        (TEMPLATE.url(INSTANCE) + "\n", False, "a line end is an addition too"),
        (TEMPLATE.url(INSTANCE).replace("sms.example", "smsXexample"), False, "a dot in a template is only a dot"),
        (TEMPLATE.url(INSTANCE).replace("sms?v", "smv"), False, "a question mark in a template is no pattern"),
        (TEMPLATE.template, False, "a template is not a URL that it made"),
        ("", False, "an empty webhook is nobody's"),
    ],
)
def test_a_template_knows_what_it_made(url: str, made: bool, reason: str) -> None:
    assert TEMPLATE.made(url) is made, reason


@settings(deadline=None)
@given(instance=st.uuids())
def test_a_template_makes_what_it_knows(instance: object) -> None:
    assert TEMPLATE.made(TEMPLATE.url(str(instance)))


# Claims


class Told(list[str]):
    """Who was told that a number is free, in order."""


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def claims(told: Told) -> Claims[str]:
    claims = Claims[str]()
    claims.on_free = told.append
    return claims


def test_the_first_to_reserve_holds_and_a_holder_is_never_displaced(claims: Claims[str], told: Told) -> None:
    assert claims.reserve("PN1", "uid-1", "one")
    assert not claims.reserve("PN1", "uid-2", "two")
    assert claims.reserve("PN1", "uid-1", "one"), "reserving again is the same as once"
    assert len(claims) == 1
    assert told == []


def test_a_record_does_not_displace_a_holder_either(claims: Claims[str], told: Told) -> None:
    claims.reserve("PN1", "uid-1", "one")
    claims.hold_only("uid-2", record(entry("PN1")))
    assert claims.reserve("PN1", "uid-1", "one")
    assert not claims.reserve("PN1", "uid-2", "two")
    claims.hold_only("uid-2", None)
    assert not claims.reserve("PN1", "uid-2", "two"), "who does not hold a number cannot let it go"
    assert told == []


def test_a_record_holds_what_it_lists(claims: Claims[str]) -> None:
    claims.hold_only("uid-1", record(entry("PN1"), entry("PN2")))
    assert len(claims) == 2
    assert not claims.reserve("PN2", "uid-2", "two")


def test_a_record_keeps_a_reservation(claims: Claims[str], told: Told) -> None:
    claims.reserve("PN1", "uid-1", "one")
    claims.reserve("PN1", "uid-2", "two")
    claims.hold_only("uid-1", record(entry("PN1")))
    assert told == []
    assert not claims.reserve("PN1", "uid-2", "two")


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (None, "there is no record any more"),
        (record(), "the record has no entries any more"),
        (record(entry("PN2")), "the channel went on to another number"),
    ],
)
def test_who_waits_is_told_once_and_takes_over(
    claims: Claims[str], told: Told, left: Record | None, reason: str
) -> None:
    claims.reserve("PN1", "uid-1", "one")
    for waiter in ("two", "three", "two"):
        assert not claims.reserve("PN1", f"uid-{waiter}", waiter)
    claims.hold_only("uid-1", left)
    assert told == ["two", "three"], reason
    assert claims.reserve("PN1", "uid-three", "three"), "whoever asks first"
    assert not claims.reserve("PN1", "uid-two", "two")
    claims.hold_only("uid-1", left)
    assert told == ["two", "three"], "who lost the race before is not told again for nothing"
    claims.hold_only("uid-three", None)
    assert told == ["two", "three", "two"], "who lost the race waits again"


def test_only_those_who_wait_for_that_number_are_told(claims: Claims[str], told: Told) -> None:
    claims.hold_only("uid-1", record(entry("PN1"), entry("PN2")))
    claims.reserve("PN1", "uid-2", "for PN1")
    claims.reserve("PN2", "uid-3", "for PN2")
    claims.hold_only("uid-1", record(entry("PN1")))
    assert told == ["for PN2"]


def test_nothing_is_kept_of_those_who_let_go(claims: Claims[str]) -> None:
    claims.reserve("PN1", "uid-1", "one")
    claims.hold_only("uid-1", None)
    claims.hold_only("uid-1", None)
    assert len(claims) == 0


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.sampled_from(("PN1", "PN2")), st.sampled_from(("a", "b", "c"))), max_size=30
    )
)
def test_a_number_never_has_two_holders(steps: list[tuple[bool, str, str]]) -> None:
    claims = Claims[str]()
    holder: dict[str, str] = {}
    for takes, number, uid in steps:
        if takes:
            assert claims.reserve(number, uid, uid) is (holder.setdefault(number, uid) == uid)
        else:
            claims.hold_only(uid, record(entry(number)))
            for each in [each for each, by in holder.items() if by == uid and each != number]:
                del holder[each]
            holder.setdefault(number, uid)
        assert len(claims) == len(holder)
