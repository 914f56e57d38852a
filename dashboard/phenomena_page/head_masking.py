"""What taking a head out did, where it was measured: effects of interventions that mask it, beside their controls."""

from __future__ import annotations

from dataclasses import dataclass

from moescope.dashboard.phenomena_page.head_scores import Head
from moescope.store.run import Run

_SQL = """
    WITH asked AS (
        SELECT e.effect_id, any_value(e.intervention) AS intervention, any_value(r.name) AS base
        FROM effects e
        JOIN runs r ON r.run_id = e.base_run_id
        JOIN runs mine ON mine.run_id = $run
        WHERE e.kind = 'target' AND contains(e.intervention::VARCHAR, 'mask_head')
            AND (e.base_run_id = $run OR (r.anatomy ->> 'digest') = (mine.anatomy ->> 'digest'))
        GROUP BY e.effect_id
    ),
    edits AS (
        SELECT effect_id, intervention, base, unnest(from_json(intervention -> 'edits', '["JSON"]')) AS edit
        FROM asked
    ),
    attention AS (
        SELECT block, count(DISTINCT layer) AS layers
        FROM layers
        WHERE run_id = $run
        GROUP BY block
    ),
    each_edit AS (
        SELECT e.*, (edit ->> 'kind') = 'mask_head' AS masks, coalesce(edit ->> 'block', 'attn') AS block,
            (edit ->> 'layer') IS NULL AS everywhere,
            CASE
                WHEN (edit ->> 'layer') IS NULL THEN coalesce(a.layers, 1)
                ELSE greatest(coalesce(json_array_length(edit -> 'layer'), 1), 1)
            END AS layers
        FROM edits e
        LEFT JOIN attention a ON a.block = coalesce(edit ->> 'block', 'attn')
    ),
    masked AS (
        SELECT effect_id, any_value(intervention ->> 'name') AS name, any_value(base) AS base,
            sum(greatest(coalesce(json_array_length(edit -> 'heads'), 1), 1) * layers) FILTER (masks) AS heads,
            count(*) FILTER (NOT masks) AS others,
            bool_or(
                masks AND block = $block
                AND (everywhere OR (edit ->> 'layer') = $layer::VARCHAR OR json_contains(edit -> 'layer', $layer::VARCHAR))
                AND ((edit ->> 'heads') = $head::VARCHAR OR json_contains(edit -> 'heads', $head::VARCHAR))
            ) AS mine
        FROM each_edit
        GROUP BY effect_id
    ),
    numbers AS (
        SELECT e.effect_id, e.metric, any_value(e.unit) AS unit, any_value(e.value) FILTER (e.kind = 'target') AS value,
            any_value(e.ci_low) FILTER (e.kind = 'target') AS low, any_value(e.ci_high) FILTER (e.kind = 'target') AS high,
            any_value(e.n) FILTER (e.kind = 'target') AS n, count(*) FILTER (e.kind = 'control') AS controls,
            avg(e.value) FILTER (e.kind = 'control') AS null_mean, min(e.value) FILTER (e.kind = 'control') AS null_low,
            max(e.value) FILTER (e.kind = 'control') AS null_high
        FROM effects e
        WHERE e.group_kind = 'all'
        GROUP BY e.effect_id, e.metric
    )
    SELECT m.effect_id::VARCHAR, m.name, m.base, m.heads::INTEGER, m.others::INTEGER, n.metric, n.unit, n.value, n.low, n.high, n.n,
        n.controls, n.null_mean, n.null_low, n.null_high
    FROM masked m
    JOIN numbers n USING (effect_id)
    WHERE m.mine AND n.value IS NOT NULL AND (n.metric LIKE 'delta%' OR n.metric = 'kl')
    ORDER BY m.heads, m.others, m.effect_id, n.metric
    LIMIT 40
"""


@dataclass(frozen=True)
class Masking:
    """One number of an intervention that takes a head out, alone or with others.

    Attributes:
        effect, name, base: which intervention, and of which run.
        heads: how many heads its edits mask, each layer's counted by itself.
        others: how many edits of other kinds it has.
        metric, unit, value, low, high, n: what it did.
        controls, null, null_low, null_high: the same at random; None without any.
    """

    effect: str
    name: str | None
    base: str
    heads: int
    others: int
    metric: str
    unit: str
    value: float
    low: float | None
    high: float | None
    n: int
    controls: int
    null: float | None
    null_low: float | None
    null_high: float | None


def masking(run: Run, head: Head) -> list[Masking]:
    """What was measured of interventions that mask a head, the most specific first; of runs of the same model."""
    given = {"run": run.run_id, "layer": head.layer, "block": head.block, "head": head.head}
    return [Masking(*row) for row in run.store.fetch(_SQL, given)]
