"""Read a channel's `status`, which the operator writes (`smschannel.core.conditions`). No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smschannel.api.reasons import Reason

Status = Mapping[str, Any]


def condition(status: Status, kind: str) -> Mapping[str, Any] | None:
    """Return the condition of type `kind`, or None."""
    return next((each for each in status.get("conditions", ()) if each["type"] == kind), None)


def reason_of(status: Status) -> Reason | None:
    """Return the reason of the `Ready` condition; None if it is missing or unknown."""
    ready = condition(status, "Ready")
    return Reason.__members__.get(ready["reason"]) if ready else None


def was_well(status: Status, *, generation: int, webhook_url: str) -> bool:
    """Return whether the last reconcile found this generation configured, with this webhook URL."""
    return (
        reason_of(status) is Reason.Configured
        and status.get("observedGeneration") == generation
        and status.get("webhookUrl") == webhook_url
    )
