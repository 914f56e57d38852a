"""The neutral form: every container gives the rows that plain loops count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.store.importing.formats import FORMATS
from moescope.store.importing.import_trace import import_trace
from moescope.store.importing.trace import COLUMNS
from moescope.store.store import Store

N_EXPERTS = 16


def _npz(rows: Any, path: Path) -> Path:
    columns = rows.table.to_pydict()
    np.savez(path, **{name: np.array(values) for name, values in columns.items()})
    return path


def _csv(rows: Any, path: Path) -> Path:
    table = rows.table
    with duckdb.connect() as connection:
        connection.register("rows", table)
        connection.table("rows").write_csv(str(path))
    return path


def _parquet(rows: Any, path: Path) -> Path:
    pq.write_table(rows.table, path, row_group_size=10)
    return path


def _folder(rows: Any, path: Path) -> Path:
    path.mkdir()
    table = rows.table
    pq.write_table(table.slice(0, 20), path / "a.parquet")
    pq.write_table(table.slice(20), path / "b.parquet")
    return path


CONTAINERS: dict[str, Callable[[Any, Path], Any]] = {
    "parquet": lambda rows, folder: _parquet(rows, folder / "trace [1]*.parquet"),
    "folder": lambda rows, folder: _folder(rows, folder / "parts"),
    "npz": lambda rows, folder: _npz(rows, folder / "trace.npz"),
    "csv": lambda rows, folder: _csv(rows, folder / "trace.csv"),
    "pyarrow": lambda rows, folder: rows.table,
    "pandas": lambda rows, folder: rows.table.to_pandas(),
    "duckdb": lambda rows, folder: duckdb.from_arrow(rows.table),
    "polars": lambda rows, folder: pytest.importorskip("polars").from_arrow(rows.table),
    "datasets": lambda rows, folder: pytest.importorskip("datasets").Dataset.from_list(rows.rows),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("weights", [True, False])
def test_every_container_gives_the_rows_counted_by_hand(
    container: str,
    weights: bool,
    store: Store,
    tmp_path: Path,
    random_trace: Any,
    expected_routing: Any,
    routing_of: Any,
) -> None:
    rows = random_trace(weights=weights)
    source = CONTAINERS[container](rows, tmp_path)
    run = import_trace(store, source, name="trace", n_experts=N_EXPERTS)
    assert run.status == "complete", run.coverage.df()
    assert routing_of(run) == expected_routing(rows)
    phases = {} if not weights else {"decode": 2 + 7, "prefill": 5 + 1 + 5}
    found = run.sql("SELECT phase, count(*) FROM tokens WHERE run_id = $run GROUP BY phase ORDER BY phase").fetchall()
    assert dict(found) == (phases or {"prefill": 20})


def test_loads_are_those_counted_by_hand_by_label_and_phase(
    store: Store, random_trace: Any, expected_loads: Any
) -> None:
    rows = random_trace((9, 4, 20, 2), seed=3)
    run = import_trace(store, rows.table, name="trace", n_experts=N_EXPERTS)
    query = "SELECT layer, label, phase, expert, tokens, weight_sum FROM loads WHERE run_id = $run AND block = 'mlp'"
    found = {tuple(row[:4]): (row[4], row[5]) for row in run.sql(query).fetchall()}
    assert found == expected_loads(rows)
    assert found == {
        tuple(row[:4]): (row[4], row[5])
        for row in run.sql(
            """
            SELECT l.layer, l.label, l.phase, l.expert, coalesce(p.tokens, 0), coalesce(p.weight_sum, 0)
            FROM loads l LEFT JOIN load_partials p USING (run_id, layer, block, label, phase, expert)
            WHERE l.run_id = $run
            """
        ).fetchall()
    }


def test_without_weights_slots_stay_as_given_and_sums_are_null(store: Store, random_trace: Any) -> None:
    run = import_trace(store, random_trace(weights=False).table, name="trace", n_experts=N_EXPERTS)
    assert run.store.sql("SELECT count(weights), count(margin), count(entropy) FROM routing").fetchall() == [(0, 0, 0)]
    assert run.store.sql("SELECT count(weight_sum), sum(tokens) FROM loads").fetchall() == [(0, 20 * 3 * 3)]
    assert run.store.sql("SELECT count(token_id), count(nll) FROM tokens").fetchall() == [(0, 0)]
    assert run.store.sql("SELECT count(text), count(label), count(content_hash) FROM sequences").fetchall() == [
        (0, 0, 0)
    ]
    (note,) = run.info["summary"]["notes"]
    for lacking in ("weights", "token ids", "text", "labels", "margins", "entropies"):
        assert f"no {lacking}" in note


def test_text_and_hash_of_a_sequence_come_from_its_prompt(store: Store, random_trace: Any) -> None:
    rows = random_trace((7, 2))
    run = import_trace(store, rows.table, name="trace", n_experts=N_EXPERTS)
    query = "SELECT sequence_id, text, n_tokens, content_hash, label, document_id, part FROM sequences ORDER BY 1"
    for sequence, text, n_tokens, content_hash, label, document, part in run.store.sql(query).fetchall():
        ids = {row["position"]: row["token_id"] for row in rows.rows if row["sequence_id"] == sequence}
        prompt = [ids[position] for position in range(min(5, len(ids)))]
        assert text == "".join(f"«{n}»" for n in prompt)
        assert n_tokens == len(prompt)
        assert content_hash == hashlib.sha256(np.array(prompt, "<i8").tobytes()).hexdigest()
        assert (label, document, part) == ("ab"[sequence], sequence, 0)
    seen = {row["token_id"]: row["text"] for row in rows.rows}
    vocabulary = run.store.sql("SELECT token_id, bytes, text FROM vocabulary").fetchall()
    assert {token_id: (raw, text) for token_id, raw, text in vocabulary} == {
        token_id: (text.encode(), text) for token_id, text in seen.items()
    }


def test_blocks_documents_and_null_experts_are_kept(store: Store) -> None:
    rows = [
        {"sequence_id": s, "position": p, "layer": 0, "block": block, "experts": [9 if p else 2], "document_id": 4}
        for s in (0, 1)
        for p in (0, 1)
        for block in ("mlp", "attn", "mlp.1")
    ]
    run = import_trace(store, pa.Table.from_pylist(rows), name="trace", n_experts=8, n_null=2)
    assert run.status == "complete"
    assert run.store.sql("SELECT block, n_experts, n_null, top_k FROM layers ORDER BY block").fetchall() == [
        ("attn", 8, 2, 1),
        ("mlp", 8, 2, 1),
        ("mlp.1", 8, 2, 1),
    ]
    assert run.store.sql("SELECT document_id, part FROM sequences ORDER BY sequence_id").fetchall() == [(4, 0), (4, 1)]
    assert run.store.sql("SELECT max(expert), count(*) FROM loads WHERE block = 'attn'").fetchall() == [(9, 10)]


def test_labels_given_fill_only_those_missing(store: Store) -> None:
    trace = pa.table(
        {
            "sequence_id": [0, 1, 2],
            "position": [0, 0, 0],
            "layer": [0, 0, 0],
            "experts": [[0], [0], [1]],
            "label": ["own", None, ""],
        }
    )
    run = import_trace(store, trace, name="trace", n_experts=2, label="given")
    assert run.store.sql("SELECT label FROM sequences ORDER BY sequence_id").fetchall() == [("own",), ("given",), ("",)]


def test_other_columns_are_left_out_and_named(store: Store, random_trace: Any) -> None:
    table = random_trace().table.append_column("temperature", pa.array(np.ones(60)))
    run = import_trace(store, table, name="trace", n_experts=N_EXPERTS)
    assert any("temperature" in note for note in run.info["summary"]["notes"])


@pytest.mark.slow
def test_an_imported_run_can_be_reported_and_analysed(store: Store, random_trace: Any, tmp_path: Path) -> None:
    import moescope as ms

    run = import_trace(store, random_trace().table, name="trace", n_experts=N_EXPERTS, model="mine")
    assert run.model == "mine"
    assert ms.analyze(run, "load").df()["tokens"].sum() == 20 * 3 * 3
    assert ms.write_report(run, tmp_path / "report.html").stat().st_size > 1000


def _documented_rows() -> list[list[str]]:
    text = (Path(__file__).parents[3] / "docs" / "import-export.md").read_text(encoding="utf-8")
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]


def test_columns_of_the_documentation_are_those_that_are_read() -> None:
    told = {row[0].strip("`"): row[1:] for row in _documented_rows() if len(row) == 4 and row[1].strip("`[]").isupper()}
    assert told == {
        name: [f"`{kind}`", "yes" if required else "", meaning] for name, (kind, required, meaning) in COLUMNS.items()
    }


def test_every_format_is_documented() -> None:
    told = {row[0].strip("`") for row in _documented_rows() if len(row) == 4 and not row[1].strip("`[]").isupper()}
    assert told == set(FORMATS)
