"""Test the twin's resources, pages, filters and credentials, mostly through Twilio's own SDK."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.twin import DEMO_URL, Twin
from tests.twin.sdk import Stage, open_stage, sdk_client

WEBHOOK = "https://hydra.example/v1/instances/1/channels/sms/webhook"


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage() as opened:
        yield opened


# -- resources -----------------------------------------------------------------------------------------------


async def test_account_contains_its_token(stage: Stage) -> None:
    fetched = await stage.client().api.v2010.accounts(stage.account.sid).fetch_async()
    assert (fetched.status, fetched.auth_token) == ("active", stage.account.auth_token)
    assert fetched.owner_account_sid == stage.account.sid
    assert fetched.date_created is not None, "RFC 2822: the SDK parses nothing else"


async def test_new_number_has_the_demo_webhook(stage: Stage) -> None:
    number = stage.numbers[0]
    fetched = await stage.client().incoming_phone_numbers(number.sid).fetch_async()
    assert (fetched.sms_url, fetched.sms_method) == (DEMO_URL, "POST")
    assert fetched.phone_number == number.phone_number
    assert fetched.capabilities == {"fax": False, "voice": True, "sms": True, "mms": False}
    assert re.fullmatch("PN[0-9a-f]{32}", fetched.sid)


async def test_empty_values_are_null_or_empty_strings(stage: Stage) -> None:
    for number in stage.numbers:
        document = (await stage.call("GET", f"{stage.path}/IncomingPhoneNumbers/{number.sid}.json")).document
        empty = [value for name, value in document.items() if name in number.settings and not value]
        assert None in empty
        assert "" in empty


async def test_update_sets_what_is_sent_and_leaves_the_rest(stage: Stage) -> None:
    number = stage.numbers[0]
    await (
        stage.client()
        .incoming_phone_numbers(number.sid)
        .update_async(sms_url=WEBHOOK, sms_method="GET", sms_fallback_url="https://fallback.example/")
    )
    updated = await stage.client().incoming_phone_numbers(number.sid).update_async(sms_method="POST")
    assert (updated.sms_url, updated.sms_method) == (WEBHOOK, "POST")
    assert updated.sms_fallback_url == "https://fallback.example/"


@pytest.mark.parametrize(
    ("form", "sms_url", "sms_method", "reason"),
    [
        ({"SmsUrl": ""}, "", "GET", "an empty string clears the field it names, and no other"),
        ({"SmsMethod": ""}, WEBHOOK, "POST", "a method cannot be empty: clearing it sets the default"),
        ({}, WEBHOOK, "GET", "nothing sent, nothing changed"),
        ({"SmsUrl": f"{WEBHOOK}#rc=2&rp=all"}, f"{WEBHOOK}#rc=2&rp=all", "GET", "overrides are kept"),
        ({"SmsUrl": "http://me:pw@old.example/"}, "http://me:pw@old.example/", "GET", "credentials are kept too"),
        ({"NoSuchThing": "1"}, WEBHOOK, "GET", "unknown fields are ignored"),
    ],
)
async def test_unset_fields_differ_from_empty_ones(
    stage: Stage, form: dict[str, str], sms_url: str, sms_method: str, reason: str
) -> None:
    number = stage.numbers[0]
    number.change({"sms_url": WEBHOOK, "sms_method": "GET"}, stage.twin.now())
    reply = await stage.call("POST", f"{stage.path}/IncomingPhoneNumbers/{number.sid}.json", form=form)
    assert reply.status == 200, reason
    assert (reply.document["sms_url"] or "", reply.document["sms_method"]) == (sms_url, sms_method), reason


async def test_released_number_is_gone_and_a_violation(stage: Stage) -> None:
    number = stage.numbers[0]
    assert await stage.client().incoming_phone_numbers(number.sid).delete_async()
    assert number not in stage.numbers
    assert [violation.why for violation in stage.twin.journal.violations] == ["release of a number"]


async def test_parent_account_transfers_a_number_to_its_subaccount(stage: Stage) -> None:
    number, sub = stage.numbers[0], stage.twin.add_account(parent=stage.account)
    await stage.client().incoming_phone_numbers(number.sid).update_async(account_sid=sub.sid)
    assert [moved.phone_number for moved in sub.numbers] == [number.phone_number]
    assert [violation.why for violation in stage.twin.journal.violations] == ["transfer to another account"]


async def test_messaging_services_list_their_numbers(stage: Stage) -> None:
    service = stage.twin.add_service(stage.account, friendly_name="pool", use_inbound_webhook_on_number=True)
    inside, outside = stage.numbers[:2]
    stage.twin.join_service(inside, service)
    messaging = stage.client().messaging.v1

    fetched = await messaging.services(service.sid).fetch_async()
    assert fetched.inbound_request_url is None
    assert fetched.use_inbound_webhook_on_number is True
    assert [one.sid for one in await messaging.services(service.sid).phone_numbers.list_async()] == [inside.sid]
    member = await messaging.services(service.sid).phone_numbers(inside.sid).fetch_async()
    assert (member.phone_number, member.service_sid) == (inside.phone_number, service.sid)
    reply = await stage.call("GET", f"/v1/Services/{service.sid}/PhoneNumbers/{outside.sid}")
    assert (reply.status, reply.document["code"]) == (404, 20404)


# -- pages ---------------------------------------------------------------------------------------------------


async def test_sdk_follows_relative_page_uris(stage: Stage) -> None:
    listed = await stage.client().incoming_phone_numbers.list_async(page_size=3)
    assert [number.phone_number for number in listed] == [number.phone_number for number in stage.numbers]
    assert stage.twin.journal.counts["GET numbers"] == 3


async def test_page_has_exactly_the_documented_keys(stage: Stage) -> None:
    path = f"{stage.path}/IncomingPhoneNumbers.json"
    middle = (await stage.call("GET", f"{path}?PageSize=3&Page=1")).document
    assert middle.keys() == {
        *("end", "first_page_uri", "next_page_uri", "page", "page_size", "previous_page_uri", "start", "uri"),
        "incoming_phone_numbers",
    }
    assert (middle["start"], middle["end"], middle["page"], middle["page_size"]) == (3, 5, 1, 3)
    assert all(middle[key].startswith(path) for key in middle if key.endswith("uri"))


async def test_pages_link_forward_and_back(stage: Stage) -> None:
    first = (await stage.call("GET", f"{stage.path}/IncomingPhoneNumbers.json?PageSize=3")).document
    second = (await stage.call("GET", first["next_page_uri"])).document
    third = (await stage.call("GET", second["next_page_uri"])).document
    assert third["next_page_uri"] is None
    assert first["previous_page_uri"] is None
    back = (await stage.call("GET", third["previous_page_uri"])).document
    assert back["incoming_phone_numbers"] == second["incoming_phone_numbers"]


async def test_release_between_two_pages_hides_no_number(stage: Stage) -> None:
    first = (await stage.call("GET", f"{stage.path}/IncomingPhoneNumbers.json?PageSize=3")).document
    rest = [number.sid for number in stage.numbers[3:6]]
    stage.twin.release(stage.numbers[0])
    second = (await stage.call("GET", first["next_page_uri"])).document
    assert [number["sid"] for number in second["incoming_phone_numbers"]] == rest


async def test_filter_is_kept_on_the_next_page(stage: Stage) -> None:
    listed = await stage.client().incoming_phone_numbers.list_async(phone_number="+6140011122", page_size=3)
    assert len(listed) == 7
    assert ["PhoneNumber" in entry.parameters for entry in stage.twin.journal.entries] == [True] * 3


async def test_messaging_links_are_absolute_and_at_the_twin(stage: Stage) -> None:
    made = [stage.twin.add_service(stage.account).sid for _ in range(5)]
    assert [one.sid for one in await stage.client().messaging.v1.services.list_async(page_size=2)] == made
    document = (await stage.call("GET", "/v1/Services?PageSize=2&Page=1")).document
    assert document.keys() == {"services", "meta"}
    meta = document["meta"]
    assert meta.keys() == {
        *("first_page_url", "key", "next_page_url", "page", "page_size", "previous_page_url", "url"),
    }
    assert meta["key"] == "services"
    assert all(meta[key].startswith(f"{stage.url}/v1/Services?") for key in meta if key.endswith("url"))


@pytest.mark.parametrize(
    ("query", "size", "reason"),
    [
        ("", 50, "the default"),
        ("?PageSize=1000", 1000, "the maximum"),
        ("?PageSize=5000", 1000, "more than the maximum means the maximum"),
        ("?PageSize=1", 1, "the minimum"),
    ],
)
async def test_page_size_has_a_default_and_limits(query: str, size: int, reason: str) -> None:
    async with open_stage(numbers=1001) as stage:
        document = (await stage.call("GET", f"{stage.path}/IncomingPhoneNumbers.json{query}")).document
    assert document["page_size"] == len(document["incoming_phone_numbers"]) == size, reason


# -- filters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "found", "reason"),
    [
        ("PhoneNumber=%2B61400111223", ["+61400111223", "+614001112234"], "a whole number still matches partially"),
        ("PhoneNumber=%2B614001112234", ["+614001112234"], "nothing longer contains it"),
        ("PhoneNumber=0011122", 8, "digits match anywhere"),
        ("PhoneNumber=11223", ["+61400111223", "+614001112234"], "the end of one, the middle of another"),
        ("PhoneNumber=%2B6140011122*4", ["+614001112234"], "a star stands for one digit"),
        ("PhoneNumber=6140*0111", 0, "and not for none, although a number contains 61400111"),
        ("PhoneNumber=%2B1", 0, "a prefix of no number"),
        ("PhoneNumber=+61400111223", 0, "an unescaped + is a blank in a query"),
        ("PhoneNumber=.*", 0, "a dot is not a wildcard"),
        ("PhoneNumber=", 8, "an empty filter matches all"),
        ("FriendlyName=reception", ["+61400111222"], "a friendly name must match completely"),
        ("FriendlyName=recep", 0, "a part does not match"),
        ("Origin=hosted", 0, "none of the twin's numbers is hosted"),
    ],
)
async def test_filter_finds_what_twilio_finds(stage: Stage, query: str, found: list[str] | int, reason: str) -> None:
    stage.twin.add_number(stage.account, "+614001112234")
    stage.numbers[0].change({"friendly_name": "reception"}, stage.twin.now())
    document = (await stage.call("GET", f"{stage.path}/IncomingPhoneNumbers.json?{query}")).document
    listed = [number["phone_number"] for number in document["incoming_phone_numbers"]]
    assert (listed if isinstance(found, list) else len(listed)) == found, reason


_PHONES = st.from_regex(r"\+[1-9][0-9]{3,6}", fullmatch=True)


@given(
    phones=st.lists(_PHONES, unique=True, max_size=30),
    pattern=st.one_of(_PHONES, st.from_regex(r"\+?[0-9]{0,3}\*?[0-9]{0,2}", fullmatch=True)),
)
def test_index_finds_what_a_scan_finds(phones: list[str], pattern: str) -> None:
    twin = Twin(seed=1)
    account = twin.add_account()
    for phone in phones:
        twin.add_number(account, phone)
    star = re.compile(re.escape(pattern).replace(r"\*", "[0-9]"))
    assert [number.phone_number for number in account.numbers.matching(pattern)] == [
        phone for phone in phones if star.search(phone)
    ]


# -- credentials ---------------------------------------------------------------------------------------------


async def test_two_tokens_are_valid_until_one_is_promoted(stage: Stage) -> None:
    twin, account = stage.twin, stage.account
    old, new = account.auth_token, twin.create_secondary_token(account)

    async def status(token: str) -> int:
        return (await stage.call("GET", f"{stage.path}.json", auth=(account.sid, token))).status

    assert [await status(old), await status(new)] == [200, 200]
    twin.promote(account)
    assert [await status(old), await status(new)] == [401, 200]


Credentials = Callable[[Stage], tuple[str, str]]


def _of_sub(stage: Stage) -> tuple[str, str]:
    [sub] = [account for account in stage.twin.accounts.values() if account.parent is stage.account]
    return sub.sid, sub.auth_token


def _of_account(stage: Stage) -> tuple[str, str]:
    return stage.account.sid, stage.account.auth_token


def _standard_key(stage: Stage) -> tuple[str, str]:
    key = stage.twin.add_key(stage.account)
    return key.sid, key.secret


def _main_key(stage: Stage) -> tuple[str, str]:
    key = stage.twin.add_key(stage.account, "main")
    return key.sid, key.secret


@pytest.mark.parametrize(
    ("credentials", "owner", "resource", "outcome", "reason"),
    [
        (_of_account, "own", "account", (200, None), "its own account"),
        (_of_account, "sub", "account", (200, None), "a parent reads its subaccounts"),
        (_of_account, "sub", "numbers", (200, None), "and their numbers"),
        (_of_account, "unrelated", "numbers", (404, 20404), "another customer's account is not found"),
        (_of_account, "unknown", "numbers", (404, 20404), "as is one that does not exist"),
        (_of_sub, "sub", "numbers", (200, None), "a subaccount reads its own"),
        (_of_sub, "own", "numbers", (401, 20003), "but not its parent's"),
        (_of_sub, "sibling", "numbers", (401, 20003), "nor its sibling's"),
        (_standard_key, "own", "numbers", (200, None), "a key reads the numbers"),
        (_standard_key, "own", "account", (401, 20003), "but a standard key is refused on /Accounts"),
        (_main_key, "own", "account", (200, None), "and a main key is not"),
        (_standard_key, "sub", "numbers", (401, 20003), "a key of the parent cannot read a subaccount"),
        (_main_key, "sub", "account", (401, 20003), "not even a main key"),
    ],
)
async def test_credentials_reach_the_accounts_of_the_table(
    stage: Stage, credentials: Credentials, owner: str, resource: str, outcome: tuple[int, int | None], reason: str
) -> None:
    twin = stage.twin
    sids = {
        "sub": twin.add_account(parent=stage.account).sid,
        "own": stage.account.sid,
        "unrelated": twin.add_account().sid,
        "unknown": twin.new_sid("AC"),
    }
    username, password = credentials(stage)
    sids["sibling"] = twin.add_account(parent=stage.account).sid
    suffix = ".json" if resource == "account" else "/IncomingPhoneNumbers.json"
    path = f"/2010-04-01/Accounts/{sids[owner]}{suffix}"
    reply = await stage.call("GET", path, auth=(username, password))
    assert (reply.status, reply.document.get("code")) == outcome, reason


async def test_messaging_api_shows_services_of_the_login_only(stage: Stage) -> None:
    sub = stage.twin.add_account(parent=stage.account)
    service = stage.twin.add_service(sub)
    reply = await stage.call("GET", f"/v1/Services/{service.sid}")
    assert reply.status == 404, "a parent cannot read a subaccount's services"
    client = sdk_client(stage.session, stage.url, sub.sid, sub.auth_token)
    assert [one.sid for one in await client.messaging.v1.services.list_async()] == [service.sid]


async def test_parent_account_uses_a_subaccount_by_naming_it(stage: Stage) -> None:
    sub = stage.twin.add_account(parent=stage.account)
    number = stage.twin.add_number(sub, "+61400999000")
    [found] = await stage.client(sub.sid).incoming_phone_numbers.list_async(phone_number="+61400999000")
    assert (found.sid, found.account_sid) == (number.sid, sub.sid)
