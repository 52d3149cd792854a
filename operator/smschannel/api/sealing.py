"""Encrypt tokens to the operator, and the operator's records at rest. No I/O.

Sealed tokens (`PublicKey.seal`, `Keyring.unseal`): HPKE base mode (RFC 9180) with the post-quantum hybrid KEM
MLKEM768-X25519, HKDF-SHA256 and AES-256-GCM. The envelope, base64 encoded:

    byte 0      version, 1
    bytes 1-8   fingerprint of the public key: the first 8 bytes of its SHA-256
    the rest    HPKE's encapsulated key (1,120 bytes) and ciphertext (the token's length + 16)

HPKE's `info` binds the envelope to its place: version, purpose, namespace, name and accountSid, each preceded by its
length (4 bytes, big endian). A copy under another name, namespace or account cannot be opened.

Records (`Keyring.wrap`, `Keyring.unwrap`): AES-256-GCM under a key derived with HKDF-SHA256 from a key of the keyring;
bytes: version, fingerprint, nonce (12), ciphertext. The uid of the record's holder is the associated data.

docs/sealing.md describes the format of sealed tokens for sealers in other languages.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import copy
import hashlib
import hmac
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr

from smschannel.api.errors import MissingKey, Unreadable

_VERSION = b"\x01"
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_PURPOSE = "channels.hydracore.io/token"
# Lengths in bytes
_MLKEM_PUBLIC = 1184
_MLKEM_SEED = 64
_SEED = _MLKEM_SEED + 32
_FINGERPRINT = 8
_NONCE = 12
_TIME = "%Y-%m-%dT%H:%M:%SZ"

MOST_KEYS = 200
"""Keys in a keyring: 16 years of renewing every 30 days. More would make the Secret too large, and slow to read."""

NOT_A_KEY = (
    f"a sealing key is {_SEED} random bytes, base64 encoded: openssl rand -base64 {_SEED}. A keyring is the value of"
    " 'keyring' in the keyring Secret"
)


class Binding(NamedTuple):
    """The channel and account that a sealed token is for; it opens for these only."""

    namespace: str
    name: str
    account_sid: str

    def encode(self) -> bytes:
        """Return HPKE's `info`. No two bindings have the same encoding."""
        parts = (_VERSION, _PURPOSE.encode(), *(part.encode() for part in self))
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@dataclass(frozen=True)
class PublicKey:
    """The public half of a sealing key: ML-KEM's 1,184 bytes followed by X25519's 32."""

    raw: bytes

    @classmethod
    def decode(cls, encoded: str) -> PublicKey:
        """Parse the base64 text of the ConfigMap. Raises `ValueError` with what is wrong with it."""
        raw = _base64(encoded)
        if len(raw) != _MLKEM_PUBLIC + 32:
            raise ValueError(f"a sealing key is {_MLKEM_PUBLIC + 32} bytes, base64 encoded; this is {len(raw)} bytes")
        return cls(raw)

    @property
    def encoded(self) -> str:
        """Return the key as the ConfigMap holds it, in base64."""
        return base64.b64encode(self.raw).decode()

    @cached_property
    def fingerprint(self) -> bytes:
        return hashlib.sha256(self.raw).digest()[:_FINGERPRINT]

    @cached_property
    def _key(self) -> MLKEM768X25519PublicKey:
        return MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(self.raw[:_MLKEM_PUBLIC]),
            X25519PublicKey.from_public_bytes(self.raw[_MLKEM_PUBLIC:]),
        )

    def seal(self, token: SecretStr, binding: Binding) -> str:
        """Return the value for `spec.credentials.sealed`, which can be opened with the same `binding` only."""
        ciphertext = _SUITE.encrypt(token.get_secret_value().encode(), self._key, info=binding.encode())
        return base64.b64encode(_VERSION + self.fingerprint + ciphertext).decode()


@dataclass(frozen=True, repr=False)
class SealingKey:
    """A private key. `seed` is ML-KEM's 64 bytes followed by X25519's 32; `repr` shows the fingerprint only.

    `created` is None if it is not known. It has whole seconds.
    """

    seed: bytes
    created: datetime | None = field(default=None, compare=False)

    @classmethod
    def generate(cls, now: datetime | None = None) -> SealingKey:
        """Make a random key, created `now`."""
        mlkem, x25519 = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        created = now.astimezone(UTC).replace(microsecond=0) if now else None
        return cls(mlkem.private_bytes_raw() + x25519.private_bytes_raw(), created)

    @classmethod
    def decode(cls, encoded: str) -> SealingKey:
        """Parse 96 bytes in base64, with any white space. Raises `ValueError`, without the content."""
        seed = _base64("".join(encoded.split()))
        if len(seed) != _SEED:
            raise ValueError(NOT_A_KEY)
        return cls(seed)

    def dated(self, created: datetime | None) -> SealingKey:
        """Return this key as created at another time. Its public half is not computed again, which takes a while."""
        dated = copy.copy(self)
        object.__setattr__(dated, "created", created)
        return dated

    def __repr__(self) -> str:
        return f"SealingKey({self.fingerprint})"

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the public half in hexadecimal, as people see it."""
        return self.public.fingerprint.hex()

    @cached_property
    def _halves(self) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
        return (
            MLKEM768PrivateKey.from_seed_bytes(self.seed[:_MLKEM_SEED]),
            X25519PrivateKey.from_private_bytes(self.seed[_MLKEM_SEED:]),
        )

    @cached_property
    def hpke(self) -> MLKEM768X25519PrivateKey:
        """Return the key that opens sealed tokens."""
        return MLKEM768X25519PrivateKey(*self._halves)

    @cached_property
    def public(self) -> PublicKey:
        mlkem, x25519 = self._halves
        return PublicKey(mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw())

    @cached_property
    def at_rest(self) -> AESGCM:
        """Return the cipher for records, under a key derived from the seed."""
        return AESGCM(self._derive(b"channels.hydracore.io/record"))

    def authenticate(self, content: bytes) -> str:
        """Return an HMAC-SHA256 of `content` in hexadecimal, which only those who have this key can make."""
        return hmac.new(self._derive(b"channels.hydracore.io/keyring"), content, "sha256").hexdigest()

    def _derive(self, purpose: bytes) -> bytes:
        return HKDF(SHA256(), length=32, salt=None, info=purpose).derive(self.seed)


class Keyring:
    """All private keys, the newest last. The newest is used for sealing, and each opens what it sealed.

    A keyring does not change: renewing, adding and retiring keys return another one.
    """

    def __init__(self, keys: Iterable[SealingKey]) -> None:
        self._keys = {key.public.fingerprint: key for key in keys}
        if not self._keys:
            raise ValueError("a keyring has at least one key")
        if len(self._keys) > MOST_KEYS:
            raise ValueError(
                f"a keyring has at most {MOST_KEYS} keys, and this would be {len(self._keys)}: retire those that"
                " nothing needs (kubectl sms keys list)"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyring) and (self.dump(), self.dump_dates()) == (other.dump(), other.dump_dates())

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[SealingKey]:
        """Yield the keys, the newest last."""
        return iter(self._keys.values())

    @classmethod
    def load(cls, encoded: str, dates: str = "{}") -> Keyring:
        """Parse the output of `dump` and `dump_dates`.

        Raises `ValueError`, without the content, if it is not a keyring. A damaged date is as if there were none.
        """
        created = _parsed(dates)
        with contextlib.suppress(ValueError, TypeError):
            match _parsed(encoded):
                # More keys than a keyring has are not counted one by one: each takes a computation.
                case {"seeds": [*seeds], **more} if not more and len(seeds) <= MOST_KEYS:
                    keys = [SealingKey(_base64(seed)) for seed in seeds]
                    return cls(key.dated(_date(created, key.fingerprint)) for key in keys)
        raise ValueError("not a keyring of this release: it is damaged, or was written by a newer one")

    def dump(self) -> str:
        """Return all seeds as JSON, for the keyring Secret."""
        return json.dumps({"seeds": [base64.b64encode(key.seed).decode() for key in self]})

    def dump_dates(self) -> str:
        """Return as JSON when each key was created, by fingerprint; apart from the seeds, which older releases read."""
        return json.dumps({key.fingerprint: key.created.strftime(_TIME) for key in self if key.created})

    def has(self, encoded: str) -> bool:
        """Return whether `encoded` is the public half of one of the keys."""
        return any(key.public.encoded == encoded for key in self)

    @property
    def is_full(self) -> bool:
        """Return whether no key can be added."""
        return len(self) >= MOST_KEYS

    @property
    def current(self) -> SealingKey:
        """Return the newest key."""
        return next(reversed(self._keys.values()))

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprints of all keys, the newest last."""
        return tuple(key.fingerprint for key in self)

    # Other keyrings

    def renewal_due(self, period: timedelta) -> datetime | None:
        """Return when the newest key is older than `period`; None if it never is. A `period` of 0 means never."""
        created = self.current.created
        if period and created:
            with contextlib.suppress(OverflowError):  # a made-up date
                return created + period
        return None

    def dated(self, created: datetime) -> Keyring:
        """Return this keyring; keys of an unknown age count as created at this time."""
        return Keyring(key if key.created else key.dated(created) for key in self)

    def with_newest(self, keys: Iterable[SealingKey]) -> Keyring:
        """Return a keyring in which the last of `keys` seals.

        Raises `ValueError` if there is one of them already, and if these are too many keys.
        """
        added = list(keys)
        if known := [key.fingerprint for key in added if key.fingerprint in self.fingerprints]:
            raise ValueError(f"the keyring has this key already: {', '.join(known)}")
        return Keyring([*self, *added])

    def merged(self, others: Iterable[SealingKey]) -> Keyring:
        """Return a keyring that opens what `others` sealed, too. What seals stays the same.

        Raises `ValueError` if these are too many keys.
        """
        own = set(self.fingerprints)
        return Keyring([*(key for key in others if key.fingerprint not in own), *self])

    def without(self, fingerprints: Iterable[str]) -> Keyring:
        """Return a keyring without these keys. Raises `ValueError` if none would be left."""
        retired = set(fingerprints)
        return Keyring(key for key in self if key.fingerprint not in retired)

    # Who wrote a keyring

    def authenticate(self, content: bytes) -> str:
        """Return a proof for `is_authentic` that whoever stores `content` has the keys of this keyring."""
        return json.dumps({key.fingerprint: key.authenticate(content) for key in self})

    def is_authentic(self, content: bytes, proof: str) -> bool:
        """Return whether `content` was stored with the key of this keyring that seals.

        The other keys prove nothing: others may have added them.
        """
        own, given = self.current, None
        match _parsed(proof):
            case {**proofs}:
                given = proofs.get(own.fingerprint)
        if not (isinstance(given, str) and given.isascii()):
            return False
        return hmac.compare_digest(own.authenticate(content), given)

    # Opening and sealing

    def unseal(self, sealed: str, binding: Binding) -> SecretStr:
        """Return the token. Raises `Unreadable` if it was sealed with an unknown key or binding, or was altered."""
        try:
            envelope = _base64(sealed)
        except ValueError:
            raise Unreadable("the sealed value is not base64: it was truncated or altered") from None
        key, ciphertext = self._open(envelope, "sealed value")
        try:
            return SecretStr(_SUITE.decrypt(ciphertext, key.hpke, info=binding.encode()).decode())
        except (InvalidTag, ValueError):
            raise Unreadable(
                f"the sealed value was truncated or altered, or sealed for another place than namespace "
                f"{binding.namespace}, name {binding.name}, accountSid {binding.account_sid}"
            ) from None

    def wrap(self, plaintext: bytes, uid: str) -> bytes:
        """Encrypt a record with the newest key; `unwrap` needs the same `uid`."""
        key, nonce = self.current, os.urandom(_NONCE)
        return _VERSION + key.public.fingerprint + nonce + key.at_rest.encrypt(nonce, plaintext, uid.encode())

    def unwrap(self, wrapped: bytes, uid: str) -> bytes:
        """Decrypt a record. Raises `Unreadable` if it was altered, or wrapped with an unknown key or another uid."""
        key, rest = self._open(wrapped, "record")
        try:
            return key.at_rest.decrypt(rest[:_NONCE], rest[_NONCE:], uid.encode())
        except (InvalidTag, ValueError):
            raise Unreadable("the record was altered, or belongs to another channel") from None

    def _open(self, envelope: bytes, what: str) -> tuple[SealingKey, bytes]:
        if envelope[:1] != _VERSION:
            raise Unreadable(
                f"the {what} has an unknown version: it was truncated, altered, or made by a newer release"
            )
        fingerprint, rest = envelope[1 : 1 + _FINGERPRINT], envelope[1 + _FINGERPRINT :]
        key = self._keys.get(fingerprint)
        if key is None:
            raise MissingKey(f"the {what} needs a key that this operator does not have ({fingerprint.hex()})")
        return key, rest


def parse_keys(text: str) -> tuple[SealingKey, ...]:
    """Return the keys of a file: one key in base64, or a keyring as `Keyring.dump` writes it.

    Raises `ValueError`, which says what is expected and never quotes the content.
    """
    with contextlib.suppress(ValueError):
        return tuple(Keyring.load(text))
    try:
        return (SealingKey.decode(text),)
    except ValueError:
        raise ValueError(NOT_A_KEY) from None


def fingerprint_of(envelope: str) -> str:
    """Return the fingerprint of the key that opens a sealed token or record, in base64; empty if that is damaged."""
    try:
        head = _base64(envelope[:12])
    except ValueError:
        return ""
    return head[1:].hex() if len(head) == 1 + _FINGERPRINT and head[:1] == _VERSION else ""


def _parsed(text: str) -> object:
    """Parse JSON; None if it is not JSON, or nested so deeply that it cannot be parsed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _date(created: object, fingerprint: str) -> datetime | None:
    with contextlib.suppress(ValueError, TypeError):
        match created:
            case {**dates} if isinstance(at := dates.get(fingerprint), str):
                return datetime.strptime(at, _TIME).replace(tzinfo=UTC)
    return None


def _base64(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
