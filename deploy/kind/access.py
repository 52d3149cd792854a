"""Reaches a cluster from this machine with its kubeconfig: kubectl, helm, the API, and the Twilio twin in it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config

from deploy.build import Progress
from deploy.kind import tools
from deploy.kind.engine import EngineError

TWIN_NAMESPACE = "sms-twin"
_TWIN = f"/api/v1/namespaces/{TWIN_NAMESPACE}/services/https:twin:443/proxy/_twin"


class Access:
    """A cluster as its administrator sees it. `bin` gets the programs, for people to put on their PATH."""

    def __init__(self, kubeconfig: Path, bin_dir: Path, progress: Progress) -> None:
        self.kubeconfig = kubeconfig
        bin_dir.mkdir(parents=True, exist_ok=True)
        self._kubectl = _link(bin_dir / "kubectl", tools.KUBERNETES.ensure(progress))
        self._helm = _link(bin_dir / "helm", tools.HELM.ensure(progress))
        configuration = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=configuration)
        self.api: Any = client.ApiClient(configuration)

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """Run kubectl. Raises EngineError with what it says if it fails."""
        return self._run(self._kubectl, *arguments, stdin=stdin)

    def helm(self, *arguments: str | Path, stdin: str | None = None) -> str:
        return self._run(self._helm, *arguments, stdin=stdin)

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl("apply", "--server-side", "--filename=-", stdin=yaml.safe_dump_all(objects))

    def get(self, kind: str, *arguments: str) -> dict[str, Any]:
        """Return an object, or a list of them."""
        found: dict[str, Any] = json.loads(self.kubectl("get", kind, *arguments, "--output=json"))
        return found

    def twin(self, method: str, path: str, body: Any = None) -> Any:
        """Call the twin's control API, through the API server; `path` as in `/numbers/+61400111222`."""
        url = f"{self.api.configuration.host}{_TWIN}{path}"
        answer = self.api.call_api(method, url, {"Content-Type": "application/json"}, body)
        content = answer.read()
        if not 200 <= answer.status < 300:
            raise EngineError(f"the twin answers {answer.status}: {content!r}")
        return json.loads(content) if content else None

    def _run(self, program: Path, *arguments: str | Path, stdin: str | None) -> str:
        done = subprocess.run(
            [program, *arguments],
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise EngineError(f"`{program.name} {' '.join(map(str, arguments[:2]))}` failed: {done.stderr.strip()}")
        return done.stdout


def _link(path: Path, target: Path) -> Path:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path
