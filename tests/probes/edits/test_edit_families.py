"""Every family: which edits it takes, and that those it takes do what they say."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.core.sites import EXPERT_INDICES, EXPERT_WEIGHTS, Site
from moescope.probes.edits.session import edited
from moescope.probes.edits.support import edit_support
from moescope.probes.families.tiny import ENCODER_DECODER_TYPES, build_tiny, moe_model_types
from moescope.probes.taps import tapped

TYPES = (*moe_model_types(), *ENCODER_DECODER_TYPES)
# Their routers cannot be edited at all, or cannot be computed; the reasons stand in the table.
NO_DECISIONS = {"doge", "jetmoe", *ENCODER_DECODER_TYPES}
NO_RULE = {"inkling_text"}
# One of each way in which families differ; the others are tried as well, where there is time.
DIFFERENT = (
    "afmoe",
    "axk2",
    "dbrx",
    "deepseek_v2",
    "deepseek_v4",
    "gemma4_text",
    "gpt_oss",
    "inkling_text",
    "llama4_text",
    "longcat_flash",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "zaya",
)
EACH = [pytest.param(t, marks=() if t in DIFFERENT else pytest.mark.slow) for t in TYPES if t not in NO_DECISIONS]


@cache
def model_of(family: str) -> Any:
    return ms.load(build_tiny(family))


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def ids_of(model: Any) -> torch.Tensor:
    return torch.randint(2, min(97, model.anatomy.vocabulary), (2, 14), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("types", [(*DIFFERENT, *sorted(NO_DECISIONS)), pytest.param(TYPES, marks=pytest.mark.slow)])
def test_every_family_takes_edits_of_decisions_or_says_why(types: tuple[str, ...]) -> None:
    tables = {family: edit_support(model_of(family)) for family in types}
    refused = {family for family, table in tables.items() if not table["ablate zero"].works}
    assert refused == NO_DECISIONS
    without = {family for family, table in tables.items() if not table["ablate route_around"].works}
    assert without == NO_DECISIONS | NO_RULE
    for table in tables.values():
        assert {s.edit for s in table.values()} == set(next(iter(tables.values())))
        assert all(s.reason for s in table.values() if not s.works)
    reasons = {s.reason for table in tables.values() for s in table.values() if s.reason}
    assert any("table of token ids" in reason for reason in reasons)


def _routers(model: Any) -> list[tuple[int, str]]:
    return [(s.layer, s.block) for s in model.anatomy.moe if s.block == "mlp"]


def decisions_of(model: Any, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    seen: dict[Site, dict[str, torch.Tensor]] = {}
    sites = [Site(*place, tensor) for place in _routers(model) for tensor in (EXPERT_INDICES, EXPERT_WEIGHTS)]
    with tapped(model.module, model.anatomy, sites, lambda site, tensors: seen.update({site: tensors})):
        logits_of(model, ids)
    found = {}
    for layer, block in _routers(model):
        pair = seen[Site(layer, block, EXPERT_INDICES)], seen[Site(layer, block, EXPERT_WEIGHTS)]
        found[layer] = pair[0]["indices"].clone(), pair[1]["weights"].clone()
    return found


@pytest.mark.parametrize("family", EACH)
def test_decisions_are_edited_in_every_family_that_takes_it(family: str) -> None:
    """Nothing changes no bit; zeroing takes the weight; routing around leaves the expert out; k changes."""
    model = model_of(family)
    ids, table = ids_of(model), edit_support(model)
    plain, base = logits_of(model, ids), decisions_of(model, ids)
    by_rule = table["ablate route_around"].layers
    nothing: list[e.Edit] = [e.Scale(experts=0, factor=1.0), e.SwapExperts(strength=0)]
    nothing += [e.Keep(layer=layer, experts=range(model.anatomy.moe_at(layer, "mlp").n_choices)) for layer in by_rule]
    with edited(model, e.Intervention(nothing)):
        assert torch.equal(logits_of(model, ids), plain)
    first = min(base)
    chosen = int(base[first][0].flatten().mode().values)
    if chosen >= model.anatomy.moe_at(first, "mlp").n_experts:  # a null expert has nothing to be zeroed
        chosen = int(base[first][0].min())
    with edited(model, e.Intervention([e.Ablate(layer=first, experts=chosen)])):
        ours = decisions_of(model, ids)[first]
        assert not torch.equal(logits_of(model, ids), plain)
    hit = base[first][0] == chosen
    still = (ours[0] == chosen) & (ours[1] != 0)
    assert hit.any()
    assert not still.any()
    assert torch.equal(ours[1].sum(-1)[~hit.any(-1)], base[first][1].sum(-1)[~hit.any(-1)])
    if first in by_rule:
        with edited(model, e.Intervention([e.Ablate(layer=first, experts=chosen, how="route_around")])):
            ids_now, weights = decisions_of(model, ids)[first]
        assert not ((ids_now == chosen) & (weights != 0)).any()
        assert (weights != 0).sum() >= 0.9 * (base[first][1] != 0).sum()
    assert torch.equal(logits_of(model, ids), plain)


@pytest.mark.parametrize("family", EACH)
def test_zero_is_a_zeroed_down_projection_in_every_family_with_stacked_weights(family: str) -> None:
    module: Any = build_tiny(family)
    model = ms.load(module)
    s = model.anatomy.moe[0]
    experts = module.get_submodule(s.experts_path)
    down = [t for n, t in experts.named_parameters() if n.startswith("down") and len(t) == (s.n_experts or 0)]
    if not down or down[0].ndim != 3:
        pytest.skip("its experts' weights lie otherwise")
    ids = ids_of(model)
    with edited(model, e.Intervention([e.Ablate(layer=s.layer, experts=[0, 1, 2])])):
        ours = logits_of(model, ids)
    with torch.no_grad():
        for parameter in down:
            parameter[[0, 1, 2]] = 0
    torch.testing.assert_close(ours, logits_of(model, ids), atol=1e-5, rtol=1e-5)
