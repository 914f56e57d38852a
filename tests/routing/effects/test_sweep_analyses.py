"""The analyses of sweeps: closed forms on planted effects, nulls, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr, ttest_1samp

from moescope.analysis_api import analyze
from moescope.core.edit_kinds.experts import Ablate, Keep, RandomRouting, TopK
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.routing.effects.document_p_values import ratio_p
from moescope.store.run import Run

Plant = Callable[..., Run]
SEQUENCES = 100


def _loaded() -> ModuleType:
    path = Path(__file__).parents[1] / "planted_sweeps.py"
    spec = importlib.util.spec_from_file_location("moescope_tests_planted_sweeps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sweeps: Any = _loaded()


@pytest.fixture
def run(plant: Plant, planted: ModuleType) -> Run:
    random = np.random.default_rng(0)
    tokens = 11 * SEQUENCES
    routers = [
        planted.Router(np.stack([random.permutation(8)[:2] for _ in range(tokens)]), 8, layer=layer)
        for layer in range(2)
    ]
    return plant(lengths=[11] * SEQUENCES, routers=routers)


def _expert(layer: int, expert: int, name: str | None = None) -> Intervention:
    return Intervention([Ablate(layer=layer, experts=expert)], name=name)


def test_expert_is_held_against_the_others_of_its_layer(run: Run) -> None:
    random = np.random.default_rng(1)
    planted = {
        (layer, e): random.normal(3 * ((layer, e) == (1, 6)), 1, SEQUENCES) for layer in range(2) for e in range(8)
    }
    sweeps.plant_sweep(run, [[(_expert(*place), sweeps.numbers(sums))] for place, sums in planted.items()])
    result = analyze(run, "expert_effects")
    frame = result.df()
    main = frame[frame["metric"] == "ΔNLL"].set_index(["layer", "expert"])
    over = frame[frame["metric"] == "ΔNLL over the others"].set_index(["layer", "expert"])
    means = {place: sums.sum() / (10 * SEQUENCES) for place, sums in planted.items()}
    for (layer, expert), mean in means.items():
        others = np.mean([means[layer, e] for e in range(8) if e != expert])
        row = main.loc[(layer, expert)]
        assert row["value"] == pytest.approx(mean)
        assert row["null"] == pytest.approx(others)
        assert row["p"] == pytest.approx(ttest_1samp(planted[layer, expert], 0).pvalue)
        assert over.loc[(layer, expert), "value"] == pytest.approx(mean - others)
    assert main["rank"].idxmin() == (1, 6)
    assert main.loc[(1, 6), "ci_low"] > 0
    assert over.loc[(1, 6), "ci_low"] > 0
    assert result.title.startswith("Without L1·E6 the NLL rises most")
    assert result.figure().data


def test_where_nothing_is_planted_few_intervals_exclude_zero(plant: Plant, planted: ModuleType) -> None:
    chosen = np.stack([np.arange(11 * SEQUENCES) % 100, (np.arange(11 * SEQUENCES) + 1) % 100], 1)
    empty = plant(lengths=[11] * SEQUENCES, routers=[planted.Router(chosen, 100, layer=layer) for layer in range(2)])
    random = np.random.default_rng(5)
    sweeps.plant_sweep(
        empty,
        [
            [(_expert(layer, e), sweeps.numbers(random.normal(0, 1, SEQUENCES)))]
            for layer in range(2)
            for e in range(100)
        ],
    )
    frame = analyze(empty, "expert_effects").df()
    for metric in ("ΔNLL", "ΔNLL over the others"):
        part = frame[frame["metric"] == metric]
        assert len(part) == 200
        assert ((part["ci_low"] > 0) | (part["ci_high"] < 0)).sum() <= 18  # the 99 % bound for a true 5 %
    assert (frame["q"] < 0.05).sum() == 0


def test_screening_shows_how_far_its_order_holds(run: Run) -> None:
    random = np.random.default_rng(2)
    true = {e: random.normal(e, 0.5, SEQUENCES) for e in range(8)}
    estimate = {e: sums + random.normal(0, 4, SEQUENCES) + random.normal(0, 3) for e, sums in true.items()}
    rows = [[(_expert(0, e), {"delta_nll_estimate": estimate[e]})] for e in range(8)]
    run_exactly = [0, 2, 3, 5, 7]
    rows += [
        [(_expert(0, e, f"L0·E{e} zero{' (drawn at random)' if e < 7 else ''}"), sweeps.numbers(true[e]))]
        for e in run_exactly
    ]
    sweeps.plant_sweep(run, rows)
    frame = analyze(run, "expert_effects").df()
    assert (frame["metric"] == "ΔNLL estimate").sum() == 8
    found = frame[frame["metric"] == "rank correlation"].set_index("among")
    for label, experts in (("all experts run", run_exactly), ("experts drawn at random", run_exactly[:-1])):
        wanted = spearmanr([true[e].sum() for e in experts], [estimate[e].sum() for e in experts]).statistic
        assert found.loc[label, "value"] == pytest.approx(wanted)
        assert found.loc[label, "n"] == len(experts)
        assert found.loc[label, "ci_low"] - 1e-9 <= wanted <= found.loc[label, "ci_high"] + 1e-9
        assert found.loc[label, "null"] == 0
    drawn = found.loc["experts drawn at random"]
    spread = np.sqrt((1 + drawn["value"] ** 2 / 2) / (4 - 3))  # Bonett & Wright, n = 4
    assert np.arctanh(drawn["value"]) - np.arctanh(drawn["ci_low"]) == pytest.approx(1.959964 * spread)


def test_drop_curve_stands_beside_its_random_sets(run: Run) -> None:
    random = np.random.default_rng(3)
    planted: dict[tuple[int, int], np.ndarray] = {
        (size, draw): random.normal(0.2 * size if draw < 0 else 0.5 * size, 0.1, SEQUENCES)
        for size in (1, 2, 4)
        for draw in (-1, 0, 1, 2)
    }
    effects = [
        [
            (
                Intervention(
                    [Ablate(layer=layer, experts=range(size), how="route_around") for layer in range(2)],
                    name="lowest by load" if draw < 0 else "random",
                ),
                sweeps.numbers(planted[size, draw]),
            )
            for draw in (-1, 0, 1, 2)
        ]
        for size in (1, 2, 4)
    ]
    sweeps.plant_sweep(run, effects)
    result = analyze(run, "drop_curves", epsilon=0.05)
    frame = result.df()
    curve = frame[frame["metric"] == "ΔNLL"].set_index("share")
    assert list(curve.index) == [1 / 8, 2 / 8, 4 / 8]
    over = frame[frame["metric"] == "ΔNLL over random"].set_index("share")
    for size, share in ((1, 1 / 8), (2, 2 / 8), (4, 4 / 8)):
        controls = [planted[size, draw].mean() / 10 for draw in range(3)]
        assert curve.loc[share, "value"] == pytest.approx(planted[size, -1].mean() / 10)
        assert curve.loc[share, ["null", "null_low", "null_high"]].tolist() == pytest.approx(
            [np.mean(controls), min(controls), max(controls)]
        )
        assert over.loc[share, "value"] == pytest.approx(planted[size, -1].mean() / 10 - np.mean(controls))
        assert over.loc[share, "ci_high"] < 0
    rows = frame.set_index("metric")
    assert rows.loc["removable", "value"] == 2 / 8  # 0.04 nats fit into 0.05, 0.08 do not
    assert rows.loc["mean over random", "value"] == pytest.approx(over["value"].mean())
    assert "3 random sets" in str(result.null)
    assert result.figure().data


def test_keep_curve_tells_how_few_are_enough(run: Run) -> None:
    steady = {6: 0.01, 4: 0.03, 2: 0.9}
    effects = []
    for size, value in steady.items():
        kept = Intervention([Keep(layer=a, experts=range(size)) for a in range(2)], name="highest by load")
        effects.append([(kept, sweeps.numbers([10 * value] * SEQUENCES))])
    sweeps.plant_sweep(run, effects)
    frame = analyze(run, "keep_curves").df().set_index("metric")
    assert frame.loc["enough", "value"] == 0.5
    assert frame.loc["ΔNLL", "value"].tolist() == pytest.approx([0.01, 0.03, 0.9])
    assert frame.loc["ΔNLL", "null"].isna().all()


def test_width_adds_the_layers_up(run: Run) -> None:
    values = {(0, 1): 0.5, (0,): 0.2, (1,): 0.1}
    sweeps.plant_sweep(
        run,
        [
            [(Intervention([TopK(layer=a, k=1) for a in place], name="top-1"), sweeps.numbers([10 * v] * SEQUENCES))]
            for place, v in values.items()
        ],
    )
    frame = analyze(run, "routing_width").df()
    main = frame[frame["metric"] == "ΔNLL"].set_index("place")["value"]
    assert main.to_dict() == pytest.approx({"all layers": 0.5, "L0": 0.2, "L1": 0.1})
    assert frame.set_index("metric").loc["sum of layers", "value"] == pytest.approx(0.3)
    assert (frame["setting"] == 1).all()


def test_value_of_routing_is_the_mean_over_seeds_and_null_where_there_is_none(run: Run) -> None:
    random = np.random.default_rng(9)
    effects = []
    for place, mean in (((0, 1), 5.0), ((0,), 4.0), ((1,), 0.0)):
        for seed in range(6):
            edits = [RandomRouting(layer=layer, seed=seed) for layer in place]
            sums = random.normal(mean, 1, SEQUENCES)
            effects.append([(Intervention(edits, name="random routing"), sweeps.numbers(sums))])
    sweeps.plant_sweep(run, effects)
    frame = analyze(run, "routing_value").df().set_index("place")
    assert frame["value"].tolist() == pytest.approx([0.5, 0.4, 0.0], abs=0.02)
    assert frame.loc["L0", "ci_low"] > 0.3
    assert frame.loc["L1", "ci_low"] < 0 < frame.loc["L1", "ci_high"]
    assert (frame["least"] <= frame["value"]).all()
    assert frame.loc["L0", "share"] == pytest.approx(frame.loc["L0", "value"] / frame.loc["all layers", "value"])


def test_dose_response_reads_strengths(run: Run) -> None:
    cut = Intervention([Ablate(layer=0, experts=3)], name="my cut × twice")
    effects = [
        [(cut.with_strength(s).named(f"my cut × twice × {s:g}"), sweeps.numbers([10 * s**2] * SEQUENCES))]
        for s in (0.5, 1, 2)
    ]
    sweeps.plant_sweep(run, effects)
    frame = analyze(run, "dose_response").df()
    part = frame[frame["metric"] == "ΔNLL"]
    assert part["strength"].tolist() == [0.5, 1, 2]
    assert part["value"].tolist() == pytest.approx([0.25, 1, 4])
    assert set(part["intervention"]) == {"my cut × twice"}


def test_newest_sweep_of_the_kind_is_taken_unless_one_is_named(run: Run) -> None:
    first, second = (
        sweeps.plant_sweep(run, [[(_expert(0, e), sweeps.numbers([10 * value] * SEQUENCES))] for e in range(2)])
        for value in (0.1, 0.7)
    )
    sweeps.plant_sweep(run, [[(Intervention([TopK(k=1)], name="top-1"), sweeps.numbers([0.0] * SEQUENCES))]])
    assert analyze(run, "expert_effects").df()["value"].iloc[0] == pytest.approx(0.7)
    assert analyze(run, "expert_effects", sweep=first).df()["value"].iloc[0] == pytest.approx(0.1)
    assert analyze(run, "expert_effects", sweep=second[:13]).df()["value"].iloc[0] == pytest.approx(0.7)
    with pytest.raises(InputError, match="no sweep of this kind"):
        analyze(run, "drop_curves")
    with pytest.raises(InputError, match="with the id"):
        analyze(run, "expert_effects", sweep="ffff")


def test_run_of_one_document_has_no_intervals(plant: Plant, planted: ModuleType) -> None:
    chosen = np.stack([np.arange(11) % 4, (np.arange(11) + 1) % 4], 1)
    one = plant(lengths=[11], routers=[planted.Router(chosen, 4)])
    sweeps.plant_sweep(one, [[(_expert(0, e), sweeps.numbers([e / 10]))] for e in range(4)])
    result = analyze(one, "expert_effects")
    main = result.df().query("metric == 'ΔNLL'")
    assert main["ci_low"].isna().all()
    assert "nan" not in result.title
    assert result.figure().data


@pytest.mark.parametrize(
    "name",
    [
        "expert_effects",
        "drop_curves",
        "keep_curves",
        "routing_width",
        "routing_value",
        "dose_response",
        "score_agreement",
    ],
)
def test_every_sweep_is_answered_with_its_query_and_figure(name: str, run: Run) -> None:
    sweeps.every_sweep(run, layers=2, n_experts=8, sequences=SEQUENCES)
    result = analyze(run, name)
    assert {column.split("[")[0] for column in result.units} <= set(result.table.column_names)
    assert run.store.sql(str(result.sql), result.sql_parameters).df().shape[0] > 0
    assert result.figure().layout.xaxis.title.text


def test_test_of_a_ratio_is_the_t_test_where_documents_are_alike() -> None:
    random = np.random.default_rng(0)
    totals = random.normal(0.2, 1, (30, 5))
    assert ratio_p(totals, np.full((30, 5), 7.0)) == pytest.approx(ttest_1samp(totals, 0).pvalue)
    assert ratio_p(np.ones((5, 1)), np.ones((5, 1)))[0] == 0
    assert np.isnan(ratio_p(np.ones((1, 1)), np.ones((1, 1))))[0]


def test_score_that_follows_the_effects_agrees_and_others_do_not(plant: Plant, planted: ModuleType) -> None:
    random = np.random.default_rng(4)
    chosen = [np.sort(random.choice(8, 2, replace=False, p=np.arange(1, 9) / 36)) for _ in range(11 * SEQUENCES)]
    routers = [planted.Router(np.stack(chosen), 8, layer=layer) for layer in range(2)]
    loaded = plant(lengths=[11] * SEQUENCES, routers=routers)
    counts = np.bincount(np.concatenate(chosen), minlength=8)
    effects = {e: random.normal(counts[e] / 100, 0.1, SEQUENCES) for e in range(8)}
    sweeps.plant_sweep(
        loaded, [[(_expert(layer, e), sweeps.numbers(effects[e]))] for layer in range(2) for e in range(8)]
    )
    frame = analyze(loaded, "score_agreement").df()
    wanted = spearmanr(counts, [effects[e].mean() for e in range(8)]).statistic
    part = frame[frame["metric"] == "frequency"].set_index("scope")
    assert part.loc["layer", "value"].tolist() == pytest.approx([wanted, wanted])
    assert part.loc["mean over layers", "value"] == pytest.approx(wanted)
    assert part.loc["mean over layers", "null_high"] == pytest.approx(1.959964 * np.sqrt(1 / 7 / 2))
    assert part.loc["all experts", "p"] < 0.01
    assert part.loc["all experts", "n"] == 16
    against = {e: -values for e, values in effects.items()}
    sweeps.plant_sweep(loaded, [[(_expert(0, e), sweeps.numbers(against[e]))] for e in range(8)])
    turned = analyze(loaded, "score_agreement").df()
    assert turned[turned["metric"] == "frequency"].set_index("scope").loc["all experts", "value"] == pytest.approx(
        -wanted
    )
    assert set(turned["scope"]) == {"layer", "all experts"}
    sweeps.plant_sweep(loaded, [[(_expert(0, e), sweeps.numbers(effects[e]))] for e in range(2)])
    with pytest.raises(InputError, match="too few experts"):
        analyze(loaded, "score_agreement")
