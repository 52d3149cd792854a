"""The shim as a process: start, draining and exit."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

import aiohttp
import pytest

from deploy.local.stack import free_port
from tests.unit.test_shim_kubernetes import CALL, Kubernetes, status, until

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def started(
    kubernetes: Kubernetes, home: Path, drain_seconds: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, aiohttp.ClientSession]]:
    """A ready shim, and a client whose key allows everything."""
    kubeconfig = home / "kubeconfig"
    kubeconfig.write_text(
        f"{{clusters: [{{name: a, cluster: {{server: 'http://127.0.0.1:{kubernetes.port}'}}}}], current-context: a,"
        " users: [{name: a, user: {token: x}}], contexts: [{name: a, context: {cluster: a, user: a}}]}"
    )
    port = free_port()
    settings = {"KUBECONFIG": str(kubeconfig), "SMSSHIM_HTTP_PORT": f"{port}", "SMSSHIM_DRAIN_SECONDS": drain_seconds}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "api_shim"), cwd=ROOT, env={**os.environ, **settings}, stderr=asyncio.subprocess.DEVNULL
    )
    headers = {"X-Api-Key": kubernetes.make_key()}
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers) as client:
            async with asyncio.timeout(20):
                while True:
                    try:
                        await until(client, "/readyz", 200)
                        break
                    except aiohttp.ClientConnectorError:
                        await asyncio.sleep(0.05)
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def kubernetes() -> AsyncIterator[Kubernetes]:
    stand_in = Kubernetes()
    async with stand_in.running():
        yield stand_in


async def test_sigterm_drains_before_exit(kubernetes: Kubernetes, tmp_path: Path) -> None:
    """It is not ready at once, so that proxies stop sending requests, and answers those sent until they notice."""
    async with started(kubernetes, tmp_path, "1") as (process, client):
        start = perf_counter()
        process.send_signal(signal.SIGTERM)
        await until(client, "/readyz", 503)
        assert await status(client, "GET", CALL) == 200, "new requests are still answered"
        assert await process.wait() == 0
        assert 0.9 < perf_counter() - start < 5


async def test_requests_in_flight_at_exit_are_answered(kubernetes: Kubernetes, tmp_path: Path) -> None:
    async with started(kubernetes, tmp_path, "0.2") as (process, client):
        kubernetes.delay = 1
        request_task = asyncio.create_task(status(client, "GET", CALL))
        await asyncio.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert await request_task == 200
        assert await process.wait() == 0


async def test_second_signal_ends_draining(kubernetes: Kubernetes, tmp_path: Path) -> None:
    async with started(kubernetes, tmp_path, "60") as (process, client):
        process.send_signal(signal.SIGTERM)
        await until(client, "/readyz", 503)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 5) == 0
