"""`kubectl sms test` and `report` on a running product: the webhook is the operator's, and no secret leaves."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
from click.testing import CliRunner, Result

from deploy.local.stack import CHANNELS, OPERATOR, Stack
from smschannel.cli.main import cli
from tests.cluster.steps import apply_secret, configured, delete, name_of, patch
from tests.twin.inbound import signature


class Webhook:
    """The instance's webhook: it accepts what Twilio would sign, and rejects everything else."""

    def __init__(self, token: str) -> None:
        self.received: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
                url = f"{outer.url}{self.path}"
                accepted = self.headers.get("X-Twilio-Signature") == signature(token, url, form)
                if accepted:
                    outer.received.append({**form, "path": self.path})
                self.send_response(200 if accepted else 403)
                self.send_header("Content-Type", "text/xml")
                self.end_headers()
                self.wfile.write(b"<Response/>" if accepted else b"")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def hook(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """A webhook that the operator's template names; the settings of this environment come before the published ones."""
    monkeypatch.setenv("KUBECONFIG", str(stack.kubeconfig))
    monkeypatch.setenv("COLUMNS", "200")
    with Webhook(stack.twin["auth_token"]) as webhook:
        template = f"{webhook.url}/{{namespace}}/instances/{{instance_id}}/sms"
        monkeypatch.setenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE", template)
        yield webhook


def run(*arguments: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(cli, arguments, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def channel(stack: Stack, number: str) -> Iterator[Any]:
    manifest = stack.manifest(number)
    yield configured(stack, manifest)
    delete(stack, name_of(manifest))


def test_signed_message_is_accepted(stack: Stack, hook: Webhook, channel: Any) -> None:
    """The token is given on standard input, and sent to nobody."""
    name, token = name_of(channel), stack.twin["auth_token"]
    result = run("test", name, "--body", "Hello", stdin=f"{token}\n")
    assert result.exit_code == 0, result.output
    assert "text/xml: delivered." in result.stdout
    [message] = hook.received
    assert message["path"] == f"/{CHANNELS}/instances/{name}/sms"
    assert (message["To"], message["Body"]) == (channel["spec"]["phoneNumber"], "Hello")
    assert message["AccountSid"] == channel["spec"]["accountSid"]
    assert token not in result.output


def test_wrong_token_is_noticed(hook: Webhook, channel: Any) -> None:
    result = run("test", name_of(channel), stdin="0" * 32)
    assert result.exit_code == 1
    assert "it rejects the signature" in result.stdout
    assert f"compute the signature over exactly this URL: {hook.url}/" in result.stderr


def test_unsigned_message_must_be_rejected(hook: Webhook, channel: Any) -> None:
    result = run("test", name_of(channel), "--unsigned")
    assert result.exit_code == 0, result.output
    assert "rejects a message without a signature, as it should" in result.stdout
    assert hook.received == []


def test_without_a_token_nothing_is_delivered(hook: Webhook, channel: Any) -> None:
    result = run("test", name_of(channel), stdin="")
    assert result.exit_code == 1
    assert "To see that the webhook rejects what nobody signed: --unsigned" in result.stderr
    assert hook.received == []


def test_token_is_read_from_the_channels_secret(stack: Stack, hook: Webhook, number: str) -> None:
    apply_secret(stack, "for-test", {"auth_token": stack.twin["auth_token"]})
    manifest = stack.manifest(number)
    manifest["spec"]["credentials"] = {"secretKeyRef": {"name": "for-test", "key": "auth_token"}}
    configured(stack, manifest)
    result = run("test", name_of(manifest), stdin="")
    assert result.exit_code == 0, result.output
    assert "signed with the auth token in Secret for-test" in result.stderr
    delete(stack, name_of(manifest))


def test_note_says_where_real_messages_go(stack: Stack, hook: Webhook, number: str) -> None:
    """A Messaging Service receives them: that the webhook works is not the whole truth."""
    manifest = stack.manifest(number, suspend=True)
    stack.apply(manifest)
    stack.wait_until(lambda each: "Suspended" in str(each), name_of(manifest))
    result = run("test", name_of(manifest), "--unsigned")
    assert "Note: It is not known whether Twilio delivers real messages to this webhook" in result.stderr
    delete(stack, name_of(manifest))


def test_tenant_is_asked_about_the_webhook_of_the_status(
    hook: Webhook, channel: Any, tenant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings may not be read, and others might have written the status."""
    monkeypatch.setenv("KUBECONFIG", str(tenant))
    result = run("test", name_of(channel), "--unsigned")
    assert result.exit_code == 1
    assert f"Deliver to {channel['status']['webhookUrl']} ? This is asked at a terminal: add --yes" in result.stderr


def test_other_twilio_needs_to_be_named_before_a_login_is_sent(stack: Stack, hook: Webhook, channel: Any) -> None:
    """As for `plan`: others may have written the published URL."""
    result = run("test", name_of(channel), "--send", "--from", "+61400000001", stdin=stack.twin["auth_token"])
    assert result.exit_code == 1
    assert "The operator's published settings name another Twilio" in result.stderr


def test_sms_is_not_sent_without_a_yes(
    stack: Stack, hook: Webhook, channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMSCHANNEL_TWILIO_URL", stack.twilio_url)
    sender = stack.twin["phone_numbers"][0]
    stack.twin_call("DELETE", "/journal")
    result = run("test", name_of(channel), "--send", "--from", sender, stdin=stack.twin["auth_token"])
    assert result.exit_code == 1
    receiver = channel["spec"]["phoneNumber"]
    assert f"One SMS from {sender} to {receiver}. Twilio lists 0.0515 to 0.0620 USD for an SMS to AU" in result.stderr
    assert "Send it? This is asked at a terminal: add --yes" in result.stderr
    calls = {(each["method"], each["kind"]) for each in stack.twin_call("GET", "/journal")["entries"]}
    assert {("GET", "lookup"), ("GET", "prices")} <= calls
    assert ("POST", "messages") not in calls


# report


def test_bundle_has_no_canary(stack: Stack, channel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(stack.kubeconfig))
    token, number = stack.twin["auth_token"], channel["spec"]["phoneNumber"]
    patch(stack, name_of(channel), {"metadata": {"annotations": {"note": f"{token} {number}"}, "labels": {"t": token}}})
    apply_secret(stack, "canary", {"auth_token": token})
    target = tmp_path / "report.tar.gz"
    result = run("report", "-o", str(target))
    assert result.exit_code == 0, result.output
    with tarfile.open(fileobj=io.BytesIO(target.read_bytes())) as archive:
        files = {each.name: archive.extractfile(each) for each in archive.getmembers()}
        contents = {name.removeprefix("sms-report/"): file.read().decode() for name, file in files.items() if file}
    everything = "\n".join(contents.values())
    sealed = channel["spec"]["credentials"]["sealed"]
    for secret in (token, number, number[1:], sealed, stack.twin["account_sid"], stack.api_key, stack.cluster.token):
        assert secret not in everything
    found = {each["name"]: each for each in json.loads(contents["channels.json"])}[name_of(channel)]
    assert (found["ready"], found["webhook"]) == ("True", "https://sms.example.com/...")
    held = {each["channel"]: each for each in json.loads(contents["records.json"])}
    assert held[f"{CHANNELS}/{name_of(channel)}"]["number"] == found["number"]
    assert {each["check"] for each in json.loads(contents["doctor.json"])} >= {"CRD", "Leader", "Keyring"}
    assert "channels.json" in result.stdout
    assert contents["not-read.txt"] == "", "an administrator may read everything"
    assert OPERATOR not in contents["channels.json"]
    assert "cannot be written: File exists" in run("report", "-o", str(target)).stderr
