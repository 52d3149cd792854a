"""`python -m smschannel`: the operator, configured by environment variables."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine
from importlib.metadata import version
from typing import Any

if __name__ == "__main__":  # the imports take seconds, and as the first process of a container it would ignore SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

import click
import structlog
import uvloop
from pydantic import ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from smschannel import metrics
from smschannel.api.environment import explain, settings_help, unknown_variables
from smschannel.api.errors import ChannelError, Fenced, KubernetesRefused, NoKindMatch, Retryable
from smschannel.api.kube_client import KubeClient
from smschannel.api.logs import log_to_stderr
from smschannel.api.names import FENCE, PACKAGE, RELEASE
from smschannel.channel_cache import ChannelCache
from smschannel.controller import Controller
from smschannel.health import Heartbeats, serve
from smschannel.kube_store import KubeStore
from smschannel.leader import Elector, Identity, call_timeout, identify, unless
from smschannel.orphans import Orphans
from smschannel.settings import Settings
from smschannel.twilio.client import TwilioClient
from smschannel.watch import watch
from smschannel.wiring import reconciler, rotation, twilio_client

log = structlog.get_logger()

_WATCH_END_SECONDS = 20
_ELECTION = "leader election"
_LEAVING_SECONDS = 60  # a former leader looks at the Lease again when its work and its watches have ended
_NO_FENCE = (
    "no admission policy refuses writes of an operator that lost its lease, so one that was stopped for long may still"
    " write to Kubernetes when it goes on: apply deploy/manifests/operator-fence.yaml"
)
_NOT_A_POD = (
    f"the admission policy {FENCE} admits writes of the pod that holds the lease, and this operator's token is bound to"
    " no pod. Run it in a pod, or delete that policy"
)


async def run(settings: Settings) -> None:
    """Stand by and lead alternately, until SIGTERM. Raises `ChannelError` for what a person must fix first."""
    ready, stop = asyncio.Event(), asyncio.Event()
    vitals, answers = Heartbeats(time.monotonic), Heartbeats(time.monotonic)
    metrics.WATCH_AGE_SECONDS.set_function(answers.age)
    probes = await serve(settings.http_host, settings.http_port, ready.is_set, vitals.silent)
    duration = settings.lease_duration_seconds
    try:
        async with (
            await KubeClient.connect() as api,
            KubeClient(api.configuration, timeout=call_timeout(duration)) as lease_api,
        ):
            for each in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(each, stop.set)
            identity = await unless(_identify(lease_api), stop)
            if identity is None:
                return
            vitals.expect(_ELECTION, 2 * duration + _LEAVING_SECONDS)
            elector = Elector(
                lease_api,
                settings.operator_namespace,
                identity.name,
                lease=settings.lease,
                duration=duration,
                on_look=lambda: vitals.beat(_ELECTION),
            )
            metrics.LEADER.set_function(lambda: elector.is_leading)
            metrics.NAMESPACES.set(len(settings.channel_namespaces))
            metrics.NAMESPACES_LED.set_function(lambda: len(settings.own_namespaces) * elector.is_leading)
            try:
                while not stop.is_set():
                    await unless(elector.campaign(lambda _: ready.set()), stop)
                    ready.clear()
                    if not stop.is_set():
                        await _lead(settings, api, elector, identity, ready, stop, vitals, answers)
            finally:
                await elector.release()
    finally:
        await probes.cleanup()


async def _lead(
    settings: Settings,
    api: KubeClient,
    elector: Elector,
    identity: Identity,
    ready: asyncio.Event,
    stop: asyncio.Event,
    vitals: Heartbeats,
    answers: Heartbeats,
) -> None:
    """Work until `stop` is set or the lease is lost. Nothing is in memory from an earlier time as the leader."""
    kube = KubeStore(api, settings.operator_namespace, settings.keyring_dir, others=settings.other_namespaces)
    async with twilio_client(settings, elector.outlasts, confirms_refusals=True) as twilio:
        while controller := await unless(_load(settings, kube, twilio, identity), stop, elector.lost):
            over = asyncio.Event()
            if controller.has_crd:
                watching = watch(
                    api,
                    controller,
                    settings.own_namespaces,
                    stop=stop,
                    over=over,
                    requests=vitals,
                    answers=answers,
                )
            else:
                watching = unless(_until_crd(kube, settings), over)
            try:
                await _serve(controller, elector, watching, ready, stop, over)
            finally:
                controller.close()
    metrics.unfollow()


async def _serve(
    controller: Controller,
    elector: Elector,
    watching: Coroutine[Any, Any, None],
    ready: asyncio.Event,
    stop: asyncio.Event,
    over: asyncio.Event,
) -> None:
    """Run until `stop` is set, the lease is lost, or `watching` ends. Release the lease in the first case.

    Reconciles that have begun may finish while this process leads.
    """
    work, watcher = asyncio.create_task(controller.run()), asyncio.create_task(watching)
    stopping, losing = asyncio.create_task(stop.wait()), asyncio.create_task(elector.lost.wait())
    ready.set()
    await asyncio.wait({work, watcher, stopping, losing}, return_when=asyncio.FIRST_COMPLETED)
    ready.clear()
    work.cancel()
    await asyncio.wait({work, losing}, return_when=asyncio.FIRST_COMPLETED)
    if losing.done():
        controller.abort()
    ended = await asyncio.gather(work, return_exceptions=True)
    if stop.is_set():
        await elector.release()
    over.set()  # not before: kopf would cancel them
    stopping.cancel()
    losing.cancel()
    _, hanging = await asyncio.wait({watcher}, timeout=_WATCH_END_SECONDS)
    if hanging:
        raise RuntimeError("the watches do not end")  # so the process must: they would go on beside later ones
    for each in [*ended, *await asyncio.gather(watcher, return_exceptions=True)]:
        if isinstance(each, Exception):
            raise each


async def _identify(api: KubeClient) -> Identity:
    """Ask the API server who this process is, until it answers."""
    async for attempt in _retrying():
        with attempt:
            return await identify(api)
    raise AssertionError("tenacity returns or raises")


async def _check_fence(kube: KubeStore, identity: Identity) -> None:
    """Log that there is no fence. Raises `ChannelError` if there is one that cannot admit this process."""
    fence = await kube.has_fence()
    if fence is False:
        log.warning(_NO_FENCE)
    elif fence and not identity.is_pod:
        raise ChannelError(_NOT_A_POD)


async def _load(settings: Settings, kube: KubeStore, twilio: TwilioClient, identity: Identity) -> Controller:
    """Load what the first reconcile needs; wait for an API server that does not answer yet.

    Waits for the CRD, too. If it does not come within a resync interval, and API discovery says that it is not there,
    it was deleted, and its channels with it: then the numbers of all records are restored.
    """
    orphans = Orphans(kube, time.monotonic)
    give_up = time.monotonic() + settings.resync_interval_seconds
    async for attempt in _retrying():
        with attempt:
            await _publish(settings, kube)  # also if there is no keyring: kubectl sms keys reads where it should be
            await kube.open_keyring(settings.channel_namespaces)
            channels = ChannelCache(kube.claims)
            controller = Controller(
                kube,
                reconciler(settings, kube, twilio, channels, orphans, observe_only=settings.observe_only),
                channels,
                orphans,
                rotation(settings, kube),
                namespaces=settings.own_namespaces,
                template=settings.template,
                workers=settings.workers,
                concurrency=settings.twilio_concurrency,
                retry_floor=settings.retry_floor_seconds,
                retry_ceiling=settings.retry_ceiling_seconds,
                resync_interval=settings.resync_interval_seconds,
                drift_interval=settings.drift_interval_seconds,
            )
            try:
                await _load_channels(controller, orphans, give_up)
                await _check_fence(kube, identity)  # the API server knows the Lease by now, also a new one
            except BaseException:
                controller.close()
                raise
            return controller
    raise AssertionError("tenacity returns or raises")


async def _load_channels(controller: Controller, orphans: Orphans, give_up: float) -> None:
    """Load the channels; without the CRD, only once it is proven that it was deleted, and not before `give_up`."""
    try:
        await controller.load()
    except NoKindMatch:
        if time.monotonic() < give_up or not await orphans.look_for_crd():
            raise
        log.warning("CRD is deleted, restoring the numbers of all records")
        await controller.load()


async def _until_crd(kube: KubeStore, settings: Settings) -> None:
    """Wait until channels can be listed, which means that the CRD is installed."""
    anything = retry_if_exception_type(ChannelError)
    async for attempt in AsyncRetrying(retry=anything, wait=wait_random_exponential(max=30)):
        with attempt:
            await anext(kube.channel_metadata(settings.own_namespaces[0]), None)


async def _publish(settings: Settings, kube: KubeStore) -> None:
    """Publish the settings for `kubectl sms`. An operator with the Role of an older release works without them."""
    try:
        await kube.publish_settings({**settings.published(), RELEASE: version(PACKAGE)})
    except KubernetesRefused as error:
        log.warning("cannot publish settings, kubectl sms plan needs them", error=str(error))


def _retrying() -> AsyncRetrying:
    """Retry what the API server may answer otherwise later."""
    transient = retry_if_exception_type((Retryable, KubernetesRefused))
    return AsyncRetrying(retry=transient, wait=wait_random_exponential(max=10), before_sleep=_log_retry)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    hint = ""
    if isinstance(error, NoKindMatch):
        hint = "is the CRD installed? kubectl apply -f crds/"
    elif isinstance(error, Fenced):  # it holds the lease
        hint = f"the API server's Lease is out of date; if it stays: kubectl delete validatingadmissionpolicy {FENCE}"
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
    metrics.OBSERVE_ONLY.set(settings.observe_only)
    if settings.observe_only:
        log.warning("only observing, nothing is written to Twilio", setting="SMSCHANNEL_OBSERVE_ONLY")
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
