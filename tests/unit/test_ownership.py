"""Who owns a channel, by its managedFields."""

from __future__ import annotations

from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

import pytest

from smschannel.api.ownership import REST_FIELDS, REST_MANAGER, adopted_by, other_owners, owned_by_rest

ALL = tuple(f"f:{field}" for field in REST_FIELDS)


def entry(manager: str, *fields: str, operation: str = "Apply", **more: Any) -> dict[str, Any]:
    return {"manager": manager, "operation": operation, "fieldsV1": {"f:spec": {each: {} for each in fields}}, **more}


def channel(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"managedFields": list(entries)}}


REST = entry(REST_MANAGER, *ALL)


@pytest.mark.parametrize(
    ("given", "owned", "others"),
    [
        (channel(REST), True, {}),
        (channel(REST, entry("kubectl-patch", "f:suspend", "f:driftPolicy", operation="Update")), True, {}),
        (channel(REST, entry("operator", *ALL, subresource="status")), True, {}),
        (channel(REST, {"manager": "x", "operation": "Update", "fieldsV1": {"f:metadata": {}}}), True, {}),
        (channel(entry(REST_MANAGER, ".", *ALL), entry("kubectl", ".")), True, {}),
        (channel(), False, {}),
        ({"metadata": {}}, False, {}),
        ({"metadata": {"managedFields": None}}, False, {}),
        (channel(entry(REST_MANAGER, "f:accountSid", "f:phoneNumber")), False, {}),
        (channel(REST, entry("argocd", "f:phoneNumber")), False, {"argocd": ("phoneNumber",)}),
        (channel(entry("kubectl", *ALL, operation="Update")), False, {"kubectl": REST_FIELDS}),
        (channel(entry(REST_MANAGER, *ALL, operation="Update")), False, {REST_MANAGER: REST_FIELDS}),
        (channel(REST, {**entry("", "f:credentials")}), False, {"an unknown field manager": ("credentials",)}),
        (
            channel(REST, entry("a", "f:credentials"), entry("a", "f:accountSid", operation="Update")),
            False,
            {"a": ("accountSid", "credentials")},
        ),
        (channel({"manager": "x", "operation": "Apply"}), False, {}),
    ],
)
def test_rest_owns_what_it_applied_alone(given: Any, owned: bool, others: Any) -> None:
    assert (owned_by_rest(given), other_owners(given)) == (owned, others)


SPEC = {
    "accountSid": "AC",
    "phoneNumber": "+1",
    "credentials": {"sid": "", "secretKeyRef": {"name": "a", "key": "b"}},
    "suspend": False,
}
APPLIED: dict[str, Any] = {
    "f:accountSid": {},
    "f:phoneNumber": {},
    "f:credentials": {"f:secretKeyRef": {"f:name": {}, "f:key": {}}},
}


def adopted(manager: str, *entries: dict[str, Any]) -> Any:
    given = {**channel(*entries), "spec": SPEC}
    before = deepcopy(given)
    fields = adopted_by(given, manager, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert given == before, "the argument is not changed"
    return fields


@pytest.mark.parametrize("manager", [REST_MANAGER, "kubectl"])
def test_adoption_of_a_channel_that_nobody_owns(manager: str) -> None:
    assert adopted(manager) == [
        {
            "manager": manager,
            "operation": "Apply",
            "apiVersion": "channels.hydracore.io/v1",
            "fieldsType": "FieldsV1",
            "time": "2026-01-02T03:04:05Z",
            "fieldsV1": {"f:spec": APPLIED},
        }
    ]


def test_adoption_takes_the_fields_of_others_and_nothing_else() -> None:
    label: dict[str, Any] = {"f:metadata": {"f:labels": {}}}
    status = entry("operator", *ALL, subresource="status")
    kubectl = entry("kubectl", ".", *ALL, operation="Update")
    both = {**kubectl, "manager": "argocd", "fieldsV1": {**kubectl["fieldsV1"], **label}}
    first, *others = adopted(REST_MANAGER, status, kubectl, both, entry("on-call", "f:suspend", "f:phoneNumber"))
    assert (first["manager"], first["operation"]) == (REST_MANAGER, "Apply")
    assert others == [status, {**both, "fieldsV1": label}, entry("on-call", "f:suspend")]
    assert owned_by_rest(channel(first, *others))


def test_adopter_keeps_what_it_applied_before() -> None:
    """An apply of the three fields alone would remove the label and the policy."""
    before = {**entry("argocd", "f:suspend"), "time": "2020-01-01T00:00:00Z"}
    before["fieldsV1"]["f:metadata"] = {"f:labels": {"f:team": {}}}
    [own] = adopted("argocd", REST, before)
    assert own["fieldsV1"] == {"f:metadata": {"f:labels": {"f:team": {}}}, "f:spec": {"f:suspend": {}, **APPLIED}}
    assert own["time"] == "2026-01-02T03:04:05Z"


def test_entry_of_the_same_name_that_was_not_applied_loses_the_fields() -> None:
    _, update = adopted("kubectl", entry("kubectl", "f:phoneNumber", "f:suspend", operation="Update"))
    assert update == entry("kubectl", "f:suspend", operation="Update")
