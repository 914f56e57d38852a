"""Dumps of SGLang's expert-distribution recorder, laid out as its source lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

torch = pytest.importorskip("torch")
LAYERS, E, K, WIDTH = 4, 8, 3, 8
EXTEND, DECODE = 1, 2


def _chosen(tokens: int, seed: int) -> Any:
    """[layer, token, 8] Three experts, then −1; layer 0 is dense."""
    random = np.random.default_rng(seed)
    ids = np.full((LAYERS, tokens, WIDTH), -1)
    ids[1:, :, :K] = np.argsort(random.random((LAYERS - 1, tokens, E)), axis=2)[:, :, :K]
    return ids


def _record(
    ids: Any, positions: list[int], *, mode: int, lengths: list[int] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "forward_pass_id": 1,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [100 + p for p in positions],
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.tensor(ids, dtype=torch.int32),
        "misc_objects": [],
        "global_physical_count": torch.zeros((LAYERS, E), dtype=torch.int32),
        **more,
    }


def _save(path: Path, records: list[dict[str, Any]], placement: Any = None) -> Path:
    placement = np.tile(np.arange(E), (LAYERS, 1)) if placement is None else placement
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(placement)}, path)
    return path


def _stored(run: Any) -> dict[tuple[int, int, int], list[int]]:
    query = """
        SELECT t.sequence_id, t.position, r.layer, r.experts
        FROM routing r JOIN tokens t USING (run_id, token) WHERE run_id = $run
    """
    return {(s, p, layer): experts for s, p, layer, experts in run.sql(query).fetchall()}


def test_texts_of_a_prefill_and_their_generated_tokens_are_sequences(store: Store, tmp_path: Path) -> None:
    prefill, first, second = _chosen(7, 0), _chosen(2, 1), _chosen(1, 2)
    path = _save(
        tmp_path / "a.pt",
        [
            _record(prefill, [0, 1, 2, 0, 1, 2, 3], mode=EXTEND, lengths=[3, 4]),
            _record(first, [4, 3], mode=DECODE),
            _record(second, [5], mode=DECODE),
        ],
    )
    run = import_trace(store, path, name="a")
    assert run.status == "complete", run.coverage.df()
    expected = {}
    for layer in range(1, LAYERS):
        rows = [(0, p, prefill[layer, p]) for p in range(3)] + [(1, p, prefill[layer, 3 + p]) for p in range(4)]
        # Position 4 goes on with the text of four tokens, position 3 with that of three.
        rows += [(1, 4, first[layer, 0]), (0, 3, first[layer, 1]), (1, 5, second[layer, 0])]
        expected |= {(s, p, layer): ids[:K].tolist() for s, p, ids in rows}
    assert _stored(run) == expected
    assert run.sql("SELECT n_experts, top_k FROM layers WHERE run_id = $run").fetchall() == [(E, K)] * (LAYERS - 1)
    assert run.sql("SELECT count(*) FROM tokens WHERE run_id = $run AND phase = 'decode'").fetchall() == [(3,)]
    assert run.sql("SELECT bool_and(token_id = 100 + position) FROM tokens WHERE run_id = $run").fetchall() == [(True,)]


def test_generated_tokens_of_two_texts_of_one_length_are_short_and_said(
    store: Store, tmp_path: Path, gaps: Any
) -> None:
    records = [
        _record(_chosen(4, 0), [0, 1, 0, 1], mode=EXTEND, lengths=[2, 2]),
        _record(_chosen(2, 1), [2, 2], mode=DECODE),
    ]
    run = import_trace(store, _save(tmp_path / "a.pt", records), name="a")
    assert run.status == "incomplete"
    assert gaps(run)["tokens"][0] == "short"
    assert any("2 generated tokens were left out" in note for note in run.info["summary"]["notes"])
    assert run.rows("tokens") == 4


def test_request_ids_tell_texts_of_one_length_apart(store: Store, tmp_path: Path) -> None:
    records = [
        _record(_chosen(4, 0), [0, 1, 0, 1], mode=EXTEND, lengths=[2, 2], rids=["x", "y"]),
        _record(_chosen(2, 1), [2, 2], mode=DECODE, rids=["y", "x"]),
    ]
    run = import_trace(store, _save(tmp_path / "a.pt", records), name="a")
    assert run.status == "complete"
    stored, decode = _stored(run), _chosen(2, 1)
    assert stored[1, 2, 1] == decode[1, 0, :K].tolist()
    assert stored[0, 2, 1] == decode[1, 1, :K].tolist()


def test_moved_experts_are_put_back(store: Store, tmp_path: Path) -> None:
    placement = np.array([np.random.default_rng(n).permutation(E) for n in range(LAYERS)])
    ids = _chosen(3, 0)
    path = _save(tmp_path / "a.pt", [_record(ids, [0, 1, 2], mode=EXTEND, lengths=[3])], placement)
    run = import_trace(store, path, name="a")
    for (_, position, layer), experts in _stored(run).items():
        assert experts == placement[layer][ids[layer, position, :K]].tolist()
    assert any("placement" in note for note in run.info["summary"]["notes"])


@pytest.mark.parametrize("mode", ["stat", "per_pass"])
def test_counts_fill_loads_and_nothing_else(store: Store, tmp_path: Path, mode: str) -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 50, (5, LAYERS, E))
    counts[:, 0] = 0
    totals = counts[:, 1:].sum((0, 2))
    counts[0, 1:, 0] += totals.max() - totals  # every layer chooses as often
    if mode == "stat":
        dump: Any = {"rank": 0, "logical_count": torch.tensor(counts), "average_utilization_rate_over_window": None}
    else:
        records = [{"forward_pass_id": n, "global_physical_count": torch.tensor(c)} for n, c in enumerate(counts)]
        dump = {"records": records, "last_physical_to_logical_map": torch.arange(E).repeat(LAYERS, 1)}
    torch.save(dump, tmp_path / "a.pt")
    run = import_trace(store, tmp_path / "a.pt", name="a", label="x", top_k=1)
    assert run.status == "complete", run.coverage.df()
    rows = run.sql("SELECT layer, label, phase, expert, tokens, weight_sum FROM loads WHERE run_id = $run").fetchall()
    total = counts.sum(0)
    assert sorted(rows) == [
        (layer, "x", None, expert, int(total[layer, expert]), None) for layer in (1, 2, 3) for expert in range(E)
    ]
    assert run.rows("routing") == run.rows("tokens") == run.rows("sequences") == 0
    assert any("only `loads`" in note for note in run.info["summary"]["notes"])


def test_layers_that_chose_less_often_are_short(store: Store, tmp_path: Path, gaps: Any) -> None:
    counts = torch.full((1, 2, E), 6)
    counts[0, 1, 0] = 3
    torch.save({"rank": 0, "logical_count": counts}, tmp_path / "a.pt")
    run = import_trace(store, tmp_path / "a.pt", name="a", top_k=2)
    assert run.status == "incomplete"
    assert gaps(run)["blocks.1.mlp.hook_expert_indices"][0] == "short"


@pytest.mark.parametrize(
    "dump",
    [
        [1],
        {"weights": 1},
        {"records": []},
        {"records": [{"topk_ids_of_layer": 3}]},
        {"logical_count": "x"},
        {"records": [{"positions": [0]}]},
        {"logical_count": torch.zeros((1, 2, 4))},
    ],
)
def test_files_that_are_no_dump_are_refused(store: Store, tmp_path: Path, dump: Any) -> None:
    torch.save(dump, tmp_path / "a.pt")
    with pytest.raises(InputError):
        import_trace(store, tmp_path / "a.pt", name="a")
