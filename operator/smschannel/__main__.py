"""`python -m smschannel`: the operator, configured by environment variables."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime

import click
import structlog
import uvloop
from kubernetes.aio.config import ConfigException
from pydantic import ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from smschannel.controller import Controller
from smschannel.errors import ChannelError, Gone, KubernetesUnavailable
from smschannel.health import log_to_stderr, serve
from smschannel.kube_api import KubeApi, KubernetesRefused
from smschannel.kube_port import KubePort
from smschannel.ledger import Claims
from smschannel.reconcile import Intervals, Key, Reconciler
from smschannel.settings import Settings, explain, settings_help
from smschannel.twilio_port import TwilioPort
from smschannel.watch import watch

log = structlog.get_logger()


async def run(settings: Settings) -> None:
    """Until SIGTERM. Raises `ChannelError` for what a person must mend first."""
    ready = asyncio.Event()
    probes = await serve(settings.http_host, settings.http_port, ready.is_set)
    try:
        async with (
            await KubeApi.connect() as api,
            TwilioPort(
                api_origin=settings.api_origin,
                messaging_origin=settings.messaging_origin,
                concurrency=settings.twilio_concurrency,
                timeout=settings.twilio_timeout_seconds,
            ) as twilio,
        ):
            controller = await _load(settings, KubePort(api, settings.operator_namespace), twilio)
            stop, over = asyncio.Event(), asyncio.Event()
            work = asyncio.create_task(controller.run())
            watching = asyncio.create_task(watch(api, controller, settings.channel_namespace, stop=stop, over=over))
            ready.set()
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({work, watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
            ready.clear()
            work.cancel()  # turns that have begun are let finish
            ended = await asyncio.gather(work, return_exceptions=True)
            over.set()  # kopf would cancel them
            stopping.cancel()
            for each in [*ended, *await asyncio.gather(watching, return_exceptions=True)]:
                if isinstance(each, Exception):
                    raise each
    finally:
        await probes.cleanup()


async def _load(settings: Settings, kube: KubePort, twilio: TwilioPort) -> Controller:
    """Everything that must be known before the first turn; waits for an API server that is not there yet."""
    transient = retry_if_exception_type((KubernetesUnavailable, Gone, KubernetesRefused))
    async for attempt in AsyncRetrying(retry=transient, wait=wait_random_exponential(max=10), before_sleep=_say_why):
        with attempt:
            keyring = await kube.open_keyring()
            claims: Claims[Key] = Claims()
            reconciler = Reconciler(
                kube,
                twilio,
                keyring=keyring,
                template=settings.template,
                claims=claims,
                intervals=Intervals(
                    drift=settings.drift_interval_seconds,
                    slow=settings.slow_interval_seconds,
                    deletion_grace=settings.deletion_grace_seconds,
                ),
                clock=lambda: datetime.now(UTC),
            )
            controller = Controller(
                kube,
                reconciler,
                claims,
                namespace=settings.channel_namespace,
                template=settings.template,
                workers=settings.workers,
                retry_floor=settings.retry_floor_seconds,
                retry_ceiling=settings.retry_ceiling_seconds,
                resync_interval=settings.resync_interval_seconds,
                drift_interval=settings.drift_interval_seconds,
            )
            await controller.load()
            return controller
    raise AssertionError("tenacity returns or raises")


def _say_why(state: object) -> None:
    error = state.outcome.exception()  # type: ignore[attr-defined]
    hint = "is the CRD installed? kubectl apply -f crds/" if isinstance(error, Gone) else ""
    log.warning("not started yet", error=str(error), hint=hint)


@click.command(
    help=f"The SMS channel operator. It takes no arguments; these environment variables:\n\n{settings_help()}"
)
def main() -> None:
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit(explain(error))
    log_to_stderr(settings.log_level, settings.log_format)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(settings))
    except (ChannelError, ConfigException, OSError) as error:
        log.critical("cannot run", error=str(error))
        sys.exit(1)
    log.info("stopped")


if __name__ == "__main__":
    main()
