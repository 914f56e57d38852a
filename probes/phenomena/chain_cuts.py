"""The links of the chain as interventions: what is cut, and what is cut at random for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moescope.core.edit import Edit
from moescope.core.edit_kinds.stream import MaskHead, SetChannel
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.effects.controls import Loads, controls_for
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.massive import (
    MassivePlaces,
    StreamMeans,
    other_channels,
    to_mean,
    to_zero,
    without_mean,
)
from moescope.probes.phenomena.super_experts import Expert, pruned
from moescope.probes.phenomena.writers import Part
from moescope.probes.projections import down_projection, widths

WRITER, ZERO, MEAN, HEADS = "writer", "massive to zero", "massive to mean", "heads"


@dataclass(frozen=True)
class Cut:
    """One cut.

    Attributes:
        link: which: `writer`, `massive to zero`, `massive to mean` or `heads`.
        target: what is cut.
        controls: the same at random.
        notes: what was matched, and what could not be.
    """

    link: str
    target: Intervention
    controls: tuple[Intervention, ...]
    notes: tuple[str, ...] = ()


def expert_cut(model: LiveModel, experts: Sequence[Expert], loads: Loads | None, *, draws: int, seed: int) -> Cut:
    """Experts with their contribution at zero, against as many others of the same routers, matched by load."""
    target = pruned(experts, name=named_cut(WRITER, ", ".join(_expert(*e) for e in experts)))
    controls = controls_for(target, model, loads=loads, draws=draws, seed=seed)
    return Cut(WRITER, target, controls.interventions, controls.notes)


def part_cut(model: LiveModel, parts: Sequence[Part], loads: Loads | None, *, draws: int, seed: int) -> Cut:
    """Heads, neurons or experts of one sublayer with their contribution at zero, against as many others of it.

    Raises:
        InputError: no part, or a shared expert.
    """
    if not parts:
        raise InputError("there is no writer to cut")
    first, numbers = parts[0], tuple(sorted(part.number for part in parts))
    if first.kind == "expert":
        return expert_cut(model, [(p.layer, p.block, p.number) for p in parts], loads, draws=draws, seed=seed)
    label = named_cut(WRITER, ", ".join(part_name(part) for part in parts))
    if first.kind == "head":
        target = Intervention([MaskHead(layer=first.layer, heads=numbers, block=first.block)], name=label)
        controls = controls_for(target, model, draws=draws, seed=seed)
        return Cut(WRITER, target, controls.interventions, controls.notes)
    return _neuron_cut(model, first, numbers, label, draws=draws, seed=seed)


def massive_cuts(
    model: LiveModel, places: MassivePlaces, means: StreamMeans, *, draws: int, seed: int
) -> tuple[Cut, ...]:
    """Massive activations to zero and to their mean, against as many other channels at zero and at theirs.

    Without the second where no channel has a mean in the texts that the means are of.
    """
    found = []
    for link, target, own in ((ZERO, to_zero(places), None), (MEAN, to_mean(places, means), means)):
        channels = ", ".join(map(str, sorted({*places.first_channels, *places.other_channels})))
        named = Intervention(target.edits, name=named_cut(link, f"channels {channels} after block {places.layer}"))
        notes: tuple[str, ...] = (
            () if places.on_first_tokens else ("Controls act on the first token of each text alone.",)
        )
        if link == MEAN and (unknown := without_mean(places, means)):
            notes += (
                f"Channels {', '.join(map(str, unknown))} are at no other token massive in the texts that means are taken of, and "
                "were left as they are there.",
            )
        if not target.edits:
            continue
        controls = tuple(other_channels(model, places, own, draws=draws, seed=seed))
        found.append(Cut(link, named, controls, notes))
    return tuple(found)


def heads_cut(model: LiveModel, heads: Sequence[tuple[int, str, int]], *, draws: int, seed: int) -> Cut:
    """Heads with their output at zero, against as many others of the same layers."""
    by_place: dict[tuple[int, str], list[int]] = {}
    for layer, block, head in sorted(heads):
        by_place.setdefault((layer, block), []).append(head)
    edits: list[Edit] = [
        MaskHead(layer=layer, block=block, heads=tuple(numbers)) for (layer, block), numbers in by_place.items()
    ]
    label = named_cut(HEADS, ", ".join(f"L{layer}·H{head}" for layer, _, head in heads))
    target = Intervention(edits, name=label)
    controls = controls_for(target, model, draws=draws, seed=seed)
    return Cut(HEADS, target, controls.interventions, controls.notes)


def neurons_at_zero(layer: int, neurons: Sequence[int], *, name: str | None = None) -> Intervention:
    """Some neurons of a dense MLP at zero, at every token: what zeroed columns of its last projection give.

    Example:
        >>> neurons_at_zero(11, [1229]).edits[0].channels
        (1229,)
    """
    return Intervention([SetChannel(layer=layer, site="mlp.hook_post", channels=tuple(neurons))], name=name)


def named_cut(link: str, what: str) -> str:
    """The name under which a cut is stored: `chain, writer: L11 neuron 1229`.

    Example:
        >>> named_cut(WRITER, "L1·E3")
        'chain, writer: L1·E3'
    """
    return f"chain, {link}: {what}"


def part_name(part: Part) -> str:
    """`L11·neuron 1229`, `L3·H2`, `L1·E3`.

    Example:
        >>> part_name(Part("neuron", 11, "mlp", 1229, 16948.0, 0.73))
        'L11·neuron 1229'
    """
    if part.kind == "expert":
        return _expert(part.layer, part.block, part.number)
    return f"L{part.layer}·" + (f"H{part.number}" if part.kind == "head" else f"{part.kind} {part.number}")


def _expert(layer: int, block: str, expert: int) -> str:
    place = f"L{layer}" if block == "mlp" else f"L{layer}.{block}"
    return f"{place}·" + (f"E{expert}" if expert >= 0 else f"shared {-expert}")


def _neuron_cut(model: LiveModel, first: Part, numbers: tuple[int, ...], label: str, *, draws: int, seed: int) -> Cut:
    random = np.random.default_rng(seed)
    path = next(s.path for s in model.anatomy.sublayers if (s.layer, s.block) == (first.layer, first.block))
    projection = down_projection(model.module, path, model.anatomy.d_model)
    size = widths(projection) if projection is not None else None
    assert size is not None  # its neurons were read there
    free = np.setdiff1d(np.arange(size[0]), numbers)

    drawn = [tuple(sorted(int(n) for n in random.choice(free, len(numbers), replace=False))) for _ in range(draws)]
    controls = tuple(neurons_at_zero(first.layer, chosen, name=f"{len(chosen)} other neurons") for chosen in drawn)
    target = neurons_at_zero(first.layer, numbers, name=label)
    return Cut(WRITER, target, controls, ("Controls are other neurons of the same MLP.",))
