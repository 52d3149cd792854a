"""Root file systems of Debian packages, made with mmdebstrap from the package sources that this machine is set up for.

Nothing is installed: package lists, archives and mmdebstrap itself are kept in a directory of the cache.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from deploy.build import BuildError, Progress, ensure, fingerprint, run

# What a node of the cluster runs, and what the private engine runs beside it.
NODE = (
    *("systemd", "systemd-sysv", "dbus", "containerd", "runc", "containernetworking-plugins"),
    *("conntrack", "iptables", "nftables", "iproute2", "ethtool", "util-linux", "mount", "kmod"),
    *("ca-certificates", "jq", "procps", "docker.io", "tini"),
)
PYTHON = ("python3", "python3-venv", "ca-certificates")
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")


def ensure_rootfs(name: str, packages: tuple[str, ...], progress: Progress) -> Path:
    """Return a tar file with Debian's essential packages and the named ones, making it first if it is not cached.

    Raises BuildError, also on a machine where it cannot be made: that needs root and Debian.
    """
    inputs = (sorted(packages), LEFT_OUT, _os_release("VERSION_CODENAME"), platform.machine())
    return ensure(
        f"debian-{name}-{fingerprint(*inputs)}",
        f"a root file system with {len(packages)} Debian packages",
        lambda draft: _make(draft, name, packages, progress),
        progress,
    )


def _make(draft: Path, name: str, packages: tuple[str, ...], progress: Progress) -> Path:
    _check_machine()
    progress(f"Making a root file system ({name}) of {len(packages)} Debian packages: about 2 min, once.")
    apt = Apt(draft / "apt")
    apt.update()
    tools = apt.unpack("mmdebstrap", draft / "tools")
    tar = draft / f"{name}.tar"
    sources = draft / "sources.list"
    sources.write_text(apt.sources())
    environment = {**os.environ, "PATH": f"{tools / 'usr/bin'}:{os.environ['PATH']}", "TMPDIR": str(draft)}
    # In a mount namespace of its own, so that an interrupted run leaves no mount behind.
    command = ["unshare", "--mount", "--propagation", "private", str(tools / "usr/bin/mmdebstrap"), "--mode=root"]
    command += ["--variant=minbase", f"--include={','.join(packages)}"]
    command += ["--dpkgopt=force-unsafe-io", *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT)]
    run([*command, _os_release("VERSION_CODENAME"), str(tar), str(sources)], environment=environment)
    return tar


class Apt:
    """apt with the machine's package sources, and its lists and archives in a directory of our own."""

    def __init__(self, directory: Path) -> None:
        for needed in ("lists/partial", "archives/partial"):
            (directory / needed).mkdir(parents=True)
        self._directory = directory
        # Without a sandbox: its user may not read the directory.
        settings = {"Dir::State::Lists": directory / "lists", "Dir::Cache": directory, "APT::Sandbox::User": "root"}
        self._options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

    def update(self) -> None:
        run(["apt-get", *self._options, "--quiet", "update"])

    def unpack(self, package: str, into: Path) -> Path:
        """Download a package and unpack it into a new directory, which is returned."""
        downloads = self._directory / package
        downloads.mkdir()
        run(["apt-get", *self._options, "--quiet", "download", package], downloads)
        [archive] = downloads.glob("*.deb")
        run(["dpkg-deb", "--extract", str(archive), str(into)])
        return into

    def sources(self) -> str:
        """Return the machine's sources of Debian itself, without those of others, in the format of sources.list."""
        one_line = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
        targets = ["Created-By: Packages", "Origin: Debian"]
        found = run(["apt-get", *self._options, "indextargets", "--format", one_line, *targets])
        lines = dict.fromkeys(found.splitlines())
        if not lines:
            raise BuildError("apt on this machine has no source of Debian packages: add one to /etc/apt and try again.")
        return "\n".join(lines) + "\n"


def _check_machine() -> None:
    if _os_release("ID") != "debian" or not shutil.which("apt-get") or not shutil.which("perl"):
        raise BuildError(
            "Without Docker and a registry, the cluster's images are made of Debian packages, which needs Debian with"
            " apt and perl. Start Docker and give it access to a registry, or use a Debian machine."
        )
    if os.geteuid() != 0:
        raise BuildError(
            "Without Docker and a registry, the cluster's images are made of Debian packages, which needs root. Start"
            " Docker and give it access to a registry, or run this as root."
        )


def _os_release(field: str) -> str:
    return platform.freedesktop_os_release().get(field, "")
