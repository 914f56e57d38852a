"""What `read_features` writes, against plain loops over planted activations."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.sae.reading.read import associate_features, read_features
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store


def _conftest() -> Any:
    spec = importlib.util.spec_from_file_location("moescope_reading_planted", Path(__file__).parent / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


planted = _conftest()
DOCUMENTS, LENGTH = planted.DOCUMENTS, planted.LENGTH


_SMALL: Any = {"progress": False, "strata": 3, "per_stratum": 2, "top": 5, "window": 9, "bins": 8}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, planted_runs: Any, components: Any) -> Iterator[Any]:
    """The planted run, its activations where they are over 0, the outcome of reading them, and the store."""
    with Store(tmp_path_factory.mktemp("reading") / "runs.duckdb") as opened:
        planted.with_autoencoders(opened)
        given = planted.planted_run(opened, planted_runs, planted.planted_activations())
        outcome = read_features(components(12), given.run, opened, **_SMALL)
        yield given, np.maximum(given.activations, 0), outcome, opened


def _rows(store: Any, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = store.sql(query).to_arrow_table().to_pylist()
    return found


def test_counts_and_histograms_are_those_of_loops(read: Any) -> None:
    given, acts, outcome, store = read
    rows = _rows(store, "SELECT * FROM features ORDER BY feature")
    assert [row["feature"] for row in rows] == list(range(12))
    for row in rows:
        mine = acts[:, row["feature"]]
        over = mine[mine > 0]
        assert row["active"] == len(over)
        assert row["tokens"] == len(acts) == outcome.tokens
        assert row["documents"] == len({d for d, value in zip(given.document, mine, strict=True) if value > 0})
        if not len(over):
            assert row["mean"] is row["maximum"] is row["edges"] is row["counts"] is None
            continue
        assert row["mean"] == pytest.approx(over.mean(dtype=np.float64), rel=1e-6)
        assert row["maximum"] == over.max()
        counts = [0] * 8
        for value in over:
            inside = [i for i in range(8) if row["edges"][i] <= value and (value < row["edges"][i + 1] or i == 7)]
            counts[inside[-1]] += 1
        assert row["counts"] == counts
        assert np.allclose(np.diff(np.log(row["edges"])), np.diff(np.log(row["edges"]))[0], atol=1e-5)
        assert row["decoder_norm"] == 1
        assert row["raised_ids"] is None
    assert outcome.dead == 1
    assert outcome.documents == DOCUMENTS


def test_largest_examples_are_one_a_document_with_every_activation_of_their_window(read: Any) -> None:
    given, acts, _, store = read
    rows = _rows(store, "SELECT * FROM feature_contexts ORDER BY feature, stratum, rank")
    for feature in range(12):
        mine = [row for row in rows if row["feature"] == feature and row["stratum"] == 0]
        best = sorted((max(acts[given.document == d, feature]) for d in range(DOCUMENTS)), reverse=True)
        assert [row["value"] for row in mine] == [float(value) for value in best if value > 0][:5]
        assert len({row["sequence_id"] for row in mine}) == len(mine)
    for row in rows:
        token = row["sequence_id"] * LENGTH + row["position"]
        first = row["sequence_id"] * LENGTH + row["first_position"]
        assert acts[token, row["feature"]] == row["value"]
        assert len(row["activations"]) == 9
        assert first <= token < first + 9 <= (row["sequence_id"] + 1) * LENGTH
        assert row["activations"] == acts[first : first + 9, row["feature"]].tolist()


def test_drawn_examples_are_of_their_quantile(read: Any) -> None:
    _, acts, _, store = read
    rows = _rows(store, "SELECT * FROM feature_contexts WHERE stratum > 0")
    for row in rows:
        over = np.sort(acts[:, row["feature"]][acts[:, row["feature"]] > 0])[::-1]
        places = [i for i, value in enumerate(over) if value == row["value"]]
        assert any(i * 3 // len(over) + 1 == row["stratum"] for i in places)
    for feature in set(range(12)) - {3}:
        for stratum in (1, 2, 3):
            mine = [row for row in rows if (row["feature"], row["stratum"]) == (feature, stratum)]
            assert [row["rank"] for row in sorted(mine, key=lambda r: r["rank"])] == [0, 1]
            assert len({row["sequence_id"] for row in mine}) == 2


def test_lift_interval_and_q_are_those_of_loops_and_scipy(read: Any) -> None:
    from scipy.stats import false_discovery_control, hypergeom

    given, acts, _, store = read
    rows = _rows(store, "SELECT * FROM feature_labels ORDER BY feature, label")
    assert len(rows) == 11 * 3
    weights = np.random.default_rng(0).multinomial(DOCUMENTS, np.full(DOCUMENTS, 1 / DOCUMENTS), size=1000)
    for row in rows:
        fires = acts[:, row["feature"]] > 0
        inside = given.label == row["label"]
        assert row["active"] == (fires & inside).sum()
        assert row["tokens"] == inside.sum()
        assert row["lift"] == pytest.approx(fires[inside].mean() / fires.mean())
        if (row["feature"], row["label"]) in ((0, "b"), (2, "a")):
            drawn = []
            by_document = [
                [x[given.document == d].sum() for d in range(DOCUMENTS)] for x in (fires & inside, inside, fires)
            ]
            for counts in weights:
                both, size, whole = (sum(c * n for c, n in zip(counts, of, strict=True)) for of in by_document)
                drawn.append(both / size / (whole / (counts.sum() * LENGTH)) if size and whole else row["lift"])
            assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), rel=1e-5)
    assert np.allclose([row["q"] for row in rows], false_discovery_control([row["p"] for row in rows]))
    strong = next(row for row in rows if (row["feature"], row["label"]) == (2, "a"))
    assert strong["lift"] == pytest.approx(3.0)
    exact = hypergeom.sf(7, DOCUMENTS, 8, 8)  # it fires in the eight documents of its label and in no other
    assert strong["p"] == pytest.approx(4 * exact, rel=1e-6)
    assert {(r["feature"], r["label"]) for r in rows if r["q"] < 0.01} == {(2, "a")}


def test_a_latent_of_one_token_is_explained_best_and_a_random_one_not_at_all(read: Any) -> None:
    rows = _rows(read[3], "SELECT * FROM sae_measures WHERE group_kind = 'feature'")
    score = {(r["metric"], int(r["group_value"]), r["condition"]): r for r in rows}
    token = {f: score["predicted_by_token", f, "sae"]["value"] for f in (0, 1, 2, 7, 8, 10)}
    assert max(token, key=lambda f: token[f]) == 0
    assert token[0] > 0.99
    assert abs(token[1]) < 0.15
    assert abs(score["predicted_by_token", 0, "shuffled"]["value"]) < 0.15
    assert score["predicted_by_previous_token", 8, "sae"]["value"] > 0.99
    assert abs(score["predicted_by_previous_token", 0, "sae"]["value"]) < 0.15
    label = score["predicted_by_label", 2, "sae"]
    assert label["value"] > 0.5
    assert abs(score["predicted_by_label", 2, "shuffled"]["value"]) < 0.35
    assert label["ci_low"] < label["value"] < label["ci_high"]
    assert not any(feature == 3 for _, feature, _ in score), "nothing is said of a latent that never fires"


def test_scores_are_correlations_with_a_table_learned_on_the_other_half(read: Any) -> None:
    given, acts, _, store = read
    half = np.random.default_rng(0).permutation(DOCUMENTS) % 2
    side = half[given.document]
    for feature in (0, 1, 7):
        found = []
        for learn in (0, 1):
            whole = acts[side == learn, feature].mean()
            means = {i: acts[(side == learn) & (given.ids == i), feature].mean() for i in set(given.ids[side == learn])}
            predicted = [means.get(i, whole) for i in given.ids[side != learn]]
            found.append(np.corrcoef(predicted, acts[side != learn, feature])[0, 1])
        row = _rows(
            store,
            "SELECT value FROM sae_measures WHERE metric = 'predicted_by_token' AND condition = 'sae' "
            f"AND group_value = '{feature}'",
        )[0]
        assert row["value"] == pytest.approx(np.mean(found), abs=1e-6)


def test_families_and_pairs_are_those_planted(read: Any) -> None:
    _, acts, _, store = read
    family = {
        (r["feature"], r["other_feature"]): r for r in _rows(store, "SELECT * FROM feature_links WHERE kind = 'family'")
    }
    assert {(4, 5), (4, 6)} <= set(family)
    assert family[4, 5]["value"] == 1.0
    assert family[4, 5]["n"] == (acts[:, 5] > 0).sum()
    assert family[4, 5]["null_value"] < 0.3
    assert all(member not in (3, 7) for pair in family for member in pair), "dead and dense latents are in no family"
    pairs = _rows(store, "SELECT * FROM feature_links WHERE kind = 'coactivation'")
    fires = acts > 0
    for row in pairs:
        i, j = row["feature"], row["other_feature"]
        assert i < j
        assert row["n"] == (fires[:, i] & fires[:, j]).sum()
        assert row["value"] == pytest.approx(np.corrcoef(fires[:, i], fires[:, j])[0, 1], abs=1e-6)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert {(4, 5), (4, 6)} <= {(r["feature"], r["other_feature"]) for r in pairs}


def test_reading_again_replaces_what_it_wrote_and_nothing_else(read: Any, components: Any) -> None:
    given, _, _, store = read
    other = {
        "sae_id": components(12).sae_id,
        "run_id": given.run.run_id,
        "metric": "fvu",
        "condition": "sae",
        "value": 0.5,
    }
    other |= {"group_kind": "all", "group_value": "all"}
    link = {
        "sae_id": components(12).sae_id,
        "run_id": given.run.run_id,
        "kind": "absorption",
        "feature": 1,
        "value": 0.1,
    }
    write_rows(store, {"sae_measures": [other], "feature_links": [link]})
    tables = ("features", "feature_contexts", "feature_labels", "feature_links", "sae_measures")
    before = {table: given.run.rows(table) for table in tables}
    read_features(components(12), given.run, store, **_SMALL)
    assert {table: given.run.rows(table) for table in tables} == before


def test_same_seed_gives_the_same_rows_and_another_draws_others(read: Any, components: Any) -> None:
    given, _, _, store = read
    query = "SELECT feature, stratum, rank, sequence_id, position FROM feature_contexts ORDER BY ALL"
    first = store.sql(query).fetchall()
    read_features(components(12), given.run, store, **_SMALL, seed=1)
    again = store.sql(query).fetchall()
    assert [r for r in again if r[1] == 0] == [r for r in first if r[1] == 0]
    assert again != first
    read_features(components(12), given.run, store, **_SMALL)
    assert store.sql(query).fetchall() == first


def test_held_out_documents_alone_are_read_on_the_run_of_training(store: Any, plant: Any, components: Any) -> None:
    from moescope.sae.data.split import held_out

    given = plant(planted.planted_activations())
    row = {"settings": {"skip_first": 2, "held_out_share": 0.4}, "trained_on": given.run.run_id}
    outcome = read_features(components(12, row=row), given.run, store, progress=False)
    out = held_out(np.arange(DOCUMENTS), share=0.4)
    assert 0 < out.sum() < DOCUMENTS
    assert outcome.tokens == out.sum() * (LENGTH - 2)
    kept = out[given.document] & (np.arange(len(given.document)) % LENGTH >= 2)
    active = [n for (n,) in store.fetch("SELECT active FROM features ORDER BY feature")]
    assert active == (given.activations[kept] > 0).sum(0).tolist()
    assert any("position 2" in note for note in outcome.notes)
    whole = read_features(components(12, row=row), given.run, store, documents="all", progress=False)
    assert whole.tokens == DOCUMENTS * (LENGTH - 2)


def test_vectors_that_training_left_out_for_their_norm_are_left_out(store: Any, plant: Any, components: Any) -> None:
    acts = planted.planted_activations()
    acts[[100, 300]] *= 1000
    given = plant(acts)
    row = {"settings": {"skip_first": 0, "max_norm_ratio": 10}}
    outcome = read_features(components(12, row=row), given.run, store, progress=False)
    assert outcome.tokens == len(acts) - 2
    assert store.fetch("SELECT max(maximum) FROM features")[0][0] < 5


def test_tokens_without_a_vector_are_shown_without_an_activation(
    store: Any, plant: Any, components: Any, planted_runs: Any
) -> None:
    acts = planted.planted_activations()
    token = np.arange(0, len(acts), 2)
    vectors = {"blocks.0.hook_resid_post": planted_runs.Vectors(acts[token], token=token)}
    given = plant(acts, vectors=vectors)
    outcome = read_features(components(12), given.run, store, progress=False, window=8)
    assert outcome.tokens == len(token)
    assert any("have no vector" in note for note in outcome.notes)
    for first, activations in store.fetch("SELECT first_position, activations FROM feature_contexts"):
        assert [a is None for a in activations] == [(first + i) % 2 == 1 for i in range(8)]


def test_of_several_slots_of_a_token_the_largest_activation_counts(
    store: Any, plant: Any, components: Any, planted_runs: Any
) -> None:
    acts = planted.planted_activations()
    slots = np.stack([acts, np.roll(acts, 1, axis=0)], 1).reshape(-1, 12)
    token, expert = np.repeat(np.arange(len(acts)), 2), np.tile([4, 7], len(acts))
    site = "blocks.0.mlp.experts.hook_out"
    given = plant(acts, vectors={site: planted_runs.Vectors(slots, token=token, expert=expert)})
    read_features(components(12, site), given.run, store, progress=False)
    both = np.maximum(np.maximum(acts, np.roll(acts, 1, axis=0)), 0)
    found = store.fetch("SELECT active, maximum FROM features ORDER BY feature")
    assert [n for n, _ in found] == (both > 0).sum(0).tolist()
    read_features(components(12, site, expert=7), given.run, store, progress=False)
    found = store.fetch("SELECT active FROM features ORDER BY feature")
    assert [n for (n,) in found] == (acts > 0).sum(0).tolist()


def test_memory_is_bounded_by_reading_fewer_documents(store: Any, plant: Any, components: Any) -> None:
    given = plant(planted.planted_activations())
    outcome = read_features(components(12), given.run, store, progress=False, most=500)
    assert 0 < outcome.documents < DOCUMENTS
    assert outcome.tokens == outcome.documents * LENGTH
    total = store.fetch("SELECT sum(active) FROM features")[0][0]
    assert total <= 500
    assert any("drawn at random" in note for note in outcome.notes)


def test_associations_are_log_odds_of_windows(read: Any, components: Any) -> None:
    given, acts, _, store = read
    found = associate_features(
        components(12), given.run, store, {"parent": [4], "child": [5, 6], "random": [10]}, window=8, progress=False
    )
    fires = {name: np.zeros(DOCUMENTS * LENGTH // 8, bool) for name in ("parent", "child", "random")}
    for name, latents in (("parent", [4]), ("child", [5, 6]), ("random", [10])):
        for window in range(len(fires[name])):
            fires[name][window] = bool((acts[window * 8 : window * 8 + 8][:, latents] > 0).any())
    for pair in found:
        a, b = fires[pair.a], fires[pair.b]
        n11, n10, n01, n00 = ((x & y).sum() + 0.5 for x, y in ((a, b), (a, ~b), (~a, b), (~a, ~b)))
        assert pair.value == pytest.approx(np.log(n11 * n00 / (n10 * n01)))
        assert pair.null_low <= pair.null <= pair.null_high
    by_name = {(pair.a, pair.b): pair for pair in found}
    assert by_name["parent", "child"].low > by_name["parent", "child"].null_high
    unrelated = by_name["parent", "random"]
    assert unrelated.low < unrelated.null_high
    rows = _rows(store, "SELECT * FROM sae_measures WHERE metric = 'association' AND group_kind = 'concepts'")
    assert len(rows) == 6
    assert json.loads(rows[0]["group_value"])["latents_b"] in ([5, 6], [10])


Call = Callable[[Any, Any, Any], Any]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda sae, run, store: read_features(sae(12), run, store, top=0), "top must be at least 1"),
        (lambda sae, run, store: read_features(sae(12), run, store, window=0), "window must be at least 1"),
        (lambda sae, run, store: read_features(sae(12), run, store, documents="some"), "held_out or all"),
        (lambda sae, run, store: read_features(sae(12, sae_id=sae(7).sae_id), run, store), "is not in"),
        (lambda sae, run, store: read_features(sae(11), run, store, progress=False), "11 components"),
        (lambda sae, run, store: read_features(sae(12, "blocks.1.hook_resid_post"), run, store), "kept no vectors"),
        (lambda sae, run, store: read_features(sae(12), run, store, skip_first=99, progress=False), "no vectors at"),
        (lambda sae, run, store: associate_features(sae(12), run, store, {"a": [1]}), "two concepts"),
        (lambda sae, run, store: associate_features(sae(12), run, store, {"a": [1], "b": [12]}), "no set of latents"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_changes_nothing(call: Call, said: str, read: Any, components: Any) -> None:
    given, _, _, store = read
    before = store.fetch("SELECT sum(active) FROM features")
    with pytest.raises(InputError, match=said):
        call(components, given.run, store)
    assert store.fetch("SELECT sum(active) FROM features") == before


def test_vectors_that_are_no_numbers_are_refused(store: Any, plant: Any, components: Any) -> None:
    acts = planted.planted_activations()
    acts[7, 2] = np.nan
    given = plant(acts)
    with pytest.raises(InputError, match="NaN"):
        read_features(components(12), given.run, store, progress=False)


def test_run_without_labels_has_no_lift_and_says_so(store: Any, plant: Any, components: Any) -> None:
    given = plant(planted.planted_activations(), labels=["a"] * DOCUMENTS)
    outcome = read_features(components(12), given.run, store, progress=False)
    assert given.run.rows("feature_labels") == 0
    assert any("No lift" in note for note in outcome.notes)
