"""The lists of edits by family in the documentation are what is found when each type is built and tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moescope.probes.families.edit_families import as_markdown, edit_families, refusal_rows
from moescope.probes.families.support import supported_types

pytestmark = pytest.mark.slow  # every family is built and recorded
PAGE = Path(__file__).parents[3] / "docs" / "edit-families.md"
_MEASURED = re.compile(r"\(the nearest: .*?\)")  # shares of tokens, which differ a little between machines


@pytest.fixture(scope="module")
def found() -> dict:
    return edit_families()


def test_the_documented_lists_are_what_is_found(found: dict) -> None:
    documented = PAGE.read_text(encoding="utf-8")
    lists = documented[documented.index("These ") :]
    assert _MEASURED.sub("", lists) == _MEASURED.sub("", as_markdown(found)), (
        "write it again: moescope doctor --families --edits --format markdown"
    )


def test_every_type_is_looked_at_and_most_take_every_edit(found: dict) -> None:
    assert list(found) == list(supported_types())
    refused = {row[0] for row in refusal_rows(found)}
    assert {"qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3"}.isdisjoint(refused)
    assert {"nllb-moe", "switch_transformers"} <= refused, "two stacks see different tokens"


def test_every_refusal_has_a_reason(found: dict) -> None:
    for table in found.values():
        for support in table.values():
            assert support.works or support.reason
