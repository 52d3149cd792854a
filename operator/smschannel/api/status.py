"""Read a channel's `status`, which the operator writes (`smschannel.core.conditions`). No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smschannel.api.reasons import Effective, Reason
from smschannel.api.resource import CHECK_NOW_ANNOTATION

Status = Mapping[str, Any]

_LONGEST_CHECK_NOW = 256
_SET_BUT_NOT_EFFECTIVE = {
    Effective.NOT_SET,
    Effective.URL_MISMATCH,
    Effective.METHOD_MISMATCH,
    Effective.OVERRIDDEN_BY_APPLICATION,
    Effective.OVERRIDDEN_BY_MESSAGING_SERVICE,
    Effective.MESSAGING_SERVICES_UNREADABLE,
    Effective.NO_LONGER_CHECKED,
}


def condition(status: Status, kind: str) -> Mapping[str, Any] | None:
    """Return the condition of type `kind`, or None."""
    return next((each for each in status.get("conditions", ()) if each["type"] == kind), None)


def reason_of(status: Status) -> Reason | None:
    """Return the reason of the `Ready` condition; None if it is missing or unknown."""
    ready = condition(status, "Ready")
    return Reason.__members__.get(ready["reason"]) if ready else None


def rest_status(status: Status) -> str:
    """Return what REST clients read: that of the reason of Ready, or degraded if the channel works all the same."""
    reason, ready = reason_of(status), condition(status, "Ready")
    if reason and ready and ready["status"] == "True" != reason.ready:
        return Reason.TokenRejected.rest_status
    return (reason or Reason.Pending).rest_status


def was_effective(status: Status) -> bool:
    """Return whether `WebhookEffective` says that the webhook was set, even if something else receives the messages.

    Unlike Ready, that is not changed by unrelated trouble.
    """
    effective = condition(status, "WebhookEffective")
    return effective is not None and (effective["status"] == "True" or effective["reason"] in _SET_BUT_NOT_EFFECTIVE)


def was_well(status: Status, *, generation: int, webhook_url: str) -> bool:
    """Return whether the last reconcile found this generation configured, with this webhook URL."""
    return (
        reason_of(status) is Reason.Configured
        and status.get("observedGeneration") == generation
        and status.get("webhookUrl") == webhook_url
    )


def check_now(annotations: Mapping[str, str]) -> str:
    """Return the check-now annotation, cut to what `status.lastHandledCheckNow` holds; empty if there is none."""
    return annotations.get(CHECK_NOW_ANNOTATION, "")[:_LONGEST_CHECK_NOW]


def wants_check(annotations: Mapping[str, str], status: Status) -> bool:
    """Return whether the check-now annotation asks for a check that no reconcile has done yet."""
    asked = check_now(annotations)
    return bool(asked) and asked != status.get("lastHandledCheckNow")
