"""README's picture shows what its commands print today."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import pytest

from deploy.local import picture


def text_of(svg: str) -> list[str]:
    """The lines of a terminal's picture. How old the channel is, and pauses between words, differ from run to run."""
    lines = [html.unescape(each) for each in re.findall(r"<text [^>]*>([^<]*)</text>", svg)]
    return [re.sub(r"\s+", " ", re.sub(r"\b\d+s\b", "AGE", each)).strip() for each in lines]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
def test_picture_is_of_the_current_output(tmp_path: Path) -> None:
    """If it fails, and the new output is right: `make picture`."""
    steps = picture.play(tmp_path / "home", lambda text, fraction=None, /: None)
    assert text_of(picture.PICTURE.read_text()) == text_of(picture.draw(steps))
