"""The site of `make docs`: it builds without a warning, needs no other host, and mistakes in pages fail the build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import PAGES, ROOT

SPHINX = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-c", str(ROOT / "docs")]


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Do what `make docs` does."""
    return subprocess.run([*SPHINX, str(source), str(site)], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from the pages as they are."""
    path = tmp_path_factory.mktemp("site")
    done = build(ROOT, path)
    assert (done.returncode, done.stderr) == (0, "")
    return path


def test_makefile_builds_as_this_test_does() -> None:
    assert "-m deploy.reference\n\t@$(BIN)/sphinx-build " + " ".join(SPHINX[3:6]) + " -c docs . build/site" in (
        (ROOT / "Makefile").read_text()
    )


def test_every_page_is_in_the_site(site: Path) -> None:
    assert {page for page in PAGES if not (site / page).with_suffix(".html").is_file()} == set()


def test_site_needs_no_other_host(site: Path) -> None:
    """It can be read offline, and tells nobody who reads it."""
    loading = r"(?:<(?:script|img|iframe)[^>]* src|<link[^>]* href|@import|url\()"
    loaded = re.compile(loading + r"""\s*=?\s*["']?((?:https?:)?//[^"')]+)""")
    files = [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]
    assert len(files) > len(PAGES)
    found = {(path.name, url) for path in files for url in loaded.findall(path.read_text())}
    assert found == set()


def test_address_of_the_site_leads_to_the_front_page(site: Path) -> None:
    assert 'content="0; url=README.html"' in (site / "index.html").read_text()


def test_mistakes_in_pages_fail_the_build(tmp_path: Path) -> None:
    """Each of these is a warning of Sphinx, and warnings are errors."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns("decisions", "reference"))
    (source / "README.md").write_text("# Title\n\n[a](docs/faq.md#no-such-anchor) [b](docs/no-such-page.md)\n")
    (source / "docs/forgotten.md").write_text("# Forgotten\n\n![no such picture](none.svg)\n")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    for mistake in (
        r"README.md:3: WARNING: .*no-such-anchor",
        r"README.md:3: WARNING: .*docs/no-such-page.md",
        r"forgotten.md: WARNING: document isn't included in any toctree",
        r"forgotten.md:3: WARNING: image file not readable",
    ):
        assert re.search(mistake, done.stderr), f"{mistake} is not in: {done.stderr}"
