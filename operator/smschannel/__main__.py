"""`python -m smschannel`: the operator, configured by environment variables."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any

import click
import structlog
import uvloop
from pydantic import ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from smschannel.api.environment import explain, settings_help, unknown_variables
from smschannel.api.errors import ChannelError, KubernetesRefused, NoKindMatch, Retryable
from smschannel.api.kube_client import KubeClient
from smschannel.api.logs import log_to_stderr
from smschannel.channel_cache import ChannelCache
from smschannel.controller import Controller
from smschannel.health import serve
from smschannel.kube_store import KubeStore
from smschannel.orphans import Orphans
from smschannel.settings import Settings
from smschannel.twilio.client import TwilioClient
from smschannel.watch import watch
from smschannel.wiring import reconciler, twilio_client

log = structlog.get_logger()


async def run(settings: Settings) -> None:
    """Run until SIGTERM. Raises `ChannelError` for what a person must fix first."""
    ready = asyncio.Event()
    probes = await serve(settings.http_host, settings.http_port, ready.is_set)
    try:
        async with (
            await KubeClient.connect() as api,
            twilio_client(settings, confirms_refusals=True) as twilio,
        ):
            kube, stop = KubeStore(api, settings.operator_namespace), asyncio.Event()
            for each in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(each, stop.set)
            while controller := await _unless_stopped(_load(settings, kube, twilio), stop):
                over = asyncio.Event()
                if controller.has_crd:
                    watching = watch(api, controller, settings.channel_namespaces, stop=stop, over=over)
                else:
                    watching = _until_crd(kube, settings)
                await _serve(controller, watching, ready, stop, over)
    finally:
        await probes.cleanup()


async def _unless_stopped(loading: Coroutine[Any, Any, Controller], stop: asyncio.Event) -> Controller | None:
    """The result of `loading`; None if `stop` is set before there is one."""
    load, stopping = asyncio.create_task(loading), asyncio.create_task(stop.wait())
    await asyncio.wait({load, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not stop.is_set():
        return await load
    load.cancel()
    await asyncio.wait({load})
    return None


async def _serve(
    controller: Controller,
    watching: Coroutine[Any, Any, None],
    ready: asyncio.Event,
    stop: asyncio.Event,
    over: asyncio.Event,
) -> None:
    """Run until `stop` is set or `watching` ends; reconciles that have begun may finish."""
    work, watcher = asyncio.create_task(controller.run()), asyncio.create_task(watching)
    stopping = asyncio.create_task(stop.wait())
    ready.set()
    await asyncio.wait({work, watcher, stopping}, return_when=asyncio.FIRST_COMPLETED)
    ready.clear()
    work.cancel()
    ended = await asyncio.gather(work, return_exceptions=True)
    over.set()  # not before: kopf would cancel them
    stopping.cancel()
    for each in [*ended, *await asyncio.gather(watcher, return_exceptions=True)]:
        if isinstance(each, Exception):
            raise each


async def _load(settings: Settings, kube: KubeStore, twilio: TwilioClient) -> Controller:
    """Load what the first reconcile needs; wait for an API server that does not answer yet.

    Waits for the CRD, too. If it does not come within a resync interval, and API discovery says that it is not there,
    it was deleted, and its channels with it: then the numbers of all records are restored.
    """
    orphans = Orphans(kube, time.monotonic)
    transient = retry_if_exception_type((Retryable, KubernetesRefused))
    give_up = time.monotonic() + settings.resync_interval_seconds
    async for attempt in AsyncRetrying(retry=transient, wait=wait_random_exponential(max=10), before_sleep=_log_retry):
        with attempt:
            keyring = await kube.open_keyring(settings.channel_namespaces)
            await _publish(settings, kube)
            channels = ChannelCache(kube.claims)
            controller = Controller(
                kube,
                reconciler(settings, kube, twilio, keyring, channels, orphans),
                channels,
                orphans,
                namespaces=settings.channel_namespaces,
                template=settings.template,
                workers=settings.workers,
                concurrency=settings.twilio_concurrency,
                retry_floor=settings.retry_floor_seconds,
                retry_ceiling=settings.retry_ceiling_seconds,
                resync_interval=settings.resync_interval_seconds,
                drift_interval=settings.drift_interval_seconds,
            )
            try:
                await controller.load()
            except NoKindMatch:
                if time.monotonic() < give_up or not await orphans.look_for_crd():
                    raise
                log.warning("CRD is deleted, restoring the numbers of all records")
                await controller.load()
            return controller
    raise AssertionError("tenacity returns or raises")


async def _until_crd(kube: KubeStore, settings: Settings) -> None:
    """Wait until channels can be listed, which means that the CRD is installed."""
    anything = retry_if_exception_type(ChannelError)
    async for attempt in AsyncRetrying(retry=anything, wait=wait_random_exponential(max=30)):
        with attempt:
            await anext(kube.channel_metadata(settings.channel_namespaces[0]), None)


async def _publish(settings: Settings, kube: KubeStore) -> None:
    """Publish the settings for `kubectl sms`. An operator with the Role of an older release works without them."""
    try:
        await kube.publish_settings(settings.published())
    except KubernetesRefused as error:
        log.warning("cannot publish settings, kubectl sms plan needs them", error=str(error))


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    hint = "is the CRD installed? kubectl apply -f crds/" if isinstance(error, NoKindMatch) else ""
    log.warning("cannot start yet", error=str(error), hint=hint)


@click.command(
    help=f"The SMS channel operator. It takes no arguments; these environment variables:\n\n{settings_help(Settings)}"
)
def main() -> None:
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit(explain(error, Settings))
    log_to_stderr(settings.log_level, settings.log_format)
    for unknown in unknown_variables(Settings, os.environ):
        log.warning("unknown environment variable", variable=unknown)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(settings))
    except (ChannelError, OSError) as error:
        log.critical("cannot run", error=str(error))
        sys.exit(1)
    log.info("stopped")


if __name__ == "__main__":
    main()
