"""The node image where no registry has one: Debian packages, kind's own files, and Kubernetes built from Go modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from deploy.build import Progress, ensure, fingerprint, run
from deploy.kind import images, tools
from deploy.kind.engine import FILES, Engine, ensure_engine_rootfs

REPOSITORY = "localhost/kubernetes"  # kubeadm's imageRepository: these images are in the node and nowhere else
VERSION = f"v{tools.KUBERNETES.version}"
ETCD_TAG = COREDNS_TAG = PAUSE_TAG = VERSION  # whatever their versions: they come with this image
COMPONENTS = ("kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler")
COMMANDS = (*COMPONENTS, "etcd", "kubeadm", "kubectl", "kubelet")
KEEP_HOST_SETTINGS = "kind/bin/keep-host-settings.sh"
ENTRYPOINT = [f"/{KEEP_HOST_SETTINGS}", "/usr/local/bin/entrypoint", "/sbin/init"]
NODE_SETTINGS = ("ENV container=docker", f"ENTRYPOINT {json.dumps(ENTRYPOINT)}")


def ensure_node_image(engine: Engine, progress: Progress) -> str:
    """Return the tag of the node image in the engine, made and imported first if it is missing. Raises BuildError."""
    tar = ensure_node_rootfs(progress)
    tag = f"localhost/kind-node:{tar.name.rpartition('-')[2]}"
    if not engine.has_image(tag):
        progress("Importing the node image into the container engine.")
        engine.import_rootfs(tar, tag, *NODE_SETTINGS)
    return tag


def ensure_node_rootfs(progress: Progress) -> Path:
    """Return a tar file with a node's root file system, made first if it is not cached. Raises BuildError."""
    rootfs = ensure_engine_rootfs(progress)
    programs = tools.ensure_all(("kubernetes", "coredns", "pause", "kind"), progress)
    scripts = [(path.name, path) for path in sorted(FILES.iterdir())]
    sources = [(path.name, path) for path in (Path(__file__), Path(images.__file__))]
    names = [rootfs.name, *sorted(path.name for path in programs.values())]

    def make(draft: Path) -> Path:
        progress("Making the node image: about 30 s, once.")
        files = draft / "files"
        _copy_kind_files(files, tools.KIND.source_dir(progress))
        _stage(files, rootfs, programs, draft)
        tar = draft / "node.tar"
        command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        run([*command, str(FILES / "node.sh"), str(rootfs), str(files), str(draft), str(tar)])
        return tar

    name = f"node-{fingerprint(names, files=[*scripts, *sources])}"
    return ensure(name, "the node image", make, progress)


def _stage(files: Path, rootfs: Path, programs: dict[str, Path], scratch: Path) -> None:
    """Add to the files of kind's base image what a node has beside them and Debian's packages."""
    binaries = files / "usr/bin"
    binaries.mkdir(parents=True)
    shutil.copy2(programs["kubernetes"], binaries / "kubernetes")
    for command in COMMANDS:
        (binaries / command).symlink_to("kubernetes")
    (files / "kind/version").write_text(VERSION)
    shutil.copy2(FILES / "keep-host-settings.sh", files / KEEP_HOST_SETTINGS)
    archive = files / "kind/images/images.tar"
    archive.parent.mkdir()
    images.write_archive(archive, _images(rootfs, programs), scratch)


def _copy_kind_files(files: Path, sources: Path) -> None:
    """Copy the files of kind's base image from its Go module, with the permissions that its Dockerfile gives them."""
    shutil.copytree(sources / "images/base/files", files)
    for path in (files, *files.rglob("*")):
        executable = path.is_dir() or path.parent.name == "bin"
        path.chmod(0o755 if executable else 0o644)
    settings = files / "etc/containerd/config.toml"
    lines = []
    for line in settings.read_text().splitlines():
        key = line.partition("=")[0].strip()
        if key == "sandbox_image":
            line = f'  sandbox_image = "{REPOSITORY}/pause:{PAUSE_TAG}"'
        elif key == "restrict_oom_score_adj":
            line = "  restrict_oom_score_adj = true"  # root here may lack the capability to lower a score
        lines.append(line)
    settings.write_text("\n".join(lines) + "\n")


def _images(rootfs: Path, programs: dict[str, Path]) -> list[images.Image]:
    commands = {f"/usr/local/bin/{name}": "kubernetes" for name in (*COMPONENTS, "etcd")}
    kubernetes = images.Layer({"/usr/local/bin/kubernetes": programs["kubernetes"]}, commands)
    firewall = images.Layer(_with_libraries(rootfs, "/usr/sbin/nft"), {})
    made = [
        images.Image(f"{REPOSITORY}/{name}:{VERSION}", (kubernetes,), (f"/usr/local/bin/{name}",))
        for name in COMPONENTS
        if name != "kube-proxy"
    ]
    return [
        *made,
        images.Image(f"{REPOSITORY}/kube-proxy:{VERSION}", (firewall, kubernetes), ("/usr/local/bin/kube-proxy",)),
        images.Image(f"{REPOSITORY}/etcd:{ETCD_TAG}", (kubernetes,), ("/usr/local/bin/etcd",)),
        _single(f"coredns:{COREDNS_TAG}", "/coredns", programs["coredns"]),
        _single(f"pause:{PAUSE_TAG}", "/pause", programs["pause"]),
    ]


def _single(name: str, path: str, program: Path) -> images.Image:
    return images.Image(f"{REPOSITORY}/{name}", (images.Layer({path: program}, {}),), (path,))


def _with_libraries(rootfs: Path, program: str) -> dict[str, Path]:
    """Return the files that a program of the root file system needs, by their paths in it."""
    listing = run(["chroot", str(rootfs), "ldd", program])
    needed = {word for line in listing.splitlines() for word in line.split() if word.startswith("/")}
    return {path: (rootfs / path.lstrip("/")).resolve() for path in (program, *needed)}
