"""The command-line program `kubectl sms`. kubectl runs it as the plugin `kubectl-sms`; that name works alone too."""

from __future__ import annotations

import click

from smschannel.cli.adopt import adopt
from smschannel.cli.detach import detach
from smschannel.cli.key import key
from smschannel.cli.keys import keys
from smschannel.cli.plan import plan
from smschannel.cli.reseal import reseal, validate
from smschannel.cli.seal import public_key, seal


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sms-channel-operator", message="%(version)s")
def cli() -> None:
    """Manage the SMS channels of HydraCore instances on Kubernetes."""


for command in (seal, public_key, plan, adopt, detach, key):
    cli.add_command(command)
for command in (keys, validate, reseal):
    cli.add_command(command)


def main() -> None:
    """Run the program; the entry point of `kubectl-sms`."""
    cli(prog_name="kubectl sms")


if __name__ == "__main__":
    main()
