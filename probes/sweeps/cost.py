"""What a sweep will cost, from two measured passes, and the most that beginning at the edited layer can save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moescope.probes.batches import Batch
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.sweeps.base_side import BaseSide
from moescope.probes.sweeps.passes import SweepPasses
from moescope.probes.sweeps.prefix import Kept
from moescope.probes.sweeps.variants import Group


@dataclass(frozen=True)
class SweepCost:
    """What a sweep is expected to take.

    Attributes:
        effects, variants: interventions asked for, and with their controls.
        sequences, tokens: of the corpus.
        passes: passes of a batch, plain ones left out.
        seconds: of all passes.
        plain_seconds: of one plain pass over the corpus.
        bound: whole passes over what remains of them behind the edited layers: how many times faster this can be at most.
        whole: why some passes begin at the bottom; empty where none does.
    """

    effects: int
    variants: int
    sequences: int
    tokens: int
    passes: int
    seconds: float
    plain_seconds: float
    bound: float
    whole: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"{self.effects:,} effects ({self.variants:,} interventions) over {self.sequences:,} sequences, {self.tokens:,} "
            f"tokens: about {spoken(self.seconds)} for {self.passes:,} passes, whole passes over what remains {self.bound:.2f}×"
        )
        return text if not self.whole else f"{text}; whole passes are run: {self.whole[0]}"


def cost_of(passes: SweepPasses, groups: Sequence[Group], batches: Sequence[Batch], *, draws: int = 2) -> SweepCost:
    """Time a plain pass, and those that begin at the first and last edited layer, on the first batch; the rest lies between.

    Args:
        passes: that would run the sweep.
        groups: of variants.
        batches: of the corpus.
        draws: how often each pass is timed; the quickest counts.
    """
    batch = batches[0]
    on_device = to_device(batch, passes.model)
    begins = {
        g.layer: g.layer if passes.resume and not passes.prefix.why_not(g.layer, on_device) else 0 for g in groups
    }
    whole = tuple(reason for layer in begins if (reason := passes.prefix.why_not(layer, on_device)))
    first, last = min(begins.values()), max(begins.values())
    behind = all(g.behind_attention for g in groups) and passes.resume and not whole
    kept = passes.prefix.plain(on_device, layers=[first, last])
    assert kept.logits is not None
    base, logits = BaseSide(kept.logits, on_device.ids, batch.lengths.tolist()), kept.logits
    compared = _quickest(lambda: base.against(logits, range(kept.rows)), draws)
    full = _quickest(lambda: logits_of(passes.model, on_device), draws)
    most, least = (
        _quickest(lambda layer=layer: _pass(passes, on_device, kept, layer, attention=behind), draws)  # type: ignore[misc]  # bound now
        for layer in (first, last)
    )
    scale = sum(_places(b) for b in batches) / _places(batch)
    counts = {layer: sum(len(g.variants) for g in groups if g.layer == layer) for layer in begins}
    remaining = {layer: most - (most - least) * (begins[layer] - first) / max(last - first, 1) for layer in begins}
    variants = sum(counts.values())
    work = sum(counts[layer] * remaining[layer] for layer in counts)
    sequences = sum(len(b.sequences) for b in batches)
    return SweepCost(
        effects=sum(len(g.effects) for g in groups),
        variants=variants,
        sequences=sequences,
        tokens=sum(b.tokens for b in batches),
        passes=variants * -(-sequences // passes.pass_size),
        seconds=scale * (work + variants * compared) + scale * full,
        plain_seconds=scale * full,
        bound=full * variants / work,
        whole=whole,
    )


def spoken(seconds: float) -> str:
    """A time for reading.

    Example:
        >>> spoken(3.2), spoken(90), spoken(7200)
        ('3 s', '1.5 min', '2.0 h')
    """
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _pass(passes: SweepPasses, batch: DeviceBatch, kept: Kept, layer: int, *, attention: bool) -> None:
    with passes.prefix.resumed(layer, kept, attention=attention):
        logits_of(passes.model, batch)


def _places(batch: Batch) -> int:
    return len(batch.sequences) * int(batch.lengths.max())


def _quickest(work: Callable[[], object], draws: int) -> float:
    found = []
    with torch.no_grad():
        for _ in range(max(1, draws)):
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
    return min(found)
