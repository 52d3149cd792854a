"""`/openapi.json` against the running server: every answer is as it says, and a client made from it works."""

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
    """Method and status of every answer at the calls' path so far."""
    sample = re.compile(rf'smsshim_requests_total{{method="(\w+)",route="{re.escape(CALL)}",status="(\d+)"}}')
    return {(method, int(status)) for method, status in sample.findall(fetch(stack, "/metrics")[1])}


@pytest.fixture
def swept(stack: Stack) -> Iterator[None]:
    """Without the channels of invented accounts that a test has left."""
    yield
    for channel in stack.channels.get(namespace=CHANNELS).items:
        if channel.spec.accountSid != stack.twin["account_sid"]:
            stack.delete(channel.metadata.name)


@pytest.mark.usefixtures("swept")
def test_the_server_keeps_to_its_document(stack: Stack, tmp_path: Path) -> None:
    """schemathesis sends what the document allows and what it forbids, and compares each answer with it."""
    config = tmp_path / "schemathesis.toml"
    config.write_text("[generation]\nwith-security-parameters = false\n")  # the key is ours; without it all is 401
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
    assert answered(stack) >= everything, "and not: hardly anything was tried"


def test_a_client_made_from_the_document_makes_the_three_calls(
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
    made = subprocess.run(
        [*generate, "--fail-on-warning", "--meta", "none", "--output-path", "made_client"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
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
        wrong = models.Setup(stack.twin["account_sid"], stack.twin["auth_token"], "400")
        refused = calls["setup_sms"].sync(instance, client=api, body=wrong)
        assert isinstance(refused, models.Invalid)
        assert refused.detail[0].loc == ["body", "phone_number"]
        removed = calls["teardown_sms"].sync_detailed(instance, client=api, prefer="wait=30")
        assert removed.status_code == 204


def test_the_page_for_people_takes_nothing_from_elsewhere(stack: Stack) -> None:
    """Every file that it names is served here, and the browser is told to load no others."""
    headers, page = fetch(stack, "/docs")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "://" not in policy
    assert "://" not in page
    named = re.findall(r'(?:src|href)="([^":]+)"', page)
    assert named
    for file in named:
        headers, content = fetch(stack, f"/{file}")
        assert (
            headers["Content-Type"].split(";")[0]
            == {
                "js": "text/javascript",
                "css": "text/css",
                "json": "application/json",
            }[file.rsplit(".", 1)[1]]
        )
        assert content
    assert "SwaggerUIBundle(" in fetch(stack, "/docs/start.js")[1]
    assert json.loads(fetch(stack, "/openapi.json")[1])["openapi"].startswith("3.1")
