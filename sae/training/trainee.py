"""`Trainee`: one autoencoder while it is trained, and all that has to be kept to go on with it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from moescope.core.errors import InputError, RunError
from moescope.sae.training.centre import geometric_median, scale_to_width
from moescope.sae.training.modules import trainer_of, training_module
from moescope.sae.training.specs import SaeSpec


@dataclass
class Trainee:
    """One autoencoder in training.

    Attributes:
        name: of the autoencoder.
        spec: what it is.
        trainer: SAELens' trainer of it.
        widths: components of the input and, for a transcoder, of the target.
        scales: what a transcoder's two sides are multiplied by; None for others, which SAELens' trainer scales itself.
        curve: how training went: step, loss, L0, dead share, explained variance of a batch.
    """

    name: str
    spec: SaeSpec
    trainer: Any
    widths: tuple[int, int | None]
    scales: tuple[float, float] | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def module(self) -> Any:
        """SAELens' training module."""
        return self.trainer.sae

    @classmethod
    def begin(
        cls,
        name: str,
        spec: SaeSpec,
        sample: Float[torch.Tensor, "row component"],
        *,
        widths: tuple[int, int | None],
        steps: int,
        batch_size: int,
        seed: int,
        device: str,
        metadata: Mapping[str, Any],
    ) -> Trainee:
        """First weights; scale, matrix and centre found on a sample.

        Raises:
            InputError: the sample's vectors are all 0.
        """
        module = training_module(
            spec, widths[0], target_width=widths[1], steps=steps, seed=seed, device=device, metadata=metadata
        )
        begun = cls(name, spec, trainer_of(module, spec, batch_size=batch_size, steps=steps), widths)
        if not bool((sample != 0).any()):
            raise InputError("the vectors are all 0", fix="record another site, or other text")
        begun._scale(sample.to(device))
        begun._centre(sample.to(device))
        return begun

    def _scale(self, sample: torch.Tensor) -> None:
        scaler = self.trainer.activation_scaler
        x, target = self._sides(sample)
        if target is not None:
            by = self.spec.normalise == "scale"
            self.scales = (scale_to_width(x), scale_to_width(target)) if by else (1.0, 1.0)
        elif self.spec.normalise == "scale":
            scaler.scaling_factor = scale_to_width(x)
        elif self.spec.normalise == "whiten":
            with redirect_stderr(io.StringIO()):  # SAELens draws a bar for each
                scaler.estimate_whitening(x.shape[-1], iter([x]), n_batches_for_norm_estimate=1)

    @torch.no_grad()
    def _centre(self, sample: torch.Tensor) -> None:
        if self.spec.centre == "zero":
            return
        seen = self._seen(sample)
        _, target = self._sides(seen)
        if target is None:
            target = self.module.run_time_activation_norm_fn_in(seen)
        centre = geometric_median(target) if self.spec.centre == "geometric_median" else target.mean(dim=0)
        self.module.b_dec.data.copy_(centre)

    def _sides(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.widths[1] is None:
            return batch, None
        return batch[..., : self.widths[0]], batch[..., self.widths[0] :]

    def _seen(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch as the module sees it."""
        x, target = self._sides(batch)
        if target is None or self.scales is None:
            scaled: torch.Tensor = self.trainer.activation_scaler(batch)
            return scaled
        return torch.cat([x * self.scales[0], target * self.scales[1]], dim=-1)

    def step(self, batch: Float[torch.Tensor, "row component"]) -> Any:
        """One step of SAELens' trainer on a batch as recorded; gives its output."""
        trainer = self.trainer
        if trainer.n_training_steps and trainer.n_training_steps % trainer.cfg.feature_sampling_window == 0:
            trainer.act_freq_scores.zero_()  # a new window of firing rates, without the histogram SAELens makes of the old
            trainer.n_frac_active_samples = 0
        output = trainer.step(batch if self.scales is None else self._seen(batch.to(self.module.device)))
        trainer.n_training_steps += 1
        return output

    @torch.no_grad()
    def wrong(self, output: Any) -> str | None:
        """What is not finite after a step, if anything is; waits for the device."""
        if not bool(torch.isfinite(output.sae_in).all()):
            return "a vector of the batch"
        if not math.isfinite(float(output.loss)):
            return "the loss"
        broken = next((n for n, p in self.module.named_parameters() if not bool(torch.isfinite(p).all())), None)
        return None if broken is None else f"the gradient of {broken}, and so its weights"

    @torch.no_grad()
    def measure(self, output: Any) -> dict[str, float]:
        """How it is doing, on the batch of a step; waits for the device."""
        acts = output.feature_acts
        wanted, got = output.sae_in.float(), output.sae_out.float()
        error = (wanted - got).pow(2).sum()
        spread = (wanted - wanted.mean(dim=0)).pow(2).sum()
        return {
            "step": float(self.trainer.n_training_steps),
            "loss": float(output.loss),
            "l0": float(acts.bool().float().sum(-1).to_dense().mean()),
            "dead_share": float(self.trainer.dead_neurons.float().mean()),
            "explained_variance": float(1 - error / spread),
        }

    def save(self, folder: Path) -> None:
        """Write it in SAELens' format, for use on vectors as the model has them; training cannot go on afterwards."""
        module, scaler = self.module, self.trainer.activation_scaler
        if self.scales is not None:
            module.fold_scales(*self.scales)
        elif scaler.scaling_factor is not None:
            module.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        elif scaler.whitening is not None:
            w = scaler.whitening
            module.fold_activation_whitening(w.mean, w.matrix, w.inverse_matrix)
        self.trainer.set_final_sae_metadata()
        module.cpu().save_inference_model(folder)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that going on needs."""
        trainer = self.trainer
        found = {f"module/{name}": value for name, value in self.module.state_dict().items()}
        for number, state in trainer.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{number}/{name}": torch.as_tensor(value) for name, value in state.items()}
        found["fired/since"] = trainer.n_forward_passes_since_fired
        found["fired/sum"] = trainer.act_freq_scores
        if (white := trainer.activation_scaler.whitening) is not None:
            found |= {f"whiten/{name}": getattr(white, name) for name in ("mean", "matrix", "inverse_matrix")}
        return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}

    def facts(self) -> dict[str, Any]:
        """All that going on needs besides tensors, for JSON."""
        trainer = self.trainer
        return {
            "name": self.name,
            "spec": self.spec.as_dict(),
            "steps": trainer.n_training_steps,
            "vectors": trainer.n_training_samples,
            "window": trainer.n_frac_active_samples,
            "groups": [
                {**group, "params": list(group["params"])} for group in trainer.optimizer.state_dict()["param_groups"]
            ],
            "schedule": _plain(trainer.lr_scheduler.state_dict()),
            "coefficients": {name: s.state_dict() for name, s in trainer.coefficient_schedulers.items()},
            "scale": trainer.activation_scaler.scaling_factor,
            "scales": self.scales,
            "curve": self.curve,
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Take up training where `tensors` and `facts` were taken.

        Raises:
            RunError: they are of another autoencoder.
        """
        trainer, device = self.trainer, self.module.device
        weights = {n.removeprefix("module/"): t for n, t in tensors.items() if n.startswith("module/")}
        try:
            self.module.load_state_dict(weights)
            trainer.optimizer.load_state_dict({"state": _moments(tensors), "param_groups": facts["groups"]})
            trainer.lr_scheduler.load_state_dict(facts["schedule"])
        except (RuntimeError, KeyError, ValueError) as failed:
            raise RunError(
                f"the checkpoint does not fit {self.name}", found=str(failed)[:300], fix="train it from the start"
            ) from failed
        for name, state in facts["coefficients"].items():
            trainer.coefficient_schedulers[name].load_state_dict(state)
        trainer.n_training_steps, trainer.n_training_samples = facts["steps"], facts["vectors"]
        trainer.n_frac_active_samples = facts["window"]
        trainer.n_forward_passes_since_fired = tensors["fired/since"].to(device)
        trainer.act_freq_scores = tensors["fired/sum"].to(device)
        trainer.activation_scaler.scaling_factor = facts["scale"]
        if "whiten/mean" in tensors:
            from sae_lens.training.activation_scaler import ActivationWhitening

            parts = [tensors[f"whiten/{name}"] for name in ("mean", "matrix", "inverse_matrix")]
            trainer.activation_scaler.whitening = ActivationWhitening(*parts)
        self.scales = tuple(facts["scales"]) if facts["scales"] else None
        self.curve = list(facts["curve"])


def _moments(tensors: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            number, _, name = rest.partition("/")
            found.setdefault(int(number), {})[name] = value
    return found


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's state without what JSON does not know: milestones become a list."""
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if key == "_schedulers":
            plain[key] = [_plain(inner) for inner in value]
        elif isinstance(value, (bool, int, float, str, list, tuple)) or value is None:
            plain[key] = list(value) if isinstance(value, tuple) else value
    return plain
