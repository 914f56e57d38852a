"""`moescope sae steer` from the command line, on an autoencoder of the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import moescope as ms
from moescope.cli.sae.steer import steer
from moescope.core.errors import InputError
from moescope.sae.loading import from_disk

TEXTS = ["def f(x): return x", "The rain fell on the hills.", "import os, sys", "She was very tired."]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sae_lens import TopKSAE, TopKSAEConfig

    folder = tmp_path_factory.mktemp("steer")
    width = ms.load("demo").anatomy.d_model
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=24, k=6, device="cpu", apply_b_dec_to_input=True))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(24, width), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.save_model(folder / "weights")
    with ms.Store(folder / "runs.duckdb") as opened:
        from_disk(folder / "weights", site="blocks.3.hook_resid_post", store=opened, name="mine")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "code.txt").write_text("\n".join([*TEXTS[::2], "x = 1", "y = [2]"]))
    (folder / "prose.txt").write_text("\n".join([*TEXTS[1::2], "It was late.", "They ate."]))
    return folder / "runs.duckdb"


def run(store: Path, *words: str) -> Any:
    app = typer.Typer()
    app.command()(steer)
    common = ["demo", "--store", str(store), "--data", str(store.parent / "texts.jsonl"), "--device", "cpu", "--json"]
    return CliRunner().invoke(app, [*common, "--controls", "2", *words])


def test_latents_are_steered_measured_stored_and_saved(store: Path) -> None:
    saved = store.parent / "steer.json"
    words = ["--sae", "mine", "--feature", "3=+6", "--feature", "5=*0", "--target", "e", "--strengths", "0,1"]
    found = run(store, *words, "--save-intervention", str(saved))
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout[found.stdout.index("{") :])
    assert "log p of 'e'" in answer["title"]
    edits: Any = ms.Intervention.load(saved).edits
    assert [(edit.ids, edit.how, edit.values) for edit in edits] == [((3,), "add", (6.0,)), ((5,), "scale", (0.0,))]
    with ms.Store(store, read_only=True) as opened:
        query = "SELECT kind, count(DISTINCT draw) FROM effects WHERE metric = 'kl' GROUP BY kind ORDER BY kind"
        assert opened.fetch(query) == [("control", 2), ("target", 0)]


def test_contrast_finds_its_layer_and_a_latent_is_a_target(store: Path) -> None:
    sides = [str(store.parent / "code.txt"), str(store.parent / "prose.txt")]
    found = run(store, "--sae", "mine", "--contrast", *sides, "--top", "4", "--target-feature", "2", "--strengths", "1")
    assert found.exit_code == 0, found.output
    assert "latent 2 of mine" in found.output
    found = run(store, "--contrast", *sides, "--target", "e", "--strengths", "1")
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "e"], "in one way"),
        (["--feature", "3=+6", "--target", "e"], "needs an autoencoder"),
        (["--sae", "mine", "--feature", "3=+6"], "one of --target"),
        (["--sae", "mine", "--feature", "3=+6", "--target", "e", "--target-feature", "1"], "one of --target"),
        (["--sae", "mine", "--feature", "3:6", "--target", "e"], "says nothing"),
        (["--sae", "mine", "--feature", "99=+6", "--target", "e"], "no latent 99"),
        (["--sae", "mine", "--feature", "3=+max", "--target", "e"], "not known"),
        (["--sae", "other", "--feature", "3=+6", "--target", "e"], "no autoencoder 'other'"),
        (["--sae", "mine", "--feature", "3=+6", "--target", "a longer text"], "tokens"),
        (["--contrast", "nowhere.txt", "nothing.txt", "--target", "e"], "cannot read"),
    ],
)
def test_what_is_asked_wrongly_is_refused(store: Path, words: list[str], said: str) -> None:
    found = run(store, *words)
    assert isinstance(found.exception, InputError)
    assert said in str(found.exception)


def test_effects_find_the_autoencoder_in_the_store_and_keep_their_run(store: Path) -> None:
    edit = ms.edits.Latents(layer=3, sae="mine", latents=[3], values=8.0)
    with ms.Store(store) as opened:
        answer = ms.effect(
            ms.load("demo"), TEXTS, ms.Intervention([edit]), opened, controls=2, keep_run="steered", progress=False
        )
        frame = answer.df()
        kl = frame[(frame["metric"] == "kl") & (frame["kind"] == "target")]["value"].iloc[0]
        query = "SELECT avg(s.nll) - avg(b.nll) FROM steered s JOIN base b USING (sequence_id, position)"
        names = {run.name: run.run_id for run in opened.runs()}
        plain = frame[frame["metric"] == "delta_nll"]["value"].iloc[0]
        tokens = "SELECT sequence_id, position, nll FROM tokens WHERE run_id = ?"
        query = f"WITH steered AS ({tokens}), base AS ({tokens}) {query}"
        (moved,) = opened.fetch(query, [names["steered"], answer.provenance["run_id"]])[0]
    assert kl > 1e-4
    assert moved == pytest.approx(plain, abs=1e-4)
    with ms.Store(store) as opened, pytest.raises(InputError, match="no autoencoder 'other'"):
        ms.effect(ms.load("demo"), TEXTS, ms.Intervention([ms.edits.Splice(layer=3, sae="other")]), opened)
