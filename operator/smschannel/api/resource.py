"""The SmsChannel resource: its names in Kubernetes, and validation of what users write (`Spec`).

`crds/smschannels.yaml` has the same rules with the same messages; the tests run one table of manifests against both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, LiteralString, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StrictBool,
    StringConstraints,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

GROUP = "channels.hydracore.io"
VERSION = "v1"
PLURAL = "smschannels"
KIND = "SmsChannel"
API_VERSION = f"{GROUP}/{VERSION}"
FINALIZER = f"{GROUP}/restore"
CREDENTIALS_LABEL = f"{GROUP}/credentials"
CHECK_NOW_ANNOTATION = f"{GROUP}/check-now"


@dataclass(frozen=True)
class Rule:
    """A pattern for a string, as in the CRD. `message` says what to write instead; `shortest` is the minimum length."""

    pattern: str
    message: LiteralString
    shortest: int = 0

    def check(self, value: str) -> str:
        """Return `value`, or raise a pydantic error with `message`."""
        # fullmatch, since Python's "$" also matches before a final line break, and the API server's does not
        if len(value) < self.shortest or not re.fullmatch(self.pattern, value):
            raise PydanticCustomError("string_pattern_mismatch", self.message)
        return value

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


InstanceId = Annotated[
    str,
    Rule(
        "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
        "the name of an SmsChannel is its instance's id: a lower-case UUID with dashes,"
        " such as 497f6eca-6276-4993-bfeb-53cbbbba6f08",
    ),
]
AccountSid = Annotated[
    str,
    Rule(
        "^AC[0-9a-f]{32}$",
        'accountSid is "AC" and 32 of the digits 0-9 and a-f, as the Twilio console shows it',
    ),
]
PhoneNumber = Annotated[
    str,
    Rule(
        "^[+][1-9][0-9]{1,14}$",
        'phoneNumber is in E.164: "+", the country code and the number, digits only and in quotes,'
        ' such as "+61400111222"',
    ),
]
LoginSid = Annotated[
    str,
    Rule(
        "^((AC|SK)[0-9a-f]{32})?$",
        'sid is "AC" (an account) or "SK" (an API key) and 32 of the digits 0-9 and a-f;'
        " leave it out to log in as accountSid",
    ),
]
Sealed = Annotated[
    str,
    StringConstraints(max_length=4096),
    Rule(
        "^[A-Za-z0-9+/]+={0,2}$",
        "sealed is what 'kubectl sms seal' prints, whole and on one line; if this is a token in plain text,"
        " treat it as leaked and replace it at Twilio",
        shortest=1528,  # the length for a token of one character; a plain token may look like base64, but is shorter
    ),
]
SecretName = Annotated[
    str,
    StringConstraints(max_length=253),
    Rule(
        "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        "name is the name of a Secret in the channel's own namespace, such as twilio",
    ),
]
SecretKey = Annotated[
    str,
    StringConstraints(max_length=253),
    Rule(
        "^[-._a-zA-Z0-9]+$",
        "key is the key within the Secret that holds the token, such as auth_token",
    ),
]

Namespace = Annotated[
    str,
    Rule(
        "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        "a namespace is at most 63 lower-case letters, digits and dashes, such as sms-channels",
    ),
]


class TakeoverPolicy(StrEnum):
    ALWAYS = "Always"
    IF_UNUSED = "IfUnused"


class DriftPolicy(StrEnum):
    CORRECT = "Correct"
    REPORT = "Report"


class DeletionPolicy(StrEnum):
    RESTORE = "Restore"
    CLEAR = "Clear"
    RETAIN = "Retain"


class _Model(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # a user may have written a token into the wrong field
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        """Drop nulls, as the API server does: the field then has its default, or is missing."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class SecretKeyRef(_Model):
    """A key of a labelled Secret in the channel's own namespace."""

    name: SecretName
    key: SecretKey


class Credentials(_Model):
    """The SID for authenticating to Twilio ("": the account's) and its token: one of `sealed` and `secret_key_ref`."""

    sid: LoginSid = ""
    sealed: Sealed | None = None
    secret_key_ref: SecretKeyRef | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.sealed is None) == (self.secret_key_ref is None):
            raise PydanticCustomError(
                "one_source",
                "give exactly one of sealed (made by 'kubectl sms seal') and secretKeyRef {name, key};"
                " a token in plain text is never written here",
            )
        return self


class Spec(_Model):
    """The desired state: the number, the credentials, and the policies."""

    account_sid: AccountSid
    phone_number: PhoneNumber
    credentials: Credentials
    suspend: StrictBool = False
    takeover_policy: TakeoverPolicy = TakeoverPolicy.ALWAYS
    drift_policy: DriftPolicy = DriftPolicy.CORRECT
    deletion_policy: DeletionPolicy = DeletionPolicy.RESTORE


class Metadata(_Model):
    """The part of the object's metadata that the operator reads."""

    name: InstanceId
    namespace: str
    uid: str
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: datetime
    deletion_timestamp: datetime | None = None
    finalizers: tuple[str, ...] = ()
    annotations: Mapping[str, str] = Field(default_factory=dict)


class SmsChannel(_Model):
    """An SmsChannel as the API server returns it. `status` is not validated: the operator is its only writer."""

    metadata: Metadata
    spec: Spec
    status: Mapping[str, Any] = Field(default_factory=dict)

    @staticmethod
    def unvalidated(body: Mapping[str, Any]) -> SmsChannel:
        """Return a channel that breaks the rules, only to report that: its `spec` must not be read."""
        meta = body["metadata"]
        given = {name: meta[field.alias] for name, field in Metadata.model_fields.items() if field.alias in meta}
        fields: dict[str, Any] = {"metadata": Metadata.model_construct(**given), "status": body.get("status") or {}}
        return SmsChannel.model_construct(**fields)

    @property
    def deleting(self) -> bool:
        """Return whether the channel has been deleted and still has finalizers."""
        return self.metadata.deletion_timestamp is not None

    def as_deleted(self, now: datetime) -> Self:
        """Return the channel as it would be if it were deleted `now`."""
        return self.model_copy(update={"metadata": self.metadata.model_copy(update={"deletion_timestamp": now})})

    @property
    def has_finalizer(self) -> bool:
        return FINALIZER in self.metadata.finalizers


def trimmed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return an SmsChannel without the metadata that the operator does not read, which may be of any size."""
    meta = {name: body["metadata"][name] for name in _METADATA if name in body["metadata"]}
    annotations = meta.pop("annotations", None) or {}
    if CHECK_NOW_ANNOTATION in annotations:
        meta["annotations"] = {CHECK_NOW_ANNOTATION: annotations[CHECK_NOW_ANNOTATION]}
    return {"metadata": meta, **{name: body[name] for name in ("spec", "status") if name in body}}


_METADATA = tuple(str(field.alias) for field in Metadata.model_fields.values())
