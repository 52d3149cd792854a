"""`python -m deploy.local up|down|demo`: what `make up`, `make down` and `make demo` run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click
import psutil
from pydantic import TypeAdapter, ValidationError

from deploy.build import BuildError, Narrator
from deploy.local import demo
from deploy.local.cluster import ControlPlaneError
from deploy.local.stack import EXAMPLE_TEMPLATE, ROOT, Options, Stack, StackError, wipe
from smschannel.settings import Origin

HOME = ROOT / ".local"
_PIDS = HOME / "processes.json"


@click.group()
def main() -> None:
    """Run the whole product on this machine: API server, Twilio twin, operator and shim."""


def _origin(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuse a URL that cannot be used, so that it never means the real Twilio."""
    try:
        return TypeAdapter(Origin).validate_python(value) if value is not None else None
    except ValidationError as error:
        raise click.BadParameter(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


@main.command()
@click.option(
    "--twilio-url", callback=_origin, help="A Twilio-compatible server that is already running, instead of the twin."
)
@click.option("--twilio", type=click.Choice(["twin", "real"]), default="twin", help="The twin, or the real Twilio.")
@click.option("--webhook-url-template", default=EXAMPLE_TEMPLATE, help="With {instance_id} in it.")
@click.option("--etcd-data", "cluster_dir", type=click.Path(path_type=Path), help="Keep the cluster here between runs.")
def up(twilio_url: str | None, twilio: str, webhook_url_template: str, cluster_dir: Path | None) -> None:
    """Start everything in the background and print what runs where."""
    if alive := _running():
        if dead := json.loads(_PIDS.read_text()).keys() - alive:
            sys.exit(
                f"Partly running: {', '.join(sorted(dead))} stopped (logs: {HOME / 'logs'}). Run `make down; make up`"
            )
        click.echo(f"Already running ({', '.join(alive)}). Values: {HOME / 'env'}. Stop it with: make down")
        return
    wipe(HOME)
    options = Options(
        twilio_url="real" if twilio == "real" else twilio_url,
        webhook_url_template=webhook_url_template,
        cluster_dir=cluster_dir.absolute() if cluster_dir else None,
    )
    stack = Stack(HOME, options, Narrator(sys.stdout))
    try:
        stack.start()
        stack.write_environment(HOME / "env")
        processes = {name: [pid, psutil.Process(pid).create_time()] for name, pid in stack.pids().items()}
        _PIDS.write_text(json.dumps(processes))
    except BaseException:
        stack.stop()
        raise
    click.echo(f"\nUp. For a shell:  set -a; . {os.path.relpath(HOME / 'env')}; set +a\nStop it with:     make down")


@main.command()
def down() -> None:
    """Stop exactly what `up` started."""
    alive = _running()
    if not alive:
        click.echo("Nothing is running.")
        _PIDS.unlink(missing_ok=True)
        return
    for name in sorted(alive, key=["shim", "operator", "twin", "controlplane"].index):
        process = alive[name]
        process.terminate()
        try:
            process.wait(30)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(5)
        click.echo(f"stopped {name}")
    _PIDS.unlink()


@main.command("demo")
def run_demo() -> None:
    """Run the product's story from beginning to end, checking each step."""
    demo.tell(HOME / "demo", Narrator(sys.stdout))


def _running() -> dict[str, psutil.Process]:
    """Return the processes that `up` started and that still run; a reused process id does not count."""
    if not _PIDS.exists():
        return {}
    alive = {}
    for name, (pid, started) in json.loads(_PIDS.read_text()).items():
        try:
            process = psutil.Process(pid)
            if process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE:
                alive[name] = process
        except psutil.NoSuchProcess:
            continue
    return alive


if __name__ == "__main__":
    try:
        main()
    except (BuildError, ControlPlaneError, StackError, demo.StoryError) as error:
        sys.exit(f"\n{error}")
