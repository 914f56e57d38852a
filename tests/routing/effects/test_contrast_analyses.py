"""Contrasts of prompts: closed forms of planted routing, counts by hand, shuffles that find nothing, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.effects.contrast_detector import area
from moescope.routing.effects.contrast_tokens import npmi
from moescope.store.run import Run

Plant = Callable[..., Run]


def _two_sided(
    planted: ModuleType, *, prompts: int, length: int, on_a: int, on_b: int, n_experts: int = 4
) -> dict[str, Any]:
    """Expert 0 is on for the first `on_a` tokens of a prompt of a and the first `on_b` of one of b; others take expert 1."""
    rows = [[0] if place < on else [1] for on in [on_a, on_b] for _ in range(prompts) for place in range(length)]
    labels = ["a"] * prompts + ["b"] * prompts
    return {
        "lengths": [length] * (2 * prompts),
        "labels": labels,
        "routers": [planted.Router(np.array(rows), n_experts)],
    }


def _by_expert(result: Any, column: str = "value") -> dict[int, float]:
    return dict(result.df().set_index("expert")[column])


def test_expert_on_with_p_in_one_set_and_q_in_the_other_differs_by_p_less_q(plant: Plant, planted: ModuleType) -> None:
    run = plant(**_two_sided(planted, prompts=6, length=10, on_a=7, on_b=2))
    for measure, size in (("risk_difference", 1), ("prompt_mean", 1), ("resonance", 10)):
        result = analyze(run, "expert_contrast", measure=measure)
        assert _by_expert(result) == pytest.approx({0: 0.5 * size, 1: -0.5 * size, 2: 0, 3: 0})
        assert _by_expert(result, "a")[0] == pytest.approx(0.7 * size)
        assert _by_expert(result, "b")[0] == pytest.approx(0.2 * size)
        # All prompts of a set are alike, so resampling them changes nothing.
        assert _by_expert(result, "ci_low") == pytest.approx(_by_expert(result))
        assert _by_expert(result, "q")[0] < 0.05
        assert _by_expert(result, "q")[2] == 1  # nobody chose it
        assert "2 of 4 experts tell a from b" in result.title
    swapped = analyze(run, "expert_contrast", a="b", b="a")
    assert _by_expert(swapped)[0] == pytest.approx(-0.5)


def test_long_prompts_decide_pooled_tokens_and_not_the_mean_over_prompts(plant: Plant, planted: ModuleType) -> None:
    # a: one prompt of 8 tokens on expert 0, one of 2 on expert 1; b: two of 3 on expert 1.
    experts = np.array([[0]] * 8 + [[1]] * 2 + [[1]] * 6)
    run = plant(lengths=[8, 2, 3, 3], labels=["a", "a", "b", "b"], routers=[planted.Router(experts, 2)])
    found = {m: _by_expert(analyze(run, "expert_contrast", measure=m))[0] for m in ("risk_difference", "prompt_mean")}
    assert found == pytest.approx({"risk_difference": 0.8, "prompt_mean": 0.5})
    resonance = analyze(run, "expert_contrast", measure="resonance")
    assert _by_expert(resonance)[0] == pytest.approx(4.0)
    assert any("differ in length" in note for note in resonance.notes)


def test_weights_count_where_asked_for(plant: Plant, planted: ModuleType) -> None:
    experts, weights = np.tile([[0, 1]], (8, 1)), np.array([[0.75, 0.25]] * 4 + [[0.5, 0.5]] * 4)
    run = plant(lengths=[2] * 4, labels=["a", "a", "b", "b"], routers=[planted.Router(experts, 2, weights=weights)])
    assert _by_expert(analyze(run, "expert_contrast"))[0] == 0  # chosen by every token of both
    weighted = _by_expert(analyze(run, "expert_contrast", weighted=True))
    assert weighted == pytest.approx({0: 0.25, 1: -0.25})


@pytest.mark.parametrize(
    ("tokens", "counted"),
    [("all", lambda d, p, i, n: True), ("last", lambda d, p, i, n: p == n - 1), ("1:3", lambda d, p, i, n: 1 <= p < 3),
     ("prompt", lambda d, p, i, n: not d), ("generated", lambda d, p, i, n: d), ("token:7", lambda d, p, i, n: i == 7)],
)  # fmt: skip
def test_tokens_that_count_equal_a_count_by_hand(
    plant: Plant, planted: ModuleType, tokens: str, counted: Callable[[bool, int, int, int], bool]
) -> None:
    generator = np.random.default_rng(3)
    prompts, read, made = 6, 5, 3
    total = prompts * (read + made)
    chosen = np.stack([generator.permutation(5)[:2] for _ in range(total)])
    ids = generator.integers(5, 9, total).tolist()
    decode = ([False] * read + [True] * made) * prompts
    labels = ["a", "b"] * 3
    run = plant(lengths=[read + made] * prompts, labels=labels, ids=ids, decode=decode,
                routers=[planted.Router(chosen, 5)])  # fmt: skip
    tally = {side: np.zeros(5) for side in "ab"}
    seen = dict.fromkeys("ab", 0)
    for token in range(total):
        prompt, place = divmod(token, read + made)
        if counted(decode[token], place, ids[token], read):
            seen[labels[prompt]] += 1
            for expert in chosen[token]:
                tally[labels[prompt]][expert] += 1
    expected = tally["a"] / seen["a"] - tally["b"] / seen["b"]
    found = _by_expert(analyze(run, "expert_contrast", tokens=tokens, permutations=20, draws=20))
    assert [found[e] for e in range(5)] == pytest.approx(expected.tolist())


def test_p_is_the_share_of_shuffles_as_far_apart(plant: Plant, planted: ModuleType) -> None:
    # Three prompts a side, expert 0 in all of a and none of b: of the 20 ways to choose three of six, 2 are as far apart.
    run = plant(**_two_sided(planted, prompts=3, length=2, on_a=2, on_b=0))
    p = _by_expert(analyze(run, "expert_contrast", permutations=4000), "p")[0]
    assert p == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 4000))


def test_sets_without_a_difference_are_not_told_apart(plant: Plant, planted: ModuleType) -> None:
    found = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        # Prompts differ from each other much, sets do not: tokens of a prompt follow its own preference.
        shares = generator.dirichlet(np.full(16, 0.5), size=12)
        rows = np.concatenate([generator.choice(16, size=(20, 1), p=share) for share in shares])
        run = plant(lengths=[20] * 12, labels=["a", "b"] * 6, routers=[planted.Router(rows, 16)])
        frame = analyze(run, "expert_contrast", permutations=400, draws=10, seed=seed).df()
        found += int((frame["q"] < 0.05).any())
    assert found <= 4  # a true rate of at most 5 % a run: five or more of 20 come by chance in 0.3 % of cases


def test_interval_covers_the_true_difference(plant: Plant, planted: ModuleType) -> None:
    missed = 0
    for seed in range(40):
        generator = np.random.default_rng(100 + seed)
        rates = np.concatenate([generator.beta(6, 4, 40), generator.beta(4, 6, 40)])
        rows = np.concatenate([(generator.random((15, 1)) >= rate).astype(int) for rate in rates])
        run = plant(lengths=[15] * 80, labels=["a"] * 40 + ["b"] * 40, routers=[planted.Router(rows, 2)])
        row = analyze(run, "expert_contrast", permutations=2, draws=400, seed=seed).df().set_index("expert").loc[0]
        missed += not row["ci_low"] <= 0.2 <= row["ci_high"]
    assert missed <= 7  # of 40 at a true 5 %, eight or more come by chance in 0.1 % of cases


def test_all_other_labels_stand_against_one(plant: Plant, planted: ModuleType) -> None:
    experts = np.array([[0]] * 4 + [[1]] * 4 + [[0]] * 2 + [[1]] * 2)
    run = plant(lengths=[2] * 6, labels=["x", "x", "y", "y", "z", "z"], routers=[planted.Router(experts, 2)])
    assert _by_expert(analyze(run, "expert_contrast", a="x"))[0] == pytest.approx(1 - 2 / 8)
    assert _by_expert(analyze(run, "expert_contrast", a="x", b="z"))[0] == pytest.approx(1 - 2 / 4)
    assert _by_expert(analyze(run, "expert_contrast", a="z, x", b="y"))[0] == pytest.approx(6 / 8 - 0)
    assert _by_expert(analyze(run, "expert_contrast", a="y,z"))[0] == pytest.approx(2 / 8 - 1)
    assert _by_expert(analyze(run, "expert_contrast", b="x"))[0] == pytest.approx(0 - 1)  # y is the first that is not x


def test_parts_of_a_document_are_one_prompt(plant: Plant, planted: ModuleType) -> None:
    experts = np.array([[0]] * 4 + [[1]] * 4)
    run = plant(
        lengths=[2] * 4, documents=[0, 0, 1, 1], labels=["a", "a", "b", "b"], routers=[planted.Router(experts, 2)]
    )
    result = analyze(run, "expert_contrast", tokens="last")
    assert result.n == 2
    assert any("one prompt" in note for note in result.notes)
    assert result.df()["ci_low"].isna().all()


def test_sets_of_two_runs_equal_labels_of_one(plant: Plant, planted: ModuleType) -> None:
    fields = _two_sided(planted, prompts=5, length=6, on_a=4, on_b=1)
    whole = analyze(plant(**fields), "expert_contrast").df()
    rows = fields["routers"][0].experts
    halves = [
        plant(lengths=[6] * 5, name=f"side {n}", routers=[planted.Router(rows[30 * n : 30 * (n + 1)], 4)])
        for n in (0, 1)
    ]
    apart = analyze(halves, "expert_contrast_of_runs").df()
    for column in ("expert", "value", "ci_low", "ci_high", "p", "q"):
        assert apart[column].tolist() == pytest.approx(whole[column].tolist())
    with pytest.raises(InputError, match="both sets are run"):
        analyze([halves[0], halves[0]], "expert_contrast_of_runs")


@pytest.mark.parametrize(
    ("given", "words"),
    [({"a": "c"}, "no label 'c'"), ({"a": "a", "b": "a"}, "both sets are 'a'"), ({"tokens": "token:49"}, "no prompt of"),
     ({"tokens": "middle"}, "positions cannot be"), ({"measure": "odds"}, "measure")],
)  # fmt: skip
def test_senseless_sets_are_refused(plant: Plant, planted: ModuleType, given: dict[str, Any], words: str) -> None:
    run = plant(**_two_sided(planted, prompts=2, length=3, on_a=2, on_b=0))
    with pytest.raises(InputError, match=words):
        analyze(run, "expert_contrast", **given)


def test_one_label_is_refused(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[2], labels=["a"], routers=[planted.Router(np.zeros((2, 1), int), 2)])
    for name in ("expert_contrast", "expert_detector"):
        with pytest.raises(InputError, match="fewer than two labels"):
            analyze(run, name)


def test_detector_of_a_planted_expert_is_perfect_and_its_controls_are_not(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(1, 64, (24 * 10, 1))
    rows[: 12 * 10 : 5] = 0  # expert 0 takes a fifth of the tokens of every prompt of a
    run = plant(lengths=[10] * 24, labels=["a"] * 12 + ["b"] * 12, routers=[planted.Router(rows, 64)])
    frame = analyze(run, "expert_detector", experts=1).df()
    assert frame["value"].tolist() == [1.0]
    assert frame["null"][0] < 0.75


def test_detector_of_nothing_is_at_chance(plant: Plant, planted: ModuleType) -> None:
    values = []
    for seed in range(30):
        rows = np.random.default_rng(seed).integers(0, 16, (20 * 10, 1))
        run = plant(lengths=[10] * 20, labels=["a", "b"] * 10, routers=[planted.Router(rows, 16)])
        values.append(
            analyze(run, "expert_detector", experts=4, draws=10, controls=1, seed=seed).df()["value"].iloc[-1]
        )
    assert abs(np.mean(values) - 0.5) < 4 * np.std(values) / math.sqrt(30)
    assert np.std(values) > 0


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_area_is_the_share_of_pairs(a: list[int], b: list[int]) -> None:
    pairs = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b)
    assert float(area(np.array(a, float), np.array(b, float))) == pytest.approx(pairs / (len(a) * len(b)))


def test_npmi_is_1_where_both_always_meet_0_where_independent_and_minus_1_where_never() -> None:
    assert npmi(np.array([10.0, 25.0, 0.0]), [10, 50, 10], np.array([10.0, 50.0, 10.0]), 100).tolist() == [1, 0, -1]


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_npmi_lies_between_minus_1_and_1(both: int, x: int, e: int, neither: int) -> None:
    total = both + x + e + neither
    value = float(npmi(np.array([float(both)]), both + x, np.array([float(both + e)]), total)[0])
    assert -1 <= value <= 1 + 1e-12
    if both < total:
        p = both / total
        assert value == pytest.approx(math.log2(p / ((both + x) / total * (both + e) / total)) / -math.log2(p))


def test_token_experts_find_the_expert_of_a_word(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(1)
    ids = generator.integers(10, 20, 400)
    rows = generator.integers(1, 8, (400, 1))
    rows[ids == 13] = 0
    run = plant(
        lengths=[40] * 10, ids=ids.tolist(), vocabulary={13: b" Wait", 14: b" so"}, routers=[planted.Router(rows, 8)]
    )
    for words in ("13", "Wait"):
        result = analyze(run, "token_experts", words=words)
        frame = result.df()
        assert frame["expert"][0] == 0
        assert frame["value"][0] == pytest.approx(1.0)
        assert frame["expected"][0] == pytest.approx(
            sum(int((ids[s : s + 40] == 13).sum()) ** 2 / 40 for s in range(0, 400, 40))
        )
        assert (frame[frame["expert"] > 0]["value"] == -1).all()
    assert "'Never'" in " ".join(analyze(run, "token_experts", words="13,Never").notes)
    shuffled = generator.permutation(ids)
    other = plant(lengths=[40] * 10, ids=shuffled.tolist(), routers=[planted.Router(rows, 8)])
    assert (analyze(other, "token_experts", words="14,15").df()["q"] > 0.05).all()


@pytest.mark.parametrize(
    ("words", "refused"), [("77", "no token of run"), ("nowhere", "no token of run"), (",", "no token of run")]
)
def test_words_that_are_not_there_are_refused(plant: Plant, planted: ModuleType, words: str, refused: str) -> None:
    run = plant(lengths=[4], routers=[planted.Router(np.zeros((4, 1), int), 2)])
    with pytest.raises(InputError, match=refused):
        analyze(run, "token_experts", words=words)


def test_words_in_bursts_and_sticky_routing_that_know_nothing_of_each_other_are_rarely_called(
    plant: Plant, planted: ModuleType
) -> None:
    """Both stay as they are with probability 0.6 from token to token: tokens of a text are not independent."""
    random, called, tests = np.random.default_rng(0), 0, 0
    for _ in range(12):
        words, experts = (_sticky(random, documents=16, length=120, states=s, stay=0.6) for s in (2, 8))
        run = plant(
            lengths=[120] * 16,
            ids=words.tolist(),
            routers=[planted.Router(experts[:, None], 8)],
            vocabulary={0: b"a", 1: b"b"},
        )
        p = analyze(run, "token_experts", words="1", draws=20).df()["p"]
        called, tests = called + int((p < 0.05).sum()), tests + len(p)
    assert called <= 12, f"{called} of {tests}, where 5 % are 4.8"  # more than 12 of 96 have a chance of 0.2 %


def _sticky(random: np.random.Generator, *, documents: int, length: int, states: int, stay: float) -> np.ndarray:
    found = random.integers(0, states, (documents, length))
    for place in range(1, length):
        kept = random.random(documents) < stay
        found[kept, place] = found[kept, place - 1]
    return found.ravel()
