"""Finds records whose channel is gone, and proves it before anything is restored.

A channel is gone if the API server answers a GET with a Status 404 that names it, or with an object of another uid.
One incomplete list or one gateway's 404 must not restore the numbers of living channels, so besides:

- what the list at start lacks is checked by two GETs, some seconds apart;
- if many channels are missing from one list at once, the next list must agree;
- a CRD counts as deleted if API discovery lacks it twice in a row: at two resyncs, or at a start that has waited for
  it for a resync interval.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import structlog

from smschannel.api.errors import NoKindMatch
from smschannel.api.kube_client import Object
from smschannel.core.record import Key, Record

log = structlog.get_logger()

SECOND_LOOK_SECONDS = 5.0
# More channels than both of these, missing from one list, are "many": a number, and a fraction of all channels.
_MANY = 10
_MANY_FRACTION = 0.1


class Kube(Protocol):
    """The calls of `KubeStore` that the proof needs."""

    async def channel(self, namespace: str, name: str) -> Object | None: ...
    async def is_crd_absent(self) -> bool: ...


class Orphans:
    """Decides which records are orphans, with the rules above. `clock` returns monotonic seconds."""

    def __init__(self, kube: Kube, clock: Callable[[], float]) -> None:
        self._kube = kube
        self._clock = clock
        self._suspects: dict[str, float | None] = {}  # uids that need two checks, and when the first one was
        self._missing_before: frozenset[Key] = frozenset()
        self._absent_in_a_row = 0

    @property
    def is_crd_gone(self) -> bool:
        """Return whether it is proven that the CRD was deleted."""
        return self._absent_in_a_row > 1

    async def is_gone(self, record: Record) -> bool:
        """Return whether it is proven that the channel which holds this record no longer exists."""
        if not record.name or not record.uid:
            return False  # damaged metadata: its channel is unknown
        try:
            body = await self._kube.channel(record.namespace, record.name)
        except NoKindMatch:
            return self.is_crd_gone
        if body is not None and body["metadata"]["uid"] == record.uid:
            self._suspects.pop(record.uid, None)
            return False
        if record.uid not in self._suspects:
            return True
        # Only the list at start lacks the channel: this answer is the first or the second of two.
        first, now = self._suspects[record.uid], self._clock()
        if first is not None and now - first >= SECOND_LOOK_SECONDS:
            del self._suspects[record.uid]
            return True
        self._suspects[record.uid] = now if first is None else first
        return False

    def require_two_looks(self, uids: Iterable[str]) -> None:
        """Make `is_gone` check these uids twice, `SECOND_LOOK_SECONDS` apart: only the list at start lacks them."""
        self._suspects.update(dict.fromkeys(uids))

    def forget_others(self, uids: Collection[str]) -> None:
        """Forget the channels that have no record any more; `uids` are those that have."""
        self._suspects = {uid: first for uid, first in self._suspects.items() if uid in uids}

    def confirm(self, missing: Collection[Key], known: int) -> frozenset[Key]:
        """Return which of the `missing` keys may be reconciled now: none that only one list lacks, if they are many.

        `known` is the number of all cached channels, or of all records at start.
        """
        many = len(missing) > max(_MANY, known * _MANY_FRACTION)
        now = frozenset(missing)
        confirmed = now & self._missing_before if many else now
        self._missing_before = now
        if len(confirmed) < len(now):
            log.warning("many channels are missing from a list, waiting for the next one", missing=len(now))
        return confirmed

    async def look_for_crd(self) -> bool:
        """Ask API discovery once more. Return whether it is proven by now that the CRD was deleted."""
        self._absent_in_a_row = self._absent_in_a_row + 1 if await self._kube.is_crd_absent() else 0
        return self.is_crd_gone

    def crd_is_there(self) -> None:
        """Note that a list succeeded, so the CRD is installed."""
        self._absent_in_a_row = 0
