"""All errors that this project raises on purpose, as a tree. The type says whether to retry; the message is for people.

    ChannelError
    ├── Retryable                   retry with backoff; not before `retry_after` seconds if the server asked for that
    │   ├── TwilioUnavailable       Twilio answered 5xx, or something that is not valid
    │   │   ├── TwilioTimeout       Twilio did not answer in time
    │   │   ├── TwilioThrottled     Twilio answered 429
    │   │   └── SuspectedRefusal    Twilio refused credentials that it accepted before, once so far
    │   ├── KubernetesUnavailable   the API server answered 5xx, 429 or something that is not valid, or not at all
    │   │   └── NotConnected        TLS, a proxy or the login failed before the API server was asked
    │   ├── Fenced                  the API server admits writes of the leader only, and this process is not the leader
    │   ├── LeaseEndsSoon           a write to Twilio might outlast this process's time as the leader
    │   ├── Conflict                409: another client wrote first; read the object again
    │   └── Expired                 410: the list or watch is too old; start it again
    ├── Refused                     Twilio, or a rule of the operator, does not allow it; carries the `Reason`
    ├── KubernetesRefused           the API server does not allow it: a missing right, a policy, an invalid object
    │   └── NoKindMatch             the API server serves no such kind: the CRD is not installed
    ├── KubeconfigError             the kubeconfig, or the pod's ServiceAccount, cannot be used
    ├── EgressError                 the setting of a proxy or of CA certificates cannot be used
    ├── NotFound                    the object does not exist: the API server, or Twilio, named it
    ├── Unreadable                  no key of the keyring opens these sealed bytes
    │   └── MissingKey              they need a key that is not in the keyring
    └── KeyringLost                 the operator cannot read its own records, and must stop

No message carries a token: messages are made from codes and names only.
"""

from __future__ import annotations

from smschannel.api.reasons import Reason

_MAX_RETRY_AFTER = 900.0  # seconds


class ChannelError(Exception):
    """The base class of all errors here."""


class Retryable(ChannelError):
    """`retry_after` is in seconds; None means that the server named no time."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TwilioUnavailable(Retryable):
    """Twilio answered 5xx, or something that is not valid. `code` is Twilio's own; 0 if it named none."""

    def __init__(self, message: str, retry_after: float | None = None, *, code: int = 0) -> None:
        super().__init__(message, retry_after)
        self.code = code


class TwilioTimeout(TwilioUnavailable):
    """Twilio did not answer in time."""


class TwilioThrottled(TwilioUnavailable):
    """Twilio answered 429."""


class SuspectedRefusal(TwilioUnavailable):
    """Twilio refused credentials that it accepted before. A second answer, some time later, must confirm that."""


class KubernetesUnavailable(Retryable):
    """The API server answered 5xx, 429 or something that is not valid, or not at all."""


class NotConnected(KubernetesUnavailable):
    """TLS, a proxy or the login failed; mostly somebody must fix that."""


class Fenced(Retryable):
    """The admission policy for operators refused a write: the API server does not know this process as the leader."""


class LeaseEndsSoon(Retryable):
    """The write to Twilio was not sent: this process does not lead, or not for longer than the call may take."""


class Conflict(Retryable):
    """Another client wrote first (409)."""


class Expired(Retryable):
    """The list or watch is too old (410)."""


class Refused(ChannelError):
    """`reason` is what the channel's `Ready` condition reports."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class KubernetesRefused(ChannelError):
    """`status` is the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NoKindMatch(KubernetesRefused):
    """The API server serves no such kind."""


class KubeconfigError(ChannelError):
    pass


class EgressError(ChannelError):
    """A proxy or CA certificates that somebody configured cannot be used."""


class NotFound(ChannelError):
    """`name` is the name of the Kubernetes object; empty for Twilio's objects."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class Unreadable(ChannelError):
    """No key of the keyring opens these sealed bytes."""


class MissingKey(Unreadable):
    """They need a key that is not in the keyring: once it is restored, they can be opened."""


class KeyringLost(ChannelError):
    """The keyring is missing although records or the public key exist."""


def retry_after_seconds(header: str | None) -> float | None:
    """Parse a Retry-After header into seconds, at most 15 minutes; return None if it is missing or not a number.

    The maximum keeps a mistaken header from stopping a channel for days.
    """
    if header and header.isascii() and header.isdecimal():
        return min(float(header), _MAX_RETRY_AFTER)
    return None
