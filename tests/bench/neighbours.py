"""What a hostile namespace costs another one: its channels' time to Ready, and REST calls that wait for it.

    python -m tests.bench.neighbours
    git worktree add /tmp/old HEAD~1
    python -m tests.bench.neighbours --also old=/tmp/old/operator

The hostile namespace has channels with invented account SIDs, and goes on changing something that makes the operator
ask Twilio again, as fast as the API server lets it. Twilio takes 0.2 seconds. Meanwhile channels are created in another
namespace: of an account that has others there already, and of accounts that have none, where nothing tells them from
invented ones; and with REST calls that wait. One control plane serves all operators.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import click
import uvloop
from rich.console import Console
from rich.table import Table

from deploy.build import Narrator, Progress
from deploy.local.stack import Options, Stack
from smschannel.api.resource import API_VERSION, CHECK_NOW_ANNOTATION, CREDENTIALS_LABEL, KIND
from tests.bench.load import Channels, LoadError, connect, in_flight, send, sweep
from tests.bench.run import manifests, operator

HOSTILE = "sms-hostile"
_PATH = f"/apis/{API_VERSION}/namespaces/{HOSTILE}/smschannels"
_SECRETS = f"/api/v1/namespaces/{HOSTILE}/secrets"
_TWILIO_SECONDS = 0.2
_PAUSE = 0.5
"""Seconds between the channels that are created in the other namespace."""
_LONGEST = 120.0
QUIET = "quiet"
KNOWN, NEW, REST = "known account", "new account", "REST, wait"

Attack = Callable[[aiohttp.ClientSession, list[str], int], Any]


async def _check_now(session: aiohttp.ClientSession, names: list[str], count: int) -> None:
    """Ask for a check of every channel."""
    body = json.dumps({"metadata": {"annotations": {CHECK_NOW_ANNOTATION: str(count)}}}).encode()
    await in_flight(lambda name: send(session, "PATCH", f"{_PATH}/{name}", body), names)


async def _edit(session: aiohttp.ClientSession, names: list[str], count: int) -> None:
    """Change the phone number of every channel."""
    body = json.dumps({"spec": {"phoneNumber": f"+614{count:08d}"}}).encode()
    await in_flight(lambda name: send(session, "PATCH", f"{_PATH}/{name}", body), names)


async def _touch_secret(session: aiohttp.ClientSession, names: list[str], count: int) -> None:
    """Write the Secret that all channels use."""
    await send(session, "PATCH", f"{_SECRETS}/twilio", json.dumps(_secret(count)).encode())
    await asyncio.sleep(0.05)


async def _recreate(session: aiohttp.ClientSession, names: list[str], count: int) -> None:
    """Delete all channels and create them again."""
    await send(session, "DELETE", _PATH)
    await _create(session, names)


ATTACKS: dict[str, Attack] = {
    "check-now": _check_now,
    "edits": _edit,
    "secret": _touch_secret,
    "recreate": _recreate,
}


def _secret(count: int) -> dict[str, Any]:
    meta = {"name": "twilio", "labels": {CREDENTIALS_LABEL: "true"}, "annotations": {"count": str(count)}}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": meta,
        "data": {"auth_token": base64.b64encode(b"0" * 32).decode()},
    }


async def _create(session: aiohttp.ClientSession, names: list[str]) -> None:
    def body(name: str) -> bytes:
        spec = {
            "accountSid": f"AC{uuid.uuid4().hex}",
            "phoneNumber": "+61400000000",
            "credentials": {"secretKeyRef": {"name": "twilio", "key": "auth_token"}},
        }
        meta = {"name": name, "namespace": HOSTILE}
        return json.dumps({"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec}).encode()

    await in_flight(lambda name: send(session, "POST", _PATH, body(name)), names)


@asynccontextmanager
async def _under(attack: Attack | None, session: aiohttp.ClientSession, channels: int) -> AsyncIterator[Counter]:
    """Attack during the block; yield the counter of rounds of the attack."""
    rounds = Counter()
    if attack is None:
        yield rounds
        return
    names = [str(uuid.uuid4()) for _ in range(channels)]
    await send(session, "POST", _SECRETS, json.dumps(_secret(0)).encode())
    await _create(session, names)

    async def go_on() -> None:
        for rounds.value in itertools.count(1):
            await attack(session, names, rounds.value)

    task = asyncio.create_task(go_on())
    try:
        yield rounds
    finally:
        ended_early = task.done()
        task.cancel()
        result = await asyncio.gather(task, return_exceptions=True)
        await send(session, "DELETE", _PATH)
        await send(session, "DELETE", f"{_SECRETS}/twilio")
        if ended_early and isinstance(result[0], Exception):
            raise result[0]


@dataclass
class Counter:
    """A mutable number."""

    value: int = 0


@dataclass
class Run:
    """Seconds until each of the other namespace's channels was Ready, by kind; `late` were not within two minutes."""

    operator: str
    case: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {KNOWN: [], NEW: [], REST: []})
    late: int = 0
    rounds: int = 0


async def measure(
    sources: Mapping[str, Path | None], cases: list[str], channels: int, seconds: float, home: Path, progress: Progress
) -> list[Run]:
    """Measure every case with every operator. SIGTERM stops everything, as Ctrl-C does."""
    this = asyncio.current_task()
    assert this
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    options = Options(
        numbers=4,
        finalizer_policy=False,
        more_namespaces=(HOSTILE,),
        webhook_url_template="https://sms.example.com/{namespace}/{instance_id}",
    )
    stack, runs = Stack(home, options, progress), list[Run]()
    try:
        await asyncio.to_thread(_start, stack)
        async with connect(stack.cluster.kubeconfig) as session:
            for case in (QUIET, *cases):
                for name, source in sources.items():
                    settings = {"SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}
                    if source:
                        settings["PYTHONPATH"] = str(source)
                    with operator(stack, settings, kill=True):
                        run = Run(name, case)
                        async with _under(ATTACKS.get(case), session, channels if case != QUIET else 0) as rounds:
                            await _others(stack, session, seconds, run)
                            run.rounds = rounds.value
                    await sweep(session)
                    runs.append(run)
                    progress(f"{name:<8} {case:<10} {_summary(run)}")
    finally:
        stack.stop()
    return runs


def _start(stack: Stack) -> None:
    stack.logs.mkdir(parents=True)
    stack.start_control_plane()
    stack.install()
    stack.start_twin()
    stack.start_operator()  # creates the keyring
    stack.start_shim()
    stack.stop_process("operator")
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "delay", "seconds": _TWILIO_SECONDS}})


async def _others(stack: Stack, session: aiohttp.ClientSession, seconds: float, run: Run) -> None:
    """Create channels in the other namespace, one of each kind every half second."""
    count = int(seconds / _PAUSE)
    [known] = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": 2 * count + 1})["accounts"]
    new = stack.twin_call("POST", "/seed", {"accounts": count, "numbers": 1})["accounts"]
    public, chance = stack.public_key(), random.Random(1)  # noqa: S311  (not used for secrets)
    known_manifests = manifests(public, [known], chance)
    new_manifests = manifests(public, new, chance)
    numbers = iter(known["phone_numbers"][::-1])
    async with Channels.watched(session) as seen, aiohttp.ClientSession(stack.api_url) as client:
        first = dict(itertools.islice(known_manifests, 1))
        await seen.create(first)
        with suppress(LoadError):
            await seen.until(seen.ready, first, _LONGEST)
        kinds: dict[str, str] = {}
        async with asyncio.TaskGroup() as calls:
            for _ in range(count):
                for kind, made in ((KNOWN, known_manifests), (NEW, new_manifests)):
                    [(name, manifest)] = itertools.islice(made, 1)
                    kinds[name] = kind
                    calls.create_task(seen.create({name: manifest}))
                calls.create_task(_rest(client, stack.api_key, known, next(numbers), run))
                await asyncio.sleep(_PAUSE)
        with suppress(LoadError):
            await seen.until(seen.ready, kinds, _LONGEST)
    for name, kind in kinds.items():
        if name in seen.ready:
            run.seconds[kind].append(seen.ready[name] - seen.created[name])
        else:
            run.late += 1


async def _rest(client: aiohttp.ClientSession, key: str, account: Mapping[str, Any], number: str, run: Run) -> None:
    """Create a channel with a call that waits for it; again while it is not active."""
    body = {"account_sid": account["account_sid"], "auth_token": account["auth_token"], "phone_number": number}
    path, headers = f"/v1/instances/{uuid.uuid4()}/channels/sms", {"X-Api-Key": key, "Prefer": "wait=30"}
    began = perf_counter()
    while perf_counter() - began < _LONGEST:
        async with client.post(path, json=body, headers=headers) as answer:
            found = await answer.json()
            if not answer.ok:
                raise LoadError(f"POST {path}: HTTP {answer.status}: {found}")
        if found["status"] == "active":
            run.seconds[REST].append(perf_counter() - began)
            return
    run.late += 1


def _percentiles(times: list[float]) -> tuple[float, float]:
    times = sorted(times)
    return (statistics.median(times), times[int(len(times) * 0.99)]) if times else (float("nan"), float("nan"))


def _summary(run: Run) -> str:
    each = (
        f"{kind} {_percentiles(times)[0]:.2f}/{_percentiles(times)[1]:.2f} s" for kind, times in run.seconds.items()
    )
    return f"{', '.join(each)}; late {run.late}; {run.rounds} rounds of the attack"


def show(console: Console, runs: list[Run], channels: int) -> None:
    table = Table(title=f"Seconds to Ready beside a namespace with {channels} hostile channels: median / p99")
    for heading in ("case", "operator", KNOWN, NEW, REST, "late", "rounds"):
        table.add_column(heading, justify="left" if heading in {"case", "operator"} else "right")
    for run in runs:
        cells = ("{:.2f} / {:.2f}".format(*_percentiles(times)) for times in run.seconds.values())
        table.add_row(run.case, run.operator, *cells, str(run.late), str(run.rounds))
    console.print(table)


def _sources(values: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for value in values:
        name, _, root = value.partition("=")
        if not name or not (Path(root) / "smschannel/__main__.py").is_file():
            raise click.BadParameter(f"{value}: write NAME=DIR, where DIR/smschannel is the operator's package")
        yield name, Path(root).absolute()


@click.command(context_settings={"show_default": True})
@click.option("--channels", type=click.IntRange(1, 10_000), default=2000, help="Hostile channels.")
@click.option("--seconds", type=click.FloatRange(5, 300), default=20, help="How long channels are created beside them.")
@click.option("--attack", "attacks", type=click.Choice(list(ATTACKS)), multiple=True, default=["check-now"])
@click.option(
    "--also",
    multiple=True,
    metavar="NAME=DIR",
    help="Measure the operator of another source root too; one from before the Lease is refused by the fence.",
)
def main(channels: int, seconds: float, attacks: tuple[str, ...], also: tuple[str, ...]) -> None:
    """Measure what a hostile namespace costs another one."""
    sources: dict[str, Path | None] = {**dict(_sources(also)), "ours": None}
    with tempfile.TemporaryDirectory(prefix="smschannel-neighbours-") as directory:
        home = Path(directory) / "home"
        runs = uvloop.run(measure(sources, list(attacks), channels, seconds, home, Narrator(sys.stderr)))
    show(Console(width=120), runs, channels)


if __name__ == "__main__":
    main()
