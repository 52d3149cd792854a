"""Attack a shim on loopback, and print its memory and what another client sees meanwhile; then the operator's memory.

Every attack on the shim has a fixed number of connections and ends after seconds. The attackers use several addresses
of 127.0.0.0/8 where the limit for one address would end the attack before it begins.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import statistics
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import aiohttp
import click
import psutil

from tests.exhaustion import operator
from tests.unit.test_shim_kubernetes import CALL, INSTANCE, Kubernetes

ROOT = Path(__file__).parents[2]
_KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "fake",
    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "nobody"}}],
    "users": [{"name": "nobody", "user": {}}],
}
Writers = list[asyncio.StreamWriter]


@dataclass(frozen=True)
class Result:
    """`grown` is the most that the shim's memory grew, and `open_after` the connections open at the end."""

    name: str
    connections: int
    grown: float
    left: float
    open_after: int
    p50: float
    p99: float
    answers: Counter[str]


class Shim:
    """A shim in a process of its own; `victim` and `attacker` are API keys for all instances."""

    def __init__(self, port: int, process: psutil.Process, victim: str, attacker: str) -> None:
        self.port = port
        self.process = process
        self.victim = victim
        self.attacker = attacker

    def megabytes(self) -> float:
        return float(self.process.memory_info().rss) / 2**20

    def connections(self, clients: set[tuple[str, int]]) -> int:
        """Return how many connections of these clients the shim has open."""
        return sum(tuple(each.raddr) in clients for each in self.process.net_connections("tcp") if each.raddr)


@asynccontextmanager
async def running(port: int, directory: Path) -> AsyncIterator[Shim]:
    kubernetes = Kubernetes()
    async with kubernetes.running():
        victim, attacker = kubernetes.make_key(), kubernetes.make_key(verbs=["post"], instances=[INSTANCE])
        cluster = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{kubernetes.port}"}}
        kubeconfig = directory / "kubeconfig"
        kubeconfig.write_text(json.dumps({**_KUBECONFIG, "clusters": [cluster]}))
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "SMSSHIM_HTTP_PORT": str(port)}
        environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'operator'}", "SMSSHIM_LOG_LEVEL": "ERROR"}
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "api_shim", env=environment, cwd=ROOT)
        try:
            shim = Shim(port, psutil.Process(process.pid), victim, attacker)
            async with asyncio.timeout(30), aiohttp.ClientSession() as client:
                while not await _is_ready(client, port):  # noqa: ASYNC110  (there is no event to wait for)
                    await asyncio.sleep(0.1)
            yield shim
        finally:
            process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 30)
            if process.returncode is None:
                process.kill()


async def _is_ready(client: aiohttp.ClientSession, port: int) -> bool:
    with suppress(aiohttp.ClientError):
        async with client.get(f"http://127.0.0.1:{port}/readyz") as response:
            return response.status == 200
    return False


async def another_client(shim: Shim, seconds: float) -> tuple[list[float], Counter[str]]:
    """Send 20 requests a second with a key of its own; return the times of all and how they were answered."""
    times: list[float] = []
    answers: Counter[str] = Counter()

    async def one(client: aiohttp.ClientSession) -> None:
        start = perf_counter()
        try:
            async with client.get(CALL) as response:
                await response.read()
                answers[str(response.status)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            answers[type(error).__name__] += 1
        times.append(perf_counter() - start)

    timeout = aiohttp.ClientTimeout(total=15)
    base, headers = f"http://127.0.0.1:{shim.port}", {"X-Api-Key": shim.victim}
    async with aiohttp.ClientSession(base, headers=headers, timeout=timeout) as client, asyncio.TaskGroup() as group:
        for _ in range(int(seconds * 20)):
            group.create_task(one(client))
            await asyncio.sleep(0.05)
    return times, answers


async def connect(shim: Shim, number: int, addresses: int) -> Writers:
    """Open connections from some addresses of loopback; those that are refused are left out."""
    gate = asyncio.Semaphore(20)  # so that this program's own work does not delay the other client

    async def one(index: int) -> asyncio.StreamWriter | None:
        async with gate:
            await asyncio.sleep(0.01)
            with suppress(OSError, TimeoutError):
                local = (f"127.0.1.{index % addresses + 1}", 0)
                # A limit of one byte: the client stops reading at once, as an attacker does.
                _, writer = await asyncio.wait_for(
                    asyncio.open_connection("127.0.0.1", shim.port, local_addr=local, limit=1), 10
                )
                return writer
        return None

    return [each for each in await asyncio.gather(*map(one, range(number))) if each]


async def never_read(shim: Shim, path: str, pipelined: int) -> Writers:
    """Pipeline requests without authentication, and read no answer."""
    writers = await connect(shim, 300, 1)
    for writer in writers:
        with suppress(OSError):
            if isinstance(writer.transport, asyncio.Transport):
                writer.transport.pause_reading()
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * pipelined)
    return writers


async def unfinished_heads(shim: Shim) -> Writers:
    """Send nearly a megabyte of a head without authentication, and never its end."""
    writers = await connect(shim, 300, 1)
    for writer in writers:
        with suppress(OSError):
            writer.write(b"GET / HTTP/1.1\r\n" + b"".join(b"A%d: %s\r\n" % (each, b"x" * 7000) for each in range(120)))
    return writers


async def slow_bodies(shim: Shim) -> Writers:
    """Begin 2,100 POSTs with one valid key from ten addresses, and send no body."""
    writers = await connect(shim, 2100, 10)
    head = f"POST {CALL} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {shim.attacker}\r\nContent-Length: 100\r\n\r\n{{"
    for writer in writers:
        with suppress(OSError):
            writer.write(head.encode())
    return writers


ATTACKS: dict[str, Callable[[Shim], Awaitable[Writers]]] = {
    "300 unread connections, 400 x /docs": lambda shim: never_read(shim, "/docs", 400),
    "300 unread connections, 4,000 x /v1": lambda shim: never_read(shim, CALL, 4000),
    "300 heads of 840 KB without an end": unfinished_heads,
    "2,100 slow bodies of one API key": slow_bodies,
}


async def measure(name: str, attack: Callable[[Shim], Awaitable[Writers]], port: int, seconds: float) -> Result:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="smschannel-exhaustion-") as directory:
        async with running(port, Path(directory)) as shim:
            before = most = shim.megabytes()
            victim = asyncio.create_task(another_client(shim, seconds))
            await asyncio.sleep(0.5)
            writers = await attack(shim)
            clients = {each.get_extra_info("sockname") for each in writers}
            while not victim.done():
                most = max(most, shim.megabytes())
                await asyncio.sleep(0.2)
            times, answers = await victim
            still = await asyncio.to_thread(shim.connections, clients)
            left = shim.megabytes() - before
            for writer in writers:
                writer.transport.abort()
            p50, *_, p99 = (statistics.quantiles(times, n=100)[each] for each in (49, 98))
            return Result(name, len(writers), most - before, left, still, p50 * 1000, p99 * 1000, answers)


@click.command(context_settings={"show_default": True})
@click.argument("programs", metavar="[shim|operator]...", nargs=-1, type=click.Choice(["shim", "operator"]))
@click.option("--seconds", type=click.FloatRange(5, 60), default=15, help="How long each attack on the shim lasts.")
@click.option("--port", type=click.IntRange(1024, 65535), default=18081, help="The port of the shim on loopback.")
@click.option(
    "--operator",
    "checkout",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=ROOT,
    show_default="this one",
    help="The checkout whose operator is measured, to compare two (Linux only).",
)
def main(programs: tuple[str, ...], seconds: float, port: int, checkout: Path) -> None:
    """Measure what hostile clients cost the REST shim and its other clients, and large objects the operator."""
    if "shim" in programs or not programs:
        attack_shim(seconds, port)
    if "operator" in programs or not programs:
        click.echo(f"{'objects of tenants':<42}{'peak memory of the operator':>28}")
        for peak in operator.measure(checkout.resolve()):
            click.echo(f"{peak.name:<42}{peak.peak:>25.0f} MB")


def attack_shim(seconds: float, port: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard == resource.RLIM_INFINITY else min(hard, 65536), hard))
    click.echo(f"{'attack':<38}{'memory':>10}{'at end':>10}{'open':>7}{'others p50':>12}{'p99':>10}  answers to others")
    for name, attack in ATTACKS.items():
        each = asyncio.run(measure(name, attack, port, seconds))
        answers = ", ".join(f"{status}: {count}" for status, count in sorted(each.answers.items()))
        click.echo(
            f"{each.name:<38}{each.grown:>+7.0f} MB{each.left:>+7.0f} MB{each.open_after:>7}"
            f"{each.p50:>9.0f} ms{each.p99:>7.0f} ms  {answers}"
        )


if __name__ == "__main__":
    main()
