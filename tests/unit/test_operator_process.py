"""Test the operator as a process: that it can be stopped at any moment, and what it says about the fence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import yaml

from smschannel.__main__ import _check_fence
from smschannel.api.errors import ChannelError, Fenced, KubernetesRefused
from smschannel.api.kube_client import KubeClient
from smschannel.api.logs import log_to_stderr
from smschannel.kube_store import KubeStore
from smschannel.leader import Identity
from tests.unit.memory import OPERATOR_NAMESPACE, MemoryApi, OnCall, at_once, raising


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_operator_that_waits_for_the_api_server_can_be_stopped(tmp_path: Path, how: signal.Signals) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    nowhere = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "none",
        "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}],
        "clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "none", "user": {"token": "t"}}],
    }
    kubeconfig.write_text(yaml.safe_dump(nowhere))
    environment = {
        **os.environ,
        "KUBECONFIG": str(kubeconfig),
        "SMSCHANNEL_WEBHOOK_URL_TEMPLATE": "https://sms.example.com/{instance_id}",
        "SMSCHANNEL_HTTP_PORT": "0",
    }
    command = [sys.executable, "-m", "smschannel"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "cannot start yet" in line:
                break
        process.send_signal(how)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert '"stopped"' in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize("program", ["smschannel", "api_shim"])
def test_program_can_be_stopped_while_it_imports_its_modules(tmp_path: Path, program: str) -> None:
    """The first process of a container ignores SIGTERM, as this one does, until it handles it."""
    (tmp_path / "click.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nraise SystemExit('it was ignored')\n"
    )
    command = f"trap '' TERM; exec {sys.executable} -m {program}"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("answer", "warns", "reason"),
    [
        (at_once, True, "the API server admits what a fence never admits"),
        (raising(Fenced("this policy is installed"), method="POST"), False, "the fence refuses it"),
        (raising(KubernetesRefused(403, "exceeded quota"), method="POST"), False, "that says nothing about a fence"),
    ],
)
async def test_missing_fence_is_logged(
    capsys: pytest.CaptureFixture[str], answer: OnCall, warns: bool, reason: str
) -> None:
    log_to_stderr("INFO", "json")
    api = MemoryApi()
    api.on_call = answer
    await _check_fence(KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE), Identity("operator", is_pod=True))
    assert ("apply deploy/manifests/operator-fence.yaml" in capsys.readouterr().err) == warns, reason


async def test_operator_outside_of_a_pod_does_not_start_where_it_could_write_nothing() -> None:
    api = MemoryApi()
    kube, identity = KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE), Identity("host_1", is_pod=False)
    await _check_fence(kube, identity)
    api.on_call = raising(Fenced("this policy is installed"), method="POST")
    with pytest.raises(ChannelError, match="Run it in a pod"):
        await _check_fence(kube, identity)
