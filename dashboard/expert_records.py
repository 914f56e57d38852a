"""What the store holds of experts without any analysis: counts, reductions, pieces and passages, by plain queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moescope.core.edit_kinds.experts import Ablate
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.dashboard.records import Router
from moescope.routing.effects.stored_effects import subject
from moescope.store.run import Run

SAMPLE = 200_000
"""Tokens that pieces and passages are looked for in, from the first on: so they come at once in runs of any size."""
LONG = 4_000_000
"""Decisions beyond which what reads all of them waits for a click."""


@dataclass(frozen=True)
class Counts:
    """Tokens of one expert, tokens and decisions of its router; None where no load was recorded."""

    mine: int | None
    tokens: int | None
    decisions: int | None
    weight_sum: float | None

    @property
    def known(self) -> bool:
        """Whether loads were recorded, and the expert is among them."""
        return bool(self.decisions) and self.mine is not None


def counts(run: Run, router: Router, expert: int) -> Counts:
    """How often an expert was chosen, from `loads`; shared experts from `experts`."""
    mine, weight, decisions = run.store.fetch(
        """
        SELECT
            sum(tokens) FILTER (expert = $expert)::BIGINT,
            sum(weight_sum) FILTER (expert = $expert),
            sum(tokens) FILTER (expert >= 0)::BIGINT
        FROM loads
        WHERE run_id = $run AND layer = $layer AND block = $block
        """,
        _at(run, router, expert),
    )[0]
    if expert < 0 and mine is None:
        found = run.store.fetch(
            """
            SELECT tokens, weight_sum
            FROM experts
            WHERE run_id = $run AND layer = $layer AND block = $block AND expert = $expert
            """,
            _at(run, router, expert),
        )
        mine, weight = found[0] if found else (None, None)
    if expert >= 0 and decisions and mine is None:
        mine, weight = 0, 0.0
    return Counts(mine, decisions // router.top_k if decisions else None, decisions, weight)


def reductions(run: Run, router: Router, expert: int) -> dict[str, Any] | None:
    """The expert's row of the table `experts`; None where there is none."""
    relation = run.sql(
        """
        SELECT tokens, weight_sum, output_norm_mean, weighted_norm_sum, max_abs_out, max_abs_channel, max_abs_token,
            active_share, zero_share
        FROM experts
        WHERE run_id = $run AND layer = $layer AND block = $block AND expert = $expert
        """,
        _at(run, router, expert),
    )
    rows = relation.to_arrow_table().to_pylist()
    return rows[0] if rows else None


def by_label(run: Run, router: Router, expert: int) -> list[tuple[str | None, int, int]]:
    """Label, decisions that name the expert, decisions of the label; the label it takes most of first."""
    return run.store.fetch(
        """
        SELECT
            label,
            coalesce(sum(tokens) FILTER (expert = $expert), 0)::BIGINT AS mine,
            (sum(tokens) FILTER (expert >= 0))::BIGINT AS decisions
        FROM loads
        WHERE run_id = $run AND layer = $layer AND block = $block
        GROUP BY label
        HAVING sum(tokens) FILTER (expert >= 0) > 0
        ORDER BY mine / decisions DESC, label
        """,
        _at(run, router, expert),
    )


def top_pieces(run: Run, router: Router, expert: int, *, limit: int) -> list[tuple[int, int, int]]:
    """Token id, tokens of it that chose the expert, tokens of it: most frequent first, within the sample."""
    return run.store.fetch(
        """
        WITH mine AS (
            SELECT t.token_id, count(*) AS n
            FROM routing r
            JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
            WHERE r.run_id = $run AND r.layer = $layer AND r.block = $block AND list_contains(r.experts, $expert)
                AND r.token < $sample AND t.token < $sample
            GROUP BY t.token_id
            ORDER BY n DESC, t.token_id
            LIMIT $limit
        )
        SELECT mine.token_id, mine.n, count(*)
        FROM mine
        JOIN tokens t ON t.run_id = $run AND t.token_id = mine.token_id AND t.token < $sample
        GROUP BY mine.token_id, mine.n
        ORDER BY mine.n DESC, mine.token_id
        """,
        {**_at(run, router, expert), "limit": limit, "sample": SAMPLE},
    )


def share_in_sample(run: Run, router: Router, expert: int) -> tuple[int, int]:
    """Tokens of the sample that chose the expert, and tokens of the sample with a decision of its router."""
    mine, every = run.store.fetch(
        """
        SELECT count(*) FILTER (list_contains(experts, $expert)), count(*)
        FROM routing
        WHERE run_id = $run AND layer = $layer AND block = $block AND token < $sample
        """,
        {**_at(run, router, expert), "sample": SAMPLE},
    )[0]
    return int(mine), int(every)


def strongest_tokens(run: Run, router: Router, expert: int, *, limit: int) -> list[tuple[int, float | None, int]]:
    """Token, weight and 0-based place in the decision where the expert has its largest weight, one of each text."""
    return run.store.fetch(
        """
        SELECT r.token, list_extract(r.weights, list_position(r.experts, $expert)) AS weight, list_position(r.experts, $expert) AS place
        FROM routing r
        JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
        WHERE r.run_id = $run AND r.layer = $layer AND r.block = $block AND list_contains(r.experts, $expert)
            AND r.token < $sample AND t.token < $sample
        QUALIFY row_number() OVER (PARTITION BY t.sequence_id ORDER BY weight DESC NULLS LAST, place, r.token) = 1
        ORDER BY weight DESC NULLS LAST, place, r.token
        LIMIT $limit
        """,
        {**_at(run, router, expert), "limit": limit, "sample": SAMPLE},
    )


@dataclass(frozen=True)
class Measured:
    """An effect of an intervention that takes the expert out, alone or with others, beside its controls."""

    words: str
    metric: str
    value: float
    low: float | None
    high: float | None
    controls: int
    control_mean: float | None
    control_low: float | None
    control_high: float | None
    n: int
    unit: str


def measured_effects(run: Run, router: Router, expert: int) -> list[Measured]:
    """Effects on predictions, outside sweeps, of edits that take this expert out."""
    rows = run.store.fetch(
        """
        SELECT
            max(intervention::VARCHAR) FILTER (kind = 'target'),
            metric,
            max(value) FILTER (kind = 'target'),
            max(ci_low) FILTER (kind = 'target'),
            max(ci_high) FILTER (kind = 'target'),
            count(*) FILTER (kind = 'control'),
            avg(value) FILTER (kind = 'control'),
            min(value) FILTER (kind = 'control'),
            max(value) FILTER (kind = 'control'),
            max(n) FILTER (kind = 'target'),
            max(unit)
        FROM effects
        WHERE base_run_id = ? AND sweep_id IS NULL AND group_kind = 'all' AND metric IN ('delta_nll', 'kl', 'flips')
        GROUP BY effect_id, metric
        HAVING count(*) FILTER (kind = 'target') > 0
        ORDER BY effect_id DESC, metric
        LIMIT 3000
        """,
        [run.run_id],
    )
    return [Measured(subject(row[0]), *row[1:]) for row in rows if _takes_out(row[0], router, expert)]


def _takes_out(intervention: str, router: Router, expert: int) -> bool:
    try:
        edits = Intervention.from_json(intervention).edits
    except InputError:
        return False
    return any(
        isinstance(edit, Ablate)
        and (edit.layers is None or router.layer in edit.layers)
        and edit.block == router.block
        and expert in edit.ids
        for edit in edits
    )


def tokens_of(run: Run) -> int:
    """How many tokens the run has."""
    return int(run.store.fetch("SELECT coalesce(max(token) + 1, 0) FROM tokens WHERE run_id = ?", [run.run_id])[0][0])


def sample_words(run: Run) -> str:
    """Of which tokens a table speaks, where it is not all of them."""
    total = tokens_of(run)
    return f"From the first {SAMPLE:,} of {total:,} tokens." if total > SAMPLE else ""


def has(run: Run, table: str) -> bool:
    """Whether a table holds anything of a run, without counting it."""
    return bool(run.table(table).limit(1).fetchall())


def _at(run: Run, router: Router, expert: int) -> dict[str, Any]:
    return {"run": run.run_id, "layer": router.layer, "block": router.block, "expert": expert}
