"""`deploy/manifests` on a real API server: nothing is left to its defaults, and Pod Security admits the pods."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kubernetes.dynamic.exceptions import ForbiddenError

from deploy import chart
from deploy.local.stack import OPERATOR, Stack
from tests.cluster.test_documents import documented, needs_kubectl, shell
from tests.documents import ROOT

OBJECTS = [each for path in sorted(chart.outputs()) for each in yaml.safe_load_all(path.read_text())]
DEPLOYMENTS = [each for each in OBJECTS if each["kind"] == "Deployment"]

# What no manifest can say, since each API server or cluster gives its own.
_OF_THE_SERVER = {"uid", "resourceVersion", "generation", "creationTimestamp", "managedFields"}
_OF_THE_CLUSTER = {
    "Service": {"clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"},
    "Namespace": {"finalizers"},
}


def apply(stack: Stack, manifest: Any, **options: Any) -> Any:
    resource = stack.api.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
    return stack.api.server_side_apply(
        resource,
        body=manifest,
        name=manifest["metadata"]["name"],
        namespace=manifest["metadata"].get("namespace"),
        field_manager="test",
        force_conflicts=True,
        **options,
    ).to_dict()


def comparable(live: Any) -> Any:
    found = {name: value for name, value in live.items() if name != "status"}
    found["metadata"] = {name: value for name, value in live["metadata"].items() if name not in _OF_THE_SERVER}
    if "spec" in found:
        given = _OF_THE_CLUSTER.get(live["kind"], set())
        found["spec"] = {name: value for name, value in live["spec"].items() if name not in given}
    return {name: value for name, value in found.items() if value != {}}


@pytest.mark.parametrize(
    "manifest", [pytest.param(each, id=f"{each['kind']} {each['metadata']['name']}") for each in OBJECTS]
)
def test_api_server_returns_what_is_shipped(installed: Stack, manifest: Any) -> None:
    """Otherwise GitOps controllers see a difference that no sync removes."""
    assert comparable(apply(installed, manifest, dry_run="All")) == manifest


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=[each["metadata"]["name"] for each in DEPLOYMENTS])
def test_pod_security_admits_the_pods(installed: Stack, deployment: Any) -> None:
    """The namespace enforces "restricted": a pod with one privilege is refused."""
    pods = installed.api.resources.get(api_version="v1", kind="Pod")
    template = copy.deepcopy(deployment["spec"]["template"])
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"]["generateName"] = "pod-"
    pods.create(body=pod, namespace=OPERATOR, dry_run="All")
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(ForbiddenError, match=r"violates PodSecurity .*restricted"):
        pods.create(body=pod, namespace=OPERATOR, dry_run="All")


@pytest.fixture
def deployed(installed: Stack) -> Iterator[Stack]:
    """An API server with the Deployments, too."""
    resource = installed.api.resources.get(api_version="apps/v1", kind="Deployment")
    for each in DEPLOYMENTS:
        apply(installed, each)
    yield installed
    for each in DEPLOYMENTS:
        resource.delete(name=each["metadata"]["name"], namespace=OPERATOR)


@needs_kubectl
def test_documented_uninstall_begins_with_the_deployments(deployed: Stack) -> None:
    """They are scaled to zero by their documented names, and nothing is left for `detach`."""
    environment = {"KUBECONFIG": str(deployed.kubeconfig)}
    [scale] = documented("docs/operations.md", "kubectl -n sms-operator scale")
    detach = documented("docs/operations.md", "kubectl sms detach --all --restore")[-1]
    shell(scale, environment=environment, cwd=ROOT)
    deployments = deployed.api.resources.get(api_version="apps/v1", kind="Deployment").get(namespace=OPERATOR)
    assert [each.spec.replicas for each in deployments.items] == [0, 0]
    assert shell(f"{detach} --yes", environment=environment, cwd=ROOT) == "Nothing to detach."


@needs_kubectl
def test_documented_webhook_setting_survives_the_next_apply(deployed: Stack) -> None:
    """The manifests have no webhook URL template, so applying them again does not take it away."""
    environment = {"KUBECONFIG": str(deployed.kubeconfig)}
    [set_env] = documented("README.md", "kubectl -n sms-operator set env")
    shell(set_env, environment=environment, cwd=ROOT)
    for each in DEPLOYMENTS:
        live = apply(deployed, each)
        names = {env["name"] for env in live["spec"]["template"]["spec"]["containers"][0]["env"]}
        assert ("SMSCHANNEL_WEBHOOK_URL_TEMPLATE" in names) == (live["metadata"]["name"] == "sms-channel-operator")
