"""Run the twin as a process: `python -m tests.twin`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path

import click
import uvloop

from tests.twin.app import twin_server
from tests.twin.control import credentials_of
from tests.twin.state import Account, Twin

log = logging.getLogger("tests.twin")


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; 0 takes a free one.")
@click.option("--accounts", type=click.IntRange(0), default=1, help="Accounts to start with.")
@click.option("--numbers", type=click.IntRange(0), default=40, help="Numbers per account, from +61400111222 up.")
@click.option(
    "--state",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write SIDs, tokens and numbers to this file (JSON, mode 0600) before printing that line.",
)
@click.option("--seed", type=int, help="Make SIDs and tokens repeatable. They are random otherwise.")
@click.option(
    "--concurrency",
    type=click.IntRange(0),
    default=40,
    help="Requests in flight per account before 429; 0 for no limit.",
)
@click.option("--latency", type=click.FloatRange(0), default=0.0, help="Seconds that every answer takes.")
@click.option("-v", "--verbose", is_flag=True, help="Log every call.")
def main(
    port: int,
    accounts: int,
    numbers: int,
    state: Path | None,
    seed: int | None,
    concurrency: int,
    latency: float,
    verbose: bool,
) -> None:
    """Run a stateful twin of Twilio's phone number and messaging APIs on loopback.

    Once it listens it prints one line of JSON on stdout: {"url", "account_sid", "state"}. Tokens are never
    printed: they are in the --state file, and in the control API's answer to the call that makes an account.
    Logs go to stderr. SIGTERM or SIGINT ends it with status 0.

    \b
    Try it:
      python -m tests.twin --state twin.json &
      curl -u SID:TOKEN URL/2010-04-01/Accounts/SID/IncomingPhoneNumbers.json
      curl URL/_twin/inbound -d '{"to": "+61400111222", "body": "hello"}'
      curl URL/_twin/faults -d '{"match": {"method": "POST", "count": 2}, "action": {"kind": "reset"}}'

    The control API is described in tests/twin/control.py.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    twin = Twin(seed=seed, concurrency=concurrency or None, latency=latency)
    made = twin.seed(accounts, numbers)
    uvloop.run(_serve(twin, made, port, state))


async def _serve(twin: Twin, accounts: list[Account], port: int, state: Path | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with twin_server(twin, port) as url:
        if state is not None:
            _write_state(state, url, accounts)
        first = accounts[0].sid if accounts else None
        click.echo(json.dumps({"url": url, "account_sid": first, "state": state and str(state)}))
        log.info("listening: %r", twin)
        await stop.wait()
    log.info("stopped")


def _write_state(path: Path, url: str, accounts: list[Account]) -> None:
    """Write `{"url", "account_sid", "auth_token", "phone_numbers", "accounts": [...]}`; the first account is on top."""
    every = [credentials_of(account) for account in accounts]
    document = {"url": url, **(every[0] if every else {}), "accounts": every}
    # A new file renamed into place: never readable by others, never half written.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(document, file)
    draft.replace(path)


if __name__ == "__main__":
    main()
