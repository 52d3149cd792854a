"""Test that the stable surface, as documented, is that of the code: a name cannot vanish or change unnoticed."""

from __future__ import annotations

from tests.documents import PAGES
from tests.surface import HEADING, surface, table


def test_documented_surface_is_the_codes() -> None:
    """After an intended change: `python -m tests.surface`, and a line in the changelog."""
    documented = PAGES["docs/compatibility.md"].split(f"\n{HEADING}\n")[1]
    assert table() in documented
    assert documented.count("\n|") == len(list(surface())) + 2, "no row that the code does not have"


def test_no_kind_of_name_is_empty() -> None:
    for kind, found in surface():
        assert found, kind
        assert len(found) == len(set(found)), kind
