"""Descriptions by planted describers: one that reads off the marks, some that know nothing, and some that answer nonsense."""

from __future__ import annotations

import random as chance
import re
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError, RunError
from moescope.sae.concepts.describe import Descriptions, describe
from moescope.store.store import Store

Plant = Callable[..., Any]
DOCUMENTS, LENGTH = 60, 30
CAT, DOG = 1, 2  # experts, and the tokens that alone choose them
WORDS = {0: b" the", 1: b" cat", 2: b" dog", 3: b" sat", 4: b" on", 5: b" mat"}


def oracle(prompt: str) -> str:
    """The commonest marked word; yes to passages that hold the described word, marked where there are marks."""
    if "DESCRIPTION:" in prompt:
        marks = re.findall("⟦([^⟧]*)⟧", prompt.split("\n\n", 1)[1])
        marked = Counter(word for mark in marks for word in mark.split())
        return f"DESCRIPTION: the word {marked.most_common(1)[0][0]}"
    found = re.search(r"the word (\w+)", prompt)
    assert found
    lines = []
    for number, text in re.findall(r"(?m)^(\d+)\. (.*)$", prompt):
        marks = re.findall("⟦ ?([^⟧]*)⟧", text)
        fits = all(found[1] in mark for mark in marks) if marks else found[1] in text
        lines.append(f"{number}: {'yes' if fits else 'no'}")
    return "\n".join(lines)


def always_yes(prompt: str) -> str:
    return oracle(prompt) if "DESCRIPTION:" in prompt else "\n".join(f"{i}: yes" for i in range(1, 6))


def guess(prompt: str) -> str:
    draw = chance.Random(prompt)
    return (
        oracle(prompt)
        if "DESCRIPTION:" in prompt
        else "\n".join(f"{i}: {draw.choice(['yes', 'no'])}" for i in range(1, 6))
    )


@pytest.fixture
def run(plant: Plant, planted: ModuleType) -> Any:
    """Half of the documents say cat, half dog, three tokens in a row now and then; each has an expert of its own."""
    ids = np.random.default_rng(0).choice([0, 3, 4, 5], DOCUMENTS * LENGTH)
    for document in range(DOCUMENTS):
        for start in (4, 17):
            ids[document * LENGTH + start : document * LENGTH + start + 2] = CAT if document % 2 else DOG
    chosen = np.where(ids == CAT, 1, np.where(ids == DOG, 2, 0))
    return plant(
        lengths=[LENGTH] * DOCUMENTS, ids=ids.tolist(), vocabulary=WORDS, routers=[planted.Router(chosen[:, None], 4)]
    )


def ask(store: Store, run: Any, complete: Callable[[str], str], **given: Any) -> Descriptions:
    fields: dict[str, Any] = {
        "units": [CAT, DOG], "unit_kind": "expert", "layer": 0, "describer": "test", "width": 8, "draws": 100, "progress": False,
    }  # fmt: skip
    return describe(store, run, complete=complete, **{**fields, **given})


def score(found: Descriptions, unit: int, metric: str) -> dict[str, Any]:
    rows = [row for row in found.rows if (row["unit"], row["metric"]) == (unit, metric)]
    return rows[0] | {row["null_kind"]: row["null_value"] for row in rows if "null_kind" in row}


def test_a_describer_that_knows_detects_and_tells_marks(store: Store, run: Any) -> None:
    found = ask(store, run, oracle)
    assert found.texts == {CAT: "the word cat", DOG: "the word dog"}
    for unit in (CAT, DOG):
        detection, fuzzing = score(found, unit, "detection"), score(found, unit, "fuzzing")
        assert (detection["value"], fuzzing["value"]) == (1, 1)
        assert detection["chance"] == 0.5
        assert detection["another unit's description"] < 0.6
        assert fuzzing["another unit's description"] == 0.5
        assert (detection["n"], fuzzing["n"]) == (20, 14)  # of the 30 documents with the word, 15 were shown
        assert (detection["ci_low"], detection["ci_high"]) == (1, 1)
    stored = store.sql("SELECT unit, text, describer, layer, block, prompt FROM descriptions ORDER BY unit").fetchall()
    assert [row[:5] for row in stored] == [
        (CAT, "the word cat", "test", 0, "mlp"),
        (DOG, "the word dog", "test", 0, "mlp"),
    ]
    assert "⟦ cat cat⟧" in stored[0][5]
    assert store.fetch("SELECT count(*) FROM description_scores") == [(len(found.rows),)]


def test_documents_that_were_shown_are_not_judged(store: Store, run: Any) -> None:
    """Texts differ from document to document, so a passage tells whose it is."""
    shown: set[str] = set()
    judged: set[str] = set()

    def listen(prompt: str) -> str:
        passages = re.findall(r"(?m)^\d+\. (.*)$", prompt)
        (shown if "DESCRIPTION:" in prompt else judged).update(re.sub("[⟦⟧]", "", text) for text in passages)
        return oracle(prompt)

    ask(store, run, listen, units=[CAT], width=12, judged=16)
    assert len(shown) > 10
    assert len(judged) > 10
    assert not shown & judged


@pytest.mark.parametrize("stupid", [always_yes, guess])
def test_a_judge_that_knows_nothing_scores_chance(store: Store, run: Any, stupid: Callable[[str], str]) -> None:
    found = ask(store, run, stupid, judged=28, examples=2)
    values = [score(found, unit, metric)["value"] for unit in (CAT, DOG) for metric in ("detection", "fuzzing")]
    assert np.mean(values) == pytest.approx(0.5, abs=1e-9 if stupid is always_yes else 0.15)


def test_units_described_before_are_left_and_scored_where_scores_are_missing(store: Store, run: Any) -> None:
    first = ask(store, run, oracle, units=[CAT], scores=())
    assert (first.calls, first.rows) == (1, ())
    second = ask(store, run, oracle, scores=("detection",))
    assert (second.kept, second.described) == ((CAT,), (DOG,))
    assert {row["unit"] for row in second.rows} == {CAT, DOG}
    third = ask(store, run, oracle, scores=("detection",))
    assert (third.calls, third.rows) == (0, ())
    fourth = ask(store, run, lambda prompt: "DESCRIPTION: pets", scores=(), again=True)
    assert fourth.texts == {CAT: "pets", DOG: "pets"}
    assert store.fetch("SELECT count(*) FROM descriptions") == [(2,)]
    assert store.fetch("SELECT count(*) FROM description_scores") == [(0,)]
    assert ask(store, run, oracle, describer="someone else", scores=()).described == (CAT, DOG)


HOSTILE = {
    "empty": "",
    "blank": " \n\t\n",
    "dots": "...\n***",
    "huge": "x y " * 500_000,
    "markup": "# Answer\n**DESCRIPTION:** `<b>cats</b>`",
    "german": "Klar! Description: Wörter über Katzen",
    "chinese": "DESCRIPTION：关于猫的词",
    "turned": "DESCRIPTION: \u202ecats\x1b[31m",
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_descriptions_are_read_however_they_are_dressed(store: Store, run: Any, name: str) -> None:
    found = ask(store, run, lambda prompt: HOSTILE[name], units=[CAT], scores=())
    if name in ("empty", "blank", "dots"):
        assert found.texts == {}
        assert "no description could be read" in found.skipped[CAT]
        assert (found.calls, found.retries, found.unread) == (2, 1, 1)
        assert store.fetch("SELECT count(*) FROM descriptions") == [(0,)]
        return
    text = found.texts[CAT]
    assert 3 < len(text) <= 400
    assert text.isprintable()
    expected = {
        "markup": "<b>cats</b>",
        "german": "Wörter über Katzen",
        "chinese": "关于猫的词",
        "turned": "\ufffdcats[31m",
    }
    assert text == expected.get(name, text)


@pytest.mark.parametrize("answer", ["", "no idea", "x" * 100_000, "99: yes\n-1: no", "<1>: yes?"])
def test_judgements_that_cannot_be_read_are_no_score(store: Store, run: Any, answer: str) -> None:
    found = ask(store, run, lambda prompt: oracle(prompt) if "DESCRIPTION:" in prompt else answer, units=[CAT])
    assert [row["metric"] for row in found.rows] == ["detection_unread", "fuzzing_unread"]
    assert [row["value"] for row in found.rows] == [20, 14]
    assert found.unread == 4 + 3  # questions of five passages


def test_some_unread_answers_are_left_out_and_counted(store: Store, run: Any) -> None:
    def partly(prompt: str) -> str:
        return oracle(prompt) if "DESCRIPTION:" in prompt else "\n".join(oracle(prompt).splitlines()[:4])

    found = ask(store, run, partly, units=[CAT], scores=("detection",))
    assert score(found, CAT, "detection")["value"] == 1
    assert score(found, CAT, "detection")["n"] == 16
    assert score(found, CAT, "detection_unread")["value"] == 4


def test_a_function_that_fails_now_and_then_is_asked_again(store: Store, run: Any) -> None:
    calls = iter(range(10_000))

    def shaky(prompt: str) -> str:
        if next(calls) % 2 == 0:
            raise OSError("line is busy")
        return oracle(prompt)

    found = ask(store, run, shaky, scores=("detection",))
    assert score(found, CAT, "detection")["value"] == 1
    assert found.errors[-1] == "OSError: line is busy"


@pytest.mark.parametrize("broken", [lambda prompt: 1 / 0, lambda prompt: None, lambda prompt: b"bytes"])
def test_a_function_that_always_fails_ends_the_work(store: Store, run: Any, broken: Any) -> None:
    with pytest.raises(RunError, match="failed 4 times in a row"):
        ask(store, run, broken)


def test_what_was_described_before_a_failure_is_kept(store: Store, run: Any) -> None:
    def until_scores(prompt: str) -> str:
        if "DESCRIPTION:" not in prompt:
            raise RuntimeError("gone")
        return oracle(prompt)

    with pytest.raises(RunError, match="gone"):
        ask(store, run, until_scores)
    found = ask(store, run, oracle)
    assert found.kept == (CAT, DOG)
    assert score(found, DOG, "fuzzing")["value"] == 1


def test_units_that_are_never_active_are_skipped(store: Store, run: Any) -> None:
    found = ask(store, run, oracle, units=[3])
    assert found.skipped == {3: "active on too few documents"}
    assert found.calls == 0


def test_latents_neurons_and_heads_are_described_from_their_vectors(
    store: Store, plant: Plant, planted: ModuleType, components: Any
) -> None:
    ids = np.tile([0, 3, 4, 5, 0, 3, 4, 5, 0, 3], DOCUMENTS)
    ids[2::20] = CAT
    vectors = np.zeros((len(ids), 3))
    vectors[:, 0] = np.random.default_rng(0).random(len(ids)) * 0.1
    vectors[ids == CAT, 2] = 4
    run = plant(
        lengths=[10] * DOCUMENTS, ids=ids.tolist(), vocabulary=WORDS,
        vectors={
            "blocks.0.hook_resid_post": planted.Vectors(vectors - 0.0),
            "blocks.0.mlp.hook_post": planted.Vectors(vectors),
            "blocks.0.attn.hook_z": planted.Vectors(np.repeat(vectors[:, :, None], 2, axis=2)),
        },
    )  # fmt: skip
    for kind, given in (("latent", {"sae": components(3), "layer": None}), ("neuron", {}), ("head", {})):
        found = ask(store, run, oracle, units=[2], unit_kind=kind, judged=8, **given)
        assert found.texts == {2: "the word cat"}, kind
        assert score(found, 2, "detection")["value"] == 1
    rows = store.fetch("SELECT unit_kind, layer, block, sae_id IS NULL FROM descriptions ORDER BY 1")
    assert rows == [("head", 0, "attn", True), ("latent", 0, None, False), ("neuron", 0, "mlp", True)]


def test_stored_contexts_of_latents_are_what_the_describer_is_shown(
    store: Store, plant: Plant, planted: ModuleType, components: Any
) -> None:
    ids = np.tile([0, 3, 4, 5, 0, 3, 4, 5, 0, 3], DOCUMENTS)
    ids[2::20] = CAT
    vectors = np.zeros((len(ids), 3))
    vectors[ids == CAT, 2] = 4
    run = plant(
        lengths=[10] * DOCUMENTS, ids=ids.tolist(), vocabulary=WORDS,
        vectors={"blocks.0.hook_resid_post": planted.Vectors(vectors)},
    )  # fmt: skip
    sae = components(3)
    planted.insert(
        run, "feature_contexts",
        [
            {
                "sae_id": sae.sae_id, "feature": 2, "stratum": 0, "rank": rank, "sequence_id": 2 * rank, "position": 2,
                "value": 4.0, "first_position": 1, "activations": [0.0, 4.0, None],
            }
            for rank in range(3)
        ],
    )  # fmt: skip
    ask(store, run, oracle, units=[2], unit_kind="latent", layer=None, sae=sae, scores=())
    prompt = store.fetch("SELECT prompt FROM descriptions")[0][0]
    assert prompt.startswith("documents: [0, 2, 4]\n")
    assert "1.  sat⟦ cat⟧ mat\n" in prompt


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"units": []}, "no units"),
        ({"units": [9]}, "no expert 9"),
        ({"layer": None}, "which layer"),
        ({"layer": 5}, "no routing of layer 5"),
        ({"unit_kind": "mood"}, "no units of kind"),
        ({"unit_kind": "latent"}, "need their autoencoder"),
        ({"unit_kind": "neuron"}, "kept no vectors"),
        ({"unit_kind": "head"}, "kept no vectors"),
        ({"unit_kind": "neuron", "scores": ["causal"]}, "no causal score"),
        ({"scores": ["causal"]}, "runs the model"),
        ({"scores": ["beauty"]}, "no score 'beauty'"),
        ({"describer": " "}, "needs a name"),
        ({"judged": 1}, "judged cannot be 1"),
        ({"examples": 0}, "examples cannot be 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(
    store: Store, run: Any, given: dict[str, Any], said: str
) -> None:
    def never(prompt: str) -> str:
        raise AssertionError("asked")

    with pytest.raises(InputError, match=said):
        ask(store, run, never, **given)


def test_marks_in_the_text_itself_are_not_taken_for_ours(store: Store, plant: Plant, planted: ModuleType) -> None:
    words = {0: "⟦".encode(), 1: " 猫".encode()[:3], 2: " 猫".encode()[3:], 3: b"\n"}
    ids = np.tile([0, 1, 2, 3], DOCUMENTS)
    run = plant(
        lengths=[4] * DOCUMENTS, ids=ids.tolist(), vocabulary=words,
        routers=[planted.Router(np.where((ids == 1) | (ids == 2), 1, 0)[:, None], 2)],
    )  # fmt: skip
    prompts: list[str] = []
    ask(store, run, lambda prompt: prompts.append(prompt) or "DESCRIPTION: x", units=[1], scores=())  # type: ignore[func-returns-value]  # the list's own None
    assert "1. [⟦ 猫⟧↵\n" in prompts[0]
