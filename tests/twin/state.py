"""Twilio's state: accounts, tokens, keys, numbers, services, applications. No I/O.

No repr contains a token or secret.
"""

from __future__ import annotations

import re
import secrets
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hmac import compare_digest
from itertools import count
from random import Random
from typing import Final, Literal
from urllib.parse import urlsplit

from tests.twin.faults import Faults
from tests.twin.journal import Journal
from tests.twin.refusals import (
    ACCOUNT_INACTIVE,
    FALLBACK_WITHOUT_URL,
    FOREIGN_SENDER,
    INVALID_METHOD,
    INVALID_RECEIVER,
    INVALID_URL,
    NO_BODY,
    NO_RECEIVER,
    NO_SENDER,
    NO_SMS,
    NOT_FOUND,
    SENDER_LACKS_SMS,
    SENDS_TO_ITSELF,
    TOO_MANY_REQUESTS,
    UNAUTHENTICATED,
    Refusal,
    Row,
)

DEMO_URL: Final = "https://demo.twilio.com/welcome/sms/reply"
FIRST_NUMBER: Final = "+61400111222"

Status = Literal["active", "suspended", "closed"]
KeyKind = Literal["main", "standard"]

# Form parameter -> field, for all that an update may set on a number.
SETTINGS: Final[Mapping[str, str]] = {
    "FriendlyName": "friendly_name",
    "SmsUrl": "sms_url",
    "SmsMethod": "sms_method",
    "SmsFallbackUrl": "sms_fallback_url",
    "SmsFallbackMethod": "sms_fallback_method",
    "SmsApplicationSid": "sms_application_sid",
    "StatusCallback": "status_callback",
    "StatusCallbackMethod": "status_callback_method",
    "VoiceUrl": "voice_url",
    "VoiceMethod": "voice_method",
    "VoiceFallbackUrl": "voice_fallback_url",
    "VoiceFallbackMethod": "voice_fallback_method",
    "VoiceApplicationSid": "voice_application_sid",
}

_BLANK = re.compile(r"[\x00-\x20]")
_E164 = re.compile(r"\+[1-9][0-9]{1,14}")


class UnknownError(LookupError):
    """A call of the control API names something that does not exist."""


class ConflictError(ValueError):
    """A call of the control API is impossible, such as adding one number twice."""


@dataclass(slots=True, eq=False)
class Number:
    """A phone number. An empty string in `settings` is a cleared field."""

    sid: str
    account_sid: str
    phone_number: str
    ordinal: int
    created: datetime
    sms: bool
    settings: dict[str, str]
    updated: datetime
    service_sid: str | None = None
    # The JSON of the last answer, until something changes: then a page of 1,000 is only a join.
    rendered: bytes | None = None

    def change(self, settings: Mapping[str, str], now: datetime) -> None:
        """Set fields by their snake_case name, without Twilio's checks."""
        self.settings.update(settings)
        self.updated = now
        self.rendered = None


class NumberBook:
    """The numbers of one account, in order of creation, with an index for the PhoneNumber filter."""

    def __init__(self) -> None:
        self.by_sid: dict[str, Number] = {}
        self._ordered: list[Number] = []
        self._by_phone: dict[str, Number] = {}
        self._phones: list[str] = []

    def __len__(self) -> int:
        return len(self._ordered)

    def __iter__(self) -> Iterator[Number]:
        return iter(self._ordered)

    def add(self, number: Number) -> None:
        self.by_sid[number.sid] = number
        self._by_phone[number.phone_number] = number
        insort(self._ordered, number, key=_ordinal)
        insort(self._phones, number.phone_number)

    def remove(self, number: Number) -> None:
        del self.by_sid[number.sid]
        del self._by_phone[number.phone_number]
        self._ordered.remove(number)
        del self._phones[bisect_left(self._phones, number.phone_number)]

    def matching(self, pattern: str) -> Sequence[Number]:
        """Return the numbers that contain `pattern`, where `*` stands for one digit; all numbers for "".

        Twilio matches partially even when the filter is a whole E.164 number. A "+" can only come first: a filter
        that starts with it is a prefix, which a sorted list finds without a scan. All others are scanned for.
        """
        if not pattern:
            return self._ordered
        if "*" in pattern:
            search = re.compile("[0-9]".join(map(re.escape, pattern.split("*")))).search
            return [number for number in self._ordered if search(number.phone_number)]
        if not pattern.startswith("+"):
            return [number for number in self._ordered if pattern in number.phone_number]
        found = []
        for index in range(bisect_left(self._phones, pattern), len(self._phones)):
            if not self._phones[index].startswith(pattern):
                break
            found.append(self._by_phone[self._phones[index]])
        return sorted(found, key=_ordinal)


@dataclass(slots=True, eq=False)
class Service:
    """A Messaging Service. With `inbound_request_url` None or "" messages are dropped, unless left to the number."""

    sid: str
    account_sid: str
    ordinal: int
    created: datetime
    friendly_name: str
    inbound_request_url: str | None
    inbound_method: str
    use_inbound_webhook_on_number: bool
    numbers: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Application:
    """A TwiML application: set on a number, it overrides the number's own URLs."""

    sid: str
    account_sid: str
    sms_url: str
    sms_method: str


@dataclass(slots=True, eq=False)
class Outbound:
    """A message that the account sent. Each fetch shows the next of Twilio's statuses."""

    sid: str
    account_sid: str
    to: str
    sender: str
    body: str
    created: datetime
    status: Literal["queued", "sent", "delivered"] = "queued"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key: gives access to one account only, not even to its subaccounts."""

    sid: str
    account: Account
    kind: KeyKind
    secret: str = field(repr=False)


@dataclass(slots=True, eq=False)
class Account:
    """An account or subaccount. `concurrency` is how many requests may be in flight, None for no limit."""

    sid: str
    friendly_name: str
    created: datetime
    auth_token: str = field(repr=False)
    secondary_token: str | None = field(default=None, repr=False)
    parent: Account | None = field(default=None, repr=False)
    test: bool = False
    own_status: Status = "active"
    inactive_row: Row = ACCOUNT_INACTIVE
    concurrency: int | None = 40
    retry_after: int | None = None
    in_flight: int = 0
    numbers: NumberBook = field(default_factory=NumberBook, repr=False)
    services: dict[str, Service] = field(default_factory=dict, repr=False)
    applications: dict[str, Application] = field(default_factory=dict, repr=False)
    messages: dict[str, Outbound] = field(default_factory=dict, repr=False)

    @property
    def status(self) -> Status:
        """Return the status; a subaccount of an account that is not active is not active either."""
        if self.own_status == "active" and self.parent is not None:
            return self.parent.status
        return self.own_status

    def accepts(self, token: str) -> bool:
        """Return whether the token is one of the account's two."""
        given = token.encode()
        return compare_digest(given, self.auth_token.encode()) or (
            self.secondary_token is not None and compare_digest(given, self.secondary_token.encode())
        )

    def require_active(self) -> None:
        """Raise Refusal if suspended or closed: by default 401/20005 (Twilio's exact answer is not documented)."""
        if self.status != "active":
            raise Refusal(self.inactive_row)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Count a request as in flight during the block; Refusal 429/20429 beyond the account's concurrency."""
        if self.concurrency is not None and self.in_flight >= self.concurrency:
            raise Refusal(TOO_MANY_REQUESTS)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


@dataclass(frozen=True, slots=True)
class Principal:
    """The account that logged in, and the API key if it was one."""

    account: Account
    key: ApiKey | None = None


class Twin:
    """All of Twilio that this product uses.

    `seed` makes SIDs and tokens repeatable; `concurrency` is the limit of new accounts; `latency` is the seconds that
    every answer takes, without which few requests are in flight at the same time.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        concurrency: int | None = 40,
        latency: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.accounts: dict[str, Account] = {}
        self.keys: dict[str, ApiKey] = {}
        self.numbers: dict[str, Number] = {}
        self.faults = Faults()
        self.journal = Journal()
        self.concurrency = concurrency
        self.latency = latency
        self.clock = clock
        self._random: Random = secrets.SystemRandom() if seed is None else Random(seed)  # noqa: S311 (repeatable on request)
        self._ordinals = count(1)

    def __repr__(self) -> str:
        return f"Twin({len(self.accounts)} accounts, {len(self.numbers)} numbers)"

    # -- for the API ------------------------------------------------------------------------------

    def authenticate(self, username: str, password: str) -> Principal:
        """Check an account SID with either token, or a key with its secret; Refusal 401/20003 if they do not match."""
        key = self.keys.get(username)
        if key is not None and compare_digest(key.secret.encode(), password.encode()):
            return Principal(key.account, key)
        account = self.accounts.get(username)
        if account is None or not account.accepts(password):
            raise Refusal(UNAUTHENTICATED)
        return Principal(account)

    def reach(self, principal: Principal, account_sid: str, path: str) -> Account:
        """Return the account in a 2010 path if `principal` has access: to its own, and with a token to its subaccounts.

        Refusal 401/20003 for an account of the same family (a key of the parent, a subaccount for its parent or
        sibling), 404/20404 for any other.
        """
        target = self.accounts.get(account_sid)
        own = principal.account
        if target is own:
            return own
        if target is None or (target.parent or target) is not (own.parent or own):
            raise Refusal(NOT_FOUND, path=path)
        if target.parent is not own or principal.key is not None:
            raise Refusal(UNAUTHENTICATED)
        return target

    def update(self, number: Number, form: Mapping[str, str]) -> None:
        """Update a number from a form: set what is sent, clear what is sent empty, ignore AccountSid and the unknown.

        Raises Refusal and changes nothing: 21407 no SMS, 21402 invalid URL, 21403 invalid method, 21406 a fallback
        URL without SmsUrl.
        """
        if not number.sms and any(value and name.startswith("Sms") for name, value in form.items()):
            raise Refusal(NO_SMS)
        for name in ("SmsUrl", "SmsFallbackUrl"):
            if form.get(name) and not is_web_url(form[name]):
                raise Refusal(INVALID_URL, field=name)
        for name in ("SmsMethod", "SmsFallbackMethod"):
            if form.get(name) and form[name] not in {"GET", "POST"}:
                raise Refusal(INVALID_METHOD, field=name)
        if form.get("SmsFallbackUrl") and not form.get("SmsUrl"):
            raise Refusal(FALLBACK_WITHOUT_URL)
        if form.get("SmsUrl") == "" and form.get("SmsFallbackUrl", number.settings["sms_fallback_url"]):
            raise Refusal(FALLBACK_WITHOUT_URL)
        changed = {SETTINGS[name]: value for name, value in form.items() if name in SETTINGS}
        # A method is never empty: clearing it sets the default.
        changed.update({name: "POST" for name, value in changed.items() if name.endswith("_method") and not value})
        number.change(changed, self.now())

    def transfer(self, number: Number, to: Account) -> None:
        self.leave_service(number)
        self.accounts[number.account_sid].numbers.remove(number)
        number.account_sid = to.sid
        number.change({}, self.now())
        to.numbers.add(number)

    def release(self, number: Number) -> None:
        self.leave_service(number)
        self.accounts[number.account_sid].numbers.remove(number)
        del self.numbers[number.phone_number]

    # -- for the control API and tests: what Twilio's console can do -------------------------------

    def add_account(self, *, friendly_name: str = "", parent: Account | None = None, test: bool = False) -> Account:
        account = Account(
            sid=self.new_sid("AC"),
            friendly_name=friendly_name,
            created=self.now(),
            auth_token=self._new_secret(),
            parent=parent,
            test=test,
            concurrency=self.concurrency,
        )
        if parent is not None and parent.parent is not None:
            raise ConflictError("a subaccount cannot have subaccounts")
        self.accounts[account.sid] = account
        return account

    def add_key(self, account: Account, kind: KeyKind = "standard") -> ApiKey:
        key = ApiKey(self.new_sid("SK"), account, kind, self._new_secret())
        self.keys[key.sid] = key
        return key

    def add_number(self, account: Account, phone_number: str, *, sms: bool = True, **settings: str) -> Number:
        """Add a newly bought number, with the demo webhook unless `settings` (snake_case) name another."""
        if not _E164.fullmatch(phone_number):
            raise ConflictError(f"{phone_number} is not an E.164 number")
        if phone_number in self.numbers:
            raise ConflictError(f"{phone_number} belongs to {self.numbers[phone_number].account_sid}")
        now = self.now()
        fresh = {name: "POST" if name.endswith("_method") else "" for name in SETTINGS.values()}
        number = Number(
            sid=self.new_sid("PN"),
            account_sid=account.sid,
            phone_number=phone_number,
            ordinal=next(self._ordinals),
            created=now,
            sms=sms,
            settings={**fresh, "friendly_name": phone_number, "sms_url": DEMO_URL if sms else "", **settings},
            updated=now,
        )
        account.numbers.add(number)
        self.numbers[phone_number] = number
        return number

    def add_application(self, account: Account, *, sms_url: str, sms_method: str = "POST") -> Application:
        application = Application(self.new_sid("AP"), account.sid, sms_url, sms_method)
        account.applications[application.sid] = application
        return application

    def add_service(
        self,
        account: Account,
        *,
        friendly_name: str = "",
        inbound_request_url: str | None = None,
        inbound_method: str = "POST",
        use_inbound_webhook_on_number: bool = False,
    ) -> Service:
        service = Service(
            sid=self.new_sid("MG"),
            account_sid=account.sid,
            ordinal=next(self._ordinals),
            created=self.now(),
            friendly_name=friendly_name,
            inbound_request_url=inbound_request_url,
            inbound_method=inbound_method,
            use_inbound_webhook_on_number=use_inbound_webhook_on_number,
        )
        account.services[service.sid] = service
        return service

    def join_service(self, number: Number, service: Service) -> None:
        if number.account_sid != service.account_sid:
            raise ConflictError("the number and the messaging service belong to different accounts")
        self.leave_service(number)
        service.numbers[number.sid] = number
        number.service_sid = service.sid

    def leave_service(self, number: Number) -> None:
        if number.service_sid is not None:
            del self.accounts[number.account_sid].services[number.service_sid].numbers[number.sid]
            number.service_sid = None

    def send(self, account: Account, form: Mapping[str, str]) -> Outbound:
        """Send a message from one of the account's numbers, as far as Twilio would take it. Raises Refusal.

        It arrives nowhere: `deliver` is for messages to the twin's numbers.
        """
        to, sender, body = (form.get(name, "") for name in ("To", "From", "Body"))
        if not to:
            raise Refusal(NO_RECEIVER)
        if not sender:
            raise Refusal(NO_SENDER)
        if not body:
            raise Refusal(NO_BODY)
        if not is_e164(to):
            raise Refusal(INVALID_RECEIVER, to=to)
        if to == sender:
            raise Refusal(SENDS_TO_ITSELF)
        number = self.numbers.get(sender)
        if number is None or number.account_sid != account.sid:
            raise Refusal(FOREIGN_SENDER, sender=sender)
        if not number.sms:
            raise Refusal(SENDER_LACKS_SMS, sender=sender)
        message = Outbound(self.new_sid("SM"), account.sid, to, sender, body, self.now())
        account.messages[message.sid] = message
        return message

    def create_secondary_token(self, account: Account) -> str:
        """Create a second valid token, which replaces an earlier secondary one."""
        account.secondary_token = self._new_secret()
        return account.secondary_token

    def promote(self, account: Account) -> None:
        """Make the secondary token the primary one; the old primary is invalid at once."""
        if account.secondary_token is None:
            raise ConflictError("the account has no secondary token to promote")
        account.auth_token, account.secondary_token = account.secondary_token, None

    def seed(self, accounts: int = 1, numbers: int = 40, first: str | None = None) -> list[Account]:
        """Add accounts of `numbers` numbers each, counting up from `first` and skipping numbers that exist."""
        following = count(int((first or FIRST_NUMBER).removeprefix("+")))
        made = []
        for _ in range(accounts):
            account = self.add_account(friendly_name=f"Account {len(self.accounts) + 1}")
            for _ in range(numbers):
                phone_number = next(
                    candidate for digits in following if (candidate := f"+{digits}") not in self.numbers
                )
                self.add_number(account, phone_number)
            made.append(account)
        return made

    def account(self, sid: str) -> Account:
        """Return an account by SID; UnknownError if there is none."""
        if sid not in self.accounts:
            raise UnknownError(f"account {sid} not found")
        return self.accounts[sid]

    def number(self, name: str) -> Number:
        """Return a number by E.164 or PN SID; UnknownError if there is none."""
        if name in self.numbers:
            return self.numbers[name]
        for account in self.accounts.values():
            if name in account.numbers.by_sid:
                return account.numbers.by_sid[name]
        raise UnknownError(f"number {name} not found")

    def service(self, sid: str) -> Service:
        """Return a messaging service by SID; UnknownError if there is none."""
        for account in self.accounts.values():
            if sid in account.services:
                return account.services[sid]
        raise UnknownError(f"messaging service {sid} not found")

    # -- randomness and time -----------------------------------------------------------------------------------

    def now(self) -> datetime:
        return datetime.fromtimestamp(int(self.clock()), UTC)

    def new_sid(self, prefix: str) -> str:
        return f"{prefix}{self._random.getrandbits(128):032x}"

    def _new_secret(self) -> str:
        return f"{self._random.getrandbits(128):032x}"


def is_e164(text: str) -> bool:
    return _E164.fullmatch(text) is not None


def is_web_url(text: str) -> bool:
    """Return whether this is an absolute http(s) URL without blanks. Unlike Twilio, accept loopback hosts."""
    if _BLANK.search(text):
        return False
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


def _ordinal(number: Number) -> int:
    return number.ordinal
