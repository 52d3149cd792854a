"""The cache of all channels: an informer's store that keeps a few fields of each channel instead of its object.

The body of an event is cached only until the reconcile that it causes, and only if it is small and surely the newest:
an event may be older than what was read, or than our own last write. Otherwise the reconcile reads the channel. Losing
the cache costs one reconcile per channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic_core import to_json

from smschannel.api.reasons import Reason
from smschannel.api.resource import FINALIZER, TakeoverPolicy, trimmed
from smschannel.api.status import check_now, reason_of
from smschannel.core.claims import Claims, is_swap
from smschannel.core.record import Key, Record

Body = Mapping[str, Any]

_MAX_BODY = 16 * 2**10  # bytes of JSON


class Trigger(NamedTuple):
    """The fields of a channel whose change needs a reconcile (a predicate). Our own writes change none of them."""

    generation: int
    deleting: bool
    check_now: str

    @classmethod
    def of(cls, body: Body) -> Trigger:
        """Return the trigger of a channel as it is in `body`."""
        meta = body["metadata"]
        asked = check_now(meta.get("annotations") or {})
        return cls(meta.get("generation", 0), "deletionTimestamp" in meta, asked)


@dataclass(slots=True)
class CachedChannel:
    """One cached channel.

    `created` is its creationTimestamp, `version` its resourceVersion and `secret` the Secret with its token, empty if
    the token is sealed. `body` is the object of an event that was not reconciled yet; None means that it must be read.
    `last_reconciled` is the trigger of the last reconcile, and `reconciled_version` the resourceVersion that it read,
    or wrote since. `unseen` is the resourceVersion of our last write until an event shows it. `awaited` is the
    SID of the number that the channel waits for. `reason` is that of Ready. `secret_changed`: the Secret was written
    since the last reconcile. `is_check_only`: what changed since then, by the last event, is the request for a check;
    `check_due` is when the event loop's clock lets it begin, if it must wait.
    """

    uid: str
    created: str
    version: str = ""
    account_sid: str = ""
    phone_number: str = ""
    secret: str = ""
    deleting: bool = False
    takes_unused_only: bool = False
    finalizer: bool = False
    body: Body | None = None
    last_reconciled: Trigger | None = None
    reconciled_version: str = ""
    unseen: str = ""
    awaited: str = ""
    reason: Reason | None = None
    secret_changed: bool = False
    is_check_only: bool = False
    check_due: float = 0.0


class ChannelCache:
    """The channels of the watched namespaces, indexed by the Secrets that they use and the numbers that they wait for.

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
        """Cache the newest body of a name: one that was just read, or the first of its uid. Return its entry."""
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
        """Cache the body of an event. Return whether the channel needs a reconcile."""
        key, version = key_of(body), body["metadata"]["resourceVersion"]
        cached = self._channels.get(key)
        if cached is None:
            cached = self.put(body)
            if reason_of(body.get("status") or {}):
                return True  # not new: perhaps a late event of a channel that is gone, so the reconcile reads it
        elif cached.uid != body["metadata"]["uid"]:
            cached.body = None  # either may be the newer one: the reconcile reads it
            cached.is_check_only = False
            return True
        else:
            self._update(key, cached, body)
            if cached.unseen == version:
                cached.unseen = ""
        trigger, before = Trigger.of(body), cached.last_reconciled
        if before == trigger:
            return False
        cached.is_check_only = before is not None and before._replace(check_now=trigger.check_now) == trigger
        cached.body = None if cached.unseen else _small(body)
        return True

    def _update(self, key: Key, cached: CachedChannel, body: Body) -> None:
        meta, spec = body["metadata"], body["spec"]
        cached.version = meta["resourceVersion"]
        cached.account_sid, cached.phone_number = str(spec.get("accountSid")), str(spec.get("phoneNumber"))
        cached.deleting = "deletionTimestamp" in meta
        cached.takes_unused_only = spec.get("takeoverPolicy") == TakeoverPolicy.IF_UNUSED
        finalizer = FINALIZER in meta.get("finalizers", ())
        if cached.finalizer and not finalizer:
            cached.last_reconciled = None  # removed by others: a reconcile adds it again
        cached.finalizer = finalizer
        secret = secret_name(body)
        if secret != cached.secret:
            _discard(self._secret_users, Key(key.namespace, cached.secret), key)
            cached.secret = secret
            if secret:
                self._secret_users.setdefault(Key(key.namespace, secret), set()).add(key)

    def written(self, body: Body) -> None:
        """Note a write of the operator. Until an event shows it, bodies of events may be older and are not used."""
        cached, version = self._channels.get(key_of(body)), body["metadata"]["resourceVersion"]
        if cached is None or cached.uid != body["metadata"]["uid"]:
            return
        cached.reconciled_version = version
        if cached.version != version:
            cached.unseen = version
            cached.body = None  # an event that arrived during the write, and does not show it

    def remove(self, key: Key) -> None:
        """Remove a channel, if it is cached."""
        cached = self._channels.get(key)
        if cached:
            self.set_reason(key, None)
            self.set_awaited(key, "")
            _discard(self._secret_users, Key(key.namespace, cached.secret), key)
            del self._channels[key]

    def set_reason(self, key: Key, reason: Reason | None) -> None:
        """Set the reason of Ready and update `reasons`; None if the status has none, or the channel is removed."""
        if cached := self._channels.get(key):
            for each, step in ((cached.reason, -1), (reason, 1)):
                if each:
                    self.reasons[each] += step
            cached.reason = reason

    def set_awaited(self, key: Key, number_sid: str) -> None:
        """Set the number that a cached channel waits for; empty if it waits for none."""
        if cached := self._channels.get(key):
            _discard(self._waiters, cached.awaited, key)
            cached.awaited = number_sid
            if number_sid:
                self._waiters.setdefault(number_sid, set()).add(key)

    def waiters(self, number_sid: str) -> list[Key]:
        """Return the channels that wait for a number, the oldest first."""
        return sorted(self._waiters.get(number_sid, ()), key=self._age)

    def is_swap(self, key: Key) -> bool:
        """Return whether this channel and the holder of the number that it waits for wait for each other."""
        return is_swap(key, awaited=self._awaited, holder=self._holder, first_waiter=self._first_waiter)

    def _awaited(self, key: Key) -> str:
        """The number that a channel would take in a swap. With IfUnused it may refuse it when it is restored."""
        cached = self._channels.get(key)
        return cached.awaited if cached and not cached.takes_unused_only else ""

    def _holder(self, number_sid: str) -> Key | None:
        record = self._claims.holder(number_sid)
        return record.key if record and self.is_holder_alive(record) else None

    def _first_waiter(self, number_sid: str) -> Key | None:
        return next(iter(self.waiters(number_sid)), None)

    def is_holder_alive(self, record: Record) -> bool:
        """Return whether the channel that holds the record is cached."""
        cached = self._channels.get(record.key)
        return cached is not None and cached.uid == record.uid

    def pending_restores(self) -> int:
        """Count the records whose number no channel desires any more."""
        return sum(not self._is_desired(record) for record in self._claims)

    def _is_desired(self, record: Record) -> bool:
        cached = self._channels.get(record.key)
        return (
            cached is not None
            and cached.uid == record.uid
            and not cached.deleting
            and cached.phone_number == record.phone_number
        )

    def take_secret_changed(self, key: Key) -> bool:
        """Return whether a cached channel's Secret was written since this was asked last."""
        cached = self._channels.get(key)
        if cached is None or not cached.secret_changed:
            return False
        cached.secret_changed = False
        return True

    def users_of(self, secret: Key) -> tuple[Key, ...]:
        """Return the channels that read their token from a Secret."""
        return tuple(self._secret_users.get(secret, ()))

    def _age(self, key: Key) -> tuple[str, str]:
        cached = self._channels[key]
        return cached.created, cached.uid


def key_of(body: Body) -> Key:
    """Return namespace and name of an object."""
    return Key(body["metadata"]["namespace"], body["metadata"]["name"])


def secret_name(body: Body) -> str:
    """Return the name of the Secret with the channel's token; empty if the token is sealed."""
    return str((body["spec"].get("credentials") or {}).get("secretKeyRef", {}).get("name", ""))


def _small(body: Body) -> Body | None:
    """Return what the operator reads of a body, or None if that is large: then the reconcile reads the channel.

    Users decide how large their channels are, and the memory for thousands of them must not depend on it.
    """
    small = trimmed(body)
    return small if len(to_json(small)) <= _MAX_BODY else None


def _discard(index: dict[Any, set[Key]], entry: object, key: Key) -> None:
    if entry in index:
        index[entry].discard(key)
        if not index[entry]:
            del index[entry]
