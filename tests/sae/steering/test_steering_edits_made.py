"""Steering found by contrast, latents, probes and descent: against plain means and hand-made tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.edits.checks import check_intervention
from moescope.sae.steering.contrast import best_layer, contrastive_labels, contrastive_mean
from moescope.sae.steering.descend import descend_to, descend_to_label
from moescope.sae.steering.latent_edit import feature_set, latent_edit
from moescope.sae.steering.probe_direction import probe_direction
from moescope.sae.steering.text_vectors import text_vectors
from moescope.store.sae_rows import write_rows

POSITIVE = ["def f(x): return x", "import os, sys", "for i in range(3): pass", "print(x[0])", "class A: pass"]
NEGATIVE = [
    "The rain fell on the hills.",
    "She was very tired.",
    "A king lived far away.",
    "They ate bread.",
    "It was.",
]
SITE = Site(2, "", "hook_resid_post")
SAE_ID = "00000000-0000-0000-0000-00000000000a"


class Planted:
    """Signed pairs of latents along fixed directions."""

    def __init__(self, width: int, site: Site = SITE) -> None:
        self.site, self.target_site, self.name, self.sae_id = site, None, "planted", SAE_ID
        rows = torch.linalg.qr(torch.randn(width, 6, generator=torch.Generator().manual_seed(0)))[0].T
        self.decoder = torch.cat([rows, -rows])
        self.d_in, self.d_sae, self.expert, self.device = width, 12, None, torch.device("cpu")
        self.row: dict[str, Any] = {}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.decoder.T).relu()

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return activations @ self.decoder


@pytest.fixture(scope="module")
def model() -> Any:
    return ms.load("demo")


@pytest.fixture(scope="module")
def sae(model: Any) -> Any:
    return Planted(model.anatomy.d_model)


def by_hand(model: Any, texts: list[str], *, last: bool = True) -> torch.Tensor:
    """One text at a time, the stream after block 2 by a plain hook."""
    found = []
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        seen: list[torch.Tensor] = []
        handle = model.module.model.layers[2].register_forward_hook(
            lambda _m, _i, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model.module(input_ids=ids)
        handle.remove()
        found.append(seen[0][0, -1] if last else seen[0][0, 1:].mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("at", ["last", "mean"])
def test_the_difference_of_means_is_that_of_plain_passes(model: Any, at: Any) -> None:
    found = contrastive_mean(model, POSITIVE, NEGATIVE, layer=2, at=at)
    wanted = by_hand(model, POSITIVE, last=at == "last").mean(0) - by_hand(model, NEGATIVE, last=at == "last").mean(0)
    edit: Any = found.intervention.edits[0]
    torch.testing.assert_close(torch.tensor(edit.vector).float(), wanted, atol=1e-4, rtol=1e-4)
    assert found.provenance["norm"] == pytest.approx(float(wanted.norm()), rel=1e-4)
    check_intervention(model, found.intervention)


def test_long_texts_in_parts_end_where_their_last_part_ends(model: Any) -> None:
    text = " ".join(NEGATIVE * 3)
    whole = text_vectors(model, [text, "Hi there."], [SITE], at="last", max_length=512)[SITE]
    parts = text_vectors(model, [text, "Hi there."], [SITE], at="last", max_length=16)[SITE]
    torch.testing.assert_close(whole[1], parts[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole[0], torch.zeros_like(whole[0]))
    assert not torch.allclose(parts[0], torch.zeros_like(parts[0]))


def test_the_best_layer_tells_held_out_texts_apart_and_mixed_ones_are_at_chance(model: Any) -> None:
    found = best_layer(model, POSITIVE * 2, NEGATIVE * 2, layers=[0, 2, 5], at="mean")
    assert found.auc[found.layer] == max(found.auc.values()) > 0.9
    same = best_layer(model, NEGATIVE, list(NEGATIVE), layers=[2], at="mean")
    assert same.auc[2] <= 0.5, "two equal sides cannot be told apart"
    with pytest.raises(InputError, match="4 texts a side"):
        best_layer(model, POSITIVE[:2], NEGATIVE)


def test_contrasts_without_texts_or_difference_are_refused(model: Any) -> None:
    for sides in (([], NEGATIVE), (POSITIVE, "one text")):
        with pytest.raises(InputError, match="needs texts"):
            contrastive_mean(model, *sides, layer=2)  # type: ignore[arg-type]  # refused
    with pytest.raises(InputError, match="same mean"):
        contrastive_mean(model, POSITIVE, POSITIVE, layer=2)
    with pytest.raises(InputError, match="norm"):
        contrastive_mean(model, POSITIVE, NEGATIVE, layer=2, norm=0)


@pytest.fixture(scope="module")
def recorded(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = [{"text": t, "label": "code"} for t in POSITIVE] + [{"text": t, "label": "prose"} for t in NEGATIVE]
    with ms.Store(tmp_path_factory.mktemp("steering") / "runs.duckdb") as store:
        yield ms.record(
            model, texts, store, name="base", probes=("tokens", "activations"), sites=[str(SITE)], progress=False
        )


def test_recorded_vectors_of_labels_give_the_same_contrast(model: Any, sae: Any, recorded: Any) -> None:
    found: Any = contrastive_labels(recorded, "code", site=str(SITE)).intervention.edits[0]
    wanted = by_hand(model, POSITIVE, last=False).mean(0) - by_hand(model, NEGATIVE, last=False).mean(0)
    torch.testing.assert_close(torch.tensor(found.vector).float(), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="no document of label 'verse'"):
        contrastive_labels(recorded, "verse", site=str(SITE))
    towards: Any = descend_to_label(sae, recorded, "code", steps=3, rate=0.1).intervention.edits[0]
    code = sae.encode(by_hand(model, POSITIVE, last=False)).mean(0)
    np.testing.assert_allclose(towards.target, code.numpy(), atol=1e-4)


def test_a_descent_goes_towards_the_mean_code_of_its_texts(model: Any, sae: Any) -> None:
    found = descend_to(sae, model, POSITIVE, steps=200, rate=0.2, replace=True)
    edit: Any = found.intervention.edits[0]
    code = sae.encode(by_hand(model, POSITIVE)).mean(0)
    np.testing.assert_allclose(edit.target, code.numpy(), atol=1e-4)
    with model.edited(found.intervention, sources={"planted": sae}):
        after = text_vectors(model, NEGATIVE, [SITE])[SITE]
    torch.testing.assert_close(after, sae.decode(code).expand_as(after), atol=1e-3, rtol=1e-3)


def test_a_feature_set_is_what_differs_between_the_sides(model: Any, sae: Any) -> None:
    found = feature_set(sae, model, POSITIVE, NEGATIVE, top=3)
    edit: Any = found.intervention.edits[0]
    codes = [sae.encode(by_hand(model, texts)) for texts in (POSITIVE, NEGATIVE)]
    difference = codes[0].mean(0) - codes[1].mean(0)
    assert len(edit.ids) == 3
    np.testing.assert_allclose(edit.values, difference[list(edit.ids)].numpy(), atol=1e-4)
    assert edit.only_active
    scores = [
        (difference[i].abs() / (sum(c[:, i].var() / len(c) for c in codes) ** 0.5 + 1e-9)).item() for i in range(12)
    ]
    assert edit.ids[0] in np.argsort(scores)[-3:]
    with pytest.raises(InputError, match="two texts a side"):
        feature_set(sae, model, POSITIVE[:1], NEGATIVE)
    with pytest.raises(InputError, match="no latent differs"):
        feature_set(sae, model, POSITIVE, POSITIVE)


def features(store: Any, run: Any) -> None:
    rows = [
        {"sae_id": SAE_ID, "run_id": run.run_id, "feature": i, "active": i, "tokens": 100, "documents": 1,
         "mean": float(i) if i else None, "maximum": 10.0 * i, "decoder_norm": 1.0}
        for i in range(12)
    ]  # fmt: skip
    write_rows(store, {"features": rows}, over=[("features", {"sae_id": SAE_ID})])


def test_values_of_latents_come_from_their_features(sae: Any, recorded: Any) -> None:
    features(recorded.store, recorded)
    for value, multiple, wanted in (("max", 1.0, [40.0, 70.0]), ("mean", 0.5, [2.0, 3.5]), (3.0, 2.0, [6.0, 6.0])):
        edit: Any = latent_edit(sae, [4, 7], value=value, multiple=multiple, store=recorded.store).intervention.edits[0]  # type: ignore[arg-type]  # all three
        assert edit.values == pytest.approx(wanted)
        assert (edit.layer, edit.site, edit.sae) == (2, "hook_resid_post", "planted")
    with pytest.raises(InputError, match="no latent 12"):
        latent_edit(sae, 12, value=1.0)
    with pytest.raises(InputError, match=r"not known.*moescope sae read"):
        latent_edit(sae, 0, value="mean", store=recorded.store)
    with pytest.raises(InputError, match="not known"):
        latent_edit(sae, 3)


def test_a_probe_becomes_latents_or_neurons_in_proportion_to_its_weights(
    sae: Any, recorded: Any, tiny_model: Any
) -> None:
    store = recorded.store
    features(store, recorded)
    base = {"run_id": recorded.run_id, "concept": "code", "ranking": "mean_difference", "metric": "F1"}
    latents = base | {"sae_id": SAE_ID, "unit_kind": "latent", "site": str(SITE)}
    neurons = base | {"unit_kind": "neuron", "site": "blocks.1.mlp.hook_post"}
    rows = [
        latents | {"probe_id": SAE_ID[:-1] + "1", "k": 1, "units": [2], "coefficients": [1.0], "value": 0.6},
        latents | {"probe_id": SAE_ID[:-1] + "2", "k": 2, "units": [2, 5], "coefficients": [1.0, -2.0], "value": 0.8},
        neurons | {"probe_id": SAE_ID[:-1] + "3", "k": 2, "units": [3, 9], "coefficients": [3.0, -4.0], "value": 0.7},
    ]
    write_rows(store, {"sparse_probes": rows})
    best: Any = probe_direction(store, "code", sae=sae).intervention.edits[0]
    assert (best.ids, best.values) == ((2, 5), pytest.approx([2.0, -10.0]))
    one: Any = probe_direction(store, "code", sae=sae, k=1, norm=4.0).intervention.edits[0]
    assert (one.ids, one.values) == ((2,), pytest.approx([4.0]))
    llama = ms.load(tiny_model("llama"))
    edit: Any = probe_direction(store, "code", units="neuron", model=llama, norm=10.0).intervention.edits[0]
    assert (edit.vector[3], edit.vector[9], edit.site) == (pytest.approx(6.0), pytest.approx(-8.0), "mlp.hook_post")
    check_intervention(llama, ms.Intervention([edit]))
    with pytest.raises(InputError, match="no such sparse probe"):
        probe_direction(store, "verse", sae=sae)
    with pytest.raises(InputError, match="its autoencoder"):
        probe_direction(store, "code")


def test_steering_is_saved_as_an_intervention(model: Any, tmp_path: Path) -> None:
    found = contrastive_mean(model, POSITIVE[:1], NEGATIVE[:1], layer=1, norm=2.0, name="x")
    found.save(tmp_path / "steer.json")
    assert ms.Intervention.load(tmp_path / "steer.json") == found.intervention
