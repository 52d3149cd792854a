"""Make text safe to send to others: tokens are removed, numbers and accounts get names. No I/O.

Text is masked word by word. A word stays if it is known, or cannot be a token, a number or a secret: letters only, or a
short number. So a secret that is an English word would stay; Twilio's tokens, API keys and sealed values never do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from smschannel.api.reasons import Effective, Reason

_SHORT = 5
"""Letters and digits mixed, as in v1 or 30s, are no secret up to this length."""
_LONGEST_WORD = 24  # letters; OverriddenByMessagingService and the like are known
_FEWEST_DIGITS = 7  # of a phone number

_URL = r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>]+"
_DATE, _CLOCK = (
    r"20[0-9]{2}-[0-9]{2}-[0-9]{2}",
    r"[0-9]{2}:[0-9]{2}:[0-9]{2}(?:[.][0-9]{1,9})?(?:Z|[+-][0-9]{2}:?[0-9]{2})?",
)
_TIME = rf"(?<![A-Za-z0-9]){_DATE}(?:[T ]{_CLOCK})?(?![A-Za-z0-9])"
_SID = r"(?<![A-Za-z0-9])[A-Z]{2}[0-9a-fA-F]{32}(?![A-Za-z0-9])"
_NUMBER = r"(?<![A-Za-z0-9])[+]?[0-9](?:[ ().-]{0,2}[0-9]){6,18}(?![A-Za-z0-9])"
_WORD = r"[^\s\"'<>(){}\[\],;=]+"  # in name=value, these are two
_DIGITS = re.compile(r"(?<![A-Za-z0-9])[+]?[0-9]{7,}(?![A-Za-z0-9])")
_PARTS = re.compile(f"(?P<url>{_URL})|(?P<time>{_TIME})|(?P<sid>{_SID})|(?P<number>{_NUMBER})|(?P<word>{_WORD})")
_SIDS = {"AC": "account", "PN": "number-sid", "SK": "api-key", "MG": "messaging-service", "AP": "application"}
_KNOWN = {"sha256", "base64", "utf-8", *Reason.__members__, *(each.value for each in Effective)}


class Mask:
    """Replaces what is secret or personal, the same value by the same name each time.

    `known` are names that stay although they look like secrets: of instances, pods, namespaces, keys.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = {*_KNOWN, *filter(None, known)}
        self._names: defaultdict[str, dict[str, str]] = defaultdict(dict)

    def know(self, *names: str) -> None:
        self._known.update(filter(None, names))

    def value(self, given: Any) -> Any:
        """Return JSON with all its text masked, keys included."""
        if isinstance(given, str):
            return self.text(given)
        if isinstance(given, dict):
            return {self.text(str(name)): self.value(each) for name, each in given.items()}
        if isinstance(given, list | tuple):
            return [self.value(each) for each in given]
        if isinstance(given, int | float) and not isinstance(given, bool):
            return given if abs(given) < 10 ** (_FEWEST_DIGITS - 1) else self.text(str(given))
        return given

    def text(self, text: str) -> str:
        return _PARTS.sub(self._masked, text)

    def number(self, phone_number: str) -> str:
        """Return the name of a phone number, however it is written."""
        return self._name("number", re.sub("[^0-9]", "", phone_number))

    def sid(self, sid: str) -> str:
        """Return the name of an account or of anything else that Twilio numbers."""
        return self._name(_SIDS.get(sid[:2], "sid"), sid.lower())

    def url(self, url: str) -> str:
        """Return scheme and host only: path, query, user and password may be secrets."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
        except ValueError:
            return self._name("masked", url)
        labels = [part if part in self._known or not self._is_opaque(part) else "masked" for part in host.split(".")]
        return f"{parts.scheme}://{'.'.join(labels)}{port}/..."

    def _masked(self, found: re.Match[str]) -> str:
        text = found[0]
        match found.lastgroup:
            case "time":
                return text
            case "url":
                return self.url(text)
            case "sid":
                return self.sid(text)
            case "number":
                return self.number(text)
            case _:
                return self._word(text)

    def _word(self, word: str) -> str:
        bare = word.strip(".:")
        if bare in self._known:
            return word
        word = _DIGITS.sub(lambda found: self.number(found[0]), word)
        bare = word.strip(".:")
        unknown = "/".join(part for part in bare.split("/") if part not in self._known)
        return word.replace(bare, self._name("masked", bare)) if self._is_opaque(unknown) else word

    def _is_opaque(self, word: str) -> bool:
        """Return whether a word may be a secret or a number, as a whole or by one of its parts."""
        parts = [part for part in re.split(r"[-_./:@+%]", word) if part]
        mixed = sum(len(part) for part in parts if not part.isdigit() and any(map(str.isdigit, part)))
        longest = max((len(part) for part in parts if part.isalpha()), default=0)
        digits = max((len(part) for part in parts if part.isdigit()), default=0)
        return not word.isascii() or mixed > _SHORT or longest > _LONGEST_WORD or digits >= _FEWEST_DIGITS

    def _name(self, kind: str, value: str) -> str:
        names = self._names[kind]
        return names.setdefault(value, f"{kind}-{len(names) + 1}")
