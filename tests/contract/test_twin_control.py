"""Test the control API, the journal, and the twin as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.twin import DEMO_URL, Twin
from tests.twin.sdk import Stage, open_stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage() as opened:
        yield opened


async def test_seed_adds_accounts_and_numbers(stage: Stage) -> None:
    made = (await stage.control("POST", "/seed", {"accounts": 3, "numbers": 100})).document["accounts"]
    phones = [phone for account in made for phone in account["phone_numbers"]]
    assert len(set(phones)) == 300
    assert not set(phones) & {number.phone_number for number in stage.numbers}, "numbers that exist are skipped"
    account = made[2]
    reply = await stage.call(
        "GET",
        f"/2010-04-01/Accounts/{account['account_sid']}/IncomingPhoneNumbers.json",
        auth=(account["account_sid"], account["auth_token"]),
    )
    assert [number["phone_number"] for number in reply.document["incoming_phone_numbers"]] == phones[200:250]


async def test_account_is_created_changed_and_closed(stage: Stage) -> None:
    parent = stage.account.sid
    made = (await stage.control("POST", "/accounts", {"friendly_name": "sub", "parent": parent})).document
    of_account = f"/accounts/{made['account_sid']}"
    auth = (made["account_sid"], made["auth_token"])
    path = f"/2010-04-01/Accounts/{made['account_sid']}.json"

    second = (await stage.control("POST", f"{of_account}/tokens/secondary")).document["auth_token"]
    assert (await stage.call("GET", path, auth=(auth[0], second))).status == 200
    await stage.control("DELETE", f"{of_account}/tokens/secondary")
    assert (await stage.call("GET", path, auth=(auth[0], second))).status == 401
    assert (await stage.control("POST", f"{of_account}/tokens/promote")).status == 409, "nothing to promote"
    third = (await stage.control("POST", f"{of_account}/tokens/secondary")).document["auth_token"]
    await stage.control("POST", f"{of_account}/tokens/promote")
    assert (await stage.call("GET", path, auth=auth)).status == 401

    key = (await stage.control("POST", f"{of_account}/keys", {"kind": "main"})).document
    assert (await stage.call("GET", path, auth=(key["sid"], key["secret"]))).status == 200
    await stage.control("DELETE", f"/keys/{key['sid']}")
    assert (await stage.call("GET", path, auth=(key["sid"], key["secret"]))).status == 401

    change = {"status": "suspended", "refusal": {"status": 403, "code": 20403}, "concurrency": 2}
    state = (await stage.control("PATCH", of_account, change)).document
    assert (state["status"], state["concurrency"], state["parent"]) == ("suspended", 2, parent)
    refused = await stage.call("GET", path, auth=(auth[0], third))
    assert (refused.status, refused.document["code"]) == (403, 20403)
    await stage.control("PATCH", of_account, {"status": "active"})
    assert (await stage.call("GET", path, auth=(auth[0], third))).status == 200


async def test_number_is_changed_outside_the_product(stage: Stage) -> None:
    of_account = f"/accounts/{stage.account.sid}"
    new = (await stage.control("POST", f"{of_account}/numbers", {"phone_number": "+61499000111"})).document
    assert (new["sms_url"], new["route"]["via"]) == (DEMO_URL, "number")
    application = (
        await stage.control("POST", f"{of_account}/applications", {"sms_url": "https://app.example/"})
    ).document
    changed = (
        await stage.control("PATCH", "/numbers/+61499000111", {"sms_application_sid": application["sid"]})
    ).document
    assert changed["route"] == {
        "via": "application", "url": "https://app.example/", "method": "POST", "service_sid": None,
    }  # fmt: skip
    of_application = f"{of_account}/applications/{application['sid']}"
    await stage.control("PUT", of_application, {"sms_url": "https://new.example/", "sms_method": "GET"})
    assert (await stage.control("GET", f"/numbers/{new['sid']}")).document["route"]["method"] == "GET"

    service = (await stage.control("POST", f"{of_account}/services", {"friendly_name": "pool"})).document
    of_service = f"/services/{service['sid']}"
    await stage.control("PATCH", "/numbers/+61499000111", {"sms_application_sid": ""})
    await stage.control("PUT", f"{of_service}/numbers/+61499000111")
    state = (await stage.control("GET", "/numbers/+61499000111")).document
    assert state["route"] == {"reason": "the messaging service has no inbound_request_url"}
    await stage.control("PATCH", of_service, {"use_inbound_webhook_on_number": True})
    assert (await stage.control("GET", of_service)).document["numbers"] == ["+61499000111"]
    assert (await stage.control("GET", "/numbers/+61499000111")).document["route"]["via"] == "number"
    await stage.control("DELETE", f"{of_service}/numbers/+61499000111")
    assert (await stage.control("GET", of_service)).document["numbers"] == []

    await stage.control("DELETE", "/numbers/+61499000111")
    assert (await stage.control("GET", "/numbers/+61499000111")).status == 404
    assert (await stage.control("GET", "/violations")).document == {"violations": []}, "it was not the product"


async def test_service_loses_a_number_that_is_released_or_moved(stage: Stage) -> None:
    service = stage.twin.add_service(stage.account)
    released, moved = stage.numbers[:2]
    stage.twin.join_service(released, service)
    stage.twin.join_service(moved, service)
    stage.twin.release(released)
    stage.twin.transfer(moved, stage.twin.add_account(parent=stage.account))
    assert service.numbers == {}


async def test_faults_are_added_listed_and_removed(stage: Stage) -> None:
    fault = {"match": {"method": "GET", "count": 1}, "action": {"kind": "status", "status": 500}}
    rule = (await stage.control("POST", "/faults", fault)).document
    assert (await stage.call("GET", f"{stage.path}.json")).status == 500
    assert (await stage.call("GET", f"{stage.path}.json")).status == 200
    [listed] = (await stage.control("GET", "/faults")).document["faults"]
    assert (listed["id"], listed["seen"], listed["hit"]) == (rule["id"], 2, 1)
    assert (await stage.control("DELETE", f"/faults/{rule['id']}")).status == 204
    assert (await stage.control("DELETE", f"/faults/{rule['id']}")).status == 404
    await stage.control("POST", "/faults", fault)
    await stage.control("DELETE", "/faults")
    assert (await stage.control("GET", "/faults")).document == {"faults": []}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text", "reason"),
    [
        ("POST", "/faults", {"action": {"kind": "explode"}}, 400, "action.kind", "unknown kind of fault"),
        ("POST", "/faults", {"action": {"kind": "reset"}, "when": 1}, 400, "when", "unknown field"),
        ("POST", "/faults", {"match": {"path": "("}, "action": {"kind": "reset"}}, 400, "regular", "a bad regex"),
        ("POST", "/accounts", {"parent": "AC0"}, 404, "AC0", "unknown parent"),
        ("PATCH", "/accounts/AC0", {}, 404, "AC0", "unknown account"),
        ("GET", "/numbers/+1", None, 404, "+1", "unknown number"),
        ("GET", "/services/MG0", None, 404, "MG0", "unknown service"),
        ("DELETE", "/keys/SK0", None, 404, "key", "unknown key"),
        ("POST", "/fault", {}, 404, "unknown control call", "unknown path"),
        ("PUT", "/journal", {}, 404, "unknown control call", "unknown method"),
        ("POST", "/inbound", {}, 400, "to", "a message without a number"),
        ("POST", "/accounts/{sid}/numbers", {"phone_number": "+61400111222"}, 409, "belongs to", "taken"),
        ("POST", "/accounts/{sid}/numbers", {"phone_number": "0400"}, 409, "E.164", "not a number"),
        ("PUT", "/accounts/{sid}/applications/AP0", {"sms_url": ""}, 404, "AP0", "unknown application"),
    ],
)
async def test_error_of_the_caller_is_answered_with_a_message(
    stage: Stage, method: str, path: str, body: object, status: int, text: str, reason: str
) -> None:
    reply = await stage.control(method, path.format(sid=stage.account.sid), body)
    assert reply.status == status, reason
    assert text in reply.document["error"], reason


# -- the journal ---------------------------------------------------------------------------------------------


async def test_journal_keeps_names_and_only_two_values(stage: Stage) -> None:
    number = stage.numbers[0]
    await stage.client().incoming_phone_numbers.list_async(phone_number=number.phone_number)
    await stage.client().incoming_phone_numbers(number.sid).update_async(sms_url="https://a.example/", sms_method="GET")
    journal = (await stage.control("GET", "/journal")).document
    assert journal["counts"] == {"GET numbers": 1, "POST number": 1}
    reading, writing = journal["entries"]
    assert reading["parameters"] == ["PhoneNumber"]
    assert (writing["sid"], writing["account"], writing["status"]) == (number.sid, stage.account.sid, 200)
    assert (writing["sms_url"], writing["sms_method"]) == ("https://a.example/", "GET")
    assert number.phone_number not in json.dumps(journal), "values of other parameters are not kept"

    narrowed = (await stage.control("GET", f"/journal?kind=number&account={stage.account.sid}")).document
    assert [entry["method"] for entry in narrowed["entries"]] == ["POST"]
    await stage.control("DELETE", "/journal")
    assert (await stage.control("GET", "/journal")).document == {"entries": [], "counts": {}}


@pytest.mark.parametrize(
    ("method", "path", "form", "why", "reason"),
    [
        (
            "POST",
            "number",
            {"SmsUrl": "https://a.example/", "SmsMethod": "POST"},
            None,
            "the two fields of the product",
        ),
        ("GET", "number", None, None, "reading"),
        (
            "POST",
            "number",
            {"SmsUrl": "", "VoiceUrl": "", "StatusCallback": ""},
            "write of StatusCallback, VoiceUrl",
            "more",
        ),
        ("POST", "number", {"SmsApplicationSid": ""}, "write of SmsApplicationSid", "another field"),
        ("POST", "number", {"AccountSid": "AC0"}, "transfer to another account", "refused, and still a violation"),
        ("DELETE", "number", None, "release of a number", "release"),
        ("POST", "numbers", {"PhoneNumber": "+61400000001"}, "POST on numbers", "buying"),
        ("POST", "services", {}, "POST on services", "anything else that writes"),
    ],
)
async def test_call_that_breaks_a_promise_is_a_violation(
    stage: Stage, method: str, path: str, form: dict[str, str] | None, why: str | None, reason: str
) -> None:
    paths = {
        "number": f"{stage.path}/IncomingPhoneNumbers/{stage.numbers[0].sid}.json",
        "numbers": f"{stage.path}/IncomingPhoneNumbers.json",
        "services": "/v1/Services",
    }
    await stage.call(method, paths[path], form=form)
    await stage.control("DELETE", "/journal")
    found = (await stage.control("GET", "/violations")).document["violations"]
    assert [violation["why"] for violation in found] == ([why] if why else []), reason
    await stage.control("DELETE", "/violations")
    assert (await stage.control("GET", "/violations")).document == {"violations": []}


# -- secrets -------------------------------------------------------------------------------------------------


async def test_no_token_in_any_repr_log_or_other_answer(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    twin, account = stage.twin, stage.account
    key = twin.add_key(account)
    secrets = [account.auth_token, twin.create_secondary_token(account), key.secret]
    service = twin.add_service(account)
    for token in secrets[:2]:
        await stage.call("DELETE", f"{stage.path}/IncomingPhoneNumbers/PN0.json", auth=(account.sid, token))
    answers = [
        await stage.control("GET", path)
        for path in (
            *("/accounts", "/faults", "/journal", "/violations"),
            *(f"/accounts/{account.sid}", f"/services/{service.sid}", "/numbers/+61400111222"),
        )
    ]
    text = " ".join(
        (repr([twin, account, key, service, stage]), caplog.text, json.dumps([a.document for a in answers]))
    )
    assert "release of a number" in text
    assert not [secret for secret in secrets if secret in text]


def test_seed_makes_sids_and_tokens_repeatable() -> None:
    def made(seed: int | None) -> tuple[str, str, str]:
        twin = Twin(seed=seed)
        [account] = twin.seed(1, 1)
        return account.sid, account.auth_token, next(iter(account.numbers)).sid

    assert made(7) == made(7)
    assert not set(made(7)) & set(made(8))
    assert not set(made(None)) & set(made(None))


# -- the process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
async def test_process_serves_and_ends_with_status_0(tmp_path: Path, ending: signal.Signals) -> None:
    state = tmp_path / "twin.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.twin", "--numbers", "3", "--accounts", "2", "--state", str(state)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        assert process.stdout is not None
        line = json.loads(await process.stdout.readline())
        secret = json.loads(state.read_text())
        async with (
            aiohttp.ClientSession(
                headers={"Authorization": aiohttp.encode_basic_auth(secret["account_sid"], secret["auth_token"])}
            ) as session,
            session.get(f"{line['url']}/2010-04-01/Accounts/{line['account_sid']}/IncomingPhoneNumbers.json") as answer,
        ):
            listed = [number["phone_number"] for number in (await answer.json())["incoming_phone_numbers"]]
        process.send_signal(ending)
        rest, log = await process.communicate()

    assert line == {"url": secret["url"], "account_sid": secret["account_sid"], "state": str(state)}
    assert listed == secret["phone_numbers"] == ["+61400111222", "+61400111223", "+61400111224"]
    assert len(secret["accounts"]) == 2
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert process.returncode == 0
    assert rest == b"", "one line on stdout only"
    assert secret["auth_token"].encode() not in log
