"""Exports: read as they are by other programs, and imported again to the same rows; whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from moescope.core.errors import InputError, RunError
from moescope.store.exporting.export_run import FORMATS, export_run
from moescope.store.exporting.tables import EXPORTED
from moescope.store.importing.import_trace import import_trace
from moescope.store.run import Run
from moescope.store.store import Store

_ROUTING = """
    SELECT token, layer, block, experts, weights, margin, entropy FROM routing WHERE run_id = $run ORDER BY token, layer, block
"""
_SEQUENCES = """
    SELECT sequence_id, document_id, part, label, text, n_tokens, content_hash FROM sequences WHERE run_id = $run ORDER BY 1
"""


@pytest.fixture
def recorded(store: Store, demo_model: Any) -> Run:
    """A run of the bundled model, with labels, text in several scripts, and generated tokens."""
    import moescope as ms

    texts = [
        {"text": "The quick brown fox, twice.", "label": "english"},
        {"text": "Größe 東京 🧪", "label": ""},
        {"text": 'def f(a, b):\n    return [a, "b"]\n'},
    ]
    corpus = [{"text": t["text"], **({"label": t["label"]} if "label" in t else {})} for t in texts]
    path = store.path.with_name("texts.jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in corpus), encoding="utf-8")
    return ms.record(demo_model, str(path), store, name="base", generate=3, progress=False)


@pytest.fixture
def small(store: Store) -> Run:
    rows = [
        {
            "sequence_id": s,
            "position": p,
            "layer": layer,
            "experts": [p % 4, 4 + s],
            "weights": [0.5, 0.25],
            "label": label,
        }
        for s, label in enumerate(["a", "", None])
        for p in range(5)
        for layer in (1, 12)
    ]
    return import_trace(store, pa.Table.from_pylist(rows), name="small", n_experts=8)


@pytest.mark.parametrize("format", FORMATS)
def test_a_recorded_run_comes_back_as_it_was(recorded: Run, tmp_path: Path, format: str) -> None:  # noqa: A002
    folder = export_run(recorded, tmp_path / "out", format=format)
    sources: dict[str, Any] = {"parquet": folder, "csv": folder / "routing.csv"}
    if format == "hf":
        sources["hf"] = pytest.importorskip("datasets").load_from_disk(str(folder))
    again = import_trace(
        recorded.store,
        sources[format],
        name="again",
        n_experts=recorded.sql("SELECT max(n_experts) FROM layers WHERE run_id = $run").fetchall()[0][0],
    )
    assert again.status == "complete", again.coverage.df()
    assert again.sql(_ROUTING).fetchall() == recorded.sql(_ROUTING).fetchall()
    tokens = "SELECT token, sequence_id, position, token_id, phase FROM tokens WHERE run_id = $run ORDER BY token"
    assert again.sql(tokens).fetchall() == recorded.sql(tokens).fetchall()
    loads = "SELECT layer, block, label, phase, expert, tokens FROM loads WHERE run_id = $run ORDER BY ALL"
    assert again.sql(loads).fetchall() == recorded.sql(loads).fetchall()
    sums = "SELECT weight_sum FROM loads WHERE run_id = $run ORDER BY layer, block, label, phase, expert"
    assert [n for (n,) in again.sql(sums).fetchall()] == pytest.approx([n for (n,) in recorded.sql(sums).fetchall()])
    labels = "SELECT sequence_id, label, content_hash FROM sequences WHERE run_id = $run ORDER BY 1"
    assert again.sql(labels).fetchall() == recorded.sql(labels).fetchall()
    if format == "parquet":  # it has the sequences and layers beside the decisions
        assert again.sql(_SEQUENCES).fetchall() == recorded.sql(_SEQUENCES).fetchall()
        layers = (
            "SELECT * EXCLUDE (run_id) FROM layers WHERE run_id = $run AND kind = 'moe' AND n_experts > 0 ORDER BY ALL"
        )
        assert again.sql(layers).fetchall() == recorded.sql(layers).fetchall()
        assert again.model == recorded.model


def test_every_table_of_a_recorded_run_is_exported_whole(recorded: Run, tmp_path: Path) -> None:
    folder = export_run(recorded, tmp_path / "out")
    written = {path.name for path in folder.iterdir() if path.is_dir()}
    assert written == {name for name in EXPORTED if recorded.rows(name)}
    assert {"routing", "tokens", "sequences", "loads", "layers", "coverage", "vocabulary"} <= written
    for name in written:
        files = f"{folder}/{name}/**/*.parquet"
        rows = duckdb.sql(
            f"SELECT count(*), count(DISTINCT run_id) FROM read_parquet('{files}', hive_partitioning=true)"
        )
        assert rows.fetchall() == [(recorded.rows(name), 1)], name
    about = json.loads((folder / "moescope.json").read_text())
    assert about["run"]["name"] == "base"
    assert about["run"]["run_id"] == recorded.run_id


def test_other_readers_take_the_partitions_as_they_are(small: Run, tmp_path: Path) -> None:
    folder = export_run(small, tmp_path / "out") / "routing"
    assert {path.parent.name for path in folder.rglob("*.parquet")} == {"layer=1", "layer=12"}
    arrow = pads.dataset(folder, partitioning="hive").to_table()  # as Ray Data reads it
    assert arrow.num_rows == 30
    assert sorted(set(arrow["layer"].to_pylist())) == [1, 12]
    found = arrow.filter(pa.compute.field("layer") == 12).sort_by("token").to_pylist()
    assert found[6]["experts"] == [1, 5]
    assert (found[6]["sequence_id"], found[6]["position"], found[6]["label"]) == (1, 1, "")
    polars = pytest.importorskip("polars")
    frame = polars.scan_parquet(folder, hive_partitioning=True).filter(polars.col("layer") == 1).collect()
    assert frame.height == 15
    assert frame["experts"].list.len().unique().to_list() == [2]


def test_the_dataset_holds_every_decision_with_its_text(recorded: Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.load_from_disk(str(export_run(recorded, tmp_path / "out", format="hf")))
    assert len(found) == recorded.rows("routing")
    texts = recorded.sql(
        """
        SELECT t.token, v.text FROM tokens t LEFT JOIN vocabulary v USING (run_id, token_id) WHERE run_id = $run
        """
    ).fetchall()
    assert dict(zip(found["token"], found["text"], strict=True)) == dict(texts)
    assert found.filter(lambda row: row["layer"] == 0).num_rows > 0


def test_the_dataset_is_cut_into_shards(small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moescope.store.exporting.hf_dataset as module

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(module, "_SHARD_BYTES", 1)
    monkeypatch.setattr(module, "_ROWS_A_BATCH", 2048)
    rows = [{"sequence_id": 0, "position": p, "layer": 0, "experts": [p % 4]} for p in range(5000)]
    run = import_trace(small.store, pa.Table.from_pylist(rows), name="long", n_experts=4)
    folder = export_run(run, tmp_path / "out", format="hf")
    assert len(list(folder.glob("data-*-of-00003.arrow"))) == 3
    found = datasets.load_from_disk(str(folder))
    assert found["position"][:] == list(range(5000))


def test_tables_can_be_chosen(small: Run, tmp_path: Path) -> None:
    folder = export_run(small, tmp_path / "out", format="csv", tables=["loads", "layers"])
    assert sorted(path.name for path in folder.iterdir()) == ["layers.csv", "loads.csv", "moescope.json"]
    with pytest.raises(InputError, match="no table 'runs'"):
        export_run(small, tmp_path / "other", tables=["runs"])
    with pytest.raises(InputError, match="no decisions"):
        export_run(small, tmp_path / "other", format="hf", tables=["loads"])
    with pytest.raises(InputError, match="no format 'xml'"):
        export_run(small, tmp_path / "other", format="xml")


def test_nothing_to_export_is_said(store: Store, tmp_path: Path) -> None:
    run = store.begin_run(name="empty", model="none")
    with pytest.raises(InputError, match="no rows to export"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_kept_unless_it_is_an_export_to_overwrite(small: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="mine"):
            export_run(small, mine, overwrite=overwrite)
    assert (mine / "thesis.txt").read_text() == "years of work"
    link = tmp_path / "link"
    link.symlink_to(mine)
    with pytest.raises(InputError, match="is not overwritten"):
        export_run(small, link, overwrite=True)
    folder = export_run(small, tmp_path / "out")
    with pytest.raises(InputError, match="is there already"):
        export_run(small, folder, format="csv")
    export_run(small, folder, format="csv", overwrite=True)
    assert (folder / "routing.csv").is_file()
    assert not (folder / "routing").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("runs.duckdb")) == [
        "link",
        "mine",
        "out",
    ]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_export_that_stops_leaves_what_was_there(
    small: Run, tmp_path: Path, failure: BaseException, overwrite: bool
) -> None:
    folder = tmp_path / "out"
    if overwrite:
        export_run(small, folder, format="csv")

    def tell(part: str) -> None:
        if part == "loads":
            raise failure

    with pytest.raises(RunError if isinstance(failure, OSError) else KeyboardInterrupt):
        export_run(small, folder, overwrite=overwrite, tell=tell)
    assert folder.exists() == overwrite
    assert not overwrite or (folder / "routing.csv").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_made_is_said(small: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        export_run(small, tmp_path / "a" / "b")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is there already"):
        export_run(small, tmp_path / "file")


def test_two_runs_in_one_folder_are_told_apart(small: Run, tmp_path: Path) -> None:
    first = export_run(small, tmp_path / "out")
    other = import_trace(small.store, first, name="other")
    second = export_run(other, tmp_path / "second")
    (second / "routing" / f"run_id={other.run_id}").rename(first / "routing" / f"run_id={other.run_id}")
    with pytest.raises(InputError, match="holds 2 runs"):
        import_trace(small.store, first, name="third")
    one = import_trace(small.store, first / "routing" / f"run_id={small.run_id}", name="one", n_experts=8)
    assert one.sql(_ROUTING).fetchall() == small.sql(_ROUTING).fetchall()
