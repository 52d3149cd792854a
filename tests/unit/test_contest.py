"""A webhook that others keep overwriting: when that counts as a contest, and when the contest is over."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from smschannel.api.resource import CHECK_NOW_ANNOTATION
from smschannel.core.plan import CONTESTED_AFTER
from smschannel.core.record import Webhook
from tests.unit.memory import MemoryApi, MemoryTwilio, sid_of, url_of
from tests.unit.test_reconcile import N, configured, reconciled
from tests.unit.virtual_time import virtually

THEIRS = Webhook(url="https://other.example.com/", method="POST")
DRIFT_CHECK = 600  # seconds, as the operators of these tests are set


def overwrite(twilio: MemoryTwilio) -> None:
    account, number = twilio.numbers[sid_of(N)]
    twilio.numbers[sid_of(N)] = account, replace(number, webhook=THEIRS)


@virtually
async def test_reconcile_right_after_a_correction_does_not_hide_a_contest() -> None:
    """An event, a resync or a restart may cause one before the other side writes again: it proves nothing."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    operator = await configured(api, twilio)
    reasons = []
    for _ in range(CONTESTED_AFTER):
        overwrite(twilio)
        for _ in ("the check", "a reconcile that something else caused"):
            await reconciled(operator, api)
            reasons.append(api.reason(1))
        assert twilio.webhook(N) == url_of(1)
        await asyncio.sleep(DRIFT_CHECK)
    assert reasons == ["Configured"] * 4 + ["WebhookContested"] * 2


@virtually
async def test_contest_of_two_clusters_that_check_equally_often_is_noticed() -> None:
    """Their intervals vary at random, so that now and then one of them checks twice before the other writes."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    operator = await configured(api, twilio)
    for is_overwritten in (True, False, True, False, True):
        if is_overwritten:
            overwrite(twilio)
        await reconciled(operator, api)
        await asyncio.sleep(0.7 * DRIFT_CHECK)
    assert api.reason(1) == "WebhookContested"


@virtually
async def test_contest_is_over_when_nothing_had_to_be_corrected_for_long() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    operator = await configured(api, twilio)
    for _ in range(CONTESTED_AFTER):
        overwrite(twilio)
        await reconciled(operator, api)
    await asyncio.sleep(1.4 * DRIFT_CHECK)
    await reconciled(operator, api)
    assert api.reason(1) == "WebhookContested"
    await asyncio.sleep(0.2 * DRIFT_CHECK)
    await reconciled(operator, api)
    assert api.reason(1) == "Configured"


@virtually
async def test_requested_check_ends_a_contest_at_once() -> None:
    """They have stopped the other side, and want to see that it worked."""
    api, twilio = MemoryApi(), MemoryTwilio(N)
    operator = await configured(api, twilio)
    for _ in range(CONTESTED_AFTER):
        overwrite(twilio)
        await reconciled(operator, api)
    api.annotate(1, **{CHECK_NOW_ANNOTATION: "now"})
    await reconciled(operator, api)
    assert api.reason(1) == "Configured"
    overwrite(twilio)
    await reconciled(operator, api)
    assert api.reason(1) == "Configured", "a new row begins"


@virtually
async def test_drift_now_and_then_is_no_contest() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(N)
    operator = await configured(api, twilio)
    for _ in range(2 * CONTESTED_AFTER):
        overwrite(twilio)
        await reconciled(operator, api)
        assert (api.reason(1), twilio.webhook(N)) == ("Configured", url_of(1))
        await asyncio.sleep(2 * DRIFT_CHECK)
