"""`moescope phenomena`: what it plans, prints, stores and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

Cli = Callable[..., Any]
SMALL = ("--texts", "3", "--max-length", "16", "--cut-texts", "3", "--controls", "2", "--no-needles", "--generate", "0")


@pytest.mark.usefixtures("demo_loaded")
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    outcome = cli("phenomena", "demo", "--data", corpus, "--dry-run", "--json", *SMALL)
    assert outcome.code == 0, outcome.err
    told = outcome.json
    assert told["texts"] == 3
    assert told["needle trials"] == "none"
    assert told["seconds"] >= 0
    assert any(step.startswith("cutting up to 4 links") for step in told)
    assert not (tmp_path / "runs.duckdb").exists()


@pytest.mark.usefixtures("demo_loaded")
def test_the_phenomena_of_the_demo_are_found_stored_and_reported(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    outcome = cli("phenomena", "demo", "--data", corpus, "--report", "p.html", *SMALL)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "assive activation" in lines[0]
    for word in ("writer", "sink", "heads", "What it shows", "random cuts"):
        assert word in outcome.out
    assert "all together about" in outcome.err, "the cost is said before it begins"
    assert outcome.err.index("all together about") < outcome.err.index("recording texts")
    assert "phenomena_chain" in (tmp_path / "p.html").read_text(encoding="utf-8") or "Writer" in outcome.out
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        run = store.run("phenomena")
        assert run.complete
        assert run.rows("massive_activations") >= 0
        assert run.rows("heads") > 0
        effects = store.fetch("SELECT count(DISTINCT effect_id) FROM effects WHERE base_run_id = ?", [run.run_id])
        sequences = store.fetch("SELECT count(*) FROM effect_sequences")
        assert effects[0][0] >= 1
        assert sequences[0][0] > 0


def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(cli: Cli, corpus: Path) -> None:
    cli("phenomena", "demo", "--full-grid", "--no-needles").assert_refused("full grid")
    cli("phenomena", "demo", "--full-grid", "--trials", "3").assert_refused("full_grid and trials")
    cli("phenomena", "demo", "--data", "nowhere.jsonl").assert_refused("nowhere.jsonl")
    cli("phenomena", "demo", "--data", corpus, "--report", "p.pdf").assert_refused("HTML")
    cli("phenomena", "demo", "--store", "nowhere/runs.duckdb").assert_refused("no such folder")
