"""Atomic training checkpoints: weights, optimizer, random state, step and the curves so far."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import Qwen3MoeForCausalLM


@dataclass
class Progress:
    """What a run has done: steps taken (which fixes the data position), wall time and curve points."""

    step: int = 0
    wall_seconds: float = 0.0
    curves: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(path: Path, model: Qwen3MoeForCausalLM, optimizer: Optimizer, progress: Progress) -> None:
    """Write beside `path`, then rename onto it: a run killed meanwhile leaves the checkpoint before whole."""
    temporary = path.with_suffix(".partial")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random_state": torch.get_rng_state(),
            "progress": vars(progress),
        },
        temporary,
    )
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: Qwen3MoeForCausalLM, optimizer: Optimizer | None = None) -> Progress:
    """Put `path`'s state into `model` (`optimizer`, random generator); return how far that run had come."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random_state"])
    return Progress(**state["progress"])
