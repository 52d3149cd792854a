"""Helm installs, upgrades and removes the chart on a real API server. tests/kind does so where there are pods, too."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from deploy import chart
from deploy.local.stack import Stack
from tests.chart.conftest import Helm, Refused, run, tool
from tests.chart.test_render import GIVEN, objects, render
from tests.documents import ROOT, commands
from tests.unit.test_chart import PROFILES

RELEASE = (chart.RELEASE, str(chart.CHART), "--namespace", chart.NAMESPACE)
_CLUSTER_SCOPED = ("clusterrole", "clusterrolebinding", "validatingadmissionpolicy", "mutatingadmissionpolicy")


@pytest.fixture
def cluster(control_plane: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """An API server with nothing installed, before and after."""
    monkeypatch.setenv("KUBECONFIG", str(control_plane.cluster.kubeconfig))
    yield control_plane
    if chart.RELEASE in (listed := run(tool("helm"), "list", "--all-namespaces", "--short")):
        run(tool("helm"), "uninstall", chart.RELEASE, "--namespace", chart.NAMESPACE)
    assert listed.split() in ([], [chart.RELEASE])
    kubectl("delete", "--ignore-not-found", "-k", str(chart.MANIFESTS))
    kubectl("delete", "--ignore-not-found", "-f", str(chart.MANIFESTS / "finalizer-policy.yaml"))
    kubectl("wait", "--for=delete", "namespace/sms-operator", "namespace/sms-channels", "--timeout=60s")


def kubectl(*arguments: str) -> str:
    return run(tool("kubectl"), *arguments)


def versions(control_plane: Stack, rendered: str) -> dict[tuple[str, str], str]:
    """Return the resourceVersion of each object of a release."""
    found = {}
    for each in objects(rendered):
        resource = control_plane.api.resources.get(api_version=each["apiVersion"], kind=each["kind"])
        name, namespace = each["metadata"]["name"], each["metadata"].get("namespace")
        live = resource.get(name=name, namespace=namespace)
        found[each["kind"], f"{namespace}/{name}"] = live.metadata.resourceVersion
    return found


def test_documented_installation_and_uninstallation(
    cluster: Stack, helm: Helm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The commands of the README and of docs/operations.md, word for word, except those that wait for pods."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "helm").symlink_to(tool("helm"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    install, label = (
        each.text
        for each in commands()
        if each.page == "README.md" and each.text.startswith(("helm install", "kubectl label namespace"))
    )
    notes = run("/bin/sh", "-c", install)
    assert "rollout status deployment/sms-channel-operator" in notes
    assert "pod-security.kubernetes.io/enforce=restricted" in notes
    run("/bin/sh", "-c", label)
    assert "pod-security" not in helm("upgrade", *RELEASE, "--reuse-values").partition("NOTES:")[2], "it is done"
    crd, channels = "crd/smschannels.channels.hydracore.io", "namespace/sms-channels"
    run("/bin/sh", "-c", "helm uninstall sms-channel-operator --namespace sms-operator")
    assert kubectl("get", "--output=name", crd, channels).split()[1] == channels, "channels survive a mistake"
    assert kubectl("get", "--output=name", "--all-namespaces", "deployments,clusterroles,roles").count("sms-") == 0
    for each in commands():
        if each.page == "docs/operations.md" and each.text.startswith(
            ("kubectl delete crd", "kubectl delete namespace")
        ):
            run("/bin/sh", "-c", each.text)


def test_second_upgrade_writes_nothing(cluster: Stack, helm: Helm) -> None:
    helm("install", *RELEASE, "--create-namespace", *GIVEN)
    rendered = render(helm, *GIVEN)
    before = versions(cluster, rendered)
    helm("upgrade", *RELEASE, *GIVEN)
    assert versions(cluster, rendered) == before
    helm("upgrade", *RELEASE, *GIVEN, "--set", "operator.replicas=3")
    assert versions(cluster, rendered) != before
    helm("rollback", chart.RELEASE, "--namespace", chart.NAMESPACE)
    deployment: Any = client.AppsV1Api(cluster.api.client).read_namespaced_deployment(chart.RELEASE, chart.NAMESPACE)
    assert deployment.spec.replicas == 2


def test_second_release_is_refused(cluster: Stack, helm: Helm) -> None:
    """There is one operator in a cluster: objects of the cluster have fixed names, and Helm sees whose they are."""
    helm("install", *RELEASE, "--create-namespace", *GIVEN)
    other = ("other", str(chart.CHART), "--namespace", "other", "--create-namespace")
    for values in ((), ("--set", "channelNamespaces={b},crd.install=false")):
        with pytest.raises(Refused, match=r"cannot be imported into the current release.*sms-channel-operator"):
            helm("install", *other, *GIVEN, *values)
    kubectl("delete", "--ignore-not-found", "namespace", "other")


def test_plain_manifests_become_a_release(cluster: Stack, helm: Helm) -> None:
    """As docs/operations.md says. Else the shim would keep the certificate of the manifests beside plain HTTP."""
    kubectl("apply", "-k", str(chart.MANIFESTS))
    with pytest.raises(Refused, match="invalid ownership metadata"):
        helm("install", *RELEASE, *GIVEN)
    [delete] = [each.text for each in commands() if "delete deployments,services" in each.text]
    run("/bin/sh", "-c", delete)
    helm("install", *RELEASE, *GIVEN, "--take-ownership")
    before = versions(cluster, rendered := render(helm, *GIVEN))
    for each in objects(rendered):
        if each["kind"] in {"Deployment", "Service", "NetworkPolicy"}:
            resource = cluster.api.resources.get(api_version=each["apiVersion"], kind=each["kind"])
            live = resource.get(name=each["metadata"]["name"], namespace=chart.NAMESPACE).to_dict()
            assert {key: live["spec"][key] for key in each["spec"]} == each["spec"]
    helm("upgrade", *RELEASE, *GIVEN)
    assert versions(cluster, rendered) == before


@pytest.mark.parametrize("profile", PROFILES, ids=[each.name for each in PROFILES])
def test_api_server_accepts_each_profile(cluster: Stack, helm: Helm, profile: Any) -> None:
    """Strictly: with an unknown field it would refuse. Kinds of other projects are left out."""
    kubectl("apply", "-k", str(chart.MANIFESTS))
    for name in ("team-a", "team-b", "team-c"):
        kubectl("create", "namespace", name)
    try:
        known = [
            each
            for each in objects(render(helm, "--values", str(profile)))
            if "." not in each["apiVersion"]
            or (re.search(r"\.k8s\.io/|^(apps|policy)/", each["apiVersion"]) and each["kind"] != "HTTPRoute")
        ]
        run(
            tool("kubectl"),
            "apply",
            "--dry-run=server",
            "--validate=strict",
            "-f",
            "-",
            stdin=yaml.safe_dump_all(known),
        )
    finally:
        kubectl("delete", "namespace", "team-a", "team-b", "team-c")
