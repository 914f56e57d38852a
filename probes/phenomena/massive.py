"""Massive activations of a recorded run: where they stand, and interventions that take them to zero or to their mean.

As in the code of arXiv 2503.22329, every channel found massive after the block that forms them is set, at every token where it
is, to 0 or to the mean it has in texts to calibrate on, apart for the first token of a text and for others. A mean that costs
nothing where zero costs much shows that the activation carries no information: it is a constant that the model needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.edit_kinds.stream import SetChannel
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import RESID_POST, Site
from moescope.probes.batches import Batch
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped
from moescope.store.run import Run

_FOUND = """
    SELECT m.layer, t.sequence_id, t.position, m.channel, m.value
    FROM massive_activations m
    JOIN tokens t ON t.run_id = m.run_id AND t.token = m.token
    WHERE m.run_id = $run AND t.phase = 'prefill'
    ORDER BY m.layer, abs(m.value) DESC, t.sequence_id, t.position, m.channel
"""
LARGEST = 100.0  # |x| that a massive activation exceeds


@dataclass(frozen=True)
class MassivePlaces:
    """Massive activations of a run, as far as interventions need them.

    Attributes:
        layer: the block after which they form.
        last_layer: the last block after which the largest channel's are.
        channel: the channel of the largest one there.
        value: its mean over the sequences that have it, signed, after `layer`.
        peak: the largest |x| anywhere.
        places: sequence → position where that channel is largest after `layer`.
        first_channels, other_channels: channels massive there at the first token of a text, and at others.
    """

    layer: int
    last_layer: int
    channel: int
    value: float
    peak: float
    places: Mapping[int, int]
    first_channels: tuple[int, ...]
    other_channels: tuple[int, ...]

    @property
    def layers(self) -> range:
        """From the first to the last block after which the channel is massive."""
        return range(self.layer, self.last_layer + 1)

    @property
    def on_first_tokens(self) -> bool:
        """Whether all of them stand on the first token of their text."""
        return not self.other_channels


def massive_places(run: Run, *, layer: int | None = None) -> MassivePlaces | None:
    """Read where massive activations of a run stand; None where it has none.

    Args:
        run: with records of probe `residual`.
        layer: the block after which they form; None for the first after which any text has one.
    """
    rows = run.sql(_FOUND).fetchall()
    if not rows:
        return None
    layers = sorted({int(row[0]) for row in rows})
    layer = layer if layer in layers else layers[0]
    here = [row for row in rows if row[0] == layer]
    channel = int(here[0][3])
    places: dict[int, int] = {}
    values = []
    for _, sequence, position, at, value in here:
        if at == channel and sequence not in places:
            places[int(sequence)] = int(position)
            values.append(float(value))
    first = {int(row[3]) for row in here if row[2] == 0}
    other = {int(row[3]) for row in here if row[2] > 0}
    return MassivePlaces(
        layer,
        max(int(row[0]) for row in rows if row[3] == channel),
        channel,
        float(np.mean(values)),
        max(abs(float(row[4])) for row in rows),
        places,
        tuple(sorted(first)),
        tuple(sorted(other)),
    )


@dataclass(frozen=True)
class StreamMeans:
    """Mean vectors of the stream after one block.

    Attributes:
        layer: of the block.
        first: [d_model] over first tokens of texts.
        massive: channel → mean at other tokens where |x| of the channel exceeds 100; channels without such a token are missing.
        texts: behind `first`.
    """

    layer: int
    first: NDArray[np.float64]
    massive: Mapping[int, float]
    texts: int


def stream_means(model: LiveModel, batches: Iterable[Batch], layer: int, channels: Sequence[int]) -> StreamMeans:
    """Means over texts to calibrate on.

    Args:
        model: runs them, without edits.
        batches: the texts.
        layer: of the block.
        channels: of which means at other tokens are wanted.
    """
    site, sums, texts = Site(layer, "", RESID_POST), torch.zeros(model.anatomy.d_model, dtype=torch.float64), 0
    totals, counts = np.zeros(len(channels)), np.zeros(len(channels))
    seen: list[torch.Tensor] = []

    def receive(_site: Site, tensors: dict[str, torch.Tensor]) -> None:
        seen[:] = [tensors["resid"].detach()]

    with torch.no_grad(), tapped(model.module, model.anatomy, [site], receive):
        for batch in batches:
            given = to_device(batch, model)
            logits_of(model, given)
            (stream,) = seen
            sums += stream[:, 0].double().sum(0).cpu()
            texts += len(stream)
            for number, channel in enumerate(channels):
                values = stream[:, 1:, channel].double()
                large = (values.abs() > LARGEST) & given.mask[:, 1:].to(values.device)
                totals[number] += float((values * large).sum())
                counts[number] += float(large.sum())
    if not texts:
        raise InputError("there is no text to calibrate on")
    means = {c: float(t / n) for c, t, n in zip(channels, totals, counts, strict=True) if n}
    return StreamMeans(layer, (sums / texts).numpy(), means, texts)


def to_zero(places: MassivePlaces) -> Intervention:
    """Every massive channel at zero, where it is massive.

    Example:
        >>> found = MassivePlaces(2, 5, 7, 900.0, 950.0, {0: 0}, (7,), ())
        >>> to_zero(found).edits[0].positions
        '0:1'
    """
    return Intervention(_edits(places, None, None), name="massive activations to zero")


def to_mean(places: MassivePlaces, means: StreamMeans) -> Intervention:
    """Every massive channel at its mean, where it is massive; apart for the first token of a text and for others.

    Channels without a mean at other tokens (`without_mean`) are left as they are there.
    """
    first = tuple(float(means.first[c]) for c in places.first_channels)
    known = tuple(c for c in places.other_channels if c in means.massive)
    other = tuple(means.massive[c] for c in known)
    return Intervention(
        _edits(replace(places, other_channels=known), first, other), name="massive activations to their mean"
    )


def without_mean(places: MassivePlaces, means: StreamMeans) -> tuple[int, ...]:
    """Channels that are massive at other tokens, and never are in the texts that the means are of."""
    return tuple(c for c in places.other_channels if c not in means.massive)


def other_channels(
    model: LiveModel, places: MassivePlaces, means: StreamMeans | None, *, draws: int, seed: int
) -> list[Intervention]:
    """Controls: as many random other channels at the first tokens of texts, at zero, or each at its own mean.

    Massive activations elsewhere have no counterpart, since other channels are not large at a few tokens: as many random
    channels as there are massive ones of either kind are set at first tokens.

    Args:
        model: whose stream it is.
        places: what the controls are for.
        means: of the stream; None to set channels to zero.
        draws: controls wanted.
        seed: of the draws.
    """
    massive = {*places.first_channels, *places.other_channels}
    free = [c for c in range(model.anatomy.d_model) if c not in massive]
    count = min(len(massive), len(free))
    if not count:
        return []
    random = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        channels = tuple(sorted(int(c) for c in random.choice(free, count, replace=False)))
        values = None if means is None else tuple(float(means.first[c]) for c in channels)
        edit = SetChannel(layer=places.layer, channels=channels, values=values, positions="0:1")
        found.append(Intervention([edit], name=f"{count} other channels"))
    return found


def _edits(places: MassivePlaces, first: tuple[float, ...] | None, other: tuple[float, ...] | None) -> list[SetChannel]:
    edits = []
    if places.first_channels:
        edits.append(SetChannel(layer=places.layer, channels=places.first_channels, values=first, positions="0:1"))
    if places.other_channels:
        edits.append(
            SetChannel(layer=places.layer, channels=places.other_channels, values=other, positions="1:", above=LARGEST)
        )
    return edits
