"""Reconstructions in the place of single experts' outputs, against plain loops over tokens and slots; and edits at inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.edits.checks import check_intervention
from moescope.probes.edits.session import edited
from moescope.probes.taps import tapped

WIDTH = 32
SLOTS = Site(0, "mlp", "experts.hook_out")


class Linear:
    """A reconstruction by a matrix, for any site; every latent is on."""

    def __init__(self, site: Site = SLOTS, width: int = WIDTH, expert: int | None = None) -> None:
        self.site, self.expert, self.d_in = site, expert, width
        self.decoder = torch.randn(5, width, generator=torch.Generator().manual_seed(2)) / width**0.5

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self.decoder.T

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return activations @ self.decoder


def some_ids(rows: int = 2, positions: int = 7) -> torch.Tensor:
    return torch.randint(1, 97, (rows, positions), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(live: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = live.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found


def at_site(live: Any, site: Site, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with tapped(live.module, live.anatomy, [site], lambda _, t: seen.append(next(iter(t.values())).clone())):
        logits(live, ids)
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("expert", [None, 2])
def test_slots_hold_their_reconstructions(
    tiny_model: Callable[..., Any], family: str, implementation: str, expert: int | None
) -> None:
    live, ids = ms.load(tiny_model(family, experts=implementation)), some_ids()
    layer = live.anatomy.moe_layers[-1]
    sae = Linear(Site(layer, "mlp", "experts.hook_out"), expert=expert)
    place = Site(layer, "", "hook_mlp_out")
    slots: dict[str, torch.Tensor] = {}
    with tapped(live.module, live.anatomy, [sae.site], lambda _, t: slots.update({k: v.clone() for k, v in t.items()})):
        logits(live, ids)
    before = at_site(live, place, ids)
    added = torch.zeros_like(before)
    hits = 0
    for token, (experts, weights, outs) in enumerate(
        zip(slots["indices"], slots["weights"], slots["out"], strict=True)
    ):
        for chosen, weight, out in zip(experts.tolist(), weights, outs, strict=True):
            if expert is None or chosen == expert:
                hits += 1
                added[token] += weight * 0.5 * (sae.decode(sae.encode(out)) - out)
    assert hits
    edit = e.Splice(layer=layer, site="mlp.experts.hook_out", sae="s", strength=0.5)
    with edited(live, e.Intervention(edit), sources={"s": sae}):
        after = at_site(live, place, ids)
    torch.testing.assert_close(after - before, added, atol=1e-5, rtol=1e-4)
    assert added.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_at_strength_0_or_with_their_error_keep_every_bit(tiny_model: Callable[..., Any], dtype: str) -> None:
    live, ids = ms.load(tiny_model("qwen3_moe", dtype=dtype)), some_ids(3)
    plain = logits(live, ids)
    edit = e.Splice(layer=0, site="mlp.experts.hook_out", sae="s")
    one = e.Intervention(edit)
    kept = e.Intervention(e.Splice(layer=0, site="mlp.experts.hook_out", sae="s", keep_error=True))
    for cut in (one.with_strength(0), kept):
        with edited(live, cut, sources={"s": Linear()}):
            assert torch.equal(logits(live, ids), plain)
    with edited(live, [e.Intervention(), one, one.with_strength(0)], sources={"s": Linear()}) as session:
        session.assign([0, 1, 2])
        found = logits(live, ids)
    atol = 1e-5 if dtype == "float32" else 0.05  # kernels lay tokens of all rows side by side
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]], atol=atol, rtol=atol)
    assert (found[1] - plain[1]).abs().max() > 0.1


def test_slots_and_weights_of_one_router_act_together(tiny_model: Callable[..., Any]) -> None:
    """An expert that is taken out writes nothing, whatever stands in its slot."""
    live, ids = ms.load(tiny_model("qwen3_moe")), some_ids()
    splice = e.Splice(layer=0, site="mlp.experts.hook_out", sae="s")
    out = e.Ablate(layer=0, experts=[2])
    with edited(live, e.Intervention([splice, out]), sources={"s": Linear(expert=2)}):
        both = logits(live, ids)
    with edited(live, e.Intervention([out])):
        alone = logits(live, ids)
    assert torch.equal(both, alone)


@pytest.mark.parametrize(
    ("family", "sae", "said"),
    [
        ("llama", Linear(), "dense model"),
        ("qwen3_moe", Linear(expert=8), "experts 0 to 7"),
        ("qwen3_moe", Linear(Site(1, "mlp", "experts.hook_out")), "layer=1"),
        ("qwen3_moe", Linear(width=31), "31 numbers"),
    ],
)
def test_what_has_no_such_slots_is_refused(tiny_model: Callable[..., Any], family: str, sae: Linear, said: str) -> None:
    live = ms.load(tiny_model(family))
    edit = e.Splice(layer=0, site="mlp.experts.hook_out", sae="s")
    with pytest.raises(InputError, match=f"(?s){said}"):
        check_intervention(live, e.Intervention(edit), sources={"s": sae})


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_the_input_of_an_mlp_is_changed_before_its_router_and_experts(
    tiny_model: Callable[..., Any], family: str
) -> None:
    live, ids = ms.load(tiny_model(family)), some_ids()
    block = live.module.transformer.h[1] if family == "gpt2" else live.module.model.layers[1]
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    plain, own = logits(live, ids), block.mlp.forward
    block.mlp.forward = lambda x, *args, **named: own(x + vector, *args, **named)
    wanted = logits(live, ids)
    del block.mlp.forward
    with edited(live, e.Intervention(e.Add(layer=1, site="mlp.hook_in", vector=vector))):
        assert torch.equal(logits(live, ids), wanted)
    assert not torch.allclose(wanted, plain, atol=1e-4)
    assert torch.equal(logits(live, ids), plain)


def test_queries_and_head_outputs_are_changed_where_their_projections_are(tiny_model: Callable[..., Any]) -> None:
    """GPT-2 gives queries, keys and values together: only the first third of the projection is touched."""
    live, ids = ms.load(tiny_model("gpt2")), some_ids()
    attention = live.module.transformer.h[1].attn
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    for site, module, wide in (("attn.hook_q", attention.c_attn, True), ("attn.hook_z", attention.c_proj, False)):
        own = module.forward

        def forward(x: torch.Tensor, own: Any = own, wide: bool = wide) -> torch.Tensor:
            if not wide:
                return own(x + vector)
            return own(x) + torch.cat([vector, torch.zeros(2 * WIDTH)])

        module.forward = forward
        wanted = logits(live, ids)
        del module.forward
        with edited(live, e.Intervention(e.Add(layer=1, site=site, vector=vector))):  # type: ignore[arg-type]  # one of two
            found = logits(live, ids)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(wanted, logits(live, ids), atol=1e-5)


def test_edits_inside_what_is_skipped_or_masked_contradict_it(tiny_model: Callable[..., Any]) -> None:
    live = ms.load(tiny_model("llama"))
    vector = (0.0,) * WIDTH
    for whole, site in (
        (e.Skip(layer=1, part="mlp"), "mlp.hook_in"),
        (e.Skip(layer=1, part="attn"), "attn.hook_q"),
        (e.MaskHead(layer=1, heads=0), "attn.hook_z"),
    ):
        inner = e.Add(layer=1, site=site, vector=vector)  # type: ignore[arg-type]  # a site
        with pytest.raises(InputError, match="contradict"):
            check_intervention(live, e.Intervention([whole, inner]))
