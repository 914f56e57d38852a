"""`moescope merge` on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest

import moescope as ms


@pytest.fixture
def shards(tmp_path: Path, tiny_model: Any, token_ids: Any) -> list[Path]:
    """Three shards of two batches each."""
    from moescope.probes.plan_walk import PlanWalk
    from moescope.probes.workers.shard_recording import ShardRecording

    model, corpus = ms.load(tiny_model("llama")), ms.Corpus.from_token_ids(token_ids((4, 7, 2, 9, 5, 3)))
    options: dict[str, Any] = {"name": "base", "batch_size": 1, "rules": None}
    paths = [tmp_path / f"shard-{number}.duckdb" for number in range(3)]
    for number, path in enumerate(paths):
        with ms.Store(path) as store:
            walk = PlanWalk(ShardRecording(model, corpus, store, batches=[], plan_batches=None, **options).whole)
            batches = walk.take(range(2 * number, 2 * number + 2))
            ShardRecording(model, corpus, store, batches=batches, plan_batches=walk.length, **options).run(
                progress=False
            )
    return paths


def test_shards_become_one_run(cli: Any, shards: list[Path], tmp_path: Path) -> None:
    done = cli("merge", "runs.duckdb", *shards, "--json")
    assert done.code == 0, done.err
    told = done.json
    assert (told["run"], told["status"], told["shards"], told["sequences"], told["tokens"]) == (
        "base",
        "complete",
        3,
        6,
        30,
    )
    listed = cli("runs", "runs.duckdb", "--json").json
    assert [run["name"] for run in listed] == ["base"]
    assert all(path.exists() for path in shards)
    again = cli("merge", "runs.duckdb", *shards, "--name", "second")
    assert again.code == 0
    assert "complete" in again.out


def test_a_gap_is_told_and_the_code_is_3(cli: Any, shards: list[Path]) -> None:
    done = cli("merge", "runs.duckdb", shards[0], shards[2])
    assert done.code == 3
    assert "incomplete" in done.out
    assert "batches 2 to 3 of the plan's 6" in done.err


def test_bad_input_is_one_clear_line(cli: Any, shards: list[Path], tmp_path: Path) -> None:
    assert cli("merge", "runs.duckdb").code == 2
    cli("merge", "runs.duckdb", "none.duckdb").assert_refused("there is no store at none.duckdb")
    (tmp_path / "text.duckdb").write_text("not a store at all, only text")
    cli("merge", "runs.duckdb", "text.duckdb").assert_refused("is not a store")
    other = shutil.copy(shards[1], tmp_path / "other.duckdb")
    with duckdb.connect(other) as connection:
        connection.execute("UPDATE runs SET model = 'another'")
    cli("merge", "runs.duckdb", shards[0], other).assert_refused("not parts of one plan", "Found: another")
    assert not (tmp_path / "runs.duckdb").exists()
    assert cli("merge", "runs.duckdb", *shards).code == 0
    cli("merge", "runs.duckdb", *shards).assert_refused("already has a run called 'base'")
    cli("merge", shards[0], *shards).assert_refused("both a shard and the store")


def test_help_says_what_it_takes(cli: Any) -> None:
    done = cli("merge", "--help")
    assert done.code == 0
    for word in ("OUT", "SHARDS", "--name", "--json"):  # spelt as the terminal likes
        assert word.lower() in done.out.lower()
