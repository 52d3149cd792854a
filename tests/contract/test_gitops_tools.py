"""What GitOps tools say of a channel for each reason: Argo CD's health check in Lua, kstatus as its Go module."""

from __future__ import annotations

import copy

import pytest
import yaml

from smschannel.api.reasons import Reason
from smschannel.core.conditions import violations
from tests.documents import table
from tests.gitops import CONFIGMAP_KEY, GITOPS, HEALTH_LUA, HOW_TO_REGENERATE, KIND, Case, Health, cases, generated
from tests.gitops.judge import argo_health, kstatus

CASES = {case.name: case for case in cases()}
HEALTH_TEST = yaml.safe_load((GITOPS / "argocd" / KIND / "health_test.yaml").read_text())


@pytest.fixture(scope="module")
def kstatus_of() -> dict[str, str]:
    return dict(zip(CASES, kstatus(case.channel for case in CASES.values()), strict=True))


# The files


def test_generated_files_are_what_the_code_generates() -> None:
    expected = generated()
    written = {name: (GITOPS / name).read_text() for name in expected if (GITOPS / name).exists()}
    assert [name for name in expected if written.get(name) != expected[name]] == [], HOW_TO_REGENERATE


def test_test_data_has_no_other_files() -> None:
    folder = GITOPS / "argocd" / KIND / "testdata"
    assert {f"testdata/{path.name}" for path in folder.iterdir()} == {
        each["inputPath"] for each in HEALTH_TEST["tests"]
    }, HOW_TO_REGENERATE


def test_every_reason_has_test_data() -> None:
    assert set(Reason.__members__) <= CASES.keys()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_status_of_the_test_data_keeps_the_rules(case: Case) -> None:
    if case.name != "New":  # nothing has been reconciled yet
        assert violations({}, case.channel["status"]) == []


# Argo CD


@pytest.mark.parametrize("each", HEALTH_TEST["tests"], ids=lambda each: each["inputPath"])
def test_health_check_says_what_the_upstream_test_expects(each: dict[str, object]) -> None:
    """As Argo CD's own test does: status and message, for each file."""
    channel = yaml.safe_load((GITOPS / "argocd" / KIND / str(each["inputPath"])).read_text())
    assert argo_health(channel)._asdict() == each["healthStatus"]


@pytest.mark.parametrize(
    ("channel", "reason"),
    [
        ({"metadata": {"generation": 1}}, "another CRD gave it no default"),
        ({"metadata": {"generation": 1}, "status": {}}, "another CRD gave it no default"),
        ({"metadata": {"generation": 1}, "status": {"observedGeneration": 1}}, "there are no conditions"),
        ({"metadata": {"generation": 1}, "status": {"observedGeneration": 1, "conditions": []}}, "there is no Ready"),
    ],
)
def test_health_check_waits_for_a_status(channel: dict[str, object], reason: str) -> None:
    assert argo_health(channel) == argo_health(CASES["New"].channel), reason


def test_stalled_of_an_older_generation_is_not_degraded() -> None:
    """Otherwise Argo CD would end the sync that fixes the channel."""
    channel = copy.deepcopy(CASES["NumberNotFound"].channel)
    channel["metadata"]["generation"] = 2
    assert argo_health(channel).status == "Progressing"


def test_suspended_of_an_older_generation_is_not_suspended() -> None:
    channel = copy.deepcopy(CASES["Suspended"].channel)
    channel["metadata"]["generation"] = 2
    assert argo_health(channel).status == "Progressing"


def test_reason_of_a_later_release_is_judged_by_its_conditions() -> None:
    channel = copy.deepcopy(CASES["NumberNotFound"].channel)
    for condition in channel["status"]["conditions"]:
        condition["reason"] = "OfALaterRelease"
    assert argo_health(channel).status == "Degraded"


@pytest.mark.parametrize("library", ["string", "os", "io", "math", "require", "python"])
def test_health_check_has_only_the_libraries_of_argo(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Script:
        def read_text(self) -> str:
            return f'return {{status = type({library}), message = ""}}'

    monkeypatch.setattr("tests.gitops.judge.HEALTH_LUA", Script())
    assert argo_health(CASES["New"].channel) == Health("nil", "")


def test_configmap_has_the_script() -> None:
    patch = yaml.safe_load((GITOPS / "argocd/argocd-cm-patch.yaml").read_text())
    assert patch == {"data": {CONFIGMAP_KEY: HEALTH_LUA.read_text()}}


# kstatus


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kstatus_agrees(case: Case, kstatus_of: dict[str, str]) -> None:
    assert kstatus_of[case.name] == case.kstatus


def test_both_agree_on_what_is_broken(kstatus_of: dict[str, str]) -> None:
    """A person who looks at Argo CD and a pipeline that waits with Flux come to the same conclusion."""
    same = {"Healthy": "Current", "Suspended": "Current", "Progressing": "InProgress", "Degraded": "Failed"}
    differing = {name for name, case in CASES.items() if same[argo_health(case.channel).status] != kstatus_of[name]}
    assert differing == {"Restoring", "RestoreFailed"}, "both tools look at deletionTimestamp before anything else"


def test_channel_without_a_status_would_be_ready() -> None:
    """Why the CRD has a default for the whole status."""
    channel = {name: value for name, value in CASES["New"].channel.items() if name != "status"}
    assert kstatus([channel, {**channel, "status": {}}]) == ["Current", "Current"]


# The page


def test_verdicts_are_in_the_table(kstatus_of: dict[str, str]) -> None:
    rows = [
        [name, _argo(case), kstatus_of[name], "met" if case.ready == "True" else "waits"]
        for name, case in CASES.items()
        if name in Reason.__members__
    ]
    assert table("Reason", "Argo CD", "kstatus: Flux, Helm 4", "kubectl wait") == rows


def _argo(case: Case) -> str:
    """Return Argo CD's own verdict: it looks at deletionTimestamp before it runs the health check."""
    deleting = "deletionTimestamp" in case.channel["metadata"]
    return "Progressing" if deleting else argo_health(case.channel).status
