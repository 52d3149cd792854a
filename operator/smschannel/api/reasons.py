"""Why a channel is as it is: the one table from which conditions, REST statuses, Events and the docs follow. No I/O."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import NamedTuple


class Recheck(StrEnum):
    """When a channel is reconciled again although nothing changed. Changes are always reconciled at once."""

    DRIFT = "drift check"
    SLOW = "slow check"
    BACKOFF = "backoff"


class Row(NamedTuple):
    """One line of the table.

    `ready` is the status of the condition Ready; `progress` names the condition that is True beside it, if any
    (Reconciling and Stalled exclude each other); `rest_status` is what REST clients read as `status`; `remedy` is what
    a person does about it. While a channel works with its recorded credentials, those that it names now being missing
    or unreadable, Ready and Stalled are True and the REST status is degraded.
    """

    ready: str
    progress: str | None
    rest_status: str
    recheck: Recheck
    remedy: str


class Reason(Row, Enum):
    """Every reason that `Ready` can carry."""

    Pending = Row("Unknown", "Reconciling", "pending", Recheck.BACKOFF, "Nothing to do: the operator is at work.")
    Configured = Row("True", None, "active", Recheck.DRIFT, "Nothing to do.")
    TwilioUnavailable = Row(
        "False",
        "Reconciling",
        "pending",
        Recheck.BACKOFF,
        "Nothing to do: the operator retries. If it lasts, check Twilio's status page and the operator's network.",
    )
    SecretNotFound = Row(
        "False",
        "Reconciling",
        "pending",
        Recheck.SLOW,
        "Create the Secret that spec.credentials.secretKeyRef names, in the channel's namespace.",
    )
    SecretKeyMissing = Row(
        "False",
        "Reconciling",
        "pending",
        Recheck.SLOW,
        "Put the token into the Secret under the key that spec.credentials.secretKeyRef.key names.",
    )
    SecretNotLabelled = Row(
        "False",
        "Reconciling",
        "pending",
        Recheck.SLOW,
        "Label the Secret: kubectl label secret NAME channels.hydracore.io/credentials=true",
    )
    TokenUnreadable = Row(
        "False",
        "Stalled",
        "token_unreadable",
        Recheck.SLOW,
        "If a key is missing, restore it: kubectl sms keys restore. Otherwise seal the token again for this namespace,"
        " name and accountSid: kubectl sms seal",
    )
    AuthenticationFailed = Row(
        "False",
        "Stalled",
        "authentication_failed",
        Recheck.SLOW,
        "Take the account SID and auth token from the Twilio console and put them into the channel.",
    )
    TokenRejected = Row(
        "True",
        "Stalled",
        "degraded",
        Recheck.SLOW,
        "The channel still works with the token before. Replace the new token with one that Twilio accepts.",
    )
    AccountSuspended = Row("False", "Stalled", "account_suspended", Recheck.SLOW, "Have Twilio reactivate the account.")
    NumberNotFound = Row(
        "False",
        "Stalled",
        "number_not_found",
        Recheck.SLOW,
        "Check spec.phoneNumber and spec.accountSid: the number must belong to that account.",
    )
    NumberLacksSms = Row("False", "Stalled", "number_lacks_sms", Recheck.SLOW, "Use a number that can receive SMS.")
    NumberInUse = Row(
        "False",
        "Stalled",
        "number_in_use",
        Recheck.SLOW,
        "Use another number, or remove the channel that uses this one: this channel then takes over by itself.",
    )
    WebhookForeign = Row(
        "False",
        "Stalled",
        "webhook_foreign",
        Recheck.DRIFT,
        "The number already points elsewhere: clear its webhook, or set spec.takeoverPolicy to Always.",
    )
    WebhookDrifted = Row(
        "False",
        "Stalled",
        "webhook_drifted",
        Recheck.DRIFT,
        "Somebody changed the number's webhook: change it back, or set spec.driftPolicy to Correct.",
    )
    WebhookOverridden = Row(
        "False",
        "Stalled",
        "webhook_overridden",
        Recheck.DRIFT,
        "Let the number's own webhook receive the messages.",
    )
    WebhookContested = Row(
        "False",
        "Stalled",
        "webhook_contested",
        Recheck.SLOW,
        "Find out who keeps writing the number's webhook, and stop one of the two.",
    )
    WebhookRefused = Row(
        "False",
        "Stalled",
        "webhook_refused",
        Recheck.SLOW,
        "Twilio refuses the webhook URL: the operator's webhook URL template must be a public https URL.",
    )
    ObserveOnly = Row(
        "False",
        "Stalled",
        "observe_only",
        Recheck.DRIFT,
        "To let the operator do this, set its SMSCHANNEL_OBSERVE_ONLY to false.",
    )
    Suspended = Row("True", None, "suspended", Recheck.SLOW, "Set spec.suspend to false to resume.")
    Restoring = Row("False", "Reconciling", "removing", Recheck.BACKOFF, "Nothing to do: the number is being restored.")
    RestoreFailed = Row(
        "False",
        "Stalled",
        "removing",
        Recheck.BACKOFF,
        "The number could not be restored yet. The operator keeps trying, also after the channel is gone.",
    )
    RecordUnreadable = Row(
        "False",
        "Stalled",
        "record_unreadable",
        Recheck.SLOW,
        "Restore the keyring (kubectl sms keys restore) or the Secret that the message names. Without a backup: kubectl"
        " sms detach --orphan, then seal the token again.",
    )
    InvalidSpec = Row(
        "False",
        "Stalled",
        "invalid",
        Recheck.SLOW,
        "Correct what the message names: the channel was created before the current rules.",
    )
    KubernetesRefused = Row(
        "False",
        "Reconciling",
        "pending",
        Recheck.BACKOFF,
        "Give the operator the right, or change the policy or quota, that the message names. The operator retries.",
    )


class Effective(StrEnum):
    """Every reason that `WebhookEffective` can carry: whether Twilio delivers the messages to the webhook."""

    EFFECTIVE = "Effective"
    NOT_SET = "NotSet"
    URL_MISMATCH = "UrlMismatch"
    METHOD_MISMATCH = "MethodMismatch"
    FOREIGN_URL = "ForeignUrl"
    OVERRIDDEN_BY_APPLICATION = "OverriddenByApplication"
    OVERRIDDEN_BY_MESSAGING_SERVICE = "OverriddenByMessagingService"
    MESSAGING_SERVICES_UNREADABLE = "MessagingServicesUnreadable"
    NOT_CHECKED = "NotChecked"
    NO_LONGER_CHECKED = "NoLongerChecked"


NOT_CONFIGURED = "not_configured"
"""What REST clients read as `status` if an instance has no channel."""

REST_STATUSES = (NOT_CONFIGURED, *dict.fromkeys(reason.rest_status for reason in Reason))
"""The closed list of REST `status` values."""
