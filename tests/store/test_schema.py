"""The contract: every table and column of the design is in the file, typed and commented."""

from __future__ import annotations

import re

import pytest

from moescope.store.schema import SCHEMA_VERSION, TABLES
from moescope.store.store import Store

# Section 6 of the design, column by column. More may be added; none of these may go or change its name.
CONTRACT = {
    "runs": "run_id name model revision architecture intervention settings versions seed corpus_fingerprint status started_at "
    "finished_at",
    "layers": "run_id layer block stack kind n_experts top_k n_shared n_null d_expert routing_rule",
    "sequences": "run_id sequence_id document_id part label source text n_tokens content_hash metadata",
    "tokens": "run_id token sequence_id position token_id phase nll predicted_id is_special class",
    "routing": "run_id token layer block experts weights margin entropy",
    "router_logits": "run_id token layer block logits",
    "expert_outputs": "run_id token layer block norms",
    "experts": "run_id layer block expert tokens weight_sum output_norm_mean weighted_norm_sum max_abs_out max_abs_channel "
    "max_abs_token active_share zero_share",
    "loads": "run_id layer block label phase expert tokens weight_sum",
    "residual": "run_id token layer norm top_values top_channels",
    "residual_sequences": "run_id sequence_id layer median_abs",
    "massive_activations": "run_id layer token channel value ratio",
    "super_experts": "run_id rule layer block expert value threshold",
    "heads": "run_id layer head metric condition value n",
    "activations": "run_id site path rows width dtype checksum",
    "coverage": "run_id site expected recorded status detail",
    "effects": "effect_id sweep_id base_run_id run_id intervention kind draw group_kind group_value metric value ci_low ci_high n "
    "unit",
    "effect_sequences": "effect_id kind draw sequence_id metric sum n",
}
TYPES = {
    ("routing", "experts"): "USMALLINT[]",
    ("routing", "weights"): "FLOAT[]",
    ("routing", "margin"): "FLOAT",
    ("routing", "entropy"): "FLOAT",
    ("router_logits", "logits"): "FLOAT[]",
    ("expert_outputs", "norms"): "FLOAT[]",
    ("residual", "top_values"): "FLOAT[3]",
    ("residual", "top_channels"): "USMALLINT[3]",
    ("runs", "run_id"): "UUID",
    ("runs", "intervention"): "JSON",
    ("runs", "settings"): "JSON",
    ("runs", "versions"): "JSON",
    ("layers", "routing_rule"): "JSON",
    ("sequences", "metadata"): "JSON",
    ("effects", "intervention"): "JSON",
}

_COLUMNS = "SELECT column_name, data_type, comment FROM duckdb_columns() WHERE table_name = ?"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Store:
    with Store(tmp_path_factory.mktemp("schema") / "runs.duckdb") as store:
        yield store


@pytest.mark.parametrize("table", CONTRACT)
def test_table_of_the_contract_has_its_columns(fresh: Store, table: str) -> None:
    found = {name for name, _, _ in fresh.fetch(_COLUMNS, [table])}
    assert set(CONTRACT[table].split()) <= found


@pytest.mark.parametrize(("table", "column"), TYPES)
def test_column_of_the_contract_has_its_type(fresh: Store, table: str, column: str) -> None:
    types = {name: kind for name, kind, _ in fresh.fetch(_COLUMNS, [table])}
    assert types[column] == TYPES[table, column]


@pytest.mark.parametrize("table", [table.name for table in TABLES])
def test_table_and_every_column_say_in_the_file_what_they_mean(fresh: Store, table: str) -> None:
    assert fresh.fetch("SELECT comment FROM duckdb_tables() WHERE table_name = ?", [table])[0][0]
    for name, _, comment in fresh.fetch(_COLUMNS, [table]):
        assert comment, f"{table}.{name} has no comment"


def test_same_column_has_the_same_type_in_every_table(fresh: Store) -> None:
    """Joins must not cast: what is called token, layer, expert or sequence_id is one type."""
    for column in ("run_id", "token", "layer", "block", "sequence_id", "expert"):
        query = "SELECT DISTINCT data_type FROM duckdb_columns() WHERE column_name = ?"
        assert len(fresh.fetch(query, [column])) == 1, column


def test_file_says_who_made_it_and_its_version(fresh: Store) -> None:
    info = dict(fresh.fetch("SELECT key, value FROM store_info"))
    assert info["application"] == "moescope"
    assert info["schema_version"] == str(SCHEMA_VERSION)
    assert re.fullmatch(r"moescope \d+\.\d+\.\d+.*", info["created_by"])
    assert re.match(r"\d{4}-\d\d-\d\dT", info["created_at"])


def test_status_of_runs_is_told_in_the_comment(fresh: Store) -> None:
    comments = {name: comment for name, _, comment in fresh.fetch(_COLUMNS, ["runs"])}
    for status in ("running", "complete", "incomplete", "failed"):
        assert status in comments["status"]
