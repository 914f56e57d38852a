"""The page of analyses says what the registry says."""

from __future__ import annotations

from pathlib import Path

from moescope.analysis_page import analyses_page
from moescope.core.analysis import SECTION_TITLES, analyses

PAGE = Path(__file__).resolve().parents[2] / "docs" / "analyses.md"


def test_the_page_is_the_registry_s() -> None:
    assert PAGE.read_text(encoding="utf-8") == analyses_page(), (
        "write it anew: moescope analyze --list --format markdown > docs/analyses.md"
    )


def test_every_analysis_has_a_place_on_it() -> None:
    page = analyses_page()
    for entry in analyses:
        assert page.count(f"### `{entry.name}`\n") == 1
        assert entry.section is None or f"## {SECTION_TITLES[entry.section]}\n" in page
