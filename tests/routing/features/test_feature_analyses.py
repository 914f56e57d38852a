"""The analyses of features: closed forms on planted rows, text of tokens, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.features.feature_tables import token_texts
from moescope.store.run import Run

Plant = Callable[..., Run]


def _loaded() -> ModuleType:
    path = Path(__file__).parents[1] / "planted_features.py"
    spec = importlib.util.spec_from_file_location("moescope_tests_planted_features", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


features_file: Any = _loaded()


@pytest.fixture(scope="module")
def run(plant: Plant) -> Run:
    ids = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 3
    words = {i: f" w{i}".encode() for i in range(10)} | {3: "é".encode()[:1], 4: "é".encode()[1:], 5: b"\n"}
    made = plant(lengths=[10] * 3, labels=["x", "y", "z"], ids=ids, vocabulary=words)
    features_file.plant_features(made)
    return made


def test_the_list_has_density_label_and_the_best_rule_of_every_latent(run: Run) -> None:
    result = analyze(run, "features")
    frame = result.df().set_index("feature")
    assert len(frame) == 12
    for i in range(11):
        assert frame["value"][i] == (i + 1) / 100
        assert frame["rule"][i] == "predicted_by_previous_token"
        assert frame["score"][i] == pytest.approx(0.9 - 0.05 * i)
        assert frame["score_null"][i] == 0.01
    assert frame["label"][0] == "x"
    assert frame["lift"][0] == 2
    assert frame["label"][1:].isna().all(), "a lift that is not found is not named"
    assert list(frame.index[:11]) == list(range(11)), "the best explained first"
    assert "12 latents, 1 dead and 1 dense" in result.title
    assert result.n == 10_000


@pytest.mark.parametrize(
    ("sort", "first"), [("density", 10), ("maximum", 10), ("lift", 0), ("number", 0), ("score", 0)]
)
def test_the_list_is_sorted_as_asked(run: Run, sort: str, first: int) -> None:
    frame = analyze(run, "features", sort=sort, top=3).df()
    assert len(frame) == 3
    assert frame["feature"][0] == first


def test_lift_of_one_label_is_shown_whatever_its_q(run: Run) -> None:
    frame = analyze(run, "features", label="y").df().set_index("feature")
    assert frame["lift"][0] == 0.5
    assert frame["lift"][4] == 1.0


def test_the_card_shows_examples_with_the_activation_on_every_token(run: Run) -> None:
    result = analyze(run, "feature", feature=4)
    frame = result.df()
    examples = frame[frame["part"] == "example"]
    assert examples["stratum"].tolist() == [0, 0, 1]
    assert examples["value"].tolist() == pytest.approx([5.0, 4.9, 4.8])
    assert examples["label"].tolist() == ["x", "y", "z"]
    # Token 3 is the first half of é, which is spelled out at token 4; token 5 is a line break.
    assert examples["text"].iloc[0] == " w0 w1 w2⟦é⟧⏎ w6 w7"
    assert json.loads(examples["tokens"].iloc[0]) == [" w0", " w1", " w2", "", "é", "⏎", " w6", " w7"]
    assert json.loads(examples["activations"].iloc[0]) == [0, 0, 0, 5.0, 0, 0, 0, 0]
    assert examples["peak"].iloc[0] == 3
    bins = frame[frame["part"] == "histogram"]
    assert bins["value"].tolist() == [200, 150, 100, 50]
    assert np.allclose(bins["high"].to_numpy()[:-1], bins["low"].to_numpy()[1:])
    raised = frame[frame["part"] == "raised"]
    assert raised["token_id"].tolist() == [4, 5]
    assert raised["value"].tolist() == [0.5, 0.25]
    labels = frame[frame["part"] == "label"]
    assert (labels["null"] == 1).all()
    assert set(frame["part"]) == {"example", "histogram", "raised", "lowered", "label", "cosine", "score"}
    assert "fires on 5.00% of tokens" in result.title


def test_the_card_of_a_parent_and_of_a_member_name_each_other(run: Run) -> None:
    parent = analyze(run, "feature", feature=0).df()
    members = parent[parent["part"] == "family"]
    assert members["other"].tolist() == [1, 2]
    assert set(members["role"]) == {"member"}
    member = analyze(run, "feature", feature=2).df()
    family = member[member["part"] == "family"]
    assert family["other"].tolist() == [0]
    assert family["role"].tolist() == ["parent"]
    pairs = member[member["part"] == "coactivation"]
    assert sorted(pairs["other"]) == [0, 1]


def test_the_card_of_a_dead_latent_says_so(run: Run) -> None:
    result = analyze(run, "feature", feature=11)
    assert "fires on none of 10,000 tokens" in result.title
    assert result.figure().data is not None


def test_without_a_number_the_best_explained_latent_is_shown(run: Run) -> None:
    assert set(analyze(run, "feature").df()["feature"]) == {0}


def test_top_features_are_those_of_the_best_rule_with_their_examples(run: Run) -> None:
    result = analyze(run, "top_features", top=3, distinct=False)
    frame = result.df()
    assert frame["feature"].tolist() == [0, 0, 1, 1, 2, 2]
    assert frame["example"].tolist() == [1, 2] * 3
    assert frame["value"].tolist() == pytest.approx([0.9, 0.9, 0.85, 0.85, 0.8, 0.8])
    assert (frame["null"] == 0.01).all()
    assert frame["text"][0] == " w0 w1 w2⟦é⟧⏎ w6 w7"
    assert frame["label"][0] == "x"
    assert frame["raises"][0] == "“ w0” “ w1”"
    by_token = analyze(run, "top_features", rule="token").df()
    assert set(by_token["metric"]) == {"predicted_by_token"}
    assert analyze(run, "top_features", reach=1).df()["text"][0] == " w2⟦é⟧"
    assert len(result.figure().data[0].z) == 6


def test_of_latents_that_peak_on_the_same_token_the_best_is_shown(run: Run) -> None:
    """Every planted example peaks at position 3; in the sequences of even and odd number that is another token."""
    everything = analyze(run, "top_features", distinct=False).df()
    shown = analyze(run, "top_features").df()
    peaks = {
        int(feature): Counter(
            token
            for (token,) in run.store.fetch(
                """
                SELECT t.token_id
                FROM feature_contexts c
                JOIN tokens t ON t.run_id = c.run_id AND t.sequence_id = c.sequence_id AND t.position = c.position
                WHERE c.run_id = ? AND c.feature = ? AND c.stratum = 0
                """,
                [run.run_id, int(feature)],
            )
        )
        for feature in everything["feature"].unique()
    }
    of_token: dict[int, list[int]] = {}
    for feature in everything["feature"].unique():  # the best first
        most = max(peaks[feature].items(), key=lambda item: (item[1], -item[0]))[0]
        of_token.setdefault(most, []).append(int(feature))
    assert shown["feature"].drop_duplicates().tolist() == [alike[0] for alike in of_token.values()]
    assert shown.drop_duplicates("feature")["alike"].tolist() == [len(alike) for alike in of_token.values()]
    assert max(map(len, of_token.values())) > 1


def test_families_are_listed_with_what_independence_gives(run: Run) -> None:
    result = analyze(run, "feature_families")
    frame = result.df()
    assert frame[["parent", "feature"]].values.tolist() == [[0, 1], [0, 2]]
    assert (frame["members"] == 2).all()
    assert frame["value"].tolist() == [0.8, 0.8]
    assert frame["null"].tolist() == [0.1, 0.1]
    assert frame["density"].tolist() == [0.02, 0.03]
    assert "1 families (0 with activations moved" in result.title
    assert len(analyze(run, "feature_families", feature=2).df()) == 2
    with pytest.raises(InputError, match="no family"):
        analyze(run, "feature_families", feature=7)


def test_association_names_the_pair_farthest_from_chance(run: Run) -> None:
    result = analyze(run, "feature_association")
    frame = result.df()
    assert frame[["a", "b"]].values.tolist() == [["x", "y"], ["x", "z"]]
    assert frame["value"].tolist() == pytest.approx([np.log(3), np.log(3) - 1])
    assert frame["latents_a"].tolist() == ["0 1", "0 1"]
    assert "1 of 2 pairs are outside of chance" in result.title
    with pytest.raises(InputError, match="no association"):
        analyze(run, "feature_association", between="concepts")


@pytest.mark.parametrize("name", ["features", "feature", "top_features", "feature_families", "feature_association"])
def test_every_figure_is_drawn(run: Run, name: str) -> None:
    assert analyze(run, name).figure().data


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("features", {"sae": "other"}, "other.*planted sae"),
        ("features", {"label": "w"}, "x, y, z"),
        ("feature", {"feature": 12}, "0 to 11"),
        ("feature_families", {"sae": "other"}, "planted sae"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(run: Run, name: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        analyze(run, name, **given)


def test_the_newest_autoencoder_is_shown_where_none_is_named(plant: Plant) -> None:
    made = plant(lengths=[10] * 3, labels=["x", "y", "z"])
    old, new = (features_file.plant_features(made, name=name, seed=seed) for seed, name in ((3, "old"), (4, "new")))
    times = {old: "2026-01-01", new: "2026-01-02"}
    for sae_id, time in times.items():
        made.store.connection.execute("UPDATE saes SET created_at = ?::TIMESTAMP WHERE sae_id = ?", [time, sae_id])
    assert any("Autoencoder new" in note for note in analyze(made, "features").notes)
    assert any("Autoencoder old" in note for note in analyze(made, "features", sae="old").notes)
    assert any("Autoencoder old" in note for note in analyze(made, "features", sae=old).notes)


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([b"a", b"b"], ("a", "b")),
        (["日".encode()[:1], "日".encode()[1:2], "日".encode()[2:]], ("", "", "日")),
        ([b"x" + "é".encode()[:1], "é".encode()[1:] + b"y"], ("x", "éy")),
        ([b"\x80"], ("\ufffd",)),
        (["🧪".encode()[:3]], ("",)),
        ([b""], ("",)),
        ([b"\t\r\n"], ("⇥␍⏎",)),
        ([b"\xf0a"], ("\ufffda",)),
    ],
)  # fmt: skip
def test_characters_over_several_tokens_are_spelled_at_the_last(pieces: list[bytes], texts: tuple[str, ...]) -> None:
    assert token_texts(range(len(pieces)), dict(enumerate(pieces))) == texts


def test_ids_without_bytes_are_shown_by_their_number() -> None:
    assert token_texts([7], {}) == ("[7]",)
