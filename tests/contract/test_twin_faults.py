"""Test that the twin's faults happen as configured, and to matching calls only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from twilio.base.exceptions import TwilioRestException, TwilioServiceException

from tests.twin import DEMO_URL, Action, Match
from tests.twin.sdk import Stage, open_stage, until

WEBHOOK = "https://hydra.example/webhook"


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage() as opened:
        yield opened


@pytest.mark.parametrize(
    ("action", "status", "code", "retry_after", "reason"),
    [
        (Action(kind="status"), 503, 20503, None, "503 is the default"),
        (Action(kind="status", status=500), 500, 20500, None, "the code follows the status"),
        (Action(kind="status", status=429, retry_after=7), 429, 20429, "7", "with Retry-After"),
        (Action(kind="status", status=401, code=20005), 401, 20005, None, "any pair of status and code"),
    ],
)
async def test_status_fault_answers_with_an_error(
    stage: Stage, action: Action, status: int, code: int, retry_after: str | None, reason: str
) -> None:
    stage.twin.faults.add(Match(), action)
    reply = await stage.call("GET", f"{stage.path}.json")
    assert (reply.status, reply.document["code"], reply.headers.get("Retry-After")) == (status, code, retry_after), (
        reason
    )
    with pytest.raises(TwilioRestException) as raised:
        await stage.client().incoming_phone_numbers(stage.numbers[0].sid).fetch_async()
    assert (raised.value.status, raised.value.code) == (status, code)


async def test_problem_details_make_the_sdk_raise_another_exception(stage: Stage) -> None:
    stage.twin.faults.add(Match(), Action(kind="status", status=500, problem=True))
    with pytest.raises(TwilioServiceException) as raised:
        await stage.client().incoming_phone_numbers(stage.numbers[0].sid).fetch_async()
    assert (raised.value.status, raised.value.code) == (500, 20500)


async def test_html_makes_the_sdk_raise_a_decoding_error(stage: Stage) -> None:
    stage.twin.faults.add(Match(), Action(kind="html200"))
    with pytest.raises(json.JSONDecodeError):
        await stage.client().incoming_phone_numbers(stage.numbers[0].sid).fetch_async()


@pytest.mark.parametrize(
    ("action", "error", "written", "reason"),
    [
        (Action(kind="reset"), aiohttp.ClientError, False, "reset before it takes effect"),
        (Action(kind="reset", after=True), aiohttp.ClientError, True, "takes effect, and the answer is lost"),
        (Action(kind="truncate"), aiohttp.ClientPayloadError, True, "takes effect, and half of the answer is lost"),
        (Action(kind="hang"), TimeoutError, False, "no effect and no answer"),
        (Action(kind="hang", after=True), TimeoutError, True, "takes effect, no answer"),
    ],
)
async def test_fault_loses_the_answer_before_or_after_the_effect(
    stage: Stage, action: Action, error: type[Exception], written: bool, reason: str
) -> None:
    number = stage.numbers[0]
    stage.twin.faults.add(Match(method="POST"), action)
    impatient = aiohttp.ClientTimeout(total=1)
    async with aiohttp.ClientSession(timeout=impatient, headers=_login(stage)) as session:
        with pytest.raises(error):
            async with session.post(
                f"{stage.url}{stage.path}/IncomingPhoneNumbers/{number.sid}.json", data={"SmsUrl": WEBHOOK}
            ) as answer:
                await answer.read()
    await until(lambda: bool(stage.twin.journal.entries))
    assert number.settings["sms_url"] == (WEBHOOK if written else DEMO_URL), reason
    assert stage.twin.journal.entries[-1].status is None, "the journal shows that no answer was sent"
    assert stage.account.in_flight == 0


def _login(stage: Stage) -> dict[str, str]:
    return {"Authorization": aiohttp.encode_basic_auth(stage.account.sid, stage.account.auth_token)}


@pytest.mark.parametrize("after", [False, True])
async def test_late_answer_is_still_the_right_one(stage: Stage, after: bool) -> None:
    stage.twin.faults.add(Match(), Action(kind="delay", seconds=0.01, after=after))
    assert (await stage.call("GET", f"{stage.path}.json")).document["sid"] == stage.account.sid


@pytest.mark.parametrize(
    ("match", "statuses", "reason"),
    [
        (Match(), [503, 503, 503, 503], "no condition: every call"),
        (Match(count=2), [503, 503, 200, 200], "the first two"),
        (Match(nth=3), [200, 200, 503, 503], "from the third on"),
        (Match(nth=2, count=1), [200, 503, 200, 200], "only the second"),
        (Match(method="POST"), [200, 200, 200, 200], "another method"),
        (Match(path=r"/IncomingPhoneNumbers\.json$"), [503, 503, 503, 503], "the path of the call"),
        (Match(path=r"^/v1/"), [200, 200, 200, 200], "another path"),
        (Match(account="AC0"), [200, 200, 200, 200], "another account"),
    ],
)
async def test_only_matching_calls_are_hit(stage: Stage, match: Match, statuses: list[int], reason: str) -> None:
    stage.twin.faults.add(match, Action(kind="status"))
    path = f"{stage.path}/IncomingPhoneNumbers.json"
    assert [(await stage.call("GET", path)).status for _ in range(4)] == statuses, reason


async def test_fault_matches_the_account_in_the_path_or_login(stage: Stage) -> None:
    sub = stage.twin.add_account(parent=stage.account)
    key = stage.twin.add_key(sub)
    stage.twin.faults.add(Match(account=sub.sid), Action(kind="status"))
    by_path = await stage.call("GET", f"/2010-04-01/Accounts/{sub.sid}.json")
    by_login = await stage.call("GET", "/v1/Services", auth=(sub.sid, sub.auth_token))
    by_key = await stage.call("GET", "/v1/Services", auth=(key.sid, key.secret))
    other = await stage.call("GET", "/v1/Services")
    assert [by_path.status, by_login.status, by_key.status, other.status] == [503, 503, 503, 200]


async def test_fault_hits_before_the_check_of_credentials(stage: Stage) -> None:
    stage.twin.faults.add(Match(), Action(kind="status"))
    assert (await stage.call("GET", f"{stage.path}.json", auth=(stage.account.sid, "wrong"))).status == 503


async def test_every_answer_takes_the_latency(stage: Stage) -> None:
    stage.twin.latency = 0.01
    reply = await stage.call("GET", f"{stage.path}.json")
    assert float(reply.headers["Twilio-Request-Duration"]) >= 0.01
