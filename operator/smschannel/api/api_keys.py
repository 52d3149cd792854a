"""API keys of the REST API, as the Secret `smschannel-api-keys` stores them: hashes only. No I/O.

A key is `smsch_ID_SECRET`; SECRET has 256 random bits, and ID has no underscore. The Secret has one entry per key ID:

    {"sha256": hex of the whole key, "instances": ["*"] or [UUID, ...], "verbs": ["get", "post", "delete"],
     "expires": RFC 3339 or null}
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError

from smschannel.api.names import API_KEYS_SECRET

KEY_PREFIX = "smsch_"
_NO_DIGEST = "0" * 64  # compared with when the key ID is unknown


class Verb(StrEnum):
    """The REST calls that a key may allow."""

    GET = "get"
    POST = "post"
    DELETE = "delete"


class ApiKey(BaseModel):
    """One entry of the Secret. `expires` None means that the key never expires."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    instances: tuple[Literal["*"] | UUID, ...]
    verbs: frozenset[Verb]
    expires: AwareDatetime | None = Field(default=None)

    def allows(self, verb: Verb, instance: str) -> bool:
        """Return whether the key may be used for `verb` on `instance` (a UUID)."""
        return verb in self.verbs and ("*" in self.instances or UUID(instance) in self.instances)

    def is_expired(self, now: datetime) -> bool:
        return self.expires is not None and self.expires <= now


def decode_key(encoded: str) -> ApiKey:
    """Parse one value of the Secret's `data`.

    Raises `ValueError` with what is wrong; the message quotes nothing, since an administrator may have stored the key
    itself by mistake.
    """
    try:
        return ApiKey.model_validate_json(base64.b64decode(encoded, validate=True))
    except ValidationError as error:
        details = error.errors(include_input=False)
        message = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in details)
    except binascii.Error:
        message = "not base64"
    raise ValueError(message)


def encode_key(key: ApiKey) -> str:
    """Return `key` as a value of the Secret's `data`."""
    entry = key.model_dump(mode="json")
    return base64.b64encode(json.dumps({**entry, "verbs": sorted(key.verbs)}).encode()).decode()


def find_key(keys: Mapping[str, ApiKey], presented: str, now: datetime) -> tuple[str, ApiKey] | None:
    """Return the ID and entry of the key `presented`, or None if it is unknown, wrong or expired.

    An unknown ID takes as long as a wrong secret, so that timing does not reveal which IDs exist.
    """
    parts = presented.split("_", 2)
    key_id = parts[1] if len(parts) == 3 else ""
    key = keys.get(key_id)
    digest = hashlib.sha256(presented.encode(errors="surrogateescape")).hexdigest()
    matches = hmac.compare_digest(digest, key.sha256 if key else _NO_DIGEST)
    return (key_id, key) if key and matches and not key.is_expired(now) else None


@dataclass(frozen=True)
class NewKey:
    """A key that was just made: `key` is for the client, `entry` for the Secret."""

    key_id: str
    key: SecretStr
    entry: ApiKey


def make_key(
    instances: Iterable[str], verbs: Iterable[str], *, expires: datetime | None = None, key_id: str | None = None
) -> NewKey:
    """Make a key with 256 random bits. `instances` are UUIDs, or "*" for all; without `key_id` the ID is random."""
    key_id = key_id or secrets.token_hex(4)
    key = f"{KEY_PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
    entry = ApiKey(
        sha256=hashlib.sha256(key.encode()).hexdigest(),
        instances=tuple("*" if each == "*" else UUID(each) for each in instances),
        verbs=frozenset(Verb(each) for each in verbs),
        expires=expires,
    )
    return NewKey(key_id, SecretStr(key), entry)


def secret_of(new: NewKey, namespace: str) -> dict[str, Any]:
    """Return a manifest of the Secret with this key alone; create it, or apply it with a field manager of its own."""
    meta = {"name": API_KEYS_SECRET, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": {new.key_id: encode_key(new.entry)}}
