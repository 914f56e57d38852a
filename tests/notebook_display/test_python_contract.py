"""The Python contract of the design, line by line, as a user would type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import moescope as ms


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with texts and a trace."""
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"The sea was calm, and ship {i} lay still.", "label": "ab"[i % 2]} for i in range(6)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    trace = {
        "sequence_id": [0, 0],
        "position": [0, 1],
        "layer": [3, 3],
        "experts": [[5, 1], [0, 5]],
        "label": ["x", "x"],
    }
    pq.write_table(pa.table(trace), "trace.parquet")
    return tmp_path


@pytest.mark.slow
def test_everything_in_the_contract_can_be_typed(folder: Path) -> None:
    import torch

    model = ms.load("demo")
    config = model.module.config
    assert model.anatomy.n_experts == config.num_experts
    assert model.anatomy.top_k == config.num_experts_per_tok
    assert model.anatomy.moe_layers == list(range(config.num_hidden_layers))
    rule = "top-k of softmax, weights softmax" + ", renormalised" * config.norm_topk_prob
    assert (model.anatomy.routing_rule or "").startswith(f"{rule} (verified: ")
    corpus = ms.Corpus.load("texts.jsonl")
    with ms.Store("runs.duckdb") as store:
        run = ms.record(
            model, corpus, store, name="base", probes=("tokens", "routing", "experts", "residual"), sites=(),
            intervention=None, generate=0, batch_size=8, max_length=512, budget=None, resume=False,
        )  # fmt: skip
        ledger = run.coverage.df()
        assert (ledger["expected"] == ledger["recorded"]).all()
        routing = run.table("routing").df()
        assert len(routing) == run.rows("tokens") * config.num_hidden_layers
        ((count,),) = store.sql("SELECT count(*) FROM routing").fetchall()
        assert count == len(routing)
        assert store.run("base").run_id == run.run_id
        assert [found.name for found in store.runs()] == ["base"]
        imported = store.import_trace("trace.parquet", name="dsv2", n_experts=64)
        assert imported.table("routing").df()["experts"].map(list).tolist() == [[5, 1], [0, 5]]

        result = ms.analyze(run, "local_consistency", segment=16)
        assert len(result.df()) > 0
        assert result.figure().data
        assert result.sql or result.computation
        assert "loads" in (ms.analyze(run, "load").sql or "")
        assert result.definition
        result.save("x.html")
        assert Path("x.html").stat().st_size > 1000
        parameters = ms.analyses().set_index("name").loc["local_consistency", "parameters"]
        assert "segment=" in parameters

        ids = torch.arange(4, 260)[None]

        def logits() -> Any:
            with torch.no_grad():
                return model.module(input_ids=ids).logits

        plain = logits()
        cut = ms.Intervention([ms.edits.Ablate(layer=3, experts=[5, 9], how="route_around")])
        with model.edited(cut):
            assert not torch.equal(logits(), plain)
        assert torch.equal(logits(), plain)
        effect = ms.effect(model, corpus, cut, store, controls=5, progress=False)
        table = effect.df()
        assert {"delta_nll", "kl", "flips"} <= set(table["metric"])
        assert table[table["kind"] == "control"]["draw"].nunique() == 5
        other = ms.record(model, corpus, store, name="other", progress=False)
        assert ms.analyze([run, other], "compare_routing").df() is not None


def test_a_corpus_is_made_from_all_that_the_contract_names(folder: Path) -> None:
    import pandas as pd

    rows = [json.loads(line) for line in Path("texts.jsonl").read_text().splitlines()]
    frame = pd.DataFrame(rows)
    frame.to_csv("texts.csv", index=False)
    frame.to_parquet("texts.parquet")
    Path("texts.txt").write_text("\n".join(row["text"] for row in rows))
    texts = [row["text"] for row in rows]
    for source in ("texts.jsonl", "texts.csv", "texts.parquet", texts, rows):
        assert [document.text for document in ms.Corpus.load(source)] == texts
    assert "".join(document.text for document in ms.Corpus.load("texts.txt")).replace("\n", "") == "".join(texts)
    ids = ms.Corpus.from_token_ids([[1, 2, 3], [4, 5]])
    assert [document.token_ids for document in ids] == [(1, 2, 3), (4, 5)]
