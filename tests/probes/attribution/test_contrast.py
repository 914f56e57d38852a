"""Contrast of prompts by intervention: a planted expert, a router masked by hand, held-out prompts, controls, refusals."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moescope as ms
from moescope.contrast_api import contrast
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.attribution import contrast_edits
from moescope.probes.attribution.contrast_edits import RankedExpert, choose, most_forced, most_removed, steer
from moescope.probes.attribution.contrast_estimates import BOTH, PREFERENCE
from moescope.probes.attribution.contrast_prompts import halved
from moescope.probes.edits.session import edited

PLANTED = 3  # the expert of layer 0 that tokens below SPLIT go to
SPLIT = 48


@pytest.fixture(scope="module")
def planted_module(tiny_model: Callable[..., Any]) -> Any:
    """In layer 0, tokens below SPLIT have expert 3 as their first choice and no others ever do."""
    module = tiny_model("qwen3_moe", eos_token_id=None)
    with torch.no_grad():
        embeddings = module.model.embed_tokens.weight
        embeddings[:, 0] = torch.where(torch.arange(len(embeddings)) < SPLIT, 8.0, -8.0)
        first = module.model.layers[0]
        first.self_attn.o_proj.weight.zero_()  # what the router sees is the token alone
        first.mlp.gate.weight[PLANTED] = 0
        first.mlp.gate.weight[PLANTED, 0] = 4.0
    return module


def _prompts(low: int, high: int, number: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(low, high, generator.integers(5, 10)).tolist() for _ in range(number)]


A, B = _prompts(1, SPLIT, 8, 0), _prompts(SPLIT, 97, 8, 1)


@contextlib.contextmanager
def _routed_around_by_hand(module: Any) -> Iterator[None]:
    """Layer 0 cannot choose the planted expert: its logit is set to minus infinity before the softmax."""
    mlp = module.model.layers[0].mlp
    plain = mlp.experts.forward

    def forward(hidden: Any, _ids: Any, weights: Any) -> Any:
        logits = (hidden.reshape(-1, hidden.shape[-1]) @ mlp.gate.weight.T).float()
        logits[:, PLANTED] = -torch.inf
        top = logits.softmax(-1).topk(2, dim=-1)
        return plain(hidden, top.indices, (top.values / top.values.sum(-1, keepdim=True)).to(weights.dtype))

    mlp.experts.forward = forward
    try:
        yield
    finally:
        del mlp.experts.forward


def _nll(module: Any, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()


def _tested(store: Any, name: str) -> list[tuple[str, list[int]]]:
    rows = store.run(f"{name}: tested on").sql(
        "SELECT s.label, list(t.token_id ORDER BY t.position) FROM tokens t JOIN sequences s USING (run_id, sequence_id) "
        "WHERE t.run_id = $run GROUP BY s.sequence_id, s.label ORDER BY s.sequence_id"
    )
    return [(label, ids) for label, ids in rows.fetchall()]


def _value(frame: Any, **wanted: Any) -> float:
    rows = frame
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_the_planted_expert_is_chosen_and_its_effect_is_that_of_a_router_masked_by_hand(
    planted_module: Any, store: Any
) -> None:
    result = contrast(ms.load(planted_module), A, B, store, suppress=1, controls=3, draws=100, progress=False)
    assert any(f"L0·E{PLANTED} (+1.000)" in note for note in result.notes)
    frame = result.df()
    target = frame[frame["kind"] == "target"]
    tested = _tested(store, "contrast")
    assert len(tested) == 8
    for side in ("a", "b"):
        before = [x for label, ids in tested if label == side for x in _nll(planted_module, ids)]
        with _routed_around_by_hand(planted_module):
            after = [x for label, ids in tested if label == side for x in _nll(planted_module, ids)]
        by_hand = sum(after) / len(after) - sum(before) / len(before)
        assert _value(target, set=side, metric="delta_nll") == pytest.approx(by_hand, abs=2e-5)
        assert target[target["set"] == side]["n"].iloc[0] == len(before)
    both = _value(target, set="a", metric="delta_nll") - _value(target, set="b", metric="delta_nll")
    assert _value(target, set=BOTH, metric="delta_nll") == pytest.approx(both)
    assert _value(target, set="a", metric="kl") > 0.05
    assert abs(_value(target, set="b", metric="kl")) < 1e-6, "no token of b ever took that expert"
    row = target[(target["set"] == BOTH) & (target["metric"] == "kl")].iloc[0]
    assert row["ci_low"] > row["null_high"], "random experts of like load are not specific to a"


def test_nothing_is_tested_on_prompts_that_chose(planted_module: Any, store: Any) -> None:
    shared = [[5, 60, 5, 60], [6, 61, 6, 61]]
    contrast(ms.load(planted_module), A + shared, B + shared, store, suppress=1, controls=1, draws=10, progress=False)
    runs = [store.run(f"contrast: {part} on") for part in ("chosen", "tested")]
    hashes = [
        {h for (h,) in run.sql("SELECT content_hash FROM sequences WHERE run_id = $run").fetchall()} for run in runs
    ]
    assert hashes[0]
    assert hashes[1]
    assert not hashes[0] & hashes[1]


def test_prompts_longer_than_the_context_are_split_alike_where_chosen_and_tested(
    planted_module: Any, store: Any
) -> None:
    long = [_prompts(1, SPLIT, 10, n)[0] * 9 for n in range(3)]
    result = contrast(ms.load(planted_module), long, B, store, suppress=1, controls=1, draws=10, progress=False)
    tested = _tested(store, "contrast")
    assert max(len(ids) for _, ids in tested) <= 64
    row = result.df().query("kind == 'target' and set == 'a' and metric == 'kl'").iloc[0]
    assert row["n"] == sum(len(ids) - 1 for label, ids in tested if label == "a")


def test_effects_are_stored_with_their_controls(planted_module: Any, store: Any) -> None:
    result = contrast(
        ms.load(planted_module), A, B, store, name="kept", suppress=1, stimulate=1, controls=2, draws=50, progress=False
    )
    frame = result.df()
    base = store.run("kept: tested on").run_id
    rows = store.sql("SELECT * FROM effects WHERE base_run_id = $run", {"run": base}).df()
    assert len(rows) == len(frame)
    assert rows["effect_id"].nunique() == 2
    assert sorted(rows["kind"].unique()) == ["control", "target"]
    kept = [Intervention.from_json(text) for text in rows["intervention"].unique()]
    assert {one.anatomy for one in kept} - {None} == {ms.load(planted_module).anatomy.digest}
    kinds = sorted(edit.kind for one in kept for edit in one.edits)
    assert kinds == ["ablate"] * 3 + ["force"] * 3
    sums = store.sql(
        "SELECT kind, draw, metric, sum(sum) / sum(n) AS mean FROM effect_sequences JOIN sequences ON "
        "sequences.run_id = $run AND sequences.sequence_id = effect_sequences.sequence_id WHERE label = 'a' "
        "GROUP BY effect_id, kind, draw, metric",
        {"run": base},
    ).df()
    found = sorted(sums[(sums["metric"] == "delta_nll")]["mean"])
    shown = sorted(frame[(frame["metric"] == "delta_nll") & (frame["set"] == "a")]["value"])
    assert found == pytest.approx(shown)
    json.dumps(result.as_json(), default=str, allow_nan=True)
    assert result.figure().data


def test_preference_is_that_of_continuations_scored_one_by_one(planted_module: Any, store: Any) -> None:
    desired, undesired = [[7, 50], [9]], [[60, 61, 62]]
    result = contrast(
        ms.load(planted_module), A, B, store, suppress=1, controls=1, desired=desired, undesired=undesired, draws=20,
        progress=False,
    )  # fmt: skip

    def preference(ids: list[int]) -> float:
        scores = [-sum(_nll(planted_module, [*ids, *c])[len(ids) - 1 :]) for c in (*desired, *undesired)]
        return (scores[0] + scores[1]) / 2 - scores[2]

    for side in ("a", "b"):
        prompts = [ids for label, ids in _tested(store, "contrast") if label == side]
        before = [preference(ids) for ids in prompts]
        with _routed_around_by_hand(planted_module):
            after = [preference(ids) for ids in prompts]
        frame = result.df()
        found = _value(frame[frame["kind"] == "target"], set=side, metric=PREFERENCE)
        assert found == pytest.approx(sum(after) / len(after) - sum(before) / len(before), abs=1e-4)


def test_forced_experts_take_every_token_and_deactivated_ones_none(planted_module: Any) -> None:
    model = ms.load(planted_module)
    ranking = [RankedExpert(0, "mlp", PLANTED, 0.9), RankedExpert(0, "mlp", 5, -0.8), RankedExpert(1, "mlp", 2, 0.5)]
    seen: list[set[int]] = []
    experts = planted_module.model.layers[0].mlp.experts
    with torch.no_grad(), edited(model, steer(ranking, model.anatomy, activate=2, deactivate=1)):
        handle = experts.register_forward_pre_hook(lambda _m, given: seen.extend(set(row) for row in given[1].tolist()))
        planted_module(input_ids=torch.tensor(_prompts(1, 97, 1, 5)))
        handle.remove()
    assert seen
    assert all(PLANTED in chosen and 5 not in chosen for chosen in seen)


def test_the_list_is_walked_as_published() -> None:
    values = [0.9, 0.8, 0.7, 0.6, -0.95, 0.5]
    ranking = [RankedExpert(0 if e < 4 else 1, "mlp", e, v) for e, v in enumerate(values)]
    most = {(0, "mlp"): 2, (1, "mlp"): 2}
    found = choose(ranking, 4, sign=1, most=most)
    assert [e.expert for e in found.experts] == [0, 1]  # 2 and 3 are over the layer's limit, and count among the four
    assert [e.expert for e in found.skipped] == [2, 3]
    assert [e.expert for e in choose(ranking, 5, sign=1, most=most).experts] == [0, 1, 5]
    assert [e.expert for e in choose(ranking, 9, sign=-1, most=most).experts] == [4]
    with pytest.raises(InputError, match="used more by the second set"):
        choose(ranking[:3], 1, sign=-1, most=most)


def test_limits_leave_a_router_its_k(demo_model: Any) -> None:
    assert set(most_forced(demo_model.anatomy).values()) == {2}
    assert set(most_removed(demo_model.anatomy).values()) == {14}


@pytest.mark.parametrize(
    ("by", "kind", "amount"),
    [("route_around", "ablate", None), ("renormalise", "ablate", None), ("bias", "bias", 3.0), ("scale", "scale", 4.0)],
)
def test_experts_of_a_router_share_an_edit(by: Any, kind: str, amount: float | None) -> None:
    ranked = [RankedExpert(1, "mlp", 4, 0.3), RankedExpert(0, "mlp", 2, 0.2), RankedExpert(1, "mlp", 6, 0.1)]
    down = contrast_edits.suppress(ranked, by=by, amount=amount)
    assert [(e.kind, e.layer, e.ids) for e in down] == [(kind, 0, (2,)), (kind, 1, (4, 6))]  # type: ignore[attr-defined]
    if kind == "bias":
        assert {e.value for e in down} == {-3.0}  # type: ignore[attr-defined]
        assert {e.value for e in contrast_edits.stimulate(ranked, by="bias", amount=3.0)} == {3.0}  # type: ignore[attr-defined]
    if kind == "scale":
        assert {e.factor for e in down} == {0.25}  # type: ignore[attr-defined]
        assert {e.factor for e in contrast_edits.stimulate(ranked, by="scale")} == {2.0}  # type: ignore[attr-defined]


def test_sets_of_one_kind_are_not_told_apart_by_their_effects(planted_module: Any, store: Any) -> None:
    model, outside = ms.load(planted_module), 0
    for seed in range(12):
        prompts = _prompts(1, 97, 48, 10 + seed)
        result = contrast(
            model, prompts[:24], prompts[24:], store, name=f"null {seed}", suppress=2, controls=1, draws=200, seed=seed,
            batch_size=24, progress=False,
        )  # fmt: skip
        frame = result.df()
        row = frame[(frame["kind"] == "target") & (frame["set"] == BOTH) & (frame["metric"] == "delta_nll")].iloc[0]
        outside += not row["ci_low"] <= 0 <= row["ci_high"]
    assert (
        outside <= 5
    )  # intervals of twelve prompts a set miss about 8 % of the time: six or more come in 0.3 % of cases


def test_npmi_of_words_chooses_experts_too(planted_module: Any, store: Any) -> None:
    result = contrast(
        ms.load(planted_module), A, B, store, method="npmi", words=",".join(str(i) for i in range(1, SPLIT)), suppress=0,
        stimulate=1, stimulate_by="scale", amount=1.5, controls=1, draws=20, progress=False,
    )  # fmt: skip
    assert any(f"L0·E{PLANTED}" in note for note in result.notes)
    assert any("Stimulated by scale" in note for note in result.notes)


@pytest.mark.parametrize(
    ("sets", "options", "words"),
    [
        (([[1, 2]], B), {}, "too few prompts"),
        (([], B), {}, "too few prompts"),
        (([[1, 2], [1, 2]], B), {}, "too few prompts"),
        ((A, A), {}, "same prompts"),
        ((A, ["text", "more"]), {}, "texts and others token ids"),
        ((A, B), {"labels": ("x", "x")}, "both sets are called"),
        ((A, B), {"suppress": 0}, "nothing is to be"),
        ((A, B), {"suppress": -1}, "nothing is to be"),
        ((A, B), {"controls": 0}, "never shown without its control"),
        ((A, B), {"method": "guess"}, "no method"),
        ((A, B), {"method": "npmi"}, "npmi needs words"),
        ((A, B), {"words": "5"}, "npmi needs words"),
        ((A, B), {"amount": 0.0}, "amount"),
        ((A, B), {"desired": [[]]}, "no continuation"),
        ((A, B), {"desired": ["text"]}, "no tokenizer"),
        ((A, B), {"desired": [[1] * 60], "max_length": 64}, "too long"),
        (([[1], [2]], [[3], [4]]), {}, "is predicted"),
    ],
)
def test_senseless_contrasts_are_refused(
    planted_module: Any, store: Any, sets: tuple[Any, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        contrast(ms.load(planted_module), *sets, store, **{"suppress": 1, "draws": 5, "progress": False, **options})
    assert not store.sql("SELECT * FROM effects").fetchall()


def test_a_dense_model_and_a_taken_name_are_refused(
    tiny_model: Callable[..., Any], planted_module: Any, store: Any
) -> None:
    with pytest.raises(InputError, match="no experts"):
        contrast(ms.load(tiny_model("llama")), A, B, store, progress=False)
    options: dict[str, Any] = {"suppress": 1, "controls": 1, "draws": 5, "progress": False}
    contrast(ms.load(planted_module), A, B, store, **options)
    with pytest.raises(InputError, match="already"):
        contrast(ms.load(planted_module), A, B, store, **options)


def test_halves_keep_equal_prompts_together() -> None:
    found = halved(["x", "x", "y", "z", "w"], ["p", "q", "r"], seed=4)
    chosen, tested = ({d.text for d in part} for part in (found.chosen_on, found.tested_on))
    assert not chosen & tested
    assert chosen | tested == set("xyzwpqr")
    assert {d.label for d in found.tested_on} == {"a", "b"} == {d.label for d in found.chosen_on}
