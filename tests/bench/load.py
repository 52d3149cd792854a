"""The load generator: creates and deletes channels, and watches when they become Ready and when they are gone."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import yaml

from deploy.local.stack import CHANNELS, OPERATOR
from smschannel.api.resource import API_VERSION, CHECK_NOW_ANNOTATION
from smschannel.core.record import RECORD_LABEL

PATH = f"/apis/{API_VERSION}/namespaces/{CHANNELS}/smschannels"
RECORDS = f"/api/v1/namespaces/{OPERATOR}/secrets"
_IN_FLIGHT = 32
# The API server writes the keys of a custom resource in alphabetical order.
_READY = b'"status":"True","type":"Ready"'


class LoadError(Exception):
    """A request of the load generator failed, or channels did not become Ready or gone in time."""


@asynccontextmanager
async def connect(kubeconfig: str | Path) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session with the API server. The kubeconfig must have certificate and token inline."""
    content = yaml.safe_load(await asyncio.to_thread(Path(kubeconfig).read_text))
    cluster, user = content["clusters"][0]["cluster"], content["users"][0]["user"]
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    async with aiohttp.ClientSession(
        cluster["server"],
        connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=authority), limit=0, keepalive_timeout=60),
        headers={"Authorization": f"Bearer {user['token']}"},
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=2**21,  # a watch event is a line
    ) as session:
        yield session


async def events(session: aiohttp.ClientSession, version: str) -> AsyncIterator[bytes]:
    """Yield the channels' watch events after `version`; "" yields the existing channels first.

    A watch that the API server closes, for example because this client is slow, is resumed. Raises `LoadError`.
    """
    while True:
        query = {"watch": "true", **({"resourceVersion": version} if version else {})}
        line = b""
        async with session.get(PATH, params=query, timeout=aiohttp.ClientTimeout(total=None)) as answer:
            async for line in answer.content:
                if line.startswith(b'{"type":"ERROR"'):
                    raise LoadError(f"the watch broke: {line.decode()}")
                yield line
        if line:
            version = json.loads(line)["object"]["metadata"]["resourceVersion"]


async def version_of(session: aiohttp.ClientSession, *, empty: bool = True) -> str:
    """Return the resourceVersion to watch from. Raises `LoadError` if the namespace should be `empty` and is not."""
    async with session.get(PATH, params={"limit": "1"}) as answer:
        page = await answer.json()
    if page["items"] and empty:
        raise LoadError("there are channels of an earlier run")
    version: str = page["metadata"]["resourceVersion"]
    return version


class Channels:
    """When each channel was created, became Ready, was deleted and was gone, by name.

    `ready` and `gone` are as one watch shows it; `created` and `deleted` are the times of the requests.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.created: dict[str, float] = {}
        self.ready: dict[str, float] = {}
        self.deleted: dict[str, float] = {}
        self.gone: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None]

    @classmethod
    @asynccontextmanager
    async def watched(cls, session: aiohttp.ClientSession, *, empty: bool = True) -> AsyncIterator[Channels]:
        """Watch the namespace, which must be empty unless `empty` is False, during the block."""
        channels = cls(session)
        version = await version_of(session, empty=empty)
        channels._watching = asyncio.create_task(channels._watch(version))
        try:
            yield channels
        finally:
            channels._watching.cancel()
            await asyncio.gather(channels._watching, return_exceptions=True)

    async def _watch(self, version: str) -> None:
        try:
            async for line in events(self._session, version):
                now = perf_counter()
                if line.startswith(b'{"type":"DELETED"'):
                    self.gone[_name(line)] = now
                elif _READY in line:
                    self.ready.setdefault(_name(line), now)
                else:
                    continue
                self._changed.set()
        finally:
            self._changed.set()

    async def create(self, manifests: Mapping[str, bytes]) -> None:
        """Create channels from manifests, which are JSON, by name."""

        async def one(name: str) -> None:
            self.created[name] = perf_counter()
            await send(self._session, "POST", PATH, manifests[name])

        await in_flight(one, manifests)

    async def check_now(self, names: Iterable[str]) -> None:
        """Ask for a check of each channel, as users do, by the annotation."""
        body = json.dumps({"metadata": {"annotations": {CHECK_NOW_ANNOTATION: str(perf_counter())}}}).encode()
        await in_flight(lambda name: send(self._session, "PATCH", f"{PATH}/{name}", body), names)

    async def delete(self, names: Iterable[str]) -> None:
        async def one(name: str) -> None:
            self.deleted[name] = perf_counter()
            await send(self._session, "DELETE", f"{PATH}/{name}")

        await in_flight(one, names)

    async def until(self, times: Mapping[str, float], names: Iterable[str], seconds: float | None = None) -> float:
        """Wait until `times`, which is `ready` or `gone`, has all of `names`. Return the time of the last one.

        Raises `LoadError` after `seconds`; None: two minutes, and half a second for each, of which hundreds a second
        are usual.
        """
        names = frozenset(names)
        seconds = seconds or 120 + len(names) / 2
        try:
            async with asyncio.timeout(seconds):
                while not names <= times.keys():
                    self._changed.clear()
                    await self._changed.wait()
                    if self._watching.done():
                        self._watching.result()
        except TimeoutError:
            missing = sorted(names - times.keys())
            raise LoadError(
                f"after {seconds:.0f} s {len(missing)} of {len(names)} channels are missing, such as {missing[0]}"
            ) from None
        return max(times[name] for name in names)


async def sweep(session: aiohttp.ClientSession) -> None:
    """Delete all channels and records while no operator runs. Numbers at Twilio are not restored."""
    async with session.get(PATH) as answer:
        names = [each["metadata"]["name"] for each in (await answer.json())["items"]]
    no_finalizers = json.dumps({"metadata": {"finalizers": None}}).encode()
    await in_flight(lambda name: send(session, "PATCH", f"{PATH}/{name}", no_finalizers), names)
    await send(session, "DELETE", PATH)
    await send(session, "DELETE", f"{RECORDS}?labelSelector={RECORD_LABEL}")


async def send(session: aiohttp.ClientSession, method: str, path: str, body: bytes | None = None) -> bytes:
    """Send a request to the API server and return the answer's body. Raises `LoadError`."""
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    async with session.request(method, path, data=body, headers={"Content-Type": kind}) as answer:
        if answer.status >= 300:
            raise LoadError(f"{method} {path}: {await answer.text()}")
        return await answer.read()


def _name(line: bytes) -> str:
    name: str = json.loads(line)["object"]["metadata"]["name"]
    return name


async def in_flight(call: Callable[[str], Awaitable[Any]], names: Iterable[str]) -> None:
    """Call for each name, for at most 32 of them at a time."""
    each = iter(names)

    async def one_after_another() -> None:
        for name in each:
            await call(name)

    await asyncio.gather(*(one_after_another() for _ in range(_IN_FLIGHT)))
