"""What belongs to an autoencoder goes and stays with it: its rows, its configuration, what it was trained on."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.core.errors import InputError, RunError, StoreError
from moescope.sae.catalogue import CONFIG, WEIGHTS, add_sae, delete_saes, sae_rows, saes_folder
from moescope.sae.loading import from_disk, load_autoencoder
from moescope.sae.training import train as training
from moescope.store.sae_rows import write_rows

SITE = "blocks.1.hook_resid_post"
WIDTH = 32
TRAINING = {"site": SITE, "batch_size": 64, "held_out": 0.25, "skip_first": 3, "progress": False}


@pytest.fixture
def run(tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]) -> Any:
    """A run of 40 texts that kept its vectors at `SITE`."""
    return record_ids(tiny_model("llama"), token_ids([40] * 40), probes=("tokens", "activations"), sites=[SITE])


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(normalize="none")`: a folder that SAELens wrote."""

    def write(normalize: str = "none") -> Path:
        from sae_lens import StandardSAE, StandardSAEConfig

        made = StandardSAEConfig(d_in=WIDTH, d_sae=12, normalize_activations=normalize)  # type: ignore[arg-type]  # one of its words
        StandardSAE(made).save_model(tmp_path / "sae")
        return tmp_path / "sae"

    return write


def test_no_row_that_names_a_deleted_autoencoder_is_left(store: Any) -> None:
    def written(folder: Path) -> None:
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_bytes(b"weights")

    gone, stays = (add_sae(store, {"name": name, "site": SITE}, written)["sae_id"] for name in ("gone", "stays"))
    descriptions = {sae: str(uuid.uuid4()) for sae in (gone, stays)}
    run_id = str(uuid.uuid4())
    rows: dict[str, Any] = {
        "descriptions": [{"description_id": id_, "run_id": run_id, "sae_id": sae} for sae, id_ in descriptions.items()],
        "description_scores": [{"description_id": id_, "n": n} for n, id_ in enumerate(descriptions.values())],
        "feature_links": [
            {"sae_id": one, "other_sae_id": other, "run_id": run_id, "kind": "cosine"}
            for one, other in [(gone, stays), (stays, gone), (stays, stays)]
        ],
    }
    write_rows(store, rows)
    deleted = delete_saes(store, ["gone"])
    assert store.fetch("SELECT CAST(description_id AS VARCHAR) FROM description_scores") == [(descriptions[stays],)]
    query = "SELECT CAST(sae_id AS VARCHAR), CAST(other_sae_id AS VARCHAR) FROM feature_links"
    assert store.fetch(query) == [(stays, stays)]
    assert deleted.rows == {"saes": 1, "descriptions": 1, "description_scores": 1, "feature_links": 2}


def test_a_changed_configuration_is_refused(saved: Callable[..., Path], store: Any) -> None:
    found = from_disk(saved(), site=SITE, store=store, name="mine")
    assert found.folder is not None
    path = found.folder / CONFIG
    before = path.read_bytes()
    told = json.loads(before)
    told["apply_b_dec_to_input"] = not told["apply_b_dec_to_input"]  # weights alone do not show it
    path.write_text(json.dumps(told))
    with pytest.raises(StoreError, match=rf"{CONFIG} is not the file that was written"):
        load_autoencoder(store, "mine")
    path.write_bytes(before)
    assert load_autoencoder(store, "mine").sae_id == found.sae_id


def test_a_folder_of_our_own_keeps_what_it_was_trained_on(run: Any, tmp_path: Path) -> None:
    (trained,) = training.train(run, run.store, "topk:d=64,k=4", **TRAINING)
    shutil.copytree(trained.folder, tmp_path / "elsewhere")
    again = from_disk(tmp_path / "elsewhere", store=run.store, name="again")
    for found in (again, load_autoencoder(run.store, "again")):
        assert found.row["trained_on"] == run.run_id
        assert found.row["corpus_fingerprint"] == run.info["corpus_fingerprint"]
        assert found.row["settings"]["held_out_share"] == 0.25
        assert found.row["settings"]["skip_first"] == 3


def test_a_folder_that_names_no_run_s_id_is_of_no_run(saved: Callable[..., Path], store: Any) -> None:
    folder = saved()
    told = json.loads((folder / CONFIG).read_text())
    told["metadata"]["moescope"] = {"run_id": "'; DROP TABLE saes", "data": [1], "corpus_fingerprint": "abc"}
    (folder / CONFIG).write_text(json.dumps(told))
    found = from_disk(folder, site=SITE, store=store, name="other")
    assert (found.row["trained_on"], found.row["corpus_fingerprint"]) == (None, "abc")


@pytest.mark.parametrize("kept", [True, False])
def test_a_scale_that_is_not_in_the_weights_is_refused(saved: Callable[..., Path], store: Any, kept: bool) -> None:
    folder = saved("expected_average_only_in")
    with pytest.raises(InputError, match=r"not folded into its weights.*fold_activation_norm_scaling_factor"):
        from_disk(folder, site=SITE, **({"store": store} if kept else {}))
    assert sae_rows(store) == []


def test_all_are_kept_or_none_and_training_goes_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {**TRAINING, "names": ["a", "b"]}
    specs, real = ["topk:d=64,k=4", "standard:d=48"], training.keep

    def second_fails(store: Any, trainee: Any, *rest: Any) -> Any:
        if trainee.name == "b":
            raise RunError("the disk is full")
        return real(store, trainee, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "keep", second_fails)
        with pytest.raises(RunError, match="the disk is full"):
            training.train(run, run.store, specs, checkpoint_every=5, **options)
    assert sae_rows(run.store) == []
    folder = saes_folder(run.store.path)
    assert [path.name for path in folder.iterdir() if not path.name.startswith("training-")] == []
    found = training.train(run, run.store, specs, checkpoint_every=5, resume=True, **options)
    assert [one.name for one in found] == ["a", "b"]
    assert [row["summary"]["status"] for row in sae_rows(run.store)] == ["complete"] * 2
