"""A channel's life in five scenarios, the calls that each makes, and what can happen to every one of them.

The calls are not listed here: they are recorded from runs without faults, so that a new call is covered as well.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from deploy.local.stack import CHANNELS
from smschannel.api.resource import CHECK_NOW_ANNOTATION
from tests.faults.rig import FLOOR, PATIENT, WATCHFUL, Case, Rig, Row
from tests.twin.faults import Action, Match

Point = tuple[str, int]
"""The kind of a call, and which of that kind it is (from 1) since the scenario began."""

_BYSTANDER = "another account's channel meanwhile"
FOREIGN = "https://drift.example.com/"


@dataclass(frozen=True)
class Scenario:
    """`act` changes a channel that is configured with its first number (unless `from_nothing`).

    `writes` is how many writes at Twilio that needs. With `secret` the token is in a Secret.
    """

    name: str
    act: Callable[[Rig, Case], None]
    writes: int
    from_nothing: bool = False
    secret: bool = False


def _create(rig: Rig, case: Case) -> None:
    rig.apply(case, case.numbers[0])


def _change_number(rig: Rig, case: Case) -> None:
    rig.apply(case, case.numbers[1])


def _rotate(rig: Rig, case: Case) -> None:
    rig.second_token(case)
    rig.put_token(case)


def _drift(rig: Rig, case: Case) -> None:
    rig.edit_webhook(case.numbers[0], FOREIGN, "POST")
    rig.stack.channels.patch(
        name=case.name,
        namespace=CHANNELS,
        body={"metadata": {"annotations": {CHECK_NOW_ANNOTATION: uuid.uuid4().hex}}},
        content_type="application/merge-patch+json",
    )


def _delete(rig: Rig, case: Case) -> None:
    rig.delete(case)


SCENARIOS = (
    Scenario("create", _create, writes=1, from_nothing=True),
    Scenario("change number", _change_number, writes=2),
    Scenario("rotate", _rotate, writes=0, secret=True),
    Scenario("drift", _drift, writes=1),
    Scenario("delete", _delete, writes=1),
)

ERRORS = {
    **{str(status): Action(kind="status", status=status) for status in (401, 403, 404, 409, 422, 429, 500, 503)},
    "429, Retry-After": Action(kind="status", status=429, retry_after=1),
    "404, a proxy's": Action(kind="html", status=404),
    "reset": Action(kind="reset"),
    "hang": Action(kind="hang"),
    "truncated": Action(kind="truncate"),
    "HTML with 200": Action(kind="html200"),
    "lost answer": Action(kind="reset", after=True),
    "done, yet 503": Action(kind="status", status=503, after=True),
}
KILLS = {
    "killed before": Action(kind="hang"),
    "killed after": Action(kind="hang", after=True),
}


@dataclass(frozen=True)
class Trial:
    """One fault at one call of one scenario; twice in a row, unless that would only take time."""

    scenario: Scenario
    point: Point
    label: str
    action: Action

    @property
    def says_number_is_gone(self) -> bool:
        """Whether Twilio itself answers that a number to be restored does not exist: then it is not restored."""
        restores = self.point[0] in {"GET number", "POST number"}
        return restores and self.action.kind == "status" and self.action.status == 404

    @property
    def immediate_retries(self) -> int:
        """How many tries may follow without a wait: a refused login is followed by the recorded one, and HTTP lets a
        client repeat a call whose kept-alive connection broke.
        """
        return int(self.action.kind == "reset" or self.action.status in {401, 403})

    def __str__(self) -> str:
        return f"{self.scenario.name}: {self.point[0]} #{self.point[1]}: {self.label}"


class Life:
    """Runs scenarios on a rig, many channels at once."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._traces: dict[Scenario, list[Point]] | None = None

    @property
    def traces(self) -> dict[Scenario, list[Point]]:
        """Each scenario's calls in order, without faults: those that three runs have in common."""
        if self._traces is None:
            cases = self._begin([scenario for scenario in SCENARIOS for _ in range(3)])
            self._act(cases)
            wrong = self.rig.settle([case for case, _ in cases], 30)
            assert not wrong, f"without any fault: {wrong}"
            self._traces = {}
            for scenario in SCENARIOS:
                runs = [[call.point for call in self.rig.proxy.calls_about(c.name)] for c, s in cases if s is scenario]
                self._traces[scenario] = [point for point in runs[0] if all(point in run for run in runs)]
            self._end(cases, [scenario.name for _, scenario in cases])
        return self._traces

    def trials(self, faults: dict[str, Action]) -> Iterator[Trial]:
        for scenario, points in self.traces.items():
            for point in points:
                for label, action in faults.items():
                    yield Trial(scenario, point, label, action)

    def kill_at(self, trials: Sequence[Trial]) -> dict[str, str]:
        """Kill the operator (SIGKILL) while each of the calls is held; what is wrong afterwards, by trial.

        All calls are held at the same time, for one kill. Calls that were not reached by then are tried once more.
        Meanwhile a channel of another account becomes Ready as usual.
        """
        wrong: dict[str, str] = {}
        remaining = list(trials)
        while remaining:
            cases = self._begin([trial.scenario for trial in remaining], PATIENT)
            tried = list(zip(remaining, cases, strict=True))
            for trial, (case, _) in tried:
                case.rule = self.rig.proxy.add(_match(case, trial.point, count=1), trial.action)
            self._act(cases)
            rules = frozenset(case.rule.id for case, _ in cases if case.rule)
            held = self.rig.proxy.wait_held(rules, quiet=3)
            bystander = self._bystander(wrong)
            self.rig.kill_operator()
            self.rig.proxy.clear()
            self.rig.start_operator(WATCHFUL)
            reached = [(trial, case) for trial, (case, _) in tried if case.rule and case.rule.id in held]
            unsettled = self._settle([case for _, case in reached], 60)
            for trial, case in reached:
                self._judge(trial, case, unsettled.get(case, ""), wrong)
            remaining = [trial for trial, (case, _) in tried if case.rule and case.rule.id not in held]
            for case, _ in cases:
                case.rule = None
            wrong |= self._end([*cases, bystander], [*(str(trial) for trial, _ in tried), _BYSTANDER])
            assert reached, f"never made: {[str(trial) for trial in remaining]}"
        return wrong

    def fail_at(self, trials: Sequence[Trial]) -> dict[str, str]:
        """Make each call fail once or twice, then work again; what is wrong afterwards, by trial."""
        wrong: dict[str, str] = {}
        cases = self._begin([trial.scenario for trial in trials])
        for trial, (case, _) in zip(trials, cases, strict=True):
            count = 1 if trial.action.kind == "hang" else 2
            case.rule = self.rig.proxy.add(_match(case, trial.point, count=count), trial.action)
            case.restored_if_possible = trial.says_number_is_gone
        self._act(cases)
        unsettled = self._settle([case for case, _ in cases], 60)
        for trial, (case, _) in zip(trials, cases, strict=True):
            self._judge(trial, case, unsettled.get(case, ""), wrong)
        self.rig.proxy.clear()
        for case, _ in cases:
            case.rule = None
        return wrong | self._end(cases, [str(trial) for trial in trials])

    def _begin(
        self, scenarios: Sequence[Scenario], settings: Mapping[str, str] | None = None
    ) -> list[tuple[Case, Scenario]]:
        """Create a channel for each, and let an operator with these settings bring it to where its scenario begins."""
        self.rig.restart_operator(settings)
        cases = list(zip(self.rig.new_cases(len(scenarios)), scenarios, strict=True))
        for case, scenario in cases:
            if scenario.secret:
                case.secret = f"twilio-{case.name}"
                self.rig.put_token(case)
            if not scenario.from_nothing:
                self.rig.apply(case, case.numbers[0])
        wrong = self.rig.settle([case for case, _ in cases], 60)
        assert not wrong, f"before the first fault: {list(wrong.values())}"
        self.rig.stack.twin_call("DELETE", "/journal")
        self.rig.proxy.forget()
        return cases

    def _bystander(self, wrong: dict[str, str]) -> tuple[Case, Scenario]:
        [case] = self.rig.new_cases(1)
        _create(self.rig, case)
        if late := self.rig.settle([case], 10):
            wrong[_BYSTANDER] = late[case]
        return case, SCENARIOS[0]

    def _act(self, cases: Sequence[tuple[Case, Scenario]]) -> None:
        for case, scenario in cases:
            scenario.act(self.rig, case)

    def _settle(self, cases: Sequence[Case], timeout: float) -> dict[Case, str]:
        return self.rig.settle(cases, timeout)

    def _judge(self, trial: Trial, case: Case, unsettled: str, wrong: dict[str, str]) -> None:
        calls = self.rig.proxy.calls_about(case.name)
        faulted = [call for call in calls if call.fault]
        needed = len(self.traces[trial.scenario])
        complaints = [
            unsettled,
            self.rig.unexpected_writes(case, at_most=trial.scenario.writes + 1),
            _too_fast([call.at for call in faulted], trial.immediate_retries),
            f"{len(calls)} calls where {needed} are enough" if len(calls) > (needed + 2) * (len(faulted) + 2) else "",
        ]
        complaint = "; ".join(filter(None, complaints))
        if complaint:
            wrong[str(trial)] = complaint
        begun = calls[0].at if calls else 0
        self.rig.rows.append(
            Row(
                trial.scenario.name,
                f"{trial.point[0]} #{trial.point[1]}",
                trial.label,
                complaint or "as it must be",
                len(faulted),
                max(0.0, case.settled_at - begun),
            )
        )

    def _end(self, cases: Sequence[tuple[Case, Scenario]], names: Sequence[str]) -> dict[str, str]:
        """Delete the channels: numbers are restored only if the records know what, and have a token that works."""
        rotated = [case for case, scenario in cases if scenario.secret]
        for case in rotated:
            self.rig.promote(case)
        for case, _ in cases:
            if case.wanted is not None:
                self.rig.delete(case)
        wrong = self.rig.settle([case for case, _ in cases], 60)
        return {
            f"{name}, deleted at the end": wrong[case]
            for name, (case, _) in zip(names, cases, strict=True)
            if case in wrong
        }


def _match(case: Case, point: Point, *, count: int) -> Match:
    kind, occurrence = point
    return Match(account=case.name, path=f"^{re.escape(kind)}$", nth=occurrence, count=count)


def _too_fast(times: Sequence[float], allowed: int) -> str:
    """Errors are never retried faster than the floor; half of it, since the proxy delays calls, too."""
    too_fast = [gap for earlier, later in pairwise(times) if (gap := later - earlier) < 0.5 * FLOOR]
    return f"tried again after {min(too_fast):.3f} s" if len(too_fast) > allowed else ""
