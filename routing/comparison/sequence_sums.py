"""Sums of every measure by sequence, so that differences between runs can be resampled by document."""

from __future__ import annotations

import pandas as pd

from moescope.store.run import Run

UNITS = {
    "mean NLL": "nats",
    "next token predicted": "share of tokens",
    "router entropy": "nats",
    "router margin": "router score",
    "weight of the first choice": "weight",
    "expert output norm": "L2 norm",
    "residual norm": "L2 norm",
    "attention to the first token": "share",
    "CV of expert load": "sd ÷ mean",
}
"""Every measure and its unit, in the order they are told."""

_SUMS = """
    WITH read AS (
        SELECT *
        FROM tokens
        WHERE run_id = $run AND coalesce(phase, 'prefill') = 'prefill'
    ),
    said AS (
        SELECT
            sequence_id, position, token_id, nll,
            lag(predicted_id) OVER (PARTITION BY sequence_id ORDER BY position) AS predicted
        FROM read
    ),
    routed AS (
        SELECT
            r.layer, r.block, t.sequence_id,
            sum(r.entropy::DOUBLE) AS entropy, count(r.entropy) AS entropies,
            sum(r.margin::DOUBLE) AS margin, count(r.margin) AS margins,
            sum(r.weights[1]::DOUBLE) AS weight, count(r.weights[1]) AS weights
        FROM routing r
        JOIN read t ON t.token = r.token
        WHERE r.run_id = $run
        GROUP BY r.layer, r.block, t.sequence_id
    )
    SELECT * FROM (
        SELECT 'mean NLL' AS metric, NULL::INTEGER AS layer, NULL::VARCHAR AS block, sequence_id,
            sum(nll::DOUBLE) AS total, count(nll)::DOUBLE AS n
        FROM said
        GROUP BY sequence_id
        UNION ALL
        SELECT 'next token predicted', NULL, NULL, sequence_id,
            sum((predicted = token_id)::DOUBLE), count(predicted = token_id)::DOUBLE
        FROM said
        WHERE nll IS NOT NULL
        GROUP BY sequence_id
        UNION ALL
        SELECT 'router entropy', layer, block, sequence_id, entropy, entropies::DOUBLE FROM routed
        UNION ALL
        SELECT 'router margin', layer, block, sequence_id, margin, margins::DOUBLE FROM routed
        UNION ALL
        SELECT 'weight of the first choice', layer, block, sequence_id, weight, weights::DOUBLE FROM routed
        UNION ALL
        SELECT 'expert output norm', o.layer, o.block, t.sequence_id, sum(list_sum(o.norms)::DOUBLE), sum(len(o.norms))::DOUBLE
        FROM expert_outputs o
        JOIN read t ON t.token = o.token
        WHERE o.run_id = $run
        GROUP BY o.layer, o.block, t.sequence_id
        UNION ALL
        SELECT 'residual norm', r.layer, 'residual', t.sequence_id, sum(r.norm::DOUBLE), count(*)::DOUBLE
        FROM residual r
        JOIN read t ON t.token = r.token
        WHERE r.run_id = $run AND isfinite(r.norm)
        GROUP BY r.layer, t.sequence_id
        UNION ALL
        SELECT 'attention to the first token', layer, block, sequence_id, list_sum(sums)::DOUBLE / len(sums), n::DOUBLE
        FROM head_sequences
        WHERE run_id = $run AND metric = 'alpha_0' AND condition = 'base'
    )
    WHERE n > 0 AND isfinite(total)
    ORDER BY metric, layer, block, sequence_id
"""
_LOADS = """
    SELECT
        d.layer, d.block,
        sqrt(greatest(sum(d.tokens ** 2) / any_value(l.e) - (sum(d.tokens) / any_value(l.e)) ** 2, 0)) * any_value(l.e)
            / sum(d.tokens) AS value,
        sum(d.tokens)::BIGINT AS n
    FROM (
        SELECT layer, block, expert, sum(tokens)::DOUBLE AS tokens
        FROM loads
        WHERE run_id = $run AND expert >= 0 AND coalesce(phase, 'prefill') = 'prefill'
        GROUP BY layer, block, expert
    ) d
    JOIN (
        SELECT layer, block, n_experts + coalesce(n_null, 0) AS e
        FROM layers
        WHERE run_id = $run AND n_experts > 0
    ) l ON l.layer = d.layer AND l.block = d.block
    GROUP BY d.layer, d.block
    HAVING sum(d.tokens) > 0
    ORDER BY d.layer, d.block
"""


def sequence_sums(run: Run) -> pd.DataFrame:
    """metric, layer, block, sequence_id, total, n: the mean of a measure is Σ total ÷ Σ n; layer −1 is the whole model.

    Generated tokens are left out: sequences are paired by what was given to the model.
    """
    frame = run.sql(_SUMS).df()
    frame["layer"] = frame["layer"].astype(float).fillna(-1).astype(int)
    frame["block"] = frame["block"].astype(object).where(frame["block"].notna(), "")
    return frame


def load_variation(run: Run) -> pd.DataFrame:
    """layer, block, value, n: standard deviation of the experts' tokens over their mean, over all texts, without generated tokens."""
    return run.sql(_LOADS).df()
