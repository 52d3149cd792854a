"""Serve the twin over HTTP: one origin for api.twilio.com, messaging.twilio.com and the control API."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from time import perf_counter
from urllib.parse import parse_qsl

import aiohttp
from aiohttp import web

from tests.twin import control, payloads
from tests.twin.api import Answer, Call, answer, authorize
from tests.twin.faults import Action
from tests.twin.journal import Entry, Violation, forbidden
from tests.twin.refusals import Refusal, Row
from tests.twin.state import Account, Twin

log = logging.getLogger("tests.twin")

LOOPBACK = "127.0.0.1"


@asynccontextmanager
async def twin_server(twin: Twin, port: int = 0) -> AsyncIterator[str]:
    """Serve `twin` on loopback while the block runs. Yield its base URL, such as http://127.0.0.1:40123."""
    runner = web.AppRunner(
        create_app(twin),
        access_log=None,
        # A caller that closes the connection frees its slot, also when its answer hangs.
        handler_cancellation=True,
        shutdown_timeout=0.1,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, LOOPBACK, port).start()
        yield f"http://{LOOPBACK}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def create_app(twin: Twin) -> web.Application:
    app = web.Application()
    app[control.TWIN] = twin
    app.cleanup_ctx.append(_outbound)
    app.router.add_routes(control.ROUTES)
    app.router.add_route("*", "/{path:.*}", _api)
    return app


async def _outbound(app: web.Application) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        app[control.SESSION] = session
        yield


async def _api(request: web.Request) -> web.StreamResponse:
    """Answer one call of Twilio's API: credentials, faults, then the answer. Record it in the journal in any case."""
    began = perf_counter()
    twin = request.app[control.TWIN]
    call = await _read(request)
    refusal: Refusal | None = None
    account: Account | None = None
    try:
        account = authorize(twin, call)
    except Refusal as refused:
        refusal = refused
    rule = twin.faults.strike(call.method, call.path, _accounts(twin, call))
    action = rule.action if rule else None
    status: int | None = None
    try:
        with account.slot() if account is not None else nullcontext():
            response = await _respond(request, call, account, refusal, action, began)
        status = response.status
    except Refusal as refused:
        response = _refuse(twin, refused, account, began)
        status = refused.status
    except _NoAnswerError:
        response = web.Response()
    finally:
        _record(twin, call, status)
    return response


async def _respond(
    request: web.Request,
    call: Call,
    account: Account | None,
    refusal: Refusal | None,
    action: Action | None,
    began: float,
) -> web.StreamResponse:
    twin = request.app[control.TWIN]
    if twin.latency:
        await asyncio.sleep(twin.latency)
    if action is not None and not action.after and action.kind != "truncate":
        faulty = await _apply_fault(request, action, account, began)
        if faulty is not None:
            return faulty
    if account is None:
        raise refusal or AssertionError("neither authorized nor refused")
    given = answer(twin, call, account)
    if action is not None and action.kind == "truncate":
        return await _truncate(request, given)
    if action is not None and action.after:
        faulty = await _apply_fault(request, action, account, began)
        if faulty is not None:
            return faulty
    return _response(twin, given, account, began)


async def _read(request: web.Request) -> Call:
    username, password = _credentials(request.headers.get("Authorization", ""))
    # parse_qsl: aiohttp's own parsing of queries and forms costs more than the rest of the call.
    form: dict[str, str] = {}
    if request.body_exists:
        body = await request.read()
        if request.content_type == "application/x-www-form-urlencoded":
            form = dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
    path, _, query = request.raw_path.partition("?")
    return Call(
        method=request.method,
        path=path,
        query=dict(parse_qsl(query, keep_blank_values=True)) if query else {},
        form=form,
        username=username,
        password=password,
        origin=f"{request.scheme}://{request.host}",
    )


def _credentials(header: str) -> tuple[str, str]:
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        username, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return username, password


def _accounts(twin: Twin, call: Call) -> tuple[str | None, ...]:
    """Return the SIDs of the account in the path and of the account that logs in."""
    key = twin.keys.get(call.username)
    return call.target.account, call.username if key is None else key.account.sid


def _record(twin: Twin, call: Call, status: int | None) -> None:
    target, accounts = call.target, _accounts(twin, call)
    at, account = twin.clock(), accounts[0] or accounts[1] or None
    sid = target.number or target.service
    twin.journal.record(
        Entry(
            at=at,
            account=account,
            method=call.method,
            kind=target.kind,
            sid=sid,
            parameters=(*call.query, *call.form),
            sms_url=call.form.get("SmsUrl"),
            sms_method=call.form.get("SmsMethod"),
            status=status,
        )
    )
    log.debug("%s %s %s: %s", call.method, target.kind, sid or account, status or "no answer")
    why = forbidden(call.method, target.kind, call.form)
    if why is not None:
        twin.journal.violations.append(Violation(at, account, call.method, target.kind, sid, why))
        log.warning("violation: %s (%s)", why, sid)


def _response(twin: Twin, given: Answer, account: Account | None, began: float) -> web.Response:
    headers = {
        "Twilio-Request-Id": twin.new_sid("RQ"),
        "Twilio-Concurrent-Requests": str(account.in_flight if account is not None else 0),
        "Twilio-Request-Duration": f"{perf_counter() - began:.3f}",
    }
    if given.body:
        headers["Content-Type"] = "application/json"
    return web.Response(status=given.status, body=given.body, headers=headers)


def _refuse(twin: Twin, refusal: Refusal, account: Account | None, began: float) -> web.Response:
    response = _response(twin, Answer(refusal.status, payloads.error(refusal)), account, began)
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="Twilio API"'
    if refusal.status == 429 and account is not None and account.retry_after is not None:
        response.headers["Retry-After"] = str(account.retry_after)
    return response


class _NoAnswerError(Exception):
    """The connection is closed: no answer can be sent."""


async def _apply_fault(
    request: web.Request, action: Action, account: Account | None, began: float
) -> web.Response | None:
    """Apply a fault. Return its answer; None if the call goes on (it was only delayed)."""
    twin = request.app[control.TWIN]
    if action.kind == "delay":
        await asyncio.sleep(action.seconds)
        return None
    if action.kind == "hang":
        await asyncio.Event().wait()
    if action.kind == "reset":
        _reset(request)
        raise _NoAnswerError
    if action.kind in {"html", "html200"}:
        status = 200 if action.kind == "html200" else action.status
        page = "<html><body>Down for maintenance</body></html>"
        return web.Response(status=status, text=page, content_type="text/html")
    refusal = Refusal(Row(action.status, action.code or 20000 + action.status, "Injected by the twin"))
    response = _refuse(twin, refusal, account, began)
    if action.problem:
        response.body = payloads.problem(refusal)
        response.content_type = "application/problem+json"
    if action.retry_after is not None:
        response.headers["Retry-After"] = str(action.retry_after)
    return response


def _reset(request: web.Request) -> None:
    """Reset the connection."""
    transport = request.transport
    if transport is None:
        return
    # Lingering for zero seconds turns the close into a RST, as from a peer that crashed.
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _truncate(request: web.Request, given: Answer) -> web.StreamResponse:
    """Send half of the body, then close the connection."""
    response = web.StreamResponse(status=given.status, headers={"Content-Type": "application/json"})
    response.content_length = len(given.body)
    await response.prepare(request)
    await response.write(given.body[: len(given.body) // 2])
    if request.transport is not None:
        request.transport.close()
    raise _NoAnswerError
