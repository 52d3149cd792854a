"""The command-line program `kubectl sms`. kubectl runs it as the plugin `kubectl-sms`; that name works alone too."""

from __future__ import annotations

import io
import sys

import click

from smschannel.cli.adopt import adopt
from smschannel.cli.completion import VARIABLE, completion, completions
from smschannel.cli.detach import detach
from smschannel.cli.doctor import doctor
from smschannel.cli.export import export
from smschannel.cli.key import key
from smschannel.cli.keys import keys
from smschannel.cli.plan import plan
from smschannel.cli.report import report
from smschannel.cli.reseal import reseal, validate
from smschannel.cli.seal import public_key, seal
from smschannel.cli.status import status
from smschannel.cli.test import test
from smschannel.cli.wait import check, wait


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sms-channel-operator", message="%(version)s")
def cli() -> None:
    """Manage the SMS channels of HydraCore instances on Kubernetes."""


for command in (
    status,
    wait,
    check,
    test,
    doctor,
    report,
    seal,
    public_key,
    plan,
    export,
    adopt,
    detach,
    key,
    keys,
    validate,
    reseal,
    completion,
):
    cli.add_command(command)


def main() -> None:
    """Run the program; the entry point of `kubectl-sms`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no box characters shows others
    cli(prog_name="kubectl sms", complete_var=VARIABLE)


def complete() -> None:
    """Print completions for kubectl; the entry point of `kubectl_complete-sms`."""
    click.echo("\n".join(completions(cli, sys.argv[1:])))


if __name__ == "__main__":
    main()
