"""Sending one SMS for `kubectl sms test --send`, at the Twilio twin: prices, refusals, and what becomes of it."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from click import ClickException
from pydantic import SecretStr

from smschannel.api.errors import Refused, TwilioUnavailable
from smschannel.cli.test import Options, _send
from smschannel.core.record import Login
from smschannel.twilio.messages import FINAL, MessageRefused, Messages, Price, Way
from tests.manifests import INSTANCE
from tests.twin import Action, Match
from tests.twin.sdk import Stage, open_stage

AWAY = "+61491570006"


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage(numbers=3) as opened:
        yield opened


def messages(stage: Stage, token: str = "") -> Messages:
    login = Login(sid=stage.account.sid, token=SecretStr(token or stage.account.auth_token))
    return Messages(login, stage.account.sid, Way(stage.url))


async def test_message_is_sent_and_followed(stage: Stage) -> None:
    sender, receiver, _ = (each.phone_number for each in stage.numbers)
    async with messages(stage) as twilio:
        sent = await twilio.send(sender, receiver, "Test")
        assert (sent.status, sent.error_code) == ("queued", 0)
        assert (await twilio.fetch(sent.sid)).status == "sent"
        assert (await twilio.fetch(sent.sid)).status in FINAL
    [stored] = stage.account.messages.values()
    assert (stored.sender, stored.to, stored.body) == (sender, receiver, "Test")


class Secrets:
    """An API server that has the channel's Secret."""

    def __init__(self, token: str) -> None:
        self._token = base64.b64encode(token.encode()).decode()

    async def request(self, method: str, path: str) -> Any:
        assert (method, path) == ("GET", "/api/v1/namespaces/sms-channels/secrets/twilio")
        labels = {"channels.hydracore.io/credentials": "true"}
        return {"metadata": {"labels": labels}, "data": {"token": self._token}}


async def test_command_sends_after_a_yes_and_says_what_became_of_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMSCHANNEL_TWILIO_URL", stage.url)
    sender, receiver, _ = (each.phone_number for each in stage.numbers)
    credentials = {"secretKeyRef": {"name": "twilio", "key": "token"}}
    spec = {"accountSid": stage.account.sid, "phoneNumber": receiver, "credentials": credentials}
    channel = {"metadata": {"namespace": "sms-channels", "name": INSTANCE}, "spec": spec}
    api: Any = Secrets(stage.account.auth_token)
    with pytest.raises(ClickException, match="add --yes"):
        await _send(api, channel, None, Options(sender, "Test", unsigned=False, yes=False))
    assert stage.account.messages == {}
    await _send(api, channel, None, Options(sender, "Test", unsigned=False, yes=True))
    shown = capsys.readouterr()
    assert f"One SMS from {sender} to {receiver}. Twilio lists 0.0515 to 0.0620 USD" in shown.err
    assert "It is sent. Now look whether the instance shows it." in shown.out
    assert stage.account.auth_token not in shown.err + shown.out


async def test_price_is_that_of_the_receivers_country(stage: Stage) -> None:
    async with messages(stage) as twilio:
        assert await twilio.price(AWAY) == Price("AU", "0.0515", "0.0620", "USD")
        assert (await twilio.price("+447400123456")).country == "GB"
        with pytest.raises(TwilioUnavailable, match="knows no country"):
            await twilio.price("+999123456")
    assert stage.account.messages == {}, "asking costs nothing"


@pytest.mark.parametrize(
    ("sender", "receiver", "code", "advice"),
    [
        pytest.param("own", "own", 21266, "a number cannot send to itself", id="to itself"),
        pytest.param("own", "0400", 21211, "the receiver is not a number", id="no number"),
        pytest.param("+61400999999", "away", 21659, "not a number of this account", id="somebody else's sender"),
        pytest.param("voice", "away", 21606, "not a number of this account that can send", id="sender without SMS"),
    ],
)
async def test_refusal_says_what_to_do(stage: Stage, sender: str, receiver: str, code: int, advice: str) -> None:
    stage.numbers[1].sms = False
    real = {"own": stage.numbers[0].phone_number, "voice": stage.numbers[1].phone_number, "away": AWAY}
    async with messages(stage) as twilio:
        with pytest.raises(MessageRefused, match=f"code {code}.*{advice}"):
            await twilio.send(real.get(sender, sender), real.get(receiver, receiver), "Test")
    assert stage.account.messages == {}


@pytest.mark.parametrize("missing", ["To", "From", "Body"])
async def test_twin_refuses_incomplete_messages(stage: Stage, missing: str) -> None:
    form = {"To": AWAY, "From": stage.numbers[0].phone_number, "Body": "Test"}
    del form[missing]
    reply = await stage.call("POST", f"{stage.path}/Messages.json", form=form)
    assert (reply.status, reply.document["code"]) == (400, {"To": 21604, "From": 21603, "Body": 21602}[missing])


async def test_wrong_token_is_refused_and_not_shown(stage: Stage) -> None:
    token = "0" * 32
    async with messages(stage, token) as twilio:
        with pytest.raises(Refused) as refused:
            await twilio.send(stage.numbers[0].phone_number, AWAY, "Test")
    assert token not in str(refused.value)


async def test_outage_is_no_refusal(stage: Stage) -> None:
    stage.twin.faults.add(Match(), Action(kind="status", status=503, code=20503))
    async with messages(stage) as twilio:
        with pytest.raises(TwilioUnavailable, match="HTTP 503"):
            await twilio.price(AWAY)


async def test_a_message_breaks_the_operators_promise(stage: Stage) -> None:
    """Tests of the operator end with the check that it never sends one."""
    async with messages(stage) as twilio:
        await twilio.send(stage.numbers[0].phone_number, AWAY, "Test")
    [violation] = stage.twin.journal.violations
    assert violation.why == "POST on messages"
