"""`python -m deploy.kind up|down|docker`: what `make kind-up` and `make kind-down` run, and Docker in the engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from deploy.build import BuildError, Narrator
from deploy.kind import install
from deploy.kind.access import Access
from deploy.kind.engine import EngineError
from deploy.kind.environment import Environment
from deploy.local.stack import ROOT

HOME = ROOT / ".local/kind"
ENV = HOME / "env"
NEXT = """
Up. For a shell:
  set -a; . {env}; set +a
  kubectl get pods -A
  kubectl sms seal $(cat /proc/sys/kernel/random/uuid) -n {channels} --account-sid "$TWILIO_ACCOUNT_SID" \\
    --phone-number "$TWILIO_PHONE_NUMBER" < {token} | kubectl apply -f -
  kubectl get smschannels -n {channels} -w
Stop it with: make kind-down"""


@click.group()
def main() -> None:
    """Run the product in a kind cluster, with real pods and the Twilio twin."""


@main.command()
def up() -> None:
    """Make the cluster and print what to type next."""
    environment = Environment(HOME, Narrator(sys.stdout))
    with environment.locked():
        if environment.is_up():
            click.echo(f"Already up. For a shell: set -a; . {_shown(ENV)}; set +a")
            return
        environment.down()  # what is left of one that did not come up
        try:
            access = environment.up()
            token = _write_values(environment, access)
        except BaseException:  # Ctrl-C too
            click.echo("\nRemoving what was started.", err=True)
            environment.down()
            raise
        (HOME / "up").touch()
    click.echo(NEXT.format(env=_shown(ENV), channels=install.CHANNELS, token=_shown(token)))


@main.command()
def down() -> None:
    """Remove everything that `up` made."""
    environment = Environment(HOME, Narrator(sys.stdout))
    if not HOME.exists():
        click.echo("Nothing is running.")
        return
    with environment.locked():
        environment.down()
    click.echo("Removed.")


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def docker(arguments: tuple[str, ...]) -> None:
    """Run Docker's command line where the cluster's containers are."""
    if not (engine := Environment(HOME, Narrator(sys.stdout)).running_engine()):
        raise EngineError("Nothing is running: make kind-up")
    os.execvp((*engine.prefix, "docker")[0], [*engine.prefix, "docker", *arguments])  # noqa: S606  (this is the purpose)


def _write_values(environment: Environment, access: Access) -> Path:
    """Make an account at the twin and write what a shell needs of it; return the file with its token."""
    account = access.twin("POST", "/seed", {"accounts": 1, "numbers": 40})["accounts"][0]
    token = _private_file(environment.home / "token.txt", account["auth_token"])
    values = {
        "KUBECONFIG": str(environment.kubeconfig),
        "PATH": f"{environment.bin}:{Path(sys.executable).parent}:$PATH",
        "TWILIO_ACCOUNT_SID": account["account_sid"],
        "TWILIO_PHONE_NUMBER": account["phone_numbers"][0],
        "TWILIO_PHONE_NUMBERS": " ".join(account["phone_numbers"]),
    }
    lines = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    _private_file(ENV, "\n".join(lines) + "\n")
    return token


def _private_file(path: Path, content: str) -> Path:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(content)
    return path


def _shown(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    try:
        main()
    except (BuildError, EngineError) as error:
        sys.exit(f"\n{error}")
