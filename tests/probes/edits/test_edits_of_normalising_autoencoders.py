"""Edits through autoencoders that bring every vector to one scale before they encode it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.core.sites import Site
from moescope.probes.taps import tapped

WIDTH, LATENTS = 32, 12
SITE = Site(1, "", "hook_resid_post")


@pytest.fixture
def llama(tiny_model: Callable[..., Any]) -> ms.LiveModel:
    return ms.load(tiny_model("llama"))


@pytest.fixture(params=["layer_norm", "constant_norm_rescale"])
def sae(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    from sae_lens import StandardSAE, StandardSAEConfig

    from moescope.sae.loading import from_disk

    module = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=LATENTS, normalize_activations=request.param))
    random = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    module.save_model(tmp_path / "sae")
    return from_disk(tmp_path / "sae", site=SITE)


@torch.no_grad()
def passed(live: ms.LiveModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What passes the site, its tokens of very different lengths, and the logits."""
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(5))
    seen: list[torch.Tensor] = []
    with tapped(live.module, live.anatomy, [SITE], lambda _, t: seen.append(next(iter(t.values())).clone())):
        logits = live.module(input_ids=ids, use_cache=False).logits
    return seen[0], logits


def scales(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """What one unit of the encoded vector stands for, a number a token."""
    if sae.module.cfg.normalize_activations == "layer_norm":
        return x.std(-1, keepdim=True)
    return x.norm(dim=-1, keepdim=True) / WIDTH**0.5


def code_after(edit: Any, z: torch.Tensor) -> torch.Tensor:
    """The code that an edit leaves, in plain loops over latents."""
    new = z.clone()
    if isinstance(edit, e.Descend):
        towards = torch.tensor(edit.numbers)
        for _ in range(edit.steps):
            if edit.weights is None:
                new = new - edit.rate * 2 * (new - towards)
            else:
                unsure = 1 - torch.sigmoid((new * towards).sum(-1, keepdim=True) + edit.bias)
                new = (new + edit.rate * unsure * towards).clamp(min=0)
        return new
    for latent, value in zip(edit.ids, edit.values, strict=True):
        own = z[..., latent]
        new[..., latent] = {"add": own + value, "set": torch.full_like(own, value), "scale": own * value}[edit.how]
    return new


TARGET = [0.3 * n for n in range(LATENTS)]
EDITS: list[Any] = [
    e.Latents(layer=1, sae="s", latents=range(LATENTS), how="scale", values=0.0),
    e.Latents(layer=1, sae="s", latents=[3, 0, 7], how="add", values=[2.0, -1.0, 0.5]),
    e.Latents(layer=1, sae="s", latents=[5, 6], how="set", values=[4.0, 0.0], strength=0.5),
    e.Descend(layer=1, sae="s", target=TARGET, steps=4, rate=0.1),
    e.Descend(layer=1, sae="s", target=TARGET, steps=4, rate=0.1, replace=True),
    e.Descend(layer=1, sae="s", weights=[n - 2.0 for n in TARGET], bias=-1.0, steps=5, rate=0.7),
]


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_what_changes_is_the_difference_of_what_two_codes_stand_for(llama: Any, sae: Any, edit: Any) -> None:
    x, plain = passed(llama)
    z = sae.encode(x)
    after = code_after(edit, z)
    with llama.edited(e.Intervention(edit), sources={"s": sae}):
        found, _ = passed(llama)
    moved = sae.decode(after, x) - (x if getattr(edit, "replace", False) else sae.decode(z, x))
    torch.testing.assert_close(found, x + edit.strength * moved, atol=1e-4, rtol=1e-4)
    if not getattr(edit, "replace", False):
        by_hand = edit.strength * scales(sae, x) * ((after - z) @ sae.module.W_dec)
        torch.testing.assert_close(found - x, by_hand, atol=1e-3, rtol=1e-3)
    assert (found - x).abs().max() > 1e-2
    with llama.edited(e.Intervention(edit).with_strength(0), sources={"s": sae}):
        assert torch.equal(passed(llama)[1], plain)


def test_a_reconstruction_has_the_scale_of_its_own_vector(llama: Any, sae: Any) -> None:
    x, plain = passed(llama)
    with llama.edited(e.Intervention(e.Splice(layer=1, sae="s")), sources={"s": sae}):
        found, _ = passed(llama)
    torch.testing.assert_close(found, sae.decode(sae.encode(x), x), atol=1e-4, rtol=1e-4)
    for still in (e.Splice(layer=1, sae="s", strength=0), e.Splice(layer=1, sae="s", keep_error=True)):
        with llama.edited(e.Intervention(still), sources={"s": sae}):
            assert torch.equal(passed(llama)[1], plain)


def test_a_latent_that_is_on_at_no_token_changes_no_bit_when_it_is_taken_out(llama: Any, sae: Any) -> None:
    x, _ = passed(llama)
    z = sae.encode(x)
    latent = int((z > 0).float().mean((0, 1)).sub(0.5).abs().argmin())
    edit = e.Latents(layer=1, sae="s", latents=[latent], how="scale", values=0.0)
    with llama.edited(e.Intervention(edit), sources={"s": sae}):
        found, _ = passed(llama)
    on = z[..., latent] > 0
    assert 0 < int(on.sum()) < on.numel()
    assert torch.equal((found != x).any(-1), on)
    without = z.clone()
    without[..., latent] = 0
    torch.testing.assert_close(found[on] - x[on], (sae.decode(without, x) - sae.decode(z, x))[on], atol=1e-4, rtol=1e-4)
