"""What the operator remembers of a number that a channel holds: one record per number. No I/O.

A record is a Secret in the operator's namespace, named after the number's SID. Creating it is the claim: the API
server lets only one channel have it. It is written before Twilio is, and deleted only after the number was restored,
so that a crash at any moment loses nothing.

Plain metadata names the number and the channel that holds it. `Contents` are sealed: the last verified login, the
previous webhook, and the URLs that the operator wrote.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, SecretStr, SerializationInfo, field_serializer

from smschannel.api.names import OPERATOR
from smschannel.api.resource import GROUP, DeletionPolicy

RECORD_LABEL = f"{GROUP}/record"
"""`true` on records, `written-off` on those that were given up."""

NAMESPACE_LABEL = f"{GROUP}/channel-namespace"
"""The namespace of the channel that holds a record, with which a shard lists its own. Earlier records have none."""

_CHANNEL = f"{GROUP}/channel"
_UID = f"{GROUP}/channel-uid"
_PHONE_NUMBER = f"{GROUP}/phone-number"
_ACCOUNT_SID = f"{GROUP}/account-sid"
_SOURCE = f"{GROUP}/credentials-source"
_DELETION_POLICY = f"{GROUP}/deletion-policy"
_RESTORE_SINCE = f"{GROUP}/restore-since"
_UNSEEN_SINCE = f"{GROUP}/unseen-since"
SEALED_WITH = f"{GROUP}/sealed-with"
"""The fingerprint of the key that opens a record. Records of releases with one key have none."""

_REVEAL = "reveal"
_OF = "of"
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_DNS_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_TIME = "%Y-%m-%dT%H:%M:%SZ"


class Key(NamedTuple):
    """What is reconciled: the channel of this name, and the records that earlier channels of this name left."""

    namespace: str
    name: str


class _Value(BaseModel):
    # A field that this release does not know is refused: it would be lost with the next write.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Login(_Value):
    """A login at Twilio: `sid` is the account itself, an API key or a parent account."""

    sid: str
    token: SecretStr

    @field_serializer("token")
    def _hidden(self, token: SecretStr, context: SerializationInfo) -> str:
        return token.get_secret_value() if context.context == _REVEAL else "***"


class Webhook(_Value):
    """A number's `SmsUrl` and `SmsMethod`. URLs found at Twilio may contain a password, so `repr` shows none."""

    url: str = Field(repr=False)
    method: str


class Contents(_Value):
    """The sealed part of a record.

    `login` was accepted by Twilio last; `previous` is the webhook before the channel claimed the number, None if it was
    already one of ours; `wrote` are all URLs that the operator wrote for this channel.
    """

    login: Login
    previous: Webhook | None
    wrote: tuple[str, ...] = Field(repr=False)

    def points_at_us(self, webhook: Webhook) -> bool:
        return webhook.url in self.wrote

    @classmethod
    def decode(cls, document: bytes) -> Contents:
        """Parse what `Record.document` returned, without the metadata in it.

        Raises `ValueError`, also for a field that this release does not know.
        """
        parsed = None
        with contextlib.suppress(ValueError):  # such a document is refused below
            parsed = json.loads(document)
        if isinstance(parsed, dict) and _OF in parsed:
            document = json.dumps({name: value for name, value in parsed.items() if name != _OF}).encode()
        return cls.model_validate_json(document)


@dataclass(frozen=True, slots=True)
class Record:
    """One number, and the channel (namespace, name, uid) that holds it.

    `source` names the credentials that `contents.login` was read from (see `secret_source`); `restore_since` is set
    when the finalizer is removed although the number was not restored; `unseen_since` is since when Twilio shows the
    number to none of the channel's own logins, None if it does; `version` is the Secret's resourceVersion, empty if it
    was not read; `contents` is None if the record was not opened, or cannot be; `sealed_with` is the fingerprint of the
    key that opens them, empty if it is not known; `secret` is the Secret's name if it is not that of the number.
    """

    number_sid: str
    phone_number: str
    account_sid: str
    namespace: str
    name: str
    uid: str
    source: str = ""
    deletion_policy: DeletionPolicy = DeletionPolicy.RESTORE
    restore_since: datetime | None = None
    unseen_since: datetime | None = None
    version: str = ""
    contents: Contents | None = None
    sealed_with: str = ""
    secret: str = ""

    @property
    def key(self) -> Key:
        return Key(self.namespace, self.name)

    @property
    def secret_name(self) -> str:
        return self.secret or self.number_sid.lower()

    @property
    def binding(self) -> str:
        """Return what the contents are sealed for: they open only as this number's, held by this channel."""
        return f"{self.number_sid}/{self.uid}"

    def document(self) -> bytes:
        """Return JSON that contains the token, for sealing only: the contents, and the metadata that never changes."""
        assert self.contents, "an unopened record is not sealed"
        return json.dumps({**self.contents.model_dump(context=_REVEAL), _OF: self._unchanging()}).encode()

    def opened(self, document: bytes) -> Record:
        """Return the record with the contents of an unsealed `document`, and the metadata that was sealed with them.

        They differ from this record's if somebody changed the Secret's metadata. Raises `ValueError`.
        """
        opened = replace(self, contents=Contents.decode(document))
        sealed = json.loads(document).get(_OF) or {}  # records of earlier releases have none
        truth: dict[str, Any] = {name: str(sealed[name]) for name in self._unchanging() if name in sealed}
        return replace(opened, **truth)

    def _unchanging(self) -> dict[str, str]:
        return {
            "namespace": self.namespace,
            "name": self.name,
            "phone_number": self.phone_number,
            "account_sid": self.account_sid,
        }

    def with_contents(self, **changes: object) -> Record:
        assert self.contents, "an unopened record is not changed"
        return replace(self, contents=self.contents.model_copy(update=changes))

    def labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/managed-by": OPERATOR, RECORD_LABEL: "true", NAMESPACE_LABEL: self.namespace}

    def annotations(self) -> dict[str, str | None]:
        """Return the annotations as a merge patch: None removes one."""
        return {
            _CHANNEL: f"{self.namespace}/{self.name}",
            _UID: self.uid,
            _PHONE_NUMBER: self.phone_number,
            _ACCOUNT_SID: self.account_sid,
            _SOURCE: self.source,
            _DELETION_POLICY: self.deletion_policy.value,
            _RESTORE_SINCE: _written(self.restore_since),
            _UNSEEN_SINCE: _written(self.unseen_since),
            SEALED_WITH: self.sealed_with or None,
        }

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any]) -> Record:
        """Read a record's plain metadata. Never fails: a record with damaged metadata still holds its number."""
        notes = meta.get("annotations") or {}
        namespace, _, name = notes.get(_CHANNEL, "").partition("/")
        try:
            policy = DeletionPolicy(notes.get(_DELETION_POLICY, ""))
        except ValueError:
            policy = DeletionPolicy.RESTORE
        return cls(
            number_sid="PN" + meta["name"][2:],
            phone_number=notes.get(_PHONE_NUMBER, ""),
            account_sid=notes.get(_ACCOUNT_SID, ""),
            namespace=namespace,
            name=name,
            uid=notes.get(_UID, ""),
            source=notes.get(_SOURCE, ""),
            deletion_policy=policy,
            restore_since=_time(notes.get(_RESTORE_SINCE, "")),
            unseen_since=_time(notes.get(_UNSEEN_SINCE, "")),
            sealed_with=notes.get(SEALED_WITH, ""),
            version=meta["resourceVersion"],
        )


def _written(time: datetime | None) -> str | None:
    return time.astimezone(UTC).strftime(_TIME) if time else None


def _time(written: str) -> datetime | None:
    try:
        return datetime.strptime(written, _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def secret_source(name: str, resource_version: str) -> str:
    """Return the `source` of a login that was read from this version of a Secret."""
    return f"secret/{name}@{resource_version}"


@dataclass(frozen=True)
class WebhookTemplate:
    """The URL of an instance's webhook, from the operator's settings: `https://.../{instance_id}/...`.

    With several channel namespaces it contains `{namespace}`, too, so that no namespace has webhooks in common with
    another. `former` are templates of earlier settings: their URLs are the operator's, never a previous webhook.
    """

    template: str
    former: tuple[str, ...] = ()

    def url(self, namespace: str, instance_id: str) -> str:
        return self.template.replace("{namespace}", namespace).replace("{instance_id}", instance_id)

    def made(self, url: str) -> bool:
        """Return whether `url` is the webhook of any instance, by this template or a former one."""
        return any(_pattern(template).fullmatch(url) for template in (self.template, *self.former))


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(re.escape("{instance_id}"), _UUID)
    return re.compile(escaped.replace(re.escape("{namespace}"), _DNS_LABEL))
