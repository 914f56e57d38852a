"""Rounded weights against rounding written out, and against models whose weights were rounded by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.edit_kinds.experts import FakeQuant
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.edits.session import edited
from moescope.probes.edits.steps.fake_quant import fake_quantised
from moescope.probes.families.tiny import build_tiny


def some_ids(rows: int = 2, positions: int = 9) -> torch.Tensor:
    return torch.randint(1, 97, (rows, positions), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(live: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = live.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found


def rounded_row(row: list[float], bits: int) -> list[float]:
    """One output row, number by number."""
    levels = 2 ** (bits - 1) - 1
    scale = max(map(abs, row)) / levels
    return [scale * max(-levels, min(levels, round(x / scale))) if scale else x for x in row]


def expected_error(bits: int) -> float:
    """Root mean square error of rounding uniform numbers on [−1, 1]: a step over √12."""
    return (1 / (2 ** (bits - 1) - 1)) / math.sqrt(12)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_rounding_equals_the_formula_number_by_number(bits: int) -> None:
    weight = torch.randn(5, 11, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    weight[3] = 0
    wanted = torch.tensor([rounded_row(row, bits) for row in weight.tolist()], dtype=torch.float64)
    torch.testing.assert_close(fake_quantised(weight, bits), wanted)
    torch.testing.assert_close(fake_quantised(weight.T, bits, axis=1), wanted.T)
    assert all(len(set(row)) <= 2**bits - 1 for row in fake_quantised(weight, bits).tolist())


def test_error_of_rounding_is_that_of_uniform_numbers() -> None:
    weight = torch.rand(4, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    for bits in (3, 5, 8):
        found = float((fake_quantised(weight, bits) - weight).square().mean().sqrt())
        assert found == pytest.approx(expected_error(bits), rel=0.01)


# Families of either layout: [expert, out, in], and gpt_oss's [expert, in, out].
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "longcat_flash"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_equals_a_model_rounded_by_hand(family: str, strength: float) -> None:
    live, ids = ms.load(build_tiny(family)), some_ids()
    s = live.anatomy.moe[-1]
    assert s.experts_path is not None
    experts = live.module.get_submodule(s.experts_path)
    taken = tuple(range(5))
    with edited(live, Intervention([FakeQuant(layer=s.layer, experts=taken, bits=3, strength=strength)])):
        found = logits(live, ids)
    before = logits(live, ids)
    with torch.no_grad():
        for name, weight in experts.named_parameters(recurse=False):
            if weight.ndim < 3:
                continue  # biases stay
            for e in taken:
                rows = weight[e].T if family == "gpt_oss" else weight[e]  # outputs by inputs
                new = torch.tensor([rounded_row(row, 3) for row in rows.tolist()])
                assert new.shape == rows.shape, name
                rows += strength * (new - rows)
    torch.testing.assert_close(found, logits(live, ids), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, before, atol=1e-4)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_the_models_own_parameters_are_back_also_after_an_exception(
    tiny_model: Callable[..., Any], experts: str
) -> None:
    live, ids = ms.load(tiny_model("qwen3_moe", experts=experts)), some_ids()
    before, own = logits(live, ids), {name: (id(p), p.clone()) for name, p in live.module.named_parameters()}
    cut = Intervention([FakeQuant(layer=0, experts=(0, 1), bits=2), FakeQuant(layer=0, experts=2, bits=4)])

    def fails() -> None:
        with edited(live, cut):
            inside = dict(live.module.named_parameters())["model.layers.0.mlp.experts.down_proj"]
            kept = own["model.layers.0.mlp.experts.down_proj"][1]
            assert torch.equal(inside[3:], kept[3:])
            assert all(not torch.equal(inside[e], kept[e]) for e in range(3))
            assert not torch.equal(logits(live, ids), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(id(p) == own[name][0] and torch.equal(p, own[name][1]) for name, p in live.module.named_parameters())
    assert torch.equal(logits(live, ids), before)


def test_strength_0_and_update(tiny_model: Callable[..., Any]) -> None:
    live, ids = ms.load(tiny_model("mixtral")), some_ids()
    before = logits(live, ids)
    every = range(4)
    with edited(live, Intervention([FakeQuant(layer=1, experts=every, bits=2, strength=0)])) as session:
        assert torch.equal(logits(live, ids), before)
        session.update(Intervention([FakeQuant(layer=1, experts=(0, 1, 2), bits=4)]))
        found = logits(live, ids)
    with edited(live, Intervention([FakeQuant(layer=1, experts=(0, 1, 2), bits=4)])):
        assert torch.equal(found, logits(live, ids))


def test_rows_cannot_differ_in_their_weights(tiny_model: Callable[..., Any]) -> None:
    live = ms.load(tiny_model("mixtral"))
    with (
        pytest.raises(InputError, match="all rows of a batch share"),
        edited(live, [Intervention([FakeQuant(layer=0, experts=1)]), Intervention()]),
    ):
        pass


@pytest.mark.parametrize(
    ("family", "make", "reason"),
    [
        ("mixtral", lambda: FakeQuant(layer=1, experts=1, bits=1), "2 to 8"),
        ("mixtral", lambda: FakeQuant(layer=1, experts=1, bits=9), "2 to 8"),
        ("mixtral", lambda: FakeQuant(layer=1, experts=8), "no expert 8"),
        ("mixtral", lambda: FakeQuant(layer=1), "expert"),
        ("mixtral", lambda: FakeQuant(layer=1, experts=1, positions="0:1"), "every token"),
        ("mixtral", lambda: FakeQuant(layer=1, experts=1, strength=2), "between 0 and 1"),
        ("dbrx", lambda: FakeQuant(layer=1, experts=1), "not known"),
        ("doge", lambda: FakeQuant(layer=1, experts=1), "no module of their own"),
    ],
)
def test_what_cannot_be_is_refused(family: str, make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason), edited(ms.load(build_tiny(family)), Intervention([make()])):
        pass
