"""The tools that these tests run. `make chart` demands all of them; otherwise tests without their tool are skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from deploy.local.stack import Stack

Helm = Callable[..., str]


class Refused(Exception):
    """A tool ended with an error; the text is what it printed."""


def tool(name: str) -> str:
    """Return the path of a tool, from the variable of its name or from $PATH."""
    if path := shutil.which(os.environ.get(name.upper().replace("-", "_")) or name):
        return path
    if os.environ.get("CHART") == "required":
        pytest.fail(f"there is no {name} on PATH: docs/development.md says where to get it")
    pytest.skip(f"there is no {name}")


def run(*command: str, stdin: str | None = None) -> str:
    """Return standard output. Raises `Refused` if the command fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise Refused(done.stdout + done.stderr)
    return done.stdout


@pytest.fixture(scope="session")
def helm() -> Helm:
    path = tool("helm")
    return lambda *arguments: run(path, *arguments)


@pytest.fixture(scope="session")
def schemas(tmp_path_factory: pytest.TempPathFactory, control_plane: Stack) -> list[str]:
    """Options for kubeconform: JSON schemas of all kinds of the local API server. Unknown fields do not fit them."""
    home = tmp_path_factory.mktemp("schemas")
    kubeconfig = str(control_plane.cluster.kubeconfig)
    definitions = json.loads(run(tool("kubectl"), "--kubeconfig", kubeconfig, "get", "--raw", "/openapi/v2"))[
        "definitions"
    ]
    for each in definitions.values():
        if "properties" in each:
            each.setdefault("additionalProperties", False)
    definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = {"type": ["string", "number"]}
    definitions["io.k8s.apimachinery.pkg.util.intstr.IntOrString"] = {"type": ["string", "integer"]}
    for name, each in definitions.items():
        for kind in each.get("x-kubernetes-group-version-kind", ()):
            group = f"-{kind['group'].partition('.')[0]}" if kind["group"] else ""
            file = home / f"{kind['kind'].lower()}{group}-{kind['version']}.json"
            file.write_text(json.dumps({"$ref": f"#/definitions/{name}", "definitions": definitions}))
    return ["-schema-location", f"{home}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json"]


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An API server with nothing installed."""
    stack = Stack(tmp_path_factory.mktemp("control-plane"))
    try:
        stack.start_control_plane()
        yield stack
    finally:
        stack.stop()
