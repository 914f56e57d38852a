"""Recording vectors for autoencoders: within a budget of tokens and bytes, no block too many, with room on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import moescope as ms
from moescope.cli.sae.record import read_count, record
from moescope.core.errors import InputError, RunError
from moescope.sae import recording
from moescope.sae.recording import plan_vectors, record_vectors
from moescope.store.vectors import vector_shards

LENGTHS = (9, 4, 12, 7, 20)
POST, INSIDE = "blocks.0.hook_resid_post", "blocks.0.mlp.experts.hook_out"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def rows_of(run: Any, site: str) -> list[int]:
    return [int(t) for shard in vector_shards(run, site) for t in shard.token]


@pytest.fixture
def corpus(token_ids: Callable[..., Any]) -> Any:
    return ms.Corpus.from_token_ids(token_ids(LENGTHS), labels=list("ababa"))


def test_every_vector_of_every_site_is_kept_and_passes_stop(
    tiny_model: Callable[..., Any], corpus: Any, store: Any
) -> None:
    run = record_vectors(ms.load(tiny_model("olmoe")), corpus, store, sites=[POST, INSIDE], progress=False)
    assert run.status == "complete"
    assert run.name == "OlmoeForCausalLM-vectors"
    assert run.info["settings"]["stop_after"] == 0
    assert rows_of(run, POST) == list(range(sum(LENGTHS)))
    assert rows_of(run, INSIDE) == [t for t in range(sum(LENGTHS)) for _ in range(3)]
    assert store.fetch("SELECT count(nll) FROM tokens") == [(0,)]


@pytest.mark.parametrize(("tokens", "documents"), [(9, 1), (12, 1), (13, 2), (31, 3), (32, 4), (51, 4), (52, 5)])
def test_it_ends_at_the_last_document_that_fits(
    tokens: int, documents: int, tiny_model: Callable[..., Any], corpus: Any, store: Any
) -> None:
    model = ms.load(tiny_model("llama"))
    plan = plan_vectors(model, corpus, store.path, sites=POST, tokens=tokens, max_length=8)
    assert (plan.documents, plan.left) == (documents, 5 - documents)
    assert plan.tokens == sum(LENGTHS[:documents])
    assert plan.sequences == sum(-(-n // 8) for n in LENGTHS[:documents])
    run = record_vectors(model, corpus, store, sites=POST, tokens=tokens, max_length=8, progress=False)
    assert run.status == "complete"
    assert store.fetch("SELECT count(DISTINCT document_id), sum(n_tokens) FROM sequences") == [(documents, plan.tokens)]
    said = f"the first {documents} of 5 documents"
    assert (said in run.info["settings"]["corpus"]) == (documents < 5)
    assert store.fetch("SELECT DISTINCT label FROM sequences WHERE document_id = 0") == [("a",)]


def test_a_plan_says_what_the_disk_will_hold(tiny_model: Callable[..., Any], corpus: Any, store: Any) -> None:
    model = ms.load(tiny_model("olmoe"))
    plan = plan_vectors(model, corpus, store.path, sites=[POST, INSIDE], trial=True)
    stream, slots = plan.sites
    assert (stream.width, stream.rows, stream.dtype) == (32, 1.0, "float32")
    assert (stream.bytes_per_token, slots.bytes_per_token) == (32 * 4 + 8, 3 * (32 * 4 + 12))
    assert plan.vectors == 4 * sum(LENGTHS)
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert json.loads(json.dumps(plan.as_json()))["stop_after"] == 0
    record_vectors(model, corpus, store, sites=[POST, INSIDE], progress=False)
    on_disk = sum(
        shard.raw.nbytes + shard.token.nbytes
        for site in (POST, INSIDE)
        for shard in vector_shards(store.runs()[0], site)
    )
    assert on_disk < plan.bytes < on_disk * 1.2


def test_a_sample_keeps_some_tokens_and_plans_for_them(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], store: Any
) -> None:
    model, corpus = ms.load(tiny_model("llama")), ms.Corpus.from_token_ids(token_ids((50,) * 20))
    run = record_vectors(model, corpus, store, sites=POST, sample=0.25, name="some", progress=False)
    assert run.status == "complete"
    assert len(rows_of(run, POST)) == pytest.approx(250, abs=60)
    assert plan_vectors(model, corpus, store.path, sites=POST, sample=0.25).vectors == 250


def test_a_budget_of_bytes_ends_it_earlier(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], store: Any
) -> None:
    model, corpus = ms.load(tiny_model("llama")), ms.Corpus.from_token_ids(token_ids((50,) * 20))
    plan = plan_vectors(model, corpus, store.path, sites=POST, budget=50_000)
    assert 0 < plan.documents < 20
    assert plan.bytes <= 50_000 < plan.bytes + 50 * plan.bytes / plan.tokens
    assert plan_vectors(model, corpus, store.path, sites=POST, budget="1GB", tokens=100).documents == 2
    with pytest.raises(InputError, match="not even the first document"):
        record_vectors(model, corpus, store, sites=POST, budget=1000, progress=False)
    assert not store.runs()


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tiny_model: Callable[..., Any], corpus: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 65 << 20))
    model = ms.load(tiny_model("llama"))
    monkeypatch.setattr(recording, "_SPARE", 66 << 20)
    with pytest.raises(RunError, match="no room for these vectors") as refused:
        record_vectors(model, corpus, store, sites=POST, progress=False)
    assert "68.2 MB" in str(refused.value)  # 65 MiB that are free
    assert not store.runs()


def test_a_recording_goes_on_where_it_was_stopped(
    tiny_model: Callable[..., Any], corpus: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moescope.probes import passes

    model = ms.load(tiny_model("llama"))
    options: dict[str, Any] = {"sites": POST, "tokens": 40, "batch_size": 1, "name": "run", "progress": False}
    calls, whole = iter(range(2)), passes.run_until

    def interrupted(*args: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        whole(*args)

    monkeypatch.setattr(passes, "run_until", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record_vectors(model, corpus, store, **options)
    monkeypatch.undo()
    assert store.run("run").status == "incomplete"
    run = record_vectors(model, corpus, store, **options, resume=True)
    assert run.status == "complete"
    assert rows_of(run, POST) == list(range(sum(LENGTHS[:4])))


def test_a_model_that_cannot_be_stopped_runs_to_its_end(token_ids: Callable[..., Any], store: Any) -> None:
    from moescope.probes.families.tiny import build_tiny

    corpus = ms.Corpus.from_token_ids(token_ids((5, 4)))
    model = ms.load(build_tiny("switch_transformers"))
    run = record_vectors(model, corpus, store, sites="blocks.0.hook_resid_post", progress=False)
    assert "stop_after" not in run.info["settings"]
    assert store.fetch("SELECT count(nll) FROM tokens")[0][0] > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sites": []}, "none was named"),
        ({"sites": ["blocks.9.hook_resid_post"]}, "no site"),
        ({"sites": ["blocks.0.attn.hook_pattern"]}, "hook_pattern"),
        ({"tokens": 0}, "how many to record"),
        ({"tokens": 8}, "not even the first document"),
        ({"sample": 0.0}, "share of the tokens"),
        ({"budget": "much"}, "number of bytes"),
        ({"resume": True}, "which run"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], told: str, tiny_model: Callable[..., Any], corpus: Any, store: Any
) -> None:
    with pytest.raises(InputError, match=told):
        record_vectors(ms.load(tiny_model("llama")), corpus, store, **{"sites": POST, "progress": False, **options})
    assert not store.runs()


def _invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(record)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_the_command_records_the_demo(tmp_path: Path, demo_model: Any) -> None:
    width = demo_model.anatomy.d_model
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"Text {n} is of some length."}) for n in range(8)))
    given = ["demo", "--site", "blocks.1.hook_mlp_out", "--data", str(texts), "--tokens", "0.06k"]
    given += ["--store", str(tmp_path / "runs.duckdb"), "--json"]
    planned = json.loads(_invoke(*given, "--dry-run").stdout)
    assert not (tmp_path / "runs.duckdb").exists()
    assert planned["left"] > 0
    done = json.loads(_invoke(*given, "--name", "vectors").stdout)
    assert done["status"] == "complete"
    assert (done["documents"], done["tokens"]) == (planned["documents"], planned["tokens"])
    assert done["sites"] == [
        {"site": "blocks.1.hook_mlp_out", "vectors": done["tokens"], "width": width, "dtype": "float32"}
    ]
    told = _invoke(*given[:-1], "--dry-run").stdout
    assert "stop after block 1 of 0 to 5" in told
    with pytest.raises(InputError, match="which run"):
        _invoke(*given, "--resume")
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("text", "count"), [("2M", 2_000_000), ("1,500", 1500), ("0.5k", 500), ("3g", 3 * 10**9)])
def test_numbers_of_tokens_are_read(text: str, count: int) -> None:
    assert read_count(text) == count


@pytest.mark.parametrize("text", ["many", "-3", "0", "2MB", ""])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="number of tokens"):
        read_count(text)


def test_vectors_are_the_same_as_a_whole_recordings(tiny_model: Callable[..., Any], corpus: Any, store: Any) -> None:
    model = ms.load(tiny_model("qwen3_moe"))
    ours = record_vectors(model, corpus, store, sites=POST, name="ours", progress=False)
    theirs = ms.record(model, corpus, store, name="theirs", probes=["tokens"], sites=[POST], progress=False)
    for mine, other in zip(vector_shards(ours, POST), vector_shards(theirs, POST), strict=True):
        assert np.array_equal(mine.raw, other.raw)
