"""Run the REST shim: `python -m api_shim`, configured by environment variables."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys

if __name__ == "__main__":  # the imports take seconds, and as the first process of a container it would ignore SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

import click
import structlog
import uvloop
from pydantic import ValidationError

from api_shim.app import serve
from api_shim.settings import Settings
from api_shim.tls import TlsError
from smschannel.api.environment import explain, settings_help, unknown_variables
from smschannel.api.errors import ChannelError
from smschannel.api.kube_client import KubeClient
from smschannel.api.logs import log_to_stderr

log = structlog.get_logger()


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the draining.

    If the API server is not available, the shim starts all the same, and is not ready until it is.
    """
    stop, stop_now = asyncio.Event(), asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, lambda: (stop_now if stop.is_set() else stop).set())
    async with await KubeClient.connect() as api, serve(settings, api) as service:
        gc.freeze()  # objects made so far live until the end: exempt them from garbage collection
        log.info("listening", host=settings.http_host, port=service.port, tls=settings.tls_cert_file is not None)
        await stop.wait()
        service.start_draining()
        log.info("draining", seconds=settings.drain_seconds)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop_now.wait(), settings.drain_seconds)


def _raise_open_files_limit() -> None:
    """Allow as many open files as the process may have, since each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@click.command(
    help=f"Serve the REST API of SMS channels. There are no arguments, only environment variables:\n\n"
    f"{settings_help(Settings)}"
)
def main() -> None:
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit(explain(error, Settings))
    _raise_open_files_limit()
    log_to_stderr(settings.log_level, settings.log_format)
    for unknown in unknown_variables(Settings, os.environ):
        log.warning("unknown environment variable", variable=unknown)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(settings))
    except (ChannelError, OSError, TlsError) as error:
        log.critical("cannot serve", error=str(error))
        sys.exit(1)
    log.info("stopped")


if __name__ == "__main__":
    main()
