"""What reconstructions do to a model's predictions when they take the place of the vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.edit_kinds.features import Splice, SpliceSite
from moescope.core.intervention import Intervention
from moescope.core.sites import EXPERT_OUT
from moescope.probes.batches import Batch
from moescope.probes.effects.paired import PairedBatch, paired_pass
from moescope.probes.live_model import LiveModel
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.judging.ablation import edit_site, written_at
from moescope.sae.judging.controls import Reconstruction
from moescope.sae.judging.rows import Floats, MeasureRow, ratios

_METRICS = {"delta_ce": "nats", "kl": "nats", "flips": "share of tokens"}


class _Source:
    """A reconstruction as an edit takes it: its code is the vector itself."""

    row: dict[str, Any] = {}  # noqa: RUF012  nothing writes to it

    def __init__(self, way: Reconstruction, autoencoder: Autoencoder) -> None:
        self.way, self.site, self.target_site = way, autoencoder.site, autoencoder.target_site
        self.d_in, self.decoder, self.expert = autoencoder.d_in, autoencoder.decoder, autoencoder.expert

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The vector."""
        return x.float()

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Its reconstruction."""
        del x
        return self.way.reconstruct(activations)


def can_splice(autoencoder: Autoencoder) -> bool:
    """Whether reconstructions can take the vectors' place in a live model."""
    site, written = autoencoder.site, written_at(autoencoder)
    known = {edit_site(site), edit_site(written)} <= set(get_args(SpliceSite))
    slots = edit_site(written) == f"mlp.{EXPERT_OUT}"
    return known and autoencoder.head is None and site.layer == written.layer and (slots or autoencoder.expert is None)


@dataclass
class Spliced:
    """Sums over the tokens that a spliced vector predicts, by sequence.

    Attributes:
        names: of the reconstructions.
        document, label: [sequence].
        n: [sequence] tokens.
        base: [sequence] Σ NLL of the model as it is, nats.
        sums: [sequence, reconstruction, metric] Σ ΔNLL, Σ KL (nats) and flips.
    """

    names: tuple[str, ...]
    document: NDArray[np.int64]
    label: NDArray[np.object_]
    n: Floats
    base: Floats
    sums: Floats


@dataclass
class _Tally:
    first: int
    documents: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    n: list[Floats] = field(default_factory=list)
    base: list[Floats] = field(default_factory=list)
    sums: list[Floats] = field(default_factory=list)

    def add(self, paired: PairedBatch) -> None:
        # The token at column c is predicted from column c − 1, which is spliced from `first` on.
        counted = paired.predicted & (np.arange(paired.ids.shape[1]) > self.first)
        self.documents += [s.document_id for s in paired.batch.sequences]
        self.labels += [s.document.label for s in paired.batch.sequences]
        self.n.append(counted.sum(1).astype(float))
        self.base.append((paired.base_nll * counted).sum(1))
        numbers = np.stack([paired.delta_nll, paired.kl, paired.flips], -1) * counted[..., None]
        self.sums.append(numbers.sum(2).transpose(1, 0, 2))


def spliced(
    model: LiveModel,
    autoencoder: Autoencoder,
    ways: Sequence[Reconstruction],
    batches: Iterable[Batch],
    *,
    first: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Spliced:
    """Run batches as they are and with each reconstruction in the place of the vectors at the autoencoder's site.

    Args:
        model: live.
        autoencoder: tells the site.
        ways: reconstructions, of different names.
        batches: of a run's sequences.
        first: position from which vectors are replaced; tokens that are predicted from there on are counted.
        advance: called with the tokens of each batch when it is done.

    Raises:
        InputError: a site at which vectors cannot be replaced.
        RunError: logits that are no numbers.
    """
    where: Any = edit_site(written_at(autoencoder))
    layer, positions = autoencoder.site.layer, f"{first}:"
    variants = [
        Intervention([Splice(layer=layer, site=where, sae=way.name, positions=positions, forced=True)], name=way.name)
        for way in ways
    ]
    sources: Any = {way.name: _Source(way, autoencoder) for way in ways}
    tally = _Tally(first)
    for paired in paired_pass(model, batches, variants, sources=sources):
        tally.add(paired)
        advance(paired.batch.tokens)
    return Spliced(
        tuple(way.name for way in ways),
        np.array(tally.documents),
        np.array(tally.labels, dtype=object),
        np.concatenate(tally.n),
        np.concatenate(tally.base),
        np.concatenate(tally.sums),
    )


def splicing_rows(found: Spliced, *, seed: int) -> list[MeasureRow]:
    """ΔCE, KL and flips of each reconstruction, by label too, and the share of the loss that it recovers.

        loss recovered = (CE_control − CE) ÷ (CE_control − CE_base)

    against the vectors replaced by zero and by their mean; 1 is the model as it is, 0 the control. Where a control does not
    raise the loss there is nothing to recover, and the measure is left out.
    """
    _, place = np.unique(found.document, return_inverse=True)
    sums, n = _by_document(found.sums, place), _by_document(found.n, place)
    total = int(n.sum())
    ((base, low, high),) = ratios(_by_document(found.base, place)[:, None], n[:, None], seed=seed)
    rows = [MeasureRow("ce", "base", base, total, "nats", low, high)]
    rows += _means(found.names, sums, n, seed)
    for label in sorted({str(value) for value in found.label if value is not None}):
        mine = found.label == label
        of_label, n_label = _by_document(found.sums[mine], place[mine]), _by_document(found.n[mine], place[mine])
        rows += _means(found.names, of_label, n_label, seed, "label", label)
    delta = sums[..., 0]
    for control in ("zero", "mean"):
        if control not in found.names:
            continue
        cost = delta[:, found.names.index(control)]
        if cost.sum() <= 0:
            continue
        others = [number for number, name in enumerate(found.names) if name != control]
        above = cost[:, None] - delta[:, others]
        recovered = ratios(above, np.repeat(cost[:, None], len(others), 1), seed=seed)
        rows += [
            MeasureRow(f"loss_recovered_{control}", found.names[other], value[0], total, "share of loss", *value[1:])
            for other, value in zip(others, recovered, strict=True)
        ]
    return rows


def _means(
    names: Sequence[str], sums: Floats, n: Floats, seed: int, kind: str = "all", value: str | None = None
) -> list[MeasureRow]:
    flat = sums.reshape(len(sums), -1)
    found = iter(ratios(flat, np.repeat(n[:, None], flat.shape[1], 1), seed=seed))
    rows = []
    for name in names:
        for metric, unit in _METRICS.items():
            mean, low, high = next(found)
            rows.append(MeasureRow(metric, name, mean, int(n.sum()), unit, low, high, kind, value))
    return rows


def _by_document(values: Floats, place: NDArray[np.int64]) -> Floats:
    _, place = np.unique(place, return_inverse=True)
    found = np.zeros((int(place.max()) + 1, *values.shape[1:]))
    np.add.at(found, place, values)
    return found
