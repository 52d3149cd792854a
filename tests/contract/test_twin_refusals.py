"""Test every row of Twilio's error table at the twin: status, code, body, headers, and that nothing changes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import pytest
from aiohttp import encode_basic_auth
from twilio.base.exceptions import TwilioException, TwilioRestException

from tests.twin import Action, Match
from tests.twin.refusals import Row
from tests.twin.sdk import Stage, open_stage, sdk_client, until


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage() as opened:
        yield opened


Arrange = Callable[[Stage], object]


def _nothing(stage: Stage) -> None:
    return None


def _suspend(stage: Stage) -> None:
    stage.account.own_status = "suspended"


def _close(stage: Stage) -> None:
    stage.account.own_status = "closed"
    stage.account.inactive_row = Row(403, 10001, "Account is not active")


def _forbid(stage: Stage) -> None:
    stage.account.own_status = "suspended"
    stage.account.inactive_row = Row(403, 20403, "Forbidden")


def _suspend_parent(stage: Stage) -> None:
    stage.account.parent = stage.twin.add_account()
    stage.account.parent.own_status = "suspended"


def _test_credentials(stage: Stage) -> None:
    stage.account.test = True


def _fallback(stage: Stage) -> None:
    stage.numbers[0].settings["sms_fallback_url"] = "https://b.example/"


def _no_sms(stage: Stage) -> None:
    stage.numbers[0].sms = False


def _rotate(stage: Stage) -> None:
    stage.twin.create_secondary_token(stage.account)
    stage.twin.promote(stage.account)


@dataclass(frozen=True)
class Case:
    """A call, what is arranged before it, and why it is refused. {number} and {sid} are filled in."""

    status: int
    code: int
    reason: str
    method: str = "GET"
    path: str = "/2010-04-01/Accounts/{sid}/IncomingPhoneNumbers/{number}.json"
    form: Mapping[str, str] = field(default_factory=dict)
    arrange: Arrange = _nothing

    def __str__(self) -> str:
        return self.reason


def _write(status: int, code: int, reason: str, form: Mapping[str, str], arrange: Arrange = _nothing) -> Case:
    return Case(status, code, reason, method="POST", form=form, arrange=arrange)


_LIST = "/2010-04-01/Accounts/{sid}/IncomingPhoneNumbers.json"
_NO_SID = "0" * 32

CASES = [
    Case(401, 20003, "a promoted token kills the old one at once", arrange=_rotate),
    Case(401, 20005, "a suspended account", arrange=_suspend),
    Case(401, 20005, "a subaccount whose parent is suspended", arrange=_suspend_parent),
    Case(403, 20403, "a suspended account, as Twilio may also put it", arrange=_forbid),
    Case(403, 10001, "a closed account, as Twilio may also put it", arrange=_close),
    Case(401, 20005, "a suspended account itself", path="/2010-04-01/Accounts/{sid}.json", arrange=_suspend),
    Case(401, 20005, "a suspended account's messaging services", path="/v1/Services", arrange=_suspend),
    Case(403, 20008, "test credentials on a list", path=_LIST, arrange=_test_credentials),
    Case(403, 20008, "test credentials on messaging", path="/v1/Services", arrange=_test_credentials),
    Case(404, 20404, "a number that is gone", path=_LIST.replace(".json", f"/PN{_NO_SID}.json")),
    Case(404, 20404, "a messaging service that is gone", path=f"/v1/Services/MG{_NO_SID}"),
    Case(404, 20404, "the numbers of such a service", path=f"/v1/Services/MG{_NO_SID}/PhoneNumbers"),
    Case(404, 20404, "a message that is gone", path=f"/2010-04-01/Accounts/{{sid}}/Messages/SM{_NO_SID}.json"),
    Case(404, 20404, "the prices of a country that is none", path="/v1/Messaging/Countries/XX"),
    Case(404, 20404, "a resource the twin does not have", path="/2010-04-01/Accounts/{sid}/Calls.json"),
    Case(404, 20404, "a path that is none", path="/elsewhere"),
    Case(405, 20004, "buying numbers is not for sale here", method="POST", path=_LIST),
    Case(400, 20001, "a page size of nothing", path=f"{_LIST}?PageSize=0"),
    Case(400, 20001, "a page size that is not a number", path=f"{_LIST}?PageSize=ten"),
    Case(400, 20001, "a negative page", path=f"{_LIST}?Page=-1"),
    Case(400, 20001, "a token that no page gave", path=f"{_LIST}?PageToken=PT1"),
    _write(400, 20001, "a transfer to an unrelated account", {"AccountSid": f"AC{_NO_SID}"}),
    _write(400, 21402, "a URL without scheme", {"SmsUrl": "hydra.example/webhook"}),
    _write(400, 21402, "a scheme that is not the web's", {"SmsUrl": "ftp://hydra.example/"}),
    _write(400, 21402, "a URL without host", {"SmsUrl": "https:///webhook"}),
    _write(400, 21402, "a URL with a blank", {"SmsUrl": "https://hydra.example/a b"}),
    _write(400, 21402, "a URL with an invalid port", {"SmsUrl": "https://hydra.example:port/"}),
    _write(400, 21402, "a fallback that is not a URL", {"SmsUrl": "https://a.example/", "SmsFallbackUrl": "b"}),
    _write(400, 21403, "a method that Twilio does not use", {"SmsMethod": "PUT"}),
    _write(400, 21403, "a method in small letters", {"SmsMethod": "post"}),
    _write(400, 21403, "a fallback method", {"SmsFallbackMethod": "PATCH"}),
    _write(400, 21406, "a fallback alone", {"SmsFallbackUrl": "https://b.example/"}),
    _write(400, 21406, "a fallback while the URL is cleared", {"SmsUrl": "", "SmsFallbackUrl": "https://b.example/"}),
    _write(400, 21406, "a fallback that would be left without a URL", {"SmsUrl": ""}, _fallback),
    _write(400, 21407, "a number without SMS", {"SmsUrl": "https://a.example/"}, _no_sms),
]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_call_is_refused_with_the_error_of_the_table(stage: Stage, case: Case) -> None:
    number = stage.numbers[0]
    username, password = stage.account.sid, stage.account.auth_token
    case.arrange(stage)
    before = dict(number.settings)
    path = case.path.format(sid=stage.account.sid, number=number.sid)
    reply = await stage.call(case.method, path, form=case.form or None, auth=(username, password))

    assert (reply.status, reply.document["code"]) == (case.status, case.code), case.reason
    assert reply.document.keys() == {"code", "message", "more_info", "status"}
    assert reply.document["status"] == case.status
    assert reply.document["more_info"].endswith(f"/{case.code}")
    assert re.fullmatch("RQ[0-9a-f]{32}", reply.headers["Twilio-Request-Id"])
    assert {"Twilio-Concurrent-Requests", "Twilio-Request-Duration"} <= reply.headers.keys()
    challenge = reply.headers.get("WWW-Authenticate")
    assert challenge == ('Basic realm="Twilio API"' if case.status == 401 else None)
    assert number.settings == before, "a refused write changes nothing"
    assert number.account_sid == stage.account.sid


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "no credentials"),
        ("Bearer abc", "another scheme"),
        ("Basic !!!", "not base64"),
        ("Basic /w==", "not UTF-8"),
        (encode_basic_auth(f"AC{_NO_SID}", "secret"), "an account that does not exist"),
        (encode_basic_auth(f"SK{_NO_SID}", "secret"), "a key that does not exist"),
        ("own sid, empty token", "an empty token"),
        ("own sid, wrong token", "a wrong token"),
        ("own key, wrong secret", "a wrong secret"),
        ("own sid, secret of a key", "a key's secret is not the account's"),
    ],
)
async def test_bad_credentials_are_refused(stage: Stage, header: str | None, reason: str) -> None:
    key = stage.twin.add_key(stage.account)
    ours = {
        "own sid, empty token": encode_basic_auth(stage.account.sid, ""),
        "own sid, wrong token": encode_basic_auth(stage.account.sid, "wörng"),
        "own key, wrong secret": encode_basic_auth(key.sid, stage.account.auth_token),
        "own sid, secret of a key": encode_basic_auth(stage.account.sid, key.secret),
    }
    headers = {} if header is None else {"Authorization": ours.get(header, header)}
    reply = await stage.call("GET", f"{stage.path}/IncomingPhoneNumbers.json", headers=headers)
    assert (reply.status, reply.document["code"]) == (401, 20003), reason
    assert reply.document["message"] == "Authenticate"


async def test_parent_account_sees_that_its_subaccount_is_suspended(stage: Stage) -> None:
    sub = stage.twin.add_account(parent=stage.account)
    sub.own_status = "suspended"
    assert (await stage.client().api.v2010.accounts(sub.sid).fetch_async()).status == "suspended"
    reply = await stage.call("GET", f"/2010-04-01/Accounts/{sub.sid}/IncomingPhoneNumbers.json")
    assert reply.status == 401, "even the parent cannot read its numbers"


async def test_sdk_raises_what_it_raises_for_twilio(stage: Stage) -> None:
    client = sdk_client(stage.session, stage.url, stage.account.sid, "wrong")
    with pytest.raises(TwilioRestException) as fetch:
        await client.incoming_phone_numbers(stage.numbers[0].sid).fetch_async()
    assert (fetch.value.status, fetch.value.code) == (401, 20003)
    with pytest.raises(TwilioException, match="Unable to fetch page") as listing:
        await client.incoming_phone_numbers.list_async()
    assert not isinstance(listing.value, TwilioRestException), "a failed list has no status and no code"


@pytest.mark.parametrize(
    ("retry_after", "header", "reason"),
    [(None, None, "Twilio does not promise the header"), (3, "3", "but may send it")],
)
async def test_requests_beyond_the_concurrency_are_refused(
    stage: Stage, retry_after: int | None, header: str | None, reason: str
) -> None:
    stage.account.concurrency = 1
    stage.account.retry_after = retry_after
    stage.twin.faults.add(Match(count=1), Action(kind="hang"))
    path = f"{stage.path}/IncomingPhoneNumbers.json"
    hanging = asyncio.create_task(stage.call("GET", path))
    await until(lambda: stage.account.in_flight == 1)
    refused = await stage.call("GET", path)
    assert (refused.status, refused.document["code"]) == (429, 20429)
    assert refused.headers["Twilio-Concurrent-Requests"] == "1"
    assert refused.headers.get("Retry-After") == header, reason

    other = stage.twin.add_account()
    others = f"/2010-04-01/Accounts/{other.sid}.json"
    reply = await stage.call("GET", others, auth=(other.sid, other.auth_token))
    assert reply.status == 200, "the limit is the account's, not the twin's"

    hanging.cancel()
    await until(lambda: stage.account.in_flight == 0)
    assert (await stage.call("GET", path)).status == 200, "a caller that closes the connection frees its slot"
