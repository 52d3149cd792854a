"""What the story does with the pods of a cluster: reads them, ends them, and calls the REST API from one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from kubernetes.client import CoordinationV1Api

from deploy.kind import install
from deploy.kind.access import TWIN_NAMESPACE, Access
from deploy.kind.environment import Environment
from deploy.local.stack import ROOT
from smschannel.api.names import LEASE
from smschannel.api.resource import FINALIZER
from smschannel.core.record import RECORD_LABEL

OPERATOR_APP, SHIM_APP = "sms-channel-operator", "sms-api-shim"
NAMESPACES = (install.OPERATOR, install.CHANNELS, TWIN_NAMESPACE)
CLIENT_NAMESPACE = "sms-clients"
_IMMEDIATELY = ("--grace-period=0", "--force")


class Pods:
    """A cluster with the product in it, an account at the twin, and a pod that calls the REST API."""

    def __init__(self, environment: Environment, access: Access, tag: str) -> None:
        self.environment = environment
        self.access = access
        self.tag = tag
        self.account: dict[str, Any] = access.twin("POST", "/seed", {"accounts": 1, "numbers": 60})["accounts"][0]
        self.numbers: list[str] = list(self.account["phone_numbers"])
        self.before = {number: f"https://before.example.com/{number[1:]}" for number in self.numbers}
        for number, url in self.before.items():
            access.twin("PATCH", f"/numbers/{number}", {"sms_url": url})
        self.channels: dict[str, str] = {}  # instance: number
        self.last_leader = ""  # before the release was removed
        self.api_key = self.sms("key", "create", "--instances", "*").strip()

    # The product's command line and API

    def sms(self, *arguments: str, stdin: str | None = None, **environment: str) -> str:
        """Run `kubectl sms` on this machine, as an administrator would."""
        done = subprocess.run(
            [sys.executable, "-m", "smschannel.cli.main", *arguments],
            cwd=ROOT,
            env={**os.environ, "KUBECONFIG": str(self.access.kubeconfig), **environment},
            input=stdin or "",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"kubectl sms {arguments[0]}: {done.stdout}{done.stderr}"
        return done.stdout

    def add_channels(self, count: int) -> list[str]:
        """Apply sealed manifests for free numbers, and return their instances once they are Ready."""
        instances = {str(uuid.uuid4()): number for number in self.free_numbers()[:count]}
        manifests = [self.sealed(instance, number) for instance, number in instances.items()]
        self.access.kubectl("apply", "--filename=-", stdin="---\n".join(manifests))
        self.channels |= instances
        self.wait_ready(*instances)
        return list(instances)

    def sealed(self, instance: str, number: str) -> str:
        """Return the manifest that `kubectl sms seal` prints."""
        options = ["--namespace", install.CHANNELS, "--account-sid", self.account["account_sid"]]
        return self.sms("seal", instance, *options, "--phone-number", number, stdin=self.account["auth_token"])

    def free_numbers(self) -> list[str]:
        return [number for number in self.numbers if number not in self.channels.values()]

    def wait_ready(self, *instances: str, seconds: int = 120) -> None:
        names = [f"smschannel/{instance}" for instance in instances]
        wait = ["wait", "--for=condition=Ready", f"--timeout={seconds}s", f"--namespace={install.CHANNELS}"]
        self.access.kubectl(*wait, *names)

    def url(self, instance: str) -> str:
        return install.TEMPLATE.format(instance_id=instance)

    def sms_url(self, number: str) -> str:
        return str(self.access.twin("GET", f"/numbers/{number}")["sms_url"])

    def assert_numbers_held(self) -> None:
        """Every number points at its instance, and no other number was touched."""
        wanted = self.before | {number: self.url(instance) for instance, number in self.channels.items()}
        assert {number: self.sms_url(number) for number in self.numbers} == wanted

    def writes(self) -> list[dict[str, Any]]:
        """Return the calls to Twilio that were writes, since the journal was reset."""
        entries = self.access.twin("GET", "/journal")["entries"]
        return [each for each in entries if each["method"] != "GET"]

    # The pod that calls the REST API

    def start_client(self, certificate: str) -> None:
        source = (Path(__file__).parent / "client.py").read_text()
        metadata = {"name": "client", "namespace": CLIENT_NAMESPACE}
        namespace = {"name": CLIENT_NAMESPACE, "labels": install.RESTRICTED}
        self.access.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": namespace},
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": metadata,
                "data": {"client.py": source, "ca.crt": certificate},
            },
            {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"API_KEY": self.api_key}},
            yaml.safe_load((Path(__file__).parent / "client.yaml").read_text().replace("IMAGE_TAG", self.tag)),
        )
        self.access.kubectl("wait", "--for=condition=Ready", "pod/client", f"-n{CLIENT_NAMESPACE}", "--timeout=120s")

    def rest(self, method: str, instance: str, body: Any = None) -> tuple[int, Any]:
        """Call the REST API through its Service; returns the status and the decoded body."""
        given = "" if body is None else json.dumps(body)
        answer = self.access.kubectl(*_exec(), method, instance, stdin=given)
        status, text = json.loads(answer)
        return status, json.loads(text) if text else None

    @contextmanager
    def load(self, *instances: str) -> Iterator[dict[str, Any]]:
        """Call the REST API all the time while the block runs; afterwards the dict has what the client counted."""
        result: dict[str, Any] = {}
        kubectl = self.environment.bin / "kubectl"
        with subprocess.Popen(
            [kubectl, f"--kubeconfig={self.access.kubeconfig}", *_exec(), "load", *instances],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as client:
            assert client.stdout
            assert client.stdin
            try:
                assert client.stdout.readline() == "started\n", "the client did not start"
                yield result
                client.stdin.close()
                result.update(json.loads(client.stdout.read()))
            finally:
                client.kill()

    # Pods

    def of(self, app: str, namespace: str = install.OPERATOR) -> list[dict[str, Any]]:
        """Return the pods of a Deployment that are not about to be deleted."""
        selector = f"--selector=app.kubernetes.io/name={app}"
        found = self.access.get("pods", f"--namespace={namespace}", selector)["items"]
        return [each for each in found if "deletionTimestamp" not in each["metadata"]]

    def term(self) -> tuple[str, int, str]:
        """Return which pod leads, and what tells its term from others: an empty name if none leads."""
        spec: Any = CoordinationV1Api(self.access.api).read_namespaced_lease(LEASE, install.OPERATOR).spec
        return spec.holder_identity or "", spec.lease_transitions or 0, str(spec.acquire_time)

    def write_as(self, pod: str) -> None:
        """Write a record as the operator in this pod would, but only try it. Raises EngineError if that is refused."""
        account = f"system:serviceaccount:{install.OPERATOR}:{OPERATOR_APP}"
        bound = f"authentication.kubernetes.io/pod-name={pod}"
        metadata = {"name": "smschannel-try", "namespace": install.OPERATOR, "labels": {RECORD_LABEL: "true"}}
        secret = yaml.safe_dump({"apiVersion": "v1", "kind": "Secret", "metadata": metadata})
        create = ["create", "--filename=-", "--dry-run=server", f"--as={account}", f"--as-user-extra={bound}"]
        self.access.kubectl(*create, stdin=secret)

    def delete_now(self, pod: str) -> None:
        """Delete a pod without giving it time to end."""
        self.access.kubectl("delete", "pod", pod, f"--namespace={install.OPERATOR}", *_IMMEDIATELY)

    @contextmanager
    def stopped(self, pod: str) -> Iterator[None]:
        """Stop all processes of a pod while the block runs, as SIGSTOP does."""
        node, container = self._container(pod)
        tasks = ["exec", node, "ctr", "--namespace=k8s.io", "tasks"]
        self.environment.engine.docker(*tasks, "pause", container)
        try:
            yield
        finally:
            self.environment.engine.docker(*tasks, "resume", container)

    def signal(self, pod: str, signal: str) -> None:
        """Send a signal to a pod's main process from its node, which the pod cannot notice or refuse."""
        node, container = self._container(pod)
        kill = ["ctr", "--namespace=k8s.io", "tasks", "kill", f"--signal={signal}", container]
        self.environment.engine.docker("exec", node, *kill)

    @contextmanager
    def cut_off(self, pod: str) -> Iterator[None]:
        """Drop what a pod sends to the API server while the block runs; it still reaches everything else."""
        found = self.access.get("pod", pod, f"--namespace={install.OPERATOR}")
        api_server = self.access.get("service", "kubernetes", "--namespace=default")["spec"]["clusterIP"]
        rule = f"ip saddr {found['status']['podIP']} ip daddr {api_server} drop"
        # Before the Service's address is replaced by the API server's own.
        table = f"table inet cut-off {{ chain sent {{ type filter hook prerouting priority raw; {rule}; }}; }}"
        node = ["exec", found["spec"]["nodeName"], "nft"]
        self.environment.engine.docker(*node, table)
        try:
            yield
        finally:
            self.environment.engine.docker(*node, "delete table inet cut-off")

    def lead_on(self, node: str) -> None:
        """Replace leaders until the leader's pod is on this node."""
        for _ in range(3):
            self.wait_rollout(OPERATOR_APP)
            leader = self.term()[0]
            if self.access.get("pod", leader, f"--namespace={install.OPERATOR}")["spec"]["nodeName"] == node:
                return
            self.access.kubectl("delete", "pod", leader, f"--namespace={install.OPERATOR}")
            self.wait_other_leader(leader)
        raise AssertionError(f"no leader on {node}")

    def wait_other_leader(self, former: str, seconds: float = 60) -> float:
        """Return how many seconds it took until another pod leads."""
        return until(lambda: self.term()[0] not in {"", former}, "another pod leads", seconds)

    @contextmanager
    def terms(self) -> Iterator[dict[str, Any]]:
        """Watch the Lease while the block runs; afterwards the dict has what was seen of the leaders."""
        seen: dict[str, Any] = {"takeovers": 0, "without": 0.0}
        ended = threading.Event()
        watching = threading.Thread(target=_watch_terms, args=(self.term, seen, ended))
        watching.start()
        try:
            yield seen
        finally:
            ended.set()
            watching.join()

    def _container(self, pod: str) -> tuple[str, str]:
        """Return a pod's node and the id of its container there."""
        found = self.access.get("pod", pod, f"--namespace={install.OPERATOR}")
        container = found["status"]["containerStatuses"][0]["containerID"]
        return found["spec"]["nodeName"], container.removeprefix("containerd://")

    def rollout(self, app: str) -> None:
        deployment = f"deployment/{app}"
        self.access.kubectl("rollout", "restart", deployment, f"--namespace={install.OPERATOR}")
        self.wait_rollout(app)

    def wait_rollout(self, app: str) -> None:
        status = ["rollout", "status", f"deployment/{app}", f"--namespace={install.OPERATOR}", "--timeout=300s"]
        self.access.kubectl(*status)

    def logs(self) -> dict[str, str]:
        """Return what every container of every pod wrote, by the path of its log on its node; also of deleted pods."""
        found: dict[str, str] = {}
        for node in self.environment.cluster.nodes():
            archive = self.environment.engine.docker("exec", node, "sh", "-c", "grep -r '' /var/log/pods")
            for line in archive.splitlines():
                path, _, text = line.partition(":")
                found[path] = found.get(path, "") + text + "\n"
        return found

    def uninstall(self) -> None:
        self.access.helm("uninstall", install.RELEASE, f"--namespace={install.OPERATOR}", "--wait", "--timeout=5m")

    def snapshot(self) -> dict[str, tuple[str, Any]]:
        """Return resourceVersion and generation of each object of the release."""
        manifest = self.access.helm("get", "manifest", install.RELEASE, f"--namespace={install.OPERATOR}")
        found = json.loads(self.access.kubectl("get", "--filename=-", "--output=json", stdin=manifest))["items"]
        return {
            f"{each['kind']} {each['metadata'].get('namespace', '')}/{each['metadata']['name']}": (
                each["metadata"]["resourceVersion"] if each["kind"] != "Deployment" else "",
                each["metadata"].get("generation"),
            )
            for each in found
        }

    def held_finalizers(self) -> list[str]:
        found = self.access.get("smschannels", "--all-namespaces")["items"]
        return [each["metadata"]["name"] for each in found if FINALIZER in each["metadata"].get("finalizers", ())]

    @contextmanager
    def forwarded(self, service: str, namespace: str, port: int) -> Iterator[int]:
        """Make a Service reachable on this machine's loopback while the block runs; yields the port."""
        command = [str(self.environment.bin / "kubectl"), f"--kubeconfig={self.access.kubeconfig}", "port-forward"]
        target = [f"--namespace={namespace}", f"service/{service}", f":{port}"]
        with subprocess.Popen([*command, *target], stdout=subprocess.PIPE, text=True) as forward:
            try:
                assert forward.stdout
                found = re.match(r"Forwarding from 127\.0\.0\.1:(\d+)", forward.stdout.readline())
                assert found, "kubectl port-forward did not start"
                yield int(found[1])
            finally:
                forward.kill()


def until(condition: Any, what: str, seconds: float = 60) -> float:
    """Wait until a condition about the cluster holds, and return how many seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - started


def _watch_terms(read: Callable[[], tuple[str, int, str]], seen: dict[str, Any], ended: threading.Event) -> None:
    """Count new terms, and note the longest time without a leader in seconds, until the event."""
    last, since, is_last = read(), time.monotonic(), False
    while not is_last:
        is_last = ended.wait(0.05)
        term, now = read(), time.monotonic()
        if term[0] and term != last:
            seen["takeovers"] += 1
            seen["without"] = max(seen["without"], now - since)
        if term[0] or last[0]:
            since = now
        last = term


def _exec() -> list[str]:
    return ["exec", "-i", "client", f"--namespace={CLIENT_NAMESPACE}", "--", "python", "/client/client.py"]
