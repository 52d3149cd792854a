"""The index of records: which channel holds which number, changes by a list of all records, and swaps of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from smschannel.core.claims import Claims, is_swap
from smschannel.core.record import Contents, Key, Login, Record

A, B, C, D = (Key("sms-channels", f"00000000-0000-4000-8000-00000000000{each}") for each in "abcd")


def record(number_sid: str, key: Key = A, version: str = "1", uid: str = "") -> Record:
    return Record(
        number_sid, "+61400111222", "AC1", key.namespace, key.name, uid or f"uid of {key.name}", version=version
    )


def index(*records: Record) -> Claims:
    claims = Claims()
    for each in records:
        claims.put(each)
    return claims


class Freed(list[str]):
    """The numbers that became free, in order."""


@pytest.fixture
def freed() -> Freed:
    return Freed()


@pytest.fixture
def claims(freed: Freed) -> Claims:
    claims = Claims()
    claims.on_free = freed.append
    return claims


# The index


def test_record_is_found_by_its_number_and_by_its_channel(claims: Claims) -> None:
    claims.put(record("PN2"))
    claims.put(record("PN1"))
    claims.put(record("PN3", B))
    assert claims.holder("PN1") == record("PN1")
    assert claims.of(A) == (record("PN1"), record("PN2"))
    assert claims.of(B) == (record("PN3", B),)
    assert (len(claims), set(claims)) == (3, {record("PN1"), record("PN2"), record("PN3", B)})


def test_account_is_known_in_a_namespace_while_a_record_names_it(claims: Claims) -> None:
    """Its new channels then count as verified; another namespace has proven nothing."""
    seen: list[tuple[str, str]] = []
    claims.on_account = lambda namespace, account_sid: seen.append((namespace, account_sid))
    for each in (record("PN1"), record("PN1", version="2"), record("PN2", B)):
        claims.put(each)
    assert seen == [("sms-channels", "AC1")], "called once"
    assert claims.has_account("sms-channels", "AC1")
    assert not claims.has_account("elsewhere", "AC1")
    claims.remove("PN1")
    assert claims.has_account("sms-channels", "AC1")
    claims.remove("PN2")
    assert not claims.has_account("sms-channels", "AC1")


def test_unknown_number_has_no_holder(claims: Claims) -> None:
    assert claims.holder("PN1") is None
    assert claims.of(A) == ()


def test_records_of_earlier_channels_of_a_name_are_found_by_that_name(claims: Claims) -> None:
    claims.put(record("PN1", uid="earlier"))
    claims.put(record("PN2", uid="current"))
    assert [each.uid for each in claims.of(A)] == ["earlier", "current"]


def test_contents_are_not_kept(claims: Claims) -> None:
    """The index is kept in memory for all numbers: it must not contain tokens."""
    contents = Contents(login=Login(sid="AC1", token=SecretStr("token")), previous=None, wrote=())
    claims.put(replace(record("PN1"), contents=contents))
    assert claims.holder("PN1") == record("PN1")


def test_newer_version_of_a_record_replaces_the_one_before(claims: Claims, freed: Freed) -> None:
    claims.put(record("PN1"))
    claims.put(record("PN1", version="2"))
    assert claims.of(A) == (record("PN1", version="2"),)
    assert freed == [], "the number was held all the time"


def test_number_with_another_holder_leaves_the_one_before(claims: Claims, freed: Freed) -> None:
    claims.put(record("PN1"))
    claims.put(record("PN1", B))
    assert claims.of(A) == ()
    assert claims.of(B) == (record("PN1", B),)
    assert freed == [], "the number is held, by another channel"


def test_removed_record_frees_its_number_once(claims: Claims, freed: Freed) -> None:
    claims.put(record("PN1"))
    claims.put(record("PN2"))
    claims.remove("PN1")
    claims.remove("PN1")
    claims.remove("PN9")
    assert freed == ["PN1"]
    assert claims.holder("PN1") is None
    assert claims.of(A) == (record("PN2"),)


def test_number_is_free_when_waiters_are_called(claims: Claims) -> None:
    holders: list[Record | None] = []
    claims.on_free = lambda number_sid: holders.append(claims.holder(number_sid))
    claims.put(record("PN1"))
    claims.remove("PN1")
    assert holders == [None]


def test_nothing_is_kept_of_a_channel_without_records(claims: Claims) -> None:
    claims.put(record("PN1"))
    claims.remove("PN1")
    assert len(claims) == 0
    assert list(claims) == []
    assert not claims._by_key, "names come and go for years"


def test_index_may_be_changed_while_it_is_iterated(claims: Claims) -> None:
    claims.put(record("PN1"))
    claims.put(record("PN2"))
    for each in claims:
        claims.remove(each.number_sid)
    assert len(claims) == 0


# A list of all records


def test_list_adds_what_the_index_lacks(claims: Claims, freed: Freed) -> None:
    changed = claims.update_from_list([record("PN1"), record("PN2", B)], tuple(claims))
    assert set(claims) == {record("PN1"), record("PN2", B)}
    assert changed == {A, B}
    assert freed == []


def test_equal_list_changes_nothing(claims: Claims, freed: Freed) -> None:
    claims.put(record("PN1"))
    assert claims.update_from_list([record("PN1")], tuple(claims)) == set()
    assert freed == []


def test_listed_newer_version_replaces_the_one_before(claims: Claims) -> None:
    claims.put(record("PN1"))
    claims.put(record("PN2", B))
    assert claims.update_from_list([record("PN1", version="2"), record("PN2", B)], tuple(claims)) == {A}
    assert claims.holder("PN1") == record("PN1", version="2")


def test_number_that_is_not_listed_is_freed(claims: Claims, freed: Freed) -> None:
    claims.put(record("PN1"))
    claims.put(record("PN2", B))
    assert claims.update_from_list([record("PN2", B)], tuple(claims)) == {A}
    assert set(claims) == {record("PN2", B)}
    assert freed == ["PN1"]


def test_channels_are_reported_that_gained_or_lost_a_number(claims: Claims, freed: Freed) -> None:
    """The status of the channel that lost it still reports Configured."""
    claims.put(record("PN1"))
    claims.put(record("PN2", C))
    assert claims.update_from_list([record("PN1", B), record("PN2", C)], tuple(claims)) == {A, B}
    assert claims.holder("PN1") == record("PN1", B)
    assert freed == []


def test_record_created_during_the_list_stays(claims: Claims, freed: Freed) -> None:
    before = tuple(claims)
    claims.put(record("PN1"))
    assert claims.update_from_list([], before) == set()
    assert claims.holder("PN1") == record("PN1")
    assert freed == []


def test_record_updated_during_the_list_stays_as_it_is_now(claims: Claims) -> None:
    claims.put(record("PN1"))
    before = tuple(claims)
    claims.put(record("PN1", version="2"))
    assert claims.update_from_list([record("PN1")], before) == set()
    assert claims.holder("PN1") == record("PN1", version="2")


def test_record_updated_during_the_list_is_not_freed_by_it(claims: Claims, freed: Freed) -> None:
    claims.put(record("PN1"))
    before = tuple(claims)
    claims.put(record("PN1", version="2"))
    assert claims.update_from_list([], before) == set()
    assert claims.holder("PN1") == record("PN1", version="2")
    assert freed == []


def test_record_updated_twice_during_the_list_stays_as_it_is_now(claims: Claims) -> None:
    """The list may have been read between the two updates."""
    claims.put(record("PN1"))
    before = tuple(claims)
    claims.put(record("PN1", version="3"))
    assert claims.update_from_list([record("PN1", version="2")], before) == set()
    assert claims.holder("PN1") == record("PN1", version="3")


def test_record_created_and_updated_during_the_list_stays_as_it_is_now(claims: Claims) -> None:
    before = tuple(claims)
    claims.put(record("PN1", version="2"))
    assert claims.update_from_list([record("PN1")], before) == set()
    assert claims.holder("PN1") == record("PN1", version="2")


def test_record_removed_during_the_list_stays_removed(claims: Claims, freed: Freed) -> None:
    claims.put(record("PN1"))
    before = tuple(claims)
    claims.remove("PN1")
    assert claims.update_from_list([record("PN1")], before) == set()
    assert claims.holder("PN1") is None
    assert freed == ["PN1"]


def test_number_claimed_by_another_during_the_list_stays_with_its_new_holder(claims: Claims) -> None:
    claims.put(record("PN1"))
    before = tuple(claims)
    claims.remove("PN1")
    claims.put(record("PN1", B, version="2"))
    assert claims.update_from_list([record("PN1")], before) == set()
    assert claims.holder("PN1") == record("PN1", B, version="2")


def test_record_created_and_removed_during_the_list_is_reconciled() -> None:
    """The list adds it again; the reconcile of its channel finds that it does not exist."""
    claims = index()
    before = tuple(claims)
    claims.put(record("PN1"))
    claims.remove("PN1")
    assert claims.update_from_list([record("PN1")], before) == {A}


NUMBERS = st.sampled_from(("PN1", "PN2", "PN3"))
RECORDS = st.builds(record, NUMBERS, st.sampled_from((A, B)), st.sampled_from(("1", "2")))


@settings(deadline=None)
@given(indexed=st.lists(RECORDS), listed=st.dictionaries(NUMBERS, st.none()), data=st.data())
def test_index_equals_the_list_if_nothing_changed_meanwhile(
    indexed: list[Record], listed: Mapping[str, None], data: st.DataObject
) -> None:
    records = [data.draw(st.builds(record, st.just(each), st.sampled_from((A, B)))) for each in listed]
    claims, free = index(*indexed), Freed()
    before = {each.number_sid: each for each in claims}
    claims.on_free = free.append
    claims.update_from_list(records, before.values())
    assert {each.number_sid: each for each in claims} == {each.number_sid: each for each in records}
    assert sorted(free) == sorted(before.keys() - listed.keys()), "waiters are called for exactly these"
    assert {each for key in (A, B) for each in claims.of(key)} == set(records), "the index by channel is the same"


WRITES = st.lists(st.tuples(NUMBERS, st.sampled_from((A, B, None))), max_size=6)


@settings(deadline=None)
@given(earlier=WRITES, until_listed=WRITES, after_listed=WRITES)
def test_list_undoes_no_write_that_was_made_meanwhile(
    earlier: list[tuple[str, Key | None]],
    until_listed: list[tuple[str, Key | None]],
    after_listed: list[tuple[str, Key | None]],
) -> None:
    """The API server answers with the state of some moment between the start of the list and its end."""
    claims = Claims()
    actual: dict[str, Record] = {}
    versions = count()

    def write(writes: list[tuple[str, Key | None]]) -> None:
        for number_sid, holder in writes:
            if holder:
                actual[number_sid] = record(number_sid, holder, version=str(next(versions)))
                claims.put(actual[number_sid])
            else:
                actual.pop(number_sid, None)
                claims.remove(number_sid)

    write(earlier)
    before = tuple(claims)
    write(until_listed)
    listed = dict(actual)
    write(after_listed)
    changed = claims.update_from_list(listed.values(), before)
    added_again = listed.keys() - {each.number_sid for each in before} - actual.keys()  # created and removed meanwhile
    assert {each.number_sid: each for each in claims} == {**actual, **{each: listed[each] for each in added_again}}
    assert changed == {listed[each].key for each in added_again}, "these are reconciled, and removed"


# Swaps


class World:
    """Which channel holds and awaits which number; waiters are in order, the oldest first."""

    def __init__(self, holds: Mapping[str, Key], waiters: Mapping[str, list[Key]]) -> None:
        self.holds, self.waiters = holds, waiters

    def awaited(self, key: Key) -> str | None:
        return next((number for number, keys in self.waiters.items() if key in keys), None)

    def first_waiter(self, number_sid: str) -> Key | None:
        return next(iter(self.waiters.get(number_sid, ())), None)

    def is_swap(self, key: Key) -> bool:
        return is_swap(key, awaited=self.awaited, holder=self.holds.get, first_waiter=self.first_waiter)


HELD = {"PN1": A, "PN2": B, "PN3": C}


@pytest.mark.parametrize(
    ("world", "swapping"),
    [
        pytest.param(World(HELD, {}), "", id="no channel waits"),
        pytest.param(World(HELD, {"PN2": [A]}), "", id="the holder waits for nothing"),
        pytest.param(World(HELD, {"PN1": [A]}), "", id="an earlier channel of the same name holds the number"),
        pytest.param(World(HELD, {"PN2": [A], "PN1": [B]}), "ab", id="two wait for each other's number"),
        pytest.param(World(HELD, {"PN2": [A], "PN3": [B], "PN1": [C]}), "abc", id="three in a circle"),
        pytest.param(World(HELD, {"PN2": [A], "PN3": [B]}), "", id="a chain without a circle"),
        pytest.param(World(HELD, {"PN2": [A], "PN3": [B], "PN9": [C]}), "", id="a chain to a number without holder"),
        pytest.param(World(HELD, {"PN2": [A, C], "PN1": [B]}), "ab", id="a younger waiter from outside"),
        pytest.param(World(HELD, {"PN2": [D, A], "PN1": [B]}), "", id="an older waiter from outside would get it"),
        pytest.param(World(HELD, {"PN2": [A], "PN1": [D, B]}), "", id="an older waiter for the other number"),
        pytest.param(World({"PN1": A}, {"PN2": [A], "PN1": [B]}), "", id="a holder that is gone"),
        pytest.param(World({"PN1": A, "PN3": C}, {"PN2": [A], "PN3": [B], "PN1": [C]}), "", id="one of three is gone"),
        pytest.param(
            World({"PN1": A, "PN2": B, "PN3": B}, {"PN2": [A], "PN1": [B]}), "ab", id="one holds another number, too"
        ),
        pytest.param(
            World(HELD, {"PN2": [A], "PN3": [B], "PN9": []}), "", id="a number that no channel waits for any more"
        ),
    ],
)
def test_swap(world: World, swapping: str) -> None:
    assert "".join(each.name[-1] for each in (A, B, C, D) if world.is_swap(each)) == swapping


def test_channel_that_waits_for_a_swap_is_not_part_of_it() -> None:
    """Restoring its own number would not help: no channel of the circle waits for that."""
    world = World({"PN1": A, "PN2": B, "PN3": C}, {"PN2": [A, C], "PN1": [B]})
    assert world.is_swap(A)
    assert not world.is_swap(C)


# Records written by others


@pytest.mark.parametrize(
    ("indexed", "read", "changed", "reason"),
    [
        (record("PN1"), record("PN1"), set(), "it is the version of the index"),
        (record("PN1"), record("PN1", version="2"), {A}, "it was repaired, or damaged: its channel is reconciled"),
        (record("PN1"), record("PN1", B, version="2"), {A, B}, "it changed hands: both channels are reconciled"),
        (None, record("PN1"), set(), "it was not in the index: its reader handles it"),
        (record("PN1", version=""), record("PN1"), set(), "its creation was not answered: it is our own"),
    ],
)
def test_record_written_by_others_causes_a_reconcile(
    indexed: Record | None, read: Record, changed: set[Key], reason: str
) -> None:
    claims = index(*([indexed] if indexed else []))
    calls: set[Key] = set()
    claims.on_change = calls.add
    claims.observe(read)
    assert calls == changed, reason
    assert claims.holder("PN1") == read
