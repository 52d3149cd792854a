"""Objects as each release stored them, which every later release must be able to read.

`python -m tests.stored v1` makes a folder of them with the current code, once per release that changes what is stored.
A folder is never made again: that would hide what the change breaks. The keys and tokens in it protect nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

FOLDER = Path(__file__).parent
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name.startswith("v"))


def stored(version: str, name: str) -> list[dict[str, Any]]:
    """Return the objects of a file: `operator`, `records` or `channels`."""
    return cast("list[dict[str, Any]]", list(yaml.safe_load_all((FOLDER / version / f"{name}.yaml").read_text())))


def expected(version: str) -> dict[str, Any]:
    """Return what the objects mean: tokens, keys, webhooks, and the REST status of each reason."""
    return cast("dict[str, Any]", yaml.safe_load((FOLDER / version / "expected.yaml").read_text()))
