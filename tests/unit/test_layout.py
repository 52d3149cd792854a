"""`operator/` is a source root, never a package: it would hide the standard library's module of that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_operator_never_becomes_a_package() -> None:
    assert not list((ROOT / "operator").glob("__init__.*"))
    assert [each.name for each in (ROOT / "operator").iterdir() if each.suffix == ".py"] == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import operator; print(operator.__file__)", "an import in the repository's root finds Python's module"),
        (
            "import sys; del sys.modules['operator']; import operator; print(operator.__file__)",
            "also if the root is the first entry of the path",
        ),
        (
            "import sys; sys.path.insert(0, '.'); del sys.modules['operator'];"
            " import operator; print(operator.__file__)",
            "also if the root is added once more",
        ),
    ],
)
def test_import_operator_finds_the_standard_library(code: str, reason: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    module = Path(result.stdout.strip())
    assert module.name == "operator.py", reason
    assert ROOT / "operator" not in module.parents, reason
