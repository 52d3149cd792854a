"""Makes what follows from the chart's sources: the settings in its schema, its copy of the CRD, `deploy/manifests`.

    python -m deploy.chart          # what `make manifests` does; needs helm
    python -m deploy.chart --schema # the first two only; needs nothing

`deploy/manifests` is the chart rendered with `PLAIN` values, for those who use kubectl or kustomize. Its kustomization
has a digest of the chart's sources and one of the files, so that a test finds out without helm if they are up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import api_shim.settings
import smschannel.settings
from smschannel.api.environment import EnvironmentSettings

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm"
MANIFESTS = ROOT / "deploy/manifests"
CRD = ROOT / "crds/smschannels.yaml"
CRD_OF_CHART = CHART / "files/smschannels.yaml"
SCHEMA = CHART / "values.schema.json"
KUSTOMIZATION = MANIFESTS / "kustomization.yaml"

RELEASE, NAMESPACE, KUBERNETES = "sms-channel-operator", "sms-operator", "1.36.0"
PLAIN = ["--set", "plainManifests=true", "--set", "shim.tls.mode=secret"]
FIRST = ("crd.yaml", "namespaces.yaml")
OPTIONAL = ("finalizer-policy.yaml",)
"""Files that not every supported Kubernetes accepts: they are not in the kustomization."""

BY_THE_CHART: dict[type[EnvironmentSettings], tuple[str, ...]] = {
    smschannel.settings.Settings: (
        "webhook_url_template",
        "former_webhook_url_templates",
        "channel_namespaces",
        "shard",
        "shard_namespaces",
        "operator_namespace",
        "ca_bundle",
        "http_host",
        "http_port",
    ),
    api_shim.settings.Settings: (
        "channel_namespace",
        "operator_namespace",
        "tls_cert_file",
        "tls_key_file",
        "plain_http",
        "http_host",
        "http_port",
    ),
}
"""Settings that the templates set from values of their own."""

_KEPT = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "items")


class ChartError(Exception):
    """Something could not be generated. The text says why and what to do."""


def settings_schema(settings: type[EnvironmentSettings]) -> dict[str, Any]:
    """Return the JSON schema of `operator.settings` or `shim.settings`: a program's settings, in camelCase."""
    properties = {
        re.sub(r"_(\w)", lambda found: found[1].upper(), name): _field_schema(each)
        for name, each in settings.model_json_schema()["properties"].items()
        if name not in BY_THE_CHART[settings]
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _field_schema(field: dict[str, Any]) -> dict[str, Any]:
    alternatives = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    kept = {name: alternatives[0][name] for name in _KEPT if name in alternatives[0]}
    if kept.get("type") == "array":
        kept = {"type": "array", "items": {"type": "string"}}
    return {"description": field["description"], **kept}


def schema_with_settings() -> str:
    """Return the text of values.schema.json with the current settings of both programs."""
    schema = json.loads(SCHEMA.read_text())
    schema["definitions"]["operatorSettings"] = settings_schema(smschannel.settings.Settings)
    schema["definitions"]["shimSettings"] = settings_schema(api_shim.settings.Settings)
    return json.dumps(schema, indent=2) + "\n"


def digest(files: list[Path]) -> str:
    """Return a SHA-256 over names and contents of files."""
    found = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        found.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def sources() -> list[Path]:
    """Return the files that `deploy/manifests` is made from."""
    return [path for path in CHART.rglob("*") if path.is_file() and CHART / "ci" not in path.parents]


def outputs() -> list[Path]:
    return [path for path in MANIFESTS.glob("*.yaml") if path != KUSTOMIZATION]


def render(helm: str, arguments: list[str]) -> str:
    """Return what `helm template` prints."""
    command = [helm, "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", KUBERNETES]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChartError(done.stderr.strip())
    return done.stdout


def split(rendered: str) -> dict[str, str]:
    """Return the rendered manifests by the file name of their template, without helm's comments."""
    files: dict[str, list[str]] = {}
    for part in re.split(r"^---\n", rendered, flags=re.MULTILINE):
        if found := re.match(r"# Source: \S+/templates/(\S+)\n", part):
            files.setdefault(found[1], []).append(part[found.end() :].strip("\n"))
    return {name: "\n---\n".join(each) + "\n" for name, each in files.items()}


def generate(helm: str) -> None:
    """Write `deploy/manifests`."""
    files = split(render(helm, PLAIN))
    MANIFESTS.mkdir(exist_ok=True)
    for path in outputs():
        path.unlink()
    for name, text in files.items():
        (MANIFESTS / name).write_text(f"# Made by 'make manifests' from deploy/helm: do not edit.\n{text}")
    KUSTOMIZATION.write_text(kustomization())


def kustomization() -> str:
    """Return the text of kustomization.yaml for the current sources and outputs."""
    names = sorted((path.name for path in outputs()), key=lambda name: (name not in FIRST, name))
    resources = "".join(f"  - {name}\n" for name in names if name not in OPTIONAL)
    return (
        "# Made by 'make manifests' from deploy/helm: do not edit.\n"
        f"# chart:     sha256:{digest(sources())}\n"
        f"# manifests: sha256:{digest(outputs())}\n"
        "apiVersion: kustomize.config.k8s.io/v1beta1\n"
        "kind: Kustomization\n"
        f"resources:\n{resources}"
    )


def find_helm() -> str:
    """Return the path of helm, from $HELM or $PATH."""
    if found := shutil.which(os.environ.get("HELM") or "helm"):
        return found
    raise ChartError("There is no helm on PATH: 'make manifests' builds one, and HELM=/path/to/helm names another")


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate what follows from the sources of the chart.")
    parser.add_argument("--schema", action="store_true", help="only the schema and the copy of the CRD, without helm")
    only_schema = parser.parse_args().schema
    try:
        SCHEMA.write_text(schema_with_settings())
        CRD_OF_CHART.write_text(CRD.read_text())
        if not only_schema:
            generate(find_helm())
    except ChartError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
