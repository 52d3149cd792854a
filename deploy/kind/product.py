"""Builds the product's image from deploy/Containerfile, and the twin's image on top of it, in a container engine."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.build import Progress, cache_dir, fingerprint
from deploy.kind import debian
from deploy.kind.engine import ROOT, Engine, EngineError


def build_product(engine: Engine, tag: str, progress: Progress) -> None:
    """Build the product's image from the checkout. Raises BuildError or EngineError."""
    bases = _bases(engine, progress)
    progress(f"Building {tag} from deploy/Containerfile: about 1 min.")
    with _context() as files, _network(engine) as options:
        build(engine, tag, files / "deploy/Containerfile", files, *options, **bases)


def build_twin(engine: Engine, tag: str, product: str) -> None:
    """Build the image of the Twilio twin: the product's, whose libraries it needs, with the twin's code."""
    with _context("tests/__init__.py", "tests/twin", "deploy/kind/twin") as files:
        build(engine, tag, files / "deploy/kind/twin/Containerfile", files, BASE=product)


def build(engine: Engine, tag: str, containerfile: Path, context: Path, *options: str, **arguments: str) -> None:
    """Build an image of a context in the checkout or the cache, which the engine sees, with build arguments."""
    words = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    engine.docker("build", *options, *words, "--file", containerfile, "--tag", tag, context)


@contextmanager
def _context(*paths: str) -> Iterator[Path]:
    """Copy what git tracks or would track of the checkout, all of it or some paths: not .venv, and no secrets."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="context-") as made:
        for name in filter(None, listed):
            source, target = ROOT / name, Path(made) / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield Path(made)


def _bases(engine: Engine, progress: Progress) -> dict[str, str]:
    """Return the base images as build arguments: none where a registry has the usual one, else our own."""
    if engine.can_pull(_usual_base()):
        return {}
    tar = debian.ensure_rootfs("python", debian.PYTHON, progress)
    base = f"localhost/python:{fingerprint(tar.name)}"
    if not engine.has_image(base):
        engine.import_rootfs(tar, base, "ENV LANG=C.UTF-8")
    return {"BASE": base, "BUILD_BASE": _build_base(engine, base)}


def _usual_base() -> str:
    arguments = (ROOT / "deploy/Containerfile").read_text().splitlines()
    [base] = [line.removeprefix("ARG BASE=") for line in arguments if line.startswith("ARG BASE=")]
    return base


def _build_base(engine: Engine, base: str) -> str:
    """Make a base for building that reaches packages as this machine does: with its pip.conf and CA certificates."""
    files = {"etc/pip.conf": Path("/etc/pip.conf")}
    if bundle := os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile:
        files["etc/ssl/certs/ca-certificates.crt"] = Path(bundle)
    tag = f"{base}-build"
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="context-") as made:
        for name, source in files.items():
            if source.exists():
                (Path(made) / "files" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, Path(made) / "files" / name)
        containerfile = Path(made) / "Containerfile"
        containerfile.write_text(f"FROM {base}\nCOPY files/ /\n")
        engine.docker("build", "--file", containerfile, "--tag", tag, made)
    return tag


@contextmanager
def _network(engine: Engine) -> Iterator[list[str]]:
    """Yield build options with which the build reaches package indexes; the private engine's network has no uplink."""
    index = [f"--build-arg={name}" for name in ("PIP_INDEX_URL", "PIP_TRUSTED_HOST") if name in os.environ]
    if not engine.private:
        yield index
        return
    with Path("/proc/self/ns/net").open("rb") as network:
        enter = ["nsenter", f"--target={engine.init}", "--net", "--"]
        proxy = subprocess.Popen(
            [*enter, sys.executable, "-m", "deploy.kind.egress", str(network.fileno())],
            cwd=ROOT,
            pass_fds=[network.fileno()],
            stdin=subprocess.PIPE,  # it ends with us
            stdout=subprocess.PIPE,
            text=True,
        )
    with proxy:
        assert proxy.stdin
        assert proxy.stdout
        if not (port := proxy.stdout.readline().strip()):
            raise EngineError("the proxy for image builds did not start")
        try:
            url = f"http://127.0.0.1:{port}"
            proxies = [f"--build-arg={name}={url}" for name in ("HTTPS_PROXY", "https_proxy")]
            yield ["--network=host", *proxies, *index]  # the engine's network, where the proxy listens
        finally:
            proxy.stdin.close()
