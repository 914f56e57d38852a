"""Vectors recorded in one run put into another, against the same made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.edit_kinds.stream import Add, Patch
from moescope.core.errors import RunError
from moescope.core.intervention import Intervention
from moescope.core.sites import Site
from moescope.probes.edits.now import Now
from moescope.probes.edits.session import edited
from moescope.probes.edits.step import Place
from moescope.probes.edits.steps.patch import PatchStep
from moescope.probes.taps import tapped
from moescope.store.vectors import vector_shards

RESID = "blocks.1.hook_resid_post"
LENGTHS = (5, 9, 7, 4)


@pytest.fixture
def live(tiny_model: Callable[..., Any]) -> ms.LiveModel:
    return ms.load(tiny_model("llama", num_hidden_layers=3))


@pytest.fixture
def texts(token_ids: Callable[..., list[list[int]]]) -> list[list[int]]:
    return token_ids(LENGTHS)


def recorded(live: Any, texts: list[list[int]], store: Any, name: str = "source", **options: Any) -> Any:
    corpus = ms.Corpus.from_token_ids(texts)
    asked = {"probes": ("tokens", "activations"), "sites": (RESID,), "batch_size": 3, "progress": False} | options
    return ms.record(live, corpus, store, name=name, **asked)


def batch(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in texts])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in texts])


@torch.no_grad()
def logits(live: Any, texts: list[list[int]]) -> torch.Tensor:
    ids, mask = batch(texts)
    found: torch.Tensor = live.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


def stream(live: Any, texts: list[list[int]]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with tapped(live.module, live.anatomy, [Site.parse(RESID)], lambda _, t: seen.append(t["resid"].clone())):
        logits(live, texts)
    return seen[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_models_own_vectors_change_nothing(
    tiny_model: Callable[..., Any], texts: list[list[int]], store: Any, dtype: str
) -> None:
    live = ms.load(tiny_model("llama", num_hidden_layers=3, dtype=dtype))
    run = recorded(live, texts, store, batch_size=4)
    with edited(live, Intervention([Patch(layer=1, run="source")]), sources={"source": run}) as session:
        session.begin([0, 1, 2, 3])
        found = logits(live, texts)
    assert torch.equal(found, logits(live, texts))


def test_another_models_vectors_by_sequence_and_position(
    live: Any, tiny_model: Callable[..., Any], texts: list[list[int]], store: Any
) -> None:
    other = ms.load(tiny_model("llama", num_hidden_layers=3, seed=7))
    run = recorded(other, texts, store)
    order = [2, 0, 3]
    asked = [texts[n] for n in order]
    with edited(live, Intervention([Patch(layer=1, run="source")]), sources={"source": run}) as session:
        session.begin(order)
        found, patched = logits(live, asked), stream(live, asked)
    for row, text in enumerate(asked):
        wanted = stream(other, [text])[0]
        torch.testing.assert_close(patched[row, : len(text)], wanted, atol=1e-5, rtol=1e-5)
        block = live.module.model.layers[1]
        plain = block.forward
        block.forward = lambda *args, _wanted=wanted, **named: _wanted[None].clone()
        try:
            torch.testing.assert_close(found[row, : len(text)], logits(live, [text])[0], atol=1e-4, rtol=1e-4)
        finally:
            del block.forward
        assert block.forward == plain
    assert torch.equal(patched[0, len(asked[0]) :], stream(live, asked)[0, len(asked[0]) :])  # padding is left alone


def test_tokens_that_were_not_kept_stay_as_they_are(live: Any, texts: list[list[int]], store: Any) -> None:
    with edited(live, Intervention([Add(layer=0, vector=(1.0,) * 32)])):
        run = recorded(live, texts, store, sample=0.4)
    kept = {
        (sequence, position)
        for sequence, position in store.fetch(
            "SELECT sequence_id, position FROM tokens WHERE run_id = ? AND token IN (SELECT unnest(?::BIGINT[]))",
            [run.run_id, [int(t) for shard in vector_shards(run, RESID) for t in shard.token]],
        )
    }
    assert 0 < len(kept) < sum(LENGTHS)
    before = stream(live, texts)
    with edited(live, Intervention([Patch(layer=1, run="source")]), sources={"source": run}) as session:
        session.begin(range(4))
        after = stream(live, texts)
    for row, text in enumerate(texts):
        for position in range(len(text)):
            assert torch.equal(after[row, position], before[row, position]) is ((row, position) not in kept)


def test_strength_is_the_share_of_the_recorded_vector(
    live: Any, tiny_model: Callable[..., Any], texts: list[list[int]], store: Any
) -> None:
    other = ms.load(tiny_model("llama", num_hidden_layers=3, seed=7))
    run = recorded(other, texts, store)
    row = texts[1]
    with edited(
        live, Intervention([Patch(layer=1, run="source", strength=0.25, positions="2:4")]), sources={"source": run}
    ) as session:
        session.begin([1])
        found = stream(live, [row])[0]
    own, given = stream(live, [row])[0], stream(other, [row])[0]
    torch.testing.assert_close(found[2:4], (0.75 * own + 0.25 * given)[2:4], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[4:], own[4:])
    assert torch.equal(found[:2], own[:2])


def test_without_begin_or_with_another_text_it_says_so(live: Any, texts: list[list[int]], store: Any) -> None:
    run = recorded(live, texts, store)
    cut = Intervention([Patch(layer=1, run="source")])
    with edited(live, cut, sources={"source": run}), pytest.raises(RunError, match="which texts"):
        logits(live, texts)
    place = Place(live.module, live.anatomy, 1, sources={"source": run})
    step = PatchStep([cut.edits[0]], place)  # type: ignore[list-item]  # a Patch
    assert step.fault() is None
    for rows, same in (([0, 1], True), ([1, 0], False)):
        step.begin((0, 1))
        passed(step, [texts[n] for n in rows])
        assert (step.fault() is None) is same
    step.begin((0, 1))
    passed(step, [texts[n] for n in (1, 0)])
    with pytest.raises(RunError, match="their tokens differ"):
        step.begin((2, 3))


def passed(step: PatchStep, texts: list[list[int]]) -> None:
    ids, mask = batch(texts)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    now = Now(ids, mask.bool(), places, False, torch.zeros(len(ids), dtype=torch.long), (0, 1))
    step.change(torch.zeros(*ids.shape, 32), now)


def test_generated_tokens_beyond_the_record_are_left_alone(live: Any, texts: list[list[int]], store: Any) -> None:
    run = recorded(live, texts, store)
    prompt = torch.tensor([texts[1]])
    with torch.no_grad():
        plain = live.module.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        with edited(live, Intervention([Patch(layer=1, run="source")]), sources={"source": run}) as session:
            session.begin([1])
            made = live.module.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(made, plain)


def test_what_cannot_be_is_refused(
    live: Any, texts: list[list[int]], store: Any, tiny_model: Callable[..., Any]
) -> None:
    run = recorded(live, texts, store)
    place = Place(live.module, live.anatomy, 1, sources={"source": run})
    assert PatchStep.why_not(Patch(layer=1, run="source"), place) is None
    assert "not among" in str(PatchStep.why_not(Patch(layer=1, run="other"), place))
    elsewhere = str(PatchStep.why_not(Patch(layer=1, run="source", site="hook_mlp_out"), place))
    assert "blocks.1.hook_mlp_out" in elsewhere
    assert "record it again" in elsewhere
    wide = ms.load(tiny_model("llama", num_hidden_layers=3, hidden_size=64))
    beside = Place(wide.module, wide.anatomy, 1, sources={"source": run})
    assert "the stream 64" in str(PatchStep.why_not(Patch(layer=1, run="source"), beside))
