"""`moescope intervene sweep`: answers, costs said before, resuming, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

Cli = Callable[..., Any]

TEXTS = ("In the beginning God created the heaven and the earth.", "def add(a, b):\n    return a + b\n",
         "Am Anfang schuf Gott Himmel und Erde.", "for i in range(10):\n    print(i)\n")  # fmt: skip


@pytest.fixture
def sweep(cli: Cli, tmp_path: Path, demo_loaded: None) -> Cli:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")

    def call(*options: object) -> Any:
        return cli("intervene", "sweep", "demo", "--data", data, "--store", tmp_path / "runs.duckdb", *options)

    return call


def test_sweep_prints_one_json_and_stores_its_effects(sweep: Cli, tmp_path: Path) -> None:
    outcome = sweep("--layers", "4-5", "--how", "route_around", "--output", tmp_path / "x.html", "--json")
    assert outcome.code == 0, outcome.err
    rows = outcome.json["table"]
    assert sum(row["metric"] == "ΔNLL" for row in rows) == 32
    assert {row["layer"] for row in rows} == {4, 5}
    assert (tmp_path / "x.html").stat().st_size > 10_000
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        found = store.fetch("SELECT count(DISTINCT effect_id), count(DISTINCT sweep_id) FROM effects")
        assert found == [(32, 1)]


def test_cost_is_said_before_and_a_dry_run_stores_nothing(sweep: Cli, tmp_path: Path) -> None:
    outcome = sweep("--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["effects"] == 96
    assert outcome.json["seconds"] > 0
    assert outcome.json["bound"] > 0  # of timed passes, so that any number may come out on a busy machine
    assert not (tmp_path / "runs.duckdb").exists()
    spoken = sweep("--kind", "top_k", "--numbers", "1", "--dry-run")
    assert "7 effects" in spoken.out


def test_same_sweep_again_is_refused_and_resumed(sweep: Cli) -> None:
    options = ("--kind", "drop", "--score", "frequency", "--score", "hotness", "--shares", "0.25,0.5", "--controls", 2)
    first = sweep(*options)
    assert first.code == 0, first.err
    assert "random sets of the same layers" in first.out
    assert "about" in first.err  # the cost, before
    sweep(*options, "--json").assert_refused("in the store already", "--resume")
    again = sweep(*options, "--resume", "--json")
    assert again.code == 0, again.err
    assert {row["set"] for row in again.json["table"]} == {"lowest by frequency", "lowest by hotness"}


def test_dose_takes_edits_in_words(sweep: Cli) -> None:
    outcome = sweep(
        "--kind", "dose", "--edit", "ablate layer=3 experts=1,2", "--strengths", "0,1", "--generate", 0, "--json"
    )
    assert outcome.code == 0, outcome.err
    rows = [row for row in outcome.json["table"] if row["metric"] == "ΔNLL"]
    assert [row["strength"] for row in rows] == [0, 1]
    assert rows[0]["value"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kind", "everything"), ("--kind cannot be 'everything'", "routing_value")),
        (("--how", "gently"), ("--how cannot be 'gently'", "route_around")),
        (("--layers", "3-x"), ("--layers cannot be '3-x'",)),
        (("--layers", "²"), ("--layers cannot be '²'",)),
        (("--layers", "5-2"), ("--layers cannot be '5-2'",)),
        (("--layers", "0-99999999999"), ("--layers cannot be",)),
        (("--kind", "top_k", "--numbers", "inf"), ("inf is no number of experts",)),
        (("--kind", "top_k", "--numbers", "nan"), ("nan is no number of experts",)),
        (("--shares", "0.1"), ("--shares is nothing for --kind experts", "drop or keep or top_p")),
        (("--kind", "drop", "--numbers", "1"), ("--numbers is nothing for --kind drop", "--kind top_k")),
        (("--kind", "top_p", "--score", "frequency"), ("--score is nothing for --kind top_p",)),
        (("--kind", "routing_value", "--screen", "5"), ("--screen is nothing", "--kind experts")),
        (("--kind", "keep", "--highest"), ("--highest is nothing", "--kind drop")),
        (("--layers", "9"), ("layer 9 has no router",)),
        (("--kind", "drop", "--shares", "a half"), ("no list of numbers",)),
        (("--kind", "top_k", "--numbers", "1.5"), ("1.5 is no number of experts",)),
        (("--kind", "dose"), ("--edit",)),
        (("--edit", "ablate layer=3 experts=1"), ("--kind dose",)),
        (("--output", "x.docx"), ("cannot be saved",)),
        (("--store", "no/such/folder/runs.duckdb"), ("no such folder",)),
        (("--kind", "drop", "--score", "beauty"), ("no measure 'beauty'", "frequency")),
    ],
    ids=lambda value: " ".join(map(str, value)) if value[0].startswith("--") else "",
)
def test_what_cannot_be_swept_is_refused_in_one_line(
    options: tuple[str, ...], words: tuple[str, ...], sweep: Cli
) -> None:
    sweep(*options, "--json").assert_refused(*words)


@pytest.mark.parametrize(
    "options",
    [("--kind", "top_k", "--numbers", "1,2"), ("--kind", "top_p", "--shares", "0.5"), ("--kind", "routing_value")],
)
def test_every_kind_is_printed(sweep: Cli, options: tuple[str, ...]) -> None:
    outcome = sweep(*options, "--controls", 2, "--layers", "5")
    assert outcome.code == 0, outcome.err
    assert "What it shows" in outcome.out
