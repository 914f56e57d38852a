"""`sae_quality`, `sae_comparison` and `sae_scaling` on planted judgements."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.features.scaling_law import LAWS, fit_law, left_out_error, possible_laws
from moescope.store.run import Run

_NUMBER = count()


@pytest.fixture(scope="session")
def judged() -> ModuleType:
    """The module `planted_sae_measures.py`."""
    path = Path(__file__).parents[1] / "planted_sae_measures.py"
    spec = importlib.util.spec_from_file_location("moescope_tests_planted_sae_measures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def planted_run(plant: Callable[..., Run], judged: ModuleType) -> Callable[..., Run]:
    """A run with judged autoencoders; what is given goes to `plant_sae_measures`."""

    def make(**given: Any) -> Run:
        run = plant(lengths=[3, 3], name=f"judged run {next(_NUMBER)}")
        judged.plant_sae_measures(run, **given)
        return run

    return make


def test_quality_is_of_the_newest_unless_named(planted_run: Callable[..., Run], judged: ModuleType) -> None:
    run = planted_run()
    newest = analyze(run, "sae_quality")
    frame = newest.df()
    own = frame[(frame["metric"] == "fvu") & (frame["condition"] == "sae")].iloc[0]
    assert own["value"] == pytest.approx(judged.planted_law(4096, 32))
    assert (own["ci_low"], own["null"], own["null_kind"]) == (pytest.approx(0.95 * own["value"]), 0.9, "random_decoder")
    assert "with 32 latents a vector" in newest.title
    named = analyze(run, "sae_quality", sae="judged blocks.0.hook_mlp_out 0 256 8").df()
    other = named[(named["metric"] == "fvu") & (named["condition"] == "sae")].iloc[0]
    assert other["value"] == pytest.approx(judged.planted_law(256, 8))


def test_probes_stand_beside_the_best_random_direction(planted_run: Callable[..., Run]) -> None:
    frame = analyze(planted_run(), "sae_quality").df()
    row = frame[(frame["metric"] == "probe_auc") & (frame["condition"] == "sae") & (frame["group"] == "b")].iloc[0]
    assert row["value"] == pytest.approx(0.89)
    assert row["null"] == pytest.approx(0.69)
    assert row["null_kind"] == "random_direction"
    assert frame.loc[frame["condition"] != "sae", "null"].isna().all()


def test_quality_without_the_live_model_says_so(planted_run: Callable[..., Run]) -> None:
    found = analyze(planted_run(live=False), "sae_quality")
    assert any("not spliced" in note for note in found.notes)
    assert "nats" not in found.title
    assert len(found.figure().data) == 1


def test_figure_draws_every_control_beside_the_autoencoder(planted_run: Callable[..., Run]) -> None:
    figure = analyze(planted_run(), "sae_quality").figure()
    left, right = figure.data
    assert len(left.x) == len(right.x) == 7
    assert left.y[0] == "autoencoder"
    assert "FVU" in figure.layout.xaxis.title.text
    assert "nats" in figure.layout.xaxis2.title.text


def test_comparison_tells_the_frontier(planted_run: Callable[..., Run], judged: ModuleType) -> None:
    found = analyze(planted_run(), "sae_comparison")
    frame = found.df()
    fvu = frame[frame["metric"] == "fvu"].set_index(["d_sae", "l0"])
    assert len(fvu) == 9
    # More latents leave less at every sparsity, so that the largest of each is on the frontier and no other.
    assert set(fvu.index[fvu["frontier"]]) == {(4096, k) for k in judged.SPARSITIES}
    assert fvu.loc[(4096, 8.0), "null"] == pytest.approx(min(0.99, 3 * judged.planted_law(4096, 8)))
    assert len(found.figure().data) == 6  # both PCA lines and one architecture, for FVU and for ΔCE
    assert "4096 32" in found.title


def test_comparison_keeps_sites_apart(planted_run: Callable[..., Run], judged: ModuleType) -> None:
    run = planted_run(sizes=(256, 512))
    judged.plant_sae_measures(run, sizes=(128,), sparsities=(8.0,), site="blocks.1.hook_resid_post", seed=1)
    assert analyze(run, "sae_comparison").n == 6
    assert analyze(run, "sae_comparison", site="blocks.1.hook_resid_post").n == 1
    with pytest.raises(InputError, match=r"no autoencoder at 'blocks.7'"):
        analyze(run, "sae_comparison", site="blocks.7")


@pytest.mark.parametrize("name", ["sae_quality", "sae_comparison", "sae_scaling"])
def test_names_and_labels_are_shown_as_text(name: str, planted_run: Callable[..., Run], planted: ModuleType) -> None:
    hostile = "<b>x</b>"
    run = planted_run(called=hostile, labels=planted.HOSTILE)
    found = analyze(run, name)
    figure = found.figure().to_json()
    assert "<b>x" not in figure.replace("\\u003c", "<")
    if name != "sae_scaling":
        assert hostile in found.title
    if name == "sae_quality":
        assert set(planted.HOSTILE) <= set(found.df()["group"])


def test_unknown_autoencoder_is_refused_with_those_there_are(planted_run: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match="no autoencoder 'other' was judged"):
        analyze(planted_run(), "sae_quality", sae="other")


def test_run_without_a_judgement_is_refused(plant: Callable[..., Run], store: Any, judged: ModuleType) -> None:
    run = plant(lengths=[3])
    with pytest.raises(InputError, match="does not have"):
        analyze(run, "sae_quality")
    judged.plant_sae_measures(run, sizes=(8,), sparsities=(2.0,), seed=9)
    store.connection.execute("DELETE FROM sae_measures WHERE run_id = ? AND metric = 'fvu'", [run.run_id])
    for name in ("sae_quality", "sae_comparison", "sae_scaling"):
        with pytest.raises(InputError, match=r"no autoencoder was judged.*judge one"):
            analyze(run, name)


def test_planted_law_is_recovered(planted_run: Callable[..., Run], judged: ModuleType) -> None:
    sizes, sparsities = (256, 512, 1024, 4096, 16384), (4.0, 8.0, 16.0, 32.0, 64.0)
    frame = analyze(planted_run(sizes=sizes, sparsities=sparsities), "sae_scaling").df()
    found = frame[frame["metric"] == "parameter"].set_index("parameter")["value"]
    assert list(found.index) == list(LAWS["full"])
    assert found.to_numpy() == pytest.approx(np.array(judged.PLANTED), rel=1e-2, abs=1e-3)
    fits = frame[frame["metric"] == "fvu"]
    assert fits["fitted"].to_numpy() == pytest.approx(fits["value"].to_numpy(), rel=1e-5)


def test_parameters_that_are_not_told_are_not_claimed(planted_run: Callable[..., Run]) -> None:
    """Three sizes without any irreducible part, measured with noise: the two parts of the law cannot be told apart."""
    random = np.random.default_rng(1)
    run = planted_run(
        sizes=(192, 384, 768), law=lambda n, k: 5 * n**-0.3 * k**-0.4 * float(np.exp(random.normal(0, 0.02)))
    )
    found = analyze(run, "sae_scaling")
    assert "do not tell its two parts apart" in found.title
    assert any("intervals of the parameters are wide" in note for note in found.notes)


def test_law_predicts_an_autoencoder_that_it_was_not_fitted_to(judged: ModuleType) -> None:
    n, k = (grid.ravel() for grid in np.meshgrid([256.0, 512, 1024, 2048], [8.0, 16, 32, 64]))
    random = np.random.default_rng(0)
    loss = np.array([judged.planted_law(*pair) for pair in zip(n, k, strict=True)])
    law = fit_law("full", n, k, loss * np.exp(random.normal(0, 0.005, len(n))))
    assert law.predict(np.array([4096.0]), np.array([24.0]))[0] == pytest.approx(judged.planted_law(4096, 24), rel=0.05)
    inside = [low <= value <= high for low, value, high in zip(law.low, judged.PLANTED, law.high, strict=True)]
    assert sum(inside) >= 5
    error, plain = left_out_error("full", n, k, loss)  # type: ignore[misc]  # there are enough
    assert error < plain / 100


@pytest.mark.parametrize(
    ("sizes", "sparsities", "law"),
    [
        ((256, 1024), (8.0, 16.0), "n_and_k"),
        ((256, 1024, 4096), (8.0,), "n"),
        ((256,), (8.0, 16.0, 32.0), "k"),
    ],
)
def test_fewer_autoencoders_get_a_law_with_fewer_parameters(
    planted_run: Callable[..., Run], sizes: Any, sparsities: Any, law: str
) -> None:
    run = planted_run(sizes=sizes, sparsities=sparsities, law=lambda n, k: 0.8 * n**-0.2 * k**-0.3)
    found = analyze(run, "sae_scaling")
    frame = found.df()
    values = frame[frame["metric"] == "parameter"].set_index("parameter")["value"]
    assert tuple(values.index) == LAWS[law]
    planted = {"beta_n": -0.2, "beta_k": -0.3}
    for name in set(planted) & set(values.index):
        assert values[name] == pytest.approx(planted[name], abs=1e-6)
    assert any("was fitted instead" in note for note in found.notes)


def test_law_that_autoencoders_cannot_tell_is_refused(planted_run: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match="2 or more, of 2 or more sizes"):
        analyze(planted_run(sizes=(256,), sparsities=(8.0,)), "sae_scaling")
    with pytest.raises(InputError, match="6 or more, of 3 or more sizes and 3 or more sparsities"):
        analyze(planted_run(sizes=(256, 512), sparsities=(8.0, 16.0)), "sae_scaling", law="full")


def test_fit_that_meets_every_point_says_so(planted_run: Callable[..., Run]) -> None:
    found = analyze(planted_run(sizes=(256, 512), sparsities=(8.0,)), "sae_scaling")
    assert any("as many autoencoders as parameters" in note for note in found.notes)
    assert found.df().query("metric == 'parameter'")["ci_low"].isna().all()


def test_possible_laws_want_sizes_and_sparsities_that_differ() -> None:
    six = np.array([1.0, 2, 3, 1, 2, 3]) * 100, np.array([8.0, 8, 8, 8.1, 8.1, 8.1])
    assert possible_laws(*six) == ["n"]
    assert possible_laws(np.array([100.0]), np.array([8.0])) == []


def test_figure_of_the_law_has_a_line_a_sparsity(planted_run: Callable[..., Run]) -> None:
    figure = analyze(planted_run(), "sae_scaling").figure()
    assert len([trace for trace in figure.data if trace.mode == "lines"]) == 3
    assert figure.layout.yaxis.type == figure.layout.xaxis.type == "log"
