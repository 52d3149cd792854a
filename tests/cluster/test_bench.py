"""The benchmarks measure what they say: the peer makes the operator's calls, and seeded channels are Ready ones."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Stack
from tests.bench import run, scale
from tests.bench.case import Case, Load, Run
from tests.bench.run import measure, operator, staged
from tests.bench.seeding import seed

SETTINGS = {"SMSCHANNEL_WORKERS": "4", "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}


def quiet(text: str, fraction: float | None = None, /) -> None:
    pass


def whole(calls: Any) -> dict[str, int]:
    """Return the calls per channel, rounded: an account's Messaging Services are read once, for all its channels."""
    return {call: round(count) for call, count in calls.items() if round(count)}


async def test_peer_makes_the_calls_that_the_operator_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise their ratio says nothing about how fast each of them makes its calls."""
    monkeypatch.setattr(run, "_WARM_UP", 1)  # calls are counted here, and not how long they take
    monkeypatch.setattr(run, "_ALONE", 1)
    load = Load(channels=20, rounds=1, accounts=1, workers=4, seed=1)
    cases = [Case(variant, at_birth) for variant in ("peer", "ours") for at_birth in (False, True)]
    runs: dict[str, Run] = {}
    await measure(load, cases, tmp_path, quiet, lambda done: runs.update({each.case: each for each in done}))
    for at_birth in (False, True):
        peer, ours = runs[Case("peer", at_birth).name], runs[Case("ours", at_birth).name]
        assert (
            whole(peer.create.twilio_calls) == whole(ours.create.twilio_calls) == {"GET numbers": 1, "POST number": 1}
        )
        assert whole(peer.delete.twilio_calls) == whole(ours.delete.twilio_calls) == {"GET number": 1, "POST number": 1}
        assert peer.create.writes == ours.create.writes == (2 if at_birth else 3)
        assert peer.delete.writes == ours.delete.writes == 2
        assert peer.delete.reads == 1


async def test_seeded_channels_are_what_the_operator_would_have_made(tmp_path: Path) -> None:
    """An operator that starts beside them finds nothing to do, and gives the numbers back when they are deleted."""
    async with staged(tmp_path, 1, 1, quiet) as (stack, session):
        await seed(stack, session, 2, 5, random.Random(1))  # noqa: S311  (not used for secrets)
        start = await scale.measure_start(stack, session, SETTINGS, empty_rss=0)
        assert (start.writes, start.twilio_calls) == (0, 0)
        assert {each["status"]["conditions"][0]["status"] for each in listed(stack)} == {"True"}
        with operator(stack, {**SETTINGS, "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "4"}) as process:
            interval = await scale.measure_interval(8, stack, session, process)
            assert interval.reconciles >= 10
            assert interval.kubernetes_writes == 0
            assert not any(call.startswith("POST") for call in interval.twilio_calls)
            numbers = [each["spec"]["phoneNumber"] for each in listed(stack)]
            names = [each["metadata"]["name"] for each in listed(stack)]
            stack.delete(*names)
            await asyncio.to_thread(stack.wait_gone, *names)
        assert {stack.number(each)["sms_url"] for each in numbers} == {"https://demo.twilio.com/welcome/sms/reply"}


def listed(stack: Stack) -> list[Any]:
    return list(stack.channels.get(namespace="sms-channels").to_dict()["items"])
