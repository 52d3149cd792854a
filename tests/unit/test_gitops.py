"""The files of deploy/gitops: examples open with the example's key, and tools get what docs/gitops.md says."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from smschannel.api.errors import Unreadable
from smschannel.api.resource import GROUP, SmsChannel
from smschannel.api.sealing import Binding, Keyring, PublicKey
from tests.documents import PAGES, ROOT, table
from tests.gitops import GITOPS
from tests.unit.memory import BEFORE, MemoryApi, MemoryTwilio, running, url_of
from tests.unit.virtual_time import virtually

PHONE = "+61400111222"
CLUSTERS = ("east", "west")
KEYRINGS = {
    name: Keyring.load(json.dumps(each))
    for name, each in json.loads((ROOT / "tests/gitops/example_keyrings.json").read_text()).items()
}
"""The private keys that the examples were sealed for. They are public: nothing else is sealed for them."""

FILES = sorted(path.relative_to(GITOPS) for path in GITOPS.rglob("*.yaml"))
EXAMPLES = [path for path in FILES if path.parts[0] == "example"]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all((GITOPS / path).read_text()))


def of_kind(kind: str, path: str) -> list[Any]:
    return [each for each in documents(Path(path)) if each["kind"] == kind]


def binding(channel: Any) -> Binding:
    return Binding(channel["metadata"]["namespace"], channel["metadata"]["name"], channel["spec"]["accountSid"])


# The example repository


def test_each_cluster_has_channels() -> None:
    assert {path.parent.name for path in EXAMPLES} == set(CLUSTERS)


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_example_opens_with_the_key_of_its_cluster_only(path: Path) -> None:
    [channel] = documents(path)
    sealed = channel["spec"]["credentials"]["sealed"]
    for cluster, keyring in KEYRINGS.items():
        if cluster == path.parent.name:
            assert keyring.unseal(sealed, binding(channel)).get_secret_value() == "not-a-token"
        else:
            with pytest.raises(Unreadable):
                keyring.unseal(sealed, binding(channel))


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_example_is_a_channel_in_a_file_of_its_name(path: Path) -> None:
    [channel] = documents(path)
    given = {"uid": "f1d7", "generation": 1, "creationTimestamp": "2026-01-02T03:04:05Z"}
    SmsChannel.model_validate({**channel, "metadata": {**given, **channel["metadata"]}})
    assert path.stem == channel["metadata"]["name"]
    assert re.fullmatch(r"AC0{31}[0-9]", channel["spec"]["accountSid"]), "clearly an example"
    assert re.fullmatch(r"\+1555010[0-9]{4}|\+6149157[0-9]{4}", channel["spec"]["phoneNumber"]), "reserved for examples"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_sealing_key_in_git_is_that_of_the_cluster(cluster: str) -> None:
    key = PublicKey.decode((GITOPS / "example" / cluster / "sealing.key").read_text().strip())
    assert key.fingerprint == KEYRINGS[cluster].current.public.fingerprint


def test_no_number_is_in_two_clusters() -> None:
    numbers = [documents(path)[0]["spec"]["phoneNumber"] for path in EXAMPLES]
    assert len(set(numbers)) == len(numbers)


# What the tools get


@pytest.mark.parametrize("path", FILES, ids=str)
def test_hosts_are_placeholders(path: Path) -> None:
    hosts = re.findall(r"(?:https|oci)://([^/\s'\"]+)", (GITOPS / path).read_text())
    assert [host for host in hosts if not host.endswith("example.com") and not host.endswith("default.svc")] == []


def test_argo_syncs_channels_after_the_operator_and_deletes_them_before_it() -> None:
    """Argo CD syncs waves in ascending order, and deletes in descending order: the operator outlives its channels."""
    operator, channels = of_kind("Application", "argocd/applications.yaml")
    waves = [int(each["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"]) for each in (operator, channels)]
    assert waves[0] < waves[1]
    for each in (operator, channels):
        assert each["metadata"]["finalizers"] == ["resources-finalizer.argocd.argoproj.io"]


def test_argo_applies_channels_as_their_owner() -> None:
    """`kubectl sms adopt` hands fields to a manager that applies on the server's side."""
    _, channels = of_kind("Application", "argocd/applications.yaml")
    assert {"ServerSideApply=true", "SkipDryRunOnMissingResource=true"} <= set(
        channels["spec"]["syncPolicy"]["syncOptions"]
    )
    assert channels["spec"]["source"]["directory"] == {"recurse": False, "include": "*.yaml"}


def test_flux_waits_and_prunes() -> None:
    [channels] = of_kind("Kustomization", "flux/channels.yaml")
    assert (channels["spec"]["wait"], channels["spec"]["prune"]) == (True, True)
    [repository] = of_kind("GitRepository", "flux/channels.yaml")
    assert channels["spec"]["sourceRef"] == {"kind": "GitRepository", "name": repository["metadata"]["name"]}
    [release] = of_kind("HelmRelease", "flux/operator.yaml")
    [chart] = of_kind("OCIRepository", "flux/operator.yaml")
    assert release["spec"]["chartRef"] == {"kind": "OCIRepository", "name": chart["metadata"]["name"]}


def test_both_tools_give_the_chart_the_same_values() -> None:
    operator, _ = of_kind("Application", "argocd/applications.yaml")
    [release] = of_kind("HelmRelease", "flux/operator.yaml")
    assert operator["spec"]["source"]["helm"]["valuesObject"] == release["spec"]["values"]


# The page


def test_tests_that_the_page_names_exist() -> None:
    rows = table("What happens", "Tested by")
    for _, names in rows:
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", names):
            assert f"def {name}(" in (ROOT / path).read_text(), name
        assert "::" in names
    assert len(rows) > 10


def test_page_names_the_annotations_that_exist() -> None:
    assert set(re.findall(rf"{re.escape(GROUP)}/[a-z-]+", PAGES["docs/gitops.md"])) <= {f"{GROUP}/check-now"}


# Backups that restore neither status nor uid


@pytest.mark.parametrize("operator_is_down", [False, True], ids=["operator runs", "operator is down meanwhile"])
def test_restored_backup_ends_configured_and_keeps_the_previous_webhook(operator_is_down: bool) -> None:
    """The record still names the former uid. A channel of another uid does not take it over: it makes a claim."""

    @virtually
    async def story() -> None:
        api, twilio = MemoryApi(), MemoryTwilio(PHONE)
        async with running(api, twilio):
            api.apply(1, PHONE)
            await asyncio.sleep(30)
            assert api.reason(1) == "Configured"
            if not operator_is_down:
                _come_back_from_backup(api)
                await asyncio.sleep(60)
        if operator_is_down:
            _come_back_from_backup(api)
        async with running(api, twilio):
            await asyncio.sleep(60)
            assert (api.reason(1), twilio.webhook(PHONE)) == ("Configured", url_of(1))
            channel = api.channel(1)
            assert channel
            assert [each.uid for each in api.records().values()] == [channel["metadata"]["uid"]]
            api.delete(1)
            await asyncio.sleep(60)
            assert (api.channel(1), twilio.webhook(PHONE)) == (None, BEFORE)

    story()


def _come_back_from_backup(api: MemoryApi) -> None:
    former = api.channel(1)
    assert former
    api.delete(1, force=True)
    restored = api.apply(1, PHONE)
    assert restored["metadata"]["uid"] != former["metadata"]["uid"]
    assert "conditions" not in restored.get("status", {})
