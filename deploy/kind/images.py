"""Writes container images as docker-archives: layers of files, without a container engine or a registry."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Layer:
    """A layer: `files` maps paths in the image to files here, `links` maps symbolic links to their targets."""

    files: Mapping[str, Path]
    links: Mapping[str, str]

    def write(self, path: Path) -> str:
        """Write the layer as a tar file and return its digest. The same files give the same bytes."""
        with tarfile.open(path, "w") as tar:
            for name, source in sorted(self.files.items()):
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.size, entry.mode = source.stat().st_size, 0o755
                with source.open("rb") as content:
                    tar.addfile(entry, content)
            for name, target in sorted(self.links.items()):
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                tar.addfile(entry)
        with path.open("rb") as written:
            return hashlib.file_digest(written, "sha256").hexdigest()


@dataclass(frozen=True)
class Image:
    tag: str
    layers: tuple[Layer, ...]
    entrypoint: tuple[str, ...]


def write_archive(path: Path, images: Iterable[Image], scratch: Path) -> None:
    """Write the images into one archive, which has each layer once. `scratch` is for the layers meanwhile."""
    written: dict[int, str] = {}
    manifest = []
    with tarfile.open(path, "w") as archive:
        for image in images:
            digests = []
            for layer in image.layers:
                if id(layer) not in written:
                    draft = scratch / "layer.tar"
                    digest = written[id(layer)] = layer.write(draft)
                    archive.add(draft, f"{digest}/layer.tar", filter=_plain)
                    draft.unlink()
                digests.append(written[id(layer)])
            config = _config(image, digests)
            name = f"{hashlib.sha256(config).hexdigest()}.json"
            _add(archive, name, config)
            layers = [f"{digest}/layer.tar" for digest in digests]
            manifest.append({"Config": name, "RepoTags": [image.tag], "Layers": layers})
        _add(archive, "manifest.json", json.dumps(manifest).encode())


def _config(image: Image, digests: list[str]) -> bytes:
    document = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Entrypoint": list(image.entrypoint), "Env": [PATH], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
        "history": [{"comment": image.tag} for _ in digests],
    }
    return json.dumps(document).encode()


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.mtime = entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
