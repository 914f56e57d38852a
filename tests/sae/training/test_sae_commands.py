"""`moescope sae train, list, delete, import, export` as a user calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moescope.core.errors import InputError

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def call(plant_run: Callable[..., Any], sparse_vectors: Callable[..., Any], store: Any) -> Callable[..., Any]:
    """`call("list", …)`: a command on a store with a planted run; its output, read as JSON where `--json` is asked for."""
    from moescope.cli.sae.delete import delete
    from moescope.cli.sae.export_ import export
    from moescope.cli.sae.import_ import import_
    from moescope.cli.sae.list_ import list_
    from moescope.cli.sae.train import train

    plant_run({SITE: sparse_vectors(1500)})
    path = store.path
    store.close()
    app = typer.Typer()
    for name, command in {"train": train, "delete": delete, "import": import_, "export": export}.items():
        app.command(name)(command)
    app.command("list")(list_)

    def run(command: str, *arguments: str) -> Any:
        where = [str(path)] if command == "list" else ["--store", str(path)]
        done = CliRunner().invoke(app, [command, *arguments, *where])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout) if "--json" in arguments else done.stdout

    return run


def _train(call: Callable[..., Any], *more: str) -> Any:
    return call("train", "--run", "run", "--site", SITE, "--batch-size", "64", "--spec", "topk:d=32,k=4", *more)


def test_training_listing_exporting_importing_deleting(call: Callable[..., Any], tmp_path: Path) -> None:
    trained = _train(call, "--spec", "standard:d=24", "--name", "a", "--name", "b", "--json")
    assert [(row["name"], row["d_sae"], row["summary"]["status"]) for row in trained] == [
        ("a", 32, "complete"),
        ("b", 24, "complete"),
    ]
    shown = call("list")
    assert len(shown.splitlines()) == 3
    for word in (
        SITE,
        "topk",
        "standard",
        "32",
        "24",
        f"{trained[0]['summary']['held_out']['explained_variance']:.1%}",
    ):
        assert word in shown
    written = call("export", "a", str(tmp_path / "out"), "--json")
    from sae_lens import SAE

    assert SAE.load_from_disk(tmp_path / "out").cfg.d_sae == 32
    assert sorted(written["files"]) == ["cfg.json", "sae_weights.safetensors"]
    imported = call("import", str(tmp_path / "out"), "--name", "c", "--json")
    assert (imported["site"], imported["d_sae"]) == (SITE, 32)
    assert imported["trained_on"] == trained[0]["trained_on"] is not None
    assert imported["checksum"] == trained[0]["checksum"]
    for told in ("revision", "held_out_share", "skip_first", "split_seed"):  # what later measures must know of training
        assert imported["settings"][told] == trained[0]["settings"][told]
    deleted = call("delete", "a", "b", "--yes", "--json")
    assert deleted["rows"] == {"saes": 2}
    assert [row["name"] for row in call("list", "--json")] == ["c"]


def test_dry_run_writes_nothing(call: Callable[..., Any]) -> None:
    told = _train(call, "--dry-run", "--json")
    assert (told["width"], told["batch_size"], told["latents"]) == (16, 64, "32")
    assert call("list", "--json") == []


def test_deleting_asks_somebody(call: Callable[..., Any]) -> None:
    _train(call, "--name", "a")
    with pytest.raises(InputError, match="add --yes"):
        call("delete", "a")
    assert [row["name"] for row in call("list", "--json")] == ["a"]


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("train", ["--run", "run", "--site", SITE, "--spec", "topk:q=1"], "no setting 'q'"),
        ("train", ["--run", "other", "--site", SITE, "--spec", "topk"], "no run"),
        ("delete", ["nothing", "--yes"], "no autoencoder 'nothing'"),
        ("export", ["nothing", "out"], "no autoencoder 'nothing'"),
        ("import", ["nowhere"], "no such folder"),
        ("import", ["no-release:blocks.0.hook_resid_pre"], "no release"),
    ],
)
def test_mistakes_are_told(call: Callable[..., Any], command: str, arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(command, *arguments)
