"""The README is the front door: what it tells people to do is done here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from deploy.local.stack import CHANNELS, ROOT, Stack, call

README = (ROOT / "README.md").read_text()
INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def curl(command: str, environment: dict[str, str]) -> tuple[int, Any]:
    """Does what the documented curl command says; curl itself need not be installed."""
    words = shlex.split(re.sub(r"\$(\w+)", lambda name: environment[name[1]], command.replace("\\\n", " ")))
    assert words.pop(0) == "curl"
    method, url, body, headers = "GET", "", None, {}
    while words:
        match words.pop(0):
            case "-X":
                method = words.pop(0)
            case "-H":
                name, value = words.pop(0).split(": ", 1)
                headers[name] = value
            case "-d":
                body = json.loads(words.pop(0))
            case word:
                url = word
    return call(method, url, body, headers)


def test_the_curl_commands_work_as_printed(stack: Stack, number: str) -> None:
    commands = [block for shell in blocks("sh") for block in shell.split("\n\n") if block.startswith("curl")]
    get, post, delete = commands
    real = {'"AC..."': f'"{stack.twin["account_sid"]}"', '"..."': f'"{stack.twin["auth_token"]}"'}
    for placeholder, value in {**real, "+61400111222": number}.items():
        post = post.replace(placeholder, value)
    environment = stack.environment()
    assert curl(get, environment)[1]["status"] == "not_configured"
    status, answer = curl(post, environment)
    assert (status, answer["status"], answer["phone_number"]) == (201, "pending", number)
    stack.wait_ready(INSTANCE)
    status, answer = curl(get, environment)
    assert (status, answer["status"], answer["enabled"]) == (200, "active", True)
    example = json.loads(re.search(r'`(\{"enabled": true.*?\})`', README)[1])  # type: ignore[index]
    assert answer.keys() == example.keys()
    assert curl(delete, environment)[0] == 204
    stack.wait_gone(INSTANCE)


def test_the_example_is_a_valid_channel_and_shows_the_defaults(stack: Stack) -> None:
    [example] = [yaml.safe_load(block) for block in blocks("yaml")]
    made = stack.channels.create(body=example, namespace=CHANNELS, dry_run="All").to_dict()
    assert made["spec"] == example["spec"]


def test_the_commands_to_install_name_files_that_are_there() -> None:
    named = re.findall(r"-f (\S+)", "\n".join(blocks("sh")))
    files = [name for name in named if not name.endswith("channel.yaml")]
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", README)) - targets <= {"two"}  # "make two namespaces" is prose


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not urllib.parse.urlsplit(link).scheme and not (ROOT / link).exists()] == []


def test_the_environment_file_can_be_sourced(stack: Stack, tmp_path: Path) -> None:
    stack.write_environment(tmp_path / "env")
    script = f"set -a; . {tmp_path / 'env'}; set +a; env -0"
    output = subprocess.run(
        ["/bin/sh", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True
    ).stdout
    sourced = dict(each.split("=", 1) for each in output.decode().split("\0") if each)
    expected = stack.environment()
    assert {name: sourced[name] for name in expected} == expected
    assert len(expected["TWILIO_PHONE_NUMBERS"].split()) >= 5
    assert [name for name, value in expected.items() if name.endswith("URL") and value.endswith("/")] == []
    assert (tmp_path / "env").stat().st_mode & 0o077 == 0, "it holds credentials"
