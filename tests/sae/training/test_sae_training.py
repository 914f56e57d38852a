"""Training from a run's vectors: what is saved, resumed, refused and stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moescope.core.errors import InputError, RunError
from moescope.sae.catalogue import sae_rows, saes_folder
from moescope.sae.training import loop
from moescope.sae.training.specs import ARCHITECTURES, SaeSpec
from moescope.sae.training.train import plan_training, train

SITE, OTHER = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"
_FAST = {"progress": False, "batch_size": 64, "site": SITE}
_SPECS = {form: f"{form}:d=32" + (",k=4" if kind == "k" else "") for form, kind in ARCHITECTURES.items()}


@pytest.fixture
def run(plant_run: Callable[..., Any], sparse_vectors: Callable[..., Any]) -> Any:
    x = sparse_vectors(3000)
    y = np.maximum(x @ np.random.default_rng(3).normal(size=(16, 10)), 0) + 1
    return plant_run({SITE: x, OTHER: y})


def _weights(autoencoder: Any) -> dict[str, torch.Tensor]:
    return dict(autoencoder.module.state_dict())


@pytest.mark.parametrize("form", ARCHITECTURES)
def test_stock_saelens_opens_every_form_and_computes_the_same(run: Any, form: str, sparse_vectors: Any) -> None:
    from sae_lens import SAE

    target = OTHER if form.endswith("transcoder") else None
    (trained,) = train(run, run.store, _SPECS[form], target_site=target, vectors=1280, **_FAST)
    stock = SAE.load_from_disk(trained.folder)
    x = torch.tensor(sparse_vectors(20, seed=5))
    acts = stock.encode(x)
    assert torch.equal(trained.encode(x), acts)
    # In sequences too, as a model would give them.
    torch.testing.assert_close(trained.encode(x.reshape(4, 5, 16)).reshape(20, -1), acts)
    torch.testing.assert_close(trained.decode(acts, x), stock(x))
    if getattr(stock, "W_skip", None) is None:
        torch.testing.assert_close(acts @ trained.decoder + stock.b_dec, stock(x), rtol=1e-4, atol=1e-4)
    meta = stock.cfg.metadata
    assert (meta.model_name, meta.hook_name, meta.context_size, meta.dataset_path) == ("planted", SITE, 50, "planted")
    assert meta.moescope["run_id"] == run.run_id
    assert meta.hook_name_out == target
    assert trained.row["summary"]["status"] == "complete"
    assert trained.row["summary"]["steps"] == 20
    assert trained.row["vectors"] == 1280


def test_rows_say_where_it_comes_from(run: Any) -> None:
    (trained,) = train(run, run.store, "topk:d=32,k=4", names=["mine"], seed=3, **_FAST)
    row = trained.row
    assert (row["name"], row["site"], row["d_in"], row["d_sae"]) == ("mine", SITE, 16, 32)
    assert (row["architecture"], row["trained_as"], row["trained_on"]) == ("topk", "topk", run.run_id)
    assert (row["model"], row["corpus_fingerprint"]) == ("planted", "abc")
    assert row["settings"]["seed"] == 3
    assert row["settings"]["spec"]["k"] == 4
    assert row["summary"]["held_out"]["vectors"] > 0
    assert row["summary"]["held_out"]["l0"] <= 4
    assert len(row["summary"]["curve"]) > 2
    assert not list(saes_folder(run.store.path).glob("training-*"))


def test_topk_has_at_most_k_active_on_every_row(run: Any, sparse_vectors: Any) -> None:
    (trained,) = train(run, run.store, "topk:d=32,k=3", **_FAST)
    active = (trained.encode(torch.tensor(sparse_vectors(500, seed=9))) > 0).sum(-1)
    assert int(active.max()) == 3


def test_learning_explains_more_than_the_first_weights(run: Any) -> None:
    (trained,) = train(run, run.store, "topk:d=48,k=4,lr=0.003", vectors=20_000, **_FAST)
    curve = [point["explained_variance"] for point in trained.row["summary"]["curve"]]
    held_out = trained.row["summary"]["held_out"]["explained_variance"]
    assert held_out > 0.8 > curve[0]
    assert held_out == pytest.approx(curve[-1], abs=0.1)


def test_held_out_measures_are_those_of_plain_sums(run: Any) -> None:
    from moescope.sae.data.split import held_out

    (trained,) = train(run, run.store, "topk:d=32,k=4", held_out=0.3, **_FAST)
    documents = np.arange(3000) // 50
    chosen = held_out(documents, share=0.3) & (np.arange(3000) % 50 >= 1)
    path = run.store.path.with_suffix(".vectors") / run.run_id / SITE
    from safetensors.numpy import load_file

    x = np.concatenate([load_file(file)["vectors"] for file in sorted(path.iterdir())])[chosen].astype(np.float64)
    got = trained.decode(trained.encode(torch.tensor(x, dtype=torch.float32))).double().numpy()
    told = trained.row["summary"]["held_out"]
    assert told["vectors"] == chosen.sum()
    assert told["explained_variance"] == pytest.approx(
        1 - ((x - got) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-5
    )


def test_several_share_one_pass_over_the_data(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], loop.fit

    def watched(trainees: Any, batches: Any, **options: Any) -> Any:
        class Counted:
            def __next__(self) -> Any:
                read.append(1)
                return next(batches)

            state = batches.state

        return real(trainees, Counted(), **options)

    monkeypatch.setattr("moescope.sae.training.train.fit", watched)
    together = train(run, run.store, ["topk:d=32,k=4", "standard:d=24"], vectors=1280, **_FAST)
    assert len(read) == 20
    monkeypatch.undo()
    for spec, shared in zip(["topk:d=32,k=4", "standard:d=24"], together, strict=True):
        (alone,) = train(run, run.store, spec, vectors=1280, **_FAST)
        assert all(torch.equal(w, _weights(shared)[n]) for n, w in _weights(alone).items())


class _Killed(BaseException):
    """Stands for a process that ends on the spot."""


@pytest.mark.parametrize("specs", [["topk:d=32,k=4", "batchtopk:d=32,k=4"], ["jumprelu:d=32", "gated:d=24"]])
def test_resume_ends_with_the_same_bits(run: Any, specs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**_FAST, "vectors": 5120, "names": ["a", "b"]}
    whole = train(run, run.store, specs, **{**options, "names": ["whole-a", "whole-b"]})
    steps = 0
    real = loop.Trainee.step

    def dying(self: Any, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2 * 53:  # in the middle of a step, long after a checkpoint
            raise _Killed
        return real(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainee, "step", dying)
        with pytest.raises(_Killed):
            train(run, run.store, specs, checkpoint_every=25, **options)
    assert [row["name"] for row in sae_rows(run.store)] == ["whole-a", "whole-b"]
    resumed = train(run, run.store, specs, checkpoint_every=25, resume=True, **options)
    for one, other in zip(whole, resumed, strict=True):
        assert other.row["summary"]["steps"] == one.row["summary"]["steps"] == 80
        assert all(torch.equal(w, _weights(other)[n]) for n, w in _weights(one).items())
        assert other.row["summary"]["curve"] == one.row["summary"]["curve"]


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**_FAST, "vectors": 2560}
    (whole,) = train(run, run.store, "topk:d=32,k=4", names=["whole"], **options)
    steps, real, before = 0, loop.Trainee.step, signal.getsignal(signal.SIGINT)

    def pressed(self: Any, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainee, "step", pressed)
        with pytest.raises(KeyboardInterrupt):
            train(run, run.store, "topk:d=32,k=4", names=["mine"], checkpoint_every=0, **options)
    assert "stopped after step 13 of 40" in caplog.text
    assert "--resume" in caplog.text
    (resumed,) = train(run, run.store, "topk:d=32,k=4", names=["mine"], resume=True, **options)
    assert all(torch.equal(w, _weights(resumed)[n]) for n, w in _weights(whole).items())
    assert signal.getsignal(signal.SIGINT) is before


def _poisoned(monkeypatch: pytest.MonkeyPatch, at: int, what: str) -> None:
    steps, real = 0, loop.Trainee.step

    def step(self: Any, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        output = real(self, batch)
        if steps == at and what == "loss":
            output.loss = output.loss * float("nan")
        if steps == at and what == "weights":
            self.module.W_dec.data[3, 2] = float("inf")
        return output

    monkeypatch.setattr(loop.Trainee, "step", step)


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_training_that_diverges_keeps_the_last_good_checkpoint(
    run: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {**_FAST, "vectors": 1920}
    _poisoned(monkeypatch, 37, what)
    with pytest.raises(RunError, match=r"stopped: at step 37 of 'mine' .* not finite.*lower rate"):
        train(
            run, run.store, SaeSpec(d_sae=32, k=4, decay=0), names=["mine"], checkpoint_every=30, vectors=2560, **_FAST
        )
    monkeypatch.undo()
    (row,) = sae_rows(run.store)
    assert row["summary"]["status"] == "stopped"
    assert "step 37" in row["summary"]["stopped"]
    assert row["summary"]["steps"] == 30
    assert row["vectors"] == 1920
    from moescope.sae.loading import load_autoencoder

    kept = load_autoencoder(run.store, "mine")
    # Without decay the first 30 of 40 steps are those of a training that was never poisoned, cut there.
    monkeypatch.setattr(
        "moescope.sae.training.train._planned", lambda *_: {"steps": 40, "batch_size": 64, "vectors": 2560}
    )
    seen: dict[str, torch.Tensor] = {}
    real = loop.Trainee.step

    def noting(self: Any, batch: Any) -> Any:
        output = real(self, batch)
        if self.trainer.n_training_steps == 30:
            seen.update({n: w.clone() for n, w in self.module.state_dict().items()})
        return output

    monkeypatch.setattr(loop.Trainee, "step", noting)
    train(run, run.store, SaeSpec(d_sae=32, k=4, decay=0), names=["again"], **short)
    direction = seen["W_dec"] / seen["W_dec"].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(kept.decoder / kept.decoder.norm(dim=-1, keepdim=True), direction)


def test_nothing_is_kept_where_nothing_was_good(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _poisoned(monkeypatch, 2, "loss")
    with pytest.raises(RunError, match="nothing of it is kept"):
        train(run, run.store, "topk:d=32,k=4", vectors=1280, **_FAST)
    assert sae_rows(run.store) == []
    assert not list(saes_folder(run.store.path).glob("*"))


def test_vectors_that_are_not_finite_are_refused(plant_run: Any, sparse_vectors: Any) -> None:
    x = sparse_vectors(1000)
    x[40:60, 3] = np.nan
    run = plant_run({SITE: x})
    with pytest.raises(RunError, match="not finite"):
        train(run, run.store, "topk:d=32,k=4", **_FAST)


def test_too_few_vectors_are_refused(plant_run: Any, sparse_vectors: Any) -> None:
    run = plant_run({SITE: sparse_vectors(200)})
    with pytest.raises(InputError, match=r"too few vectors.*at least 256"):
        train(run, run.store, "topk:d=32,k=4", **_FAST)


@pytest.mark.parametrize(
    ("specs", "options", "said"),
    [
        ([], {}, "nothing to train"),
        ("transcoder:d=32", {}, "predicts one site from another"),
        ("topk:d=32,k=4", {"target_site": OTHER}, "target site was given"),
        ("topk:d=32,k=4", {"site": "blocks.7.hook_resid_post"}, "kept no vectors"),
        ("topk:d=32,k=4", {"site": "nowhere"}, "not a site"),
        ("topk:d=32,k=4", {"names": ["a", "b"]}, "needs a name"),
        (["topk:d=32,k=4"] * 2, {"names": ["a", "a"]}, "two were given"),
        ("topk:d=32,k=4", {"names": [" "]}, "needs a name of Unicode"),
        ("topk:d=32,k=4", {"vectors": 70}, "make 1 batches"),
        ("topk:d=32,k=4", {"batch_size": -1}, "over 0"),
        ("topk:d=32,k=4", {"device": "cuda:77"}, "no device"),
        ("topk:d=32,k=4", {"held_out": 1.0}, "share"),
        ("topk:d=32,k=4", {"expert": 2}, "expert"),
        ("topk:d=32,k=4", {"head": 2}, "no head 2"),
    ],
)
def test_bad_input_is_refused(run: Any, specs: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        train(run, run.store, specs, **{**_FAST, **options})
    assert sae_rows(run.store) == []


def test_resume_with_other_settings_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_at(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        train(run, run.store, "topk:d=32,k=4", names=["mine"], vectors=2560, **_FAST)
    monkeypatch.undo()
    with pytest.raises(InputError, match="asked for otherwise: specs"):
        train(run, run.store, "topk:d=32,k=5", names=["mine"], vectors=2560, resume=True, **_FAST)


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    real = loop.Trainee.step

    def step(self: Any, batch: Any) -> Any:
        if self.trainer.n_training_steps == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch)

    monkeypatch.setattr(loop.Trainee, "step", step)


def test_damaged_shard_is_told(run: Any) -> None:
    path = next((run.store.path.with_suffix(".vectors") / run.run_id / SITE).iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    from moescope.core.errors import StoreError

    with pytest.raises(StoreError, match="not whole"):
        train(run, run.store, "topk:d=32,k=4", **_FAST)


def test_plan_says_what_training_would_do(run: Any) -> None:
    told = plan_training(run, run.store, ["topk:d=32,k=4", "gated:d=24"], site=SITE, batch_size=64, vectors=1280)
    assert (told["steps"], told["width"], told["latents"]) == (20, 16, "32, 24")
    assert told["weights"] == 32 * 33 + 16 + 24 * 33 + 16
    assert sae_rows(run.store) == []


def test_nothing_is_pickled(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickled")

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    import pickle

    monkeypatch.setattr(pickle, "dumps", refuse)
    (trained,) = train(run, run.store, "topk:d=32,k=4", vectors=1280, checkpoint_every=5, **_FAST)
    assert {file.suffix for file in Path(trained.folder).iterdir()} == {".json", ".safetensors"}
