"""An SmsChannel as somebody would write it into Git. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smschannel.api.resource import API_VERSION, KIND, Spec


def manifest_of(channel: Mapping[str, Any]) -> dict[str, Any]:
    """Return the channel without defaults, status, and everything that the API server or other tools add."""
    defaults = {field.alias: field.default for field in Spec.model_fields.values() if not field.is_required()}
    spec = {name: value for name, value in channel["spec"].items() if name not in defaults or value != defaults[name]}
    spec["credentials"] = {name: value for name, value in spec["credentials"].items() if value}
    meta = {name: channel["metadata"][name] for name in ("name", "namespace")}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec}
