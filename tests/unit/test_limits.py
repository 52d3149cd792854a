"""Test the limits on calls to Twilio: each credential has its own, and circuit breakers spare callers a timeout."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import weakref
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

import pytest
from pydantic import SecretStr

from smschannel.api.errors import NotFound, Refused, SuspectedRefusal, TwilioThrottled, TwilioTimeout, TwilioUnavailable
from smschannel.api.reasons import Reason
from smschannel.core.record import Login
from smschannel.twilio.limits import TENANT, Limiter, Origin
from tests.unit.virtual_time import now, virtually

ACCOUNT, ANOTHER = "AC1", "AC2"
MEMORY, CONFIRM = 450.0, 60.0
POOL = 16
"""How many calls with unverified credentials are in flight at a time, in all."""


def login(word: str = "right", sid: str = ACCOUNT) -> Login:
    return Login(sid=sid, token=SecretStr(word))


OWNER, GUESS = login(), login("wrong")
REFUSED = Refused(Reason.AuthenticationFailed, "Twilio refuses the credentials.")
SUSPENDED = Refused(Reason.AccountSuspended, "The Twilio account is suspended.")
DOWN = TwilioUnavailable("Twilio answers HTTP 503.")
TIMEOUT = TwilioTimeout("Twilio does not answer (TimeoutError).")


class Twilio:
    """A Twilio behind a limiter. Counts the calls that are made, in flight, and most in flight."""

    def __init__(self, concurrency: int = 2) -> None:
        self.limiter = Limiter(concurrency=concurrency, refusal_memory=MEMORY, confirm_after=CONFIRM, clock=now)
        self.made = 0
        self.in_flight = 0
        self.most_in_flight = 0

    async def call(
        self,
        login: Login = OWNER,
        account: str = ACCOUNT,
        *,
        seconds: float = 1,
        ends: Exception | None = None,
        origin: Origin = "api",
    ) -> float:
        """Make a call of `seconds` that ends with the error, if any. Return when it ended."""
        async with self.limiter.call(login, account, origin=origin):
            self.made += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.in_flight -= 1
            if ends:
                raise ends
        return now()

    async def verify(self, login: Login = OWNER, account: str = ACCOUNT) -> None:
        """Make a call that succeeds at once."""
        await self.call(login, account, seconds=0)

    async def fail(self, login: Login, ends: Exception, account: str = ACCOUNT) -> None:
        """Make a call that ends with an error at once."""
        with pytest.raises(type(ends)):
            await self.call(login, account, seconds=0, ends=ends)

    async def suspect(self, ends: Exception) -> SuspectedRefusal:
        """Make a call that Twilio refuses, and that is only suspected; return the error."""
        with pytest.raises(SuspectedRefusal) as raised:
            await self.call(seconds=0, ends=ends)
        return raised.value

    async def revoke(self) -> None:
        """Let Twilio refuse a verified credential until that is confirmed."""
        await self.suspect(REFUSED)
        await asyncio.sleep(CONFIRM)
        await self.fail(OWNER, REFUSED)


async def outcomes(*calls: Awaitable[float]) -> list[float | type]:
    """Return when each call ended, or the type of its error."""
    ended = await asyncio.gather(*calls, return_exceptions=True)
    return [type(each) if isinstance(each, BaseException) else round(each, 3) for each in ended]


# Limits


@virtually
async def test_verified_credential_has_as_many_calls_in_flight_as_configured() -> None:
    twilio = Twilio(concurrency=2)
    await twilio.verify()
    assert await outcomes(*(twilio.call() for _ in range(5))) == [1, 1, 2, 2, 3]
    assert twilio.most_in_flight == 2


@virtually
async def test_first_answer_verifies_a_credential_and_frees_the_callers_that_wait() -> None:
    """They do not wait for unverified slots any more: from the first answer on the credential has its own limit."""
    twilio = Twilio(concurrency=2)
    assert await outcomes(*(twilio.call() for _ in range(6))) == [1, 2, 2, 3, 3, 4]


@virtually
async def test_each_credential_has_limits_of_its_own() -> None:
    """Two keys of one account, and one login at two accounts: none waits for another."""
    twilio = Twilio(concurrency=1)
    credentials = [(OWNER, ACCOUNT), (login("key", "SK1"), ACCOUNT), (OWNER, ANOTHER)]
    for each, account in credentials:
        await twilio.verify(each, account)
    assert await outcomes(*(twilio.call(each, account) for each, account in credentials)) == [1, 1, 1]


@virtually
async def test_verified_credential_does_not_wait_for_unverified_ones_of_its_account() -> None:
    """A guess that takes long occupies the account's one unverified slot, and nothing else."""
    twilio = Twilio()
    await twilio.verify()
    guess = asyncio.ensure_future(twilio.call(GUESS, seconds=15))
    await asyncio.sleep(0)
    assert await twilio.call() == 1
    assert twilio.in_flight == 1, "the guess is still in flight"
    await guess


@virtually
async def test_credential_stays_unverified_when_another_of_the_account_is_verified() -> None:
    """Both waited for the account's one unverified slot: only the verified credential leaves it for its own slots."""
    twilio = Twilio(concurrency=2)
    ended = await outcomes(twilio.call(OWNER), twilio.call(GUESS, ends=REFUSED), twilio.call(OWNER), twilio.call(GUESS))
    assert ended == [1, Refused, 3, Refused], "the owner's second call waited for the guess"
    assert twilio.made == 3, "the second guess fails with the result of the first"


@virtually
async def test_unverified_credentials_share_a_small_pool() -> None:
    twilio = Twilio()
    accounts = [f"AC{number}" for number in range(POOL + 4)]
    ended = await outcomes(*(twilio.call(login(sid=each), each) for each in accounts))
    assert ended == [1] * POOL + [2] * 4
    assert twilio.most_in_flight == POOL


@virtually
async def test_account_has_one_unverified_call_however_many_tokens_are_guessed() -> None:
    """A hundred tokens for an account whose calls hang: another account's first call does not wait."""
    twilio = Twilio()
    guesses = [asyncio.ensure_future(twilio.call(login(str(number)), seconds=15)) for number in range(100)]
    await asyncio.sleep(0)
    assert await twilio.call(login(sid=ANOTHER), ANOTHER) == 1
    for guess in guesses:
        guess.cancel()
    await asyncio.wait(guesses)


@virtually
async def test_full_pool_does_not_delay_verified_credentials() -> None:
    twilio = Twilio()
    await twilio.verify()
    guesses = [asyncio.ensure_future(twilio.call(login(sid=f"X{n}"), f"X{n}", seconds=15)) for n in range(2 * POOL)]
    await asyncio.sleep(0)
    assert await twilio.call() == 1
    assert twilio.in_flight == POOL
    await asyncio.wait(guesses)


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (
            TwilioThrottled("429", 1),
            "a 429 may be the fault of the account's owner: it does not depend on this credential",
        ),
        (DOWN, "Twilio did not check the credential"),
        (NotFound("404"), "an account that the credential cannot see is answered the same way"),
        (ValueError(), "a bug of ours does not depend on the credential"),
    ],
)
def test_result_that_does_not_verify_a_credential(ends: Exception, reason: str) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.fail(OWNER, ends)
        await asyncio.sleep(10)
        assert await outcomes(*(twilio.call(ends=DOWN) for _ in range(3))) == [TwilioUnavailable] * 3
        assert twilio.most_in_flight == 1, reason

    story()


@pytest.mark.parametrize("reason", [Reason.NumberLacksSms, Reason.WebhookRefused])
def test_refusal_about_a_number_verifies_the_credential_and_is_not_cached(reason: Reason) -> None:
    """Twilio checks the credential first: what it refuses after that is about one number."""

    @virtually
    async def story() -> None:
        twilio = Twilio(concurrency=3)
        await twilio.fail(OWNER, Refused(reason, "no"))
        assert await outcomes(*(twilio.call() for _ in range(3))) == [1, 1, 1]

    story()


# Tenants


async def of(tenant: str, call: Callable[[], Awaitable[float]]) -> float:
    """Make a call for a tenant."""
    TENANT.set(tenant)
    return await call()


def calls_of(twilio: Twilio, tenant: str, count: int, seconds: float = 1) -> list[asyncio.Task[float]]:
    """Make unverified calls for a tenant, each with an account of its own."""

    def one(number: int) -> asyncio.Task[float]:
        sid = f"AC-{tenant}-{number}"
        return asyncio.create_task(of(tenant, lambda: twilio.call(login("new", sid), sid, seconds=seconds)))

    return [one(number) for number in range(count)]


@virtually
async def test_tenant_that_fills_the_pool_does_not_delay_anothers_first_call() -> None:
    """2,000 invented accounts, whose calls take long, and one new channel of another tenant."""
    twilio = Twilio()
    flood = calls_of(twilio, "a", 2000, seconds=15)
    await asyncio.sleep(0.1)
    assert twilio.in_flight == 12, "three quarters"
    [new] = calls_of(twilio, "b", 1)
    assert await new == 1.1
    for each in flood:
        each.cancel()
    await asyncio.wait(flood)
    assert twilio.in_flight == 0
    assert len(await asyncio.gather(*calls_of(twilio, "a", 12))) == 12, "no slot was lost"


@virtually
async def test_tenants_that_wait_take_turns() -> None:
    twilio = Twilio()
    flood = calls_of(twilio, "a", 160) + calls_of(twilio, "b", 160)
    await asyncio.sleep(0.5)
    later = calls_of(twilio, "c", 8)
    await asyncio.gather(*later)
    assert now() < 5
    assert twilio.most_in_flight <= POOL
    await asyncio.gather(*flood)
    assert now() < 25


@virtually
async def test_tenant_that_names_anothers_account_does_not_delay_its_first_call() -> None:
    """The new channel's own tenant has made no call with this account yet."""
    twilio = Twilio()
    guesses = [
        asyncio.create_task(of("a", lambda n=n: twilio.call(login(f"guess {n}"), seconds=15)))  # type: ignore[misc]
        for n in range(50)
    ]
    await asyncio.sleep(0.1)
    assert await asyncio.create_task(of("b", lambda: twilio.call(OWNER))) == 1.1
    for each in guesses:
        each.cancel()
    await asyncio.wait(guesses)


@virtually
async def test_cancelled_callers_leave_shared_slots_to_the_next() -> None:
    """Whether they wait, were just given a slot, or have one."""
    for moment in (0.5, 1.0, 1.5):
        twilio = Twilio()
        began = now()
        calls = calls_of(twilio, "a", 30)
        await asyncio.sleep(moment)
        for each in calls[::2]:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert twilio.in_flight == 0
        pool = twilio.limiter._unverified
        assert (pool._free, dict(pool._taken), dict(pool._waiting)) == (POOL, {}, {})
        assert now() - began < 5


# Refusals


@pytest.mark.parametrize("refusal", [REFUSED, SUSPENDED])
def test_refused_credential_is_not_tried_again_for_a_while(refusal: Refused) -> None:
    """Calls meanwhile fail immediately, with the same reason and message, and do not extend it."""

    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.fail(OWNER, refusal)
        for _ in range(3):
            with pytest.raises(Refused) as raised:
                await twilio.call()
            assert (raised.value.reason, str(raised.value)) == (refusal.reason, str(refusal))
            await asyncio.sleep(MEMORY / 3 + 0.001)
        assert twilio.made == 1
        await twilio.verify()

    story()


@virtually
async def test_refusal_is_kept_for_one_credential_at_one_account() -> None:
    """A wrong token for an account does not block the account's owner."""
    twilio = Twilio()
    await twilio.fail(GUESS, REFUSED)
    await twilio.verify(OWNER)
    await twilio.fail(GUESS, REFUSED)
    await twilio.verify(GUESS, ANOTHER)
    await twilio.verify(login("wrong", "SK1"))
    assert twilio.made == 4


@virtually
async def test_callers_that_wait_fail_with_the_refusal_without_a_call() -> None:
    twilio = Twilio()
    assert await outcomes(*(twilio.call(ends=REFUSED) for _ in range(20))) == [Refused] * 20
    assert twilio.made == 1
    assert now() == 1


@virtually
async def test_forgotten_refusal_is_tried_again_at_once() -> None:
    twilio = Twilio()
    for each in (OWNER, GUESS):
        await twilio.fail(each, REFUSED)
    twilio.limiter.forget_refusal(OWNER, ACCOUNT)
    await twilio.verify(OWNER)
    await twilio.fail(GUESS, REFUSED)
    assert twilio.made == 3, "the guess is still refused"
    twilio.limiter.forget_refusal(login("unused"), ACCOUNT)


@virtually
async def test_refused_credential_is_unverified_again() -> None:
    """A revoked token is a guess like any other: one call at a time, until Twilio accepts it again."""
    twilio = Twilio()
    await twilio.verify()
    await twilio.revoke()
    await asyncio.sleep(MEMORY)
    twilio.most_in_flight = 0
    await outcomes(*(twilio.call(ends=DOWN) for _ in range(3)))
    assert twilio.most_in_flight == 1


@virtually
async def test_last_answer_of_twilio_counts() -> None:
    """One of Twilio's machines may refuse a new token that the next one accepts already."""
    twilio = Twilio()
    await twilio.verify()
    await twilio.suspect(REFUSED)
    await asyncio.sleep(CONFIRM)
    ended = await outcomes(twilio.call(ends=REFUSED, seconds=1), twilio.call(seconds=2))
    assert ended == [Refused, CONFIRM + 2]
    assert await twilio.call() == CONFIRM + 3


# Refusals of verified credentials are confirmed first


@pytest.mark.parametrize("refusal", [REFUSED, SUSPENDED])
def test_first_refusal_of_a_verified_credential_is_only_suspected(refusal: Refused) -> None:
    """Other callers are not judged from it: they ask Twilio, and a success ends the suspicion."""

    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.verify()
        suspected = await twilio.suspect(refusal)
        assert suspected.retry_after == CONFIRM
        assert str(refusal) in str(suspected)
        await twilio.verify()
        await asyncio.sleep(10 * CONFIRM)
        assert (await twilio.suspect(refusal)).retry_after == CONFIRM, "the success in between began it again"

    story()


@pytest.mark.parametrize("refusal", [REFUSED, SUSPENDED])
def test_refusal_is_confirmed_by_a_later_one(refusal: Refused) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.verify()
        await twilio.suspect(refusal)
        await asyncio.sleep(CONFIRM / 2)
        assert (await twilio.suspect(refusal)).retry_after == CONFIRM / 2, "two refusals in a row may be one fault"
        await asyncio.sleep(CONFIRM / 2)
        await twilio.fail(OWNER, refusal)
        made = twilio.made
        await twilio.fail(OWNER, refusal)
        assert twilio.made == made, "now it is remembered"

    story()


@virtually
async def test_refusal_counts_at_once_if_nothing_confirms_it() -> None:
    """As for a command line, which has no later."""
    twilio = Twilio()
    twilio.limiter = Limiter(concurrency=2, refusal_memory=MEMORY, confirm_after=0, clock=now)
    twilio.limiter.trust(OWNER, ACCOUNT)
    await twilio.fail(OWNER, REFUSED)


@virtually
async def test_burst_of_refusals_is_only_suspected() -> None:
    twilio = Twilio(concurrency=4)
    await twilio.verify()
    assert await outcomes(*(twilio.call(ends=REFUSED) for _ in range(20))) == [SuspectedRefusal] * 20
    assert await twilio.call()


@virtually
async def test_refusal_of_a_recorded_credential_is_suspected_after_a_restart_too() -> None:
    twilio = Twilio()
    twilio.limiter.trust(OWNER, ACCOUNT)
    await twilio.suspect(REFUSED)
    await twilio.fail(GUESS, REFUSED)


@virtually
async def test_record_does_not_verify_what_twilio_refuses() -> None:
    """Every reconcile names the recorded login; a confirmed refusal counts until Twilio accepts it again."""
    twilio = Twilio()
    await twilio.verify()
    await twilio.revoke()
    twilio.limiter.trust(OWNER, ACCOUNT)
    await twilio.fail(OWNER, REFUSED)
    twilio.limiter.forget_refusal(OWNER, ACCOUNT)
    twilio.limiter.trust(OWNER, ACCOUNT)
    await twilio.fail(OWNER, REFUSED)
    await asyncio.sleep(MEMORY)
    twilio.limiter.trust(OWNER, ACCOUNT)
    await twilio.fail(OWNER, REFUSED)
    await asyncio.sleep(MEMORY)
    await twilio.verify()
    await twilio.suspect(REFUSED)


@virtually
async def test_suspicion_is_kept_for_one_credential_at_one_account_and_api() -> None:
    twilio = Twilio()
    await twilio.verify()
    await twilio.verify(OWNER, ANOTHER)
    await twilio.suspect(REFUSED)
    await asyncio.sleep(CONFIRM)
    with pytest.raises(SuspectedRefusal):
        await twilio.call(OWNER, ANOTHER, ends=REFUSED)


@pytest.mark.parametrize("ends", [DOWN, TIMEOUT, NotFound("20404"), TwilioThrottled("429", 1)])
def test_answer_that_does_not_speak_of_the_credential_neither_confirms_nor_ends_a_suspicion(ends: Exception) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.verify()
        await twilio.suspect(REFUSED)
        await twilio.fail(OWNER, ends)
        await asyncio.sleep(CONFIRM)
        await twilio.fail(OWNER, REFUSED)

    story()


@virtually
async def test_refusal_younger_than_asked_is_not_forgotten() -> None:
    """Fifty channels that are applied at once with one wrong token cost one call."""
    twilio = Twilio()
    await twilio.fail(GUESS, REFUSED)
    await asyncio.sleep(4)
    twilio.limiter.forget_refusal(GUESS, ACCOUNT, older_than=5)
    await twilio.fail(GUESS, REFUSED)
    assert twilio.made == 1
    await asyncio.sleep(1)
    twilio.limiter.forget_refusal(GUESS, ACCOUNT, older_than=5)
    await twilio.fail(GUESS, REFUSED)
    assert twilio.made == 2


@virtually
async def test_refusal_and_pause_are_kept_for_one_api() -> None:
    """A restricted key may read numbers and not Messaging Services."""
    twilio = Twilio()
    await outcomes(twilio.call(seconds=0, ends=REFUSED, origin="messaging"))
    await twilio.verify()
    assert await outcomes(twilio.call(origin="messaging")) == [Refused]
    twilio.limiter.forget_refusal(OWNER, ACCOUNT)
    await outcomes(twilio.call(seconds=0, ends=TwilioThrottled("429", 30), origin="messaging"))
    await twilio.verify()
    assert await outcomes(twilio.call(origin="messaging")) == [TwilioThrottled]


# Pauses


@pytest.mark.parametrize(
    ("retry_after", "pause", "reason"),
    [
        (30.0, 30.0, "as long as Retry-After says"),
        (None, 1.0, "a second without Retry-After"),
        (0.0, 1.0, "none at all would be no pause"),
    ],
)
def test_429_pauses_the_credential(retry_after: float | None, pause: float, reason: str) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await twilio.verify()
        await twilio.fail(OWNER, TwilioThrottled("429", retry_after))
        await asyncio.sleep(pause * 0.75)
        with pytest.raises(
            TwilioThrottled, match=r"^429$"
        ) as raised:  # another message would be another status each time
            await twilio.call()
        assert raised.value.retry_after == pytest.approx(pause / 4), "the rest of the pause"
        assert twilio.made == 2, "no call was made"
        await asyncio.sleep(pause / 4)
        await twilio.verify()

    story()


@virtually
async def test_pause_is_kept_for_one_credential_at_one_account() -> None:
    """Twilio limits the account, but guesses must not be able to use the limit up for the owner."""
    twilio = Twilio()
    await twilio.verify()
    await twilio.fail(GUESS, TwilioThrottled("429", 900))
    await twilio.verify()
    await twilio.verify(GUESS, ANOTHER)


@virtually
async def test_callers_that_wait_fail_with_the_pause_at_once() -> None:
    """Their workers are needed elsewhere, and Twilio would refuse the calls again."""
    twilio = Twilio(concurrency=2)
    await twilio.verify()
    throttled = TwilioThrottled("429", 30)
    assert await outcomes(*(twilio.call(ends=throttled) for _ in range(20))) == [TwilioThrottled] * 20
    assert now() == 1
    assert twilio.made == 1 + 2


@virtually
async def test_pause_is_not_shortened_by_a_429_without_retry_after() -> None:
    """Calls in flight together are refused together, and not all answers have a Retry-After."""
    twilio = Twilio(concurrency=2)
    await twilio.verify()
    await outcomes(twilio.call(ends=TwilioThrottled("429", 30)), twilio.call(ends=TwilioThrottled("429")))
    await asyncio.sleep(20)
    with pytest.raises(TwilioThrottled):
        await twilio.call()
    assert twilio.made == 1 + 2


@virtually
async def test_credential_stays_verified_after_a_pause() -> None:
    twilio = Twilio(concurrency=2)
    await twilio.verify()
    await twilio.fail(OWNER, TwilioThrottled("429", 5))
    await asyncio.sleep(5)
    assert await outcomes(twilio.call(), twilio.call()) == [6, 6]


# The circuit breaker of a credential


@virtually
async def test_two_consecutive_timeouts_open_the_breaker_of_the_credential() -> None:
    """A thousand deletions, for example: they fail immediately, for as long as the last call hung."""
    twilio = Twilio(concurrency=1)
    await twilio.verify()
    await asyncio.sleep(1)
    many = [twilio.call(seconds=15, ends=TIMEOUT) for _ in range(1000)]
    assert await outcomes(*many) == [TwilioTimeout] * 1000
    assert (now(), twilio.made) == (16, 1 + 1), "those that waited for the slot have waited long enough"
    assert await outcomes(twilio.call(seconds=15, ends=TIMEOUT)) == [TwilioTimeout]
    assert (now(), twilio.made) == (31, 1 + 2), "a single timeout may be an accident"
    await asyncio.sleep(14)
    assert await outcomes(twilio.call(), twilio.call(GUESS)) == [TwilioTimeout, 46], (
        "it is the breaker of one credential"
    )
    await twilio.fail(OWNER, TIMEOUT)
    assert twilio.made == 1 + 2 + 2, "then calls are made again"


@pytest.mark.parametrize("ends", [None, DOWN, NotFound("20404"), REFUSED, TwilioThrottled("429")])
def test_any_answer_between_two_timeouts_resets_the_count(ends: Exception | None) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await outcomes(twilio.call(seconds=15, ends=TIMEOUT))
        await outcomes(twilio.call(ends=ends))
        twilio.limiter.forget_refusal(OWNER, ACCOUNT)
        await asyncio.sleep(60)
        await outcomes(twilio.call(seconds=15, ends=TIMEOUT))
        made = twilio.made
        await outcomes(twilio.call())
        assert twilio.made == made + 1

    story()


# The circuit breaker of an API


def account_sid(number: int) -> str:
    return f"AC{number}"


class Accounts:
    """Accounts whose reconciles call Twilio and retry with backoff, as the operator's do, with a worker each.

    Calls of accounts for which `hangs` is true time out after `hang` seconds; others take 50 ms.
    """

    def __init__(self, count: int, hang: float) -> None:
        self.twilio = Twilio(concurrency=4)
        self.hang = hang
        self.hangs: Callable[[int], bool] = lambda number: False
        self.longest = 0.0
        self.tasks = [asyncio.ensure_future(self._reconcile(number)) for number in range(count)]

    async def call(self, number: int, origin: Origin = "api") -> float:
        """Make a call. Return the seconds that it took; raise `TwilioTimeout` if it failed."""
        began, sid = now(), account_sid(number)
        seconds, ends = (self.hang, TIMEOUT) if self.hangs(number) else (0.05, None)
        await self.twilio.call(login(sid=sid), sid, seconds=seconds, ends=ends, origin=origin)
        return now() - began

    async def _reconcile(self, number: int) -> None:
        chance = random.Random(number)  # noqa: S311
        failures = 0
        await asyncio.sleep(chance.random())
        while True:
            began = now()
            try:
                await self.call(number)
                failures, at_least = 0, 60.0
            except TwilioTimeout as timeout:
                failures, at_least = failures + 1, timeout.retry_after or 0
            self.longest = max(self.longest, now() - began)
            await asyncio.sleep(max(at_least, chance.uniform(1, min(300, 2**failures))))

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


@pytest.mark.parametrize("restarted", [False, True], ids=["verified before", "the operator was restarted"])
@pytest.mark.parametrize("hang", [5, 15])
@pytest.mark.parametrize("count", [10, 100, 300, 1000, 2000])
def test_if_all_calls_hang_no_caller_waits_longer_than_one_timeout(count: int, hang: float, restarted: bool) -> None:
    """Deletions must end in time, however many accounts hang: not each may wait for its own timeout."""

    @virtually
    async def story() -> None:
        accounts = Accounts(count, hang)
        if not restarted:
            await asyncio.sleep(120)
        made = accounts.twilio.made
        accounts.hangs = lambda number: True
        began, accounts.longest = now(), 0.0
        await asyncio.sleep(hang + 1)
        for _ in range(40):
            await asyncio.sleep(7)
            before = now()
            with pytest.raises(TwilioTimeout) as raised:
                await accounts.call(7)
            assert now() - before <= hang + 0.001
            assert str(raised.value) == str(TIMEOUT)
            if now() == before:
                assert raised.value.retry_after, "it fails without a call"
        assert accounts.longest <= hang + 0.001, "no call ever waited longer, from the first second on"
        probes = accounts.twilio.made - made - count
        assert probes <= (now() - began) / hang + 2, "one call at a time, after at most one for each account"
        accounts.hangs = lambda number: False
        ended = now()
        for _ in range(int(2 * hang) + 2):
            with suppress(TwilioTimeout):
                await accounts.call(7)
                break
            await asyncio.sleep(1)
        assert now() - ended <= 2 * hang + 2, "the probe in flight still hangs, and the next one waits"
        await accounts.stop()

    story()


async def hang_together(twilio: Twilio, numbers: Iterable[int], seconds: float = 15) -> None:
    """Let calls of these accounts time out at the same time."""
    calls = (
        twilio.call(login(sid=account_sid(each)), account_sid(each), seconds=seconds, ends=TIMEOUT) for each in numbers
    )
    assert set(await outcomes(*calls)) == {TwilioTimeout}


@virtually
async def test_three_credentials_that_time_out_open_the_breaker_for_all() -> None:
    twilio = Twilio()
    await twilio.verify()
    await asyncio.sleep(1)
    await hang_together(twilio, [11, 12, 11])
    assert await twilio.call(seconds=0) == 16, "two credentials may hang on their own"
    await asyncio.sleep(1)
    await hang_together(twilio, [13, 14, 15])
    made = twilio.made
    with pytest.raises(TwilioTimeout, match=f"^{re.escape(str(TIMEOUT))}$") as raised:
        await twilio.call(login(sid="AC99"), "AC99")
    assert (twilio.made, raised.value.retry_after) == (made, 15), "as long as the last call hung"


@virtually
async def test_open_breaker_lets_one_probe_through_at_a_time() -> None:
    twilio = Twilio()
    await hang_together(twilio, range(3))
    await asyncio.sleep(15)
    made = twilio.made
    calls = [
        twilio.call(login(sid=account_sid(each)), account_sid(each), seconds=15, ends=TIMEOUT)
        for each in range(10, 110)
    ]
    probe, *others = [asyncio.ensure_future(each) for each in calls]
    await asyncio.wait(others, timeout=0.001)
    assert all(isinstance(each.exception(), TwilioTimeout) for each in others), "they fail immediately"
    assert {getattr(each.exception(), "retry_after", None) for each in others} == {15}, "when the probe may end"
    await asyncio.wait([probe])
    assert twilio.made == made + 1
    with pytest.raises(TwilioTimeout):
        await twilio.call(login(sid="AC1000"), "AC1000")
    await asyncio.sleep(15)
    assert twilio.made == made + 1, "the next probe waits as long as this one hung"
    assert await outcomes(twilio.call()) == [61], "its success closes the breaker"
    assert len(set(await outcomes(*(twilio.call(login(sid=f"X{each}"), f"X{each}") for each in range(5))))) == 1


@virtually
async def test_verified_credential_that_never_timed_out_probes_at_once() -> None:
    """In a quiet hour three hanging accounts are enough to open the breaker: it must not cost the others a minute."""
    twilio = Twilio()
    await twilio.verify()
    await asyncio.sleep(1)
    await hang_together(twilio, range(11, 31))
    assert await twilio.call(seconds=0) == now()
    await twilio.verify(login("key", "SK1"))
    assert now() < 100


@virtually
async def test_verified_credential_that_timed_out_itself_does_not_probe_at_once() -> None:
    twilio = Twilio()
    for each in range(11, 14):
        await twilio.verify(login(sid=account_sid(each)), account_sid(each))
    await asyncio.sleep(1)
    await hang_together(twilio, range(11, 14))
    assert await outcomes(twilio.call(login(sid="AC11"), "AC11")) == [TwilioTimeout]
    await asyncio.sleep(15)
    assert await twilio.call(login(sid="AC11"), "AC11") == 32


@virtually
async def test_cancelled_probe_leaves_the_probe_to_the_next() -> None:
    twilio = Twilio()
    await hang_together(twilio, range(3))
    await asyncio.sleep(15)
    probe = asyncio.ensure_future(twilio.call())
    await asyncio.sleep(0.5)
    probe.cancel()
    await asyncio.wait([probe])
    assert await twilio.call() == 31.5


@pytest.mark.parametrize("ends", [DOWN, NotFound("20404"), REFUSED, TwilioThrottled("429")])
def test_any_answer_closes_the_breaker_of_an_api(ends: Exception) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio()
        await hang_together(twilio, range(3))
        await asyncio.sleep(15)
        await twilio.fail(OWNER, ends)
        assert await outcomes(*(twilio.call(login(sid=f"X{each}"), f"X{each}") for each in range(5))) == [31] * 5

    story()


@virtually
async def test_each_api_has_a_breaker_of_its_own() -> None:
    twilio = Twilio()
    for each in range(3):
        await outcomes(twilio.call(login(str(each)), seconds=5, ends=TIMEOUT, origin="messaging"))
    assert await outcomes(twilio.call(origin="messaging"), twilio.call(origin="api")) == [TwilioTimeout, 16]


@virtually
async def test_callers_that_wait_for_a_slot_fail_when_the_breaker_opens() -> None:
    """After a restart all credentials are unverified: a thousand wait for sixteen slots."""
    twilio = Twilio()
    await hang_together(twilio, range(1000))
    assert (now(), twilio.made) == (15, POOL)


@virtually
async def test_caller_that_waits_goes_on_after_a_timeout_if_others_are_answered() -> None:
    """Its account hangs, perhaps: that is for the breaker of its credential to decide."""
    twilio = Twilio(concurrency=1)
    await twilio.verify()
    await asyncio.sleep(1)
    first = asyncio.ensure_future(twilio.call(seconds=15, ends=TIMEOUT))
    waiting = asyncio.ensure_future(twilio.call())
    await asyncio.sleep(14)
    await twilio.verify(login(sid=ANOTHER), ANOTHER)
    assert await outcomes(first, waiting) == [TwilioTimeout, 17]
    first = asyncio.ensure_future(twilio.call(seconds=15))
    waiting = asyncio.ensure_future(twilio.call())
    await asyncio.sleep(1)
    await outcomes(twilio.call(login(sid=ANOTHER), ANOTHER, seconds=5, ends=TIMEOUT))
    assert await outcomes(first, waiting) == [32, 33], "the first of them was answered, late as it was"


@virtually
async def test_no_caller_waits_for_a_slot_while_the_breaker_is_open() -> None:
    twilio = Twilio(concurrency=1)
    await twilio.verify()
    await asyncio.sleep(1)
    held = asyncio.ensure_future(twilio.call(seconds=15))  # began before the others hang, and holds the only slot
    await asyncio.sleep(1)
    await hang_together(twilio, range(11, 14), 5)
    assert await outcomes(twilio.call()) == [TwilioTimeout]
    assert now() == 7
    assert await held == 16


@pytest.mark.parametrize("restarted", [False, True], ids=["verified before", "the operator was restarted"])
def test_twenty_hanging_accounts_do_not_affect_healthy_ones(restarted: bool) -> None:
    """They time out at the same moments, and healthy accounts are answered meanwhile."""

    @virtually
    async def story() -> None:
        accounts = Accounts(10 + 20, 15)
        if not restarted:
            await asyncio.sleep(120)
        accounts.hangs = lambda number: number >= 10
        chance = random.Random(3)  # noqa: S311
        took = []
        for _ in range(2000):
            took.append(await accounts.call(chance.randrange(10)))
            await asyncio.sleep(chance.random())
        slow = [seconds for seconds in took if seconds > 0.06]
        assert len(slow) <= (10 if restarted else 0), "only a first call may wait for an unverified slot"
        assert max(took) < 15.06
        await accounts.stop()

    story()


@virtually
async def test_hostile_credentials_cannot_open_the_breaker_while_others_are_answered() -> None:
    """However many they are: no timeout counts whose call was in flight while the API answered."""
    twilio = Twilio()
    await twilio.verify()
    guesses = [
        asyncio.ensure_future(
            twilio.call(login(f"{each}", f"AC{each % 16}"), f"AC{each % 16}", seconds=15, ends=TIMEOUT)
        )
        for each in range(2, 500)
    ]
    for _ in range(60):
        await asyncio.sleep(10)
        await twilio.verify()
    for guess in guesses:
        guess.cancel()
    await asyncio.wait(guesses)


# Cancelled callers, and errors


@virtually
async def test_caller_cancelled_while_it_waits_leaves_the_slot_to_the_next() -> None:
    """For the unverified slot as for those of a verified credential."""
    for verified in (False, True):
        twilio = Twilio(concurrency=1)
        if verified:
            await twilio.verify()
        began = now()
        first, second, third = (asyncio.ensure_future(twilio.call()) for _ in range(3))
        await asyncio.sleep(0.5)
        second.cancel()
        assert await first == began + 1
        assert await third == began + 2
        assert second.cancelled()


@virtually
async def test_caller_cancelled_as_it_gets_the_slot_leaves_it_to_the_next() -> None:
    """It is woken, and cancelled before it runs: the slot must not be lost."""
    twilio = Twilio(concurrency=1)
    await twilio.verify()
    first, second, third = (asyncio.ensure_future(twilio.call()) for _ in range(3))
    first.add_done_callback(lambda _: second.cancel())
    assert await third == 2
    assert second.cancelled()


@pytest.mark.parametrize("verified", [False, True], ids=["unverified", "verified"])
def test_call_that_fails_or_is_cancelled_frees_its_slot(verified: bool) -> None:
    @virtually
    async def story() -> None:
        twilio = Twilio(concurrency=1)
        if verified:
            await twilio.verify()
        for ends in (DOWN, ValueError()):
            await twilio.fail(OWNER, ends)
        in_flight = asyncio.ensure_future(twilio.call(seconds=1000))
        await asyncio.sleep(1)
        in_flight.cancel()
        assert await twilio.call() == 2

    story()


@virtually
async def test_cancelled_call_verifies_nothing() -> None:
    twilio = Twilio()
    cancelled = asyncio.ensure_future(twilio.call())
    await asyncio.sleep(0.5)
    cancelled.cancel()
    await outcomes(*(twilio.call(ends=DOWN) for _ in range(3)))
    assert twilio.most_in_flight == 1


@virtually
async def test_unused_slots_are_discarded() -> None:
    """Account SIDs are whatever a user writes into a channel: slots are made when needed, and discarded then."""
    twilio = Twilio()
    for number in range(50):
        await twilio.verify(login(str(number)), f"AC{number}")
        await twilio.verify(login(str(number)), f"AC{number}")
    gc.collect()
    assert len(twilio.limiter._slots) == 0


@virtually
async def test_cached_refusal_keeps_nothing_of_its_call_alive() -> None:
    """An exception keeps every frame that it passed alive: the login in plain text, Twilio's answer, the channel."""
    twilio = Twilio()

    channels: weakref.WeakSet[asyncio.Event] = weakref.WeakSet()

    async def reconcile() -> None:
        channel = asyncio.Event()
        channels.add(channel)
        await twilio.call(seconds=0, ends=Refused(Reason.AuthenticationFailed, "no"))

    with pytest.raises(Refused):
        await reconcile()
    gc.collect()
    assert not channels


@virtually
async def test_no_error_contains_the_token() -> None:
    twilio = Twilio()
    await twilio.fail(login("s3cr3t"), REFUSED)
    with pytest.raises(Refused) as raised:
        await twilio.call(login("s3cr3t"))
    assert "s3cr3t" not in repr(raised.value)
    assert "s3cr3t" not in repr(vars(twilio.limiter))
