"""`judge` on a tiny model: against plain forward passes with hooks of the test's own, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import Site
from moescope.edits import Splice
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.split import held_out
from moescope.sae.judging.ablation import ablated, changes_of_logits
from moescope.sae.judging.controls import Zero
from moescope.sae.judging.judge import JudgeOutcome, judge
from moescope.sae.judging.rows import METRICS
from moescope.sae.judging.run_tokens import batches_of, run_tokens
from moescope.sae.judging.splicing import spliced, splicing_rows
from moescope.sae.judging.vectors import fitting, live_vectors, recorded_vectors
from moescope.sae.loading import from_disk
from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store

SITE, SLOTS = "blocks.0.hook_mlp_out", "blocks.0.mlp.experts.hook_out"
WIDTH = 32
DOCUMENTS = 60


@dataclasses.dataclass
class Ground:
    """A tiny model, a run of it with vectors at the site, and autoencoders planted in its store."""

    store: Store
    model: Any
    run: Run
    exact: Autoencoder
    poor: Autoencoder


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, token_ids: Any) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("judging")
    module = tiny_model("qwen3_moe")
    model = ms.load(module)
    sequences = token_ids([24, 17, 30] * (DOCUMENTS // 3))
    corpus = ms.Corpus.from_token_ids(sequences, labels=["a", "b"] * (DOCUMENTS // 2))
    with Store(folder / "runs.duckdb") as store:
        run = ms.record(
            model, corpus, store, name="base", probes=("tokens", "activations"), sites=[SITE, SLOTS], progress=False
        )
        yield Ground(
            store, model, run, planted(store, model, folder, "exact"), planted(store, model, folder, "poor", k=4)
        )


def planted(store: Store, model: Any, folder: Path, name: str, *, k: int = WIDTH, width: int = WIDTH) -> Autoencoder:
    """A TopK autoencoder with a latent for each component and sign: without error where it may use them all."""
    from sae_lens import TopKSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE

    module = TopKSAE(TopKSAEConfig(d_in=width, d_sae=2 * width, k=k))
    rows = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        module.W_enc.copy_(rows.T)
        module.W_dec.copy_(rows)
        module.b_enc.zero_()
        module.b_dec.zero_()
    module.save_model(folder / name)
    return from_disk(folder / name, site=SITE, store=store, name=name, model=model if width == WIDTH else None)


def of_plain_passes(ground: Ground, change: Callable[[torch.Tensor], torch.Tensor], documents: set[int]) -> list[float]:
    """ΔNLL of every token predicted from position 1 on, with what the first MLP adds changed there by hand."""
    module, found = ground.model.module, []
    rows = ground.run.sql(
        "SELECT document_id, list(token_id ORDER BY token) FROM tokens JOIN sequences USING (run_id, sequence_id) "
        "WHERE run_id = $run GROUP BY sequence_id, document_id ORDER BY sequence_id"
    ).fetchall()

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = first.clone()
        new[:, 1:] = change(first[:, 1:])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    for document, ids in rows:
        if document not in documents:
            continue
        tokens = torch.tensor([ids])
        nll = []
        for hooked in (False, True):
            handle = module.model.layers[0].mlp.register_forward_hook(hook) if hooked else None
            with torch.no_grad():
                logits = module(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
            if handle is not None:
                handle.remove()
            nll.append(-logits[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0])
        found += (nll[1] - nll[0])[1:].tolist()
    return found


@pytest.fixture(scope="module")
def outcome(ground: Ground) -> JudgeOutcome:
    return judge(
        ground.poor,
        ground.model,
        ground.store,
        run=ground.run,
        ablations=4,
        controls=2,
        live_tokens=10_000,
        progress=False,
    )


def test_splicing_without_error_gives_the_same_logits(ground: Ground) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    edits = {
        "error kept": Splice(layer=0, site="hook_mlp_out", sae="x", keep_error=True),  # type: ignore[arg-type]  # a site
        "exact": Splice(layer=0, site="hook_mlp_out", sae="x"),  # type: ignore[arg-type]  # a site
    }
    with torch.no_grad():
        plain = ground.model.module(input_ids=ids).logits
    for edit in edits.values():
        with torch.no_grad(), ground.model.edited(Intervention([edit]), sources={"x": ground.exact}):
            assert torch.equal(ground.model.module(input_ids=ids).logits, plain)


def test_exact_autoencoder_loses_nothing(ground: Ground) -> None:
    found = judge(ground.exact, ground.model, ground.store, run="base", ablations=0, controls=1, progress=False)
    assert found.value("fvu") == pytest.approx(0, abs=1e-10)
    assert found.value("delta_ce") == 0
    assert found.value("kl") == 0
    assert found.value("flips") == 0
    assert found.value("loss_recovered_zero") == 1
    assert found.value("loss_recovered_mean") == 1


def test_losses_are_those_of_plain_passes(ground: Ground, outcome: JudgeOutcome) -> None:
    documents = {i for i in range(DOCUMENTS) if held_out([i])[0]}
    zero = of_plain_passes(ground, torch.zeros_like, documents)
    own = of_plain_passes(ground, lambda x: ground.poor.decode(ground.poor.encode(x)), documents)
    assert outcome.value("delta_ce", "zero") == pytest.approx(np.mean(zero), abs=1e-5)
    assert outcome.value("delta_ce") == pytest.approx(np.mean(own), abs=1e-5)
    expected = (np.mean(zero) - np.mean(own)) / np.mean(zero)
    assert outcome.value("loss_recovered_zero") == pytest.approx(expected, abs=1e-4)


def test_fvu_is_that_of_the_recorded_vectors_of_held_out_documents(ground: Ground, outcome: JudgeOutcome) -> None:
    from moescope.store.vectors import vector_shards

    vectors = np.concatenate([shard.float32() for shard in vector_shards(ground.run, SITE)]).astype(np.float64)
    facts = ground.run.sql(
        "SELECT position, document_id FROM tokens JOIN sequences USING (run_id, sequence_id) WHERE run_id = $run ORDER BY token"
    ).fetchnumpy()
    out, counts = held_out(facts["document_id"]), facts["position"] >= 1
    mean = vectors[~out & counts].mean(0)
    above = below = 0.0
    for x in vectors[out & counts]:
        again = np.where(np.abs(x) >= np.sort(np.abs(x))[-4], x, 0)  # the four largest components of either sign
        above += ((x - again) ** 2).sum()
        below += ((x - mean) ** 2).sum()
    assert outcome.value("fvu") == pytest.approx(above / below, rel=1e-5)
    assert outcome.value("l0") == 4


def test_measures_come_with_controls_and_intervals(outcome: JudgeOutcome) -> None:
    conditions = {"sae", "zero", "mean", "pca", "pca_topk", "random_decoder", "shuffled"}
    assert {row.condition for row in outcome.rows if row.metric == "fvu"} == conditions
    assert {row.condition for row in outcome.rows if row.metric == "delta_ce"} == conditions
    whole = [row for row in outcome.rows if row.group_value is None]
    assert all(row.ci_low is not None for row in whole if row.metric in ("fvu", "kl", "cosine", "probe_loss"))
    assert {row.group_value for row in outcome.rows if row.metric == "delta_ce"} == {None, "a", "b"}
    assert outcome.value("fvu", "pca_topk") < outcome.value("fvu", "random_decoder") < 1
    assert outcome.value("fvu", "mean") == pytest.approx(1, abs=1e-6)
    assert {row.metric for row in outcome.rows} <= set(METRICS)
    assert 0 < outcome.value("ablation_sparsity") < 1


def test_intervals_over_few_documents_are_called_narrow(outcome: JudgeOutcome, ground: Ground) -> None:
    assert sum(held_out([i])[0] for i in range(DOCUMENTS)) < 10
    assert (
        sum("narrower than they should be" in note for note in outcome.notes) == 2
    )  # of the vectors, and of the live model
    all_of_them = judge(ground.poor, None, ground.store, run=ground.run, controls=1, held_out=False, progress=False)
    assert not any("narrower" in note for note in all_of_them.notes)


def test_rows_are_stored_over_earlier_ones(ground: Ground, outcome: JudgeOutcome) -> None:
    kept = {
        "sae_id": ground.poor.sae_id,
        "run_id": ground.run.run_id,
        "metric": "families",
        "condition": "sae",
        "value": 3.0,
    }
    write_rows(ground.store, {"sae_measures": [kept]})  # of somebody else
    again = judge(
        ground.poor,
        ground.model,
        ground.store,
        run=ground.run,
        ablations=4,
        controls=2,
        live_tokens=10_000,
        progress=False,
    )
    assert again.rows == outcome.rows
    rows = ground.store.fetch("SELECT count(*) FROM sae_measures WHERE sae_id = ?", [ground.poor.sae_id])
    assert rows == [(len(outcome.rows) + 1,)]


def test_live_vectors_are_the_recorded_ones(ground: Ground) -> None:
    tokens = run_tokens(ground.run)
    eligible = (tokens.position >= 1) & (tokens.document < 9)
    recorded = recorded_vectors(ground.run, ground.poor, tokens, eligible, limit=10_000, seed=0)
    live = live_vectors(ground.model, ground.poor, batches_of(ground.run, tokens, np.arange(9)), tokens, eligible)
    assert np.array_equal(live.place, recorded.place)
    assert torch.allclose(live.x, recorded.x, atol=1e-5)


def test_run_without_vectors_is_judged_live(ground: Ground, outcome: JudgeOutcome) -> None:
    sequences = [
        ids
        for (ids,) in ground.run.sql(
            "SELECT list(token_id ORDER BY token) FROM tokens WHERE run_id = $run GROUP BY sequence_id ORDER BY sequence_id"
        ).fetchall()
    ]
    corpus = ms.Corpus.from_token_ids(sequences, labels=["a", "b"] * (DOCUMENTS // 2))
    found = judge(
        ground.poor, ground.model, ground.store, corpus=corpus, ablations=0, controls=1, live_tokens=64, progress=False
    )
    assert found.run.name != "base"
    assert found.value("fvu") == pytest.approx(outcome.value("fvu"), rel=1e-4)


def test_latent_taken_out_changes_logits_as_a_plain_hook_does(ground: Ground) -> None:
    tokens = run_tokens(ground.run)
    place = 5
    vector = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    found = changes_of_logits(ground.model, Site.parse(SITE), vector, tokens, place)
    ids = torch.from_numpy(tokens.token_id[: int((tokens.sequence == 0).sum())])[None, : place + 16]
    module = ground.model.module
    with torch.no_grad():
        plain = module(input_ids=ids, use_cache=False).logits
    for number in range(2):

        def hook(_module: Any, _inputs: Any, output: Any, number: int = number) -> Any:
            new = (output[0] if isinstance(output, tuple) else output).clone()
            new[:, place] += vector[number]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = module.model.layers[0].mlp.register_forward_hook(hook)
        with torch.no_grad():
            changed = module(input_ids=ids, use_cache=False).logits
        handle.remove()
        assert torch.allclose(found[number], (changed - plain)[0, place:], atol=1e-4)


def test_ablations_are_of_active_latents_and_have_a_control_each(ground: Ground) -> None:
    tokens = run_tokens(ground.run)
    eligible = np.isin(np.arange(len(tokens.token)), [3, 40])
    sequences = np.unique(tokens.sequence[eligible])
    vectors = live_vectors(ground.model, ground.poor, batches_of(ground.run, tokens, sequences), tokens, eligible)
    found = ablated(ground.model, ground.poor, vectors, tokens, seed=0)
    assert len(found.sparsity) == len(found.random) == 8  # four latents are active on each of two tokens
    assert set(found.document.tolist()) == set(tokens.document[eligible].tolist())


def test_control_that_costs_nothing_leaves_nothing_to_recover(ground: Ground) -> None:
    class Same(Zero):
        def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
            return x.float()

    tokens = run_tokens(ground.run)
    found = spliced(ground.model, ground.poor, [Same(WIDTH)], batches_of(ground.run, tokens, np.arange(3)), first=1)
    assert not [row for row in splicing_rows(found, seed=0) if row.metric.startswith("loss_recovered")]


def test_transcoder_is_judged_on_what_it_predicts(ground: Ground, tmp_path: Path) -> None:
    exact = dataclasses.replace(
        ground.exact, site=Site.parse("blocks.0.hook_resid_post"), target_site=Site.parse(SITE), name="across"
    )
    found = judge(exact, ground.model, ground.store, run=ground.run, ablations=2, controls=1, progress=False)
    tokens = run_tokens(ground.run)
    out, counts = held_out(tokens.document), tokens.position >= 1
    batches = list(batches_of(ground.run, tokens, np.arange(DOCUMENTS)))
    pairs, rest = (live_vectors(ground.model, exact, batches, tokens, counts & side) for side in (out, ~out))
    error = (pairs.x - pairs.y).double().square().sum()  # it predicts its own input
    about = (pairs.y.double() - rest.y.double().mean(0)).square().sum()
    assert found.value("fvu") == pytest.approx(float(error / about), rel=1e-4)
    assert {row.condition for row in found.rows if row.metric == "fvu"} == {"sae", "zero", "mean", "shuffled"}
    assert found.value("delta_ce") > found.value("delta_ce", "mean") / 10
    with ground.store.cursor() as cursor:
        cursor.execute("DELETE FROM sae_measures WHERE sae_id = ?", [exact.sae_id])


def stored(ground: Ground) -> int:
    return int(ground.store.fetch("SELECT count(*) FROM sae_measures")[0][0])


def test_autoencoder_of_experts_outputs_is_judged_slot_by_slot(ground: Ground, outcome: JudgeOutcome) -> None:
    """Without shared experts, every slot at zero is the whole sublayer at zero."""
    of_slots = dataclasses.replace(ground.poor, site=Site.parse(SLOTS), name="of slots")
    found = judge(of_slots, ground.model, ground.store, run=ground.run, controls=1, live_tokens=10_000, progress=False)
    assert found.value("delta_ce", "zero") == pytest.approx(outcome.value("delta_ce", "zero"), abs=1e-4)
    (fvu,) = [row for row in found.rows if (row.metric, row.condition) == ("fvu", "sae")]
    (before,) = [row for row in outcome.rows if (row.metric, row.condition) == ("fvu", "sae")]
    assert fvu.n == 2 * before.n  # two slots a token
    assert "ablation_sparsity" not in {row.metric for row in found.rows}
    tokens = run_tokens(ground.run)
    of_one = dataclasses.replace(of_slots, expert=3)
    one = live_vectors(ground.model, of_one, batches_of(ground.run, tokens, np.arange(6)), tokens, tokens.position >= 1)
    kept = recorded_vectors(
        ground.run, of_one, tokens, (tokens.position >= 1) & (tokens.sequence < 6), limit=10_000, seed=0
    )
    assert 0 < len(one) == len(kept)
    assert torch.allclose(one.x, kept.x, atol=1e-5)


def test_vectors_whose_norms_training_left_out_do_not_count(ground: Ground) -> None:
    settings = {"skip_first": 2, "held_out_share": 0.5}
    counts = []
    for ratio in (None, 1.0):
        row = {**ground.poor.row, "settings": {**settings, "max_norm_ratio": ratio}}
        strict = dataclasses.replace(ground.poor, row=row)
        found = judge(strict, None, ground.store, run=ground.run, controls=1, progress=False)
        counts.append(next(row.n for row in found.rows if row.metric == "fvu"))
        assert any("tokens before position 2 of their sequence" in note for note in found.notes)
        assert any("norms over 1 times the median" in note for note in found.notes) == (ratio is not None)
    assert 0.3 < counts[1] / counts[0] < 0.7


def test_judged_on_all_documents_says_what_that_favours(ground: Ground) -> None:
    found = judge(ground.exact, None, ground.store, run=ground.run, controls=1, held_out=False, progress=False)
    assert f"same {DOCUMENTS} documents, which favours" in found.notes[0]


def test_vectors_that_are_no_numbers_are_refused(ground: Ground) -> None:
    x = torch.zeros(5, WIDTH)
    x[2, 1] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity in 1 of 5"):
        fitting(x, WIDTH, ground.poor, ground.poor.site)


def test_what_cannot_be_judged_is_refused_and_nothing_is_stored(
    ground: Ground, tiny_model: Any, tmp_path: Path
) -> None:
    before = stored(ground)
    other = ms.load(tiny_model("olmoe"))
    with pytest.raises(InputError, match="is of another model"):
        judge(ground.poor, other, ground.store, run=ground.run, progress=False)
    of_it = dataclasses.replace(ground.poor, row={**ground.poor.row, "anatomy_digest": ground.model.anatomy.digest})
    with pytest.raises(InputError, match="belongs to another model"):
        judge(of_it, other, ground.store, run=ground.run, progress=False)
    wide = planted(ground.store, ground.model, tmp_path, "wide", width=WIDTH + 1)
    with pytest.raises(InputError, match="the width of"):
        judge(wide, ground.model, ground.store, run=ground.run, force=True, progress=False)
    with pytest.raises(InputError, match="does not fit"):
        judge(wide, None, ground.store, run=ground.run, force=True, progress=False)
    with pytest.raises(InputError, match="there are too few vectors"):
        judge(ground.poor, ground.model, ground.store, run=ground.run, tokens=50, progress=False)
    with pytest.raises(InputError, match="trained on no run"):
        judge(ground.poor, ground.model, ground.store, progress=False)
    unknown = dataclasses.replace(ground.poor, sae_id="00000000-0000-0000-0000-000000000001")
    with pytest.raises(InputError, match="is not in"):
        judge(unknown, ground.model, ground.store, run=ground.run, progress=False)
    with pytest.raises(InputError, match="1 or more"):
        judge(ground.poor, ground.model, ground.store, run=ground.run, controls=0, progress=False)
    assert stored(ground) == before


def test_reconstruction_that_is_no_number_is_told_and_not_stored(ground: Ground, tmp_path: Path) -> None:
    before = stored(ground)
    spoilt = planted(ground.store, ground.model, tmp_path, "spoilt")
    with torch.no_grad():
        spoilt.module.W_dec[3] = float("nan")
    with pytest.raises(InputError, match="are no numbers"):
        judge(spoilt, ground.model, ground.store, run=ground.run, progress=False)
    assert stored(ground) == before


def test_without_a_model_what_needs_one_is_left_out_and_said(ground: Ground) -> None:
    found = judge(ground.exact, None, ground.store, run=ground.run, controls=1, progress=False)
    assert not {"delta_ce", "ablation_sparsity"} & {row.metric for row in found.rows}
    assert any("No model was given" in note for note in found.notes)
