"""Who owns a channel: the REST API, or somebody in Kubernetes. No I/O.

The API server keeps in `metadata.managedFields` which field manager wrote which field. REST owns a channel if its own
manager applied `REST_FIELDS` and nobody else owns any part of them. Other fields of `spec` may belong to anybody.
`deploy/manifests/shim-policy.yaml` says the same for the shim's ServiceAccount.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from datetime import datetime
from typing import Any

from smschannel.api.resource import API_VERSION

REST_MANAGER = "sms-api-shim"
REST_LABELS = {"app.kubernetes.io/created-by": REST_MANAGER}
REST_FIELDS = ("accountSid", "phoneNumber", "credentials")


def owned_by_rest(channel: Mapping[str, Any]) -> bool:
    """Return whether REST owns the channel; never True for one whose managedFields are empty or not understood."""
    applied = {
        field for entry in _entries(channel) if _is_applied_by(entry, REST_MANAGER) for field in _rest_fields_of(entry)
    }
    return applied == set(REST_FIELDS) and not other_owners(channel)


def other_owners(channel: Mapping[str, Any], manager: str = REST_MANAGER) -> dict[str, tuple[str, ...]]:
    """Return for each field manager but `manager` which of `REST_FIELDS` it owns, entirely or in part.

    An entry with the name of `manager` that was not made by an apply counts as another owner: an apply conflicts with
    it.
    """
    owners: dict[str, tuple[str, ...]] = {}
    for entry in _entries(channel):
        if (found := _rest_fields_of(entry)) and not _is_applied_by(entry, manager):
            name = entry.get("manager") or "an unknown field manager"
            owners[name] = tuple(field for field in REST_FIELDS if field in {*owners.get(name, ()), *found})
    return dict(sorted(owners.items()))


def adopted_by(channel: Mapping[str, Any], manager: str, now: datetime) -> list[dict[str, Any]]:
    """Return the channel's managedFields as if `manager` had applied `REST_FIELDS`, and nobody else had written them.

    Everything else in them is kept. No value of the channel depends on managedFields, so writing them changes nothing
    that the operator sees. An apply could not do the same: it removes what the manager applied before and leaves out
    now, and the former owners would stay owners.
    """
    own: dict[str, Any] = {"manager": manager, "operation": "Apply", "fieldsV1": {}}
    kept = [own]
    for entry in deepcopy(list(channel["metadata"].get("managedFields") or ())):
        if not entry.get("subresource") and _is_applied_by(entry, manager):
            kept[0] = own = entry
            continue
        if _is_of_spec(entry):
            _disown(entry["fieldsV1"])
        if entry.get("fieldsV1"):
            kept.append(entry)
    own |= {"apiVersion": API_VERSION, "fieldsType": "FieldsV1", "time": now.strftime("%Y-%m-%dT%H:%M:%SZ")}
    applied = {field: channel["spec"][field] for field in REST_FIELDS}
    applied["credentials"] = {name: value for name, value in applied["credentials"].items() if value}
    own["fieldsV1"]["f:spec"] = {**own["fieldsV1"].get("f:spec", {}), **_paths(applied)}
    return kept


def _disown(fields: dict[str, Any]) -> None:
    for field in REST_FIELDS:
        fields["f:spec"].pop(f"f:{field}", None)
    if not fields["f:spec"].keys() - {"."}:
        del fields["f:spec"]


def _paths(value: Any) -> dict[str, Any]:
    """Return the set of all leaves of a value in the form of `fieldsV1`."""
    return {f"f:{name}": _paths(each) for name, each in value.items()} if isinstance(value, Mapping) else {}


def _entries(channel: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in channel["metadata"].get("managedFields") or () if _is_of_spec(entry)]


def _is_of_spec(entry: Mapping[str, Any]) -> bool:
    return not entry.get("subresource") and "f:spec" in (entry.get("fieldsV1") or {})


def _is_applied_by(entry: Mapping[str, Any], manager: str) -> bool:
    return entry.get("manager") == manager and entry.get("operation") == "Apply"


def _rest_fields_of(entry: Mapping[str, Any]) -> list[str]:
    return [field for field in REST_FIELDS if f"f:{field}" in entry["fieldsV1"]["f:spec"]]
