"""Needle trials, induction and recovered mass against plain transformers with eager attention and loops written to be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.phenomena.head_map import head_map
from moescope.probes.phenomena.head_roles import MASS, head_roles
from moescope.probes.phenomena.induction import ECHO, ECHO_MEAN, INDUCTION, INDUCTION_MEAN, PREVIOUS, induction_heads
from moescope.probes.phenomena.needle_prompts import NeedlePrompt
from moescope.probes.phenomena.needle_trials import run_trial
from moescope.probes.phenomena.repeated_tokens import repeated_tokens
from moescope.probes.phenomena.retrieval import GIVEN, retrieval_heads

FAMILIES = ("llama", "qwen3_moe", "deepseek_v3", "gpt2")


def eager_patterns(module: Any, ids: list[int]) -> np.ndarray:
    """[layer · head, query, key] from the model's own eager attention."""
    import torch

    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.no_grad():
        found = module(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    module.set_attn_implementation(before)
    return np.concatenate([layer[0].double().numpy() for layer in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_trials_are_scored_as_a_loop_over_whole_passes_scores_them(tiny_model: Callable[..., Any], family: str) -> None:
    """No cache at all here: after each token the whole sequence runs anew, and the last query's row is looked at."""
    import torch

    module = tiny_model(family)
    model = ms.load(module)
    ids = np.random.default_rng(5).integers(2, 12, 40).tolist()
    span = (6, 30)  # long, so that some of the few ids are met
    trial = run_trial(model, NeedlePrompt(tuple(ids), span), head_map(model), steps=12)
    heads = head_map(model).total
    for told, credits_found in ((None, trial.free), (ids[span[0] : span[1]], trial.given)):
        sequence, score, places = list(ids), np.zeros(heads), [set() for _ in range(heads)]
        for step in range(12 if told is None else len(told)):
            rows = eager_patterns(module, sequence)[:, -1]
            with torch.no_grad():
                logits = module(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1]
            written = int(logits.argmax()) if told is None else told[step]
            for head in range(heads):
                looked = int(rows[head].argmax())
                if span[0] <= looked < span[1] and sequence[looked] == written:
                    score[head] += 1 / (span[1] - span[0])
                    places[head].add(looked)
            sequence.append(written)
            if told is None and written == getattr(module.config, "eos_token_id", None):
                break
        assert credits_found is not None
        assert credits_found.score == pytest.approx(score)
        assert credits_found.once == pytest.approx([len(p) / (span[1] - span[0]) for p in places])
        if told is not None:
            assert score.max() > 0, "a comparison of zeros would show nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_induction_and_echo_are_those_of_eager_attention(tiny_model: Callable[..., Any], family: str) -> None:
    module = tiny_model(family)
    model = ms.load(module)
    n, repeats = 9, 4
    found = induction_heads(model, segment=n, repeats=repeats, draws=2, seed=3)
    expected: dict[str, list[np.ndarray]] = {
        name: [] for name in (INDUCTION, ECHO, PREVIOUS, INDUCTION_MEAN, ECHO_MEAN)
    }
    for ids in repeated_tokens(model, segment=n, repeats=repeats, draws=2, seed=3):
        a = eager_patterns(module, ids)
        sums = {name: [] for name in expected}
        for i in range(n, n * repeats):
            copies = [i - c * n for c in range(1, i // n + 1)]
            sums[INDUCTION].append(sum(a[:, i, k + 1] for k in copies))
            sums[ECHO].append(sum(a[:, i, k] for k in copies))
            sums[PREVIOUS].append(a[:, i, i - 1])
            sums[INDUCTION_MEAN] += [a[:, i, k + 1] for k in copies]
            sums[ECHO_MEAN] += [a[:, i, k] for k in copies]
        for name, values in sums.items():
            expected[name].append(np.mean(values, axis=0))
    for name, values in expected.items():
        assert found.value(name) == pytest.approx(np.mean(values, axis=0), abs=1e-5), name


def test_long_sequences_in_slices_give_the_same(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ms.load(tiny_model("llama"))
    whole = induction_heads(model, segment=12, repeats=4, draws=2)
    roles = head_roles(model, ms.Corpus.from_token_ids([list(range(2, 50))]))
    monkeypatch.setattr("moescope.probes.attention_slices.SLICE_BYTES_CPU", 4 * 4 * 48 * 5)  # five queries
    sliced = induction_heads(model, segment=12, repeats=4, draws=2)
    again = head_roles(model, ms.Corpus.from_token_ids([list(range(2, 50))]))
    for one, other in ((whole, sliced), (roles, again)):
        for name in one.metrics:
            assert one.value(name) == pytest.approx(other.value(name), abs=1e-6), name


def test_recovered_mass_is_that_of_eager_attention(tiny_model: Callable[..., Any]) -> None:
    """Without a tokenizer only the first token is special, and nothing is punctuation."""
    module = tiny_model("llama")
    ids = np.random.default_rng(1).integers(2, 90, 20).tolist()
    found = head_roles(ms.load(module), ms.Corpus.from_token_ids([ids]), frequent=0.2, local=0.15)
    a = eager_patterns(module, ids)
    for head in range(len(a)):
        often = set(np.argsort(-a[head].sum(0))[: math.ceil(0.2 * 20)].tolist())
        mass = {"special": [], "+ frequent": [], "+ local": []}
        for q in range(20):
            near = {k for k in range(20) if q - math.ceil(0.15 * 20) < k <= q}
            for name, keys in (("special", {0}), ("+ frequent", {0} | often), ("+ local", {0} | often | near)):
                mass[name].append(sum(a[head, q, k] for k in keys if k <= q))
        for name, values in mass.items():
            assert found.value(MASS + name)[head] == pytest.approx(np.mean(values), abs=1e-5)
    assert found.value(MASS + "+ punctuation") == pytest.approx(found.value(MASS + "special"))


def test_a_sliding_window_shorter_than_the_distance_is_said(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("mixtral", sliding_window=8))
    ids = np.random.default_rng(2).integers(2, 90, 30).tolist()
    trial = run_trial(model, NeedlePrompt(tuple(ids), (3, 9)), head_map(model), steps=3)
    assert trial.hidden_layers == (0, 1)
    assert trial.free is not None
    assert not trial.free.score.any()
    found = retrieval_heads(model, prompts=[NeedlePrompt(tuple(ids), (3, 9))], steps=3, progress=False)
    assert any("beyond the sliding window of 2 layers" in note for note in found.notes)
    near = run_trial(model, NeedlePrompt(tuple(ids), (23, 29)), head_map(model), steps=3)
    assert near.hidden_layers == ()
    notes = induction_heads(model, segment=12, repeats=2, draws=1).notes
    assert any("shorter than the segment" in note for note in notes)


def test_a_window_moves_top_keys_to_their_places_in_the_sequence(tiny_model: Callable[..., Any]) -> None:
    """The cache keeps the last keys only: places are counted from the sequence's beginning all the same."""
    module = tiny_model("mixtral", sliding_window=8)
    model = ms.load(module)
    ids = np.random.default_rng(2).integers(2, 8, 30).tolist()
    trial = run_trial(model, NeedlePrompt(tuple(ids), (22, 29)), head_map(model), steps=1)
    rows = eager_patterns(module, ids)[:, -1]
    told = [int(row.argmax()) for row in rows]
    assert trial.given is not None
    first = [22 <= k < 29 and ids[k] == ids[22] for k in told]
    assert (trial.given.score >= np.array(first) / 7 - 1e-9).all()
    assert trial.given.score.max() > 0


def test_models_without_attention_or_a_cache_are_refused(tiny_model: Callable[..., Any]) -> None:
    import transformers

    ssm = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    for protocol in (induction_heads, head_roles, retrieval_heads):
        with pytest.raises(InputError, match="attention"):
            protocol(ms.load(ssm))
    model = ms.load(tiny_model("llama"))
    with pytest.raises(InputError, match="no tokenizer"):
        retrieval_heads(model)
    with pytest.raises(InputError, match="do not fit"):
        retrieval_heads(model, prompts=[NeedlePrompt(tuple(range(2, 62)), (3, 9))], progress=False)
    with pytest.raises(InputError, match="inside its prompt"):
        NeedlePrompt((1, 2, 3), (2, 5))
    with pytest.raises(InputError, match="do not fit into this model's context"):
        induction_heads(model, segment=60)
    with pytest.raises(InputError, match="segment cannot be 2"):
        induction_heads(model, segment=2)
    with pytest.raises(InputError, match="sets of keys"):
        head_roles(model, local=0)


@pytest.mark.slow
def test_heads_of_every_family_are_read_or_refused_with_the_reason() -> None:
    from moescope.probes.families.tiny import build_tiny, moe_model_types

    ids = np.random.default_rng(0).integers(2, 30, 24).tolist()
    for name in moe_model_types():
        try:
            model = ms.load(build_tiny(name))
        except InputError:
            continue
        scores = induction_heads(model, segment=6, repeats=3, draws=1)
        assert np.isfinite(scores.value(INDUCTION)).all(), name
        assert 0 < scores.value(INDUCTION).max() <= 1.0001, name
        trials = retrieval_heads(model, prompts=[NeedlePrompt(tuple(ids), (4, 12))], steps=3, progress=False)
        assert np.isfinite(trials.value(GIVEN)).all(), name
        attentions = [s for s in model.anatomy.sublayers if s.kind in ("attention", "ssm") and s.stack == "decoder"]
        assert len(scores.heads.places) + len(scores.heads.refused) == len(attentions), name
