"""The local control plane: it behaves like a cluster, keeps its data across restarts and says why it cannot start."""

import asyncio
import base64
import json
import ssl
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from deploy.build import Narrator
from deploy.local.build import CONTROLPLANE
from deploy.local.cluster import Cluster, ControlPlane, ControlPlaneError, write_kubeconfig

CONFIGMAPS = "/api/v1/namespaces/default/configmaps"
SECRETS = "/api/v1/namespaces/default/secrets"
ACCOUNTS = "/api/v1/namespaces/default/serviceaccounts"
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"

Object = dict[str, Any]


class Api:
    """A client of the API server without any library of Kubernetes."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def create(self, path: str, obj: Object) -> Object:
        async with self._session.post(path, json=obj) as answer:
            assert answer.status == 201, await answer.text()
            created: Object = await answer.json()
            return created

    async def get(self, path: str) -> Object:
        async with self._session.get(path) as answer:
            assert answer.status == 200, await answer.text()
            found: Object = await answer.json()
            return found

    async def delete(self, path: str) -> None:
        async with self._session.delete(path, json={"propagationPolicy": "Background"}) as answer:
            assert answer.status == 200, await answer.text()

    async def watch(self, path: str, obj: Object) -> AsyncIterator[Object]:
        """Watch one object from the version given on."""
        version, name = obj["metadata"]["resourceVersion"], obj["metadata"]["name"]
        query = {"watch": "1", "resourceVersion": version, "fieldSelector": f"metadata.name={name}"}
        async with self._session.get(path, params=query) as answer:
            async for line in answer.content:
                yield json.loads(line)

    async def until(self, path: str, obj: Object, wanted: Callable[[Object], bool]) -> None:
        async with asyncio.timeout(30):
            async for event in self.watch(path, obj):
                if wanted(event):
                    return
        raise AssertionError(f"the watch on {path} ended first")


@asynccontextmanager
async def connect(cluster: Cluster, token: str | None = None) -> AsyncIterator[Api]:
    trust = ssl.create_default_context(cadata=base64.b64decode(cluster.ca_data).decode())
    trust.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    async with aiohttp.ClientSession(
        cluster.url,
        connector=aiohttp.TCPConnector(ssl=trust),
        headers={"Authorization": f"Bearer {token or cluster.token}"},
    ) as session:
        yield Api(session)


@pytest.fixture(scope="module")
def binary() -> Path:
    return CONTROLPLANE.ensure(Narrator(sys.stderr))


@pytest.fixture(scope="module")
def cluster(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("cluster")
    with ControlPlane(binary, home=home / "home", log=home / "log") as running:
        yield running


def named(name: str, **rest: Any) -> Object:
    return {"metadata": {"name": name}, **rest}


def deleted(event: Object) -> bool:
    return bool(event["type"] == "DELETED")


def established(event: Object) -> bool:
    conditions = event["object"].get("status", {}).get("conditions") or []  # null at first
    return any(each["type"] == "Established" and each["status"] == "True" for each in conditions)


async def test_owned_secret_is_collected_after_its_owner(cluster: Cluster) -> None:
    """The owner is of a kind that did not exist when the garbage collector started."""
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    widgets = "/apis/test.example/v1/namespaces/default/widgets"
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": {"type": "object"}}}
    names = {"kind": "Widget", "plural": "widgets"}
    async with connect(cluster) as api:
        spec = {"group": "test.example", "scope": "Namespaced", "names": names, "versions": [version]}
        crd = await api.create(crds, named("widgets.test.example", spec=spec))
        await api.until(crds, crd, established)
        owner = await api.create(widgets, named("owner", apiVersion="test.example/v1", kind="Widget"))
        reference = {
            "apiVersion": "test.example/v1",
            "kind": "Widget",
            "name": "owner",
            "uid": owner["metadata"]["uid"],
        }
        owned = await api.create(SECRETS, {"metadata": {"name": "owned", "ownerReferences": [reference]}})
        await api.delete(f"{widgets}/owner")
        await api.until(SECRETS, owned, deleted)


async def test_namespace_is_deleted_with_its_objects(cluster: Cluster) -> None:
    async with connect(cluster) as api:
        doomed = await api.create("/api/v1/namespaces", named("doomed"))
        await api.create("/api/v1/namespaces/doomed/secrets", named("content"))
        await api.delete("/api/v1/namespaces/doomed")
        await api.until("/api/v1/namespaces", doomed, deleted)


async def test_token_is_valid_for_its_audience_only(cluster: Cluster, tmp_path: Path) -> None:
    async with connect(cluster) as api:
        await api.create(ACCOUNTS, named("client"))
        request = {"spec": {"audiences": ["sms-shim"]}}
        token = (await api.create(f"{ACCOUNTS}/client/token", request))["status"]["token"]

        async def review(audience: str) -> Object:
            spec = {"token": token, "audiences": [audience]}
            status: Object = (await api.create(REVIEWS, {"spec": spec}))["status"]
            return status

        accepted = await review("sms-shim")
        assert accepted["authenticated"]
        assert accepted["audiences"] == ["sms-shim"]
        assert accepted["user"]["username"] == "system:serviceaccount:default:client"
        assert "authenticated" not in await review("another-audience")


async def test_kubeconfig_is_private_and_logs_in_as_its_user(cluster: Cluster, tmp_path: Path) -> None:
    async with connect(cluster) as api:
        await api.create(ACCOUNTS, named("worker"))
        token = (await api.create(f"{ACCOUNTS}/worker/token", {}))["status"]["token"]
    path = write_kubeconfig(
        tmp_path / "worker", url=cluster.url, ca_data=cluster.ca_data, token=token, namespace="default"
    )
    for each in (path, cluster.kubeconfig):
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
    assert yaml.safe_load(path.read_text())["users"][0]["user"]["token"] == token
    async with connect(cluster, token) as worker:
        review = await worker.create("/apis/authentication.k8s.io/v1/selfsubjectreviews", {})
    assert review["status"]["userInfo"]["username"] == "system:serviceaccount:default:worker"


async def test_restart_keeps_the_data_although_a_watch_was_open(binary: Path, tmp_path: Path) -> None:
    plane = ControlPlane(binary, home=tmp_path / "home", log=tmp_path / "log")
    with plane as first:
        async with connect(first) as api:
            await api.create(ACCOUNTS, named("client"))
            token = (await api.create(f"{ACCOUNTS}/client/token", {}))["status"]["token"]
            await api.create(CONFIGMAPS, named("kept", data={"seen": "before"}))
            passing = await api.create(CONFIGMAPS, named("passing"))
            await api.delete(f"{CONFIGMAPS}/passing")
            watch = api.watch(CONFIGMAPS, passing)
            assert deleted(await anext(watch))  # it is open now
            began = time.monotonic()
            await asyncio.to_thread(plane.stop)  # raises unless the exit status is 0
            assert time.monotonic() - began < 10
            with pytest.raises(StopAsyncIteration):
                await anext(watch)

        second = plane.start()
        assert second == first
        async with connect(second) as api:
            assert (await api.get(f"{CONFIGMAPS}/kept"))["data"] == {"seen": "before"}
            assert (await api.create(REVIEWS, {"spec": {"token": token}}))["status"]["authenticated"]
            await api.create(CONFIGMAPS, named("written-last"))
        plane.kill()

        third = plane.start()
        async with connect(third) as api:
            await api.get(f"{CONFIGMAPS}/written-last")
    assert "written-last" in "".join(each.read_text("latin-1") for each in third.etcd_dir.rglob("*") if each.is_file())


def test_second_control_plane_on_the_same_home_is_refused(cluster: Cluster, binary: Path, tmp_path: Path) -> None:
    second = ControlPlane(binary, home=cluster.kubeconfig.parent, log=tmp_path / "log")
    with pytest.raises(ControlPlaneError, match="another control plane runs on"):
        second.start()


def test_port_in_use_is_named(cluster: Cluster, binary: Path, tmp_path: Path) -> None:
    port = int(cluster.url.rpartition(":")[2])
    with pytest.raises(ControlPlaneError, match=rf"127\.0\.0\.1:{port}: bind: address already in use"):
        ControlPlane(binary, home=tmp_path / "home", log=tmp_path / "log", port=port).start()
