"""Who owns a channel: the REST API, or somebody in Kubernetes. No I/O.

The API server keeps in `metadata.managedFields` which field manager wrote which field. REST owns a channel if its own
manager applied `REST_FIELDS` and nobody else owns any part of them. Other fields of `spec` may belong to anybody.
`deploy/shim-policy.yaml` says the same for the shim's ServiceAccount.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

REST_MANAGER = "sms-api-shim"
REST_LABELS = {"app.kubernetes.io/created-by": REST_MANAGER}
REST_FIELDS = ("accountSid", "phoneNumber", "credentials")


def owned_by_rest(channel: Mapping[str, Any]) -> bool:
    """Return whether REST owns the channel; never True for one whose managedFields are empty or not understood."""
    applied = {field for entry in _entries(channel) if _is_rest(entry) for field in _rest_fields_of(entry)}
    return applied == set(REST_FIELDS) and not other_owners(channel)


def other_owners(channel: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return for each field manager but REST's own which of `REST_FIELDS` it owns, entirely or in part.

    An entry with REST's name that was not made by an apply counts as another owner: an apply conflicts with it.
    """
    owners: dict[str, tuple[str, ...]] = {}
    for entry in _entries(channel):
        if (found := _rest_fields_of(entry)) and not _is_rest(entry):
            name = entry.get("manager") or "an unknown field manager"
            owners[name] = tuple(field for field in REST_FIELDS if field in {*owners.get(name, ()), *found})
    return dict(sorted(owners.items()))


def without_other_owners(channel: Mapping[str, Any], manager: str) -> list[dict[str, Any]]:
    """Return the managedFields without `REST_FIELDS` in all entries but what `manager` applied.

    Everything else in them is kept, and no value of the channel depends on it.
    """
    kept = []
    for entry in deepcopy(list(channel["metadata"].get("managedFields") or ())):
        if _is_of_spec(entry) and not _is_applied_by(entry, manager):
            fields = entry["fieldsV1"]
            for field in REST_FIELDS:
                fields["f:spec"].pop(f"f:{field}", None)
            if not fields["f:spec"].keys() - {"."}:
                del fields["f:spec"]
            if not fields:
                continue
        kept.append(entry)
    return kept


def _entries(channel: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in channel["metadata"].get("managedFields") or () if _is_of_spec(entry)]


def _is_of_spec(entry: Mapping[str, Any]) -> bool:
    return not entry.get("subresource") and "f:spec" in (entry.get("fieldsV1") or {})


def _is_rest(entry: Mapping[str, Any]) -> bool:
    return _is_applied_by(entry, REST_MANAGER)


def _is_applied_by(entry: Mapping[str, Any], manager: str) -> bool:
    return entry.get("manager") == manager and entry.get("operation") == "Apply"


def _rest_fields_of(entry: Mapping[str, Any]) -> list[str]:
    return [field for field in REST_FIELDS if f"f:{field}" in entry["fieldsV1"]["f:spec"]]
