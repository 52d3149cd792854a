"""The admission policies about the operator's own objects and about namespaces, on a real API server."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tenacity import AsyncRetrying, stop_after_delay, wait_fixed

from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, OPERATOR, Stack
from smschannel.api.errors import KubernetesRefused, NotFound
from smschannel.api.kube_client import MERGE_PATCH, KubeClient, Object
from smschannel.api.names import (
    KEYRING_SECRET,
    NAMESPACES,
    PUBLIC_KEY,
    PUBLIC_KEY_CONFIGMAP,
    SETTINGS_CONFIGMAP,
    channels_path,
    core_path,
)
from smschannel.core.record import RECORD_LABEL
from smschannel.kube_store import KubeStore
from tests.manifests import good

CONFIGMAPS, SECRETS = core_path(OPERATOR, "configmaps"), core_path(OPERATOR, "secrets")
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{OPERATOR}/leases"
RECORD = "pn" + "0a" * 16
TOKEN_OF_THE_OPERATOR = {
    "metadata": {"name": "x", "annotations": {"kubernetes.io/service-account.name": "sms-channel-operator"}},
    "type": "kubernetes.io/service-account-token",
}
DRY_RUN = {"dryRun": "All"}
EVERYTHING = [
    {"apiGroups": [""], "resources": ["configmaps", "secrets"], "verbs": ["*"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["*"]},
]


@pytest.fixture
async def admin(installed: Stack) -> AsyncIterator[KubeClient]:
    async with await KubeClient.connect(str(installed.cluster.kubeconfig)) as api:
        yield api


@pytest.fixture
async def operator(installed: Stack) -> AsyncIterator[KubeClient]:
    """The operator's ServiceAccount, after its first start."""
    async with await KubeClient.connect(str(installed.operator_kubeconfig())) as api:
        store = KubeStore(api, OPERATOR)
        await store.open_keyring([CHANNELS])
        await store.publish_settings({"SMSCHANNEL_CHANNEL_NAMESPACES": CHANNELS})
        yield api


@asynccontextmanager
async def user(installed: Stack, rules: list[Object]) -> AsyncIterator[KubeClient]:
    """A user with these rights in the operator's namespace, once the policy is active for them."""
    name = f"user-{uuid.uuid4().hex[:8]}"
    meta = {"name": name, "namespace": OPERATOR}
    rbac = "rbac.authorization.k8s.io"
    installed.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": meta, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", **meta}],
        },
    )
    file = installed.home / f"{name}.kubeconfig"
    cluster = installed.cluster
    token = installed._token(name, OPERATOR, [])
    write_kubeconfig(file, url=cluster.url, ca_data=cluster.ca_data, token=token, namespace=OPERATOR)
    async with await KubeClient.connect(str(file)) as api:
        async for attempt in AsyncRetrying(wait=wait_fixed(0.1), stop=stop_after_delay(30), reraise=True):
            with attempt:  # the API server follows policies and RBAC with watches
                await api.request("POST", CONFIGMAPS, named("probe"), params=DRY_RUN)
        yield api


@pytest.fixture
async def writer(installed: Stack, operator: KubeClient) -> AsyncIterator[KubeClient]:
    """A user with all rights on ConfigMaps, Secrets and Leases of the operator's namespace."""
    async with user(installed, EVERYTHING) as api:
        async for attempt in AsyncRetrying(wait=wait_fixed(0.1), stop=stop_after_delay(30), reraise=True):
            with attempt:
                assert await is_denied(api), "the API server follows policies with a watch"
        yield api


async def is_denied(api: KubeClient) -> bool:
    try:
        await api.request("POST", SECRETS, named(f"pn{uuid.uuid4().hex}"), params=DRY_RUN)
    except KubernetesRefused:
        return True
    return False


def named(name: str, **more: Any) -> Object:
    return {"metadata": {"name": name, **more}}


async def write(api: KubeClient, method: str, path: str, body: Object | None = None, **params: str) -> Object:
    kind = MERGE_PATCH if method == "PATCH" else "application/json"
    return await api.request(method, path, body, params={**DRY_RUN, **params}, content_type=kind)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        pytest.param("PATCH", f"{CONFIGMAPS}/{PUBLIC_KEY_CONFIGMAP}", {"data": {PUBLIC_KEY: "x"}}, id="public key"),
        pytest.param("PATCH", f"{CONFIGMAPS}/{PUBLIC_KEY_CONFIGMAP}", {"immutable": True}, id="made immutable"),
        pytest.param("PATCH", f"{CONFIGMAPS}/{SETTINGS_CONFIGMAP}", {"data": {"A": "x"}}, id="settings"),
        pytest.param("DELETE", f"{CONFIGMAPS}/{SETTINGS_CONFIGMAP}", None, id="settings deleted"),
        pytest.param("DELETE", CONFIGMAPS, None, id="all ConfigMaps deleted"),
        pytest.param("DELETE", SECRETS, None, id="all Secrets deleted"),
        pytest.param("PATCH", f"{SECRETS}/{KEYRING_SECRET}", {"data": {"keyring": "eA=="}}, id="keyring"),
        pytest.param("DELETE", f"{SECRETS}/{KEYRING_SECRET}", None, id="keyring deleted"),
        pytest.param("POST", SECRETS, named(RECORD), id="a number is claimed"),
        pytest.param("POST", SECRETS, {"metadata": {"generateName": RECORD[:29]}}, id="with a generated name"),
        pytest.param("POST", SECRETS, named("x", labels={RECORD_LABEL: "true"}), id="a record under another name"),
        pytest.param("POST", SECRETS, named("x", labels={RECORD_LABEL: "written-off"}), id="a written-off record"),
        pytest.param("POST", SECRETS, TOKEN_OF_THE_OPERATOR, id="a Secret that would get the operator's token"),
        pytest.param("POST", LEASES, named("sms-channel-operator"), id="the Lease"),
    ],
)
async def test_rights_on_the_objects_are_not_enough(writer: KubeClient, method: str, path: str, body: Any) -> None:
    verb = {"PATCH": "update", "POST": "create", "DELETE": "delete"}[method]
    needed = rf"only the operator writes this object; others need the right to {verb} operatorobjects\.channels\.hydra"
    with pytest.raises(KubernetesRefused, match=needed) as refused:
        await write(writer, method, path, body)
    assert refused.value.status == 403


async def test_label_of_a_record_cannot_be_added_or_removed(writer: KubeClient, admin: KubeClient) -> None:
    """Without its label the operator's list lacks the record; with it, another Secret is taken for one."""
    other = f"other-{uuid.uuid4().hex[:8]}"
    await admin.request("POST", SECRETS, named(other))
    with contextlib.suppress(NotFound):
        await admin.request("DELETE", f"{SECRETS}/{RECORD}")
    await admin.request("POST", SECRETS, named(RECORD, labels={RECORD_LABEL: "true"}))
    for name, value in ((other, "true"), (RECORD, None)):
        with pytest.raises(KubernetesRefused, match="only the operator writes this object"):
            await write(writer, "PATCH", f"{SECRETS}/{name}", {"metadata": {"labels": {RECORD_LABEL: value}}})


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", f"{SECRETS}/smschannel-api-keys", {"data": {"a": "eA=="}}),
        ("POST", SECRETS, named("pn-other")),
        ("POST", SECRETS, {"metadata": {"generateName": "pn-"}}),
        ("POST", CONFIGMAPS, named("kube-root-ca.crt-2")),
        ("POST", LEASES, named("another")),
    ],
)
async def test_other_objects_are_nobodys_concern(writer: KubeClient, method: str, path: str, body: Object) -> None:
    """'kubectl sms key' needs rights on its Secret only."""
    await write(writer, method, path, body)


async def test_same_names_elsewhere_are_nobodys_concern(admin: KubeClient, installed: Stack) -> None:
    shim = installed.home / "sms-api-shim.kubeconfig"  # has no right: RBAC answers, not the policy
    async with await KubeClient.connect(str(shim)) as api:
        with pytest.raises(KubernetesRefused, match="cannot create resource"):
            await write(api, "POST", core_path("default", "configmaps"), named(PUBLIC_KEY_CONFIGMAP))
    await write(admin, "POST", core_path("default", "configmaps"), named(PUBLIC_KEY_CONFIGMAP))


async def test_operator_and_administrators_write_them(operator: KubeClient, admin: KubeClient) -> None:
    """The fixture wrote as the operator. Administrators restore a keyring, detach, or delete the namespace."""
    await write(operator, "POST", SECRETS, named("pn" + "0b" * 16, labels={RECORD_LABEL: "true"}))
    await write(admin, "PATCH", f"{SECRETS}/{KEYRING_SECRET}", {"metadata": {"annotations": {"restored": "yes"}}})
    await write(admin, "DELETE", f"{CONFIGMAPS}/{PUBLIC_KEY_CONFIGMAP}")
    await write(admin, "POST", SECRETS, named("pn" + "0c" * 16))


async def test_role_of_the_policy_gives_the_right(installed: Stack, operator: KubeClient) -> None:
    own = {"apiGroups": ["channels.hydracore.io"], "resources": ["operatorobjects"], "verbs": ["update"]}
    async with user(installed, [*EVERYTHING, own]) as api:
        patch = {"metadata": {"annotations": {"a": "b"}}}
        await write(api, "PATCH", f"{SECRETS}/{KEYRING_SECRET}", patch)
        with pytest.raises(KubernetesRefused, match="the right to delete operatorobjects"):
            await write(api, "DELETE", f"{SECRETS}/{KEYRING_SECRET}")


# Namespaces


async def warnings_of(api: KubeClient, namespace: str) -> list[str]:
    """Create a channel as a dry run; return the warnings, which kubectl prints."""
    manifest = good()
    manifest["metadata"] |= {"namespace": namespace, "name": str(uuid.uuid4())}
    url = f"{api.configuration.host}{channels_path(namespace)}"
    async with api.new_session() as session, session.post(url, json=manifest, params=DRY_RUN) as response:
        assert response.status == 201, await response.text()
        return response.headers.getall("Warning", [])


async def test_channel_where_no_operator_watches_is_created_with_a_warning(
    admin: KubeClient, operator: KubeClient
) -> None:
    async for attempt in AsyncRetrying(wait=wait_fixed(0.1), stop=stop_after_delay(30), reraise=True):
        with attempt:
            [warning] = await warnings_of(admin, "default")
    assert "no operator watches namespace default, so this channel stays without a status" in warning
    assert f"it belongs into: {CHANNELS}" in warning
    assert await warnings_of(admin, CHANNELS) == []


async def test_warning_follows_what_the_operator_publishes(admin: KubeClient, operator: KubeClient) -> None:
    """There is no second list of namespaces to keep up to date."""
    await KubeStore(operator, OPERATOR).open_keyring([CHANNELS, "default"])
    async for attempt in AsyncRetrying(wait=wait_fixed(0.1), stop=stop_after_delay(30), reraise=True):
        with attempt:
            assert await warnings_of(admin, "default") == []


async def test_without_published_namespaces_there_is_no_warning(admin: KubeClient, operator: KubeClient) -> None:
    """The operator may be older, or was not started yet."""
    path = f"{CONFIGMAPS}/{PUBLIC_KEY_CONFIGMAP}"
    await admin.request("PATCH", path, {"data": {NAMESPACES: None}}, content_type=MERGE_PATCH)
    async for attempt in AsyncRetrying(wait=wait_fixed(0.1), stop=stop_after_delay(30), reraise=True):
        with attempt:
            assert await warnings_of(admin, "default") == []
    await admin.request("DELETE", path)
    assert await warnings_of(admin, "default") == []
