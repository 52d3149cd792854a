"""Observing: what a reconcile reads before it plans. Records, credentials, and numbers at Twilio; writes nothing."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from cachetools import TTLCache
from pydantic import SecretStr

from smschannel.api.errors import ChannelError, MissingKey, Refused, SuspectedRefusal, Unreadable
from smschannel.api.reasons import Reason
from smschannel.api.resource import CREDENTIALS_LABEL, DeletionPolicy, DriftPolicy, SmsChannel
from smschannel.api.sealing import Binding
from smschannel.api.status import reason_of, wants_check, was_effective, was_well
from smschannel.api.text import TextError, clean, decode
from smschannel.channel_cache import ChannelCache
from smschannel.core.plan import CONTESTED_AFTER, Current, Desired, Number, Observed, Routing, Waiter
from smschannel.core.record import Key, Login, Record, Webhook, secret_source
from smschannel.kube_store import KubeStore
from smschannel.twilio.account_cache import Snapshot

_MOST_WAITING_LOGINS = 65_536
_MOST_CORRECTED = 65_536
_FRESH_SECONDS = 5.0
"""An answer of Twilio's that is younger counts as one to a change: many channels may be applied at once."""
_CREDENTIALS_UNUSABLE = {
    Reason.SecretNotFound,
    Reason.SecretKeyMissing,
    Reason.SecretNotLabelled,
    Reason.TokenUnreadable,
    Reason.AuthenticationFailed,
}


class Twilio(Protocol):
    """The calls of `twilio.client.TwilioClient` that a reconcile makes. All of them are idempotent."""

    def forget_refusal(self, login: Login, account_sid: str, *, older_than: float = 0) -> None: ...
    def trust(self, login: Login, account_sid: str) -> None: ...
    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None: ...
    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None: ...
    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number: ...


class Accounts(Protocol):
    """The reads of `twilio.account_cache.AccountCache`: whole accounts, in pages."""

    async def number(self, login: Login, account_sid: str, phone_number: str) -> Number | None: ...
    async def routing(
        self, login: Login, account_sid: str, number_sid: str, *, max_age: float | None = None
    ) -> Routing: ...
    def snapshot(self, login: Login, account_sid: str, number: Number, routing: Routing) -> Snapshot | None: ...
    async def age_if_unchanged(self, snapshot: Snapshot) -> float | None: ...


class _Found(NamedTuple):
    """The desired number, the login that found it, and the credentials (`source`) with that login.

    `rejected` is why newer credentials cannot be used, if the recorded login was used instead.
    """

    number: Number
    login: Login
    source: str
    rejected: Refused | None = None


class _Waiting(NamedTuple):
    """A channel that waits for a number, with the login that found it."""

    key: Key
    account_sid: str
    login: Login


class Observer:
    """Reads what a reconcile needs.

    `drift_interval`: configured numbers are compared with Twilio this often, in seconds; `slow_interval`: all channels
    are reconciled at least this often. `clock` returns monotonic seconds.
    """

    def __init__(
        self,
        kube: KubeStore,
        twilio: Twilio,
        accounts: Accounts,
        channels: ChannelCache,
        *,
        drift_interval: float,
        slow_interval: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._twilio = twilio
        self._accounts = accounts
        self._channels = channels
        # Of the channels that wait for a number the last one that found it, by the number's SID.
        self._waiting: TTLCache[str, _Waiting] = TTLCache(_MOST_WAITING_LOGINS, 2 * slow_interval)
        # By uid: how often the channel's webhook was corrected in a row. A row ends when no correction was needed for
        # longer than two drift checks are apart. That one reconcile finds the webhook in place does not end it: it may
        # come right after a correction, before the other side writes again.
        self._corrections: TTLCache[str, int] = TTLCache(_MOST_CORRECTED, 1.5 * drift_interval, timer=clock)

    async def channel(self, channel: SmsChannel, desired: Desired | None) -> Observed:
        """Observe a channel, its records and its number; `desired` is None while the channel is being deleted.

        Raises `TwilioUnavailable`, and Kubernetes' errors. A `Refused` becomes `Observed.number`.
        """
        meta = channel.metadata
        own = [each for each in self._kube.claims.of(Key(meta.namespace, meta.name)) if each.uid == meta.uid]
        forget = self._refusals_to_forget(channel)
        records, unreadable = await self._open(own, forget)
        if desired is None:
            return await self._deleted(channel, records, unreadable)
        observed = Observed(records=records, finalizer=channel.has_finalizer)
        if desired.suspend:
            return observed
        try:
            found = await self._find(channel, desired, records, unreadable, forget)
        except Refused as refused:
            # Channels that wait for each other's numbers would wait forever: one of them restores its own first, and
            # finishes that (`restore_since` says that it has begun) whatever the others want by then.
            is_swap = self._channels.is_swap(Key(meta.namespace, meta.name))
            others = [record for record in records.values() if record.phone_number != desired.phone_number]
            freed = [record for record in others if is_swap or record.restore_since]
            former = await self._read_all(freed, desired.deletion_policy)
            observed = replace(observed, number=refused, to_restore=former)
            return await self._observe_unseen(channel, observed, refused)
        number = found.number
        to_restore: dict[str, Current] = dict(unreadable)
        for each in list(records.values()):
            if each.number_sid != number.sid and each.contents:
                other = replace(each, deletion_policy=desired.deletion_policy)
                other, to_restore[each.number_sid] = await self._read_with_fallback(other, channel)
                records[each.number_sid] = replace(each, contents=other.contents)
        was_named = channel.status.get("phoneNumberSid") == number.sid
        was_configured = was_named and _was_configured(channel.status, desired)
        return replace(
            observed,
            login=found.login,
            source=found.source,
            number=number,
            rejected=found.rejected,
            routing=await self._routing(channel, found),
            was_configured=was_configured,
            was_named=was_named,
            corrections=self._count_corrections(
                channel, was_configured, overwritten=was_configured and number.webhook != desired.webhook
            ),
            to_restore=to_restore,
        )

    def snapshot(self, desired: Desired, observed: Observed) -> Snapshot | None:
        """Return what a check must see again for a configured channel to need nothing; None if it is not so simple."""
        if observed.login is None or len(observed.records) != 1:  # others are to be restored
            return None
        assert isinstance(observed.number, Number)
        return self._accounts.snapshot(observed.login, desired.account_sid, observed.number, observed.routing)

    async def age_if_unchanged(self, snapshot: Snapshot) -> float | None:
        """Return how many seconds ago Twilio still showed this; None if the channel must be observed."""
        try:
            return await self._accounts.age_if_unchanged(snapshot)
        except ChannelError:
            return None

    def unread(self, channel: SmsChannel) -> Observed:
        """Return what is known of a deleted channel without a call: its deletion has waited long enough."""
        meta, policy = channel.metadata, channel.spec.deletion_policy
        own = [each for each in self._kube.claims.of(Key(meta.namespace, meta.name)) if each.uid == meta.uid]
        records = {each.number_sid: replace(each, deletion_policy=policy) for each in own}
        return Observed(records=records, finalizer=channel.has_finalizer, deleted_at=meta.deletion_timestamp)

    async def records(self, records: Iterable[Record], successor: SmsChannel | None) -> Observed:
        """Observe records whose channel is gone; `successor` is the current channel of its name, if there is one."""
        opened, unreadable = await self._open(records, forget=None)
        return await self._to_restore(opened, unreadable, successor)

    async def login(self, channel: SmsChannel) -> tuple[Login, str]:
        """Return the channel's login and its source (see `secret_source`).

        Raises `Refused` if the credentials are missing or cannot be read, and Kubernetes' errors.
        """
        spec, meta = channel.spec, channel.metadata
        sid = spec.credentials.sid or spec.account_sid
        if spec.credentials.sealed:
            binding = Binding(meta.namespace, meta.name, spec.account_sid)
            try:
                return Login(sid=sid, token=self._kube.keys.keyring.unseal(spec.credentials.sealed, binding)), "sealed"
            except Unreadable as error:
                if isinstance(error, MissingKey):
                    self._kube.keys.lacking.add(Key(meta.namespace, meta.name))
                raise Refused(Reason.TokenUnreadable, f"{str(error).capitalize()}.") from None
        ref = spec.credentials.secret_key_ref
        assert ref, "the model allows exactly one source"
        secret = await self._kube.secret(meta.namespace, ref.name)
        if secret is None:
            raise Refused(Reason.SecretNotFound, f"Secret {ref.name} does not exist in namespace {meta.namespace}.")
        if (secret["metadata"].get("labels") or {}).get(CREDENTIALS_LABEL) != "true":
            raise Refused(Reason.SecretNotLabelled, f'Secret {ref.name} lacks the label {CREDENTIALS_LABEL}: "true".')
        try:
            token = clean(decode(base64.b64decode((secret.get("data") or {}).get(ref.key) or "")))
        except TextError as error:
            message = f"The token in Secret {ref.name} under the key {ref.key} {error}."
            raise Refused(Reason.SecretKeyMissing, message) from None
        if not token:
            raise Refused(Reason.SecretKeyMissing, f"Secret {ref.name} has no token under the key {ref.key}.")
        return Login(sid=sid, token=SecretStr(token)), secret_source(ref.name, secret["metadata"]["resourceVersion"])

    def in_use(self, desired: Desired, number: Number, login: Login) -> Refused:
        """Let the channel wait for the number, and return the refusal to report.

        The message names no holder, which may belong to another tenant.
        """
        key = Key(desired.namespace, desired.name)
        self._waiting[number.sid] = _Waiting(key, desired.account_sid, login)
        self._channels.set_awaited(key, number.sid)
        holder = self._kube.claims.holder(number.sid)
        if (
            holder and holder.key != key and holder.unseen_since
        ):  # perhaps for long enough that it loses the number: look at it now
            self._kube.claims.on_change(holder.key)
        if holder and holder.key == key:
            message = f"{number.phone_number} is still held by an earlier channel of this name until it is restored."
        else:
            message = f"{number.phone_number} already serves another channel."
        return Refused(Reason.NumberInUse, message)

    def corrected(self, uid: str, corrections: int) -> None:
        """Remember how often a channel's webhook was corrected in a row; 0 once the channel is gone."""
        if corrections:
            self._corrections[uid] = corrections
        else:
            self._corrections.pop(uid, None)

    # Records

    def _refusals_to_forget(self, channel: SmsChannel) -> float | None:
        """Return how many seconds ago Twilio must have refused the channel's logins for them to be tried again.

        None if nobody asked for that: no new generation, no changed Secret, no check-now annotation.
        """
        if _bypass_cache(channel):
            return 0
        meta = channel.metadata
        secret_changed = self._channels.take_secret_changed(Key(meta.namespace, meta.name))
        return _FRESH_SECONDS if secret_changed or channel.status.get("observedGeneration") != meta.generation else None

    async def _open(
        self, records: Iterable[Record], forget: float | None
    ) -> tuple[dict[str, Record], dict[str, Unreadable]]:
        """Return the current records by number SID, and for those that cannot be opened the error.

        `forget`: see `_refusals_to_forget`.
        """
        opened: dict[str, Record] = {}
        unreadable: dict[str, Unreadable] = {}
        for record in records:
            error = None
            try:
                found = await self._kube.open_record(record)
            except Unreadable as reason:
                error = reason
                if isinstance(error, MissingKey):
                    self._kube.keys.lacking.add(record.key)
                found = self._kube.claims.holder(record.number_sid)  # its plain metadata as it is now
            if found is None or found.uid != record.uid:
                continue
            opened[record.number_sid] = found
            if error:
                unreadable[record.number_sid] = error
            elif found.contents:
                self._twilio.trust(found.contents.login, found.account_sid)
                if forget is not None:
                    self._twilio.forget_refusal(found.contents.login, found.account_sid, older_than=forget)
        return opened, unreadable

    async def _deleted(
        self, channel: SmsChannel, records: dict[str, Record], unreadable: dict[str, Unreadable]
    ) -> Observed:
        """Observe a channel that is being deleted. Its current deletion policy replaces that of the records."""
        policy = channel.spec.deletion_policy
        records = {number_sid: replace(record, deletion_policy=policy) for number_sid, record in records.items()}
        observed = await self._to_restore(records, unreadable, channel)
        return replace(observed, finalizer=channel.has_finalizer, deleted_at=channel.metadata.deletion_timestamp)

    async def _to_restore(
        self, records: dict[str, Record], unreadable: dict[str, Unreadable], channel: SmsChannel | None
    ) -> Observed:
        """Read all numbers of the records, which are all to be restored."""
        to_restore: dict[str, Current] = dict(unreadable)
        for number_sid, record in list(records.items()):
            if number_sid not in unreadable:
                records[number_sid], to_restore[number_sid] = await self._read_with_fallback(record, channel)
        return Observed(records=records, to_restore=to_restore)

    # Numbers to restore

    async def _read_with_fallback(self, record: Record, channel: SmsChannel | None) -> tuple[Record, Current]:
        """Read a number to restore, with fallback logins. Return its record with the login that was accepted."""
        current = await self._read(record, record.deletion_policy)
        if _is_login_refused(current):
            for login in await self._fallback_logins(record, channel):
                tried = record.with_contents(login=login)
                answer = await self._read(tried, record.deletion_policy)
                if not _is_login_refused(answer):
                    return tried, answer
        return record, current

    async def _fallback_logins(self, record: Record, channel: SmsChannel | None) -> list[Login]:
        """Return the logins to try if Twilio refuses the recorded one, whose token may have been rotated since.

        They are those of the current channel of the name, and of a channel that waits for this number.
        """
        logins = []
        if channel and channel.spec.account_sid == record.account_sid:
            # While a namespace is being deleted, the right to read its Secrets may be gone already.
            with contextlib.suppress(ChannelError):
                login, _ = await self.login(channel)
                logins.append(login)
        waiting = self._waiting.get(record.number_sid)
        if waiting and waiting.account_sid == record.account_sid:
            logins.append(waiting.login)
        return logins

    # Numbers that the channel holds and cannot see

    async def _observe_unseen(self, channel: SmsChannel, observed: Observed, refused: Refused) -> Observed:
        """Observe which numbers of the channel none of its own logins sees, and who waits for them."""
        unseen: dict[str, bool] = {}
        waiters: dict[str, Waiter] = {}
        for number_sid, record in observed.records.items():
            seen = None
            if refused.reason is Reason.AccountSuspended:
                seen = True  # Twilio knows the login, and the number is still the account's
            elif record.contents:
                seen = await self._is_seen(channel, record)
            if seen is not None:
                unseen[number_sid] = not seen
            if seen is False and (waiter := await self._waiter(record)):
                waiters[number_sid] = waiter
        named = str(channel.status.get("phoneNumberSid", ""))
        holder = self._kube.claims.holder(named)
        lost = holder is not None and holder.uid != channel.metadata.uid
        return replace(observed, unseen=unseen, waiters=waiters, lost=lost)

    async def _is_seen(self, channel: SmsChannel, record: Record) -> bool | None:
        """Return whether one of the channel's own logins sees the number of a record.

        None if that is not known: only Twilio's answers count, that it refuses a login or that the number is not there.
        """
        assert record.contents, "unopened records have no login"
        logins = [record.contents.login]
        if channel.spec.account_sid == record.account_sid:
            try:
                login, _ = await self.login(channel)
                logins.append(login)
            except Refused as refused:
                if refused.reason is Reason.TokenUnreadable:  # there is a login, which may be right
                    return None
        if record.unseen_since and self._channels.waiters(record.number_sid):  # not from memory, since it may be lost
            for login in logins:
                self._twilio.forget_refusal(login, record.account_sid, older_than=_FRESH_SECONDS)
        known: bool | None = False
        for login in dict.fromkeys(logins):
            answer = await self._read(record.with_contents(login=login), DeletionPolicy.RESTORE)
            if isinstance(answer, Number):
                return True
            if answer is not None and not (isinstance(answer, Refused) and _is_login_refused(answer)):
                known = None
        return known

    async def _waiter(self, record: Record) -> Waiter | None:
        """Return a channel that waits for the number of a record, if its login sees the number now."""
        waiting = self._waiting.get(record.number_sid)
        if waiting is None or waiting.key not in self._channels.waiters(record.number_sid):
            return None
        cached = self._channels.get(waiting.key)
        tried = replace(record.with_contents(login=waiting.login), account_sid=waiting.account_sid)
        number = await self._read(tried, DeletionPolicy.RESTORE)
        if cached is None or not isinstance(number, Number):
            return None
        return Waiter(waiting.key, cached.uid, waiting.account_sid, waiting.login, number, cached.takes_unused_only)

    async def _read_all(self, records: Iterable[Record], policy: DeletionPolicy) -> dict[str, Current]:
        return {each.number_sid: await self._read(each, policy) for each in records if each.contents}

    async def _read(self, record: Record, policy: DeletionPolicy) -> Current:
        """Read a number, or why it cannot be read; None if it is gone. With policy Retain, None without a call."""
        if policy is DeletionPolicy.RETAIN:
            return None
        assert record.contents, "unopened records are not read"
        try:
            return await self._twilio.fetch_number(record.contents.login, record.account_sid, record.number_sid)
        except ChannelError as error:
            return error

    # The desired number

    async def _find(
        self,
        channel: SmsChannel,
        desired: Desired,
        records: Mapping[str, Record],
        unreadable: Mapping[str, Unreadable],
        forget: float | None,
    ) -> _Found:
        """Find the desired number. Raises `Refused`, with NumberInUse if another channel holds it."""
        for number_sid, error in unreadable.items():
            if records[number_sid].phone_number == desired.phone_number:
                raise record_unreadable(records[number_sid], error)
        found = await self._look_up(channel, desired, records, forget)
        number = found.number
        if number.sid in unreadable:
            raise record_unreadable(records[number.sid], unreadable[number.sid])
        if number.receives_sms and number.sid not in records and await self._is_held(desired, number):
            raise self.in_use(desired, number, found.login)
        return found

    async def _look_up(
        self, channel: SmsChannel, desired: Desired, records: Mapping[str, Record], forget: float | None
    ) -> _Found:
        """Find the desired number, from the account cache if nothing changed since the last reconcile.

        If the channel's credentials are missing, or Twilio refuses them, the recorded login is tried, but only for the
        number of that record.
        """
        place = desired.account_sid, desired.phone_number
        record = next((each for each in records.values() if (each.account_sid, each.phone_number) == place), None)
        login = None
        try:
            login, source = await self.login(channel)
            number = await self._look_up_with(login, source, channel, desired, record, forget)
        except Refused as refused:
            if record and record.contents and record.contents.login == login:
                raise
            found = await self._find_with_recorded(desired, record, refused)
            if found is None:
                raise
            return found
        if number is None:
            message = f"Account {desired.account_sid} has no number {desired.phone_number}."
            raise Refused(Reason.NumberNotFound, message)
        return _Found(number, login, source)

    async def _look_up_with(
        self,
        login: Login,
        source: str,
        channel: SmsChannel,
        desired: Desired,
        record: Record | None,
        forget: float | None,
    ) -> Number | None:
        """Find the desired number with the channel's login. Raises `Refused` if Twilio refuses that."""
        if forget is not None:
            self._twilio.forget_refusal(login, desired.account_sid, older_than=forget)
        if not _bypass_cache(channel) and record and record.source == source and _was_well(channel, desired):
            number = await self._confirmed(desired, login)
            if number and number.sid == record.number_sid:
                return number
        return await self._twilio.find_number(login, desired.account_sid, desired.phone_number)

    async def _find_with_recorded(self, desired: Desired, record: Record | None, refused: Refused) -> _Found | None:
        """Find the number of a record with its login, if the channel's credentials are missing or refused.

        None if that does not help either: the refusal stands.
        """
        if refused.reason not in _CREDENTIALS_UNUSABLE or record is None or record.contents is None:
            return None
        recorded = record.contents.login
        number = await self._find_with(recorded, desired)
        if number is None or number.sid != record.number_sid:
            return None
        if refused.reason is Reason.AuthenticationFailed:
            rejected = Refused(Reason.TokenRejected, f"The newer token is not used: {refused}")
        else:
            rejected = Refused(refused.reason, f"{refused} The channel still works with the credentials before.")
        return _Found(number, recorded, record.source, rejected)

    async def _find_with(self, login: Login, desired: Desired) -> Number | None:
        """Find the desired number with another login; None if that login is refused, too, or the number is missing."""
        try:
            return await self._twilio.find_number(login, desired.account_sid, desired.phone_number)
        except Refused:
            return None

    async def _confirmed(self, desired: Desired, login: Login) -> Number | None:
        """Return the number if the account cache shows that nothing changed; None if Twilio must be asked."""
        try:
            number = await self._accounts.number(login, desired.account_sid, desired.phone_number)
        except ChannelError:  # perhaps about another number, and all callers share it: each reads its own
            return None
        fine = number and number.webhook == desired.webhook and number.receives_sms and not number.application_sid
        return number if fine else None

    async def _is_held(self, desired: Desired, number: Number) -> bool:
        """Return whether another channel holds the number. The index may be out of date, so the record is read."""
        holder = self._kube.claims.holder(number.sid)
        if holder is None or holder.uid == desired.uid:
            return False
        holder = await self._kube.holder(number.sid)
        return holder is not None and holder.uid != desired.uid

    async def _routing(self, channel: SmsChannel, found: _Found) -> Routing:
        max_age = 0.0 if _bypass_cache(channel) else None
        return await self._accounts.routing(found.login, channel.spec.account_sid, found.number.sid, max_age=max_age)

    def _count_corrections(self, channel: SmsChannel, was_configured: bool, *, overwritten: bool) -> int:
        """Return how often in a row the webhook was overwritten, and corrected or about to be.

        Once WebhookContested is reported, a requested check ends the row if it finds the webhook in place.
        """
        uid, contested = channel.metadata.uid, reason_of(channel.status) is Reason.WebhookContested
        if overwritten and channel.spec.drift_policy is DriftPolicy.CORRECT:
            return 1 + self._corrections.get(uid, CONTESTED_AFTER if contested else 0)  # not counted: before a restart
        is_over = not was_configured or (contested and _bypass_cache(channel))
        if is_over or channel.spec.drift_policy is not DriftPolicy.CORRECT:
            self._corrections.pop(uid, None)
        return self._corrections.get(uid, 0)


def record_unreadable(record: Record, error: Unreadable) -> Refused:
    """Return the refusal to report for a record that cannot be opened."""
    message = f"The operator's record of {record.phone_number}, Secret {record.secret_name}, cannot be opened: {error}."
    return Refused(Reason.RecordUnreadable, message)


def _bypass_cache(channel: SmsChannel) -> bool:
    """Return whether the check-now annotation asks for a check that bypasses all caches."""
    return wants_check(channel.metadata.annotations, channel.status)


def _is_login_refused(current: Current) -> bool:
    """Return whether another login should be tried, also because of a refusal that is only suspected."""
    if isinstance(current, SuspectedRefusal):
        return True
    return isinstance(current, Refused) and current.reason is Reason.AuthenticationFailed


def _was_well(channel: SmsChannel, desired: Desired) -> bool:
    return was_well(channel.status, generation=channel.metadata.generation, webhook_url=desired.webhook.url)


def _was_configured(status: Mapping[str, Any], desired: Desired) -> bool:
    """Return whether the number of the status was set to this URL, so that another URL now is drift."""
    return was_effective(status) and status.get("webhookUrl") == desired.webhook.url
