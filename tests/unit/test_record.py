"""What is owed: tokens show in the sealed document only, templates know what they made, and holders stay."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from smschannel.api.resource import DeletionPolicy
from smschannel.core.record import Age, Claims, Entry, Login, Record, Webhook, WebhookTemplate

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


class Called(list[str]):
    """Who was called since a number is free, in order."""


@pytest.fixture
def called() -> Called:
    return Called()


@pytest.fixture
def claims(called: Called) -> Claims[str]:
    claims = Claims[str]()
    claims.on_free = called.append
    return claims


def age(uid: str, day: int = 1) -> Age:
    return Age(datetime(2026, 1, day, tzinfo=UTC), uid)


def reserve(claims: Claims[str], number: str, uid: str, day: int = 1) -> bool:
    return claims.reserve(number, age(uid, day), uid, f"waiter {uid}")


def keep(claims: Claims[str], number: str, uid: str, day: int = 1) -> bool:
    return claims.keep(number, age(uid, day), uid, f"waiter {uid}")


def kept(uid: str, *numbers: str) -> Record:
    return record(*map(entry, numbers)).model_copy(update={"uid": uid, "name": f"instance of {uid}"})


def test_what_is_kept_is_never_displaced(claims: Claims[str], called: Called) -> None:
    assert reserve(claims, "PN1", "young", day=2)
    assert keep(claims, "PN1", "young", day=2)
    assert not reserve(claims, "PN1", "old"), "an older resource comes too late"
    assert reserve(claims, "PN1", "young", day=2), "reserving again is the same as once"
    assert called == []


def test_of_two_at_the_same_time_the_older_resource_wins(claims: Claims[str]) -> None:
    assert reserve(claims, "PN1", "young", day=2)
    assert reserve(claims, "PN1", "old", day=1)
    assert not keep(claims, "PN1", "young", day=2), "the younger finds out before it writes anything"
    assert keep(claims, "PN1", "old", day=1)


def test_of_two_of_the_same_age_the_lower_uid_wins(claims: Claims[str]) -> None:
    assert reserve(claims, "PN1", "b")
    assert reserve(claims, "PN1", "a")
    assert not reserve(claims, "PN1", "b")


def test_a_record_does_not_displace_a_holder_either(claims: Claims[str], called: Called) -> None:
    reserve(claims, "PN1", "one")
    claims.hold_only("two", kept("two", "PN1"))
    assert reserve(claims, "PN1", "one")
    assert not reserve(claims, "PN1", "two")
    claims.hold_only("two", None)
    assert not reserve(claims, "PN1", "two"), "who does not hold a number cannot let it go"
    assert called == []


def test_a_record_holds_what_it_lists(claims: Claims[str]) -> None:
    claims.hold_only("one", kept("one", "PN1", "PN2"))
    assert claims.holds("one")
    assert not reserve(claims, "PN2", "two")


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (None, "there is no record any more"),
        (kept("one"), "the record has no entries any more"),
        (kept("one", "PN2"), "the channel went on to another number"),
    ],
)
def test_the_eldest_who_waits_is_called_first(
    claims: Claims[str], called: Called, left: Record | None, reason: str
) -> None:
    claims.hold_only("one", kept("one", "PN1"))
    for uid, day in (("three", 3), ("two", 2), ("three", 3)):
        assert not reserve(claims, "PN1", uid, day)
    claims.hold_only("one", left)
    assert called == ["waiter two"], reason
    assert keep(claims, "PN1", "two", day=2)
    claims.hold_only("two", kept("two", "PN1"))
    assert called == ["waiter two"], "nobody else is woken for nothing"
    claims.hold_only("two", None)
    assert called == ["waiter two", "waiter three"]


def test_a_called_one_that_does_not_take_it_passes_the_call_on(claims: Claims[str], called: Called) -> None:
    claims.hold_only("one", kept("one", "PN1"))
    for uid, day in (("two", 2), ("three", 3)):
        reserve(claims, "PN1", uid, day)
    claims.hold_only("one", None)
    claims.hold_only("two", None)  # its token is refused by now
    assert called == ["waiter two", "waiter three"]


def test_a_called_one_that_is_deleted_passes_the_call_on(claims: Claims[str], called: Called) -> None:
    claims.hold_only("one", kept("one", "PN1"))
    for uid, day in (("two", 2), ("three", 3)):
        reserve(claims, "PN1", uid, day)
    claims.hold_only("one", None)
    claims.leave("two")
    assert called == ["waiter two", "waiter three"]


def test_who_left_is_not_called(claims: Claims[str], called: Called) -> None:
    claims.hold_only("one", kept("one", "PN1"))
    reserve(claims, "PN1", "two")
    claims.leave("two")
    claims.hold_only("one", None)
    assert called == []


def test_only_those_who_wait_for_that_number_are_called(claims: Claims[str], called: Called) -> None:
    claims.hold_only("one", kept("one", "PN1", "PN2"))
    reserve(claims, "PN1", "two")
    reserve(claims, "PN2", "three")
    claims.hold_only("one", kept("one", "PN1"))
    assert called == ["waiter three"]


def test_those_who_want_each_others_numbers_are_in_a_circle(claims: Claims[str]) -> None:
    for uid, number in (("a", "PN1"), ("b", "PN2"), ("c", "PN3")):
        claims.hold_only(uid, kept(uid, number))
    assert not reserve(claims, "PN2", "a")
    assert not reserve(claims, "PN3", "b")
    assert not claims.in_circle("a"), "c wants nothing else: it will never let go"
    assert not reserve(claims, "PN2", "c")
    assert not claims.in_circle("a"), "b and c are in one, which does not help a"
    assert not reserve(claims, "PN1", "c")
    assert all(map(claims.in_circle, "abc"))
    claims.stop_waiting("b")
    assert not any(map(claims.in_circle, "abc")), "b wants its own number again"


def test_a_circle_does_not_open_for_somebody_elder_outside(claims: Claims[str]) -> None:
    """They would take the number that one of the circle has given up its own for."""
    for uid, number in (("a", "PN1"), ("b", "PN2")):
        claims.hold_only(uid, kept(uid, number))
    assert not reserve(claims, "PN2", "a", day=2)
    assert not reserve(claims, "PN1", "b", day=2)
    assert not reserve(claims, "PN1", "younger", day=3)
    assert claims.in_circle("a")
    assert not reserve(claims, "PN1", "elder", day=1)
    assert not any(map(claims.in_circle, ("a", "b", "elder")))
    claims.leave("elder")
    assert claims.in_circle("b")


def test_who_waits_for_an_instance_is_in_no_circle(claims: Claims[str]) -> None:
    """Letting go of a number would not do: the instance would go to another namespace with it."""
    for uid, number in (("a", "PN1"), ("b", "PN2")):
        claims.hold_only(uid, kept(uid, number))
    assert not reserve(claims, "PN2", "a")
    assert not claims.reserve("instance of a", age("b"), "another-namespace", "waiter b")
    assert not claims.in_circle("a")
    assert not claims.in_circle("b")


def test_what_is_only_reserved_makes_no_circle(claims: Claims[str]) -> None:
    """Its holder is about to find out whether it may keep it."""
    claims.hold_only("a", kept("a", "PN1"))
    assert reserve(claims, "PN2", "b")
    assert not reserve(claims, "PN2", "a", day=2)
    assert not reserve(claims, "PN1", "b")
    assert not claims.in_circle("a")


def test_an_instance_is_its_namespaces(claims: Claims[str]) -> None:
    """A channel made anew must not wait for the debts of its predecessor; another namespace's must."""
    claims.hold_only("one", kept("one", "PN1"))
    instance, namespace = "instance of one", "sms-channels"
    assert claims.keep(instance, age("successor"), namespace, "waiter")
    assert not claims.reserve(instance, age("stranger"), "another-namespace", "waiter")
    claims.hold_only("one", None)
    assert not claims.reserve(instance, age("stranger"), "another-namespace", "waiter"), "the successor serves it"


def test_nothing_is_kept_of_those_who_let_go(claims: Claims[str]) -> None:
    reserve(claims, "PN1", "one")
    claims.hold_only("one", None)
    claims.hold_only("one", None)
    assert len(claims) == 0
    assert not claims.holds("one")


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(("reserve", "keep", "hold", "let go", "leave")),
            st.sampled_from(("PN1", "PN2")),
            st.sampled_from(("a", "b", "c")),
        ),
        max_size=40,
    )
)
def test_a_number_never_has_two_keepers_and_no_call_is_lost(steps: list[tuple[str, str, str]]) -> None:
    claims, called = Claims[str](), list[str]()
    claims.on_free = called.append
    keeper: dict[str, str] = {}
    for step, number, uid in steps:
        if step == "reserve":
            assert not (reserve(claims, number, uid) and keeper.get(number, uid) != uid)
        elif step == "keep":
            if keep(claims, number, uid):
                assert keeper.setdefault(number, uid) == uid
        elif step == "leave":
            claims.leave(uid)
        else:
            mine = [each for each, by in keeper.items() if by == uid]
            kept_on = mine if step == "hold" else []
            claims.hold_only(uid, kept(uid, *kept_on))
            keeper = {each: by for each, by in keeper.items() if by != uid or each in kept_on}
