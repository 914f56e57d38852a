"""Real weights: the heads of SmolLM2-135M that copy, found without being told."""

from __future__ import annotations

from typing import Any

import pytest

import moescope as ms
from moescope.probes.phenomena.head_masking import mask_heads
from moescope.probes.phenomena.induction import ECHO, INDUCTION, NULL, induction_heads
from moescope.probes.phenomena.needle_grid import needle_grid
from moescope.probes.phenomena.retrieval import GIVEN, SCORE, THRESHOLD, retrieval_heads
from moescope.store.store import Store


@pytest.mark.slow
def test_smollm2_has_induction_echo_and_retrieval_heads_and_they_overlap(smollm2: Any, store: Store) -> None:
    repeats = induction_heads(smollm2, draws=4, store=store)
    induction = repeats.value(INDUCTION)
    assert induction.max() > 0.7
    assert induction.max() > 50 * repeats.value(NULL)[induction.argmax()]
    assert repeats.value(ECHO)[induction.argmax()] < 0.1
    assert 3 <= (induction > 0.3).sum() <= 40, "a few of 270 heads"

    found = retrieval_heads(smollm2, lengths=[512], needles=4, store=store, progress=False)
    assert found.run is not None
    assert found.run.complete
    assert len(found.sequences) == 12
    counted = sum(fact["counted"] for fact in found.sequences)
    told = GIVEN if SCORE in found.withheld else SCORE
    assert (counted < 5) == (SCORE in found.withheld)
    score = found.value(told)
    assert 3 <= (score >= THRESHOLD).sum() <= 40
    assert len(set(found.top(told, 8)) & set(repeats.top(INDUCTION, 12))) >= 3, (
        "heads that copy in one way copy in another"
    )
    assert f"{counted} of 12 trials" in ms.analyze(found.run, "retrieval_heads").title
    row = ms.analyze(found.run, "retrieval_heads").df().query("metric == 'split-half correlation'").iloc[0]
    assert row["value"] > 0.8


@pytest.mark.slow
def test_masking_retrieval_heads_of_smollm2_costs_the_answer_more_than_random_heads_do(smollm2: Any) -> None:
    prompts = needle_grid(smollm2, lengths=[384], depths=[0.5], needles=4)
    found = retrieval_heads(smollm2, prompts=prompts, minimum=1, progress=False)
    score = found.value(GIVEN)
    retrieval = found.top(GIVEN, int((score >= THRESHOLD).sum()))
    masked = mask_heads(smollm2, retrieval[:10], prompts, never=retrieval, text_count=1, progress=False)
    table = masked.df()
    contrast = table[(table["kind"] == "target − controls") & (table["metric"] == "answer NLL")].iloc[0]
    assert contrast["change_low"] > 1, "nats a token"
