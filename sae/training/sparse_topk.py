"""TopK and BatchTopK steps that pay for the active latents alone: SAELens' losses, its weights, its trainer, four times as fast.

Of a step's five matrix products between vectors and latents, SAELens computes all over every latent. But only those that are
active decode, and only they have a gradient: here the first product alone, which finds them, is dense. The rest are products
with sparse matrices. Losses and gradients are SAELens' own up to rounding (a test holds them side by side).

On processors only. Importing this imports SAELens, so it is imported only where such an autoencoder is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, act_times_W_dec, calculate_topk_aux_acts


@dataclass(frozen=True)
class Active:
    """Where latents are active in a batch, row by row.

    Attributes:
        starts: where each row begins in `latents`, and the end.
        rows, latents: of every active pair.
        shape: rows and latents of the batch.
    """

    starts: Int[torch.Tensor, " row+1"]
    rows: Int[torch.Tensor, " pair"]
    latents: Int[torch.Tensor, " pair"]
    shape: tuple[int, int]

    def matrix(self, values: Float[torch.Tensor, " pair"]) -> torch.Tensor:
        """[row, latent] with `values` at the pairs, by rows."""
        return torch.sparse_csr_tensor(self.starts, self.latents, values, self.shape, check_invariants=False)

    def transposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Order of pairs by latent, where each latent begins, and the rows in that order."""
        order = torch.argsort(self.latents, stable=True)
        starts = torch.zeros(self.shape[1] + 1, dtype=torch.long)
        torch.cumsum(torch.bincount(self.latents, minlength=self.shape[1]), 0, out=starts[1:])
        return order, starts, self.rows[order]


class _Autoencode(torch.autograd.Function):
    """x → x̂ through the active latents; their pre-activations are scaled by nothing, since a decoder's norm cancels out."""

    @staticmethod
    def forward(
        ctx: Any,
        centred: torch.Tensor,
        w_enc: torch.Tensor,
        b_enc: torch.Tensor,
        w_dec: torch.Tensor,
        b_dec: torch.Tensor,
        values: torch.Tensor,
        active: Active,
    ) -> torch.Tensor:
        ctx.save_for_backward(centred, w_enc, w_dec, values)
        ctx.active = active
        out: torch.Tensor = torch.sparse.mm(active.matrix(values), w_dec) + b_dec
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        centred, w_enc, w_dec, values = ctx.saved_tensors
        active: Active = ctx.active
        grad = grad.contiguous()
        order, starts, rows = active.transposed()
        shape = (active.shape[1], active.shape[0])

        def by_latent(of_pairs: torch.Tensor, what: torch.Tensor) -> torch.Tensor:
            matrix = torch.sparse_csr_tensor(starts, rows, of_pairs[order], shape, check_invariants=False)
            found: torch.Tensor = torch.sparse.mm(matrix, what)
            return found

        of_values = torch.sparse.sampled_addmm(active.matrix(torch.zeros_like(values)), grad, w_dec.T).values()
        of_values = of_values * (values > 0)
        of_b_enc = torch.zeros(shape[0]).index_add_(0, active.latents, of_values)
        of_centred = -(w_enc @ of_b_enc)  # summed over rows: the bias that was taken off is all that needs it
        return (
            None,
            by_latent(of_values, centred).T,
            of_b_enc,
            by_latent(values, grad),
            grad.sum(0) + of_centred,
            None,
            None,
        )


class SparseTopKTraining(TopKTrainingSAE):  # type: ignore[misc]  # SAELens has no types that are seen
    """SAELens' TopK autoencoder with a sparse step."""

    def _active(self, before: Float[torch.Tensor, "row latent"]) -> Active:
        k = min(int(self.cfg.k), before.shape[1])
        latents = torch.topk(before, k, dim=-1, sorted=False).indices.flatten()
        starts = torch.arange(0, len(latents) + 1, k)
        return Active(
            starts, torch.arange(before.shape[0]).repeat_interleave(k), latents, (before.shape[0], before.shape[1])
        )

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses."""
        x = step_input.sae_in
        with torch.no_grad():
            centred = x - self.b_dec
            before = torch.addmm(self.b_enc, centred, self.W_enc)
            norms = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else torch.ones(before.shape[1])
            before *= norms
            active = self._active(before)
            scaled = before[active.rows, active.latents].relu()
            values = scaled / norms[active.latents]
        through: Any = _Autoencode.apply
        out = through(centred, self.W_enc, self.b_enc, self.W_dec, self.b_dec, values, active)
        error = self.mse_loss_fn(out, x).sum(dim=-1).mean()
        aux = self._aux(x, out, step_input.dead_neuron_mask)
        where = torch.stack([active.rows, active.latents])
        acts = torch.sparse_coo_tensor(where, scaled, active.shape, check_invariants=False)
        losses = {"mse_loss": error, "auxiliary_reconstruction_loss": aux}
        return TrainStepOutput(x, out, acts, before, error + aux, losses)

    def _aux(self, x: torch.Tensor, out: torch.Tensor, dead: torch.Tensor | None) -> torch.Tensor:
        """SAELens' loss for dead latents, computed on those alone."""
        which = torch.nonzero(dead).flatten() if dead is not None else None
        if which is None or not len(which):
            return out.new_tensor(0.0)
        residual = (x - out).detach()
        most = x.shape[-1] // 2
        scale, k_aux = min(len(which) / most, 1.0), min(most, len(which))
        w_dec = self.W_dec[which]
        before = (x - self.b_dec) @ self.W_enc[:, which] + self.b_enc[which]
        if self.cfg.rescale_acts_by_decoder_norm:
            before = before * w_dec.norm(dim=-1)
        all_dead = torch.ones(len(which), dtype=torch.bool)
        acts = calculate_topk_aux_acts(k_aux=k_aux, hidden_pre=before, dead_neuron_mask=all_dead)
        given = act_times_W_dec(acts, w_dec, self.cfg.rescale_acts_by_decoder_norm)
        lost: torch.Tensor = (given - residual).pow(2).sum(dim=-1).mean()
        return lost * (float(self.cfg.aux_loss_coefficient) * scale)


class SparseBatchTopKTraining(SparseTopKTraining, BatchTopKTrainingSAE):  # type: ignore[misc]  # as above
    """SAELens' BatchTopK autoencoder with a sparse step."""

    def _active(self, before: Float[torch.Tensor, "row latent"]) -> Active:
        count = int(self.cfg.k * before.shape[0])
        flat = torch.topk(before.flatten(), count, sorted=False).indices.sort().values
        rows, latents = flat // before.shape[1], flat % before.shape[1]
        starts = torch.zeros(before.shape[0] + 1, dtype=torch.long)
        torch.cumsum(torch.bincount(rows, minlength=before.shape[0]), 0, out=starts[1:])
        return Active(starts, rows, latents, (before.shape[0], before.shape[1]))

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses; the threshold follows the smallest activation that is kept."""
        output = SparseTopKTraining.training_forward_pass(self, step_input)
        self.update_topk_threshold(output.feature_acts._values())
        return output
