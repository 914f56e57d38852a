"""The table of families in the documentation is what is found when each is built and recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from moescope.probes.families.support import as_markdown, support_table, supported_types

pytestmark = pytest.mark.slow  # every family is built and recorded
PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def table_of(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


@pytest.fixture(scope="module")
def found() -> str:
    return as_markdown(support_table())


def test_the_documented_table_is_what_recording_finds(found: str) -> None:
    documented, measured = table_of(PAGE.read_text()), table_of(found)
    assert documented == measured, "write it again: moescope doctor --families --format markdown"


def test_every_type_is_in_the_table_and_recorded_completely(found: str) -> None:
    rows = table_of(found)[2:]
    assert [row[0] for row in rows] == list(supported_types())
    assert {row[1] for row in rows} == {"complete"}


def test_every_rule_but_those_known_to_be_out_of_reach_is_verified(found: str) -> None:
    open_rules = {row[0] for row in table_of(found)[2:] if "no known rule" in row[4] or "no logits" in row[4]}
    # inkling weighs its experts together with the shared ones; doge's logits are product keys; NLLB's experts ignore theirs.
    assert open_rules == {"inkling_text", "doge", "nllb-moe"}
