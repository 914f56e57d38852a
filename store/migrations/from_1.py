"""Version 1 → 2: neurons in the partials of experts, shards numbered, views."""

from __future__ import annotations

# Two kinds of file call themselves version 1: the first, and one that has these columns already; hence IF NOT EXISTS.
# Nothing of version 1 read neurons, so 0 of them were seen. Vectors, where there are any, get their numbers by path.
STATEMENTS: tuple[str, ...] = (
    'ALTER TABLE "expert_partials" ADD COLUMN IF NOT EXISTS "neurons" BIGINT',
    'ALTER TABLE "expert_partials" ADD COLUMN IF NOT EXISTS "active" BIGINT',
    'ALTER TABLE "expert_partials" ADD COLUMN IF NOT EXISTS "zeros" BIGINT',
    """
    UPDATE expert_partials
    SET neurons = coalesce(neurons, 0), active = coalesce(active, 0), zeros = coalesce(zeros, 0)
    WHERE neurons IS NULL OR active IS NULL OR zeros IS NULL
    """,
    'ALTER TABLE "activations" ADD COLUMN IF NOT EXISTS "shard" INTEGER',
    'ALTER TABLE "activations" ADD COLUMN IF NOT EXISTS "tokens" BIGINT',
    """
    UPDATE activations
    SET shard = numbered.shard
    FROM (
        SELECT rowid AS place, row_number() OVER (PARTITION BY run_id, site ORDER BY path) - 1 AS shard
        FROM activations
    ) AS numbered
    WHERE activations.rowid = numbered.place AND activations.shard IS NULL
    """,
)
