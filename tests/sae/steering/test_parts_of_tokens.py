"""Autoencoders of one head or expert give no number of a token to steer by; and what steers past all bounds."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import moescope as ms
import moescope.edits as e
from moescope.cli.sae.steer import steer
from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.loading import from_disk
from moescope.sae.steering.latent_edit import feature_set, mean_codes
from moescope.sae.steering.targets import LatentTarget
from moescope.sae.steering.text_vectors import text_vectors

TEXTS = ["def f(x): return x", "The rain fell on the hills."]
STREAM, HEADS, SLOTS = "blocks.3.hook_resid_post", "blocks.3.attn.hook_z", "blocks.3.mlp.experts.hook_out"


@pytest.fixture(scope="module")
def model() -> Any:
    return ms.load("demo")


@pytest.fixture(scope="module")
def weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`weights(width)`: a folder with an autoencoder of that many components."""

    def write(width: int) -> Path:
        from sae_lens import StandardSAE, StandardSAEConfig

        module, random = StandardSAE(StandardSAEConfig(d_in=width, d_sae=24)), torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) / width**0.5
        folder = tmp_path_factory.mktemp(f"weights-{uuid.uuid4()}")
        module.save_model(folder / "sae")
        return folder / "sae"

    return write


def of_part(autoencoder: Autoencoder, site: str, *, head: int | None = None, expert: int | None = None) -> Autoencoder:
    """The same weights, said to be of one head or expert."""
    row = {**autoencoder.row, "settings": {} if head is None else {"head": head}}
    return dataclasses.replace(autoencoder, site=Site.parse(site), expert=expert, row=row)


def test_a_head_s_or_an_expert_s_autoencoder_has_no_code_of_a_token(model: Any, weights: Callable[..., Path]) -> None:
    width = text_vectors(model, TEXTS[:1], [Site.parse(HEADS)])[Site.parse(HEADS)].shape[-1]
    of_heads = from_disk(weights(width), site=HEADS)
    assert mean_codes(of_heads, model, TEXTS).shape == (2, 24)
    assert LatentTarget(of_heads, 3).feature == 3
    # As wide as all heads side by side, so that no width gives it away.
    head = of_part(of_heads, HEADS, head=1)
    with pytest.raises(InputError, match="reads one head or expert alone"):
        mean_codes(head, model, TEXTS)
    with pytest.raises(InputError, match="reads one head or expert alone"):
        feature_set(head, model, TEXTS, TEXTS[::-1])
    stream = from_disk(weights(model.anatomy.d_model), site=STREAM)
    with pytest.raises(InputError, match="reads one head or expert alone"):
        mean_codes(of_part(stream, STREAM, expert=3), model, TEXTS)
    for part in (head, of_part(stream, SLOTS, expert=3), of_part(stream, SLOTS)):
        with pytest.raises(InputError, match="reads a part of a token's vectors"):
            LatentTarget(part, 3)


@pytest.mark.parametrize("text", ["12=*max", "12=*mean"])
def test_an_activation_is_no_factor(model: Any, weights: Callable[..., Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    with ms.Store(tmp_path / "runs.duckdb") as store:
        found = from_disk(weights(model.anatomy.d_model), site=STREAM, store=store, name="mine")
        store.connection.execute(
            "INSERT INTO features (sae_id, run_id, feature, active, mean, maximum) VALUES (?, ?, 12, 5, 1.0, 2.0)",
            [found.sae_id, str(uuid.uuid4())],
        )
    app = typer.Typer()
    app.command()(steer)
    where = ["demo", "--store", str(tmp_path / "runs.duckdb"), "--data", str(tmp_path / "texts.txt"), "--device", "cpu"]
    words = ["--sae", "mine", "--feature", text, "--target", "e", "--strengths", "1", "--controls", "2"]
    done = CliRunner().invoke(app, [*where, *words])
    assert isinstance(done.exception, InputError), done.output
    assert f"{text!r} scales by an activation" in str(done.exception)


def test_a_long_fast_descent_of_a_probe_ends_where_its_steps_lead(model: Any, weights: Callable[..., Path]) -> None:
    sae = from_disk(weights(model.anatomy.d_model), site=STREAM)
    pulls = [0.2, -0.1, 0.3]
    edit = e.Descend(layer=3, sae="s", weights=pulls, latents=[4, 1, 9], bias=-2.0, steps=2000, rate=1.5)
    site = Site.parse(STREAM)
    x = text_vectors(model, TEXTS, [site])[site]
    with model.edited(e.Intervention(edit), sources={"s": sae}):
        found = text_vectors(model, TEXTS, [site])[site]
    z = sae.encode(x)
    after, towards = z.double(), torch.tensor(pulls, dtype=torch.float64)
    for _ in range(2000):
        unsure = 1 - torch.sigmoid(after[:, [4, 1, 9]] @ towards - 2.0)
        after[:, [4, 1, 9]] = (after[:, [4, 1, 9]] + 1.5 * unsure[:, None] * towards).clamp(min=0)
    torch.testing.assert_close(found, x + (after.float() - z) @ sae.decoder, atol=2e-3, rtol=2e-3)
    assert (found - x).abs().max() > 0.1
