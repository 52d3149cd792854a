"""The control API under /_twin/: changes made at Twilio's console, outages, and messages from phones.

JSON in and out, no authentication (the twin listens on loopback only). Unknown fields are refused, so that a
typo in a test does not pass unnoticed. Errors: 400, 404, 409 with `{"error": "..."}`. Only the calls that make a
token or secret answer with it: seed, accounts, secondary token, keys.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from functools import wraps
from typing import Annotated, Literal, TypeVar

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tests.twin import inbound
from tests.twin.faults import Action, Match, Rule
from tests.twin.refusals import Row
from tests.twin.state import (
    Account,
    Application,
    ConflictError,
    KeyKind,
    Number,
    Service,
    Status,
    Twin,
    UnknownError,
)

log = logging.getLogger("tests.twin")

TWIN = web.AppKey("twin", Twin)
SESSION = web.AppKey("session", aiohttp.ClientSession)

Method = Literal["GET", "POST"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Seed(_Body):
    accounts: int = Field(default=1, ge=0)
    numbers: int = Field(default=40, ge=0)
    first: Annotated[str, Field(pattern=r"^\+[1-9][0-9]{1,14}$")] | None = None


class NewAccount(_Body):
    friendly_name: str = ""
    parent: str | None = None
    test: bool = False


class AccountRefusal(_Body):
    status: int
    code: int


class AccountChange(_Body):
    """`refusal`: the error that a suspended or closed account receives. `concurrency` null: no limit."""

    status: Status | None = None
    refusal: AccountRefusal | None = None
    concurrency: int | None = Field(default=None, ge=0)
    retry_after: int | None = Field(default=None, ge=0)


class NewKey(_Body):
    kind: KeyKind = "standard"


class NumberSettings(_Body):
    friendly_name: str | None = None
    sms_url: str | None = None
    sms_method: Method | None = None
    sms_fallback_url: str | None = None
    sms_fallback_method: Method | None = None
    sms_application_sid: str | None = None
    status_callback: str | None = None
    voice_url: str | None = None

    def given(self) -> dict[str, str]:
        return self.model_dump(include=set(NumberSettings.model_fields), exclude_none=True)


class NewNumber(NumberSettings):
    phone_number: str
    sms: bool = True


class NewService(_Body):
    friendly_name: str = ""
    inbound_request_url: str | None = None
    inbound_method: Method = "POST"
    use_inbound_webhook_on_number: bool = False


class NewApplication(_Body):
    sms_url: str
    sms_method: Method = "POST"


class NewFault(_Body):
    match: Match = Match()
    action: Action


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Body = TypeVar("Body", bound=BaseModel)


def _guarded(handler: Handler) -> Handler:
    """Turn errors of the caller into 400, 404 and 409 with a message."""

    @wraps(handler)
    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in error.errors()]
            return web.json_response({"error": "; ".join(wrong)}, status=400)
        except UnknownError as error:
            return web.json_response({"error": str(error)}, status=404)
        except ConflictError as error:
            return web.json_response({"error": str(error)}, status=409)

    return guarded


async def _body(request: web.Request, model: type[Body]) -> Body:
    return model.model_validate_json(await request.read() or b"{}")


def _twin(request: web.Request) -> Twin:
    return request.app[TWIN]


def _account(request: web.Request) -> Account:
    return _twin(request).account(request.match_info["account"])


def _number(request: web.Request) -> Number:
    return _twin(request).number(request.match_info["number"])


def _service(request: web.Request) -> Service:
    return _twin(request).service(request.match_info["service"])


def _done() -> web.Response:
    return web.Response(status=204)


# -- accounts and credentials --------------------------------------------------------------------------------


async def _overview(request: web.Request) -> web.Response:
    twin = _twin(request)
    return web.json_response({"accounts": list(twin.accounts), "numbers": len(twin.numbers)})


async def _seed(request: web.Request) -> web.Response:
    requested = await _body(request, Seed)
    made = _twin(request).seed(requested.accounts, requested.numbers, requested.first)
    return web.json_response({"accounts": [credentials_of(account) for account in made]}, status=201)


async def _add_account(request: web.Request) -> web.Response:
    twin, requested = _twin(request), await _body(request, NewAccount)
    parent = None if requested.parent is None else twin.account(requested.parent)
    account = twin.add_account(friendly_name=requested.friendly_name, parent=parent, test=requested.test)
    return web.json_response(credentials_of(account), status=201)


async def _read_account(request: web.Request) -> web.Response:
    return web.json_response(_account_state(_account(request)))


async def _change_account(request: web.Request) -> web.Response:
    account, requested = _account(request), await _body(request, AccountChange)
    if requested.status is not None:
        account.own_status = requested.status
    if requested.refusal is not None:
        account.inactive_row = Row(requested.refusal.status, requested.refusal.code, account.inactive_row.message)
    if "concurrency" in requested.model_fields_set:
        account.concurrency = requested.concurrency
    if "retry_after" in requested.model_fields_set:
        account.retry_after = requested.retry_after
    return web.json_response(_account_state(account))


async def _create_secondary(request: web.Request) -> web.Response:
    token = _twin(request).create_secondary_token(_account(request))
    return web.json_response({"auth_token": token}, status=201)


async def _revoke_secondary(request: web.Request) -> web.Response:
    _account(request).secondary_token = None
    return _done()


async def _promote(request: web.Request) -> web.Response:
    _twin(request).promote(_account(request))
    return _done()


async def _add_key(request: web.Request) -> web.Response:
    requested = await _body(request, NewKey)
    key = _twin(request).add_key(_account(request), requested.kind)
    return web.json_response({"sid": key.sid, "secret": key.secret, "kind": key.kind}, status=201)


async def _revoke_key(request: web.Request) -> web.Response:
    if _twin(request).keys.pop(request.match_info["key"], None) is None:
        raise UnknownError("API key not found")
    return _done()


# -- numbers, services, applications -------------------------------------------------------------------------


async def _add_number(request: web.Request) -> web.Response:
    twin, requested = _twin(request), await _body(request, NewNumber)
    number = twin.add_number(_account(request), requested.phone_number, sms=requested.sms, **requested.given())
    return web.json_response(number_state(twin, number), status=201)


async def _read_number(request: web.Request) -> web.Response:
    return web.json_response(number_state(_twin(request), _number(request)))


async def _change_number(request: web.Request) -> web.Response:
    twin, number = _twin(request), _number(request)
    number.change((await _body(request, NumberSettings)).given(), twin.now())
    return web.json_response(number_state(twin, number))


async def _release_number(request: web.Request) -> web.Response:
    _twin(request).release(_number(request))
    return _done()


async def _add_service(request: web.Request) -> web.Response:
    requested = await _body(request, NewService)
    service = _twin(request).add_service(_account(request), **requested.model_dump())
    return web.json_response(_service_state(service), status=201)


async def _read_service(request: web.Request) -> web.Response:
    return web.json_response(_service_state(_service(request)))


async def _change_service(request: web.Request) -> web.Response:
    service, requested = _service(request), await _body(request, NewService)
    for name in requested.model_fields_set:
        setattr(service, name, getattr(requested, name))
    return web.json_response(_service_state(service))


async def _join_service(request: web.Request) -> web.Response:
    _twin(request).join_service(_number(request), _service(request))
    return _done()


async def _leave_service(request: web.Request) -> web.Response:
    number, service = _number(request), _service(request)
    if number.service_sid != service.sid:
        raise UnknownError("the number is not in this messaging service")
    _twin(request).leave_service(number)
    return _done()


async def _add_application(request: web.Request) -> web.Response:
    requested = await _body(request, NewApplication)
    application = _twin(request).add_application(
        _account(request), sms_url=requested.sms_url, sms_method=requested.sms_method
    )
    return web.json_response(asdict(application), status=201)


async def _change_application(request: web.Request) -> web.Response:
    account, sid = _account(request), request.match_info["application"]
    if sid not in account.applications:
        raise UnknownError(f"application {sid} not found")
    requested = await _body(request, NewApplication)
    changed: Application = replace(account.applications[sid], **requested.model_dump())
    account.applications[sid] = changed
    return web.json_response(asdict(changed))


# -- faults, journal, inbound --------------------------------------------------------------------------------


async def _add_fault(request: web.Request) -> web.Response:
    requested = await _body(request, NewFault)
    rule = _twin(request).faults.add(requested.match, requested.action)
    return web.json_response(_rule_state(rule), status=201)


async def _list_faults(request: web.Request) -> web.Response:
    return web.json_response({"faults": [_rule_state(rule) for rule in _twin(request).faults.rules.values()]})


async def _clear_faults(request: web.Request) -> web.Response:
    _twin(request).faults.clear()
    return _done()


async def _remove_fault(request: web.Request) -> web.Response:
    try:
        _twin(request).faults.remove(int(request.match_info["fault"]))
    except KeyError:
        raise UnknownError("fault not found") from None
    return _done()


async def _read_journal(request: web.Request) -> web.Response:
    """List entries, the oldest first; ?account=, ?kind=, ?method=, ?sid= filter them (not the counts)."""
    journal, requested = _twin(request).journal, request.query
    entries = [
        asdict(entry)
        for entry in journal.entries
        if all(
            getattr(entry, name) == requested[name]
            for name in ("account", "kind", "method", "sid")
            if name in requested
        )
    ]
    return web.json_response({"entries": entries, "counts": dict(journal.counts)})


async def _reset_journal(request: web.Request) -> web.Response:
    _twin(request).journal.reset()
    return _done()


async def _read_violations(request: web.Request) -> web.Response:
    return web.json_response({"violations": [asdict(one) for one in _twin(request).journal.violations]})


async def _reset_violations(request: web.Request) -> web.Response:
    _twin(request).journal.reset_violations()
    return _done()


async def _inbound(request: web.Request) -> web.Response:
    message = await _body(request, inbound.Message)
    outcome = await inbound.deliver(request.app[SESSION], _twin(request), message)
    log.info("inbound to %s: %s", message.to, type(outcome).__name__.lower())
    return web.json_response({"outcome": type(outcome).__name__.lower(), **asdict(outcome)})


async def _unknown(request: web.Request) -> web.Response:
    # Without this a typo would be answered as a call of Twilio's API and recorded in the journal.
    raise UnknownError(f"unknown control call: {request.method} {request.path}")


# -- shapes --------------------------------------------------------------------------------------------------


def credentials_of(account: Account) -> dict[str, object]:
    """Return SID, token and numbers of an account, for the caller that makes it. Nothing else contains the token."""
    return {
        "account_sid": account.sid,
        "auth_token": account.auth_token,
        "phone_numbers": [number.phone_number for number in account.numbers],
    }


def number_state(twin: Twin, number: Number) -> dict[str, object]:
    """Return everything about a number; `route` is where an inbound SMS would go, or why it would be dropped."""
    return {
        "sid": number.sid,
        "account_sid": number.account_sid,
        "phone_number": number.phone_number,
        "sms": number.sms,
        "service_sid": number.service_sid,
        **number.settings,
        "route": asdict(inbound.route(twin, number)),
    }


def _account_state(account: Account) -> dict[str, object]:
    return {
        "account_sid": account.sid,
        "parent": account.parent and account.parent.sid,
        "status": account.status,
        "test": account.test,
        "secondary_token": account.secondary_token is not None,
        "concurrency": account.concurrency,
        "retry_after": account.retry_after,
        "in_flight": account.in_flight,
        "numbers": len(account.numbers),
        "services": list(account.services),
    }


def _service_state(service: Service) -> dict[str, object]:
    return {
        "sid": service.sid,
        "account_sid": service.account_sid,
        "friendly_name": service.friendly_name,
        "inbound_request_url": service.inbound_request_url,
        "inbound_method": service.inbound_method,
        "use_inbound_webhook_on_number": service.use_inbound_webhook_on_number,
        "numbers": [number.phone_number for number in service.numbers.values()],
    }


def _rule_state(rule: Rule) -> dict[str, object]:
    return {
        "id": rule.id,
        "match": rule.match.model_dump(),
        "action": rule.action.model_dump(),
        "seen": rule.seen,
        "hit": rule.hit,
    }


_OF_ACCOUNT = "/_twin/accounts/{account}"
_OF_SERVICE = "/_twin/services/{service}"

ROUTES = [
    web.route(method, path, _guarded(handler))
    for method, path, handler in (
        ("GET", "/_twin/accounts", _overview),
        ("POST", "/_twin/seed", _seed),
        ("POST", "/_twin/accounts", _add_account),
        ("GET", _OF_ACCOUNT, _read_account),
        ("PATCH", _OF_ACCOUNT, _change_account),
        ("POST", f"{_OF_ACCOUNT}/tokens/secondary", _create_secondary),
        ("DELETE", f"{_OF_ACCOUNT}/tokens/secondary", _revoke_secondary),
        ("POST", f"{_OF_ACCOUNT}/tokens/promote", _promote),
        ("POST", f"{_OF_ACCOUNT}/keys", _add_key),
        ("DELETE", "/_twin/keys/{key}", _revoke_key),
        ("POST", f"{_OF_ACCOUNT}/numbers", _add_number),
        ("GET", "/_twin/numbers/{number}", _read_number),
        ("PATCH", "/_twin/numbers/{number}", _change_number),
        ("DELETE", "/_twin/numbers/{number}", _release_number),
        ("POST", f"{_OF_ACCOUNT}/services", _add_service),
        ("GET", _OF_SERVICE, _read_service),
        ("PATCH", _OF_SERVICE, _change_service),
        ("PUT", f"{_OF_SERVICE}/numbers/{{number}}", _join_service),
        ("DELETE", f"{_OF_SERVICE}/numbers/{{number}}", _leave_service),
        ("POST", f"{_OF_ACCOUNT}/applications", _add_application),
        ("PUT", f"{_OF_ACCOUNT}/applications/{{application}}", _change_application),
        ("GET", "/_twin/faults", _list_faults),
        ("POST", "/_twin/faults", _add_fault),
        ("DELETE", "/_twin/faults", _clear_faults),
        ("DELETE", r"/_twin/faults/{fault:\d+}", _remove_fault),
        ("GET", "/_twin/journal", _read_journal),
        ("DELETE", "/_twin/journal", _reset_journal),
        ("GET", "/_twin/violations", _read_violations),
        ("DELETE", "/_twin/violations", _reset_violations),
        ("POST", "/_twin/inbound", _inbound),
        ("*", "/_twin/{path:.*}", _unknown),
    )
]
