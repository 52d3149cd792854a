"""`kubectl sms completion`, and what kubectl gets when it completes `kubectl sms`."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

VARIABLE = "_KUBECTL_SMS_COMPLETE"
"""The environment variable by which the shell's script asks `kubectl-sms` for completions."""
_PROGRAM = "kubectl-sms"
_NO_FILES = ":4"  # cobra's directive: the shell adds no names of files


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes kubectl-sms.

    For kubectl sms nothing is needed but kubectl's own completion: it calls the program kubectl_complete-sms, which is
    installed beside kubectl-sms.

    \b
      kubectl sms completion bash > ~/.local/share/bash-completion/completions/kubectl-sms
      kubectl sms completion zsh > "${fpath[1]}/_kubectl-sms"
      kubectl sms completion fish > ~/.config/fish/completions/kubectl-sms.fish
    """
    found = get_completion_class(shell)
    assert found, "click knows each of them"
    click.echo(found(ctx.find_root().command, {}, _PROGRAM, VARIABLE).source())


def completions(cli: click.Command, arguments: list[str]) -> list[str]:
    """Return completions of the last argument as kubectl expects them: one a line, and what the shell may not add."""
    *before, last = arguments or [""]
    found = ShellComplete(cli, {}, _PROGRAM, VARIABLE).get_completions(before, last)
    return [*(f"{each.value}\t{each.help}" if each.help else each.value for each in found), _NO_FILES]
