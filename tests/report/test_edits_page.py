"""The page of edits is written from the registry, and says what every field does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moescope.cli.app import app
from moescope.core.edit import Edit, edits
from moescope.edit_page import edits_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "edits.md"


def test_page_in_docs_is_the_one_the_registry_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == edits_page(), (
        "write it anew: moescope intervene edits --format markdown > docs/edits.md"
    )


@pytest.mark.parametrize("kind", list(edits), ids=lambda kind: kind.kind)
def test_every_field_of_a_kind_is_described(kind: type[Edit]) -> None:
    entry = edits_page().split(f"\n## `{kind.kind}`\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in entry.splitlines() if line.startswith("- ")]
    shared = {field.name for field in dataclasses.fields(Edit)}
    own = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
    assert [line.split("`")[1] for line in lines] == own
    assert all(line.split(": ", 1)[1].strip() for line in lines)


def test_command_prints_the_page() -> None:
    printed = CliRunner().invoke(app, ["intervene", "edits", "--format", "markdown"])
    assert printed.exit_code == 0
    assert printed.stdout == edits_page()
