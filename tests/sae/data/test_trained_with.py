"""What training left out is left out by every later measure, also on another run of the same texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescope.sae.data.split import held_out
from moescope.sae.data.trained_with import TrainedWith

ROW: dict[str, Any] = {
    "trained_on": "one",
    "corpus_fingerprint": "abc",
    "settings": {"skip_first": 4, "held_out_share": 0.3, "split_seed": 7, "max_norm_ratio": 10},
}


def _run(run_id: str, fingerprint: str | None) -> Any:
    return SimpleNamespace(run_id=run_id, info={"corpus_fingerprint": fingerprint})


def test_a_row_is_read() -> None:
    assert TrainedWith.of(ROW) == TrainedWith("one", "abc", 4, 0.3, 7, 10.0)
    documents = np.arange(500)
    assert (TrainedWith.of(ROW).left_out(documents) == held_out(documents, share=0.3, seed=7)).all()


@pytest.mark.parametrize("row", [{}, {"settings": None}, {"settings": {}, "trained_on": None}])
def test_a_row_that_says_nothing_has_the_defaults_of_training(row: dict[str, Any]) -> None:
    assert TrainedWith.of(row) == TrainedWith()


def test_nothing_held_out_stays_nothing() -> None:
    assert not TrainedWith.of({"settings": {"held_out_share": 0.0}}).left_out(np.arange(100)).any()


@pytest.mark.parametrize(
    ("run_id", "fingerprint", "seen"),
    [("one", "other", True), ("two", "abc", True), ("two", "other", False), ("two", None, False), ("two", "", False)],
)
def test_texts_are_known_again_in_another_run(run_id: str, fingerprint: str | None, seen: bool) -> None:
    assert TrainedWith.of(ROW).saw(_run(run_id, fingerprint)) is seen
    assert TrainedWith.of({}).saw(_run(run_id, fingerprint)) is False
