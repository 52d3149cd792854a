"""What the controller knows of each channel without asking the API server. Losing all of it costs one reconcile each.

An event only says which name to look at. A body is used only if it is the newest of the same uid that is known of:
events of different uids come in any order, and an event may be older than our own last write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from smschannel.api.reasons import Reason
from smschannel.api.resource import CHECK_NOW_ANNOTATION, FINALIZER
from smschannel.api.status import reason_of
from smschannel.core.claims import Claims, is_swap
from smschannel.core.record import Key, Record

Body = Mapping[str, Any]


class Trigger(NamedTuple):
    """What of a channel makes a reconcile necessary when it changes. Our own writes change none of it."""

    generation: int
    deleting: bool
    check_now: str | None

    @classmethod
    def of(cls, body: Body) -> Trigger:
        meta = body["metadata"]
        check_now = (meta.get("annotations") or {}).get(CHECK_NOW_ANNOTATION)
        return cls(meta.get("generation", 0), "deletionTimestamp" in meta, check_now)


@dataclass(slots=True)
class CachedChannel:
    """`body` is kept only between an event and the reconcile that it causes, and None if it must be read.

    `last_reconciled` is the trigger that a reconcile has seen; `unseen` the resourceVersion of our last write while no
    event has shown it; `awaited` the SID of the number that the channel waits for.
    """

    uid: str
    created: str
    version: str = ""
    account_sid: str = ""
    phone_number: str = ""
    secret: str = ""
    deleting: bool = False
    finalizer: bool = False
    body: Body | None = None
    last_reconciled: Trigger | None = None
    unseen: str = ""
    awaited: str = ""
    reason: Reason | None = None


class ChannelCache:
    """All channels of the watched namespaces, which Secrets they use, and for which numbers they wait.

    `reasons` counts the channels by the reason that Ready carries.
    """

    def __init__(self, claims: Claims) -> None:
        self.reasons: Counter[Reason] = Counter()
        self._claims = claims
        self._channels: dict[Key, CachedChannel] = {}
        self._secret_users: dict[Key, set[Key]] = {}
        self._waiters: dict[str, set[Key]] = {}

    def __len__(self) -> int:
        return len(self._channels)

    def __iter__(self) -> Iterator[tuple[Key, CachedChannel]]:
        return iter(tuple(self._channels.items()))

    def get(self, key: Key) -> CachedChannel | None:
        return self._channels.get(key)

    def put(self, body: Body) -> CachedChannel:
        """Take in the newest body of a name: one that was just read, or the first of its uid that is known of."""
        meta = body["metadata"]
        key, uid = key_of(body), meta["uid"]
        cached = self._channels.get(key)
        if cached is None or cached.uid != uid:
            self.remove(key)
            cached = self._channels[key] = CachedChannel(uid, meta["creationTimestamp"])
            self.set_reason(key, reason_of(body.get("status") or {}))
        self._update(key, cached, body)
        cached.unseen = ""
        return cached

    def observe(self, body: Body) -> bool:
        """Take in an event's body; whether it calls for a reconcile."""
        key, version = key_of(body), body["metadata"]["resourceVersion"]
        cached = self._channels.get(key)
        if cached is None:
            cached = self.put(body)
        elif cached.uid != body["metadata"]["uid"]:
            cached.body = None  # which of the two is newer is not known: the API server is asked
            return True
        else:
            self._update(key, cached, body)
            if cached.unseen == version:
                cached.unseen = ""
        if cached.last_reconciled == Trigger.of(body):
            return False
        cached.body = None if cached.unseen else body
        return True

    def _update(self, key: Key, cached: CachedChannel, body: Body) -> None:
        meta, spec = body["metadata"], body["spec"]
        cached.version = meta["resourceVersion"]
        cached.account_sid, cached.phone_number = str(spec.get("accountSid")), str(spec.get("phoneNumber"))
        cached.deleting = "deletionTimestamp" in meta
        finalizer = FINALIZER in meta.get("finalizers", ())
        if cached.finalizer and not finalizer:
            cached.last_reconciled = None  # it was removed: it must be added again
        cached.finalizer = finalizer
        secret = secret_name(body)
        if secret != cached.secret:
            _discard(self._secret_users, Key(key.namespace, cached.secret), key)
            cached.secret = secret
            if secret:
                self._secret_users.setdefault(Key(key.namespace, secret), set()).add(key)

    def written(self, body: Body) -> None:
        """The operator wrote the channel. Until an event shows that write, bodies from events may be older."""
        cached, version = self._channels.get(key_of(body)), body["metadata"]["resourceVersion"]
        if cached and cached.uid == body["metadata"]["uid"] and cached.version != version:
            cached.unseen = version

    def remove(self, key: Key) -> None:
        cached = self._channels.get(key)
        if cached:
            self.set_reason(key, None)
            self.set_awaited(key, "")
            _discard(self._secret_users, Key(key.namespace, cached.secret), key)
            del self._channels[key]

    def set_reason(self, key: Key, reason: Reason | None) -> None:
        """Keep count of the reasons that Ready carries."""
        if cached := self._channels.get(key):
            for each, step in ((cached.reason, -1), (reason, 1)):
                if each:
                    self.reasons[each] += step
            cached.reason = reason

    def set_awaited(self, key: Key, number_sid: str) -> None:
        """Only a channel that is there waits; an empty SID means that it waits no longer."""
        if cached := self._channels.get(key):
            _discard(self._waiters, cached.awaited, key)
            cached.awaited = number_sid
            if number_sid:
                self._waiters.setdefault(number_sid, set()).add(key)

    def waiters(self, number_sid: str) -> list[Key]:
        """The channels that wait for a number, the oldest first."""
        return sorted(self._waiters.get(number_sid, ()), key=self._age)

    def is_swap(self, key: Key) -> bool:
        """Whether this channel and the holder of the number that it waits for wait for each other."""
        return is_swap(key, awaited=self._awaited, holder=self._holder, first_waiter=self._first_waiter)

    def _awaited(self, key: Key) -> str:
        cached = self._channels.get(key)
        return cached.awaited if cached else ""

    def _holder(self, number_sid: str) -> Key | None:
        record = self._claims.holder(number_sid)
        return record.key if record and self.is_holder_alive(record) else None

    def _first_waiter(self, number_sid: str) -> Key | None:
        return next(iter(self.waiters(number_sid)), None)

    def is_holder_alive(self, record: Record) -> bool:
        cached = self._channels.get(record.key)
        return cached is not None and cached.uid == record.uid

    def pending_restores(self) -> int:
        """How many numbers are held by a record although no channel wants them any more."""
        return sum(not self._is_wanted(record) for record in self._claims)

    def _is_wanted(self, record: Record) -> bool:
        cached = self._channels.get(record.key)
        return (
            cached is not None
            and cached.uid == record.uid
            and not cached.deleting
            and cached.phone_number == record.phone_number
        )

    def users_of(self, secret: Key) -> tuple[Key, ...]:
        return tuple(self._secret_users.get(secret, ()))

    def _age(self, key: Key) -> tuple[str, str]:
        cached = self._channels[key]
        return cached.created, cached.uid


def key_of(body: Body) -> Key:
    return Key(body["metadata"]["namespace"], body["metadata"]["name"])


def secret_name(body: Body) -> str:
    """The Secret that the channel's token is read from, empty if it is sealed."""
    return str((body["spec"].get("credentials") or {}).get("secretKeyRef", {}).get("name", ""))


def _discard(index: dict[Any, set[Key]], entry: object, key: Key) -> None:
    if entry in index:
        index[entry].discard(key)
        if not index[entry]:
            del index[entry]
