"""Paired passes give the numbers that plain transformers and a loop by hand give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

LENGTHS = (9, 5, 1, 7)


def by_hand(module: Any, changed: Any, sequences: list[list[int]]) -> dict[str, list[list[float]]]:
    """NLL, ΔNLL, KL and flips of each token, one sequence at a time, one probability at a time."""
    import torch

    found: dict[str, list[list[float]]] = {"base_nll": [], "delta_nll": [], "kl": [], "flips": []}
    for ids in sequences:
        with torch.no_grad():
            before, after = (
                m(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double() for m in (module, changed)
            )
        rows: dict[str, list[float]] = {name: [0.0] for name in found}
        for position in range(1, len(ids)):
            p, q = before[position - 1].softmax(0).tolist(), after[position - 1].softmax(0).tolist()
            nll = -math.log(p[ids[position]])
            rows["base_nll"].append(nll)
            rows["delta_nll"].append(-math.log(q[ids[position]]) - nll)
            rows["kl"].append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
            rows["flips"].append(float(p.index(max(p)) != q.index(max(q))))
        for name, row in rows.items():
            found[name].append(row)
    return found


@pytest.mark.parametrize("batch_size", [4, 3])
def test_numbers_are_those_of_plain_transformers(
    batch_size: int, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    import torch

    import moescope as ms
    from moescope.probes.batches import BatchPlan
    from moescope.probes.effects.paired import paired_pass

    module, sequences = tiny_model("qwen3_moe"), token_ids(LENGTHS)
    changed = copy.deepcopy(module)
    with torch.no_grad():
        changed.model.layers[1].mlp.experts.down_proj[[2, 5]] = 0.0
    expected = by_hand(module, changed, sequences)
    assert max(max(row) for row in expected["kl"]) > 0.01, "the edit must do something"
    model = ms.load(module)
    plan = BatchPlan(ms.Corpus.from_token_ids(sequences), None, batch_size, 64)
    row = 0
    for paired in paired_pass(model, plan, [ablate(1, [2, 5])]):
        for place, sequence in enumerate(paired.batch.sequences):
            ids = sequence.token_ids
            assert paired.predicted[place].tolist() == [0 < i < len(ids) for i in range(paired.ids.shape[1])]
            for name, rows in expected.items():
                given = paired.base_nll if name == "base_nll" else getattr(paired, name)[0]
                np.testing.assert_allclose(given[place, : len(ids)], rows[row], atol=2e-5, err_msg=name)
                assert not given[place, len(ids) :].any(), "padding has no numbers"
            row += 1
    assert row == len(sequences)


def test_what_changes_nothing_gives_exactly_zero(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    import moescope as ms
    from moescope.core.edit_kinds.experts import Keep, Scale
    from moescope.core.edit_kinds.stream import Skip
    from moescope.core.intervention import Intervention
    from moescope.probes.batches import BatchPlan
    from moescope.probes.effects.paired import paired_pass

    model = ms.load(tiny_model("mixtral"))
    plan = BatchPlan(ms.Corpus.from_token_ids(token_ids(LENGTHS)), None, 2, 64)
    nothing = [
        ablate(1, 2, strength=0),
        Intervention([Skip(layer=0, strength=0)]),
        Intervention([Scale(experts=range(4), factor=1.0)]),
        Intervention([Keep(experts=range(4))]),
    ]
    for paired in paired_pass(model, plan, [*nothing, ablate(1, 2)]):
        for values in (paired.delta_nll, paired.kl, paired.flips):
            assert not values[: len(nothing)].any()
        if paired.batch.number == 0:
            assert paired.delta_nll[-1].any()


def test_edits_of_weights_run_one_by_one_and_give_the_same_base(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    import moescope as ms
    from moescope.core.edit_kinds.experts import FakeQuant
    from moescope.core.intervention import Intervention
    from moescope.probes.batches import BatchPlan
    from moescope.probes.effects.paired import paired_pass

    model = ms.load(tiny_model("qwen3_moe"))
    plan = BatchPlan(ms.Corpus.from_token_ids(token_ids(LENGTHS)), None, 4, 64)
    rounded = Intervention([FakeQuant(layer=0, experts=range(8), bits=3)])
    (both,) = paired_pass(model, plan, [rounded, ablate(1, 2)])
    (alone,) = paired_pass(model, plan, [ablate(1, 2)])
    np.testing.assert_array_equal(both.base_nll, alone.base_nll)
    np.testing.assert_array_equal(both.delta_nll[1], alone.delta_nll[0])
    assert both.kl[0].any()


def test_nan_after_an_edit_stops_and_says_which(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    import moescope as ms
    from moescope.core.edit_kinds.stream import Add
    from moescope.core.errors import RunError
    from moescope.core.intervention import Intervention
    from moescope.probes.batches import BatchPlan
    from moescope.probes.effects.paired import paired_pass

    model = ms.load(tiny_model("qwen3_moe"))
    plan = BatchPlan(ms.Corpus.from_token_ids(token_ids(LENGTHS)), None, 4, 64)
    huge = Intervention([Add(layer=1, vector=[3e38] * 32, strength=1e6)], name="far too much")
    with pytest.raises(RunError, match=r"far too much.*NaN or infinity.*nothing was stored"):
        list(paired_pass(model, plan, [huge]))
    assert list(paired_pass(model, plan, [])), "the model is as it was"


def test_impossible_tokens_add_nothing_to_the_divergence() -> None:
    import torch

    from moescope.probes.effects.token_numbers import compared

    base = torch.tensor([[[0.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]]])
    edited = torch.tensor([[[1.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]])
    found = compared(base, edited, torch.tensor([[0, 1]]))
    p, q = 1 / (1 + math.e), math.e / (1 + math.e)
    assert float(found.kl[0, 1]) == pytest.approx(p * math.log(p / q) + q * math.log(q / p), rel=1e-6)
    assert float(found.flips[0, 1]) == 1.0
    nowhere = torch.tensor([[[1.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0]]])
    assert float(compared(base, nowhere, torch.tensor([[0, 1]])).kl[0, 1]) == math.inf
