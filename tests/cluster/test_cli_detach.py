"""`kubectl sms release` on the real API server: what is owed is paid or named, nothing waits for the operator any more.

These tests have a stack of their own, in which the operator runs only to configure channels.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from kubernetes import client

from deploy.local.stack import CHANNELS, OPERATOR, ROOT, Options, Stack
from smschannel.api.resource import FINALIZER
from smschannel.cli import detach
from smschannel.cli.main import cli
from tests.cluster.steps import name_of, patch, take_finalizers_off
from tests.conftest import take_number
from tests.documents import section

PROGRAM = Path(sys.executable).with_name("kubectl-sms")

Configured = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """API server and twin; no operator, and no shim."""
    stack = Stack(tmp_path_factory.mktemp("quiet"), Options(numbers=60))
    stack.fresh_numbers = itertools.count()  # type: ignore[attr-defined]
    try:
        stack.start_control_plane()
        stack.install()
        stack.start_twin()
        with_operator(stack)  # its first start makes the keyring, which manifests are sealed for
        yield stack
        assert stack.twin_call("GET", "/violations")["violations"] == [], "only SmsUrl and SmsMethod are ever written"
    finally:
        stack.stop()


@pytest.fixture(autouse=True)
def _as_administrator(quiet: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left of a test: neither faults nor channels nor debts."""
    monkeypatch.setenv("KUBECONFIG", str(quiet.kubeconfig))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(detach, "_WATCHED", 1)
    yield
    quiet.twin_call("DELETE", "/faults")
    done(release("--all", "--let-go", "--yes", "--kubeconfig", str(quiet.kubeconfig)))
    for each in quiet.channels.get(namespace=CHANNELS).to_dict()["items"]:
        quiet.delete(each["metadata"]["name"])
    assert quiet.records() == []


@pytest.fixture
def configured(quiet: Stack) -> Configured:
    """Ready channels, each on a number of its own; the operator has stopped since."""

    def make(count: int = 1, **spec: Any) -> list[Any]:
        manifests = [quiet.manifest(take_number(quiet), **spec) for _ in range(count)]
        with_operator(quiet, *manifests)
        return manifests

    return make


def with_operator(stack: Stack, *manifests: Any) -> None:
    stack.start_operator()
    try:
        stack.apply(*manifests)
        if manifests:
            stack.wait_ready(*(name_of(each) for each in manifests))
    finally:
        stack.stop_process("operator")


def release(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["release", *arguments], input=stdin)


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def refusal(result: Result) -> str:
    assert result.exit_code in {1, 2}, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def number_of(manifest: Any) -> str:
    return str(manifest["spec"]["phoneNumber"])


def url_at(stack: Stack, manifest: Any) -> str:
    return str(stack.number(number_of(manifest))["sms_url"] or "")


def before(manifest: Any) -> str:
    return f"https://before.example.com/{number_of(manifest)[1:]}"


def ours(stack: Stack, manifest: Any) -> str:
    return stack.options.webhook_url_template.replace("{instance_id}", name_of(manifest))


def finalizers(stack: Stack, manifest: Any) -> list[str]:
    return list(stack.channels.get(name=name_of(manifest), namespace=CHANNELS).metadata.finalizers or ())


def delete_crd(stack: Stack) -> None:
    """Ends when it is gone with all its channels, or fails after a minute."""
    _delete(stack, yaml.safe_load((ROOT / "crds/smschannels.yaml").read_text()))
    stack.api.resources.invalidate_cache()


CONTAINER = {"name": "main", "image": "example.com/image"}


def deployment_of(name: str) -> Any:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [CONTAINER]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": OPERATOR},
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": template},
    }


@pytest.fixture
def crd_back(quiet: Stack) -> Iterator[None]:
    yield
    quiet.install()


# Giving back


def test_gives_back_what_the_numbers_pointed_at(quiet: Stack, configured: Configured, crd_back: None) -> None:
    """To the letter: a fragment holds connection overrides, and a password stays in it without being shown."""
    found = "https://user:s3cret@before.example.com/sms?x=1#rc=2&rp=all"
    special = quiet.manifest(take_number(quiet))
    quiet.twin_call("PATCH", f"/numbers/{number_of(special)}", {"sms_url": found, "sms_method": "GET"})
    with_operator(quiet, special)
    plain = configured(3)

    text = done(release("--all", "--give-back", "--yes"))
    number = quiet.number(number_of(special))
    assert (number["sms_url"], number["sms_method"]) == (found, "GET")
    assert [url_at(quiet, each) for each in plain] == [before(each) for each in plain]
    sid = number["sid"]
    assert (
        f"{CHANNELS}/{name_of(special)}: gave back {number_of(special)} ({sid}): SmsUrl {ours(quiet, special)} ->"
        " https://***@before.example.com/sms?x=1#rc=2&rp=all, SmsMethod POST -> GET\n"
    ) in text
    assert "s3cret" not in text
    assert text.endswith("4 of 4 released.\n")
    assert quiet.records() == []
    assert [finalizers(quiet, each) for each in [special, *plain]] == [[]] * 4
    assert done(release("--all", "--give-back", "--yes")) == "Nothing to release.\n"
    delete_crd(quiet)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_it_may_be_interrupted_and_repeated(quiet: Stack, configured: Configured, how: signal.Signals) -> None:
    """At the worst moment, too: Twilio has the number back, and its answer is still on the way."""
    manifests = configured(4)
    lost = quiet.number(number_of(manifests[0]))["sid"]
    hang = {"match": {"method": "POST", "path": lost}, "action": {"kind": "hang", "after": True}}
    quiet.twin_call("POST", "/faults", hang)
    command = [str(PROGRAM), "release", "--all", "--give-back", "--yes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        told = [process.stdout.readline() for _ in range(3)]
        process.send_signal(how)
        rest = process.stdout.read() + process.stderr.read()
    assert all("gave back" in line for line in told)
    assert name_of(manifests[0]) not in rest
    assert process.returncode == (1 if how is signal.SIGINT else -signal.SIGKILL)
    if how is signal.SIGINT:
        assert "Interrupted. What is done is done; repeat the command to go on." in rest
        assert "Traceback" not in rest
    assert len(quiet.records()) == 1
    assert finalizers(quiet, manifests[0]) == [FINALIZER]

    quiet.twin_call("DELETE", "/faults")
    text = done(release("--all", "--give-back", "--yes"))
    assert text.endswith("1 of 1 released.\n")
    assert [url_at(quiet, each) for each in manifests] == [before(each) for each in manifests]
    assert quiet.records() == []


def test_a_debt_that_twilio_refuses_is_kept_and_named(quiet: Stack, configured: Configured) -> None:
    [account] = quiet.twin_call("POST", "/seed", {"accounts": 1, "numbers": 1, "first": "+61495000000"})["accounts"]
    [other] = configured(1)
    refused = quiet.manifest(account["phone_numbers"][0], account=account)
    with_operator(quiet, refused)
    quiet.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "suspended"})

    result = release("--all", "--give-back", "--yes")
    said = refusal(result)
    sid = quiet.number(number_of(refused))["sid"]
    assert f"{CHANNELS}/{name_of(refused)}: NOT given back: {number_of(refused)} ({sid}): " in result.stdout
    assert "The Twilio account is suspended or closed" in result.stdout
    assert f"1 of 2 released. Still owed: {CHANNELS}/{name_of(refused)}. Mend what is said above and repeat" in said
    assert "--let-go" in said
    assert url_at(quiet, other) == before(other), "one that cannot be paid keeps no other from being paid"
    assert len(quiet.records()) == 1
    assert finalizers(quiet, refused) == [FINALIZER]

    quiet.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "active"})
    assert done(release("--all", "--give-back", "--yes")).endswith("1 of 1 released.\n")
    assert url_at(quiet, refused) == "https://demo.twilio.com/welcome/sms/reply"


def test_what_mends_by_itself_is_tried_again(quiet: Stack, configured: Configured) -> None:
    """Too many requests at once are no reason to call the administrator again."""
    manifests = configured(3)
    busy = {"kind": "status", "status": 429, "code": 20429, "retry_after": 1}
    quiet.twin_call("POST", "/faults", {"match": {"method": "POST", "count": 2}, "action": busy})
    result = release("--all", "--give-back", "--yes")
    assert "not released yet: again in 1 s." in result.stderr
    assert done(result).endswith("3 of 3 released.\n")
    assert "NOT given back" not in result.stdout, "it is told once, when it is known"
    assert [url_at(quiet, each) for each in manifests] == [before(each) for each in manifests]


def test_while_twilio_is_down_everything_is_kept(quiet: Stack, configured: Configured) -> None:
    manifests = configured(2)
    quiet.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}})
    result = release("--all", "--give-back", "--yes")
    assert "0 of 2 released. Still owed" in refusal(result)
    assert result.stdout.count("Twilio answers HTTP 503") == 2, "and it is not asked for ever"
    assert len(quiet.records()) == 2
    assert [finalizers(quiet, each) for each in manifests] == [[FINALIZER]] * 2


def test_nothing_is_written_off_for_being_owed_long(
    quiet: Stack, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator gives up what is owed for too long; who runs the command decides that for themselves."""
    [manifest] = configured()
    take_finalizers_off(quiet, name_of(manifest))
    quiet.delete(name_of(manifest))
    monkeypatch.setenv("SMSCHANNEL_RESTORE_DEADLINE_SECONDS", "0")
    quiet.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}})
    for _ in range(2):  # the first of them notes since when it is owed
        assert "0 of 1 released. Still owed" in refusal(release("--all", "--give-back", "--yes"))
    assert len(quiet.records()) == 1
    quiet.twin_call("DELETE", "/faults")
    done(release("--all", "--give-back", "--yes"))
    assert url_at(quiet, manifest) == before(manifest)


def test_a_policy_edited_after_the_operator_stopped_is_honoured(quiet: Stack, configured: Configured) -> None:
    [manifest] = configured()
    patch(quiet, name_of(manifest), {"spec": {"deletionPolicy": "Retain"}})
    text = done(release("--all", "--give-back", "--yes"))
    assert "is left as it is: the deletion policy is Retain" in text
    assert url_at(quiet, manifest) == ours(quiet, manifest)


def test_what_somebody_pointed_elsewhere_is_left_alone(quiet: Stack, configured: Configured) -> None:
    [manifest] = configured()
    theirs = "https://theirs.example.com/sms"
    quiet.twin_call("PATCH", f"/numbers/{number_of(manifest)}", {"sms_url": theirs})
    text = done(release("--all", "--give-back", "--yes"))
    assert f"is left as it is: somebody pointed it elsewhere since, at {theirs}" in text
    assert url_at(quiet, manifest) == theirs


def test_only_the_named_instances_are_released(quiet: Stack, configured: Configured) -> None:
    one, other = configured(2)
    unknown = str(uuid.uuid4())
    text = done(release(name_of(one), unknown, "--give-back", "--yes"))
    assert f"{unknown}: nothing to release in {CHANNELS}\n" in text
    assert text.endswith("1 of 1 released.\n")
    assert url_at(quiet, one) == before(one)
    assert url_at(quiet, other) == ours(quiet, other)
    assert finalizers(quiet, other) == [FINALIZER]


def test_a_channel_whose_number_was_never_taken_is_freed_too(quiet: Stack, configured: Configured) -> None:
    """The admission policy gives the finalizer to each new channel, also while no operator runs."""
    manifest = quiet.manifest(take_number(quiet))
    quiet.apply(manifest)
    assert finalizers(quiet, manifest) == [FINALIZER]
    assert f"{name_of(manifest)}: no number was taken" in done(release("--all", "--give-back", "--yes"))
    assert finalizers(quiet, manifest) == []


def test_a_channel_that_todays_rules_refuse_is_released_too(
    quiet: Stack, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made before the rules were; its record says all that is needed."""
    [manifest] = configured()
    monkeypatch.setattr(detach, "_model", lambda body: None)
    done(release("--all", "--give-back", "--yes"))
    assert url_at(quiet, manifest) == before(manifest)
    assert finalizers(quiet, manifest) == []


def test_records_without_channels_are_found_also_without_the_crd(
    quiet: Stack, configured: Configured, crd_back: None
) -> None:
    manifests = configured(2)
    for each in manifests:
        take_finalizers_off(quiet, name_of(each))
    delete_crd(quiet)
    assert len(quiet.records()) == 2
    looked = CliRunner().invoke(cli, ["plan", name_of(manifests[0])])
    assert "has no kind SmsChannel: is the CRD installed? kubectl apply -f crds/" in refusal(looked)
    assert release("--all", "--give-back", stdin="n\n").stderr.startswith(
        "0 channels, and 2 records whose channel is gone."
    )
    assert done(release("--all", "--give-back", "--yes")).endswith("2 of 2 released.\n")
    assert [url_at(quiet, each) for each in manifests] == [before(each) for each in manifests]


def test_a_record_that_cannot_be_opened_is_never_dropped_for_it(quiet: Stack, configured: Configured) -> None:
    [manifest] = configured()
    core = client.CoreV1Api(quiet.api.client)
    [uid] = quiet.records()
    body = {"data": {"record": "AAAA"}}
    core.patch_namespaced_secret(uid, OPERATOR, body)
    result = release("--all", "--give-back", "--yes")
    assert "NOT given back: The number is not given back yet: the record has an unknown version" in result.stdout
    assert "0 of 1 released. Still owed" in refusal(result)
    assert quiet.records() == [uid]
    assert finalizers(quiet, manifest) == [FINALIZER]
    assert "the record has an unknown version" in done(release("--all", "--let-go", "--yes"))
    assert quiet.records() == []


# Letting go


def test_letting_go_needs_no_twilio(quiet: Stack, configured: Configured, crd_back: None) -> None:
    manifests = configured(2)
    quiet.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "reset"}})
    quiet.twin_call("DELETE", "/journal")
    text = done(release("--all", "--let-go", "--yes"))
    for each in manifests:
        sid = quiet.number(number_of(each))["sid"]
        assert f"{name_of(each)}: let go of {number_of(each)} ({sid}), which pointed at {before(each)} before" in text
    assert quiet.twin_call("GET", "/journal")["entries"] == [], "Twilio is not even asked"
    assert [url_at(quiet, each) for each in manifests] == [ours(quiet, each) for each in manifests]
    assert quiet.records() == []
    delete_crd(quiet)


def test_letting_go_needs_no_keyring(quiet: Stack, configured: Configured, crd_back: None) -> None:
    manifests = configured(2)
    core = client.CoreV1Api(quiet.api.client)
    keyring = core.read_namespaced_secret("smschannel-keyring", OPERATOR)
    core.delete_namespaced_secret("smschannel-keyring", OPERATOR)
    try:
        said = refusal(release("--all", "--give-back", "--yes"))
        assert f"there is no Secret {OPERATOR}/smschannel-keyring" in said
        assert "restore it from its backup; or --let-go" in said
        assert len(quiet.records()) == 2
        looked = CliRunner().invoke(cli, ["plan", name_of(manifests[0])])
        assert f"there is no Secret {OPERATOR}/smschannel-keyring: it was lost, or no operator" in refusal(looked)

        result = release("--all", "--let-go", "--yes")
        assert done(result).endswith("2 of 2 released.\n")
        assert "What the numbers pointed at before cannot be told." in result.stderr
        assert quiet.records() == []
        assert [finalizers(quiet, each) for each in manifests] == [[], []]
        delete_crd(quiet)
    finally:
        assert keyring.metadata
        keyring.metadata.resource_version = keyring.metadata.uid = None
        core.create_namespaced_secret(OPERATOR, keyring)


# Before anything is done


def test_it_asks_with_a_count(quiet: Stack, configured: Configured) -> None:
    manifests = configured(2)
    asked = release("--all", "--give-back", stdin="n\n")
    assert asked.exit_code == 1
    assert "2 channels, and 0 records whose channel is gone. Their numbers are given back as their" in asked.stderr
    assert asked.stdout == ""
    assert release("--all", "--let-go").exit_code == 1, "nobody is there to say yes"
    assert len(quiet.records()) == 2
    assert [url_at(quiet, each) for each in manifests] == [ours(quiet, each) for each in manifests]
    assert done(release("--all", "--give-back", stdin="y\n")).endswith("2 of 2 released.\n")


def test_while_the_operator_runs_it_refuses(quiet: Stack, configured: Configured) -> None:
    """Nothing runs in pods here; what counts is what the API server holds."""
    [manifest] = configured()
    deployment = deployment_of("sms-channel-operator")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "sms-channel-operator-x", "namespace": OPERATOR},
        "spec": {"serviceAccountName": "sms-channel-operator", "containers": [CONTAINER]},
    }
    apps, core = client.AppsV1Api(quiet.api.client), client.CoreV1Api(quiet.api.client)
    quiet.apply(deployment, pod)
    try:
        said = refusal(release("--all", "--let-go", "--yes"))
        assert "pod/sms-channel-operator-x, deployment/sms-channel-operator in namespace sms-operator" in said
        assert f"kubectl -n {OPERATOR} scale deployment sms-channel-operator --replicas=0" in said

        apps.patch_namespaced_deployment_scale("sms-channel-operator", OPERATOR, {"spec": {"replicas": 0}})
        assert ": pod/sms-channel-operator-x in namespace" in refusal(release("--all", "--let-go", "--yes"))
        assert finalizers(quiet, manifest) == [FINALIZER]
        assert done(release("--all", "--let-go", "--yes", "--force")).endswith("1 of 1 released.\n")

        core.patch_namespaced_pod_status("sms-channel-operator-x", OPERATOR, {"status": {"phase": "Succeeded"}})
        assert done(release("--all", "--let-go", "--yes")) == "Nothing to release.\n"
    finally:
        apps.delete_namespaced_deployment("sms-channel-operator", OPERATOR)
        core.delete_namespaced_pod("sms-channel-operator-x", OPERATOR, grace_period_seconds=0)


@pytest.mark.parametrize("way", ["--give-back", "--let-go"])
def test_an_operator_that_nobody_knew_of_shows_itself(
    quiet: Stack, configured: Configured, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """It runs outside of the cluster, say: no Pod tells of it, but it takes back what it is deprived of."""
    configured(2)
    quiet.start_operator()
    try:
        with monkeypatch.context() as patient:
            patient.setattr(detach, "_WATCHED", 30)
            said = refusal(release("--all", way, "--yes"))
    finally:
        quiet.stop_process("operator")
    assert f"An operator is at work: it has taken {CHANNELS}/" in said
    assert "Stop it and repeat." in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["--give-back"], "name the INSTANCEs, or say --all", id="neither instances nor all"),
        pytest.param([str(uuid.UUID(int=0)), "--all", "--let-go"], "name the INSTANCEs, or", id="both"),
        pytest.param(["--all"], "say --give-back", id="neither way"),
        pytest.param(["--all", "--give-back", "--let-go"], "say --give-back", id="both ways"),
    ],
)
def test_it_must_be_said_what_and_how(arguments: list[str], says: str) -> None:
    result = release(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_without_the_rights_it_says_which(quiet: Stack) -> None:
    said = refusal(release("--all", "--give-back", "--kubeconfig", str(quiet.home / "sms-channel-operator.kubeconfig")))
    assert 'cannot list resource "pods" in API group ""' in said
    assert "needs the rights of an administrator" in said


def test_help_says_what_to_stop_first() -> None:
    shown = done(release("-h"))
    assert "kubectl -n sms-operator scale deployment sms-channel-operator --replicas=0" in shown
    assert os.linesep + "  --let-go" in shown


def test_the_documented_way_to_uninstall_leaves_nothing(quiet: Stack, configured: Configured) -> None:
    """Each command as printed, in its order; kubectl itself need not be installed."""
    [commands] = re.findall(r"```sh\n(.*?)```", section("Uninstall"), re.DOTALL)
    manifests = configured(3)
    quiet.apply(deployment_of("sms-channel-operator"), deployment_of("sms-api-shim"))
    assert "is not stopped" in refusal(release("--all", "--give-back"))
    try:
        for line in commands.splitlines():
            _kubectl(quiet, line)
        assert [url_at(quiet, each) for each in manifests] == [before(each) for each in manifests]
        core = client.CoreV1Api(quiet.api.client)
        left = {each.metadata.name for each in core.list_namespace().items if each.metadata}
        assert not {CHANNELS, OPERATOR} & left
    finally:
        quiet.install()
        with_operator(quiet)


def _kubectl(stack: Stack, line: str) -> None:
    """What kubectl does for the few commands of the section; a deletion ends when all is gone."""
    words = shlex.split(line)
    match words:
        case ["kubectl", "sms", "detach", *arguments]:
            assert "3 of 3 detached." in done(release(*arguments, stdin="y\n"))
        case ["kubectl", "-n", namespace, "scale", "deployment", *names, "--replicas=0"]:
            for name in names:
                apps = client.AppsV1Api(stack.api.client)
                apps.patch_namespaced_deployment_scale(name, namespace, {"spec": {"replicas": 0}})
        case ["kubectl", "delete", *arguments]:
            paths = [ROOT / file for option, file in itertools.pairwise(arguments) if option == "-f"]
            files = itertools.chain.from_iterable(sorted(p.glob("*.yaml")) if p.is_dir() else [p] for p in paths)
            _delete(stack, *(each for file in files for each in yaml.safe_load_all(file.read_text())))
        case _:
            pytest.fail(f"not understood: {line}")


def _delete(stack: Stack, *manifests: Any) -> None:
    """Ends when all of them are gone, or fails."""
    waits = []
    for manifest in manifests:
        kind = stack.api.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
        where = {"namespace": manifest["metadata"]["namespace"]} if kind.namespaced else {}
        name = manifest["metadata"]["name"]
        selected = {"field_selector": f"metadata.name={name}", **where}
        version = kind.get(**selected).metadata.resourceVersion
        kind.delete(name=name, **where)
        waits.append((kind, {**selected, "resource_version": version, "timeout": 60}))
    for kind, selected in waits:
        if not any(event["type"] == "DELETED" for event in kind.watch(**selected)):
            pytest.fail(f"{kind.kind} {selected['field_selector']} is still there after 60 s")
