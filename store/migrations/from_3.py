"""Version 3 → 4: sparse autoencoders, their features, sparse probes, descriptions and students of MLPs."""

from __future__ import annotations

STATEMENTS: tuple[str, ...] = (
    """
    CREATE TABLE "saes" (
        "sae_id" UUID,
        "name" VARCHAR,
        "site" VARCHAR,
        "target_site" VARCHAR,
        "expert" INTEGER,
        "architecture" VARCHAR,
        "trained_as" VARCHAR,
        "d_in" INTEGER,
        "d_sae" INTEGER,
        "path" VARCHAR,
        "checksum" VARCHAR,
        "model" VARCHAR,
        "anatomy_digest" VARCHAR,
        "trained_on" UUID,
        "corpus_fingerprint" VARCHAR,
        "vectors" BIGINT,
        "settings" JSON,
        "summary" JSON,
        "source" JSON,
        "versions" JSON,
        "created_at" TIMESTAMP
    )
    """,
    """
    CREATE TABLE "sae_measures" (
        "sae_id" UUID,
        "run_id" UUID,
        "metric" VARCHAR,
        "condition" VARCHAR,
        "group_kind" VARCHAR,
        "group_value" VARCHAR,
        "value" DOUBLE,
        "ci_low" DOUBLE,
        "ci_high" DOUBLE,
        "n" BIGINT,
        "unit" VARCHAR
    )
    """,
    """
    CREATE TABLE "features" (
        "sae_id" UUID,
        "run_id" UUID,
        "feature" INTEGER,
        "active" BIGINT,
        "tokens" BIGINT,
        "documents" BIGINT,
        "mean" DOUBLE,
        "maximum" DOUBLE,
        "edges" FLOAT[],
        "counts" UBIGINT[],
        "decoder_norm" DOUBLE,
        "raised_ids" INTEGER[],
        "raised" FLOAT[],
        "lowered_ids" INTEGER[],
        "lowered" FLOAT[]
    )
    """,
    """
    CREATE TABLE "feature_contexts" (
        "sae_id" UUID,
        "run_id" UUID,
        "feature" INTEGER,
        "stratum" INTEGER,
        "rank" INTEGER,
        "sequence_id" BIGINT,
        "position" INTEGER,
        "value" DOUBLE,
        "first_position" INTEGER,
        "activations" FLOAT[]
    )
    """,
    """
    CREATE TABLE "feature_labels" (
        "sae_id" UUID,
        "run_id" UUID,
        "feature" INTEGER,
        "label" VARCHAR,
        "active" BIGINT,
        "tokens" BIGINT,
        "lift" DOUBLE,
        "ci_low" DOUBLE,
        "ci_high" DOUBLE,
        "p" DOUBLE,
        "q" DOUBLE
    )
    """,
    """
    CREATE TABLE "feature_links" (
        "sae_id" UUID,
        "run_id" UUID,
        "kind" VARCHAR,
        "feature" INTEGER,
        "other_sae_id" UUID,
        "other_feature" INTEGER,
        "value" DOUBLE,
        "ci_low" DOUBLE,
        "ci_high" DOUBLE,
        "null_value" DOUBLE,
        "null_kind" VARCHAR,
        "n" BIGINT
    )
    """,
    """
    CREATE TABLE "feature_experts" (
        "sae_id" UUID,
        "run_id" UUID,
        "feature" INTEGER,
        "layer" USMALLINT,
        "block" VARCHAR,
        "expert" INTEGER,
        "metric" VARCHAR,
        "value" DOUBLE,
        "ci_low" DOUBLE,
        "ci_high" DOUBLE,
        "null_value" DOUBLE,
        "null_kind" VARCHAR,
        "n" BIGINT,
        "unit" VARCHAR
    )
    """,
    """
    CREATE TABLE "sparse_probes" (
        "probe_id" UUID,
        "run_id" UUID,
        "sae_id" UUID,
        "unit_kind" VARCHAR,
        "site" VARCHAR,
        "concept" VARCHAR,
        "ranking" VARCHAR,
        "k" INTEGER,
        "units" INTEGER[],
        "coefficients" FLOAT[],
        "metric" VARCHAR,
        "value" DOUBLE,
        "ci_low" DOUBLE,
        "ci_high" DOUBLE,
        "null_value" DOUBLE,
        "null_kind" VARCHAR,
        "n" BIGINT
    )
    """,
    """
    CREATE TABLE "descriptions" (
        "description_id" UUID,
        "run_id" UUID,
        "sae_id" UUID,
        "unit_kind" VARCHAR,
        "layer" USMALLINT,
        "block" VARCHAR,
        "unit" INTEGER,
        "text" VARCHAR,
        "describer" VARCHAR,
        "prompt" VARCHAR,
        "created_at" TIMESTAMP
    )
    """,
    """
    CREATE TABLE "description_scores" (
        "description_id" UUID,
        "metric" VARCHAR,
        "value" DOUBLE,
        "ci_low" DOUBLE,
        "ci_high" DOUBLE,
        "null_value" DOUBLE,
        "null_kind" VARCHAR,
        "n" BIGINT,
        "scorer" VARCHAR
    )
    """,
    """
    CREATE TABLE "mlp_students" (
        "run_id" UUID,
        "layer" USMALLINT,
        "block" VARCHAR,
        "student" VARCHAR,
        "inputs" VARCHAR,
        "experts" INTEGER,
        "active" INTEGER,
        "share" DOUBLE,
        "router_rank" INTEGER,
        "metric" VARCHAR,
        "value" DOUBLE,
        "ci_low" DOUBLE,
        "ci_high" DOUBLE,
        "n" BIGINT,
        "settings" JSON
    )
    """,
)
