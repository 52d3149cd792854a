"""Twilio's REST API as a function from a call to an answer. No I/O.

`authorize` checks the credentials and their right to the account (401, 403, 404); `answer` does the rest. Both raise
Refusal where Twilio refuses. They are two steps because a refused call takes none of the account's slots, while an
authorized one does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from urllib.parse import unquote

from tests.twin import payloads
from tests.twin.paging import cut
from tests.twin.refusals import BAD_REQUEST, METHOD_NOT_ALLOWED, NOT_FOUND, TEST_CREDENTIALS, UNAUTHENTICATED, Refusal
from tests.twin.state import Account, Number, Service, Twin, is_e164


class Target(NamedTuple):
    """What a path names. `kind` is its name in the journal; "unknown" is answered with 404."""

    kind: str
    account: str | None = None
    service: str | None = None
    number: str | None = None
    name: str | None = None


_PATHS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in {
        "number": r"/2010-04-01/Accounts/(?P<account>\w+)/IncomingPhoneNumbers/(?P<number>\w+)\.json",
        "numbers": r"/2010-04-01/Accounts/(?P<account>\w+)/IncomingPhoneNumbers\.json",
        "account": r"/2010-04-01/Accounts/(?P<account>\w+)\.json",
        "messages": r"/2010-04-01/Accounts/(?P<account>\w+)/Messages\.json",
        "message": r"/2010-04-01/Accounts/(?P<account>\w+)/Messages/(?P<name>\w+)\.json",
        "lookup": r"/v2/PhoneNumbers/(?P<name>[^/]+)",
        "prices": r"/v1/Messaging/Countries/(?P<name>\w+)",
        "service_number": r"/v1/Services/(?P<service>\w+)/PhoneNumbers/(?P<number>\w+)",
        "service_numbers": r"/v1/Services/(?P<service>\w+)/PhoneNumbers",
        "service": r"/v1/Services/(?P<service>\w+)",
        "services": r"/v1/Services",
    }.items()
)


def locate(path: str) -> Target:
    """Find what a path names."""
    for kind, pattern in _PATHS:
        if match := pattern.fullmatch(path):
            return Target(kind, **match.groupdict())
    return Target("unknown")


@dataclass(frozen=True)
class Call:
    """One request. `form` is empty unless the body is form-encoded; `origin` is scheme and host, for links."""

    method: str
    path: str
    query: Mapping[str, str]
    form: Mapping[str, str]
    username: str
    password: str
    origin: str

    @cached_property
    def target(self) -> Target:
        return locate(self.path)

    def __repr__(self) -> str:
        return f"Call({self.method} {self.path})"


class Answer(NamedTuple):
    """Status and JSON body."""

    status: int
    body: bytes


def authorize(twin: Twin, call: Call) -> Account:
    """Return the account whose resources the call is about: the one in the path, else the one that logs in.

    Raises Refusal: 401/20003, 403/20008, 404/20404, and for a suspended account 401/20005 or what it is set to.
    """
    principal = twin.authenticate(call.username, call.password)
    if principal.account.test:
        raise Refusal(TEST_CREDENTIALS)
    principal.account.require_active()
    target = call.target
    if target.account is None:
        # The messaging API has no account in its paths: a parent account cannot see a subaccount through it.
        return principal.account
    account = twin.reach(principal, target.account, call.path)
    if target.kind == "account":
        if principal.key is not None and principal.key.kind == "standard":
            raise Refusal(UNAUTHENTICATED)
    else:
        account.require_active()
    return account


def answer(twin: Twin, call: Call, account: Account) -> Answer:
    """Execute an authorized call. Raises Refusal: 400, 404/20404, 405/20004."""
    methods = _HANDLERS.get(call.target.kind)
    if methods is None:
        raise Refusal(NOT_FOUND, path=call.path)
    handler = methods.get(call.method)
    if handler is None:
        raise Refusal(METHOD_NOT_ALLOWED)
    return handler(twin, call, account)


def _account(twin: Twin, call: Call, account: Account) -> Answer:
    return Answer(200, payloads.account(account))


def _numbers(twin: Twin, call: Call, account: Account) -> Answer:
    found = account.numbers.matching(call.query.get("PhoneNumber", ""))
    if name := call.query.get("FriendlyName"):
        found = [number for number in found if number.settings["friendly_name"] == name]
    if call.query.get("Origin", "twilio") != "twilio":
        found = []
    page = cut(found, call.query, ("PhoneNumber", "FriendlyName", "Origin", "Beta"))
    return Answer(200, payloads.numbers(page, call.path))


def _number(twin: Twin, call: Call, account: Account) -> Answer:
    return Answer(200, payloads.number(_own_number(call, account)))


def _update_number(twin: Twin, call: Call, account: Account) -> Answer:
    number = _own_number(call, account)
    receiver = _receiver(twin, call, account)
    twin.update(number, call.form)
    if receiver is not account:
        twin.transfer(number, receiver)
    return Answer(200, payloads.number(number))


def _receiver(twin: Twin, call: Call, account: Account) -> Account:
    """Return the account to transfer the number to; `account` itself for no transfer."""
    sid = call.form.get("AccountSid")
    if not sid:
        return account
    try:
        return twin.reach(twin.authenticate(call.username, call.password), sid, call.path)
    except Refusal:
        raise Refusal(BAD_REQUEST, what="AccountSid is not an account you can transfer to") from None


def _release_number(twin: Twin, call: Call, account: Account) -> Answer:
    twin.release(_own_number(call, account))
    return Answer(204, b"")


def _services(twin: Twin, call: Call, account: Account) -> Answer:
    page = cut(list(account.services.values()), call.query)
    return Answer(200, payloads.services(page, call.path, call.origin))


def _service(twin: Twin, call: Call, account: Account) -> Answer:
    return Answer(200, payloads.service(_own_service(call, account), call.origin))


def _service_numbers(twin: Twin, call: Call, account: Account) -> Answer:
    members = sorted(_own_service(call, account).numbers.values(), key=lambda number: number.ordinal)
    return Answer(200, payloads.service_numbers(cut(members, call.query), call.path, call.origin))


def _service_number(twin: Twin, call: Call, account: Account) -> Answer:
    number = _own_service(call, account).numbers.get(call.target.number or "")
    if number is None:
        raise Refusal(NOT_FOUND, path=call.path)
    return Answer(200, payloads.service_number(number, call.origin))


def _send_message(twin: Twin, call: Call, account: Account) -> Answer:
    return Answer(201, payloads.message(twin.send(account, call.form)))


def _message(twin: Twin, call: Call, account: Account) -> Answer:
    message = account.messages.get(call.target.name or "")
    if message is None:
        raise Refusal(NOT_FOUND, path=call.path)
    message.status = "sent" if message.status == "queued" else "delivered"
    return Answer(200, payloads.message(message))


def _lookup(twin: Twin, call: Call, account: Account) -> Answer:
    """Answer for any text: what is no number is not valid, and has no country."""
    phone_number = unquote(call.target.name or "")
    country = next((each for prefix, each in _COUNTRIES.items() if phone_number.startswith(prefix)), None)
    return Answer(200, payloads.lookup(phone_number, country if is_e164(phone_number) else None))


def _prices(twin: Twin, call: Call, account: Account) -> Answer:
    country = call.target.name or ""
    if country not in _COUNTRIES.values():
        raise Refusal(NOT_FOUND, path=call.path)
    return Answer(200, payloads.prices(country))


_COUNTRIES = {"+61": "AU", "+44": "GB", "+1": "US"}


def _own_number(call: Call, account: Account) -> Number:
    number = account.numbers.by_sid.get(call.target.number or "")
    if number is None:
        raise Refusal(NOT_FOUND, path=call.path)
    return number


def _own_service(call: Call, account: Account) -> Service:
    service = account.services.get(call.target.service or "")
    if service is None:
        raise Refusal(NOT_FOUND, path=call.path)
    return service


Handler = Callable[[Twin, Call, Account], Answer]

_HANDLERS: Mapping[str, Mapping[str, Handler]] = {
    "account": {"GET": _account},
    "numbers": {"GET": _numbers},
    "number": {"GET": _number, "POST": _update_number, "DELETE": _release_number},
    "messages": {"POST": _send_message},
    "message": {"GET": _message},
    "lookup": {"GET": _lookup},
    "prices": {"GET": _prices},
    "services": {"GET": _services},
    "service": {"GET": _service},
    "service_numbers": {"GET": _service_numbers},
    "service_number": {"GET": _service_number},
}
