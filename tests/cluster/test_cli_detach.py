"""`kubectl sms detach` on the real API server: afterwards nothing waits for the operator any more.

These tests have a stack of their own, in which no operator runs unless a test starts it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from kubernetes import client

from deploy.local.stack import CHANNELS, OPERATOR, ROOT, Options, Stack
from smschannel.api.kube_client import KubeClient
from smschannel.api.names import channels_path
from smschannel.api.reasons import Reason
from smschannel.api.resource import FINALIZER, SmsChannel
from smschannel.channel_cache import ChannelCache
from smschannel.cli import detach
from smschannel.cli.admin_store import AdminStore
from smschannel.cli.main import cli
from smschannel.core.record import Key
from smschannel.orphans import Orphans
from smschannel.settings import Settings
from smschannel.wiring import reconciler, twilio_client
from tests.cluster.steps import (
    DEMO_WEBHOOK,
    TWILIO_DOWN,
    damage_record,
    metric,
    name_of,
    patch,
    remove_finalizers,
    seed_account,
    wait_for,
    webhook,
)
from tests.conftest import take_number
from tests.documents import section

PROGRAM = Path(sys.executable).with_name("kubectl-sms")

Configured = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """API server and twin, without operator and shim."""
    stack = Stack(tmp_path_factory.mktemp("quiet"), Options(numbers=60))
    stack.fresh_numbers = itertools.count()  # type: ignore[attr-defined]
    try:
        stack.start_control_plane()
        stack.install()
        stack.start_twin()
        create_keyring(stack)
        yield stack
        assert stack.twin_call("GET", "/violations")["violations"] == [], "only SmsUrl and SmsMethod are ever written"
    finally:
        stack.stop()


@pytest.fixture(autouse=True)
def _as_administrator(quiet: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the administrator's kubeconfig; leave neither faults nor channels nor records of a test."""
    monkeypatch.setenv("KUBECONFIG", str(quiet.kubeconfig))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("SMSCHANNEL_TWILIO_URL", quiet.twilio_url)
    yield
    quiet.twin_call("DELETE", "/faults")
    done(run_detach("--all", "--orphan", "--yes", "--kubeconfig", str(quiet.kubeconfig)))
    for each in quiet.channels.get(namespace=CHANNELS).to_dict()["items"]:
        quiet.delete(each["metadata"]["name"])
    assert quiet.records() == []


@pytest.fixture
def configured(quiet: Stack) -> Configured:
    """Ready channels, each with a number of its own; the operator is stopped."""

    def make(count: int = 1, **spec: Any) -> list[Any]:
        manifests = [quiet.manifest(take_number(quiet), **spec) for _ in range(count)]
        reconciled(quiet, *manifests)
        return manifests

    return make


def create_keyring(stack: Stack) -> None:
    """Let the operator start for the first time: manifests are sealed for its keyring."""
    stack.start_operator()
    stack.stop_process("operator")


def reconciled(stack: Stack, *manifests: Any) -> None:
    """Apply channels and reconcile them here, as the operator would: a process for that takes seconds to start."""
    stack.apply(*manifests)
    asyncio.run(_reconcile(stack, manifests))


async def _reconcile(stack: Stack, manifests: Iterable[Any]) -> None:
    settings = Settings(
        webhook_url_template=stack.options.webhook_url_template,
        twilio_url=stack.twilio_url,
        channel_namespaces=CHANNELS,
    )
    async with (
        await KubeClient.connect(str(stack.kubeconfig)) as api,
        twilio_client(settings, lambda seconds: True) as twilio,
    ):
        kube = AdminStore(api, OPERATOR)
        await kube.read_keyring()
        await kube.load_claims()
        work = reconciler(settings, kube, twilio, ChannelCache(kube.claims), Orphans(kube, time.monotonic))
        for name in map(name_of, manifests):
            channel = SmsChannel.model_validate(await api.request("GET", channels_path(CHANNELS, name)))
            outcome = await work.reconcile(Key(CHANNELS, name), channel)
            assert outcome.ready is Reason.Configured, outcome


def run_detach(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["detach", *arguments], input=stdin)


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
    return webhook(stack, number_of(manifest))


def before(manifest: Any) -> str:
    return f"https://before.example.com/{number_of(manifest)[1:]}"


def ours(stack: Stack, manifest: Any) -> str:
    return stack.webhook_url(name_of(manifest))


def finalizers(stack: Stack, manifest: Any) -> list[str]:
    return list(stack.channels.get(name=name_of(manifest), namespace=CHANNELS).metadata.finalizers or ())


def delete_crd(stack: Stack) -> None:
    """Delete the CRD and wait until it is gone with all its channels."""
    _delete(stack, yaml.safe_load((ROOT / "crds/smschannels.yaml").read_text()))
    stack.api.resources.invalidate_cache()


SHORT_LEASE = {"SMSCHANNEL_LEASE_DURATION_SECONDS": "6", "SMSCHANNEL_TWILIO_TIMEOUT_SECONDS": "1"}
CONTAINER = {"name": "main", "image": "example.com/image"}


def holder(stack: Stack) -> str:
    """Who holds the operator's Lease; empty if nobody does."""
    lease = client.CoordinationV1Api(stack.api.client).read_namespaced_lease("sms-channel-operator", OPERATOR)
    assert lease.spec
    return lease.spec.holder_identity or ""


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


# --restore


def test_restore_writes_previous_webhooks_unchanged(quiet: Stack, configured: Configured, crd_back: None) -> None:
    """With their fragments, which hold connection overrides, and their passwords, which are not shown."""
    found = "https://user:s3cret@before.example.com/sms?x=1#rc=2&rp=all"
    special = quiet.manifest(take_number(quiet))
    quiet.twin_call("PATCH", f"/numbers/{number_of(special)}", {"sms_url": found, "sms_method": "GET"})
    reconciled(quiet, special)
    plain = configured(3)

    text = done(run_detach("--all", "--restore", "--yes"))
    number = quiet.number(number_of(special))
    assert (number["sms_url"], number["sms_method"]) == (found, "GET")
    assert [url_at(quiet, each) for each in plain] == [before(each) for each in plain]
    sid = number["sid"]
    assert (
        f"{CHANNELS}/{name_of(special)}: restored {number_of(special)} ({sid}): SmsUrl {ours(quiet, special)} ->"
        " https://***@before.example.com/sms?x=1#rc=2&rp=all, SmsMethod POST -> GET\n"
    ) in text
    assert "s3cret" not in text
    assert text.endswith("4 of 4 detached.\n")
    assert quiet.records() == []
    assert [finalizers(quiet, each) for each in [special, *plain]] == [[]] * 4
    assert done(run_detach("--all", "--restore", "--yes")) == "Nothing to detach.\n"
    delete_crd(quiet)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_restore_may_be_interrupted_and_repeated(quiet: Stack, configured: Configured, how: signal.Signals) -> None:
    """Also after Twilio has restored the number and before its answer arrives."""
    manifests = configured(4)
    lost = quiet.number(number_of(manifests[0]))["sid"]
    hang = {"match": {"method": "POST", "path": lost}, "action": {"kind": "hang", "after": True}}
    quiet.twin_call("POST", "/faults", hang)
    command = [str(PROGRAM), "detach", "--all", "--restore", "--yes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(how)
        rest = process.stdout.read() + process.stderr.read()
    assert all("restored" in line for line in lines)
    assert name_of(manifests[0]) not in rest
    assert process.returncode == (1 if how is signal.SIGINT else -signal.SIGKILL)
    if how is signal.SIGINT:
        assert "Interrupted. What is done is done; repeat the command to go on." in rest
        assert "Traceback" not in rest
    assert len(quiet.records()) == 1
    assert finalizers(quiet, manifests[0]) == [FINALIZER]

    quiet.twin_call("DELETE", "/faults")
    text = done(run_detach("--all", "--restore", "--yes"))
    assert text.endswith("1 of 1 detached.\n")
    assert [url_at(quiet, each) for each in manifests] == [before(each) for each in manifests]
    assert quiet.records() == []


def test_number_that_cannot_be_restored_keeps_its_record_and_is_named(quiet: Stack, configured: Configured) -> None:
    account = seed_account(quiet, "+61495000000")
    [other] = configured(1)
    refused = quiet.manifest(account["phone_numbers"][0], account=account)
    reconciled(quiet, refused)
    quiet.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "suspended"})

    result = run_detach("--all", "--restore", "--yes")
    message = refusal(result)
    sid = quiet.number(number_of(refused))["sid"]
    assert f"{CHANNELS}/{name_of(refused)}: NOT restored: {number_of(refused)} ({sid}): " in result.stdout
    assert "The Twilio account is suspended or closed" in result.stdout
    assert f"1 of 2 detached. Not restored: {CHANNELS}/{name_of(refused)}. Fix the causes above and repeat" in message
    assert "--orphan" in message
    assert url_at(quiet, other) == before(other), "the others are restored all the same"
    assert len(quiet.records()) == 1
    assert finalizers(quiet, refused) == [FINALIZER]

    quiet.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "active"})
    assert done(run_detach("--all", "--restore", "--yes")).endswith("1 of 1 detached.\n")
    assert url_at(quiet, refused) == DEMO_WEBHOOK


@pytest.mark.parametrize("after", [1, None], ids=["Retry-After", "no Retry-After"])
def test_throttled_restore_is_retried(quiet: Stack, configured: Configured, after: int | None) -> None:
    manifests = configured(3)
    busy = {"kind": "status", "status": 429, "code": 20429, "retry_after": after}
    quiet.twin_call("POST", "/faults", {"match": {"method": "POST", "count": 2}, "action": busy})
    result = run_detach("--all", "--restore", "--yes")
    assert "not detached yet, retrying in 1 s." in result.stderr
    assert done(result).endswith("3 of 3 detached.\n")
    assert "NOT restored" not in result.stdout, "each result is printed once, when it is final"
    assert [url_at(quiet, each) for each in manifests] == [before(each) for each in manifests]


def test_restore_ends_during_an_outage_and_keeps_all_records(quiet: Stack, configured: Configured) -> None:
    manifests = configured(2)
    quiet.twin_call("POST", "/faults", TWILIO_DOWN)
    result = run_detach("--all", "--restore", "--yes")
    assert "0 of 2 detached. Not restored" in refusal(result)
    assert result.stdout.count("Twilio answers HTTP 503") == 2, "and it gives up"
    assert len(quiet.records()) == 2
    assert [finalizers(quiet, each) for each in manifests] == [[FINALIZER]] * 2


def test_restore_writes_nothing_off_after_the_deadline(
    quiet: Stack, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator gives up after its deadline; here the administrator decides."""
    [manifest] = configured()
    remove_finalizers(quiet, name_of(manifest))
    quiet.delete(name_of(manifest))
    monkeypatch.setenv("SMSCHANNEL_RESTORE_DEADLINE_SECONDS", "0")
    quiet.twin_call("POST", "/faults", TWILIO_DOWN)
    for _ in range(2):  # the first one records since when it is to be restored
        assert "0 of 1 detached. Not restored" in refusal(run_detach("--all", "--restore", "--yes"))
    assert len(quiet.records()) == 1
    quiet.twin_call("DELETE", "/faults")
    done(run_detach("--all", "--restore", "--yes"))
    assert url_at(quiet, manifest) == before(manifest)


def test_policy_edited_after_the_operator_stopped_counts(quiet: Stack, configured: Configured) -> None:
    [manifest] = configured()
    patch(quiet, name_of(manifest), {"spec": {"deletionPolicy": "Retain"}})
    text = done(run_detach("--all", "--restore", "--yes"))
    assert "is left as it is: the deletion policy is Retain" in text
    assert url_at(quiet, manifest) == ours(quiet, manifest)


def test_webhook_set_by_somebody_else_is_left_alone(quiet: Stack, configured: Configured) -> None:
    [manifest] = configured()
    theirs = "https://theirs.example.com/sms"
    quiet.twin_call("PATCH", f"/numbers/{number_of(manifest)}", {"sms_url": theirs})
    text = done(run_detach("--all", "--restore", "--yes"))
    assert f"is left as it is: somebody pointed it elsewhere since, at {theirs}" in text
    assert url_at(quiet, manifest) == theirs


def test_only_named_instances_are_detached(quiet: Stack, configured: Configured) -> None:
    one, other = configured(2)
    text = done(run_detach(name_of(one), "--restore", "--yes"))
    assert text.endswith("1 of 1 detached.\n")
    assert url_at(quiet, one) == before(one)
    assert url_at(quiet, other) == ours(quiet, other)
    assert finalizers(quiet, other) == [FINALIZER]


def test_mistyped_instance_is_an_error_and_the_others_are_detached(quiet: Stack, configured: Configured) -> None:
    [one] = configured()
    unknown = str(uuid.uuid4())
    result = run_detach(name_of(one), unknown, "--restore", "--yes")
    assert f"1 of 1 detached. There is no channel, nor a record of one, in {CHANNELS}: {unknown}." in refusal(result)
    assert url_at(quiet, one) == before(one)
    again = run_detach(name_of(one), "--restore", "--yes")
    assert done(again) == f"{name_of(one)}: nothing to detach in {CHANNELS}\nNothing to detach.\n", "it may be repeated"
    assert f"Nothing to detach. There is no channel, nor a record of one, in {CHANNELS}: {unknown}." in refusal(
        run_detach(unknown, "--restore", "--yes")
    )


def test_mistyped_namespace_is_an_error(quiet: Stack) -> None:
    for chosen in ([str(uuid.uuid4())], ["--all"]):
        result = run_detach(*chosen, "-n", "nosuch", "--orphan", "--yes")
        assert "There is no namespace nosuch. Nothing was changed." in refusal(result)


def test_channel_without_a_record_loses_its_finalizer_too(quiet: Stack, configured: Configured) -> None:
    """The admission policy adds the finalizer to new channels also while no operator runs."""
    manifest = quiet.manifest(take_number(quiet))
    quiet.apply(manifest)
    assert finalizers(quiet, manifest) == [FINALIZER]
    assert f"{name_of(manifest)}: no number was taken" in done(run_detach("--all", "--restore", "--yes"))
    assert finalizers(quiet, manifest) == []


def test_channel_that_the_current_rules_refuse_is_restored_too(
    quiet: Stack, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is older than the rules; its records have all that is needed."""
    [manifest] = configured()
    monkeypatch.setattr(detach, "_as_deleted", lambda body: None)
    done(run_detach("--all", "--restore", "--yes"))
    assert url_at(quiet, manifest) == before(manifest)
    assert finalizers(quiet, manifest) == []


def test_records_of_deleted_channels_are_found_without_the_crd(
    quiet: Stack, configured: Configured, crd_back: None
) -> None:
    manifests = configured(2)
    for each in manifests:
        remove_finalizers(quiet, name_of(each))
    delete_crd(quiet)
    assert len(quiet.records()) == 2
    planned = CliRunner().invoke(cli, ["plan", name_of(manifests[0])])
    assert "has no kind SmsChannel: is the CRD installed? kubectl apply -f crds/" in refusal(planned)
    assert run_detach("--all", "--restore", stdin="n\n").stderr.startswith(
        "0 channels and the records of 2 deleted channels."
    )
    assert done(run_detach("--all", "--restore", "--yes")).endswith("2 of 2 detached.\n")
    assert [url_at(quiet, each) for each in manifests] == [before(each) for each in manifests]


def test_unreadable_record_is_kept_by_restore_and_deleted_by_orphan(quiet: Stack, configured: Configured) -> None:
    [manifest] = configured()
    [uid] = quiet.records()
    damage_record(quiet, number_of(manifest))
    result = run_detach("--all", "--restore", "--yes")
    sid = quiet.number(number_of(manifest))["sid"]
    assert f"NOT restored: {number_of(manifest)} ({sid}): the record has an unknown version" in result.stdout
    assert "0 of 1 detached. Not restored" in refusal(result)
    assert quiet.records() == [uid]
    assert finalizers(quiet, manifest) == [FINALIZER]
    assert "the record has an unknown version" in done(run_detach("--all", "--orphan", "--yes"))
    assert quiet.records() == []


def test_number_of_an_earlier_channel_that_cannot_be_restored_is_named_with_its_own_reason(
    quiet: Stack, configured: Configured
) -> None:
    account = seed_account(quiet, "+61495100000")
    former = quiet.manifest(account["phone_numbers"][0], account=account)
    reconciled(quiet, former)
    remove_finalizers(quiet, name_of(former))
    quiet.delete(name_of(former))
    quiet.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "suspended"})
    quiet.apply(quiet.manifest(take_number(quiet), name=name_of(former)))
    result = run_detach("--all", "--restore", "--yes")
    sid = quiet.number(number_of(former))["sid"]
    assert f"NOT restored: {number_of(former)} ({sid}): The Twilio account is suspended or closed" in result.stdout
    assert "0 of 1 detached. Not restored" in refusal(result)


def test_record_with_damaged_metadata_is_named(quiet: Stack, configured: Configured) -> None:
    [manifest] = configured()
    name = quiet.record_name(number_of(manifest))
    client.CoreV1Api(quiet.api.client).patch_namespaced_secret(name, OPERATOR, {"metadata": {"annotations": None}})
    result = run_detach("--all", "--restore", "--yes")
    assert "records without a channel: NOT restored" in result.stdout
    assert f"the metadata of its record is damaged: restore Secret {name} from its backup" in result.stdout
    assert "1 of 2 detached. Not restored" in refusal(result)
    assert url_at(quiet, manifest) == ours(quiet, manifest)


# --orphan


def test_orphan_needs_no_twilio(quiet: Stack, configured: Configured, crd_back: None) -> None:
    manifests = configured(2)
    quiet.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "reset"}})
    quiet.twin_call("DELETE", "/journal")
    text = done(run_detach("--all", "--orphan", "--yes"))
    for each in manifests:
        sid = quiet.number(number_of(each))["sid"]
        assert f"{name_of(each)}: orphaned {number_of(each)} ({sid}), which pointed at {before(each)} before" in text
    assert quiet.twin_call("GET", "/journal")["entries"] == [], "Twilio is not called"
    assert [url_at(quiet, each) for each in manifests] == [ours(quiet, each) for each in manifests]
    assert quiet.records() == []
    delete_crd(quiet)


def test_orphan_needs_no_keyring(quiet: Stack, configured: Configured, crd_back: None) -> None:
    manifests = configured(2)
    core = client.CoreV1Api(quiet.api.client)
    keyring = core.read_namespaced_secret("smschannel-keyring", OPERATOR)
    core.delete_namespaced_secret("smschannel-keyring", OPERATOR)
    try:
        message = refusal(run_detach("--all", "--restore", "--yes"))
        assert f"there is no Secret {OPERATOR}/smschannel-keyring" in message
        assert "restore it from its backup; or --orphan" in message
        assert len(quiet.records()) == 2
        planned = CliRunner().invoke(cli, ["plan", name_of(manifests[0])])
        assert f"there is no Secret {OPERATOR}/smschannel-keyring: it was lost, or no operator" in refusal(planned)

        result = run_detach("--all", "--orphan", "--yes")
        assert done(result).endswith("2 of 2 detached.\n")
        assert "What the numbers pointed at before cannot be shown." in result.stderr
        assert quiet.records() == []
        assert [finalizers(quiet, each) for each in manifests] == [[], []]
        delete_crd(quiet)
    finally:
        assert keyring.metadata
        keyring.metadata.resource_version = keyring.metadata.uid = None
        core.create_namespaced_secret(OPERATOR, keyring)


# Questions and checks


def test_published_twilio_url_is_not_followed(
    quiet: Stack, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    [manifest] = configured()
    monkeypatch.delenv("SMSCHANNEL_TWILIO_URL")
    result = run_detach("--all", "--restore", "--yes")
    assert result.exit_code == 1
    assert f"name another Twilio: SMSCHANNEL_TWILIO_URL={quiet.twilio_url}" in result.stderr
    assert url_at(quiet, manifest) == ours(quiet, manifest), "nothing was changed"


def test_question_counts_what_is_detached(quiet: Stack, configured: Configured) -> None:
    manifests = configured(2)
    asked = run_detach("--all", "--restore", stdin="n\n")
    assert asked.exit_code == 1
    assert "2 channels. Their numbers are restored as their" in asked.stderr
    assert asked.stdout == ""
    assert run_detach("--all", "--orphan").exit_code == 1, "there is no terminal to answer it"
    assert len(quiet.records()) == 2
    assert [url_at(quiet, each) for each in manifests] == [ours(quiet, each) for each in manifests]
    assert done(run_detach("--all", "--restore", stdin="y\n")).endswith("2 of 2 detached.\n")


@pytest.mark.parametrize("way", ["--restore", "--orphan"])
def test_running_operator_is_refused(quiet: Stack, configured: Configured, way: str) -> None:
    """Wherever it runs: it renews the Lease. Nothing is changed."""
    [manifest] = configured()
    quiet.start_operator()
    try:
        message = refusal(run_detach("--all", way, "--yes"))
    finally:
        quiet.stop_process("operator")
    assert f"operator holds the operator's Lease ({OPERATOR}/sms-channel-operator); looking whether it is" in message
    assert "The operator is running, and would configure the channels again: operator has just renewed" in message
    assert f"kubectl -n {OPERATOR} scale deployment sms-channel-operator --replicas=0" in message
    assert finalizers(quiet, manifest) == [FINALIZER]
    assert url_at(quiet, manifest) == ours(quiet, manifest)


def test_operator_that_starts_meanwhile_stands_by(quiet: Stack, configured: Configured) -> None:
    """As one that a GitOps controller scales up again: detach holds the Lease."""
    manifests = configured(2)
    quiet.twin_call("POST", "/faults", {"match": {"count": 1}, "action": {"kind": "delay", "seconds": 8}})
    quiet.twin_call("DELETE", "/journal")
    with ThreadPoolExecutor() as thread:
        detaching = thread.submit(run_detach, "--all", "--restore", "--yes")
        wait_for(lambda: bool(holder(quiet)), "the command holds the Lease")
        assert holder(quiet).startswith("kubectl-sms-detach_")
        quiet.start_operator()
        try:
            assert not detaching.done()
            assert metric(quiet, "smschannel_leader") == 0
            assert "2 of 2 detached." in done(detaching.result())
            for each in manifests:
                quiet.delete(name_of(each))
            writes = quiet.twin_call("GET", "/journal?method=POST")["entries"]
            wait_for(lambda: metric(quiet, "smschannel_leader") == 1, "the operator leads when the command has ended")
        finally:
            quiet.stop_process("operator")
    assert {each["sms_url"] for each in writes[:2]} == {before(each) for each in manifests}


def test_operator_that_was_killed_is_waited_for(quiet: Stack, configured: Configured) -> None:
    """It holds the Lease until that ends; nobody renews it, so it does not run."""
    [manifest] = configured()
    quiet.start_operator(settings=SHORT_LEASE)
    quiet.stop_process("operator", kill=True)
    text = done(run_detach("--all", "--restore", "--yes"))
    assert "1 of 1 detached." in text
    assert url_at(quiet, manifest) == before(manifest)


def test_missing_right_is_named(quiet: Stack) -> None:
    message = refusal(
        run_detach("--all", "--restore", "--kubeconfig", str(quiet.home / "sms-api-shim.kubeconfig"), "--yes")
    )
    assert "is forbidden" in message
    assert "needs the rights of an administrator" in message


def test_help_names_the_command_that_stops_the_operator() -> None:
    shown = done(run_detach("-h"))
    assert "kubectl -n sms-operator scale deployment sms-channel-operator --replicas=0" in shown
    assert os.linesep + "  --orphan" in shown


def test_documented_uninstall_commands_leave_nothing(quiet: Stack, configured: Configured) -> None:
    """Each command as printed, in their order; kubectl itself need not be installed."""
    first, chart, manifests_of_ours = re.findall(r"```sh\n(.*?)```", section("Uninstall"), re.DOTALL)
    assert chart.startswith("helm ")  # the real pods run it
    commands = first + manifests_of_ours
    manifests = configured(3)
    quiet.apply(deployment_of("sms-channel-operator"), deployment_of("sms-api-shim"))
    try:
        for line in commands.splitlines():
            _kubectl(quiet, line)
        assert [url_at(quiet, each) for each in manifests] == [before(each) for each in manifests]
        core = client.CoreV1Api(quiet.api.client)
        left = {each.metadata.name for each in core.list_namespace().items if each.metadata}
        assert not {CHANNELS, OPERATOR} & left
    finally:
        quiet.restart_control_plane()  # else it keeps its old copy of the Lease, which the fence compares
        quiet.install()
        create_keyring(quiet)


def _kubectl(stack: Stack, line: str) -> None:
    """Do what kubectl does for the commands of that section; a deletion waits until all is gone."""
    words = shlex.split(line)
    match words:
        case ["kubectl", "sms", "detach", *arguments]:
            assert "3 of 3 detached." in done(run_detach(*arguments, stdin="y\n"))
        case ["kubectl", "-n", namespace, "scale", "deployment", *names, "--replicas=0"]:
            for name in names:
                apps = client.AppsV1Api(stack.api.client)
                apps.patch_namespaced_deployment_scale(name, namespace, {"spec": {"replicas": 0}})
        case ["kubectl", "delete", "--ignore-not-found", "-f", file]:
            _delete(stack, *yaml.safe_load_all((ROOT / file).read_text()))
        case ["kubectl", "delete", "-k", folder]:
            files = yaml.safe_load((ROOT / folder / "kustomization.yaml").read_text())["resources"]
            objects = (yaml.safe_load_all((ROOT / folder / file).read_text()) for file in files)
            _delete(stack, *itertools.chain.from_iterable(objects))
        case _:
            pytest.fail(f"unknown command: {line}")


def _delete(stack: Stack, *manifests: Any) -> None:
    """Delete objects and wait until all of them are gone. The local cluster has no pods, and not all objects."""
    waits = []
    for manifest in manifests:
        kind = stack.api.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
        where = {"namespace": manifest["metadata"]["namespace"]} if kind.namespaced else {}
        name = manifest["metadata"]["name"]
        selected = {"field_selector": f"metadata.name={name}", **where}
        found = kind.get(**selected)
        if not found.items:
            continue
        version = found.metadata.resourceVersion
        kind.delete(name=name, **where)
        waits.append((kind, {**selected, "resource_version": version, "timeout": 60}))
    for kind, selected in waits:
        if not any(event["type"] == "DELETED" for event in kind.watch(**selected)):
            pytest.fail(f"{kind.kind} {selected['field_selector']} is still there after 60 s")
