"""Everything that can go wrong, as a tree. The type says whether to retry; the message is for people.

    ChannelError
    ├── Retryable                   retry with backoff, after `retry_after` seconds where the other side asked for that
    │   ├── TwilioUnavailable       5xx, and answers that cannot be understood
    │   │   ├── TwilioTimeout       no answer at all
    │   │   └── TwilioThrottled     429
    │   ├── KubernetesUnavailable   5xx, 429, timeouts, and answers that cannot be understood
    │   ├── Conflict                409: somebody else wrote first; read again
    │   └── Expired                 410: the list or watch is too old; begin again
    ├── Refused                     retrying alone does not help; carries the `Reason`
    ├── KubernetesRefused           the API server said no: a missing right (403), an invalid object (422), a policy
    │   └── NoKindMatch             the API server serves no such kind: the CRD is not installed
    ├── NotFound                    the object does not exist: the API server, or Twilio, named it
    ├── Unreadable                  sealed bytes that no key of the keyring opens here
    └── KeyringLost                 the operator cannot read its own records, and must not go on

No message carries a token: messages are made from codes and names only.
"""

from __future__ import annotations

from smschannel.api.reasons import Reason

_LONGEST_RETRY_AFTER = 900.0  # seconds


class ChannelError(Exception):
    """Base of all errors that this project raises on purpose."""


class Retryable(ChannelError):
    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TwilioUnavailable(Retryable):
    pass


class TwilioTimeout(TwilioUnavailable):
    pass


class TwilioThrottled(TwilioUnavailable):
    pass


class KubernetesUnavailable(Retryable):
    pass


class Conflict(Retryable):
    pass


class Expired(Retryable):
    pass


class Refused(ChannelError):
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class KubernetesRefused(ChannelError):
    """`status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NoKindMatch(KubernetesRefused):
    pass


class NotFound(ChannelError):
    """`name` is the object that the API server named; empty for Twilio's."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class Unreadable(ChannelError):
    pass


class KeyringLost(ChannelError):
    pass


def retry_after_seconds(header: str | None) -> float | None:
    """Parse a Retry-After header. At most 15 minutes: a mistaken header must not stop a channel for days."""
    if header and header.isascii() and header.isdecimal():
        return min(float(header), _LONGEST_RETRY_AFTER)
    return None
