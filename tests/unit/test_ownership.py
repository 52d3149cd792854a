"""Who owns a channel, by its managedFields."""

from __future__ import annotations

from typing import Any

import pytest

from smschannel.api.ownership import REST_FIELDS, REST_MANAGER, other_owners, owned_by_rest, without_other_owners

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


def test_taking_fields_away_keeps_everything_else() -> None:
    own_label = {"f:metadata": {"f:labels": {}}}
    status = entry("operator", *ALL, subresource="status")
    kubectl = {**entry("kubectl", ".", *ALL, operation="Update")}
    given = channel(
        REST,
        status,
        kubectl,
        {**kubectl, "manager": "argocd", "fieldsV1": {**kubectl["fieldsV1"], **own_label}},
        entry("on-call", "f:suspend", "f:phoneNumber"),
    )
    assert without_other_owners(given, REST_MANAGER) == [
        REST,
        status,
        {**kubectl, "manager": "argocd", "fieldsV1": own_label},
        entry("on-call", "f:suspend"),
    ]
    assert given["metadata"]["managedFields"][2] == kubectl, "the argument is not changed"
