"""Two replicas of the operator: one leads, the other takes over, however the first one ends, and never both write.

The lease is shorter than usual, so that the tests need not wait. `pytest -s` shows the times that were measured.
"""

from __future__ import annotations

import ssl
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, OPERATOR, Options, Stack, free_port
from smschannel.api.errors import Fenced
from smschannel.api.kube_client import KubeClient
from smschannel.api.names import FENCE
from smschannel.api.names import LEASE as OPERATORS_LEASE
from smschannel.core.record import RECORD_LABEL
from smschannel.kube_store import KubeStore
from smschannel.leader import Claim, Elector, identify
from tests.cluster.steps import before, delete, metric, name_of, records, wait_for, webhook
from tests.conftest import running, take_number
from tests.faults.proxy import Proxy, Upstream

LEASE = 8
SETTINGS = {
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "2",
    "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
    "SMSCHANNEL_DELETION_GRACE_SECONDS": "2",
    "SMSCHANNEL_TWILIO_TIMEOUT_SECONDS": "2",
    "SMSCHANNEL_LEASE_DURATION_SECONDS": str(LEASE),
}
AT_ONCE = 10.0
"""Seconds for a takeover without waiting, on a busy machine: to see the release, and to load everything."""
FIRST, SECOND = "operator", "operator-2"


@pytest.fixture(scope="module")
def urls() -> dict[str, str]:
    """Where the operators serve their metrics."""
    return {SECOND: f"http://127.0.0.1:{free_port()}"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, urls: dict[str, str]) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("two"), Options(numbers=200, operator_settings=SETTINGS)) as started:
        urls[FIRST] = started.operator_url
        yield started


@pytest.fixture(autouse=True)
def _first_leads(stack: Stack, urls: dict[str, str]) -> None:
    """Let the first operator lead and the second stand by."""
    for name in (FIRST, SECOND):
        if name not in stack.pids():
            start(stack, urls, name)
    if leads(urls[SECOND]):
        stack.stop_process(SECOND)
        wait_for(lambda: leads(urls[FIRST]), "the first operator leads")
        start(stack, urls, SECOND)
    wait_for(lambda: leads(urls[FIRST]) and not leads(urls[SECOND]), "the first operator leads")


def start(stack: Stack, urls: dict[str, str], name: str) -> None:
    stack.start_operator(name, int(urls[name].rpartition(":")[2]))


def leads(url: str) -> bool:
    return metric(url, "smschannel_leader") == 1


def any_leads(operators: list[str]) -> bool:
    return any(map(leads, operators))


def wait_takeover(stack: Stack, url: str, since: float) -> float:
    """Wait until this operator leads and works. Return how many seconds after `since` a new channel was configured."""
    manifest = stack.manifest(take_number(stack))
    stack.apply(manifest)
    wait_for(lambda: leads(url), "the other operator leads")
    stack.wait_ready(name_of(manifest))
    return time.monotonic() - since


def live_channels(stack: Stack, count: int) -> dict[str, str]:
    """Make channels that work. Return each number's holder."""
    manifests = [stack.manifest(take_number(stack)) for _ in range(count)]
    stack.apply(*manifests)
    stack.wait_ready(*(name_of(each) for each in manifests))
    return {each["spec"]["phoneNumber"]: name_of(each) for each in manifests}


def writes(stack: Stack) -> list[tuple[str, str]]:
    """Number SID and SmsUrl of each write that Twilio has seen since its journal was cleared."""
    return [(each["sid"], each["sms_url"]) for each in stack.twin_call("GET", "/journal?method=POST")["entries"]]


def check_held(stack: Stack, held: dict[str, str]) -> None:
    found = records(stack)
    assert {number: found[number].name for number in held} == held
    assert {number: webhook(stack, number) for number in held} == {
        number: stack.webhook_url(name) for number, name in held.items()
    }


def test_standby_is_ready_and_does_nothing(stack: Stack, urls: dict[str, str]) -> None:
    held = live_channels(stack, 3)
    wait_for(lambda: metric(urls[FIRST], "smschannel_channels") >= len(held), "the leader counts its channels")
    assert metric(urls[SECOND], "smschannel_channels") == 0
    assert metric(urls[SECOND], "smschannel_reconciles_total") == 0
    check_held(stack, held)


def test_release_at_sigterm_hands_over_at_once(stack: Stack, urls: dict[str, str]) -> None:
    held = live_channels(stack, 20)
    stack.twin_call("DELETE", "/journal")
    began = time.monotonic()
    assert stack.stop_process(FIRST) == 0
    ended = time.monotonic() - began
    wait_for(lambda: leads(urls[SECOND]), "the other operator leads")
    seconds = time.monotonic() - began
    assert seconds <= AT_ONCE + 10, f"{seconds:.1f} s, of which {ended:.1f} until the process ended"
    print(f"SIGTERM: {seconds:.2f} s until the other leads")
    print(f"SIGTERM: {wait_takeover(stack, urls[SECOND], began):.2f} s until it configured a channel")
    assert len(writes(stack)) == 1, "only the new channel's"
    check_held(stack, held)


@pytest.mark.parametrize("way", ["SIGKILL", "SIGSTOP"])
def test_silent_leader_is_replaced_when_its_lease_has_ended(stack: Stack, urls: dict[str, str], way: str) -> None:
    held = live_channels(stack, 10)
    stack.twin_call("DELETE", "/journal")
    began = time.monotonic()
    if way == "SIGKILL":
        stack.stop_process(FIRST, kill=True)
    else:
        stack.process(FIRST).suspend()
    try:
        seconds = wait_takeover(stack, urls[SECOND], began)
        assert seconds <= LEASE + AT_ONCE
        print(f"{way}: {seconds:.2f} s until the other configured a channel, with a lease of {LEASE} s")
    finally:
        if way == "SIGSTOP":
            stack.process(FIRST).resume()
    if way == "SIGSTOP":
        wait_for(lambda: not leads(urls[FIRST]), "the former leader stands by")
    assert leads(urls[SECOND])
    assert len(writes(stack)) == 1, "only the new channel's"
    check_held(stack, held)


def test_leader_that_was_stopped_in_the_middle_of_its_work_writes_nothing_afterwards(
    stack: Stack, urls: dict[str, str]
) -> None:
    """It was about to configure numbers. Another one has configured and restored them when it goes on."""
    numbers = [take_number(stack) for _ in range(12)]
    manifests = [stack.manifest(number) for number in numbers]
    names = [name_of(each) for each in manifests]
    slow = {"match": {"method": "GET"}, "action": {"kind": "delay", "seconds": 0.5}}
    rule = stack.twin_call("POST", "/faults", slow)["id"]
    stack.apply(*manifests)
    wait_for(lambda: arrived(stack, rule) >= 4, "some reconciles wait for Twilio")
    stack.process(FIRST).suspend()
    try:
        stack.twin_call("DELETE", "/faults")
        stack.wait_ready(*names)
        assert leads(urls[SECOND])
        delete(stack, *names)
        wait_for(lambda: not set(records(stack)) & set(numbers), "no record is left")
        done = writes(stack)
    finally:
        stack.process(FIRST).resume()
    wait_for(lambda: not leads(urls[FIRST]), "the former leader stands by")
    log = (stack.logs / f"{FIRST}.log").read_text()
    assert "lease lost, all work stops" in log
    assert writes(stack) == done, "it has written nothing"
    assert {number: webhook(stack, number) for number in numbers} == {number: before(number) for number in numbers}


def arrived(stack: Stack, rule: int) -> int:
    rules = stack.twin_call("GET", "/faults")["faults"]
    return next((int(each["hit"]) for each in rules if each["id"] == rule), 0)


@pytest.fixture
def partitioned(stack: Stack, urls: dict[str, str]) -> Iterator[Callable[[bool], None]]:
    """The first operator behind a proxy. The function returned cuts it off from the API server, but not from Twilio."""
    authority = ssl.create_default_context(cadata=b64decode(stack.cluster.ca_data).decode())
    upstreams = {"kubernetes": Upstream(stack.cluster.url, authority), "twilio": Upstream(stack.twilio_url)}
    stack.stop_process(FIRST)
    stack.stop_process(SECOND)
    with Proxy(kubernetes=upstreams["kubernetes"], twilio=upstreams["twilio"]) as proxy:
        token = yaml.safe_load(stack.operator_kubeconfig(FIRST).read_text())["users"][0]["user"]["token"]
        path = stack.home / "partitioned.kubeconfig"
        write_kubeconfig(path, url=proxy.urls["kubernetes"], ca_data="", token=token, namespace=CHANNELS)

        def cut(away: bool) -> None:
            proxy.away = {"kubernetes"} if away else set()
            if away:
                proxy.cut_watches()

        stack.start_operator(FIRST, settings={"KUBECONFIG": str(path)})
        start(stack, urls, SECOND)
        yield cut
        stack.stop_process(FIRST)


def test_leader_without_the_api_server_stops_before_another_begins(
    stack: Stack, urls: dict[str, str], partitioned: Callable[[bool], None]
) -> None:
    """Twilio still answers it: drift that it sees must not be corrected by two operators."""
    held = live_channels(stack, 5)
    assert leads(urls[FIRST])
    began = time.monotonic()
    partitioned(True)
    wait_for(lambda: not leads(urls[FIRST]), "the leader gives up")
    given_up = time.monotonic() - began
    assert given_up <= LEASE
    seconds = wait_takeover(stack, urls[SECOND], began)
    assert seconds <= LEASE + LEASE / 6 + AT_ONCE
    print(f"partition: the leader stopped after {given_up:.2f} s, the other configured a channel after {seconds:.2f} s")
    partitioned(False)
    check_held(stack, held)
    stack.stop_process(SECOND)
    wait_for(lambda: leads(urls[FIRST]), "it leads again without a restart")
    check_held(stack, held)


def test_rolling_update_writes_nothing_at_twilio(stack: Stack, urls: dict[str, str]) -> None:
    """Each replica is replaced while the other one is there, as a Deployment does it."""
    held = live_channels(stack, 20)
    stack.twin_call("DELETE", "/journal")
    versions = {each.phone_number: each.version for each in records(stack).values()}
    for third in ("operator-3", "operator-4"):
        urls[third] = f"http://127.0.0.1:{free_port()}"
        start(stack, urls, third)
    for gone in (FIRST, SECOND):
        stack.stop_process(gone)
        there = [urls[each] for each in (SECOND, "operator-3", "operator-4") if each in stack.pids()]
        wait_for(partial(any_leads, there), "one of the others leads")
    check_held(stack, held)
    assert writes(stack) == []
    assert {each.phone_number: each.version for each in records(stack).values()} == versions
    for third in ("operator-3", "operator-4"):
        stack.stop_process(third)


def test_lease_that_is_deleted_or_edited_leaves_one_leader(stack: Stack, urls: dict[str, str]) -> None:
    leases = client.CoordinationV1Api(stack.api.client)
    leases.delete_namespaced_lease("sms-channel-operator", OPERATOR)
    live_channels(stack, 1)
    wait_for(lambda: holder(stack) == FIRST, "the leader creates the Lease again")
    assert (leads(urls[FIRST]), leads(urls[SECOND])) == (True, False)
    spec = {"holderIdentity": SECOND, "leaseTransitions": 99}
    leases.patch_namespaced_lease("sms-channel-operator", OPERATOR, {"spec": spec})
    wait_for(lambda: not leads(urls[FIRST]), "the leader stops")
    wait_for(lambda: leads(urls[FIRST]) != leads(urls[SECOND]), "one of them leads again")
    live_channels(stack, 1)


def holder(stack: Stack) -> str:
    try:
        lease = client.CoordinationV1Api(stack.api.client).read_namespaced_lease("sms-channel-operator", OPERATOR)
    except client.ApiException:
        return ""
    return (lease.spec and lease.spec.holder_identity) or ""


# The fence


async def test_former_leader_is_refused_at_its_first_write(stack: Stack) -> None:
    """By the API server, whatever the former leader believes; and only operators are."""
    for name in (FIRST, SECOND):
        stack.stop_process(name)
    paths = [str(stack.operator_kubeconfig(name)) for name in ("former", "present")]
    async with await KubeClient.connect(paths[0]) as former, await KubeClient.connect(paths[1]) as present:
        identities = [await identify(each) for each in (former, present)]
        assert [(each.name, each.is_pod) for each in identities] == [("former", True), ("present", True)]
        first, second = Elector(former, OPERATOR, "former"), Elector(present, OPERATOR, "present")
        assert await first.look() == Claim()
        await write(former, "pn1")
        with pytest.raises(Fenced, match="held by former, and this token is bound to pod present"):
            await write(present, "pn1")

        await first.release()
        assert await second.look() == Claim()
        began = time.monotonic()
        with pytest.raises(Fenced, match="held by present, and this token is bound to pod former"):
            await write(former, "pn2")
        print(f"fence: refused {time.monotonic() - began:.3f} s after another one took the lease")
        await write(present, "pn2")
        assert await KubeStore(former, OPERATOR).has_fence()
        assert await KubeStore(present, OPERATOR).has_fence()
        await second.release()
        with pytest.raises(Fenced, match="held by nobody"):
            await write(present, "pn3")
    async with await KubeClient.connect(str(stack.kubeconfig)) as administrator:
        await write(administrator, "pn4")
        assert await KubeStore(administrator, OPERATOR).has_fence() is False, "it holds operators only"


def test_operator_is_not_fenced_by_what_is_left_of_a_removed_shard(stack: Stack) -> None:
    """Helm keeps a shard's bindings, and its Lease, which has no holder any more."""
    for name in (FIRST, SECOND):
        stack.stop_process(name)
    leases, policies = client.CoordinationV1Api(stack.api.client), client.AdmissionregistrationV1Api(stack.api.client)
    leases.patch_namespaced_lease(OPERATORS_LEASE, OPERATOR, {"spec": {"holderIdentity": "leader"}})
    operator = client.CoreV1Api(config.new_client_from_config(str(stack.operator_kubeconfig("leader"))))
    wait_for(lambda: refusal(operator) == "", "the operator that leads writes")

    removed = client.V1ObjectMeta(name=f"{OPERATORS_LEASE}-removed", namespace=OPERATOR)
    left = policies.read_validating_admission_policy_binding(f"{FENCE}-records")
    left.metadata = client.V1ObjectMeta(name=f"{FENCE}-left")
    left.spec.param_ref = client.V1ParamRef(name=removed.name, namespace=OPERATOR, parameter_not_found_action="Deny")
    policies.create_validating_admission_policy_binding(left)
    try:
        wait_for(lambda: f"{FENCE}-left" in refusal(operator), "the API server follows the binding")
        leases.create_namespaced_lease(OPERATOR, client.V1Lease(metadata=removed, spec=client.V1LeaseSpec()))
        wait_for(lambda: refusal(operator) == "", "the operator that leads writes")
    finally:
        policies.delete_validating_admission_policy_binding(f"{FENCE}-left")
        leases.patch_namespaced_lease(OPERATORS_LEASE, OPERATOR, {"spec": {"holderIdentity": ""}})


def refusal(operator: client.CoreV1Api) -> str:
    """Return what the API server says to a write of this operator; an empty text if it writes."""
    secret = client.V1Secret(metadata=client.V1ObjectMeta(name="pn5", labels={RECORD_LABEL: "true"}))
    try:
        operator.create_namespaced_secret(OPERATOR, secret, dry_run="All")
    except client.ApiException as error:
        return str(error.body)
    return ""


async def write(api: KubeClient, name: str) -> None:
    """As the operator writes a record; a dry run passes the same admission."""
    meta = {"name": name, "namespace": OPERATOR, "labels": {RECORD_LABEL: "true"}}
    secret: dict[str, Any] = {"apiVersion": "v1", "kind": "Secret", "metadata": meta}
    await api.request("POST", f"/api/v1/namespaces/{OPERATOR}/secrets", secret, params={"dryRun": "All"})
