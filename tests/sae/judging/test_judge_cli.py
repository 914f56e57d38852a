"""`moescope sae judge` from the command line, on recorded vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import moescope as ms
from moescope.cli.sae.judge import judge
from moescope.core.errors import InputError
from moescope.sae.loading import from_disk
from moescope.store.store import Store

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def judged_store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    """A store with a run that kept vectors, and an autoencoder of them."""
    import torch
    from sae_lens import TopKSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE

    folder = tmp_path_factory.mktemp("judge-cli")
    random = np.random.default_rng(0)
    corpus = ms.Corpus.from_token_ids([random.integers(1, 97, 20).tolist() for _ in range(100)])
    path = folder / "runs.duckdb"
    with Store(path) as store:
        model = ms.load(tiny_model("llama"))
        ms.record(model, corpus, store, name="base", probes=("tokens", "activations"), sites=[SITE], progress=False)
        module = TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=8))
        with torch.no_grad():
            rows = torch.cat([torch.eye(32), -torch.eye(32)])
            module.W_enc.copy_(rows.T)
            module.W_dec.copy_(rows)
        module.save_model(folder / "planted")
        from_disk(folder / "planted", site=SITE, store=store, name="planted")
    return path


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(judge)
    return made


def test_table_has_the_autoencoder_beside_its_controls(judged_store: Path, app: typer.Typer) -> None:
    found = CliRunner().invoke(
        app, ["--store", str(judged_store), "--sae", "planted", "--run", "base"], env={"COLUMNS": "200"}
    )
    assert found.exit_code == 0, found.exception
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("fvu ")]
    words = line.split()  # fvu, its value, "low to high", then the controls in the order of the heading
    assert 0 < float(words[2]) < float(words[1]) < float(words[4]) < 1
    assert float(words[5]) < float(words[7])  # PCA by vector, random decoder
    assert float(words[9]) == pytest.approx(1)  # the mean
    assert "No model was given" in found.stderr


def test_json_is_the_answer_of_the_analysis(judged_store: Path, app: typer.Typer) -> None:
    found = CliRunner().invoke(app, ["--store", str(judged_store), "--sae", "planted", "--run", "base", "--json"])
    assert found.exit_code == 0, found.exception
    (answer,) = json.loads(found.stdout)
    with Store(judged_store, read_only=True) as store:
        stored = store.fetch("SELECT value FROM sae_measures WHERE metric = 'fvu' AND condition = 'sae'")
    told = [row["value"] for row in answer["table"] if (row["metric"], row["condition"]) == ("fvu", "sae")]
    assert [(told[0],)] == stored
    assert any("Judged on" in note for note in answer["notes"])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--sae", "planted", "--run", "base", "--data", "demo"], "both say what to judge on"),
        (["--sae", "other", "--run", "base"], "no autoencoder 'other'"),
        (["--sae", "planted"], "trained on no run"),
        (["--sae", "planted", "--run", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told(judged_store: Path, app: typer.Typer, given: list[str], problem: str) -> None:
    found = CliRunner().invoke(app, ["--store", str(judged_store), *given])
    assert isinstance(found.exception, InputError)
    assert problem in str(found.exception)
