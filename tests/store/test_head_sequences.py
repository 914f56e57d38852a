"""Statistics of heads by sequence: totals made from them, files of version 2, and what deleting and merging make of them."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moescope.store.ending import end_run
from moescope.store.head_totals import fold_heads, other_heads
from moescope.store.run import Run
from moescope.store.run_shapes import RunShape
from moescope.store.schema import SCHEMA_VERSION
from moescope.store.sizes import run_bytes
from moescope.store.store import Store
from moescope.store.table_rows import rows_of

HERE = Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location("moescope_tests_every_table_of_heads", HERE / "every_table.py")
assert _SPEC is not None
assert _SPEC.loader is not None
every_table: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(every_table)

RUNS = {str(uuid.UUID(int=1)): "first", str(uuid.UUID(int=2)): "second"}


def insert(run: Run, *rows: tuple[Any, ...]) -> None:
    """Rows (sequence_id, layer, block, metric, sums, n) under the condition `base`."""
    for sequence, layer, block, metric, sums, n in rows:
        run.store.connection.execute(
            "INSERT INTO head_sequences VALUES (?, ?, ?, ?, ?, 'base', ?, ?)",
            [run.run_id, sequence, layer, block, metric, sums, n],
        )


def heads(run: Run) -> list[tuple[Any, ...]]:
    query = "SELECT layer, block, head, metric, condition, value, n FROM heads WHERE run_id = ? ORDER BY ALL"
    return run.store.fetch(query, [run.run_id])


def test_a_value_is_the_mean_over_all_queries(run: Run) -> None:
    insert(run, (0, 3, "attn", "m", [1.0, 2.0], 4), (1, 3, "attn", "m", [2.0, 10.0], 8))
    fold_heads(run.store.connection, run.run_id)
    assert heads(run) == [(3, "attn", 0, "m", "base", 0.25, 12), (3, "attn", 1, "m", "base", 1.0, 12)]


def test_places_and_metrics_are_kept_apart(run: Run) -> None:
    insert(run, (0, 0, "attn", "m", [1.0], 2), (0, 0, "attn.1", "m", [3.0], 2), (0, 0, "attn", "o", [5.0], 2))
    fold_heads(run.store.connection, run.run_id)
    assert [(row[1], row[3], row[5]) for row in heads(run)] == [
        ("attn", "m", 0.5),
        ("attn", "o", 2.5),
        ("attn.1", "m", 1.5),
    ]


def test_texts_too_short_for_a_position_count_for_nothing(run: Run) -> None:
    insert(
        run,
        (0, 0, "attn", "alpha_9", [0.0], 0),
        (1, 0, "attn", "alpha_9", [3.0], 6),
        (2, 0, "attn", "alpha_8", [0.0], 0),
    )
    fold_heads(run.store.connection, run.run_id)
    assert heads(run) == [(0, "attn", 0, "alpha_9", "base", 0.5, 6)]


def test_folding_again_puts_new_totals_in_place_of_the_old(run: Run) -> None:
    insert(run, (0, 0, "attn", "m", [1.0], 1))
    fold_heads(run.store.connection, run.run_id)
    insert(run, (1, 0, "attn", "m", [0.0], 1))
    fold_heads(run.store.connection, run.run_id)
    assert heads(run) == [(0, "attn", 0, "m", "base", 0.5, 2)]


def test_rows_of_protocols_stay_and_are_told_from_totals(run: Run) -> None:
    """What a protocol measured has no sums by sequence behind it."""
    run.store.connection.execute(
        "INSERT INTO heads VALUES (?, 0, 0, 'retrieval', 'needle', 0.5, 9, 'attn')", [run.run_id]
    )
    insert(run, (0, 0, "attn", "m", [1.0], 1))
    fold_heads(run.store.connection, run.run_id)
    assert [row[3] for row in heads(run)] == ["m", "retrieval"]
    assert other_heads(run.store.connection, run.run_id) == 1


def test_other_runs_are_left_alone(store: Store) -> None:
    first, second = (store.begin_run(name=name) for name in "ab")
    for run in (first, second):
        insert(run, (0, 0, "attn", "m", [1.0], 1))
    fold_heads(store.connection, first.run_id)
    assert len(heads(first)) == 1
    assert heads(second) == []


def test_sums_are_added_in_the_order_of_sequences(run: Run) -> None:
    """So that every cut of a run gives the same bits: 1e16 + 1 − 1e16 is 0 or 1, by the order."""
    values = [1e16, 1.0, -1e16, 3.0]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        run.store.connection.execute("DELETE FROM head_sequences")
        insert(run, *((s, 0, "attn", "m", [values[s]], 1) for s in order))
        fold_heads(run.store.connection, run.run_id)
        ((*_, value, n),) = heads(run)
        assert (value, n) == ((((1e16 + 1.0) - 1e16) + 3.0) / 4, 4)


def test_a_run_that_ends_has_its_totals(run: Run) -> None:
    insert(run, (0, 0, "attn", "m", [1.0], 2))
    end_run(run.store, run, [], {}, failed=True)
    assert heads(run) == [(0, "attn", 0, "m", "base", 0.5, 2)]


def test_deleting_a_run_takes_both_tables(store: Store) -> None:
    kept, gone = (store.begin_run(name=name) for name in ("kept", "gone"))
    for run in (kept, gone):
        insert(run, (0, 0, "attn", "m", [1.0], 1))
        end_run(store, run, [], {}, failed=False)
    store.delete_run(gone)
    for table in ("heads", "head_sequences"):
        assert store.fetch(f"SELECT run_id::VARCHAR FROM {table}") == [(kept.run_id,)]


@pytest.fixture
def old(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """A file as version 2 made it, with rows of two runs in every table."""
    with duckdb.connect(str(path)) as connection:
        connection.execute((HERE / "v2_schema.sql").read_text(encoding="utf-8"))
        for run_id, name in RUNS.items():
            every_table.fill(connection, run_id, name)
        found: dict[str, list[tuple[Any, ...]]] = every_table.contents(connection)
        return found


def test_a_file_of_version_2_is_made_like_a_fresh_one(path: Path, old: Any, tmp_path: Path) -> None:
    with Store(path) as upgraded, Store(tmp_path / "fresh.duckdb") as fresh:
        assert every_table.shape(upgraded.connection) == every_table.shape(fresh.connection)
        assert dict(upgraded.fetch("SELECT key, value FROM store_info"))["schema_version"] == str(SCHEMA_VERSION)


def test_the_frozen_schema_of_version_2_is_an_older_one(path: Path, old: Any, tmp_path: Path) -> None:
    """Or the test above would compare a file with itself."""
    with duckdb.connect(str(path)) as connection, Store(tmp_path / "fresh.duckdb") as fresh:
        assert every_table.shape(connection) != every_table.shape(fresh.connection)


def test_every_row_of_version_2_is_there_and_heads_are_of_the_first_attention(path: Path, old: Any) -> None:
    with Store(path) as store:
        new = every_table.contents(store.connection)
        assert store.fetch("SELECT DISTINCT block FROM heads") == [("attn",)]
    assert new.pop("head_sequences") == []
    for table in set(old) - {"store_info"}:
        width = len(old[table][0])
        assert [row[:width] for row in new[table]] == old[table], table


def test_planned_rows_are_those_of_the_probe() -> None:
    shape = RunShape(
        tokens=1000, sequences=10, batches=2, longest=120, layers=3, d_model=64, vocabulary=97, heads=(4, 4, 8)
    )
    assert rows_of("head_sequences", shape) == 10 * 3 * 29
    assert rows_of("heads", shape) == 16 * 29
    assert run_bytes(shape, ["attention"]).tables["head_sequences"] > 0
