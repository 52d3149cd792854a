"""The cluster with real pods, as far as it needs no engine: configuration, images, relays, locks, and refusals."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.build import BuildError
from deploy.kind import cluster, debian, egress, environment, install, node, product, relay, tools
from deploy.kind.engine import FILES, EngineError
from deploy.kind.images import Image, Layer, write_archive
from tests.kind import host

SERVED = b"served by the other side"


def quiet(text: str, fraction: float | None = None, /) -> None:
    pass


# The configuration of kind


def test_own_node_image_takes_every_image_from_the_node() -> None:
    config = cluster._configuration("sms", 1, "localhost/kind-node:1", fixed_port=True)
    patches = {each["kind"]: each for each in map(yaml.safe_load, config["kubeadmConfigPatches"])}
    images = patches["ClusterConfiguration"]
    assert {
        images["imageRepository"],
        images["dns"]["imageRepository"],
        images["etcd"]["local"]["imageRepository"],
    } == {node.REPOSITORY}
    assert node.REPOSITORY.startswith("localhost/"), "no registry may ever serve them"
    assert config["networking"]["disableDefaultCNI"], "kindnet is in kind's own image only"
    assert [each["image"] for each in config["nodes"]] == ["localhost/kind-node:1"] * 2


def test_busy_machine_gets_more_time_than_kubeadm_gives() -> None:
    """On two cores with other work the API server took more than the minute after which kubeadm gives up."""
    patches = cluster._configuration("sms", 1, "localhost/kind-node:1", fixed_port=True)["kubeadmConfigPatches"]
    timeouts = {each["kind"]: each["timeouts"] for each in map(yaml.safe_load, patches) if "timeouts" in each}
    assert timeouts == dict.fromkeys(("InitConfiguration", "JoinConfiguration"), cluster.PATIENCE)


def test_stock_image_keeps_what_kind_brings() -> None:
    config = cluster._configuration("sms", 1, None, fixed_port=False)
    assert "disableDefaultCNI" not in config["networking"]
    assert "apiServerPort" not in config["networking"], "the port may be taken on this machine"
    assert [each["role"] for each in config["nodes"]] == ["control-plane", "worker"]
    assert all("image" not in each for each in config["nodes"])


@pytest.mark.parametrize("image", ["localhost/kind-node:1", None])
def test_control_plane_takes_the_pods_of_a_drained_worker(image: str | None) -> None:
    patches = cluster._configuration("sms", 1, image, fixed_port=False)["kubeadmConfigPatches"]
    [init] = [each for each in map(yaml.safe_load, patches) if each["kind"] == "InitConfiguration"]
    assert init["nodeRegistration"]["taints"] == []


def test_kubernetes_has_the_version_of_the_local_control_plane() -> None:
    """And so have its dependencies: both builds then share Go's build cache."""
    ours = _requirements(tools.KUBERNETES.module / "go.mod")
    theirs = _requirements(Path(cluster.__file__).parents[1] / "local/controlplane/go.mod")
    assert {name: ours[name] for name in theirs if name in ours} == {
        name: version for name, version in theirs.items() if name in ours
    }
    assert len(theirs) > 100


def _requirements(path: Path) -> dict[str, str]:
    words = [line.split() for line in path.read_text().splitlines() if line.startswith("\t")]
    return {each[0]: each[1] for each in words if len(each) > 1 and each[1].startswith("v")}


# Images


def test_archive_has_a_shared_layer_once_and_is_the_same_each_time(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"program")
    shared = Layer({"/bin/program": program}, {"/bin/other": "program"})
    images = [Image("localhost/a:1", (shared,), ("/bin/program",)), Image("localhost/b:1", (shared,), ("/bin/other",))]
    for name in ("first.tar", "second.tar"):
        write_archive(tmp_path / name, images, tmp_path)
    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()

    with tarfile.open(tmp_path / "first.tar") as archive:
        manifest = json.loads(_read(archive, "manifest.json"))
        assert [each["RepoTags"] for each in manifest] == [["localhost/a:1"], ["localhost/b:1"]]
        [layer] = {layer for each in manifest for layer in each["Layers"]}
        assert archive.getnames().count(layer) == 1
        content = _read(archive, layer)
        config = json.loads(_read(archive, manifest[1]["Config"]))
    assert config["config"]["Entrypoint"] == ["/bin/other"]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(content).hexdigest()}"]


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    assert found
    return found.read()


def test_build_context_has_no_secrets_and_no_environment() -> None:
    with product._context() as files:
        names = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    assert "deploy/Containerfile" in names
    assert not [name for name in names if name.startswith((".git/", ".venv/", ".local/"))]


# Refusals


def test_without_docker_and_root_it_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "host_engine", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EngineError, match=r"Start Docker .* or run this as root on Debian"):
        environment.Environment(tmp_path / "home", quiet).start()


@pytest.mark.parametrize(
    ("system", "user", "message"),
    [({"ID": "fedora"}, 0, "needs Debian with"), ({"ID": "debian"}, 1000, "needs root")],
)
def test_root_file_system_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: dict[str, str], user: int, message: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: system)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(BuildError, match=message):
        debian.ensure_rootfs("node", debian.NODE, quiet)


def test_machine_without_debian_sources_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "bin/apt-get"
    apt.parent.mkdir()
    apt.write_text("#!/bin/sh\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(BuildError, match="no source of Debian packages: add one"):
        debian.Apt(tmp_path / "apt").sources()


def test_second_process_is_told_to_wait(tmp_path: Path) -> None:
    first, second = (environment.Environment(tmp_path / "home", quiet) for _ in range(2))
    with first.locked(), pytest.raises(EngineError, match="Another process is working"), second.locked():
        pass
    with second.locked():
        pass


# Networks


async def _served() -> tuple[asyncio.Server, int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SERVED + await reader.read())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


async def _ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def test_relay_copies_both_ways_until_each_side_has_ended() -> None:
    server, port = await _served()
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(relay.serve(listener, "127.0.0.1", port))
    assert await _ask(listener.getsockname()[1], b" question") == SERVED + b" question"
    serving.cancel()
    server.close()


async def _through_proxy(request: bytes) -> bytes:
    proxy = await asyncio.start_server(egress.connect, "127.0.0.1", 0)
    try:
        return await _ask(proxy.sockets[0].getsockname()[1], request)
    finally:
        proxy.close()


async def test_proxy_tunnels_to_what_is_asked_for() -> None:
    server, port = await _served()
    answer = await _through_proxy(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n question" % port)
    server.close()
    status, _, body = answer.partition(b"\r\n\r\n")
    assert status == b"HTTP/1.1 200 Connection established"
    assert body == SERVED + b" question"


async def test_proxy_says_when_it_cannot_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert (await _through_proxy(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n" % port)).startswith(b"HTTP/1.1 502 ")


async def test_proxy_sees_no_traffic_in_the_clear() -> None:
    assert (await _through_proxy(b"GET http://example.com/ HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")


# A root without CAP_SYS_RESOURCE


@pytest.mark.skipif(not shutil.which("jq"), reason="the engine brings jq, this machine may not have it")
@pytest.mark.parametrize("kind", ["container", "process"])
def test_runtime_asks_for_no_capability_that_cannot_be_had(tmp_path: Path, kind: str) -> None:
    process: dict[str, Any] = {
        "capabilities": {"bounding": ["CAP_SYS_RESOURCE", "CAP_NET_RAW"], "ambient": None},
        "oomScoreAdj": -999,
    }
    file = tmp_path / ("config.json" if kind == "container" else "process.json")
    file.write_text(json.dumps({"process": process} if kind == "container" else process))
    option = ["create", "--bundle", str(tmp_path)] if kind == "container" else ["exec", "--process", str(file)]
    subprocess.run([FILES / "runc-limited.sh", *option, "name"], check=False, capture_output=True)  # no runc here
    written = json.loads(file.read_text())
    limited = written["process"] if kind == "container" else written
    assert limited == {"capabilities": {"bounding": ["CAP_NET_RAW"], "ambient": None}, "oomScoreAdj": 0}


# Installation


def test_values_of_a_test_are_merged_over_ours() -> None:
    values = install.merged(install.product_values("1"), {"operator": {"podAnnotations": {"a": "b"}}})
    assert values["operator"]["podAnnotations"] == {"a": "b"}
    assert values["operator"]["settings"]["twilioUrl"].startswith("https://twin.")
    assert values["image"]["tag"] == "1"


def test_what_is_left_on_the_machine_is_named() -> None:
    before, after = {"mounts": ["a", "b"]}, {"mounts": ["b", "c"]}
    assert host.differences(before, after) == ["mounts: - a", "mounts: + c"]
