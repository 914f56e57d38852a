"""What a random control of each kind of edit names instead."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import Ablate, Keep, MixRouting, OfExperts, SwapExperts, as_tuple
from moescope.core.edit_kinds.features import Descend, Latents
from moescope.core.edit_kinds.stream import AlongVector, MaskHead, SetChannel, Skip
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.edits.step import Place
from moescope.probes.edits.steps.mask_head import head_count
from moescope.probes.edits.steps.stream import width_at
from moescope.probes.effects.latent_controls import LatentDraws, TooFewLatentsError

Router = tuple[int, str]
Matcher = Callable[[Any, "Drawing"], list[Edit]]
D = TypeVar("D")


class ExhaustedError(Exception):
    """There are too few others to draw from; the message says where."""


class Drawing:
    """Draws for the edits of one intervention what stands for each thing they name; one draw at a time.

    Args:
        module, anatomy: of the model.
        edits: of the intervention: nothing that any of them names is drawn for another.
        loads: router → decisions of each expert.
        random: where the draws come from.
        near: an expert is drawn among so many of nearest load.
        latents: draws other latents, for edits through an autoencoder.

    Attributes:
        unmatched: whether experts were drawn without loads to match.
        notes: what a reader must know of the draws.
    """

    def __init__(
        self,
        module: nn.Module,
        anatomy: Anatomy,
        edits: Sequence[Edit],
        loads: Mapping[Router, NDArray[np.float64]],
        random: np.random.Generator,
        *,
        near: int,
        latents: LatentDraws | None = None,
    ) -> None:
        self._latents = latents
        self.module, self.anatomy, self.random = module, anatomy, random
        self._loads, self._near = loads, near
        self.unmatched = False
        self.far = 1.0  # the largest ratio between the loads of an expert and of what stands for it
        self.notes: list[str] = []
        self._experts = {place: _unique(named) for place, named in _expert_targets(edits, anatomy).items()}
        self._heads: dict[Router, tuple[int, ...]] = {}
        self._channels: dict[str, tuple[int, ...]] = {}
        for edit in edits:
            if isinstance(edit, SetChannel):
                self._channels[edit.site] = _unique([*self._channels.get(edit.site, ()), *as_tuple(edit.channels)])
        self._skipped = _unique(
            layer for e in edits if isinstance(e, Skip) for layer in e.layers or range(anatomy.n_layers)
        )
        for edit in edits:
            if isinstance(edit, MaskHead):
                for s in attentions(edit, anatomy):
                    held = self._heads.get((s.layer, s.block), ())
                    self._heads[s.layer, s.block] = _unique([*held, *as_tuple(edit.heads)])
        self._drawn: dict[Hashable, Any] = {}

    def anew(self) -> None:
        """Begin a draw."""
        self._drawn = {}

    def drawn(self) -> Hashable:
        """What this draw came to, whatever stands for what: equal for draws that make no difference."""
        return tuple(
            (place, tuple(sorted(found.values())) if isinstance(found, dict) else tuple(found))
            for place, found in sorted(self._drawn.items(), key=lambda item: repr(item[0]))
        )

    def experts(self, place: Router) -> dict[int, int]:
        """Expert named → the one that stands for it, at a router."""
        return self._once(("experts", place), lambda: self._draw_experts(place))

    def heads(self, s: Sublayer) -> dict[int, int]:
        """Head named → the one that stands for it, at an attention."""
        count = head_count(Place(self.module, self.anatomy, s.layer, s)) or 0
        named = self._heads[s.layer, s.block]
        return self._once(
            ("heads", (s.layer, s.block)), lambda: self._draw(named, range(count), f"heads in layer {s.layer}")
        )

    def channels(self, site: str) -> dict[int, int]:
        """Channel named → the one that stands for it, at a site; the same one in every layer."""
        places = (Place(self.module, self.anatomy, layer) for layer in range(self.anatomy.n_layers))
        width = min((found for place in places if (found := width_at(site, place)) is not None), default=0)
        return self._once(
            ("channels", site), lambda: self._draw(self._channels[site], range(width), f"channels of {site}")
        )

    def layers(self, part: str) -> dict[int, int]:
        """Layer skipped → the one that stands for it."""
        kinds = {"attn": ("attention", "ssm"), "mlp": ("moe", "dense")}.get(part, ())
        there = [s.layer for s in self.anatomy.sublayers if s.kind in kinds] if kinds else range(self.anatomy.n_layers)
        return self._once(
            ("layers", part), lambda: self._draw(self._skipped, _unique(there), f"layers with {part} in the model")
        )

    def latents(self, sae: str) -> dict[int, int]:
        """Latent named → the one that stands for it, of an autoencoder."""
        assert self._latents is not None
        try:
            return self._once(("latents", sae), partial(self._latents.stand_ins, sae, self.random))
        except TooFewLatentsError as reason:
            raise ExhaustedError(str(reason)) from reason

    def alike(self, sae: str, latent: int, other: int) -> float:
        """By what a value of one latent is multiplied so that another writes as long a vector."""
        assert self._latents is not None
        return self._latents.ratio(sae, latent, other)

    def direction(self, vector: Sequence[float]) -> tuple[float, ...]:
        """A random direction of the same norm; the same one for the same vector."""

        def draw() -> tuple[float, ...]:
            random = self.random.standard_normal(len(vector))
            return tuple(float(x) for x in random * (np.linalg.norm(vector) / np.linalg.norm(random)))

        return self._once(("direction", hash(tuple(vector))), draw)

    def shuffled(self, reference: Sequence[float]) -> tuple[float, ...]:
        """The same probabilities for other experts; the same ones for the same reference."""

        def draw() -> tuple[float, ...]:
            return tuple(float(x) for x in self.random.permutation(reference))

        return self._once(("reference", tuple(reference)), draw)

    def _once(self, key: Hashable, draw: Callable[[], D]) -> D:
        if key not in self._drawn:
            self._drawn[key] = draw()
        found: D = self._drawn[key]
        return found

    def _draw(self, named: Sequence[int], there: Iterable[int], what: str) -> dict[int, int]:
        others = [n for n in there if n not in named]
        if len(others) < len(named):
            raise ExhaustedError(
                f"of the {len(others) + len(named)} {what}, {len(named)} are named, and too few are left"
            )
        return dict(zip(named, map(int, self.random.choice(others, len(named), replace=False)), strict=True))

    def _draw_experts(self, place: Router) -> dict[int, int]:
        s = self.anatomy.moe_at(*place)
        assert s is not None
        routed, found = s.n_experts or 0, dict[int, int]()
        for ids in (range(routed), range(routed, s.n_choices)):  # a null expert stands for a null expert
            named = [e for e in self._experts[place] if e in ids]
            others = [e for e in ids if e not in named]
            if len(others) < len(named):
                raise ExhaustedError(
                    f"of the {len(ids)} experts in layer {place[0]}, {len(named)} are named, and too few are left"
                )
            for expert in self.random.permutation(named) if named else ():
                choice = self._one_near(place, int(expert), others)
                found[int(expert)] = choice
                others.remove(choice)
        return found

    def _one_near(self, place: Router, expert: int, others: Sequence[int]) -> int:
        """One of the experts whose load is nearest to an expert's."""
        load = self._loads.get(place)
        if load is None:
            self.unmatched = True
            return int(self.random.choice(others))
        # Those of equal distance in random order, so that none is preferred for its number.
        order = sorted(self.random.permutation(others), key=lambda other: abs(load[other] - load[expert]))
        chosen = int(self.random.choice(order[: self._near]))
        self.far = max(self.far, float((max(load[chosen], load[expert]) + 1) / (min(load[chosen], load[expert]) + 1)))
        return chosen


def matcher_of(edit: Edit) -> Matcher | None:
    """What draws a control of an edit; None where its kind has none."""
    return next((matcher for kind, matcher in _MATCHERS if isinstance(edit, kind)), None)


def attentions(edit: MaskHead, anatomy: Anatomy) -> list[Sublayer]:
    """The attentions whose heads an edit masks."""
    there = [s for s in anatomy.sublayers if s.kind == "attention" and s.block == edit.block]
    return [s for s in there if edit.layers is None or s.layer in edit.layers]


def _routers(edit: Any, anatomy: Anatomy) -> list[Sublayer]:
    there = [s for s in anatomy.moe if s.block == edit.block]
    return [s for s in there if edit.layers is None or s.layer in edit.layers]


def _expert_targets(edits: Sequence[Edit], anatomy: Anatomy) -> dict[Router, list[int]]:
    """Router → experts that edits name there; of those that Keep keeps and those it leaves out, the fewer."""
    found: dict[Router, list[int]] = {}
    for edit in edits:
        if isinstance(edit, (OfExperts, SwapExperts)):
            for s in _routers(edit, anatomy):
                found.setdefault((s.layer, s.block), []).extend(_named(edit, s))
    return found


def _named(edit: OfExperts | SwapExperts, s: Sublayer) -> tuple[int, ...]:
    if isinstance(edit, SwapExperts):
        return edit.first, edit.second
    return _left_out(edit, s) if isinstance(edit, Keep) and _keeps_most(edit, s) else edit.ids


def _keeps_most(edit: Keep, s: Sublayer) -> bool:
    return 2 * len(edit.ids) > s.n_choices


def _left_out(edit: OfExperts, s: Sublayer) -> tuple[int, ...]:
    return tuple(e for e in range(s.n_choices) if e not in edit.ids)


def _of_experts(edit: OfExperts, drawing: Drawing) -> list[Edit]:
    made: list[Edit] = []
    for s in _routers(edit, drawing.anatomy):
        stands_for = drawing.experts((s.layer, s.block))
        if isinstance(edit, Keep) and _keeps_most(edit, s):
            out = {stands_for[e] for e in _left_out(edit, s)}
            experts = tuple(e for e in range(s.n_choices) if e not in out)
        else:
            experts = tuple(stands_for[e] for e in edit.ids)
        # Mean outputs belong to the experts they are of.
        own = {"means": None} if isinstance(edit, Ablate) else {}
        made.append(replace(edit, layer=s.layer, experts=experts, **own))  # type: ignore[arg-type]  # fields of the kind
    return made


def _swap(edit: SwapExperts, drawing: Drawing) -> list[Edit]:
    made: list[Edit] = []
    for s in _routers(edit, drawing.anatomy):
        stands_for = drawing.experts((s.layer, s.block))
        made.append(replace(edit, layer=s.layer, first=stands_for[edit.first], second=stands_for[edit.second]))
    return made


def _mask_head(edit: MaskHead, drawing: Drawing) -> list[Edit]:
    made: list[Edit] = []
    for s in attentions(edit, drawing.anatomy):
        stands_for = drawing.heads(s)
        made.append(replace(edit, layer=s.layer, heads=tuple(stands_for[h] for h in as_tuple(edit.heads))))
    return made


def _set_channel(edit: SetChannel, drawing: Drawing) -> list[Edit]:
    stands_for = drawing.channels(edit.site)
    return [replace(edit, channels=tuple(stands_for[c] for c in as_tuple(edit.channels)))]


def _along(edit: AlongVector, drawing: Drawing) -> list[Edit]:
    return [replace(edit, vector=drawing.direction(edit.vector))]


def _skip(edit: Skip, drawing: Drawing) -> list[Edit]:
    stands_for = drawing.layers(edit.part)
    layers = range(drawing.anatomy.n_layers) if edit.layers is None else edit.layers
    return [replace(edit, layer=tuple(stands_for[layer] for layer in layers))]


def _mix(edit: MixRouting, drawing: Drawing) -> list[Edit]:
    return [replace(edit, reference=drawing.shuffled(edit.reference))]


def _unique(numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(n) for n in numbers))


def _of_latents(edit: Latents, drawing: Drawing) -> list[Edit]:
    stands_for = drawing.latents(edit.sae)
    values: Sequence[float] = edit.values  # type: ignore[assignment]  # a tuple once made
    if edit.how != "scale":
        pairs = zip(edit.ids, values, strict=True)
        values = tuple(value * drawing.alike(edit.sae, i, stands_for[i]) for i, value in pairs)
    return [replace(edit, latents=tuple(stands_for[i] for i in edit.ids), values=values)]


def _descend(edit: Descend, drawing: Drawing) -> list[Edit]:
    if edit.ids is not None:
        stands_for = drawing.latents(edit.sae)
        return [replace(edit, latents=tuple(stands_for[i] for i in edit.ids))]
    numbers = drawing.shuffled(edit.numbers)
    return [replace(edit, **{"target" if edit.target is not None else "weights": numbers})]  # type: ignore[arg-type]  # fields of the kind


_MATCHERS: tuple[tuple[type[Edit], Matcher], ...] = (
    (OfExperts, _of_experts),
    (SwapExperts, _swap),
    (MaskHead, _mask_head),
    (SetChannel, _set_channel),
    (AlongVector, _along),
    (Skip, _skip),
    (Latents, _of_latents),
    (Descend, _descend),
    (MixRouting, _mix),
)
