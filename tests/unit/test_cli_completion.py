"""Completion: for shells by click, for kubectl by its own convention. And what every command says of itself."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from smschannel.cli.completion import completions
from smschannel.cli.main import cli
from tests.documents import INSTANCE

BIN = Path(sys.executable).parent


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(cli))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["doc"], "doctor"),
        (["status", "--na"], "--namespace"),
        (["status", "-o", "w"], "wide"),
        (["completion", "f"], "fish"),
        (["key", "rev"], "revoke"),
    ],
)
def test_commands_options_and_values_are_completed(arguments: list[str], expected: str) -> None:
    *found, directive = completions(cli, arguments)
    assert [each.split("\t")[0] for each in found] == [expected]
    assert directive == ":4", "kubectl's directive to add no names of files"


def test_nothing_typed_lists_all_commands() -> None:
    assert {each.split("\t")[0] for each in completions(cli, [])} == {*cli.commands, ":4"}


def test_kubectl_finds_the_program() -> None:
    """kubectl runs kubectl_complete-sms with what was typed after `kubectl sms`."""
    done = subprocess.run([BIN / "kubectl_complete-sms", "wai"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("wait\t")
    assert done.stdout.endswith("\n:4\n")


def test_script_for_bash_works_in_bash() -> None:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    script = (
        'eval "$(kubectl-sms completion bash)"; COMP_WORDS=(kubectl-sms sta); COMP_CWORD=1;'
        ' _kubectl_sms_completion kubectl-sms sta; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["/bin/bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "status\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert f"_KUBECTL_SMS_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_with_an_example(name: str) -> None:
    """One that can be copied: it names options and commands that exist (test_documents.py checks those in prose)."""
    shown = CliRunner().invoke(cli, [*name.split(), "--help"])
    assert shown.exit_code == 0
    assert f"kubectl sms {name}" in shown.stdout
    assert COMMANDS[name].help


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_can_be_parsed(name: str) -> None:
    for line in (COMMANDS[name].help or "").splitlines():
        words = shlex.split(line) if line.startswith("  kubectl sms") else []
        if words[:2] != ["kubectl", "sms"] or words[2 : 2 + len(name.split())] != name.split():
            continue
        rest = words[2 + len(name.split()) :]
        rest = rest[: next((i for i, word in enumerate(rest) if word in {">", "<", "\\", "|"}), len(rest))]
        real = {"497f6eca-...": INSTANCE, "AC...": f"AC{'0' * 32}"}
        if any("..." in each and each not in real for each in rest) or {"channel.yaml", "sealing.key"} & {*rest}:
            continue  # they need a file, or are abridged
        command = COMMANDS[name]
        with command.make_context(name, [real.get(each, each) for each in rest], parent=click.Context(cli)):
            pass
