"""What the operator owes to Twilio: one entry for each number it took over, and how to give it back. No I/O.

A `Record` is kept, sealed, for each channel in the operator's own namespace. It is written before Twilio is,
and an entry leaves it only after the number was given back, so that a crash at any moment loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, SerializationInfo, field_serializer

from smschannel.resource import DeletionPolicy

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
    """Everything that is remembered of one channel. `source` tells from which credentials the login was read."""

    uid: str
    namespace: str
    name: str
    source: str = ""
    deletion_policy: DeletionPolicy = DeletionPolicy.RESTORE
    entries: tuple[Entry, ...] = ()

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


class Claims(Generic[Waiter]):
    """Which channel holds a number, and who waits for it. One event loop, so no locks.

    A claim is reserved the moment verified credentials have seen the number, kept by the record's ledger entry,
    and dropped with it. A holder is never displaced; `on_free` is called with each that waited when it lets go.
    """

    def __init__(self) -> None:
        self.on_free: Callable[[Waiter], object] = lambda waiter: None
        self._holder: dict[str, str] = {}
        self._held: dict[str, set[str]] = {}
        self._waiting: dict[str, dict[Waiter, None]] = {}

    def __len__(self) -> int:
        return len(self._holder)

    def holds(self, uid: str) -> bool:
        return uid in self._held

    def reserve(self, number_sid: str, uid: str, waiter: Waiter) -> bool:
        """Take the number for the channel `uid`; or note `waiter`, to be told when it is let go."""
        if self._holder.setdefault(number_sid, uid) != uid:
            self._waiting.setdefault(number_sid, {})[waiter] = None
            return False
        self._held.setdefault(uid, set()).add(number_sid)
        return True

    def hold_only(self, uid: str, record: Record | None) -> None:
        """Bring what `uid` holds to what its record says, and tell those who waited for the rest."""
        keep = {entry.number_sid for entry in record.entries} if record else set()
        for number_sid in self._held.pop(uid, set()) - keep:
            del self._holder[number_sid]
            for waiter in self._waiting.pop(number_sid, {}):
                self.on_free(waiter)
        kept = {number_sid for number_sid in keep if self._holder.setdefault(number_sid, uid) == uid}
        if kept:
            self._held[uid] = kept
