"""Who may call Twilio now: one login's limits, pauses and refusals never reach another's."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable

import pytest
from pydantic import SecretStr

from smschannel.api.errors import NotFound, Refused, TwilioThrottled, TwilioTimeout, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.core.record import Login
from smschannel.twilio.limits import Gate
from tests.unit.virtual_time import now, virtually

ACCOUNT, ANOTHER = "AC1", "AC2"
MEMORY = 450.0
POOL = 16
"""So many calls of logins that Twilio never accepted are made at once, in all."""


def login(word: str = "right", sid: str = ACCOUNT) -> Login:
    return Login(sid=sid, token=SecretStr(word))


OWNER, STRANGER = login(), login("wrong")
REFUSED = Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")
SUSPENDED = Refused(Reason.AccountSuspended, "The Twilio account is suspended.")
DOWN = TwilioUnavailable("Twilio answers HTTP 503.")
SILENT = TwilioTimeout("Twilio does not answer (TimeoutError).")


class Twilio:
    """Calls through a gate, each of `seconds`; how many were made, and how many at once at most."""

    def __init__(self, concurrency: int = 2) -> None:
        self.gate = Gate(concurrency=concurrency, refusal_memory=MEMORY, clock=now)
        self.made = 0
        self.at_once = 0
        self.most_at_once = 0

    async def call(
        self, who: Login = OWNER, account: str = ACCOUNT, *, seconds: float = 1, ends: Exception | None = None
    ) -> float:
        """When it ended."""
        async with self.gate.call(who, account):
            self.made += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.at_once -= 1
            if ends:
                raise ends
        return now()

    async def open(self, who: Login = OWNER, account: str = ACCOUNT) -> None:
        """A call that takes no time: Twilio accepts the login."""
        await self.call(who, account, seconds=0)

    async def closed(self, who: Login, ends: Exception, account: str = ACCOUNT) -> None:
        """A call that takes no time and ends with an error."""
        with pytest.raises(type(ends)):
            await self.call(who, account, seconds=0, ends=ends)


async def outcomes(*calls: Awaitable[float]) -> list[float | type]:
    """When each ended, or how it failed."""
    ended = await asyncio.gather(*calls, return_exceptions=True)
    return [type(each) if isinstance(each, BaseException) else round(each, 3) for each in ended]


# Limits


@virtually
async def test_a_login_that_was_accepted_has_so_many_calls_at_once() -> None:
    twilio = Twilio(concurrency=2)
    await twilio.open()
    assert await outcomes(*(twilio.call() for _ in range(5))) == [1, 1, 2, 2, 3]
    assert twilio.most_at_once == 2


@virtually
async def test_a_login_that_was_never_accepted_has_one_call_and_the_others_go_on_once_it_is() -> None:
    """Those who wait are not kept in the queue of strangers: after the first answer they share the login's limit."""
    twilio = Twilio(concurrency=2)
    assert await outcomes(*(twilio.call() for _ in range(6))) == [1, 2, 2, 3, 3, 4]


@virtually
async def test_limits_are_each_logins_own() -> None:
    """Two keys of one account, and one login at two accounts: nobody waits for a neighbour."""
    twilio = Twilio(concurrency=1)
    doors = [(OWNER, ACCOUNT), (login("key", "SK1"), ACCOUNT), (OWNER, ANOTHER)]
    for who, account in doors:
        await twilio.open(who, account)
    assert await outcomes(*(twilio.call(who, account) for who, account in doors)) == [1, 1, 1]


@virtually
async def test_who_was_accepted_does_not_wait_for_strangers_at_the_same_account() -> None:
    """A stranger's call that takes long holds the account's one place for guesses, and that is all."""
    twilio = Twilio()
    await twilio.open()
    stranger = asyncio.ensure_future(twilio.call(STRANGER, seconds=15))
    await asyncio.sleep(0)
    assert await twilio.call() == 1
    assert twilio.at_once == 1, "the stranger's is still under way"
    await stranger


@virtually
async def test_a_stranger_stays_one_when_the_neighbour_is_accepted() -> None:
    """Both waited for the account's one place: only who was accepted leaves it for the login's own places."""
    twilio = Twilio(concurrency=2)
    ended = await outcomes(
        twilio.call(OWNER), twilio.call(STRANGER, ends=REFUSED), twilio.call(OWNER), twilio.call(STRANGER)
    )
    assert ended == [1, Refused, 3, Refused], "the second of the owner's had the stranger before it in the line"
    assert twilio.made == 3, "the stranger's second call is answered with what the first brought"


@virtually
async def test_all_who_were_never_accepted_share_a_small_pool() -> None:
    twilio = Twilio()
    accounts = [f"AC{number}" for number in range(POOL + 4)]
    ended = await outcomes(*(twilio.call(login(sid=each), each) for each in accounts))
    assert ended == [1] * POOL + [2] * 4
    assert twilio.most_at_once == POOL


@virtually
async def test_an_account_takes_one_place_in_the_pool_however_many_guess_at_it() -> None:
    """A hundred tokens for one account whose calls hang: another account's first call does not wait."""
    twilio = Twilio()
    guesses = [asyncio.ensure_future(twilio.call(login(str(number)), seconds=15)) for number in range(100)]
    await asyncio.sleep(0)
    assert await twilio.call(login(sid=ANOTHER), ANOTHER) == 1
    for guess in guesses:
        guess.cancel()
    await asyncio.wait(guesses)


@virtually
async def test_a_full_pool_is_nothing_to_who_was_accepted() -> None:
    twilio = Twilio()
    await twilio.open()
    guesses = [asyncio.ensure_future(twilio.call(login(sid=f"X{n}"), f"X{n}", seconds=15)) for n in range(2 * POOL)]
    await asyncio.sleep(0)
    assert await twilio.call() == 1
    assert twilio.at_once == POOL
    await asyncio.wait(guesses)


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (TwilioThrottled("429", 1), "a 429 may be for the account's owner: it says nothing about this login"),
        (DOWN, "nobody looked at the login"),
        (NotFound("404"), "an account that the login does not reach is answered the same way"),
        (ValueError(), "a mistake of ours says nothing about the login"),
    ],
)
def test_what_does_not_make_a_login_an_accepted_one(ends: Exception, reason: str) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.closed(OWNER, ends)
        await asyncio.sleep(10)
        assert await outcomes(*(twilio.call(ends=DOWN) for _ in range(3))) == [TwilioUnavailable] * 3
        assert twilio.most_at_once == 1, reason

    story()


@pytest.mark.parametrize("reason", [Reason.NumberLacksSms, Reason.WebhookRefused])
def test_a_refusal_of_what_was_asked_accepts_the_login_and_is_not_remembered(reason: Reason) -> None:
    """Twilio looks at the login first: what it refuses later is about one number, not about who asks."""

    @virtually
    async def story() -> None:
        twilio = Twilio(concurrency=3)
        await twilio.closed(OWNER, Refused(reason, "no"))
        assert await outcomes(*(twilio.call() for _ in range(3))) == [1, 1, 1]

    story()


# Refusals


@pytest.mark.parametrize("refusal", [REFUSED, SUSPENDED])
def test_a_refused_login_is_not_tried_again_for_a_while(refusal: Refused) -> None:
    """Asking meanwhile makes no call, repeats reason and message, and does not make the while longer."""

    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.closed(OWNER, refusal)
        for _ in range(3):
            with pytest.raises(Refused) as raised:
                await twilio.call()
            assert (raised.value.reason, str(raised.value)) == (refusal.reason, str(refusal))
            await asyncio.sleep(MEMORY / 3 + 0.001)
        assert twilio.made == 1
        await twilio.open()

    story()


@virtually
async def test_a_refusal_is_one_logins_at_one_account() -> None:
    """Who has the account's SID and a wrong token shuts no door but their own."""
    twilio = Twilio()
    await twilio.closed(STRANGER, REFUSED)
    await twilio.open(OWNER)
    await twilio.closed(STRANGER, REFUSED)
    await twilio.open(STRANGER, ANOTHER)
    await twilio.open(login("wrong", "SK1"))
    assert twilio.made == 4


@virtually
async def test_all_who_wait_with_a_login_learn_of_its_refusal_without_a_call_of_their_own() -> None:
    twilio = Twilio()
    assert await outcomes(*(twilio.call(ends=REFUSED) for _ in range(20))) == [Refused] * 20
    assert twilio.made == 1
    assert now() == 1


@virtually
async def test_a_forgotten_refusal_is_tried_at_once() -> None:
    twilio = Twilio()
    for who in (OWNER, STRANGER):
        await twilio.closed(who, REFUSED)
    twilio.gate.forget_refusal(OWNER, ACCOUNT)
    await twilio.open(OWNER)
    await twilio.closed(STRANGER, REFUSED)
    assert twilio.made == 3, "the stranger's is not forgotten with it"
    twilio.gate.forget_refusal(login("never seen"), ACCOUNT)


@virtually
async def test_who_was_accepted_and_is_refused_begins_anew() -> None:
    """A revoked token is a guess like any other: one call at a time, until Twilio takes it again."""
    twilio = Twilio()
    await twilio.open()
    await twilio.closed(OWNER, REFUSED)
    await asyncio.sleep(MEMORY)
    twilio.most_at_once = 0
    await outcomes(*(twilio.call(ends=DOWN) for _ in range(3)))
    assert twilio.most_at_once == 1


@virtually
async def test_twilios_last_word_counts() -> None:
    """Where a token was made a moment ago, one of Twilio's machines may refuse it and the next one take it."""
    twilio = Twilio()
    await twilio.open()
    ended = await outcomes(twilio.call(ends=REFUSED, seconds=1), twilio.call(seconds=2))
    assert ended == [Refused, 2]
    assert await twilio.call() == 3


# Pauses


@pytest.mark.parametrize(
    ("retry_after", "pause", "reason"),
    [
        (30.0, 30.0, "as long as Twilio says"),
        (None, 1.0, "a second where it does not say"),
        (0.0, 1.0, "none at all would be no pause"),
    ],
)
def test_a_429_is_a_pause(retry_after: float | None, pause: float, reason: str) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.open()
        await twilio.closed(OWNER, TwilioThrottled("429", retry_after))
        await asyncio.sleep(pause * 0.75)
        with pytest.raises(TwilioThrottled, match=r"^429$") as raised:  # other words would be another status each time
            await twilio.call()
        assert raised.value.retry_after == pytest.approx(pause / 4), "what is left of it"
        assert twilio.made == 2, "no call was made"
        await asyncio.sleep(pause / 4)
        await twilio.open()

    story()


@virtually
async def test_a_pause_is_one_logins() -> None:
    """Twilio's limit is the account's, but a stranger must not be able to use it up for the owner."""
    twilio = Twilio()
    await twilio.open()
    await twilio.closed(STRANGER, TwilioThrottled("429", 900))
    await twilio.open()
    await twilio.open(STRANGER, ANOTHER)


@virtually
async def test_who_waits_for_a_place_learns_of_the_pause_at_once() -> None:
    """Their workers have other things to do; and no call is made that Twilio would refuse again."""
    twilio = Twilio(concurrency=2)
    await twilio.open()
    throttled = TwilioThrottled("429", 30)
    assert await outcomes(*(twilio.call(ends=throttled) for _ in range(20))) == [TwilioThrottled] * 20
    assert now() == 1
    assert twilio.made == 1 + 2


@virtually
async def test_a_pause_is_not_cut_short_by_a_429_that_names_none() -> None:
    """Calls that were under way together are refused together, and not all of Twilio's answers say for how long."""
    twilio = Twilio(concurrency=2)
    await twilio.open()
    await outcomes(twilio.call(ends=TwilioThrottled("429", 30)), twilio.call(ends=TwilioThrottled("429")))
    await asyncio.sleep(20)
    with pytest.raises(TwilioThrottled):
        await twilio.call()
    assert twilio.made == 1 + 2


@virtually
async def test_a_pause_does_not_make_a_stranger_of_who_was_accepted() -> None:
    twilio = Twilio(concurrency=2)
    await twilio.open()
    await twilio.closed(OWNER, TwilioThrottled("429", 5))
    await asyncio.sleep(5)
    assert await outcomes(twilio.call(), twilio.call()) == [6, 6]


# Silence


@virtually
async def test_two_calls_in_a_row_that_hang_spare_the_others_their_time_out() -> None:
    """A thousand deletions, say: they are told at once, for as long as the last one hung."""
    twilio = Twilio(concurrency=1)
    await twilio.open()
    many = [twilio.call(seconds=15, ends=SILENT) for _ in range(1000)]
    assert await outcomes(*many) == [TwilioTimeout] * 1000
    assert (now(), twilio.made) == (30, 1 + 2), "one alone may have been an accident"
    await asyncio.sleep(14)
    assert await outcomes(twilio.call(), twilio.call(STRANGER)) == [TwilioTimeout, 45], "it is one login's"
    await twilio.closed(OWNER, SILENT)
    assert twilio.made == 1 + 2 + 2, "then it is asked again"


@pytest.mark.parametrize("ends", [None, DOWN, NotFound("20404"), REFUSED, TwilioThrottled("429")])
def test_whatever_it_answers_is_no_silence(ends: Exception | None) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await outcomes(twilio.call(seconds=15, ends=SILENT))
        await outcomes(twilio.call(ends=ends))
        twilio.gate.forget_refusal(OWNER, ACCOUNT)
        await asyncio.sleep(60)
        await outcomes(twilio.call(seconds=15, ends=SILENT))
        made = twilio.made
        await outcomes(twilio.call())
        assert twilio.made == made + 1

    story()


# Callers that go away, and errors


@virtually
async def test_who_gives_up_waiting_leaves_the_place_to_the_next() -> None:
    """In the line for guesses and in the line of an accepted login."""
    for accepted in (False, True):
        twilio = Twilio(concurrency=1)
        if accepted:
            await twilio.open()
        began = now()
        first, second, third = (asyncio.ensure_future(twilio.call()) for _ in range(3))
        await asyncio.sleep(0.5)
        second.cancel()
        assert await first == began + 1
        assert await third == began + 2
        assert second.cancelled()


@virtually
async def test_who_gives_up_in_the_moment_of_the_turn_leaves_it_to_the_next() -> None:
    """Woken and cancelled before it ran: the place must not be lost."""
    twilio = Twilio(concurrency=1)
    await twilio.open()
    first, second, third = (asyncio.ensure_future(twilio.call()) for _ in range(3))
    first.add_done_callback(lambda _: second.cancel())
    assert await third == 2
    assert second.cancelled()


@pytest.mark.parametrize("accepted", [False, True], ids=["a guess", "an accepted login"])
def test_a_call_that_is_cancelled_or_fails_gives_its_place_back(accepted: bool) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio(concurrency=1)
        if accepted:
            await twilio.open()
        for ends in (DOWN, ValueError()):
            await twilio.closed(OWNER, ends)
        under_way = asyncio.ensure_future(twilio.call(seconds=1000))
        await asyncio.sleep(1)
        under_way.cancel()
        assert await twilio.call() == 2

    story()


@virtually
async def test_a_cancelled_call_accepts_nobody() -> None:
    twilio = Twilio()
    cancelled = asyncio.ensure_future(twilio.call())
    await asyncio.sleep(0.5)
    cancelled.cancel()
    await outcomes(*(twilio.call(ends=DOWN) for _ in range(3)))
    assert twilio.most_at_once == 1


@virtually
async def test_nothing_is_kept_of_doors_that_nobody_stands_at() -> None:
    """Account SIDs are whatever somebody writes into a channel: places are made when needed, and go afterwards."""
    twilio = Twilio()
    for number in range(50):
        await twilio.open(login(str(number)), f"AC{number}")
        await twilio.open(login(str(number)), f"AC{number}")
    gc.collect()
    assert len(twilio.gate._slots) == 0


@virtually
async def test_a_remembered_refusal_keeps_nothing_of_the_call_that_brought_it() -> None:
    """An exception holds on to every frame that it passed: the login in plain text, Twilio's answer, the channel."""
    twilio = Twilio()

    channels: weakref.WeakSet[asyncio.Event] = weakref.WeakSet()

    async def turn() -> None:
        channel = asyncio.Event()
        channels.add(channel)
        await twilio.call(seconds=0, ends=Refused(Reason.AuthenticationFailed, "no"))

    with pytest.raises(Refused):
        await turn()
    gc.collect()
    assert not channels


@virtually
async def test_no_error_repeats_the_token() -> None:
    twilio = Twilio()
    await twilio.closed(login("s3cr3t"), REFUSED)
    with pytest.raises(Refused) as raised:
        await twilio.call(login("s3cr3t"))
    assert "s3cr3t" not in repr(raised.value)
    assert "s3cr3t" not in repr(vars(twilio.gate))
