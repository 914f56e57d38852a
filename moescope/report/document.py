"""A report before it is a file: headings, paragraphs, tables and answers, the same for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moescope.core.result import Result

Tone = Literal["plain", "muted", "warning"]


@dataclass(frozen=True)
class Heading:
    """A heading; `anchor` names the place for links."""

    text: str
    anchor: str
    level: Literal[1, 2] = 1


@dataclass(frozen=True)
class Paragraph:
    """A few sentences."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, what it is sorted by, and the place it leads to.

    Attributes:
        text: as shown.
        order: a number to sort by; None sorts by the text.
        to: anchor of the place it links to.
        strong: marked, in bold.
    """

    text: str
    order: float | None = None
    to: str | None = None
    strong: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        columns: names; those in `numeric` stand to the right.
        rows: cells, as many a row as columns.
        sortable: whether a click on a column's name sorts by it.
        headless: label and value a row, without a line of names.
        kind: "measures" for the table of measures before and after, which a terminal shows narrower.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: frozenset[int] = frozenset()
    sortable: bool = False
    headless: bool = False
    kind: Literal["", "measures"] = ""


@dataclass(frozen=True)
class Answer:
    """One result: finding, figure, table, definition, query."""

    result: Result
    anchor: str
    title: str = ""

    @property
    def heading(self) -> str:
        """What it is called in the list of contents."""
        return self.title or self.result.name.replace("_", " ")


Block = Heading | Paragraph | Grid | Answer


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: of the page.
        blocks: in reading order.
        manifest: where every number comes from, as JSON data: what a check needs to compute the report again.
        facts: what a command says of the report: sections, findings, what was left out.
    """

    title: str
    blocks: Sequence[Block]
    manifest: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[Answer]:
        """Every answer, in order."""
        return [block for block in self.blocks if isinstance(block, Answer)]


def facts_grid(pairs: Sequence[tuple[str, str]]) -> Grid:
    """Label and value a row."""
    return Grid(("", ""), [(Cell(label), Cell(value)) for label, value in pairs], headless=True)
