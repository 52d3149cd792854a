"""Sealing: tokens on their way in, and the operator's records at rest. No I/O.

Coming in (`seal`, `Keyring.unseal`): HPKE base mode (RFC 9180) with the post-quantum hybrid KEM
MLKEM768-X25519, HKDF-SHA256 and AES-256-GCM. The envelope, base64 encoded:

    byte 0      version, 1
    bytes 1-8   fingerprint of the public key: first 8 bytes of its SHA-256
    the rest    HPKE's encapsulated key (1,120 bytes) and ciphertext (the token's length + 16)

`info` binds the envelope to its place: version, purpose, namespace, name and accountSid, each preceded by
its length (4 bytes, big endian), so that a copy under another name, namespace or account opens nothing.

At rest (`Keyring.wrap`, `Keyring.unwrap`): AES-256-GCM under a key derived with HKDF-SHA256 from a key of
the keyring; bytes: version, fingerprint, nonce (12), ciphertext. The channel's uid is associated data.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
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
_MLKEM_PUBLIC = 1184
_MLKEM_SEED = 64
_FINGERPRINT = 8
_NONCE = 12


class Binding(NamedTuple):
    """The only place where a sealed token opens."""

    namespace: str
    name: str
    account_sid: str

    def encode(self) -> bytes:
        parts = (_VERSION, _PURPOSE.encode(), *(part.encode() for part in self))
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@dataclass(frozen=True)
class PublicKey:
    """The public half of a sealing key; `encoded` is what the ConfigMap holds (base64 of 1,216 bytes)."""

    raw: bytes

    @classmethod
    def decode(cls, encoded: str) -> PublicKey:
        """Raises `ValueError` with what was wrong for anything but an encoded public key."""
        raw = _base64(encoded)
        if len(raw) != _MLKEM_PUBLIC + 32:
            raise ValueError(f"a sealing key is {_MLKEM_PUBLIC + 32} bytes, base64 encoded; this is {len(raw)} bytes")
        return cls(raw)

    @property
    def encoded(self) -> str:
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
        """The value for `spec.credentials.sealed`, which opens under `binding` only."""
        ciphertext = _SUITE.encrypt(token.get_secret_value().encode(), self._key, info=binding.encode())
        return base64.b64encode(_VERSION + self.fingerprint + ciphertext).decode()


@dataclass(frozen=True, repr=False)
class SealingKey:
    """A private key: `seed` is ML-KEM's 64 bytes followed by X25519's 32."""

    seed: bytes

    @classmethod
    def generate(cls) -> SealingKey:
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
        return MLKEM768X25519PrivateKey(*self._halves)

    @cached_property
    def public(self) -> PublicKey:
        mlkem, x25519 = self._halves
        return PublicKey(mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw())

    @cached_property
    def at_rest(self) -> AESGCM:
        derived = HKDF(SHA256(), length=32, salt=None, info=b"channels.hydracore.io/record").derive(self.seed)
        return AESGCM(derived)


class Keyring:
    """All private keys, the newest last: that one seals what is new, any of them opens what is old."""

    def __init__(self, keys: Iterable[SealingKey]) -> None:
        self._keys = {key.public.fingerprint: key for key in keys}
        if not self._keys:
            raise ValueError("a keyring has at least one key")

    @classmethod
    def load(cls, encoded: str) -> Keyring:
        """From what `dump` made. Raises `ValueError` where it is no keyring; never shows what it held."""
        try:
            document: Mapping[str, list[str]] = json.loads(encoded)
            return cls(SealingKey(_base64(seed)) for seed in document["seeds"])
        except (ValueError, KeyError, TypeError):
            raise ValueError("not a keyring of this product, or a damaged one") from None

    def dump(self) -> str:
        return json.dumps({"seeds": [base64.b64encode(key.seed).decode() for key in self._keys.values()]})

    @property
    def current(self) -> SealingKey:
        return next(reversed(self._keys.values()))

    def unseal(self, sealed: str, binding: Binding) -> SecretStr:
        """The token. Raises `Unreadable` and says why: unknown key, cut or altered, or made for another place."""
        try:
            envelope = _base64(sealed)
        except ValueError:
            raise Unreadable("the sealed value is not base64: it was cut or altered") from None
        key, ciphertext = self._open(envelope, "sealed value")
        try:
            return SecretStr(_SUITE.decrypt(ciphertext, key.hpke, info=binding.encode()).decode())
        except (InvalidTag, ValueError):
            raise Unreadable(
                f"the sealed value was cut or altered, or made for another place than namespace "
                f"{binding.namespace}, name {binding.name}, accountSid {binding.account_sid}"
            ) from None

    def wrap(self, plaintext: bytes, uid: str) -> bytes:
        key, nonce = self.current, os.urandom(_NONCE)
        return _VERSION + key.public.fingerprint + nonce + key.at_rest.encrypt(nonce, plaintext, uid.encode())

    def unwrap(self, wrapped: bytes, uid: str) -> bytes:
        """Raises `Unreadable` where no key of the ring made it, or it was made for another uid."""
        key, rest = self._open(wrapped, "record")
        try:
            return key.at_rest.decrypt(rest[:_NONCE], rest[_NONCE:], uid.encode())
        except (InvalidTag, ValueError):
            raise Unreadable("the record was altered, or belongs to another channel") from None

    def _open(self, envelope: bytes, what: str) -> tuple[SealingKey, bytes]:
        if envelope[:1] != _VERSION:
            raise Unreadable(f"the {what} is of no known version: it was cut, altered, or made by a newer release")
        fingerprint, rest = envelope[1 : 1 + _FINGERPRINT], envelope[1 + _FINGERPRINT :]
        key = self._keys.get(fingerprint)
        if key is None:
            raise Unreadable(f"the {what} was made for a key that this operator does not have ({fingerprint.hex()})")
        return key, rest


def _base64(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
