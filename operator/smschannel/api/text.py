"""Clean and judge text that people paste: phone numbers, SIDs, tokens, URLs, names and settings. No I/O.

Web pages, word processors and shells add characters that nobody sees: byte order marks, no-break spaces, zero-width and
bidirectional marks, line ends. Every door (settings, Secrets, command line, REST) cleans text here, so that all accept
the same: around a value they are removed; inside, the value is refused and the first of them named by its code point.
"""

from __future__ import annotations

import unicodedata

_CONTROLS = {
    "\0": "null",
    "\t": "tab",
    "\n": "line feed",
    "\v": "vertical tab",
    "\f": "form feed",
    "\r": "carriage return",
    "\x1b": "escape",
    "\x7f": "delete",
}
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_QUOTES = "\"'`"
_PUNCTUATION = frozenset(_DASHES + ".()")
_ENCODINGS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),  # before UTF-16, whose mark is the beginning of this one
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


class TextError(ValueError):
    """The message says what is wrong with a text, and never repeats the text."""


def clean(text: str) -> str:
    """Return `text` without white space, line ends, byte order marks, zero-width and bidi marks around it."""
    start, end = 0, len(text)
    while start < end and _is_blank(text[start]):
        start += 1
    while end > start and _is_blank(text[end - 1]):
        end -= 1
    return text[start:end]


def clean_phone_number(text: str) -> str:
    """Return a phone number without the punctuation for readers: spaces and dashes of any kind, dots, parentheses."""
    return "".join(each for each in clean(text) if each not in _PUNCTUATION and unicodedata.category(each) != "Zs")


def clean_line(text: str) -> str:
    """Return `text` cleaned; raise `TextError` if a character inside it is invisible and no plain space."""
    cleaned = clean(text)
    for position, character in enumerate(cleaned, start=1):
        if is_invisible(character):
            raise TextError(f"contains {described(character)} at position {position}; type it again, as plain text")
    return cleaned


def unexpected(text: str) -> str | None:
    """Return a description of the first character that is neither a visible ASCII character nor a space, and where."""
    for position, character in enumerate(text, start=1):
        if not " " <= character <= "~":
            return f"{described(character)} at position {position}"
    return None


def unsendable(token: str) -> str | None:
    """Return a description of the first character that no token of Twilio has; None if there is none.

    HTTP basic authentication could not carry most of them; quotes around the token are somebody's shell or YAML.
    """
    if len(token) > 1 and token[0] == token[-1] and token[0] in _QUOTES:
        return f"{described(token[0])} at both ends"
    for position, character in enumerate(token, start=1):
        if not "!" <= character <= "~":
            return f"{described(character)} at position {position}"
    return None


def described(character: str) -> str:
    """Return the character's code point and name, such as `U+200B (zero width space)`."""
    is_control = unicodedata.category(character) == "Cc"
    name = unicodedata.name(character, "").lower() or _CONTROLS.get(character)
    name = name or ("control character" if is_control else "unnamed character")
    return f"U+{ord(character):04X} ({name})"


def is_invisible(character: str) -> bool:
    """Return whether a reader cannot see the character, or takes it for a plain space."""
    return character != " " and not (character.isprintable() and unicodedata.category(character) != "Zs")


def decode(raw: bytes) -> str:
    """Decode a file, standard input or a Secret's value: UTF-8, or UTF-16 as PowerShell writes it, or UTF-32.

    Raises `TextError`, without the content, for anything else.
    """
    mark, encoding = next(((mark, name) for mark, name in _ENCODINGS if raw.startswith(mark)), (b"", _unmarked(raw)))
    try:
        return raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-le").removesuffix("-be").upper()
        at = len(mark) + error.start + 1
        if encoding == "utf-8" and not mark:
            raise TextError(f"is not UTF-8 text (nor UTF-16): byte {at} is not; save it as UTF-8") from None
        raise TextError(f"begins as {name} text, but byte {at} is not {name}; save it as UTF-8") from None


def _unmarked(raw: bytes) -> str:
    """Guess the encoding of bytes without a byte order mark: in ASCII text as UTF-16, every other byte is zero."""
    if len(raw) >= 2 and len(raw) % 2 == 0 and 0 in raw:
        if not any(raw[1::2]) and all(raw[::2]):
            return "utf-16-le"
        if not any(raw[::2]) and all(raw[1::2]):
            return "utf-16-be"
    return "utf-8"


def _is_blank(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in {"Cf", "Zs", "Zl", "Zp"}
