"""Keeps the keyring up to date while this process leads: follows changes, renews the key, seals records again.

Nothing here touches Twilio. Each step may be interrupted and repeated: a key is stored before it is published, and a
record is replaced only if it is still what was read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta

import structlog

from smschannel import metrics
from smschannel.api.errors import ChannelError, Conflict, KubernetesRefused, NotFound, Unreadable
from smschannel.core.record import Key, Record
from smschannel.kube_store import KubeStore

log = structlog.get_logger()

CHECK_SECONDS = 15.0
"""How often the keyring is read. What `kubectl sms keys` changes takes effect within this time."""
_RESEAL_PAUSE = 0.2  # seconds between two records, so that 10,000 take half an hour
_RESEALS_PER_CHECK = 75
_WRITTEN_OFF_INTERVAL = timedelta(minutes=10)


class Rotation:
    """The care for the keyring of one process. `renewal` is how old the newest key may get; 0: it is never renewed.

    `interval` is how often the keyring is checked, in seconds. `on_readable` is called with each key whose token or
    record lacked a key, when keys were added.
    """

    def __init__(
        self, kube: KubeStore, *, renewal: timedelta, clock: Callable[[], datetime], interval: float = CHECK_SECONDS
    ) -> None:
        self.on_readable: Callable[[Key], object] = lambda key: None
        self._kube = kube
        self._renewal = renewal
        self._clock = clock
        self._interval = interval
        self._fingerprints: tuple[str, ...] = ()
        self._closed: set[tuple[str, str]] = set()  # records that this keyring does not open, by Secret and version
        self._written_off_due: datetime | None = None

    async def run(self) -> None:
        """Check the keyring regularly until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.step()
            except Conflict:
                log.info("keyring was changed meanwhile, reading it again")  # by another shard or kubectl sms
            except ChannelError as error:
                log.warning("cannot check keyring", error=str(error))
            except Exception:
                log.exception("cannot check keyring")

    async def step(self) -> None:
        """Follow the keyring, seal some records again, and renew the key if that is due. Raises Kubernetes' errors.

        What was restored is used first, also if the Secret cannot be written.
        """
        await self._kube.follow_keyring()
        now, keys = self._clock(), self._kube.keys
        if set(keys.keyring.fingerprints) - set(self._fingerprints):
            for key in keys.take_lacking():
                self.on_readable(key)
        await self._reseal(now)
        await self._renew_if_due(now)

    async def _renew_if_due(self, now: datetime) -> None:
        keys = self._kube.keys
        due = None if keys.store.directory else keys.keyring.renewal_due(self._renewal)
        metrics.KEY_RENEWAL_DUE.set(due.timestamp() if due else 0)
        if due is None or now < due:
            return
        if keys.keyring.is_full:
            log.error("cannot renew the key: the keyring is full, retire keys", keys=len(keys.keyring))
            return
        await self._kube.renew_keyring(now)

    async def _reseal(self, now: datetime) -> None:
        keyring = self._kube.keys.keyring
        if keyring.fingerprints != self._fingerprints:
            self._fingerprints, self._closed, self._written_off_due = keyring.fingerprints, set(), now
        stale = self._stale_records()
        metrics.RECORDS_TO_RESEAL.set(len(stale))
        for record in stale[:_RESEALS_PER_CHECK]:
            await self._reseal_record(record)
            await asyncio.sleep(_RESEAL_PAUSE)
        if self._written_off_due and now >= self._written_off_due and len(keyring) > 1:
            async for copy in self._stale_copies():
                await self._reseal_record(copy)
                await asyncio.sleep(_RESEAL_PAUSE)
            self._written_off_due = now + _WRITTEN_OFF_INTERVAL
        metrics.RECORDS_TO_RESEAL.set(len(self._stale_records()))

    def _stale_records(self) -> list[Record]:
        """Return the records that another key than the newest opens. With one key only, none is: it opens all."""
        if len(self._fingerprints) == 1:
            return []
        return [each for each in self._kube.claims if self._is_stale(each)]

    def _is_stale(self, record: Record) -> bool:
        return record.sealed_with != self._fingerprints[-1] and (record.secret_name, record.version) not in self._closed

    async def _stale_copies(self) -> AsyncIterator[Record]:
        for copy in [each async for each in self._kube.written_off() if self._is_stale(each)][:_RESEALS_PER_CHECK]:
            yield copy

    async def _reseal_record(self, record: Record) -> None:
        try:
            if record.secret:
                await self._kube.reseal_written_off(record)
            elif opened := await self._kube.open_record(record):
                await self._kube.update_record(opened)
        except Unreadable:
            read = None if record.secret else self._kube.claims.holder(record.number_sid)
            self._closed.add((record.secret_name, (read or record).version))  # its channel reports that
        except KubernetesRefused as error:  # it was made immutable, for example: the others are sealed all the same
            log.warning("cannot seal record again", name=record.secret_name, error=str(error))
            self._closed.add((record.secret_name, record.version))
        except (Conflict, NotFound):
            pass  # somebody else wrote it: if it is still stale, the next check sees that
