"""Test the operator as a process: that it can be stopped at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


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
