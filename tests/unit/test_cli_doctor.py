"""What `kubectl sms doctor` says of what it read. What it could not read is never good."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from smschannel.api.errors import KubernetesRefused
from smschannel.api.kube_client import KubeClient
from smschannel.cli import findings
from smschannel.cli.admin_store import operators
from smschannel.cli.findings import Finding, Level, Probe

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy/manifests"


def crd() -> Any:
    found = yaml.safe_load((ROOT / "crds/smschannels.yaml").read_text())
    found["status"] = {"conditions": [{"type": "Established", "status": "True"}]}
    return found


def schema_of(found: Any) -> Any:
    return found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([Level.GOOD, Level.WARNING], 0),
        ([Level.GOOD, Level.NOT_READ], 3),
        ([Level.NOT_READ, Level.BAD], 1),
        ([], 0),
    ],
)
def test_exit_status(levels: list[Level], expected: int) -> None:
    assert findings.exit_status(Finding("x", level, "") for level in levels) == expected


def test_crd_of_this_release_is_good() -> None:
    assert findings.crd(crd()).level is Level.GOOD


def test_missing_crd_is_bad() -> None:
    assert findings.crd(None) == Finding("CRD", Level.BAD, f"There is no CRD {findings.CRD}.", findings._APPLY_CRD)


@pytest.mark.parametrize("field", ["driftPolicy", "suspend"])
def test_crd_of_an_older_release_is_bad(field: str) -> None:
    """The API server drops fields that it does not know: a user's policy would silently not be there."""
    older = crd()
    del schema_of(older)[field]
    found = findings.crd(older)
    assert found.level is Level.BAD
    assert f"it lacks spec.{field}" in found.text


def test_crd_of_a_newer_release_is_a_warning() -> None:
    newer = crd()
    schema_of(newer)["credentials"]["properties"]["secretKeyRef"]["properties"]["namespace"] = {"type": "string"}
    found = findings.crd(newer)
    assert (found.level, "spec.credentials.secretKeyRef.namespace" in found.text) == (Level.WARNING, True)


@pytest.mark.parametrize("part", ["served", "status"])
def test_crd_that_is_not_served_is_bad(part: str) -> None:
    broken = crd()
    if part == "served":
        broken["spec"]["versions"][0]["served"] = False
    else:
        broken["status"] = {}
    assert findings.crd(broken).text == f"The CRD {findings.CRD} does not serve v1."


def policies() -> tuple[list[Any], list[Any]]:
    documents = [each for file in sorted(MANIFESTS.glob("*.yaml")) for each in yaml.safe_load_all(file.read_text())]
    by_kind = {
        kind: [each for each in documents if each and each.get("kind") == kind]
        for kind in ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    }
    return by_kind["ValidatingAdmissionPolicy"], by_kind["ValidatingAdmissionPolicyBinding"]


def test_all_policies_of_the_manifests_are_checked() -> None:
    installed, bindings = policies()
    assert {each["metadata"]["name"] for each in installed} == findings.POLICIES.keys()
    assert [each.level for each in findings.policies(installed, bindings)] == [Level.GOOD]
    for file, _ in findings.POLICIES.values():
        assert (MANIFESTS / file).exists()


@pytest.mark.parametrize("name", findings.POLICIES)
def test_missing_policy_says_what_is_lost(name: str) -> None:
    installed, bindings = policies()
    [found] = findings.policies([each for each in installed if each["metadata"]["name"] != name], bindings)
    assert (found.level, f"{name} is not installed" in found.text) == (Level.WARNING, True)
    [found] = findings.policies(installed, [each for each in bindings if each["spec"]["policyName"] != name])
    assert f"{name} has no binding" in found.text


def test_rights_are_those_of_the_manifests() -> None:
    """A right that the operator gets, and the doctor does not ask about, would not be missed."""
    documents = list(yaml.safe_load_all((MANIFESTS / "operator-rbac.yaml").read_text()))
    roles = {"ClusterRole sms-channel-operator": "everywhere", "Role sms-channel-operator": "own"}
    roles["ClusterRole sms-channel-operator-tenant"] = "channels"
    granted = set()
    for each in documents:
        if where := roles.get(f"{each['kind']} {each['metadata']['name']}"):
            for rule in each["rules"]:
                [group], [resource] = rule["apiGroups"], rule["resources"]
                names = tuple(rule.get("resourceNames", [""]))
                granted.add(findings.Right(where, group, resource, tuple(rule["verbs"]), names))
    assert granted == set(findings.OPERATOR_RIGHTS)


def test_missing_rights_are_listed() -> None:
    found = findings.rights(["patch smschannels in all namespaces"], 30)
    assert (found.level, found.text) == (Level.BAD, "The operator may not: patch smschannels in all namespaces.")
    assert findings.rights([], 30).level is Level.GOOD


LEASE = {"spec": {"holderIdentity": "pod-1"}}


@pytest.mark.parametrize(
    ("lease", "renewed", "level", "text"),
    [
        pytest.param(LEASE, 4.6, Level.GOOD, "pod-1 leads, and renewed its Lease after 5 s.", id="a renewal was seen"),
        pytest.param(LEASE, None, Level.BAD, "did not renew it while this was watched", id="a leader that is dead"),
        pytest.param({"spec": {"holderIdentity": None}}, None, Level.BAD, "Nobody holds the Lease", id="released"),
        pytest.param({}, None, Level.BAD, "Nobody holds the Lease", id="an empty Lease"),
        pytest.param(None, None, Level.BAD, "no operator has started there", id="no Lease"),
    ],
)
def test_leader_is_who_renews(lease: Any, renewed: float | None, level: Level, text: str) -> None:
    """By this machine's clock alone: the leader's may be wrong."""
    found = findings.leader("sms-channel-operator", lease, renewed_within=renewed)
    assert (found.level, text in found.text) == (level, True)


def test_leader_of_each_shard_is_named() -> None:
    found = findings.leader("sms-channel-operator-a", LEASE, renewed_within=5)
    assert found.text == "pod-1 leads shard a, and renewed its Lease after 5 s."


@pytest.mark.parametrize("lease", [{}, LEASE], ids=["released", "of an operator that was cut off when it ended"])
@pytest.mark.parametrize("name", ["sms-channel-operator", "sms-channel-operator-a"])
def test_lease_of_an_operator_that_was_removed_can_be_deleted(name: str, lease: Any) -> None:
    """It outlives a shard, and the one operator that there was before there were shards."""
    found = findings.leader(name, lease, renewed_within=None, is_only=False)
    assert f"delete lease {name}" in found.remedy
    assert "delete lease" not in findings.leader(name, lease, renewed_within=None).remedy


class Api:
    """An API server with these Leases and Deployments; None: the user may not list them."""

    def __init__(self, leases: list[str], deployments: list[str] | None) -> None:
        self._found = {"leases": leases, "deployments": deployments}

    async def pages(self, path: str, *, metadata_only: bool) -> AsyncIterator[Any]:
        names = self._found[path.rpartition("/")[2]]
        if names is None:
            raise KubernetesRefused(403, "forbidden")
        for each in names:
            yield {"metadata": {"name": each}}


@pytest.mark.parametrize(
    ("leases", "deployments", "found", "why"),
    [
        ([""], ["", "sms-api-shim"], [""], "one operator"),
        (["-a"], ["-a", "-b"], ["-a", "-b"], "a shard that never started has no Lease"),
        (["", "-a"], ["-a"], ["", "-a"], "the Lease of the one operator before is still there"),
        (["-a"], [""], ["", "-a"], "an operator that has not started, beside the Lease of a shard before"),
        ([], [], [""], "it is not there yet"),
        (["-a"], None, ["-a"], "whoever detaches may not list Deployments"),
        (["other"], ["sms-channel-operators"], [""], "other names"),
    ],
)
async def test_operators_are_found_by_their_leases_and_deployments(
    leases: list[str], deployments: list[str] | None, found: list[str], why: str
) -> None:
    def named(names: list[str]) -> list[str]:
        return [each if each[:1].isalpha() else f"sms-channel-operator{each}" for each in names]

    api = Api(named(leases), None if deployments is None else named(deployments))
    assert await operators(cast(KubeClient, api), "sms-operator") == named(found), why


def test_keyring_has_the_published_key() -> None:
    assert findings.keyring(True, has_published=True).level is Level.GOOD
    assert "Restart the operator" in findings.keyring(True, has_published=False).remedy
    assert "from its backup" in findings.keyring(False, has_published=None).remedy


@pytest.mark.parametrize(
    ("data", "level"),
    [
        ({"public-key": "x", "fingerprint": "00", "namespaces": "a b"}, Level.GOOD),
        ({"public-key": "x", "fingerprint": "00"}, Level.GOOD),
        ({}, Level.BAD),
        (None, Level.BAD),
    ],
)
def test_published_key(data: Any, level: Level) -> None:
    assert findings.published(data).level is level


@pytest.mark.parametrize("judge", [findings.webhook, findings.twilio])
@pytest.mark.parametrize(
    ("probe", "level"),
    [
        (Probe(200), Level.GOOD),
        (Probe(401), Level.GOOD),
        (Probe(404), Level.GOOD),
        (Probe(503), Level.WARNING),
        (Probe(None, "no such host"), Level.BAD),
    ],
)
def test_any_answer_shows_that_a_server_is_reachable(judge: Any, probe: Probe, level: Level) -> None:
    found = judge("https://sms.example.com", probe)
    assert found.level is level
    assert "this machine" in found.text, "it says from where that was seen"


def quota(**counts: tuple[str, str]) -> Any:
    names = {name.replace("__", "/"): each for name, each in counts.items()}
    hard, used = ({name: each[part] for name, each in names.items()} for part in (1, 0))
    return {"metadata": {"namespace": "sms-operator", "name": "q"}, "status": {"hard": hard, "used": used}}


@pytest.mark.parametrize(
    ("given", "levels"),
    [
        pytest.param([], [Level.GOOD], id="no quota"),
        pytest.param([quota(secrets=("5", "100"))], [Level.GOOD], id="enough"),
        pytest.param([quota(secrets=("95", "100"))], [Level.WARNING], id="nearly full"),
        pytest.param([quota(secrets=("100", "100"))], [Level.BAD], id="full"),
        pytest.param([quota(secrets=("0", "0"))], [Level.BAD], id="none is allowed"),
        pytest.param([quota(cpu=("4", "4"), secrets=("1k", "1k"))], [Level.GOOD], id="what is not a count"),
        pytest.param([quota(count__secrets=("9", "9"), configmaps=("9", "9"))], [Level.BAD] * 2, id="several"),
    ],
)
def test_quota_that_keeps_the_operator_from_claiming(given: list[Any], levels: list[Level]) -> None:
    assert [each.level for each in findings.quotas(given)] == levels


def test_versions_are_compared() -> None:
    assert findings.versions("1.0", "1.0").level is Level.GOOD
    assert findings.versions("1.0", "1.1").text == "kubectl sms is 1.0, and the operator 1.1."
    assert findings.versions("1.0", None).level is Level.WARNING


@pytest.mark.parametrize(
    ("ready", "level"), [(2, Level.GOOD), (1, Level.WARNING), (0, Level.BAD), (None, Level.WARNING)]
)
def test_replicas(ready: int | None, level: Level) -> None:
    found = None if ready is None else {"spec": {"replicas": 2}, "status": {"readyReplicas": ready}}
    assert findings.deployment("sms-api-shim", found).level is level


def test_channels_are_counted_by_reason() -> None:
    good = {"namespace": "a", "ready": "True", "reconciled": True, "reason": "Configured"}
    stuck = {**good, "ready": "False", "reason": "NumberNotFound"}
    alone = {**good, "namespace": "b", "ready": "Unknown", "reason": None, "reconciled": False}
    assert [each.text for each in findings.channels([good], ["a"])] == ["All channels are ready (1)."]
    texts = [each.text for each in findings.channels([good, stuck, stuck, alone], ["a"])]
    assert texts == [
        "There are channels in namespaces that the operator does not watch: b.",
        "2 of 4 channels are not ready: 2 NumberNotFound.",
    ]
    [found] = findings.channels([{**stuck, "reason": "TwilioUnavailable"}], ["a"])
    assert found.remedy == "Wait: the operator retries."
    assert [each.level for each in findings.channels([], [])] == [Level.GOOD]


def test_judgement_does_not_change_what_was_read() -> None:
    before = crd()
    after = copy.deepcopy(before)
    findings.crd(after)
    assert after == before
