"""The load generator: creates channels as fast as they are taken, and sees when they are Ready, and gone."""

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
from smschannel.api.names import KEYRING_SECRET
from smschannel.api.resource import API_VERSION, CHECK_NOW_ANNOTATION

PATH = f"/apis/{API_VERSION}/namespaces/{CHANNELS}/smschannels"
RECORDS = f"/api/v1/namespaces/{OPERATOR}/secrets"
_IN_FLIGHT = 32
# The API server writes the keys of a custom resource in alphabetical order.
_READY = b'"status":"True","type":"Ready"'


class LoadError(Exception):
    """The load could not be made, or its end did not come."""


@asynccontextmanager
async def connect(kubeconfig: str | Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A bare session with the API server: for `write_kubeconfig`'s files, which have everything inline."""
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
    """The channels' watch events after `version`, or from "" with what is there already.

    The API server may cut off a watcher that is slow for a moment: it goes on where it was.
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


async def version_of(session: aiohttp.ClientSession) -> str:
    """From which to watch a namespace that is empty."""
    async with session.get(PATH, params={"limit": "1"}) as answer:
        page = await answer.json()
    if page["items"]:
        raise LoadError("there are channels of an earlier run")
    version: str = page["metadata"]["resourceVersion"]
    return version


class Channels:
    """What one watch has seen of the channels, by name: when each became Ready, and when it was gone."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.created: dict[str, float] = {}
        self.ready: dict[str, float] = {}
        self.gone: dict[str, float] = {}
        self._seen = asyncio.Event()
        self._watching: asyncio.Task[None]

    @classmethod
    @asynccontextmanager
    async def watched(cls, session: aiohttp.ClientSession) -> AsyncIterator[Channels]:
        """From an empty namespace on."""
        channels = cls(session)
        version = await version_of(session)
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
                self._seen.set()
        finally:
            self._seen.set()

    async def create(self, manifests: Mapping[str, bytes]) -> None:
        """Manifests by name, as the JSON that is sent."""

        async def one(name: str) -> None:
            self.created[name] = perf_counter()
            await _send(self._session, "POST", PATH, manifests[name])

        await _in_flight(one, manifests)

    async def look_again(self, names: Iterable[str]) -> None:
        """Ask for a look at each, as a person would: by the annotation."""
        body = json.dumps({"metadata": {"annotations": {CHECK_NOW_ANNOTATION: str(perf_counter())}}}).encode()
        await _in_flight(lambda name: _send(self._session, "PATCH", f"{PATH}/{name}", body), names)

    async def delete(self, names: Iterable[str]) -> None:
        await _in_flight(lambda name: _send(self._session, "DELETE", f"{PATH}/{name}"), names)

    async def until(self, seen: Mapping[str, float], names: Iterable[str], seconds: float = 120) -> float:
        """When the last of `names` was in `seen`, which is `ready` or `gone`."""
        names = frozenset(names)
        try:
            async with asyncio.timeout(seconds):
                while not names <= seen.keys():
                    self._seen.clear()
                    await self._seen.wait()
                    if self._watching.done():
                        self._watching.result()
        except TimeoutError:
            left = sorted(names - seen.keys())
            raise LoadError(f"after {seconds:.0f} s {len(left)} of {len(names)} are missing, as {left[0]}") from None
        return max(seen[name] for name in names)


async def sweep(session: aiohttp.ClientSession) -> None:
    """Remove all channels and records, with nobody there who would mind. Twilio is left as it is."""
    async with session.get(PATH) as answer:
        left = [each["metadata"]["name"] for each in (await answer.json())["items"]]
    let_go = json.dumps({"metadata": {"finalizers": None}}).encode()
    await _in_flight(lambda name: _send(session, "PATCH", f"{PATH}/{name}", let_go), left)
    await _send(session, "DELETE", PATH)
    await _send(session, "DELETE", f"{RECORDS}?fieldSelector=metadata.name!={KEYRING_SECRET}")


async def _send(session: aiohttp.ClientSession, method: str, path: str, body: bytes | None = None) -> None:
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    async with session.request(method, path, data=body, headers={"Content-Type": kind}) as answer:
        if answer.status >= 300:
            raise LoadError(f"{method} {path}: {await answer.text()}")
        await answer.read()


def _name(line: bytes) -> str:
    name: str = json.loads(line)["object"]["metadata"]["name"]
    return name


async def _in_flight(call: Callable[[str], Awaitable[Any]], names: Iterable[str]) -> None:
    each = iter(names)

    async def one_after_another() -> None:
        for name in each:
            await call(name)

    await asyncio.gather(*(one_after_another() for _ in range(_IN_FLIGHT)))
