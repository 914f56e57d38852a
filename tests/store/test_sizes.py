"""Size formulas against files that DuckDB wrote: what a run is said to take, and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from moescope.store.block_packing import BLOCK, GROUP_ROWS, packed, row_groups, table_blocks
from moescope.store.coverage import Expectation
from moescope.store.ending import end_run
from moescope.store.measured_bytes import bytes_before, bytes_in_use, measured_floats, note_costs
from moescope.store.run_shapes import RouterShape, RunShape, VectorShape
from moescope.store.sizes import run_bytes, vector_bytes
from moescope.store.store import Store
from moescope.store.table_rows import FLOAT_BYTES, bits, columns_of, rows_of
from moescope.store.totals import ExpertPartial, LoadPartial
from moescope.store.vector_shards import VectorRows
from moescope.store.writer import BatchRecords, RunWriter

LAYERS, EXPERTS, TOP_K, WIDTH, VOCABULARY, LENGTH = 3, 12, 3, 256, 4096, 250
ALL = ("tokens", "routing", "experts", "residual", "router_logits", "expert_outputs")


def _blocks_of(path: Path, columns: dict[str, pa.Array]) -> int:
    """Blocks that DuckDB uses for a table written at once, of which the directory takes one."""
    rows = pa.table(columns)
    with duckdb.connect(str(path)) as connection:
        connection.register("rows", rows)
        connection.execute("CREATE TABLE t AS SELECT * FROM rows")
        connection.execute("CHECKPOINT")
        return int(connection.execute("SELECT used_blocks FROM pragma_database_size()").fetchall()[0][0]) - 1


@pytest.mark.parametrize("rows", [3_000, 60_000, 122_880, 300_000, 500_000])
def test_blocks_are_those_that_duckdb_uses(rows: int, tmp_path: Path) -> None:
    random = np.random.default_rng(rows)
    widths = (3, 11, 16, 20, 7)
    columns = {f"c{n}": pa.array(random.integers(0, 2**width, rows), pa.int64()) for n, width in enumerate(widths)}
    sizes = [bits(2.0**width) for width in widths]
    expected = packed([[group * size for size in sizes] for group in row_groups(rows)])
    found = _blocks_of(tmp_path / "t.duckdb", columns)
    assert abs(expected - found) <= max(1, 0.05 * found)


def test_full_blocks_and_rests_are_counted_by_hand() -> None:
    room = BLOCK - 8
    assert packed([[room * 3.0]]) == 3
    assert packed([[room * 0.5, room * 0.4]]) == 1
    assert packed([[room * 0.5, room * 0.6]]) == 2
    assert packed([[room * 0.85, room * 0.1]]) == 2  # over four fifths: alone in its block
    assert packed([[room * 0.5], [room * 0.4]]) == 1  # rests of the next row group fill the block up
    assert packed([]) == 0


def test_small_chunks_are_written_together_and_large_ones_by_themselves() -> None:
    assert table_blocks(1_000, [1.0], chunk_rows=10, chunks_between_checkpoints=5) == 1_000 // 50
    assert table_blocks(1_000, [1.0], chunk_rows=10, chunks_between_checkpoints=200) == 1
    large = GROUP_ROWS + 1
    one = packed([[GROUP_ROWS * 4.0], [4.0]])
    assert table_blocks(7 * large, [4.0], chunk_rows=large, chunks_between_checkpoints=100) == 7 * one


@pytest.mark.parametrize("values", [1, 2, 3, 16, 17, 256, 50_257])
def test_packed_integers_are_as_wide_as_their_range(values: int) -> None:
    assert bits(values) * 8 == (values - 1).bit_length()


Recorded = Callable[..., tuple[Store, RunShape]]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """`recorded(batches, routers=3)`: a run of random records, written as any run, and its shape."""

    def make(batches: int, *, rows: int = 8, routers: int = LAYERS, seed: int = 0) -> tuple[Store, RunShape]:
        store = Store(tmp_path / "runs.duckdb")
        said = {"what a run says of itself": "as JSON"}
        run = store.begin_run(name="random", model="random", settings=said, versions=said, anatomy=said)
        store.add_layers(
            run, [{"layer": n, "block": "mlp", "kind": "moe", "n_experts": EXPERTS} for n in range(LAYERS)]
        )
        writer = RunWriter(store, run.run_id)
        random = np.random.default_rng(seed)
        for number in range(batches):
            records = _batch(random, number, rows, routers)
            writer.submit(lambda records=records: records)  # type: ignore[misc]
        writer.close()
        counted = [Expectation(name, 0, f'SELECT count(*) FROM "{name}"') for name in ("tokens", "residual")]
        end_run(store, run, counted, {"seconds": 1.0}, failed=False)
        note_costs(store, run.run_id, planned=None, seconds=1.0, before=0)
        shape = RunShape(
            tokens=batches * rows * LENGTH,
            sequences=batches * rows,
            batches=batches,
            longest=LENGTH,
            layers=LAYERS,
            d_model=WIDTH,
            vocabulary=VOCABULARY,
            routers=(RouterShape(TOP_K, EXPERTS),) * routers,
            labels=2,
            labels_a_batch=1.0,
            text_bytes=batches * rows * 600,
        )
        return store, shape

    return make


def _batch(random: np.random.Generator, number: int, rows: int, routers: int) -> BatchRecords:
    """One batch as the probes make it: token by token, layer after layer."""
    n = rows * LENGTH
    token = number * n + np.arange(n)
    sequence = number * rows + np.arange(rows)
    text = ["".join(map(chr, random.integers(97, 123, 600))) for _ in range(rows)]
    tables = {
        "sequences": pa.table(
            {
                "sequence_id": sequence,
                "document_id": sequence,
                "label": pa.array([f"label {number % 2}"] * rows),
                "text": text,
                "n_tokens": pa.array([LENGTH] * rows, pa.int32()),
                "content_hash": [random.bytes(32).hex() for _ in range(rows)],
            }
        ),
        "tokens": pa.table(
            {
                "token": token,
                "sequence_id": np.repeat(sequence, LENGTH),
                "position": pa.array(np.tile(np.arange(LENGTH), rows), pa.int32()),
                "token_id": pa.array(random.integers(0, VOCABULARY, n), pa.int32()),
                "phase": pa.array(["prefill"] * n),
                "nll": pa.array(random.gamma(2.0, 2.0, n), pa.float32()),
                "predicted_id": pa.array(random.integers(0, VOCABULARY, n), pa.int32()),
                "is_special": pa.array(np.zeros(n, bool)),
            }
        ),
        "residual": pa.table(
            {
                "token": np.tile(token, LAYERS),
                "layer": np.repeat(np.arange(LAYERS, dtype=np.uint16), n),
                "norm": pa.array(random.normal(30, 4, n * LAYERS), pa.float32()),
                "top_values": _lists(random.normal(0, 9, (n * LAYERS, 3)).astype(np.float32), fixed=True),
                "top_channels": _lists(random.integers(0, WIDTH, (n * LAYERS, 3)).astype(np.uint16), fixed=True),
            }
        ),
        "residual_sequences": pa.table(
            {
                "sequence_id": np.tile(sequence, LAYERS),
                "layer": np.repeat(np.arange(LAYERS, dtype=np.uint16), rows),
                "median_abs": pa.array(random.normal(1, 0.1, rows * LAYERS), pa.float32()),
            }
        ),
    }
    records = BatchRecords(number, (int(sequence[0]), rows, n), tables)
    if routers:
        _add_routing(records, random, token, number, routers)
    return records


def _add_routing(
    records: BatchRecords, random: np.random.Generator, token: np.ndarray, number: int, routers: int
) -> None:
    n = len(token)
    logits = random.normal(0, 2, (n * routers, EXPERTS)).astype(np.float32)
    chosen = np.argsort(-logits, axis=1)[:, :TOP_K]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    weights = np.take_along_axis(shares, chosen, 1)
    where = {
        "token": np.tile(token, routers),
        "layer": np.repeat(np.arange(routers, dtype=np.uint16), n),
        "block": pa.array(["mlp"] * (n * routers)),
    }
    ordered = -np.sort(-logits, axis=1)
    scores = {
        "margin": pa.array(ordered[:, TOP_K - 1] - ordered[:, TOP_K]),
        "entropy": pa.array(-(shares * np.log(shares)).sum(1), pa.float32()),
    }
    lists = {"experts": _lists(chosen.astype(np.uint16)), "weights": _lists(weights)}
    norms = random.normal(5, 1, (n * routers, TOP_K)).astype(np.float32)
    records.tables["routing"] = pa.table({**where, **lists, **scores})
    records.tables["router_logits"] = pa.table({**where, "logits": _lists(logits)})
    records.tables["expert_outputs"] = pa.table({**where, "norms": _lists(norms)})
    for layer in range(routers):
        tokens = np.bincount(chosen[layer * n : (layer + 1) * n].ravel(), minlength=EXPERTS)
        sums = tokens * random.uniform(0.2, 0.4, EXPERTS)
        records.loads.append(LoadPartial(layer, "mlp", f"label {number % 2}", "prefill", tokens, sums))
        largest = random.uniform(1, 9, EXPERTS).astype(np.float32)
        where_ = random.integers(0, n, EXPERTS)
        records.experts.append(
            ExpertPartial(
                *(layer, "mlp", tokens, sums, sums * 7, sums * 3, largest),
                *(where_ % WIDTH, where_, tokens * 32, tokens * 30, tokens * 0),
            )
        )


def _lists(values: np.ndarray, *, fixed: bool = False) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).ravel())
    if fixed:
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.ListArray.from_arrays(pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)), flat)


@pytest.mark.parametrize("batches", [1, 6, 60])
@pytest.mark.parametrize("probes", [("tokens", "residual"), ALL])
def test_a_run_takes_what_the_formulas_say(batches: int, probes: tuple[str, ...], recorded: Recorded) -> None:
    store, shape = recorded(batches, routers=LAYERS if probes == ALL else 0)
    with store:
        used = bytes_in_use(store)
        planned = run_bytes(shape, probes)
        assert planned.total == pytest.approx(used, rel=0.1)
        assert used == pytest.approx(store.path.stat().st_size, rel=0.05)
        for table, rows in planned.rows.items():
            assert rows == pytest.approx(store.fetch(f'SELECT count(*) FROM "{table}"')[0][0], rel=0.02), table


def test_over_100_000_tokens_most_of_a_table_is_its_rows(recorded: Recorded) -> None:
    store, shape = recorded(60)
    with store:
        bytes_in_use(store)
        random = np.random.default_rng(9)
        floats = measured_floats([_batch(random, number, 8, LAYERS).tables for number in range(3)])
        assert set(floats) == {n for n in FLOAT_BYTES if n != "residual_sequences.median_abs" and n != "tokens.nll"}
        planned = run_bytes(shape, ALL, floats).tables
        for table in ("routing", "residual", "router_logits", "expert_outputs", "tokens"):
            query = """
                SELECT count(DISTINCT block)
                FROM (
                    SELECT unnest(list_append(additional_block_ids, block_id)) AS block
                    FROM pragma_storage_info($table)
                    WHERE persistent
                )
                WHERE block >= 0
            """
            blocks = store.fetch(query, {"table": table})[0][0]
            assert planned[table] / BLOCK == pytest.approx(blocks, rel=0.1, abs=1), table


def test_measured_floats_follow_the_data() -> None:
    rows = 40_000
    few = pa.array(np.tile(np.array([0.25, 0.5], np.float32), rows // 2))
    noise = pa.array(np.random.default_rng(0).integers(0, 2**31 - 2**24, rows).astype(np.uint32).view(np.float32))
    of = {name: measured_floats([{"tokens": pa.table({"nll": data})}])["tokens.nll"] for name, data in
          (("few", few), ("noise", noise))}  # fmt: skip
    assert of["few"] < 1.0
    assert 3.9 < of["noise"] < 4.2


def test_too_few_records_measure_nothing() -> None:
    short = pa.table({"nll": pa.array(np.ones(100, np.float32))})
    assert measured_floats([{"tokens": short}]) == {}
    assert measured_floats([]) == {}


@pytest.mark.parametrize(("dtype", "itemsize", "experts"), [("float32", 4, False), ("bfloat16", 2, True)])
def test_vectors_take_exactly_their_bytes(dtype: str, itemsize: int, experts: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows, width, k = 400, 48, 3 if experts else 1
    kind = np.float32 if itemsize == 4 else np.uint16
    with Store(tmp_path / "runs.duckdb") as store:
        run = store.begin_run(name="vectors")
        writer = RunWriter(store, run.run_id)
        vectors = VectorRows(
            "blocks.0.mlp.experts.hook_out",
            dtype,
            random.integers(0, 99, (rows * k, width)).astype(kind),
            np.repeat(np.arange(rows), k),
            np.zeros(rows * k, np.int32) if experts else None,
            rows,
        )
        writer.submit(lambda: BatchRecords(0, (0, 1, rows), vectors=[vectors]))
        writer.close()
    written = sum(f.stat().st_size for f in (tmp_path / "runs.vectors").rglob("*") if f.is_file())
    said = vector_bytes(VectorShape("blocks.0.mlp.experts.hook_out", width, itemsize, k, experts), rows, 1)
    payload = rows * k * (width * itemsize + 8 + 4 * experts)
    assert said - written == pytest.approx(0, abs=350)
    assert said > payload


def test_rows_grow_with_what_they_are_made_of() -> None:
    base = {"sequences": 10, "batches": 2, "longest": 100, "layers": 4, "d_model": 64, "vocabulary": 500}
    shape = RunShape(tokens=1_000, routers=(RouterShape(2, 8), RouterShape(2, 8, logits=False, inside=False)), **base)
    assert rows_of("routing", shape) == 2_000
    assert rows_of("router_logits", shape) == 1_000
    assert rows_of("expert_outputs", shape) == 1_000
    assert rows_of("residual", shape) == 4_000
    assert rows_of("loads", shape) == 16
    assert rows_of("load_partials", shape) == 2 * 2 * 8  # 500 tokens of two choices each leave none of 8 out
    answered = RunShape(tokens=1_000, generated=400, routers=(RouterShape(2, 8),), **base)
    assert rows_of("loads", answered) == 16  # two phases


def test_few_tokens_choose_few_experts() -> None:
    shape = RunShape(
        tokens=10, sequences=1, batches=1, longest=10, layers=1, d_model=8, vocabulary=9, routers=(RouterShape(1, 100),)
    )
    random = np.random.default_rng(0)
    drawn = np.mean([len(set(random.integers(0, 100, 10))) for _ in range(4_000)])
    assert rows_of("expert_partials", shape) == pytest.approx(drawn, abs=0.6)


def test_a_dense_model_has_no_rows_of_routing() -> None:
    shape = RunShape(tokens=1_000, sequences=10, batches=2, longest=100, layers=4, d_model=64, vocabulary=500)
    planned = run_bytes(shape, ALL)
    assert {t: planned.tables[t] for t in ("routing", "loads", "experts", "router_logits")} == dict.fromkeys(
        ("routing", "loads", "experts", "router_logits"), 0
    )


def test_columns_are_finite_and_positive_for_every_table() -> None:
    shape = RunShape(
        tokens=10, sequences=1, batches=1, longest=10, layers=1, d_model=8, vocabulary=9, routers=(RouterShape(1, 2),)
    )
    for probe in ALL:
        for table in run_bytes(shape, [probe]).rows:
            columns = columns_of(table, shape)
            assert all(math.isfinite(size) and size >= 0 for size in columns)
            assert sum(columns) > 0


def test_what_a_run_took_is_kept_with_it(recorded: Recorded) -> None:
    store, _ = recorded(2)
    with store:
        (run,) = store.runs()
        said = run.info["summary"]
        taken = bytes_in_use(store) - BLOCK
        note_costs(store, run.run_id, planned={"bytes": 5, "seconds": 2.0}, seconds=1.23456, before=BLOCK)
        summary = run.info["summary"]
        assert summary == {
            **said,
            "planned": {"bytes": 5, "seconds": 2.0},
            "actual": {"bytes": taken, "seconds": 1.235},
        }
        assert bytes_before(store) == bytes_in_use(store)
        kept = store.fetch("SELECT current_setting('max_vacuum_tasks')")
        note_costs(store, run.run_id, planned=None, seconds=1.0, before=0)
        assert store.fetch("SELECT current_setting('max_vacuum_tasks')") == kept


def test_a_store_without_runs_has_nothing_in_use_before_one(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.duckdb") as store:
        assert bytes_before(store) == 0
