"""What people paste is cleaned around, and judged inside, at every door alike."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smschannel.api.text import (
    TextError,
    clean,
    clean_line,
    clean_phone_number,
    decode,
    described,
    is_invisible,
    unexpected,
    unsendable,
)

TOKEN = "5e5c0ffee5e5c0ffee"
INVISIBLE = [
    *" \t\r\n\v\f\x1c\x85\xa0\xad\u1680\u2000\u200a\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u202a\u202c\u202e\u202f",
    *"\u205f\u2060\u2066\u2069\u3000\ufeff\U000e0041",
]


@pytest.mark.parametrize("character", INVISIBLE, ids=lambda each: f"U+{ord(each):04X}")
def test_invisible_characters_are_dropped_around_and_named_inside(character: str) -> None:
    assert clean(f"{character}a b{character}{character}") == "a b"
    if character != " ":
        with pytest.raises(TextError, match=rf"^contains U\+{ord(character):04X} \(.+\) at position 2; type it again"):
            clean_line(f"a{character}b")


@pytest.mark.parametrize("character", ["\0", "\x1b", "\x7f", "\x08", "\ue000", "\ud800", "\u0301"])
def test_control_characters_are_not_dropped(character: str) -> None:
    """They are never an accident of pasting; a value with one is refused."""
    assert clean(character + "a") == character + "a"


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\u200b", "U+200B (zero width space)"),
        ("\ufeff", "U+FEFF (zero width no-break space)"),
        ("\u2011", "U+2011 (non-breaking hyphen)"),
        ("\n", "U+000A (line feed)"),
        ("\0", "U+0000 (null)"),
        ("\x01", "U+0001 (control character)"),
        ("\ue000", "U+E000 (unnamed character)"),
        ("\U000e0041", "U+E0041 (tag latin capital letter a)"),
    ],
)
def test_characters_are_named(character: str, name: str) -> None:
    assert described(character) == name


@pytest.mark.parametrize(
    ("pasted", "number"),
    [
        ("+61 400 111 222", "+61400111222"),
        ("\u202a+61\u00a0400\u2009111\u3000222\u202c", "+61400111222"),
        ("+61\u2011400\u2013111\u2212222\r\n", "+61400111222"),
        ("(+61) 400.111\uff0d222", "+61400111222"),
        ("+61400\u200b111222", "+61400\u200b111222"),
        ("+61400\n111222", "+61400\n111222"),
        ("\uff0b61400111222", "\uff0b61400111222"),
    ],
)
def test_phone_numbers_lose_what_is_for_readers_only(pasted: str, number: str) -> None:
    assert clean_phone_number(pasted) == number


def test_first_unexpected_character_is_described() -> None:
    assert unexpected("+61 400") is None
    assert unexpected("+61\u200b\u200c") == "U+200B (zero width space) at position 4"
    assert unsendable("a b") == "U+0020 (space) at position 2"
    assert unsendable(f"'{TOKEN}'") == "U+0027 (apostrophe) at both ends"
    assert unsendable(TOKEN) is unsendable(f"'{TOKEN}") is unsendable("") is unsendable("'") is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "ascii"])
def test_encodings_are_recognized(encoding: str) -> None:
    assert decode(f"{TOKEN}\r\n".encode(encoding)) == f"{TOKEN}\r\n"


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_marks_of_both_byte_orders_are_recognized(mark: str) -> None:
    assert decode(f"\ufeff{TOKEN}".encode(mark)) == TOKEN


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (TOKEN.encode() + b"\xe9", "is not UTF-8 text (nor UTF-16): byte 19 is not; save it as UTF-8"),
        (b"\xff\xfe" + TOKEN.encode("utf-16-le")[:-1], "begins as UTF-16 text, but byte 37 is not UTF-16"),
        (b"\xef\xbb\xbf\xff", "begins as UTF-8 text, but byte 4 is not UTF-8"),
        (b"\xff\xfe\x00\x00\x01", "begins as UTF-32 text, but byte 5 is not UTF-32"),
        (b"\x1f\x8b\x08\x00\x80", "is not UTF-8 text"),
    ],
)
def test_other_encodings_are_refused_without_the_content(raw: bytes, message: str) -> None:
    with pytest.raises(TextError) as error:
        decode(raw)
    assert message in str(error.value)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("raw", [b"", b"\0", b"\0\0", b"a\0", b"\0a", b"a\0\0b", b"\xff\xfe", b"\xef\xbb\xbf"])
def test_short_inputs_are_decoded_somehow(raw: bytes) -> None:
    assert len(decode(raw)) <= len(raw)


@given(st.text())
def test_cleaning_is_idempotent_and_removes_nothing_visible(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert cleaned in text
    assert all(each == " " or is_invisible(each) for each in text.replace(cleaned, "", 1))


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1))
def test_text_survives_every_encoding_with_a_mark(text: str) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert decode(text.encode(encoding)) == text


@given(st.binary())
def test_any_bytes_are_decoded_or_refused(raw: bytes) -> None:
    with contextlib.suppress(TextError):
        assert len(decode(raw)) <= len(raw)


@given(st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126)))
def test_plain_text_is_never_refused(text: str) -> None:
    assert clean_line(text) == text.strip(" ")
