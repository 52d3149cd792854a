"""A small model of all that users, Twilio's console and crashes do to a few channels, run against the real thing.

Facts are looked at whenever the operator is at rest: dead, or with nothing left to do. Between two such moments a
number may be on its way, but only from where it was to where it belongs, and never without its entry in the ledger.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from deploy.local.stack import ready_reason
from tests.faults.conftest import EVERYTHING
from tests.faults.rig import Case, Rig, World, before, webhook_of
from tests.twin.faults import Action, Match

Webhook = tuple[str, str]
"""SmsUrl and SmsMethod."""

Cut = tuple[int, bool] | None
"""The operator dies at its n-th call from now, before it takes effect or after it did; None: it does not."""

CHOICES = st.integers(0, 11)
DELETIONS = st.sampled_from(["Restore", "Clear", "Retain"])
DRIFTS = st.sampled_from(["Correct", "Report"])
CUTS = st.none() | st.tuples(st.integers(1, 10), st.booleans())
QUICK = {
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "1",
    "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "2",
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "0.5",
}
BUDGET = settings(
    max_examples=16 if EVERYTHING else 5,
    stateful_step_count=30 if EVERYTHING else 15,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Channel:
    """What its user wants of it. `gone` once it was deleted: it may hold numbers for a while."""

    case: Case
    number: str
    deletion: str
    drift: str
    suspend: bool = False
    gone: bool = False
    named: str = ""  # the number that its status is about
    configured: str = ""  # the same, where the status knows what it pointed at

    @property
    def ours(self) -> Webhook:
        return webhook_of(self.case.name), "POST"


@dataclass(frozen=True)
class Claim:
    """A number in a channel's ledger; `previous` is None where it pointed at some channel of ours."""

    name: str
    previous: Webhook | None


@dataclass
class Facts:
    """Which numbers are in whose ledger, and where each points."""

    claims: dict[str, Claim] = field(default_factory=dict)
    webhooks: dict[str, Webhook] = field(default_factory=dict)


class Model(RuleBasedStateMachine):
    """Two accounts of two numbers each, and at most three channels at once. The operator begins at work."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self.rig = rig
        self.channels: dict[str, Channel] = {}
        self.accounts: list[Case] = []
        self.known = Facts()
        self.edits: Counter[str] = Counter()
        self.up = True
        self.missed = 0  # acts since the operator died
        self.failed = False

    @initialize()
    def begin(self) -> None:
        self.accounts = self.rig.new_cases(2)
        for account in self.accounts:
            account.secret = f"twilio-{account.account['account_sid'].lower()}"
            self.rig.put_token(account)
        self.known = Facts({}, {number: before(number) for number in self._numbers()})

    # Users

    @precondition(lambda self: len(self._living()) < 3)
    @rule(choice=CHOICES, deletion=DELETIONS, drift=DRIFTS, cut=CUTS)
    def create(self, choice: int, deletion: str, drift: str, cut: Cut) -> None:
        account, number = self._unwanted(choice)
        case = Case(str(uuid.uuid4()), account.account, secret=account.secret)
        channel = self.channels[case.name] = Channel(case, number, deletion=deletion, drift=drift)
        with self._acting(cut):
            self._apply(channel)

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, number_choice=CHOICES, cut=CUTS)
    def change_number(self, choice: int, number_choice: int, cut: Cut) -> None:
        """Perhaps to one of another account; not while it is suspended, when nobody looks after the old one's token."""
        channel, (account, number) = self._pick(choice), self._unwanted(number_choice)
        if channel.suspend and channel.number not in account.numbers:
            return
        channel.number = number
        channel.case.account, channel.case.secret = account.account, account.secret
        with self._acting(cut):
            self._apply(channel)

    @precondition(lambda self: len(self._living()) > 1)
    @rule(choice=CHOICES, cut=CUTS)
    def swap_numbers(self, choice: int, cut: Cut) -> None:
        one, other = self._pick(choice), self._pick(choice + 1)
        if one.suspend or other.suspend:
            return
        one.number, other.number = other.number, one.number
        one.case.account, other.case.account = other.case.account, one.case.account
        one.case.secret, other.case.secret = other.case.secret, one.case.secret
        with self._acting(cut):
            self._apply(one)
            self._apply(other)

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, cut=CUTS)
    def suspend_or_resume(self, choice: int, cut: Cut) -> None:
        channel = self._pick(choice)
        channel.suspend = not channel.suspend
        with self._acting(cut):
            self._apply(channel)

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, deletion=DELETIONS, drift=DRIFTS, cut=CUTS)
    def edit_policies(self, choice: int, deletion: str, drift: str, cut: Cut) -> None:
        channel = self._pick(choice)
        channel.deletion, channel.drift = deletion, drift
        with self._acting(cut):
            self._apply(channel)

    @precondition(lambda self: self._living())
    @rule(choice=CHOICES, cut=CUTS)
    def delete(self, choice: int, cut: Cut) -> None:
        channel = self._pick(choice)
        channel.gone = True
        with self._acting(cut):
            self.rig.delete(channel.case)

    @precondition(lambda self: self.up and self._living())
    @rule(choice=CHOICES)
    def rotate(self, choice: int) -> None:
        """As it is done: a second token is made and given to the channels; when they use it, the first one dies."""
        account = self.accounts[choice % 2]
        if any(self.channels[claim.name].number != number for number, claim in self.known.claims.items()):
            return  # what is owed to one account is not paid with the credentials of another
        self.rig.second_token(account)
        self.rig.put_token(account)
        self._settle()
        self.rig.promote(account)
        self._settle()

    # Twilio's console

    @rule(choice=CHOICES, url=st.sampled_from(["", "https://foreign.example.com/sms#rc=3"]), cut=CUTS)
    def edit_at_twilio(self, choice: int, url: str, cut: Cut) -> None:
        numbers = [number for number in self._numbers() if self.edits[number] < 2]  # three times in a row is a contest
        numbers = [number for number in numbers if number in self.known.claims] or numbers
        if not numbers:
            return
        number = numbers[choice % len(numbers)]
        self.edits[number] += 1
        self.known.webhooks[number] = (url, "GET")
        with self._acting(cut):
            self.rig.stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": url, "sms_method": "GET"})

    # The operator

    @precondition(lambda self: not self.up)
    @rule()
    def come_back(self) -> None:
        self.rig.start_operator(QUICK)
        self.up, self.missed = True, 0
        self._settle()

    @contextmanager
    def _acting(self, cut: Cut) -> Iterator[None]:
        """Waits for what follows from an act, or kills the operator at one of its next calls."""
        self.failed = True
        if not self.up:
            yield
            self.missed += 1
            self.failed = False
            if self.missed == 3:
                self.come_back()
        elif cut is None:
            yield
            self._settle()
        else:
            nth, after = cut
            fatal = self.rig.proxy.add(Match(nth=nth, count=1), Action(kind="hang", after=after))
            yield
            self.rig.proxy.wait_held(frozenset({fatal.id}), quiet=1)
            self.rig.kill_operator()
            self.rig.proxy.clear()
            self.up = False
            self._check_on_the_way()
            self.failed = False

    def teardown(self) -> None:
        """Everything is deleted in the end: what the ledger says comes back."""
        self.rig.proxy.clear()
        if not self.failed:
            for channel in self._living():
                channel.gone = True
                self.rig.delete(channel.case)
        if not self.up:
            self.rig.start_operator(QUICK)
        if self.failed:
            self.rig.clear()
        else:
            self._settle()

    # What must be

    def _apply(self, channel: Channel) -> None:
        spec = {"suspend": channel.suspend, "deletionPolicy": channel.deletion, "driftPolicy": channel.drift}
        self.rig.apply(channel.case, channel.number, **spec)

    def _settle(self) -> None:
        """Waits until everything is as the model has it."""
        self.failed = True
        final, reasons = self._final()
        deadline = time.monotonic() + 40
        while True:
            seen = len(self.rig.proxy.trace)
            world = self.rig.world()
            if not (wrong := list(self._wrong(world, final, reasons))):
                break
            assert time.monotonic() < deadline, "; ".join(wrong)
            with self.rig.proxy.changed:
                self.rig.proxy.changed.wait_for(lambda now=seen: len(self.rig.proxy.trace) > now, 1)  # type: ignore[misc]
        self.known = final
        self.channels = {name: channel for name, channel in self.channels.items() if not channel.gone}
        self._read_statuses(world)
        self.failed = False

    def _wrong(self, world: World, final: Facts, reasons: Mapping[str, str]) -> Iterator[str]:
        if world.channels.keys() != reasons.keys():
            yield f"channels {sorted(world.channels)}, not {sorted(reasons)}"
        owners = {claim.name for claim in final.claims.values()}
        if world.records.keys() != owners:
            yield f"records {sorted(world.records)}, not {sorted(owners)}"
        for name, channel in world.channels.items():
            if ready_reason(channel)[1] != reasons.get(name):
                yield f"{name}: {ready_reason(channel)}, not {reasons.get(name)}"
        found = self._facts(world)
        if found.claims != final.claims:
            yield f"the ledgers have {found.claims}, not {final.claims}"
        for number, webhook in found.webhooks.items():
            if webhook != final.webhooks[number]:
                yield f"{number} points at {webhook}, not {final.webhooks[number]}"
        for account in self.accounts:
            for name, record in world.records.items():
                entry = next((each for each in record.entries if each.phone_number in account.numbers), None)
                at_work = reasons.get(name) in {"Configured", "WebhookDrifted"}
                if entry and at_work and entry.login.token.get_secret_value() != account.token:
                    yield f"{name} has another token than its account"

    def _final(self) -> tuple[Facts, dict[str, str]]:
        """Where everything ends that is on its way, and what `Ready` says of each living channel."""
        waiting = self._waiting()
        final = Facts({}, dict(self.known.webhooks))
        reasons: dict[str, str] = {}
        for number, claim in self.known.claims.items():
            channel = self.channels[claim.name]
            if not channel.gone and (channel.suspend or claim.name in waiting or channel.number == number):
                final.claims[number] = claim
            else:
                final.webhooks[number] = self._given_back(number, claim)
        for channel in self._living():
            number, name = channel.number, channel.case.name
            if channel.suspend or name in waiting:
                reasons[name] = "Suspended" if channel.suspend else "NumberInUse"
                continue
            reasons[name] = "Configured"
            if number not in final.claims:
                final.claims[number] = Claim(name, _as_previous(final.webhooks[number]))
                final.webhooks[number] = channel.ours
            elif channel.drift == "Report" and self._drifted(channel):
                reasons[name] = "WebhookDrifted"
            else:
                final.webhooks[number] = channel.ours
        return final, reasons

    def _waiting(self) -> set[str]:
        """Who wants a number that its holder does not let go of: who is suspended, or waits for such a one."""
        held = {each.case.name: self.known.claims.get(each.number) for each in self._living() if not each.suspend}
        holders = {name: self.channels[claim.name] for name, claim in held.items() if claim and claim.name != name}
        waiting: set[str] = set()
        while (
            more := {
                name
                for name, holder in holders.items()
                if not holder.gone and (holder.suspend or holder.case.name in waiting)
            }
            - waiting
        ):
            waiting |= more
        return waiting

    def _given_back(self, number: str, claim: Claim) -> Webhook:
        channel, webhook = self.channels[claim.name], self.known.webhooks[number]
        if webhook[0] != channel.ours[0] or channel.deletion == "Retain":
            return webhook
        return ("", "POST") if channel.deletion == "Clear" else claim.previous or webhook

    def _drifted(self, channel: Channel) -> bool:
        claim, webhook = self.known.claims[channel.number], self.known.webhooks[channel.number]
        if channel.configured == channel.number:
            return webhook != channel.ours
        return channel.named == channel.number and webhook != claim.previous and _as_previous(webhook) is not None

    def _check_on_the_way(self) -> None:
        """The operator is dead: whatever it had begun, the ledger knows of it."""
        world = self.rig.world()
        found, (final, _) = self._facts(world), self._final()
        for number, webhook in found.webhooks.items():
            was, now, then = self.known.claims.get(number), found.claims.get(number), final.claims.get(number)
            allowed = {self.known.webhooks[number]}
            if was:
                released = self._given_back(number, was)
                if now == was:
                    allowed |= {released, self.channels[was.name].ours}
                else:
                    assert then != was, f"{number} left the ledger of a channel that wants it"
                    allowed = {released}
            if now and now != was:
                assert now == then, f"{number} is claimed with {now}, not {then}"
                allowed |= {self.channels[now.name].ours}
            assert webhook in allowed, f"{number} points at {webhook}, which is none of {allowed}"
        self.known = found
        self._read_statuses(world)

    def _facts(self, world: World) -> Facts:
        found = Facts({}, {})
        for name, record in world.records.items():
            for entry in record.entries:
                assert entry.phone_number not in found.claims, f"{entry.phone_number} is in two ledgers"
                previous = (entry.previous.url, entry.previous.method) if entry.previous else None
                found.claims[entry.phone_number] = Claim(name, previous)
        for number in self._numbers():
            at_twilio = self.rig.stack.number(number)
            found.webhooks[number] = at_twilio["sms_url"] or "", at_twilio["sms_method"]
        return found

    def _read_statuses(self, world: World) -> None:
        sids = {self.rig.stack.number(number)["sid"]: number for number in self._numbers()}
        for name, channel in self.channels.items():
            status: Mapping[str, Any] = world.channels.get(name, {}).get("status", {})
            kinds = {each["type"]: each for each in status.get("conditions", ())}
            effective = kinds.get("WebhookEffective", {"status": "Unknown", "reason": "NotChecked"})
            known = effective["status"] == "True" or effective["reason"] in {"NotSet", "UrlMismatch", "MethodMismatch"}
            channel.named = sids.get(status.get("phoneNumberSid", ""), "")
            channel.configured = channel.named if known else ""

    def _numbers(self) -> list[str]:
        return [number for account in self.accounts for number in account.numbers]

    def _pick(self, choice: int) -> Channel:
        living = self._living()
        return living[choice % len(living)]

    def _unwanted(self, choice: int) -> tuple[Case, str]:
        """A number that no living channel wants, though one may still have it; and its account."""
        wanted = {channel.number for channel in self._living()}
        free = [(account, number) for account in self.accounts for number in account.numbers if number not in wanted]
        return free[choice % len(free)]

    def _living(self) -> list[Channel]:
        return [channel for channel in self.channels.values() if not channel.gone]


def _as_previous(webhook: Webhook) -> Webhook | None:
    return None if webhook[0].startswith("https://sms.example.com/") else webhook


@pytest.fixture
def quick(rig: Rig) -> Iterator[Rig]:
    rig.restart_operator(QUICK)
    yield rig
    rig.restart_operator()


def test_whatever_happens_in_whatever_order(quick: Rig) -> None:
    class OnThisRig(Model):
        def __init__(self) -> None:
            super().__init__(quick)

    run_state_machine_as_test(OnThisRig, settings=BUDGET)
