"""Sweeps in the store: stopped and resumed, refused where they do not fit, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import moescope as ms
from moescope.core.errors import InputError, RunError
from moescope.core.intervention import Intervention
from moescope.probes.effects.baseline import baseline
from moescope.probes.sweeps import sweep as sweeps
from moescope.probes.sweeps.passes import SweepPasses
from moescope.probes.sweeps.perform import SweepRequest
from moescope.sweep_api import sweep

ROWS = """
    SELECT e.intervention::VARCHAR AS intervention, e.kind, e.draw, e.metric, e.value, e.ci_low, e.ci_high, e.n
    FROM effects e
    ORDER BY ALL
"""
SUMS = """
    SELECT e.intervention::VARCHAR AS intervention, s.kind, s.draw, s.metric, s.sequence_id, s.sum, s.n
    FROM effect_sequences s
    JOIN (SELECT DISTINCT effect_id, kind, draw, intervention FROM effects) e
    ON e.effect_id = s.effect_id AND e.kind = s.kind AND e.draw IS NOT DISTINCT FROM s.draw
    ORDER BY ALL
"""


@pytest.fixture
def corpus(token_ids: Callable[..., Any]) -> Any:
    return ms.Corpus.from_token_ids(token_ids((9, 7, 11, 6, 8), seed=5))


@pytest.fixture
def model(swept_model: Callable[..., Any]) -> Any:
    return ms.load(swept_model("deepseek_v3"))


@pytest.mark.parametrize("options", [{}, {"screen": 3, "verify": 3}], ids=["exact", "screened"])
def test_stopped_sweep_ends_with_the_rows_of_an_unbroken_one(
    options: dict[str, Any], model: Any, corpus: Any, store: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = baseline(model, corpus, store, batch_size=2, progress=False)
    monkeypatch.setattr(sweeps, "_SECONDS", 0.0)  # every group is written by itself
    request = SweepRequest(model, corpus, "experts", **options)
    plain, calls = SweepPasses.run, []

    def stopping(self: SweepPasses, groups: Any, batches: Any, tick: Any) -> Any:
        calls.append(len(groups))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, groups, batches, tick)

    monkeypatch.setattr(SweepPasses, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        request.run(store, base, progress=False)
    part = store.fetch("SELECT count(*) FROM effects")[0][0]
    assert part > 0
    with pytest.raises(InputError, match="in the store already"):
        request.run(store, base, progress=False)
    sweep_id = request.run(store, base, resume=True, progress=False)
    assert calls == [1, 1, 1]
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    with ms.Store(tmp_path / "unbroken.duckdb") as other:
        again = baseline(model, corpus, other, batch_size=2, progress=False)
        monkeypatch.setattr(SweepPasses, "run", plain)
        request.run(other, again, progress=False)
        for query in (ROWS, SUMS):
            assert store.fetch(query) == other.fetch(query)
    whole = store.fetch("SELECT count(*) FROM effects")[0][0]
    assert whole > part
    assert request.run(store, base, resume=True, progress=False) == sweep_id  # nothing is left to run
    assert store.fetch("SELECT count(*) FROM effects")[0][0] == whole


def test_exact_numbers_of_a_screened_sweep_are_those_of_the_whole(model: Any, corpus: Any, store: Any) -> None:
    whole = sweep(model, corpus, store, progress=False).df()
    part = sweep(model, corpus, store, screen=4, verify=4, progress=False).df()
    exact = whole[whole["metric"] == "ΔNLL"].set_index(["layer", "expert"])["value"]
    chosen = part[part["metric"] == "ΔNLL"].set_index(["layer", "expert"])
    assert len(chosen) == 8
    assert chosen["drawn"].sum() == 4
    assert chosen["value"].tolist() == pytest.approx(exact.loc[chosen.index].tolist(), abs=1e-6)
    estimates = part[part["metric"] == "ΔNLL estimate"].set_index(["layer", "expert"])["value"]
    assert len(estimates) == len(exact)
    top = set(estimates.sort_values(ascending=False).index[:4])
    assert top == set(chosen.index[~chosen["drawn"].astype(bool)])
    assert set(part[part["metric"] == "rank correlation"]["among"]) == {"experts drawn at random", "all experts run"}


def test_nothing_is_stored_of_a_group_that_gave_no_numbers(model: Any, corpus: Any, store: Any) -> None:
    from moescope.core.edit_kinds.stream import Add

    burst = Intervention([Add(layer=1, vector=(3e38,) * 32)], name="burst")
    with pytest.raises(RunError, match="no numbers"):
        sweep(model, corpus, store, kind="dose", intervention=burst, strengths=[1e5], generate=0, progress=False)
    assert store.fetch("SELECT count(*) FROM effects")[0][0] == 0
    assert [run.name for run in store.runs()] == ["base"]


def test_base_run_of_another_model_is_refused(
    swept_model: Callable[..., Any], model: Any, corpus: Any, store: Any
) -> None:
    base = baseline(model, corpus, store, progress=False)
    other = ms.load(swept_model("deepseek_v3", seed=1))
    with pytest.raises(RunError, match="does not give the numbers of its base run"):
        sweep(other, corpus, store, kind="top_k", numbers=[1], base=base, progress=False)
    assert store.fetch("SELECT count(*) FROM effects")[0][0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "all"}, "no sweep 'all'"),
        ({"layers": [0]}, "layer 0 has no router"),
        ({"kind": "dose"}, "needs an intervention"),
        ({"kind": "dose", "intervention": Intervention()}, "no dose"),
        ({"kind": "drop", "shares": [1.5]}, "1.5 is no share"),
        ({"kind": "drop", "shares": [0.001]}, "takes out no expert"),
        ({"kind": "drop", "scores": {(1, 0): 1.0}}, "have no score"),
        ({"kind": "drop", "scores": {(0, 0): 1.0}}, "does not have"),
        ({"kind": "keep", "scores": "REAP"}, "no measure 'REAP'"),
        ({"kind": "top_k", "numbers": [9]}, "cannot take 9"),
        ({"kind": "routing_value", "controls": 0}, "random routing"),
        ({"screen": 0, "verify": 0}, "not shown alone"),
        ({"kind": "drop", "screen": 3}, "screening is for"),
        ({"kind": "drop", "layers": [1]}, "layers are not for a sweep of kind drop"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_swept_is_refused(
    options: dict[str, Any], message: str, model: Any, corpus: Any, store: Any
) -> None:
    with pytest.raises(InputError, match=message):
        sweep(model, corpus, store, progress=False, **options)
    assert store.fetch("SELECT count(*) FROM effects")[0][0] == 0


def test_dense_model_has_no_sweep_of_experts(swept_model: Callable[..., Any], corpus: Any, store: Any) -> None:
    with pytest.raises(InputError, match="no routers"):
        sweep(ms.load(swept_model("llama")), corpus, store, kind="drop", progress=False)
