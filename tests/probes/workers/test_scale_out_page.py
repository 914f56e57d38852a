"""The sizes that docs/scale-out.md tells are those of the formulas, and its engines read what is exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moescope.store.run_shapes import RouterShape, RunShape
from moescope.store.sizes import run_bytes

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "scale-out.md").read_text(encoding="utf-8")
# Layers, width and vocabulary of the models, from their published configurations.
MODELS = {
    "OLMoE-1B-7B": (16, 2048, 50304),
    "Mixtral-8x7B": (32, 4096, 32000),
    "Qwen3-30B-A3B": (48, 2048, 151936),
    "gpt-oss-120b": (36, 2880, 201088),
    "DeepSeek-V3": (61, 7168, 129280),
}
ROW = re.compile(r"\| (\S+) \| (\d+) × (\d+), (\d+) \| (\d+) G \| ([\d.]+) TB \| ([\d.]+) TB \| ([\d.]+) TB \|")
TOKENS, BATCH, LONGEST = 10**9, 64, 2048


@pytest.mark.parametrize("row", ROW.findall(PAGE), ids=lambda row: row[0])
def test_sizes_on_the_page_are_those_of_the_formulas(row: tuple[str, ...]) -> None:
    name = row[0]
    routers, experts, k, decisions = map(int, row[1:5])
    routing, residual, everything = map(float, row[5:])
    layers, width, vocabulary = MODELS[name]
    batches = -(-TOKENS // (BATCH * LONGEST))
    shape = RunShape(
        tokens=TOKENS,
        sequences=batches * BATCH,
        batches=batches,
        longest=LONGEST,
        layers=layers,
        d_model=width,
        vocabulary=vocabulary,
        routers=tuple(RouterShape(k, experts) for _ in range(routers)),
        distinct=vocabulary,
        text_bytes=4 * TOKENS,
    )
    found = run_bytes(shape, ["tokens", "routing", "experts", "residual"])
    assert decisions * 10**9 == TOKENS * routers * k
    assert routing == pytest.approx(found.tables["routing"] / 1e12, rel=0.1)
    assert residual == pytest.approx(found.tables["residual"] / 1e12, rel=0.1)
    assert everything == pytest.approx(found.total / 1e12, rel=0.1)


def test_every_model_of_the_page_is_checked() -> None:
    assert {row[0] for row in ROW.findall(PAGE)} == set(MODELS)


@pytest.fixture
def exported(tmp_path: Path, tiny_model: Any, token_ids: Any) -> tuple[Path, dict[tuple[int, int], int]]:
    """An export of a run, and the load of every expert as the store tells it."""
    import moescope as ms
    from moescope.store.exporting.export_run import export_run
    from moescope.store.store import Store

    with Store(tmp_path / "runs.duckdb") as store:
        corpus = ms.Corpus.from_token_ids(token_ids((7, 12, 4, 9)))
        run = ms.record(ms.load(tiny_model("qwen3_moe")), corpus, store, name="base", progress=False)
        folder = export_run(
            run, tmp_path / "exported", format="parquet", tables=None, overwrite=False, tell=lambda _: None
        )
        rows = store.fetch("SELECT layer, expert, tokens FROM loads WHERE tokens > 0")
    return folder, {(layer, expert): tokens for layer, expert, tokens in rows}


def test_duckdb_and_polars_read_the_export(exported: tuple[Path, dict[tuple[int, int], int]]) -> None:
    import duckdb

    folder, load = exported
    with duckdb.connect() as connection:
        rows = connection.execute(
            f"""
            SELECT layer, expert, count(*)
            FROM (
                SELECT layer, unnest(experts) AS expert
                FROM read_parquet('{folder}/routing/**/*.parquet', hive_partitioning = true)
            )
            GROUP BY ALL
            """
        ).fetchall()
    assert {(int(layer), int(expert)): n for layer, expert, n in rows} == load
    pl = pytest.importorskip("polars")
    found = (
        pl.scan_parquet(folder / "routing", hive_partitioning=True)
        .explode("experts")
        .group_by("layer", "experts")
        .len()
    )
    assert {(int(layer), int(expert)): n for layer, expert, n in found.collect().iter_rows()} == load


@pytest.mark.slow
def test_ray_data_reads_the_export(exported: tuple[Path, dict[tuple[int, int], int]]) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    import pyarrow as pa

    def explode(rows: Any) -> Any:
        parents = pa.compute.list_parent_indices(rows["experts"])
        layer = rows["layer"].take(parents).cast(pa.int64())
        return pa.table({"layer": layer, "expert": pa.compute.list_flatten(rows["experts"]).cast(pa.int64())})

    folder, load = exported
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    try:
        decisions = ray.data.read_parquet(str(folder / "routing")).map_batches(explode, batch_format="pyarrow")
        rows = decisions.groupby(["layer", "expert"]).count().take_all()
    finally:
        ray.shutdown()
    assert {(row["layer"], row["expert"]): row["count()"] for row in rows} == load
