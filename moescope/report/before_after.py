"""A base run against another: every measure before and after, with difference, interval and controls where they exist."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from moescope.core.errors import InputError
from moescope.core.html import cell
from moescope.core.result import Result
from moescope.report.document import Answer, Block, Cell, Grid, Heading, Paragraph
from moescope.report.leaderboard import labels_of
from moescope.report.summary import at_the_median, span
from moescope.report.table_rows import key_columns, same_row, where_words
from moescope.routing.comparison.compare_measures import moved
from moescope.routing.effects.metric_names import metric_name
from moescope.routing.effects.stored_effects import subject
from moescope.routing.findings import finding, in_order
from moescope.store.run import Run

_EFFECTS = """
    SELECT
        effect_id::VARCHAR AS effect_id,
        max(run_id::VARCHAR) AS run_id,
        max(intervention::VARCHAR) FILTER (kind = 'target') AS intervention,
        metric,
        max(value) FILTER (kind = 'target') AS value,
        max(ci_low) FILTER (kind = 'target') AS ci_low,
        max(ci_high) FILTER (kind = 'target') AS ci_high,
        avg(value) FILTER (kind = 'control') AS control,
        min(value) FILTER (kind = 'control') AS control_low,
        max(value) FILTER (kind = 'control') AS control_high,
        count(*) FILTER (kind = 'control') AS controls,
        max(unit) AS unit
    FROM effects
    WHERE base_run_id = $run AND group_kind = 'all' AND NOT starts_with(metric, 'base_')
    GROUP BY effect_id, metric
    HAVING count(*) FILTER (kind = 'target') = 1
    ORDER BY effect_id, metric
"""
_NONE = "—"


def measures_blocks(run: Run, other: Run, measures: Result | None) -> list[Block]:
    """The table of measures; `measures` is the answer of `compare_measures`, None where it has none."""
    blocks: list[Block] = [Heading("Measures before and after", "measures")]
    if measures is None:
        return [*blocks, Paragraph("The runs share no measure; the end of this report says why.")]
    units = {name.removeprefix("value[").removesuffix("]"): unit for name, unit in measures.units.items()}
    controls = _controls(run, other)
    columns = (
        "measure",
        *labels_of([run, other]),
        "difference",
        "95 % interval",
        "% of first",
        "beyond",
        "controls",
        "unit",
    )
    rows = [_measure(row, units, controls) for row in measures.table.to_pylist()]
    blocks += [
        Grid(columns, rows, frozenset((1, 2, 3, 4, 5)), sortable=True, kind="measures"),
        Paragraph(f"Interval: {measures.interval}. {' '.join(measures.notes)}", "muted"),
    ]
    told = (
        "Controls: mean, smallest and largest of matched random controls of the same size, from the effect that was measured "
        "with this intervention on the first run."
        if controls
        else "No controls: the store has no effect of this intervention on the first run (moescope intervene effect measures "
        "one, with matched random controls)."
    )
    return [*blocks, Paragraph(told, "muted")]


def _measure(row: dict[str, Any], units: dict[str, str], controls: dict[str, str]) -> list[Cell]:
    low, high = row["ci_low"], row["ci_high"]
    judged = low is not None and low == low  # noqa: PLR0124  a NaN differs from itself
    apart = judged and not low <= 0 <= high
    more = bool(moved(row["value"], math.nan if row["relative"] is None else row["relative"]))
    verdict = "● interval leaves 0 out" if apart and more else "○ rounding only" if apart else "○ interval holds 0"
    relative = row["relative"]
    percent = None if relative is None or relative != relative else 100 * relative  # noqa: PLR0124  as above
    return [
        Cell(row["metric"], to="compare_measures"),
        Cell(cell(row["value_a"]), row["value_a"]),
        Cell(cell(row["value_b"]), row["value_b"]),
        Cell(cell(row["value"]), row["value"]),
        Cell(span(low, high)),
        Cell(cell(percent), percent),
        Cell(verdict if judged else _NONE),
        Cell(controls.get(row["metric"], _NONE)),
        Cell(units.get(row["metric"], "")),
    ]


def _controls(run: Run, other: Run) -> dict[str, str]:
    """Measure → what matched controls did to it, from an effect of the other run's intervention on the first."""
    if run.store is not other.store:
        return {}
    mine = [
        row for row in stored_effects(run) if _is_of(row, other) and row["metric"] == "delta_nll" and row["controls"]
    ]
    if not mine:
        return {}
    row = mine[-1]
    text = f"{cell(row['control'])} ({span(row['control_low'], row['control_high'])}; {row['controls']} controls)"
    return {"mean NLL": text}


def _is_of(row: dict[str, Any], other: Run) -> bool:
    if row["run_id"] == other.run_id:
        return True
    edits = other.info["intervention"].get("edits")
    return bool(edits) and json.loads(row["intervention"] or "{}").get("edits") == edits


def stored_effects(run: Run) -> list[dict[str, Any]]:
    """Every effect measured against a run, metric by metric, with its controls."""
    rows: list[dict[str, Any]] = run.sql(_EFFECTS).to_arrow_table().to_pylist()
    return rows


def effects_blocks(run: Run, other: Run | None = None, *, most: int = 60) -> list[Block]:
    """Interventions measured against a run, the whole of them or those of one other run, beside their controls."""
    rows = [row for row in stored_effects(run) if other is None or _is_of(row, other)]
    if not rows:
        return []
    shown = rows[:most]
    grid = Grid(
        ("intervention", "measure", "change", "95 % interval", "controls: mean", "smallest to largest", "against controls", "unit"),
        [_effect(row) for row in shown],
        frozenset((2, 3, 4, 5)),
        sortable=True,
    )  # fmt: skip
    blocks: list[Block] = [Heading(f"Interventions measured against {run.name}", "measured-effects"), grid]
    if len(rows) > most:
        blocks.append(Paragraph(f"{most} of {len(rows):,} rows; the analysis effects ranks them all.", "muted"))
    return blocks


def _effect(row: dict[str, Any]) -> list[Cell]:
    verdict = _NONE
    if row["controls"]:
        outside = not row["control_low"] <= row["value"] <= row["control_high"]
        verdict = f"{'● outside' if outside else '○ within'} the range of {row['controls']}"
    return [
        Cell(subject(str(row["intervention"]))),
        Cell(metric_name(row["metric"])),
        Cell(cell(row["value"]), row["value"]),
        Cell(span(row["ci_low"], row["ci_high"])),
        Cell(cell(row["control"]), row["control"]),
        Cell(span(row["control_low"], row["control_high"])),
        Cell(verdict),
        Cell(str(row["unit"])),
    ]


def findings_blocks(runs: Sequence[Run], answers: Sequence[dict[str, Result]]) -> list[Block]:
    """What each analysis of one run found in both: the number at the first run's median, and the same number of the other."""
    found = in_order([finding(result) for name, result in answers[0].items() if name in answers[1]])
    rows = []
    for one in found:
        middle = at_the_median(one)
        if middle is None:
            continue
        keys = key_columns(one.result.table)
        other = same_row(middle, keys, answers[1][one.result.name])
        after = None if other is None else other["value"]
        change = None if after is None else after - middle["value"]
        rows.append(
            [
                Cell(one.result.name.replace("_", " ")),
                Cell(", ".join(part for part in (str(one.metric), where_words(middle, keys)) if part)),
                Cell(cell(middle["value"]), middle["value"]),
                Cell(span(middle["ci_low"], middle["ci_high"])),
                Cell(cell(after), after),
                Cell(_NONE if other is None else span(other.get("ci_low"), other.get("ci_high"))),
                Cell(cell(change), change),
                Cell(cell(middle["null"]), middle["null"]),
                Cell(one.unit),
            ]
        )
    if not rows:
        return []
    first, second = labels_of(runs)
    columns = (
        "analysis",
        "number",
        first,
        f"interval, {first}",
        second,
        f"interval, {second}",
        "difference",
        "chance in first",
        "unit",
    )
    return [
        Heading("Findings before and after", "findings-before-after"),
        Paragraph(
            "Of every analysis of one run with a chance level: the number at the first run's median distance from chance, and the "
            "same number of the other run. Intervals are each run's own: that they overlap does not say that nothing changed, and "
            "the difference has no interval here.",
            "muted",
        ),
        Grid(columns, rows, frozenset((2, 3, 4, 5, 6, 7)), sortable=True),
    ]  # fmt: skip


def asked(analysis: Any, runs: Sequence[Run]) -> Result | str:
    """An analysis' answer, or why there is none."""
    try:
        result: Result = analysis(list(runs), {}, allow_incomplete=True)
    except InputError as reason:
        return str(reason)
    return result


def linked(answers: Sequence[Answer], name: str) -> Result | None:
    """The answer of an analysis among those of a report."""
    return next((answer.result for answer in answers if answer.result.name == name), None)
