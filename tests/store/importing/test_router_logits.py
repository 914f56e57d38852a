"""`router_logits` of transformers: the decision that torch takes from them, and no probabilities taken for logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

torch = pytest.importorskip("torch")
LAYERS, SEQUENCES, TOKENS, E, K = 3, 2, 6, 8, 3


@pytest.fixture
def logits() -> Any:
    """[layer, sequence · token, expert], rounded so that ties are there."""
    random = np.random.default_rng(0)
    return random.normal(size=(LAYERS, SEQUENCES * TOKENS, E)).round(1).astype(np.float32)


def _by_torch(logits: Any, *, normalize: bool) -> list[tuple[Any, ...]]:
    """(token, layer, ids, weights, entropy) by plain torch, ties by the lower id."""
    found = []
    for layer in range(len(logits)):
        shares = torch.softmax(torch.tensor(logits[layer]), -1)
        for token, row in enumerate(shares):
            ids = sorted(range(E), key=lambda e: (-float(row[e]), e))[:K]
            weights = row[ids]
            weights = weights / weights.sum() if normalize else weights
            found.append((token, layer, ids, weights.tolist(), float(-(row * row.log()).sum())))
    return sorted(found, key=lambda row: row[:2])


def _check(run: Any, expected: list[tuple[Any, ...]]) -> None:
    rows = run.sql(
        "SELECT token, layer, experts, weights, entropy, margin FROM routing WHERE run_id = $run ORDER BY token, layer"
    ).fetchall()
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    np.testing.assert_allclose([row[3] for row in rows], [row[3] for row in expected], rtol=1e-5)
    np.testing.assert_allclose([row[4] for row in rows], [row[4] for row in expected], rtol=1e-5)
    assert {row[5] for row in rows} == {None}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", ["npy", "npz", "layers", "four axes"])
def test_decisions_are_those_of_softmax_and_top_k(
    store: Store, tmp_path: Path, logits: Any, layout: str, normalize: bool
) -> None:
    path = tmp_path / ("a.npy" if layout in ("npy", "four axes") else "a.npz")
    if layout == "npy":
        np.save(path, logits)
    elif layout == "four axes":
        np.save(path, logits.reshape(LAYERS, SEQUENCES, TOKENS, E))
    elif layout == "npz":
        np.savez(path, router_logits=logits)
    else:
        # Names in another order than their numbers.
        np.savez(path, **{f"layer_{n}": logits[n] for n in reversed(range(LAYERS))})
    run = import_trace(store, path, name="a", top_k=K, normalize=normalize)
    assert run.status == "complete"
    _check(run, _by_torch(logits, normalize=normalize))
    stored = run.sql("SELECT logits FROM router_logits WHERE run_id = $run ORDER BY layer, token").fetchall()
    np.testing.assert_array_equal([row for (row,) in stored], logits.reshape(-1, E))
    assert any("decisions were made here" in note for note in run.info["summary"]["notes"])


def test_padding_is_left_out(store: Store, tmp_path: Path, logits: Any) -> None:
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    ids = np.arange(12).reshape(2, 6)
    np.savez(tmp_path / "a.npz", router_logits=logits, attention_mask=mask, input_ids=ids)
    run = import_trace(store, tmp_path / "a.npz", name="a", top_k=K)
    _check(run, _by_torch(logits[:, mask.ravel() == 1], normalize=False))
    rows = run.sql("SELECT sequence_id, position, token_id FROM tokens WHERE run_id = $run ORDER BY token").fetchall()
    assert rows == [(0, 0, 2), (0, 1, 3), (0, 2, 4), (0, 3, 5), (1, 0, 6), (1, 1, 7), (1, 2, 8)]


def test_probabilities_are_refused_unless_told(store: Store, tmp_path: Path, logits: Any) -> None:
    shares = torch.softmax(torch.tensor(logits), -1).numpy()
    np.save(tmp_path / "shares.npy", shares)
    with pytest.raises(InputError, match="probabilities, not logits"):
        import_trace(store, tmp_path / "shares.npy", name="a", top_k=K)
    run = import_trace(store, tmp_path / "shares.npy", name="a", top_k=K, probabilities=True)
    _check(run, _by_torch(logits, normalize=False))
    assert run.rows("router_logits") == 0
    np.save(tmp_path / "logits.npy", logits)
    with pytest.raises(InputError, match="holds no probabilities"):
        import_trace(store, tmp_path / "logits.npy", name="b", top_k=K, probabilities=True)


def test_one_layer_of_probabilities_is_enough_to_refuse(store: Store, tmp_path: Path, logits: Any) -> None:
    logits[1] = torch.softmax(torch.tensor(logits[1]), -1).numpy()
    np.save(tmp_path / "a.npy", logits)
    with pytest.raises(InputError, match="layer 1"):
        import_trace(store, tmp_path / "a.npy", name="a", top_k=K)


def test_what_does_not_fit_is_refused(store: Store, tmp_path: Path, logits: Any) -> None:
    np.save(tmp_path / "a.npy", logits)
    with pytest.raises(InputError, match="top_k"):
        import_trace(store, tmp_path / "a.npy", name="a")
    with pytest.raises(InputError, match="top_k=9 does not fit"):
        import_trace(store, tmp_path / "a.npy", name="a", top_k=9)
    np.savez(tmp_path / "b.npz", router_logits=logits, attention_mask=np.ones((2, 5)))
    with pytest.raises(InputError, match="attention_mask"):
        import_trace(store, tmp_path / "b.npz", name="a", top_k=K)
    np.savez(tmp_path / "c.npz", a=logits[0], b=logits[1, :4])
    with pytest.raises(InputError, match="no router logits"):
        import_trace(store, tmp_path / "c.npz", name="a", top_k=K)


def test_logits_that_are_nan_make_the_run_incomplete(store: Store, tmp_path: Path, logits: Any, gaps: Any) -> None:
    logits[2, 5, 1] = np.nan
    np.save(tmp_path / "a.npy", logits)
    run = import_trace(store, tmp_path / "a.npy", name="a", top_k=K)
    assert run.status == "incomplete"
    assert "blocks.2.mlp.hook_expert_indices" in gaps(run)
