"""The CRD on a real API server: what it accepts and refuses, its defaults, and what kubectl shows and selects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deploy.local.stack import Stack
from smschannel.api.errors import ChannelError, KubernetesRefused
from smschannel.api.kube_client import MERGE_PATCH, KubeClient, Object
from smschannel.api.names import channels_path
from smschannel.api.resource import FINALIZER, Spec
from tests.manifests import ACCOUNT_SID, INSTANCE, NAMESPACE, PHONE_NUMBER, ROWS, SEALED, TOKEN, Row, good

CHANNELS = channels_path(NAMESPACE)
DRY_RUN = {"dryRun": "All"}
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"


@pytest.fixture
async def api(installed: Stack) -> AsyncIterator[KubeClient]:
    async with await KubeClient.connect(str(installed.cluster.kubeconfig)) as connected:
        yield connected


@asynccontextmanager
async def created(api: KubeClient, manifest: Object) -> AsyncIterator[Object]:
    channel = await api.request("POST", CHANNELS, manifest)
    path = channels_path(NAMESPACE, channel["metadata"]["name"])
    try:
        yield channel
    finally:
        await api.request("PATCH", path, {"metadata": {"finalizers": None}}, content_type=MERGE_PATCH)
        await api.request("DELETE", path)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.why) for row in ROWS])
async def test_manifest_is_accepted_or_refused_by_the_api_server(api: KubeClient, row: Row) -> None:
    if row.accepted:
        await api.request("POST", CHANNELS, row.manifest, params=DRY_RUN)
        return
    with pytest.raises(KubernetesRefused) as refused:
        await api.request("POST", CHANNELS, row.manifest, params=DRY_RUN)
    assert refused.value.status == 422
    message = str(refused.value).casefold()
    assert [fragment for fragment in row.refusal if fragment.casefold() not in message] == [], message


@pytest.mark.parametrize("value", [TOKEN, f"{SEALED} ", SEALED * 10])
async def test_refusal_does_not_repeat_the_sealed_value(api: KubeClient, value: str) -> None:
    """GitOps controllers copy refusals into the status of their own resources."""
    manifest = good()
    manifest["spec"]["credentials"]["sealed"] = value
    with pytest.raises(KubernetesRefused) as refused:
        await api.request("POST", CHANNELS, manifest, params=DRY_RUN)
    assert value[:32] not in str(refused.value)


@pytest.mark.parametrize("field", ["authToken", "auth_token", "token"])
async def test_unknown_field_is_refused_or_dropped_before_it_is_stored(api: KubeClient, field: str) -> None:
    """kubectl asks for strict validation, which refuses it; without that it is dropped."""
    manifest = good()
    manifest["spec"]["credentials"][field] = TOKEN
    stored = await api.request("POST", CHANNELS, manifest, params=DRY_RUN)
    assert TOKEN not in str(stored)
    with pytest.raises(KubernetesRefused, match=f'unknown field "spec.credentials.{field}"') as refused:
        await api.request("POST", CHANNELS, manifest, params={**DRY_RUN, "fieldValidation": "Strict"})
    assert TOKEN not in str(refused.value)


async def test_defaults_are_those_of_the_model(api: KubeClient) -> None:
    channel = await api.request("POST", CHANNELS, good(), params=DRY_RUN)
    assert channel["spec"] == Spec.model_validate(good()["spec"]).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )


async def test_new_channel_gets_the_finalizer_only_in_watched_namespaces(api: KubeClient) -> None:
    """Elsewhere neither the channel nor its namespace could ever be deleted."""
    for namespace, finalizers in ((NAMESPACE, [FINALIZER]), ("default", None)):
        manifest = good()
        manifest["metadata"]["namespace"] = namespace
        found = await api.request("POST", channels_path(namespace), manifest, params=DRY_RUN)
        assert found["metadata"].get("finalizers") == finalizers


async def test_new_channel_is_in_progress_whatever_status_it_came_with(api: KubeClient) -> None:
    """To kstatus, which Flux and Argo CD use, a channel without observedGeneration would be ready."""
    manifest = {**good(), "status": {"observedGeneration": 1, "webhookUrl": "https://evil.example"}}
    channel = await api.request("POST", CHANNELS, manifest, params=DRY_RUN)
    assert channel["status"] == {"observedGeneration": -1}


async def test_status_is_written_through_its_subresource_only(api: KubeClient) -> None:
    path = channels_path(NAMESPACE, INSTANCE)
    async with created(api, good()):
        body = {"status": {"webhookUrl": "https://sms.example.com"}, "spec": {"suspend": True}}
        by_users = await api.request("PATCH", path, body, content_type=MERGE_PATCH)
        assert by_users["status"] == {"observedGeneration": -1}
        by_operator = await api.request("PATCH", f"{path}/status", {**body, "spec": {}}, content_type=MERGE_PATCH)
        assert by_operator["status"]["webhookUrl"] == "https://sms.example.com"
        assert by_operator["metadata"]["generation"] == by_users["metadata"]["generation"] == 2


async def test_update_is_validated_as_a_creation_is(api: KubeClient) -> None:
    async with created(api, good()):
        change = {"spec": {"phoneNumber": "0400 111 222"}}
        with pytest.raises(KubernetesRefused, match=r"phoneNumber is in E\.164"):
            await api.request("PATCH", channels_path(NAMESPACE, INSTANCE), change, content_type=MERGE_PATCH)


async def test_kubectl_get_shows_number_status_and_age(api: KubeClient) -> None:
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Configured",
        "message": "Twilio delivers to the instance.",
        "lastTransitionTime": "2026-01-02T03:04:05Z",
    }
    status = {"observedGeneration": 1, "webhookUrl": "https://sms.example.com/webhook", "conditions": [ready]}
    async with created(api, good()):
        path = channels_path(NAMESPACE, INSTANCE)
        await api.request("PATCH", f"{path}/status", {"status": status}, content_type=MERGE_PATCH)
        table = await api.request("GET", CHANNELS, accept=TABLE)
    columns = table["columnDefinitions"]
    shown = dict(zip([each["name"] for each in columns], table["rows"][0]["cells"], strict=True))
    assert shown.pop("Age")
    assert shown == {
        "Name": INSTANCE,
        "Phone number": PHONE_NUMBER,
        "Ready": "True",
        "Status": "Configured",
        "Webhook": "https://sms.example.com/webhook",
        "Message": "Twilio delivers to the instance.",
    }
    wide_only = [each["name"] for each in columns if each["priority"]]
    assert wide_only == ["Webhook", "Message"]


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        (f"spec.phoneNumber={PHONE_NUMBER}", True),
        (f"spec.accountSid={ACCOUNT_SID}", True),
        (f"spec.accountSid={ACCOUNT_SID},spec.phoneNumber={PHONE_NUMBER}", True),
        ("spec.phoneNumber=+61400111223", False),
        (f"spec.accountSid!={ACCOUNT_SID}", False),
    ],
)
async def test_channels_are_selected_by_number_and_account(api: KubeClient, selector: str, found: bool) -> None:
    async with created(api, good()):
        channels = await api.request("GET", CHANNELS, params={"fieldSelector": selector})
    assert [each["metadata"]["name"] for each in channels["items"]] == [INSTANCE] * found


@pytest.mark.parametrize("metadata_only", [False, True], ids=["whole objects", "metadata only"])
async def test_empty_list_yields_nothing(api: KubeClient, metadata_only: bool) -> None:
    """The API server writes the items of an empty list of metadata as null."""
    assert [each async for each in api.pages(channels_path("default"), metadata_only=metadata_only)] == []


async def test_other_fields_do_not_select(api: KubeClient) -> None:
    with pytest.raises(ChannelError, match=r"field label not supported: spec\.suspend"):
        await api.request("GET", CHANNELS, params={"fieldSelector": "spec.suspend=true"})


async def test_short_name_and_category(api: KubeClient) -> None:
    resources = (await api.request("GET", "/apis/channels.hydracore.io/v1"))["resources"]
    [channels] = [each for each in resources if each["name"] == "smschannels"]
    assert channels["shortNames"] == ["smsch"]
    assert channels["categories"] == ["hydracore"]
    assert channels["namespaced"]
