"""Matched random controls: the same edits of other experts, heads, channels, directions, latents or layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.edit import Edit
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.corpus import Corpus
from moescope.probes.effects.calibration import with_means
from moescope.probes.effects.control_kinds import Drawing, ExhaustedError, matcher_of
from moescope.probes.effects.latent_controls import LatentDraws
from moescope.probes.effects.latent_rates import Rates
from moescope.probes.live_model import LiveModel
from moescope.store.run import Run

Loads = Mapping[tuple[int, str], NDArray[np.float64]]
# Draws that came out before are thrown away, and so many of them in a row mean that there are no others.
_TRIES = 200
_FAR = 2.0  # loads that differ by more are no match

_LOADS = """
    SELECT layer, block, expert, sum(tokens)::DOUBLE AS tokens
    FROM loads
    WHERE run_id = ? AND expert >= 0
    GROUP BY layer, block, expert
    ORDER BY layer, block, expert
"""


@dataclass(frozen=True)
class Controls:
    """Controls of an intervention.

    Attributes:
        interventions: one a draw, all different, none touching what the intervention itself names.
        notes: what was matched and what could not be, in sentences.
    """

    interventions: tuple[Intervention, ...]
    notes: tuple[str, ...]


def loads_of(run: Run) -> dict[tuple[int, str], NDArray[np.float64]]:
    """(layer, block) → how many decisions of a run chose each expert; empty for a run without routing."""
    found: dict[tuple[int, str], dict[int, float]] = {}
    for layer, block, expert, tokens in run.store.fetch(_LOADS, [run.run_id]):
        found.setdefault((int(layer), str(block)), {})[int(expert)] = float(tokens)
    loads = {}
    for place, by_expert in found.items():
        loads[place] = np.zeros(max(by_expert) + 1)
        for expert, tokens in by_expert.items():
            loads[place][expert] = tokens
    return loads


def controls_for(
    intervention: Intervention,
    model: LiveModel,
    *,
    loads: Loads | None = None,
    draws: int = 5,
    seed: int = 0,
    sources: Mapping[str, Any] | None = None,
    rates: Rates | None = None,
) -> Controls:
    """Draw interventions of the same size at the same places that spare what the given one names.

    Experts: as many others of the same router, each drawn among those whose load is nearest to that of the one it stands
    for (SwapExperts and FakeQuant too; for Keep, where it keeps most experts, those it leaves out are drawn anew). Heads: as
    many others of the same layers. Channels: as many others, with the same values. Directions (Add, ProjectOut, Clamp):
    Gaussian ones of the same norm. Skip: as many other layers. MixRouting: the reference with its experts shuffled. Latents:
    as many others of the same autoencoder, each drawn among those active about as often as the one it stands for, its value
    times the ratio of the two decoder norms so that it writes a vector of the same length. Descend: towards the same numbers
    for other latents (for all latents, shuffled among them). What has no random counterpart (TopK, TopP, RandomRouting,
    SetRouting, Patch, Splice) stays as it is; where nothing else is edited there are no controls, and the notes say so.

    Args:
        intervention: what is measured.
        model: it is for.
        loads: (layer, block) → decisions of each expert, as `loads_of` gives them; None to draw experts without matching.
        draws: controls wanted; there are fewer where no more differ.
        seed: of the draws.
        sources: the autoencoders that edits go through, by name.
        rates: name of an autoencoder → share of tokens on which each latent is active, as
            `moescope.probes.effects.latent_rates.latent_rates` gives them; None to draw latents without matching.

    Example:
        >>> import moescope as ms
        >>> from moescope.core.edit_kinds.experts import Ablate
        >>> found = controls_for(Intervention([Ablate(layer=3, experts=5)]), ms.load("demo"), draws=2)
        >>> [5 in control.edits[0].ids for control in found.interventions]
        [False, False]
    """
    if draws < 1 or not intervention.edits:
        return Controls((), ())
    anatomy = model.anatomy
    matchers = [matcher_of(edit) for edit in intervention.edits]
    fixed = [edit.kind for edit, matcher in zip(intervention.edits, matchers, strict=True) if matcher is None]
    if len(fixed) == len(matchers):
        kinds = ", ".join(dict.fromkeys(fixed))
        return Controls((), (f"There is no matched random counterpart of {kinds}: no controls.",))
    notes = [f"The controls leave {', '.join(dict.fromkeys(fixed))} as it is."] if fixed else []
    others = LatentDraws(intervention.edits, sources or {}, rates or {}, near=draws + 2)
    drawing = Drawing(
        model.module,
        anatomy,
        intervention.edits,
        loads or {},
        np.random.default_rng(seed),
        near=draws + 2,
        latents=others,
    )
    found: dict[Any, tuple[Edit, ...]] = {}
    try:
        for _ in range(_TRIES + draws):
            if len(found) == draws:
                break
            drawing.anew()
            edits = tuple(
                made
                for edit, matcher in zip(intervention.edits, matchers, strict=True)
                for made in ([edit] if matcher is None else matcher(edit, drawing))
            )
            found.setdefault(drawing.drawn(), edits)
    except ExhaustedError as reason:
        return Controls((), (*notes, f"No controls: {reason}."))
    if len(found) < draws:
        notes.append(f"Only {len(found)} different controls exist, of {draws} asked for.")
    if drawing.unmatched:
        notes.append("The run has no loads: control experts are drawn without matching how often they are chosen.")
    if drawing.far > _FAR:
        notes.append(
            "Loads are matched poorly, since a layer has few experts: a control expert is chosen up to "
            f"{drawing.far:,.1f} times as often, or as rarely, as the one it stands for."
        )
    notes += others.notes()
    interventions = tuple(
        Intervention(edits, name=f"{intervention.name or 'control'} (control {number})")
        for number, edits in enumerate(found.values())
    )
    return Controls(interventions, (*notes, *drawing.notes))


def with_own_means(controls: Controls, model: LiveModel, corpus: Corpus, batch_size: int, max_length: int) -> Controls:
    """The controls of edits that put a mean in an expert's place, each with the means of its own experts.

    A control with an expert that no token of the corpus chose has no mean to put there: it is left out, and a note says so.
    """
    found: list[Intervention] = []
    notes = list(controls.notes)
    for control in controls.interventions:
        try:
            found.append(with_means(model, corpus, control, batch_size=batch_size, max_length=max_length))
        except InputError as reason:
            notes.append(f"A control was left out: {reason.problem}.")
    return Controls(tuple(found), tuple(notes))
