"""Continued texts: every generated token is recorded once, as plain greedy decoding without a cache would have it.

The truth is brute force: each sequence alone, unpadded, the whole text run again for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.probes.generation import end_ids, fed_before_the_end
from moescope.probes.passes import Passes

LENGTHS = (7, 1, 12, 4, 9)
GENERATED = 6
FAMILIES = [("qwen3_moe", {}), ("olmoe", {}), ("deepseek_v3", {}), ("mixtral", {"sliding_window": 5}), ("gpt2", {})]
DECIDED = "SELECT sequence_id, position, layer, experts, weights, margin FROM routing JOIN tokens USING (run_id, token)"


@dataclass
class Continued:
    """One sequence and its answer: ids of both, NLL and arg-max at each position, decisions by layer."""

    ids: list[int]
    prompt: int
    nll: list[float]
    best: list[int]
    decisions: dict[int, list[tuple[tuple[int, ...], list[float]]]]


def greedily(module: Any, prompt: list[int], tokens: int, ends: tuple[int, ...] = ()) -> Continued:
    """Decode without any cache: run the whole text, take the most likely token, run again."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and not (len(ids) > len(prompt) and ids[-1] in ends):
        with torch.no_grad():
            ids.append(int(module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    seen: dict[int, Any] = {}
    layers = getattr(getattr(module, "model", None), "layers", [])
    experts = {n: layer.mlp.experts for n, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}
    hooks = [
        e.register_forward_pre_hook(lambda _m, given, n=n: seen.update({n: (given[1].tolist(), given[2].tolist())}))
        for n, e in experts.items()
    ]
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    for hook in hooks:
        hook.remove()
    shares = logits.log_softmax(-1)
    nll = [-float(shares[n - 1, ids[n]]) for n in range(1, len(ids))]
    decisions = {n: list(zip(map(tuple, i), w, strict=True)) for n, (i, w) in seen.items()}
    return Continued(ids, len(prompt), nll, logits.argmax(-1).tolist(), decisions)


def assert_recorded(run: Any, truth: list[Continued]) -> None:
    """Tokens in order, once each, with the phases, losses and predictions of the truth."""
    query = """
        SELECT token, sequence_id, position, token_id, phase, nll, predicted_id
        FROM tokens WHERE run_id = ? ORDER BY token
    """
    rows = run.store.fetch(query, [run.run_id])
    expected = [
        (
            number,
            position,
            token,
            "prefill" if position < t.prompt else "decode",
            [None, *t.nll][position],
            t.best[position],
        )
        for number, t in enumerate(truth)
        for position, token in enumerate(t.ids)
    ]
    assert [row[0] for row in rows] == list(range(len(expected)))
    for row, (number, position, token, phase, nll, best) in zip(rows, expected, strict=True):
        assert row[1:5] == (number, position, token, phase)
        assert row[5] == (None if nll is None else pytest.approx(nll, abs=2e-4))
        assert row[6] == best


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_a_continued_text_is_recorded_as_greedy_decoding_without_a_cache_has_it(
    family: str,
    config: dict[str, Any],
    batch_size: int,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    module, prompts = tiny_model(family, **config), token_ids(LENGTHS)
    module.generation_config.eos_token_id = None
    module.config.eos_token_id = None
    truth = [greedily(tiny_model(family, **config), prompt, GENERATED) for prompt in prompts]
    run = record_ids(module, prompts, generate=GENERATED, batch_size=batch_size)
    assert run.status == "complete"
    assert_recorded(run, truth)
    assert run.info["summary"]["generated_tokens"] == GENERATED * len(LENGTHS)
    assert run.info["summary"]["tokens"] == sum(LENGTHS) + GENERATED * len(LENGTHS)
    if family == "gpt2":
        return
    rows = run.store.fetch(DECIDED)
    assert len(rows) == sum(len(d) for t in truth for d in t.decisions.values())
    for sequence, position, layer, experts, weights, margin in rows:
        ids, given = truth[sequence].decisions[layer][position]
        if margin is not None and margin < 1e-4:
            continue
        order = np.lexsort((ids, -np.array(given)))
        assert experts == [ids[n] for n in order]
        assert weights == pytest.approx([given[n] for n in order], rel=1e-3)


def test_token_tables_and_sums_hold_each_generated_token_once(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), generate=GENERATED, batch_size=2, labels=[*"aabba"])
    tokens = sum(LENGTHS) + GENERATED * len(LENGTHS)
    for table in ("routing", "residual"):
        query = f"SELECT token, layer FROM {table}"
        assert sorted(run.store.fetch(query)) == [(token, layer) for token in range(tokens) for layer in (0, 1)]
    query = """
        WITH slots AS (
            SELECT layer, label, phase, unnest(experts)::INTEGER AS expert, unnest(weights) AS weight
            FROM routing JOIN tokens USING (run_id, token) JOIN sequences USING (run_id, sequence_id)
        )
        SELECT layer, label, phase, expert, count(*), sum(weight) FROM slots GROUP BY ALL ORDER BY ALL
    """
    loads = "SELECT layer, label, phase, expert, tokens, weight_sum FROM loads WHERE tokens > 0 ORDER BY ALL"
    counted, summed = run.store.fetch(query), run.store.fetch(loads)
    assert [row[:5] for row in counted] == [row[:5] for row in summed]
    assert [row[5] for row in counted] == pytest.approx([row[5] for row in summed], rel=1e-6)
    assert {row[2] for row in summed} == {"prefill", "decode"}
    by_expert = "SELECT layer, expert, sum(tokens), sum(weight_sum) FROM loads GROUP BY ALL ORDER BY ALL"
    experts = "SELECT layer, expert, tokens, weight_sum FROM experts ORDER BY ALL"
    for (*key, n, weight), row in zip(run.store.fetch(by_expert), run.store.fetch(experts), strict=True):
        assert (*key, n) == row[:3]
        assert weight == pytest.approx(row[3], rel=1e-6)
    assert run.store.fetch("SELECT sum(tokens) FROM batches") == [(tokens,)]
    assert run.store.fetch("SELECT n_tokens FROM sequences ORDER BY sequence_id") == [(n,) for n in LENGTHS]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_sequence_ends_with_its_end_token_and_the_others_go_on(
    batch_size: int, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    prompts = token_ids(LENGTHS)
    free = [greedily(tiny_model("qwen3_moe"), prompt, GENERATED) for prompt in prompts]
    # A token that ends one answer early and is missing in another.
    answers = [t.ids[t.prompt :] for t in free]
    end = next(a[1] for a in answers if a[1] != a[0] and any(a[1] not in other for other in answers))
    module = tiny_model("qwen3_moe")
    module.generation_config.eos_token_id = [end, 96]
    truth = [greedily(tiny_model("qwen3_moe"), prompt, GENERATED, (end, 96)) for prompt in prompts]
    lengths = {len(t.ids) - t.prompt for t in truth}
    assert min(lengths) < GENERATED
    assert max(lengths) == GENERATED
    run = record_ids(module, prompts, generate=GENERATED, batch_size=batch_size)
    assert run.status == "complete"
    assert_recorded(run, truth)
    for table in ("routing", "residual"):
        assert run.rows(table) == 2 * sum(len(t.ids) for t in truth)


def test_generation_stops_once_every_sequence_of_a_batch_has_ended(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module, prompts = tiny_model("qwen3_moe"), token_ids(LENGTHS)
    module.generation_config.eos_token_id = list(range(97))  # whatever comes first is the end
    passes = []
    module.register_forward_hook(lambda *_: passes.append(1))
    run = record_ids(module, prompts, generate=40, batch_size=5)
    assert run.status == "complete"
    assert run.info["summary"]["generated_tokens"] == len(LENGTHS)
    assert len(passes) < 20


def test_the_models_own_settings_for_sampling_and_penalties_are_left_out_and_kept(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module, prompts = tiny_model("qwen3_moe"), token_ids(LENGTHS)
    own = module.generation_config
    own.update(do_sample=True, temperature=3.0, top_k=50, repetition_penalty=50.0, num_beams=1, min_length=9)
    own.eos_token_id = None
    before = own.to_dict()
    truth = [greedily(tiny_model("qwen3_moe"), prompt, GENERATED) for prompt in prompts]
    assert_recorded(record_ids(module, prompts, generate=GENERATED), truth)
    assert module.generation_config is own
    assert own.to_dict() == before


def test_prompts_leave_room_for_the_answer_in_the_models_context(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("gpt2"), token_ids((64, 10)), generate=20)
    assert run.status == "complete"
    assert run.info["settings"]["max_length"] == 44
    ((longest,),) = run.store.fetch("SELECT max(position) FROM tokens")
    assert longest == 63
    with pytest.raises(ms.InputError, match="no room for so long an answer"):
        record_ids(tiny_model("gpt2"), token_ids((5,)), generate=63, name="other")


def test_a_model_that_cannot_generate_is_refused_before_a_run_is_entered(
    store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe")
    module.can_generate = lambda: False
    with pytest.raises(ms.InputError, match=r"cannot continue texts.*cannot generate"):
        record_ids(module, token_ids(LENGTHS), generate=2)
    failing = tiny_model("qwen3_moe")

    def broken(*_args: Any, **_named: Any) -> Any:
        raise ValueError("no decoding here")

    failing.generate = broken
    with pytest.raises(ms.InputError, match="its generate fails: ValueError: no decoding here"):
        record_ids(failing, token_ids(LENGTHS), generate=2)
    assert store.runs() == []


def test_a_model_without_a_cache_is_refused(
    store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe")
    plain = module.prepare_inputs_for_generation

    def whole_text_again(ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs |= {"next_sequence_length": None, "past_key_values": None, "use_cache": False}
        return plain(ids, attention_mask=attention_mask, **kwargs)

    module.prepare_inputs_for_generation = whole_text_again
    with pytest.raises(ms.InputError, match="it has no cache"):
        record_ids(module, token_ids(LENGTHS), generate=2)
    assert store.runs() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"generate": -1}, "number of tokens"), ({"generate": 2, "padding": "right"}, "padded at the left")],
)
def test_requests_that_make_no_sense_are_refused(
    options: dict[str, Any],
    message: str,
    store: Any,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    with pytest.raises(ms.InputError, match=message):
        record_ids(tiny_model("llama"), token_ids((3,)), **options)
    assert store.runs() == []


def test_a_tap_that_is_silent_while_decoding_is_a_gap_with_its_reason(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """As where the model computes its experts another way, past their hooks, once single tokens come."""
    module = tiny_model("qwen3_moe")
    block = module.model.layers[1].mlp
    plain = block.forward

    def another_way(hidden: Any) -> Any:
        if hidden.shape[1] > 1:
            return plain(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(rows)
        return block.experts.forward(rows, ids, weights).reshape(hidden.shape)

    block.forward = another_way
    run = record_ids(module, token_ids(LENGTHS), generate=3, batch_size=5, probes=("routing",))
    assert run.status == "incomplete"
    gaps = {row["site"]: row for row in run.coverage.table.to_pylist() if row["status"] != "complete"}
    row = gaps["blocks.1.mlp.hook_expert_indices"]
    assert row["status"] == "short"
    assert row["expected"] - row["recorded"] == 2 * 3 * len(LENGTHS)
    assert "did not fire in 3 of 3 decode passes" in row["detail"]
    assert not [site for site in gaps if site.startswith("blocks.0.")]


def test_generated_tokens_that_no_pass_was_seen_to_feed_are_missing_in_the_ledger(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was generated is counted from what `generate` gives back, not from the passes that were seen."""
    seen = Passes._enter

    def overlooking(self: Any, batch: Any, ids: Any, mask: Any) -> None:
        seen(self, batch, ids, mask)
        if len(self._done) == 2:
            self._step.mask = torch.zeros_like(self._step.mask)

    monkeypatch.setattr(Passes, "_enter", overlooking)
    run = record_ids(tiny_model("llama"), token_ids(LENGTHS), generate=4)
    row = next(r for r in run.coverage.table.to_pylist() if r["site"] == "tokens")
    assert row["status"] == "short"
    assert row["expected"] - row["recorded"] == len(LENGTHS)


def test_which_tokens_belong_to_an_answer() -> None:
    ends = torch.tensor([1, 2])
    ids = torch.tensor([[5, 1, 1], [5, 5, 5], [2, 5, 1], [5, 5, 2]])
    assert fed_before_the_end(ids, ends).tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert fed_before_the_end(ids, torch.tensor([], dtype=torch.int64)).all()


def test_end_tokens_come_from_the_first_that_names_any(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("llama")
    model = ms.load(module)
    module.generation_config.eos_token_id, module.config.eos_token_id = [3, 4], 5
    assert end_ids(model) == (3, 4)
    module.generation_config.eos_token_id = None
    assert end_ids(model) == (5,)
    module.config.eos_token_id = None
    assert end_ids(model) == ()
