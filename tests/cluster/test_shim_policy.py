"""The admission policy for the shim's ServiceAccount, deploy/manifests/shim-policy.yaml, on a real API server."""

from __future__ import annotations

import copy
import functools
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tenacity import AsyncRetrying, stop_after_delay, wait_fixed

from deploy.local.stack import CHANNELS, Stack
from smschannel.api.errors import KubernetesRefused
from smschannel.api.kube_client import APPLY_PATCH, MERGE_PATCH, KubeClient, Object
from smschannel.api.names import channels_path
from smschannel.api.ownership import REST_FIELDS, REST_LABELS, REST_MANAGER, owned_by_rest
from smschannel.api.resource import API_VERSION, FINALIZER, KIND

SEALED = "A" * 2048


@pytest.fixture
async def shim(installed: Stack) -> AsyncIterator[KubeClient]:
    """A client with the shim's ServiceAccount, once the policy is active."""
    async with await KubeClient.connect(str(installed.home / "sms-api-shim.kubeconfig")) as api:
        async for attempt in AsyncRetrying(wait=wait_fixed(0.1), stop=stop_after_delay(30), reraise=True):
            with attempt:
                assert await is_denied(api), "the API server follows policies with a watch"
        yield api


@pytest.fixture
async def admin(installed: Stack) -> AsyncIterator[KubeClient]:
    async with await KubeClient.connect(str(installed.cluster.kubeconfig)) as api:
        yield api


def manifest(*, metadata: Object | None = None, **spec: Any) -> Object:
    """Return what the shim applies, with some fields replaced."""
    meta = {"name": str(uuid.uuid4()), "labels": REST_LABELS, "finalizers": [FINALIZER], **(metadata or {})}
    fields = {"accountSid": f"AC{'0' * 32}", "phoneNumber": "+61400111222", "credentials": {"sealed": SEALED}, **spec}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": fields}


async def apply(api: KubeClient, body: Object, manager: str = REST_MANAGER, **params: str) -> Object:
    path = channels_path(CHANNELS, body["metadata"]["name"])
    return await api.request(
        "PATCH", path, body, params={"fieldManager": manager, "force": "true", **params}, content_type=APPLY_PATCH
    )


async def is_denied(api: KubeClient) -> bool:
    try:
        await apply(api, manifest(suspend=True), dryRun="All")
    except KubernetesRefused:
        return True
    return False


async def patch(api: KubeClient, name: str, body: Object) -> Object:
    return await api.request("PATCH", channels_path(CHANNELS, name), body, content_type=MERGE_PATCH)


async def test_shim_may_do_what_it_does(shim: KubeClient) -> None:
    body = manifest()
    created = await apply(shim, body)
    changed = copy.deepcopy(body)
    changed["spec"]["phoneNumber"] = "+61400111223"
    changed["spec"]["credentials"]["sid"] = f"SK{'0' * 32}"
    assert (await apply(shim, changed))["metadata"]["uid"] == created["metadata"]["uid"]
    await shim.request("DELETE", channels_path(CHANNELS, created["metadata"]["name"]))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        pytest.param(
            manifest(credentials={"secretKeyRef": {"name": "twilio", "key": "auth_token"}}),
            "sealed credentials only",
            id="secretKeyRef: the operator would send a tenant's token to Twilio",
        ),
        pytest.param(
            manifest(credentials={"sealed": SEALED, "sid": f"AC{'0' * 32}"}),
            "as the account itself",
            id="the login of another account",
        ),
        pytest.param(manifest(suspend=True), "accountSid, phoneNumber", id="suspend"),
        pytest.param(manifest(deletionPolicy="Clear"), "accountSid, phoneNumber", id="deletionPolicy"),
        pytest.param(manifest(takeoverPolicy="IfUnused"), "accountSid, phoneNumber", id="takeoverPolicy"),
        pytest.param(manifest(driftPolicy="Report"), "accountSid, phoneNumber", id="driftPolicy"),
        pytest.param(
            manifest(metadata={"finalizers": [FINALIZER, "example.com/x"]}), "finalizer only", id="another finalizer"
        ),
        pytest.param(manifest(metadata={"labels": {**REST_LABELS, "team": "a"}}), "label only", id="another label"),
        pytest.param(
            manifest(metadata={"labels": {"app.kubernetes.io/created-by": "kubectl"}}),
            "label only",
            id="another value of the label",
        ),
        pytest.param(manifest(metadata={"annotations": {"a": "b"}}), "no annotations", id="annotation"),
        pytest.param(
            manifest(
                metadata={
                    "ownerReferences": [
                        {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": str(uuid.uuid4())}
                    ]
                }
            ),
            "no annotations and no owners",
            id="ownerReference",
        ),
    ],
)
async def test_other_creations_are_denied(shim: KubeClient, body: Object, why: str) -> None:
    with pytest.raises(KubernetesRefused, match=why) as caught:
        await apply(shim, body)
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"metadata": {"finalizers": None}}, "take none away"),
        ({"metadata": {"finalizers": [FINALIZER, "example.com/x"]}}, "finalizer only"),
        ({"metadata": {"labels": {"app.kubernetes.io/created-by": None}}}, "label only"),
        ({"metadata": {"annotations": {"channels.hydracore.io/check-now": "1"}}}, "no annotations"),
        ({"spec": {"suspend": True}}, "accountSid, phoneNumber"),
        ({"spec": {"credentials": {"sealed": None, "secretKeyRef": {"name": "a", "key": "b"}}}}, "sealed credentials"),
    ],
)
async def test_other_changes_are_denied(shim: KubeClient, change: Object, why: str) -> None:
    name = (await apply(shim, manifest()))["metadata"]["name"]
    with pytest.raises(KubernetesRefused, match=why):
        await patch(shim, name, change)


async def test_labels_and_annotations_of_others_are_kept(shim: KubeClient, admin: KubeClient) -> None:
    body = manifest()
    name = body["metadata"]["name"]
    await apply(shim, body)
    await patch(admin, name, {"metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}}})
    applied = await apply(shim, body)
    assert applied["metadata"]["labels"] == {**REST_LABELS, "team": "a"}
    with pytest.raises(KubernetesRefused, match="label only"):
        await patch(shim, name, {"metadata": {"labels": {"team": None}}})
    with pytest.raises(KubernetesRefused, match="no annotations"):
        await patch(shim, name, {"metadata": {"annotations": {"note": None}}})


@pytest.mark.parametrize("manager", ["kubectl", "argocd-controller"])
async def test_channels_of_other_managers_are_neither_changed_nor_deleted(
    shim: KubeClient, admin: KubeClient, manager: str
) -> None:
    """Also without the shim's own check: an attacker with its token would not run it."""
    other = manifest()
    name = other["metadata"]["name"]
    await apply(admin, other, manager)
    path = channels_path(CHANNELS, name)
    for write in (
        apply(shim, other),
        patch(shim, name, {"spec": {"phoneNumber": "+61400111223"}}),
        shim.request("DELETE", path),
    ):
        with pytest.raises(KubernetesRefused, match=f"it belongs to {manager}"):
            await write
    assert "deletionTimestamp" not in (await admin.request("GET", path))["metadata"]


UNKNOWN = "it belongs to an unknown field manager"
MUST_APPLY = "must apply accountSid, phoneNumber and credentials as the field manager sms-api-shim"


async def reset_managed_fields(admin: KubeClient, name: str) -> None:
    """What some tools do to channels: nobody is the owner of any field afterwards."""
    assert "managedFields" not in (await patch(admin, name, {"metadata": {"managedFields": [{}]}}))["metadata"]


@pytest.mark.parametrize("manager", ["argocd-controller", REST_MANAGER])
async def test_channel_without_managed_fields_is_refused(shim: KubeClient, admin: KubeClient, manager: str) -> None:
    """Whoever owned it before: the policy fails closed."""
    body = manifest()
    name = body["metadata"]["name"]
    await apply(admin, body, manager)
    await reset_managed_fields(admin, name)
    path = channels_path(CHANNELS, name)
    for write in (
        apply(shim, body),
        patch(shim, name, {"spec": {"phoneNumber": "+61400111223"}}),
        shim.request("DELETE", path),
    ):
        with pytest.raises(KubernetesRefused, match=UNKNOWN):
            await write
    assert (await admin.request("GET", path))["spec"]["phoneNumber"] == body["spec"]["phoneNumber"]


FORGED = {
    "manager": REST_MANAGER,
    "operation": "Apply",
    "apiVersion": API_VERSION,
    "fieldsType": "FieldsV1",
    "fieldsV1": {"f:spec": {f"f:{field}": {} for field in REST_FIELDS}},
}


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"managedFields": [FORGED]}},
        {"metadata": {"managedFields": [FORGED]}, "spec": {"phoneNumber": "+61400111223"}},
    ],
    ids=["managedFields alone", "with a number"],
)
async def test_forged_managed_fields_do_not_take_over_a_channel(
    shim: KubeClient, admin: KubeClient, change: Object
) -> None:
    other = manifest()
    await apply(admin, other, "argocd-controller")
    with pytest.raises(KubernetesRefused, match="it belongs to argocd-controller"):
        await patch(shim, other["metadata"]["name"], change)


async def test_creation_under_another_field_manager_is_refused(shim: KubeClient) -> None:
    """It would be a channel that REST can neither change nor delete."""
    with pytest.raises(KubernetesRefused, match=MUST_APPLY):
        await apply(shim, manifest(), "kubectl")
    post = functools.partial(shim.request, "POST", channels_path(CHANNELS))
    for params in ({}, {"fieldManager": "kubectl"}, {"fieldManager": REST_MANAGER}):
        with pytest.raises(KubernetesRefused, match=MUST_APPLY):
            await post(manifest(), params=params)
    for forged in ([FORGED], [{**FORGED, "manager": "kubectl"}]):
        with pytest.raises(KubernetesRefused, match=MUST_APPLY):
            await post(manifest(metadata={"managedFields": forged}), params={"fieldManager": "kubectl"})


async def test_creation_without_one_of_the_fields_is_refused(shim: KubeClient) -> None:
    body = manifest()
    del body["spec"]["credentials"]
    with pytest.raises(KubernetesRefused):
        await apply(shim, body)


@pytest.mark.parametrize(
    ("change", "params"),
    [
        pytest.param({"spec": {"phoneNumber": "+61400111223"}}, {"fieldManager": "kubectl"}, id="another manager"),
        pytest.param({"spec": {"phoneNumber": "+61400111223"}}, {"fieldManager": REST_MANAGER}, id="not applied"),
        pytest.param({"metadata": {"managedFields": [{}]}}, {}, id="managedFields emptied"),
        pytest.param({"metadata": {"managedFields": [{**FORGED, "manager": "x"}]}}, {}, id="another owner forged"),
    ],
)
async def test_the_shim_cannot_give_its_channel_away(
    shim: KubeClient, admin: KubeClient, change: Object, params: dict[str, str]
) -> None:
    body = manifest()
    name = body["metadata"]["name"]
    await apply(shim, body)
    path = channels_path(CHANNELS, name)
    with pytest.raises(KubernetesRefused, match=MUST_APPLY):
        await shim.request("PATCH", path, change, params=params, content_type=MERGE_PATCH)
    assert owned_by_rest(await admin.request("GET", path))
    await shim.request("DELETE", path)


@pytest.mark.parametrize(
    ("field", "value"), [("suspend", True), ("driftPolicy", "Report"), ("takeoverPolicy", "IfUnused")]
)
async def test_other_fields_of_spec_may_belong_to_anybody(
    shim: KubeClient, admin: KubeClient, field: str, value: Any
) -> None:
    """The shim's apply keeps them, without force; with the stolen token they cannot be changed."""
    body = manifest()
    name = body["metadata"]["name"]
    await apply(shim, body)
    path = channels_path(CHANNELS, name)
    await patch(admin, name, {"spec": {field: value}})
    params = {"fieldManager": REST_MANAGER}
    applied = await shim.request("PATCH", path, body, params=params, content_type=APPLY_PATCH)
    assert applied["spec"][field] == value
    with pytest.raises(KubernetesRefused, match="may set accountSid, phoneNumber"):
        await apply(shim, {**body, "spec": {**body["spec"], field: manifest_default(field)}})
    await shim.request("DELETE", path)


def manifest_default(field: str) -> Any:
    return {"suspend": False, "driftPolicy": "Correct", "takeoverPolicy": "Always"}[field]


@pytest.mark.parametrize(
    "change", [{"phoneNumber": "+61400111223"}, {"credentials": {"sid": f"SK{'0' * 32}"}}], ids=["number", "login"]
)
async def test_one_field_of_another_manager_is_enough(shim: KubeClient, admin: KubeClient, change: Object) -> None:
    body = manifest()
    name = body["metadata"]["name"]
    await apply(shim, body)
    await admin.request(
        "PATCH",
        channels_path(CHANNELS, name),
        {"spec": change},
        params={"fieldManager": "kubectl-patch"},
        content_type=MERGE_PATCH,
    )
    for write in (apply(shim, body), shim.request("DELETE", channels_path(CHANNELS, name))):
        with pytest.raises(KubernetesRefused, match="it belongs to kubectl-patch"):
            await write


async def test_policy_applies_to_the_shim_only(admin: KubeClient) -> None:
    body = manifest(suspend=True, metadata={"annotations": {"a": "b"}, "labels": {"team": "a"}})
    applied = await apply(admin, body, "kubectl")
    await admin.request("DELETE", channels_path(CHANNELS, applied["metadata"]["name"]))
