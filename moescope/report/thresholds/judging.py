"""Rules judged against runs: each passes, fails, is skipped, or is an error; never a silent pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moescope.core.analysis import analyses
from moescope.core.errors import InputError, NotRecordedError
from moescope.core.result import Result
from moescope.report.leaderboard import labels_of
from moescope.report.table_rows import key_columns, same_row, where_words
from moescope.report.thresholds.rules import Rule, Rules
from moescope.store.run import Run

Status = Literal["pass", "fail", "error", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """What became of a rule for one run.

    Attributes:
        rule, run: which.
        status: whether every number that the rule is about holds.
        found: the number that is furthest over its bound, or nearest to it; None without one.
        bound: the bounds in words.
        where: what that number is about.
        rows, over: how many numbers the rule is about, and how many break it.
        detail: what else a reader must know, as why it is an error.
        incomplete: name of the baseline, where that is not complete.
    """

    rule: Rule
    run: str
    status: Status
    found: float | None = None
    bound: str = ""
    where: str = ""
    rows: int = 0
    over: int = 0
    detail: str = ""
    incomplete: str = ""

    def data(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "rule": self.rule.name,
            "analysis": self.rule.analysis,
            "metric": self.rule.metric,
            "run": self.run,
            "status": self.status,
            "found": self.found,
            "bound": self.bound,
            "where": self.where,
            "rows": self.rows,
            "over": self.over,
            "detail": self.detail,
            "incomplete": self.incomplete,
            "line": self.rule.line,
        }


def judge(rules: Rules, runs: Sequence[Run]) -> tuple[Verdict, ...]:
    """Judge every rule for every run that it is about.

    Args:
        rules: read with `read_rules`.
        runs: what is judged; the baseline is among them or in the first one's store. Without a baseline named, the first
            run is it where there are several.
    """
    answers: dict[tuple[str, ...], Result | InputError] = {}
    verdicts: list[Verdict] = []
    for rule in rules.rules:
        two = analyses[rule.analysis].runs == 2
        try:
            baseline = _baseline(rule, rules, runs) if two or rule.of_change else None
        except InputError as wrong:
            verdicts.append(Verdict(rule, "", "error", bound=rule.bound, detail=str(wrong)))
            continue
        chosen = [
            (run, label)
            for run, label in zip(runs, labels_of(runs), strict=True)
            if (not rule.run or {run.name, label} & set(rule.run))
            and not (baseline is not None and _same(run, baseline))
        ]
        known = {run.name for run in runs} | set(labels_of(runs))
        absent = [f"of the runs judged none is called {name}" for name in rule.run if name not in known]
        if not chosen and not absent:
            absent = ["no run besides the baseline"]
        verdicts += [Verdict(rule, "", "error", bound=rule.bound, detail=why) for why in absent]
        verdicts += [_marked(_verdict(rule, run, label, baseline, answers), baseline) for run, label in chosen]
    return tuple(verdicts)


def _marked(verdict: Verdict, baseline: Run | None) -> Verdict:
    """A verdict that says so where its baseline is not whole."""
    if baseline is None or baseline.complete:
        return verdict
    said = f"baseline {baseline.name} is incomplete"
    detail = f"{verdict.detail}; {said}" if verdict.detail else said
    return dataclasses.replace(verdict, detail=detail, incomplete=baseline.name)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """2 where a rule could not be judged, else 1 where one fails, else 0."""
    states = {verdict.status for verdict in verdicts}
    return 2 if "error" in states else 1 if "fail" in states else 0


def _same(run: Run, other: Run) -> bool:
    return run.run_id == other.run_id


def _baseline(rule: Rule, rules: Rules, runs: Sequence[Run]) -> Run:
    name = rule.baseline or rules.baseline
    if name is None:
        if len(runs) < 2:
            raise InputError(
                "the rule needs a baseline run", fix="name one: baseline: NAME, in the rule or above the rules"
            )
        return runs[0]
    for run, label in zip(runs, labels_of(runs), strict=True):
        if name in (run.name, label):
            return run
    try:
        return runs[0].store.run(name)
    except InputError as gone:  # which names the store and what else is in it: both may change, and a check compares
        raise InputError(f"the first run's store has no run called {name!r}") from gone


def _verdict(rule: Rule, run: Run, label: str, baseline: Run | None, answers: dict[Any, Any]) -> Verdict:
    try:
        two = analyses[rule.analysis].runs == 2
        pair = [baseline, run] if two and baseline is not None else [run]
        result = _answer(rule, pair, answers)
        rows = _matching(rule, result)
        other = _answer(rule, [baseline], answers) if rule.of_change and not two and baseline is not None else None
        if rule.of_change and two:
            raise InputError(
                f"{rule.analysis} compares two runs already",
                fix="bound its own numbers: max or min instead of max_change",
            )
        return _judged(rule, label, rows, key_columns(result.table), other)
    except NotRecordedError as missing:
        if rule.missing == "skip":
            return Verdict(rule, label, "skipped", bound=rule.bound, detail=missing.problem)
        return Verdict(rule, label, "error", bound=rule.bound, detail=str(missing))
    except InputError as wrong:
        return Verdict(rule, label, "error", bound=rule.bound, detail=str(wrong))


def _answer(rule: Rule, runs: Sequence[Run], answers: dict[Any, Any]) -> Result:
    key = (rule.analysis, *sorted(f"{k}={v!r}" for k, v in rule.parameters.items()), *(run.run_id for run in runs))
    if key not in answers:
        try:
            answers[key] = analyses[rule.analysis](list(runs), rule.parameters, allow_incomplete=True)
        except InputError as reason:
            answers[key] = reason
    found = answers[key]
    if isinstance(found, InputError):
        raise found
    assert isinstance(found, Result)
    return found


def _matching(rule: Rule, result: Result) -> list[dict[str, Any]]:
    """The rows that a rule is about; raises `InputError` where there is none, saying what there is."""
    table = result.table
    for column in (rule.judge, *rule.where):
        if column not in table.column_names:
            raise InputError(f"{rule.analysis} has no column {column!r}", expected=", ".join(table.column_names))
    rows: list[dict[str, Any]] = table.to_pylist()
    if "metric" in table.column_names:
        metrics = list(dict.fromkeys(str(row["metric"]) for row in rows))
        if rule.metric is None and len(metrics) > 1:
            raise InputError(
                f"{rule.analysis} has several metrics, and the rule names none", expected=", ".join(metrics)
            )
        if rule.metric is not None and rule.metric not in metrics:
            raise InputError(
                f"{rule.analysis} has no metric {rule.metric!r}", expected=", ".join(metrics) or "no rows at all"
            )
        rows = [row for row in rows if rule.metric is None or row["metric"] == rule.metric]
    elif rule.metric is not None:
        raise InputError(f"{rule.analysis} has no column of metrics", fix="leave metric out")
    for column, wanted in rule.where.items():
        there = list(dict.fromkeys(row[column] for row in rows))
        if absent := [value for value in wanted if not any(_equal(value, one) for one in there)]:
            some = ", ".join(map(str, there[:12])) + (", …" if len(there) > 12 else "")
            raise InputError(f"no row has {column} {absent[0]!r}", expected=some or "no rows are left")
        rows = [row for row in rows if any(_equal(value, row[column]) for value in wanted)]
    if not rows:
        raise InputError(
            "the rule matches nothing", fix="a rule that is about no number never passes: widen its selectors"
        )
    return rows


def _equal(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, bool) != isinstance(found, bool) and not isinstance(wanted, str):
        return False  # True == 1
    return bool(wanted == found or (isinstance(wanted, str) and wanted == str(found)))


def _judged(
    rule: Rule, label: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], other: Result | None
) -> Verdict:
    worst: tuple[float, float, str] | None = None
    over = 0
    for row in rows:
        number = _number(rule, row, keys)
        before = None if other is None else _before(rule, row, keys, other)
        slack = _slack(rule, number, before)
        over += slack < 0
        told = number if before is None else number - before
        if worst is None or slack < worst[0]:
            worst = (slack, told, where_words(dict(row), keys))
    assert worst is not None
    changed = " (change)" if other is not None else ""
    return Verdict(
        rule, label, "fail" if over else "pass", worst[1], rule.bound, worst[2] + changed, len(rows), over,
        "" if rule.judge == "value" else f"judged by {rule.judge}",
    )  # fmt: skip


def _number(rule: Rule, row: Mapping[str, Any], keys: Sequence[str]) -> float:
    value = row[rule.judge]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        where = where_words(dict(row), keys)
        raise InputError(
            f"{rule.judge} is no number{' at ' + where if where else ''}",
            found=repr(value),
            fix="leave such rows out with where",
        )
    return float(value)


def _before(rule: Rule, row: Mapping[str, Any], keys: Sequence[str], other: Result) -> float:
    before = same_row(dict(row), keys, other)
    if before is None:
        raise InputError(f"the baseline has no such number: {where_words(dict(row), keys) or rule.metric}")
    return _number(rule, before, keys)


def _slack(rule: Rule, number: float, before: float | None) -> float:
    """How far a number is inside its nearest bound; negative outside."""
    slacks = []
    if rule.max is not None:
        slacks.append(rule.max - number)
    if rule.min is not None:
        slacks.append(number - rule.min)
    if before is not None:
        change = number - before
        for bound, moved in ((rule.max_change, abs(change)), (rule.max_rise, change), (rule.max_fall, -change)):
            if bound is not None:
                allowed = float(bound[:-1]) / 100 * abs(before) if isinstance(bound, str) else bound
                slacks.append(allowed - moved)
    return min(slacks)
