"""The documents as data: tests find sections, code blocks and tables here, whichever page has them, and check them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES: dict[str, str] = {
    str(path.relative_to(ROOT)): path.read_text() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
}
"""Text of each page by its path."""

HISTORY = "CHANGELOG.md"
"""The one page that may use former names."""

CURRENT = {page: text for page, text in PAGES.items() if page != HISTORY}
INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
"""The instance that the documents use as an example."""

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced code block; `language` is empty if the fence names none."""

    page: str
    language: str
    text: str


class Command(NamedTuple):
    """One documented shell command, on one line, without its comment."""

    page: str
    text: str


BLOCKS = [Block(page, *found) for page, text in PAGES.items() for found in _BLOCK.findall(text)]


def blocks(language: str, page: str | None = None) -> list[str]:
    """Return the code blocks of a language, of all pages or of one."""
    return [each.text for each in BLOCKS if each.language == language and page in {None, each.page}]


def commands() -> list[Command]:
    """Return all shell commands of all pages, in the order of the pages."""
    found = []
    for block in BLOCKS:
        if block.language == "sh":
            lines = block.text.replace("\\\n", " ").splitlines()
            found += [Command(block.page, _without_comment(line)) for line in lines if _without_comment(line)]
    return found


def section(title: str) -> str:
    """Return the text below a heading of the second level, which exactly one page must have."""
    found = [text.split(f"\n## {title}\n")[1] for text in PAGES.values() if f"\n## {title}\n" in text]
    assert len(found) == 1, f"{len(found)} pages have a section {title}"
    return found[0].split("\n## ")[0]


def table(*header: str) -> list[list[str]]:
    """Return the cells of all tables with this header, row by row."""
    line = f"| {' | '.join(header)} |"
    rows = []
    for text in PAGES.values():
        for rest in f"\n{text}".split(f"\n{line}\n")[1:]:
            lines = rest.splitlines()
            assert re.fullmatch(r"\|(-+\|)+", lines[0]), lines[0]
            for row in lines[1:]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in row.strip("|").split("|")])
    assert rows, f"no page has a table {line}"
    return rows


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return _BLOCK.sub("", text)


def anchors(text: str) -> set[str]:
    """Return the fragments of a page's headings, as GitHub makes them for links."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s+)#\s.*$", "", line).strip()
