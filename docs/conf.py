"""Sphinx's configuration of the site: `make docs`. Its pages are the repository's Markdown files, where they are."""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
NAVIGATION = {
    "Start": ["docs/install", "docs/first-channel", "docs/faq", "docs/comparison"],
    "Use": ["docs/rest-api", "docs/gitops", "docs/cli*"],
    "Operate": ["docs/operations", "docs/reasons", "docs/sealing*"],
    "Understand": ["docs/promises", "docs/security", "docs/performance", "docs/scale", "docs/compatibility"],
    "Reference": ["docs/reference/smschannel", "docs/reference/rest", "docs/reference/settings"],
    "Runbooks": ["docs/runbooks/*"],
    "Project": ["CONTRIBUTING", "docs/development", "docs/decisions/README", "CHANGELOG", "SECURITY"],
}
"""The pages in the order of the menu; a pattern may match none. A page that is in no menu is an error."""

MENUS = {
    "README": NAVIGATION,
    "docs/decisions/README": {"Records": ["docs/decisions/0*"]},
}
"""The menus below a page. They are added here, and not written in the page, since others than Sphinx show it too."""

project = "SMS Channel Operator"
version = release = version_of("sms-channel-operator")
project_copyright = ""
html_show_copyright = False

extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md"]
exclude_patterns = [".*", "build", "node_modules"]
nitpicky = True

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_title = project
html_additional_pages = {"index": "to_first_page.html"}
templates_path = ["site"]
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5f8a", "color-brand-content": "#0b5f8a"},
    "dark_css_variables": {"color-brand-primary": "#6cc4f0", "color-brand-content": "#6cc4f0"},
}
html_copy_source = False
html_show_sourcelink = False
pygments_dark_style = "github-dark"


def _add_menus(_: Sphinx, page: str, source: list[str]) -> None:
    for caption, pages in MENUS.get(page, {}).items():
        entries = "\n".join(f"/{each}" for each in pages if "*" not in each or any(ROOT.glob(f"{each}.md")))
        if entries:
            source[0] += f"\n\n:::{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{entries}\n:::\n"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_menus)
