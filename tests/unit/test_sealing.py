"""Sealed tokens open for their binding only; truncated, altered or copied values are rejected and never quoted."""

from __future__ import annotations

import base64
import json
import logging
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from smschannel.api.errors import Unreadable
from smschannel.api.sealing import Binding, Keyring, PublicKey, SealingKey

TOKEN = SecretStr("5e5c0ffee5e5c0ffee5e5c0ffee5e5c0")
BINDING = Binding("sms-channels", "497f6eca-6276-4993-bfeb-53cbbbba6f08", "AC0123456789abcdef0123456789abcdef")

# The regions of the envelope.
VERSION, FINGERPRINT, ENCAPSULATED = slice(0, 1), slice(1, 9), slice(9, 9 + 1120)
TAG = 16

# Never regenerate these: values in users' Git repositories must open with every later release.
VECTORS = json.loads((Path(__file__).parent / "sealing_vectors.json").read_text())

KEY = SealingKey(bytes(range(96)))
RING = Keyring([KEY])
SEALED = KEY.public.seal(TOKEN, BINDING)
ENVELOPE = base64.b64decode(SEALED)
WRAPPED = RING.wrap(b"the contents", "uid-1")


def opened(envelope: bytes, binding: Binding = BINDING, ring: Keyring = RING) -> str:
    return ring.unseal(base64.b64encode(envelope).decode(), binding).get_secret_value()


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# Sealed tokens


@settings(deadline=None)
@given(token=st.text(min_size=1), namespace=st.text(), name=st.text(), account=st.text())
def test_sealed_token_opens(token: str, namespace: str, name: str, account: str) -> None:
    binding = Binding(namespace, name, account)
    sealed = KEY.public.seal(SecretStr(token), binding)
    assert RING.unseal(sealed, binding) == SecretStr(token)


def test_sealing_is_randomised() -> None:
    assert KEY.public.seal(TOKEN, BINDING) != SEALED
    assert RING.unseal(KEY.public.seal(TOKEN, BINDING), BINDING) == TOKEN


@pytest.mark.parametrize(
    "elsewhere",
    [
        BINDING._replace(namespace="other"),
        BINDING._replace(name="00000000-0000-0000-0000-000000000000"),
        BINDING._replace(account_sid="AC" + "0" * 32),
        BINDING._replace(name=BINDING.name.upper()),
        BINDING._replace(namespace=""),
    ],
)
def test_copy_in_another_place_is_unreadable(elsewhere: Binding) -> None:
    with pytest.raises(Unreadable, match="sealed for another place than namespace") as caught:
        RING.unseal(SEALED, elsewhere)
    for part in elsewhere:
        assert part in str(caught.value)


def test_binding_parts_are_delimited() -> None:
    sealed = KEY.public.seal(TOKEN, Binding("ab", "c", "d"))
    for other in (Binding("a", "bc", "d"), Binding("ab", "", "cd"), Binding("abc", "d", ""), Binding("", "abc", "d")):
        with pytest.raises(Unreadable):
            RING.unseal(sealed, other)


@given(st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=2, max_size=2, unique=True))
def test_binding_encoding_is_unique(places: list[tuple[str, str, str]]) -> None:
    first, second = (Binding(*place).encode() for place in places)
    assert first != second


@settings(deadline=None, max_examples=300)
@given(bit=st.integers(0, len(ENVELOPE) * 8 - 1))
def test_any_flipped_bit_is_detected(bit: int) -> None:
    with pytest.raises(Unreadable):
        opened(flipped(ENVELOPE, bit))


@pytest.mark.parametrize(
    ("region", "error"),
    [
        (VERSION, "has an unknown version"),
        (FINGERPRINT, "needs a key that this operator does not have"),
        (ENCAPSULATED, "truncated or altered"),
        (slice(ENCAPSULATED.stop, -TAG), "truncated or altered"),
        (slice(-TAG, None), "truncated or altered"),
    ],
    ids=["version", "fingerprint", "encapsulated key", "ciphertext", "tag"],
)
def test_each_region_of_the_envelope_is_protected(region: slice, error: str) -> None:
    begin, end, _ = region.indices(len(ENVELOPE))
    for byte in (begin, end - 1):
        with pytest.raises(Unreadable, match=error):
            opened(flipped(ENVELOPE, byte * 8))
    with pytest.raises(Unreadable):
        opened(ENVELOPE[:begin] + ENVELOPE[end:])


@settings(deadline=None)
@given(length=st.integers(0, len(ENVELOPE) - 1))
def test_truncated_value_is_unreadable(length: int) -> None:
    with pytest.raises(Unreadable):
        opened(ENVELOPE[:length])


def test_value_with_trailing_bytes_is_unreadable() -> None:
    with pytest.raises(Unreadable):
        opened(ENVELOPE + b"\0")


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda some: base64.b64encode(some).decode()))
def test_arbitrary_text_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        RING.unseal(text, BINDING)


def test_error_never_contains_the_input() -> None:
    """A user may have written the token itself where the sealed value belongs."""
    plain = TOKEN.get_secret_value()
    for given_text in (plain, plain + "!", base64.b64encode(plain.encode()).decode(), SEALED[:-4]):
        with pytest.raises(Unreadable) as caught:
            RING.unseal(given_text, BINDING)
        shown = "".join(traceback.format_exception(caught.value))
        assert given_text not in shown
        assert plain not in shown


def test_unknown_key_is_reported_by_fingerprint() -> None:
    other = SealingKey.generate()
    with pytest.raises(Unreadable, match=other.public.fingerprint.hex()):
        RING.unseal(other.public.seal(TOKEN, BINDING), BINDING)


# The keyring


def test_newest_key_seals_and_every_key_opens() -> None:
    old, new = SealingKey.generate(), SealingKey.generate()
    before, after = Keyring([old]), Keyring([old, new])
    assert before.current == old
    assert after.current == new
    for public in (old.public, new.public):
        assert after.unseal(public.seal(TOKEN, BINDING), BINDING) == TOKEN
    assert after.unwrap(before.wrap(b"record", "uid-1"), "uid-1") == b"record"
    with pytest.raises(Unreadable, match="needs a key that this operator does not have"):
        before.unwrap(after.wrap(b"record", "uid-1"), "uid-1")


def test_dumped_keyring_loads_unchanged() -> None:
    keys = [SealingKey.generate() for _ in range(3)]
    loaded = Keyring.load(Keyring(keys).dump())
    assert loaded.dump() == Keyring(keys).dump()
    assert loaded.current == keys[-1]
    for key in keys:
        assert loaded.unseal(key.public.seal(TOKEN, BINDING), BINDING) == TOKEN


def test_keyring_needs_a_key() -> None:
    with pytest.raises(ValueError, match="at least one key"):
        Keyring([])


SEED = base64.b64encode(KEY.seed).decode()


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"seeds": null}',
        '{"seeds": []}',
        '{"seeds": [null]}',
        '{"seeds": [7]}',
        '{"seeds": {}}',
        '{"seeds": [""]}',
        f'{{"seeds": ["{SEED}"',
        f'{{"seeds": "{SEED}"}}',
        f'{{"seeds": ["{SEED[:-4]}"]}}',
        f'{{"seeds": ["{SEED[:-1]}"]}}',
        f'{{"seeds": ["{SEED}AAAA"]}}',
        f'{{"seeds": ["{SEED}", "AAAA"]}}',
        f'{{"seeds": ["!{SEED[1:]}"]}}',
        f'{{"seeds": ["\u00e9{SEED[1:]}"]}}',
    ],
)
def test_damaged_keyring_is_rejected_and_not_shown(damaged: str) -> None:
    with pytest.raises(
        ValueError, match=r"^not a keyring of this release: it is damaged, or was written by a newer one$"
    ) as caught:
        Keyring.load(damaged)
    shown = "".join(traceback.format_exception(caught.value))
    assert SEED[4:32] not in shown


# Records


@given(plaintext=st.binary(), uid=st.text())
def test_wrapped_record_unwraps(plaintext: bytes, uid: str) -> None:
    assert RING.unwrap(RING.wrap(plaintext, uid), uid) == plaintext


def test_record_of_another_channel_is_unreadable() -> None:
    with pytest.raises(Unreadable, match="was altered, or belongs to another channel"):
        RING.unwrap(WRAPPED, "uid-2")


@given(bit=st.integers(0, len(WRAPPED) * 8 - 1), length=st.integers(0, len(WRAPPED) - 1))
def test_altered_or_truncated_record_is_unreadable(bit: int, length: int) -> None:
    for damaged in (flipped(WRAPPED, bit), WRAPPED[:length]):
        with pytest.raises(Unreadable):
            RING.unwrap(damaged, "uid-1")


def test_nonces_are_unique() -> None:
    nonces = {RING.wrap(b"the same", "uid-1")[9:21] for _ in range(100)}
    assert len(nonces) == 100


def test_sealed_tokens_and_records_are_not_interchangeable() -> None:
    with pytest.raises(Unreadable):
        RING.unwrap(ENVELOPE, BINDING.name)
    with pytest.raises(Unreadable):
        opened(WRAPPED)


# Compatibility


def test_public_key_of_a_seed_never_changes() -> None:
    public = SealingKey(bytes.fromhex(VECTORS["seed"])).public
    assert public.encoded == VECTORS["publicKey"]
    assert public.fingerprint.hex() == VECTORS["fingerprint"]


def test_values_sealed_by_earlier_releases_open() -> None:
    ring = Keyring([SealingKey(bytes.fromhex(VECTORS["seed"]))])
    for vector in VECTORS["sealed"]:
        token = ring.unseal(vector["value"], Binding(*vector["binding"]))
        assert token.get_secret_value() == vector["token"]


def test_records_of_earlier_releases_open() -> None:
    ring = Keyring.load(VECTORS["keyring"])
    assert ring.unwrap(bytes.fromhex(VECTORS["record"]["value"]), VECTORS["record"]["uid"]) == b"what is owed"


def test_binding_encoding_never_changes() -> None:
    assert Binding("ab", "c", "").encode() == (
        b"\0\0\0\x01\x01" + b"\0\0\0\x1bchannels.hydracore.io/token" + b"\0\0\0\x02ab" + b"\0\0\0\x01c" + b"\0\0\0\0"
    )


def test_lengths_match_the_suite() -> None:
    """An encapsulated key of 1,120 bytes is that of ML-KEM-768 and X25519 together; nothing else has it."""
    assert len(KEY.public.raw) == 1184 + 32
    assert len(KEY.seed) == 64 + 32
    assert len(ENVELOPE) == 1 + 8 + 1120 + len(TOKEN.get_secret_value()) + TAG
    assert ENVELOPE[VERSION] == b"\x01"
    assert ENVELOPE[FINGERPRINT] == KEY.public.fingerprint
    assert len(KEY.public.seal(SecretStr("x"), BINDING)) == 1528, "the minimum length in resource.py and in the CRD"
    assert len(WRAPPED) == 1 + 8 + 12 + len(b"the contents") + TAG


# Secrecy


def test_logs_and_reprs_never_contain_a_seed_or_token(caplog: pytest.LogCaptureFixture) -> None:
    objects = (KEY, RING, KEY.public, KEY.hpke, KEY.at_rest, BINDING, RING.unseal(SEALED, BINDING), replace(KEY))
    with caplog.at_level(logging.DEBUG):
        logging.getLogger().info("%s %r", objects, objects)
    shown = caplog.text + "".join(f"{each}{each!r}{[each]}" for each in objects)
    secrets = (KEY.seed[:64], KEY.seed[64:], TOKEN.get_secret_value().encode())
    for secret in secrets:
        for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]):
            assert form not in shown


# Public keys


def test_encoded_public_key_decodes_unchanged() -> None:
    loaded = PublicKey.decode(KEY.public.encoded)
    assert loaded == KEY.public
    assert RING.unseal(loaded.seal(TOKEN, BINDING), BINDING) == TOKEN


@pytest.mark.parametrize(
    ("encoded", "error"),
    [
        ("", "this is 0 bytes"),
        (base64.b64encode(KEY.public.raw[:-1]).decode(), "1216 bytes, base64 encoded; this is 1215 bytes"),
        (base64.b64encode(KEY.public.raw + b"more").decode(), "this is 1220 bytes"),
        (KEY.public.encoded[:-2], "padding"),
        (f"{KEY.public.encoded}\n", "padding|base64"),
        ("-----BEGIN PUBLIC KEY-----", "base64"),
        ("schl\u00fcssel", "ASCII"),
    ],
)
def test_invalid_public_key_is_rejected(encoded: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PublicKey.decode(encoded)


def test_fingerprints_differ() -> None:
    assert len({SealingKey.generate().public.fingerprint for _ in range(10)}) == 10
