"""Where containers run: the Docker of this machine if it works, else a private one that leaves nothing behind.

The private engine is Debian's dockerd in namespaces of its own (mount, network, PID), on a root file system from the
cache. Everything that it makes is in its home directory, in those namespaces, or in a cgroup of its own; `stop` removes
all three. It needs root, but no package and no setting on the host.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from deploy.build import BuildError, Progress, cache_dir, ensure, fingerprint, remedy, run
from deploy.kind import debian

FILES = Path(__file__).parent / "files"
ROOT = Path(__file__).parents[2]
CAP_SYS_RESOURCE = 24
START_SECONDS = 120.0


class EngineError(Exception):
    """A container engine did not start, or a command in it failed. The text says what, and the end of its output."""


@dataclass(frozen=True)
class Engine:
    """Runs programs where they reach the container engine.

    `prefix` enters the private engine's namespaces; it is empty for the Docker of this machine. `init` is the process
    id of the private engine's first process.
    """

    prefix: tuple[str, ...] = ()
    init: int | None = None

    @property
    def private(self) -> bool:
        return self.init is not None

    def run(self, *command: str | Path, stdin: IO[bytes] | bytes | None = None, timeout: float | None = None) -> str:
        """Run a program and return what it writes. Raises EngineError if it fails or takes too long."""
        given = stdin if isinstance(stdin, bytes) else None
        try:
            done = subprocess.run(
                [*self.prefix, *map(str, command)],
                env=_environment(self.private),
                input=given,
                stdin=None if given is not None else stdin or subprocess.DEVNULL,  # type: ignore[arg-type]
                capture_output=True,
                check=False,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"`{_shown(command)}` took more than {timeout:.0f} s: {_text(error.stderr)}") from None
        if done.returncode:
            output = _text(done.stderr) or _text(done.stdout)
            raise EngineError(f"`{_shown(command)}` failed. {remedy(output)}\n{output}")
        return str(done.stdout.decode(errors="replace"))

    def docker(self, *arguments: str | Path, stdin: IO[bytes] | bytes | None = None) -> str:
        return self.run("docker", *arguments, stdin=stdin)

    def has_image(self, tag: str) -> bool:
        return bool(self.docker("images", "--quiet", tag).strip())

    def can_pull(self, tag: str) -> bool:
        """Return whether an image is here or in a registry; the private engine reaches none."""
        if self.private:
            return False
        try:
            self.docker("pull", "--quiet", tag)
        except EngineError:
            return self.has_image(tag)
        return True

    def import_rootfs(self, tar: Path, tag: str, *changes: str) -> None:
        """Make an image of a tar file of a root file system. `changes` are instructions, as in a Containerfile."""
        words = [word for change in changes for word in ("--change", change)]
        with tar.open("rb") as content:
            self.docker("import", *words, "-", tag, stdin=content)


class PrivateEngine:
    """A private engine in a home directory, which `stop` deletes. It goes on when the process that started it ends."""

    def __init__(self, home: Path, say: Progress, shared: Sequence[Path] = ()) -> None:
        """`shared` are directories that programs in the engine see, beside the checkout, the cache and `home`."""
        self.home = home
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None  # if this object started it
        self._shared = tuple(dict.fromkeys((ROOT, cache_dir(), home, *shared)))

    @property
    def _state(self) -> Path:
        return self.home / "engine.json"

    def running(self) -> Engine | None:
        """Return the engine if it was started and still runs."""
        if not self._state.exists():
            return None
        state = json.loads(self._state.read_text())
        try:
            process = psutil.Process(state["pid"])
            if process.create_time() != state["started"] or process.status() == psutil.STATUS_ZOMBIE:
                return None
            [init] = process.children()
        except (psutil.NoSuchProcess, ValueError):
            return None
        return _inside(init.pid)

    def start(self) -> Engine:
        """Start it, and return when Docker answers. Raises BuildError or EngineError."""
        if engine := self.running():
            return engine
        rootfs = ensure_engine_rootfs(self._say)
        self.stop()  # what is left of one that was killed
        self.home.mkdir(parents=True, mode=0o700)
        cgroup = f"sms-kind-{uuid.uuid4().hex[:12]}"
        log = self.home / "dockerd.log"
        command = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        command += ["--propagation", "private", str(FILES / "engine.sh"), str(rootfs), str(self.home), f"/{cgroup}"]
        command += [_runtime(), *map(str, self._shared)]
        with log.open("wb") as output:
            self._process = process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        started = psutil.Process(process.pid).create_time()
        self._state.write_text(json.dumps({"pid": process.pid, "started": started, "cgroup": cgroup}))
        try:
            return self._answering(process, log)
        except BaseException:  # Ctrl-C too: otherwise it would keep running
            self.stop()
            raise

    def stop(self) -> None:
        """End everything in the engine and delete what it made."""
        if self._state.exists():
            state = json.loads(self._state.read_text())
            _kill(state["pid"], state["started"])
            _remove_cgroups(state["cgroup"])
        if self._process:
            self._process.wait()
            self._process = None
        run(["rm", "-rf", str(self.home)])  # some 100,000 files, which Python takes minutes for

    def _answering(self, process: subprocess.Popen[bytes], log: Path) -> Engine:
        deadline = time.monotonic() + START_SECONDS
        for attempt in Retrying(
            retry=retry_if_exception_type(EngineError), wait=wait_fixed(0.2), stop=stop_after_delay(START_SECONDS)
        ):
            with attempt:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BuildError(f"the private engine did not start: {_end_of(log)}")
                if not (engine := self.running()):
                    raise EngineError("not yet")
                engine.docker("version", "--format", "{{.Server.Version}}")
                return engine
        raise AssertionError("unreachable")


def host_engine() -> Engine | None:
    """Return the Docker of this machine, None if there is none that works."""
    if not shutil.which("docker"):
        return None
    answer = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return Engine() if answer.returncode == 0 else None


def ensure_engine_rootfs(progress: Progress) -> Path:
    """Return a directory with the root file system that the private engine and the nodes share. Raises BuildError."""
    tar = debian.ensure_rootfs("node", debian.NODE, progress)

    def unpack(draft: Path) -> Path:
        root = draft / "root"
        root.mkdir()
        run(["tar", "--extract", "--numeric-owner", "--xattrs", f"--file={tar}", f"--directory={root}"])
        return root

    return ensure(f"rootfs-{fingerprint(tar.name)}", "the unpacked root file system", unpack, progress)


def _inside(init: int) -> Engine:
    enter = ["nsenter", f"--target={init}", "--mount", "--net", "--pid", "--ipc", "--uts", "--root", "--wd"]
    return Engine((*enter, "--"), init)


def _runtime() -> str:
    """Return the OCI runtime: runc itself, or a wrapper where root lacks a capability that Docker asks for."""
    status = Path("/proc/self/status").read_text()
    [effective] = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff")]
    return "runc" if effective & (1 << CAP_SYS_RESOURCE) else str(FILES / "runc-limited.sh")


def _kill(pid: int, started: float) -> None:
    """Kill the engine's parent process and wait: its child dies with it, and with the child all in its namespaces."""
    try:
        process = psutil.Process(pid)
        if process.create_time() != started:
            return
        children = process.children()
        for each in (*children, process):
            each.kill()
        psutil.wait_procs([*children, process], timeout=30)
    except psutil.NoSuchProcess:
        return


def _remove_cgroups(name: str) -> None:
    """Remove the engine's cgroups, in every hierarchy there is."""
    top = Path("/sys/fs/cgroup")
    for root in [top / name, *(each / name for each in top.iterdir() if each.is_dir())]:
        for directory, _, __ in os.walk(root, topdown=False):
            for attempt in Retrying(
                retry=retry_if_exception_type(OSError), wait=wait_fixed(0.05), stop=stop_after_delay(10), reraise=True
            ):
                with attempt:
                    Path(directory).rmdir()


def _environment(private: bool) -> Mapping[str, str]:
    if not private:
        return os.environ
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8"}


def _shown(command: Sequence[str | Path]) -> str:
    return " ".join(Path(str(word)).name for word in command[:3])


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace").strip()[-4000:]


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
