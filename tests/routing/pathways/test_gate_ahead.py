"""Gate ahead: logits that are a linear map of planted vectors are found again, noise is not."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.vector_shards import VectorRows, write_shards

Plant = Callable[..., Run]
WIDTH, EXPERTS, K = 12, 8, 2


def _keep(planted: ModuleType, run: Run, site: str, vectors: np.ndarray, token: np.ndarray) -> None:
    parts = [
        VectorRows(site, "float32", vectors[half].astype(np.float32), token[half].astype(np.int64), None, len(half))
        for half in np.array_split(np.arange(len(token)), 2)
    ]
    counts: dict[str, int] = {}
    for part in parts:
        catalogue = write_shards(run.store.path, run.run_id, [part], counts)
        assert catalogue is not None
        planted.insert(run, "activations", catalogue.to_pylist())


def _run(plant: Plant, planted: ModuleType, logits: list[np.ndarray], lengths: list[int]) -> Run:
    routers = [
        planted.Router(np.argsort(-scores, axis=1)[:, :K], EXPERTS, layer=layer, logits=scores)
        for layer, scores in enumerate(logits)
    ]
    return plant(lengths=lengths, routers=routers)


def _vectors(generator: np.random.Generator, tokens: int) -> np.ndarray:
    drawn = generator.normal(size=(tokens, WIDTH))
    return drawn / np.sqrt((drawn**2).mean(1, keepdims=True))


def test_linear_logits_are_found_again_on_new_documents(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(1)
    x = _vectors(generator, 400)
    linear = x @ generator.normal(size=(WIDTH, EXPERTS)) + generator.normal(size=EXPERTS)
    run = _run(plant, planted, [generator.normal(size=(400, EXPERTS)), linear], [20] * 20)
    scale = generator.uniform(0.5, 50, size=(400, 1))  # norms carry nothing: vectors are divided by theirs
    _keep(planted, run, "blocks.0.hook_resid_post", x * scale, np.arange(400))
    result = analyze(run, "gate_ahead", ridge=1e-9)
    row = result.df().iloc[0]
    assert (row["layer"], row["site"]) == (1, "blocks.0.hook_resid_post")
    assert row["value"] == 1.0
    assert row["r2"] == pytest.approx(1.0, abs=1e-5)
    assert row["null"] < 0.6
    assert row["n"] + row["fitted_on"] == 400
    assert "not the later router's own weights" in result.notes[-1]
    assert result.figure().data


def test_unrelated_vectors_are_no_better_than_popularity(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    logits = [generator.normal(size=(600, EXPERTS)) for _ in range(2)]
    run = _run(plant, planted, logits, [20] * 30)
    _keep(planted, run, "blocks.0.hook_resid_post", _vectors(generator, 600), np.arange(600))
    row = analyze(run, "gate_ahead").df().iloc[0]
    assert row["value"] == pytest.approx(K / EXPERTS, abs=0.07)
    assert row["null"] == pytest.approx(K / EXPERTS, abs=0.07)
    assert row["r2"] < 0.05


@pytest.mark.parametrize("tokens", [16, 90])
def test_map_is_the_minimiser_of_the_penalised_error(tokens: int) -> None:
    """Both forms of the solution (fewer and more tokens than components) against gradients of the objective."""
    from moescope.routing.pathways.gate_ahead import _predicted

    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(tokens, 40)), generator.normal(size=(tokens, 3))
    centre = x - x.mean(0)
    penalty = 0.1 * (centre**2).sum() / 40
    probe = np.eye(40) + x.mean(0)
    weights = _predicted(x.astype(np.float32), y, probe.astype(np.float32), 0.1) - y.mean(0)
    gradient = centre.T @ (centre @ weights - (y - y.mean(0))) + penalty * weights
    assert np.abs(gradient).max() < 1e-3


def test_part_of_the_tokens_and_a_sample_are_enough(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(4)
    x = _vectors(generator, 400)
    linear = x @ generator.normal(size=(WIDTH, EXPERTS))
    run = _run(plant, planted, [linear], [20] * 20)
    token = np.sort(generator.permutation(400)[:250])[::-1]
    _keep(planted, run, "blocks.0.hook_resid_pre", x[token], token)
    fields: dict[str, Any] = {"site": "hook_resid_pre", "ahead": 0, "ridge": 1e-9}
    row = analyze(run, "gate_ahead", **fields).df().iloc[0]
    assert row["value"] == 1.0
    assert row["n"] + row["fitted_on"] == 250
    row = analyze(run, "gate_ahead", sample=60, **fields).df().iloc[0]
    assert row["n"] + row["fitted_on"] == 60


def test_missing_vectors_sites_and_logits_are_named(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(5)
    logits = [generator.normal(size=(20, EXPERTS)) for _ in range(2)]
    bare = _run(plant, planted, logits, [10, 10])
    with pytest.raises(InputError, match=r"rows in activations.*probe"):
        analyze(bare, "gate_ahead")
    _keep(planted, bare, "blocks.1.hook_resid_post", _vectors(generator, 20), np.arange(20))
    with pytest.raises(InputError, match=r"kept no vectors.*--probe activations"):
        analyze(bare, "gate_ahead")
    with pytest.raises(InputError, match="ridge"):
        analyze(bare, "gate_ahead", ridge=0.0)
    half = _run(plant, planted, logits, [10, 10])
    _keep(planted, half, "blocks.0.hook_resid_post", _vectors(generator, 20)[:10], np.arange(10))
    with pytest.raises(InputError, match="both halves"):
        analyze(half, "gate_ahead")
    half.store.connection.execute("DELETE FROM router_logits WHERE run_id = ? AND layer = 1", [half.run_id])
    with pytest.raises(InputError, match=r"router logits.*--probe router_logits"):
        analyze(half, "gate_ahead")
