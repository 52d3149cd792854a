"""The product's story with real pods. Each step builds on those before it: run them all, with `make kind-test`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from twilio.request_validator import RequestValidator

from deploy.kind import install
from deploy.kind.access import TWIN_NAMESPACE
from deploy.kind.engine import EngineError
from smschannel.leader import DURATION
from tests.kind.pods import CLIENT_NAMESPACE, NAMESPACES, OPERATOR_APP, SHIM_APP, Pods, until

Note = Callable[[str], None]


def test_pods_run_under_pod_security_restricted(pods: Pods, note: Note) -> None:
    for namespace in NAMESPACES:
        labels = pods.access.get("namespace", namespace)["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted", namespace
        with pytest.raises(EngineError, match="violates PodSecurity"):
            pods.access.kubectl("run", "root", "--image=none", "--privileged", f"-n{namespace}", "--dry-run=server")
    running = [*pods.of(OPERATOR_APP), *pods.of(SHIM_APP)]
    assert len(running) == 4, "two replicas of each"
    nodes = {each["spec"]["nodeName"] for each in running}
    assert len(nodes) == 2, "spread over both nodes"
    note(f"{len(running)} pods on {len(nodes)} nodes")


def test_sealed_manifest_becomes_ready(pods: Pods, note: Note) -> None:
    [instance] = pods.add_channels(1)
    number = pods.channels[instance]
    assert pods.sms_url(number) == pods.url(instance)
    note(f"{number} points at its instance")


def test_instance_is_configured_by_rest_through_the_service(pods: Pods, note: Note) -> None:
    instance, number = "497f6eca-6276-4993-bfeb-53cbbbba6f08", pods.free_numbers()[0]
    body = {name: pods.account[name] for name in ("account_sid", "auth_token")} | {"phone_number": number}
    status, answer = pods.rest("POST", instance, body)
    assert status == 201, answer
    pods.channels[instance] = number
    pods.wait_ready(instance)
    status, answer = pods.rest("GET", instance)
    assert (status, answer["status"]) == (200, "active"), answer
    assert pods.sms_url(number) == pods.url(instance)
    note("POST 201, GET active")


def test_inbound_message_reaches_the_instance_with_a_valid_signature(pods: Pods, note: Note) -> None:
    instance, number = next(iter(pods.channels.items()))
    sent = {"to": number, "from": "+61499000001", "body": "Hello, instance!"}
    outcome = pods.access.twin("POST", "/inbound", sent)
    assert outcome["outcome"] == "delivered", outcome
    log = pods.access.kubectl("logs", "deployment/twin", f"--namespace={TWIN_NAMESPACE}")
    received = [json.loads(line)["received"] for line in log.splitlines() if line.startswith('{"received"')]
    [message] = [each for each in received if each["form"]["Body"] == sent["body"]]
    assert instance in message["path"]
    validator = RequestValidator(pods.account["auth_token"])
    assert validator.validate(pods.url(instance), message["form"], message["signature"])
    note("delivered, signature valid")


def test_another_pod_takes_over_when_the_leaders_is_deleted(pods: Pods, note: Note) -> None:
    note(take_over(pods, pods.delete_now, at_most=DURATION + 15))


def test_operator_works_again_when_the_leaders_process_is_killed(pods: Pods, note: Note) -> None:
    """The pod's next process, which has the same identity, or another pod."""
    note(take_over(pods, lambda pod: pods.signal(pod, "SIGKILL"), at_most=DURATION + 15))


def test_another_pod_takes_over_at_once_when_the_leaders_is_told_to_end(pods: Pods, note: Note) -> None:
    note(take_over(pods, lambda pod: pods.signal(pod, "SIGTERM"), at_most=10))


def test_another_pod_takes_over_when_the_leaders_is_stopped_and_it_stands_by_afterwards(pods: Pods, note: Note) -> None:
    pods.wait_rollout(OPERATOR_APP)
    before = pods.term()
    pods.access.twin("DELETE", "/journal")
    with pods.stopped(before[0]):
        took = pods.wait_other_leader(before[0], DURATION + 15)
        pods.add_channels(1)
    pods.wait_rollout(OPERATOR_APP)
    pods.add_channels(1)
    pods.assert_numbers_held()
    assert len(pods.writes()) == 2, "one write for each new channel"
    note(f"{took:.1f} s until another led")


def test_another_pod_takes_over_when_the_leaders_cannot_reach_the_api_server(pods: Pods, note: Note) -> None:
    """It still reaches Twilio, and has stopped writing there before the other begins."""
    pods.wait_rollout(OPERATOR_APP)
    before = pods.term()
    pods.access.twin("DELETE", "/journal")
    with pods.cut_off(before[0]):
        took = pods.wait_other_leader(before[0], DURATION + 15)
        pods.add_channels(1)
        [of_leader] = [each for each in pods.of(OPERATOR_APP) if each["metadata"]["name"] == before[0]]
    pods.wait_rollout(OPERATOR_APP)
    pods.add_channels(1)
    pods.assert_numbers_held()
    assert len(pods.writes()) == 2, "one write for each new channel"
    [afterwards] = [each for each in pods.of(OPERATOR_APP) if each["metadata"]["name"] == before[0]]
    assert restarts(afterwards) == restarts(of_leader), "it stands by without a restart"
    note(f"{took:.1f} s until another led")


def test_node_is_drained_without_a_failed_request(pods: Pods, note: Note) -> None:
    [worker] = [name for name in pods.environment.cluster.nodes() if "worker" in name]
    pods.lead_on(worker)
    leader = pods.term()[0]
    pods.access.twin("DELETE", "/journal")
    with pods.load(*pods.channels) as counted, pods.terms() as seen:
        drain = ["drain", worker, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s"]
        pods.access.kubectl(*drain)
        for app in (OPERATOR_APP, SHIM_APP):
            pods.wait_rollout(app)
        pods.wait_other_leader(leader)
    assert worker not in {each["spec"]["nodeName"] for app in (OPERATOR_APP, SHIM_APP) for each in pods.of(app)}
    pods.access.kubectl("uncordon", worker)
    assert counted["failed"] == []
    assert pods.writes() == [], "moving pods is no reason to write to Twilio"
    pods.assert_numbers_held()
    note(f"{counted['requests']} requests, 0 failed, 0 writes to Twilio; {takeovers(seen)}")


@pytest.mark.parametrize("app", [OPERATOR_APP, SHIM_APP])
def test_rolling_update_with_live_channels(pods: Pods, note: Note, app: str) -> None:
    pods.add_channels(10)
    pods.access.twin("DELETE", "/journal")
    old = {each["metadata"]["name"] for each in pods.of(app)}
    with pods.load(*pods.channels) as counted, pods.terms() as seen:
        pods.rollout(app)
        until(lambda: not old & {each["metadata"]["name"] for each in pods.of(app)}, "the old pods are gone")
        until(lambda: pods.term()[0] not in {"", *old}, "a pod leads that stays")
    assert counted["failed"] == []
    assert pods.writes() == [], "an update is no reason to write to Twilio"
    pods.assert_numbers_held()
    pods.add_channels(1)
    assert bool(seen["takeovers"]) == (app == OPERATOR_APP)
    note(f"{len(pods.channels)} channels, {counted['requests']} requests, slowest {counted['slowest']} s, 0 failed")
    note(takeovers(seen))


def test_upgrade_that_changes_nothing_writes_nothing(pods: Pods, note: Note) -> None:
    before = pods.snapshot()
    install.install_product(pods.access, pods.tag)
    after = pods.snapshot()
    assert after == before
    note(f"{len(after)} objects unchanged")


def test_release_is_rolled_back(pods: Pods, note: Note) -> None:
    pods.access.twin("DELETE", "/journal")
    changed = {"operator": {"podAnnotations": {"example.com/changed": "yes"}}, "shim": {"replicas": 3}}
    with pods.load(*pods.channels) as counted:
        install.install_product(pods.access, pods.tag, changed)
        assert len(pods.of(SHIM_APP)) == 3
        rollback = ["rollback", install.RELEASE, f"--namespace={install.OPERATOR}", "--wait", "--timeout=5m"]
        pods.access.helm(*rollback)
    until(lambda: len(pods.of(SHIM_APP)) == 2, "two replicas again")
    assert counted["failed"] == []
    assert pods.writes() == []
    pods.assert_numbers_held()
    pods.add_channels(1)
    note(f"{counted['requests']} requests, 0 failed, 0 writes to Twilio")


def test_probes_failed_for_no_pod_that_was_meant_to_work(pods: Pods, note: Note) -> None:
    """A pod that starts or ends may fail its probes; none that works does, and none was restarted because of one."""
    events = pods.access.get("events", f"--namespace={install.OPERATOR}")["items"]
    assert [each for each in events if each["reason"] == "Killing" and "failed liveness" in each["message"]] == []
    unhealthy = [each for each in events if each["reason"] == "Unhealthy"]
    failed = {each["involvedObject"]["name"] for each in unhealthy if each["message"].startswith("Liveness")}
    for pod in (*pods.of(OPERATOR_APP), *pods.of(SHIM_APP)):
        name = pod["metadata"]["name"]
        assert name not in failed
        assert restarts(pod) == [0], name
        conditions = {each["type"]: each["status"] for each in pod["status"]["conditions"]}
        assert conditions["Ready"] == "True", name
    note(f"{sum(each.get('count') or 1 for each in unhealthy)} failed probes, all of pods that started or ended")


def test_no_log_of_any_pod_has_a_token(pods: Pods, note: Note) -> None:
    account = pods.account
    pair = f"{account['account_sid']}:{account['auth_token']}".encode()
    secrets = [account["auth_token"], pods.api_key, base64.b64encode(pair).decode()]
    logs = pods.logs()
    ours = {path: text for path, text in logs.items() if f"/{install.OPERATOR}_" in path}
    assert any("Hello, instance!" in text for text in logs.values()), "the search works: the twin's log has the message"
    found = [path for path, text in logs.items() if any(secret in text for secret in secrets)]
    assert found == []
    note(f"{len(ours)} of {len(logs)} logs are the product's, {sum(map(len, logs.values())) // 1024} KiB")


def test_release_that_was_uninstalled_by_mistake_goes_on_when_it_is_installed_again(pods: Pods, note: Note) -> None:
    """Helm leaves the CRD with the channels, the keyring with the records, and the fence with its Lease."""
    former = pods.term()[0]
    pods.access.twin("DELETE", "/journal")
    pods.uninstall()
    install.install_product(pods.access, pods.tag)
    pods.wait_other_leader(former, DURATION + 15)
    pods.wait_ready(*pods.channels)
    assert pods.writes() == []
    pods.add_channels(1)
    pods.assert_numbers_held()
    assert_fenced(pods, former)
    note(f"{len(pods.channels) - 1} channels as before, 0 writes to Twilio, one new channel, and the fence holds")


def test_release_is_removed_after_the_numbers_are_restored(pods: Pods, note: Note) -> None:
    pods.last_leader = pods.term()[0]
    pods.access.kubectl("delete", "namespace", CLIENT_NAMESPACE)
    scale = ["scale", f"deployment/{OPERATOR_APP}", f"deployment/{SHIM_APP}", "--replicas=0"]
    pods.access.kubectl(*scale, f"--namespace={install.OPERATOR}")
    until(lambda: not pods.access.get("pods", f"-n{install.OPERATOR}")["items"], "the pods are gone", 120)
    with pods.forwarded("twin", TWIN_NAMESPACE, 443) as port:
        twilio = {
            "SMSCHANNEL_TWILIO_URL": f"https://localhost:{port}",
            "SMSCHANNEL_CA_BUNDLE": str(pods.environment.home / "twin-ca.crt"),
        }
        said = pods.sms("detach", "--all", "--restore", "--yes", **twilio)
    assert {number: pods.sms_url(number) for number in pods.numbers} == pods.before, said
    assert pods.held_finalizers() == []
    pods.uninstall()
    left = pods.access.get("all", f"--namespace={install.OPERATOR}")["items"]
    assert [f"{each['kind']} {each['metadata']['name']}" for each in left] == []
    assert pods.access.twin("GET", "/violations")["violations"] == [], "only SmsUrl and SmsMethod were ever written"
    note(f"{len(pods.channels)} numbers restored")


def test_release_is_installed_again_after_everything_was_removed(pods: Pods, note: Note) -> None:
    """The API server still has the fence of before, whose Lease went with its namespace."""
    pods.access.kubectl("delete", "crd", "smschannels.channels.hydracore.io")
    pods.access.kubectl("delete", "namespace", install.CHANNELS, install.OPERATOR)
    pods.channels = {}
    pods.access.twin("DELETE", "/journal")
    pods.environment.install(pods.access, pods.tag)
    [instance] = pods.add_channels(1)
    assert pods.sms_url(pods.channels[instance]) == pods.url(instance)
    assert len(pods.writes()) == 1
    assert_fenced(pods, pods.last_leader)
    note("a new channel is Ready, and the fence holds")


def assert_fenced(pods: Pods, former: str) -> None:
    """The API server admits a record that the leader's pod writes, and refuses that of a former leader's pod."""
    holder = pods.term()[0]
    pods.write_as(holder)
    with pytest.raises(EngineError, match=f"held by {holder}, and this token is bound to pod {former}"):
        pods.write_as(former)


def restarts(pod: dict[str, Any]) -> list[int]:
    return [each["restartCount"] for each in pod["status"]["containerStatuses"]]


def takeovers(seen: dict[str, Any]) -> str:
    return f"{seen['takeovers']} takeovers, without a leader for at most {seen['without']:.1f} s"


def take_over(pods: Pods, end: Callable[[str], None], at_most: float) -> str:
    """End the leader, and return how long it took until a new term began; then a new channel becomes Ready."""
    pods.wait_rollout(OPERATOR_APP)
    before = pods.term()
    assert before[0], "no pod of the operator holds the Lease"
    pods.access.twin("DELETE", "/journal")
    end(before[0])
    took = until(lambda: pods.term()[0] and pods.term() != before, "a new term", at_most)
    assert pods.writes() == [], "a takeover is no reason to write to Twilio"
    pods.add_channels(1)
    pods.assert_numbers_held()
    if is_other := pods.term()[0] != before[0]:
        assert_fenced(pods, before[0])
    return f"{took:.1f} s until {'another' if is_other else 'the same'} pod led"
