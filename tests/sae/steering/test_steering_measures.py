"""Agreement of paraphrases and the shift of attention, against plain generation and hand-made divergences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.core.errors import InputError
from moescope.sae.steering.agreement import paraphrase_agreement
from moescope.sae.steering.attention_shift import attention_shift

GROUPS = [["The sky is", "The sky above is", "Above us the sky is"], ["import", "from os import"]]


def test_agreement_counts_pairs_that_are_written_alike() -> None:
    model = ms.load("demo")
    push = e.Intervention(e.Add(layer=5, vector=[30.0 * (-1) ** n for n in range(model.anatomy.d_model)]))
    found = paraphrase_agreement(model, GROUPS, push, tokens=1)
    first = []
    for text in [text for group in GROUPS for text in group]:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            plain = int(model.module(input_ids=ids).logits[0, -1].argmax())
            with model.edited(push):
                moved = int(model.module(input_ids=ids).logits[0, -1].argmax())
        first.append(((plain,), (moved,)))
    assert [pair for group in found.answers for pair in group] == first
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert found.base == pytest.approx(sum(first[i][0] == first[j][0] for i, j in pairs) / 4)
    assert found.steered == pytest.approx(sum(first[i][1] == first[j][1] for i, j in pairs) / 4)
    assert (found.pairs, found.groups) == (4, 2)
    still = paraphrase_agreement(model, GROUPS, push.with_strength(0))
    assert (still.difference, still.ci_low, still.ci_high) == (0, 0, 0)
    with pytest.raises(InputError, match="two paraphrases"):
        paraphrase_agreement(model, [["alone"]], push)


def test_the_shift_of_attention_is_the_divergence_of_its_patterns(tiny_model: Any) -> None:
    module = tiny_model("llama")
    module.set_attn_implementation("eager")
    model = ms.load(module)
    ids = torch.randint(1, 97, (5, 8), generator=torch.Generator().manual_seed(2))
    corpus = ms.Corpus.from_token_ids([row[:n].tolist() for row, n in zip(ids, (8, 5, 8, 3, 8), strict=True)])
    push = e.Intervention(e.Add(layer=0, site="attn.hook_q", vector=torch.randn(32).tolist()))
    found = attention_shift(model, push, corpus, controls=[push.with_strength(0)])
    wanted, queries = np.zeros((2, 4)), 0
    for row, n in zip(ids, (8, 5, 8, 3, 8), strict=True):
        with torch.no_grad():
            plain = module(input_ids=row[None, :n], output_attentions=True).attentions
            with model.edited(push):
                moved = module(input_ids=row[None, :n], output_attentions=True).attentions
        queries += n
        for layer in range(2):
            for head in range(4):
                for query in range(n):
                    p, q = (a[layer][0, head, query, : query + 1].double().numpy() for a in (plain, moved))
                    m = (p + q) / 2
                    wanted[layer, head] += (np.sum(p * np.log(p / m)) + np.sum(q * np.log(q / m))) / 2
    np.testing.assert_allclose(found.value, wanted / queries, atol=1e-6)
    assert found.value[0].min() > 1e-4
    assert (found.ci_low <= found.value).all()
    assert (found.value <= found.ci_high).all()
    assert found.queries == queries
    assert not found.controls.any()
    with pytest.raises(InputError, match="no attention in layers"):
        attention_shift(model, push, corpus, layers=[9])
