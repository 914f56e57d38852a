"""Dose-response of steering: what it reaches and what it costs at growing strength, beside matched controls; stored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.core.intervention import Intervention
from moescope.core.sites import Site
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.choices import check_room
from moescope.probes.claim import claimed
from moescope.probes.corpus import Corpus
from moescope.probes.edits.checks import check_intervention
from moescope.probes.effects.baseline import BATCH_SIZE, MAX_LENGTH, SameNumbers, baseline, plan_of
from moescope.probes.effects.calibration import with_means
from moescope.probes.effects.controls import Controls, controls_for, loads_of
from moescope.probes.effects.generation_health import generation_health
from moescope.probes.effects.intervals import mean_with_interval
from moescope.probes.effects.latent_controls import matched_alike
from moescope.probes.effects.latent_rates import latent_rates
from moescope.probes.effects.measure import health_rows
from moescope.probes.effects.paired import PairedBatch
from moescope.probes.effects.sources import sources_of
from moescope.probes.effects.token_numbers import compared
from moescope.probes.effects.variants import Under, alternately
from moescope.probes.failures import explained
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.progress import RunProgress
from moescope.probes.sweeps.stored import stored_effects, sweep_id_of
from moescope.probes.taps import tapped
from moescope.sae.steering.targets import Seen, Target
from moescope.store.effects import EffectRow, Kind, Measured, SequenceSums, new_effect_id, write_effects

if TYPE_CHECKING:
    from moescope.store.run import Run
    from moescope.store.store import Store

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
_UNITS = {"delta_nll": "nats", "kl": "nats", "flips": "share", "base_nll": "nats"}


@dataclass(frozen=True)
class Dose:
    """A measured dose-response.

    Attributes:
        sweep_id: under which its effects lie in the store.
        base: the run they are measured against.
        controls: how many matched controls there are.
        notes: what was matched and what could not be.
    """

    sweep_id: str
    base: Run
    controls: int
    notes: tuple[str, ...] = ()


def dose_response(
    model: LiveModel,
    intervention: Intervention,
    corpus: Any,
    store: Store,
    *,
    target: Target,
    strengths: Sequence[float] = STRENGTHS,
    controls: int = 5,
    generate: int = 0,
    prompts: int = 16,
    base: Run | str | None = None,
    sources: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Dose:
    """Measure what steering does to its target and to everything else, at several strengths, beside matched controls.

    For every predicted token: the target's number less the unedited model's, ΔNLL (nats), KL(unedited ‖ edited) (nats) and
    whether the most likely token is another. Controls are the same edit of other latents, active about as often and writing
    vectors of the same length (or, for vectors, of random directions of the same norm), at the same strengths. With
    `generate`, greedy continuations are measured too. All is stored in one transaction, under one sweep; the analysis
    `steering_dose` answers, with the base run. The same request is answered from the store where it is there already.

    Args:
        model: from `moescope.load`.
        intervention: what steers, at strength 1.
        corpus: text on which it is measured; labels let the answer keep the target's own texts apart from others.
        store: open for writing.
        target: what should grow: `moescope.sae.steering.targets`.
        strengths: by which the edits' own are multiplied.
        controls: how many matched controls at each strength.
        generate: tokens written after each of so many `prompts` at each strength; 0 for none.
        prompts: how many texts are continued.
        base: the run of the unedited model, or its name; None to take one that fits, or to record one now.
        sources: name → autoencoder, for edits that go through one.
        batch_size, max_length: of the plan; None for those of the base run, else 8 and 512.
        seed: of the controls and intervals.
        progress: show how far it is, on stderr.

    Raises:
        InputError: an empty intervention, no strengths, edits the model cannot take, or a base run that does not fit.
        RunError: predictions or target that are no numbers; nothing is stored.
    """
    wanted = sorted(dict.fromkeys(float(s) for s in strengths))
    if not intervention.edits or not wanted or min(controls, generate, seed) < 0 or prompts < 1:
        raise InputError(
            "a dose-response needs edits, strengths, and counts from 0 on",
            found=f"{len(intervention.edits)} edits, {len(wanted)} strengths, controls={controls}, generate={generate}",
        )
    check_room(store)
    corpus = Corpus.load(corpus)
    known = sources_of(intervention, store, sources)
    sizes = {"batch_size": batch_size or BATCH_SIZE, "max_length": max_length or MAX_LENGTH}
    intervention = with_means(model, corpus, intervention, **sizes)
    check_intervention(model, intervention, sources=known)
    for strength in wanted:
        check_intervention(model, intervention.with_strength(strength), sources=known)
    run = baseline(
        model, corpus, store, base=base, batch_size=batch_size, max_length=max_length, seed=seed, progress=progress
    )
    dosing = _Dosing(model, corpus, intervention, target, run, known, wanted, seed, progress)
    with claimed(model.module, f"dose-response of {intervention.name or 'an intervention'}"):
        try:
            return dosing.run(store, controls=controls, generate=generate, prompts=prompts)
        except (MoescopeError, KeyboardInterrupt):
            raise
        except Exception as failure:  # whatever a model may raise, told as its failure
            raise explained(failure) from failure


@dataclass
class _Sums:
    """[variant, metric, sequence] sums over predicted tokens, batch by batch."""

    sequence: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    label: list[str | None] = field(default_factory=list)
    n: list[NDArray[np.int64]] = field(default_factory=list)
    base: list[NDArray[np.float64]] = field(default_factory=list)  # [2, sequence] NLL and target
    moved: list[NDArray[np.float64]] = field(default_factory=list)


@dataclass
class _Dosing:
    """One dose-response while it is measured."""

    model: LiveModel
    corpus: Corpus
    intervention: Intervention
    target: Target
    base: Run
    sources: Mapping[str, Any]
    strengths: Sequence[float]
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        self.plan = BatchPlan(self.corpus, self.model.tokenizer, *plan_of(self.base), self.model.anatomy.vocabulary)
        self.metrics = (f"delta_{self.target.metric}", "delta_nll", "kl", "flips")
        self.units = {name: self.target.unit if "target" in name else _UNITS[name] for name in self.metrics}

    def run(self, store: Store, *, controls: int, generate: int, prompts: int) -> Dose:
        """Everything measured and stored."""
        drawn = self._controls(store, controls)
        called = f"{self.intervention.name or 'steering'} → {self.target.name}"
        effects = [
            [
                self.intervention.with_strength(s).named(f"{called} × {s:g}"),
                *(
                    c.with_strength(s).named(f"{called} × {s:g} (control {i})")
                    for i, c in enumerate(drawn.interventions)
                ),
            ]
            for s in self.strengths
        ]
        variants = [variant for effect in effects for variant in effect]
        settings = {"kind": "steering", "target": self.target.name, "seed": self.seed, "generate": generate}
        settings |= {
            "prompts": prompts,
            "autoencoders": {n: str(getattr(a, "sae_id", n)) for n, a in self.sources.items()},
        }
        sweep_id = sweep_id_of(self.base, variants, settings)
        found = Dose(sweep_id, self.base, len(drawn.interventions), drawn.notes)
        if stored_effects(store, sweep_id):
            return found
        measured = self._measured(self._passes(variants), effects, sweep_id)
        if generate:
            self._write(measured, effects, generate, prompts)
        write_effects(store, measured)
        return found

    def _controls(self, store: Store, draws: int) -> Controls:
        names = matched_alike(self.intervention.edits) if draws else []
        rates = latent_rates(self.model, self.plan, store, {name: self.sources[name] for name in names})
        return controls_for(
            self.intervention,
            self.model,
            loads=loads_of(self.base),
            draws=draws,
            seed=self.seed,
            sources=self.sources,
            rates=rates,
        )

    def _passes(self, variants: Sequence[Intervention]) -> _Sums:
        sums, same, tokens = _Sums(), SameNumbers(self.base, self.model), 0
        started = time.perf_counter()
        seen: dict[Site, torch.Tensor] = {}

        def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
            seen[site] = next(iter(tensors.values())).detach().clone()

        taps: AbstractContextManager[Any] = nullcontext()
        if self.target.sites:
            taps = tapped(self.model.module, self.model.anatomy, list(self.target.sites), receive)
        with (
            torch.no_grad(),
            alternately(self.model, variants, sources=self.sources) as under,
            taps,
            RunProgress("measuring steering", self.corpus.facts().characters, shown=self.progress) as bar,
        ):
            for batch in self.plan:
                same.check(self._batch(batch, under, variants, seen, sums))
                tokens += batch.tokens * (1 + len(variants))
                bar.advance_to(batch.characters, tokens, time.perf_counter() - started)
        return sums

    def _batch(
        self, batch: Batch, under: Under, variants: Sequence[Intervention], seen: Seen, sums: _Sums
    ) -> PairedBatch:
        """Sums of one batch, and its plain side, which is held against the base run."""
        on_device, ids_of = to_device(batch, self.model), [s.sequence_id for s in batch.sequences]
        spans = batch.spans() if self.model.device.type == "cpu" else None
        ids, mask = batch.padded(self.model.pad_id)
        predicted = mask & (np.arange(mask.shape[1]) > 0)
        with under(None, ids_of):
            plain, before = self._pass(on_device, seen)
        numbers = compared(plain, plain, on_device.ids, spans=spans)
        base_nll = np.where(predicted, numbers.base_nll.cpu().numpy(), 0.0)
        moved = np.zeros((len(variants), len(self.metrics), len(ids_of)))
        for number, variant in enumerate(variants):
            with under(number, ids_of):
                edited, after = self._pass(on_device, seen)
            numbers = compared(plain, edited, on_device.ids, spans=spans)
            columns = (after - before).cpu(), numbers.delta_nll.cpu(), numbers.kl.cpu(), numbers.flips.cpu()
            for place, values in enumerate(columns):
                moved[number, place] = np.where(predicted, values.double().numpy(), 0.0).sum(1)
            if not np.isfinite(moved[number]).all():
                raise RunError(
                    f"after the edit the model's predictions are no numbers ({variant.name})",
                    found=f"NaN or infinity in batch {batch.number}",
                    fix="take smaller strengths; nothing was stored",
                )
            del edited
        sums.sequence += ids_of
        sums.document += [s.document_id for s in batch.sequences]
        sums.label += [s.document.label for s in batch.sequences]
        sums.n.append(predicted.sum(1))
        target = np.where(predicted, before.double().cpu().numpy(), 0.0).sum(1)
        sums.base.append(np.stack([base_nll.sum(1), target]))
        sums.moved.append(moved)
        nothing = np.zeros((0, *ids.shape))
        return PairedBatch(batch, ids, predicted, base_nll, nothing, nothing, nothing)

    def _pass(self, batch: DeviceBatch, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(self.model, batch)
        at_sites = {site: vectors.reshape(*batch.ids.shape, -1) for site, vectors in seen.items()}
        return logits, self.target.values(logits, at_sites)

    def _measured(self, sums: _Sums, effects: Sequence[Sequence[Intervention]], sweep_id: str) -> list[Measured]:
        """Rows and sums of every variant, by effect."""
        n, base, moved = np.concatenate(sums.n), np.concatenate(sums.base, 1), np.concatenate(sums.moved, 2)
        sequence, document = np.array(sums.sequence), np.array(sums.document)
        if not n.sum():
            raise InputError("no token of the corpus is predicted", fix="give longer texts")
        plain = {"base_nll": ("nats", base[0]), f"base_{self.target.metric}": (self.target.unit, base[1])}
        flat = moved.reshape(-1, len(n))
        intervals = iter(mean_with_interval(np.concatenate([base, flat]).T, n, document, seed=self.seed))
        tokens = int(n.sum())
        base_rows = [EffectRow("all", None, name, *next(intervals), tokens, unit) for name, (unit, _) in plain.items()]
        found, number = [], 0
        for effect in effects:
            effect_id = new_effect_id()
            for draw, variant in enumerate(effect):
                rows = [EffectRow("all", None, m, *next(intervals), tokens, self.units[m]) for m in self.metrics]
                parts = [SequenceSums(m, sequence, moved[number, i], n) for i, m in enumerate(self.metrics)]
                if draw == 0:
                    rows = [*base_rows, *rows]
                    parts += [SequenceSums(name, sequence, values, n) for name, (_, values) in plain.items()]
                kind: Kind = "target" if draw == 0 else "control"
                which = draw - 1 if draw else None
                found.append(
                    Measured(
                        effect_id, self.base.run_id, variant.to_json(), kind, which, rows, parts, sweep_id=sweep_id
                    )
                )
                number += 1
        return found

    def _write(
        self, measured: list[Measured], effects: Sequence[Sequence[Intervention]], generate: int, prompts: int
    ) -> None:
        """Add what is written at each strength to the effects themselves; controls are not asked to write."""
        steered = [effect[0] for effect in effects]
        health = generation_health(
            self.model, self.plan, steered, tokens=generate, prompts=prompts, sources=self.sources
        )
        targets = [number for number, entry in enumerate(measured) if entry.kind == "target"]
        for variant, number in enumerate(targets):
            rows, parts = health_rows(health, variant, seed=self.seed)
            entry = measured[number]
            measured[number] = replace(entry, rows=[*entry.rows, *rows], sequences=[*entry.sequences, *parts])
