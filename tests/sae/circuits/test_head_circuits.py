"""Circuits of heads: scores by loops, a planted model in which two heads matter, nulls, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.sae.circuits.ablation import matched_sets
from moescope.sae.circuits.circuit import head_circuit
from moescope.sae.circuits.codes import train_coder
from moescope.sae.circuits.head_outputs import at_mean, head_outputs, last_logits, of_one_length
from moescope.sae.circuits.prompts import Prompt, circuit_task
from moescope.sae.circuits.scores import code_scores
from moescope.store.store import Store


def test_scores_are_those_of_loops_over_sets() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-1, 6, (14, 5))
    positive = np.arange(14) < 6
    found = code_scores(codes, positive, shuffles=200, seed=3)
    counts = []
    for head in range(5):
        with_it = {int(codes[row, head]) for row in range(14) if positive[row]}
        without = {int(codes[row, head]) for row in range(14) if not positive[row]}
        counts.append(len(with_it - without))
    assert found.count.tolist() == counts
    weights = [np.exp(count / 6) for count in counts]
    assert found.score.tolist() == pytest.approx([w / sum(weights) for w in weights])
    drawn = np.random.default_rng(3)
    shuffled = []
    for _ in range(200):
        side = drawn.permutation(positive)
        shuffled.append([len(set(codes[side, head]) - set(codes[~side, head])) for head in range(5)])
    assert found.null.tolist() == pytest.approx(np.mean(shuffled, 0).tolist())
    reached = (np.array(shuffled) >= np.array(counts)).sum(0)
    assert found.p.tolist() == pytest.approx(((1 + reached) / 201).tolist())


def test_heads_of_sides_alike_score_at_chance() -> None:
    random = np.random.default_rng(1)
    codes = random.integers(0, 12, (60, 200))
    scores = code_scores(codes, np.arange(60) < 30, shuffles=300)
    assert (scores.q <= 0.05).sum() == 0
    assert (scores.p <= 0.05).mean() <= 0.08
    assert scores.count.mean() == pytest.approx(scores.null.mean(), abs=0.2)


def test_coder_tells_directions_apart_and_names_silence() -> None:
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(6, 16, generator=random), dim=1)
    which = torch.randint(6, (60, 3), generator=random)
    coder = train_coder(4 * directions[which], codes=24, sparsity=0.1, steps=400)
    codes = coder(4 * directions[which])
    assert coder.fvu < 0.1
    for direction in range(6):
        assert len(set(codes[which.numpy() == direction])) == 1, "one direction, one code"
    assert len(set(codes.ravel().tolist())) == 6
    silent = coder(coder.scale * coder.centre[None, None] - 1e3 * coder.encoder.mean(1))
    assert set(silent.ravel()) <= {-1, *range(24)}
    with pytest.raises(InputError, match="cannot be coded"):
        train_coder(torch.zeros(10, 2, 4), codes=4)


SPECIAL = 7  # the token that positives have somewhere


@pytest.fixture(scope="module")
def two_heads(tiny_model: Callable[..., Any]) -> Any:
    """A Llama in which two heads of layer 1 alone pass on what stands before the last token, and the logits read only them."""
    module = tiny_model("llama", seed=5)
    with torch.no_grad():
        for layer in module.model.layers:
            layer.mlp.down_proj.weight.zero_()
        module.model.layers[0].self_attn.o_proj.weight.zero_()
        attention = module.model.layers[1].self_attn
        kept = torch.zeros(32, dtype=torch.bool)
        for head in (0, 3):
            kept[head * 8 : head * 8 + 8] = True
        attention.o_proj.weight[:, ~kept] = 0
        # Keys and values see the special token; heads 0 and 3 are in different key groups.
        other = module.model.layers[1].self_attn
        other.o_proj.weight *= 6
    return module


def _prompts(special: bool, count: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = random.integers(20, 90, 9).tolist()
        if special:
            ids[int(random.integers(1, 8))] = SPECIAL
        found.append([int(i) for i in ids])
    return found


def test_cutting_all_heads_equals_setting_z_by_hand(two_heads: Any) -> None:
    model = ms.load(two_heads)
    prompts = [Prompt(tuple(ids)) for ids in _prompts(True, 6, 0)]
    outputs = head_outputs(model, prompts)
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(two_heads.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _m, inputs, number=number: seen.__setitem__(number, inputs[0].clone())
        )
    ids = torch.tensor([p.ids for p in prompts])
    with torch.no_grad():
        two_heads(input_ids=ids)
    for number, z in seen.items():
        expected = z[:, -1].reshape(6, 4, 8)
        assert torch.allclose(outputs.last[:, number * 4 : number * 4 + 4], expected, atol=1e-5)
        mean = z.reshape(-1, 4, 8).mean(0)
        assert torch.allclose(outputs.mean[number * 4 : number * 4 + 4], mean, atol=1e-5)

    means = torch.arange(8 * 8).reshape(8, 8).float() / 10
    chosen = np.array([False, True, False, False, True, False, False, True])

    def made(at: str) -> list[Any]:
        return [
            at_mean(outputs, np.zeros(8, bool), means, positions=at, name="none"),
            at_mean(outputs, chosen, means, positions=at, name="some"),
        ]

    for positions in ("last", "all"):
        found = {(which, n): row for which, n, row in last_logits(model, prompts, made, positions=positions)}

        def by_hand(_module: Any, inputs: tuple[torch.Tensor], layer: int) -> tuple[torch.Tensor]:
            z = inputs[0].clone()
            for head in range(4):
                if chosen[layer * 4 + head]:
                    where = slice(None) if positions == "all" else slice(-1, None)  # noqa: B023  called inside this turn
                    z[:, where, head * 8 : head * 8 + 8] = means[layer * 4 + head]
            return (z,)

        with torch.no_grad():
            plain = two_heads(input_ids=ids).logits[:, -1]
            handles = [
                layer.self_attn.o_proj.register_forward_pre_hook(lambda m, i, n=n: by_hand(m, i, n))
                for n, layer in enumerate(two_heads.model.layers)
            ]
            edited = two_heads(input_ids=ids).logits[:, -1]
            for handle in handles:
                handle.remove()
        for n in range(6):
            assert torch.allclose(found[0, n], plain[n], atol=1e-4)
            assert torch.allclose(found[1, n], edited[n], atol=1e-4)
        assert not torch.allclose(plain, edited, atol=1e-2)
    for layer in two_heads.model.layers:
        layer.self_attn.o_proj._forward_pre_hooks.clear()


def test_planted_heads_carry_the_logits_and_the_rest_nothing(two_heads: Any, store: Store) -> None:
    """Cutting the two heads that write takes the whole difference, and keeping them alone leaves all of it."""
    model = ms.load(two_heads)
    positives, negatives = _prompts(True, 24, 1), _prompts(False, 16, 2)
    found = head_circuit(
        model,
        store,
        task=(positives, negatives),
        test_prompts=8,
        size=8,
        codes=16,
        steps=50,
        controls=2,
        progress=False,
    )
    assert found.ablation is None, "every head is of the circuit"
    outputs = head_outputs(model, [Prompt(tuple(ids)) for ids in negatives])
    member = np.zeros(8, bool)
    member[[4, 7]] = True  # heads 0 and 3 of layer 1

    def made(at: str) -> list[Any]:
        sets = (np.zeros(8, bool), member, ~member, np.ones(8, bool))
        return [at_mean(outputs, heads, outputs.last.mean(0), positions=at, name="x") for heads in sets]

    tests = [Prompt(tuple(ids)) for ids in positives[:5]]
    logits = {(which, n): row for which, n, row in last_logits(model, tests, made, positions="last")}
    for n in range(5):
        assert torch.allclose(logits[0, n], logits[2, n], atol=1e-4), "the others add nothing"
        assert torch.allclose(logits[1, n], logits[3, n], atol=1e-4), "all there is goes with the two"
        assert not torch.allclose(logits[0, n], logits[1, n], atol=0.1)


@pytest.fixture(scope="module")
def copying(tiny_model: Callable[..., Any]) -> Any:
    """A Llama in which one head writes what tells positives from negatives, and every other head writes the same on all prompts."""
    module = tiny_model("llama", seed=2)
    with torch.no_grad():
        for number, layer in enumerate(module.model.layers):
            layer.mlp.down_proj.weight.zero_()
            if number == 0:
                layer.self_attn.o_proj.weight.zero_()
            # Values of key group 1 (heads 2 and 3) of both layers are nothing; group 0 of layer 0 neither.
            values = layer.self_attn.v_proj.weight
            values[8:] = 0
            if number == 0:
                values.zero_()
        module.model.layers[1].self_attn.o_proj.weight *= 4
    return module


def test_heads_that_say_nothing_are_never_called_and_effects_are_stored(copying: Any, store: Store) -> None:
    """Positives end in many tokens, negatives in one: only heads 0 and 1 of layer 1 put out anything at all."""
    random = np.random.default_rng(0)
    positives = [[int(i) for i in random.integers(20, 90, 8)] for _ in range(36)]
    negatives = [[5, 6, 5, 6, 5, 6, 5, 6]] * 24
    found = head_circuit(
        ms.load(copying), store, task=(positives, negatives), test_prompts=12, fdr=0.05, codes=32, sparsity=0.1, steps=150, controls=3,
        shuffles=400, run_name="planted", progress=False,
    )  # fmt: skip
    assert set(found.members) <= {(1, "attn", 0), (1, "attn", 1)}
    assert found.members
    frame = found.df().set_index(["layer", "head"])
    silent = [(layer, head) for layer in (0, 1) for head in range(4) if (layer, head) not in {(1, 0), (1, 1)}]
    assert (frame.loc[silent, "count"] == 0).all()
    assert found.run is not None
    assert found.run.complete
    assert found.ablation is not None
    assert (found.ablation.value[0] >= 0).all(), "answers are the model's own best token against its second"

    sequences = store.sql("SELECT label, metadata FROM sequences ORDER BY sequence_id").df()
    assert sequences["label"].value_counts().to_dict() == {"positive": 24, "negative": 24, "held out": 12}
    assert json.loads(sequences["metadata"][0])["codes"] == found.codes[0].tolist()
    rows = store.sql("SELECT * FROM heads WHERE metric = 'circuit_member' AND condition = 'prompts'").df()
    assert int(rows["value"].sum()) == len(found.members)
    effects = store.sql("SELECT * FROM effects").df()
    assert set(effects["effect_id"].astype(str)) == set(found.effects)
    assert (effects[effects["kind"] == "control"].groupby("effect_id")["draw"].nunique() == 3).all()
    cut = effects[(effects["kind"] == "target") & (effects["metric"] == "delta_logit_difference")].set_index(
        "effect_id"
    )
    changes = found.ablation.value[1] - found.ablation.value[0]
    assert cut.loc[next(i for i in cut.index if str(i) == found.effects[0]), "value"] == pytest.approx(changes.mean())

    result = ms.analyze(found.run, "head_circuit")
    told = result.df()
    assert int(told["member"].sum()) == len(found.members)
    base = told[(told["metric"] == "logit difference") & (told["condition"] == "base")]["value"].item()
    assert base == pytest.approx(found.ablation.value[0].mean())
    cut_to = told[(told["metric"] == "logit difference") & (told["condition"] == "circuit at its mean")]
    assert cut_to["value"].item() == pytest.approx(found.ablation.value[1].mean())
    assert cut_to["null"].item() == pytest.approx(found.ablation.value[4:7].mean())
    assert ms.analyze(found.run, "effect", effect=found.effects[0]).df().size


def test_prompts_alike_on_both_sides_give_no_circuit(tiny_model: Callable[..., Any], store: Store) -> None:
    both = _prompts(False, 60, 3)
    found = head_circuit(
        ms.load(tiny_model("llama")),
        store,
        task=(both[:36], both[36:]),
        test_prompts=12,
        fdr=0.05,
        codes=16,
        steps=60,
        controls=2,
        progress=False,
    )
    assert found.members == []
    assert found.ablation is None
    assert found.effects == ()
    assert ms.analyze(found.run, "head_circuit").title.startswith("No head has more codes")


def test_same_seed_same_circuit(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("gpt2"))
    options: dict[str, Any] = {
        "task": "induction",
        "examples": 5,
        "test_prompts": 4,
        "steps": 20,
        "size": 2,
        "controls": 2,
        "progress": False,
    }
    first, again = (head_circuit(model, None, **options) for _ in range(2))
    assert np.array_equal(first.codes, again.codes)
    assert first.members == again.members
    assert first.ablation is not None
    assert again.ablation is not None
    assert np.array_equal(first.ablation.value, again.ablation.value)
    assert first.known is not None
    other = head_circuit(
        model, None, **options | {"positions": "all", "threshold": 0.999, "size": None, "test_prompts": 3}
    )
    assert other.run is None


def test_random_sets_have_as_many_heads_in_every_layer(two_heads: Any) -> None:
    heads = head_outputs(ms.load(two_heads), [Prompt((1, 2, 3))]).heads
    member = np.array([True, False, False, False, True, True, True, False])
    for drawn in matched_sets(heads, member, controls=8, seed=0):
        assert drawn[:4].sum() == 1
        assert not (drawn & member)[:4].any()
        assert drawn[4:].sum() == 3, "too few others in this layer: of all of it"


def test_induction_prompts_repeat_and_negatives_never(demo_model: Any) -> None:
    task = circuit_task(demo_model, "induction", count=6, seed=1)
    for positive, negative in zip(task.positives, task.negatives, strict=True):
        assert len(positive.ids) == len(negative.ids)
        assert len(set(negative.ids)) == len(negative.ids)
        last = positive.ids[-1]
        before = [i for i, token in enumerate(positive.ids[:-1]) if token == last]
        assert len(before) == 1
        assert positive.ids[before[0] + 1] == positive.answers[0]
        assert positive.wrong[0] != positive.answers[0]


def test_givers_and_years_are_told_apart_by_their_first_different_token(demo_model: Any) -> None:
    tokenizer = demo_model.tokenizer
    task = circuit_task(demo_model, "ioi", count=8, seed=0)
    for positive, negative in zip(task.positives, task.negatives, strict=True):
        text = tokenizer.decode(list(positive.ids))
        right, wrong = (text + tokenizer.decode([ids[0]]) for ids in (positive.answers, positive.wrong))
        assert right != wrong
        for prompt, times in ((positive, 2), (negative, 1)):
            words = prompt.text.replace(",", "").split()
            names = [word for word in words[1:] if word[0].isupper()]
            assert names.count(names[2]) == times, "the third name is the giver's"
    for prompt in circuit_task(demo_model, "greater_than", count=4).positives:
        assert not set(prompt.answers) & set(prompt.wrong)
        year = int(prompt.text.split(" to ")[0][-2:])
        for ids, later in ((prompt.answers, True), (prompt.wrong, False)):
            for token in ids:
                digits = tokenizer.decode([token]).strip()
                assert (int(digits.ljust(2, "9" if not later else "0")) > year) == later


def test_prompts_of_ones_own_are_read(demo_model: Any) -> None:
    mine = ["The sky is blue"] * 4, [("Roses are", " red", " blue"), [5, 6, 7], "a", "b"]
    task = circuit_task(demo_model, mine, count=5)
    assert task.name == "prompts"
    assert task.negatives[0].answers != task.negatives[0].wrong
    assert task.negatives[1].ids == (5, 6, 7)
    assert task.positives[0].answers == ()
    lengths = [[len(task.positives[n].ids) for n in part] for part in of_one_length(task.positives)]
    assert all(len(set(part)) == 1 for part in lengths)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"task": "docstring"}, "no task 'docstring'"),
        ({"task": (["a"], ["b"])}, "too few prompts"),
        ({"task": 3}, "no prompts"),
        ({"task": ([[999_999]] * 4, ["b"] * 4)}, "no tokens of this model"),
        ({"task": ([{}] * 4, ["b"] * 4)}, "is no prompt"),
        ({"examples": 1}, "examples cannot be 1"),
        ({"threshold": 1.0, "size": 3}, "one rule"),
        ({"threshold": -1.0}, "threshold cannot be -1"),
        ({"fdr": 0.0}, "fdr cannot be 0"),
        ({"positions": "first"}, "positions"),
        ({"controls": 1}, "controls cannot be 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], problem: str, demo_model: Any, store: Store) -> None:
    with pytest.raises(InputError, match=problem):
        head_circuit(demo_model, store, progress=False, **options)
    assert not store.runs()


def test_texts_without_a_tokenizer_are_refused(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("llama"))
    with pytest.raises(InputError, match="no tokenizer"):
        circuit_task(model, "ioi", count=5)
    with pytest.raises(InputError, match="no tokenizer"):
        circuit_task(model, (["a"] * 4, ["b"] * 4), count=5)
