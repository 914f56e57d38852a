"""Version 2 → 3: which attention a head is of, and statistics of heads by sequence."""

from __future__ import annotations

# Nothing of version 2 measured heads of a second attention.
STATEMENTS: tuple[str, ...] = (
    'ALTER TABLE "heads" ADD COLUMN "block" VARCHAR',
    "UPDATE heads SET block = 'attn'",
    """
    CREATE TABLE "head_sequences" (
        "run_id" UUID,
        "sequence_id" BIGINT,
        "layer" USMALLINT,
        "block" VARCHAR,
        "metric" VARCHAR,
        "condition" VARCHAR,
        "sums" FLOAT[],
        "n" BIGINT
    )
    """,
)
