"""The demo, which checks every step itself, down to the search for tokens in the database."""

from __future__ import annotations

from pathlib import Path

import psutil

from deploy.local import demo


def test_demo_succeeds_and_leaves_nothing_running(tmp_path: Path) -> None:
    lines: list[str] = []
    demo.tell(tmp_path / "demo", lambda text, fraction=None, /: lines.append(text))
    assert sum(line.startswith("\n") for line in lines) == 7, "seven steps"
    left = [each.cmdline() for each in psutil.Process().children(recursive=True)]
    assert [command for command in left if str(tmp_path) in " ".join(command)] == []
