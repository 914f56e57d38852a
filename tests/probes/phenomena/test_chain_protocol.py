"""The steps before the chain is cut: texts, the token for the beginning, batches, costs, and rows of small planted numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.phenomena.chain import chosen_batches, fitting
from moescope.probes.phenomena.chain_rows import copy_rows, repetition_rows, score_rows
from moescope.probes.phenomena.protocol import (
    Asked,
    chosen_texts,
    first_condition,
    other_beginning,
    prepared,
    trial_shape,
)
from moescope.store.store import Store

TEXTS = [f"This is text number {n}, and it goes on for a while." for n in range(10)]


def test_texts_are_spread_evenly_and_cut() -> None:
    chosen = [document.text for document in chosen_texts(Corpus.load(TEXTS), 4, 1000)]
    assert chosen == [TEXTS[n] for n in (0, 3, 6, 9)]
    (short, *_) = chosen_texts(Corpus.load(TEXTS), 2, 3)
    assert TEXTS[0].startswith(short.text)
    assert len(short.text) < len(TEXTS[0])
    (ids, _) = chosen_texts(Corpus.from_token_ids([[5] * 9, [6] * 9]), 2, 4)
    assert ids.token_ids == (5, 5, 5, 5)


def test_the_demo_begins_with_a_special_token_and_is_run_without_it(demo_model: Any, store: Store) -> None:
    other, said = first_condition(demo_model)
    assert other == "without BOS"
    assert "with its token 0" in said
    run = other_beginning(demo_model, Corpus.load(TEXTS), "without BOS", Asked(), store, "bare")
    begun = run.store.fetch("SELECT token_id FROM tokens WHERE position = 0")
    assert begun
    assert all(token != 0 for (token,) in begun)
    again = other_beginning(demo_model, Corpus.load(TEXTS), "with BOS", Asked(), store, "begun")
    query = "SELECT token_id FROM tokens WHERE run_id = ? AND position = 0"
    assert {token for (token,) in store.fetch(query, [again.run_id])} == {0}
    lengths = "SELECT n_tokens FROM sequences WHERE run_id = ? ORDER BY sequence_id"
    bare, begun_lengths = (store.fetch(lengths, [r.run_id]) for r in (run, again))
    assert [n + 1 for (n,) in bare] == [n for (n,) in begun_lengths]


def test_a_tokenizer_without_such_a_token_is_told_of() -> None:
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=None))
    other, said = first_condition(model)
    assert other is None
    assert "no token for the beginning" in said


def test_texts_to_cut_on_and_to_calibrate_on_are_different_ones(demo_model: Any) -> None:
    plan = BatchPlan(Corpus.load(TEXTS), demo_model.tokenizer, 3, 64)
    cut, calibration = chosen_batches(plan, texts=4, batch_size=3)
    ids = [{s.sequence_id for batch in part for s in batch.sequences} for part in (cut, calibration)]
    assert ids[0] == {0, 3, 6, 9}
    assert len(ids[1]) == 4
    assert not ids[0] & ids[1]
    assert all(len(batch.sequences) <= 3 for batch in cut)
    same, others = chosen_batches(plan, texts=10, batch_size=3)
    assert same is others, "where there are no others, the same ones"


def test_the_cost_is_told_and_needles_that_do_not_fit_are_left_out(demo_model: Any) -> None:
    ready = prepared(demo_model, TEXTS, Asked(texts=4, max_length=16, needles=False))
    assert ready.prompts == []
    assert trial_shape(ready.prompts) == "none"
    lines = ready.cost.lines()
    assert lines[-1].startswith("all together about")
    assert ready.cost.seconds == pytest.approx(sum(seconds for _, seconds in ready.cost.steps.values()))
    assert all(seconds > 0 for _, seconds in ready.cost.steps.values())
    bare = prepared(demo_model, Corpus.from_token_ids([[5, 6, 7], [8, 9, 10]]), Asked(texts=2, max_length=16))
    assert bare.prompts == []
    assert any(note.startswith("No needle trials") for note in bare.notes)


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in (
        {"texts": 1},
        {"max_length": 3},
        {"batch_size": 0},
        {"cut_texts": 1},
        {"controls": 0},
        {"generate": -1},
    ):
        with pytest.raises(InputError):
            Asked(**wrong).check()


def test_repeated_tokens_fit_context_and_vocabulary(demo_model: Any) -> None:
    assert fitting(demo_model, 64, 4) == (64, 4)
    small: Any = SimpleNamespace(context=40, tokenizer=None, anatomy=SimpleNamespace(vocabulary=97))
    assert fitting(small, 64, 4) == (19, 2)


def test_shares_and_changes_are_ratios_of_sums() -> None:
    rows = {row.metric: row for row in score_rows("induction", np.array([0.5, 1.0]), np.array([0.1, 0.2]), seed=0)}
    assert rows["base_induction"].value == pytest.approx(0.75)
    assert rows["induction_share"].value == pytest.approx(0.2)
    sums = np.array([[10.0, 30.0], [20.0, 30.0]])
    copies = {row.metric: row for row in copy_rows(sums, 10, 1, seed=0)}
    assert copies["base_copy_nll"].value == pytest.approx(2.0)
    assert copies["delta_copy_nll"].value == pytest.approx(0.5)
    assert copies["delta_copy_nll"].n == 20
    known = {r.metric: r for r in repetition_rows(np.array([0.2, np.nan, 0.4]), np.array([0.5, 0.1, 0.5]), seed=0)}
    assert known["base_repetition"].value == pytest.approx(0.3)
    assert known["delta_repetition"].value == pytest.approx(0.2)
    assert known["delta_repetition"].n == 2
    assert repetition_rows(np.array([np.nan]), np.array([0.1]), seed=0) == []
    assert all(row.metric != "induction_share" for row in score_rows("induction", np.zeros(2), np.zeros(2), seed=0))
