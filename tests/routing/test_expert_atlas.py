from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.experts.measures import MEASURES
from moescope.routing.experts.places import gini
from moescope.store.run import Run

Plant = Callable[..., Run]
LENGTHS, LABELS = [12, 12, 12, 12], ["a", "a", "b", "b"]
GINI, PROFILE = "Gini coefficient of the layer", "mean over layers"


def decisions(seed: int, n_experts: int = 6, dead: int | None = None) -> np.ndarray[Any, Any]:
    """[token, 2] choices of 48 tokens, uneven over experts and over the two labels."""
    generator = np.random.default_rng(seed)
    chosen = []
    for token in range(sum(LENGTHS)):
        p = np.arange(1, n_experts + 1, dtype=float) if token < 24 else np.arange(n_experts, 0, -1, dtype=float)
        if dead is not None:
            p[dead] = 0
        chosen.append(generator.choice(n_experts, 2, replace=False, p=p / p.sum()))
    return np.array(chosen)


@pytest.fixture(scope="module")
def routed(plant: Plant, planted: ModuleType) -> tuple[Run, dict[int, np.ndarray[Any, Any]]]:
    """Two routers of six experts, E2 of the second never chosen, and their decisions."""
    chosen = {0: decisions(0), 3: decisions(1, dead=2)}
    weights = {layer: np.random.default_rng(layer).uniform(0.1, 1, ids.shape) for layer, ids in chosen.items()}
    routers = [planted.Router(ids, 6, layer=layer, weights=weights[layer]) for layer, ids in chosen.items()]
    run = plant(lengths=LENGTHS, labels=LABELS, routers=routers, name="routed")
    run_weights.update(weights)
    return run, chosen


run_weights: dict[int, np.ndarray[Any, Any]] = {}


def cells(run: Run, **given: Any) -> Any:
    frame = analyze(run, "expert_atlas", **given).df()
    return frame[frame["expert"].notna()].set_index(["layer", "expert"])


def test_load_is_log2_of_the_share_over_the_fair_share(routed: Any) -> None:
    run, chosen = routed
    found = cells(run)
    for layer, ids in chosen.items():
        count = np.bincount(ids.ravel(), minlength=6)
        for expert in range(6):
            row = found.loc[layer, expert]
            assert row["tokens"] == count[expert]
            if count[expert]:
                assert row["value"] == pytest.approx(np.log2(count[expert] / count.sum() * 6))
                assert row["state"] == "value"


def test_an_expert_that_nobody_chose_is_no_missing_record(routed: Any) -> None:
    run, _ = routed
    for measure in ("load", "weight", "label_lift", "partner", "reap"):
        try:
            found = cells(run, measure=measure)
        except InputError:
            assert measure == "reap", "no norms were planted"
            continue
        assert np.isnan(found.loc[3, 2]["value"])
        assert found.loc[3, 2]["state"] == "never chosen"
    assert "1 of 12 experts is never chosen" in analyze(run, "expert_atlas").title


def test_mean_weight_is_the_mean_over_the_tokens_that_chose_it(routed: Any) -> None:
    run, chosen = routed
    found = cells(run, measure="weight")
    for layer, ids in chosen.items():
        for expert in np.unique(ids):
            mean = run_weights[layer][ids == expert].mean()
            assert found.loc[layer, int(expert)]["value"] == pytest.approx(mean, rel=1e-5)


def test_preferred_label_is_the_one_of_largest_lift_and_a_label_asked_for_is_that_one(routed: Any) -> None:
    run, chosen = routed
    strongest, of_a = cells(run, measure="label_lift"), cells(run, measure="label_lift", label="a")
    in_a = np.arange(48) < 24
    for layer, ids in chosen.items():
        for expert in np.unique(ids):
            takes = (ids == expert).any(1)
            lifts = {"a": takes[in_a].mean() / takes.mean(), "b": takes[~in_a].mean() / takes.mean()}
            row = strongest.loc[layer, int(expert)]
            assert row["value"] == pytest.approx(np.log2(max(lifts.values())))
            assert row["detail"].startswith(max(lifts, key=lambda name: lifts[name]))
            if lifts["a"] > 0:
                assert of_a.loc[layer, int(expert)]["value"] == pytest.approx(np.log2(lifts["a"]))


def test_closest_partner_agrees_with_co_activation(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(5)
    pairs = np.array([[0, 1], [2, 3], [4, 5], [0, 2], [1, 4]])
    ids = pairs[generator.choice(5, 400, p=[0.4, 0.3, 0.2, 0.05, 0.05])]
    run = plant(lengths=[100] * 4, routers=[planted.Router(ids, 6)])
    found = cells(run, measure="partner")
    frame = analyze(run, "coactivation").df()
    frame = frame[frame["together"] >= 30]
    for expert, part in frame.groupby("expert"):
        best = part.loc[part["over_chance"].idxmax()]
        assert found.loc[0, expert]["value"] == pytest.approx(np.log2(best["over_chance"]))
        assert found.loc[0, expert]["detail"] == f"with E{best['other']}"


def test_the_order_by_load_puts_the_busiest_first_and_equal_ones_by_number(routed: Any) -> None:
    run, chosen = routed
    found = cells(run, sort="load")
    for layer, ids in chosen.items():
        count = np.bincount(ids.ravel(), minlength=6)
        order = sorted(range(6), key=lambda expert: (-count[expert], expert))
        assert [found.loc[layer, expert]["place"] for expert in order] == list(range(6))


def test_the_order_by_similarity_puts_experts_of_the_same_documents_side_by_side(
    plant: Plant, planted: ModuleType
) -> None:
    # Documents 0 and 2 use the even experts, 1 and 3 the odd ones.
    ids = np.array(
        [
            [2 * (t % 3) + document % 2, 2 * ((t + 1 + document // 2) % 3) + document % 2]
            for document in range(4)
            for t in range(30)
        ]
    )
    run = plant(lengths=[30] * 4, routers=[planted.Router(ids, 6)])
    place = cells(run, sort="similarity").loc[0]["place"]
    even = sorted(int(place[expert]) for expert in (0, 2, 4))
    assert even in ([0, 1, 2], [3, 4, 5])
    assert sorted(place.astype(int)) == list(range(6)), "every place is taken once"


def test_margins_are_the_gini_coefficient_and_the_mean_over_layers(routed: Any) -> None:
    run, chosen = routed
    frame = analyze(run, "expert_atlas", sort="load").df()
    for layer, ids in chosen.items():
        count = np.bincount(ids.ravel(), minlength=6).astype(float)
        brute = np.abs(count[:, None] - count[None, :]).sum() / (2 * 6 * count.sum())
        found = frame[(frame["metric"] == GINI) & (frame["layer"] == layer)]["value"].item()
        assert found == pytest.approx(brute)
    first = [np.log2(np.bincount(ids.ravel(), minlength=6).max() / 96 * 6) for ids in chosen.values()]
    profile = frame[frame["metric"] == PROFILE].set_index("place")["value"]
    assert profile[0] == pytest.approx(np.mean(first))


def test_gini_of_known_amounts() -> None:
    assert gini(np.array([0.0, 0, 0, 8])) == pytest.approx(0.75)
    assert gini(np.ones(5)) == pytest.approx(0)
    assert np.isnan(gini(np.zeros(3)))


def test_less_another_run_is_the_difference_cell_by_cell(routed: Any, plant: Plant, planted: ModuleType) -> None:
    run, chosen = routed
    other = {0: decisions(7), 3: decisions(8)}
    plant(
        lengths=LENGTHS,
        labels=LABELS,
        routers=[planted.Router(ids, 6, layer=layer) for layer, ids in other.items()],
        name="other run",
    )
    found = cells(run, other="other run")
    for layer, ids in chosen.items():
        mine, theirs = (np.bincount(part.ravel(), minlength=6) for part in (ids, other[layer]))
        for expert in range(6):
            if mine[expert] and theirs[expert]:
                value = np.log2(mine[expert] / theirs[expert])
                assert found.loc[layer, expert]["value"] == pytest.approx(value)
    assert np.isnan(found.loc[3, 2]["value"])
    with pytest.raises(InputError, match="no run called"):
        analyze(run, "expert_atlas", other="nobody")


def test_every_measure_is_answered_or_refused_with_what_to_do(plant: Plant, planted: ModuleType) -> None:
    run = plant(**planted.everything(layers=3, n_experts=6, labels=["a", "b"] * 4))
    answered = set()
    for name in MEASURES:
        try:
            result = analyze(run, "expert_atlas", measure=name)
        except InputError as refused:
            assert refused.fix or refused.expected, name  # noqa: PT017  an answer is as good
            continue
        answered.add(name)
        frame = result.df()
        frame = frame[frame["expert"].notna()]
        assert len(frame) == 18, "one row an expert"
        assert result.figure().data[0].type == "heatmap"
        assert ("ci_low" in frame) == (result.interval is not None)
    assert {"load", "weight", "output_norm", "max_out", "active", "reap", "label_lift", "features_written"} <= answered
    assert all(measure.unit and measure.definition.endswith(".") for measure in MEASURES.values())


def test_what_other_analyses_give_is_not_changed(plant: Plant, planted: ModuleType) -> None:
    run = plant(**planted.everything(layers=2, n_experts=5, labels=["a", "b"] * 4))
    for measure, analysis, metric in (
        ("reap", "importance", "REAP"),
        ("max_out", "expert_maxima", "max |output|"),
        ("active", "expert_neurons", "active"),
        ("label_divergence", "label_divergence", "JS divergence of the expert's labels"),
    ):
        found = cells(run, measure=measure)["value"]
        frame = analyze(run, analysis).df()
        frame = frame[(frame["metric"] == metric) & frame["expert"].notna()].set_index(["layer", "expert"])["value"]
        assert len(frame)
        for place, value in frame.items():
            assert found[place] == pytest.approx(value, nan_ok=True)


def test_latents_written_are_counted_from_the_pairs(plant: Plant, planted: ModuleType) -> None:
    run = plant(**planted.everything(layers=2, n_experts=5, labels=["a", "b"] * 4))
    found = cells(run, measure="features_written")
    frame = run.sql(
        """
        SELECT layer, feature, expert, value
        FROM feature_experts
        WHERE run_id = $run AND metric = 'writes_excess' AND expert >= 0
        """
    ).df()
    best = frame.loc[frame.groupby(["layer", "feature"])["value"].idxmax()]
    best = best[best["value"] > 0]
    for (layer, expert), part in best.groupby(["layer", "expert"]):
        assert found.loc[layer, expert]["value"] == len(part)
    assert found["value"].sum() == len(best)


def test_a_wrong_measure_or_label_is_answered_with_those_there_are(routed: Any) -> None:
    run, _ = routed
    with pytest.raises(InputError, match=r"no measure 'beauty'.*load, weight"):
        analyze(run, "expert_atlas", measure="beauty")
    with pytest.raises(InputError, match=r"no label 'c'.*a, b"):
        analyze(run, "expert_atlas", measure="label_lift", label="c")


def test_the_figure_of_a_large_model_has_no_gaps_few_ticks_and_marks_beyond_its_scale(
    plant: Plant, planted: ModuleType
) -> None:
    generator = np.random.default_rng(0)
    p = np.exp(generator.normal(0, 1.5, 128))
    routers = [planted.Router(generator.choice(128, (60, 1), p=p / p.sum()), 128, layer=layer) for layer in range(26)]
    run = plant(lengths=[30, 30], routers=routers)
    figure = analyze(run, "expert_atlas").figure()
    cell = figure.data[0]
    assert (cell.xgap, cell.ygap) == (0, 0)
    assert list(figure.layout.xaxis.tickvals) == ["E0", "E32", "E64", "E96"]
    assert list(figure.layout.yaxis.tickvals) == ["L0", "L8", "L16", "L24"]
    z = np.array(cell.z, dtype=float)
    beyond = (z > cell.zmax) | (z < cell.zmin)
    marked = [len(trace.x) for trace in figure.data if trace.name and "the scale" in trace.name]
    assert sum(marked) == beyond.sum() > 0
    dead = next(trace for trace in figure.data if trace.name and trace.name.startswith("never chosen"))
    assert len(dead.x) == np.isnan(z).sum()


def test_a_label_is_text_in_the_figure(plant: Plant, planted: ModuleType) -> None:
    hostile = "<b>x</b>"
    routers = [planted.Router(decisions(3), 6)]
    run = plant(lengths=LENGTHS, labels=[hostile, hostile, "b", "b"], routers=routers)
    figure = analyze(run, "expert_atlas", measure="label_lift").figure()
    assert "<b>x" not in str(figure.data[0].customdata)
    assert "&lt;b&gt;x" in str(figure.data[0].customdata)
