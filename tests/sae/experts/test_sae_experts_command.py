"""`moescope sae experts`: what it refuses before it loads anything, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import moescope as ms
from moescope.cli.sae.experts import experts
from moescope.core.errors import InputError
from moescope.store.store import Store


def run(*words: str) -> None:
    app = typer.Typer()
    app.command()(experts)
    app(list(words), standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--documents", "some"], "documents cannot be 'some'"),
        (["--layers", "1,two"], "layers cannot be '1,two'"),
        (["--features", "x"], "features cannot be 'x'"),
        ([], "there is no store at"),
    ],
)
def test_bad_words_are_refused_with_what_is_expected(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run("--sae", "mine", "--model", "demo", "--store", str(tmp_path / "none.duckdb"), *words)


@pytest.mark.parametrize("as_json", [True, False])
def test_latents_are_joined_cut_and_told(
    as_json: bool, tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Store, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    module = tiny_model("mixtral", num_local_experts=8)
    record_ids(module, token_ids([18] * 6), labels=["a", "b"] * 3)
    directions = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q[:8].contiguous()
    autoencoder = planted_autoencoder("blocks.0.hook_mlp_out", directions, threshold=0.05)
    path = store.path
    store.close()
    monkeypatch.setattr("moescope.probes.loading.load", lambda *_args, **_options: ms.load(module))
    monkeypatch.setattr("moescope.sae.loading.load_autoencoder", lambda *_args, **_options: autoencoder)
    words = ["--sae", "planted", "--model", "tiny", "--store", str(path), "--least-active", "4", "--ablate", "2"]
    words += ["--writers", "1", "--controls", "2", "--sparsity", *(["--json"] if as_json else [])]
    capsys.readouterr()
    run(*words)
    told = capsys.readouterr().out
    if not as_json:
        assert "writes in excess" in told
        assert "without its writers it loses" in told
        assert "L0·E" in told
        return
    found = json.loads(told)
    assert set(found) == {"writes", "gates", "writers", "sparsity"}
    assert {row["layer"] for row in found["writes"]["table"]} == {0}
    assert {row["layer"] for row in found["gates"]["table"]} == {1}
    assert any(row["metric"] == "falls without its writers" for row in found["writers"]["table"])
