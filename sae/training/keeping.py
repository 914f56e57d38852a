"""What is trained, written into the store: its files, its row, and how training went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from moescope.core.sites import Site
from moescope.sae.catalogue import add_sae
from moescope.sae.loading import opened_module, row_of_metadata
from moescope.sae.training.held_out import held_out_measures
from moescope.sae.training.loop import Ended
from moescope.sae.training.trainee import Trainee

if TYPE_CHECKING:
    from moescope.store.run import Run
    from moescope.store.store import Store


@dataclass(frozen=True)
class Place:
    """Where the vectors come from.

    Attributes:
        run: whose they are.
        site: where they were read.
        target: what transcoders predict; None for none.
        expert: the one expert whose vectors they are; None for all.
        head: the one head whose vectors they are; None for all.
    """

    run: Run
    site: Site
    target: Site | None
    expert: int | None
    head: int | None

    def metadata(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """What SAELens' configuration keeps beside the numbers: enough to attach it elsewhere, and where it comes from.

        Args:
            data: what it was trained on, as `VectorSource.facts` says it.
        """
        info = self.run.info
        return {
            "model_name": info["model"],
            "hook_name": str(self.site),
            **({} if self.target is None else {"hook_name_out": str(self.target)}),
            **({} if self.head is None else {"hook_head_index": self.head}),
            "context_size": info["settings"].get("max_length"),
            "dataset_path": info["settings"].get("corpus"),
            "moescope": {
                "run": self.run.name,
                "run_id": self.run.run_id,
                "corpus_fingerprint": info["corpus_fingerprint"],
                "expert": self.expert,
                "anatomy_digest": info["anatomy"].get("digest"),
                "revision": info["revision"],
                "data": dict(data),
            },
        }

    def columns(self) -> dict[str, Any]:
        """Columns of `saes` that say where it belongs."""
        info = self.run.info
        return {
            "site": str(self.site),
            "target_site": None if self.target is None else str(self.target),
            "expert": self.expert,
            "model": info["model"],
            "anatomy_digest": info["anatomy"].get("digest"),
            "trained_on": self.run.run_id,
            "corpus_fingerprint": info["corpus_fingerprint"],
        }

    def settings(self) -> dict[str, Any]:
        """What tells the model apart later, and the head."""
        info = self.run.info
        return {"head": self.head, "revision": info["revision"], "anatomy": info["anatomy"], "run": self.run.name}


def keep(
    store: Store,
    trainee: Trainee,
    place: Place,
    settings: Mapping[str, Any],
    held_out: Float[torch.Tensor, "row component"],
    ended: Ended,
) -> dict[str, Any]:
    """Write one autoencoder into the store; gives its row.

    Args:
        store: open for writing.
        trainee: as it is to be kept; training cannot go on afterwards.
        place: where its vectors come from.
        settings: of the training.
        held_out: vectors that training did not see, on which it is measured.
        ended: how training ended.
    """
    trainer = trainee.trainer
    told = {
        **settings,
        **place.settings(),
        "spec": trainee.spec.as_dict(),
        "asked": str(trainee.spec),
        "sparsity": trainee.spec.sparsity,
        "lr": trainer.cfg.lr,
        "warm_up_steps": trainer.cfg.lr_warm_up_steps,
        "decay_steps": trainer.cfg.lr_decay_steps,
        "dead_after_steps": trainer.cfg.dead_feature_window,
        "scale": trainee.scales or trainer.activation_scaler.scaling_factor,
    }
    summary = _summary(trainee, ended)

    def write(folder: Path) -> dict[str, Any]:
        trainee.save(folder)
        module = opened_module(folder)
        summary["held_out"] = held_out_measures(module, held_out, trainee.widths)
        return {**row_of_metadata(module), "summary": summary}

    vectors = int(trainer.n_training_samples)
    row = {**place.columns(), "name": trainee.name, "vectors": vectors, "settings": told, "source": {}}
    return add_sae(store, row, write)


def _summary(trainee: Trainee, ended: Ended) -> dict[str, Any]:
    trainer = trainee.trainer
    last = trainee.curve[-1] if trainee.curve else {}
    told: dict[str, Any] = {
        "status": "complete" if ended.diverged is None else "stopped",
        "steps": trainer.n_training_steps,
        "seconds": round(ended.seconds, 3),
        "vectors_per_second": int(trainer.n_training_samples) / ended.seconds if ended.seconds else None,
        **{key: value for key, value in last.items() if key != "step"},
        "curve": trainee.curve,
    }
    if (bad := ended.diverged) is not None:
        told["stopped"] = (
            f"at step {bad.step} {bad.what} of {bad.name} was not finite; this is it after step {ended.step}"
        )
    return told
