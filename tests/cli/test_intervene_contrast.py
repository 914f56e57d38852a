"""`moescope intervene contrast`: from two files of prompts to stored effects; refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.core.intervention import Intervention
from moescope.store.store import Store

Cli = Callable[..., Any]

VERSES = ("In the beginning God created the heaven and the earth.", "And the earth was without form, and void.",
          "And God said, Let there be light.", "And the evening and the morning were the first day.")  # fmt: skip
CODE = ("def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i)\n", "import os\nimport sys\n",
        "class Thing(object):\n    pass\n")  # fmt: skip


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, texts in zip(paths, (VERSES, CODE), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return paths


@pytest.fixture
def contrast(cli: Cli, sets: tuple[Path, Path], tmp_path: Path, demo_loaded: None) -> Cli:
    def call(*options: object) -> Any:
        a, b = sets
        return cli(
            "intervene",
            "contrast",
            "demo",
            "--prompts-a",
            a,
            "--prompts-b",
            b,
            "--store",
            tmp_path / "runs.duckdb",
            *options,
        )

    return call


def test_contrast_prints_one_json_and_stores_its_effects(contrast: Cli, tmp_path: Path) -> None:
    outcome = contrast("--labels", "verse,code", "--suppress", 2, "--stimulate", 1, "--controls", 2, "--desired", " the",
                       "--undesired", "(", "--output", tmp_path / "x.html", "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    said = outcome.json
    rows = said["table"]
    assert {row["label"] for row in rows} == {"verse", "code", "verse − code"}
    assert {row["metric"] for row in rows} == {"delta_nll", "kl", "flips", "preference"}
    assert [sum(row["kind"] == kind for row in rows) for kind in ("target", "control")] == [24, 48]
    assert (tmp_path / "x.html").stat().st_size > 10_000
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        assert {run.name for run in store.runs()} == {"contrast: chosen on", "contrast: tested on"}
        kept = store.sql("SELECT kind, intervention FROM effects WHERE kind = 'target'").fetchall()
        kinds = {edit.kind for _, text in kept for edit in Intervention.from_json(text).edits}
        assert kinds == {"ablate", "force"}


def test_contrast_prints_a_table(contrast: Cli) -> None:
    outcome = contrast("--suppress", 1, "--controls", 1, "--method", "resonance", "--suppress-by", "renormalise")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Suppress 1: changes the NLL by")
    assert "Suppressed by renormalise" in outcome.out


def test_dry_run_says_what_it_would_do(contrast: Cli, tmp_path: Path) -> None:
    outcome = contrast("--stimulate", 3, "--dry-run", "--json")
    assert outcome.json == {
        "model": "demo", "experts chosen on": 4, "tested on": 4, "interventions": 2, "controls each": 5,
    }  # fmt: skip
    assert not (tmp_path / "runs.duckdb").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--method", "guess"), "guess"),
        (("--suppress-by", "magic"), "magic"),
        (("--stimulate-by", "magic"), "magic"),
        (("--labels", "one"), "two names"),
        (("--labels", "x,x"), "both sets are called"),
        (("--steer", "a,b"), "two numbers"),
        (("--tokens", "middle"), "positions cannot be"),
        (("--suppress", "0"), "nothing is to be"),
        (("--method", "npmi"), "npmi needs words"),
    ],
)
def test_senseless_options_are_refused(contrast: Cli, options: tuple[str, ...], word: str) -> None:
    contrast(*options).assert_refused(word)


def test_senseless_sets_are_refused(cli: Cli, sets: tuple[Path, Path], tmp_path: Path, demo_loaded: None) -> None:
    one, empty = tmp_path / "one.txt", tmp_path / "empty.jsonl"
    one.write_text("Only this.\n", encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    a = sets[0]
    cli("intervene", "contrast", "demo", "--prompts-a", a, "--prompts-b", a).assert_refused("same prompts")
    cli("intervene", "contrast", "demo", "--prompts-a", a, "--prompts-b", one).assert_refused("too few prompts")
    cli("intervene", "contrast", "demo", "--prompts-a", a, "--prompts-b", empty).assert_refused()
    cli("intervene", "contrast", "demo", "--prompts-a", a, "--prompts-b", tmp_path / "nowhere.jsonl").assert_refused(
        "nowhere"
    )
