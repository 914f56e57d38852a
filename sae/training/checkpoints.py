"""Checkpoints of a training: tensors as safetensors, the rest as JSON, each written whole; the newest is kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moescope.core.errors import InputError, StoreError
from moescope.core.json_data import to_json
from moescope.sae.catalogue import folder_written_whole, saes_folder
from moescope.sae.training.trainee import Trainee

_TENSORS, _FACTS = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A state of a training that can be gone on with.

    Attributes:
        step: steps that were done.
        tensors: for each autoencoder.
        facts: for each autoencoder.
        data: where the data were.
        seconds: that training took until then.
    """

    step: int
    tensors: list[dict[str, torch.Tensor]]
    facts: list[dict[str, Any]]
    data: dict[str, Any]
    seconds: float


class Checkpoints:
    """The checkpoints of one training, in a folder of their own beside the store's autoencoders.

    Args:
        store: path of the store.
        names: of the autoencoders that are trained together, which find it again.
        asked: what was asked for; going on with something else is refused.
    """

    def __init__(self, store: Path, names: Sequence[str], asked: dict[str, Any]) -> None:
        key = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        self.folder = saes_folder(store) / f"training-{key}"
        self._asked: dict[str, Any] = json.loads(to_json(asked))

    def write(self, step: int, trainees: Sequence[Trainee], data: dict[str, Any], seconds: float) -> None:
        """Keep this state, then drop the one before.

        Raises:
            InputError: the folder cannot be written.
            RunError: the disk failed; the checkpoint before is still there.
        """
        from safetensors.torch import save_file

        target = self.folder / f"{step:09}"
        facts = [trainee.facts() for trainee in trainees]
        tensors = {f"{n}/{name}": t for n, trainee in enumerate(trainees) for name, t in trainee.tensors().items()}
        with folder_written_whole(target) as partial:
            save_file(tensors, partial / _TENSORS)
            told = {"step": step, "facts": facts, "data": data, "seconds": seconds, "asked": self._asked}
            # Plain json, not ours, writes numbers so that they are read back to the bit.
            (partial / _FACTS).write_text(json.dumps(told), encoding="utf-8")
        for old in self._whole():
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest state; None where there is none.

        Raises:
            InputError: it is of a training that was asked for otherwise.
            StoreError: it is damaged.
        """
        whole = self._whole()
        if not whole:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            told = json.loads((whole[-1] / _FACTS).read_text(encoding="utf-8"))
            flat = load_file(whole[-1] / _TENSORS)
        except (OSError, ValueError, SafetensorError) as failed:
            raise StoreError(
                f"the checkpoint {whole[-1]} is damaged",
                found=str(failed)[:200],
                fix="delete it and train from the start",
            ) from failed
        if differing := [key for key, value in self._asked.items() if told["asked"].get(key) != value]:
            key = differing[0]
            raise InputError(
                f"the training that was stopped was asked for otherwise: {key}",
                expected=json.dumps(told["asked"].get(key)),
                found=json.dumps(self._asked[key]),
                fix="go on with the same settings, or train from the start without resume",
            )
        tensors: list[dict[str, torch.Tensor]] = [{} for _ in told["facts"]]
        for name, tensor in flat.items():
            number, _, rest = name.partition("/")
            tensors[int(number)][rest] = tensor
        return Checkpoint(int(told["step"]), tensors, told["facts"], told["data"], float(told["seconds"]))

    def drop(self) -> None:
        """Take all of them away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole(self) -> list[Path]:
        """Folders of states, the newest last."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit() and (p / _FACTS).is_file())
