"""SAELens' training modules and trainers, made of a `SaeSpec`; and modules for use, read back from what is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from moescope.sae.training.specs import ARCHITECTURES, NORMALISING, SaeSpec

_WINDOW_DEAD = 10_000_000
_SETTLED = 20  # time constants of the threshold's running mean in a training


def training_module(
    spec: SaeSpec,
    width: int,
    *,
    target_width: int | None,
    steps: int,
    seed: int,
    device: str,
    metadata: Mapping[str, Any],
) -> Any:
    """A training module of SAELens with its first weights, which a seed decides.

    Args:
        spec: what to make.
        width: components of a vector.
        target_width: of what it predicts; None for the vector itself.
        steps: that training will take, of which the penalties warm up.
        seed: of the weights, where the spec has none.
        device: where it shall be.
        metadata: for its configuration: model, hook, context and where its vectors come from.
    """
    from sae_lens.saes.sae import SAEMetadata

    config_class, module_class = _classes(spec, spec.latents(width), device)
    arguments = _arguments(spec, width, target_width or width, steps)
    config = config_class(**arguments, device="cpu", metadata=SAEMetadata(**metadata))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed if spec.seed is None else spec.seed)
        module = module_class(config)  # on the CPU first, so that every device begins with the same weights
    return module.to(device)


# Form → SAELens' classes of its configuration and its module.
_CLASSES = {
    "topk": ("TopKTrainingSAEConfig", "TopKTrainingSAE"),
    "batchtopk": ("BatchTopKTrainingSAEConfig", "BatchTopKTrainingSAE"),
    "matryoshka": ("MatryoshkaBatchTopKTrainingSAEConfig", "MatryoshkaBatchTopKTrainingSAE"),
    "jumprelu": ("JumpReLUTrainingSAEConfig", "JumpReLUTrainingSAE"),
    "standard": ("StandardTrainingSAEConfig", "StandardTrainingSAE"),
    "gated": ("GatedTrainingSAEConfig", "GatedTrainingSAE"),
}
# Form → our sparse step of it, taken on processors where at most one latent of so many is active.
_SPARSE = {"topk": "SparseTopKTraining", "batchtopk": "SparseBatchTopKTraining"}
_SPARSE_FROM = 8


def _classes(spec: SaeSpec, d_sae: int, device: str) -> tuple[Any, Any]:
    if not spec.is_transcoder:
        import sae_lens

        config, module = _CLASSES[spec.architecture]
        few = spec.architecture in _SPARSE and spec.sparsity * _SPARSE_FROM <= d_sae
        if few and torch.device(device).type == "cpu":
            from moescope.sae.training import sparse_topk

            return getattr(sae_lens, config), getattr(sparse_topk, _SPARSE[spec.architecture])
        return getattr(sae_lens, config), getattr(sae_lens, module)
    from moescope.sae.training import transcoders as of_pairs

    if ARCHITECTURES[spec.architecture] == "k":
        return of_pairs.BatchTopKTranscoderTrainingConfig, of_pairs.BatchTopKTranscoderTraining
    return of_pairs.ReluTranscoderTrainingConfig, of_pairs.ReluTranscoderTraining


def _arguments(spec: SaeSpec, width: int, target: int, steps: int) -> dict[str, Any]:
    """What SAELens' configuration of this form is told."""
    # A transcoder's two sides are scaled before SAELens sees them: it knows one number for both.
    normalise = "none" if spec.is_transcoder else NORMALISING[spec.normalise]
    told: dict[str, Any] = {"d_in": width, "d_sae": spec.latents(width), "normalize_activations": normalise}
    kind, warm_up = ARCHITECTURES[spec.architecture], round(spec.warm_up * steps)
    if kind == "k" and spec.architecture != "topk":
        # SAELens' running mean of the threshold forgets by 1 % a step; a short training would end before it has settled.
        told["topk_threshold_lr"] = min(1.0, max(0.01, _SETTLED / steps))
    if kind == "k":
        k = int(spec.sparsity) if spec.architecture == "topk" else spec.sparsity
        told |= {"k": k, "aux_loss_coefficient": spec.aux}
    elif kind == "l1":
        told |= {"l1_coefficient": spec.sparsity, "l1_warm_up_steps": warm_up}
    elif spec.target_l0 is not None:
        told |= {"l0_coefficient": 1.0, "l0_warm_up_steps": warm_up}
        told |= {"target_l0": spec.target_l0, "jumprelu_sparsity_loss_mode": "quadratic"}
    else:
        told |= {"l0_coefficient": spec.sparsity, "l0_warm_up_steps": warm_up}
    if spec.architecture == "matryoshka":
        told["matryoshka_widths"] = _widths(spec, width)
    if spec.is_transcoder:
        told |= {"d_out": target, "skip": "skip" in spec.architecture}
    return told


def _widths(spec: SaeSpec, width: int) -> list[int]:
    count = spec.latents(width)
    given = spec.widths or tuple(max(1, count // part) for part in (8, 4, 2))
    return sorted({*given, count})


def trainer_of(module: Any, spec: SaeSpec, *, batch_size: int, steps: int) -> Any:
    """SAELens' trainer of a module, with its optimizer and its schedules, and no log of its own.

    Args:
        module: that it trains.
        spec: rate, warm-up and decay.
        batch_size: vectors a step.
        steps: in all.
    """
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    rate, vectors = spec.rate(int(module.cfg.d_sae)), steps * batch_size
    config = SAETrainerConfig(
        total_training_samples=vectors,
        train_batch_size_samples=batch_size,
        lr=rate,
        lr_end=rate,
        lr_warm_up_steps=_at_least_two(spec.warm_up * steps),
        lr_decay_steps=int(spec.decay * steps),
        device=str(module.device),
        dead_feature_window=dead_window(spec, batch_size=batch_size, vectors=vectors),
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=config, sae=module, data_provider=iter(()))


def _at_least_two(steps: float) -> int:
    """Steps of a warm-up; torch's schedule cannot warm up in one."""
    return int(steps) if int(steps) >= 2 else 0


def dead_window(spec: SaeSpec, *, batch_size: int, vectors: int) -> int:
    """Steps without firing after which a latent is dead.

    Example:
        >>> dead_window(SaeSpec(), batch_size=1000, vectors=2_000_000)
        200
    """
    asked = spec.dead_after if spec.dead_after is not None else min(_WINDOW_DEAD, vectors // 10)
    return max(1, math.ceil(asked / batch_size))
