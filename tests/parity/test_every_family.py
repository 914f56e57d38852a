"""Every family with experts, in tiny form: what is recorded is what its experts were given, to the bit.

The truth is noted by hand on a plain forward pass of the same padded batch: by wrapping what is called with experts' ids, or,
for the families that call nothing of the kind, by following their published code on the tensors that do pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.probes.families.tiny import ENCODER_DECODER_TYPES, build_tiny, moe_model_types

LENGTHS = (11, 5, 18)
# Their routing of a token depends on what else is in the batch: doge's logits mix tokens, NLLB's capacity counts them.
BATCH_DEPENDENT = {"doge", "nllb-moe"}
Slots = list[list[tuple[int, float]]]


@functools.cache
def tiny(family: str) -> Any:
    return build_tiny(family)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`recorded(family, batch_size=3, name=…)`: a run over three sequences, made once."""
    folder = tmp_path_factory.mktemp("families")
    runs: dict[Any, Any] = {}

    def run(family: str, batch_size: int = 3, name: str = "first") -> Any:
        key = family, batch_size, name
        if key not in runs:
            store = ms.Store(folder / f"{family}-{batch_size}-{name}.duckdb")
            corpus = ms.Corpus.from_token_ids(sequences())
            runs[key] = ms.record(
                ms.load(tiny(family)), corpus, store, name=name, batch_size=batch_size, progress=False
            )
        return runs[key]

    yield run
    for made in runs.values():
        made.store.close()


def sequences() -> list[list[int]]:
    random = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (n,), generator=random).tolist() for n in LENGTHS]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    rows = sequences()
    width = max(LENGTHS)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), mask


def plain_forward(module: Any, side: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given) -> Any:
    ids, mask = padded()
    given = side({"input_ids": ids, "attention_mask": mask, "use_cache": False})
    with torch.no_grad():
        return module(**given).logits


def both_sides(given: dict[str, Any]) -> dict[str, Any]:
    """An encoder-decoder model reads the same text on both sides."""
    return given | {"decoder_input_ids": given["input_ids"], "decoder_attention_mask": given["attention_mask"]}


def noting(module: Any, note: Callable[..., None]) -> Callable[[], None]:
    """Put `note(*arguments, output)` around a module's `forward`; gives the undoing."""
    plain = module.forward

    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = [a.clone() if isinstance(a, torch.Tensor) else a for a in [*args, *kwargs.values()]]
        out = plain(*args, **kwargs)
        note(*given, out)
        return out

    module.forward = wrapper
    return lambda: delattr(module, "forward")


def real_rows() -> torch.Tensor:
    return padded()[1].flatten().bool()


def slots(ids: torch.Tensor, weights: torch.Tensor) -> Slots:
    """Slots of the unmasked tokens, weight descending, ties by lower id."""
    width = ids.shape[-1]
    rows = zip(
        ids.reshape(-1, width)[real_rows()].tolist(),
        weights.reshape(-1, width).float()[real_rows()].tolist(),
        strict=True,
    )
    return [sorted(zip(*row, strict=True), key=lambda slot: (-slot[1], slot[0])) for row in rows]


def stored(run: Any, layer: int, block: str) -> Slots:
    query = "SELECT experts, weights FROM routing WHERE run_id = ? AND layer = ? AND block = ? ORDER BY token"
    return [list(zip(*row, strict=True)) for row in run.store.fetch(query, [run.run_id, layer, block])]


def given_to_experts(module: Any) -> dict[str, Slots]:
    """Name of every module called with (hidden states, expert ids, weights) → the slots it was given."""
    given: dict[str, Slots] = {}
    undo = []
    for name, experts in module.named_modules():
        takes = list(inspect.signature(experts.forward).parameters)
        if type(experts).__name__.endswith("Experts") and len(takes) >= 3:
            undo.append(
                noting(experts, lambda _h, ids, weights, _out, name=name: given.update({name: slots(ids, weights)}))
            )
    plain_forward(module)
    for step in undo:
        step()
    return given


@pytest.mark.parametrize("family", sorted({*moe_model_types()} - {"doge", "jetmoe", "llama4_text", "zaya"}))
def test_what_the_experts_are_given_is_recorded(family: str, recorded: Callable[..., Any]) -> None:
    run = recorded(family)
    assert run.status == "complete", [r for r in run.coverage.table.to_pylist() if r["status"] != "complete"]
    given = given_to_experts(tiny(family))
    routers = ms.load(tiny(family)).anatomy.moe
    assert {s.experts_path for s in routers} == set(given)
    for s in routers:
        assert stored(run, s.layer, s.block) == given[str(s.experts_path)]
        assert {len(row) for row in given[str(s.experts_path)]} == {s.top_k}


def test_llama4_scores_that_scale_the_experts_inputs_are_recorded(recorded: Callable[..., Any]) -> None:
    run, module = recorded("llama4_text"), tiny("llama4_text")
    assert run.status == "complete"
    for s in ms.load(module).anatomy.moe:
        owner, seen = module.get_submodule(s.path), {}
        undo = [
            noting(owner, lambda hidden, _out, seen=seen: seen.update(hidden=hidden.reshape(-1, hidden.shape[-1]))),
            noting(owner.experts, lambda scaled, _out, seen=seen: seen.update(scaled=scaled)),
        ]
        plain_forward(module)
        [step() for step in undo]
        scaled = seen["scaled"].reshape(s.n_experts, -1, seen["hidden"].shape[-1])
        factor = torch.einsum("eth,th->te", scaled, seen["hidden"]) / seen["hidden"].square().sum(-1, keepdim=True)
        for token, (row, truth) in enumerate(zip(stored(run, s.layer, s.block), factor[real_rows()], strict=True)):
            assert {expert for expert, _ in row} == set(truth.nonzero().flatten().tolist()), token
            assert [w for _, w in row] == pytest.approx([float(truth[e]) for e, _ in row], rel=1e-4)


def test_both_gatings_of_jetmoe_are_recorded(recorded: Callable[..., Any]) -> None:
    run, module = recorded("jetmoe"), tiny("jetmoe")
    assert run.status == "complete"
    routers = ms.load(module).anatomy.moe
    assert {s.block for s in routers} == {"mlp", "attn"}
    for s in routers:
        seen: list[torch.Tensor] = []
        undo = noting(module.get_submodule(f"{s.router_path}.layer"), lambda _hidden, out, seen=seen: seen.append(out))
        plain_forward(module)
        undo()
        top, ids = seen[0].float().topk(s.top_k or 0, dim=1)
        assert stored(run, s.layer, s.block) == slots(ids, top.softmax(-1))


def test_experts_looked_up_by_doge_are_recorded(recorded: Callable[..., Any]) -> None:
    run, module = recorded("doge"), tiny("doge")
    assert run.status == "complete"
    for s in ms.load(module).anatomy.moe:
        owner, seen = module.get_submodule(s.path), {}
        undo = [
            noting(owner.router_gate, lambda _hidden, out, seen=seen: seen.update(logits=out)),
            noting(owner.down_embed, lambda ids, _out, seen=seen: seen.update(ids=ids)),
        ]
        plain_forward(module)
        [step() for step in undo]
        ids, keys = seen["ids"], owner.num_keys
        first, second = seen["logits"].view(2, len(ids), -1)
        scores = torch.stack([first[t, ids[t] // keys] + second[t, ids[t] % keys] for t in range(len(ids))])
        weights = scores.softmax(-1)
        weights = weights / weights.sum(-1, keepdim=True) if owner.norm_topk_prob else weights
        assert stored(run, s.layer, s.block) == slots(ids, weights)


def test_zayas_class_for_no_expert_is_a_null_expert(recorded: Callable[..., Any]) -> None:
    run, module = recorded("zaya"), tiny("zaya")
    assert run.status == "complete"
    skipped = 0
    for s in ms.load(module).anatomy.moe:
        gate, seen = module.get_submodule(str(s.router_path)), []
        undo = noting(gate, lambda *given, seen=seen: seen.append(given[-1][0]))
        plain_forward(module)
        undo()
        shares = seen[0].softmax(-1)
        ids = (shares + gate.balancing_biases).argmax(-1, keepdim=True)
        weights = torch.where(ids == s.n_experts, 0, shares.gather(-1, ids))
        assert stored(run, s.layer, s.block) == slots(ids, weights)
        skipped += int((ids == s.n_experts).sum())
        assert s.n_null == 1
    assert skipped


@pytest.mark.parametrize("family", ENCODER_DECODER_TYPES)
def test_experts_of_encoder_and_decoder_run_on_as_many_tokens_as_recorded(
    family: str, recorded: Callable[..., Any]
) -> None:
    run, module = recorded(family), tiny(family)
    assert run.status == "complete", [r for r in run.coverage.table.to_pylist() if r["status"] != "complete"]
    routers = [s for s in ms.load(module).anatomy.moe if s.experts_path and s.reader != "shares_of_two"]
    assert {s.stack for s in routers} == {"encoder", "decoder"}
    ran: dict[tuple[str, int], int] = {}
    undo = []
    for s in routers:
        for number in range(s.n_experts or 0):
            expert = module.get_submodule(f"{s.experts_path}.expert_{number}")
            undo.append(noting(expert, lambda rows, _out, key=(s.path, number): ran.update({key: len(rows)})))
    ids, mask = padded()
    # One sequence without padding, so that every row an expert sees is a token.
    row = ids[2:3], mask[2:3]
    assert bool(row[1].all())
    with torch.no_grad():
        module(input_ids=row[0], attention_mask=row[1], decoder_input_ids=row[0], decoder_attention_mask=row[1])
    [step() for step in undo]
    one = ms.record(
        ms.load(module),
        ms.Corpus.from_token_ids([sequences()[2]]),
        run.store,
        name="one",
        probes=["routing"],
        progress=False,
    )
    for s in routers:
        found = stored(one, s.layer, s.block)
        for number in range(s.n_experts or 0):
            seen = ran.get((s.path, number), 0)
            chosen = sum(number in (e for e, _ in slots_of) for slots_of in found)
            if s.reader == "mask_as_ids" and number == 0:
                # Expert 0 runs on a token once for every 0 of its mask: at least n_experts - 1 times.
                assert chosen == len(found)
                assert seen >= len(found) * ((s.n_experts or 0) - 1)
            else:
                assert chosen == seen


@pytest.mark.parametrize("family", [*moe_model_types(), *ENCODER_DECODER_TYPES])
def test_taps_leave_every_familys_logits_identical(family: str) -> None:
    from moescope.probes.taps import sites_of, tapped

    module = tiny(family)
    live = ms.load(module)
    side = both_sides if family in ENCODER_DECODER_TYPES else dict
    plain = plain_forward(module, side)
    seen: dict[Any, int] = {}
    sites = sites_of(module, live.anatomy)
    with tapped(module, live.anatomy, sites, lambda site, _tensors: seen.update({site: seen.get(site, 0) + 1})):
        under_taps = plain_forward(module, side)
    assert torch.equal(plain, under_taps)
    assert torch.equal(plain, plain_forward(module, side))
    assert seen == dict.fromkeys(sites, 1)


@pytest.mark.parametrize("family", [*moe_model_types(), *ENCODER_DECODER_TYPES])
def test_two_runs_of_a_family_give_the_same_rows(family: str, recorded: Callable[..., Any]) -> None:
    runs = [recorded(family), recorded(family, name="second")]
    query = "SELECT * EXCLUDE run_id FROM routing WHERE run_id = ? ORDER BY layer, block, token"
    rows = [run.store.fetch(query, [run.run_id]) for run in runs]
    assert rows[0] == rows[1]
    assert len(rows[0]) == sum(LENGTHS) * len(ms.load(tiny(family)).anatomy.moe)


@pytest.mark.parametrize("family", sorted({*moe_model_types(), *ENCODER_DECODER_TYPES} - BATCH_DEPENDENT))
def test_batch_size_changes_no_clear_decision(family: str, recorded: Callable[..., Any]) -> None:
    query = """
        SELECT list_sort(experts), margin FROM routing JOIN tokens USING (run_id, token)
        WHERE run_id = ? ORDER BY layer, block, sequence_id, position
    """
    runs = [recorded(family, size) for size in (1, 3, 8)]
    rows = [run.store.fetch(query, [run.run_id]) for run in runs]
    compared = 0
    for one, *others in zip(*rows, strict=True):
        if one[1] is None or one[1] > 1e-4:
            assert all(other[0] == one[0] for other in others)
            compared += 1
    assert compared > 0.9 * len(rows[0])
