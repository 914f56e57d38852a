"""A MoE layer as one wide sparse MLP: every neuron of every expert is a latent, with the interface of an autoencoder.

y = Σ over the chosen experts e of w_e · down_e · z_e, and so y = decoderᵀ · a with a the neurons of all experts side by side,
each times its expert's routing weight and 0 where the expert was not chosen (MoE-X, arXiv 2503.07639).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from moescope.core.errors import InputError, RunError
from moescope.core.json_data import to_json
from moescope.core.sites import MLP_IN, MLP_OUT, Site
from moescope.probes.expert_slots import SlotTap, slots_tapped
from moescope.probes.live_model import LiveModel
from moescope.probes.shared_expert_taps import routed_scale
from moescope.sae.experts.expert_matrices import ExpertMatrices, expert_matrices
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store

ARCHITECTURE, ROTATED = "expert_neurons", "rotated_expert_neurons"
_NAMESPACE = uuid.UUID("6d6f6573-636f-7065-0000-000000000000")


@dataclass(frozen=True, eq=False)
class ExpertNeurons:
    """The neurons of all experts of one router, as latents of a transcoder from the block's input to its output.

    Neurons of gated experts take both signs, and a sign writes the opposite of the other: each is two latents, the positive
    half and the negative half, so that latents are never under 0 and what is decoded is exact. Latent e · d_expert + i is
    the positive half of neuron i of expert e; the negative halves follow, n_experts · d_expert further on. Almost every neuron of
    a chosen expert is a little active: with `least` over 0 a latent is active only where what it writes is at least
    that share of the length of what all routed experts write.

    Attributes:
        model, layer, block: which router.
        least: 0 keeps every neuron, and decoding is then exact.
        sae_id, name: as rows have it; the same for the same model, layer, `least` and rotation.
        row: its row of the table `saes`.
        rotation: seed of a random rotation of each expert's neurons, a control: other axes, and the same sum; None for none.
    """

    model: LiveModel
    layer: int
    block: str
    least: float
    sae_id: str
    name: str
    row: dict[str, Any]
    rotation: int | None = None
    expert: int | None = None
    head: int | None = None
    folder: Path | None = None

    @property
    def site(self) -> Site:
        """What it reads: the block's input."""
        return Site(self.layer, self.block, MLP_IN)

    @property
    def target_site(self) -> Site:
        """What it decodes: the routed experts' part of the block's output."""
        return Site(self.layer, "" if self.block == "mlp" else self.block, MLP_OUT)

    @cached_property
    def matrices(self) -> ExpertMatrices:
        """The experts' weights."""
        found = expert_matrices(self.model, self.layer, self.block)
        return found if self.rotation is None else replace(found, signed=True)  # rotated, they take both signs

    @property
    def d_in(self) -> int:
        """Components of what it reads."""
        return self.model.anatomy.d_model

    @property
    def d_out(self) -> int:
        """Components of what it decodes."""
        return self.model.anatomy.d_model

    @property
    def d_sae(self) -> int:
        """Latents."""
        return len(self.decoder)

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return self.matrices.down.device

    @cached_property
    def decoder(self) -> Float[torch.Tensor, "latent d_model"]:
        """Columns of the down projections, those of the negative halves with their sign turned."""
        rows = self._turned(self.matrices.down.transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        return torch.cat([rows, -rows]) if self.matrices.signed else rows.contiguous()

    @cached_property
    def lengths(self) -> Float[torch.Tensor, " latent"]:
        """Norms of the decoder rows."""
        found: torch.Tensor = self.decoder.norm(dim=-1)
        return found

    def expert_of(self, latent: int) -> tuple[int, int, int]:
        """Expert, neuron and sign (1 or −1) of a latent."""
        wide = self.matrices.n_experts * self.matrices.d_expert
        sign, place = (1, latent) if latent < wide else (-1, latent - wide)
        return place // self.matrices.d_expert, place % self.matrices.d_expert, sign

    @torch.no_grad()
    def neurons(self, x: Float[torch.Tensor, "row d_model"]) -> Float[torch.Tensor, "row neuron"]:
        """Weight · neuron of every expert, 0 where it was not chosen; the block itself is run on `x`.

        Raises:
            RunError: the block's kernel keeps its neurons to itself.
        """
        held: dict[str, torch.Tensor] = {}
        moe: Any = self.model.module.get_submodule(self._sublayer.path)
        experts = self.model.module.get_submodule(self._sublayer.experts_path or "")
        with slots_tapped([SlotTap(experts, held.update, neurons=True, out=False)]):
            moe(x.to(self.model.dtype)[None])
        if "post" not in held:
            raise RunError(
                f"the neurons of layer {self.layer} were not given",
                fix="load the model with experts_implementation='grouped_mm' or 'eager'",
            )
        ids, weights = held["indices"], held["weights"].float() * routed_scale(moe)
        post, slot = held["post"].float(), held["slot"]
        width = self.matrices.d_expert
        values = post * weights.flatten().index_select(0, slot)[:, None]
        first = ids.flatten().index_select(0, slot).long() * width + (slot // ids.shape[1]) * (
            self.matrices.n_experts * width
        )
        out = torch.zeros(len(x) * self.matrices.n_experts * width, device=post.device)
        out.index_add_(0, (first[:, None] + torch.arange(width, device=post.device)).flatten(), values.flatten())
        if self.rotation is None:
            return out.reshape(len(x), -1)
        return (
            self._turned(out.reshape(len(x), self.matrices.n_experts, width).transpose(0, 1)).transpose(0, 1).flatten(1)
        )

    @torch.no_grad()
    def encode(self, x: Float[torch.Tensor, "*row d_model"]) -> Float[torch.Tensor, "*row latent"]:
        """Activations of the latents, 0 or more, in float32."""
        flat = x.reshape(-1, x.shape[-1])
        signed = self.neurons(flat)
        found = torch.cat([signed.relu(), (-signed).relu()], -1) if self.matrices.signed else signed
        if self.least > 0:
            whole = (found @ self.decoder).norm(dim=-1, keepdim=True)
            found = torch.where(found * self.lengths >= self.least * whole, found, 0.0)
        return found.reshape(*x.shape[:-1], -1)

    @torch.no_grad()
    def decode(
        self, activations: Float[torch.Tensor, "*row latent"], x: torch.Tensor | None = None
    ) -> Float[torch.Tensor, "*row d_model"]:
        """What the routed experts write with these neurons, in float32; shared experts are no part of it."""
        del x
        return activations.float() @ self.decoder

    def _turned(self, rows: Float[torch.Tensor, "expert row neuron"]) -> Float[torch.Tensor, "expert row neuron"]:
        """Each expert's neurons along its rotation's axes; as they are without one."""
        return rows if self.rotation is None else rows @ self._rotations

    @cached_property
    def _rotations(self) -> Float[torch.Tensor, "expert neuron axis"]:
        random = torch.Generator().manual_seed(self.rotation or 0)
        width = self.matrices.d_expert
        drawn = torch.randn(self.matrices.n_experts, width, width, generator=random, dtype=torch.float64)
        found: torch.Tensor = torch.linalg.qr(drawn).Q.to(self.device, torch.float32)
        return found

    @property
    def _sublayer(self) -> Any:
        return self.model.anatomy.moe_at(self.layer, self.block)


def neurons_as_features(
    model: LiveModel, layer: int, *, block: str = "mlp", least: float = 0.0, rotation: int | None = None
) -> ExpertNeurons:
    """A MoE layer's neurons as latents that every reader of autoencoders takes.

    Args:
        model: with experts.
        layer, block: which router.
        least: share of the routed output's length under which a neuron does not count as active.
        rotation: seed of a random rotation of each expert's neurons, for a control.

    Raises:
        InputError: no router there, experts whose neurons cannot be read or have biases or a norm behind them.

    Example:
        >>> import torch, moescope as ms
        >>> neurons = neurons_as_features(ms.load("demo"), 2)
        >>> x = torch.randn(3, neurons.d_in)
        >>> neurons.encode(x).shape == (3, neurons.d_sae), neurons.expert_of(97)
        (True, (1, 1, 1))
    """
    s = model.anatomy.moe_at(layer, block)
    if s is None:
        raise InputError(f"layer {layer} has no router {block!r}", expected=f"one of layers {model.anatomy.moe_layers}")
    if not 0 <= least < 1:
        raise InputError("least is a share, at least 0 and under 1", found=str(least))
    experts: Any = model.module.get_submodule(s.experts_path) if s.experts_path else None
    why = None if s.neurons else s.unreachable or "where its neurons pass is not known"
    if getattr(experts, "down_proj_bias", None) is not None:
        why = "its down projections have biases, which no neuron writes"
    if getattr(experts, "has_post_expert_norm", False):
        why = "a norm stands behind each expert, so that its neurons' parts do not add up"
    if why is not None:
        raise InputError(f"the neurons of layer {layer} are no latents", found=why, fix="leave this layer out")
    found = expert_matrices(model, layer, block)
    part = f"{layer}" if block == "mlp" else f"{layer} {block}"
    kind = "neurons" if rotation is None else f"rotated neurons ({rotation})"
    name = f"{kind} of layer {part}" + (f", least {least:.4g}" if least else "")
    sae_id = str(uuid.uuid5(_NAMESPACE, f"{model.name} {model.revision} {model.anatomy.digest} {name}"))
    width = found.n_experts * found.d_expert * (2 if found.signed or rotation is not None else 1)
    row = {
        "sae_id": sae_id,
        "name": name,
        "site": str(Site(layer, block, MLP_IN)),
        "target_site": str(Site(layer, "" if block == "mlp" else block, MLP_OUT)),
        "architecture": ARCHITECTURE if rotation is None else ROTATED,
        "d_in": model.anatomy.d_model,
        "d_sae": width,
        "model": model.name,
        "anatomy_digest": model.anatomy.digest,
        "settings": {"least": least, "rotation": rotation},
    }
    return ExpertNeurons(model, layer, block, least, sae_id, name, row, rotation)


def register_neurons(store: Store, neurons: ExpertNeurons) -> None:
    """Put the row of a layer's neurons into `saes`, so that analyses find them by name; it has no files and no date.

    Args:
        store: open for writing.
        neurons: from `neurons_as_features`.

    Raises:
        InputError: the store is open for reading only.
    """
    row = {**neurons.row, "settings": to_json(neurons.row["settings"])}
    write_rows(store, {"saes": [row]}, over=[("saes", {"sae_id": neurons.sae_id})])
