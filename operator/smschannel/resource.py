"""The SmsChannel resource: what users write (`Spec`) and where it hangs in Kubernetes.

The same rules stand in `crds/smschannels.yaml`; one table of manifests is run against both.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

GROUP = "channels.hydracore.io"
VERSION = "v1"
PLURAL = "smschannels"
KIND = "SmsChannel"
API_VERSION = f"{GROUP}/{VERSION}"
FINALIZER = f"{GROUP}/give-back"
CREDENTIALS_LABEL = f"{GROUP}/credentials"
CHECK_NOW_ANNOTATION = f"{GROUP}/check-now"

InstanceId = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")
]
AccountSid = Annotated[str, StringConstraints(pattern=r"^AC[0-9a-f]{32}$")]
PhoneNumber = Annotated[str, StringConstraints(pattern=r"^\+[1-9][0-9]{1,14}$")]


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
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")


class SecretKeyRef(_Model):
    """A key of a labelled Secret in the channel's own namespace."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
    key: Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]


class Credentials(_Model):
    """Who logs in to Twilio, and where the token is: exactly one of `sealed` and `secret_key_ref`."""

    sid: Annotated[str, StringConstraints(pattern=r"^((AC|SK)[0-9a-f]{32})?$")] = ""
    sealed: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=4096)] | None = None
    secret_key_ref: SecretKeyRef | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.sealed is None) == (self.secret_key_ref is None):
            raise ValueError("give exactly one of sealed (made by 'kubectl sms seal') and secretKeyRef {name, key}")
        return self


class Spec(_Model):
    account_sid: AccountSid
    phone_number: PhoneNumber
    credentials: Credentials
    suspend: bool = False
    takeover_policy: TakeoverPolicy = TakeoverPolicy.ALWAYS
    drift_policy: DriftPolicy = DriftPolicy.CORRECT
    deletion_policy: DeletionPolicy = DeletionPolicy.RESTORE


class Metadata(_Model):
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
    """One channel as the API server holds it. `status` stays a plain mapping: we are its only writer."""

    metadata: Metadata
    spec: Spec
    status: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def deleting(self) -> bool:
        return self.metadata.deletion_timestamp is not None

    @property
    def has_finalizer(self) -> bool:
        return FINALIZER in self.metadata.finalizers
