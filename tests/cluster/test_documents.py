"""What the documents tell people to do on a cluster is done here, as printed and in the order of the page."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.local.stack import CHANNELS, OPERATOR, Stack, call
from tests.cluster.test_shim import Rest, wait_until
from tests.documents import INSTANCE, ROOT, blocks, commands

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")


def documented(page: str, *beginnings: str) -> list[str]:
    """The commands of a page that begin like this; all that begin like the last one."""
    found = [each.text for each in commands() if each.page == page and each.text.startswith(beginnings)]
    assert len(found) >= len(beginnings)
    return found


def shell(command: str, *, environment: Mapping[str, str], cwd: Path) -> str:
    """Standard output of a command that succeeds; `kubectl sms` is the one of this repository."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        env={**os.environ, "PATH": path, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def curl(command: str, environment: Mapping[str, str], cwd: Path) -> tuple[int, Any]:
    """What curl does for the few options that the documents use; curl itself need not be installed."""
    words = shlex.split(re.sub(r"\$(\w+)", lambda name: environment[name[1]], command))
    assert words.pop(0) == "curl"
    method, url, body = "GET", "", None
    headers: dict[str, str] = {}
    while words:
        match words.pop(0):
            case "-X":
                method = words.pop(0)
            case "-H":
                given = words.pop(0)
                lines = (cwd / given[1:]).read_text().splitlines() if given.startswith("@") else [given]
                headers |= {name: value for name, _, value in (line.partition(": ") for line in lines)}
            case "--data":
                body = json.loads((cwd / words.pop(0).removeprefix("@")).read_text())
            case word:
                url = word
    return call(method, url, body, headers)


def test_the_curl_commands_work(stack: Stack, number: str, tmp_path: Path) -> None:
    page = "docs/rest-api.md"
    [write_key] = documented(page, "(umask")
    get, post, delete = documented(page, "curl")
    setup, example = (json.loads(each) for each in blocks("json", page))
    account = {"account_sid": stack.twin["account_sid"], "auth_token": stack.twin["auth_token"], "phone_number": number}
    assert account.keys() == setup.keys()
    (tmp_path / "setup.json").write_text(json.dumps(account))
    environment = stack.environment()
    shell(write_key, environment=environment, cwd=tmp_path)
    assert (tmp_path / "api-key.txt").stat().st_mode & 0o077 == 0, "it holds a key"

    assert curl(get, environment, tmp_path)[1]["status"] == "not_configured"
    status, answer = curl(post, environment, tmp_path)
    assert (status, answer["status"], answer["phone_number"]) == (201, "pending", number)
    stack.wait_ready(INSTANCE)
    status, answer = curl(get, environment, tmp_path)
    assert (status, answer["status"], answer["enabled"]) == (200, "active", True)
    assert answer.keys() == example.keys()
    assert curl(delete, environment, tmp_path)[0] == 204
    stack.wait_gone(INSTANCE)


def test_the_commands_for_a_local_cluster_work(stack: Stack, tmp_path: Path) -> None:
    """Those between `make up` and `make down`."""
    (tmp_path / ".local").mkdir()
    stack.write_environment(tmp_path / ".local/env")
    page = "docs/development.md"
    [source] = documented(page, "set -a; . .local/env")
    [write_key] = documented(page, "(umask")
    [get] = documented(page, "curl")
    output = shell(f"{source}; {write_key}; env -0", environment={}, cwd=tmp_path)
    sourced = dict(each.split("=", 1) for each in output.split("\0") if each)
    expected = stack.environment()
    assert {name: sourced[name] for name in expected} == expected
    assert len(expected["TWILIO_PHONE_NUMBERS"].split()) >= 5
    assert [name for name, value in expected.items() if name.endswith("URL") and value.endswith("/")] == []
    assert (tmp_path / ".local/env").stat().st_mode & 0o077 == 0, "it holds credentials"
    assert curl(get, sourced, tmp_path)[0] == 200


def test_the_example_is_a_valid_channel_and_shows_the_defaults(stack: Stack) -> None:
    [example] = [yaml.safe_load(block) for block in blocks("yaml", "README.md")]
    made = stack.channels.create(body=example, namespace=CHANNELS, dry_run="All").to_dict()
    assert made["spec"] == example["spec"]


@needs_kubectl
def test_the_manifests_can_be_applied(stack: Stack) -> None:
    for command in documented("README.md", "kubectl apply -k deploy", "kubectl apply -f deploy"):
        shell(f"{command} --dry-run=server", environment={"KUBECONFIG": str(stack.kubeconfig)}, cwd=ROOT)


@needs_kubectl
def test_a_channel_with_a_secret_is_made_and_looked_after(stack: Stack, number: str, tmp_path: Path) -> None:
    """The example of the README and its Secret, then all commands for every day."""

    def run(command: str) -> str:
        return shell(command, environment={"KUBECONFIG": str(stack.kubeconfig)}, cwd=tmp_path)

    (tmp_path / "token.txt").write_text(stack.twin["auth_token"] + "\n")
    for command in documented("README.md", "kubectl -n sms-channels create secret", "kubectl -n sms-channels label"):
        run(command)
    [example] = [yaml.safe_load(block) for block in blocks("yaml", "README.md")]
    example["spec"] |= {"accountSid": stack.twin["account_sid"], "phoneNumber": number}
    stack.apply(example)
    page = "docs/operations.md"
    get, wait, annotate = (
        documented(page, f"kubectl {each}")[0]
        for each in ("get smsch", "-n sms-channels wait", "-n sms-channels annotate")
    )
    run(wait)
    assert re.search(rf"{INSTANCE} +{re.escape(number)} +True +Configured", run(get))
    for status in documented(page, "kubectl sms status"):
        assert INSTANCE in run(status)
    run(annotate)
    [written_off] = documented(page, "kubectl -n sms-operator get secrets")
    assert run(written_off) == ""
    stack.delete(INSTANCE)
    stack.wait_gone(INSTANCE)
    run("kubectl -n sms-channels delete secret twilio")


@needs_kubectl
def test_a_key_is_made_listed_and_revoked(stack: Stack, tmp_path: Path) -> None:
    def run(command: str) -> str:
        return shell(command, environment={"KUBECONFIG": str(stack.kubeconfig)}, cwd=tmp_path)

    rest = Rest(stack)
    create, list_keys, revoke = documented("docs/rest-api.md", "kubectl sms key")
    key = run(create)
    key_id = key.split("_")[1]
    wait_until(lambda: rest("GET", INSTANCE, X_Api_Key=key).status == 200)
    assert re.search(rf"^{key_id} +live .*{INSTANCE}$", run(list_keys), re.MULTILINE)
    assert key.split("_", 2)[2] not in run(f"kubectl -n {OPERATOR} get secret smschannel-api-keys -o yaml")
    run(revoke.replace("ID", key_id))
    wait_until(lambda: rest("GET", INSTANCE, X_Api_Key=key).status == 401, seconds=3)


@needs_kubectl
def test_rbac_decides_for_bearers(stack: Stack, number: str, tmp_path: Path) -> None:
    def run(command: str) -> str:
        return shell(command, environment={"KUBECONFIG": str(stack.kubeconfig)}, cwd=tmp_path)

    rest = Rest(stack)
    *commands, token = documented("docs/rest-api.md", "kubectl -n sms-channels create")
    for command in commands:
        run(command)
    headers = {"X_Api_Key": "", "Authorization": f"Bearer {run(token)}"}
    wait_until(lambda: rest("GET", INSTANCE, **headers).status == 200)
    assert rest("POST", INSTANCE, rest.setup(number), Prefer="wait=30", **headers).body["status"] == "active"
    assert rest("DELETE", INSTANCE, Prefer="wait=30", **headers).status == 204


@needs_kubectl
def test_first_channel_with_kubectl(stack: Stack, number: str, tmp_path: Path) -> None:
    """The commands of the page in their order; the token comes from standard input in place of the prompt."""
    page = "docs/first-channel.md"
    real = {"AC...": stack.twin["account_sid"], "+61400111222": number}
    environment = {"KUBECONFIG": str(stack.kubeconfig)}
    (tmp_path / "token").write_text(stack.twin["auth_token"])

    def run(command: str) -> str:
        for printed, value in real.items():
            command = command.replace(printed, value)
        return shell(f"{command} < token", environment=environment, cwd=tmp_path)

    seal, apply, wait, get, delete = (
        documented(page, f"kubectl {each}")[0]
        for each in ("sms seal", "apply", "-n sms-channels wait", "-n sms-channels get", "delete")
    )
    for command in (seal, apply, wait):
        run(command)
    assert stack.twin["auth_token"] not in (tmp_path / "channel.yaml").read_text()
    header, *rows = run(get).splitlines()
    assert re.fullmatch(r"NAME +PHONE NUMBER +READY +STATUS +AGE", header)
    assert any(re.match(rf"{INSTANCE} +{re.escape(number)} +True +Configured", row) for row in rows)
    run(delete)
    stack.wait_gone(INSTANCE)


@needs_kubectl
def test_first_channel_by_rest(stack: Stack, number: str, tmp_path: Path) -> None:
    page = "docs/first-channel.md"
    environment = stack.environment()
    [make_key] = documented(page, "(umask")
    post, delete = documented(page, "curl")
    shell(make_key, environment=environment, cwd=tmp_path)
    assert (tmp_path / "api-key.txt").stat().st_mode & 0o077 == 0, "it holds a key"
    account = {"account_sid": stack.twin["account_sid"], "auth_token": stack.twin["auth_token"], "phone_number": number}
    (tmp_path / "setup.json").write_text(json.dumps(account))
    wait_until(lambda: curl(delete, environment, tmp_path)[0] == 204)  # until the shim knows the key
    status, answer = curl(post, environment, tmp_path)
    assert (status, answer["status"], answer["phone_number"]) == (201, "active", number)
    assert curl(delete, environment, tmp_path)[0] == 204
    stack.wait_gone(INSTANCE)
