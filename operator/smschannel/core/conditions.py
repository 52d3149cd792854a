"""From a verdict to `status`: the one setter of conditions. No I/O; the clock is passed in.

What every status keeps to (checked after each test's reconcile by `violations`):

1. `Ready` is always there; `Reconciling` and `Stalled` only while they are True, and never both.
2. A condition's `lastTransitionTime`, in whole seconds, moves when its `status` does, never otherwise, never back.
3. `observedGeneration` and the conditions come from the same reconcile.
4. Stalled stands beside Ready only for TokenRejected: the channel works, its last change failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from smschannel.api.reasons import Reason
from smschannel.api.status import Status, condition
from smschannel.core.plan import Verdict

_TOKEN_REFUSED = {
    Reason.SecretNotFound,
    Reason.SecretKeyMissing,
    Reason.SecretNotLabelled,
    Reason.TokenUnreadable,
    Reason.AuthenticationFailed,
    Reason.TokenRejected,
    Reason.AccountSuspended,
}
_NOT_LOOKED_AT = {
    Reason.Pending,
    Reason.TwilioUnavailable,
    Reason.Suspended,
    Reason.InstanceInUse,
    Reason.Restoring,
    Reason.RestoreFailed,
}


def next_status(
    before: Status, verdict: Verdict, *, generation: int, webhook_url: str, now: datetime
) -> dict[str, Any]:
    """The whole status after a reconcile; equal to `before` when there is nothing new to tell."""
    reason = verdict.reason
    remedy = "" if reason.ready == "True" and reason is not Reason.TokenRejected else f" {reason.remedy}"
    message = verdict.message + remedy
    known = {
        "Ready": (reason.ready, reason.name, message),
        reason.progress: ("True", reason.name, message),
        "CredentialsValid": _credentials_valid(before, verdict),
        "WebhookEffective": _webhook_effective(before, verdict),
    }
    stamp = _stamp(now)
    conditions = [
        _transition(condition(before, kind), kind, known[kind], generation, stamp)
        for kind in ("Ready", "Reconciling", "Stalled", "CredentialsValid", "WebhookEffective")
        if kind in known
    ]
    status = {"observedGeneration": generation, "webhookUrl": webhook_url, "conditions": conditions}
    number_sid = verdict.number_sid or before.get("phoneNumberSid")
    return {**status, "phoneNumberSid": number_sid} if number_sid else status


def still_trying(before: Status, message: str, *, generation: int, now: datetime) -> dict[str, Any] | None:
    """Twilio cannot be reached. None where there is nothing to tell: the generation that works, works on.

    A newer generation of a working channel keeps Ready, and its old `observedGeneration`: it is not there yet.
    """
    ready = condition(before, "Ready")
    if ready is None or ready["status"] != "True":
        return None
    if before.get("observedGeneration") == generation:
        return dict(before)
    stamp = _stamp(now)
    trying = _transition(
        condition(before, "Reconciling"),
        "Reconciling",
        ("True", Reason.TwilioUnavailable.name, message),
        generation,
        stamp,
    )
    kept = [each for each in before["conditions"] if each["type"] not in {"Reconciling", "Stalled"}]
    return {**before, "conditions": [kept[0], trying, *kept[1:]]}


def _stamp(now: datetime) -> str:
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _credentials_valid(before: Status, verdict: Verdict) -> tuple[str, str, str]:
    if verdict.rejected:
        return "False", Reason.TokenRejected.name, verdict.rejected
    if verdict.reason in _TOKEN_REFUSED:
        return "False", verdict.reason.name, verdict.message
    if verdict.reason in _NOT_LOOKED_AT:
        return _unchanged(before, "CredentialsValid")
    return "True", "Verified", "Twilio accepts the credentials."


def _webhook_effective(before: Status, verdict: Verdict) -> tuple[str, str, str]:
    if verdict.effective:
        return "False", verdict.effective, verdict.message
    if verdict.unknown:
        return "Unknown", UNREADABLE, verdict.unknown
    if verdict.reason in {Reason.Configured, Reason.TokenRejected}:
        message = "The number points at status.webhookUrl, and no application or Messaging Service overrides it."
        return "True", "Effective", message
    return _unchanged(before, "WebhookEffective") if verdict.reason in _NOT_LOOKED_AT | _TOKEN_REFUSED else _UNKNOWN


_UNKNOWN = ("Unknown", "NotChecked", "Not looked at yet.")
UNREADABLE = "MessagingServicesUnreadable"
"""The webhook is set, but whether a Messaging Service overrides it cannot be seen."""


def _unchanged(before: Status, kind: str) -> tuple[str, str, str]:
    known = condition(before, kind)
    return (known["status"], known["reason"], known["message"]) if known else _UNKNOWN


def _transition(
    before: Mapping[str, Any] | None, kind: str, now_known: tuple[Any, str, str], generation: int, stamp: str
) -> dict[str, Any]:
    status, reason, message = now_known
    moved = before is None or before["status"] != status
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message[:32768],
        "observedGeneration": generation,
        "lastTransitionTime": stamp if before is None or moved else before["lastTransitionTime"],
    }


def violations(before: Status, after: Status) -> list[str]:
    """Which of the rules above the step from `before` to `after` breaks; empty for a right one."""
    kinds = {each["type"]: each for each in after.get("conditions", ())}
    broken = []
    if "Ready" not in kinds:
        broken.append("Ready is missing")
    if "Reconciling" in kinds and "Stalled" in kinds:
        broken.append("Reconciling and Stalled stand together")
    for kind in ("Reconciling", "Stalled"):
        if kind in kinds and kinds[kind]["status"] != "True":
            broken.append(f"{kind} is there without being True")
    for kind, each in kinds.items():
        earlier = condition(before, kind)
        if earlier is None:
            continue
        since, now = earlier["lastTransitionTime"], each["lastTransitionTime"]
        if now < since or (now > since and earlier["status"] == each["status"]):
            broken.append(f"{kind} moved its status and its lastTransitionTime apart")
    ready = kinds.get("Ready", {})
    if "Stalled" in kinds and ready.get("status") == "True" and ready["reason"] != Reason.TokenRejected.name:
        broken.append("Stalled beside a Ready that is not TokenRejected")
    return broken
