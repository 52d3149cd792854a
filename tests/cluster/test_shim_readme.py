"""What the README tells people to do about keys and RBAC is done here, with the kubectl that is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.stack import OPERATOR, Stack
from tests.cluster.test_readme import INSTANCE, blocks
from tests.cluster.test_shim import Rest, wait_until

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")


def block(first_words: str) -> list[str]:
    (found,) = [each for each in blocks("sh") if each.startswith(first_words)]
    return [line.split("    #")[0] for line in found.splitlines()]


def shell(stack: Stack, command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "KUBECONFIG": str(stack.kubeconfig)}
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_key_is_made_listed_and_revoked(stack: Stack) -> None:
    rest = Rest(stack)
    create, list_keys, revoke = block("kubectl sms key create")
    key = shell(stack, create)
    key_id = key.split("_")[1]
    wait_until(lambda: rest("GET", INSTANCE, X_Api_Key=key).status == 200)
    assert re.search(rf"^{key_id} +live .*{INSTANCE}$", shell(stack, list_keys), re.MULTILINE)
    assert key.split("_", 2)[2] not in shell(stack, f"kubectl -n {OPERATOR} get secret smschannel-api-keys -o yaml")
    shell(stack, revoke.replace("ID", key_id))
    wait_until(lambda: rest("GET", INSTANCE, X_Api_Key=key).status == 401, seconds=3)


def test_rbac_decides_for_bearers(stack: Stack, number: str) -> None:
    rest = Rest(stack)
    *commands, token = block("kubectl -n sms-channels create serviceaccount crm")
    for command in commands:
        shell(stack, command)
    headers = {"X_Api_Key": "", "Authorization": f"Bearer {shell(stack, token)}"}
    wait_until(lambda: rest("GET", INSTANCE, **headers).status == 200)
    assert rest("POST", INSTANCE, rest.setup(number), Prefer="wait=30", **headers).body["status"] == "active"
    assert rest("DELETE", INSTANCE, Prefer="wait=30", **headers).status == 204
