"""`SweepRequest`: a sweep as asked for, from its options to the effects in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from moescope.core.edit_kinds.experts import How
from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.choices import check_room
from moescope.probes.claim import claimed
from moescope.probes.corpus import Corpus
from moescope.probes.edits.checks import check_intervention
from moescope.probes.effects.baseline import BATCH_SIZE, MAX_LENGTH, plan_of
from moescope.probes.effects.sources import sources_of
from moescope.probes.failures import explained
from moescope.probes.live_model import LiveModel
from moescope.probes.sweeps import plans
from moescope.probes.sweeps.cost import SweepCost, cost_of
from moescope.probes.sweeps.passes import SweepPasses
from moescope.probes.sweeps.scores import Across, ExpertScores
from moescope.probes.sweeps.screened_sweep import ScreenedSweep
from moescope.probes.sweeps.sweep import Sweep
from moescope.probes.sweeps.variants import Variant, grouped
from moescope.probes.sweeps.written import write_health
from moescope.store.run import Run
from moescope.store.store import Store

SweepKind = Literal["experts", "drop", "keep", "top_k", "top_p", "routing_value", "dose"]
KINDS: tuple[SweepKind, ...] = ("experts", "drop", "keep", "top_k", "top_p", "routing_value", "dose")


@dataclass
class SweepRequest:
    """What to sweep.

    Attributes:
        model, corpus: what runs on what.
        kind: `experts`, every expert alone; `drop` and `keep`, growing sets by score beside random ones; `top_k` and
            `top_p`, other numbers of experts a token; `routing_value`, random routing; `dose`, an intervention at several
            strengths.
        how: for `experts` and `drop`, how experts are taken out.
        layers: the layers of `experts`, and those taken alone by `top_k`, `top_p` and `routing_value`; None for all.
        scores: of `drop` and `keep`.
        shares: of experts taken out or kept, or of scores for `top_p`; None for the usual ones.
        numbers: of experts a token for `top_k`.
        across: whether the experts of `drop` compete in their layer or in the whole model.
        highest: for `drop`, take out the highest scores.
        controls: random sets beside each, or seeds of random routing.
        intervention, strengths: of `dose`.
        generate, prompts: for `dose`, tokens written after each of so many prompts; 0 for none.
        screen, verify: for `experts`, estimate all and run the `screen` highest and `verify` random ones; None to run all.
        seed: of random sets, samples and intervals.
        sources: name → autoencoder, for edits that go through one.
    """

    model: LiveModel
    corpus: Corpus
    kind: SweepKind
    how: How | None = None
    layers: Sequence[int] | None = None
    scores: Sequence[ExpertScores] = ()
    shares: Sequence[float] | None = None
    numbers: Sequence[int] | None = None
    across: Across = "layer"
    highest: bool = False
    controls: int = 5
    intervention: Intervention | None = None
    strengths: Sequence[float] = (0.25, 0.5, 1.0, 2.0)
    generate: int = 32
    prompts: int = 16
    screen: int | None = None
    verify: int = 16
    seed: int = 0
    sources: Mapping[str, Any] = field(default_factory=dict)
    _batches: dict[tuple[int, int], list[Batch]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"there is no sweep {self.kind!r}", expected=", ".join(KINDS))
        if self.controls < 0 or self.verify < 0 or self.generate < 0 or self.prompts < 1:
            raise InputError("controls, verify and generate are 0 or more, prompts 1 or more")
        if self.kind == "routing_value" and self.controls < 1:
            raise InputError(
                "routing is valued against random routing", expected="at least one seed of it: controls=1 (--controls)"
            )
        if self.screen is not None and (self.kind != "experts" or self.screen < 0):
            raise InputError("screening is for the sweep of experts", expected="screen=20, say, with kind='experts'")

    @cached_property
    def variants(self) -> list[Variant]:
        """Every intervention, checked against the model."""
        found = self._variants()
        for variant in found if self.kind != "experts" else found[:1]:  # experts differ in nothing but their ids
            check_intervention(self.model, variant.intervention, sources=self.sources)
        return found

    def _variants(self) -> list[Variant]:
        if self.kind == "dose":
            if self.intervention is None:
                raise InputError("a dose-response needs an intervention", fix="pass intervention=…")
            return plans.doses(self.intervention, self.strengths)
        return self._of_experts()

    def _of_experts(self) -> list[Variant]:
        anatomy = self.model.anatomy
        shares: dict[str, Any] = {} if self.shares is None else {"shares": self.shares}
        if self.kind == "experts":
            return plans.every_expert(anatomy, self.how or "zero", self.layers)
        if self.kind in ("drop", "keep"):
            plans.routers_of(anatomy)
            if not self.scores:
                raise InputError(f"a {self.kind} sweep needs scores of experts", fix="pass scores=…")
            more: dict[str, Any] = {"controls": self.controls, "seed": self.seed, **shares}
            if self.kind == "keep":
                return plans.keep_sets(anatomy, self.scores, **more)
            more |= {"how": self.how or "route_around", "across": self.across, "highest": self.highest}
            return plans.drop_sets(anatomy, self.scores, **more)
        if self.kind == "top_k":
            return plans.fewer_or_more(anatomy, self.numbers, self.layers)
        if self.kind == "top_p":
            return plans.by_mass(anatomy, layers=self.layers, **shares)
        return plans.random_routers(anatomy, seeds=self.controls, seed=self.seed, layers=self.layers)

    def cost(
        self, *, batch_size: int | None = None, max_length: int | None = None, pass_size: int | None = None
    ) -> SweepCost:
        """What it will take, from a few timed passes; nothing is stored."""
        plan = batch_size or BATCH_SIZE, min(max_length or MAX_LENGTH, self.model.context or MAX_LENGTH)
        batches, variants = self.batches(*plan), self.variants
        if self.screen is not None:  # the others are estimated together, in about two passes
            variants = variants[:: max(1, len(variants) // max(1, self.screen + self.verify))]
        return cost_of(
            SweepPasses(self.model, pass_size or plan[0], sources=self.sources), list(grouped(variants)), batches
        )

    def batches(self, batch_size: int, max_length: int) -> list[Batch]:
        """The corpus, cut into batches."""
        key = batch_size, max_length
        if key not in self._batches:
            made = list(BatchPlan(self.corpus, self.model.tokenizer, *key, self.model.anatomy.vocabulary))
            if not any(len(s.token_ids) > 1 for batch in made for s in batch.sequences):
                raise InputError(
                    "no token of the corpus is predicted", found="no sequence of two tokens", fix="give longer texts"
                )
            self._batches[key] = made
        return self._batches[key]

    def run(
        self,
        store: Store,
        base: Run,
        *,
        pass_size: int | None = None,
        resume: bool = False,
        progress: bool = True,
        intervals: int = 1000,
    ) -> str:
        """Run what is not stored yet, against a base run of the same corpus and model; gives the sweep's id.

        Args:
            store: open for writing.
            base: the run of the unedited model.
            pass_size: pairs of an intervention and a sequence that share one edited pass; by default as many as the base
                run's batches have sequences.
            resume: go on where the same sweep was stopped.
            progress: show how far it is, on stderr.
            intervals: bootstrap resamples of documents behind each stored interval.

        Raises:
            InputError: an edit that the model cannot take; a sweep that is stored already, where `resume` is not set.
            RunError: NaN after an edit, or a model that does not give the base run's numbers. What was stored before stays.
            KeyboardInterrupt: after Ctrl-C; what was stored before stays.
        """
        check_room(store)
        batch_size, max_length = plan_of(base)
        named = (sources_of(variant.intervention, store, self.sources) for variant in self.variants)
        sources = {name: source for found in named for name, source in found.items()}
        more: dict[str, Any] = {
            "pass_size": pass_size or batch_size,
            "draws": intervals,
            "seed": self.seed,
            "sources": sources,
        }
        # The words of these settings are part of the id by which a stopped sweep is found again.
        settings = {"kind": self.kind, "rows": more["pass_size"], "seed": self.seed, "generate": self._writes}
        if through := {name: str(getattr(a, "sae_id", name)) for name, a in self.sources.items()}:
            settings["autoencoders"] = through
        sweep = Sweep(
            self.model, self.batches(batch_size, max_length), self.variants, store, base, self._label, settings, **more
        )
        with claimed(self.model.module, f"sweep of {self._label}"):
            try:
                if self.screen is not None:
                    return ScreenedSweep(sweep, self.how or "zero", self.screen, self.verify, self.layers).run(
                        resume=resume, progress=progress
                    )
                sweep_id = sweep.run(resume=resume, progress=progress)
                if self._writes:
                    plan = BatchPlan(self.corpus, self.model.tokenizer, *plan_of(base), self.model.anatomy.vocabulary)
                    write_health(sweep, plan, tokens=self.generate, prompts=self.prompts)
                return sweep_id
            except (MoescopeError, KeyboardInterrupt):
                raise
            except Exception as failure:  # whatever a model may raise, told as its failure
                raise explained(failure) from failure

    @property
    def _writes(self) -> int:
        return self.generate if self.kind == "dose" else 0

    @property
    def _label(self) -> str:
        return {"experts": "experts", "dose": "doses", "routing_value": "random routings"}.get(
            self.kind, "sets of experts"
        )


def flat_scores(model: LiveModel, names: Sequence[str]) -> list[ExpertScores]:
    """Scores that rank nothing, for counting what a sweep would run before there are any."""
    routers = {(s.layer, s.block): np.zeros(s.n_experts or 0) for s in model.anatomy.moe}
    return [ExpertScores(name, routers) for name in names]
