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
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
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

from smschannel.api.errors import Unreadable

_VERSION = b"\x01"
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_PURPOSE = "channels.hydracore.io/token"
# Lengths in bytes
_MLKEM_PUBLIC = 1184
_MLKEM_SEED = 64
_FINGERPRINT = 8
_NONCE = 12


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
    """A private key. `seed` is ML-KEM's 64 bytes followed by X25519's 32; `repr` shows the fingerprint only."""

    seed: bytes

    @classmethod
    def generate(cls) -> SealingKey:
        """Make a random key."""
        mlkem, x25519 = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        return cls(mlkem.private_bytes_raw() + x25519.private_bytes_raw())

    def __repr__(self) -> str:
        return f"SealingKey({self.public.fingerprint.hex()})"

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
        derived = HKDF(SHA256(), length=32, salt=None, info=b"channels.hydracore.io/record").derive(self.seed)
        return AESGCM(derived)


class Keyring:
    """All private keys, the newest last. The newest is used for sealing, and each opens what it sealed."""

    def __init__(self, keys: Iterable[SealingKey]) -> None:
        self._keys = {key.public.fingerprint: key for key in keys}
        if not self._keys:
            raise ValueError("a keyring has at least one key")

    @classmethod
    def load(cls, encoded: str) -> Keyring:
        """Parse the output of `dump`. Raises `ValueError`, without the content, if it is not a keyring."""
        with contextlib.suppress(ValueError, TypeError):
            match json.loads(encoded):
                case {"seeds": [*seeds], **more} if not more:
                    return cls(SealingKey(_base64(seed)) for seed in seeds)
        raise ValueError("not a keyring of this release: it is damaged, or was written by a newer one")

    def dump(self) -> str:
        """Return all seeds as JSON, for the keyring Secret."""
        return json.dumps({"seeds": [base64.b64encode(key.seed).decode() for key in self._keys.values()]})

    def has(self, encoded: str) -> bool:
        """Return whether `encoded` is the public half of one of the keys."""
        return any(key.public.encoded == encoded for key in self._keys.values())

    @property
    def current(self) -> SealingKey:
        """Return the newest key."""
        return next(reversed(self._keys.values()))

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
            raise Unreadable(f"the {what} needs a key that this operator does not have ({fingerprint.hex()})")
        return key, rest


def sealed_with(sealed: str) -> str | None:
    """Return the fingerprint, in hexadecimal, of the key that a value was sealed with; None if it is damaged."""
    try:
        envelope = _base64(sealed)
    except ValueError:
        return None
    fingerprint = envelope[1 : 1 + _FINGERPRINT]
    return fingerprint.hex() if envelope[:1] == _VERSION and len(fingerprint) == _FINGERPRINT else None


def _base64(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
