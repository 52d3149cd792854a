"""`kubectl sms key` on a real API server, and its effect on the running shim."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, OPERATOR, Stack, free_port
from smschannel.api.kube_client import MERGE_PATCH, KubeClient, Object
from smschannel.api.names import API_KEYS_SECRET
from smschannel.cli.main import cli
from tests.cluster.test_shim import wait_until

SECRET = f"/api/v1/namespaces/{OPERATOR}/secrets/{API_KEYS_SECRET}"


def run(stack: Stack, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["key", *arguments, "--kubeconfig", str(stack.kubeconfig)])


def key(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


def error_of(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def rows(stack: Stack) -> dict[str, Any]:
    result = run(stack, "list", "-o", "json")
    assert result.exit_code == 0, result.stderr
    return {row["id"]: row for row in json.loads(result.stdout)}


def get(stack: Stack, api_key: str, instance: str) -> int:
    url = f"{stack.api_url}/v1/instances/{instance}/channels/sms"
    request = urllib.request.Request(url, headers={"X-Api-Key": api_key})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


async def as_admin(stack: Stack, method: str, body: Object | None = None, path: str = SECRET) -> Object:
    async with await KubeClient.connect(str(stack.kubeconfig)) as api:
        return await api.request(method, path, body, content_type=MERGE_PATCH)


def test_key_lifecycle(stack: Stack) -> None:
    """A key is created, used, replaced while both work, and revoked within seconds."""
    instance = str(uuid.uuid4())
    old = key(run(stack, "create", "--instances", instance, "--verbs", "get", "--id", "rotated-1"))
    wait_until(lambda: get(stack, old, instance) == 200, seconds=3)
    assert get(stack, old, str(uuid.uuid4())) == 403
    new = key(run(stack, "create", "--instances", instance, "--verbs", "get", "--id", "rotated-2", "--expires", "1d"))
    wait_until(lambda: get(stack, new, instance) == 200, seconds=3)
    assert get(stack, old, instance) == 200, "both keys work"
    listed = run(stack, "list").stdout.splitlines()
    assert listed[0].split() == ["ID", "STATE", "VERBS", "EXPIRES", "INSTANCES"]
    assert f"rotated-1  live   get              never                      {instance}".split() in [
        line.split() for line in listed
    ]
    assert run(stack, "revoke", "rotated-1").exit_code == 0
    wait_until(lambda: get(stack, old, instance) == 401, seconds=3)
    assert get(stack, new, instance) == 200, "the other key still works"
    assert set(rows(stack)) >= {"rotated-2"}
    assert "rotated-1" not in rows(stack)
    run(stack, "revoke", "rotated-2")


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
def test_kubectl_runs_the_plugin(stack: Stack) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "KUBECONFIG": str(stack.kubeconfig)}
    command = ["kubectl", "sms", "key", "create", "--instances", "*", "--id", "by-kubectl"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("smsch_by-kubectl_")
    revoke = ["kubectl", "sms", "key", "revoke", "by-kubectl"]
    assert subprocess.run(revoke, env=environment, capture_output=True, text=True, check=True).stdout == ""


def test_first_key_creates_the_secret(installed: Stack) -> None:
    asyncio.run(as_admin(installed, "DELETE"))
    assert rows(installed) == {}
    printed = key(run(installed, "create", "--instances", "*", "--id", "first"))
    assert list(rows(installed)) == ["first"]
    assert printed.split("_", 2)[2] not in str(asyncio.run(as_admin(installed, "GET")))


def test_existing_key_is_never_overwritten(installed: Stack) -> None:
    key(run(installed, "create", "--instances", "*", "--id", "taken"))
    before = asyncio.run(as_admin(installed, "GET"))["data"]["taken"]
    message = error_of(run(installed, "create", "--instances", "*", "--id", "taken"))
    assert "A key with the ID taken already exists: choose another --id, or revoke it first" in message
    assert asyncio.run(as_admin(installed, "GET"))["data"]["taken"] == before


def test_revoke_is_all_or_nothing(installed: Stack) -> None:
    key(run(installed, "create", "--instances", "*", "--id", "kept"))
    message = error_of(run(installed, "revoke", "kept", "unknown"))
    assert "No key has the ID unknown. The IDs are:" in message
    assert "kept" in rows(installed)


def test_list_shows_malformed_and_expired_keys(installed: Stack) -> None:
    key(run(installed, "create", "--instances", "*", "--id", "over"))
    entry = {"sha256": "0" * 64, "instances": [], "verbs": [], "expires": "2020-01-01T00:00:00Z"}
    content = {"stringData": {"over": json.dumps(entry), "broken": '{"sha256": "smsch_x_5ecret"}'}}
    asyncio.run(as_admin(installed, "PATCH", content))
    found = rows(installed)
    assert found["over"]["state"] == "expired"
    assert found["broken"]["state"].startswith("unusable: sha256: String should match pattern")
    assert "5ecret" not in run(installed, "list").output, (
        "an administrator may have stored the key in place of its hash"
    )
    assert run(installed, "revoke", "broken", "over").exit_code == 0


def test_missing_right_is_named(installed: Stack) -> None:
    shim = str(installed.home / "sms-api-shim.kubeconfig")
    message = error_of(CliRunner().invoke(cli, ["key", "create", "--instances", "*", "--kubeconfig", shim]))
    assert f"needs the rights to get and patch the Secret {OPERATOR}/{API_KEYS_SECRET}" in message


def test_missing_namespace_is_reported(installed: Stack) -> None:
    message = error_of(run(installed, "create", "--instances", "*", "--operator-namespace", "nowhere"))
    assert (
        "has no namespace nowhere. If the operator runs in another namespace, name it with --operator-namespace."
        in message
    )


def test_unreachable_cluster_is_reported(installed: Stack, tmp_path: Path) -> None:
    url = f"https://127.0.0.1:{free_port()}"
    away = write_kubeconfig(
        tmp_path / "away", url=url, ca_data=installed.cluster.ca_data, token="x", namespace=CHANNELS
    )
    message = error_of(CliRunner().invoke(cli, ["key", "list", "--kubeconfig", str(away)]))
    assert f"The cluster at {url} cannot be reached" in message
