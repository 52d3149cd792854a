"""`python -m smschannel`: the operator, configured by environment variables."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine
from typing import Any

import click
import structlog
import uvloop
from kubernetes.aio.config import ConfigException
from pydantic import ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from smschannel.api.environment import explain, settings_help
from smschannel.api.errors import ChannelError, KubernetesRefused, NoKindMatch, Retryable
from smschannel.api.kube_client import KubeClient
from smschannel.api.logs import log_to_stderr
from smschannel.api.sealing import Keyring
from smschannel.controller import Controller
from smschannel.core.record import Claims
from smschannel.health import serve
from smschannel.kube_store import KubeStore
from smschannel.reconcile import Key
from smschannel.settings import Settings
from smschannel.twilio.client import TwilioClient
from smschannel.watch import watch
from smschannel.wiring import reconciler, twilio_port

log = structlog.get_logger()


async def run(settings: Settings) -> None:
    """Until SIGTERM. Raises `ChannelError` for what a person must mend first."""
    ready = asyncio.Event()
    probes = await serve(settings.http_host, settings.http_port, ready.is_set)
    try:
        async with (
            await KubeClient.connect() as api,
            twilio_port(settings) as twilio,
        ):
            kube, stop = KubeStore(api, settings.operator_namespace), asyncio.Event()
            while not stop.is_set():
                controller = await _load(settings, kube, twilio)
                over = asyncio.Event()
                if controller.has_crd:
                    watching = watch(api, controller, settings.channel_namespaces, stop=stop, over=over)
                else:
                    watching = _until_crd(kube, settings)
                await _serve(controller, watching, ready, stop, over)
    finally:
        await probes.cleanup()


async def _serve(
    controller: Controller,
    watching: Coroutine[Any, Any, None],
    ready: asyncio.Event,
    stop: asyncio.Event,
    over: asyncio.Event,
) -> None:
    """Until `stop` is set or `watching` ends; turns that have begun are let finish."""
    work, watcher = asyncio.create_task(controller.run()), asyncio.create_task(watching)
    stopping = asyncio.create_task(stop.wait())
    ready.set()
    await asyncio.wait({work, watcher, stopping}, return_when=asyncio.FIRST_COMPLETED)
    ready.clear()
    work.cancel()
    ended = await asyncio.gather(work, return_exceptions=True)
    over.set()  # kopf would cancel them
    stopping.cancel()
    for each in [*ended, *await asyncio.gather(watcher, return_exceptions=True)]:
        if isinstance(each, Exception):
            raise each


async def _load(settings: Settings, kube: KubeStore, twilio: TwilioClient) -> Controller:
    """Everything that must be known before the first turn; waits for an API server that is not there yet.

    Where the CRD does not come, it was deleted: what the records say is then given back.
    """
    transient = retry_if_exception_type((Retryable, KubernetesRefused))
    give_up = time.monotonic() + settings.resync_interval_seconds
    async for attempt in AsyncRetrying(retry=transient, wait=wait_random_exponential(max=10), before_sleep=_say_why):
        with attempt:
            controller = _controller(settings, kube, twilio, await kube.open_keyring())
            await _publish(settings, kube)
            try:
                await controller.load()
            except NoKindMatch:
                if time.monotonic() < give_up:
                    raise
                await controller.load_without_crd()
            return controller
    raise AssertionError("tenacity returns or raises")


async def _until_crd(kube: KubeStore, settings: Settings) -> None:
    anything = retry_if_exception_type(ChannelError)
    async for attempt in AsyncRetrying(retry=anything, wait=wait_random_exponential(max=30)):
        with attempt:
            await anext(kube.channel_metadata(settings.channel_namespaces[0]), None)


def _controller(settings: Settings, kube: KubeStore, twilio: TwilioClient, keyring: Keyring) -> Controller:
    claims: Claims[Key] = Claims()
    return Controller(
        kube,
        reconciler(settings, kube, twilio, keyring, claims),
        claims,
        namespaces=settings.channel_namespaces,
        template=settings.template,
        workers=settings.workers,
        concurrency=settings.twilio_concurrency,
        retry_floor=settings.retry_floor_seconds,
        retry_ceiling=settings.retry_ceiling_seconds,
        resync_interval=settings.resync_interval_seconds,
        drift_interval=settings.drift_interval_seconds,
    )


async def _publish(settings: Settings, kube: KubeStore) -> None:
    """A courtesy to 'kubectl sms': an operator with the Role of an older release works without."""
    try:
        await kube.publish_settings(settings.published())
    except KubernetesRefused as error:
        log.warning("settings not published: kubectl sms plan needs them", error=str(error))


def _say_why(state: object) -> None:
    error = state.outcome.exception()  # type: ignore[attr-defined]
    hint = "is the CRD installed? kubectl apply -f crds/" if isinstance(error, NoKindMatch) else ""
    log.warning("not started yet", error=str(error), hint=hint)


@click.command(
    help=f"The SMS channel operator. It takes no arguments; these environment variables:\n\n{settings_help(Settings)}"
)
def main() -> None:
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit(explain(error, Settings))
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
