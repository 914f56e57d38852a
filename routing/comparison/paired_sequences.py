"""Which sequences of two runs are the same tokens."""

from __future__ import annotations

import pandas as pd

from moescope.store.run import Run

SAME_SEQUENCES = """
    keyed AS (
        SELECT
            run_id, sequence_id, document_id, label, n_tokens,
            coalesce(content_hash, CASE WHEN $same THEN 'number ' || sequence_id END) AS key,
            row_number() OVER (
                PARTITION BY run_id, coalesce(content_hash, CASE WHEN $same THEN 'number ' || sequence_id END), n_tokens
                ORDER BY sequence_id
            ) AS again
        FROM sequences
        WHERE run_id IN ($run, $other)
    ),
    same_sequences AS (
        SELECT a.sequence_id, b.sequence_id AS other_id, a.document_id, a.label, a.n_tokens
        FROM keyed a
        JOIN keyed b ON b.key = a.key AND b.again = a.again AND b.n_tokens IS NOT DISTINCT FROM a.n_tokens
        WHERE a.run_id = $run AND b.run_id = $other
    )
"""
"""Two tables for a WITH clause: `same_sequences` pairs sequences of equal token ids, the first with the first where a text
is there twice; where a run has no ids stored, equal numbers in the same corpus. Binds `pair_parameters`."""

GENERATED_LEFT_OUT = "Generated tokens are left out."
"""Said where a run of a comparison has some: what pairs sequences is of the texts that were given alone."""

_GENERATED = "SELECT 1 FROM tokens WHERE run_id IN ($run, $other) AND phase != 'prefill' LIMIT 1"
_PAIRS = "\n".join(("WITH", SAME_SEQUENCES, "SELECT * FROM same_sequences ORDER BY sequence_id"))


def pair_parameters(run: Run, other: Run) -> dict[str, object]:
    """What `SAME_SEQUENCES` binds."""
    first, second = run.info["corpus_fingerprint"], other.info["corpus_fingerprint"]
    return {"run": run.run_id, "other": other.run_id, "same": first is not None and first == second}


def generated(run: Run, other: Run) -> bool:
    """Whether one of two runs has generated tokens."""
    return bool(run.store.fetch(_GENERATED, {"run": run.run_id, "other": other.run_id}))


def paired_sequences(run: Run, other: Run) -> pd.DataFrame:
    """Pairs of sequences that are the same tokens: sequence_id, other_id, document_id (of `run`), label, n_tokens."""
    return run.store.sql(_PAIRS, pair_parameters(run, other)).df()
