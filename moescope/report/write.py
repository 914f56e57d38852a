"""`write_report`: one self-contained HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from moescope.core.analysis import SECTION_TITLES, Section, analyses
from moescope.core.atomic import written_whole
from moescope.core.errors import InputError
from moescope.core.html import cell, page, result_section
from moescope.core.result import Result
from moescope.core.text import escaped

if TYPE_CHECKING:
    from moescope.store.run import Run


# Sections that are not about routing; the others are what `analyze --all` reports.
_BESIDE_ROUTING = ("overview", "predictions", "residual", "phenomena")


def write_report(
    runs: Run | Sequence[Run],
    path: str | Path,
    *,
    part: Literal["all", "routing"] = "all",
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Write everything known about a run to one HTML file.

    First what was run and the coverage ledger, then every analysis that a report shows and that the run has the records for;
    at the end those it does not, with the reason. Figures are drawn by the results themselves.

    Args:
        runs: the run, or two runs to compare, the first being the one the other is held against; an incomplete one is
            reported too, and marked on every figure.
        path: where to write; ends in .html.
        part: "routing" leaves out what is not about routing.
        tell: called with the name of each analysis before it is computed.

    Raises:
        InputError: another ending, or a folder that is not there.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with ms.Store(folder / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     ms.write_report(run, folder / "report.html").name
        'report.html'
    """
    chosen = list(runs) if isinstance(runs, Sequence) else [runs]
    target = Path(path)
    if target.suffix != ".html":
        raise InputError("a report is an HTML file", expected="a path ending in .html", found=str(target))
    with written_whole(target) as partial:
        results, left_out = _results(chosen, part, tell or (lambda _: None))
        parts = [*map(_header, chosen), _findings(results)]
        for run in chosen:
            parts += [
                f"<h1>Coverage{f' of {escaped(run.name)}' * (len(chosen) > 1)}</h1>",
                result_section(run.coverage),
            ]
        for section in get_args(Section):
            if members := [r for s, r in results if s == section]:
                parts.append(f"<h1>{SECTION_TITLES[section]}</h1>")
                parts += [result_section(result) for result in members]
        parts.append(_left_out(left_out))
        partial.write_text(page(f"moescope: {', '.join(run.name for run in chosen)}", parts), encoding="utf-8")
    return target


def _results(
    runs: Sequence[Run], part: str, tell: Callable[[str], None]
) -> tuple[list[tuple[Section, Result]], list[tuple[str, str]]]:
    """Results for the report, each with its section, and what was left out, with the reason."""
    results: list[tuple[Section, Result]] = []
    left_out: list[tuple[str, str]] = []
    for analysis in sorted(analyses, key=lambda a: (a.order, a.name)):
        if analysis.section is None or analysis.runs != len(runs):
            continue
        if part == "routing" and analysis.section in _BESIDE_ROUTING:
            continue
        tell(analysis.name)
        try:
            results.append((analysis.section, analysis(runs, {}, allow_incomplete=True)))
        except InputError as reason:
            left_out.append((analysis.name, str(reason)))
    return results, left_out


def _header(run: Run) -> str:
    info, summary = run.info, run.info["summary"]
    settings, anatomy = info["settings"], info["anatomy"]
    routers = run.store.fetch(
        "SELECT count(*), max(n_experts), max(top_k) FROM layers WHERE run_id = ? AND kind = 'moe'", [run.run_id]
    )[0]
    experts = (
        f"{routers[0]} MoE layers of {routers[1]} experts, top-{routers[2]}"
        if routers[0]
        else "dense: no routers, no experts"
    )
    facts = {
        "Model": info["model"],
        "Revision": info["revision"] or "not known",
        "Architecture": f"{info['architecture']}, {anatomy.get('n_layers')} layers, {experts}",
        "Parameters": anatomy.get("parameters"),
        "Corpus": settings.get("corpus"),
        "Corpus fingerprint": info["corpus_fingerprint"],
        "Documents": summary.get("documents"),
        "Sequences": summary.get("sequences"),
        "Tokens": summary.get("tokens"),
        "Speed": f"{summary.get('tokens_per_second', 0):,.0f} tokens/s, records included",
        "Probes": ", ".join(settings.get("probes", [])),
        "Batches": f"{settings.get('batch_size')} sequences of at most {settings.get('max_length')} tokens",
        "Device and type": f"{settings.get('device')}, {settings.get('dtype')}, experts "
        f"{settings.get('experts')}, attention {settings.get('attention')}, {settings.get('threads')} threads",
        "Seed": info["seed"],
        "Versions": ", ".join(f"{k} {v}" for k, v in info["versions"].items()),
        "Recorded": f"{info['started_at']:%Y-%m-%d %H:%M} UTC",
        "Said on the way": _said(summary),
    }
    rows = "".join(f"<tr><th>{escaped(k)}</th><td class='cell'>{escaped(cell(v))}</td></tr>" for k, v in facts.items())
    warning = (
        ""
        if run.complete
        else (
            f"<p class='bad'><b>⚠ This run is {escaped(info['status'])}.</b> "
            f"{escaped(str(summary.get('stopped') or ''))} Numbers below rest on "
            "what was recorded; the ledger says what is missing.</p>"
        )
    )
    return f"<h1>Run {escaped(run.name)}</h1>{warning}<table>{rows}</table>"


def _said(summary: dict[str, object]) -> str:
    notes = []
    if count := summary.get("split_documents"):
        notes.append(f"{count} documents were longer than a sequence and split")
    if count := summary.get("single_token_sequences"):
        notes.append(f"{count} sequences have one token, which nothing predicts")
    if count := summary.get("skipped_records"):
        notes.append(f"{count} unreadable records were skipped, the first: {summary.get('first_skipped')}")
    return "; ".join(notes) or "nothing"


def _findings(results: list[tuple[Section, Result]]) -> str:
    """Every title with a link to its result, under the section it is in."""
    listed: dict[Section, str] = dict.fromkeys(get_args(Section), "")
    for section, result in results:
        listed[section] += f"<li><a href='#{escaped(result.name)}'>{escaped(result.title)}</a></li>"
    parts = [f"<h2>{SECTION_TITLES[section]}</h2><ul>{items}</ul>" for section, items in listed.items() if items]
    return "<h1>Findings</h1>" + "".join(parts)


def _left_out(left_out: list[tuple[str, str]]) -> str:
    if not left_out:
        return ""
    items = "".join(f"<li><b>{escaped(name)}</b>: {escaped(reason)}</li>" for name, reason in left_out)
    return f"<h1>Not in this report</h1><ul>{items}</ul>"
