"""Effects measured and stored: against kept runs, whole or not at all, and refused where nothing can be measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError, RunError

LENGTHS = (9, 5, 12, 7, 11, 6)


@pytest.fixture
def corpus(token_ids: Callable[..., Any]) -> Any:
    import moescope as ms

    return ms.Corpus.from_token_ids(token_ids(LENGTHS), labels=["a", "b"] * 3)


@pytest.fixture
def measure(store: Any, corpus: Any) -> Callable[..., Any]:
    def run(model: Any, intervention: Any, **options: Any) -> Any:
        from moescope.probes.effects.measure import measure_effect

        return measure_effect(model, corpus, intervention, store, progress=False, **{"controls": 2, **options})

    return run


@pytest.fixture(scope="module")
def qwen(tiny_model: Callable[..., Any]) -> Any:
    import moescope as ms

    return ms.load(tiny_model("qwen3_moe"))


def counts(store: Any) -> tuple[int, int]:
    return store.fetch("SELECT (SELECT count(*) FROM effects), (SELECT count(*) FROM effect_sequences)")[0]  # type: ignore[no-any-return]  # a pair of counts


def value_of(store: Any, effect_id: str, metric: str, **columns: Any) -> float:
    given = {"kind": "target", "group_kind": "all", **columns}
    where = " AND ".join(f"{name} = ${name}" for name in given)
    query = f"SELECT value FROM effects WHERE effect_id = $effect AND metric = $metric AND {where}"
    ((value,),) = store.fetch(query, {"effect": effect_id, "metric": metric, **given})
    return float(value)


def test_effect_is_the_difference_of_the_run_kept_under_it_from_its_baseline(
    qwen: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    found = measure(qwen, ablate(1, [2, 5], how="route_around"), keep_run="cut", batch_size=4)
    assert found.base.complete
    assert found.run.complete
    assert found.run.provenance["intervention"]["edits"][0]["how"] == "route_around"
    query = "SELECT sequence_id, sum(nll::DOUBLE), count(nll) FROM tokens WHERE run_id = ? GROUP BY 1 ORDER BY 1"
    base, cut = (np.array(store.fetch(query, [run.run_id])) for run in (found.base, found.run))
    stored = np.array(
        store.fetch(
            "SELECT sequence_id, sum, n FROM effect_sequences WHERE effect_id = ? AND kind = 'target' AND metric = 'delta_nll' "
            "ORDER BY 1",
            [found.effect_id],
        )
    )
    np.testing.assert_allclose(stored[:, 1], cut[:, 1] - base[:, 1], atol=1e-4)
    np.testing.assert_array_equal(stored[:, 2], base[:, 2])
    assert np.abs(stored[:, 1]).max() > 0.01
    mean = (cut[:, 1] - base[:, 1]).sum() / base[:, 2].sum()
    assert value_of(store, found.effect_id, "delta_nll") == pytest.approx(mean, abs=1e-5)
    assert value_of(store, found.effect_id, "base_nll") == pytest.approx(base[:, 1].sum() / base[:, 2].sum(), abs=1e-6)
    kept = store.fetch("SELECT DISTINCT kind, run_id::VARCHAR FROM effects ORDER BY 1")
    assert kept == [("control", None), ("target", found.run.run_id)]


def test_run_under_an_edit_has_the_edited_decisions_and_no_margin_there(
    qwen: Any, corpus: Any, store: Any, ablate: Callable[..., Any]
) -> None:
    import moescope as ms

    cut = ablate(1, [2, 5], how="route_around")
    run = ms.record(qwen, corpus, store, name="cut", intervention=cut, progress=False)
    assert run.complete, run.coverage.df()
    query = "SELECT layer, bool_or(list_has_any(experts, [2, 5])), count(margin) FROM routing GROUP BY 1 ORDER BY 1"
    assert store.fetch(query) == [(0, True, sum(LENGTHS)), (1, False, 0)]
    with pytest.raises(InputError, match="intervention"):
        ms.record(qwen, corpus, store, name="cut", resume=True, progress=False)
    with pytest.raises(InputError, match="the intervention is empty"):
        ms.record(qwen, corpus, store, name="none", intervention=ms_intervention(), progress=False)
    with pytest.raises(InputError, match="records no generated tokens"):
        ms.record(qwen, corpus, store, name="more", intervention=cut, generate=2, progress=False)


def ms_intervention() -> Any:
    from moescope.core.intervention import Intervention

    return Intervention()


@pytest.mark.parametrize("k", [1, 3])
def test_run_with_another_number_of_experts_a_token_is_complete(qwen: Any, corpus: Any, store: Any, k: int) -> None:
    import moescope as ms
    from moescope.core.edit_kinds.experts import TopK
    from moescope.core.intervention import Intervention

    run = ms.record(qwen, corpus, store, name="k", intervention=Intervention([TopK(k=k)]), progress=False)
    assert run.complete, run.coverage.df()
    assert store.fetch("SELECT DISTINCT len(experts) FROM routing") == [(k,)]


def test_baseline_is_found_again_and_recorded_only_once(
    qwen: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    first = measure(qwen, ablate(1, 2))
    again = measure(qwen, ablate(0, 3), base=first.base.name)
    assert again.base.run_id == first.base.run_id == measure(qwen, ablate(0, 1)).base.run_id
    assert [run.name for run in store.runs()] == ["base"]
    assert first.effect_id < again.effect_id


def test_baseline_of_another_model_of_the_same_name_is_not_taken(
    qwen: Any, tiny_model: Callable[..., Any], store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    import moescope as ms

    measure(qwen, ablate(1, 2))
    other = ms.load(tiny_model("qwen3_moe", seed=1))
    assert other.name == qwen.name
    assert measure(other, ablate(1, 2)).base.name == "base-2"
    with pytest.raises(RunError, match=r"does not give the numbers of its base run 'base'.*nothing was stored"):
        measure(other, ablate(1, 2), base="base")


def test_baseline_must_fit(
    qwen: Any, corpus: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:  # fmt: skip
    import moescope as ms

    options: dict[str, Any] = {"progress": False}
    ms.record(qwen, token_ids_corpus(token_ids), store, name="other texts", **options)
    ms.record(qwen, corpus, store, name="edited", intervention=ablate(1, 2), **options)
    ms.record(qwen, corpus, store, name="unrouted", probes=["tokens"], **options)
    for name, reason in {
        "other texts": "its corpus fingerprint is",
        "edited": "recorded under an intervention",
        "unrouted": "it has no routing",
        "nowhere": "no run called 'nowhere'",
    }.items():
        with pytest.raises(InputError, match=reason):
            measure(qwen, ablate(1, 2), base=name)
    ms.record(qwen, corpus, store, name="fits", **options)
    with pytest.raises(InputError, match="its batch size is 8, not 3"):
        measure(qwen, ablate(1, 2), base="fits", batch_size=3)
    assert counts(store) == (0, 0)


def token_ids_corpus(token_ids: Callable[..., Any]) -> Any:
    import moescope as ms

    return ms.Corpus.from_token_ids(token_ids((4, 4), seed=9))


def test_content_and_rerouting_add_up_and_after_the_last_router_nothing_is_rerouted(
    tiny_model: Callable[..., Any], store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    import moescope as ms

    model = ms.load(tiny_model("olmoe", num_hidden_layers=3))
    early = measure(model, ablate(0, [1, 2, 4]), decompose=True, controls=0)
    for metric in ("delta_nll", "kl", "flips"):
        parts = [value_of(store, early.effect_id, f"{part}_{metric}") for part in ("content", "rerouting")]
        assert sum(parts) == pytest.approx(value_of(store, early.effect_id, metric), abs=1e-12)
    assert abs(value_of(store, early.effect_id, "rerouting_kl")) > 1e-6, "later routers see another stream"
    last = measure(model, ablate(2, [1, 2, 4]), decompose=True, controls=0)
    assert abs(value_of(store, last.effect_id, "delta_nll")) > 1e-4
    for metric in ("delta_nll", "kl", "flips"):
        assert value_of(store, last.effect_id, f"rerouting_{metric}") == pytest.approx(0, abs=1e-6)


def test_routing_replayed_by_hand_gives_the_content_part(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], store: Any, measure: Callable[..., Any],
    ablate: Callable[..., Any], plain_passes: Callable[..., Any],
) -> None:  # fmt: skip
    """Plain torch: the experts are zeroed, and each experts module is handed the decisions it had before."""
    import copy

    import torch
    import torch.nn.functional as F

    import moescope as ms

    module, sequences = tiny_model("qwen3_moe"), token_ids(LENGTHS)
    batches = plain_passes(module, sequences, 8)
    changed = copy.deepcopy(module)
    with torch.no_grad():
        changed.model.layers[0].mlp.experts.down_proj[[0, 1, 2, 3]] = 0.0
    total = tokens = 0.0
    for batch in batches:
        for number, layer in enumerate(changed.model.layers):
            own = type(layer.mlp.experts).forward
            _, ids, weights, _ = batch.experts[number]

            def replay(
                hidden: Any, *_: Any, own: Any = own, experts: Any = layer.mlp.experts, given: Any = (ids, weights)
            ) -> Any:
                return own(experts, hidden, *given)

            layer.mlp.experts.forward = replay
        with torch.no_grad():
            logits = changed(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        for row, length in enumerate(batch.mask.sum(1).tolist()):
            following = batch.ids[row, 1:length]
            total += float(F.cross_entropy(logits[row, : length - 1], following, reduction="sum"))
            total -= float(F.cross_entropy(batch.logits[row, : length - 1], following, reduction="sum"))
            tokens += length - 1
    found = measure(ms.load(module), ablate(0, [0, 1, 2, 3]), decompose=True, controls=0)
    assert value_of(store, found.effect_id, "content_delta_nll") == pytest.approx(total / tokens, abs=1e-5)
    assert abs(value_of(store, found.effect_id, "rerouting_delta_nll")) > 1e-4


def test_generation_is_measured_beside_its_controls(
    qwen: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    import torch

    found = measure(qwen, ablate(1, range(4)), generate=6, prompts=3, controls=1)
    for metric in ("delta_length", "delta_distinct_1", "delta_repetition"):
        value_of(store, found.effect_id, metric)
        value_of(store, found.effect_id, metric, kind="control")
    # Plain transformers, one prompt at a time: the first three sequences that are longer than the prompts.
    rows = store.fetch(
        "SELECT sequence_id FROM effect_sequences WHERE effect_id = ? AND metric = 'base_length' ORDER BY 1",
        [found.effect_id],
    )
    ids = store.fetch("SELECT sequence_id, list(token_id ORDER BY position) FROM tokens GROUP BY 1")
    texts = dict(ids)
    length = sorted((len(t) - 1 for t in texts.values()), reverse=True)[2]
    assert length == 8
    distinct = []
    for (sequence,) in rows:
        prompt = torch.tensor([texts[sequence][:length]])
        with torch.no_grad():
            written = qwen.module.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        answer = written[0, length:].tolist()
        distinct.append(len(set(answer)) / len(answer))
    assert len(rows) == 3
    assert value_of(store, found.effect_id, "base_distinct_1") == pytest.approx(np.mean(distinct))
    assert value_of(store, found.effect_id, "base_length") == 6


def test_what_is_written_is_measured_as_defined() -> None:
    from moescope.probes.effects.generation_health import measures

    assert measures([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx((1 - 4 / 5, 4 / 8, 4 / 7, 4 / 6, 8.0))
    assert measures(list(range(9))) == pytest.approx((0.0, 1.0, 1.0, 1.0, 9.0))
    short = measures([5])
    assert np.isnan(short[0])
    assert short[1] == 1.0
    assert np.isnan(measures([])[1])
    assert measures([])[4] == 0


def test_mean_in_place_of_an_expert_is_calibrated_for_the_edit_and_for_each_control(
    qwen: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    found = measure(qwen, ablate(1, 2, how="mean"))
    for intervention in (found.intervention, *found.controls):
        assert len(intervention.edits[0].means[0]) == 32
    assert found.intervention.edits[0].means != found.controls[0].edits[0].means
    assert abs(value_of(store, found.effect_id, "delta_nll")) > 0


def test_interruption_stores_nothing(
    qwen: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moescope.probes.effects import tally

    measure(qwen, ablate(1, 2), controls=0)
    before = counts(store)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tally.Tally, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(qwen, ablate(1, 3))
    assert counts(store) == before
    monkeypatch.undo()
    measure(qwen, ablate(1, 3), controls=0)
    assert counts(store) > before, "model and store can be used again"


def test_nan_after_an_edit_stores_nothing(qwen: Any, store: Any, measure: Callable[..., Any]) -> None:
    from moescope.core.edit_kinds.stream import Add
    from moescope.core.intervention import Intervention

    with pytest.raises(RunError, match="NaN or infinity"):
        measure(qwen, Intervention([Add(layer=1, vector=[3e38] * 32, strength=1e6)], name="too much"))
    assert counts(store) == (0, 0)


def test_failing_write_stores_nothing(
    qwen: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moescope.store import effects

    plain = effects._sequence_rows
    monkeypatch.setattr(
        effects, "_sequence_rows", lambda rows: plain(rows).append_column("wrong", [[1] * plain(rows).num_rows])
    )
    with pytest.raises(RunError, match="could not be stored"):
        measure(qwen, ablate(1, 2))
    assert counts(store) == (0, 0)


def test_deleting_the_baseline_takes_its_effects_along(
    qwen: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    from moescope.store.effects import effect_ids

    first, second = measure(qwen, ablate(1, 2)), measure(qwen, ablate(1, 3))
    assert effect_ids(first.base) == [first.effect_id, second.effect_id]
    store.delete_run("base")
    assert counts(store) == (0, 0)


def test_bad_questions_are_refused(
    qwen: Any, tiny_model: Callable[..., Any], store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    import moescope as ms
    from moescope.core.edit_kinds.stream import Skip
    from moescope.core.intervention import Intervention

    dense = ms.load(tiny_model("llama"))
    for model, intervention, options, words in [
        (qwen, Intervention(), {}, "the intervention is empty"),
        (qwen, ablate(1, 99), {}, "no expert 99"),
        (qwen, ablate(7, 1), {}, "layer"),
        (qwen, ablate(1, range(8)), {}, "layer"),
        (qwen, ablate(1, 2), {"groups": ("colour",)}, "cannot be grouped by 'colour'"),
        (qwen, ablate(1, 2), {"controls": -1}, "0 or more"),
        (qwen, ablate(1, 2), {"prompts": 0}, "prompts 1 or more"),
        (qwen, ablate(1, 2), {"seed": -1}, "seed are 0 or more"),
        (qwen, ablate(1, 2, positions="generated"), {}, "act on generated tokens alone"),
        (dense, Intervention([Skip(layer=0, part="mlp")]), {"decompose": True}, "no routers"),
        (dense, ablate(1, 2), {}, "expert"),
    ]:
        with pytest.raises(InputError, match=words):
            measure(model, intervention, **options)
    assert store.runs() == [], "refused before anything was recorded"
    found = measure(dense, Intervention([Skip(layer=0, part="mlp")]))
    assert len(found.controls) == 1
    assert "Only 1 different controls exist, of 2 asked for." in found.notes


def test_continuations_longer_than_the_context_are_refused(
    qwen: Any, store: Any, measure: Callable[..., Any], ablate: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match="no room for so long an answer"):
        measure(qwen, ablate(1, 2), generate=64, prompts=2, controls=0)
    assert counts(store) == (0, 0)


def test_effects_are_not_written_where_they_do_not_belong(store: Any, tmp_path: Any) -> None:
    from moescope.store.effects import EffectRow, Measured, new_effect_id, write_effects
    from moescope.store.store import Store

    row = EffectRow("all", None, "delta_nll", 0.1, None, None, 5, "nats")
    nowhere = Measured(new_effect_id(), "00000000-0000-0000-0000-000000000000", "{}", "target", None, [row])
    with pytest.raises(InputError, match="has no run with the id 00000000"):
        write_effects(store, [nowhere])
    store.close()
    with Store(store.path, read_only=True) as closed, pytest.raises(InputError, match="open for reading only"):
        write_effects(closed, [])


def test_ids_of_effects_are_ordered_by_time_and_of_version_7() -> None:
    import uuid

    from moescope.store.effects import new_effect_id

    made = [new_effect_id() for _ in range(2000)]
    assert made == sorted(made)
    assert len(set(made)) == 2000
    assert {uuid.UUID(one).version for one in made} == {7}


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("how", ["zero", "route_around"])
def test_every_family_is_measured_and_split(
    family: str, how: str, tiny_model: Callable[..., Any], store: Any, measure: Callable[..., Any],
    ablate: Callable[..., Any],
) -> None:  # fmt: skip
    import moescope as ms

    found = measure(ms.load(tiny_model(family)), ablate(1, 2, how=how), decompose=True, controls=1)
    assert len(found.controls) == 1
    for kind in ("target", "control"):
        parts = [value_of(store, found.effect_id, f"{part}_kl", kind=kind) for part in ("content", "rerouting")]
        assert sum(parts) == pytest.approx(value_of(store, found.effect_id, "kl", kind=kind), abs=1e-12)
    assert value_of(store, found.effect_id, "kl") > 0
