"""Reading on real models: live and recorded vectors agree, logit effects are those of plain torch, commands work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.sae.reading.read import read_features

SITE = "blocks.0.hook_resid_post"


@pytest.fixture
def module(tiny_model: Any) -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def sequences(token_ids: Any) -> Any:
    return token_ids([30, 24, 40, 7, 33, 12])


def _counts(store: Any) -> list[Any]:
    found: list[Any] = store.fetch("SELECT feature, active, documents, mean, maximum FROM features ORDER BY 1")
    return found


def test_live_and_recorded_vectors_give_what_plain_passes_give(
    module: Any, sequences: Any, record_ids: Any, store: Any, components: Any, plain_passes: Any
) -> None:
    import moescope as ms

    run = record_ids(module, sequences, probes=("tokens", "activations"), sites=[SITE], labels=list("abcabc"))
    bare = record_ids(module, sequences, name="bare", probes=("tokens",), labels=list("abcabc"))
    autoencoder = components(32, SITE)
    read_features(autoencoder, run, store, progress=False)
    recorded = _counts(store)
    plain = np.concatenate([b.resid[0][b.mask].numpy() for b in plain_passes(module, sequences)])
    for feature, active, _, mean, maximum in recorded:
        over = plain[:, feature][plain[:, feature] > 0]
        assert active == len(over)
        assert mean == pytest.approx(over.mean(), rel=1e-4)
        assert maximum == pytest.approx(over.max(), rel=1e-5)
    outcome = read_features(autoencoder, bare, store, model=ms.load(module), progress=False)
    assert any("while the model ran" in note for note in outcome.notes)
    store.connection.execute("DELETE FROM features WHERE run_id = ?", [run.run_id])
    for live, of_shards in zip(_counts(store), recorded, strict=True):
        assert live[:3] == of_shards[:3]
        assert live[3:] == pytest.approx(of_shards[3:], rel=1e-4)
    with pytest.raises(InputError, match="kept no vectors"):
        read_features(autoencoder, bare, store, progress=False)


def test_live_slots_of_experts_give_what_recorded_ones_give(
    module: Any, sequences: Any, record_ids: Any, store: Any, components: Any
) -> None:
    import moescope as ms

    site = "blocks.1.mlp.experts.hook_out"
    run = record_ids(module, sequences, probes=("tokens", "activations"), sites=[site])
    bare = record_ids(module, sequences, name="bare", probes=("tokens",))
    for expert in (None, 3):
        autoencoder = components(32, site, expert=expert)
        kept = read_features(autoencoder, run, store, progress=False)
        found = _counts(store)
        live = read_features(autoencoder, bare, store, model=ms.load(module), progress=False)
        store.connection.execute("DELETE FROM features WHERE run_id = ?", [run.run_id])
        assert live.tokens == kept.tokens
        assert [row[:3] for row in _counts(store)] == [row[:3] for row in found]
        store.connection.execute("DELETE FROM features")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logit_effects_are_decoder_times_norm_times_unembedding(
    family: str, tiny_model: Any, sequences: Any, record_ids: Any, store: Any, components: Any
) -> None:
    import torch

    import moescope as ms

    module = tiny_model(family)
    run = record_ids(module, sequences, probes=("tokens", "activations"), sites=[SITE])
    decoder = torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
    outcome = read_features(
        components(32, SITE, decoder=decoder), run, store, model=ms.load(module), progress=False, logits=4
    )
    norm = module.model.norm if family == "llama" else module.transformer.ln_f
    seen: list[Any] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for ids in sequences:
            module(input_ids=torch.tensor([ids]))
    handle.remove()
    stream = torch.cat([x[1:] for x in seen])  # first tokens are left out
    if family == "llama":
        scale = (stream.square().mean(-1) + norm.variance_epsilon).rsqrt().mean()
        rows = decoder.double() * norm.weight.double()
    else:
        scale = (stream.var(-1, unbiased=False) + norm.eps).rsqrt().mean()
        rows = (decoder.double() - decoder.double().mean(-1, keepdim=True)) * norm.weight.double()
    effects = scale * rows @ module.get_output_embeddings().weight.double().T
    effects = (effects - effects.mean(-1, keepdim=True)).detach().numpy()
    for feature, raised_ids, raised, lowered_ids, lowered in store.fetch(
        "SELECT feature, raised_ids, raised, lowered_ids, lowered FROM features"
    ):
        order = np.argsort(effects[feature])
        assert raised_ids == order[::-1][:4].tolist()
        assert lowered_ids == order[:4].tolist()
        assert raised == pytest.approx(effects[feature][raised_ids], rel=1e-4)
        assert lowered == pytest.approx(effects[feature][lowered_ids], rel=1e-4)
    assert any("direct path" in note for note in outcome.notes)


def test_away_from_the_stream_there_are_no_logit_effects_and_the_reason(
    module: Any, sequences: Any, record_ids: Any, store: Any, components: Any
) -> None:
    import moescope as ms

    site = "blocks.1.attn.hook_z"
    run = record_ids(module, sequences, probes=("tokens", "activations"), sites=[site])
    outcome = read_features(components(32, site), run, store, model=ms.load(module), progress=False)
    assert any("is not added to the residual stream" in note for note in outcome.notes)
    assert store.fetch("SELECT count(raised_ids) FROM features") == [(0,)]


def test_words_that_only_logits_name_get_into_the_vocabulary(demo_model: Any, store: Any, components: Any) -> None:
    import moescope as ms

    site = "blocks.5.hook_mlp_out"
    texts = ["def add(a, b):\n    return a + b\n", "Am Anfang schuf Gott Himmel und Erde."]
    run = ms.record(
        demo_model, texts, store, name="r", probes=("tokens", "activations"), sites=[site], progress=False
    )  # fmt: skip
    read_features(components(demo_model.anatomy.d_model, site), run, store, model=demo_model, progress=False)
    missing = """
        SELECT count(*)
        FROM (SELECT DISTINCT unnest(raised_ids || lowered_ids) AS token_id FROM features)
        WHERE token_id NOT IN (SELECT token_id FROM vocabulary)
    """
    assert store.fetch(missing) == [(0,)]
    assert store.fetch("SELECT count(*) = count(DISTINCT token_id) FROM vocabulary") == [(True,)]
    shown = ms.analyze(run, "feature", feature=3).df()
    assert len(shown[shown["part"] == "raised"]) == 15


def test_commands_read_and_show_features(demo_model: Any, tmp_path: Any) -> None:
    import json

    import torch
    import typer
    from sae_lens import TopKSAE, TopKSAEConfig
    from typer.testing import CliRunner

    import moescope as ms
    from moescope.cli.sae.features import features
    from moescope.cli.sae.read import read
    from moescope.sae.loading import from_disk

    site, width = "blocks.2.hook_resid_post", demo_model.anatomy.d_model
    module = TopKSAE(TopKSAEConfig(d_in=width, d_sae=32, k=4))
    with torch.no_grad():
        module.W_dec.copy_(torch.randn(32, width, generator=torch.Generator().manual_seed(0)))
        module.W_enc.copy_(module.W_dec.T)
    module.save_model(tmp_path / "sae")
    path = tmp_path / "runs.duckdb"
    with ms.Store(path) as store:
        ms.record(
            demo_model, ["One text of some words.", "And another one, of others."], store, name="r",
            probes=("tokens", "activations"), sites=[site], progress=False,
        )  # fmt: skip
        from_disk(tmp_path / "sae", site=site, store=store, name="mine", model=demo_model)
    app = typer.Typer()
    app.command()(read)
    app.command()(features)
    run = CliRunner()
    told = run.invoke(app, ["read", "--store", str(path), "--sae", "mine", "--model", "demo", "--json"])
    assert told.exit_code == 0, told.output
    outcome = json.loads(told.stdout)
    assert outcome["features"] + outcome["dead"] == 32
    assert outcome["rows"]["features"] == 32
    listed = json.loads(
        run.invoke(app, ["features", "--store", str(path), "--top", "5", "--sort", "density", "--json"]).stdout
    )
    assert len(listed["table"]) == 5
    most = listed["table"][0]["feature"]
    card = run.invoke(app, ["features", "--store", str(path), "--sae", "mine", "--feature", str(most)])
    assert card.exit_code == 0
    assert f"Latent {most} fires on" in card.stdout
    assert "⟦" in card.stdout
    assert "raises" in card.stdout
    assert "latents" in run.invoke(app, ["features", "--store", str(path)]).stdout
