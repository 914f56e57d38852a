"""What the protocols for heads leave in a store: a run with its ledger, rows of heads, and what failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import moescope as ms
from moescope.core.edit_kinds.stream import MaskHead
from moescope.core.errors import InputError, RunError
from moescope.core.intervention import Intervention
from moescope.probes.edits.session import edited
from moescope.probes.phenomena.head_masking import mask_heads
from moescope.probes.phenomena.head_masking_effects import store_masking
from moescope.probes.phenomena.head_roles import head_roles
from moescope.probes.phenomena.induction import INDUCTION, NULL, induction_heads
from moescope.probes.phenomena.needle_prompts import NeedlePrompt
from moescope.probes.phenomena.retrieval import GIVEN, SCORE, retrieval_heads
from moescope.store.store import Store


def prompts(count: int = 3) -> list[NeedlePrompt]:
    random = np.random.default_rng(0)
    return [NeedlePrompt(tuple(random.integers(2, 90, 30).tolist()), (5, 12), number=n) for n in range(count)]


def test_heads_in_the_store_are_those_that_were_returned(tiny_model: Callable[..., Any], store: Store) -> None:
    model = ms.load(tiny_model("qwen3_moe"))
    found = induction_heads(model, segment=8, repeats=3, draws=3, store=store, run_name="repeats")
    run = store.run("repeats")
    assert run.complete
    assert found.run is not None
    table = run.table("heads").df()
    assert len(table) == len(found.metrics) * 2 * 4
    mine = table[table["metric"] == INDUCTION].sort_values(["layer", "head"])
    assert mine["value"].to_numpy() == pytest.approx(found.value(INDUCTION), abs=1e-6)
    assert set(mine["n"]) == {3 * 16}
    assert set(table["condition"]) == {"base"}
    coverage = run.coverage.df().set_index("site")
    assert coverage.loc["sequences", "recorded"] == 3
    assert coverage.loc["head_sequences", "recorded"] == 3 * 2 * len(found.metrics)
    sequences = run.table("sequences").df()
    assert sequences["n_tokens"].tolist() == [24] * 3
    frame = ms.analyze(run, "induction_heads").df()
    analysed = frame[frame["metric"] == INDUCTION].sort_values(["layer", "head"])
    assert analysed["value"].to_numpy() == pytest.approx(found.value(INDUCTION), abs=1e-6)
    assert analysed["null"].to_numpy() == pytest.approx(found.value(NULL), abs=1e-6)
    assert analysed["key_value_head"].tolist() == [0, 0, 1, 1] * 2
    mine = found.df()
    mine = mine[mine["metric"] == INDUCTION].sort_values(["layer", "head"])
    assert analysed[["ci_low", "ci_high"]].to_numpy() == pytest.approx(mine[["ci_low", "ci_high"]].to_numpy(), abs=1e-6)


def test_withheld_scores_are_not_in_the_store_and_every_trial_is(tiny_model: Callable[..., Any], store: Store) -> None:
    model = ms.load(tiny_model("llama"))
    found = retrieval_heads(model, prompts=prompts(), steps=4, store=store, run_name="needles", progress=False)
    run = store.run("needles")
    assert run.complete
    assert SCORE in found.withheld
    assert {row[0] for row in run.table("heads").project("metric").fetchall()} == {
        GIVEN,
        "even choice of key, answer given",
    }
    facts = [json.loads(text) for (text,) in run.table("sequences").project("metadata").fetchall()]
    assert [fact["span"] for fact in facts] == [[5, 12]] * 3
    assert run.info["summary"]["counted_trials"] == 0
    assert ms.analyze(run, "retrieval_heads").title.startswith("No retrieval score: 0 of 3 trials counted")


def test_a_name_that_is_taken_is_refused_before_anything_runs(tiny_model: Callable[..., Any], store: Store) -> None:
    model = ms.load(tiny_model("llama"))
    head_roles(model, ms.Corpus.from_token_ids([[3, 4, 5, 6]]), store=store, run_name="roles")
    with pytest.raises(InputError, match="already has a run called 'roles'"):
        head_roles(model, ms.Corpus.from_token_ids([[3, 4, 5, 6]]), store=store, run_name="roles")
    assert [run.name for run in store.runs()] == ["roles"]


def test_a_protocol_that_breaks_leaves_a_failed_run_without_rows(
    tiny_model: Callable[..., Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ms.load(tiny_model("llama"))
    seen = []

    def break_down(*_: Any, **__: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            raise MemoryError("no room")
        return np.zeros(8)

    monkeypatch.setattr("moescope.probes.phenomena.retrieval.run_trial", break_down)
    with pytest.raises(RunError, match="out of memory"):
        retrieval_heads(model, prompts=prompts(), steps=4, store=store, run_name="broken", progress=False)
    run = store.run("broken")
    assert run.status == "failed"
    assert run.rows("heads") == run.rows("sequences") == 0
    assert "no room" in run.coverage.df().to_string()


def test_masks_leave_nothing_behind_and_give_the_same_answers_twice(tiny_model: Callable[..., Any]) -> None:
    import torch

    model = ms.load(tiny_model("llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model.module(input_ids=ids).logits
    one = mask_heads(model, [(0, "attn", 1), (1, "attn", 2)], prompts(), steps=3, progress=False)
    two = mask_heads(model, [(0, "attn", 1), (1, "attn", 2)], prompts(), steps=3, progress=False)
    with torch.no_grad():
        assert torch.equal(before, model.module(input_ids=ids).logits)
    assert one.controls == two.controls
    assert all(np.array_equal(one.sums[name], two.sums[name]) for name in one.sums)


def test_answers_under_masks_are_those_of_even_attention_in_decode_steps(tiny_model: Callable[..., Any]) -> None:
    """NLL of the given answer by hand: the prompt runs plain, then the masked head's output is the mean of its values."""
    import torch

    module = tiny_model("gpt2")
    model = ms.load(module)
    prompt = prompts(1)[0]
    found = mask_heads(model, [(1, "attn", 2)], [prompt], steps=2, draws=5, progress=False)
    answer = list(prompt.ids[slice(*prompt.span)])
    whole = [*prompt.ids, *answer]
    at = len(prompt.ids) - 1
    width = module.config.n_embd // module.config.n_head
    attention = module.transformer.h[1].attn

    def even(_module: Any, inputs: tuple[Any, ...]) -> Any:
        z = inputs[0].clone()
        values = seen["v"]
        for q in range(at, len(whole)):
            z[0, q, 2 * width : 3 * width] = values[0, : q + 1].mean(0)
        return (z,)

    seen: dict[str, Any] = {}

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        start = 2 * module.config.n_embd + 2 * width
        seen["v"] = output[..., start : start + width]

    handles = [attention.c_attn.register_forward_hook(keep), attention.c_proj.register_forward_pre_hook(even)]
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([whole]), use_cache=False).logits[0].double()
    for handle in handles:
        handle.remove()
    expected = [-logits[at + i].log_softmax(-1)[token].item() for i, token in enumerate(answer)]
    assert found.sums["answer NLL"][1, 0] == pytest.approx(sum(expected), abs=1e-3)
    assert abs(found.sums["answer NLL"][0, 0] - sum(expected)) > 1e-2, "the mask does something"


def test_masking_is_stored_as_an_effect_on_the_run_of_its_trials(tiny_model: Callable[..., Any], store: Store) -> None:
    model = ms.load(tiny_model("llama"))
    given = prompts(4)
    retrieval_heads(model, prompts=given, steps=3, store=store, run_name="needles", progress=False)
    masked = mask_heads(model, [(0, "attn", 1), (1, "attn", 2)], given, steps=3, progress=False)
    run = store.run("needles")
    with pytest.raises(InputError, match="not of these prompts"):
        store_masking(masked, given[::-1], run)
    effect_id = store_masking(masked, given, run)
    rows = store.sql("SELECT * FROM effects WHERE effect_id = ?", [effect_id]).df()
    assert len(rows[rows["kind"] == "control"]) == 5 * 4
    target = rows[(rows["kind"] == "target") & (rows["metric"] == "delta_nll")].iloc[0]
    sums = masked.sums["answer NLL"]
    assert target["value"] == pytest.approx((sums[1] - sums[0]).sum() / 28)
    assert target["ci_low"] <= target["value"] <= target["ci_high"]
    again = store.sql(
        "SELECT sum(sum) / sum(n) FROM effect_sequences WHERE metric = 'delta_nll' AND kind = 'target'"
    ).fetchall()
    assert again[0][0] == pytest.approx(target["value"])
    assert ms.analyze(run, "effect").df()["kind"].unique().tolist() == ["target", "control", "difference"]


def test_scores_of_an_edited_model_say_so(tiny_model: Callable[..., Any], store: Store) -> None:
    model = ms.load(tiny_model("llama"))
    cut = Intervention([MaskHead(layer=1, heads=2, how="uniform")], name="without L1·H2")
    plain = induction_heads(model, segment=8, repeats=3, draws=2)
    with edited(model, cut):
        found = induction_heads(model, segment=8, repeats=3, draws=2, store=store, run_name="cut")
    run = store.run("cut")
    assert {row[0] for row in run.table("heads").project("condition").fetchall()} == {"without L1·H2"}
    assert run.info["intervention"]["name"] == "without L1·H2"
    masked = found.value(INDUCTION)[4 + 2]
    assert masked == pytest.approx(np.mean([(i // 8) / (i + 1) for i in range(8, 24)]), abs=1e-5)
    assert masked != pytest.approx(plain.value(INDUCTION)[4 + 2], abs=1e-3)
    row = ms.analyze(run, "induction_heads").df().query("metric == 'induction' and layer == 1 and head == 2").iloc[0]
    assert row["value"] == pytest.approx(masked, abs=1e-6)
    with edited(model, [Intervention(), cut]) as session:
        session.assign([1])
        same = induction_heads(model, segment=8, repeats=3, draws=2)
        assert same.value(INDUCTION) == pytest.approx(found.value(INDUCTION))
        assert same.metrics[INDUCTION].condition == "edited"
        with pytest.raises(InputError, match="under one intervention"):
            induction_heads(model, segment=8, repeats=3, draws=2, store=store, run_name="several")
