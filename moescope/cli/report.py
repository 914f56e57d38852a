"""`moescope report`: everything known about runs in one file, thresholds for continuous integration, and a check of reports."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.completion import run_names
from moescope.cli.flags import DryRun, Json
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.stages import stages
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.report.thresholds.judging import Verdict
    from moescope.store.run import Run

Thresholds = Annotated[
    Path | None,
    typer.Option(
        help="A YAML file of rules to judge: 1 is left with where one fails, 2 where one could not be judged.",
        show_default="none",
    ),
]


def report(
    store: Annotated[
        Path | None, typer.Argument(help="The store; with --check, where it has moved to.", show_default=False)
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Argument(
            help="Runs, by name; other.duckdb:name for one of another store. One: everything known about it. Two: the second "
            "held against the first. More: side by side.",
            show_default="the only one",
            autocompletion=run_names,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where to write: .html, or .md with a folder of PNG files beside it.",
            show_default="report.html; nothing with --thresholds",
        ),
    ] = None,
    thresholds: Thresholds = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Compute this report again from its store and compare every number it shows; 1 is left with where one differs.",
            show_default="none",
        ),
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write everything known about one run, two or many to one file, or check such a file against its store.

    Example: moescope report runs.duckdb base --output report.html

    Example: moescope report runs.duckdb base cut --output changed.md

    Example: moescope report runs.duckdb base --thresholds limits.yaml

    Example: moescope report --check report.html
    """
    if check is not None:
        if run or output or thresholds or dry_run:
            raise InputError("--check reads a report and writes nothing", fix="leave out runs and the other flags")
        _check(check, store, json=json)
        return
    if store is None:
        raise InputError("no store is named", fix="moescope report runs.duckdb base, or --check report.html")
    from moescope.report.choosing import chosen_runs
    from moescope.report.write import check_target

    target = output or (None if thresholds else Path("report.html"))
    if target is not None:
        check_target(target)
    with ExitStack() as stack:
        runs = chosen_runs(store, run or [], stack)
        if dry_run:
            _outline(runs, target, thresholds, json=json)
            return
        code = told_report(runs, target, thresholds, json=json)
    if code:
        raise typer.Exit(code)


def told_report(runs: Sequence[Run], target: Path | None, thresholds: Path | None, *, json: bool) -> int:
    """Compose, write and judge; say what came of it, and give the exit code."""
    from moescope.report.thresholds.judging import exit_code, judge
    from moescope.report.thresholds.rules import read_rules

    told: dict[str, Any] = {}
    verdicts: tuple[Verdict, ...] = ()
    if target is None:
        assert thresholds is not None
        rules = read_rules(thresholds)
        with stages("judging"):
            verdicts = judge(rules, runs)
    else:
        told, verdicts = _written(runs, target, thresholds)
    if json:
        as_json(told | ({"thresholds": [one.data() for one in verdicts]} if thresholds else {}))
    else:
        if told:
            counted = {name.replace("_", " "): len(told[name]) for name in ("sections", "findings", "left_out")}
            facts({key: told[key] for key in ("report", "bytes", "kind")} | counted)
        if thresholds:
            tell_verdicts(verdicts)
    unfinished = tell_unfinished(runs, verdicts)
    return exit_code(verdicts) or unfinished


def tell_unfinished(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> int:
    """Say which runs are not whole, baselines of rules among them; 3 where there is one, else 0."""
    names = [run.name for run in runs if not run.complete] + [one.incomplete for one in verdicts if one.incomplete]
    if names:
        news(f"not complete: {', '.join(dict.fromkeys(names))}; numbers rest on what was recorded")
    return 3 if names else 0


def _written(runs: Sequence[Run], target: Path, thresholds: Path | None) -> tuple[dict[str, Any], tuple[Verdict, ...]]:
    from moescope.report.write import composed, save

    with stages("reporting") as tell:
        done = composed(runs, target, thresholds=thresholds, tell=tell)
        notes = save(done, target, tell=tell)
    for note in notes:
        news(note)
    told = {"report": str(target), "bytes": target.stat().st_size, **done.document.facts}
    return told, done.verdicts


def tell_verdicts(verdicts: Sequence[Verdict]) -> None:
    """The verdicts as a table, and how many there are of each."""
    from moescope.report.thresholds.verdicts import COLUMNS, counted, verdict_rows

    table(COLUMNS, verdict_rows(verdicts))
    news(counted(verdicts))


def _outline(runs: Sequence[Run], target: Path | None, thresholds: Path | None, *, json: bool) -> None:
    from moescope.report.compose import outline
    from moescope.report.thresholds.rules import read_rules

    there, without = outline(runs)
    told: dict[str, Any] = {
        "report": None if target is None else str(target),
        "runs": [run.name for run in runs],
        "thresholds": 0 if thresholds is None else len(read_rules(thresholds).rules),
        "sections": [{"analysis": one.name, "section": one.section} for one in there],
        "left_out": without,
    }
    if json:
        as_json(told)
        return
    table(
        ("analysis", "section", "in the report", "what would fill it"),
        [
            *([one.name, str(one.section), "yes", ""] for one in there),
            *([one["analysis"], "", f"no: {one['reason']}", one["command"]] for one in without),
        ],
    )


def _check(path: Path, store: Path | None, *, json: bool) -> None:
    from moescope.report.check import check_report

    with stages("checking") as tell:
        done = check_report(path, store=store, tell=tell)
    if json:
        as_json(
            {
                "report": str(path),
                "holds": not done.differences,
                "pieces": done.pieces,
                "numbers": done.numbers,
                "differences": [vars(one) for one in done.differences],
                "notes": list(done.notes),
            }
        )
    else:
        if done.differences:
            table(
                ("section", "place", "the report says", "the store says"),
                [[one.section, one.place, _short(one.report), _short(one.store)] for one in done.differences],
            )
        found = f"{len(done.differences):,} differ" if done.differences else "all as the store has them"
        said(printable(f"{path}: {done.numbers:,} numbers in {done.pieces:,} pieces, {found}"))
        for note in done.notes:
            news(note)
    if done.differences:
        raise typer.Exit(1)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
