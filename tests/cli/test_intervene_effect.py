"""`moescope intervene effect` and `profile --intervention`: what they print, save and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

Cli = Callable[..., Any]
EDIT = "ablate layer=3 experts=5"


@pytest.fixture
def effect(cli: Cli, corpus: Path, tmp_path: Path, demo_loaded: None) -> Cli:
    """`effect("--edit", …)`: the command on three texts, with two controls."""

    def call(*options: object, store: str = "runs.duckdb", controls: int = 2) -> Any:
        return cli(
            "intervene",
            "effect",
            "demo",
            "--data",
            corpus,
            "--store",
            tmp_path / store,
            "--controls",
            controls,
            *options,
        )

    return call


def stored(path: Path, query: str) -> list[tuple[Any, ...]]:
    with Store(path, read_only=True) as store:
        return store.fetch(query)


def test_effect_is_measured_printed_and_stored(effect: Cli, tmp_path: Path) -> None:
    said = effect("--edit", EDIT, "--seed", 1)
    assert said.code == 0, said.err
    first = said.out.splitlines()[0]
    assert first.startswith("Removing L3E5 ")
    assert " nats" in first
    assert "2 matched controls" in first
    assert "ΔNLL" in said.out
    assert "KL" in said.out
    assert "top-1 flips" in said.out
    kinds = stored(tmp_path / "runs.duckdb", "SELECT kind, count(DISTINCT draw) FROM effects GROUP BY 1 ORDER BY 1")
    assert kinds == [("control", 2), ("target", 0)]
    assert stored(tmp_path / "runs.duckdb", "SELECT name, status FROM runs") == [("base", "complete")]


def test_json_is_the_whole_answer_and_nothing_else(effect: Cli) -> None:
    answer = effect("--edit", EDIT, "--edit", "skip layer=5 part=mlp strength=0", "--name", "both", "--json").json
    assert answer["title"].startswith("both ")
    assert {row["kind"] for row in answer["table"]} == {"target", "control", "difference"}
    assert {row["metric"] for row in answer["table"]} == {"base_nll", "delta_nll", "kl", "flips"}
    assert answer["interval"]
    assert answer["null"]


def test_answer_report_and_intervention_are_saved(
    effect: Cli, cli: Cli, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []

    def write_report(run: Any, path: Path) -> Path:
        reported.append(run.name)
        return path

    monkeypatch.setattr("moescope.report.write.write_report", write_report)
    saved = tmp_path / "cut.json"
    said = effect(
        "--edit", EDIT, "--save-intervention", saved, "--output", tmp_path / "effect.html", "--report", tmp_path / "report.html",
        "--decompose", "--generate", 5, "--prompts", 2, "--keep-run", "cut",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "ΔNLL, re-routing" in said.out
    assert "repetition (seq-rep-4)" in said.out
    assert "Removing L3E5" in (tmp_path / "effect.html").read_text(encoding="utf-8")
    assert reported == ["base"], "the report is of the run that effects are measured against"
    assert json.loads(saved.read_text())["edits"] == [{"kind": "ablate", "layer": 3, "experts": [5]}]
    again = effect("--intervention", saved, "--json")
    kept = stored(tmp_path / "runs.duckdb", "SELECT name FROM runs WHERE intervention IS NOT NULL")
    assert kept == [("cut",)]
    assert again.json["title"].startswith("Removing L3E5")
    recorded = cli(
        "profile",
        "demo",
        "--data",
        corpus,
        "--store",
        tmp_path / "runs.duckdb",
        "--name",
        "again",
        "--intervention",
        saved,
    )
    assert recorded.code == 0, recorded.err
    query = "SELECT name, intervention->'$.edits[0].experts' FROM runs WHERE intervention IS NOT NULL ORDER BY name"
    assert stored(tmp_path / "runs.duckdb", query) == [("again", "[5]"), ("cut", "[5]")]


def test_dry_run_checks_everything_and_writes_nothing(effect: Cli, tmp_path: Path) -> None:
    plan = effect("--edit", EDIT, "--decompose", "--dry-run", "--json").json
    assert plan["controls"] == 2
    assert plan["passes over the corpus"] == 8, (
        "the baseline, the plain pass, and three variants with and without replay"
    )
    assert "Ablate(layer=3" in plan["intervention"]
    effect("--edit", "ablate layer=3 experts=99", "--dry-run").assert_refused("no expert 99")
    assert not (tmp_path / "runs.duckdb").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["one of --edit and --intervention is needed"]),
        (["--edit", EDIT, "--intervention", "x.json"], ["only one"]),
        (["--intervention", "nowhere.json"], ["nowhere.json"]),
        (["--edit", "ablade layer=3"], ["ablade", "ablate"]),
        (["--edit", "ablate layer=3 experts=99"], ["no expert 99"]),
        (["--edit", "ablate layer=9 experts=1"], ["layer"]),
        (["--edit", "ablate layer=3 experts=0-15"], ["layer 3"]),
        (["--edit", "mask_head layer=0 heads=77"], ["77"]),
        (["--edit", "set_channel layer=0 channels=5000"], ["5000"]),
        (["--edit", "add layer=0 vector=1,2"], ["2"]),
        (["--edit", "set_routing run=nowhere"], ["nowhere"]),
        (["--edit", EDIT, "--group", "colour"], ["colour"]),
        (["--edit", EDIT, "--base", "nowhere"], ["nowhere"]),
        (["--edit", EDIT, "--output", "answer.xyz"], ["answer.xyz"]),
        (["--edit", EDIT, "--output", "nowhere/answer.html"], ["no such folder"]),
        (["--edit", EDIT, "--report", "report.pdf"], [".html"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(effect: Cli, options: list[str], words: list[str], tmp_path: Path) -> None:
    said = effect(*options)
    assert said.code == 2, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert sum(line.startswith("error: ") for line in said.err.splitlines()) == 1
    for word in words:
        assert word in said.err
    path = tmp_path / "runs.duckdb"
    assert not path.exists() or stored(path, "SELECT count(*) FROM effects") == [(0,)]


def test_intervention_of_another_model_is_refused(effect: Cli, cli: Cli, corpus: Path, tmp_path: Path) -> None:
    saved = tmp_path / "cut.json"
    assert effect("--edit", EDIT, "--save-intervention", saved, "--dry-run").code == 0
    foreign = json.loads(saved.read_text()) | {"anatomy": "0" * 16}
    saved.write_text(json.dumps(foreign))
    effect("--intervention", saved).assert_refused("made for another model")
    store = tmp_path / "runs.duckdb"
    for options in ((), ("--dry-run",)):
        said = cli("profile", "demo", "--data", corpus, "--store", store, "--intervention", saved, *options)
        said.assert_refused("made for another model")


def test_profile_under_an_intervention_is_a_plain_recording(
    cli: Cli, corpus: Path, tmp_path: Path, demo_loaded: None
) -> None:
    from moescope.core.edit_kinds.experts import Ablate
    from moescope.core.intervention import Intervention

    saved = tmp_path / "cut.json"
    Intervention([Ablate(layer=3, experts=5)]).save(saved)
    for option in (("--workers", 2), ("--budget", "1GB"), ("--time-plain",), ("--generate", 3)):
        said = cli("profile", "demo", "--data", corpus, "--store", "runs.duckdb", "--intervention", saved, *option)
        assert said.code == 2
        assert "intervention" in said.err
