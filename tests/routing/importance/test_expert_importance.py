"""Importance of experts against closed forms, a reading brute force, and records that are missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]


def _values(run: Run, metric: str, **parameters: Any) -> list[float | None]:
    frame = analyze(run, "importance", **parameters).df().query("metric == @metric")
    return [None if math.isnan(v) else float(v) for v in frame.sort_values(["layer", "expert"])["value"]]


def _two_experts(plant: Plant, planted: ModuleType) -> Run:
    """REAP's first unit test: logits (2,1), (4,0), both to expert 0, whose outputs are (3,4) and (5,12)."""
    router = planted.Router(
        np.array([[0], [0]]),
        2,
        weights=np.array([[0.731059], [0.982014]]),
        logits=np.array([[2.0, 1.0], [4.0, 0.0]]),
        norms=np.array([[5.0], [13.0]]),
    )
    experts = [{"layer": 0, "block": "mlp", "expert": 0, "tokens": 2, "max_abs_out": 12.0}]
    return plant(lengths=[2], routers=[router], experts=experts)


@pytest.mark.parametrize("gate", ["given", "softmax"])
def test_reap_of_two_experts_is_the_published_unit_value(plant: Plant, planted: ModuleType, gate: str) -> None:
    run = _two_experts(plant, planted)
    assert _values(run, "frequency", gate=gate) == [2, 0]
    assert _values(run, "EAN sum", gate=gate) == [18, 0]
    assert _values(run, "mean output norm", gate=gate) == [9, None]
    assert _values(run, "weighted frequency", gate=gate) == pytest.approx([1.713072, 0], abs=2e-6)
    reap = _values(run, "REAP", gate=gate)
    assert reap[0] == pytest.approx(8.21074, abs=6e-6)
    assert reap[1] is None, "a mean over no token is no number"
    assert _values(run, "max activation", gate=gate) == [12, None]


def test_reap_of_three_experts_with_renormalised_weights_is_the_published_unit_value(
    plant: Plant, planted: ModuleType
) -> None:
    logits = np.array([[2.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = np.array([[0, 1], [2, 0]])
    router = planted.Router(
        chosen,
        3,
        weights=np.take_along_axis(odds, chosen, 1),
        logits=logits,
        norms=np.array([[5.0, 6.0], [25.0, 17.0]]),
    )
    run = plant(lengths=[2], routers=[router])
    assert _values(run, "REAP", gate="renormalised") == pytest.approx([4.11365, 1.61365, 18.27646], abs=6e-6)
    assert _values(run, "frequency") == [2, 1, 1]
    assert _values(run, "mean output norm") == [11, 6, 25]
    assert _values(run, "REAP", gate="given") == pytest.approx(_values(run, "REAP", gate="softmax"), rel=1e-6)


@st.composite
def _shapes(draw: st.DrawFn) -> dict[str, Any]:
    layers = [
        (size := draw(st.sampled_from([1, 2, 3, 7, 256])), draw(st.integers(1, min(size, 3))))
        for _ in range(draw(st.integers(1, 2)))
    ]
    return {
        "layers": layers,
        "lengths": draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 10**6)),
    }


def _random_routers(planted: ModuleType, shape: dict[str, Any]) -> list[Any]:
    generator = np.random.default_rng(shape["seed"])
    total = sum(shape["lengths"])
    routers = []
    for layer, (size, k) in enumerate(shape["layers"]):
        chosen = np.stack([generator.permutation(size)[:k] for _ in range(total)])
        weights = np.sort(generator.uniform(0.1, 1, chosen.shape), axis=1)[:, ::-1].astype(np.float32)
        norms = generator.integers(1, 4, chosen.shape).astype(np.float32)
        routers.append(planted.Router(chosen, size, layer=layer, weights=weights, norms=norms))
    return routers


@given(shape=_shapes())
@settings(max_examples=12)
def test_measures_agree_with_counting_slot_by_slot(plant: Plant, planted: ModuleType, shape: dict[str, Any]) -> None:
    routers = _random_routers(planted, shape)
    run = plant(lengths=shape["lengths"], routers=routers)
    frame = analyze(run, "importance", draws=5).df()
    tokens = sum(shape["lengths"])
    for router in routers:
        for expert in range(router.n_experts):
            count = weight = norm = weighted = 0.0
            for token in range(tokens):
                for slot in range(router.top_k):
                    if router.experts[token, slot] == expert:
                        count += 1
                        weight += float(router.weights[token, slot])
                        norm += float(router.norms[token, slot])
                        weighted += float(router.weights[token, slot]) * float(router.norms[token, slot])
            expected = {
                "frequency": count,
                "hotness": count / (tokens * router.top_k / router.n_experts),
                "ESFT token score": count / tokens / router.top_k,
                "weighted frequency": weight,
                "ESFT gate score": weight / tokens,
                "mean output norm": norm / count if count else math.nan,
                "EAN sum": norm,
                "weighted EAN sum": weighted,
                "REAP": weighted / count if count else math.nan,
            }
            rows = frame[(frame["layer"] == router.layer) & (frame["expert"] == expert)]
            assert dict(zip(rows["metric"], rows["value"], strict=True)) == pytest.approx(expected, nan_ok=True)


def test_even_share_is_the_layers_mean(plant: Plant, planted: ModuleType) -> None:
    router = planted.Router(
        np.array([[0, 1], [0, 2], [0, 1]]),
        4,
        weights=np.array([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]]),
        norms=np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    )
    null = analyze(plant(lengths=[3], routers=[router]), "importance").df().groupby("metric")["null"].first()
    assert null["frequency"] == 6 / 4
    assert null["hotness"] == 1
    assert null["mean output norm"] == pytest.approx(21 / 6)
    assert null["REAP"] == pytest.approx((0.6 + 0.8 + 1.5 + 2.0 + 4.5 + 0.6) / 6)


def test_rank_one_is_the_largest_and_experts_without_a_value_have_none(plant: Plant, planted: ModuleType) -> None:
    frame = analyze(_two_experts(plant, planted), "importance").df().set_index(["metric", "expert"])
    assert frame.loc[("frequency", 0), "rank"] == 1
    assert frame.loc[("frequency", 1), "rank"] == 2
    assert np.isnan(frame.loc[("REAP", 1), "value"])
    assert frame["rank"].isna().sum() == 3, "mean output norm, REAP and max activation of expert 1"


def test_interval_resamples_documents_not_tokens(plant: Plant, planted: ModuleType) -> None:
    """Two documents of constant routing: a document is drawn whole, so frequency is 0, 50 or 100 and nothing between."""
    router = planted.Router(np.repeat([[0], [1]], 50, axis=0), 2)
    frame = analyze(plant(lengths=[50, 50], routers=[router]), "importance").df().query("metric == 'frequency'")
    assert list(frame["ci_low"]) == [0, 0]
    assert list(frame["ci_high"]) == [100, 100]


def test_one_document_has_no_interval(plant: Plant, planted: ModuleType) -> None:
    frame = analyze(_two_experts(plant, planted), "importance").df()
    assert frame["ci_low"].isna().all()


def test_norms_of_reductions_stand_in_without_an_interval_and_it_is_said(plant: Plant, planted: ModuleType) -> None:
    router = planted.Router(np.array([[0], [0], [1], [1]]), 2)
    experts = [
        {"layer": 0, "block": "mlp", "expert": 0, "tokens": 2, "output_norm_mean": 9.0, "weighted_norm_sum": 16.0},
        {"layer": 0, "block": "mlp", "expert": 1, "tokens": 2, "output_norm_mean": 1.0, "weighted_norm_sum": 1.0},
        {"layer": 0, "block": "mlp", "expert": -1, "tokens": 4, "output_norm_mean": 7.0, "weighted_norm_sum": 7.0},
    ]
    run = plant(lengths=[2, 2], routers=[router], experts=experts)
    assert _values(run, "REAP") == [8, 0.5]
    assert _values(run, "EAN sum") == [18, 2]
    result = analyze(run, "importance")
    reap = result.df().query("metric == 'REAP'")
    assert reap["ci_low"].isna().all()
    assert reap["null"].tolist() == [4.25, 4.25]
    assert any("no interval" in note for note in result.notes)
    renormalised = analyze(run, "importance", gate="renormalised")
    assert "REAP" not in set(renormalised.df()["metric"]), "its sums were taken with the weights as given"
    assert any(note.startswith("REAP is left out") for note in renormalised.notes)


def test_what_is_missing_is_left_out_and_said(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3], routers=[planted.Router(np.array([[0], [1], [1]]), 2)])
    run.store.connection.execute("UPDATE routing SET weights = NULL WHERE run_id = ?", [run.run_id])
    result = analyze(run, "importance")
    assert set(result.df()["metric"]) == {"frequency", "hotness", "ESFT token score"}
    for name in ("weighted frequency", "ESFT gate score", "REAP", "EAN sum", "max activation"):
        assert any(note.startswith(f"{name} is left out") for note in result.notes)
    with pytest.raises(InputError, match="no records for the measure 'REAP'"):
        analyze(run, "importance", shown="REAP")


def test_softmax_without_logits_names_the_probe(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[2], routers=[planted.Router(np.array([[0], [1]]), 2)])
    with pytest.raises(InputError, match="--probe router_logits"):
        analyze(run, "importance", gate="softmax")


def test_real_trace_has_weights_but_no_norms(store: Store) -> None:
    from pathlib import Path

    path = Path("/work/shared/data/deepseek_v2_lite_routing/law.parquet")
    if not path.exists():
        pytest.skip("the real trace is not here")
    run = store.import_trace(path, name="law for importance", n_experts=64)
    frame = analyze(run, "importance", draws=20).df()
    layer = frame[(frame["layer"] == 13) & (frame["metric"] == "ESFT token score")]
    assert layer["value"].sum() == pytest.approx(1)
    assert "REAP" not in set(frame["metric"])
