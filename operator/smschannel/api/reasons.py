"""Why a channel is as it is: the one table from which conditions, REST statuses, Events and the docs follow.

Each `Reason` names what it does to the conditions `Ready`, `Reconciling` and `Stalled`, what REST clients
read as `status`, when the operator looks at the channel again, and what a person does about it (`remedy`).
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import NamedTuple


class Look(StrEnum):
    """When a channel is looked at again, apart from when its own spec changes (always, and at once)."""

    AT_ONCE = "at once"
    DRIFT = "drift check"
    BACKOFF = "backoff"
    SECRET = "when the Secret changes"  # noqa: S105
    SPEC = "when spec or keyring changes"
    SLOW = "slowly; when credentials change"
    HOLDER = "when the holder lets go"
    SETTINGS = "when settings change"


class Row(NamedTuple):
    """One line of the table; `ready` None means that the conditions are left as they are."""

    ready: str | None
    progress: str | None  # "Reconciling", "Stalled" or neither: they exclude each other
    rest_status: str
    look: Look
    remedy: str


class Reason(Row, Enum):
    """Every reason that `Ready` can carry."""

    Pending = Row("Unknown", "Reconciling", "pending", Look.AT_ONCE, "Nothing to do: the operator is at work.")
    Configured = Row("True", None, "active", Look.DRIFT, "Nothing to do.")
    TwilioUnavailable = Row(
        "False",
        "Reconciling",
        "pending",
        Look.BACKOFF,
        "Nothing to do: it is tried again by itself. If it lasts, look at Twilio's status page and at the"
        " operator's way out of the cluster.",
    )
    SecretNotFound = Row(
        "False",
        "Reconciling",
        "pending",
        Look.SECRET,
        "Create the Secret that spec.credentials.secretKeyRef names, in the channel's namespace.",
    )
    SecretKeyMissing = Row(
        "False",
        "Reconciling",
        "pending",
        Look.SECRET,
        "Put the token into the Secret under the key that spec.credentials.secretKeyRef.key names.",
    )
    SecretNotLabelled = Row(
        "False",
        "Reconciling",
        "pending",
        Look.SECRET,
        "Label the Secret: kubectl label secret NAME channels.hydracore.io/credentials=true",
    )
    TokenUnreadable = Row(
        "False",
        "Stalled",
        "token_unreadable",
        Look.SPEC,
        "Seal the token again for this namespace, name and accountSid: kubectl sms seal",
    )
    AuthenticationFailed = Row(
        "False",
        "Stalled",
        "authentication_failed",
        Look.SLOW,
        "Take the account SID and auth token from the Twilio console and put them into the channel.",
    )
    TokenRejected = Row(
        "True",
        "Stalled",
        "degraded",
        Look.SLOW,
        "The channel still works with the token before. Replace the new token with one that Twilio accepts.",
    )
    AccountSuspended = Row("False", "Stalled", "account_suspended", Look.SLOW, "Have Twilio reactivate the account.")
    NumberNotFound = Row(
        "False",
        "Stalled",
        "number_not_found",
        Look.SLOW,
        "Check spec.phoneNumber and spec.accountSid: the number must belong to that account.",
    )
    NumberLacksSms = Row("False", "Stalled", "number_lacks_sms", Look.SLOW, "Use a number that can receive SMS.")
    NumberInUse = Row(
        "False",
        "Stalled",
        "number_in_use",
        Look.HOLDER,
        "Use another number, or remove the channel that uses this one: this channel then takes over by itself.",
    )
    InstanceInUse = Row(
        "False",
        "Stalled",
        "instance_in_use",
        Look.HOLDER,
        "An instance has one channel: remove the other one, or this one.",
    )
    WebhookForeign = Row(
        "False",
        "Stalled",
        "webhook_foreign",
        Look.DRIFT,
        "The number already points elsewhere: clear its webhook, or set spec.takeoverPolicy to Always.",
    )
    WebhookDrifted = Row(
        "False",
        "Stalled",
        "webhook_drifted",
        Look.DRIFT,
        "Somebody changed the number's webhook: change it back, or set spec.driftPolicy to Correct.",
    )
    WebhookOverridden = Row(
        "False",
        "Stalled",
        "webhook_overridden",
        Look.DRIFT,
        "Take the number out of the TwiML application or Messaging Service that receives its messages.",
    )
    WebhookContested = Row(
        "False",
        "Stalled",
        "webhook_contested",
        Look.SLOW,
        "Find out who keeps writing the number's webhook, and stop one of the two.",
    )
    WebhookRefused = Row(
        "False",
        "Stalled",
        "webhook_refused",
        Look.SETTINGS,
        "Twilio refuses the webhook URL: the operator's webhook URL template must be a public https URL.",
    )
    Suspended = Row(
        "True", None, "suspended", Look.SPEC, "Set spec.suspend to false to have the channel looked after again."
    )
    Restoring = Row("False", "Reconciling", "removing", Look.BACKOFF, "Nothing to do: the number is being given back.")
    RestoreFailed = Row(
        "False",
        "Stalled",
        "removing",
        Look.BACKOFF,
        "The number could not be given back yet; the operator keeps trying, also after the channel is gone.",
    )
    RecordUnreadable = Row(
        "False",
        "Stalled",
        "record_unreadable",
        Look.SPEC,
        "Restore the Secret that the message names, or the keyring, in the operator's namespace from a backup.",
    )


NOT_CONFIGURED = "not_configured"
"""What REST clients read as `status` where an instance has no channel."""

REST_STATUSES = (NOT_CONFIGURED, *dict.fromkeys(reason.rest_status for reason in Reason))
"""The closed list of REST `status` values."""
