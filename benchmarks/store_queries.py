"""Named questions to a store, each asked of a run as any analysis would ask it."""

from __future__ import annotations

from collections.abc import Mapping

QUERIES: Mapping[str, str] = {
    "load, from routing": """
        SELECT layer, block, expert, count(*) AS tokens
        FROM (SELECT layer, block, unnest(experts) AS expert FROM routing WHERE run_id = $run)
        GROUP BY ALL
    """,
    "load, from loads": """
        SELECT layer, block, expert, sum(tokens) AS tokens
        FROM loads
        WHERE run_id = $run
        GROUP BY ALL
    """,
    "decisions by label": """
        SELECT s.label, r.layer, sum(len(r.experts)) AS decisions
        FROM routing r
        JOIN tokens t USING (run_id, token)
        JOIN sequences s USING (run_id, sequence_id)
        WHERE r.run_id = $run
        GROUP BY ALL
    """,
    "entropy by layer": """
        SELECT layer, block, avg(entropy) AS mean, stddev(entropy) AS deviation
        FROM routing
        WHERE run_id = $run
        GROUP BY ALL
    """,
    "tokens of one expert": """
        SELECT t.sequence_id, t.position, r.weights[list_position(r.experts, $expert)] AS weight
        FROM routing r
        JOIN tokens t USING (run_id, token)
        WHERE r.run_id = $run AND r.layer = $layer AND list_contains(r.experts, $expert)
    """,
    "co-activation of one layer": """
        SELECT first, second, count(*) AS tokens
        FROM (
            SELECT first, unnest(experts) AS second
            FROM (SELECT unnest(experts) AS first, experts FROM routing WHERE run_id = $run AND layer = $layer)
        )
        WHERE first < second
        GROUP BY ALL
    """,
    "neighbours of a token": """
        SELECT t.token, t.position, r.layer, r.experts, r.weights
        FROM routing r
        JOIN tokens t USING (run_id, token)
        WHERE r.run_id = $run AND r.token BETWEEN $token - 8 AND $token + 8 AND t.token BETWEEN $token - 8 AND $token + 8
    """,
    "overlap of consecutive tokens": """
        SELECT r.layer, avg(len(list_intersect(r.experts, f.experts)) / len(r.experts)) AS overlap
        FROM routing r
        JOIN routing f ON f.run_id = $run AND f.layer = r.layer AND f.block = r.block AND f.token = r.token + 1
        JOIN tokens t ON t.run_id = $run AND t.token = f.token AND t.position > 0
        WHERE r.run_id = $run AND r.layer = $layer AND f.layer = $layer
        GROUP BY r.layer
    """,
    "margin percentiles": """
        SELECT layer, block, quantile_cont(margin, [0.01, 0.05, 0.5, 0.95, 0.99]) AS margins
        FROM routing
        WHERE run_id = $run
        GROUP BY ALL
    """,
    "chosen share by position": """
        SELECT r.layer, t.position // 32 AS stretch, avg(list_sum(r.weights)) AS share
        FROM routing r
        JOIN tokens t USING (run_id, token)
        WHERE r.run_id = $run
        GROUP BY ALL
    """,
    "one sequence's routing": """
        SELECT t.position, r.layer, r.experts, r.weights, r.margin, r.entropy
        FROM tokens t
        JOIN routing r USING (run_id, token)
        WHERE t.run_id = $run AND t.sequence_id = $sequence
        ORDER BY t.position, r.layer
    """,
}
