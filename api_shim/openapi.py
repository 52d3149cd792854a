"""The OpenAPI 3.1 document of the API. Tests compare the running server with it, and generate a client from it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from api_shim.schemas import ChannelStatus, Setup
from api_shim.server import BODY_BYTES
from smschannel.api.reasons import NOT_CONFIGURED, Reason

PATH = "/v1/instances/{instance_id}/channels/sms"

_INTRODUCTION = f"""
Configure the Twilio number of an instance, and see whether its messages arrive.

**Authentication.** Send `X-Api-Key`, or `Authorization: Bearer` with a Kubernetes token for this API's audience. One is
enough; if both are sent, both must be valid. A client with too many failures is answered 429 for a while.

A key, token or setup on a command line is visible to other users of the machine, so the examples read them from
files that only you can read: `setup.json`, and `api-key.txt` with the line `X-Api-Key: KEY`.

**Result.** POST is answered at once, usually with `pending`: the operator then verifies the credentials and configures
the number. With `Prefer: wait=10` the answer waits for the result, at most 10 seconds; `Preference-Applied` confirms
that it waited. A channel that does not work is not an HTTP error: its `status` gives the reason.

**Retries.** Every call is idempotent. After 409, 429 and 503, repeat it when the seconds in `Retry-After` have passed;
without that header, repeating alone does not help.

**Request IDs.** Every answer has `X-Request-Id`: the one that was sent, or else a new one. The log has it too.

**Statuses.** If the table says to change a field of `spec` or to seal a token, POST the correct values again.
`suspended` and the policies can be set in Kubernetes only, and are kept by POST.

| status | what to do |
|---|---|
| {NOT_CONFIGURED} | The instance has no channel. POST creates one. |
"""

_ONLY_DETAIL = {"type": "object", "required": ["detail"], "additionalProperties": False}


def document() -> dict[str, Any]:
    """Return the document that `/openapi.json` serves."""
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
                    "description": "Created with `kubectl sms key create`.",
                },
                "Bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A Kubernetes token whose user may get, create and update, or delete the SmsChannel"
                    " with the instance's name.",
                },
            },
            "schemas": {
                "Setup": Setup.model_json_schema(),
                "ChannelStatus": {**ChannelStatus.model_json_schema(), "additionalProperties": False},
                "HTTPError": {
                    **_ONLY_DETAIL,
                    "description": "The reason, and what to do about it.",
                    "properties": {"detail": {"type": "string", "title": "Detail"}},
                    "title": "HTTPError",
                },
                "HTTPValidationError": {
                    **_ONLY_DETAIL,
                    "description": "All errors of the request, without the values that were sent.",
                    "properties": {
                        "detail": {
                            "type": "array",
                            "minItems": 1,
                            "title": "Detail",
                            "items": {"$ref": "#/components/schemas/ValidationError"},
                        }
                    },
                    "title": "HTTPValidationError",
                },
                "ValidationError": {
                    "type": "object",
                    "required": ["loc", "msg", "type"],
                    "additionalProperties": False,
                    "properties": {
                        "loc": {
                            "description": "The path to the invalid value; the first item is path, header or body.",
                            "type": "array",
                            "minItems": 1,
                            "title": "Location",
                            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                        },
                        "msg": {"type": "string", "title": "Message"},
                        "type": {"type": "string", "title": "Error Type", "description": "pydantic's error type."},
                    },
                    "title": "ValidationError",
                },
            },
            "headers": _HEADERS,
        },
        "security": [{"ApiKey": []}, {"Bearer": []}, {"ApiKey": [], "Bearer": []}],
    }


def _header(kind: str, description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind, **more}}


_HEADERS = {
    "X-Request-Id": _header("string", "The ID of this request in the service's log."),
    "Preference-Applied": _header("string", "wait=N, if the answer waited for the result.", pattern="^wait=[0-9]+$"),
    "Retry-After": _header("integer", "The seconds after which to try again.", minimum=1),
    "WWW-Authenticate": _header("string", "The supported ways to authenticate."),
    "Allow": _header("string", "The methods of this path."),
}


def _path() -> dict[str, Any]:
    instance = {
        "name": "instance_id",
        "in": "path",
        "required": True,
        "description": "The instance's UUID; upper case, braces and missing dashes are accepted.",
        "schema": {"type": "string", "format": "uuid", "title": "Instance Id"},
        "example": "497f6eca-6276-4993-bfeb-53cbbbba6f08",
    }
    prefer = {
        "name": "Prefer",
        "in": "header",
        "required": False,
        "description": "wait=N: answer when the result is known, or after N seconds (RFC 7240).",
        "schema": {"type": "string", "title": "Prefer"},
        "example": "wait=10",
    }
    request_id = {
        "name": "X-Request-Id",
        "in": "header",
        "required": False,
        "description": "An ID for logs: at most 128 letters, digits and -._~+/=:@. Other values are replaced.",
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
            "responses": {"200": _status("The channel's status, or not_configured."), **_errors(422)},
        },
        "post": {
            "operationId": "setup_sms",
            "tags": ["SMS channel"],
            "summary": "Setup Sms",
            "description": "Creates or changes the channel. Repeating it with the same values changes nothing.",
            "parameters": [prefer, request_id],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Setup"}}},
            },
            "responses": {
                "200": _status("The channel existed, and was changed.", *waited),
                "201": _status("The channel was created.", *waited),
                **_errors(408, 409, 413, 415, 422),
            },
        },
        "delete": {
            "operationId": "teardown_sms",
            "tags": ["SMS channel"],
            "summary": "Teardown Sms",
            "description": "Removes the channel and its credentials, and restores the number's previous webhook.",
            "parameters": [prefer, request_id],
            "responses": {
                "202": _answer(
                    "The wait is over, and the channel is still being removed. The removal continues.", *waited
                ),
                "204": _answer(
                    "The channel is being removed, or after a wait, is gone. Also if there was none.", *waited
                ),
                **_errors(409, 422),
            },
        },
    }


def _answer(description: str, *headers: str, schema: str | None = None) -> dict[str, Any]:
    named = {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *headers)}
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "headers": named, **({"content": content} if schema else {})}


def _status(description: str, *headers: str) -> dict[str, Any]:
    return _answer(description, *headers, schema="ChannelStatus")


_ERRORS: Mapping[int, tuple[str, tuple[str, ...]]] = {
    400: ("The HTTP request is malformed, or the body incomplete.", ()),
    401: ("Not authenticated: the API key or bearer token is missing or invalid.", ("WWW-Authenticate",)),
    403: ("Not authorized for this call on this instance, whether or not it has a channel.", ()),
    404: ("There is no resource at this path.", ()),
    405: ("Method not allowed.", ("Allow",)),
    408: ("The body did not arrive in time.", ()),
    409: (
        "The channel is managed in Kubernetes (change it there, in Git or with kubectl, or have it handed over with"
        " 'kubectl sms adopt'), is still being removed, or is being changed"
        " by other clients at the same time (the last two have Retry-After).",
        ("Retry-After",),
    ),
    413: (f"The body is larger than {BODY_BYTES} bytes.", ()),
    415: ("The Content-Type is not JSON.", ()),
    417: ("The Expect header is not 100-continue.", ()),
    422: ("The path or the body is invalid; detail has all errors.", ()),
    429: (
        "Too many authentication failures from your address, or too many concurrent requests of yours.",
        ("Retry-After",),
    ),
    500: ("Internal server error.", ()),
    503: (
        "Kubernetes is not available, or the service has too many requests. A write was complete, or not made at all.",
        ("Retry-After",),
    ),
}
_ERRORS_OF_ALL_CALLS = (400, 401, 403, 404, 405, 417, 429, 500, 503)


def _errors(*more: int) -> dict[str, Any]:
    return {
        str(status): _answer(description, *headers, schema="HTTPValidationError" if status == 422 else "HTTPError")
        for status, (description, headers) in _ERRORS.items()
        if status in {*_ERRORS_OF_ALL_CALLS, *more}
    }
