"""The shim loads nothing of the operator but `smschannel.api`; import-linter reads the code, this runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import {module}
from prometheus_client import REGISTRY
names = [metric.name for metric in REGISTRY.collect()]
print(json.dumps([sorted(sys.modules), names]))
"""


def imported(module: str) -> tuple[list[str], list[str]]:
    """All modules that importing `module` loads, and the metrics that it registers in the default registry."""
    command = [sys.executable, "-c", PROGRAM.format(module=module)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    modules, metrics = json.loads(printed)
    return modules, metrics


@pytest.mark.parametrize("module", ["api_shim.__main__", "api_shim.docs", "api_shim.openapi"])
def test_importing_the_shim_loads_only_the_api_package(module: str) -> None:
    modules, metrics = imported(module)
    ours = {name for name in modules if name.startswith("smschannel.") and not name.startswith("smschannel.api.")}
    assert ours <= {"smschannel.api"}
    assert not {"kopf", "twilio"} & set(modules)
    assert [name for name in metrics if name.startswith("smschannel")] == []
