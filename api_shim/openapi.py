"""The API's description of itself, OpenAPI 3.1. It is tested against the running server, and a client made from it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from api_shim.edge import BODY_BYTES
from api_shim.schemas import ChannelStatus, Setup
from smschannel.api.reasons import NOT_CONFIGURED, Reason

PATH = "/v1/instances/{instance_id}/channels/sms"

_INTRODUCTION = f"""
Which Twilio number serves an instance, and whether its messages really arrive there.

**Logging in.** `X-Api-Key`, or `Authorization: Bearer` with a Kubernetes token for this API's audience. Either is
enough; where both are sent, both must be right. A client that sends too many wrong ones is answered 429 for a while.

**The outcome.** POST is answered at once, mostly with `pending`: the operator then tries the credentials and takes
the number over. `Prefer: wait=10` has the answer wait until the outcome is known, at most so many seconds;
`Preference-Applied` says that it was waited for. A channel that turns out not to work is no error: its `status` says
why.

**Twice is no harm.** Every call may be repeated. After 409, 429 and 503, do so when `Retry-After` (seconds) is over;
it is missing where repeating alone does not help.

**Finding it again.** Every answer carries `X-Request-Id`, yours if you sent one; the service's log has it, too.

**What each status asks for.** Where it names the channel's `spec`, or has a token sealed: POST the right values again.
`suspended` and the policies are set in Kubernetes only, by whoever then owns the channel.

| status | what to do |
|---|---|
| {NOT_CONFIGURED} | The instance has no channel: POST makes one. |
"""

_NOTHING_ELSE = {"type": "object", "required": ["detail"], "additionalProperties": False}


def document() -> dict[str, Any]:
    """As `/openapi.json` has it."""
    remedies: dict[str, str] = {}
    for reason in Reason:
        remedies.setdefault(reason.rest_status, reason.remedy)
    table = "\n".join(f"| {status} | {remedy} |" for status, remedy in remedies.items())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "SMS channels",
            "version": version("sms-channel-operator"),
            "description": _INTRODUCTION.strip() + "\n" + table,
        },
        "paths": {PATH: _path()},
        "components": {
            "securitySchemes": {
                "ApiKey": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-Api-Key",
                    "description": "Made with `kubectl sms key create`.",
                },
                "Bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A Kubernetes token whose owner may get, create and update, or delete the"
                    " SmsChannel of the instance's name.",
                },
            },
            "schemas": {
                "Setup": Setup.model_json_schema(),
                "ChannelStatus": {**ChannelStatus.model_json_schema(), "additionalProperties": False},
                "Refused": {
                    **_NOTHING_ELSE,
                    "description": "Why not, and what to do about it.",
                    "properties": {"detail": {"type": "string", "title": "Detail"}},
                    "title": "Refused",
                },
                "Invalid": {
                    **_NOTHING_ELSE,
                    "description": "Everything that is wrong, never with the value that was sent.",
                    "properties": {
                        "detail": {
                            "type": "array",
                            "minItems": 1,
                            "title": "Detail",
                            "items": {"$ref": "#/components/schemas/Mistake"},
                        }
                    },
                    "title": "Invalid",
                },
                "Mistake": {
                    "type": "object",
                    "required": ["loc", "msg", "type"],
                    "additionalProperties": False,
                    "properties": {
                        "loc": {
                            "description": "Where: path, header or body first, then what in there.",
                            "type": "array",
                            "minItems": 1,
                            "title": "Location",
                            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                        },
                        "msg": {"type": "string", "title": "Message"},
                        "type": {"type": "string", "title": "Kind", "description": "pydantic's name for the mistake."},
                    },
                    "title": "Mistake",
                },
            },
            "headers": _HEADERS,
        },
        "security": [{"ApiKey": []}, {"Bearer": []}, {"ApiKey": [], "Bearer": []}],
    }


def _header(kind: str, description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind, **more}}


_HEADERS = {
    "X-Request-Id": _header("string", "Under which the service's log has this request."),
    "Preference-Applied": _header("string", "wait=N, if the answer waited for the outcome.", pattern="^wait=[0-9]+$"),
    "Retry-After": _header("integer", "Seconds after which to try again.", minimum=1),
    "WWW-Authenticate": _header("string", "How to log in."),
    "Allow": _header("string", "The methods that this path takes."),
}


def _path() -> dict[str, Any]:
    instance = {
        "name": "instance_id",
        "in": "path",
        "required": True,
        "description": "The instance's UUID, in any of the usual forms: capitals, no dashes, braces.",
        "schema": {"type": "string", "format": "uuid", "title": "Instance Id"},
        "example": "497f6eca-6276-4993-bfeb-53cbbbba6f08",
    }
    prefer = {
        "name": "Prefer",
        "in": "header",
        "required": False,
        "description": "wait=N: answer when the outcome is known, at most N seconds from now (RFC 7240).",
        "schema": {"type": "string", "title": "Prefer"},
        "example": "wait=10",
    }
    request_id = {
        "name": "X-Request-Id",
        "in": "header",
        "required": False,
        "description": "To find this request in logs: letters, digits and -._~+/=:@, at most 128. Others are replaced.",
        "schema": {"type": "string", "title": "X-Request-Id"},
    }
    waited = ("Preference-Applied",)
    return {
        "parameters": [instance],
        "get": {
            "operationId": "sms_status",
            "tags": ["SMS channel"],
            "summary": "Sms Status",
            "parameters": [request_id],
            "responses": {"200": _status("The channel as it is, or that there is none."), **_refusals(422)},
        },
        "post": {
            "operationId": "setup_sms",
            "tags": ["SMS channel"],
            "summary": "Setup Sms",
            "description": "Makes the channel, or changes it. The same thing again disturbs nothing.",
            "parameters": [prefer, request_id],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Setup"}}},
            },
            "responses": {
                "200": _status("The channel was there, and is as you said now.", *waited),
                "201": _status("The channel is new.", *waited),
                **_refusals(408, 409, 413, 415, 422),
            },
        },
        "delete": {
            "operationId": "teardown_sms",
            "tags": ["SMS channel"],
            "summary": "Teardown Sms",
            "description": "Removes channel and credentials, and gives the number back as it was found.",
            "parameters": [prefer, request_id],
            "responses": {
                "202": _answer("You waited, and the removal is still under way. It goes on by itself.", *waited),
                "204": _answer("It is being removed; if you waited, it is gone. Also where nothing was.", *waited),
                **_refusals(409, 422),
            },
        },
    }


def _answer(description: str, *headers: str, schema: str | None = None) -> dict[str, Any]:
    named = {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *headers)}
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "headers": named, **({"content": content} if schema else {})}


def _status(description: str, *headers: str) -> dict[str, Any]:
    return _answer(description, *headers, schema="ChannelStatus")


_REFUSALS: Mapping[int, tuple[str, tuple[str, ...]]] = {
    400: ("This is no HTTP, or the body was cut.", ()),
    401: ("Who you are cannot be told: no key or token, or a wrong one.", ("WWW-Authenticate",)),
    403: ("You may not do this with this instance, whether or not it has a channel.", ()),
    404: ("There is nothing at this path.", ()),
    405: ("This path does not take this method.", ("Allow",)),
    408: ("The body did not arrive in time.", ()),
    409: (
        "The channel is managed in Kubernetes (by Git or kubectl: change it there), is still being removed, or is"
        " being changed by others at the same time (those two have Retry-After).",
        ("Retry-After",),
    ),
    413: (f"The body has more than {BODY_BYTES} bytes.", ()),
    415: ("The body is not declared as JSON.", ()),
    417: ("The Expect header asks for something else than 100-continue.", ()),
    422: ("Something in the path or the body is wrong: each mistake with its place.", ()),
    429: ("Too many wrong keys or tokens came from your address.", ("Retry-After",)),
    500: ("A mistake in this service.", ()),
    503: ("Kubernetes does not answer, or the service is too busy. Nothing is half done.", ("Retry-After",)),
}
_ALWAYS = (400, 401, 403, 404, 405, 417, 429, 500, 503)


def _refusals(*more: int) -> dict[str, Any]:
    return {
        str(status): _answer(description, *headers, schema="Invalid" if status == 422 else "Refused")
        for status, (description, headers) in _REFUSALS.items()
        if status in {*_ALWAYS, *more}
    }
