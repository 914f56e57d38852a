"""Router entropy: token-weighted means, ln E beside them, and what happens without logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


def _router(planted: ModuleType, entropy: list[float], *, n_experts: int = 8, **where: object) -> object:
    return planted.Router(np.zeros((len(entropy), 1), int), n_experts, entropy=np.array(entropy), **where)


def test_mean_is_over_tokens_not_over_documents(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[1, 3], routers=[_router(planted, [2.0, 1.0, 1.0, 1.0])])
    row = analyze(run, "router_entropy").df().iloc[0]
    assert row["value"] == pytest.approx(5 / 4)
    assert row["n"] == 4


@pytest.mark.parametrize(("n_experts", "n_null"), [(8, 0), (60, 4), (1, 0)])
def test_null_is_ln_of_all_experts_the_router_scores(
    plant: Plant, planted: ModuleType, n_experts: int, n_null: int
) -> None:
    run = plant(lengths=[2], routers=[_router(planted, [0.0, 0.0], n_experts=n_experts, n_null=n_null)])
    row = analyze(run, "router_entropy").df().iloc[0]
    assert row["null"] == pytest.approx(math.log(n_experts + n_null))


def test_equal_entropies_leave_no_room_in_the_interval(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4, 2, 6], routers=[_router(planted, [0.5] * 12)])
    row = analyze(run, "router_entropy").df().iloc[0]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.5, 0.5))


def test_one_document_has_no_interval(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[2, 2], documents=[0, 0], routers=[_router(planted, [0.1, 0.2, 0.3, 0.4])])
    row = analyze(run, "router_entropy").df().iloc[0]
    assert row["value"] == pytest.approx(0.25)
    assert np.isnan([row["ci_low"], row["ci_high"]]).all()


def test_title_names_the_sharpest_and_the_vaguest_router(plant: Plant, planted: ModuleType) -> None:
    routers = [
        _router(planted, [math.log(8)] * 2, layer=1),
        _router(planted, [0.0] * 2, layer=2),
        _router(planted, [math.log(2)] * 2, layer=3, block="attn"),
    ]
    title = analyze(plant(lengths=[2], routers=routers), "router_entropy").title
    assert "from 0% of its maximum in L2 to 100% in L1" in title


def test_routing_without_logits_is_refused_with_the_reason(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3], routers=[planted.Router(np.zeros((3, 1), int), 4)])
    with pytest.raises(InputError, match="without router logits"):
        analyze(run, "router_entropy")


@given(data=st.data())
def test_means_equal_a_loop_over_tokens(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    tokens = sum(lengths)
    value = st.one_of(st.floats(0, 4, width=32), st.just(float("nan")))
    entropies = [data.draw(st.lists(value, min_size=tokens, max_size=tokens)) for _ in range(2)]
    run = plant(lengths=lengths, routers=[_router(planted, e, layer=layer) for layer, e in enumerate(entropies)])
    expected = {
        layer: kept for layer, e in enumerate(entropies) if (kept := [value for value in e if not math.isnan(value)])
    }
    if not expected:
        with pytest.raises(InputError):
            analyze(run, "router_entropy")
        return
    frame = analyze(run, "router_entropy", draws=50).df().set_index("layer")
    assert set(frame.index) == set(expected)
    for layer, kept in expected.items():
        row = frame.loc[layer]
        assert row["n"] == len(kept)
        assert row["value"] == pytest.approx(sum(kept) / len(kept), abs=1e-6)
        if not math.isnan(row["ci_low"]):
            assert min(kept) - 1e-6 <= row["ci_low"] <= row["ci_high"] <= max(kept) + 1e-6
