"""What the operator owes to Twilio: one entry for each number it took over, and how to give it back. No I/O.

A `Record` is kept, sealed, for each channel in the operator's own namespace. It is written before Twilio is,
and an entry leaves it only after the number was given back, so that a crash at any moment loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, SerializationInfo, field_serializer

from smschannel.api.resource import DeletionPolicy

Waiter = TypeVar("Waiter", bound=Hashable)

_REVEAL = "reveal"
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)


class Login(_Value):
    """Who logs in to Twilio: the account itself, an API key or a parent account."""

    sid: str
    token: SecretStr

    @field_serializer("token")
    def _hidden(self, token: SecretStr, context: SerializationInfo) -> str:
        return token.get_secret_value() if context.context == _REVEAL else "***"


class Webhook(_Value):
    """A number's `SmsUrl` and `SmsMethod`. Found URLs may embed a password, so none is shown by `repr`."""

    url: str = Field(repr=False)
    method: str


class Entry(_Value):
    """One number that was taken over. `previous` is None where what was there before is not known."""

    account_sid: str
    number_sid: str
    phone_number: str
    login: Login
    previous: Webhook | None
    wrote: tuple[str, ...] = Field(repr=False)
    claimed_at: datetime

    def points_at_us(self, webhook: Webhook) -> bool:
        return webhook.url in self.wrote


class Record(_Value):
    """Everything that is remembered of one channel.

    `source` tells from which credentials the login was read; `owed_since` when the channel was let go of with
    something still to be given back.
    """

    uid: str
    namespace: str
    name: str
    source: str = ""
    deletion_policy: DeletionPolicy = DeletionPolicy.RESTORE
    entries: tuple[Entry, ...] = ()
    owed_since: datetime | None = None

    def entry(self, number_sid: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.number_sid == number_sid), None)

    def login_for(self, account_sid: str) -> Login | None:
        """The last login that Twilio accepted for this account."""
        return next((entry.login for entry in reversed(self.entries) if entry.account_sid == account_sid), None)

    def with_entry(self, entry: Entry) -> Record:
        others = (other for other in self.entries if other.number_sid != entry.number_sid)
        return self.model_copy(update={"entries": (*others, entry)})

    def with_login(self, account_sid: str, login: Login) -> Record:
        """The newest accepted login pays the account's older debts too: the one before may be revoked any time."""
        return self.model_copy(
            update={
                "entries": tuple(
                    entry.model_copy(update={"login": login}) if entry.account_sid == account_sid else entry
                    for entry in self.entries
                )
            }
        )

    def without(self, number_sids: Iterable[str]) -> Record:
        gone = frozenset(number_sids)
        return self.model_copy(update={"entries": tuple(e for e in self.entries if e.number_sid not in gone)})

    def claims(self) -> dict[str, str]:
        """What the channel holds, and in whose name: {number SID: uid, instance: namespace}."""
        if not self.entries:
            return {}
        return {**{entry.number_sid: self.uid for entry in self.entries}, self.name: self.namespace}

    def encode(self) -> bytes:
        """JSON with the tokens in it: for sealing only."""
        return self.model_dump_json(context=_REVEAL).encode()

    @classmethod
    def decode(cls, document: bytes) -> Record:
        return cls.model_validate_json(document)


@dataclass(frozen=True)
class WebhookTemplate:
    """The URL of an instance's webhook, from the operator's settings: `https://.../{instance_id}/...`.

    `former` are templates of earlier settings; what they made is ours too, and never somebody's previous webhook.
    """

    template: str
    former: tuple[str, ...] = ()

    def url(self, instance_id: str) -> str:
        return self.template.replace("{instance_id}", instance_id)

    def made(self, url: str) -> bool:
        """Whether any instance's webhook URL, of this template or a former one, is `url`."""
        return any(_pattern(template).fullmatch(url) for template in (self.template, *self.former))


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(re.escape("{instance_id}"), _UUID))


class Age(NamedTuple):
    """Who comes first among those that want the same at the same time: the older resource, then the lower uid."""

    created: datetime
    uid: str


@dataclass
class _Hold:
    owner: str
    reserved: Age | None  # None once it is kept


class Claims(Generic[Waiter]):
    """Who holds a thing (a number, an instance), and who waits for it. One event loop, so no locks.

    A claim is reserved the moment verified credentials have seen the number; it is kept from the moment its record is
    about to be written until the record lets go of it. What is kept is never displaced; of those that have only
    reserved, the eldest wins. A channel claims in the name of an owner: its uid for a number, its namespace for an
    instance, so that a channel made anew does not wait for the instance that its own predecessor still settles.
    """

    def __init__(self) -> None:
        self.on_free: Callable[[Waiter], object] = lambda waiter: None
        self._holds: dict[str, dict[str, _Hold]] = {}  # by thing, by uid
        self._things: dict[str, set[str]] = {}  # that a uid holds
        self._waiting: dict[str, dict[str, tuple[Age, Waiter]]] = {}  # by thing, by uid
        self._awaited: dict[str, str] = {}  # the thing that a uid waits for: the first that it could not have
        self._called: dict[str, set[str]] = {}  # for which things a uid was called, and has not had its turn yet

    def __len__(self) -> int:
        return len(self._holds)

    def holds(self, uid: str) -> bool:
        return uid in self._things

    def reserve(self, thing: str, age: Age, owner: str, waiter: Waiter) -> bool:
        """Take `thing`; or note `waiter`, to be called when it is free."""
        holds = self._holds.get(thing, {})
        others = {uid: hold for uid, hold in holds.items() if hold.owner != owner}
        if any(hold.reserved is None or hold.reserved < age for hold in others.values()):
            self.stop_waiting(age.uid)
            self._waiting.setdefault(thing, {})[age.uid] = age, waiter
            self._awaited[age.uid] = thing
            return False
        for uid in others:  # younger, and not kept: they find out when they try to keep it
            self._drop(thing, uid)
        if age.uid not in holds:
            self._hold(thing, age.uid, _Hold(owner, age))
        return True

    def keep(self, thing: str, age: Age, owner: str, waiter: Waiter) -> bool:
        """Make a reservation final; False, and `waiter` noted, where an elder took it meanwhile."""
        if not self.reserve(thing, age, owner, waiter):
            return False
        self._holds[thing][age.uid].reserved = None
        return True

    def hold_only(self, uid: str, record: Record | None) -> None:
        """Bring what `uid` holds to what its record says, and call the eldest of those who wait for the rest."""
        kept = record.claims() if record else {}
        let_go = self._things.get(uid, set()) - kept.keys()
        for thing in let_go:
            self._drop(thing, uid)
        for thing, owner in kept.items():
            if all(hold.owner == owner for hold in self._holds.get(thing, {}).values()):
                self._hold(thing, uid, _Hold(owner, None))
        for thing in let_go | self._called.pop(uid, set()):
            self._call_next(thing)

    def stop_waiting(self, uid: str) -> None:
        """For the begin of a turn: what `uid` could not have before, it may not want any more."""
        thing = self._awaited.pop(uid, None)
        if thing is not None:
            self._waiting[thing].pop(uid)
            if not self._waiting[thing]:
                del self._waiting[thing]

    def in_circle(self, uid: str) -> bool:
        """Whether `uid` waits for a number whose holder waits for one of `uid`'s, perhaps by way of others; and whether
        each of them would get the number that it waits for, which an elder outside the circle would else.
        """
        path = [uid]
        while (holder := self._keeper(self._awaited.get(path[-1], ""))) != uid:
            if holder is None or holder in path:
                return False
            path.append(holder)
        return all(min(self._waiting[self._awaited[each]].values())[0].uid == each for each in path)

    def _keeper(self, number: str) -> str | None:
        holds = self._holds.get(number, {})
        return next((uid for uid, hold in holds.items() if hold.owner == uid and hold.reserved is None), None)

    def leave(self, uid: str) -> None:
        """`uid` waits for nothing any more, and passes on what it was called for."""
        self.stop_waiting(uid)
        for thing in self._called.pop(uid, set()):
            self._call_next(thing)

    def _call_next(self, thing: str) -> None:
        if thing in self._holds or thing not in self._waiting:
            return
        age, waiter = min(self._waiting[thing].values(), key=lambda waits: waits[0])
        self.stop_waiting(age.uid)
        self._called.setdefault(age.uid, set()).add(thing)
        self.on_free(waiter)

    def _hold(self, thing: str, uid: str, hold: _Hold) -> None:
        self._holds.setdefault(thing, {})[uid] = hold
        self._things.setdefault(uid, set()).add(thing)

    def _drop(self, thing: str, uid: str) -> None:
        del self._holds[thing][uid]
        if not self._holds[thing]:
            del self._holds[thing]
        self._things[uid].discard(thing)
        if not self._things[uid]:
            del self._things[uid]
