"""Two runs' measures: differences planted on purpose, paired and unpaired, against numbers known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.comparison.compare_measures import moved
from moescope.routing.comparison.paired_sequences import paired_sequences
from moescope.store.run import Run

Plant = Callable[..., Run]
LENGTHS = [6] * 12


def _nll(seed: int, tokens: int = sum(LENGTHS)) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, size=tokens)


def _one(run: Run, other: Run, metric: str, **given: object) -> dict[str, float]:
    frame = analyze([run, other], "compare_measures", **given).df()
    return frame[frame["metric"] == metric].iloc[0].to_dict()


def test_a_planted_shift_is_found_with_an_interval_of_no_width(plant: Plant) -> None:
    """The same noise in both runs cancels where tokens are paired: every resample gives the shift."""
    noise = _nll(0)
    first, second = plant(lengths=LENGTHS, nll=noise), plant(lengths=LENGTHS, nll=noise + 0.25)
    row = _one(first, second, "mean NLL")
    assert row["value"] == pytest.approx(0.25, abs=1e-6)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.25, 0.25), abs=1e-6)
    assert row["value_b"] - row["value_a"] == pytest.approx(row["value"])
    assert row["n"] == sum(LENGTHS) - len(LENGTHS), "first tokens are predicted by nothing"


def test_the_interval_is_that_of_documents_drawn_by_hand(plant: Plant) -> None:
    a, b = _nll(1), _nll(2)
    first, second = plant(lengths=LENGTHS, nll=a), plant(lengths=LENGTHS, nll=b)
    row = _one(first, second, "mean NLL", draws=4000)
    kept = np.arange(sum(LENGTHS)) % 6 > 0
    change = (b - a).astype(np.float32)[kept].reshape(12, 5).mean(1)
    drawn = change[np.random.default_rng(9).integers(0, 12, (20_000, 12))].mean(1)
    assert row["value"] == pytest.approx(change.mean(), abs=1e-6)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.03)


def test_predictions_are_counted_at_the_token_they_were_of(plant: Plant) -> None:
    ids = [0, 1, 2, 3] * 3
    right = [1, 2, 3, 0] * 3
    first = plant(lengths=[4] * 3, ids=ids, predicted=right)
    second = plant(lengths=[4] * 3, ids=ids, predicted=[1, 9, 9, 9] * 3)
    row = _one(first, second, "next token predicted")
    assert (row["value_a"], row["value_b"]) == pytest.approx((1.0, 1 / 3))


def test_only_layers_of_both_runs_are_pooled(plant: Plant, planted: ModuleType) -> None:
    experts = np.zeros((8, 1), int)
    zero = planted.Router(experts, 2, layer=0, entropy=np.full(8, 0.2))
    one = planted.Router(experts, 2, layer=1, entropy=np.full(8, 0.9))
    shifted = planted.Router(experts, 2, layer=0, entropy=np.full(8, 0.5))
    first, second = plant(lengths=[4, 4], routers=[zero, one]), plant(lengths=[4, 4], routers=[shifted])
    row = _one(first, second, "router entropy")
    assert (row["value_a"], row["value_b"], row["value"]) == pytest.approx((0.2, 0.5, 0.3))
    by_layer = analyze([first, second], "compare_measures", by="layer").df()
    assert set(by_layer["layer"]) == {0}


def test_runs_of_other_texts_are_compared_unpaired_and_it_is_said(plant: Plant) -> None:
    first, second = plant(lengths=[5] * 10, nll=_nll(3, 50)), plant(lengths=[7] * 10, nll=_nll(4, 70))
    assert paired_sequences(first, second).empty
    result = analyze([first, second], "compare_measures")
    assert any("share no sequence" in note for note in result.notes)
    assert "unpaired" in (result.interval or "")
    row = result.df().set_index("metric").loc["mean NLL"]
    assert row["ci_low"] < row["value"] < row["ci_high"]


def test_shared_sequences_alone_are_compared(plant: Plant, planted: ModuleType) -> None:
    """The first run has two texts more; their NLL must not enter."""
    noise = _nll(5, 24)
    first = plant(lengths=[4] * 8, nll=np.concatenate([noise, np.full(8, 50.0)]))
    second = plant(lengths=[4] * 6, nll=noise)
    result = analyze([first, second], "compare_measures")
    assert result.df().set_index("metric").loc["mean NLL", "value"] == pytest.approx(0.0, abs=1e-6)
    assert any("6 sequences are in both" in note for note in result.notes)


def test_equal_texts_are_paired_one_by_one(plant: Plant, store: object) -> None:
    first, second = plant(lengths=[3, 3, 3]), plant(lengths=[3, 3, 3])
    for run in (first, second):
        run.store.connection.execute("UPDATE sequences SET content_hash = 'same' WHERE run_id = ?", [run.run_id])
    pairs = paired_sequences(first, second)
    assert pairs[["sequence_id", "other_id"]].to_numpy().tolist() == [[0, 0], [1, 1], [2, 2]]


def test_a_run_against_itself_differs_in_nothing(plant: Plant, planted: ModuleType) -> None:
    run = plant(**planted.everything(layers=2, n_experts=4, labels=["a"] * 4))
    for by in ("model", "layer"):
        result = analyze([run, run], "compare_measures", by=by)
        assert set(result.df()["value"]) == {0.0}
        assert result.title.split(": ", 1)[1].count("0 of ") == 1
        assert result.figure().data


def test_a_planted_load_difference_is_told_without_an_interval(plant: Plant, planted: ModuleType) -> None:
    even = planted.Router(np.arange(8)[:, None] % 2, 2)
    skew = planted.Router(np.zeros((8, 1), int), 2)
    row = _one(plant(lengths=[8], routers=[even]), plant(lengths=[8], routers=[skew]), "CV of expert load")
    assert (row["value_a"], row["value_b"]) == pytest.approx((0.0, 1.0))
    assert np.isnan(row["ci_low"])


def test_runs_without_a_common_measure_are_refused(plant: Plant, planted: ModuleType) -> None:
    alone = plant(lengths=[4], nll=np.full(4, np.nan), predicted=[0] * 4)
    first = plant(lengths=[4, 4], nll=_nll(6, 8))
    with pytest.raises(InputError, match="share no measure"):
        analyze([first, alone], "compare_measures")


@pytest.mark.parametrize("names", [("a-b", "c-d")])
def test_names_of_runs_stay_as_they_are_in_the_title(plant: Plant, names: tuple[str, str]) -> None:
    runs = [plant(name=name, lengths=[4, 4], nll=_nll(n, 8)) for n, name in enumerate(names)]
    assert analyze(runs, "compare_measures").title.startswith("a-b → c-d: ")


def test_generated_tokens_are_left_out(plant: Plant, planted: ModuleType) -> None:
    """The second run wrote two tokens on after each text, with other experts and likelihoods."""
    noise, generated = _nll(7, 24), np.tile([False] * 4 + [True] * 2, 6)
    longer = np.full(36, 50.0)
    longer[~generated] = noise
    even = planted.Router(np.arange(24)[:, None] % 2, 2, entropy=np.full(24, 0.4))
    chosen = np.zeros((36, 1), int)
    chosen[~generated] = even.experts
    skew = planted.Router(
        chosen, 2, entropy=np.where(generated, 0.1, 0.4), norms=np.where(generated, 9.0, 1.0)[:, None]
    )
    even.norms = np.ones((24, 1))
    streams = [{0: planted.Stream(np.ones(24))}, {0: planted.Stream(np.where(generated, 9.0, 1.0))}]
    first = plant(lengths=[4] * 6, nll=noise, routers=[even], streams=streams[0])
    second = plant(lengths=[6] * 6, nll=longer, routers=[skew], streams=streams[1], decode=generated.tolist())
    for run in (first, second):
        run.store.connection.execute(
            "UPDATE sequences SET n_tokens = 4, content_hash = 'text ' || sequence_id WHERE run_id = ?", [run.run_id]
        )
    result = analyze([first, second], "compare_measures")
    frame = result.df().set_index("metric")
    assert set(frame.index) >= {
        "mean NLL",
        "next token predicted",
        "router entropy",
        "expert output norm",
        "residual norm",
        "CV of expert load",
    }
    assert frame["value"].to_numpy() == pytest.approx(0, abs=1e-6)
    assert "Generated tokens are left out." in result.notes
    assert "Generated tokens are left out." not in analyze([first, first], "compare_measures").notes


def test_a_number_of_one_run_alone_is_left_out_of_both(plant: Plant) -> None:
    noise = _nll(8)
    first, second = plant(lengths=LENGTHS, nll=noise), plant(lengths=LENGTHS, nll=noise)
    second.store.connection.execute(
        "UPDATE tokens SET nll = 'nan' WHERE run_id = ? AND sequence_id = 3 AND position = 2", [second.run_id]
    )
    result = analyze([first, second], "compare_measures")
    row = result.df().set_index("metric").loc["mean NLL"]
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((0, 0, 0), abs=1e-9)
    assert row["n"] == 5 * (len(LENGTHS) - 1)
    assert any(note.startswith("Left out: 1 cell of sequence × measure") for note in result.notes)
    assert not any(note.startswith("Left out") for note in analyze([first, first], "compare_measures").notes)


def test_layers_are_pooled_over_what_both_runs_have(plant: Plant, planted: ModuleType) -> None:
    """A layer that one run lacks in one text must not enter the other run's mean of that text."""
    levels = [0.2, 0.9]
    runs = [
        plant(
            lengths=[4] * 4,
            routers=[
                planted.Router(np.zeros((16, 1), int), 2, layer=layer, entropy=np.full(16, level))
                for layer, level in enumerate(levels)
            ],
        )
        for _ in range(2)
    ]
    runs[1].store.connection.execute(
        "UPDATE routing SET entropy = NULL WHERE run_id = ? AND layer = 1 AND token < 4", [runs[1].run_id]
    )
    frame = analyze(runs, "compare_measures").df().set_index("metric")
    assert frame.loc["router entropy", "value"] == pytest.approx(0, abs=1e-6)


def test_a_measure_that_was_0_has_moved_and_the_figure_says_that_it_has_no_percent(
    plant: Plant, planted: ModuleType
) -> None:
    experts = np.zeros((48, 1), int)
    levels = [np.zeros(48), np.full(48, 0.5)]
    first, second = (
        plant(lengths=[6] * 8, nll=_nll(9, 48), routers=[planted.Router(experts, 2, entropy=level)]) for level in levels
    )
    result = analyze([first, second], "compare_measures")
    assert result.title.endswith("1 of 5 measures differ beyond their interval")
    assert any(note.startswith(f"0 in {first.name}") and "router entropy" in note for note in result.notes)
    assert "router entropy" not in result.figure().data[0].y
    layers = analyze([first, second], "compare_measures", by="layer")
    assert "1 of 3 numbers by layer differ" in layers.title
    shown = layers.figure().data[0]
    assert np.isnan(shown.z[list(shown.y).index("router entropy")][0]), "an interval of no width has no half-widths"


@pytest.mark.parametrize(
    ("value", "relative", "expected"),
    [(0.0, np.nan, False), (0.5, np.nan, True), (1e-9, 1e-9, False), (0.1, -0.1, True), (0.0, 0.0, False)],
)
def test_a_difference_from_0_has_moved(value: float, relative: float, expected: bool) -> None:
    assert bool(moved(value, relative)) is expected
