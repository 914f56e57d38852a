"""Sparse probes on runs where the units that tell a concept are planted."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.sae.concepts.concept import Concept, of_token_ids
from moescope.sae.concepts.sparse_probes import SparseProbes, sparse_probes
from moescope.store.store import Store

Plant = Callable[..., Any]
DOCUMENTS, LENGTH = 40, 12
QUICK: dict[str, Any] = {"draws": 60, "skip_first": 0, "progress": False}


def value(
    found: SparseProbes, concept: str, k: int, metric: str = "F1", ranking: str = "mean_difference"
) -> dict[str, Any]:
    rows = [
        row
        for row in found.rows
        if (row["concept"], row["k"], row["metric"]) == (concept, k, metric) and row["ranking"] in (ranking, "all")
    ]
    return rows[0] | {row["null_kind"]: row["null_value"] for row in rows if "null_kind" in row}


@pytest.fixture
def layout() -> dict[str, Any]:
    """Documents of two labels in turn."""
    return {"lengths": [LENGTH] * DOCUMENTS, "labels": ["a", "b"] * (DOCUMENTS // 2)}


def of_documents(labels: list[str]) -> np.ndarray:
    return np.repeat(np.array(labels) == "a", LENGTH)


def test_the_expert_that_only_one_label_takes_is_found(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    random = np.random.default_rng(0)
    is_a = of_documents(layout["labels"])
    noise = random.integers(0, 4, len(is_a))
    second = np.stack([noise, np.where(is_a, 6, 5)], 1)
    run = plant(**layout, routers=[planted.Router(noise[:, None], 8, layer=0), planted.Router(second, 8, layer=1)])
    found = sparse_probes(run, store, units="expert", k=[1, 2], controls=8, **QUICK)
    row = value(found, "a", 1)
    assert row["value"] == 1
    assert row["units"] in ([8 + 5], [8 + 6])
    assert (row["ci_low"], row["ci_high"]) == (1, 1)
    assert row["labels permuted over documents"] < 0.9
    assert row["random units"] < 0.9
    assert value(found, "a", 1, "sparsity")["value"] == 1
    assert value(found, "a", 1, "AUC")["value"] == 1
    assert store.fetch("SELECT count(*) FROM sparse_probes") == [(len(found.rows),)]


def test_two_units_are_needed_where_either_may_tell(plant: Plant, planted: ModuleType, store: Store) -> None:
    """Half of the concept's tokens make unit 2 active, the other half unit 5; nothing else does."""
    random = np.random.default_rng(1)
    total = DOCUMENTS * LENGTH
    ids = random.integers(0, 10, total)
    held = ids < 4
    vectors = random.normal(size=(total, 8)) * 0.1
    vectors[:, [2, 5]] = 0
    vectors[held & (ids % 2 == 0), 2] = 3
    vectors[held & (ids % 2 == 1), 5] = 3
    run = plant(
        lengths=[LENGTH] * DOCUMENTS, ids=ids.tolist(), vectors={"blocks.0.mlp.hook_post": planted.Vectors(vectors)}
    )
    found = sparse_probes(run, store, units="neuron", concepts=[of_token_ids("low", range(4))], k=[1, 2, 4], **QUICK)
    assert 0.4 < value(found, "low", 1, "recall")["value"] < 0.6
    assert value(found, "low", 2)["value"] == 1
    assert sorted(value(found, "low", 2)["units"]) == [2, 5]
    assert value(found, "low", 2, "sparsity")["value"] == 2
    assert "labels rotated along the tokens" in value(found, "low", 1)


def test_a_probe_cannot_know_documents_it_has_not_seen(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    """Every document has an expert of its own: were tokens split, the label would be known from any of them."""
    document = np.repeat(np.arange(DOCUMENTS), LENGTH)
    run = plant(**layout, routers=[planted.Router(document[:, None], DOCUMENTS)])
    found = sparse_probes(run, store, units="expert", k=[1, 16], **QUICK)
    for k in (0, 1, 16):
        assert value(found, "a", k, "AUC")["value"] == 0.5
    assert found.test_documents == 12


def test_neurons_of_experts_are_numbered_expert_by_expert(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    random = np.random.default_rng(2)
    is_a = of_documents(layout["labels"])
    token = np.repeat(np.arange(len(is_a)), 2)
    expert = np.tile([1, 3], len(is_a))
    values = random.normal(size=(len(token), 4)) * 0.1
    values[(expert == 3) & is_a[token], 2] = 5
    site = "blocks.0.mlp.experts.hook_post"
    run = plant(**layout, vectors={site: planted.Vectors(values, token, expert)})
    found = sparse_probes(run, store, units="neuron", k=1, **QUICK)
    assert (found.site, found.units) == (site, 16)
    assert value(found, "a", 1)["units"] == [3 * 4 + 2]
    assert value(found, "a", 1)["value"] == 1


def test_latents_that_are_components_probe_as_components_do(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any], components: Any
) -> None:
    random = np.random.default_rng(3)
    is_a = of_documents(layout["labels"])
    values = np.abs(random.normal(size=(len(is_a), 6))) + 0.01
    values[:, 4] += is_a
    run = plant(**layout, vectors={"blocks.0.hook_resid_post": planted.Vectors(values)})
    given: dict[str, Any] = {"k": [1, 3], "ranking": ("mean_difference", "f"), **QUICK}
    neurons = sparse_probes(run, store, units="neuron", site="blocks.0.hook_resid_post", **given)
    latents = sparse_probes(run, store, units="latent", sae=components(6), **given)
    for ranking in ("mean_difference", "f"):
        for k in (1, 3):
            mine, theirs = (value(found, "a", k, ranking=ranking) for found in (latents, neurons))
            assert mine["units"] == theirs["units"]
            assert mine["value"] == pytest.approx(theirs["value"], abs=1e-6)
    assert {row["sae_id"] for row in latents.rows} == {components(6).sae_id}


def test_an_autoencoder_is_tested_on_what_it_was_not_trained_on(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any], components: Any
) -> None:
    from moescope.sae.data.split import held_out

    values = np.abs(np.random.default_rng(4).normal(size=(DOCUMENTS * LENGTH, 6)))
    run = plant(**layout, vectors={"blocks.0.hook_resid_post": planted.Vectors(values)})
    sae = components(6, row={"trained_on": run.run_id, "settings": {"held_out_share": 0.25, "split_seed": 1}})
    found = sparse_probes(run, store, units="latent", sae=sae, k=1, least=2, **QUICK)
    assert found.test_documents == int(held_out(np.arange(DOCUMENTS), 0.25, 1).sum())


def test_documents_are_probed_by_the_mean_of_their_tokens(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    """One token of twelve takes expert 5 in documents of one label: too rare for tokens, plain for documents."""
    is_a = of_documents(layout["labels"])
    chosen = np.where(is_a & (np.arange(len(is_a)) % LENGTH == 3), 5, np.arange(len(is_a)) % 3)
    run = plant(**layout, routers=[planted.Router(chosen[:, None], 8)])
    tokens = sparse_probes(run, store, units="expert", k=1, **QUICK)
    documents = sparse_probes(run, store, units="expert", k=1, level="document", least=3, **QUICK)
    assert value(tokens, "a", 1)["value"] < 0.7
    assert value(documents, "a (whole documents)", 1)["value"] == 1
    assert documents.test == documents.test_documents == 12
    with pytest.raises(InputError, match="of tokens, not of documents"):
        sparse_probes(run, store, units="expert", level="document", concepts=["class: word"], **QUICK)


def test_router_logits_and_weights_are_read_as_they_are(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    random = np.random.default_rng(5)
    is_a = of_documents(layout["labels"])
    logits = random.normal(size=(len(is_a), 4))
    logits[:, 2] += 30 * is_a
    chosen = np.tile([2, 0], (len(is_a), 1))
    weights = np.where(is_a[:, None], [[0.9, 0.1]], [[0.6, 0.4]])
    run = plant(**layout, routers=[planted.Router(chosen, 4, weights=weights, logits=logits)])
    assert value(sparse_probes(run, store, units="router_logit", k=1, **QUICK), "a", 1)["units"] == [2]
    by_weight = sparse_probes(run, store, units="expert", values="weight", k=1, **QUICK)
    assert value(by_weight, "a", 1)["value"] == 1
    assert by_weight.site == "hook_expert_weights"
    with pytest.raises(InputError, match=r"no unit at .* varies"):
        sparse_probes(run, store, units="expert", k=1, **QUICK)


def test_probing_again_takes_the_place_of_what_was_probed(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    run = plant(**layout, routers=[planted.Router(np.random.default_rng(6).integers(0, 6, (DOCUMENTS * LENGTH, 1)), 6)])
    for _ in range(2):
        found = sparse_probes(run, store, units="expert", k=[1, 2], **QUICK)
    sparse_probes(run, store, units="expert", k=1, ranking="f", dense=False, concepts=["a"], **QUICK)
    counts = dict(store.fetch("SELECT ranking, count(*) FROM sparse_probes GROUP BY ranking"))
    assert counts["mean_difference"] == sum(row["ranking"] == "mean_difference" for row in found.rows)
    assert counts["f"] > 0


def test_labels_without_meaning_score_like_their_permutations(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    vectors = np.random.default_rng(7).normal(size=(DOCUMENTS * LENGTH, 12))
    run = plant(**layout, vectors={"blocks.0.mlp.hook_post": planted.Vectors(vectors)})
    found = sparse_probes(run, store, units="neuron", k=[1, 8], controls=10, **QUICK)
    for k in (1, 8, 0):
        row = value(found, "a", k, "AUC")
        assert row["ci_low"] - 0.05 <= 0.5 <= row["ci_high"] + 0.05
        assert row["labels permuted over documents"] == pytest.approx(0.5, abs=0.08)


def test_memory_bounds_how_many_tokens_are_read(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    vectors = np.random.default_rng(8).normal(size=(DOCUMENTS * LENGTH, 64))
    run = plant(**layout, vectors={"blocks.0.mlp.hook_post": planted.Vectors(vectors)})
    found = sparse_probes(run, store, units="neuron", k=1, memory=300 * 64 * 4, least=2, **QUICK)
    assert found.train + found.test == 300
    assert "300 of 480 tokens" in found.notes[0]


def test_rare_concepts_are_left_out_and_said(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    routers = [planted.Router(np.random.default_rng(9).integers(0, 6, (DOCUMENTS * LENGTH, 1)), 6)]
    run = plant(**layout, routers=routers)
    one = Concept("the first token", lambda tokens: tokens.token == 0)
    found = sparse_probes(run, store, units="expert", k=1, concepts=["a", one], **QUICK)
    assert found.concepts == ("a",)
    assert "rows of" in found.skipped["the first token"]
    with pytest.raises(InputError, match="no concept has enough tokens"):
        sparse_probes(run, store, units="expert", k=1, concepts=[one], **QUICK)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"concepts": ["nothing"]}, "no concept of this run"),
        ({"concepts": ["a", "a"]}, "given twice"),
        ({"concepts": [Concept("odd", lambda tokens: np.zeros(3))]}, "does not answer yes or no"),
        ({"ranking": "means"}, "no ranking 'means'"),
        ({"ranking": []}, "no ranking"),
        ({"k": 0}, "k counts units"),
        ({"k": []}, "k counts units"),
        ({"train_share": 1.0}, "train_share"),
        ({"tokens": 0}, "tokens cannot be 0"),
        ({"units": "latent"}, "need their autoencoder"),
        ({"units": "neuron"}, "kept neurons at 0 sites"),
        ({"units": "neuron", "site": "blocks.0.mlp.hook_post"}, "kept no vectors"),
        ({"units": "neuron", "site": "nowhere"}, "is not a site"),
        ({"units": "router_logit"}, "no router logits"),
        ({"site": "blocks.7.mlp.hook_router_logits"}, "no routing at"),
    ],
)
def test_bad_input_is_refused_with_the_reason(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    run = plant(**layout, routers=[planted.Router(np.arange(DOCUMENTS * LENGTH)[:, None] % 5, 6)])
    with pytest.raises(InputError, match=said):
        sparse_probes(run, store, **{"units": "expert", **QUICK, **given})
    assert store.fetch("SELECT count(*) FROM sparse_probes") == [(0,)]


def test_latents_of_another_width_or_place_are_refused(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any], components: Any
) -> None:
    run = plant(**layout, vectors={"blocks.0.hook_resid_post": planted.Vectors(np.ones((DOCUMENTS * LENGTH, 6)))})
    with pytest.raises(InputError, match=r"Expected: 5 components\. Found: 6"):
        sparse_probes(run, store, units="latent", sae=components(5), **QUICK)
    with pytest.raises(InputError, match="does not read"):
        sparse_probes(run, store, units="latent", sae=components(6), site="blocks.1.hook_resid_post", **QUICK)


def test_vectors_that_are_no_numbers_are_refused(
    plant: Plant, planted: ModuleType, store: Store, layout: dict[str, Any]
) -> None:
    vectors = np.ones((DOCUMENTS * LENGTH, 4))
    vectors[7, 1] = np.nan
    run = plant(**layout, vectors={"blocks.0.mlp.hook_post": planted.Vectors(vectors)})
    with pytest.raises(InputError, match="NaN or infinities"):
        sparse_probes(run, store, units="neuron", **QUICK)
