"""The verdicts of thresholds as a table."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.core.html import cell
from moescope.report.document import Block, Cell, Grid, Heading, Paragraph, Tone
from moescope.report.thresholds.judging import Status, Verdict

_MARKS: dict[Status, str] = {"pass": "✓ pass", "fail": "✗ FAIL", "error": "⚠ ERROR", "skipped": "– skipped"}
COLUMNS = ("rule", "run", "verdict", "found", "bound", "where", "numbers over", "detail")


def verdict_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """A row a verdict, as text."""
    return [
        [
            one.rule.name,
            one.run or "—",
            _MARKS[one.status],
            cell(one.found),
            one.bound,
            one.where,
            f"{one.over:,} of {one.rows:,}" if one.rows else "—",
            one.detail,
        ]
        for one in verdicts
    ]


def counted(verdicts: Sequence[Verdict]) -> str:
    """How many rules passed, failed and so on, in words."""
    names: dict[Status, str] = {"pass": "hold", "fail": "fail", "error": "could not be judged", "skipped": "skipped"}
    parts = [f"{n} {word}" for status, word in names.items() if (n := sum(v.status == status for v in verdicts))]
    return f"Of {len(verdicts)} thresholds: {', '.join(parts)}."


def verdict_blocks(verdicts: Sequence[Verdict]) -> list[Block]:
    """The section of a report."""
    rows = [[Cell(text, strong=number == 2) for number, text in enumerate(row)] for row in verdict_rows(verdicts)]
    tone: Tone = "plain" if all(v.status in ("pass", "skipped") for v in verdicts) else "warning"
    return [
        Heading("Thresholds", "thresholds"),
        Paragraph(counted(verdicts), tone),
        Grid(COLUMNS, rows, frozenset((3,))),
    ]
