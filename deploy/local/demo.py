"""The demo: what the product does, step by step, on a real API server. A step that fails ends it."""

from __future__ import annotations

import base64
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import parse_qsl

import yaml
from kubernetes import client, watch
from rich.console import Console
from rich.table import Table
from twilio.request_validator import RequestValidator

from deploy.build import Progress
from deploy.local.stack import CHANNELS, ROOT, Options, Stack, ready_reason, wipe


class StoryError(Exception):
    """A step did not have the expected result."""


class Receiver:
    """A webhook server in place of a HydraCore instance. `received` holds path, signature and form of each message."""

    def __init__(self) -> None:
        received: Queue[tuple[str, str, dict[str, str]]] = Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                received.put(
                    (self.path, self.headers["X-Twilio-Signature"], dict(parse_qsl(form, keep_blank_values=True)))
                )
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def tell(home: Path, say: Progress) -> None:
    """Run all steps and print a table of them; everything is stopped afterwards. Raises `StoryError`."""
    wipe(home)
    receiver = Receiver()
    options = Options(
        webhook_url_template=f"{receiver.origin}/v1/instances/{{instance_id}}/channels/sms/webhook",
        operator_settings={"SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "2"},
    )
    started = time.monotonic()
    try:
        with Stack(home, options, say) as stack:
            done = [("Start everything, with the RBAC of deploy/manifests", time.monotonic() - started)]
            story = _Story(stack, receiver, say, done)
            story.run()
    finally:
        receiver.close()
    table = Table("", "step", "seconds", title="The demo")
    for number, (what, seconds) in enumerate(done):
        table.add_row(str(number), what, f"{seconds:.1f}")
    Console().print(table)


class _Story:
    def __init__(self, stack: Stack, receiver: Receiver, say: Progress, done: list[tuple[str, float]]) -> None:
        self.stack = stack
        self.receiver = receiver
        self.say = say
        self.done = done
        self.numbers: list[str] = stack.twin["phone_numbers"]
        self.before = {number: f"https://before.example.com/{number[1:]}" for number in self.numbers}

    def run(self) -> None:
        for number, url in self.before.items():
            self.stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": url})
        with self.step("Apply a manifest with a sealed token: it becomes Ready"):
            first = self.apply_a_sealed_manifest()
        with self.step("Configure a second instance by REST: it becomes active"):
            second = self.configure_by_rest()
        with self.step("Send an SMS: the instance receives it with a valid signature"):
            self.receive(first)
        with self.step("Change a webhook at Twilio by hand: the operator corrects it"):
            self.correct_drift(second)
        with self.step("Kill the operator amid 20 channels, start it: all are Ready"):
            many = self.kill_in_the_middle()
        with self.step("Delete all channels, also by REST: all numbers are restored"):
            self.delete(first, second, many)
        with self.step("Search database and logs for the token: it is in none"):
            self.search_for_tokens()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        self.say(f"\n{len(self.done)}. {what}")
        started = time.monotonic()
        yield
        self.done.append((what, time.monotonic() - started))

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            raise StoryError(f"Not as expected: {what}. Logs: {self.stack.logs}")
        self.say(f"   {what}")

    def apply_a_sealed_manifest(self) -> str:
        name, number = str(uuid.uuid4()), self.numbers[0]
        command = [sys.executable, "-m", "smschannel.cli.main", "seal", name, "--namespace", CHANNELS]
        command += ["--account-sid", self.stack.twin["account_sid"], "--phone-number", number]
        command += ["--kubeconfig", str(self.stack.kubeconfig)]
        token = self.stack.twin["auth_token"]
        manifest = subprocess.run(command, input=token, text=True, check=True, capture_output=True, cwd=ROOT).stdout
        self.check(
            token not in manifest,
            f"'kubectl sms seal' prints a manifest of {len(manifest)} bytes; the token in it is sealed",
        )
        self.stack.apply(yaml.safe_load(manifest))
        channel = self.stack.wait_ready(name)[name]
        url = channel["status"]["webhookUrl"]
        self.check(self.stack.number(number)["sms_url"] == url, f"Ready: {number} points at {url}")
        return name

    def configure_by_rest(self) -> str:
        name = str(uuid.uuid4())
        body = {
            "account_sid": self.stack.twin["account_sid"],
            "auth_token": self.stack.twin["auth_token"],
            "phone_number": self.numbers[1],
        }
        status, answer = self.stack.rest("POST", name, body)
        self.check(status == 201, f"POST answers {status}: {answer}")
        self.stack.wait_ready(name)
        status, answer = self.stack.rest("GET", name)
        self.check(answer["status"] == "active" and answer["enabled"], f"GET answers {status}: {answer}")
        return name

    def receive(self, instance: str) -> None:
        sent = {"to": self.numbers[0], "from": "+61499000001", "body": "Hello, instance!"}
        outcome = self.stack.twin_call("POST", "/inbound", sent)
        self.check(outcome["outcome"] == "delivered", f"Twilio delivers to {outcome.get('url')}")
        path, signature, form = self.receiver.received.get(timeout=10)
        validator = RequestValidator(self.stack.twin["auth_token"])
        valid = validator.validate(self.receiver.origin + path, form, signature)
        self.check(instance in path and form["Body"] == sent["body"], f"the instance receives {form['Body']!r}")
        self.check(valid, f"X-Twilio-Signature {signature} is valid")

    def correct_drift(self, instance: str) -> None:
        number = self.numbers[1]
        ours = self.stack.number(number)["sms_url"]
        self.stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://elsewhere.example.com/sms"})
        self.say(f"   somebody points {number} at https://elsewhere.example.com/sms")
        events = client.EventsV1Api(self.stack.api.client)
        for event in watch.Watch().stream(events.list_namespaced_event, CHANNELS, timeout_seconds=30):
            if event["object"].reason == "DriftCorrected" and event["object"].regarding.name == instance:
                break
        self.check(self.stack.number(number)["sms_url"] == ours, f"Event DriftCorrected: it points at {ours} again")

    def kill_in_the_middle(self) -> dict[str, str]:
        slowly = {"match": {"method": "POST"}, "action": {"kind": "delay", "seconds": 1}}
        self.stack.twin_call("POST", "/faults", slowly)
        manifests = {number: self.stack.manifest(number) for number in self.numbers[2:22]}
        names = {number: manifest["metadata"]["name"] for number, manifest in manifests.items()}
        self.stack.apply(*manifests.values())
        self.stack.wait_ready(*names.values(), enough=5)
        self.stack.stop_process("operator", kill=True)
        self.stack.twin_call("DELETE", "/faults")
        listed = self.stack.channels.get(namespace=CHANNELS).to_dict()["items"]
        ready = sum(ready_reason(each)[0] == "True" for each in listed if each["metadata"]["name"] in names.values())
        self.check(ready < len(names), f"killed when {ready} of {len(names)} channels were Ready")
        self.stack.start_operator()
        self.stack.wait_ready(*names.values())
        self.check(True, f"started again: {len(names)} of {len(names)} channels become Ready")
        return names

    def delete(self, first: str, second: str, many: dict[str, str]) -> None:
        status, _ = self.stack.rest("DELETE", second)
        self.check(status in {202, 204}, f"DELETE by REST answers {status}")
        self.stack.delete(first, *many.values())
        self.stack.wait_gone(first, second, *many.values())
        used = [*self.numbers[:2], *many]
        restored = [number for number in used if self.stack.number(number)["sms_url"] == self.before[number]]
        self.check(restored == used, f"{len(restored)} of {len(used)} numbers point at what they pointed at before")
        left: list[Any] = [*self.stack.records(), *self.stack.channels.get(namespace=CHANNELS).to_dict()["items"]]
        self.check(not left, f"{len(left)} channels and records are left")
        violations = self.stack.twin_call("GET", "/violations")["violations"]
        self.check(not violations, f"{len(violations)} writes to Twilio changed anything but SmsUrl and SmsMethod")

    def search_for_tokens(self) -> None:
        token, sid = self.stack.twin["auth_token"], self.stack.twin["account_sid"]
        forms = [token.encode(), base64.b64encode(token.encode()), base64.b64encode(f"{sid}:{token}".encode())]
        files = [
            path for top in (self.stack.cluster.etcd_dir, self.stack.logs) for path in top.rglob("*") if path.is_file()
        ]
        contents = {path: path.read_bytes() for path in files}
        control = any(sid.encode() in content for content in contents.values())
        self.check(control, f"the search works: it finds the account's SID in {len(files)} files")
        found = [path.name for path, content in contents.items() if any(form in content for form in forms)]
        self.check(not found, f"the token, raw or in base64, is in {len(found)} of them")
