"""`kubectl sms detach`: frees channels and numbers before the operator is removed for good."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from smschannel.api.errors import ChannelError, Conflict, KeyringLost, Retryable, Unreadable
from smschannel.api.reasons import Reason
from smschannel.api.resource import FINALIZER, SmsChannel
from smschannel.cli.options import INSTANCE, NAMESPACE, cluster, cluster_options, context_namespace, settings_of

if TYPE_CHECKING:
    from smschannel.api.kube_client import KubeClient
    from smschannel.cli.admin_store import AdminStore
    from smschannel.cli.plan_text import Outlook
    from smschannel.core.record import Key, Record
    from smschannel.leader import Elector
    from smschannel.reconcile import Reconciler
    from smschannel.settings import Settings

_CONCURRENCY = 8
_PATIENCE = 3  # rounds in a row that detach nothing
_LONGEST_PAUSE = 30.0  # seconds
_NEVER = 366 * 86_400.0


@click.command()
@click.argument("instances", metavar="[INSTANCE]...", type=INSTANCE, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All channels, and all records whose channel is gone.")
@click.option("--restore", is_flag=True, help="Restore the numbers at Twilio, as the deletion policies say.")
@click.option("--orphan", is_flag=True, help="Leave the numbers at Twilio as they are, and forget them.")
@click.option(
    "-n",
    "--namespace",
    type=NAMESPACE,
    help="The channels' namespace. Default: the context's for INSTANCEs, all with --all.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@cluster_options
def detach(
    instances: tuple[str, ...],
    everything: bool,
    restore: bool,
    orphan: bool,
    namespace: str | None,
    yes: bool,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Detach channels from their Twilio numbers, before the operator is removed for good.

    Afterwards the operator has no records of these channels, and they have no finalizer: they, their namespace and the
    CRD can be deleted without it. No number leaves its Twilio account. Stop the operator first: this command takes its
    Lease, so that none can work meanwhile, and ends if one is running.

    --restore does what deleting each channel would do. A number that cannot be restored stays in the operator's
    records, and its channel keeps the finalizer; the command says why, and ends with 1. It may be interrupted and
    repeated.

    --orphan leaves Twilio as it is: the numbers go on pointing at the instances' webhooks. It needs neither Twilio nor
    the operator's keyring.

    \b
      kubectl -n sms-operator scale deployment sms-channel-operator --replicas=0
      kubectl sms detach --all --restore
    """
    if everything and instances:
        raise click.UsageError("name the INSTANCEs or use --all, not both")
    if restore and orphan:
        raise click.UsageError("use --restore or --orphan, not both")
    if not everything and not instances:
        raise click.UsageError("name the INSTANCEs, or use --all")
    if not restore and not orphan:
        raise click.UsageError("use --restore (as the deletion policies say) or --orphan (Twilio is left as it is)")
    if instances:
        namespace = namespace or context_namespace(kubeconfig, context)
    selection = _Selection(frozenset(instances), namespace)
    try:
        asyncio.run(_detach(selection, restore, yes, kubeconfig, context, operator_namespace))
    except KeyboardInterrupt:
        raise click.ClickException("Interrupted. What is done is done; repeat the command to go on.") from None


@dataclass(frozen=True)
class _Selection:
    """The channels of a namespace (None: of all) with one of these names (none: any)."""

    names: frozenset[str]
    namespace: str | None

    def __contains__(self, key: tuple[str, str]) -> bool:
        namespace, name = key
        return self.namespace in {None, namespace} and (not self.names or name in self.names)


@dataclass(frozen=True)
class _Target:
    """A name with something to detach: a channel that has our finalizer, records, or both."""

    key: Key
    records: tuple[Record, ...] = ()
    body: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.key.namespace}/{self.key.name}" if self.key.name else "records without a channel"

    @property
    def has_finalizer(self) -> bool:
        return self.body is not None and FINALIZER in self.body["metadata"].get("finalizers", ())


@dataclass(frozen=True)
class _Result:
    """What was done for one channel (`text`), and whether something is left to do (`pending`).

    `pause` is after how many seconds a retry may help; None if it would not.
    """

    text: str
    pending: bool = False
    pause: float | None = None


async def _detach(
    selection: _Selection,
    restore: bool,
    yes: bool,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    denied = (
        "'detach' needs the rights of an administrator over all namespaces, or over one of them (-n) and over"
        f" {operator_namespace}."
    )
    async with cluster(kubeconfig, context, denied=denied) as api:
        from smschannel.api.logs import log_to_stderr
        from smschannel.cli.admin_store import AdminStore
        from smschannel.leader import unless

        log_to_stderr("ERROR", "console")
        kube = AdminStore(api, operator_namespace)
        settings = await settings_of(kube) if restore else None
        if not yes and (targets := await _find(kube, selection)):
            click.confirm(_question(targets, restore), abort=True, err=True)
        async with _leading(api, operator_namespace, settings) as leaders:
            work = _detach_selected(
                kube, selection, settings, lambda seconds: all(e.outlasts(seconds) for e in leaders)
            )
            outcome = await unless(work, *(each.lost for each in leaders))
        if outcome is None:
            raise click.ClickException("Another process took the operator's Lease. What is done is done; repeat.")
        click.echo(outcome)


@contextlib.asynccontextmanager
async def _leading(api: KubeClient, namespace: str, settings: Settings | None) -> AsyncIterator[list[Elector]]:
    """Hold the operator's Lease, or those of all shards. Raises `click.ClickException` if one is renewed."""
    from smschannel.api.kube_client import KubeClient
    from smschannel.cli.admin_store import operators
    from smschannel.leader import DURATION, Elector, call_timeout

    duration = settings.lease_duration_seconds if settings else DURATION
    identity, leaders = f"kubectl-sms-detach_{uuid.uuid4().hex[:8]}", []
    async with (
        KubeClient(api.configuration, timeout=call_timeout(duration)) as lease_api,
        contextlib.AsyncExitStack() as held,
    ):
        for lease in await operators(api, namespace):
            leader = Elector(lease_api, namespace, identity, lease=lease, duration=duration)
            await _take_lease(leader, namespace, lease)
            held.push_async_callback(leader.release)
            leaders.append(leader)
        yield leaders


async def _take_lease(leader: Elector, namespace: str, lease: str) -> None:
    from smschannel.leader import Wait

    first: Wait | None = None

    def refuse_if_renewed(wait: Wait) -> None:
        nonlocal first
        if first is None:
            first = wait
            click.echo(
                f"{wait.holder} holds the operator's Lease ({namespace}/{lease}); looking whether it is running ...",
                err=True,
            )
        elif wait != first:
            raise click.ClickException(
                f"The operator is running, and would configure the channels again: {wait.holder} has just renewed its"
                f" Lease. First: kubectl -n {namespace} scale deployment {lease} --replicas=0"
            )

    await leader.campaign(refuse_if_renewed)


async def _detach_selected(
    kube: AdminStore, selection: _Selection, settings: Settings | None, lease_outlasts: Callable[[float], bool]
) -> str:
    """Detach what is selected; restore the numbers if there are settings. Return what to say of it."""
    targets = await _find(kube, selection)
    unknown = await _unknown(kube, selection, {each.key.name for each in targets})
    if not targets and unknown:
        raise click.ClickException(f"Nothing to detach. {_not_found(unknown, selection.namespace)}")
    if not targets:
        return "Nothing to detach."
    pending = await (_restore(kube, targets, settings, lease_outlasts) if settings else _orphan(kube, targets))
    detached = f"{len(targets) - len(pending)} of {len(targets)} detached."
    if pending:
        raise click.ClickException(
            f"{detached} Not restored: {', '.join(map(str, pending))}. Fix the causes above and repeat the command;"
            " or give them up: --orphan"
        )
    if unknown:
        raise click.ClickException(f"{detached} {_not_found(unknown, selection.namespace)}")
    return detached


async def _unknown(kube: AdminStore, selection: _Selection, found: set[str]) -> list[str]:
    """Return the names of channels that do not exist. Print those that do, and have nothing to detach."""
    namespace = selection.namespace
    if namespace and not found and await kube.is_namespace_absent(namespace):
        raise click.ClickException(f"There is no namespace {namespace}. Nothing was changed.")
    unknown = []
    for name in sorted(selection.names - found):
        if namespace and await kube.channel(namespace, name):
            click.echo(f"{name}: nothing to detach in {namespace}")
        else:
            unknown.append(name)
    return unknown


def _not_found(unknown: list[str], namespace: str | None) -> str:
    return (
        f"There is no channel, nor a record of one, in {namespace or 'any namespace'}: {', '.join(unknown)}. Name its"
        " namespace with -n, or leave it out if it was deleted."
    )


async def _find(kube: AdminStore, selection: _Selection) -> list[_Target]:
    from smschannel.core.record import Key

    await kube.load_claims()
    targets = {key: _Target(key, kube.claims.of(key)) for key in {each.key for each in kube.claims} if key in selection}
    async for body in kube.all_channels(selection.namespace):
        key = Key(body["metadata"]["namespace"], body["metadata"]["name"])
        target = replace(targets.get(key) or _Target(key), body=body)
        if key in selection and (target.records or target.has_finalizer):
            targets[key] = target
    return sorted(targets.values(), key=str)


def _question(targets: list[_Target], restore: bool) -> str:
    channels = sum(each.body is not None for each in targets)
    deleted = len(targets) - channels
    what = _count(channels, "channel") + (
        f" and the records of {_count(deleted, 'deleted channel')}" if deleted else ""
    )
    consequence = (
        "Their numbers are restored as their deletion policies say."
        if restore
        else "Their numbers are left as they are at Twilio, and what they pointed at before is forgotten."
    )
    return f"{what}. {consequence} Go on?"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


async def _orphan(kube: AdminStore, targets: list[_Target]) -> list[_Target]:
    try:
        await kube.read_keyring()
        readable = True
    except KeyringLost as error:
        click.echo(f"{error}. What the numbers pointed at before cannot be shown.", err=True)
        readable = False

    async def one(target: _Target) -> _Result:
        texts = [await _forgotten(kube, record, readable) for record in target.records]
        if target.has_finalizer and target.body:
            await kube.remove_finalizer_from(target.body)
        for record in target.records:
            await kube.delete_record(record)
        return _Result("; ".join(texts) or "no number was taken")

    return await _each(kube, targets, one)


async def _forgotten(kube: AdminStore, record: Record, readable: bool) -> str:
    """Return the text about what is lost with a record."""
    from smschannel.cli.plan_text import shown

    number = f"orphaned {record.phone_number} ({record.number_sid})"
    if not readable:
        return number
    try:
        opened = await kube.open_record(record)
    except Unreadable as error:
        return f"{number}; {error}"
    previous = opened.contents.previous if opened and opened.contents else None
    return f"{number}, which pointed at {shown(previous.url) if previous else 'an unknown webhook'} before"


async def _restore(
    kube: AdminStore, targets: list[_Target], settings: Settings, lease_outlasts: Callable[[float], bool]
) -> list[_Target]:
    import time

    from smschannel.channel_cache import ChannelCache
    from smschannel.orphans import Orphans
    from smschannel.wiring import reconciler, twilio_client

    try:
        await kube.read_keyring()
    except KeyringLost as error:
        raise click.ClickException(
            f"{error}. Without it no record can be opened: restore it from its backup; or --orphan"
        ) from None
    invalid = frozenset(each.body["metadata"]["uid"] for each in targets if each.body and not _as_deleted(each.body))

    class Gone(Orphans):
        """Treats channels that the current rules refuse as gone: their records have all that is needed."""

        async def is_gone(self, record: Record) -> bool:
            return record.uid in invalid or await super().is_gone(record)

    orphans = Gone(kube, time.monotonic)
    await orphans.look_for_crd()
    if await orphans.look_for_crd():
        click.echo("The CRD is not installed, so all channels are gone.", err=True)
    async with twilio_client(settings, lease_outlasts) as twilio:
        patient = settings.model_copy(update={"restore_deadline_seconds": _NEVER})  # nothing is written off here
        work = reconciler(patient, kube, twilio, ChannelCache(kube.claims), orphans)

        async def one(target: _Target) -> _Result:
            channel = _as_deleted(target.body)
            result = await _restore_one(kube, work, target.key, channel)
            if not result.pending and target.has_finalizer and target.body and channel is None:
                await kube.remove_finalizer_from(target.body)
            return result

        return await _each(kube, targets, one)


async def _restore_one(kube: AdminStore, work: Reconciler, key: Key, channel: SmsChannel | None) -> _Result:
    """Reconcile a channel as if it had just been deleted, or the records of channels that are gone."""
    from smschannel.cli.plan_text import Outlook
    from smschannel.reconcile import RequeueRateLimited

    outlooks = [Outlook(observed, plan) for observed, plan in await work.preview(key, channel)]
    outcome = await work.reconcile(key, channel)
    pending = kube.claims.of(key)
    still = {record.number_sid for record in pending}
    texts = [text for outlook in outlooks for text in _done(outlook, still)]
    if not pending:
        return _Result("; ".join(texts) or "no number was taken")
    troubles = [_trouble(record, outlooks) for record in pending]
    for record, trouble in zip(pending, troubles, strict=True):
        why = trouble or outcome.verdict.message
        texts.append(f"NOT restored: {record.phone_number} ({record.number_sid}): {why}")
    may_succeed = outcome.verdict.reason is not Reason.RestoreFailed
    pause = None
    if any(isinstance(trouble, Retryable) if trouble else may_succeed for trouble in troubles):
        asked = outcome.requeue.at_least if isinstance(outcome.requeue, RequeueRateLimited) else None
        pause = asked or 1.0
    return _Result("; ".join(texts), pending=True, pause=pause)


def _done(outlook: Any, still: set[str]) -> Iterator[str]:
    """What was done with the numbers that are free now."""
    from smschannel.core.plan import RestoreWebhook

    for change in outlook.plan.changes:
        if isinstance(change, RestoreWebhook) and change.record.number_sid not in still:
            yield f"restored {outlook.moved(change)}"
    for record, text in outlook.not_restored():
        if record.number_sid not in still:
            yield text


def _trouble(record: Record, outlooks: list[Outlook]) -> ChannelError | None:
    """Why a number could not be restored, if that was known before it was tried."""
    if not record.uid:
        return Unreadable(f"the metadata of its record is damaged: restore Secret {record.secret_name} from its backup")
    currents = [outlook.observed.to_restore.get(record.number_sid) for outlook in outlooks]
    return next((each for each in currents if isinstance(each, ChannelError)), None)


def _as_deleted(body: dict[str, Any] | None) -> SmsChannel | None:
    """The channel as if it had just been deleted; None also for one that the current rules refuse."""
    try:
        return SmsChannel.model_validate(body).as_deleted(datetime.now(UTC)) if body else None
    except ValidationError:
        return None


async def _each(
    kube: AdminStore, targets: list[_Target], one: Callable[[_Target], Awaitable[_Result]]
) -> list[_Target]:
    """Detach a few at a time, one line each; retry what may succeed later, until nothing does. Returns the rest."""
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def attempt(target: _Target) -> _Result:
        async with slots:
            try:
                result = await _unless_changed_meanwhile(kube, target, one)
            except ChannelError as error:
                pause = (error.retry_after or 1.0) if isinstance(error, Retryable) else None
                result = _Result(f"NOT detached: {error}", pending=True, pause=pause)
        if result.pause is None:
            click.echo(f"{target}: {result.text}")
        return result

    given_up: list[_Target] = []
    fruitless = 0
    while True:
        results = list(zip(targets, await asyncio.gather(*map(attempt, targets)), strict=True))
        given_up += [target for target, result in results if result.pending and result.pause is None]
        retries = [(target, result) for target, result in results if result.pause is not None]
        fruitless = fruitless + 1 if len(retries) == len(targets) else 0
        if not retries or fruitless == _PATIENCE:
            for target, result in retries:
                click.echo(f"{target}: {result.text}")
            return given_up + [target for target, _ in retries]
        pause = min(_LONGEST_PAUSE, max(result.pause or 0 for _, result in retries))
        click.echo(f"{len(retries)} not detached yet, retrying in {pause:.0f} s.", err=True)
        await asyncio.sleep(pause)
        targets = [target for target, _ in retries]


async def _unless_changed_meanwhile(
    kube: AdminStore, target: _Target, one: Callable[[_Target], Awaitable[_Result]]
) -> _Result:
    """Try once more, with current objects, if the channel or its records were changed meanwhile."""
    try:
        return await one(target)
    except Conflict:
        body = await kube.channel(*target.key)
        return await one(replace(target, body=body, records=kube.claims.of(target.key)))
