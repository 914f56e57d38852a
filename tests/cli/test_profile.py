"""`profile` → `runs` → report: the main job, with data on stdout, news on stderr and an exit code that tells how it went."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moescope.store.store import Store

Cli = Callable[..., Any]


@pytest.fixture
def profile(cli: Cli, corpus: Path, tmp_path: Path, demo_loaded: None) -> Cli:
    def call(*options: object, model: object = "demo") -> Any:
        return cli("profile", model, "--data", corpus, "--store", tmp_path / "runs.duckdb", *options)

    return call


def test_profile_then_runs_then_report(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    store, report = tmp_path / "runs.duckdb", tmp_path / "report.html"
    options = ["--store", store, "--name", "base", "--report", report, "--json", "--time-plain"]
    profiled = cli("profile", "demo", "--data", corpus, *options)
    assert profiled.code == 0, profiled.err
    said = profiled.json
    assert (said["run"], said["status"], said["store"], said["report"]) == ("base", "complete", str(store), str(report))
    assert said["plain forward tokens/s"] > 0
    full, _, sites = said["coverage"].split(" sites")[0].partition(" of ")
    assert full == sites

    listed = cli("runs", store, "--json")
    assert listed.code == 0
    (run,) = listed.json
    assert (run["name"], run["status"], run["model"]) == ("base", "complete", "demo")
    assert run["settings"]["probes"] == ["experts", "residual", "routing", "tokens"]
    with Store(store, read_only=True) as opened:
        recorded = opened.run("base")
        assert recorded.rows("tokens") == said["tokens"] == run["summary"]["tokens"]
        assert recorded.rows("sequences") == 3
        labels = recorded.table("sequences").order("sequence_id").df()["label"].tolist()
        assert labels == ["english", "python", "german"]
        assert recorded.rows("routing") == said["tokens"] * len(set(recorded.table("routing").df()["layer"]))

    html = report.read_text(encoding="utf-8")
    assert "Run base" in html
    for section in ("coverage", "nll", "load", "router_entropy", "residual_norms", "expert_maxima"):
        assert f"id='{section}'" in html
    assert "INCOMPLETE RUN" not in html


def test_without_json_facts_go_to_stdout_and_progress_to_stderr(profile: Cli) -> None:
    outcome = profile("--name", "base")
    assert outcome.code == 0
    facts = dict(line.split("  ", 1) for line in outcome.out.splitlines())
    assert facts["status"].strip() == "complete"
    assert "recording base" in outcome.err
    assert "recording" not in outcome.out


def test_runs_are_numbered_where_no_name_is_given(profile: Cli, cli: Cli, tmp_path: Path) -> None:
    names = [profile("--probe", "tokens", "--json").json["run"] for _ in range(2)]
    assert names == ["demo", "demo-2"]
    shown = cli("runs", tmp_path / "runs.duckdb")
    for name in names:
        assert any(line.split()[0] == name for line in shown.out.splitlines())


def test_only_the_probes_named_are_recorded(profile: Cli, tmp_path: Path) -> None:
    assert profile("--probe", "routing", "--name", "r", "--json").code == 0
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        run = store.run("r")
        assert run.rows("routing") > 0
        assert run.rows("tokens") > 0, "tokens are always there"
        assert run.rows("residual") == run.rows("experts") == 0


def test_unreadable_lines_are_counted_where_asked(profile: Cli, corpus: Path) -> None:
    with corpus.open("a") as file:
        file.write("not json\n")
    outcome = profile("--skip-bad-lines", "--probe", "tokens", "--json")
    assert outcome.code == 0
    assert outcome.json["skipped"].startswith("1 unreadable records, the first: ")
    assert "line 4" in outcome.json["skipped"]


def test_long_documents_are_split_and_it_is_said(profile: Cli, tmp_path: Path) -> None:
    outcome = profile("--max-length", "8", "--probe", "tokens", "--json", "--name", "short")
    assert outcome.json["split"].startswith("3 documents")
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        lengths = store.run("short").table("sequences").df()
    assert lengths["n_tokens"].max() <= 8
    assert lengths["document_id"].nunique() == 3


def test_batch_size_changes_no_row_of_tokens(profile: Cli, tmp_path: Path) -> None:
    for size in (1, 3):
        assert profile("--batch-size", size, "--probe", "tokens", "--name", f"by {size}", "--json").code == 0
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        one, three = (store.run(f"by {size}").table("tokens").order("token").df() for size in (1, 3))
    assert one["token_id"].tolist() == three["token_id"].tolist()
    assert one["nll"].to_numpy() == pytest.approx(three["nll"].to_numpy(), abs=1e-3, nan_ok=True)


def test_dry_run_says_what_would_be_done_and_makes_nothing(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("profile", "demo", "--store", tmp_path / "runs.duckdb", "--dry-run", "--json")
    assert outcome.code == 0
    plan = outcome.json
    assert plan["run"] == "demo"
    assert plan["labels"] == 10
    assert "bundled labelled corpus" in outcome.err, "news of a default that was chosen goes to stderr"
    assert list(tmp_path.iterdir()) == []


def test_dry_run_leaves_the_store_byte_for_byte(profile: Cli, tmp_path: Path) -> None:
    path = tmp_path / "runs.duckdb"
    Store(path).close()
    with duckdb.connect(str(path)) as connection:  # a run whose recorder was killed
        connection.execute("INSERT INTO runs (run_id, name, status) VALUES (uuid(), 'cut off', 'running')")
    before = path.read_bytes()
    assert profile("--dry-run", "--json").code == 0
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("runs")] == ["runs.duckdb"]


@pytest.fixture
def nan_model(tmp_path: Path) -> Path:
    """The bundled model with a final norm of NaN: every logit is NaN, and nothing before it."""
    import torch
    from safetensors.torch import load_file, save_file

    from moescope.probes.demo import MODEL_DIR

    folder = tmp_path / "nan"
    shutil.copytree(MODEL_DIR, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_model_that_gives_nan_ends_incomplete_with_3_and_a_marked_report(
    profile: Cli, cli: Cli, nan_model: Path, tmp_path: Path
) -> None:
    outcome = profile("--name", "broken", "--report", tmp_path / "r.html", "--json", model=nan_model)
    assert outcome.code == 3, outcome.err
    assert outcome.json["status"] == "incomplete"
    assert "invalid" in outcome.err
    assert "tokens.nll" in outcome.err
    assert "Traceback" not in outcome.err
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "This run is incomplete" in html
    assert "INCOMPLETE RUN" in html
    assert cli("runs", tmp_path / "runs.duckdb", "--json").json[0]["status"] == "incomplete"


def _fail_at(monkeypatch: pytest.MonkeyPatch, batch: int, error: BaseException) -> None:
    """Let the n-th batch fail, between the forward pass and the handing over of its records."""
    import moescope.probes.passes as module

    plain, calls = module.token_nll, []

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == batch:
            raise error
        return plain(*arguments, **named)

    monkeypatch.setattr(module, "token_nll", failing)


def test_model_that_fails_on_the_way_ends_with_4_and_a_failed_run(
    profile: Cli, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(monkeypatch, 2, RuntimeError("the kernel\nwent away"))
    outcome = profile("--name", "base", "--batch-size", "1")
    assert (outcome.code, outcome.out) == (4, "")
    assert "error: the model failed on the way" in outcome.err
    assert "the kernel went away" in outcome.err
    assert "Traceback" not in outcome.err
    (run,) = cli("runs", tmp_path / "runs.duckdb", "--json").json
    assert run["status"] == "failed"
    assert "the kernel" in run["summary"]["stopped"]


def test_interruption_ends_with_130_and_keeps_whole_sequences(
    profile: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(monkeypatch, 3, KeyboardInterrupt())
    outcome = profile("--name", "base", "--batch-size", "1")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert "interrupted" in outcome.err
    with Store(tmp_path / "runs.duckdb") as store:
        run = store.run("base")
        assert run.status == "incomplete"
        assert run.info["summary"]["stopped"] == "interrupted"
        sequences = run.table("sequences").order("sequence_id").df()
        tokens = run.table("tokens").df().groupby("sequence_id").size()
        assert sequences["sequence_id"].tolist() == [0, 1]
        assert tokens.tolist() == sequences["n_tokens"].tolist()
        assert run.coverage.incomplete


def test_bug_of_ours_ends_with_4_one_line_and_the_way_to_its_traceback(
    profile: Cli, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moescope.cli.profile as module

    def broken(*_: object) -> None:
        raise ZeroDivisionError("[/red] by zero")

    monkeypatch.setattr(module, "check_report", broken)
    outcome = profile()
    assert outcome.code == 4
    assert outcome.err == (
        "error: internal error: ZeroDivisionError: [/red] by zero. Run `moescope --debug …` for the traceback.\n"
    )
    debugged = cli("--debug", "profile", "demo", "--store", tmp_path / "runs.duckdb")
    assert debugged.code == 4
    assert "Traceback" in debugged.err
    assert "moescope/cli/profile.py" in debugged.err


def test_json_of_a_run_reads_back_in_full(profile: Cli, cli: Cli, tmp_path: Path) -> None:
    name = "ünï 'quote' \"double\" 🧪 [/red] \u202e"
    assert profile("--probe", "tokens", "--name", name, "--json").json["run"] == name
    (run,) = cli("runs", tmp_path / "runs.duckdb", "--json").json
    assert run["name"] == name
    assert json.dumps(run)


def test_continued_texts_are_recorded_and_told(profile: Cli, tmp_path: Path) -> None:
    outcome = profile("--name", "base", "--generate", "3", "--batch-size", "2", "--json")
    assert outcome.code == 0
    assert outcome.json["status"] == "complete"
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        phases = dict(store.fetch("SELECT phase, count(*) FROM tokens GROUP BY phase"))
    assert outcome.json["generated"] == f"{phases['decode']:,} of these tokens"
    assert outcome.json["tokens"] == phases["prefill"] + phases["decode"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--generate", "2", "--padding", "right"], "padded at the left"),
        (["--generate", "2", "--time-plain"], "many more"),
        (["--padding", "both"], "no padding at 'both'"),
        (["--sample", "0"], "share of the tokens"),
        (["--site", "blocks.0.hook_nothing"], "not a site"),
        (["--site", "blocks.99.hook_resid_post"], "no site blocks.99.hook_resid_post"),
        (["--probe", "activations"], "none was named"),
        (["--device", "cpu", "--device-map", "auto"], "pass one of them"),
    ],
)
def test_options_that_contradict_each_other_or_the_model_are_refused_before_a_run(
    options: list[str], words: str, profile: Cli, cli: Cli, tmp_path: Path
) -> None:
    outcome = profile("--name", "base", *options)
    assert outcome.code == 2
    assert words in outcome.err
    assert not (tmp_path / "runs.duckdb").exists() or cli("runs", tmp_path / "runs.duckdb", "--json").json == []
