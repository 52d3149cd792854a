"""`/metrics`, `/healthz` and `/readyz` of the operator, and what `/healthz` is about.

Liveness is about this process only: what must go on begins again and again, and what has not begun for too long is dead
by a mistake that a restart repairs. Calls to an API server that is away fail, but they begin: no outage restarts it.
An event loop that is stuck answers nothing at all, which a probe takes for a failure, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest


@dataclass
class _Activity:
    last: float
    limit: float


class Heartbeats:
    """When each activity that must go on last began. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._activities: dict[str, _Activity] = {}

    def expect(self, name: str, limit: float) -> None:
        """Expect the activity to begin at least every `limit` seconds from now on."""
        self._activities[name] = _Activity(self._clock(), limit)

    def forget(self, name: str) -> None:
        """Expect the activity no longer."""
        self._activities.pop(name, None)

    def beat(self, name: str) -> None:
        """Note that the activity began. One that is not expected is ignored."""
        if activity := self._activities.get(name):
            activity.last = self._clock()

    def silent(self) -> list[str]:
        """Return the activities that have not begun for longer than their limits."""
        now = self._clock()
        return sorted(name for name, each in self._activities.items() if now - each.last > each.limit)

    def age(self) -> float:
        """Return the seconds since the activity began that has been silent for longest; 0 if none is expected."""
        return self._clock() - min((each.last for each in self._activities.values()), default=self._clock())


async def serve(host: str, port: int, ready: Callable[[], bool], silent: Callable[[], list[str]]) -> web.AppRunner:
    """Listen until the returned runner is cleaned up.

    `/readyz` answers 503 while `ready()` is false, and `/healthz` while `silent()` names what does not go on.
    """

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        if dead := silent():
            return web.Response(status=503, text=f"silent for too long: {', '.join(dead)}\n")
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(status=503, text="loading\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
