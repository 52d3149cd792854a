"""Turns a verdict into `status`: the only place that sets conditions. No I/O; the clock is an argument.

Every status keeps these rules (`violations` checks them after each reconcile of the tests):

1. Ready is always there; Reconciling and Stalled only while they are True, and never both.
2. A condition's lastTransitionTime, in whole seconds, moves if and only if its status changes, and never back.
3. observedGeneration and the conditions come from the same reconcile.
4. Stalled beside Ready is for credentials that cannot be used only: the channel works with those before.
5. What nothing looks at any more is Unknown: CredentialsValid and WebhookEffective say what was seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from smschannel.api.reasons import Effective, Reason
from smschannel.api.status import Status, condition, was_effective
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
_MAY_BE_DEGRADED = _TOKEN_REFUSED - {Reason.AuthenticationFailed, Reason.AccountSuspended}
_CHECKED_SOON = {Reason.Pending, Reason.TwilioUnavailable}
_NO_LONGER_CHECKED = {
    Reason.Suspended,
    Reason.RecordUnreadable,
    Reason.InvalidSpec,
    Reason.Restoring,
    Reason.RestoreFailed,
    Reason.KubernetesRefused,
}
_REFUSED_FOR = timedelta(minutes=1)
"""An API server that has just started refuses calls for some seconds, until it knows the operator's rights."""
_LONGEST_MESSAGE = 32768


def next_status(
    before: Status, verdict: Verdict, *, generation: int, webhook_url: str, check_now: str = "", now: datetime
) -> dict[str, Any]:
    """Return the whole status after a reconcile; equal to `before` if nothing changed.

    `check_now` is the value of the check-now annotation that this reconcile handled; empty if there is none.
    """
    reason = verdict.reason
    remedy = "" if verdict.ready == "True" and not verdict.progress else f" {reason.remedy}"
    message = verdict.message + remedy
    found = {
        "Ready": (verdict.ready, reason.name, message),
        verdict.progress: ("True", reason.name, message),
        "CredentialsValid": _credentials_valid(before, verdict),
        "WebhookEffective": _webhook_effective(before, verdict),
    }
    stamp = _stamp(now)
    conditions = [
        _transition(condition(before, kind), kind, found[kind], generation, stamp)
        for kind in ("Ready", "Reconciling", "Stalled", "CredentialsValid", "WebhookEffective")
        if kind in found
    ]
    status: dict[str, Any] = {"observedGeneration": generation, "webhookUrl": webhook_url, "conditions": conditions}
    if number_sid := verdict.number_sid or before.get("phoneNumberSid"):
        status["phoneNumberSid"] = number_sid
    if handled := check_now or before.get("lastHandledCheckNow"):
        status["lastHandledCheckNow"] = handled
    return status


def status_while_unavailable(before: Status, message: str, *, generation: int, now: datetime) -> dict[str, Any] | None:
    """Return the status of a channel that worked before, while Twilio is unavailable; None if it did not work before.

    Ready is left as it is. A newer generation gets Reconciling, and keeps the old `observedGeneration`.
    """
    if not _is_ready(before):
        return None
    if before.get("observedGeneration") == generation:
        return dict(before)
    return _reconciling(before, Reason.TwilioUnavailable, message, generation, now)


def status_while_refused(before: Status, message: str, *, generation: int, now: datetime) -> dict[str, Any] | None:
    """Return the status of a channel that worked before, in the first minute that Kubernetes refuses a call.

    None if it did not work before, or that minute is over. Ready is left as it is, and Reconciling says why.
    """
    if not _is_ready(before):
        return None
    trying = condition(before, "Reconciling")
    if trying and trying["reason"] == Reason.KubernetesRefused.name:
        if abs(now - datetime.fromisoformat(trying["lastTransitionTime"])) >= _REFUSED_FOR:
            return None  # also if the clock was far ahead then
        if trying["message"] == message and trying["observedGeneration"] == generation:
            return dict(before)
    return _reconciling(before, Reason.KubernetesRefused, message, generation, now)


def _is_ready(status: Status) -> bool:
    ready = condition(status, "Ready")
    return ready is not None and ready["status"] == "True"


def _reconciling(before: Status, reason: Reason, message: str, generation: int, now: datetime) -> dict[str, Any]:
    """Return `before` with Reconciling in place of Stalled."""
    retrying = _transition(
        condition(before, "Reconciling"), "Reconciling", ("True", reason.name, message), generation, _stamp(now)
    )
    others = [each for each in before["conditions"] if each["type"] not in {"Reconciling", "Stalled"}]
    return {**before, "conditions": [others[0], retrying, *others[1:]]}


def _stamp(now: datetime) -> str:
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _credentials_valid(before: Status, verdict: Verdict) -> tuple[str, str, str]:
    if verdict.rejected:
        return "False", verdict.rejected.reason.name, str(verdict.rejected)
    if verdict.reason in _TOKEN_REFUSED:
        return "False", verdict.reason.name, verdict.message
    if verdict.reason in _CHECKED_SOON:
        return _unchanged(before, "CredentialsValid")
    if verdict.reason in _NO_LONGER_CHECKED:
        return "Unknown", Effective.NOT_CHECKED.value, "Not checked at present."
    return "True", "Verified", "Twilio accepts the credentials."


def _webhook_effective(before: Status, verdict: Verdict) -> tuple[str, str, str]:
    if verdict.effective:
        return "False", verdict.effective.value, verdict.message
    if verdict.unknown:
        return "Unknown", Effective.MESSAGING_SERVICES_UNREADABLE.value, verdict.unknown
    if verdict.degraded or verdict.reason in {Reason.Configured, Reason.TokenRejected}:
        message = "The number points at status.webhookUrl, and no application or Messaging Service overrides it."
        return "True", Effective.EFFECTIVE.value, message
    if verdict.reason in _CHECKED_SOON:
        return _unchanged(before, "WebhookEffective")
    if verdict.reason in _NO_LONGER_CHECKED | _TOKEN_REFUSED and was_effective(before):
        message = "Not checked at present. The webhook had been set before."
        return "Unknown", Effective.NO_LONGER_CHECKED.value, message
    return _UNKNOWN


_UNKNOWN = ("Unknown", Effective.NOT_CHECKED.value, "Not checked yet.")


def _unchanged(before: Status, kind: str) -> tuple[str, str, str]:
    found = condition(before, kind)
    return (found["status"], found["reason"], found["message"]) if found else _UNKNOWN


def _transition(
    before: Mapping[str, Any] | None, kind: str, found: tuple[str, str, str], generation: int, stamp: str
) -> dict[str, Any]:
    status, reason, message = found
    since = stamp
    if before is not None:
        earlier = before["lastTransitionTime"]
        since = earlier if before["status"] == status else max(stamp, earlier)  # the clock may be behind
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message[:_LONGEST_MESSAGE],
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }


def violations(before: Status, after: Status) -> list[str]:
    """Return the rules above that the step from `before` to `after` breaks."""
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
    may_be_degraded = ready.get("reason") in {each.name for each in _MAY_BE_DEGRADED}
    if "Stalled" in kinds and ready.get("status") == "True" and not may_be_degraded:
        broken.append("Stalled beside a Ready that does not name the credentials")
    return broken
