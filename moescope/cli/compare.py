"""`moescope compare`: in what runs differ, on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.completion import run_names
from moescope.cli.flags import Json
from moescope.cli.output import as_json, news, printable, said, table
from moescope.cli.report import Thresholds, tell_unfinished, tell_verdicts, told_report
from moescope.cli.stages import stages
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.report.document import Block, Grid
    from moescope.store.run import Run

_BEYOND, _CONTROLS, _UNIT = 6, 7, 8
"""Places of columns in the table of measures: some columns are called as the runs are."""


def compare(
    store: Annotated[Path, typer.Argument(help="The store, a DuckDB file.", show_default=False)],
    run: Annotated[
        list[str],
        typer.Argument(
            help="Two runs, the first being the one the other is held against, or more, side by side; other.duckdb:name for a "
            "run of another store.",
            show_default=False,
            autocompletion=run_names,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Write the whole report here as well: .html or .md.", show_default="no report"),
    ] = None,
    thresholds: Thresholds = None,
    json: Json = False,
) -> None:
    """Tell in what runs differ: settings, and every measure with its difference and interval.

    Example: moescope compare runs.duckdb base cut

    Example: moescope compare runs.duckdb base cut --thresholds limits.yaml --output changed.html
    """
    from moescope.report.choosing import chosen_runs
    from moescope.report.write import check_target

    if len(run) < 2:
        raise InputError(
            "a comparison takes two runs or more", found=f"{len(run)}", fix="moescope report tells of one run"
        )
    if output is not None:
        check_target(output)
    with ExitStack() as stack:
        runs = chosen_runs(store, run, stack)
        told = _told if output is None else partial(told_report, target=output)
        code = told(runs, thresholds=thresholds, json=json)
    if code:
        raise typer.Exit(code)


def _told(runs: Sequence[Run], thresholds: Path | None, *, json: bool) -> int:
    from moescope.report.configuration import changed_settings
    from moescope.report.leaderboard import labels_of
    from moescope.report.thresholds.judging import exit_code, judge
    from moescope.report.thresholds.rules import read_rules

    rules = None if thresholds is None else read_rules(thresholds)
    with stages("comparing"):
        changed = changed_settings(list(runs))
        blocks, data = _measures(runs)
        verdicts = () if rules is None else judge(rules, runs)
    if json:
        as_json(
            {"runs": labels_of(runs), "configuration": _as_data(changed), **data}
            | ({} if rules is None else {"thresholds": [one.data() for one in verdicts]})
        )
    else:
        for block in [*changed, *blocks]:
            _print(block)
        if rules is not None:
            tell_verdicts(verdicts)
    unfinished = tell_unfinished(runs, verdicts)
    return exit_code(verdicts) or unfinished


def _measures(runs: Sequence[Run]) -> tuple[list[Block], dict[str, Any]]:
    if len(runs) > 2:
        from moescope.report.leaderboard import leaderboard_blocks

        blocks, board = leaderboard_blocks(runs)
        return blocks, {"leaderboard": board}
    from moescope.core.analysis import analyses
    from moescope.report.before_after import asked, measures_blocks

    answer = asked(analyses["compare_measures"], runs)
    if isinstance(answer, str):
        raise InputError(answer)
    return measures_blocks(runs[0], runs[1], answer), {"measures": answer.as_json()}


def _as_data(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """A setting and its values, one a run, in the order of the runs."""
    from moescope.report.document import Grid

    grids = [block for block in blocks if isinstance(block, Grid)]
    return [{"setting": row[0].text, "values": [cell.text for cell in row[1:]]} for grid in grids for row in grid.rows]


def _print(block: Block) -> None:
    from moescope.report.document import Grid, Heading, Paragraph

    if isinstance(block, Heading):
        said(f"\n{printable(block.text)}")
    elif isinstance(block, Paragraph):
        news(block.text)
    elif isinstance(block, Grid):
        columns, rows = _narrow(block)
        table(columns, rows)


def _narrow(grid: Grid) -> tuple[Sequence[str], list[list[str]]]:
    """A table as a terminal shows it: of measures the unit beside the name, verdicts as their mark, controls below."""
    columns, rows = list(grid.columns), [[cell.text for cell in row] for row in grid.rows]
    if grid.kind != "measures":
        return columns, rows
    for row in rows:
        if row[_CONTROLS] != "—":
            news(f"{row[0]}: controls {row[_CONTROLS]}")
        row[0], row[_BEYOND] = f"{row[0]}, {row[_UNIT]}", row[_BEYOND].partition(" ")[0]
    columns[_BEYOND] = ""
    news("● the interval leaves 0 out, ○ it holds 0 or the change is rounding")
    return columns[:_CONTROLS], [row[:_CONTROLS] for row in rows]
