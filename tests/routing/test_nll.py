"""NLL: means by label, perplexity, intervals over documents, and nothing counted that nothing predicted."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


def _rows(run: Run, **parameters: int) -> pd.DataFrame:
    return analyze(run, "nll", **parameters).df()


def test_first_tokens_are_not_counted(plant: Plant) -> None:
    run = plant(lengths=[4, 3], nll=np.array([99, 1, 1, 1, 99, 2, 2.0]))
    row = _rows(run).iloc[0]
    assert row["n"] == 5
    assert row["value"] == pytest.approx(7 / 5)


def test_missing_nlls_are_left_out_of_sum_and_count(plant: Plant) -> None:
    run = plant(lengths=[4, 3], nll=np.array([0, 1, np.nan, 3, 0, np.nan, 5.0]))
    row = _rows(run).iloc[0]
    assert (row["n"], row["value"]) == (3, pytest.approx(3.0))


def test_labels_have_rows_of_their_own_and_unlabelled_documents_only_the_first(plant: Plant) -> None:
    nll = np.array([0, 1, 1, 0, 2, 2, 0, 6, 6.0])
    frame = _rows(plant(lengths=[3, 3, 3], labels=["b", "a", None], nll=nll))
    assert frame["label"].tolist() == ["all", "a", "b"]
    assert frame["value"].tolist() == pytest.approx([3.0, 2.0, 1.0])
    assert frame["documents"].tolist() == [3, 1, 1]


def test_perplexity_is_the_exponential_of_the_mean(plant: Plant) -> None:
    frame = _rows(plant(lengths=[5, 5], nll=np.full(10, math.log(17))))
    assert frame["perplexity"][0] == pytest.approx(17, rel=1e-6)


def test_title_names_best_and_worst_label(plant: Plant) -> None:
    run = plant(lengths=[2, 2, 2], labels=["poetry", "code", "prose"], nll=np.array([0, 3, 0, 1, 0, 2.0]))
    title = analyze(run, "nll").title
    assert "2.000 nats" in title
    assert title.index("code") < title.index("poetry")
    assert "prose" not in title


def test_documents_are_resampled_not_sequences(plant: Plant) -> None:
    lengths, nll = [2] * 8, np.array([0, 1, 0, 9] * 4, float)
    one_document = _rows(plant(lengths=lengths, documents=[0] * 8, nll=nll)).iloc[0]
    equal_documents = _rows(plant(lengths=lengths, documents=[0, 0, 1, 1, 2, 2, 3, 3], nll=nll)).iloc[0]
    eight_documents = _rows(plant(lengths=lengths, nll=nll)).iloc[0]
    assert math.isnan(one_document["ci_low"])
    assert (equal_documents["ci_low"], equal_documents["ci_high"]) == pytest.approx((5.0, 5.0))
    assert eight_documents["ci_low"] < 5.0 < eight_documents["ci_high"]


def test_interval_is_near_the_normal_one_for_many_documents(plant: Plant) -> None:
    generator = np.random.default_rng(7)
    values = generator.normal(3.0, 0.5, 200).astype(np.float32).astype(float)
    nll = np.stack([np.zeros(200), values], 1).ravel()
    row = _rows(plant(lengths=[2] * 200, nll=nll), draws=2000).iloc[0]
    half = 1.96 * values.std() / math.sqrt(200)
    assert row["ci_low"] == pytest.approx(values.mean() - half, abs=0.25 * half)
    assert row["ci_high"] == pytest.approx(values.mean() + half, abs=0.25 * half)


def test_seed_repeats_the_interval_and_another_moves_it(plant: Plant) -> None:
    nll = np.random.default_rng(0).exponential(2, 40)
    run = plant(lengths=[2] * 20, nll=nll)
    first, again, other = (_rows(run, seed=seed)["ci_low"][0] for seed in (1, 1, 2))
    assert first == again != other


def test_corpus_of_single_tokens_is_refused(plant: Plant) -> None:
    with pytest.raises(InputError, match="no predicted tokens"):
        analyze(plant(lengths=[1, 1, 1]), "nll")


@given(data=st.data())
def test_means_equal_a_loop_over_tokens(data: st.DataObject, plant: Plant) -> None:
    lengths = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=6))
    labels = data.draw(st.lists(st.sampled_from(["x", "y", None]), min_size=len(lengths), max_size=len(lengths)))
    nll = np.array(data.draw(st.lists(st.floats(0, 20, width=32), min_size=sum(lengths), max_size=sum(lengths))))
    frame = _rows(plant(lengths=lengths, labels=labels, nll=nll), draws=20).set_index("label")
    starts = np.cumsum([0, *lengths[:-1]])
    predicted = [nll[start + 1 : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]
    groups = {"all": list(chain(*predicted))}
    for label in {label for label in labels if label is not None}:
        groups[label] = list(chain(*(p for p, name in zip(predicted, labels, strict=True) if name == label)))
    assert set(frame.index) == set(groups)
    for label, values in groups.items():
        assert frame.loc[label, "n"] == len(values)
        assert frame.loc[label, "value"] == pytest.approx(sum(values) / len(values), abs=1e-5)
