"""A small model of what users, Twilio's console, damage and crashes do to a few channels, run against the real thing.

Facts are compared whenever the system is at rest: the operator is dead, or has nothing left to do. In between, a number
only moves from where it was to where it belongs, and never without a record.
"""

from __future__ import annotations

import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from deploy.local.stack import ready_reason
from tests.faults.conftest import EVERYTHING
from tests.faults.rig import Case, Rig, World, before, webhook_of
from tests.twin.faults import Action, Match

Webhook = tuple[str, str]
"""SmsUrl and SmsMethod."""


class Cut(NamedTuple):
    """What happens at the operator's n-th call from now, before it takes effect or `after` it did.

    The operator is killed; or, beside another one, it may be `paused`: its call takes longer than all that the other
    one does meanwhile. Only calls to Kubernetes are: their preconditions protect from a late write, Twilio has none.
    """

    nth: int
    after: bool
    paused: bool


CHOICES = st.integers(0, 11)
DELETIONS = st.sampled_from(["Restore", "Clear", "Retain"])
DRIFTS = st.sampled_from(["Correct", "Report"])
CUTS = st.none() | st.builds(Cut, st.integers(1, 10), st.booleans(), st.booleans())
PAUSE_SECONDS = 1.5
QUICK = {
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "1",
    "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "2",
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "0.5",
    "SMSCHANNEL_DELETION_GRACE_SECONDS": "2",
}
BUDGET = settings(
    max_examples=10 if EVERYTHING else 4,
    stateful_step_count=30 if EVERYTHING else 15,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
BUDGET_OF_TWO = settings(BUDGET, max_examples=6 if EVERYTHING else 3, stateful_step_count=24 if EVERYTHING else 14)
SEED, SEED_OF_TWO = (11, 3) if EVERYTHING else (34, 6)
"""With these seeds even so few examples make use of every rule."""


@dataclass
class Channel:
    """What its user asked for. `gone` once it was deleted: it may hold numbers for a while.

    A channel that was deleted by force is restored as its records say: `policies` are theirs, by number.
    """

    case: Case
    number: str
    deletion: str
    drift: str
    uid: str = ""
    suspend: bool = False
    gone: bool = False
    policies: Mapping[str, str] = field(default_factory=dict)
    named: str = ""  # the number that its status is about
    configured: str = ""  # the same, if the status knows what it pointed at

    @property
    def ours(self) -> Webhook:
        return webhook_of(self.case.name), "POST"


class Claim(NamedTuple):
    """The record of a number: which channel holds it. `previous` is None if the number pointed at one of ours."""

    uid: str
    previous: Webhook | None


@dataclass
class Facts:
    """Which channels hold which numbers, where each number points, and what else the records say."""

    claims: dict[str, Claim] = field(default_factory=dict)
    webhooks: dict[str, Webhook] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


class Model(RuleBasedStateMachine):
    """Two accounts of two numbers each, and at most three channels at once. At first two, and the operator runs.

    Hypothesis repeats examples, so preconditions must not depend on timing, as what the records say when the operator
    dies does. A rule that cannot do anything still kills the operator.
    """

    rig: Rig  # see `on_rig`

    def __init__(self) -> None:
        super().__init__()
        self.channels: dict[str, Channel] = {}  # by uid
        self.accounts: list[Case] = []
        self.sids: dict[str, str] = {}
        self.known = Facts()
        self.damaged: dict[str, dict[str, str]] = {}  # numbers, and what their records contained
        self.edits: Counter[str] = Counter()
        self.up = True
        self.missed = 0  # acts since the operator died
        self.failed = False

    @initialize()
    def begin(self) -> None:
        self._prepare()

    def _prepare(self) -> None:
        self.accounts = self.rig.new_cases(2)
        for account in self.accounts:
            account.secret = f"twilio-{account.account['account_sid'].lower()}"
            self.rig.put_token(account)
        self.sids = {number: self.rig.stack.number(number)["sid"] for number in self._numbers()}
        self.known = Facts(webhooks={number: before(number) for number in self._numbers()})
        for account in self.accounts:
            case = Case(str(uuid.uuid4()), account.account, secret=account.secret)
            self._create(Channel(case, account.numbers[0], deletion="Restore", drift="Correct"))
        self._settle()

    # Users

    @precondition(lambda self: len(self._living()) < 3)
    @rule(choice=CHOICES, deletion=DELETIONS, drift=DRIFTS, cut=CUTS)
    def create(self, choice: int, deletion: str, drift: str, cut: Cut | None) -> None:
        account, number = self._unwanted(choice)
        case = Case(str(uuid.uuid4()), account.account, secret=account.secret)
        with self._acting(cut):
            self._create(Channel(case, number, deletion=deletion, drift=self._drift_policy(drift)))

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, number_choice=CHOICES, cut=CUTS)
    def change_number(self, choice: int, number_choice: int, cut: Cut | None) -> None:
        """Perhaps to one of another account, unless the token in the old one's record may be out of date."""
        channel, (account, number) = self._pick(choice), self._unwanted(number_choice)
        if channel.number in account.numbers or not (channel.suspend or self._has_old_token(channel)):
            self._give(channel, account, number)
        with self._acting(cut):
            self._apply(channel)

    @precondition(lambda self: len(self._living()) > 1)
    @rule(choice=CHOICES, cut=CUTS)
    def swap_numbers(self, choice: int, cut: Cut | None) -> None:
        """Two channels, or three in a ring: each gets the next one's number."""
        candidates = self._unsuspended()
        start, size = choice % max(1, len(candidates)), min(len(candidates), 2 + choice // 6)
        ring = [*candidates, *candidates][start : start + size]
        held = {number for number, claim in self.known.claims.items() if claim.uid in {each.uid for each in ring}}
        if self.damaged.keys() & {*held, *(each.number for each in ring)} or any(map(self._has_old_token, ring)):
            ring = []  # a damaged record breaks the ring, and timing decides where
        wanted = [(self._account_of(each.number), each.number) for each in ring]
        for channel, (account, number) in zip(ring, [*wanted[1:], *wanted[:1]], strict=True):
            self._give(channel, account, number)
        with self._acting(cut):
            for channel in ring:
                self._apply(channel)

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, cut=CUTS)
    def suspend_or_resume(self, choice: int, cut: Cut | None) -> None:
        channel = self._pick(choice)
        channel.suspend = not channel.suspend
        if self._has_damaged_ring():
            channel.suspend = True
        with self._acting(cut):
            self._apply(channel)

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, deletion=DELETIONS, drift=DRIFTS, cut=CUTS)
    def edit_policies(self, choice: int, deletion: str, drift: str, cut: Cut | None) -> None:
        channel = self._pick(choice)
        channel.deletion, channel.drift = deletion, self._drift_policy(drift)
        with self._acting(cut):
            self._apply(channel)

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, cut=CUTS)
    def delete(self, choice: int, cut: Cut | None) -> None:
        channel = self._pick(choice)
        channel.gone = True
        with self._acting(cut):
            self.rig.delete(channel.case)

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, number_choice=CHOICES, deletion=DELETIONS, cut=CUTS)
    def replace(self, choice: int, number_choice: int, deletion: str, cut: Cut | None) -> None:
        """Delete a channel by force, and create another one of the same name at once, perhaps with the same number.

        Its successor claims a number only after the operator has restored it from the record that is left.
        """
        channel = self._pick(choice)
        if self._has_old_token(channel):  # only the channel knows a newer one
            with self._acting(cut):
                return
        channel.gone = True
        channel.policies = {
            number: self.known.policies[number]
            for number, claim in self.known.claims.items()
            if claim.uid == channel.uid
        }
        account, number = self._unwanted(number_choice)
        case = Case(channel.case.name, account.account, secret=account.secret)
        with self._acting(cut):
            self.rig.force_delete(channel.case)
            self._create(Channel(case, number, deletion=deletion, drift=channel.drift))

    @precondition(lambda self: self.up and self._living())
    @rule(choice=CHOICES)
    def rotate(self, choice: int) -> None:
        """Create a second token, give it to the channels, and promote it when they use it: then the first one dies."""
        account = self.accounts[choice % 2]
        if self.damaged or any(self.channels[uid].number != number for number, (uid, _) in self.known.claims.items()):
            return  # a number that waits to be restored has nobody who renews its token
        self.rig.second_token(account)
        self.rig.put_token(account)
        self._settle()
        self.rig.promote(account)
        self._settle()

    # Damage

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, lost=st.booleans(), cut=CUTS)
    def damage_or_repair_record(self, choice: int, lost: bool, cut: Cut | None) -> None:
        """The number of a damaged record stays where it is, and nobody else gets it, until the record is repaired."""
        numbers = sorted(self.known.claims)
        number = numbers[choice % len(numbers)] if numbers else ""
        repaired = self.damaged.pop(number, None)
        if number and repaired is None:
            self.damaged[number] = {}
            if self._has_damaged_ring():
                del self.damaged[number]
                number = ""
        with self._acting(cut):
            if repaired:
                self.rig.edit_record(self.sids[number], repaired)
            elif number:
                self.damaged[number] = self.rig.edit_record(self.sids[number], {"record": None if lost else "AAAA"})

    # Twilio's console

    @rule(choice=CHOICES, url=st.sampled_from(["", "https://foreign.example.com/sms#rc=3"]), cut=CUTS)
    def edit_at_twilio(self, choice: int, url: str, cut: Cut | None) -> None:
        numbers = [number for number in self._numbers() if self.edits[number] < 2]  # three times in a row is a contest
        numbers = [number for number in numbers if number in self.known.claims] or numbers
        number = numbers[choice % len(numbers)] if numbers else ""
        if number:
            self.edits[number] += 1
            self.known.webhooks[number] = (url, "GET")
        with self._acting(cut):
            if number:
                self.rig.edit_webhook(number, url, "GET")

    # The operator

    @precondition(lambda self: not self.up)
    @rule()
    def restart_operator(self) -> None:
        self.rig.start_operator(QUICK)
        self.up, self.missed = True, 0
        self._settle()

    @contextmanager
    def _acting(self, cut: Cut | None) -> Iterator[None]:
        """Wait for what follows from an act; or kill or pause the operator at one of its next calls."""
        self.failed = True
        was_up = self.up
        if cut is None or not self.up:
            yield
        elif cut.paused and self.rig.has_second:
            pause = Action(kind="delay", seconds=PAUSE_SECONDS, after=cut.after)
            self.rig.proxy.add(Match(path="^[A-Z]+ (secrets|smschannels)", nth=cut.nth, count=1), pause)
            yield
        else:
            fatal = self.rig.proxy.add(Match(nth=cut.nth, count=1), Action(kind="hang", after=cut.after))
            yield
            self.rig.proxy.wait_held(frozenset({fatal.id}), quiet=1)
            self.rig.kill_operator()
            self.rig.proxy.clear()
            self.up = False
        if self.up or self.rig.has_second:
            self._settle()
        elif was_up:
            self._check_on_the_way()
        else:
            self.missed += 1
        self.failed = False
        if self.missed == 3:
            self.restart_operator()

    def teardown(self) -> None:
        """Repair and delete everything: in the end each number points where the records say that it did before."""
        error = sys.exc_info()[1]
        if isinstance(error, Exception):  # Hypothesis repeats the example, and only reports that it ended differently
            traceback.print_exception(error)
        self.rig.proxy.clear()
        if not self.failed:
            self.failed = True
            for number, content in self.damaged.items():
                self.rig.edit_record(self.sids[number], content)
            self.damaged = {}
            for channel in self._living():
                channel.gone = True
                self.rig.delete(channel.case)
            self.failed = False
        if not self.up:
            self.rig.start_operator(QUICK)
        if self.failed:
            self.rig.clear()
        else:
            self._settle()

    # What must be

    def _create(self, channel: Channel) -> None:
        self._apply(channel)
        channel.uid = self.rig.uid_of(channel.case)
        self.channels[channel.uid] = channel

    def _apply(self, channel: Channel) -> None:
        spec = {"suspend": channel.suspend, "deletionPolicy": channel.deletion, "driftPolicy": channel.drift}
        self.rig.apply(channel.case, channel.number, **spec)

    def _give(self, channel: Channel, account: Case, number: str) -> None:
        """Let a channel want a number of this account, unless that makes a ring that nothing decides."""
        earlier = channel.number, channel.case.account, channel.case.secret
        channel.number, channel.case.account, channel.case.secret = number, account.account, account.secret
        if self._has_damaged_ring():
            channel.number, channel.case.account, channel.case.secret = earlier

    def _settle(self) -> None:
        """Wait until everything is as the model has it."""
        self.failed = True
        final, reasons = self._final()
        deadline = time.monotonic() + 40
        while True:
            calls = len(self.rig.proxy.trace)
            world = self.rig.world()
            wrong = list(self._wrong(world, final, reasons))
            if not wrong and self._is_at_rest(final, reasons):
                break
            assert time.monotonic() < deadline, "; ".join(wrong)
            self.rig.wait_for_call(calls)
        self.known = self._facts(world)
        holders = {claim.uid for claim in self.known.claims.values()}
        self.channels = {uid: each for uid, each in self.channels.items() if not each.gone or uid in holders}
        self._read_statuses(world)
        self.failed = False

    def _is_at_rest(self, final: Facts, reasons: Mapping[str, str]) -> bool:
        """Whether what is right now stays so: two operators may still be at the same thing."""
        if not self.rig.has_second:
            return True
        self.rig.proxy.wait_released(30)
        self.rig.proxy.clear()
        time.sleep(0.3)
        return not list(self._wrong(self.rig.world(), final, reasons))

    def _wrong(self, world: World, final: Facts, reasons: Mapping[str, str]) -> Iterator[str]:
        uids = {name: channel["metadata"]["uid"] for name, channel in world.channels.items()}
        living = {each.case.name: each.uid for each in self._living()}
        if uids != living:
            yield f"channels {uids}, not {living}"
        for name, channel in world.channels.items():
            if ready_reason(channel)[1] != reasons.get(name):
                yield f"{name}: {ready_reason(channel)}, not {reasons.get(name)}"
        found = self._facts(world)
        if found.claims != final.claims:
            yield f"the records say {found.claims}, not {final.claims}"
        for number, webhook in found.webhooks.items():
            if webhook != final.webhooks[number]:
                yield f"{number} points at {webhook}, not {final.webhooks[number]}"
        for each in self._living():
            works = reasons[each.case.name] in {"Configured", "WebhookDrifted"}
            if works and found.tokens.get(each.number) != self._account_of(each.number).token:
                yield f"{each.case.name} has another token than its account"

    def _final(self) -> tuple[Facts, dict[str, str]]:
        """Where everything ends, and the reason that `Ready` of each living channel carries then."""
        final = Facts(dict(self.known.claims), dict(self.known.webhooks))
        while self._restore_one(final) or self._claim_one(final):
            pass
        reasons: dict[str, str] = {}
        for channel in self._living():
            number = channel.number
            claim = final.claims.get(number)
            if channel.suspend:
                reason = "Suspended"
            elif claim is None or claim.uid != channel.uid:
                reason = "NumberInUse"
            elif number in self.damaged:
                reason = "RecordUnreadable"
            elif claim == self.known.claims.get(number) and channel.drift == "Report" and self._drifted(channel):
                reason = "WebhookDrifted"
            else:
                reason = "Configured"
                # As long as it is not known what the number pointed at before, it is what is overwritten.
                final.claims[number] = claim._replace(previous=claim.previous or _as_previous(final.webhooks[number]))
                final.webhooks[number] = channel.ours
            reasons[channel.case.name] = reason
        return final, reasons

    def _restore_one(self, final: Facts) -> bool:
        """Restore a number that its holder does not want any more; False if there is none."""
        for number, claim in final.claims.items():
            channel = self.channels[claim.uid]
            if number not in self.damaged and self._gives_up(channel, number, final.claims):
                final.webhooks[number] = self._restored(number, claim, final.webhooks[number])
                del final.claims[number]
                return True
        return False

    def _claim_one(self, final: Facts) -> bool:
        """Claim a free number for the channel that wants it; False if there is none."""
        for channel in self._unsuspended():
            if channel.number not in final.claims:
                final.claims[channel.number] = Claim(channel.uid, _as_previous(final.webhooks[channel.number]))
                final.webhooks[channel.number] = channel.ours
                return True
        return False

    def _gives_up(self, channel: Channel, number: str, claims: Mapping[str, Claim]) -> bool:
        if channel.gone or channel.suspend or channel.number == number:
            return channel.gone
        claim = claims.get(channel.number)
        if claim and claim.uid == channel.uid:
            return channel.number not in self.damaged
        return bool(self._ring(channel, claims))

    def _ring(self, channel: Channel, claims: Mapping[str, Claim]) -> list[str]:
        """The numbers that channels want from each other in a ring, this one among them; empty if there is no ring."""
        wanted, each = [channel.number], channel
        while (claim := claims.get(each.number)) and claim.uid != channel.uid:
            each = self.channels[claim.uid]
            if each.gone or each.suspend or each.number in wanted:
                return []
            wanted.append(each.number)
        return wanted if claim and len(wanted) > 1 else []

    def _has_damaged_ring(self) -> bool:
        """Whether channels want each other's numbers and one cannot be restored: timing decides how that ends."""
        rings = (self._ring(each, self.known.claims) for each in self._unsuspended())
        return any(number in self.damaged for ring in rings for number in ring)

    def _restored(self, number: str, claim: Claim, webhook: Webhook) -> Webhook:
        channel = self.channels[claim.uid]
        policy = channel.policies.get(number, channel.deletion)
        if webhook[0] != channel.ours[0] or policy == "Retain":
            return webhook
        return ("", "POST") if policy == "Clear" else claim.previous or webhook

    def _drifted(self, channel: Channel) -> bool:
        claim, webhook = self.known.claims[channel.number], self.known.webhooks[channel.number]
        if channel.configured == channel.number:
            return webhook != channel.ours
        return channel.named == channel.number and webhook != claim.previous and _as_previous(webhook) is not None

    def _check_on_the_way(self) -> None:
        """No operator runs: whatever one had begun, a record says so."""
        world = self.rig.world()
        found, (final, _) = self._facts(world), self._final()
        for number, webhook in found.webhooks.items():
            was, now, then = self.known.claims.get(number), found.claims.get(number), final.claims.get(number)
            allowed = {self.known.webhooks[number]}
            if was:
                restored = self._restored(number, was, self.known.webhooks[number])
                if now == was:
                    allowed |= {restored, self.channels[was.uid].ours}
                else:
                    assert then != was, f"the record of {number} is gone although its channel wants it"
                    allowed = {restored}
            if now and now != was:
                assert now == then, f"the record of {number} says {now}, not {then}"
                allowed |= {self.channels[now.uid].ours}
            assert webhook in allowed, f"{number} points at {webhook}, which is none of {allowed}"
        self.known = found
        self._read_statuses(world)

    def _facts(self, world: World) -> Facts:
        found = Facts()
        for record in (record for records in world.records.values() for record in records):
            number, contents = record.phone_number, record.contents
            if number not in self.sids:
                continue  # an example that failed has left it
            assert record.number_sid == self.sids[number]
            assert (contents is None) == (number in self.damaged)
            known = self.known.claims.get(number)
            if contents is None:
                assert known
                assert record.uid == known.uid, f"the damaged record of {number} is of another channel"
                found.claims[number], found.tokens[number] = known, self.known.tokens[number]
            else:
                previous = (contents.previous.url, contents.previous.method) if contents.previous else None
                found.claims[number] = Claim(record.uid, previous)
                found.tokens[number] = contents.login.token.get_secret_value()
            found.policies[number] = record.deletion_policy.value
        for number in self._numbers():
            at_twilio = self.rig.stack.number(number)
            found.webhooks[number] = at_twilio["sms_url"] or "", at_twilio["sms_method"]
        return found

    def _read_statuses(self, world: World) -> None:
        numbers = {sid: number for number, sid in self.sids.items()}
        for channel in self._living():
            status: Mapping[str, Any] = world.channels.get(channel.case.name, {}).get("status", {})
            kinds = {each["type"]: each for each in status.get("conditions", ())}
            effective = kinds.get("WebhookEffective", {"status": "Unknown", "reason": "NotChecked"})
            known = effective["status"] == "True" or effective["reason"] in {"NotSet", "UrlMismatch", "MethodMismatch"}
            channel.named = numbers.get(status.get("phoneNumberSid", ""), "")
            channel.configured = channel.named if known else ""

    def _drift_policy(self, policy: str) -> str:
        return policy

    def _has_old_token(self, channel: Channel) -> bool:
        return any(
            claim.uid == channel.uid and self.known.tokens[number] != self._account_of(number).token
            for number, claim in self.known.claims.items()
        )

    def _numbers(self) -> list[str]:
        return [number for account in self.accounts for number in account.numbers]

    def _account_of(self, number: str) -> Case:
        return next(each for each in self.accounts if number in each.numbers)

    def _pick(self, choice: int) -> Channel:
        living = self._living()
        return living[choice % len(living)]

    def _unwanted(self, choice: int) -> tuple[Case, str]:
        """A number that no living channel wants, though one may still have it; and its account."""
        wanted = {channel.number for channel in self._living()}
        free = [number for number in self._numbers() if number not in wanted]
        number = free[choice % len(free)]
        return self._account_of(number), number

    def _living(self) -> list[Channel]:
        return [channel for channel in self.channels.values() if not channel.gone]

    def _unsuspended(self) -> list[Channel]:
        return [channel for channel in self._living() if not channel.suspend]


class ModelOfTwo(Model):
    """A second operator runs beside the first at times: both do everything, and the API server arbitrates."""

    def _prepare(self) -> None:
        super()._prepare()
        self.rig.start_second()

    @precondition(lambda self: not self.rig.has_second)
    @rule()
    def start_second(self) -> None:
        self.rig.start_second()
        self._settle()

    @precondition(lambda self: self.rig.has_second)
    @rule(kill=st.booleans())
    def stop_second(self, kill: bool) -> None:
        self.rig.stop_second(kill=kill)
        if self.up:
            self._settle()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if self.rig.has_second:
                self.rig.stop_second()

    def _drift_policy(self, policy: str) -> str:
        """Twilio has no compare-and-set: a late restore may overwrite a waiter's webhook. `Correct` repairs that."""
        return "Correct"


def _as_previous(webhook: Webhook) -> Webhook | None:
    return None if webhook[0].startswith("https://sms.example.com/") else webhook


@pytest.fixture
def quick(rig: Rig) -> Iterator[Rig]:
    rig.restart_operator(QUICK)
    yield rig
    rig.restart_operator()


def test_one_operator_keeps_to_the_model(quick: Rig) -> None:
    run_state_machine_as_test(seed(SEED)(on_rig(Model, quick)), settings=BUDGET)


def test_two_operators_keep_to_the_model(quick: Rig) -> None:
    run_state_machine_as_test(seed(SEED_OF_TWO)(on_rig(ModelOfTwo, quick)), settings=BUDGET_OF_TWO)


def on_rig(model: type[Model], rig: Rig) -> type[Model]:
    return type(f"{model.__name__}OnThisRig", (model,), {"rig": rig})
