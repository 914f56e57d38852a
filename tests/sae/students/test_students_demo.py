"""Students of a MoE block of the bundled model: the mixture is ahead of the dense student, and no student beats nothing by magic."""

from __future__ import annotations

from typing import Any

import pytest

import moescope as ms
from moescope.sae.students.study import mlp_students
from moescope.store.store import Store


@pytest.mark.slow
def test_mixture_imitates_a_mixture_of_experts_better_than_a_dense_student(demo_model: Any, store: Store) -> None:
    """The teacher is a mixture itself: what routing gives it, a dense student with as many active neurons has not."""
    found = mlp_students(
        demo_model, ms.Corpus.load("demo"), store, layer=5, students=("moe", "dense", "linear", "mean"), active=(16,), experts=256,
        inputs=("real",), vectors=20_000, lrs=(1e-2,), progress=False,
    ).df()  # fmt: skip
    gain = found[found["metric"] == "gain"].iloc[0]
    assert gain["ci_low"] > 0.05
    mean = found[(found["student"] == "mean") & (found["metric"] == "fvu")].iloc[0]
    assert mean["value"] == pytest.approx(1, abs=0.1)
