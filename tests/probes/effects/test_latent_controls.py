"""Controls of latents: others of like frequency that write as long a vector; frequencies counted against plain passes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.core.sites import Site
from moescope.probes.batches import BatchPlan
from moescope.probes.effects.controls import controls_for
from moescope.probes.effects.latent_rates import latent_rates
from moescope.probes.effects.measure import measure_effect
from moescope.store.sae_rows import write_rows

LATENTS = 40
SAE_ID = "00000000-0000-0000-0000-0000000000cc"


class Planted:
    """ReLU latents with decoder rows of very different lengths."""

    def __init__(self, width: int = 32, site: Site | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.site, self.sae_id, self.d_in = site or Site(1, "", "hook_resid_post"), None, width
        self.decoder = torch.randn(LATENTS, width, generator=generator) * torch.linspace(0.2, 4, LATENTS)[:, None]
        self.encoder = torch.randn(width, LATENTS, generator=generator)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.encoder - 0.3).relu()

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return activations @ self.decoder


@pytest.fixture
def llama(tiny_model: Any) -> Any:
    return ms.load(tiny_model("llama"))


@pytest.mark.parametrize("how", ["add", "set", "scale"])
def test_controls_are_other_latents_of_like_frequency_and_length(llama: Any, how: Any) -> None:
    sae, named = Planted(), (3, 17)
    rates = np.geomspace(1e-4, 0.9, LATENTS)
    edit = e.Latents(layer=1, sae="s", latents=named, how=how, values=[2.0, -1.0])
    found = controls_for(e.Intervention(edit), llama, draws=4, seed=1, sources={"s": sae}, rates={"s": rates})
    norms = sae.decoder.norm(dim=-1).numpy()
    drawn = set()
    for control in found.interventions:
        (made,) = control.edits
        assert isinstance(made, e.Latents)
        assert not set(made.ids) & set(named)
        assert len(set(made.ids)) == 2
        drawn.add(made.ids)
        for ours, theirs, value, given in zip(named, made.ids, made.values, (2.0, -1.0), strict=True):  # type: ignore[arg-type]  # a tuple once made
            assert abs(ours - theirs) <= 7, "one of the six nearest in rate"
            wanted = given if how == "scale" else given * norms[ours] / norms[theirs]
            assert value == pytest.approx(wanted, rel=1e-5)
    assert len(drawn) == 4
    again = controls_for(e.Intervention(edit), llama, draws=4, seed=1, sources={"s": sae}, rates={"s": rates})
    assert again.interventions == found.interventions


def test_without_rates_it_is_said_and_poor_matches_too(llama: Any) -> None:
    cut = e.Intervention(e.Latents(layer=1, sae="s", latents=[3], values=1))
    found = controls_for(cut, llama, draws=2, sources={"s": Planted()})
    assert "without matching" in " ".join(found.notes)
    rates = np.full(LATENTS, 1e-5)
    rates[3] = 0.5
    found = controls_for(cut, llama, draws=2, sources={"s": Planted()}, rates={"s": rates})
    assert "times as often" in " ".join(found.notes)


def test_too_many_latents_leave_no_controls(llama: Any) -> None:
    cut = e.Intervention(e.Latents(layer=1, sae="s", latents=range(25), values=1))
    found = controls_for(cut, llama, draws=2, sources={"s": Planted()})
    assert not found.interventions
    assert "No controls" in found.notes[0]


def test_descents_go_to_the_same_numbers_elsewhere_and_splices_have_no_control(llama: Any) -> None:
    target = [float(n) for n in range(LATENTS)]
    whole = e.Intervention(e.Descend(layer=1, sae="s", target=target))
    some = e.Intervention(e.Descend(layer=1, sae="s", latents=[3, 9], weights=[1.0, -1.0]))
    for cut in (whole, some):
        found = controls_for(cut, llama, draws=2, sources={"s": Planted()})
        assert len(found.interventions) == 2
        for control in found.interventions:
            (made,) = control.edits
            assert isinstance(made, e.Descend)
            assert made != cut.edits[0]
            assert sorted(made.numbers) == sorted(cut.edits[0].numbers)  # type: ignore[attr-defined]  # descents
    found = controls_for(e.Intervention(e.Splice(layer=1, sae="s")), llama, draws=2, sources={"s": Planted()})
    assert "no matched random counterpart of splice" in found.notes[0]


@pytest.fixture
def counted(llama: Any, tmp_path: Path) -> Any:
    lengths = (9, 4, 7)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths]
    with ms.Store(tmp_path / "runs.duckdb") as store:
        yield SimpleNamespace(model=llama, store=store, ids=ids, corpus=ms.Corpus.from_token_ids(ids))


@pytest.mark.parametrize(
    "site", [Site(1, "", "hook_resid_post"), Site(0, "attn", "hook_z"), Site(1, "", "hook_mlp_out")]
)
def test_rates_are_shares_of_the_real_tokens(counted: Any, site: Site) -> None:
    sae = Planted(site=site)
    plan = BatchPlan(counted.corpus, None, 2, 64, 97)
    rates = latent_rates(counted.model, plan, counted.store, {"s": sae})["s"]
    active, tokens = torch.zeros(LATENTS), 0
    for ids in counted.ids:
        for vector in by_hand(counted.model.module, site, ids):
            active += sae.encode(vector) > 0
            tokens += 1
    np.testing.assert_allclose(rates, (active / tokens).numpy(), atol=1e-9)
    assert 0 < rates.mean() < 1


def by_hand(module: Any, site: Site, ids: list[int]) -> torch.Tensor:
    block = module.model.layers[site.layer]
    seen: list[torch.Tensor] = []
    if site.tensor == "hook_z":
        handle = block.self_attn.o_proj.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    else:
        owner = block.mlp if site.tensor == "hook_mlp_out" else block
        handle = owner.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        module(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def test_rates_of_a_read_autoencoder_come_from_its_features(counted: Any) -> None:
    run = ms.record(counted.model, counted.corpus, counted.store, name="base", probes=("tokens",), progress=False)
    rows = [{"sae_id": SAE_ID, "run_id": run.run_id, "feature": i, "active": i, "tokens": 50} for i in range(LATENTS)]
    write_rows(counted.store, {"features": rows})
    sae = Planted()
    sae.sae_id = SAE_ID  # type: ignore[assignment]  # None before
    rates = latent_rates(counted.model, [], counted.store, {"s": sae})["s"]
    assert rates.tolist() == [i / 50 for i in range(LATENTS)]


def test_an_effect_of_latents_stands_beside_its_controls(counted: Any) -> None:
    cut = e.Intervention(e.Latents(layer=1, sae="s", latents=[30], values=1.0), name="thirty")
    found = measure_effect(
        counted.model, counted.corpus, cut, counted.store, controls=3, sources={"s": Planted()}, progress=False
    )
    assert len(found.controls) == 3
    query = "SELECT kind, count(*), min(value) FROM effects WHERE metric = 'kl' AND group_kind = 'all' GROUP BY kind ORDER BY kind"
    rows = counted.store.fetch(query)
    assert [(kind, n) for kind, n, _ in rows] == [("control", 3), ("target", 1)]
    assert all(least > 0 for _, _, least in rows)
