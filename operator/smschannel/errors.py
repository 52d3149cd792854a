"""What can go wrong, as a tree. Whether to try again is in the type; what a person reads is in the message.

    ChannelError
    ├── Retryable               try again later, with backoff; `retry_after` in seconds where the other side said it
    │   ├── TwilioUnavailable   5xx, broken answers
    │   │   ├── TwilioSilent    time-outs: it does not answer at all
    │   │   └── TwilioThrottled 429: it asks for a pause
    │   ├── KubernetesUnavailable
    │   └── Conflict            somebody wrote first: look again
    ├── Refused                 trying again alone mends nothing; carries the `Reason`
    ├── Gone                    the object this was about does not exist any more
    ├── Unreadable              sealed bytes that no key opens in this place
    └── KeyringLost             the operator cannot read what it wrote: it must not go on

No message carries a token: they are made from codes and names only.
"""

from __future__ import annotations

from smschannel.reasons import Reason

_LONGEST_RETRY_AFTER = 900.0


class ChannelError(Exception):
    """Base of all errors that this package raises on purpose."""


class Retryable(ChannelError):
    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TwilioUnavailable(Retryable):
    pass


class TwilioSilent(TwilioUnavailable):
    pass


class TwilioThrottled(TwilioUnavailable):
    pass


class KubernetesUnavailable(Retryable):
    pass


class Conflict(Retryable):
    pass


class Refused(ChannelError):
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Gone(ChannelError):
    pass


class Unreadable(ChannelError):
    pass


class KeyringLost(ChannelError):
    pass


def retry_after_seconds(header: str | None) -> float | None:
    """A Retry-After header in seconds, at most 15 minutes: a mistaken one must not park a channel for days."""
    if header and header.isascii() and header.isdecimal():
        return min(float(header), _LONGEST_RETRY_AFTER)
    return None
