"""Log lines: those of a reconcile name the version of the channel, and no reconcile's fields leak into another's."""

from __future__ import annotations

import asyncio
import json

import pytest
import structlog

from smschannel.api.errors import TwilioUnavailable
from smschannel.api.logs import log_to_stderr
from tests.unit.memory import MemoryApi, MemoryTwilio, raising, running
from tests.unit.virtual_time import VirtualTime

PHONES = ("+61400111222", "+61400111333")


def test_lines_of_a_reconcile_have_uid_and_generation(capsys: pytest.CaptureFixture[str]) -> None:
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(*PHONES)
        async with running(api, twilio):
            for n, phone in enumerate(PHONES, 1):
                api.apply(n, phone)
            await asyncio.sleep(30)
            twilio.on_call = raising(TwilioUnavailable("HTTP 503"))
            api.apply(1, PHONES[0], driftPolicy="Report")
            await asyncio.sleep(30)
        structlog.get_logger().info("outside of reconciles")
        uids.update({name: api.channel(n)["metadata"]["uid"] for n, name in ((1, "first"), (2, "second"))})  # type: ignore[index]

    uids: dict[str, str] = {}
    log_to_stderr("INFO", "json")
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(story())
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    changed = [(each["uid"], each["generation"]) for each in lines if each["event"] == "status changed"]
    assert sorted(changed) == sorted([(uids["first"], 1), (uids["second"], 1)])
    failed = [each for each in lines if each["event"] == "cannot check channel, left as it is"]
    assert {(each["uid"], each["generation"]) for each in failed} == {(uids["first"], 2)}, "the newer generation"
    [outside] = [each for each in lines if each["event"] == "outside of reconciles"]
    assert "uid" not in outside
