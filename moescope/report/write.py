"""`write_report`: everything known about runs in one file that opens offline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moescope.core.atomic import written_whole
from moescope.core.errors import InputError
from moescope.report.compose import Composed, Part, compose

if TYPE_CHECKING:
    from moescope.store.run import Run

_log = logging.getLogger(__name__)
ENDINGS = (".html", ".md")


def write_report(
    runs: Run | Sequence[Run],
    path: str | Path,
    *,
    part: Part = "all",
    thresholds: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Write everything known about a run, or about several, to one HTML or Markdown file.

    First what was run and whether it is whole; then every finding with its effect size, interval, chance level and distance
    from it, the largest first; then the coverage ledger and every analysis that a report shows and that the run has the
    records for; at the end those it does not, with the reason and the command that would fill them. Of two runs the first is
    the one the other is held against: what changed in configuration, every measure before and after. More runs stand side by
    side in a leaderboard. Every number can be held against the store again: `moescope report --check FILE`.

    Args:
        runs: a run, two to compare, or many; an incomplete one is reported too, and marked on every figure.
        path: where to write: .html for one file with its figures, .md for Markdown with a folder of PNG files beside it
            (`report_files` for report.md; without the `images` extra the tables alone).
        part: "routing" leaves out what is not about routing.
        thresholds: a YAML file of rules to judge as well; the report tells the verdicts.
        tell: called with the name of each analysis before it is computed.

    Raises:
        InputError: another ending, a folder that is not there, or a file of thresholds that cannot be read.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with ms.Store(folder / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     ms.write_report(run, folder / "report.html").name
        'report.html'
    """
    target = Path(path)
    check_ending(target)
    for note in save(composed(runs, target, part=part, thresholds=thresholds, tell=tell), target, tell=tell):
        _log.warning(note)
    return target


def composed(
    runs: Run | Sequence[Run],
    target: Path | None,
    *,
    part: Part = "all",
    thresholds: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Composed:
    """The report before it is written; `target` is looked at first, so that no work is done for nothing."""
    from moescope.report.thresholds.rules import read_rules

    if target is not None:
        check_target(target)
    rules = None if thresholds is None else read_rules(thresholds)
    chosen = list(runs) if isinstance(runs, Sequence) else [runs]
    return compose(chosen, part=part, rules=rules, tell=tell)


def save(report: Composed, target: Path, *, tell: Callable[[str], None] | None = None) -> list[str]:
    """Write a report to `target`, whole or not at all; what a reader must know of the files comes back."""
    if target.suffix == ".md":
        from moescope.report.markdown_files import save_markdown

        return save_markdown(report.document, target, tell=tell)
    from moescope.report.html_page import html_page

    with written_whole(target) as partial:
        partial.write_text(html_page(report.document), encoding="utf-8")
    return []


def check_ending(target: Path) -> None:
    """Raise `InputError` for a file that is neither HTML nor Markdown."""
    if target.suffix not in ENDINGS:
        raise InputError(
            "a report is an HTML or a Markdown file", expected="a path ending in .html or .md", found=str(target)
        )


def check_target(target: Path) -> None:
    """Raise `InputError` where a report could not be written, before any work."""
    check_ending(target)
    if target.is_dir():
        raise InputError(f"cannot write {target}", found="a folder of that name", fix="choose another name")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}", found="no such folder", fix=f"mkdir -p {target.parent}")
