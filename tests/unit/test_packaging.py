"""Test what is shipped: the wheel, the image's Containerfile, and the SBOM."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTAINERFILE = (ROOT / "deploy/Containerfile").read_text().replace("\\\n", " ")
COMMANDS = [line for line in CONTAINERFILE.splitlines() if line and not line.startswith("#")]
STAGES = [stage.splitlines() for stage in re.split(r"^(?=FROM )", "\n".join(COMMANDS), flags=re.MULTILINE)[1:]]


def locked(name: str) -> dict[str, tuple[str, set[str]]]:
    """Return version and hashes of each package of a lock."""
    requirements = re.findall(
        r"^([a-z0-9-]+)==(\S+)(.*?)(?=^\S|\Z)", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE
    )
    return {package: (version, set(re.findall(r"sha256:(\w+)", rest))) for package, version, rest in requirements}


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel as the Containerfile does, from what the Containerfile copies."""
    context, built = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("dist")
    for line in STAGES[0]:
        if line.startswith("COPY"):
            *sources, target = line.split()[1:]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(
                        ROOT / source, context / target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                    )
                else:
                    shutil.copy(ROOT / source, context / target)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    subprocess.run([sys.executable, *command, built, "."], cwd=context, check=True, timeout=120)
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_every_module(wheel: zipfile.ZipFile) -> None:
    modules = {str(path.relative_to(ROOT / "operator")) for path in (ROOT / "operator/smschannel").rglob("*.py")}
    modules |= {str(path.relative_to(ROOT)) for path in (ROOT / "api_shim").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules
    assert {"smschannel/__main__.py", "api_shim/__main__.py", "smschannel/cli/main.py"} <= modules


def test_wheel_has_the_kubectl_plugin(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "kubectl-sms = smschannel.cli.main:main" in entry_points


# The image


def test_image_has_the_projects_version() -> None:
    assert f'org.opencontainers.image.version="{PROJECT["project"]["version"]}"' in CONTAINERFILE


def test_image_runs_as_a_number_that_is_not_root() -> None:
    """Kubernetes cannot check `runAsNonRoot` for a user's name."""
    (user,) = [line.split()[1] for line in STAGES[-1] if line.startswith("USER")]
    assert re.fullmatch(r"[1-9]\d{4,}:[1-9]\d{4,}", user)


def test_last_stage_runs_nothing() -> None:
    """So that the base needs neither shell nor pip, and nothing of the build is left in the image."""
    assert [line for line in STAGES[-1] if line.startswith(("RUN", "ADD"))] == []


def test_everything_is_installed_by_hash_or_from_here() -> None:
    installs = [part for line in STAGES[0] if line.startswith("RUN") for part in line.split("&&") if "pip " in part]
    installs = [part for part in installs if re.search(r"\b(install|wheel)\b", part)]
    assert len(installs) == 4
    for each in installs:
        assert "--require-hashes" in each or "--no-index" in each


def test_ignore_file_lets_in_what_is_copied_and_nothing_else() -> None:
    copied = {source for line in STAGES[0] if line.startswith("COPY") for source in line.split()[1:-1]}
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied


def test_wheel_is_built_with_the_locked_build_system() -> None:
    """The group is there only so that `make lock` can lock it."""
    assert PROJECT["dependency-groups"]["build"] == PROJECT["build-system"]["requires"]
    assert locked("requirements-build.lock").items() <= locked("requirements-dev.lock").items()


# The SBOM


def test_sbom_names_every_locked_package_with_version_and_hashes_and_is_reproducible(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"cyclonedx_py (.*?)--output-file build/sbom\.cdx\.json (\S+)$", _makefile(), re.MULTILINE)
    options, lock = recipe
    made = []
    for name in ("one.json", "two.json"):
        command = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", *options.split(), "--output-file"]
        subprocess.run([*command, tmp_path / name, lock], cwd=ROOT, check=True, timeout=120, capture_output=True)
        made.append((tmp_path / name).read_text())
    assert made[0] == made[1]
    sbom = json.loads(made[0])
    assert (sbom["bomFormat"], sbom["metadata"]["component"]["name"]) == ("CycloneDX", "sms-channel-operator")
    assert sbom["metadata"]["component"]["version"] == PROJECT["project"]["version"]
    found = {
        each["name"]: (
            each["version"],
            {digest["content"] for reference in each["externalReferences"] for digest in reference.get("hashes", ())},
        )
        for each in sbom["components"]
    }
    assert found == locked("requirements.lock")
    assert len(found) > 40
    assert all(hashes for _, hashes in found.values())


def _makefile() -> str:
    return (ROOT / "Makefile").read_text().replace("\\\n", " ")


# The workflow files


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflow_pins_actions_by_commit_and_may_write_nothing_by_default(name: str) -> None:
    text = (ROOT / ".github/workflows" / name).read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    used = re.findall(r"uses: (.*)$", text, re.MULTILINE)
    assert used
    for each in used:
        assert re.fullmatch(r"[a-z-]+/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each), each
    targets = set(re.findall(r"^([a-z]+):", _makefile(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", text)) <= targets


def test_only_publishing_may_sign_and_push() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    allowed = {name: job.get("permissions") for name, job in workflow["jobs"].items()}
    assert allowed == {"test": None, "publish": {"contents": "read", "id-token": "write", "packages": "write"}}
