"""Recorded losses and predictions against `torch.nn.CrossEntropyLoss` on the plain model's logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moescope as ms
from moescope.probes.demo import MODEL_DIR

LENGTHS = (7, 1, 12, 4, 9)
TEXTS = [
    "for i in range(10):\n    print(i)\n",
    "Der Hund läuft über die Straße.",
    "?",
    "a b c d e f g h i j k l m n o p",
]


def expected_tokens(batches: list[Any]) -> list[tuple[int, float | None, int]]:
    """(token id, loss or None at a sequence's first token, most likely next id) of every real token, in order."""
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    found = []
    for batch in batches:
        for ids, mask, logits in zip(batch.ids, batch.mask, batch.logits.float(), strict=True):
            length = int(mask.sum())
            losses = loss(logits[: length - 1], ids[1:length]).tolist()
            best = logits[:length].argmax(-1).tolist()
            found += zip(ids[:length].tolist(), [None, *losses], best, strict=True)
    return found


def assert_recorded(run: Any, expected: list[tuple[int, float | None, int]]) -> None:
    query = "SELECT token, token_id, nll, predicted_id FROM tokens WHERE run_id = ? ORDER BY token"
    rows = run.store.fetch(query, [run.run_id])
    assert [row[0] for row in rows] == list(range(len(expected)))
    assert [row[1] for row in rows] == [token_id for token_id, _, _ in expected]
    assert [row[3] for row in rows] == [best for _, _, best in expected]
    for (_, _, nll, _), (_, loss, _) in zip(rows, expected, strict=True):
        assert (nll is None) == (loss is None)
        assert nll is None or nll == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize(("family", "dtype"), [("qwen3_moe", "float32"), ("llama", "float32"), ("mixtral", "bfloat16")])
def test_recorded_nll_is_the_cross_entropy_of_the_plain_model(
    family: str,
    dtype: str,
    batch_size: int,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    sequences = token_ids(LENGTHS)
    run = record_ids(tiny_model(family, dtype=dtype), sequences, batch_size=batch_size)
    assert_recorded(run, expected_tokens(plain_passes(tiny_model(family, dtype=dtype), sequences, batch_size)))


def test_recorded_nll_of_the_demo_model_is_the_cross_entropy_of_plain_transformers(
    demo_model: Any, store: Any, plain_passes: Callable[..., Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    module = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    sequences = [tokenizer(text)["input_ids"] for text in TEXTS]
    run = ms.record(demo_model, TEXTS, store, name="run", batch_size=3, progress=False)
    assert_recorded(run, expected_tokens(plain_passes(module, sequences, 3)))


def test_mean_nll_leaves_out_padding_and_first_positions(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    module, sequences = tiny_model("qwen3_moe"), token_ids(LENGTHS)
    run = record_ids(module, sequences)
    expected = [loss for _, loss, _ in expected_tokens(plain_passes(module, sequences)) if loss is not None]
    assert len(expected) == sum(LENGTHS) - len(LENGTHS)
    ((mean, count),) = run.store.fetch("SELECT avg(nll), count(nll) FROM tokens WHERE run_id = ?", [run.run_id])
    assert count == len(expected)
    assert mean == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_a_model_of_equal_logits_loses_ln_of_the_vocabulary(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module = tiny_model("llama")
    with torch.no_grad():
        module.lm_head.weight.zero_()
    run = record_ids(module, token_ids(LENGTHS))
    values = run.store.fetch("SELECT nll FROM tokens WHERE run_id = ? AND position > 0", [run.run_id])
    assert [value for (value,) in values] == pytest.approx([math.log(97)] * len(values), abs=1e-6)
