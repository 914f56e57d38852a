"""Queries to begin with, each over the real tables of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import cleandoc


@dataclass(frozen=True)
class Example:
    """A query to click.

    Attributes:
        title: what it answers.
        sql: the query; `$run` is the run that the page shows.
        view: the chart it opens with, and values of its other parameters, as the address has them.
    """

    title: str
    sql: str
    view: Mapping[str, str] = field(default_factory=dict)


def _example(title: str, sql: str, **view: str) -> Example:
    return Example(title, cleandoc(sql), view)


EXAMPLES: tuple[Example, ...] = (
    _example(
        "Runs of this store",
        """
        SELECT name, status, model, tokens, sequences, seconds, started_at, run_id
        FROM run_overview
        ORDER BY started_at DESC
        """,
    ),
    _example(
        "Load of every expert",
        """
        SELECT layer, expert, tokens, share, relative_load
        FROM expert_load
        WHERE run_id = $run AND block = 'mlp'
        ORDER BY relative_load DESC
        """,
        chart="heat",
        x="expert",
        y="layer",
        z="relative_load",
    ),
    _example(
        "Experts that prefer a label",
        """
        SELECT label, layer, expert, tokens, share, overall_share, lift
        FROM expert_load_by_label
        WHERE run_id = $run AND label IS NOT NULL AND tokens >= $least
        ORDER BY lift DESC
        LIMIT 200
        """,
        p_least="20",
    ),
    _example(
        "Tokens that surprised the model most",
        """
        SELECT token, sequence_id, label, text, predicted_text, nll
        FROM token_text
        WHERE run_id = $run AND nll IS NOT NULL
        ORDER BY nll DESC
        LIMIT 200
        """,
    ),
    _example(
        "Closest decisions of the routers",
        """
        WITH closest AS (
            SELECT token, layer, block, experts, margin
            FROM routing
            WHERE run_id = $run AND margin IS NOT NULL
            ORDER BY margin
            LIMIT 200
        )
        SELECT c.token, t.text, c.layer, c.block, c.experts, c.margin
        FROM closest c
        JOIN token_text t ON t.run_id = $run AND t.token = c.token
        ORDER BY c.margin
        """,
    ),
    _example(
        "Pairs of experts chosen together",
        """
        SELECT a.layer AS layer, a.expert AS expert, b.expert AS other, count(*) AS decisions
        FROM decisions a
        JOIN decisions b USING (run_id, token, layer, block)
        WHERE a.run_id = $run AND a.layer = $layer AND b.layer = $layer AND a.expert < b.expert
        GROUP BY ALL
        ORDER BY decisions DESC
        LIMIT 500
        """,
        p_layer="0",
        chart="heat",
        x="expert",
        y="other",
        z="decisions",
    ),
    _example(
        "Entropy of the router along the text",
        """
        SELECT t.position // 8 * 8 AS position, avg(r.entropy) AS entropy_nats, count(*) AS n
        FROM routing r
        JOIN tokens t USING (run_id, token)
        WHERE r.run_id = $run AND r.layer = $layer
        GROUP BY ALL
        ORDER BY position
        """,
        p_layer="0",
        chart="line",
        x="position",
        y="entropy_nats",
    ),
    _example(
        "Experts that write most for each token they take",
        """
        SELECT layer, expert, avg(weight * norm) AS weighted_norm, avg(norm) AS norm, count(*) AS decisions
        FROM decision_outputs
        WHERE run_id = $run AND block = 'mlp'
        GROUP BY ALL
        ORDER BY weighted_norm DESC
        """,
        chart="heat",
        x="expert",
        y="layer",
        z="weighted_norm",
    ),
    _example(
        "Size of the residual stream by layer",
        """
        SELECT layer, median(norm) AS median_norm, max(norm) AS largest, count(*) AS tokens
        FROM residual
        WHERE run_id = $run
        GROUP BY layer
        ORDER BY layer
        """,
        chart="line",
        x="layer",
        y="median_norm",
    ),
    _example(
        "What is not fully recorded",
        """
        SELECT name, site, missing, status, detail, run_id
        FROM gaps
        ORDER BY name, site
        """,
    ),
)
