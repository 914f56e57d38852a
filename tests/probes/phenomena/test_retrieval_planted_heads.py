"""Heads of known behaviour, built by setting weights by hand: previous token, even, induction (which copies) and same token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.phenomena.head_map import head_map
from moescope.probes.phenomena.head_masking import mask_heads, random_heads
from moescope.probes.phenomena.induction import ECHO, INDUCTION, NULL, PREVIOUS, induction_heads
from moescope.probes.phenomena.needle_decoding import Steps
from moescope.probes.phenomena.needle_prompts import NeedlePrompt
from moescope.probes.phenomena.needle_trials import credits_of
from moescope.probes.phenomena.retrieval import ACTIVE, CHANCE, GIVEN, ONCE, SCORE, retrieval_heads

VOCABULARY, PLACES = 24, 48
PREVIOUS_HEAD, EVEN, COPYING, SAME = 0, 1, 2, 3  # columns: two layers of two heads


@pytest.fixture(scope="module")
def planted() -> Any:
    """A GPT-2 of two layers and two heads without MLPs, over a stream of [token, place, token before], each one-hot.

    L0·H0 attends to the place before and writes its token into the third part; L0·H1 has no queries: it attends evenly.
    L1·H0 attends where the token *before* is the current one, and writes the token there: it copies what came after.
    L1·H1 attends to the current token's earlier places, never to its own.
    """
    import torch
    import transformers

    d = 2 * VOCABULARY + PLACES
    module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=PLACES, n_embd=d, n_layer=2, n_head=2, n_inner=4, bos_token_id=0, eos_token_id=0
        )
    ).eval()  # fmt: skip
    width = d // 2
    token, place, before = slice(0, VOCABULARY), slice(VOCABULARY, VOCABULARY + PLACES), slice(VOCABULARY + PLACES, d)
    sharp = 40.0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        module.transformer.wte.weight[:, token] = torch.eye(VOCABULARY)
        module.transformer.wpe.weight[:, place] = torch.eye(PLACES)
        first, second = (block.attn for block in module.transformer.h)
        q, k, v = (slice(n * d, (n + 1) * d) for n in range(3))

        def head(part: slice, number: int, n: int) -> slice:
            """The first n columns of a head's queries, keys or values."""
            return slice(part.start + number * width, part.start + number * width + n)

        shift = torch.zeros(PLACES, PLACES)
        shift[range(1, PLACES), range(PLACES - 1)] = 1  # the query of place i is the key of place i − 1
        first.c_attn.weight[place, head(q, 0, PLACES)] = sharp * shift
        first.c_attn.weight[place, head(k, 0, PLACES)] = torch.eye(PLACES)
        first.c_attn.weight[token, head(v, 0, VOCABULARY)] = torch.eye(VOCABULARY)
        first.c_proj.weight[:VOCABULARY, before] = torch.eye(VOCABULARY)
        second.c_attn.weight[token, head(q, 0, VOCABULARY)] = sharp * torch.eye(VOCABULARY)
        second.c_attn.weight[before, head(k, 0, VOCABULARY)] = torch.eye(VOCABULARY)
        # The first place has no token before it, and its own in that part: nothing looks there.
        second.c_attn.bias[q.start + VOCABULARY] = sharp
        second.c_attn.weight[VOCABULARY, k.start + VOCABULARY] = -2.0
        second.c_attn.weight[token, head(v, 0, VOCABULARY)] = torch.eye(VOCABULARY)
        second.c_proj.weight[:VOCABULARY, token] = 20 * torch.eye(VOCABULARY)
        own = slice(q.start + width, q.start + width + VOCABULARY)
        second.c_attn.weight[token, own] = sharp * torch.eye(VOCABULARY)
        second.c_attn.weight[token, head(k, 1, VOCABULARY)] = torch.eye(VOCABULARY)
        # Against itself: queries and keys of the last places meet in what is left of the head's width, hashed in two halves.
        rest = width - VOCABULARY
        code = torch.zeros(PLACES, rest)
        code[range(PLACES), [n % rest for n in range(PLACES)]] = 1.0
        second.c_attn.weight[place, slice(own.stop, own.stop + rest)] = -2 * sharp * code
        second.c_attn.weight[place, slice(k.start + width + VOCABULARY, k.start + 2 * width)] = code
    return ms.load(module)


def test_induction_and_same_token_heads_score_one_and_nothing_of_each_other(planted: Any) -> None:
    found = induction_heads(planted, segment=7, repeats=4, draws=5)
    induction, echo, previous = (found.value(name) for name in (INDUCTION, ECHO, PREVIOUS))
    assert induction[COPYING] == pytest.approx(1, abs=1e-3)
    assert echo[COPYING] == pytest.approx(0, abs=1e-3)
    assert echo[SAME] == pytest.approx(1, abs=1e-3)
    assert induction[SAME] == pytest.approx(0, abs=1e-3)
    assert previous[PREVIOUS_HEAD] == pytest.approx(1, abs=1e-3)
    assert found.top(INDUCTION, 1) == [(1, "attn", 0)]
    assert found.top(ECHO, 1) == [(1, "attn", 1)]


def test_an_even_head_scores_at_chance(planted: Any) -> None:
    """Query i sees i + 1 keys, one of which for each earlier copy: mean of j / (i + 1)."""
    found = induction_heads(planted, segment=7, repeats=4, draws=2)
    expected = np.mean([(i // 7) / (i + 1) for i in range(7, 28)])
    for name in (INDUCTION, ECHO, NULL):
        assert found.value(name)[EVEN] == pytest.approx(expected, abs=1e-5)
    table = found.df()
    even = table[(table["layer"] == 0) & (table["head"] == 1) & (table["metric"] == INDUCTION)].iloc[0]
    assert even["value"] == pytest.approx(even["null"], abs=1e-5)


def copy_prompt(answer: Sequence[int], filler: Sequence[int], *, before: int) -> NeedlePrompt:
    """filler[0] … cue answer … filler, cue: the copying head goes on with the answer."""
    cue = 23
    ids = [*filler[:before], cue, *answer, *filler[before:], cue]
    return NeedlePrompt(tuple(ids), (before + 1, before + 1 + len(answer)), number=before)


def copy_prompts() -> list[NeedlePrompt]:
    random = np.random.default_rng(3)
    prompts = []
    for before in (2, 5, 8, 3, 6, 9):
        drawn = random.permutation(np.arange(1, 23)).tolist()
        prompts.append(copy_prompt(drawn[:8], drawn[8:], before=before))
    return prompts


@pytest.mark.parametrize(("steps", "share"), [(8, 1.0), (6, 0.75), (5, 0.625)])
def test_a_copying_head_scores_the_share_it_copied(planted: Any, steps: int, share: float) -> None:
    found = retrieval_heads(planted, prompts=copy_prompts(), steps=steps, progress=False)
    assert [fact["counted"] for fact in found.sequences] == [True] * 6
    assert found.value(SCORE)[COPYING] == pytest.approx(share)
    assert found.value(ONCE)[COPYING] == pytest.approx(share)
    assert found.value(ACTIVE)[COPYING] == 1
    assert found.value(SCORE)[[PREVIOUS_HEAD, EVEN, SAME]].tolist() == [0, 0, 0]
    assert found.value(GIVEN)[COPYING] == pytest.approx(1), "with the answer given, all of it is copied"


def test_chance_is_an_even_choice_among_the_keys(planted: Any) -> None:
    """Each of 8 steps writes one token that stands once in the answer, and its query sees 25 + step keys."""
    prompts = copy_prompts()
    found = retrieval_heads(planted, prompts=prompts, steps=8, progress=False)
    length = len(prompts[0].ids)
    expected = sum(1 / (length + step) for step in range(8)) / 8
    assert found.value(CHANCE) == pytest.approx([expected] * 4)


def test_too_few_counted_trials_withhold_the_score(planted: Any) -> None:
    """Four steps copy half of the answer: recall is not over a half, and no trial counts."""
    found = retrieval_heads(planted, prompts=copy_prompts(), steps=4, progress=False)
    assert found.withheld[SCORE].startswith("0 of 6 trials counted")
    with pytest.raises(InputError, match="withheld"):
        found.value(SCORE)
    assert found.value(GIVEN)[COPYING] == pytest.approx(1)


def test_a_sharp_answer_is_credited_as_the_published_loop_does(planted: Any) -> None:
    """The authors' scoring, written as their code reads, on random looks."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 4, 20).tolist()
    start, stop = 6, 13
    steps = Steps(random.integers(0, 4, 15), random.integers(0, 22, (15, 5)), np.full((15, 5), 22))
    found = credits_of(steps, ids, (start, stop))
    assert found.score.max() > 0
    for head in range(5):
        score, places = 0.0, set()
        for written, looked in zip(steps.written, steps.looked[:, head], strict=True):
            if start <= looked < stop and written == ids[looked]:
                score += 1 / (stop - start)
                places.add(int(looked))
        assert found.score[head] == pytest.approx(score)
        assert found.once[head] == pytest.approx(len(places) / (stop - start))


def test_masking_the_copying_head_takes_the_answer_and_other_heads_do_not(planted: Any) -> None:
    prompts = copy_prompts()
    scores = retrieval_heads(planted, prompts=prompts, steps=8, progress=False)
    found = mask_heads(planted, scores.top(SCORE, 1), prompts, steps=8, draws=5, progress=False)
    assert found.target == ((1, "attn", 0),)
    table = found.df()
    recall = table[table["metric"] == "needle recall"].set_index("condition")["value"]
    assert recall["base"] == 1
    assert recall["mask top 1"] < 0.3
    assert (recall[[name for name in found.conditions if "random" in name]] == 1).all()
    contrast = table[(table["kind"] == "target − controls") & (table["metric"] == "needle recall")].iloc[0]
    assert contrast["change_high"] < -0.5
    nll = table[table["metric"] == "answer NLL"].set_index("condition")["value"]
    assert nll["mask top 1"] > nll["base"] + 1


def test_decode_only_masking_leaves_the_prompt_as_it_was(planted: Any) -> None:
    """The head before the copying one works on the prompt: masked in decode steps alone, everything it wrote stays."""
    found = mask_heads(
        planted, [(0, "attn", 0)], copy_prompts(), steps=8, draws=5, never=[(1, "attn", 0)], progress=False
    )
    recall = found.df().query("metric == 'needle recall'").set_index("condition")["value"]
    assert recall["mask top 1"] == 1
    assert all((1, "attn", 0) not in draw for draw in found.controls)


def test_random_controls_are_drawn_without_the_heads_left_out_and_refused_where_too_few_remain(planted: Any) -> None:
    heads = head_map(planted)
    top, never = [(1, "attn", 0)], [(1, "attn", 1)]
    for draw in random_heads(heads, top, never, draws=50, layer_matched=False, seed=0):
        assert set(draw) <= {(0, "attn", 0), (0, "attn", 1)}
    with pytest.raises(InputError, match="not enough other heads"):
        random_heads(heads, top, never, draws=5, layer_matched=True, seed=0)
    with pytest.raises(InputError, match="draws"):
        mask_heads(planted, top, copy_prompts(), draws=4)
    with pytest.raises(InputError, match="heads that the model has"):
        mask_heads(planted, [(7, "attn", 0)], copy_prompts())


def test_chance_is_the_mean_over_even_draws_of_the_top_key() -> None:
    """Top keys drawn evenly 4,000 times from what each step can see, which for the second head leaves half of the answer out."""
    random = np.random.default_rng(1)
    ids, (start, stop) = [0, 3, 1, 2, 1, 3, 2], (1, 5)
    written = np.array([1, 1, 3, 2])
    keys = np.stack([np.arange(7, 11), np.full(4, 4)], 1)
    draws = 4_000
    tokens = np.arange(7, 11)
    drawn = np.stack([random.integers(tokens[:, None] - keys, tokens[:, None]) for _ in range(draws)])
    credited = [credits_of(Steps(written, looked, keys), ids, (start, stop)) for looked in drawn]
    expected = credited[0]
    assert np.mean([c.score for c in credited], axis=0) == pytest.approx(expected.chance, abs=0.03)
    assert np.mean([c.once for c in credited], axis=0) == pytest.approx(expected.chance_once, abs=0.03)
    assert np.mean([c.score > 0 for c in credited], axis=0) == pytest.approx(expected.chance_active, abs=0.035)
    assert expected.chance[0] != pytest.approx(expected.chance[1], abs=0.05)
