"""The exact sweep against whole passes with weights zeroed by hand; what is skipped is zero; NaN is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.edit_kinds.experts import Ablate, RandomRouting, Scale, TopK
from moescope.core.edit_kinds.stream import Add
from moescope.core.errors import RunError
from moescope.core.intervention import Intervention
from moescope.probes.batches import BatchPlan
from moescope.probes.forward import to_device
from moescope.probes.sweeps.base_side import BaseSide
from moescope.probes.sweeps.passes import SweepPasses
from moescope.probes.sweeps.plans import every_expert
from moescope.probes.sweeps.prefix import Prefix
from moescope.probes.sweeps.variants import Variant, grouped

LENGTHS = (11, 7, 14, 1, 9)


def _plan(model: Any, ids: list[list[int]], batch_size: int = 3) -> list[Any]:
    return list(BatchPlan(ms.Corpus.from_token_ids(ids), None, batch_size, 64, model.anatomy.vocabulary))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_sweep_gives_the_numbers_of_weights_zeroed_by_hand(
    family: str, swept_model: Callable[..., Any], by_hand: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module, ids = swept_model(family), token_ids(LENGTHS, seed=1)
    model = ms.load(module)
    passes = SweepPasses(model, pass_size=4)
    found = passes.run(list(grouped(every_expert(model.anatomy))), _plan(model, ids))
    assert not passes.whole
    checked = 0
    for group in found:
        assert group.n.tolist() == [n - 1 for n in LENGTHS]
        for number, variant in enumerate(group.group.variants):
            expert = variant.intervention.edits[0].ids[0]
            wanted = np.array(by_hand(module, variant.layer, expert, ids))
            assert group.sums[number].T[:, :2] == pytest.approx(wanted[:, :2], abs=1e-4)
            assert (group.sums[number, 2] == wanted[:, 2]).all()
            checked += 1
    assert checked == sum(s.n_experts or 0 for s in model.anatomy.moe)


@pytest.mark.parametrize("how", ["route_around", "renormalise", "copy"])
def test_passes_that_begin_at_the_layer_give_the_numbers_of_whole_ones(
    how: str, swept_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    model = ms.load(swept_model("olmoe"))
    groups, plan = list(grouped(every_expert(model.anatomy, how))), _plan(model, token_ids(LENGTHS))
    begun = SweepPasses(model, pass_size=5).run(groups, plan)
    whole = SweepPasses(model, pass_size=3, resume=False).run(groups, plan)
    for a, b in zip(begun, whole, strict=True):
        assert a.sums == pytest.approx(b.sums, abs=1e-4)
        assert np.abs(a.sums).sum() > 0


def test_sequences_that_never_take_the_expert_are_left_out_and_zero(
    swept_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    model = ms.load(swept_model("qwen3_moe"))
    plan = _plan(model, token_ids((4, 4, 4), seed=3))
    (first, _) = SweepPasses(model).run(list(grouped(every_expert(model.anatomy))), plan)
    assert first.skipped > 0
    kept = Prefix(model).plain(to_device(plan[0], model), layers=(), routers=[(0, "mlp")])
    taken = kept.routed[0, "mlp"][:, :-1]  # the last token predicts nothing
    for expert in range(8):
        never = ~(taken == expert).any(-1).any(-1).numpy()
        assert (first.sums[expert][:, never] == 0).all()
        assert (first.sums[expert, 1][~never] > 0).all()
    assert first.skipped + first.rows == 24


def test_variants_that_do_nothing_are_exactly_zero_beside_others(
    swept_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    model = ms.load(swept_model("qwen3_moe"))
    edits = [Scale(layer=1, experts=(0, 1), factor=1.0), Ablate(layer=1, experts=2, strength=0.0), TopK(layer=1, k=2),
             Ablate(layer=1, experts=range(6))]  # fmt: skip
    variants = [Variant(Intervention([edit]), effect=number) for number, edit in enumerate(edits)]
    (found,) = SweepPasses(model, pass_size=3).run(list(grouped(variants)), _plan(model, token_ids((9, 9, 9))))
    assert (found.sums[:3] == 0).all()
    assert (found.sums[3, 1] > 0).all()


def test_same_edits_run_once_and_count_for_all_that_have_them(
    swept_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    model = ms.load(swept_model("qwen3_moe"))
    twice = [Variant(Intervention([RandomRouting(seed=4)], name=name), effect=n) for n, name in enumerate("ab")]
    (found,) = SweepPasses(model).run(list(grouped(twice)), _plan(model, token_ids((9, 9))))
    assert found.rows == 2
    assert (found.sums[0] == found.sums[1]).all()
    assert found.sums[0, 1].sum() > 0


def test_edit_after_which_logits_are_no_numbers_is_named(
    swept_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    model = ms.load(swept_model("qwen3_moe"))
    burst = Intervention([Add(layer=0, vector=(3e38,) * 32, strength=1e5)], name="too much")
    with pytest.raises(RunError, match="too much"):
        SweepPasses(model).run(list(grouped([Variant(burst)])), _plan(model, token_ids((5, 5))))


def test_sums_are_those_of_plain_softmaxes() -> None:
    random = torch.Generator().manual_seed(0)
    base, edited = (4 * torch.randn(3, 6, 11, generator=random) for _ in range(2))
    base[0, 0, 3] = edited[0, 0, 3] = -torch.inf
    ids = torch.randint(0, 3, (3, 6), generator=random)
    lengths, rows = [6, 4, 1], [1, 0, 2]
    found = BaseSide(base, ids, lengths).against(edited, rows)
    for number, row in enumerate(rows):
        delta = kl = flips = 0.0
        for position in range(lengths[row] - 1):
            p, q = base[row, position].double().softmax(-1), edited[number, position].double().softmax(-1)
            target = int(ids[row, position + 1])
            delta += float(p[target].log() - q[target].log())
            kl += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True) if a > 0)
            flips += int(p.argmax() != q.argmax())
        assert found[:, number].tolist() == pytest.approx([delta, kl, flips], abs=1e-5)
