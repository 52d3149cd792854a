"""Measures the cases of the speed benchmark, interleaved, on one control plane."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml
from pydantic import SecretStr

from deploy.build import Progress
from deploy.local.stack import CHANNELS, ROOT, Options, Stack
from smschannel.api.resource import API_VERSION, KIND
from smschannel.api.sealing import Binding, PublicKey
from tests.bench import gopeer
from tests.bench.case import Case, Load, Phase, Run
from tests.bench.gauges import Processes, kubernetes_calls, settled_writes, twilio_calls, writes
from tests.bench.load import PATH, Channels, LoadError, connect, sweep

_WARM_UP = 20
_ALONE = 40
"""Channels that are created, and deleted, one after another first, to measure the latency of one."""

_SAMPLE = 200
"""Channels of a batch whose checks are measured."""


async def measure(
    load: Load, cases: Sequence[Case], home: Path, progress: Progress, save: Callable[[list[Run]], object]
) -> list[Run]:
    """Measure every case once per round, in an order shuffled by the seed. Calls `save` with all runs after each."""
    async with staged(home, 1, 1, progress) as (stack, session):  # each run makes accounts of its own
        bench = _Bench(stack, load, session, progress)
        chance = random.Random(load.seed)  # noqa: S311  (not used for secrets)
        runs: list[Run] = []
        for number in range(1, load.rounds + 1):
            for case in chance.sample(cases, len(cases)):
                runs.append(await bench.run(case, number, chance))
                save(runs)
                rate = f"{runs[-1].create.per_second:.0f} channels/s {runs[-1].cpu_milliseconds:5.2f} ms"
                progress(f"round {number}  {case.name:<30} {rate:>26}  {runs[-1].elsewhere:4.0%} of the CPU elsewhere")
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
    def __init__(self, stack: Stack, load: Load, session: aiohttp.ClientSession, progress: Progress) -> None:
        self._progress = progress
        self._stack = stack
        self._load = load
        self._session = session
        self._public = stack.public_key()
        self._at_birth = False

    async def run(self, case: Case, number: int, chance: random.Random) -> Run:
        await self._set_policy(case.at_birth)
        code = case.code()
        accounts = self._new_accounts()
        made = islice(manifests(self._public, accounts, chance), self._load.channels + _WARM_UP + _ALONE)
        warm_up, alone, batch = dict(islice(made, _WARM_UP)), dict(islice(made, _ALONE)), dict(made)
        with self._program(case, accounts) as process:
            async with Channels.watched(self._session) as channels:
                await self._one_by_one(channels, {**warm_up, **alone})
                create, created_rss = await self._create(channels, batch, process)
                sample = list(islice(batch, _SAMPLE))
                idle_writes = await self._idle_writes(channels, sample) if case.variant == "ours" else None
                delete, deleted_rss = await self._delete(channels, batch, process)
        await sweep(self._session)
        return Run(
            case=case.name,
            round=number,
            code=code if case.code() == code else f"{code} and later",
            create=create,
            delete=delete,
            alone_ready=tuple(channels.ready[name] - channels.created[name] for name in alone),
            alone_gone=tuple(channels.gone[name] - channels.deleted[name] for name in alone),
            max_rss=max(created_rss, deleted_rss),
            idle_writes=idle_writes,
        )

    async def _one_by_one(self, channels: Channels, made: Mapping[str, bytes]) -> None:
        """Create channels one after another, then delete them so."""
        for name, manifest in made.items():
            await channels.create({name: manifest})
            await channels.until(channels.ready, [name])
        for name in made:
            await channels.delete([name])
            await channels.until(channels.gone, [name])

    async def _create(
        self, channels: Channels, batch: Mapping[str, bytes], process: psutil.Process
    ) -> tuple[Phase, int]:
        """Create a batch and wait until it is Ready. Return what that took, and the most memory."""
        async with counted(self._stack, self._session, process) as spent:
            await channels.create(batch)
            last = await channels.until(channels.ready, batch)
        spent.kubernetes_calls["POST smschannels"] -= len(batch)
        times = tuple(channels.ready[name] - channels.created[name] for name in batch)
        return _phase(spent, last - channels.created[next(iter(batch))], times), spent.processes.max_rss

    async def _delete(
        self, channels: Channels, batch: Mapping[str, bytes], process: psutil.Process
    ) -> tuple[Phase, int]:
        """Delete a batch and wait until it is gone. Return what that took, and the most memory."""
        async with counted(self._stack, self._session, process) as spent:
            await channels.delete(batch)
            last = await channels.until(channels.gone, batch)
        spent.kubernetes_calls["DELETE smschannels"] -= len(batch)
        times = tuple(channels.gone[name] - channels.deleted[name] for name in batch)
        return _phase(spent, last - channels.deleted[next(iter(batch))], times), spent.processes.max_rss

    def _new_accounts(self) -> list[dict[str, Any]]:
        """Make accounts with enough numbers: those of the runs before still point where they were pointed."""
        count = self._load.channels + _WARM_UP + _ALONE
        new = {"accounts": self._load.accounts, "numbers": -(-count // self._load.accounts)}
        made: list[dict[str, Any]] = self._stack.twin_call("POST", "/seed", new)["accounts"]
        return made

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
    def _program(self, case: Case, accounts: Sequence[Mapping[str, Any]]) -> Iterator[psutil.Process]:
        stack, workers = self._stack, str(self._load.workers)
        if case.variant == "ours":
            settings = {"SMSCHANNEL_WORKERS": workers, "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "86400"}
            if case.source:
                settings["PYTHONPATH"] = str(case.source)
            with operator(stack, settings) as process:
                yield process
            return
        command = [sys.executable, "-m", f"tests.bench.{case.variant}", workers]
        # As an administrator: the others hold no Lease, which the fence asks of the operator's ServiceAccount.
        kubeconfig = stack.cluster.kubeconfig
        if case.variant == "peer":
            tokens = stack.home / "peer-tokens.json"
            tokens.write_text(json.dumps({each["account_sid"]: each["auth_token"] for each in accounts}))
            command = [str(gopeer.PEER.ensure(self._progress)), "-workers", workers, "-accounts", str(tokens)]
            command += ["-twilio-url", stack.twilio_url]
        with (stack.logs / f"{case.variant}.log").open("ab") as log:
            program = subprocess.Popen(
                command,
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
        _, trial = next(manifests(self._public, self._new_accounts(), random.Random(0)))  # noqa: S311
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
    """What a block spent: CPU time and memory, Kubernetes calls by "VERB resource", Twilio calls by "METHOD kind"."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.kubernetes_calls: Counter[str] = Counter()
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
    before, calls = await kubernetes_calls(session), await twilio_calls(session, stack.twilio_url)
    async with processes:
        yield spent
    await settled_writes(session)
    spent.kubernetes_calls = await kubernetes_calls(session)
    spent.kubernetes_calls.subtract(before)
    spent.twilio_calls = await twilio_calls(session, stack.twilio_url)
    spent.twilio_calls.subtract(calls)


def _phase(spent: Counted, seconds: float, times: tuple[float, ...]) -> Phase:
    return Phase(
        seconds=seconds,
        times=times,
        kubernetes_calls=_each(spent.kubernetes_calls, len(times)),
        twilio_calls=_each(spent.twilio_calls, len(times)),
        cpu_seconds=spent.processes.cpu_seconds,
        elsewhere=spent.processes.elsewhere,
    )


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
