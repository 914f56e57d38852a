"""Transcoders trained by SAELens' own machinery, which has them for use only: what one site holds, predicted from another.

A batch is both sides beside each other, [input, target], so that SAELens' trainer, which knows one tensor a batch, takes it as
it is. The ReLU forms learn by its standard form's loss, mean squared error and L1 penalty; the JumpReLU forms by BatchTopK and
its threshold, as its BatchTopK autoencoders become JumpReLU ones. Saved, stock SAELens opens each as its own transcoder.

Importing this imports SAELens, so it is imported only where a transcoder is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoderConfig,
    SkipTranscoderConfig,
    TranscoderConfig,
)
from torch import nn


class PairTraining(TrainingSAE[Any]):  # type: ignore[misc]  # SAELens has no types that are seen
    """The part that all transcoders share: weights between two widths, and a step on pairs."""

    W_skip: nn.Parameter | None

    def initialize_weights(self) -> None:
        """Random directions of the initial norm; no skip at first, and the encoder is not the decoder's transpose."""
        cfg, where = self.cfg, {"dtype": self.dtype, "device": self.device}
        norm = cfg.decoder_init_norm or 0.1
        decoder, encoder = torch.randn(cfg.d_sae, cfg.d_out, **where), torch.randn(cfg.d_sae, cfg.d_in, **where)
        self.W_dec = nn.Parameter(norm * decoder / decoder.norm(dim=-1, keepdim=True))
        self.W_enc = nn.Parameter((norm * encoder / encoder.norm(dim=-1, keepdim=True)).T.contiguous())
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, **where))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **where))
        self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, **where)) if cfg.skip else None

    def process_sae_in(self, sae_in: Float[torch.Tensor, "row d_in"]) -> Float[torch.Tensor, "row d_in"]:
        """The input in the weights' type; the decoder's bias is of the other site and not taken off."""
        seen: torch.Tensor = self.hook_sae_input(sae_in.to(self.dtype))
        return seen

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses on pairs."""
        x, target = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], dim=-1)
        acts, before = self.encode_with_hidden_pre(x)
        out = self.decode(acts)
        if self.W_skip is not None:
            out = out + x @ self.W_skip.T
        error = self.mse_loss_fn(out, target).sum(dim=-1).mean()
        rest = self.calculate_aux_loss(replace(step_input, sae_in=target), acts, before, out)
        losses = {"mse_loss": error, **(rest if isinstance(rest, dict) else {"aux_loss": rest})}
        total = torch.stack([loss.reshape(()) for loss in losses.values()]).sum()
        return TrainStepOutput(target, out, acts, before, total, losses)

    @torch.no_grad()
    def fold_scales(self, of_input: float, of_target: float) -> None:
        """Take vectors as the model has them: both sides were multiplied by a number each while this was trained."""
        self.W_enc.data *= of_input
        self.W_dec.data /= of_target
        self.b_dec.data /= of_target
        if self.W_skip is not None:
            self.W_skip.data *= of_input / of_target
        if hasattr(self, "topk_threshold"):
            self.topk_threshold /= of_target  # it is in units of the decoder's norm, like the activations


@dataclass(kw_only=True)
class ReluTranscoderTrainingConfig(StandardTrainingSAEConfig):  # type: ignore[misc]  # as above
    """A ReLU transcoder with an L1 penalty."""

    d_out: int
    skip: bool = False
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        """Name of the form in training."""
        return "transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        """SAELens' configuration of the saved form."""
        found: type[SAEConfig] = SkipTranscoderConfig if self.skip else TranscoderConfig
        return found


@dataclass(kw_only=True)
class BatchTopKTranscoderTrainingConfig(BatchTopKTrainingSAEConfig):  # type: ignore[misc]  # as above
    """A transcoder trained by BatchTopK and saved with a threshold."""

    d_out: int
    skip: bool = False
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        """Name of the form in training."""
        return "batchtopk_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        """SAELens' configuration of the saved form."""
        found: type[SAEConfig] = JumpReLUSkipTranscoderConfig if self.skip else JumpReLUTranscoderConfig
        return found


class ReluTranscoderTraining(PairTraining, StandardTrainingSAE):  # type: ignore[misc]  # as above
    """Trains a transcoder or a skip transcoder."""


class BatchTopKTranscoderTraining(PairTraining, BatchTopKTrainingSAE):  # type: ignore[misc]  # as above
    """Trains a JumpReLU transcoder, with or without a skip."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses on pairs; the threshold follows the smallest activation that is kept."""
        output = PairTraining.training_forward_pass(self, step_input)
        self.update_topk_threshold(output.feature_acts)
        return output
