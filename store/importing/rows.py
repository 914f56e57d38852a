"""Rows of a run, made from a staged trace by SQL alone: tokens, sequences, decisions, loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import duckdb

from moescope.store.importing.routers import Router

# Tokens of a stretch: within it rows lie router by router, as a recorded batch's do, which compresses well and keeps
# what belongs to one text together.
_STRETCH = 8192

NUMBER_TOKENS = """
    CREATE TEMP TABLE moescope_tokens AS
    SELECT row_number() OVER (ORDER BY sequence_id, position) - 1 AS token, *
    FROM (
        SELECT
            sequence_id, position,
            min(phase) AS phase,
            min(token_id) AS token_id,
            min(text) AS text,
            min(label) AS label,
            min(document_id) AS document_id
        FROM moescope_trace
        GROUP BY sequence_id, position
    )
"""
_TOKENS = """
    INSERT INTO tokens (run_id, token, sequence_id, position, token_id, phase)
    SELECT $run, token, sequence_id, position, token_id, phase
    FROM moescope_tokens
    ORDER BY token
"""
_HASH = """
    sha256(unhex(string_agg(
        regexp_replace(format('{:08x}', token_id), '(..)(..)(..)(..)', '\\4\\3\\2\\1') || '00000000', '' ORDER BY position
    ) FILTER (phase = 'prefill')))
"""
_SEQUENCES = f"""
    INSERT INTO sequences
        (run_id, sequence_id, document_id, part, label, source, text, n_tokens, content_hash, metadata)
    SELECT
        $run,
        sequence_id,
        coalesce(k.document_id, t.document_id, sequence_id),
        coalesce(k.part, row_number() OVER (
            PARTITION BY coalesce(k.document_id, t.document_id, sequence_id) ORDER BY sequence_id) - 1),
        coalesce(k.label, t.label, $label),
        coalesce(k.source, $source),
        coalesce(k.text, t.text),
        t.n_tokens,
        coalesce(k.content_hash, t.content_hash),
        k.metadata
    FROM (
        SELECT
            sequence_id,
            min(document_id) AS document_id,
            min(label) AS label,
            count(*) FILTER (phase = 'prefill') AS n_tokens,
            CASE WHEN count(text) = count(*)
                THEN string_agg(text, '' ORDER BY position) FILTER (phase = 'prefill')
            END AS text,
            CASE WHEN count(token_id) = count(*) THEN {_HASH} END AS content_hash
        FROM moescope_tokens
        GROUP BY sequence_id
    ) t
    LEFT JOIN moescope_sequences k USING (sequence_id)
    ORDER BY sequence_id
"""
_VOCABULARY = """
    INSERT INTO vocabulary (run_id, token_id, bytes, text)
    SELECT $run, token_id, encode(min(text)), min(text)
    FROM moescope_tokens
    WHERE token_id IS NOT NULL AND text IS NOT NULL
    GROUP BY token_id
    ORDER BY token_id
"""
# Up to so many experts a token it is looked at slot by slot whether a row is in order already; beyond, it is always sorted.
_LOOKED_AT = 16
# Slots are sorted by weight, descending, ties by the lower id; NaN goes last. Without weights the order given stays.
_ROUTING = f"""
    INSERT INTO routing (run_id, token, layer, block, experts, weights, margin, entropy)
    SELECT
        $run, token, layer, block,
        CAST(coalesce(list_transform(slots, lambda s: s[2]), experts) AS USMALLINT[]),
        CAST(coalesce(list_transform(slots, lambda s: -s[1]), weights) AS FLOAT[]),
        margin, entropy
    FROM (
        SELECT *, CASE WHEN weights IS NOT NULL AND NOT ({{in_order}})
            THEN list_sort(list_zip(list_transform(weights, lambda w: -w), experts))
        END AS slots
        FROM moescope_trace
        JOIN moescope_tokens USING (sequence_id, position)
        WHERE list_min(experts) >= 0
    )
    ORDER BY token // {_STRETCH}, layer, block, token
"""
_LOGITS = f"""
    INSERT INTO router_logits (run_id, token, layer, block, logits)
    SELECT $run, token, layer, block, logits
    FROM moescope_trace
    JOIN moescope_tokens USING (sequence_id, position)
    WHERE logits IS NOT NULL
    ORDER BY token // {_STRETCH}, layer, block, token
"""
_LOADS = """
    INSERT INTO loads (run_id, layer, block, label, phase, expert, tokens, weight_sum)
    WITH slots AS (
        SELECT r.layer, r.block, s.label, t.phase, unnest(r.experts) AS expert, unnest(r.weights) AS weight
        FROM routing r
        JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
        JOIN sequences s ON s.run_id = r.run_id AND s.sequence_id = t.sequence_id
        WHERE r.run_id = $run
    ),
    counted AS (
        SELECT layer, block, label, phase, expert::INTEGER AS expert, count(*) AS tokens, fsum(weight) AS weight_sum
        FROM slots
        GROUP BY ALL
    ),
    every AS (
        SELECT
            layer, block, label, phase,
            unnest(range(n_experts + n_null))::INTEGER AS expert,
            0 AS tokens,
            CASE WHEN count(weight_sum) > 0 THEN 0.0 END AS weight_sum
        FROM counted
        JOIN layers USING (layer, block)
        WHERE run_id = $run
        GROUP BY layer, block, label, phase, n_experts, n_null
    )
    SELECT $run, layer, block, label, phase, expert, sum(tokens), sum(weight_sum)
    FROM (SELECT * FROM counted UNION ALL BY NAME SELECT * FROM every)
    GROUP BY layer, block, label, phase, expert
    ORDER BY layer, block, label, phase, expert
"""
_PARTIALS = """
    INSERT INTO load_partials (run_id, batch, layer, block, label, phase, expert, tokens, weight_sum)
    SELECT run_id, 0, layer, block, label, phase, expert, tokens, weight_sum
    FROM loads
    WHERE run_id = $run AND tokens > 0
"""
_BATCH = """
    INSERT INTO batches (run_id, batch, first_sequence, sequences, tokens)
    SELECT $run, 0, min(sequence_id), count(DISTINCT sequence_id), count(*)
    FROM moescope_tokens
"""


def write_decisions(
    connection: duckdb.DuckDBPyConnection, run_id: str, *, source: str, label: str | None, top_k: int
) -> Iterator[str]:
    """Every row of the run but those of `runs`, `layers` and `coverage`; gives the name of each step before it is done.

    Args:
        connection: holds the staged trace.
        run_id: of the run.
        source, label: of sequences that say none.
        top_k: experts a token of most rows; rows with more are as right, and take longer.
    """
    steps: list[tuple[str, str]] = [
        ("tokens", _TOKENS),
        ("sequences", _SEQUENCES),
        ("vocabulary", _VOCABULARY),
        ("decisions", _ROUTING.format(in_order=_in_order(top_k))),
        ("logits", _LOGITS),
        ("loads", _LOADS),
        ("loads", _PARTIALS),
        ("loads", _BATCH),
    ]
    for name, statement in steps:
        yield name
        bound = {"run": run_id, "source": source, "label": label}
        connection.execute(statement, {key: value for key, value in bound.items() if f"${key}" in statement})


def _in_order(top_k: int) -> str:
    """SQL that is true of most rows whose slots are in the store's order already, and false of all others."""
    slots = min(top_k, _LOOKED_AT)
    pairs = [
        f"(len(experts) <= {i} OR weights[{i}] > weights[{i + 1}]"
        f" OR (weights[{i}] = weights[{i + 1}] AND experts[{i}] < experts[{i + 1}]))"
        for i in range(1, slots)
    ]
    return " AND ".join([f"len(experts) <= {slots}", "NOT isnan(weights[1])", *pairs])


def write_layers(connection: duckdb.DuckDBPyConnection, run_id: str, routers: Sequence[Router]) -> None:
    """One row a router."""
    for r in routers:
        row = {"run_id": run_id, "layer": r.layer, "block": r.block, "stack": "decoder", "kind": "moe"}
        row |= {key: value for key, value in r.row.items() if value is not None}
        row |= {"n_experts": r.n_experts, "top_k": r.top_k, "n_null": r.n_null}
        names, places = ", ".join(row), ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO layers ({names}) VALUES ({places})", list(row.values()))
