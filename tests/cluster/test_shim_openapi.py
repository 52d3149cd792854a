"""The running server conforms to `/openapi.json`, a client generated from it works, and `/docs` shows it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import CHANNELS, Stack
from tests.contract.test_rest import NOT_CONFIGURED

PROGRAMS = Path(sys.executable).parent
CALL = "/v1/instances/{instance_id}/channels/sms"


def fetch(stack: Stack, path: str) -> tuple[Any, str]:
    with urllib.request.urlopen(f"{stack.api_url}{path}", timeout=10) as response:  # noqa: S310
        return response.headers, response.read().decode()


def answered(stack: Stack) -> set[tuple[str, int]]:
    """Return method and status of every answer so far at the path of the calls."""
    sample = re.compile(rf'smsshim_requests_total{{method="(\w+)",route="{re.escape(CALL)}",status="(\d+)"}}')
    return {(method, int(status)) for method, status in sample.findall(fetch(stack, "/metrics")[1])}


@pytest.fixture
def generated_channels_deleted(stack: Stack) -> Iterator[None]:
    """Delete the channels with generated accounts that a test created."""
    yield
    for channel in stack.channels.get(namespace=CHANNELS).items:
        if channel.spec.accountSid != stack.twin["account_sid"]:
            stack.delete(channel.metadata.name)


@pytest.mark.usefixtures("generated_channels_deleted")
def test_server_conforms_to_its_openapi_document(stack: Stack, tmp_path: Path) -> None:
    """schemathesis sends valid and invalid requests, and compares each answer with the document."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(
        "[generation]\nwith-security-parameters = false\n"
    )  # the key below is used; without it every answer would be 401
    command = [str(PROGRAMS / "schemathesis"), "--config-file", str(config), "run", f"{stack.api_url}/openapi.json"]
    options = ["-H", f"X-Api-Key: {stack.api_key}", "--seed", "1", "--max-examples", "25", "--request-timeout", "20"]
    phases = ["--phases", "examples,coverage,fuzzing", "--checks", "all", "--continue-on-failure"]
    result = subprocess.run(
        [*command, *options, *phases], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout
    assert "No issues found" in result.stdout
    everything = {("GET", 200), ("POST", 200), ("POST", 201), ("DELETE", 204), ("POST", 415)}
    everything |= {(method, status) for method in ("GET", "POST", "DELETE") for status in (401, 422)}
    assert answered(stack) >= everything, "all of these were tried"


def test_generated_client_makes_the_three_calls(
    stack: Stack, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openapi.json").write_text(fetch(stack, "/openapi.json")[1])
    (tmp_path / "config.yaml").write_text("post_hooks: []\n")
    generate = [
        str(PROGRAMS / "openapi-python-client"),
        "generate",
        "--path",
        "openapi.json",
        "--config",
        "config.yaml",
    ]
    generation = subprocess.run(
        [*generate, "--fail-on-warning", "--meta", "none", "--output-path", "made_client"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert generation.returncode == 0, generation.stdout + generation.stderr
    monkeypatch.syspath_prepend(tmp_path)
    client = importlib.import_module("made_client")
    models = importlib.import_module("made_client.models")
    calls = {
        name: importlib.import_module(f"made_client.api.sms_channel.{name}")
        for name in ("sms_status", "setup_sms", "teardown_sms")
    }
    instance = uuid.uuid4()
    with client.AuthenticatedClient(stack.api_url, stack.api_key, prefix="", auth_header_name="X-Api-Key") as api:
        assert calls["sms_status"].sync(instance, client=api).to_dict() == NOT_CONFIGURED
        setup = models.Setup(stack.twin["account_sid"], stack.twin["auth_token"], number)
        created = calls["setup_sms"].sync_detailed(instance, client=api, body=setup, prefer="wait=30")
        assert (created.status_code, created.parsed.status) == (201, models.ChannelStatusStatus.ACTIVE)
        setup_without_plus = models.Setup(stack.twin["account_sid"], stack.twin["auth_token"], "400")
        answer = calls["setup_sms"].sync(instance, client=api, body=setup_without_plus)
        assert isinstance(answer, models.HTTPValidationError)
        assert answer.detail[0].loc == ["body", "phone_number"]
        removed = calls["teardown_sms"].sync_detailed(instance, client=api, prefer="wait=30")
        assert removed.status_code == 204


def test_docs_page_loads_nothing_from_other_hosts(stack: Stack) -> None:
    """It has no script, and every file that it names is served by the shim."""
    headers, page = fetch(stack, "/docs")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert "://" not in policy
    assert "<script" not in page
    assert "://" not in page
    named = re.findall(r'(?:src|href)="([^":]+)"', page)
    assert sorted(named) == ["docs/style.css", "openapi.json"]
    types = {"css": "text/css", "json": "application/json"}
    for file in named:
        headers, content = fetch(stack, f"/{file}")
        assert headers["Content-Type"].split(";")[0] == types[file.rsplit(".", 1)[1]]
        assert content
    assert json.loads(fetch(stack, "/openapi.json")[1])["openapi"].startswith("3.1")
