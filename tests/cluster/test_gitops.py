"""What docs/gitops.md says, on a real API server: kubectl's verdicts, the files of deploy/gitops, restored backups."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml
from kubernetes import client

from deploy.local.stack import CHANNELS, Stack
from smschannel.api.kube_client import MERGE_PATCH
from tests.cluster.steps import (
    before,
    configured,
    contents_of,
    delete,
    name_of,
    patch,
    read_record,
    remove_finalizers,
    wait_reason,
    webhook,
)
from tests.cluster.test_documents import documented, needs_kubectl, shell
from tests.documents import ROOT
from tests.gitops import CONFIGMAP_KEY, HEALTH_LUA, Case, cases

PAGE = "docs/gitops.md"


# kubectl wait


@contextmanager
def stored(installed: Stack, case: Case, at: int) -> Iterator[str]:
    """Store a channel with its status; yields its name."""
    channel = copy.deepcopy(case.channel)
    generation = channel["metadata"].pop("generation")
    channel["metadata"].pop("deletionTimestamp", None)  # the API server sets it
    name = channel["metadata"]["name"] = f"00000000-0000-0000-0000-{at:012}"
    status = channel.pop("status")
    installed.channels.create(body=channel, namespace=CHANNELS)
    if generation == 2:
        patch(installed, name, {"spec": {"suspend": True}})
    if "conditions" in status:
        installed.channels.status.patch(
            name=name, namespace=CHANNELS, body={"status": status}, content_type=MERGE_PATCH
        )
    try:
        yield name
    finally:
        remove_finalizers(installed, name)
        installed.channels.delete(name=name, namespace=CHANNELS)


@needs_kubectl
@pytest.mark.parametrize(("at", "case"), list(enumerate(cases())), ids=[case.name for case in cases()])
def test_kubectl_wait_agrees(installed: Stack, at: int, case: Case) -> None:
    with stored(installed, case, at) as name:
        command = ["kubectl", "--kubeconfig", str(installed.kubeconfig), "-n", CHANNELS]
        command += ["wait", "--for=condition=Ready", f"smsch/{name}", "--timeout=0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ("condition met" in done.stdout) is (case.ready == "True"), done.stderr


# The files


@needs_kubectl
def test_health_check_is_installed_as_documented(installed: Stack) -> None:
    meta = {"name": "argocd-cm", "namespace": "argocd"}
    installed.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "argocd"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"url": "kept"}},
    )
    [command] = documented(PAGE, "kubectl -n argocd patch")
    shell(command, environment={"KUBECONFIG": str(installed.kubeconfig)}, cwd=ROOT)
    patched: Any = client.CoreV1Api(installed.api.client).read_namespaced_config_map("argocd-cm", "argocd")
    assert patched.data == {"url": "kept", CONFIGMAP_KEY: HEALTH_LUA.read_text()}


@needs_kubectl
@pytest.mark.parametrize("cluster", ["east", "west"])
def test_example_channels_are_accepted(installed: Stack, cluster: str) -> None:
    """kubectl asks for strict validation: no field is unknown."""
    command = f"kubectl apply --dry-run=server -f deploy/gitops/example/{cluster}"
    output = shell(command, environment={"KUBECONFIG": str(installed.kubeconfig)}, cwd=ROOT)
    assert "smschannel.channels.hydracore.io/" in output


@pytest.mark.parametrize("cluster", ["east", "west"])
def test_example_channels_stay_in_sync(installed: Stack, cluster: str) -> None:
    """A field in Git that the API server drops or changes would be OutOfSync forever."""
    for path in sorted((ROOT / "deploy/gitops/example" / cluster).glob("*.yaml")):
        manifest = yaml.safe_load(path.read_text())
        stored = installed.channels.create(body=manifest, namespace=CHANNELS, dry_run="All").to_dict()
        assert _is_part(manifest, stored), path.name


def _is_part(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(found, dict):
        return bool(wanted) and all(name in found and _is_part(each, found[name]) for name, each in wanted.items())
    return wanted is not None and wanted == found


# Backups that restore neither status nor uid


def from_backup(channel: dict[str, Any]) -> dict[str, Any]:
    """The channel as Velero creates it again: without status, uid and what else the API server gives."""
    meta = {name: channel["metadata"][name] for name in ("name", "namespace", "finalizers")}
    return {**{field: channel[field] for field in ("apiVersion", "kind", "spec")}, "metadata": meta}


@pytest.mark.parametrize("operator_is_down", [False, True], ids=["operator runs", "operator is down meanwhile"])
def test_restored_backup_ends_configured_and_keeps_the_previous_webhook(
    stack: Stack, number: str, operator_is_down: bool
) -> None:
    """The record still names the former uid. A channel of another uid does not take it over: it makes a claim."""
    channel = configured(stack, stack.manifest(number))
    name, uid = name_of(channel), channel["metadata"]["uid"]
    if operator_is_down:
        stack.stop_process("operator")
    patch(stack, name, {"metadata": {"finalizers": ["example.com/hold"]}})
    stack.delete(name)
    remove_finalizers(stack, name)
    stack.wait_gone(name)
    stack.channels.create(body=from_backup(channel), namespace=CHANNELS)
    if operator_is_down:
        stack.start_operator()
    restored = wait_reason(stack, name, "Configured")
    assert restored["metadata"]["uid"] != uid
    assert webhook(stack, number) == stack.webhook_url(name)
    record = read_record(stack, number)
    assert record.metadata.annotations["channels.hydracore.io/channel-uid"] == restored["metadata"]["uid"]
    previous = contents_of(stack, record).previous
    assert previous is not None
    assert previous.url == before(number)
    delete(stack, name)
    assert webhook(stack, number) == before(number)
