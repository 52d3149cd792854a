"""`kubectl sms release`: before the operator is taken away for good, so that nothing waits for it or is owed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from smschannel.api.errors import ChannelError, Conflict, KeyringLost, Retryable, Unreadable
from smschannel.api.resource import FINALIZER, SmsChannel
from smschannel.cli.options import INSTANCE, NAMESPACE, cluster, cluster_options, context_namespace, settings_of

if TYPE_CHECKING:
    from smschannel.cli.admin_store import AdminStore
    from smschannel.core.record import Entry
    from smschannel.reconcile import Reconciler

_AT_ONCE = 8
_PATIENCE = 3  # rounds in which nothing mends
_LONGEST_PAUSE = 30.0  # seconds
_NEVER = 1e9
_WATCHED = 3  # seconds in which an operator that nobody knew of shows itself


@click.command()
@click.argument("instances", metavar="[INSTANCE]...", type=INSTANCE, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All channels, and all records whose channel is gone.")
@click.option("--give-back", is_flag=True, help="Put the numbers back, as the deletion policies say.")
@click.option("--let-go", is_flag=True, help="Leave the numbers at Twilio as they are, and forget them.")
@click.option(
    "-n",
    "--namespace",
    type=NAMESPACE,
    help="Of the channels; by default the context's for INSTANCEs, and all with --all.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Do not look whether the operator is stopped.")
@cluster_options
def release(
    instances: tuple[str, ...],
    everything: bool,
    give_back: bool,
    let_go: bool,
    namespace: str | None,
    yes: bool,
    force: bool,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    """Give back or let go of numbers, for taking the operator away for good.

    Afterwards the operator remembers nothing of these channels, and nothing of theirs waits for it: they, their
    namespace and the CRD can be deleted without it. The operator must be stopped, or it would take the numbers again.

    --give-back does what deleting each channel would do. A number that cannot be given back stays in the operator's
    records, and its channel keeps the finalizer; the command says why, and ends with 1. It may be interrupted and
    repeated.

    --let-go leaves Twilio as it is: the numbers go on pointing at the instances' webhooks. It needs neither Twilio nor
    the operator's keyring.

    \b
      kubectl -n sms-operator scale deployment sms-channel-operator --replicas=0
      kubectl sms release --all --give-back
    """
    if everything == bool(instances):
        raise click.UsageError("name the INSTANCEs, or say --all")
    if give_back == let_go:
        raise click.UsageError("say --give-back (as the deletion policies say) or --let-go (Twilio is left as it is)")
    if instances:
        namespace = namespace or context_namespace(kubeconfig, context)
    chosen = _Chosen(frozenset(instances), namespace)
    try:
        asyncio.run(_release(chosen, give_back, yes, force, kubeconfig, context, operator_namespace))
    except KeyboardInterrupt:
        raise click.ClickException("Interrupted. What is done is done; repeat the command to go on.") from None


@dataclass(frozen=True)
class _Chosen:
    """Which channels: of the namespace (None: of all), with one of the names (none: any)."""

    names: frozenset[str]
    namespace: str | None

    def __contains__(self, place: tuple[str, str]) -> bool:
        namespace, name = place
        return self.namespace in {None, namespace} and (not self.names or name in self.names)


@dataclass(frozen=True)
class _Left:
    """What a channel's end would have to wait for: its object's finalizer, the operator's record of it, or both."""

    namespace: str
    name: str
    uid: str
    recorded: bool = False
    body: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def held(self) -> bool:
        return self.body is not None and FINALIZER in self.body["metadata"].get("finalizers", ())


@dataclass(frozen=True)
class _Outcome:
    """`told` is what became of it; what is `owed` stays as it was, for `pause` seconds where waiting may help."""

    told: str
    owed: bool = False
    pause: float | None = None


async def _release(
    chosen: _Chosen,
    give_back: bool,
    yes: bool,
    force: bool,
    kubeconfig: str | None,
    context: str | None,
    operator_namespace: str,
) -> None:
    denied = (
        "'release' needs the rights of an administrator over all namespaces, or over one of them (-n) and over"
        f" {operator_namespace}; --force leaves out looking whether the operator is stopped."
    )
    async with cluster(kubeconfig, context, denied=denied) as api:
        from smschannel.api.names import OPERATOR
        from smschannel.cli.admin_store import AdminStore

        kube = AdminStore(api, operator_namespace)
        if not force and (running := await kube.operators()):
            raise click.ClickException(
                f"The operator is not stopped, and would take the numbers again: {', '.join(running)} in namespace"
                f" {operator_namespace}. First: kubectl -n {operator_namespace} scale deployment {OPERATOR}"
                " --replicas=0, and wait until its pod is gone. If it does not run all the same: --force"
            )
        found = await _find(kube, chosen)
        for name in sorted(chosen.names - {each.name for each in found}):
            click.echo(f"{name}: nothing to release in {chosen.namespace or 'any namespace'}")
        if not found:
            click.echo("Nothing to release.")
            return
        if not yes:
            click.confirm(_question(found, give_back), abort=True, err=True)
        owed = await (_give_back(kube, found) if give_back else _let_go(kube, found))
        owing = {each.uid for each in owed}
        free = {each.uid for each in found if each.body is not None and each.uid not in owing}
        if free and (taken := await kube.taken_again(free, chosen.namespace, _WATCHED)):
            raise click.ClickException(
                f"An operator is at work: it has taken {taken} again, and will take the others. Stop it and repeat."
            )
    released = f"{len(found) - len(owed)} of {len(found)} released."
    if owed:
        raise click.ClickException(
            f"{released} Still owed: {', '.join(map(str, owed))}. Mend what is said above and repeat the command; or"
            " give them up: --let-go"
        )
    click.echo(released)


async def _find(kube: AdminStore, chosen: _Chosen) -> list[_Left]:
    left = {
        kept.uid: _Left(kept.namespace, kept.name, kept.uid, recorded=True)
        async for kept in kube.kept()
        if (kept.namespace, kept.name) in chosen
    }
    async for body in kube.all_channels(chosen.namespace):
        meta = body["metadata"]
        if (meta["namespace"], meta["name"]) in chosen:
            known = left.get(meta["uid"]) or _Left(meta["namespace"], meta["name"], meta["uid"])
            seen = replace(known, body=body)
            if seen.recorded or seen.held:
                left[seen.uid] = seen
    return sorted(left.values(), key=str)


def _question(found: list[_Left], give_back: bool) -> str:
    channels = sum(each.body is not None for each in found)
    what = f"{_count(channels, 'channel')}, and {_count(len(found) - channels, 'record')} whose channel is gone."
    consequence = (
        "Their numbers are given back as their deletion policies say."
        if give_back
        else "Their numbers are left as they are at Twilio, and what they pointed at before is forgotten."
    )
    return f"{what} {consequence} Go on?"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


async def _let_go(kube: AdminStore, found: list[_Left]) -> list[_Left]:
    try:
        await kube.read_keyring()
        readable = True
    except KeyringLost as error:
        click.echo(f"{error}. What the numbers pointed at before cannot be told.", err=True)
        readable = False

    async def one(left: _Left) -> _Outcome:
        told = await _forgotten(kube, left) if readable and left.recorded else "let go"
        if left.held and left.body:
            await kube.take_finalizer_off(left.body)
        if left.recorded:
            await kube.drop_record(left.uid)
        return _Outcome(told)

    return await _each(kube, found, one)


async def _forgotten(kube: AdminStore, left: _Left) -> str:
    """What nobody will know any more."""
    try:
        record = await kube.load_record(left.uid)
    except Unreadable as error:
        return f"let go; {error}"
    told = [
        f"{entry.phone_number} ({entry.number_sid}), which pointed at {_previous(entry)} before"
        for entry in (record.entries if record else ())
    ]
    return f"let go of {', '.join(told)}" if told else "no number was taken"


def _previous(entry: Entry) -> str:
    from smschannel.cli.plan_text import shown

    return shown(entry.previous.url) if entry.previous else "what is not known"


async def _give_back(kube: AdminStore, found: list[_Left]) -> list[_Left]:
    from smschannel.api.logs import log_to_stderr
    from smschannel.core.record import Claims
    from smschannel.wiring import reconciler, twilio_port

    log_to_stderr("ERROR", "console")
    settings = await settings_of(kube)
    try:
        keyring = await kube.read_keyring()
    except KeyringLost as error:
        raise click.ClickException(
            f"{error}. Without it no record can be opened: restore it from its backup; or --let-go"
        ) from None
    async with twilio_port(settings) as twilio:
        unhurried = settings.model_copy(update={"restore_deadline_seconds": _NEVER})  # nothing is written off here
        work = reconciler(unhurried, kube, twilio, keyring, Claims())

        async def one(left: _Left) -> _Outcome:
            channel = _model(left.body)
            outcome = await _turn(work, left, channel)
            if not outcome.owed and left.held and left.body and channel is None:
                await kube.take_finalizer_off(left.body)
            return outcome

        return await _each(kube, found, one)


async def _turn(work: Reconciler, left: _Left, channel: SmsChannel | None) -> _Outcome:
    """The channel's turn as if it had been deleted just now; or that of a record whose channel is gone."""
    from smschannel.cli.plan_text import Outlook
    from smschannel.core.plan import GiveBack
    from smschannel.reconcile import Key

    key = Key(left.namespace, left.name, "" if channel else left.uid)
    seen, foreseen = await work.preview(key, channel)
    outlook = Outlook(seen, foreseen, seen.record.deletion_policy)
    outcome = await work.reconcile(key, channel)
    owed = outcome.stored or outcome.owed > 0
    still = {entry.number_sid: entry.phone_number for entry in outcome.record.entries if owed}
    told = [
        f"gave back {outlook.moved(change)}"
        for change in foreseen.changes
        if isinstance(change, GiveBack) and change.entry.number_sid not in still
    ]
    told += [text for entry, text in outlook.left() if entry.number_sid not in still]
    if not owed:
        return _Outcome("; ".join(told) or "no number was taken")
    numbers = ", ".join(f"{phone_number} ({number_sid})" for number_sid, phone_number in still.items())
    told.append(f"NOT given back: {numbers + ': ' if numbers else ''}{outcome.verdict.message}")
    return _Outcome("; ".join(told), owed=True, pause=(outcome.at_least or 1.0) if outcome.unreachable else None)


def _model(body: dict[str, Any] | None) -> SmsChannel | None:
    """None for a channel that today's rules refuse, too: its record says all that is needed."""
    try:
        return SmsChannel.model_validate(body).as_deleted(datetime.now(UTC)) if body else None
    except ValidationError:
        return None


async def _each(kube: AdminStore, found: list[_Left], one: Callable[[_Left], Awaitable[_Outcome]]) -> list[_Left]:
    """A handful at a time, with a line for each; again what may mend by itself, until nothing does. What is owed."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def attempt(left: _Left) -> _Outcome:
        async with slots:
            try:
                outcome = await _unless_written_meanwhile(kube, left, one)
            except ChannelError as error:
                pause = (error.retry_after or 1.0) if isinstance(error, Retryable) else None
                outcome = _Outcome(f"NOT released: {error}", owed=True, pause=pause)
        if outcome.pause is None:
            click.echo(f"{left}: {outcome.told}")
        return outcome

    given_up: list[_Left] = []
    fruitless = 0
    while True:
        outcomes = list(zip(found, await asyncio.gather(*map(attempt, found)), strict=True))
        given_up += [left for left, outcome in outcomes if outcome.owed and outcome.pause is None]
        again = [(left, outcome) for left, outcome in outcomes if outcome.pause is not None]
        fruitless = fruitless + 1 if len(again) == len(found) else 0
        if not again or fruitless == _PATIENCE:
            for left, outcome in again:
                click.echo(f"{left}: {outcome.told}")
            return given_up + [left for left, _ in again]
        pause = min(_LONGEST_PAUSE, max(outcome.pause or 0 for _, outcome in again))
        click.echo(f"{len(again)} not released yet: again in {pause:.0f} s.", err=True)
        await asyncio.sleep(pause)
        found = [left for left, _ in again]


async def _unless_written_meanwhile(
    kube: AdminStore, left: _Left, one: Callable[[_Left], Awaitable[_Outcome]]
) -> _Outcome:
    try:
        return await one(left)
    except Conflict:
        body = await kube.channel(left.namespace, left.name)
        return await one(replace(left, body=body if body and body["metadata"]["uid"] == left.uid else None))
