"""What stays the same while units are described: where they are from, who is asked, how much is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from moescope.sae.concepts.activity import Activity, Described
from moescope.sae.concepts.asking import Asker
from moescope.sae.concepts.windows import Words

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.sae.autoencoder import Autoencoder
    from moescope.store.run import Run
    from moescope.store.store import Store

Scored = Literal["detection", "fuzzing", "causal"]
SCORES: tuple[Scored, ...] = ("detection", "fuzzing", "causal")


@dataclass
class Job:
    """One call of `describe`.

    Attributes:
        store, run: where rows go, and whose texts are shown.
        kind, sae, layer, block: what is described.
        describer: the name that is stored.
        activity, words: where the units are active, and the text of tokens.
        asker: the completion function.
        examples, judged, width: windows shown, windows judged, and tokens of each.
        draws, seed: of resampling.
        model: for the causal score.
        shown: unit → documents that its describer was shown.
    """

    store: Store
    run: Run
    kind: Described
    sae: Autoencoder | None
    layer: int | None
    block: str | None
    describer: str
    activity: Activity
    words: Words
    asker: Asker
    examples: int
    judged: int
    width: int
    draws: int
    seed: int
    model: LiveModel | None
    shown: dict[int, frozenset[int]] = field(default_factory=dict)

    def random(self, unit: int, purpose: int) -> np.random.Generator:
        """A generator of its own for every unit and purpose, so that none depends on the others."""
        return np.random.default_rng([self.seed, unit, purpose])
