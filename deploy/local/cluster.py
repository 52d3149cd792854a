"""The local control plane as a process: start, stop, kill, and start again with its data.

with ControlPlane(binary, home=tmp / "cluster", log=tmp / "cluster.log") as cluster:
    ...  # cluster.url, cluster.kubeconfig
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast
from urllib.parse import urlsplit

import yaml

STOP_SECONDS = 30.0  # it takes two or three; etcd may have more to write on a busy machine


class ControlPlaneError(Exception):
    """The process did not start or did not stop. The text has the end of its log."""


@dataclass(frozen=True)
class Cluster:
    """How to reach a running control plane as its administrator (group system:masters)."""

    url: str  # https://127.0.0.1:PORT
    ca_data: str  # PEM in base64, as a kubeconfig has it
    token: str = field(repr=False)  # valid as long as the home directory exists
    kubeconfig: Path  # mode 0600, needs no other file
    etcd_dir: Path


class ControlPlane:
    """One control plane process. Its data and keys are in `home`, so the next start finds them.

    The process has a session of its own: it does not get the terminal's Ctrl-C, and it goes on when its starter ends
    without stopping it.
    """

    def __init__(self, binary: Path, *, home: Path, log: Path, port: int = 0) -> None:
        """`log` is appended to. `port` 0 picks a free one at the first start, and later starts use the same."""
        self._binary = binary
        self._home = home
        self._log = log
        self._port = port
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> Cluster:
        """Start it, and return when the API server and its controllers are ready, after about 3 seconds."""
        if self._process is not None:
            raise ControlPlaneError(f"the control plane on {self._home} is already running")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [self._binary, "--dir", self._home, "--port", str(self._port)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._process = process
        try:
            cluster = self._announced(process)
        except BaseException:  # Ctrl-C too: otherwise it would keep running
            self.kill()
            raise
        self._port = urlsplit(cluster.url).port or 0
        return cluster

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Ask it to end, and wait. Raises ControlPlaneError when it ends with an error, or had to be killed."""
        process = self._running()
        process.terminate()
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ControlPlaneError(
                f"killed because it did not stop within {timeout:.0f} s:\n{self._log_end()}"
            ) from None
        self._process = None
        if status:
            raise ControlPlaneError(f"the control plane ended with status {status}:\n{self._log_end()}")

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def restart(self) -> Cluster:
        """Stop it and start it again: same port, same data, same tokens."""
        self.stop()
        return self.start()

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.stop()

    def _announced(self, process: subprocess.Popen[str]) -> Cluster:
        """Wait for the line of JSON that it prints when it is ready. It ends by itself if that takes too long."""
        stdout = cast(IO[str], process.stdout)
        with stdout:
            line = stdout.readline()
        if not line:
            raise ControlPlaneError(f"the control plane ended with status {process.wait()}:\n{self._log_end()}")
        announced: dict[str, str] = json.loads(line)
        kubeconfig = Path(announced["kubeconfig"])
        config: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
        return Cluster(
            url=announced["url"],
            ca_data=config["clusters"][0]["cluster"]["certificate-authority-data"],
            token=config["users"][0]["user"]["token"],
            kubeconfig=kubeconfig,
            etcd_dir=Path(announced["etcdDir"]),
        )

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ControlPlaneError(f"the control plane on {self._home} is not running")
        return self._process

    def _log_end(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def write_kubeconfig(path: Path, *, url: str, ca_data: str, token: str, namespace: str) -> Path:
    """Write a kubeconfig that authenticates with `token`, with everything inline, and return `path`.

    Only the user may read the file, and it appears complete or not at all. `ca_data` is PEM in base64.
    """
    name = "local"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": url, "certificate-authority-data": ca_data}}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": namespace}}],
        "current-context": name,
    }
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            yaml.safe_dump(config, file, sort_keys=False)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink()
        raise
    return path
