"""Which rule calls which heads what, from the scores of a run, and how the roles overlap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from moescope.dashboard.phenomena_page.head_scores import Head
from moescope.store.run import Run

_SQL = """
    SELECT layer, block, head, metric, value
    FROM heads
    WHERE run_id = $run AND condition = 'base' AND list_contains($metrics, metric) AND isfinite(value)
"""


@dataclass(frozen=True)
class Rule:
    """A rule that gives a head a role: a metric over a threshold.

    Attributes:
        role: what it calls a head.
        metric: as it stands in `heads`.
        threshold: the value from which (or over which) it does.
        strict: over the threshold, not from it.
        source: who published it.
    """

    role: str
    metric: str
    threshold: float
    strict: bool
    source: str

    @property
    def words(self) -> str:
        """The rule as a comparison."""
        return f"{'>' if self.strict else '≥'} {self.threshold:g}"


RULES = (
    Rule("attention sink", "sink_alpha_0", 0.3, True, "α₀ over the first 64 tokens, arXiv 2410.10781"),
    Rule("retrieval head", "retrieval score", 0.1, False, "arXiv 2404.15574"),
    Rule("strong retrieval head", "retrieval score", 0.5, False, "arXiv 2404.15574"),
    Rule("retrieval head, answer given", "retrieval score, answer given", 0.1, False, "not the published score"),
    Rule("induction head", "induction", 0.3, False, "the threshold is ours; none is published"),
    Rule("echo head", "echo", 0.3, False, "the threshold is ours; none is published"),
)


@dataclass(frozen=True)
class Called:
    """What a rule says of one head and of all of them.

    Attributes:
        rule: which.
        value: of the head; None where the rule's metric was not measured for it.
        called: whether the rule calls it so.
        count: heads that the rule calls so, of `heads`.
        both: role → heads that have this role and that one, and how many would by chance.
    """

    rule: Rule
    value: float | None
    called: bool
    count: int
    heads: int
    both: dict[str, tuple[int, float]]


def roles(run: Run, head: Head) -> list[Called]:
    """Every rule's word on a head; rules whose metric the run lacks say so by having no value."""
    frame = run.sql(_SQL, {"metrics": sorted({rule.metric for rule in RULES})}).df()
    wide = frame.pivot_table(index=["layer", "block", "head"], columns="metric", values="value")
    held = {rule: _over(wide, rule) for rule in RULES}
    place = (head.layer, head.block, head.head)
    found = []
    for rule, mine in held.items():
        value = wide[rule.metric].get(place) if rule.metric in wide else None
        value = None if value is None or pd.isna(value) else float(value)
        called = value is not None and bool(mine.get(place, False))
        others = [other for other in RULES if other.metric != rule.metric and held[other].any()] if called else []
        found.append(Called(rule, value, called, int(mine.sum()), len(mine), _overlap(mine, others, held)))
    return found


def _over(wide: pd.DataFrame, rule: Rule) -> pd.Series:
    """[head] whether a rule calls it so, over heads with the metric."""
    if rule.metric not in wide:
        return pd.Series(dtype=bool)
    values = wide[rule.metric].dropna()
    return values > rule.threshold if rule.strict else values >= rule.threshold


def _overlap(mine: pd.Series, others: Iterable[Rule], held: dict[Rule, pd.Series]) -> dict[str, tuple[int, float]]:
    found = {}
    for other in others:
        both = pd.concat([mine, held[other]], axis=1, join="inner")
        if len(both):
            one, two = both.iloc[:, 0].astype(bool), both.iloc[:, 1].astype(bool)
            found[other.role] = (int((one & two).sum()), float(one.sum() * two.sum() / len(both)))
    return found
