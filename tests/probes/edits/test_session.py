"""A session: rows of one batch under different interventions, numbers changed in place, caches, threads, taps, faults."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moescope as ms
import moescope.edits as e
from moescope.core.errors import InputError, RunError
from moescope.core.sites import EXPERT_INDICES, EXPERT_WEIGHTS, MLP_OUT, RESID_POST, Site
from moescope.probes.edits.checks import check_intervention
from moescope.probes.edits.router_rules import rules_of
from moescope.probes.edits.session import edited
from moescope.probes.taps import tapped

CUTS = [
    e.Intervention(),
    e.Intervention([e.Ablate(experts=[1])]),
    e.Intervention([e.Ablate(experts=[2, 4], layer=1)]),
    e.Intervention([e.Ablate(experts=[3], how="route_around")]),
    e.Intervention([e.Keep(experts=range(5)), e.Scale(experts=[2], factor=2.0)]),
    e.Intervention([e.TopK(k=1)]),
    e.Intervention([e.TopK(k=4, positions="2:6")]),
    e.Intervention([e.RankRouting(ranks=[2, 3, 5])]),
    e.Intervention([e.Force(experts=[6]), e.Bias(experts=[1], value=1.0)]),
    e.Intervention([e.RandomRouting(seed=1)]),
    e.Intervention([e.SwapExperts(first=0, second=3), e.Ablate(experts=0, how="copy")]),
    e.Intervention([e.MixRouting(reference=[0.125] * 8, share=0.5, positions="0:3")]),
    e.Intervention([e.TopP(p=0.3), e.Ablate(experts=1, how="renormalise")]),
    e.Intervention([e.Add(vector=[0.2] * 32, layer=0), e.MaskHead(heads=1)]),
]


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return ms.load(tiny_model("qwen3_moe"))


def ids_of(rows: int, positions: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, 97, (rows, positions), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model.module(input_ids=ids, attention_mask=mask.long(), use_cache=False, **more).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_rows_of_one_batch_are_as_each_alone(tiny_model: Callable[..., Any], family: str) -> None:
    model, ids = ms.load(tiny_model(family)), ids_of(len(CUTS))
    with edited(model, CUTS) as session:
        session.assign(range(len(CUTS)))
        together = run(model, ids)
    plain = run(model, ids)
    for number, cut in enumerate(CUTS):
        with model.edited(cut):
            alone = run(model, ids[number, None])
        torch.testing.assert_close(together[number, None], alone, atol=1e-5, rtol=1e-5)
        moved = (alone - plain[number, None]).abs().max()
        assert moved < 1e-5 if number == 0 else moved > 1e-3, cut


def test_many_interventions_of_one_kind_are_one_step(model: Any) -> None:
    cuts = [e.Intervention([e.Ablate(layer=i % 2, experts=i % 8)]) for i in range(40)]
    mixed = e.Intervention(
        [e.Ablate(layer=i % 2, experts=x, strength=s) for i, (x, s) in enumerate([(1, 1), (2, 0.5)] * 6)]
    )
    for interventions in (cuts, [mixed]):
        with edited(model, interventions) as session:
            assert [len(columns) for columns in session._program.spots.values()] == [1, 1]


def test_an_update_changes_numbers_where_they_lie(model: Any) -> None:
    ids = ids_of(2)
    first = e.Intervention([e.Ablate(experts=[1]), e.Bias(experts=[2], value=1.0), e.Add(vector=[0.1] * 32)])
    then = e.Intervention(
        [e.Ablate(experts=[4, 5], strength=0.5), e.Bias(experts=[0], value=-2.0), e.Add(vector=[-0.1] * 32)]
    )
    with edited(model, then):
        expected = run(model, ids)
    with edited(model, first) as session:
        before = run(model, ids)
        hooks = [dict(m._forward_pre_hooks) for m in model.module.modules()]
        tables = [
            column.step.table
            for columns in session._program.spots.values()
            for column in columns
            if hasattr(column.step, "table")
        ]
        places = [table.data_ptr() for table in tables]
        session.update(then)
        assert torch.equal(run(model, ids), expected)
        assert [dict(m._forward_pre_hooks) for m in model.module.modules()] == hooks
        assert [table.data_ptr() for table in tables] == places
        session.update(first)
        assert torch.equal(run(model, ids), before)
        session.update(e.Intervention())
        inside = run(model, ids)
    assert torch.equal(inside, run(model, ids))


def test_an_update_of_another_kind_is_refused_and_changes_nothing(model: Any) -> None:
    ids = ids_of(2)
    with edited(model, e.Intervention([e.Ablate(layer=0, experts=[1])])) as session:
        before = run(model, ids)
        for other in (
            [e.Ablate(layer=1, experts=[1])],
            [e.Scale(layer=0, experts=[1])],
            [e.Ablate(layer=0, experts=[1]), e.Scale(layer=0, experts=1)],
        ):
            with pytest.raises(InputError, match="numbers only"):
                session.update(e.Intervention(other))
        with pytest.raises(InputError, match="no expert 99"):
            session.update(e.Intervention([e.Ablate(layer=0, experts=[99])]))
        with pytest.raises(InputError, match="at most 1"):
            session.update(e.Intervention(), e.Intervention())
        assert torch.equal(run(model, ids), before)


def test_rows_must_be_assigned_to_what_is_there(model: Any) -> None:
    with edited(model, CUTS[:2]) as session:
        with pytest.raises(InputError, match="no such intervention"):
            session.assign([0, 2])
        session.assign([0, 1, 1])
        with pytest.raises(RunError, match="3 rows"):
            run(model, ids_of(2))
        session.assign([1, 0])
        torch.testing.assert_close(run(model, ids_of(2))[1], run_plainly(model, ids_of(2))[1], atol=1e-5, rtol=1e-5)


def run_plainly(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """In another thread, whose passes no session edits."""
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(run(model, ids)))
    thread.start()
    thread.join()
    return found[0]


def test_only_the_thread_that_entered_is_edited(model: Any) -> None:
    ids = ids_of(2)
    plain = run(model, ids)
    with model.edited(e.Intervention([e.Ablate(experts=[1]), e.Add(vector=[1.0] * 32), e.MaskHead(heads=0)])):
        assert not torch.equal(run(model, ids), plain)
        assert torch.equal(run_plainly(model, ids), plain)


def test_one_session_at_a_time(model: Any) -> None:
    plain = run(model, ids_of(1))
    with model.edited(CUTS[1]):
        ours = run(model, ids_of(1))
        with pytest.raises(InputError, match="already being edited"), model.edited(CUTS[2]):
            pass
        assert torch.equal(run(model, ids_of(1)), ours)
    assert torch.equal(run(model, ids_of(1)), plain)
    with pytest.raises(InputError, match="at least one"), edited(model, []):
        pass


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "0:1", "3:", "2:9", "token:7"])
@pytest.mark.parametrize("where", ["experts", "stream"])
def test_edits_act_at_their_positions_padded_cached_or_not(model: Any, positions: str, where: str) -> None:
    """The decisions (or streams) of layer 0 change at exactly those tokens; with a cache the logits are those without."""
    lengths, width, prompt = (12, 8), 12, 6
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 9, (n,), generator=random) for n in lengths]  # few ids: some are 7
    ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    place = (mask.long().cumsum(-1) - 1).clamp(min=0)
    edit: e.Edit = e.SwapExperts(layer=0, positions=positions, first=0, second=1)
    site = Site(0, "mlp", EXPERT_WEIGHTS)
    if where == "experts":
        edit = e.Scale(layer=0, experts=range(8), factor=3.0, positions=positions)
    else:
        edit, site = e.Add(layer=0, vector=[1.0] * 32, positions=positions), Site(0, "", RESID_POST)

    def passes() -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt of six columns, and each further column by itself, with the cache."""
        kept: list[torch.Tensor] = []
        logits, cache = [], None

        def receive(_: Site, tensors: dict[str, torch.Tensor]) -> None:
            (found,) = (t for name, t in tensors.items() if name in ("weights", "resid"))
            kept.append(found.reshape(2, -1, found.shape[-1]).clone())

        with torch.no_grad(), tapped(model.module, model.anatomy, [site], receive):
            for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, width))]:
                out = model.module(
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop].long(),
                    position_ids=place[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                logits.append(out.logits)
        return torch.cat(kept, 1), torch.cat(logits, 1)

    plain, _ = passes()
    with edited(model, e.Intervention([edit])):
        ours, cached = passes()
        whole = run(model, ids, mask, position_ids=place)
    touched = ((ours - plain).abs() > 1e-6).any(-1)
    for i in range(2):
        for column in range(width):
            if not mask[i, column]:
                continue
            at = int(place[i, column])
            wanted = {
                "all": True,
                "prompt": column < prompt,
                "generated": column >= prompt,
                "0:1": at == 0,
                "3:": at >= 3,
                "2:9": 2 <= at < 9,
                "token:7": int(ids[i, column]) == 7,
            }[positions]
            assert bool(touched[i, column]) == wanted, (i, column)
    if positions not in ("prompt", "generated"):
        torch.testing.assert_close(cached[mask], whole[mask], atol=1e-4, rtol=1e-4)


def test_generate_runs_under_edits(model: Any) -> None:
    ids = ids_of(2, 5)
    cut = e.Intervention([e.Ablate(experts=[0, 1], how="route_around", positions="generated"), e.TopK(k=1)])
    decisions: list[torch.Tensor] = []

    def receive(_: Site, tensors: dict[str, torch.Tensor]) -> None:
        decisions.append(tensors["indices"].clone())

    site = Site(0, "mlp", EXPERT_INDICES)
    with model.edited(cut), tapped(model.module, model.anatomy, [site], receive):
        written = model.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert [d.shape for d in decisions] == [(10, 1), *[(2, 1)] * 4]
    assert all((d > 1).all() for d in decisions[1:])
    assert (decisions[0] <= 1).any()
    # one token after another, without a cache, by the same edits: positions told by hand
    by_hand = ids
    for _ in range(5):
        with model.edited(e.Intervention([e.Ablate(experts=[0, 1], how="route_around", positions="5:"), e.TopK(k=1)])):
            by_hand = torch.cat([by_hand, run(model, by_hand)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, by_hand)


@pytest.mark.parametrize("inside", [True, False])
def test_taps_see_what_the_edited_model_did(model: Any, inside: bool) -> None:
    """In either order of entering: the decision after the edit, and the sublayer's output with it."""
    sites = [Site(0, "mlp", EXPERT_INDICES), Site(0, "mlp", EXPERT_WEIGHTS), Site(0, "", MLP_OUT)]
    seen: dict[Site, dict[str, torch.Tensor]] = {}
    receive = lambda site, tensors: seen.update({site: {n: t.clone() for n, t in tensors.items()}})  # noqa: E731 — short
    cut, ids = e.Intervention([e.Ablate(layer=0, experts=range(7))]), ids_of(1)
    if inside:
        with model.edited(cut), tapped(model.module, model.anatomy, sites, receive):
            run(model, ids)
    else:
        with tapped(model.module, model.anatomy, sites, receive), model.edited(cut):
            run(model, ids)
    indices, weights = seen[sites[0]]["indices"], seen[sites[1]]["weights"]
    assert torch.equal(weights == 0, indices != 7)
    alone = (indices != 7).all(-1)
    assert alone.any()
    assert (seen[sites[2]]["out"].reshape(12, -1)[alone] == 0).all()


def test_recording_inside_stores_the_edited_decisions(model: Any, store: Any, token_ids: Callable[..., Any]) -> None:
    corpus = ms.Corpus.from_token_ids(token_ids([9, 14]))
    with model.edited(e.Intervention([e.Ablate(experts=[1, 2], how="route_around")])):
        run_ = ms.record(model, corpus, store, name="cut", progress=False)
    assert run_.complete
    chosen = {x for (experts,) in store.fetch("SELECT experts FROM routing") for x in experts}
    assert chosen == {0, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("weights", ["recorded", "own"])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_replaying_a_model_s_own_routing_changes_no_bit(
    tiny_model: Callable[..., Any], store: Any, token_ids: Callable[..., Any], family: str, weights: Any
) -> None:
    model, sequences = ms.load(tiny_model(family)), token_ids([12, 12, 12])
    corpus = ms.Corpus.from_token_ids(sequences)
    base = ms.record(model, corpus, store, name="base", progress=False)
    ids = torch.tensor(sequences)
    plain = run(model, ids)
    replay = e.Intervention([e.SetRouting(run="base", weights=weights)])
    with edited(model, replay, sources={"base": base}) as session:
        with pytest.raises(RunError, match=r"session\.begin"):
            run(model, ids)
        session.begin([0, 1, 2])
        assert torch.equal(run(model, ids), plain)
        session.begin([1])
        assert torch.allclose(run(model, ids[1:2]), plain[1:2], atol=1e-5)
        with pytest.raises(InputError, match="no decisions of sequence 9"):
            session.begin([9])
        with pytest.raises(RunError, match=r"session\.begin"):
            run(model, ids)
        session.check_finite()
        session.begin([2, 1, 0])
        run(model, ids)
        with pytest.raises(RunError, match="their tokens differ"):
            session.check_finite()


def test_replayed_decisions_are_those_of_the_other_run(
    model: Any, store: Any, token_ids: Callable[..., Any], plain_passes: Callable[..., Any]
) -> None:
    """Recorded under a cut, replayed on the plain model: the experts and weights of the record, token by token."""
    sequences = token_ids([10, 7])
    corpus = ms.Corpus.from_token_ids(sequences)
    with model.edited(
        e.Intervention([e.Ablate(experts=[0, 1, 2], how="route_around"), e.Scale(experts=4, factor=0.5)])
    ):
        other = ms.record(model, corpus, store, name="other", progress=False)
    with edited(model, e.Intervention([e.SetRouting(run="other")]), sources={"other": other}) as session:
        session.begin([0, 1])
        (batch,) = plain_passes(model.module, sequences)
    rows = store.fetch("SELECT layer, experts, weights FROM routing ORDER BY layer, token")
    for layer in (0, 1):
        _, ids, weights, _ = batch.experts[layer]
        real = batch.mask.flatten()
        recorded = [dict(zip(x, w, strict=True)) for at, x, w in rows if at == layer]
        found = [dict(zip(x, w, strict=True)) for x, w in zip(ids[real].tolist(), weights[real].tolist(), strict=True)]
        assert found == recorded


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (e.SetRouting(run="missing"), "not among the given ones"),
        (e.SetRouting(run="other"), "top-3"),
    ],
)
def test_runs_that_cannot_be_replayed(
    model: Any, tiny_model: Callable[..., Any], record_ids: Callable[..., Any], edit: e.Edit, said: str
) -> None:
    other = record_ids(tiny_model("olmoe"), [[5, 6, 7]], name="other")
    with pytest.raises(InputError, match=said), edited(model, e.Intervention([edit]), sources={"other": other}):
        pass


def test_what_is_not_finite_is_said_with_the_intervention(model: Any) -> None:
    spoilt = e.Intervention([e.Add(vector=[3e38] * 32, strength=100.0)], name="far too much")
    with edited(model, [e.Intervention(), spoilt]) as session:
        session.assign([0, 0])
        run(model, ids_of(2))
        session.check_finite()
        session.assign([0, 1])
        run(model, ids_of(2))
        with pytest.raises(RunError, match="far too much"):
            session.check_finite()
        session.check_finite()  # said once


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_an_edited_pass_reads_nothing_back(tiny_model: Callable[..., Any], family: str) -> None:
    """Under FakeTensorMode, where a tensor has no value to read."""
    module = tiny_model(family, dtype="bfloat16", experts="grouped_mm")
    model = ms.load(module)
    with edited(model, CUTS) as session:
        session.assign(range(len(CUTS)))
        for columns in session._program.spots.values():
            assert all(column.step is not None for column in columns)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            ids = torch.ones(len(CUTS), 6, dtype=torch.int64)
            out = module(input_ids=ids, attention_mask=ids, use_cache=False)
        assert out.logits.shape == (len(CUTS), 6, 97)


def test_vectors_instead_of_ids_are_refused(model: Any) -> None:
    with model.edited(CUTS[1]), pytest.raises(RunError, match="token ids"):
        model.module(inputs_embeds=torch.zeros(1, 3, 32))


def test_an_exception_in_a_pass_leaves_the_session_usable(model: Any) -> None:
    ids = ids_of(1)
    with model.edited(CUTS[3]):
        before = run(model, ids)
        with pytest.raises(IndexError):
            run(model, torch.tensor([[1, 2, 9999]]))
        assert torch.equal(run(model, ids), before)


def test_a_rule_first_asked_for_inside_a_session_is_the_plain_model_s(model: Any) -> None:
    with model.edited(
        e.Intervention([e.SwapExperts(first=0, second=1)])
    ):  # would spoil every decision it is held against
        check_intervention(model, e.Intervention([e.TopK(k=1)]))
    assert all(bound.rule.agreement == 1 for bound in rules_of(model).values())


def test_a_run_recorded_inside_a_session_names_the_intervention(tiny_model: Any, token_ids: Any, store: Any) -> None:
    model, cut = ms.load(tiny_model("qwen3_moe")), ms.Intervention([ms.edits.Ablate(layer=0, experts=1)], name="cut")
    corpus = ms.Corpus.from_token_ids(token_ids((9, 12)))
    with model.edited(cut):
        run = ms.record(model, corpus, store, name="inside", progress=False)
    assert ms.Intervention.from_data(run.info["intervention"]) == cut
    assert ms.record(model, corpus, store, name="outside", progress=False).info["intervention"] == {}
    with model.edited([ms.Intervention(), cut]), pytest.raises(InputError, match="a run is of one intervention"):
        ms.record(model, corpus, store, name="both", progress=False)
