"""Benchmark of the REST API: GET and POST through the shim, compared with two baselines.

`python -m tests.bench.shim`, which is part `rest` of `make bench`. One control plane, the shim under its own
ServiceAccount as in `make up`, and no operator, which would use CPU time for every POST.

bare route   aiohttp answers a constant of the same size: the upper limit of a server of this kind
Kubernetes   the calls that the shim needs for the same answer, sent directly: GET for GET, GET and apply for POST
shim         through the REST API, with an API key

This process generates the load, over the given number of connections; each sends its next request as soon as it has an
answer. All processes share this machine's cores, so compare ratios, not machines.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import click
import psutil
import uvloop
from aiohttp import web
from rich.console import Console
from rich.table import Table

from deploy.build import BuildError, Narrator, Progress
from deploy.local.cluster import ControlPlaneError
from deploy.local.stack import ROOT, Options, Stack, StackError, free_port
from smschannel.api.kube_client import APPLY_PATCH
from smschannel.api.ownership import REST_LABELS
from smschannel.api.resource import API_VERSION, FINALIZER, KIND
from tests.bench import aims
from tests.bench.aims import Result, show_results
from tests.bench.gauges import Processes
from tests.bench.load import PATH, LoadError, connect

_WARM_UP_SECONDS = 0.5
_BUSY = 0.1  # the share of the CPU used by other programs above which the rates are unreliable
_REVIEWED_REQUESTS = 500
_BARE = "--serve-bare-route"
_ANSWER = json.dumps(
    {
        "enabled": True,
        "phone_number": "+61400111222",
        "status": "pending",
        "webhook_url": "https://sms.example.com/v1/instances/497f6eca-6276-4993-bfeb-53cbbbba6f08/channels/sms/webhook",
    }
)

Ask = Callable[[int], Awaitable[None]]
"""Send one request on the connection with this number; raises if it fails."""


@dataclass(frozen=True)
class Case:
    call: str
    against: str
    connections: int


@dataclass(frozen=True)
class Run:
    """One measurement. Latencies are in seconds; CPU times are per answer, `all` includes the load generator.

    `elsewhere` is the share of the CPU that other programs used.
    """

    case: Case
    per_second: float
    p50: float
    p99: float
    shim_cpu_milliseconds: float
    all_cpu_milliseconds: float
    elsewhere: float


@dataclass(frozen=True)
class Results:
    """All results. `reviews`: TokenReviews and SubjectAccessReviews of 500 GETs with one cached token. `rss_mb`: the
    shim's memory in the course of `requests` requests."""

    runs: list[Run]
    reviews: int
    rss_mb: list[float]
    requests: int


class Bench:
    """Builds the request functions of every case."""

    def __init__(self, stack: Stack, bare_port: int, kubernetes: aiohttp.ClientSession, instances: list[str]) -> None:
        self._stack = stack
        self._bare = f"http://127.0.0.1:{bare_port}/v1/instances"
        self._shim = f"{stack.api_url}/v1/instances"
        self._kubernetes = kubernetes
        self._instances = instances
        self.session: aiohttp.ClientSession

    def asking(self, case: Case, headers: dict[str, str] | None = None) -> Ask:
        """Return the function that a connection calls repeatedly. Each has its own instance, to avoid conflicts."""
        match case.call, case.against:
            case method, "bare route":
                return self._rest(self._bare, method, {})
            case method, "shim":
                return self._rest(self._shim, method, headers or {"X-Api-Key": self._stack.api_key})
            case "GET", "Kubernetes":
                return self._read
            case _:
                return self._read_and_apply

    def _rest(self, base: str, method: str, headers: dict[str, str]) -> Ask:
        twin = self._stack.twin
        setup = {"account_sid": twin["account_sid"], "auth_token": twin["auth_token"], "phone_number": "+61400111222"}
        body = json.dumps(setup).encode() if method == "POST" else None
        sent = {**headers, "Content-Type": "application/json"} if body else headers

        async def ask(number: int) -> None:
            url = f"{base}/{self._instances[number]}/channels/sms"
            async with self.session.request(method, url, data=body, headers=sent) as response:
                answer = await response.read()
                if response.status not in {200, 201}:
                    raise LoadError(f"{method} {base}: {response.status} {answer.decode()}")

        return ask

    async def _read(self, number: int) -> None:
        async with self._kubernetes.get(f"{PATH}/{self._instances[number]}") as response:
            await response.read()
            response.raise_for_status()

    async def _read_and_apply(self, number: int) -> None:
        name = self._instances[number]
        async with self._kubernetes.get(f"{PATH}/{name}") as response:
            meta = (await response.json())["metadata"]
            response.raise_for_status()
        precondition = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        body = json.dumps(applied(name, random.randbytes(3).hex(), precondition))  # noqa: S311
        options = {"fieldManager": "sms-api-shim"}
        headers = {"Content-Type": APPLY_PATCH}
        async with self._kubernetes.patch(f"{PATH}/{name}", params=options, data=body, headers=headers) as response:
            await response.read()
            response.raise_for_status()


def applied(name: str, change: str, precondition: dict[str, str] | None = None) -> Any:
    """Return an SmsChannel like the shim's, of the same size; `change` makes the token a different one."""
    meta = {"name": name, "labels": REST_LABELS, "finalizers": [FINALIZER], **(precondition or {})}
    credentials = {"sealed": "A" * 1600 + change}
    spec = {"accountSid": f"AC{'0' * 32}", "phoneNumber": "+61400111222", "credentials": credentials}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec}


async def drive(ask: Ask, connections: int, seconds: float) -> tuple[list[float], int]:
    """Return the sorted latencies of the answers within the measured time, and the number of all answers."""
    latencies: list[float] = []
    answers = 0
    counted_from = perf_counter() + _WARM_UP_SECONDS
    end = counted_from + seconds

    async def connection(number: int) -> None:
        nonlocal answers
        while (start := perf_counter()) < end:
            await ask(number)
            answers += 1
            now = perf_counter()
            if counted_from <= now <= end:
                latencies.append(now - start)

    async with asyncio.TaskGroup() as group:
        for number in range(connections):
            group.create_task(connection(number))
    if not latencies:
        raise LoadError("no answer arrived within the measured time: this machine is too busy, or --seconds too short")
    return sorted(latencies), answers


@asynccontextmanager
async def running(
    home: Path, connections: int, progress: Progress
) -> AsyncIterator[tuple[Bench, Stack, dict[str, int]]]:
    """Start everything and create a channel for every instance; yield the bench, the stack and the process IDs."""
    stack = Stack(home, Options(accounts=1, numbers=1), progress)
    bare_port = free_port()
    try:
        stack.logs.mkdir(parents=True)
        stack.start_control_plane()
        stack.install()
        stack.start_twin()
        stack.start_operator()  # publishes the sealing key
        stack.stop_process("operator")
        stack.start_shim()
        bare = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.shim", _BARE, str(bare_port)), cwd=ROOT
        )
        try:
            instances = [str(uuid.uuid4()) for _ in range(connections)]
            async with (
                connect(home / "sms-api-shim.kubeconfig") as kubernetes,
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            ):
                bench = Bench(stack, bare_port, kubernetes, instances)
                bench.session = session
                make = bench.asking(Case("POST", "shim", connections))
                for number in range(connections):
                    await make(number)
                pids = {name: pid for name, pid in stack.pids().items() if name != "twin"}
                yield bench, stack, {**pids, "bare": bare.pid, "load": psutil.Process().pid}
        finally:
            bare.terminate()
            await bare.wait()
    finally:
        stack.stop()


async def measure(bench: Bench, pids: dict[str, int], case: Case, seconds: float) -> Run:
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    async with Processes(processes, "shim") as gauges:
        latencies, answers = await drive(bench.asking(case), case.connections, seconds)
    return Run(
        case=case,
        per_second=len(latencies) / seconds,
        p50=latencies[len(latencies) // 2],
        p99=latencies[len(latencies) * 99 // 100],
        shim_cpu_milliseconds=gauges.cpu_seconds["shim"] / answers * 1000,
        all_cpu_milliseconds=sum(gauges.cpu_seconds.values()) / answers * 1000,
        elsewhere=gauges.elsewhere,
    )


async def reviews_of(bench: Bench, stack: Stack, kubernetes: aiohttp.ClientSession, requests: int) -> int:
    """Return the number of TokenReviews and SubjectAccessReviews that `requests` GETs with a cached token cause."""
    ask = bench.asking(Case("GET", "shim", 1), {"Authorization": f"Bearer {stack.api_token}"})
    await ask(0)
    before = await reviews(kubernetes)
    for _ in range(requests):
        await ask(0)
    return await reviews(kubernetes) - before


async def reviews(kubernetes: aiohttp.ClientSession) -> int:
    async with kubernetes.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    asked = [line for line in lines if line.startswith("apiserver_request_total{") and "reviews" in line]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in asked)


async def memory(bench: Bench, pids: dict[str, int], requests: int, progress: Progress) -> list[float]:
    """Return the shim's memory in MB: after a warm-up, and after each tenth of `requests`, half of them rejected."""
    process, connections = psutil.Process(pids["shim"]), 32
    right = bench.asking(Case("GET", "shim", connections))
    found = []

    async def refused(number: int) -> None:
        url = f"{bench._shim}/{uuid.uuid4()}/channels/sms"
        headers = {"X-Api-Key": f"smsch_{uuid.uuid4()}_x", "X-Request-Id": str(uuid.uuid4())}
        async with bench.session.get(url, headers=headers) as response:
            await response.read()

    for tenth in range(11):
        each = requests // 10 // connections // 2

        async def connection(number: int, times: int = each) -> None:
            for _ in range(times):
                await right(number)
                await refused(number)

        await asyncio.gather(*(connection(number) for number in range(connections)))
        found.append(process.memory_info().rss / 1e6)
        progress(f"memory after {tenth} tenths of {requests} requests: {found[-1]:.1f} MB")
    return found


def show(console: Console, results: Results) -> None:
    """Print the medians over the rounds."""
    runs = results.runs
    table = Table(title="REST")
    for column in (
        "",
        "per second",
        "p50",
        "p99",
        "x bare",
        "x Kubernetes",
        "by CPU",
        "CPU: all",
        "the shim",
        "others",
    ):
        table.add_column(column, justify="left" if not column else "right")
    medians = {case: [run for run in runs if run.case == case] for case in dict.fromkeys(run.case for run in runs)}

    def median(case: Case, field: str) -> float:
        return float(statistics.median(getattr(run, field) for run in medians[case]))

    for case in medians:
        rate = median(case, "per_second")
        ratios = ["", "", ""]
        if case.against == "shim":
            bare, kubernetes = (Case(case.call, other, case.connections) for other in ("bare route", "Kubernetes"))
            by_cpu = median(kubernetes, "all_cpu_milliseconds") / median(case, "all_cpu_milliseconds")
            rates = [rate / median(each, "per_second") for each in (bare, kubernetes)]
            ratios = [f"{ratio:.2f}" for ratio in (*rates, by_cpu)]
        table.add_row(
            f"{case.call} {case.against}, {case.connections} connections",
            f"{rate:.0f}",
            f"{median(case, 'p50') * 1000:.1f} ms",
            f"{median(case, 'p99') * 1000:.1f} ms",
            *ratios,
            f"{median(case, 'all_cpu_milliseconds'):.2f} ms",
            f"{median(case, 'shim_cpu_milliseconds'):.2f} ms" if case.against == "shim" else "",
            f"{median(case, 'elsewhere'):.0%}",
        )
    console.print(table)
    if any(run.elsewhere > _BUSY for run in runs):
        console.print("Other programs used the CPU: rely on the ratio by CPU time, not on the rates.")


def aims_of(results: Results) -> list[Result]:
    """Return the aims with their results. A ratio is that of the medians over the rounds."""

    def rate(case: Case) -> float:
        return statistics.median(run.per_second for run in results.runs if run.case == case)

    found = []
    for case in dict.fromkeys(run.case for run in results.runs if run.case.against == "shim"):
        ratio = rate(case) / rate(Case(case.call, "Kubernetes", case.connections))
        aim = aims.REST_GET if case.call == "GET" else aims.REST_POST
        found.append(Result(aim, ratio, f"{case.connections} connections"))
    found.append(Result(aims.REST_REVIEWS, results.reviews))
    if results.rss_mb:
        growth = results.rss_mb[-1] / results.rss_mb[0]
        found.append(Result(aims.REST_MEMORY, growth, f"{results.requests:,} requests"))
    return found


async def everything(
    home: Path,
    progress: Progress,
    *,
    connections: Sequence[int] = (32, 256),
    seconds: float = 4,
    rounds: int = 3,
    requests: int = 100_000,
) -> Results:
    async with running(home, max(*connections, 32), progress) as (bench, stack, pids):
        runs: list[Run] = []
        chance = random.Random(1)  # noqa: S311
        cases = [
            Case(call, against, each)
            for call in ("GET", "POST")
            for each in connections
            for against in ("bare route", "Kubernetes", "shim")
        ]
        for number in range(1, rounds + 1):
            for case in chance.sample(cases, len(cases)):
                runs.append(await measure(bench, pids, case, seconds))
                rate = f"{runs[-1].per_second:6.0f}/s"
                progress(f"round {number}  {case.call:<4} {case.against:<10} {case.connections:>4} connections {rate}")
        runs.sort(key=lambda run: cases.index(run.case))
        async with connect(stack.cluster.kubeconfig) as admin:
            reviews_sent = await reviews_of(bench, stack, admin, _REVIEWED_REQUESTS)
        return Results(runs, reviews_sent, await memory(bench, pids, requests, progress) if requests else [], requests)


async def serve_bare_route(port: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(text=_ANSWER, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/v1/instances/{instance}/channels/sms", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--connections", multiple=True, type=click.IntRange(1), default=(32, 256), help="May be repeated.")
@click.option("--seconds", type=click.FloatRange(0.5), default=4, help="For each measurement.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, help="How often everything is measured; the output has medians."
)
@click.option("--requests", type=int, default=100_000, help="Requests of the memory measurement; 0: skip it.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write every run to this file.")
@click.option(_BARE, "bare_port", type=int, hidden=True)
def main(
    connections: tuple[int, ...],
    seconds: float,
    rounds: int,
    requests: int,
    path: Path | None,
    bare_port: int | None,
) -> None:
    """Measure the REST API, compared with a bare aiohttp route and with the Kubernetes calls that it needs."""
    if bare_port:
        uvloop.run(serve_bare_route(bare_port))
        return
    with tempfile.TemporaryDirectory(prefix="smschannel-bench-") as home:
        progress = Narrator(sys.stderr)
        results = uvloop.run(
            everything(Path(home), progress, connections=connections, seconds=seconds, rounds=rounds, requests=requests)
        )
    console = Console(width=140)
    show(console, results)
    show_results(console, aims_of(results))
    if path:
        path.write_text(json.dumps(asdict(results), indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (BuildError, ControlPlaneError, LoadError, StackError) as error:
        sys.exit(f"\n{error}")
