"""`moescope analyze`: questions to recorded runs, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.completion import analysis_names, parameter_names, run_names
from moescope.cli.export import only_run
from moescope.cli.flags import OUTPUT, Rows, listed
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.stages import stages
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.analysis import Analysis
    from moescope.core.result import Result
    from moescope.store.run import Run

_ROWS = 20
_FORMATS = ("table", "csv", "json")


def analyze(
    store: Annotated[Path | None, typer.Argument(help="The store; --list needs none.", show_default=False)] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the run; twice for an analysis that compares two.",
            show_default="the only one",
            autocompletion=run_names,
        ),
    ] = None,
    analysis: Annotated[
        list[str] | None,
        typer.Option(
            help="Which analyses, comma-separated or repeated; --list shows them.",
            show_default="none",
            autocompletion=analysis_names,
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            help="Parameter of the analysis, name=value, repeatable.",
            show_default="what --list says",
            autocompletion=parameter_names,
        ),
    ] = None,
    format: Annotated[  # noqa: A002  the flag's name
        str, typer.Option(help="On stdout: table, csv or json; for --list also markdown.", rich_help_panel=OUTPUT)
    ] = "table",
    rows: Rows = _ROWS,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Also save: .html, .png, .svg, .csv, .parquet or .json for one analysis, .html for --all.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Every routing analysis that the run has the records for, as one HTML file.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List analyses, what they need and their parameters.")] = False,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Analyse a run whose ledger is not full; results say so.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Ask questions of recorded or imported runs.

    Example: moescope analyze runs.duckdb --run base --analysis local_consistency --param segment=16 --format csv

    Example: moescope analyze runs.duckdb --all --output routing.html
    """
    chosen_format = "json" if json else format
    known = ("table", "json", "markdown") if list_ else _FORMATS
    if chosen_format not in known:
        raise InputError(f"there is no format {chosen_format!r}", expected=", ".join(known))
    if list_:
        _list(chosen_format)
        return
    if store is None:
        raise InputError("no store is named", fix="moescope analyze runs.duckdb --analysis load, or --list")
    if all_ == bool(analysis):
        raise InputError("one of --analysis and --all is needed, and only one", fix="--list shows the analyses")
    if all_ and (param or rows != _ROWS or chosen_format == "csv"):
        ignored = "--param" if param else "--format csv" if chosen_format == "csv" else "--rows"
        raise InputError(f"{ignored} is for --analysis, and --all writes a report", fix=f"leave out {ignored}")
    from moescope.store.store import Store as OpenedStore

    with OpenedStore(store, read_only=True) as opened:
        runs = [opened.run(name) for name in run] if run else [only_run(opened, None)]
        if all_:
            _report(
                runs, output or Path("routing.html"), allow_incomplete=allow_incomplete, json=chosen_format == "json"
            )
            return
        _answer(runs, listed(analysis), param or [], chosen_format, rows, output, allow_incomplete=allow_incomplete)


def _answer(
    runs: Sequence[Run],
    names: Sequence[str],
    given: Sequence[str],
    format: str,  # noqa: A002  the flag's name
    rows: int,
    output: Path | None,
    *,
    allow_incomplete: bool,
) -> None:
    """Compute, save and print the analyses named."""
    from moescope.core.analysis import analyses

    wanted = [analyses[name] for name in names]
    if len(wanted) > 1 and (output or given):
        raise InputError(
            f"--{'output' if output else 'param'} is for one analysis, and {len(wanted)} are asked for",
            fix="ask for one at a time, or for --all",
        )
    parameters = dict(map(_pair, given))
    with stages("analysing") as tell:
        results = []
        for asked in wanted:
            tell(asked.name)
            results.append(asked(runs, parameters, allow_incomplete=allow_incomplete))
            if output:
                results[-1].save(output)
    if format == "json":
        as_json(results[0].as_json() if len(results) == 1 else [result.as_json() for result in results])
    for result in results:
        if format == "csv":
            said(result.df().to_csv(index=False), nl=False)
        elif format == "table":
            _print(result, rows)
    if output:
        news(f"saved {output}")


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise InputError(f"--param {text!r} is no parameter", expected="name=value, as in segment=16")
    return name.strip(), value.strip()


def _print(result: Result, rows: int) -> None:
    from moescope.core.html import cell

    said(f"{printable(result.title)}\n{printable(result.subtitle())}\n")
    told = [
        name
        for name, column in zip(result.table.column_names, result.table.columns, strict=True)
        if column.null_count < len(column)
    ]
    head = result.table.select(told).slice(0, rows)
    table(head.column_names, [[cell(value) for value in row.values()] for row in head.to_pylist()])
    if result.table.num_rows > rows:
        said(f"… {result.table.num_rows:,} rows in all; --format csv has them, --rows shows more")
    said("")
    facts(result.facts())


def _report(runs: Sequence[Run], output: Path, *, allow_incomplete: bool, json: bool) -> None:
    from moescope.core.errors import IncompleteError
    from moescope.report.write import write_report

    for run in runs:
        if not run.complete and not allow_incomplete:
            raise IncompleteError(f"run {run.name!r} is not complete", fix="--allow-incomplete analyses it as it is")
    with stages("analysing") as tell:
        written = write_report(runs, output, part="routing", tell=tell)
    summary = {"report": str(written), "bytes": written.stat().st_size}
    as_json(summary) if json else facts(summary)


def _list(format: str) -> None:  # noqa: A002  the flag's name
    from moescope.analysis_page import analyses_page
    from moescope.core.analysis import analyses

    if format == "json":
        as_json([_listed(entry) for entry in analyses])
        return
    if format == "markdown":
        said(analyses_page(), nl=False)
        return
    for entry in analyses:
        listed = _listed(entry)
        said(f"{entry.name}\n  {listed['answers']}")
        runs = f"; compares {entry.runs} runs" if entry.runs > 1 else ""
        said(f"  needs {', '.join(entry.needs) or 'nothing besides the run'}{runs}")
        for name, described in listed["parameters"].items():
            said(f"  --param {name}={described['default']}  ({described['takes']})")
        said("")


def _listed(entry: Analysis) -> dict[str, Any]:
    return {
        "name": entry.name,
        "answers": entry.summary,
        "needs": list(entry.needs),
        "runs": entry.runs,
        "parameters": {
            name: {"default": "none" if facts.default is None else facts.default, "takes": facts.describe()}
            for name, facts in entry.parameters.items()
        },
        "source": entry.source,
    }
