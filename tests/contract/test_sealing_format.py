"""docs/sealing.md is enough to write a sealer: one in Go was, and each step of the page's example is computed here."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from pydantic import SecretStr

from smschannel.api.errors import Unreadable
from smschannel.api.sealing import Binding, Keyring, SealingKey
from tests.documents import ROOT, table
from tests.sealer import seal_with_go

VECTORS = json.loads((ROOT / "tests/unit/sealing_vectors.json").read_text())
SUITE = b"HPKE\x64\x7a\x00\x01\x00\x02"


@pytest.mark.parametrize(
    ("token", "binding"),
    [
        ("5e5c0ffee5e5c0ffee5e5c0ffee5e5c0", Binding("sms-channels", "497f6eca", "AC0123456789abcdef")),
        ("t", Binding("", "", "")),
        ("x" * 512, Binding("team-b", "ü" * 70, "AC" + "0" * 32)),
    ],
    ids=["usual", "empty binding", "long, and lengths that are bytes and not characters"],
)
def test_what_go_seals_opens_here_and_in_its_place_only(token: str, binding: Binding) -> None:
    key = SealingKey.generate()
    sealed, ring = seal_with_go(key.public.encoded, token, binding), Keyring([key])
    assert ring.unseal(sealed, binding) == SecretStr(token)
    with pytest.raises(Unreadable):
        ring.unseal(sealed, binding._replace(name="another"))
    with pytest.raises(Unreadable):
        Keyring([SealingKey.generate()]).unseal(sealed, binding)


class Steps(NamedTuple):
    """The steps of opening a sealed value as the page describes them, in hexadecimal."""

    fingerprint: str
    info: str
    shared_secret: str
    key: str
    base_nonce: str
    token: str


def opened(seed: bytes, sealed: str, binding: list[str]) -> Steps:
    envelope = base64.b64decode(sealed)
    assert envelope[0] == 1
    encapsulated, ciphertext = envelope[9:1129], envelope[1129:]
    lattice, curve = MLKEM768PrivateKey.from_seed_bytes(seed[:64]), X25519PrivateKey.from_private_bytes(seed[64:])
    first = lattice.decapsulate(encapsulated[:1088])
    second = curve.exchange(X25519PublicKey.from_public_bytes(encapsulated[1088:]))
    own = curve.public_key().public_bytes_raw()
    shared = hashlib.sha3_256(first + second + encapsulated[1088:] + own + b"\\.//^\\").digest()
    parts = [b"\x01", b"channels.hydracore.io/token", *(part.encode() for part in binding)]
    info = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    key, nonce = expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)
    token = AESGCM(key).decrypt(nonce, ciphertext, b"")
    return Steps(envelope[1:9].hex(), info.hex(), shared.hex(), key.hex(), nonce.hex(), token.decode())


def extract(salt: bytes, label: bytes, content: bytes) -> bytes:
    return HKDF.extract(SHA256(), salt or bytes(32), b"HPKE-v1" + SUITE + label + content)


def expand(secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + SUITE + label + context
    return HKDFExpand(SHA256(), length, labelled).derive(secret)


def test_example_of_the_page_is_right_in_each_step() -> None:
    vector = VECTORS["sealed"][0]
    steps = opened(bytes.fromhex(VECTORS["seed"]), vector["value"], vector["binding"])
    documented = {name: value.strip("`") for name, value in table("Step", "Value")}
    assert documented == steps._asdict() | {"namespace, name, accountSid": ", ".join(vector["binding"])}
    public = SealingKey(bytes.fromhex(VECTORS["seed"])).public
    assert (public.encoded, public.fingerprint.hex()) == (VECTORS["publicKey"], steps.fingerprint)
