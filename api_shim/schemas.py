"""The bodies of requests and answers, as pydantic models, and `HttpError`. No I/O.

Errors have FastAPI's shape and pydantic's types, but only the keys `loc`, `msg` and `type`: the key `input` would echo
the token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, LiteralString, TypedDict
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Secret,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from smschannel.api.errors import ChannelError
from smschannel.api.kube_client import Object
from smschannel.api.reasons import NOT_CONFIGURED, REST_STATUSES, Reason
from smschannel.api.resource import AccountSid, PhoneNumber
from smschannel.api.status import rest_status
from smschannel.api.text import clean, clean_phone_number, unexpected

_PATTERN = "string_pattern_mismatch"
_API_KEY_SID = re.compile("SK[0-9a-f]{32}")
_API_KEY_SID_MESSAGE: LiteralString = (
    'api_key_sid is "SK" and 32 of the digits 0-9 and a-f; leave it out if auth_token is the account\'s'
)


class ErrorItem(TypedDict):
    """One error of a 422 answer; `loc` is the path to the invalid value."""

    loc: list[str | int]
    msg: str
    type: str


class HttpError(ChannelError):
    """An answer with status 400 or above: raised anywhere, rendered by `server`."""

    def __init__(self, status: int, detail: str | Sequence[ErrorItem], **headers: str) -> None:
        """Answer `{"detail": detail}`. Header names are written with underscores: `Retry_After="5"`."""
        super().__init__(detail if isinstance(detail, str) else "invalid input")
        self.status = status
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def validation_error(loc: Sequence[str | int], msg: str, kind: str) -> HttpError:
    """Return a 422 answer with one error, of pydantic's type `kind`."""
    return HttpError(422, [ErrorItem(loc=list(loc), msg=msg, type=kind)])


def _pattern_message(message: LiteralString, cleaned: Callable[[str], str] = clean) -> WrapValidator:
    """Replace pydantic's message about a regular expression with one that says what is expected.

    It names the first character that is not plain text after `cleaned`.
    """

    def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            if error.errors(include_input=False)[0]["type"] != _PATTERN:
                raise
            raise _pattern_error(message, cleaned(value)) from None

    return WrapValidator(validate)


def _without_punctuation(value: object) -> object:
    return clean_phone_number(value) if isinstance(value, str) else value


def _clean(value: object) -> object:
    return clean(value) if isinstance(value, str) else value


def _check_api_key_sid(value: str) -> str:
    if _API_KEY_SID.fullmatch(value):
        return value
    raise _pattern_error(_API_KEY_SID_MESSAGE, value)


def _pattern_error(message: LiteralString, value: str) -> PydanticCustomError:
    """Return an error that says what is expected, and names the first character of `value` that is not plain text."""
    if wrong := unexpected(value):
        return PydanticCustomError(_PATTERN, "it contains {wrong}; " + message, {"wrong": wrong})
    return PydanticCustomError(_PATTERN, message)


def _at_most_30(value: object) -> object:
    if isinstance(value, str) and len(value) > 30:
        raise PydanticCustomError("string_too_long", "String should have at most 30 characters")
    return value


def _api_key_sid_schema(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [{"type": "string", "pattern": r"^\s*SK[0-9a-f]{32}\s*$"}, {"type": "null"}]


class _Twice(ValueError):
    """A JSON object has a name more than once. Programs differ in which value counts, so that neither does."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise _Twice
    return document


class Setup(BaseModel):
    """The Twilio number of the instance, and the account's credentials. Other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    account_sid: Annotated[
        AccountSid,
        BeforeValidator(_clean),
        _pattern_message('account_sid is "AC" and 32 of the digits 0-9 and a-f, as the Twilio console shows it'),
        Field(
            description="The Twilio account that owns the number. White space around it is removed.",
            examples=["AC00000000000000000000000000000000"],
            json_schema_extra={"pattern": r"^\s*AC[0-9a-f]{32}\s*$"},
        ),
    ]
    auth_token: Annotated[
        Secret[Annotated[str, StringConstraints(max_length=512, pattern=r"^[!-~]+$"), BeforeValidator(_clean)]],
        _pattern_message("auth_token has letters, digits and punctuation only, no spaces within, and is not empty"),
        Field(
            description="The account's auth token, or the secret of the API key api_key_sid. It is stored encrypted;"
            " it can be replaced, but not read.",
            examples=["0123456789abcdef0123456789abcdef"],
            json_schema_extra={
                "type": "string",
                "format": "password",
                "pattern": r"^\s*[!-~]{1,512}\s*$",
                "writeOnly": True,
            },
        ),
    ]
    phone_number: Annotated[
        PhoneNumber,
        BeforeValidator(_without_punctuation),
        BeforeValidator(_at_most_30),  # validators run last to first: this one counts the characters sent
        _pattern_message(
            'phone_number is in E.164: "+", the country code and the number, such as +61400111222', clean_phone_number
        ),
        Field(
            description="In E.164: +, country code and number. Spaces, dashes, dots and parentheses are removed.",
            examples=["+61400111222"],
            json_schema_extra={
                "maxLength": 30,
                "pattern": r"^[ .()-]*\+[ .()-]*[1-9]([ .()-]*[0-9]){1,14}[ .()-]*$",
            },
        ),
    ]

    api_key_sid: Annotated[
        Annotated[str, BeforeValidator(_clean), AfterValidator(_check_api_key_sid)] | None,
        Field(
            description="The SID of the Twilio API key whose secret auth_token is. Null, or left out: auth_token is the"
            " account's.",
            examples=["SK00000000000000000000000000000000"],
            json_schema_extra=_api_key_sid_schema,
        ),
    ] = None

    @classmethod
    def parse(cls, body: bytes) -> Setup:
        """Parse a JSON body. Raises `HttpError` (422), with the errors that FastAPI would answer."""
        try:
            document = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_once_each) if body else None
        except json.JSONDecodeError as error:
            raise validation_error(["body", error.pos], "JSON decode error", "json_invalid") from None
        except UnicodeDecodeError as error:
            raise validation_error(["body", error.start], "JSON decode error: not UTF-8", "json_invalid") from None
        except _Twice:
            raise validation_error(["body"], "JSON object with a name more than once", "json_invalid") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, or too deep nesting
            raise validation_error(["body", 0], "JSON decode error", "json_invalid") from None
        if document is None:
            raise validation_error(["body"], "Field required", "missing")
        try:
            return cls.model_validate(document, from_attributes=True)
        except ValidationError as error:
            raise HttpError(
                422,
                [
                    ErrorItem(loc=["body", *each["loc"]], msg=each["msg"], type=each["type"])
                    for each in error.errors(include_url=False, include_context=False, include_input=False)
                ],
            ) from None


class ChannelStatus(BaseModel):
    """The body of every successful answer to GET and POST: these four keys and no others."""

    enabled: bool = Field(description="Whether the instance has a channel that is neither suspended nor being removed.")
    phone_number: str | None = Field(description="In E.164; null without a channel.")
    status: str = Field(
        description="not_configured without a channel, active if messages arrive; others: see the description.",
        json_schema_extra={"enum": list(REST_STATUSES)},
    )
    webhook_url: str | None = Field(
        description="The URL that receives the messages while the channel works; null until the operator has set it."
    )

    @classmethod
    def of(cls, channel: Object | None) -> ChannelStatus:
        """Return the status of an SmsChannel; None means that the instance has no channel."""
        if channel is None:
            return cls(enabled=False, phone_number=None, status=NOT_CONFIGURED, webhook_url=None)
        spec, status = channel["spec"], channel.get("status", {})
        return cls(
            enabled=not is_being_deleted(channel) and not spec.get("suspend", False),
            phone_number=spec["phoneNumber"],
            status=_rest_status(channel, status),
            webhook_url=status.get("webhookUrl"),
        )


def _rest_status(channel: Object, status: Mapping[str, Any]) -> str:
    if is_being_deleted(channel):
        return Reason.Restoring.rest_status
    if channel["spec"].get("suspend", False):
        return Reason.Suspended.rest_status
    return rest_status(status) if is_observed(channel) else Reason.Pending.rest_status


def is_being_deleted(channel: Object) -> bool:
    """Return whether the channel has been deleted and still has finalizers."""
    return "deletionTimestamp" in channel["metadata"]


def is_observed(channel: Object) -> bool:
    """Return whether the operator's status is about the current generation of the channel."""
    return bool(channel.get("status", {}).get("observedGeneration") == channel["metadata"]["generation"])


_UUID = TypeAdapter(UUID)


def instance_id(segment: str) -> str:
    """Return the UUID in the form that names a channel. Raises `HttpError` (422) for anything that is not a UUID."""
    try:
        return str(_UUID.validate_python(segment))
    except ValidationError as error:
        kind = error.errors(include_input=False)[0]["type"]
        message = "Input should be a valid UUID, such as 497f6eca-6276-4993-bfeb-53cbbbba6f08"
        raise validation_error(["path", "instance_id"], message, kind) from None
