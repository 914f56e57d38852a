"""`attention_statistics`: statistics of a model's attention on some token ids, without a store."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.attention_classes import LOCAL, key_codes
from moescope.probes.attention_reduced import attention_reduced
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.attention_statistics import WINDOW, AttentionSums, reduce_pattern
from moescope.probes.forward import DeviceBatch, logits_of
from moescope.probes.live_model import LiveModel
from moescope.probes.pieces import Pieces


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of attention, layer by layer.

    Attributes:
        layers: site → its sums, on the layer's device; sites are `blocks.{L}.attn.hook_pattern_slices`.
        left_out: sites without a pattern, and why.
    """

    layers: Mapping[Site, AttentionSums]
    left_out: Mapping[Site, str]

    def pooled(self, metric: str) -> dict[int, Any]:
        """Layer → value of a metric for every head over all sequences, as a NumPy array.

        Of layers with two attentions the first counts.
        """
        found: dict[int, Any] = {}
        for site, sums in self.layers.items():
            if metric in sums.names:
                found.setdefault(site.layer, sums.pooled(metric).cpu().numpy())
        return found


def attention_statistics(
    model: LiveModel,
    ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    layers: Collection[int] | None = None,
    window: int = WINDOW,
    local: int = LOCAL,
) -> AttentionStatistics:
    """Run token ids through a model once and give the statistics of its attention.

    Definitions are those of `moescope.probes.attention_statistics` (`sink_alpha_k`: arXiv 2410.10781). Inside
    `model.edited(…)` they are those of the edited model. Memory grows linearly with the length, beside what the model needs.

    Args:
        model: from `moescope.load`.
        ids: [row, position] token ids, or sequences of any lengths, which are padded at the right.
        layers: 0-based numbers of the blocks; None for all.
        window: W of `sink_alpha_k`, in tokens.
        local: keys before the query that count as local.

    Raises:
        InputError: no ids, no layer that shows its pattern, an attention implementation other than sdpa and eager.

    Example:
        >>> import moescope as ms
        >>> model = ms.load("demo")
        >>> found = attention_statistics(model, [[5, 6, 7, 8], [9, 10, 11]], layers=[2])
        >>> found.pooled("mass_self")[2].shape
        (6,)
    """
    batch, codes = _batch(model, ids)
    found: dict[Site, AttentionSums] = {}

    def receive(site: Site, slices: PatternSlices) -> None:
        mask, on_device = batch.mask.to(slices.device), codes.to(slices.device)
        found[site] = reduce_pattern(slices, mask, on_device, window=window, local=local)

    with torch.no_grad(), attention_reduced(model, layers, receive) as left_out:
        logits_of(model, batch)
    return AttentionStatistics(found, left_out)


def _batch(model: LiveModel, ids: torch.Tensor | Sequence[Sequence[int]]) -> tuple[DeviceBatch, torch.Tensor]:
    rows = [np.asarray(row.cpu() if isinstance(row, torch.Tensor) else row, np.int64) for row in ids]
    if not rows or any(row.ndim != 1 or not len(row) for row in rows):
        raise InputError("there is nothing to run", expected="token ids, at least one in each row")
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, model.pad_id, np.int64)
    padded[mask] = np.concatenate(rows)
    codes = torch.from_numpy(key_codes(Pieces(model.tokenizer), padded))
    return DeviceBatch(*(torch.from_numpy(a).to(model.device) for a in (padded, mask))), codes
