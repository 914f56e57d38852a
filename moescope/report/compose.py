"""What a report of one, two or many runs holds, computed; how it looks is the renderers' business."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moescope.core.analysis import SECTION_TITLES, Analysis, Section, analyses
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.versions import VERSION
from moescope.report.before_after import asked, effects_blocks, findings_blocks, linked, measures_blocks
from moescope.report.configuration import changed_settings, run_blocks
from moescope.report.document import Answer, Block, Document, Heading, Paragraph
from moescope.report.leaderboard import labels_of, leaderboard_blocks
from moescope.report.left_out import left_out_blocks, left_out_row
from moescope.report.summary import summary_blocks
from moescope.report.thresholds.judging import Verdict, judge
from moescope.report.thresholds.rules import Rules
from moescope.report.thresholds.verdicts import verdict_blocks
from moescope.store.run import Run

Part = Literal["all", "routing"]
Tell = Callable[[str], None]
# Sections that are not about routing; the others are what `analyze --all` reports.
_BESIDE_ROUTING = ("overview", "predictions", "residual", "phenomena")
FORMAT = 1


@dataclass(frozen=True)
class Composed:
    """A report and what its thresholds say."""

    document: Document
    verdicts: tuple[Verdict, ...] = ()


def compose(
    runs: Sequence[Run],
    *,
    part: Part = "all",
    rules: Rules | None = None,
    stores: Mapping[str, str] | None = None,
    tell: Tell | None = None,
) -> Composed:
    """Compute a report: of one run, of a base run and another, or of many side by side.

    Args:
        runs: the runs; of two, the first is the one the other is held against.
        part: "routing" leaves out what is not about routing.
        rules: thresholds to judge as well.
        stores: run_id → path of its store, as commands in the report name it; None for the paths as they were opened.
        tell: called with the name of what is computed.
    """
    if not runs:
        raise InputError("a report needs a run", fix="name one")
    say = tell or (lambda _: None)
    making = _one if len(runs) == 1 else _two if len(runs) == 2 else _many
    paths = stores or {run.run_id: str(run.store.path) for run in runs}
    middle, answers, left_out, facts = making(_Asked(runs, part, say, paths))
    verdicts: tuple[Verdict, ...] = ()
    facts_of = [block for number, run in enumerate(runs, 1) for block in run_blocks(run, anchor=f"run-{number}")]
    blocks: list[Block] = facts_of if len(runs) == 1 else _side_by_side(runs)
    if rules is not None:
        say("thresholds")
        verdicts = judge(rules, runs)
        blocks += verdict_blocks(verdicts)
    findings, told = summary_blocks(answers)
    # Of one run: what was run, then the findings. Of several: in what they differ first, and each one's facts after it.
    if len(runs) == 1:
        blocks += [*findings, *middle]
    else:
        blocks += [*middle, *findings, *facts_of]
    blocks += [*_ledgers(runs), *_sections(answers)]
    blocks += left_out_blocks(left_out, _other_reports(runs, paths))
    labels = labels_of(runs)
    facts |= {
        "runs": [{"name": label, "run_id": run.run_id, "store": str(run.store.path), "status": run.status}
                 for label, run in zip(labels, runs, strict=True)],
        "sections": [{"analysis": one.result.name, "section": one.anchor, "rows": one.result.table.num_rows} for one in answers],
        "findings": told,
        "left_out": left_out,
    }  # fmt: skip
    manifest = _manifest(runs, part, rules, answers, paths)
    return Composed(Document(f"moescope: {', '.join(labels)}", tuple(blocks), manifest, facts), verdicts)


def outline(runs: Sequence[Run], part: Part = "all") -> tuple[list[Analysis], list[dict[str, str]]]:
    """What a report would hold, without computing it: analyses with their records, and those without."""
    there: list[Analysis] = []
    without: list[dict[str, str]] = []
    for analysis in _applicable(min(len(runs), 2), part):
        lacking = sorted({table for run in runs for table in analysis.missing(run)})
        if lacking:
            paths = {run.run_id: str(run.store.path) for run in runs}
            without.append(left_out_row(analysis, runs, f"no rows in {', '.join(lacking)}", paths))
        else:
            there.append(analysis)
    return there, without


_Made = tuple[list[Block], list[Answer], list[dict[str, str]], dict[str, Any]]


@dataclass(frozen=True)
class _Asked:
    """What a report is composed of and for."""

    runs: Sequence[Run]
    part: Part
    say: Tell
    stores: Mapping[str, str]


def _one(asked_for: _Asked) -> _Made:
    answers, left_out = _answers(asked_for)
    return effects_blocks(asked_for.runs[0]), answers, left_out, {"kind": "run"}


def _two(asked_for: _Asked) -> _Made:
    runs, part, say = asked_for.runs, asked_for.part, asked_for.say
    first, second = runs
    answers, left_out = _answers(asked_for)
    before: list[dict[str, Result]] = []
    for run in runs:
        found: dict[str, Result] = {}
        for analysis in _applicable(1, part):
            if not any(analysis.missing(one) for one in runs):
                say(f"{analysis.name} of {run.name}")
                answer = asked(analysis, [run])
                if isinstance(answer, Result):
                    found[analysis.name] = answer
        before.append(found)
    blocks = changed_settings([first, second])
    blocks += measures_blocks(first, second, linked(answers, "compare_measures"))
    blocks += effects_blocks(first, second) if first.store is second.store else []
    blocks += findings_blocks(runs, before)
    return blocks, answers, left_out, {"kind": "comparison"}


def _many(asked_for: _Asked) -> _Made:
    runs, part, say = asked_for.runs, asked_for.part, asked_for.say
    say("leaderboard")
    blocks, data = leaderboard_blocks(runs)
    blocks += changed_settings(list(runs))
    answers: list[Answer] = []
    left_out: list[dict[str, str]] = []
    labels = labels_of(runs)
    for number, (label, other) in enumerate(zip(labels[1:], runs[1:], strict=True), 2):
        for analysis in _applicable(2, part):
            say(f"{analysis.name}: {labels[0]} → {label}")
            answer = asked(analysis, [runs[0], other])
            if isinstance(answer, str):
                reason = f"{labels[0]} → {label}: {answer}"
                left_out.append(left_out_row(analysis, [runs[0], other], reason, asked_for.stores))
            else:
                anchor = f"{analysis.name}-{number}"
                answers.append(Answer(answer, anchor, f"{analysis.name.replace('_', ' ')}: {label}"))
    return blocks, _in_order(answers), left_out, {"kind": "leaderboard", "leaderboard": data}


def _answers(asked_for: _Asked) -> tuple[list[Answer], list[dict[str, str]]]:
    runs = asked_for.runs
    answers: list[Answer] = []
    left_out: list[dict[str, str]] = []
    for analysis in _applicable(len(runs), asked_for.part):
        asked_for.say(analysis.name)
        answer = asked(analysis, runs)
        if isinstance(answer, str):
            left_out.append(left_out_row(analysis, runs, answer, asked_for.stores))
        else:
            answers.append(Answer(answer, analysis.name))
    return _in_order(answers), left_out


def _applicable(count: int, part: Part) -> list[Analysis]:
    known = [a for a in analyses if a.section is not None and a.runs == count]
    if part == "routing":
        known = [a for a in known if a.section not in _BESIDE_ROUTING]
    return sorted(known, key=lambda a: (a.order, a.name))


def _in_order(answers: list[Answer]) -> list[Answer]:
    places = list(get_args(Section))
    return sorted(answers, key=lambda answer: places.index(analyses[answer.result.name].section))


def _sections(answers: Sequence[Answer]) -> list[Block]:
    blocks: list[Block] = []
    last: Section | None = None
    for answer in answers:
        section = analyses[answer.result.name].section
        if section is not None and section != last:
            blocks.append(Heading(SECTION_TITLES[section], f"section-{section}"))
            last = section
        blocks.append(answer)
    return blocks


def _side_by_side(runs: Sequence[Run]) -> list[Block]:
    """Which runs, and whether they are whole."""
    labels = labels_of(runs)
    between = " → " if len(runs) == 2 else ", "
    blocks: list[Block] = [Heading(between.join(labels), "runs")]
    whole = [label for label, run in zip(labels, runs, strict=True) if run.complete]
    if len(whole) == len(runs):
        blocks.append(Paragraph("All of these runs are complete: every expected event was recorded.", "muted"))
    for label, run in zip(labels, runs, strict=True):
        if not run.complete:
            told = f"⚠ {label} is {run.status}: its numbers rest on what was recorded; its ledger says what is missing."
            blocks.append(Paragraph(told, "warning"))
    return blocks


def _ledgers(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    for number, (label, run) in enumerate(zip(labels_of(runs), runs, strict=True), 1):
        several = len(runs) > 1
        anchor = f"coverage-{number}" if several else "coverage"
        blocks += [Heading(f"Coverage of {label}" if several else "Coverage", f"ledger-{number}"),
                   Answer(run.coverage, anchor, f"coverage of {label}" if several else "coverage")]  # fmt: skip
    return blocks


def _other_reports(runs: Sequence[Run], stores: Mapping[str, str]) -> list[tuple[str, str]]:
    """Questions that another set of runs answers."""
    path = shlex.quote(stores[runs[0].run_id])
    if len(runs) == 1:
        mine = shlex.quote(runs[0].name)
        return [("how this run differs from another", f"moescope report {path} {mine} OTHER")]
    return [
        (f"everything known about {run.name}", f"moescope report {shlex.quote(stores[run.run_id])} {shlex.quote(run.name)}")
        for run in runs
    ]  # fmt: skip


def _manifest(
    runs: Sequence[Run], part: Part, rules: Rules | None, answers: Sequence[Answer], stores: Mapping[str, str]
) -> dict[str, Any]:
    """What a check needs to compute this report again, and where each result comes from."""
    return {
        "format": FORMAT,
        "moescope": VERSION,
        "part": part,
        "runs": [
            {
                "store": str(run.store.path.resolve()),
                "named": stores[run.run_id],
                "run_id": run.run_id,
                "name": run.name,
                "status": run.status,
            }
            for run in runs
        ],
        "thresholds": None if rules is None else rules.data(),
        "results": [_provenance(answer) for answer in answers],
    }


def _provenance(answer: Answer) -> Mapping[str, Any]:
    result = answer.result
    several = result.provenance.get("runs") or [result.provenance]
    return {
        "section": answer.anchor,
        "analysis": result.name,
        "parameters": dict(result.parameters),
        "runs": [run.get("run_id") for run in several],
    }
