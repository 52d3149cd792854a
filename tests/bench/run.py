"""Measures the cases of the speed benchmark, interleaved, on one control plane."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import psutil
import yaml
from pydantic import SecretStr

from deploy.local.build import Progress
from deploy.local.stack import CHANNELS, ROOT, Options, Stack
from smschannel.api.resource import API_VERSION, KIND
from smschannel.api.sealing import Binding, PublicKey
from tests.bench.case import Case, Load, Run
from tests.bench.gauges import Processes, settled_writes, twilio_calls, writes
from tests.bench.load import PATH, Channels, LoadError, connect, sweep

_ALONE = 20
"""Channels that are created one after another first, to measure the latency of one and to warm up."""

_SAMPLE = 200
"""Channels of a batch whose checks and deletions are measured; the others are removed by `sweep`."""


async def measure(
    load: Load, cases: Sequence[Case], home: Path, progress: Progress, save: Callable[[list[Run]], object]
) -> list[Run]:
    """Measure every case once per round, in an order shuffled by the seed. Calls `save` with all runs after each."""
    per_account = -(-(load.channels + _ALONE) // load.accounts)
    async with staged(home, load.accounts, per_account, progress) as (stack, session):
        bench = _Bench(stack, load, session)
        chance = random.Random(load.seed)  # noqa: S311  (not used for secrets)
        runs: list[Run] = []
        for number in range(1, load.rounds + 1):
            for case in chance.sample(cases, len(cases)):
                runs.append(await bench.run(case, number, chance))
                save(runs)
                rate = f"{runs[-1].channels_per_second:.0f} channels/s"
                progress(f"round {number}  {case.name:<30} {rate:>16}  {runs[-1].elsewhere:4.0%} of the CPU elsewhere")
        return runs


@asynccontextmanager
async def staged(
    home: Path, accounts: int, numbers: int, progress: Progress
) -> AsyncIterator[tuple[Stack, aiohttp.ClientSession]]:
    """Start control plane and twin, create the keyring, and open a session with the API server; no operator runs.

    SIGTERM stops everything, as Ctrl-C does.
    """
    this = asyncio.current_task()
    assert this
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    stack = Stack(home, Options(accounts=accounts, numbers=numbers, finalizer_policy=False), progress)
    try:
        stack.logs.mkdir(parents=True)
        stack.start_control_plane()
        stack.install()
        stack.start_twin()
        stack.start_operator()  # creates the keyring
        stack.stop_process("operator")
        async with connect(stack.cluster.kubeconfig) as session:
            yield stack, session
    finally:
        stack.stop()


@contextmanager
def operator(stack: Stack, settings: Mapping[str, str], *, kill: bool = False) -> Iterator[psutil.Process]:
    """Run the operator during the block; `kill` stops it without waiting for its reconciles."""
    stack.options = replace(stack.options, operator_settings=settings)
    stack.start_operator()
    try:
        yield stack.process("operator")
    finally:
        stack.stop_process("operator", kill=kill)


def manifests(
    public: PublicKey, accounts: Sequence[Mapping[str, Any]], chance: random.Random
) -> Iterator[tuple[str, bytes]]:
    """Yield a name and a manifest (JSON, token sealed) for each number; neighbours belong to different accounts."""
    for row in zip(*(each["phone_numbers"] for each in accounts), strict=True):
        for account, number in zip(accounts, row, strict=True):
            name = str(uuid.UUID(int=chance.getrandbits(128), version=4))
            yield name, json.dumps(_manifest(name, account, number, public)).encode()


class _Bench:
    def __init__(self, stack: Stack, load: Load, session: aiohttp.ClientSession) -> None:
        self._stack = stack
        self._load = load
        self._session = session
        self._public = stack.public_key()
        self._at_birth = False

    async def run(self, case: Case, number: int, chance: random.Random) -> Run:
        await self._set_policy(case.at_birth)
        code = case.code()
        made = self._manifests(chance)
        alone = dict(islice(made, _ALONE))
        batch = dict(made)
        with self._program(case) as process:
            async with Channels.watched(self._session) as channels:
                for name, manifest in alone.items():
                    await channels.create({name: manifest})
                    await channels.until(channels.ready, [name])
                async with counted(self._stack, self._session, process) as spent:
                    await channels.create(batch)
                    last = await channels.until(channels.ready, batch)
                seconds = last - channels.created[next(iter(batch))]
                spent.writes["POST smschannels"] -= len(batch)
                sample = list(islice(batch, _SAMPLE))
                idle_writes = await self._idle_writes(channels, sample) if case.variant == "ours" else None
                began = perf_counter()
                await channels.delete(sample)
                ended = await channels.until(channels.gone, sample)
        await sweep(self._session)
        return Run(
            case=case.name,
            round=number,
            code=code if case.code() == code else f"{code} and later",
            seconds=seconds,
            channels_per_second=len(batch) / seconds,
            time_to_ready=tuple(channels.ready[name] - channels.created[name] for name in batch),
            alone=statistics.median(channels.ready[name] - channels.created[name] for name in alone),
            writes=_each(spent.writes, len(batch)),
            twilio_calls=_each(spent.twilio_calls, len(batch)),
            cpu_seconds=spent.processes.cpu_seconds,
            max_rss=spent.processes.max_rss,
            idle_writes=idle_writes,
            deletions_per_second=len(sample) / (ended - began),
            elsewhere=spent.processes.elsewhere,
        )

    def _manifests(self, chance: random.Random) -> Iterator[tuple[str, bytes]]:
        """Numbers of new accounts: those of the runs before still point where they were pointed."""
        count = self._load.channels + _ALONE
        new = {"accounts": self._load.accounts, "numbers": -(-count // self._load.accounts)}
        accounts = self._stack.twin_call("POST", "/seed", new)["accounts"]
        return islice(manifests(self._public, accounts, chance), count)

    async def _idle_writes(self, channels: Channels, names: Sequence[str]) -> int:
        """Ask for a check of each of `names`, where nothing has changed, and return the number of writes.

        The annotation that asks for a check, and `status.lastHandledCheckNow`, which acknowledges it, do not count.
        """
        calls = await twilio_calls(self._session, self._stack.twilio_url)
        before = await writes(self._session)
        await channels.check_now(names)
        async with asyncio.timeout(60):
            while True:
                now = await twilio_calls(self._session, self._stack.twilio_url)
                if (now - calls).total() >= len(names):
                    break
                await asyncio.sleep(0.2)
        return ((await settled_writes(self._session)) - before).total() - 2 * len(names)

    @contextmanager
    def _program(self, case: Case) -> Iterator[psutil.Process]:
        stack, workers = self._stack, str(self._load.workers)
        if case.variant == "ours":
            settings = {"SMSCHANNEL_WORKERS": workers, "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}
            if case.source:
                settings["PYTHONPATH"] = str(case.source)
            with operator(stack, settings) as process:
                yield process
            return
        # As an administrator: the others hold no Lease, which the fence asks of the operator's ServiceAccount.
        kubeconfig = stack.cluster.kubeconfig
        with (stack.logs / f"{case.variant}.log").open("ab") as log:
            program = subprocess.Popen(
                [sys.executable, "-m", f"tests.bench.{case.variant}", workers],
                cwd=ROOT,
                env={**os.environ, "KUBECONFIG": str(kubeconfig), "TWILIO_URL": stack.twilio_url, "WORKERS": workers},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield psutil.Process(program.pid)
        finally:
            program.terminate()
            try:
                program.wait(20)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()

    async def _set_policy(self, at_birth: bool) -> None:
        """Install or remove the admission policy, and wait until the API server applies it."""
        if at_birth is self._at_birth:
            return
        for manifest in yaml.safe_load_all((ROOT / "deploy/manifests/finalizer-policy.yaml").read_text()):
            resource = self._stack.api.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
            if at_birth:
                resource.create(body=manifest)
            else:
                resource.delete(name=manifest["metadata"]["name"])
        _, trial = next(self._manifests(random.Random(0)))  # noqa: S311
        for _ in range(100):
            kind = {"Content-Type": "application/json"}
            async with self._session.post(PATH, params={"dryRun": "All"}, data=trial, headers=kind) as answer:
                meta: dict[str, Any] = (await answer.json())["metadata"]
            if ("finalizers" in meta) is at_birth:
                self._at_birth = at_birth
                return
            await asyncio.sleep(0.1)
        raise LoadError("the API server does not apply the change of the admission policy")


class Counted:
    """What a block spent: CPU time and memory, writes by "VERB resource" and Twilio calls by "METHOD kind"."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.writes: Counter[str] = Counter()
        self.twilio_calls: Counter[str] = Counter()


@asynccontextmanager
async def counted(stack: Stack, session: aiohttp.ClientSession, subject: psutil.Process) -> AsyncIterator[Counted]:
    """Count what is spent within the block; writes and Twilio calls until there are no more writes."""
    pids = stack.pids()
    processes = Processes(
        {
            "subject": subject,
            "control plane": psutil.Process(pids["controlplane"]),
            "twin": psutil.Process(pids["twin"]),
            "load": psutil.Process(),
        },
        "subject",
    )
    spent = Counted(processes)
    before, calls = await writes(session), await twilio_calls(session, stack.twilio_url)
    async with processes:
        yield spent
    spent.writes = await settled_writes(session)
    spent.writes.subtract(before)
    spent.twilio_calls = await twilio_calls(session, stack.twilio_url)
    spent.twilio_calls.subtract(calls)


def _each(counted: Counter[str], channels: int) -> dict[str, float]:
    return {kind: count / channels for kind, count in sorted(counted.items()) if count}


def _manifest(name: str, account: Mapping[str, Any], number: str, public: PublicKey) -> dict[str, Any]:
    sid = account["account_sid"]
    sealed = public.seal(SecretStr(account["auth_token"]), Binding(CHANNELS, name, sid))
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": CHANNELS},
        "spec": {"accountSid": sid, "phoneNumber": number, "credentials": {"sealed": sealed}},
    }
