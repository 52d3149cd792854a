"""What helm makes of the chart: for each profile of values, for each value, and for each mistake."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import chart
from tests.chart.conftest import Helm, Refused, run, tool
from tests.unit.test_chart import PROFILES, VALUES

TEMPLATE = "https://sms.example.com/v1/instances/{instance_id}/channels/sms/webhook"
GIVEN = ("--set", f"webhookUrlTemplate={TEMPLATE}", "--set", "shim.tls.mode=plainHttp")
SHARDED = (
    *("--set", "webhookUrlTemplate=https://sms.example.com/{namespace}/{instance_id}", "--set", "shim.enabled=false"),
    *("--set", "channelNamespaces={team-a,team-b}", "--set", "operator.shards.a={team-a}"),
)
EVERYTHING = yaml.safe_load((chart.CHART / "ci/everything-values.yaml").read_text())
by_profile = pytest.mark.parametrize("profile", PROFILES, ids=[each.name for each in PROFILES])


def render(helm: Helm, *arguments: str, kubernetes: str = "1.36.0", namespace: str = chart.NAMESPACE) -> str:
    location = ("--namespace", namespace, "--kube-version", kubernetes)
    return helm("template", chart.RELEASE, str(chart.CHART), *location, *arguments)


class _Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML parsers silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{keys} at {node.start_mark}"
        return super().construct_mapping(node, deep)


def objects(rendered: str) -> list[Any]:
    return [each for each in yaml.load_all(rendered, _Strict) if each]


# Profiles


@by_profile
def test_lint_finds_nothing(helm: Helm, profile: Path) -> None:
    helm("lint", "--strict", "--kube-version", "1.36.0", str(chart.CHART), "--values", str(profile))


@by_profile
def test_rendering_is_complete_and_repeatable(helm: Helm, profile: Path) -> None:
    rendered = render(helm, "--values", str(profile))
    assert rendered == render(helm, "--values", str(profile))
    found = objects(rendered)
    assert "<no value>" not in rendered
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in found]
    assert len(names) == len(set(names))
    labels = [each["metadata"].get("labels", {}) for each in found if each["kind"] != "CustomResourceDefinition"]
    assert all(each["app.kubernetes.io/part-of"] == "sms-channel-operator" for each in labels)


def test_manifests_are_what_helm_renders(helm: Helm) -> None:
    files = chart.split(render(helm, *chart.PLAIN))
    shipped = {path.name: path.read_text().partition("\n")[2] for path in chart.outputs()}
    assert shipped == files, "run: make manifests"


@by_profile
def test_kubeconform_accepts_the_objects(helm: Helm, profile: Path, schemas: list[str]) -> None:
    rendered = render(helm, "--values", str(profile))
    run(tool("kubeconform"), "-strict", "-summary", "-skip", _FOREIGN, *schemas, stdin=rendered)


_FOREIGN = "Certificate,HTTPRoute,PodMonitor,PrometheusRule"
"""Kinds of other projects, whose schemas no API server here has."""


def test_kube_score_finds_nothing_that_is_not_argued(helm: Helm) -> None:
    ignored = [word for name in ARGUED for word in ("--ignore-test", name)]
    options = ("--kubernetes-version", "v1.36", "--ignore-container-cpu-limit", "--exit-one-on-warning", *ignored)
    run(tool("kube-score"), "score", *options, "-", stdin=render(helm, *GIVEN))


ARGUED = {
    "container-image-pull-policy": "the image has a version or a digest, which do not change",
    "container-ephemeral-storage-request-and-limit": "the file system is read-only, so only logs take storage",
    "deployment-has-host-podantiaffinity": "topologySpreadConstraints spread the pods, and still allow one node",
}
"""Checks of kube-score that this chart fails, and why. It has no CPU limit, since throttling would delay takeovers."""


# Values


def leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all values in values.yaml; a map without keys, or of a user's keys, is one value."""
    if not isinstance(values, dict) or not values or path[-1:] == ("resources",):
        yield path
        return
    for name, each in values.items():
        yield from leaves(each, (*path, name))


def get(values: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        values = values[name] if isinstance(values, dict) and name in values else None
    return values


def replaced(values: Any, path: tuple[str, ...], value: Any) -> Any:
    changed = copy.deepcopy(values)
    inner = changed
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = value
    return changed


@pytest.fixture(scope="module")
def everything(helm: Helm) -> str:
    return render(helm, "--values", str(chart.CHART / "ci/everything-values.yaml"))


@pytest.mark.parametrize("path", list(leaves(VALUES)), ids=".".join)
def test_each_value_is_used(helm: Helm, everything: str, path: tuple[str, ...], tmp_path: Path) -> None:
    """Its default in place of the value of everything-values.yaml changes what is rendered, or is refused."""
    default, other = get(VALUES, path), get(EVERYTHING, path)
    if other in (None, default):
        assert isinstance(default, bool) or path[:1] in {("podSecurityContext",), ("securityContext",), ("shim",)}, (
            "everything-values.yaml has no other value"
        )
        other = not default if isinstance(default, bool) else "other"
        changed = replaced(EVERYTHING, path, other)
    else:
        changed = replaced(EVERYTHING, path, default)
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(changed))
    try:
        assert render(helm, "--values", str(tmp_path / "values.yaml")) != everything
    except Refused as refused:
        assert "validate.yaml" in str(refused), "refused with words of the chart"  # noqa: PT017


def test_large_numbers_stay_whole(everything: str) -> None:
    """YAML's numbers are floats to Helm, which prints 1000000 as 1e+06; the programs take integers only."""
    assert 'value: "1000000"' in everything


def test_two_programs_have_the_same_values_for_pods() -> None:
    only = {"enabled", "channelNamespace", "tls", "service", "ingress", "httpRoute"}
    assert VALUES["operator"].keys() - {"shards"} == VALUES["shim"].keys() - only


# Shards


def test_each_shard_is_an_operator_of_its_own(helm: Helm) -> None:
    """Of the tenants' Secrets it may read those of its namespaces only, and its Lease alone lets it write."""
    found = objects(render(helm, *SHARDED, "--set", "operator.shards.b={team-b}"))
    for shard in ("a", "b"):
        name = f"sms-channel-operator-{shard}"
        [deployment] = [each for each in found if (each["kind"], each["metadata"]["name"]) == ("Deployment", name)]
        pod = deployment["spec"]["template"]["spec"]
        env = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert pod["serviceAccountName"] == name
        assert env["SMSCHANNEL_CHANNEL_NAMESPACES"] == "team-a team-b"
        assert (env["SMSCHANNEL_SHARD"], env["SMSCHANNEL_SHARD_NAMESPACES"]) == (shard, f"team-{shard}")
        bound = [each for each in found if each["kind"] == "RoleBinding" and name in str(each["subjects"])]
        assert {each["metadata"]["namespace"] for each in bound} == {chart.NAMESPACE, f"team-{shard}"}
        fences = [each["spec"] for each in found if each.get("spec", {}).get("paramRef", {}).get("name") == name]
        assert [each["policyName"] for each in fences] == ["sms-channel-operator-fence"] * 2
    kinds = {each["kind"] for each in found if each["metadata"]["name"] == "sms-channel-operator-a"}
    assert kinds >= {"ServiceAccount", "Deployment", "PodDisruptionBudget", "NetworkPolicy"}
    names = {each["metadata"]["name"] for each in found if each["kind"] in {"Deployment", "ServiceAccount"}}
    assert names == {"sms-channel-operator-a", "sms-channel-operator-b"}


# Mistakes

# arguments and what helm says
REFUSED: tuple[tuple[tuple[str, ...], str], ...] = (
    ((), "webhookUrlTemplate is required"),
    (("--set", f"webhookUrlTemplate={TEMPLATE}"), "shim.tls.mode is required"),
    ((*GIVEN, "--set", "channelNamespaces={a,b}"), "must contain {namespace}, since channelNamespaces names several"),
    ((*GIVEN, "--set", "webhookUrlTemplate=https://sms.example.com/"), "must contain {instance_id} exactly once"),
    ((*GIVEN, "--set", "formerWebhookUrlTemplates={https://sms.example.com/}"), "must contain {instance_id} exactly"),
    ((*GIVEN, "--set", "channelNamespaces={sms-operator}"), "must not contain the release's own namespace"),
    ((*GIVEN, "--set", "shim.channelNamespace=b"), "is not one of channelNamespaces"),
    ((*GIVEN, "--set", "shim.tls.mode=certManager"), "issuerRef.name is required"),
    ((*GIVEN, "--set", "shim.ingress.enabled=true"), "shim.ingress.host is required"),
    ((*GIVEN, "--set", "shim.httpRoute.enabled=true"), "shim.httpRoute.parentRefs is required"),
    ((*GIVEN, "--set", "operator.replica=3"), "'replica' not allowed"),
    ((*GIVEN, "--set", "operator.replicas=three"), "want integer"),
    ((*GIVEN, "--set", "shim=false"), "want object"),
    ((*GIVEN, "--set", "operator.settings.twilioUrll=https://a"), "'twilioUrll' not allowed"),
    ((*SHARDED, "--set", "operator.shards.b={team-a,team-b}"), "operator.shards names namespace team-a twice"),
    ((*SHARDED, "--set", "operator.shards.b={team-b,team-c}"), "names namespace team-c, which channelNamespaces lacks"),
    (SHARDED, "operator.shards lacks namespace team-b of channelNamespaces"),
    ((*SHARDED, "--set", "operator.shards.B={team-b}"), "'B' does not match pattern"),
    ((*SHARDED, "--set", f"operator.shards.{'b' * 43}={{team-b}}"), "maxLength"),
    ((*SHARDED, "--set-json", "operator.shards.b=[]"), "minItems"),
    ((*GIVEN, "--set", "operator.settings.shard=a"), "'shard' not allowed"),
)


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_mistake_is_refused(helm: Helm, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(Refused) as refused:
        render(helm, *arguments)
    assert message in str(refused.value)


def test_template_that_is_as_long_as_it_may_be(helm: Helm) -> None:
    """The longest names that Kubernetes allows, and a release of another name."""
    longest = "a" * 63
    arguments = ("--set", f"channelNamespaces={{{longest}}}", *GIVEN)
    location = ("--namespace", "b" * 63, "--kube-version", "1.36.0")
    found = objects(helm("template", "c" * 53, str(chart.CHART), *location, *arguments))
    assert {each["metadata"].get("namespace", longest) for each in found} == {longest, "b" * 63}
    assert {each["metadata"]["name"] for each in found if each["kind"] == "Deployment"} == {
        "sms-channel-operator",
        "sms-api-shim",
    }


@pytest.mark.parametrize(("kubernetes", "has_policy"), [("1.32.0", False), ("1.35.9", False), ("1.36.0-gke.1", True)])
def test_finalizer_policy_is_for_a_kubernetes_that_has_it(helm: Helm, kubernetes: str, has_policy: bool) -> None:
    found = {each["kind"] for each in objects(render(helm, *GIVEN, kubernetes=kubernetes))}
    assert ("MutatingAdmissionPolicy" in found) == has_policy


def test_old_kubernetes_is_refused(helm: Helm) -> None:
    with pytest.raises(Refused, match=r"requires kubeVersion: >=1\.32"):
        render(helm, *GIVEN, kubernetes="1.29.0")


def test_proxy_leaves_out_the_api_server_and_its_port_is_open(helm: Helm, everything: str) -> None:
    """Without that, a pod behind a proxy would call its own API server through it."""
    found = objects(everything)
    for name in ("sms-channel-operator-a", "sms-channel-operator-b", "sms-api-shim"):
        [spec] = [each["spec"] for each in found if (each["kind"], each["metadata"]["name"]) == ("Deployment", name)]
        env = {each["name"]: each.get("value") for each in spec["template"]["spec"]["containers"][0]["env"]}
        assert env["NO_PROXY"] == "$(KUBERNETES_SERVICE_HOST),.svc,10.0.0.0/8"
        [policy] = [
            each["spec"] for each in found if (each["kind"], each["metadata"]["name"]) == ("NetworkPolicy", name)
        ]
        ports = {each["port"] for each in policy["egress"][0]["ports"]}
        assert {3128, 443, 16443} <= ports, "a proxy's port is the one that its URL names, or its scheme's"
