"""Read counters: the API server's requests, the twin's calls, the operator's metrics, CPU time and memory."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Mapping

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.case import is_read

_SAMPLE = re.compile(r"^apiserver_request_total\{(?P<labels>.*)\} (?P<count>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_WRITES = {"POST", "PUT", "PATCH", "APPLY", "DELETE"}
_READS = {"GET", "LIST"}
_READ = {"secrets", "smschannels"}
_NOT_OURS = {
    "leases",
    "flowschemas",
    "prioritylevelconfigurations",
    "tokenreviews",
    "subjectaccessreviews",
    "selfsubjectreviews",
}


async def kubernetes_calls(session: aiohttp.ClientSession) -> Counter[str]:
    """Return the number of calls that the API server received, refused ones included, by "VERB resource".

    Watches are left out, and of the reads all that are not of channels or Secrets.
    """
    async with session.get("/metrics") as answer:
        exposition = await answer.text()
    counted: Counter[str] = Counter()
    for sample in _SAMPLE.finditer(exposition):
        labels = dict(_LABEL.findall(sample["labels"]))
        verb, resource = labels["verb"], labels["resource"]
        is_write = verb in _WRITES and resource not in _NOT_OURS and not labels["dry_run"]
        if is_write or (verb in _READS and resource in _READ):
            resource = "/".join(part for part in (resource, labels["subresource"]) if part)
            counted[f"{verb} {resource}"] += int(float(sample["count"]))
    return counted


async def writes(session: aiohttp.ClientSession) -> Counter[str]:
    """Return the number of writes among them."""
    calls = await kubernetes_calls(session)
    return Counter({call: count for call, count in calls.items() if not is_read(call)})


async def settled_writes(session: aiohttp.ClientSession) -> Counter[str]:
    """Return the same once there was no write for 0.4 seconds."""
    before = await writes(session)
    while True:
        await asyncio.sleep(0.4)
        now = await writes(session)
        if now == before:
            return now
        before = now


async def twilio_calls(session: aiohttp.ClientSession, twin: str) -> Counter[str]:
    """Return the number of calls that the twin received, by "METHOD kind"."""
    async with session.get(f"{twin}/_twin/journal", params={"kind": "none"}) as answer:
        return Counter((await answer.json())["counts"])


async def metric(session: aiohttp.ClientSession, operator: str, name: str) -> float:
    """Return the sum of one of the operator's metrics over all of its labels."""
    async with session.get(f"{operator}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


class Processes:
    """Measures the CPU time and memory of our processes, and the CPU share of all others, during a `with` block."""

    def __init__(self, processes: Mapping[str, psutil.Process], subject: str) -> None:
        self._processes = processes
        self._subject = subject
        self.cpu_seconds: dict[str, float] = {}
        self.max_rss = 0
        self.elsewhere = 0.0

    async def __aenter__(self) -> Processes:
        self._before = self._spent()
        self._total, self._idle = _machine()
        self._sampling = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sampling.cancel()
        total, idle = _machine()
        spent = self._spent()
        self.cpu_seconds = {name: spent[name] - before for name, before in self._before.items()}
        busy = total - self._total - (idle - self._idle)
        self.elsewhere = max(0.0, busy - sum(self.cpu_seconds.values())) / (total - self._total)
        self._update_max_rss()

    def _spent(self) -> dict[str, float]:
        return {name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()}

    async def _sample(self) -> None:
        while True:
            self._update_max_rss()
            await asyncio.sleep(0.1)

    def _update_max_rss(self) -> None:
        self.max_rss = max(self.max_rss, self._processes[self._subject].memory_info().rss)


def _machine() -> tuple[float, float]:
    """Return the CPU seconds of all cores since boot, and how many of them were idle."""
    times = psutil.cpu_times()
    return sum(times) - times.guest - times.guest_nice, times.idle + times.iowait
