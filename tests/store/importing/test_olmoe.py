"""Pickles and JSON lines of the OLMoE authors' analysis, made as their scripts make them."""

from __future__ import annotations

import json
import pickle
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

E, K, LAYERS, TOKENS = 16, 4, 3, 50


@pytest.fixture
def exp_ids() -> Any:
    """[token, k, layer], as their scripts stack them."""
    random = np.random.default_rng(0)
    return np.stack([np.argsort(random.random((TOKENS, E)), -1)[:, :K] for _ in range(LAYERS)], -1)


def _pickled(value: Any, path: Path) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def _loads(run: Any) -> dict[tuple[int, int], int]:
    found = run.sql("SELECT layer, expert, tokens FROM loads WHERE run_id = $run").fetchall()
    return {(layer, expert): tokens for layer, expert, tokens in found}


def test_counters_fill_the_loads_of_their_three_layers(store: Store, tmp_path: Path, exp_ids: Any) -> None:
    counters = [Counter(exp_ids[:, :, n].flatten()) for n in range(3)]
    path = _pickled(counters, tmp_path / "arxiv.pkl")
    run = import_trace(store, path, name="arxiv", n_experts=E, top_k=K, label="arxiv")
    assert run.status == "complete"
    assert _loads(run) == {
        (layer, e): int((exp_ids[:, :, n] == e).sum()) for n, layer in enumerate((0, 7, 15)) for e in range(E)
    }
    assert run.sql("SELECT DISTINCT label FROM loads WHERE run_id = $run").fetchall() == [("arxiv",)]
    assert any("layers 0, 7, 15" in note for note in run.info["summary"]["notes"])


def test_tokens_of_experts_are_counted_too(store: Store, tmp_path: Path, exp_ids: Any) -> None:
    tables: list[Any] = [defaultdict(Counter) for _ in range(2)]
    for n, table in enumerate(tables):
        for token in range(TOKENS):
            for e in exp_ids[token, :, n]:
                table[e][token % 7] += 1
    path = _pickled(tables, tmp_path / "eid2token.pkl")
    run = import_trace(store, path, name="a", n_experts=E, layers=[2, 9])
    assert _loads(run) == {
        (layer, e): int((exp_ids[:, :, n] == e).sum()) for n, layer in enumerate((2, 9)) for e in range(E)
    }


def test_counts_of_pairs_are_refused(store: Store, tmp_path: Path, exp_ids: Any) -> None:
    pairs = [Counter(zip(exp_ids[:, :, 0].flatten(), exp_ids[:, :, 1].flatten(), strict=True))]
    with pytest.raises(InputError, match="pairs of experts in two layers"):
        import_trace(store, _pickled(pairs, tmp_path / "a.pkl"), name="a")


@pytest.mark.parametrize("container", ["jsonl", "pickle", "array"])
def test_expert_ids_are_decisions(store: Store, tmp_path: Path, exp_ids: Any, container: str) -> None:
    result = {"input_ids": list(range(TOKENS)), "predicted_token_ids": [0] * TOKENS, "exp_ids": exp_ids.tolist()}
    path = tmp_path / ("a.jsonl" if container == "jsonl" else "a.pkl")
    if container == "jsonl":
        path.write_text(json.dumps(result) + "\n")
    else:
        _pickled([{**result, "exp_ids": exp_ids}] if container == "pickle" else exp_ids, path)
    run = import_trace(store, path, name="a", n_experts=E)
    assert run.status == "complete"
    rows = run.sql("SELECT token, layer, experts FROM routing WHERE run_id = $run ORDER BY token, layer").fetchall()
    assert rows == [(t, layer, exp_ids[t, :, layer].tolist()) for t in range(TOKENS) for layer in range(LAYERS)]
    ids = run.sql("SELECT count(token_id) FROM tokens WHERE run_id = $run").fetchall()
    assert ids == [(0 if container == "array" else TOKENS,)]


def test_pickled_router_probabilities_need_to_be_told(store: Store, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shares = [random.dirichlet(np.ones(E), TOKENS).astype(np.float32) for _ in range(LAYERS)]
    path = _pickled(shares, tmp_path / "a.pkl")
    with pytest.raises(InputError, match="probabilities"):
        import_trace(store, path, name="a", top_k=K)
    run = import_trace(store, path, name="a", top_k=K, probabilities=True)
    rows = run.sql("SELECT experts, weights FROM routing WHERE run_id = $run ORDER BY layer, token").fetchall()
    for (experts, weights), row in zip(rows, np.concatenate(shares), strict=True):
        assert experts == np.argsort(-row)[:K].tolist()
        np.testing.assert_array_equal(np.float32(weights), row[experts])


@pytest.mark.parametrize("value", [{"a": 1}, [1, 2], "text", [], [Counter("ab")], [{1: "x"}], np.array([1.5])])
def test_pickles_of_other_things_are_refused(store: Store, tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError):
        import_trace(store, _pickled(value, tmp_path / "a.pkl"), name="a", n_experts=E, top_k=1)
    assert store.runs() == []
