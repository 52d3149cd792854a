"""The chart without helm: what is made from it is up to date, and fits the programs that it runs. See tests/chart."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema_rs import Draft7Validator

import api_shim.settings
import smschannel.settings
from deploy import chart
from smschannel.api.environment import EnvironmentSettings
from smschannel.api.names import OPERATOR
from tests.documents import ROOT, blocks
from tests.unit.test_documents import parse

VALUES = yaml.safe_load((chart.CHART / "values.yaml").read_text())
SCHEMA = json.loads(chart.SCHEMA.read_text())
OBJECTS: list[Any] = [each for path in chart.outputs() for each in yaml.safe_load_all(path.read_text())]
DEPLOYMENTS = {each["metadata"]["name"]: each["spec"] for each in OBJECTS if each["kind"] == "Deployment"}
PROFILES = sorted((chart.CHART / "ci").glob("*-values.yaml"))
PROGRAMS: dict[str, type[EnvironmentSettings]] = {
    OPERATOR: smschannel.settings.Settings,
    "sms-api-shim": api_shim.settings.Settings,
}


def test_manifests_are_those_of_the_chart() -> None:
    """The kustomization has digests of the chart and of the files beside it."""
    assert chart.KUSTOMIZATION.read_text() == chart.kustomization(), "run: make manifests"


def test_change_of_the_chart_or_of_a_manifest_changes_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chart, "ROOT", tmp_path)
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("1")
    second.write_text("2")
    before = chart.digest([first, second])
    assert before == chart.digest([second, first]), "the order in which a directory is read does not matter"
    first.write_text("12")
    second.write_text("")
    assert chart.digest([first, second]) != before, "content may not move between files"


def test_schema_has_the_settings_of_both_programs() -> None:
    assert chart.SCHEMA.read_text() == chart.schema_with_settings(), "run: make manifests"


def test_chart_has_the_crd() -> None:
    assert chart.CRD_OF_CHART.read_bytes() == chart.CRD.read_bytes(), "run: make manifests"


def test_versions_are_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert metadata["version"] == metadata["appVersion"] == project["version"]


# Values


def wrong(values: Any) -> list[str]:
    return [each.message for each in Draft7Validator(SCHEMA).iter_errors(values)]


def names(schema: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all values that the schema allows; maps of free keys count as one value."""
    while "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    if "properties" not in schema or path.endswith((".settings", ".resources")):
        yield path
        return
    assert schema["additionalProperties"] is False, f"{path or 'the top'} accepts a mistyped name"
    for name, inner in schema["properties"].items():
        yield from names(inner, f"{path}.{name}")


def test_schema_allows_exactly_the_values_with_a_default() -> None:
    allowed = set(names(SCHEMA)) - {".global"}
    for path in allowed:
        value = VALUES
        for name in path.strip(".").split("."):
            assert name in value, f"values.yaml lacks {path}"
            value = value[name]
    assert set(paths(VALUES, allowed)) == allowed


def paths(values: Any, stop: set[str], path: str = "") -> Iterator[str]:
    if path in stop or not isinstance(values, dict):
        yield path
        return
    for name, inner in values.items():
        yield from paths(inner, stop, f"{path}.{name}")


def test_defaults_fit_the_schema() -> None:
    assert wrong(VALUES) == []


@pytest.mark.parametrize("profile", PROFILES, ids=[each.name for each in PROFILES])
def test_profile_fits_the_schema(profile: Path) -> None:
    given = yaml.safe_load(profile.read_text())
    given["podSecurityContext"] = {n: v for n, v in given.get("podSecurityContext", {}).items() if v is not None}
    assert wrong(given) == []


# name, value: one mistake each
MISTAKES: tuple[tuple[str, Any], ...] = (
    ("webhookURLTemplate", "https://sms.example.com/{instance_id}"),
    ("webhookUrlTemplate", "sms.example.com/{instance_id}"),
    ("webhookUrlTemplate", "https://sms.example.com/ {instance_id}"),
    ("webhookUrlTemplate", ["https://sms.example.com/{instance_id}"]),
    ("channelNamespaces", "sms-channels"),
    ("channelNamespaces", []),
    ("channelNamespaces", ["a", "a"]),
    ("channelNamespaces", ["Team_A"]),
    ("channelNamespaces", ["a" * 64]),
    ("createChannelNamespaces", "false"),
    ("crd.install", "no"),
    ("image.tag", "sha256:abc"),
    ("image.digest", "0123"),
    ("image.repository", "registry.example.com/sms@sha256:0"),
    ("image.pullPolicy", "always"),
    ("imagePullSecrets", ["registry"]),
    ("proxy.https", "proxy.example.com:3128"),
    ("proxy.https", "socks5://proxy.example.com"),
    ("proxy.noProxy", [".svc"]),
    ("operator.replicas", "2"),
    ("operator.replicas", -1),
    ("operator.replicas", 1.5),
    ("operator.replicaCount", 2),
    ("operator.settings", {"SMSCHANNEL_LOG_LEVEL": "DEBUG"}),
    ("operator.settings", {"logLevel": "debug"}),
    ("operator.settings", {"twilioTimeoutSeconds": 0}),
    ("operator.settings", {"workers": "64"}),
    ("operator.settings", {"httpHost": "127.0.0.1"}),
    ("operator.resources", {"request": {"cpu": "1"}}),
    ("operator.extraEnv", {"NAME": "value"}),
    ("operator.podLabels", {"replicas": 2}),
    ("operator.podLabels", {"app.kubernetes.io/name": "other"}),
    ("shim.tls.mode", "plain"),
    ("shim.tls.secretName", ""),
    ("shim.service.port", 0),
    ("shim.service.type", "ExternalName"),
    ("shim.ingress.host", "https://sms-api.example.com"),
    ("shim.ingress.hosts", ["sms-api.example.com"]),
    ("shim.settings", {"trustedProxies": "10.0.0.0/8"}),
    ("networkPolicy.egressPorts.tcp", ["443"]),
    ("podMonitor.interval", "30"),
)


@pytest.mark.parametrize(("name", "value"), MISTAKES, ids=[f"{name}={value}"[:60] for name, value in MISTAKES])
def test_schema_refuses_a_mistake(name: str, value: Any) -> None:
    given: Any = value
    for each in reversed(name.split(".")):
        given = {each: given}
    assert wrong(given)


def test_notes_name_commands_that_exist() -> None:
    notes = re.sub(
        r"\{\{.*?\}\}", "", (chart.CHART / "templates/NOTES.txt").read_text().replace("{{ $channels }}", "team-b")
    )
    found = re.findall(r"^  kubectl sms (.*)$", notes, re.MULTILINE)
    for command in found:
        parse(shlex.split(command))
    assert len(found) == 3


# Objects


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_accepts_its_environment(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [container] = DEPLOYMENTS[name]["template"]["spec"]["containers"]
    program = PROGRAMS[name]
    prefix = str(program.model_config["env_prefix"])
    for each in container["env"]:
        assert each["name"].removeprefix(prefix).lower() in program.model_fields
        monkeypatch.setenv(each["name"], each["value"])
    if name == OPERATOR:  # the one that the README sets afterwards
        monkeypatch.setenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE", "https://sms.example.com/{instance_id}")
    settings: Any = program()
    assert settings.http_host == "0.0.0.0", "probes come from outside"  # noqa: S104
    assert [port["containerPort"] for port in container["ports"]] == [settings.http_port]
    assert settings.operator_namespace == chart.NAMESPACE


def test_settings_that_the_chart_sets_are_not_among_the_others() -> None:
    for program, names_of in chart.BY_THE_CHART.items():
        assert set(names_of) <= program.model_fields.keys()


def test_shim_has_time_to_drain() -> None:
    """It serves for the drain time after SIGTERM, and requests in progress get 20 seconds more."""
    drain = api_shim.settings.Settings.model_fields["drain_seconds"].default
    assert DEPLOYMENTS["sms-api-shim"]["template"]["spec"]["terminationGracePeriodSeconds"] >= drain + 20


def test_no_null_and_no_empty_map_is_shipped() -> None:
    """GitOps controllers would report them as a difference forever; only selectors of everything are empty."""

    def empty(value: Any, path: str) -> Iterator[str]:
        if value is None or (
            value == {} and path.rpartition(".")[2] not in {"namespaceSelector", "objectSelector", "status"}
        ):
            yield path
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, each in inside:
            yield from empty(each, f"{path}.{name}")

    assert [path for each in OBJECTS for path in empty(each, f"{each['kind']}/{each['metadata']['name']}")] == []


def test_selectors_find_the_pods() -> None:
    for name, deployment in DEPLOYMENTS.items():
        labels = deployment["template"]["metadata"]["labels"]
        for each in OBJECTS:
            if each["kind"] in {"Service", "PodDisruptionBudget", "NetworkPolicy"} and each["metadata"]["name"] == name:
                spec = each["spec"]
                selector = spec.get("podSelector", spec.get("selector", {}))
                assert selector.get("matchLabels", selector).items() <= labels.items()
                assert selector


def test_uninstalling_leaves_each_policy_with_a_parameter_and_its_bindings() -> None:
    """The API server stops following a parameter's kind with its last binding, and then knows only its former value."""
    found = [each for path in chart.outputs() for each in yaml.safe_load_all(path.read_text()) if each]
    policies = {each["metadata"]["name"] for each in found if "paramKind" in each.get("spec", {})}
    bound = [each for each in found if each.get("spec", {}).get("policyName") in policies]
    assert len(policies) == 2
    assert len(bound) == 3
    kept = [each for each in found if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"]
    assert all(each in kept for each in bound)
    assert policies <= {each["metadata"]["name"] for each in kept}


def test_shards_on_the_page_are_those_of_the_profile() -> None:
    """Helm renders the profile, and the API server accepts it."""
    [shown] = [yaml.safe_load(each) for each in blocks("yaml", "docs/scale.md")]
    profile = yaml.safe_load((chart.CHART / "ci/shards-values.yaml").read_text())
    assert shown == {name: profile[name] for name in shown}
