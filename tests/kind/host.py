"""What the machine looks like, to compare before and after: the cluster must leave nothing behind."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import psutil


def snapshot() -> dict[str, list[str]]:
    """Return mounts, interfaces, firewall rules, processes, packages, cgroups, settings of the kernel, and /etc."""
    return {
        "mounts": sorted(line.split(" - ")[-1] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        "interfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "routes": Path("/proc/net/route").read_text().splitlines(),
        "namespaces": sorted(str(path) for path in Path("/run/netns").glob("*")),
        "packages": [_digest(Path("/var/lib/dpkg/status"))],
        "package lists": sorted(path.name for path in Path("/var/lib/apt/lists").glob("*")),
        "cgroups": sorted(str(path) for path in Path("/sys/fs/cgroup").rglob("sms-kind-*")),
        "kernel": _kernel_settings(),
        "etc": [f"{path} {_digest(path)}" for path in sorted(Path("/etc").rglob("*")) if path.is_file()],
        "engines": sorted(each.name() for each in psutil.process_iter() if each.name() in _ENGINE),
    }


def differences(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    """Return what was added or removed, a line each."""
    found = []
    for what, old in before.items():
        new = after[what]
        found += [f"{what}: - {each}" for each in old if each not in new]
        found += [f"{what}: + {each}" for each in new if each not in old]
    return found


_ENGINE = {"dockerd", "containerd", "kubelet", "kube-apiserver", "etcd", "containerd-shim-runc-v2", "tini"}


def _kernel_settings() -> list[str]:
    """Return the settings under kernel, vm and fs; not those that count or are random."""
    listing = subprocess.run(
        [
            "/sbin/sysctl",
            "--all",
            "--ignore",
            "--pattern",
            "^(vm|fs)[.]|^kernel[.](panic|pid_max|keys|core|sysrq|printk)",
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    volatile = ("fs.dentry-state", "fs.file-nr", "fs.inode", "fs.quota", "fs.aio-nr", "vm.stat")
    return [line for line in listing.splitlines() if not line.startswith(volatile)]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        return str(error)
