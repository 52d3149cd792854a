"""`kubectl sms status, wait, check, export` and `doctor` against a running operator, also with a tenant's rights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from kubernetes import client

from deploy.local.stack import CHANNELS, OPERATOR, Stack
from smschannel.cli.main import cli
from tests.cluster.steps import configured, delete, name_of, patch, webhook
from tests.cluster.test_shim import Rest
from tests.conftest import take_number
from tests.manifests import INSTANCE

PROGRAM = Path(sys.executable).with_name("kubectl-sms")
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

pytestmark = pytest.mark.usefixtures("_as_tenant")


@pytest.fixture
def _as_tenant(tenant: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tenant))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def administrator(_as_tenant: None, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(stack.kubeconfig))


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def working(stack: Stack) -> Iterator[Any]:
    """A channel that works, and its number."""
    manifest = stack.manifest(take_number(stack))
    yield configured(stack, manifest)
    delete(stack, name_of(manifest))


# status


def test_tenant_sees_who_gets_the_messages(stack: Stack, working: Any) -> None:
    """With rights on SmsChannels alone: what may not be read is named, and nothing is guessed in its place."""
    name, number = name_of(working), working["spec"]["phoneNumber"]
    result = run("status", name)
    assert result.exit_code == 0, result.output
    assert f"Number     {number} ({working['status']['phoneNumberSid']}) of account" in result.stdout
    assert f"Messages   go to {webhook(stack, number)}, for " in result.stdout
    key = stack.public_key().fingerprint.hex()
    assert f"sealed with key {key}, the newest" in result.stdout
    assert "├─ Ready True, Configured, for " in result.stdout
    assert f"Not read: Events of namespace {CHANNELS}: events is forbidden" in result.stdout
    assert "Events: none" not in result.stdout, "they could not be read: nobody knows whether there are some"


def test_documents_have_the_same_as_the_text(working: Any) -> None:
    name = name_of(working)
    shown = json.loads(run("status", name, "-o", "json").stdout)
    assert shown["phoneNumber"] == working["spec"]["phoneNumber"]
    assert (shown["ready"], shown["reason"], shown["restStatus"]) == ("True", "Configured", "active")
    assert shown["routing"]["effective"] == "True"
    assert shown["events"] is None
    assert [each["type"] for each in shown["conditions"]] == ["Ready", "CredentialsValid", "WebhookEffective"]
    assert yaml.safe_load(run("status", name, "-o", "yaml").stdout) == shown
    assert run("status", name, "-o", "name").stdout == f"smschannel.channels.hydracore.io/{name}\n"


def test_watch_shows_every_change_until_the_channel_is_gone(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    name = name_of(configured(stack, manifest))
    with subprocess.Popen([PROGRAM, "status", name, "--watch", "-o", "wide"], **PIPES) as process:
        assert process.stdout
        assert process.stderr
        heading, first = process.stdout.readline(), process.stdout.readline()
        assert (heading.split()[0], first.split()[2:5]) == ("NAMESPACE", [number, "True", "Configured"])
        patch(stack, name, {"spec": {"suspend": True}})
        line = next(line for line in process.stdout if "Suspended" in line)
        assert number in line
        delete(stack, name)
        rest = process.stdout.read() + process.stderr.read()
    assert rest.endswith(f"SmsChannel {CHANNELS}/{name} is gone.\n")
    assert process.returncode == 0


@pytest.mark.parametrize("arguments", [(), ("-A",)], ids=["namespace", "all"])
@pytest.mark.usefixtures("administrator", "interruptible")
def test_watch_of_all_channels_shows_new_ones_and_ends_with_ctrl_c(
    stack: Stack, number: str, arguments: tuple[str, ...]
) -> None:
    manifest = stack.manifest(number)
    with subprocess.Popen([PROGRAM, "status", "--watch", "-o", "name", *arguments], **PIPES) as process:
        assert process.stdout
        name = name_of(configured(stack, manifest))
        assert next(line for line in process.stdout if name in line) == f"smschannel.channels.hydracore.io/{name}\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (errors, process.returncode) == ("", 130)
    delete(stack, name)


def test_list_shows_each_channel_on_a_line(working: Any) -> None:
    result = run("status")
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["NAMESPACE", "NAME", "NUMBER", "READY", "REASON", "MESSAGES", "SINCE"]
    [row] = [each for each in rows if name_of(working) in each]
    assert row.split()[2:6] == [working["spec"]["phoneNumber"], "True", "Configured", "Effective"]
    assert working["status"]["webhookUrl"] in run("status", "-o", "wide").stdout
    items = json.loads(run("status", "-o", "json").stdout)["items"]
    assert name_of(working) in {each["name"] for each in items}


def test_remedy_is_said_once(stack: Stack) -> None:
    manifest = stack.manifest("+61400999888")
    stack.apply(manifest)
    stack.wait_until(lambda each: "Stalled" in str(each), name_of(manifest))
    shown = run("status", name_of(manifest)).stdout
    assert shown.count("What to do: Check spec.phoneNumber and spec.accountSid") == 1
    assert "Messages   it is not known where they go: " in shown
    assert "NumberNotFound" in shown
    delete(stack, name_of(manifest))


@pytest.mark.usefixtures("administrator")
def test_events_are_shown_newest_first(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    configured(stack, manifest)
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    assert run("check", name_of(manifest)).exit_code == 0
    shown = run("status", name_of(manifest)).stdout
    assert "Warning  DriftCorrected: The number's webhook was changed at Twilio; it is corrected." in shown
    delete(stack, name_of(manifest))


def test_wrong_places_are_explained(working: Any) -> None:
    name = name_of(working)
    assert "You need the right to get and list SmsChannels there" in said(run("status", name, "-n", "team-b"))
    assert "You need the right" in said(run("status", "-A"))
    missing = str(uuid.uuid4())
    assert f"Namespace {CHANNELS} has no SmsChannel {missing}: name its namespace with -n." in said(
        run("status", missing)
    )


@pytest.mark.usefixtures("administrator")
def test_administrator_learns_where_the_channel_is(working: Any) -> None:
    name = name_of(working)
    expected = f"Namespace team-b has no SmsChannel {name}, but namespace {CHANNELS} has: name it with -n."
    assert expected in said(run("status", name, "-n", "team-b"))
    missing = str(uuid.uuid4())
    assert f"No namespace has an SmsChannel {missing}." in said(run("wait", missing))
    assert "There is no namespace nowhere" in said(run("status", missing, "-n", "nowhere"))


@pytest.mark.usefixtures("administrator")
def test_channel_that_nobody_watches_is_explained(stack: Stack) -> None:
    """It stays without conditions forever; the operator publishes which namespaces it watches."""
    stack.add_namespace("unwatched")
    manifest = stack.manifest("+61400999777", namespace="unwatched")
    stack.apply(manifest)
    shown = run("status", name_of(manifest), "-n", "unwatched").stdout
    assert "Ready      Unknown: No operator has reconciled this channel yet." in shown
    assert f"The operator does not watch namespace unwatched. It watches {CHANNELS}, team-b, team-c." in shown
    stack.delete(name_of(manifest), namespace="unwatched")


# wait and check


def test_wait_ends_when_the_channel_is_ready(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    stack.apply(manifest)
    result = run("wait", name_of(manifest), "--timeout", "60")
    assert (result.exit_code, result.stdout) == (0, f"SmsChannel {CHANNELS}/{name_of(manifest)} is ready.\n")
    stack.delete(name_of(manifest))
    gone = run("wait", name_of(manifest), "--for", "gone")
    assert (gone.exit_code, gone.stdout) == (0, f"SmsChannel {CHANNELS}/{name_of(manifest)} is gone.\n")
    assert run("wait", name_of(manifest), "--for", "gone").exit_code == 0, "it can be repeated"


def test_wait_ends_early_for_what_only_a_person_can_fix(stack: Stack) -> None:
    """kubectl wait would wait for its timeout."""
    manifest = stack.manifest("+61400999666")
    stack.apply(manifest)
    result = run("wait", name_of(manifest), "--timeout", "300")
    assert result.exit_code == 1
    assert "Only a person can make it ready." in result.stderr
    assert "What to do: Check spec.phoneNumber" in result.stderr
    assert "Nobody has deleted it." in said(run("wait", name_of(manifest), "--for", "gone", "--timeout", "1"))
    delete(stack, name_of(manifest))


def test_check_is_answered_by_the_operator(stack: Stack, working: Any) -> None:
    result = run("check", name_of(working))
    assert result.exit_code == 0, result.output
    assert "Ready True, Configured" in result.stdout
    handled = stack.channels.get(name=name_of(working), namespace=CHANNELS).to_dict()["status"]["lastHandledCheckNow"]
    assert handled.startswith("20"), "the request that this command made"


def test_check_says_that_nobody_answers(stack: Stack) -> None:
    """A suspended operator, or one that does not watch the namespace, never acknowledges the request."""
    manifest = stack.manifest("+61400999555", namespace="unwatched-too")
    stack.add_namespace("unwatched-too")
    stack.apply(manifest)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KUBECONFIG", str(stack.kubeconfig))
        result = run("check", name_of(manifest), "-n", "unwatched-too", "--timeout", "2")
    assert result.exit_code == 1
    assert "The operator has not checked it within 2 s: is it running? kubectl sms doctor" in result.stderr
    stack.delete(name_of(manifest), namespace="unwatched-too")


# export


def test_exported_manifest_is_the_channel(stack: Stack, number: str) -> None:
    """What REST made can be applied from Git, and says no more than a person would write."""
    instance, rest = str(uuid.uuid4()), Rest(stack)
    rest("POST", instance, rest.setup(number), Prefer="wait=30")
    result = run("export", instance)
    assert result.exit_code == 0, result.output
    assert f"belongs to the REST API. To hand it over to Git: kubectl sms adopt {instance} -n {CHANNELS}" in said(
        result
    )
    manifest = yaml.safe_load(result.stdout)
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["metadata"] == {"name": instance, "namespace": CHANNELS}
    assert manifest["spec"].keys() == {"accountSid", "phoneNumber", "credentials"}
    assert manifest["spec"]["credentials"].keys() == {"sealed"}
    assert stack.twin["auth_token"] not in result.output
    assert json.loads(run("export", instance, "-o", "json").stdout) == manifest
    before = stack.channels.get(name=instance, namespace=CHANNELS).to_dict()["spec"]
    patch(stack, instance, {"spec": manifest["spec"]})
    assert stack.channels.get(name=instance, namespace=CHANNELS).to_dict()["spec"] == before
    rest("DELETE", instance, Prefer="wait=30")


# doctor


@pytest.mark.usefixtures("administrator")
def test_doctor_sees_the_running_installation(stack: Stack, working: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMSCHANNEL_TWILIO_URL", stack.twilio_url)
    monkeypatch.setenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE", f"{stack.api_url}/{{namespace}}/{{instance_id}}")
    result = run("doctor", "-o", "json")
    found = {each["check"]: each for each in json.loads(result.stdout)["findings"]}
    good = ("CRD", "Policies", "RBAC", "Leader", "Versions", "Public key", "Keyring", "Quotas", "Webhook", "Twilio")
    assert {name: found[name]["text"] for name in good if found[name]["level"] != "good"} == {}
    assert "leads, and renewed its Lease after" in found["Leader"]["text"]
    assert found["Pods"]["level"] == "warning", "here the operator runs without a Deployment"
    assert result.exit_code == 0


def test_doctor_says_what_a_tenant_may_not_read(stack: Stack) -> None:
    result = run("doctor")
    assert result.exit_code == 3, result.output
    lines = result.stdout.splitlines()
    assert "good      Public key" in result.stdout
    unread = [line.split("  ")[1].strip() for line in lines if line.startswith("not read")]
    expected = "CRD Policies RBAC Leader Pods Versions Keyring Quotas Channels Webhook Twilio"
    assert unread == expected.split()
    assert result.stdout.count("Run it with the rights of an administrator.") == len(unread)


@pytest.mark.usefixtures("administrator")
def test_doctor_notices_that_nobody_leads(stack: Stack) -> None:
    leases: Any = client.CoordinationV1Api(stack.api.client)
    lease = leases.read_namespaced_lease("sms-channel-operator", OPERATOR)
    other = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "empty"}}
    stack.apply(other)
    shown = run("doctor", "--operator-namespace", "empty")
    assert shown.exit_code == 1
    assert "There is no Lease sms-channel-operator: no operator has started there." in shown.stdout
    spec = {"holderIdentity": lease.spec.holder_identity, "leaseDurationSeconds": 6}
    copy = {"metadata": {"name": "sms-channel-operator", "namespace": "empty"}, "spec": spec}
    leases.create_namespaced_lease("empty", copy)
    shown = run("doctor", "--operator-namespace", "empty")
    assert "holds the Lease sms-channel-operator, but did not renew it while this was watched." in shown.stdout


def test_unknown_instance_is_no_traceback() -> None:
    assert "a lower-case UUID with dashes" in said(run("status", "x"))
    assert "leave out INSTANCE" in said(run("status", INSTANCE, "-A"))
