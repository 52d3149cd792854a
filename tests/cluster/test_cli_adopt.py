"""`kubectl sms adopt`: channels change hands between REST and Kubernetes without a gap at Twilio."""

from __future__ import annotations

import copy
import uuid
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from kubernetes import client

from deploy.local.stack import CHANNELS, Stack
from smschannel.api.ownership import REST_MANAGER, other_owners, owned_by_rest
from smschannel.cli.main import cli
from tests.cluster.test_shim import Rest, patch, resource

APPLY = "application/apply-patch+yaml"


@pytest.fixture
def rest(stack: Stack) -> Rest:
    return Rest(stack)


@pytest.fixture(autouse=True)
def _as_administrator(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(stack.kubeconfig))
    monkeypatch.setenv("COLUMNS", "200")


def adopt(instance: str, *options: str) -> Result:
    return CliRunner().invoke(cli, ["adopt", instance, "-n", CHANNELS, *options])


def raw(stack: Stack, instance: str) -> Any:
    """The channel as it is on the wire."""
    return client.CustomObjectsApi(stack.channels.client.client).get_namespaced_custom_object(
        "channels.hydracore.io", "v1", CHANNELS, "smschannels", instance
    )


def apply_as(stack: Stack, manifest: Any, manager: str, *, force: bool = False) -> Any:
    return stack.channels.patch(
        name=manifest["metadata"]["name"],
        namespace=CHANNELS,
        body=manifest,
        content_type=APPLY,
        field_manager=manager,
        force_conflicts=force,
    )


class Unchanged:
    """Checks at the end that the channel has the same values, and that nothing was written to Twilio meanwhile."""

    def __init__(self, stack: Stack, instance: str) -> None:
        self.stack, self.instance = stack, instance

    def __enter__(self) -> None:
        self.before = resource(self.stack, self.instance)
        self.stack.twin_call("DELETE", "/journal")

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            return
        after = resource(self.stack, self.instance)
        assert after["spec"] == self.before["spec"]
        for field in ("uid", "generation", "finalizers", "labels", "annotations"):
            assert after["metadata"].get(field) == self.before["metadata"].get(field), field
        assert after["status"] == self.before["status"]
        assert [each for each in self.stack.twin_call("GET", "/journal")["entries"] if each["method"] != "GET"] == []


def created(stack: Stack, number: str, how: str) -> str:
    """A working channel that Kubernetes owns, made in one of the ways people use."""
    manifest = stack.manifest(number)
    name = str(manifest["metadata"]["name"])
    if how == "applied":
        stack.apply(manifest)
    else:  # kubectl create, as from a backup
        stack.channels.create(namespace=CHANNELS, body=manifest, field_manager="kubectl-create")
    stack.wait_ready(name)
    if how == "without managedFields":
        patch(stack, name, {"metadata": {"managedFields": [{}]}})
    return name


@pytest.mark.parametrize(
    ("how", "owner"),
    [("applied", "kubectl"), ("restored from a backup", "kubectl-create"), ("without managedFields", None)],
)
def test_channel_is_handed_over_to_rest(stack: Stack, rest: Rest, number: str, how: str, owner: str | None) -> None:
    instance = created(stack, number, how)
    refused = rest("POST", instance, rest.setup(number))
    assert refused.status == 409
    with Unchanged(stack, instance):
        if owner:
            shown = adopt(instance, "--for", "rest")
            assert shown.exit_code == 1
            assert f"  {owner}: accountSid, phoneNumber, credentials\n" in shown.stderr
            assert "repeat the command with --force" in shown.stderr
            assert rest("POST", instance, rest.setup(number)).status == 409, "nothing was changed"
        done = adopt(instance, "--for", "rest", *(["--force"] if owner else []))
        assert (done.exit_code, done.stdout) == (0, ""), done.stderr
        assert f"belong to {REST_MANAGER} now." in done.stderr
        again = adopt(instance, "--for", "rest")
        assert again.exit_code == 0, "it can be repeated, and needs no force then"
    changed = rest("POST", instance, rest.setup(number), Prefer="wait=30")
    assert (changed.status, changed.body["status"]) == (200, "active")
    assert rest("DELETE", instance, Prefer="wait=30").status == 204


def test_command_in_the_409_works_as_it_is_written(stack: Stack, rest: Rest, number: str) -> None:
    instance = created(stack, number, "restored from a backup")
    detail = rest("DELETE", instance).body["detail"]
    command = detail.split("kubectl sms ")[1].split()
    assert command == ["adopt", instance, "--for", "rest", "-n", CHANNELS]
    assert "kubectl-create: accountSid" in CliRunner().invoke(cli, command).stderr
    assert CliRunner().invoke(cli, [*command, "--force"]).exit_code == 0
    assert rest("DELETE", instance, Prefer="wait=30").status == 204


def test_channel_is_handed_over_to_git(stack: Stack, rest: Rest, number: str) -> None:
    """The printed manifest is what the channel is: applying it as Git changes nothing and needs no force."""
    instance = str(uuid.uuid4())
    rest("POST", instance, rest.setup(number), Prefer="wait=30")
    patch(stack, instance, {"spec": {"driftPolicy": "Report"}}, manager="kubectl-patch")
    stack.wait_ready(instance)
    with Unchanged(stack, instance):
        options = ("--for", "git", "--manager", "argocd-controller")
        assert f"  {REST_MANAGER}: accountSid, phoneNumber, credentials\n" in adopt(instance, *options).stderr
        done = adopt(instance, *options, "--force")
        assert done.exit_code == 0, done.stderr
        assert stack.twin["auth_token"] not in done.output
        channel = raw(stack, instance)
        assert other_owners(channel, "argocd-controller") == {}
        assert not owned_by_rest(channel)
        manifest = yaml.safe_load(done.stdout)
        assert manifest["spec"]["driftPolicy"] == "Report"
        assert set(manifest["spec"]) == {"accountSid", "phoneNumber", "credentials", "driftPolicy"}
        apply_as(stack, manifest, "argocd-controller")
        answer = rest("POST", instance, rest.setup(number))
        assert (answer.status, "by argocd-controller:" in answer.body["detail"]) == (409, True)
    number_only = copy.deepcopy(manifest)
    number_only["spec"]["takeoverPolicy"] = "IfUnused"
    apply_as(stack, number_only, "argocd-controller")
    assert resource(stack, instance)["metadata"]["finalizers"], "what REST applied besides stays"


def test_adoption_keeps_what_the_adopter_applied_before(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number, takeoverPolicy="IfUnused")
    manifest["metadata"]["labels"] = {"team": "a"}
    instance = str(manifest["metadata"]["name"])
    apply_as(stack, manifest, "argocd-controller")
    patch(stack, instance, {"spec": {"accountSid": "AC" + "1" * 32}}, manager="kubectl-edit")
    patch(stack, instance, {"spec": {"accountSid": stack.twin["account_sid"]}}, manager="kubectl-edit")
    done = adopt(instance, "--for", "git", "--manager", "argocd-controller", "--force")
    assert done.exit_code == 0, done.stderr
    channel = resource(stack, instance)
    assert (channel["metadata"]["labels"], channel["spec"]["takeoverPolicy"]) == ({"team": "a"}, "IfUnused")
    smaller = copy.deepcopy(manifest)
    del smaller["metadata"]["labels"]
    apply_as(stack, smaller, "argocd-controller")
    assert not resource(stack, instance)["metadata"].get("labels"), "the label was still the adopter's"


def test_missing_channel_is_explained() -> None:
    instance = str(uuid.uuid4())
    result = adopt(instance, "--for", "rest")
    assert result.exit_code == 1
    assert f"No namespace has an SmsChannel {instance}." in result.stderr


def test_missing_right_is_explained(stack: Stack, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shim's own token it does not work: its policy keeps it from taking a channel."""
    instance = created(stack, number, "applied")
    monkeypatch.setenv("KUBECONFIG", str(stack.home / "sms-api-shim.kubeconfig"))
    result = adopt(instance, "--for", "rest", "--force")
    assert result.exit_code == 1
    assert "it belongs to kubectl" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "rest", "--manager", "kubectl"], "--manager is for --for git"),
        (["--for", "git", "--manager", REST_MANAGER], "use --for rest"),
        (["--for", "git", "--manager", "two words"], "no spaces"),
        (["--for", "git", "--manager", ""], "1 to 128"),
        (["--for", "kubectl"], "'rest', 'git'"),
        ([], "Missing option '--for'"),
    ],
)
def test_usage_is_explained(options: list[str], message: str) -> None:
    result = adopt(str(uuid.uuid4()), *options)
    assert result.exit_code == 2
    assert message in result.stderr
