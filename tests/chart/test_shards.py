"""Two shards of two replicas each, under the rights and the admission policies that the chart gives them.

They share the records and the keyring, and nothing else: when one shard loses its leader, the other does not notice.
The lease is a little shorter than usual. `pytest -s` shows the times that were measured.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from deploy import chart
from deploy.local.stack import CHANNELS, OPERATOR, Options, Stack, free_port
from smschannel.api.errors import Fenced, KubernetesRefused
from smschannel.api.kube_client import KubeClient
from smschannel.api.names import core_path, leases_path
from smschannel.cli.main import cli
from smschannel.core.record import RECORD_LABEL
from tests.chart.conftest import Helm
from tests.cluster.steps import before, configured, delete, metric, name_of, records, wait_for, wait_reason, webhook
from tests.conftest import take_number

LEASE = 20
AT_ONCE = 20.0
"""Seconds for a takeover without waiting, on a busy machine: to load everything, and to configure a channel."""
TEMPLATE = "https://sms.example.com/{namespace}/instances/{instance_id}/channels/sms/webhook"
SHARDS = {"a": CHANNELS, "b": "team-b"}
SETTINGS = {
    "SMSCHANNEL_CHANNEL_NAMESPACES": " ".join(SHARDS.values()),
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "3600",
    "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "3600",
    "SMSCHANNEL_SLOW_INTERVAL_SECONDS": "5",
    "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
    "SMSCHANNEL_TWILIO_TIMEOUT_SECONDS": "2",
    "SMSCHANNEL_LEASE_DURATION_SECONDS": str(LEASE),
}
REPLICAS = [f"{shard}-{n}" for shard in SHARDS for n in (1, 2)]


@pytest.fixture(scope="module")
def manifests(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `deploy/manifests` would be with shards."""
    home = tmp_path_factory.mktemp("manifests")
    shards = {shard: [namespace] for shard, namespace in SHARDS.items()}
    values = {
        "webhookUrlTemplate": TEMPLATE,
        "channelNamespaces": list(SHARDS.values()),
        "operator": {"shards": shards},
    }
    (home / "values").write_text(yaml.safe_dump(values))
    location = ("--namespace", OPERATOR, "--kube-version", "1.36.0")
    rendered = helm(
        "template", chart.RELEASE, str(chart.CHART), *location, *chart.PLAIN, "--values", str(home / "values")
    )
    files = chart.split(rendered)
    for name, text in files.items():
        (home / name).write_text(text)
    names = sorted(files.keys() - set(chart.OPTIONAL), key=lambda name: (name not in chart.FIRST, name))
    (home / "kustomization.yaml").write_text(yaml.safe_dump({"resources": names}))
    return home


@pytest.fixture(scope="module")
def urls() -> dict[str, str]:
    """Where each replica serves its metrics."""
    return {name: f"http://127.0.0.1:{free_port()}" for name in REPLICAS}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, manifests: Path, urls: dict[str, str]) -> Iterator[Stack]:
    options = Options(webhook_url_template=TEMPLATE, manifests=manifests, operator_settings=SETTINGS)
    stack = Stack(tmp_path_factory.mktemp("shards"), options)
    stack.logs.mkdir()
    stack.fresh_numbers = itertools.count()  # type: ignore[attr-defined]
    try:
        stack.start_control_plane()
        stack.install()
        stack.start_twin()
        for name in REPLICAS:
            stack.make_pod(name, f"sms-channel-operator-{name[0]}")
            start(stack, urls, name)
        yield stack
    finally:
        stack.stop()


def start(stack: Stack, urls: dict[str, str], name: str) -> None:
    shard = name[0]
    settings = {"SMSCHANNEL_SHARD": shard, "SMSCHANNEL_SHARD_NAMESPACES": SHARDS[shard]}
    stack.start_operator(name, int(urls[name].rpartition(":")[2]), settings)


def leader(stack: Stack, urls: dict[str, str], shard: str) -> str:
    """Return the one replica of a shard that leads."""
    leading: list[str] = []

    def one_leads() -> bool:
        running = [name for name in REPLICAS if name[0] == shard and name in stack.pids()]
        leading[:] = [name for name in running if metric(urls[name], "smschannel_leader") == 1]
        return len(leading) == 1

    wait_for(one_leads, f"one replica of shard {shard} leads")
    return leading[0]


def work_of(url: str) -> dict[str, float]:
    """Return how often an operator has called Twilio, has written to Kubernetes, and has reconciled."""
    names = (
        "twilio_call_duration_seconds_count",
        "kubernetes_writes_total",
        "reconciles_total",
        "lease_acquired_total",
    )
    return {name: metric(url, f"smschannel_{name}") for name in names}


def test_shard_that_loses_its_leader_does_not_disturb_the_other(stack: Stack, urls: dict[str, str]) -> None:
    for namespace in SHARDS.values():
        made = [stack.manifest(take_number(stack), namespace=namespace) for _ in range(3)]
        stack.apply(*made)
        stack.wait_ready(*map(name_of, made), namespace=namespace)
    lost, other = leader(stack, urls, "a"), leader(stack, urls, "b")
    for name in (lost, other):
        assert metric(urls[name], "smschannel_claims") == metric(urls[name], "smschannel_channels") == 3
        assert (metric(urls[name], "smschannel_namespaces_led"), metric(urls[name], "smschannel_namespaces")) == (1, 2)
    held = {number: record for number, record in records(stack).items() if record.namespace == SHARDS["b"]}
    done = work_of(urls[other])

    began = time.monotonic()
    stack.stop_process(lost, kill=True)
    manifest = stack.manifest(take_number(stack))
    stack.apply(manifest)
    stack.wait_ready(name_of(manifest))
    seconds = time.monotonic() - began
    print(f"SIGKILL: {seconds:.2f} s until the standby of the shard configured a channel, with a lease of {LEASE} s")
    assert seconds <= LEASE + AT_ONCE
    assert leader(stack, urls, "a") != lost
    assert work_of(urls[other]) == done, "the other shard did nothing at all"
    assert {number: records(stack)[number] for number in held} == held
    start(stack, urls, lost)


def test_number_of_one_shard_is_in_use_in_the_other_until_it_is_freed(stack: Stack, urls: dict[str, str]) -> None:
    number = take_number(stack)
    first, second = stack.manifest(number), stack.manifest(number, namespace=SHARDS["b"])
    configured(stack, first)
    stack.apply(second)
    wait_reason(stack, name_of(second), "NumberInUse", namespace=SHARDS["b"])
    assert webhook(stack, number) == stack.webhook_url(name_of(first))
    delete(stack, name_of(first))
    wait_reason(stack, name_of(second), "Configured", namespace=SHARDS["b"])
    assert webhook(stack, number) == stack.webhook_url(name_of(second), SHARDS["b"])
    delete(stack, name_of(second), namespace=SHARDS["b"])
    assert webhook(stack, number) == before(number)
    assert number not in records(stack)


async def test_only_the_leader_of_each_shard_may_write(stack: Stack, urls: dict[str, str]) -> None:
    """Each by its own Lease; and a shard may read the Secrets of its own namespaces only."""
    leaders = {leader(stack, urls, shard) for shard in SHARDS}
    secret = {"apiVersion": "v1", "kind": "Secret"}
    meta = {"name": "pn" + "0" * 32, "namespace": OPERATOR, "labels": {RECORD_LABEL: "true"}}
    record: dict[str, Any] = {**secret, "metadata": meta}
    for name in REPLICAS:
        async with await KubeClient.connect(str(stack.operator_kubeconfig(name))) as api:
            write = api.request("POST", core_path(OPERATOR, "secrets"), record, params={"dryRun": "All"})
            if name in leaders:
                await write
            else:
                with pytest.raises(
                    Fenced, match=f"the operator's lease is held by {name[0]}-., and this token is bound"
                ):
                    await write
            for shard, namespace in SHARDS.items():
                listing = api.request("GET", core_path(namespace, "secrets"))
                if shard == name[0]:
                    await listing
                else:
                    with pytest.raises(KubernetesRefused, match="forbidden"):
                        await listing


async def test_lease_of_a_shard_belongs_to_the_operator(stack: Stack) -> None:
    """Who may write Leases in the namespace could else make himself the leader, or leave the shard without one."""
    subject = f"system:serviceaccount:{OPERATOR}:sms-api-shim"
    rules = [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["*"]}]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "leases", "namespace": OPERATOR}}
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "leases"}
    user = {"kind": "User", "name": subject, "apiGroup": "rbac.authorization.k8s.io"}
    stack.apply(
        {**role, "kind": "Role", "rules": rules}, {**role, "kind": "RoleBinding", "roleRef": ref, "subjects": [user]}
    )
    async with await KubeClient.connect(str(stack.home / "sms-api-shim.kubeconfig")) as api:
        for shard in SHARDS:
            with pytest.raises(KubernetesRefused, match="only the operator writes this object"):
                await api.request("DELETE", f"{leases_path(OPERATOR)}/sms-channel-operator-{shard}")


def test_commands_know_all_shards(stack: Stack, urls: dict[str, str]) -> None:
    """`doctor` names each leader, and `detach` does not begin while any shard would configure the channels again."""
    leaders = {shard: leader(stack, urls, shard) for shard in SHARDS}
    options = ["--kubeconfig", str(stack.kubeconfig)]
    shown = CliRunner().invoke(cli, ["doctor", *options]).output
    for shard, name in leaders.items():
        assert f"{name} leads shard {shard}, and renewed its Lease" in shown
    assert re.search(r"good +RBAC +The operator has all \d+ rights that it needs", shown)
    refused = CliRunner().invoke(cli, ["detach", "--all", "--orphan", "--yes", *options])
    assert refused.exit_code == 1
    assert f"kubectl -n {OPERATOR} scale deployment sms-channel-operator-a --replicas=0" in refused.output
