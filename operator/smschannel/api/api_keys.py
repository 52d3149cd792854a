"""API keys of the REST API, as the Secret `smschannel-api-keys` holds them: hashes only. No I/O.

A key is `smsch_ID_SECRET`, with 256 random bits; the ID has no underscore. Each entry of the Secret, by the key's ID:

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

_PREFIX = "smsch"
_NO_KEY = "0" * 64


class Verb(StrEnum):
    GET = "get"
    POST = "post"
    DELETE = "delete"


class ApiKey(BaseModel):
    """One entry of the Secret: no key, only its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    instances: tuple[Literal["*"] | UUID, ...]
    verbs: frozenset[Verb]
    expires: AwareDatetime | None = Field(default=None)

    def may(self, verb: Verb, instance: str) -> bool:
        return verb in self.verbs and ("*" in self.instances or UUID(instance) in self.instances)

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and self.expires <= now


Entry = ApiKey | str
"""A key, or why what stands there is none."""


def read_entry(encoded: str) -> Entry:
    """From a Secret's `data`. The reason quotes nothing: somebody may have written the key itself."""
    try:
        return ApiKey.model_validate_json(base64.b64decode(encoded, validate=True))
    except ValidationError as error:
        mistakes = error.errors(include_input=False)
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in mistakes)
    except binascii.Error:
        return "not base64"


def encode_key(key: ApiKey) -> str:
    """As an entry of the Secret's `data`."""
    entry = key.model_dump(mode="json")
    return base64.b64encode(json.dumps({**entry, "verbs": sorted(key.verbs)}).encode()).decode()


def find_key(keys: Mapping[str, ApiKey], presented: str, now: datetime) -> tuple[str, ApiKey] | None:
    """The entry that `presented` opens. It takes as long for an unknown id as for a wrong secret."""
    parts = presented.split("_", 2)
    key_id = parts[1] if len(parts) == 3 else ""
    key = keys.get(key_id)
    digest = hashlib.sha256(presented.encode(errors="surrogateescape")).hexdigest()
    right = hmac.compare_digest(digest, key.sha256 if key else _NO_KEY)
    return (key_id, key) if key and right and not key.expired(now) else None


@dataclass(frozen=True)
class Made:
    """A new key: `key` is for who uses it, `entry` for the Secret."""

    key_id: str
    key: SecretStr
    entry: ApiKey


def make_key(
    instances: Iterable[str], verbs: Iterable[str], *, expires: datetime | None = None, key_id: str | None = None
) -> Made:
    """With 256 random bits. `instances` are UUIDs, or "*" for all."""
    key_id = key_id or secrets.token_hex(4)
    key = f"{_PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    entry = ApiKey(
        sha256=hashlib.sha256(key.encode()).hexdigest(),
        instances=tuple("*" if each == "*" else UUID(each) for each in instances),
        verbs=frozenset(Verb(each) for each in verbs),
        expires=expires,
    )
    return Made(key_id, SecretStr(key), entry)


def secret_of(made: Made, namespace: str) -> dict[str, Any]:
    """A manifest that adds the key, applied as a field manager of its own."""
    meta = {"name": API_KEYS_SECRET, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": {made.key_id: encode_key(made.entry)}}
