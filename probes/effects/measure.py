"""`measure_effect`: what an intervention does to a model's predictions, beside matched controls, paired and stored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.choices import check_room
from moescope.probes.claim import claimed
from moescope.probes.corpus import Corpus
from moescope.probes.edits.checks import check_intervention
from moescope.probes.effects.baseline import BATCH_SIZE, MAX_LENGTH, SameNumbers, baseline, plan_of
from moescope.probes.effects.calibration import with_means
from moescope.probes.effects.controls import Controls, controls_for, loads_of, with_own_means
from moescope.probes.effects.generation_health import METRICS, Health, generation_health
from moescope.probes.effects.intervals import mean_with_interval, sequence_sums, token_rows, unit_of
from moescope.probes.effects.latent_controls import matched_alike
from moescope.probes.effects.latent_rates import latent_rates
from moescope.probes.effects.paired import paired_pass
from moescope.probes.effects.rerouting import routing_frozen
from moescope.probes.effects.sources import autoencoder_names, sources_of
from moescope.probes.effects.tally import GROUPS, TOKEN_METRICS, Tallied, Tally, check_groups
from moescope.probes.failures import explained
from moescope.probes.live_model import LiveModel
from moescope.probes.progress import RunProgress
from moescope.probes.record import record
from moescope.store.effects import EffectRow, Measured, SequenceSums, new_effect_id, write_effects
from moescope.store.run import Run
from moescope.store.store import Store

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """A measured effect, as it lies in the store.

    Attributes:
        effect_id: its identity, shared with its controls.
        base: the run it was measured against.
        run: the run under the intervention, where it was kept.
        intervention: what was measured.
        controls: what it was measured beside.
        notes: what was matched and what could not be.
    """

    effect_id: str
    base: Run
    run: Run | None
    intervention: Intervention
    controls: tuple[Intervention, ...] = ()
    notes: tuple[str, ...] = ()


def measure_effect(
    model: LiveModel,
    corpus: Any,
    intervention: Intervention,
    store: Store,
    *,
    controls: int = 5,
    base: Run | str | None = None,
    groups: Sequence[str] = GROUPS,
    generate: int = 0,
    prompts: int = 16,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    decompose: bool = False,
    keep_run: str | None = None,
    sources: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Effect:
    """Measure an intervention against the unedited model, on the same tokens, beside matched random controls.

    Every batch runs unedited, under the intervention and under each control. For each predicted token: ΔNLL (nats), the
    divergence KL(unedited ‖ edited) of the distribution over it (nats), and whether the most likely token is another. Means
    over tokens have intervals of 95 %, resampled by document. Everything is stored in one transaction at the end: nothing of
    an effect that was interrupted or went wrong.

    Args:
        model: from `moescope.load`.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        intervention: what to measure.
        store: open for writing.
        controls: how many matched random controls (`moescope.probes.effects.controls.controls_for`); 0 for none.
        base: the run of the unedited model, or its name; None to take one that fits, or to record one now.
        groups: what to group tokens by as well: `label`, `position`, `class`.
        generate: also continue texts by up to so many tokens and measure what is written; 0 for not.
        prompts: how many texts are continued.
        batch_size, max_length: of the plan; None for those of the base run.
        seed: of the controls and of the resampling.
        decompose: split the effect, and those of its controls, into content (routers replay the baseline's decisions) and
            re-routing (the rest); takes twice as long.
        keep_run: also record a full run under the intervention, with this name.
        sources: name → autoencoder, for edits that go through one; runs that edits replay are found in the store.
        progress: show how far it is, on stderr.

    Raises:
        InputError: an intervention that is empty or that the model cannot take, a baseline that does not fit, a dense model
            that is to be decomposed.
        RunError: NaN after an edit, or a baseline whose numbers the model does not give. Nothing is stored.
        KeyboardInterrupt: after Ctrl-C; nothing is stored.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.core.edit_kinds.experts import Ablate
        >>> cut = Intervention([Ablate(layer=3, experts=5)])
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = measure_effect(ms.load("demo"), ["Hello world."], cut, store, controls=2, progress=False)
        ...     found.base.name, len(found.controls)
        ('base', 2)
    """
    if not intervention.edits:
        raise InputError("the intervention is empty: it has no effect", fix="give it at least one edit (--edit)")
    if min(controls, generate, seed) < 0 or prompts < 1:
        raise InputError(
            "controls, generate and seed are 0 or more, prompts 1 or more",
            found=f"{controls}, {generate}, {seed} and {prompts}",
        )
    if not generate and all(edit.positions == "generated" for edit in intervention.edits):
        raise InputError(
            "the edits act on generated tokens alone, and none are generated",
            fix="have texts continued (--generate), or choose other positions",
        )
    check_groups(groups)
    store.check_writable()
    check_room(store)
    if keep_run is not None and any(run.name == keep_run for run in store.runs()):
        raise InputError(f"{store.path} already has a run called {keep_run!r}", fix="choose another name (--keep-run)")
    corpus = Corpus.load(corpus)
    found_sources = sources_of(intervention, store, sources)
    sizes = {"batch_size": batch_size or BATCH_SIZE, "max_length": max_length or MAX_LENGTH}
    intervention = with_means(model, corpus, intervention, **sizes)
    check_intervention(model, intervention, sources=found_sources)
    if decompose and base is not None and (base if isinstance(base, str) else base.name) in found_sources:
        raise InputError("the base run and an autoencoder share a name", fix="give one of them another name")
    if decompose:
        routing_frozen(intervention, model, "baseline")  # refused now, not after the baseline was recorded
    run = baseline(
        model, corpus, store, base=base, batch_size=batch_size, max_length=max_length, seed=seed, progress=progress
    )
    measuring = _Measuring(model, corpus, intervention, run, found_sources, seed, progress)
    with claimed(model.module, f"effect of {intervention.name or 'an intervention'}"):
        try:
            measured = measuring.run(controls, groups, decompose=decompose, generate=generate, prompts=prompts)
        except (MoescopeError, KeyboardInterrupt):
            raise
        except Exception as failure:  # whatever a model may raise, told as its failure
            raise explained(failure) from failure
    kept = None if keep_run is None else _kept(measuring, store, keep_run)
    kept_id = None if kept is None else kept.run_id
    write_effects(store, [replace(measured[0], run_id=kept_id), *measured[1:]])
    found = measuring.controls
    return Effect(measured[0].effect_id, run, kept, intervention, found.interventions, found.notes)


@dataclass
class _Measuring:
    """One measurement while it runs."""

    model: LiveModel
    corpus: Corpus
    intervention: Intervention
    base: Run
    sources: Mapping[str, Any]
    seed: int
    progress: bool
    controls: Controls = field(default_factory=lambda: Controls((), ()))

    def __post_init__(self) -> None:
        self.plan = BatchPlan(self.corpus, self.model.tokenizer, *plan_of(self.base), self.model.anatomy.vocabulary)

    def run(
        self, controls: int, groups: Sequence[str], *, decompose: bool, generate: int, prompts: int
    ) -> list[Measured]:
        """Everything that will be stored."""
        loads = loads_of(self.base)
        through = {name: self.sources[name] for name in matched_alike(self.intervention.edits)} if controls else {}
        rates = latent_rates(self.model, self.plan, self.base.store, through)
        drawn = controls_for(
            self.intervention,
            self.model,
            loads=loads,
            draws=controls,
            seed=self.seed,
            sources=self.sources,
            rates=rates,
        )
        self.controls = with_own_means(drawn, self.model, self.corpus, *plan_of(self.base))
        compared = [self.intervention, *self.controls.interventions]
        frozen = [routing_frozen(variant, self.model, self.base.name) for variant in compared] if decompose else []
        tallied = self._tally([*compared, *frozen], groups)
        variants = [tallied.of(number) for number in range(len(compared))]
        contents = [tallied.of(len(compared) + number) for number in range(len(frozen))]
        variants[0] = {"base_nll": tallied.base_nll, **variants[0]}
        for variant, content in zip(variants, contents, strict=False):  # none where the effect is not split
            variant.update(parts_of(variant, content))
        rows = token_rows(tallied, variants, by_label="label" in groups, seed=self.seed)
        sums = [sequence_sums(tallied, variant) for variant in variants]
        if generate:
            health = generation_health(
                self.model, self.plan, compared, tokens=generate, prompts=prompts, sources=self.sources
            )
            for number in range(len(compared)):
                more_rows, more_sums = health_rows(health, number, seed=self.seed)
                rows[number] += more_rows
                sums[number] += more_sums
        effect_id = new_effect_id()
        return [
            Measured(
                effect_id,
                self.base.run_id,
                variant.to_json(),
                "target" if number == 0 else "control",
                None if number == 0 else number - 1,
                rows[number],
                sums[number],
            )
            for number, variant in enumerate(compared)
        ]

    def _tally(self, variants: Sequence[Intervention], groups: Sequence[str]) -> Tallied:
        tally = Tally(groups=groups, tokenizer=self.model.tokenizer)
        same, started, tokens = SameNumbers(self.base, self.model), time.perf_counter(), 0
        sources = {**self.sources, self.base.name: self.base}
        what = self.intervention.name or "the effect"
        with RunProgress(f"measuring {what}", self.corpus.facts().characters, shown=self.progress) as bar:
            for paired in paired_pass(self.model, self._batches(), variants, sources=sources):
                same.check(paired)
                tally.add(paired)
                tokens += paired.batch.tokens * (1 + len(variants))
                bar.advance_to(paired.batch.characters, tokens, time.perf_counter() - started)
        return tally.done()

    def _batches(self) -> Iterator[Batch]:
        return iter(self.plan)


def parts_of(whole: Mapping[str, Sums], content: Mapping[str, Sums]) -> dict[str, Sums]:
    """The part of each metric that is left with the baseline's routing, and the rest, which re-routing adds."""
    found = {f"content_{metric}": content[metric] for metric in TOKEN_METRICS}
    return found | {f"rerouting_{metric}": whole[metric] - content[metric] for metric in TOKEN_METRICS}


def health_rows(health: Health, variant: int, *, seed: int = 0) -> tuple[list[EffectRow], list[SequenceSums]]:
    """Rows of what one variant writes, less what the unedited model writes; for the first also the unedited model's own.

    A prompt counts for a metric where both continuations are long enough for it.
    """
    rows: list[EffectRow] = []
    sums: list[SequenceSums] = []
    sequence = np.array([prompt.sequence_id for prompt in health.prompts])
    document = np.array([prompt.document_id for prompt in health.prompts])
    for number, metric in enumerate(METRICS):
        base, values = health.values[0, number], health.values[variant + 1, number]
        there = ~np.isnan(base) & ~np.isnan(values)
        if not there.any():
            continue
        named = {f"delta_{metric}": values - base} | ({f"base_{metric}": base} if variant == 0 else {})
        for name, column in named.items():
            total, n = np.where(there, column, 0.0), there.astype(np.int64)
            ((value, low, high),) = mean_with_interval(total[:, None], n, document, seed=seed)
            rows.append(EffectRow("all", None, name, value, low, high, int(n.sum()), unit_of(name)))
            sums.append(SequenceSums(name, sequence, total, n))
    return rows, sums


def _kept(measuring: _Measuring, store: Store, name: str) -> Run:
    batch_size, max_length = plan_of(measuring.base)
    return record(
        measuring.model,
        measuring.corpus,
        store,
        name=name,
        intervention=measuring.intervention,
        batch_size=batch_size,
        max_length=max_length,
        seed=measuring.seed,
        sources={name: measuring.sources[name] for name in autoencoder_names([measuring.intervention])},
        progress=measuring.progress,
    )
