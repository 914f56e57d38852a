"""Two runs of one plan give the same rows, however they are cut into chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moescope as ms
from moescope.store.schema import TABLES
from moescope.store.writer import RunWriter

LENGTHS = (7, 1, 12, 4, 9, 30, 2, 15, 11)
LABELS = ["a", "b", "a", "c", "b", "a", "a", "c", "b"]
FILLED = {
    "layers",
    "sequences",
    "tokens",
    "routing",
    "experts",
    "loads",
    "residual",
    "residual_sequences",
    "coverage",
    "batches",
    "load_partials",
    "expert_partials",
}


def contents(run: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table that has runs, without run_id; of `runs` what a plan decides."""
    found = {}
    for table in TABLES:
        if table.name != "runs" and "run_id" in {column.name for column in table.columns}:
            query = f'SELECT * EXCLUDE (run_id) FROM "{table.name}" WHERE run_id = ? ORDER BY ALL'
            found[table.name] = run.store.fetch(query, [run.run_id])
    columns = "model, revision, architecture, settings, versions, seed, corpus_fingerprint, status, anatomy"
    found["runs"] = run.store.fetch(f"SELECT {columns} FROM runs WHERE run_id = ?", [run.run_id])
    return found


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many batches each transaction of a writer took."""
    sizes: list[int] = []
    plain = RunWriter._commit

    def counting(self: RunWriter) -> None:
        if self._pending:
            sizes.append(len(self._pending))
        plain(self)

    monkeypatch.setattr(RunWriter, "_commit", counting)
    return sizes


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama"])
def test_two_runs_of_one_plan_give_identical_rows(
    family: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    sequences = token_ids(LENGTHS)
    runs = [
        record_ids(tiny_model(family), sequences, name=name, batch_size=2, labels=LABELS) for name in ("one", "two")
    ]
    one, two = map(contents, runs)
    assert one == two
    moe = set() if family == "llama" else {"routing", "experts", "loads", "load_partials", "expert_partials"}
    assert {name for name, rows in one.items() if rows} == (
        FILLED - {"routing", "experts", "loads", "load_partials", "expert_partials"} | moe | {"runs"}
    )


def test_chunks_change_no_row_and_no_bit_of_a_sum(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    commits: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sequences, module = token_ids(LENGTHS), tiny_model("qwen3_moe")
    whole = contents(record_ids(module, sequences, name="whole", batch_size=2, labels=LABELS))
    assert commits == [5], "five batches in one transaction"
    found = {}
    for rows in (1, 40):
        commits.clear()
        monkeypatch.setitem(RunWriter.__init__.__kwdefaults__, "chunk_rows", rows)
        found[rows] = contents(record_ids(module, sequences, name=f"chunks of {rows}", batch_size=2, labels=LABELS))
        assert sum(commits) == 5
        assert len(commits) == 5 if rows == 1 else 1 < len(commits) < 5
    assert found[1] == whole
    assert found[40] == whole


def test_a_chunk_also_ends_when_its_time_is_up(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    commits: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RunWriter.__init__.__kwdefaults__, "chunk_seconds", 0.0)
    record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), batch_size=2)
    assert commits == [1] * 5


def test_partials_of_the_batches_add_up_to_the_totals(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """Added in batch order, the partials give the totals to the last bit."""
    run = record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), batch_size=2, labels=LABELS)
    for partials, totals, keys in (
        ("load_partials", "loads", "layer, block, label, phase, expert"),
        ("expert_partials", "experts", "layer, block, expert"),
    ):
        added: dict[tuple[Any, ...], list[float]] = {}
        query = f"SELECT ({keys}), tokens, weight_sum FROM {partials} WHERE run_id = ? ORDER BY batch"
        for key, tokens, weights in run.store.fetch(query, [run.run_id]):
            held = added.setdefault(key, [0, 0.0])
            held[0], held[1] = held[0] + tokens, held[1] + weights
        query = f"SELECT ({keys}), tokens, weight_sum FROM {totals} WHERE run_id = ? AND tokens > 0"
        stored = {key: [tokens, weights] for key, tokens, weights in run.store.fetch(query, [run.run_id])}
        assert stored == added


def test_the_demo_model_gives_the_same_rows_twice(demo_model: Any, tmp_path: Path) -> None:
    texts = [{"text": f"Sentence number {n}, {'long ' * n}and done.", "label": "ab"[n % 2]} for n in range(7)]
    found = []
    for name in ("one", "two"):
        with ms.Store(tmp_path / f"{name}.duckdb") as store:
            found.append(contents(ms.record(demo_model, texts, store, name="run", batch_size=3, progress=False)))
    assert found[0] == found[1]
    assert found[0]["vocabulary"]
