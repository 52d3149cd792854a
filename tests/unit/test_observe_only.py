"""The operator that only observes: it says what it would do, writes nothing to Twilio, and still ends deletions."""

from __future__ import annotations

import asyncio
from typing import Any

from smschannel.api.status import condition
from tests.unit.memory import BEFORE, MemoryApi, MemoryTwilio, running, url_of
from tests.unit.virtual_time import virtually

PHONE, OTHER = "+61400111222", "+61400111333"
FOREIGN = "https://foreign.example.com/"


def ready(api: MemoryApi, n: int) -> Any:
    channel = api.channel(n)
    assert channel
    return condition(channel["status"], "Ready")


def change(twilio: MemoryTwilio, phone: str, url: str) -> None:
    """Change a number's webhook at Twilio, as others do."""
    for sid, (account, number) in twilio.numbers.items():
        if number.phone_number == phone:
            changed = number.webhook.model_copy(update={"url": url})
            twilio.numbers[sid] = account, number.__class__(**{**vars(number), "webhook": changed})


@virtually
async def test_new_channel_says_what_would_be_done_until_the_mode_ends() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(PHONE)
    async with running(api, twilio, observe_only=True):
        api.apply(1, PHONE)
        await asyncio.sleep(3600)
        assert ready(api, 1)["status"] == "False"
        assert ready(api, 1)["reason"] == "ObserveOnly"
        assert ready(api, 1)["message"] == (
            "The operator only observes. It would: claim +61400111222, set its webhook."
            " To let the operator do this, set its SMSCHANNEL_OBSERVE_ONLY to false."
        )
        channel = api.channel(1)
        assert channel
        effective = condition(channel["status"], "WebhookEffective")
        assert effective
        assert (effective["status"], effective["reason"]) == ("False", "UrlMismatch"), "messages go elsewhere still"
        assert condition(channel["status"], "CredentialsValid")["status"] == "True"  # type: ignore[index]
        assert "finalizers" not in channel["metadata"]
        assert (twilio.writes, api.records()) == ([], {})
    async with running(api, twilio):
        await asyncio.sleep(30)
        assert (api.reason(1), twilio.webhook(PHONE)) == ("Configured", url_of(1)), "the setting is all that it takes"


@virtually
async def test_two_channels_of_one_number_both_see_it_free() -> None:
    """Nothing is claimed, so neither of them keeps the other from anything."""
    api, twilio = MemoryApi(), MemoryTwilio(PHONE)
    async with running(api, twilio, observe_only=True):
        api.apply(1, PHONE)
        api.apply(2, PHONE)
        await asyncio.sleep(60)
        assert (api.reason(1), api.reason(2)) == ("ObserveOnly", "ObserveOnly")
        assert twilio.writes == []


@virtually
async def test_drift_is_reported_and_left_and_what_is_well_stays_ready() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(PHONE, OTHER)
    async with running(api, twilio):
        api.apply(1, PHONE)
        api.apply(2, OTHER)
        await asyncio.sleep(30)
    written = list(twilio.writes)
    async with running(api, twilio, observe_only=True):
        change(twilio, PHONE, FOREIGN)
        await asyncio.sleep(3600)
        assert (api.reason(1), api.reason(2)) == ("ObserveOnly", "Configured")
        assert "It would: set its webhook." in ready(api, 1)["message"]
        assert twilio.writes == written
        change(twilio, PHONE, url_of(1))
        await asyncio.sleep(3600)
        assert api.reason(1) == "Configured", "there is nothing to withhold any more"


@virtually
async def test_deletion_ends_and_the_number_is_restored_after_the_mode() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(PHONE)
    async with running(api, twilio):
        api.apply(1, PHONE)
        await asyncio.sleep(30)
    async with running(api, twilio, observe_only=True):
        api.delete(1)
        await asyncio.sleep(60)
        assert api.channel(1), "it waits for its number, as in an outage"
        assert ready(api, 1)["message"].startswith("The operator only observes, so the number is not restored.")
        await asyncio.sleep(90)
        assert api.channel(1) is None, "and it waits for the grace period only"
        await asyncio.sleep(8 * 86_400)
        assert (twilio.webhook(PHONE), list(api.records())) == (url_of(1), [PHONE]), "it is not written off"
    async with running(api, twilio):
        await asyncio.sleep(3600)
        assert (twilio.webhook(PHONE), api.records()) == (BEFORE, {})


@virtually
async def test_changed_number_keeps_both_as_they_are() -> None:
    api, twilio = MemoryApi(), MemoryTwilio(PHONE, OTHER)
    async with running(api, twilio):
        api.apply(1, PHONE)
        await asyncio.sleep(30)
    async with running(api, twilio, observe_only=True):
        api.apply(1, OTHER)
        await asyncio.sleep(60)
        assert ready(api, 1)["message"].startswith(
            "The operator only observes. It would: claim +61400111333, set its webhook, restore another number's"
            " webhook, free another number."
        )
        assert (twilio.webhook(PHONE), twilio.webhook(OTHER)) == (url_of(1), BEFORE)
        assert list(api.records()) == [PHONE]
