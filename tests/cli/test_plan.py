"""`moescope plan`: the table and its JSON, what it refuses, and that it writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


@pytest.fixture
def plan(cli: Cli, corpus: Path, demo_loaded: None) -> Cli:
    """`plan("--probe", "routing")` plans three short texts through the bundled model."""
    return lambda *arguments: cli("plan", "demo", "--data", corpus, *arguments)


def test_plan_says_what_a_profile_then_takes(plan: Cli, cli: Cli, corpus: Path, tmp_path: Path) -> None:
    planned = plan("--json")
    assert planned.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [corpus.name]
    recorded = cli("profile", "demo", "--data", corpus, "--store", tmp_path / "runs.duckdb", "--json")
    assert planned.json["tokens"] == recorded.json["tokens"]
    assert planned.json["documents"] == 3
    assert planned.json["bytes"] == pytest.approx((tmp_path / "runs.duckdb").stat().st_size, rel=0.1)
    assert planned.json["seconds"] > 0
    assert planned.json["memory_bytes"] > 10 << 20
    assert planned.json["costs"][0]["part"] == "forward pass"


def test_plan_shows_a_line_for_each_probe(plan: Cli) -> None:
    told = plan("--probe", "routing", "--site", "blocks.2.hook_resid_post", "--sample", "0.5")
    assert told.code == 0
    for name in ("forward pass", "tokens", "routing", "activations", "the file itself"):
        assert f"\n{name} " in told.out
    assert "residual" not in told.out
    assert "vectors of 0.5 of the tokens" in told.out


def test_budget_says_what_is_lost(plan: Cli) -> None:
    whole = plan("--json").json["bytes"]
    told = plan("--budget", f"{whole - 1}", "--json")
    assert told.code == 0
    assert told.json["bytes"] < whole
    assert len(told.json["lost"]) >= 1
    assert any("left out" in note for note in told.json["notes"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "lots"], "number of bytes"),
        (["--budget", "100KB"], "at least"),
        (["--sample", "2"], "share of the tokens"),
        (["--probe", "nothing"], "nothing"),
        (["--site", "blocks.0.hook_nothing"], "not a site"),
        (["--store", "no/such/folder/runs.duckdb"], "no folder"),
        (["--generate", "2", "--padding", "right"], "padded at the left"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: list[str], words: str, plan: Cli) -> None:
    plan(*options).assert_refused(words)


def test_plan_takes_the_flags_of_profile() -> None:
    import inspect

    from moescope.cli.plan import plan
    from moescope.cli.profile import profile

    of_plan, of_profile = (inspect.signature(command).parameters for command in (plan, profile))
    own = {"budget"}
    of_recording = {
        "name",
        "report",
        "thresholds",
        "time_plain",
        "dry_run",
        "resume",
        "workers",
        "ray_address",
        "intervention",
    }
    assert set(of_profile) - set(of_plan) <= of_recording
    assert set(of_plan) - set(of_profile) <= own
    for name in set(of_plan) & set(of_profile):
        assert of_plan[name].default == of_profile[name].default, name
