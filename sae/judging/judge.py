"""`judge`: an autoencoder measured by the field's measures, beside controls, on documents it was not trained on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError, MoescopeError
from moescope.probes.claim import claimed
from moescope.probes.failures import explained
from moescope.probes.live_model import LiveModel
from moescope.probes.progress import RunProgress
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.belonging import check_belongs
from moescope.sae.data.trained_with import TrainedWith
from moescope.sae.judging.ablation import ablated, ablation_rows, can_ablate
from moescope.sae.judging.absorption import absorption_rows
from moescope.sae.judging.asked import check_asked, check_run, run_to_judge_on
from moescope.sae.judging.controls import Own, Reconstruction, controls_for, principal_components, random_rows
from moescope.sae.judging.latents import decoder_rows, firing, latent_rows
from moescope.sae.judging.probing import Code, Question, probe_rows
from moescope.sae.judging.reconstruction import reconstruction_rows
from moescope.sae.judging.rows import METRICS, ByDocument, MeasureRow, finite, groups_of
from moescope.sae.judging.run_tokens import (
    RunTokens,
    Split,
    batches_of,
    first_letters,
    run_tokens,
    some_sequences,
    split,
)
from moescope.sae.judging.splicing import can_splice, spliced, splicing_rows
from moescope.sae.judging.vectors import Vectors, live_vectors, recorded_vectors
from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store
from moescope.store.vectors import vector_sites

LEAST = 100  # vectors on each side
_FEW_DOCUMENTS = 10
_ABLATED_BEFORE = 128  # positions at which latents are taken out: what comes before a token is run with it


@dataclass(frozen=True)
class JudgeOutcome:
    """What judging an autoencoder found, as it lies in `sae_measures`.

    Attributes:
        sae_id, name: of the autoencoder.
        run: whose tokens it was judged on.
        rows: every measure, of the autoencoder and of its controls.
        notes: what was left out, and why.
    """

    sae_id: str
    name: str
    run: Run
    rows: tuple[MeasureRow, ...] = field(repr=False)
    notes: tuple[str, ...]

    def value(self, metric: str, condition: str = "sae") -> float:
        """One measure over all tokens; raises `KeyError` where it was not taken."""
        for row in self.rows:
            if (row.metric, row.condition, row.group_kind) == (metric, condition, "all"):
                return row.value
        raise KeyError(f"{metric} of {condition}")


def judge(
    autoencoder: Autoencoder,
    model: LiveModel | None,
    store: Store,
    *,
    run: Run | str | None = None,
    corpus: Any = None,
    tokens: int = 20_000,
    live_tokens: int = 4_096,
    ablations: int = 32,
    controls: int = 5,
    held_out: bool = True,
    skip_first: int | None = None,
    force: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> JudgeOutcome:
    """Measure an autoencoder beside controls, and store what was found over any earlier judgement on the same run.

    From vectors: FVU, normalised error, cosine, ratio of norms; L0, dead and dense latents; the decoder's nearest rows; the
    best single latent as a probe of labels and token classes; absorption and splitting of first letters. From the live model:
    ΔCE, KL, flips and loss recovered with the reconstruction in the vectors' place, and how sparse single latents' effects on
    the logits are. Controls: PCA of as many components as the mean L0 (one subspace, and the largest of all components for
    each vector), a random decoder, shuffled decoder rows, the mean, and zero. (Gao et al. 2024, arXiv 2406.04093; Chanin et
    al. 2024, arXiv 2409.14507.)

    Args:
        autoencoder: in the store.
        model: live; None leaves out what needs one, and then the run must have kept vectors at the site.
        store: open for writing.
        run: whose tokens to judge on, or its name; None for that of `corpus`, else the run it was trained on.
        corpus: judge on this instead: a run of it that is in the store, or one recorded now.
        tokens: vectors judged at most, and as many again to fit controls and probes on.
        live_tokens: tokens that the model runs over with each reconstruction, at most.
        ablations: tokens at which up to four latents are taken out one at a time; 0 for none.
        controls: draws of the random controls; the live model takes the first of each.
        held_out: judge on documents that training leaves out, and fit controls on the others. False judges and fits on all of
            them, which favours what was fitted.
        skip_first: so many first tokens of each sequence neither count nor have their vectors replaced; None for what training
            left out, else 1: first tokens carry massive activations, which would outweigh all others.
        force: judge it on another model than it was trained for.
        seed: of samples, controls and resampling.
        progress: show how far the live passes are, on stderr.

    Raises:
        InputError: an autoencoder of another model or width, or not in the store; too few tokens or documents; vectors that
            are no numbers; nothing to judge on. Nothing is stored.
        RunError: the model failed on the way. Nothing is stored.

    Example:
        >>> import moescope as ms
        >>> from moescope.sae.judging.judge import judge
        >>> from moescope.sae.loading import load_autoencoder
        >>> with ms.Store("runs.duckdb") as store:  # doctest: +SKIP
        ...     judge(load_autoencoder(store, "mine"), ms.load("demo"), store).value("fvu")
    """
    check_asked(autoencoder, store, tokens=tokens, live_tokens=live_tokens, ablations=ablations, controls=controls)
    if model is not None:
        check_belongs(autoencoder, model, force=force)
    chosen = run_to_judge_on(autoencoder, model, store, run, corpus, seed=seed, progress=progress)
    check_run(autoencoder, model, chosen, force=force)
    judging = _Judging(
        autoencoder, model, chosen, tokens, live_tokens, ablations, controls, held_out, skip_first, seed, progress
    )
    rows = judging.rows()
    stored = [row.stored(autoencoder.sae_id, chosen.run_id) for row in rows]
    identity = {"sae_id": autoencoder.sae_id, "run_id": chosen.run_id}
    earlier = [("sae_measures", {**identity, "metric": metric}) for metric in METRICS]
    write_rows(store, {"sae_measures": stored}, over=earlier)
    return JudgeOutcome(autoencoder.sae_id, autoencoder.name, chosen, tuple(rows), tuple(judging.notes))


@dataclass
class _Judging:
    """One judgement while it runs."""

    autoencoder: Autoencoder
    model: LiveModel | None
    run: Run
    limit: int
    live_limit: int
    ablations: int
    draws: int
    held_out: bool
    skip_first: int | None
    seed: int
    progress: bool
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[MeasureRow]:
        """Every measure."""
        trained = self.trained = TrainedWith.of(self.autoencoder.row)
        self.tokens: RunTokens = run_tokens(self.run)
        first = trained.skip_first if self.skip_first is None else self.skip_first
        self.split: Split = split(
            self.tokens,
            apart=self.held_out,
            first=first,
            share=trained.held_out_share or 0.1,
            seed=trained.split_seed,
        )
        self._note_split()
        judged, fitted = (
            self._vectors(side, verify=side is self.split.judged) for side in (self.split.judged, self.split.fitted)
        )
        judged, fitted = self._of_usual_norm(judged, fitted, trained.max_norm_ratio)
        if min(len(judged), len(fitted)) < LEAST:
            raise InputError(
                f"there are too few vectors at {self.autoencoder.site} to judge {self.autoencoder.name} on",
                expected=f"{LEAST} or more to judge on and to fit controls on",
                found=f"{len(judged):,} and {len(fitted):,}",
                fix="give more texts, record a larger share of the tokens, or judge on all documents (held_out=False, --documents all)",
            )
        rows, ways = self._from_vectors(judged, fitted)
        if self.model is None:
            self.notes.append("No model was given: ΔCE, KL, flips, loss recovered and ablation sparsity are left out.")
        elif not can_splice(self.autoencoder):
            self.notes.append(
                f"Vectors at {self.autoencoder.site} cannot be replaced while the model runs: what needs that is left out."
            )
        else:
            rows += self._live(self.model, ways)
        return finite(rows)

    def _from_vectors(self, judged: Vectors, fitted: Vectors) -> tuple[list[MeasureRow], list[Reconstruction]]:
        own = self.autoencoder
        by_document = ByDocument(self.tokens.document[judged.place], seed=self.seed)
        found = firing(own, judged.x)
        mean_l0 = float(found.l0.mean())
        ways = [Own(own), *controls_for(own, fitted.y, k=round(mean_l0), draws=self.draws, seed=self.seed)]
        mean, components = principal_components(fitted.x)
        groups = groups_of(self.tokens.label[judged.place], self.tokens.klass[judged.place], LEAST)
        rows = reconstruction_rows(ways, judged, fitted.y.mean(0), by_document, groups, width=own.d_sae)
        rows += latent_rows(found, by_document, own.row.get("summary") or {})
        rows += decoder_rows(own, seed=self.seed)
        width = max(own.d_sae, own.d_in)
        random = random_rows(own.d_sae, own.d_in, torch.Generator().manual_seed(self.seed))
        codes: dict[str, Code] = {
            "sae": lambda x: own.encode(x.to(own.device)).cpu(),
            "random_direction": lambda x: (x - mean) @ random.T,
            "pca": lambda x: (x - mean) @ components.T,
        }
        document = self.tokens.document[fitted.place]
        questions = self._questions(judged, fitted)
        rows += probe_rows(codes, width, fitted.x, judged.x, questions, document, by_document, seed=self.seed)
        letters = self._letters(fitted), self._letters(judged)
        told = {name: codes[name] for name in ("sae", "pca")}
        if own.target_site is not None:
            self.notes.append(
                "Absorption and splitting are left out: a transcoder writes in another space than it reads."
            )
            return rows, ways
        absorbed = absorption_rows(own, told, fitted.x, judged.x, letters, by_document, seed=self.seed)
        if not absorbed:
            self.notes.append(
                "Absorption and splitting are left out: no first letter is frequent enough and told by a probe on whole vectors."
            )
        return rows + absorbed, ways

    def _live(self, model: LiveModel, ways: list[Reconstruction]) -> list[MeasureRow]:
        once = list({way.name: way for way in reversed(ways)}.values())[::-1]
        sequences = some_sequences(self.tokens, self.split.judged, limit=self.live_limit, seed=self.seed)
        total = int(np.isin(self.tokens.sequence, sequences).sum())
        with _model_runs(model, self.autoencoder.name):
            started, done = time.perf_counter(), [0]
            with RunProgress(f"judging {self.autoencoder.name}", total, shown=self.progress) as bar:

                def advance(more: int) -> None:
                    done[0] += more
                    bar.advance_to(done[0], done[0] * (1 + len(once)), time.perf_counter() - started)

                batches = batches_of(self.run, self.tokens, sequences)
                found = spliced(model, self.autoencoder, once, batches, first=self.split.first, advance=advance)
            rows = splicing_rows(found, seed=self.seed)
            self._note_few(len(np.unique(found.document)), "The live model ran over")
            if self.ablations and can_ablate(self.autoencoder):
                rows += self._ablations(model)
        if not any(row.metric.startswith("loss_recovered") for row in rows):
            self.notes.append("Replacing the vectors by zero or their mean costs no loss: there is none to recover.")
        return rows

    def _ablations(self, model: LiveModel) -> list[MeasureRow]:
        early = self.split.judged & (self.tokens.position < max(_ABLATED_BEFORE, self.split.first + 1))
        sequences = some_sequences(self.tokens, early, limit=self.ablations * _ABLATED_BEFORE, seed=self.seed)
        within = early & np.isin(self.tokens.sequence, sequences)
        possible = np.flatnonzero(within)
        count = min(self.ablations, len(possible))
        chosen = np.zeros(len(early), bool)
        chosen[np.random.default_rng(self.seed).choice(possible, count, replace=False)] = True
        there = np.unique(self.tokens.sequence[chosen])
        vectors = live_vectors(model, self.autoencoder, batches_of(self.run, self.tokens, there), self.tokens, chosen)
        found = ablated(model, self.autoencoder, vectors, self.tokens, seed=self.seed)
        return ablation_rows(found, seed=self.seed)

    def _vectors(self, eligible: NDArray[np.bool_], *, verify: bool) -> Vectors:
        """A sample of the vectors of some tokens: recorded ones where there are any, else read now."""
        own = self.autoencoder
        if {str(site) for site in (own.site, own.target_site) if site is not None} <= set(vector_sites(self.run)):
            return recorded_vectors(
                self.run, own, self.tokens, eligible, limit=self.limit, seed=self.seed, verify=verify
            )
        if self.model is None:
            raise InputError(
                f"run {self.run.name!r} kept no vectors at {self.autoencoder.site}, and there is no model to read them from",
                fix="pass the model, or record the site",
            )
        sequences = some_sequences(self.tokens, eligible, limit=self.limit, seed=self.seed)
        with _model_runs(self.model, self.autoencoder.name):
            batches = batches_of(self.run, self.tokens, sequences)
            return live_vectors(self.model, self.autoencoder, batches, self.tokens, eligible)

    def _of_usual_norm(self, judged: Vectors, fitted: Vectors, most: float | None) -> tuple[Vectors, Vectors]:
        """Vectors without those of norms that training left out."""
        if most is None:
            return judged, fitted
        limit = float(most) * float(fitted.x.norm(dim=-1).median())
        near = [(side.x.norm(dim=-1) <= limit).numpy() for side in (judged, fitted)]
        if left := int((~near[0]).sum()):
            self.notes.append(
                f"{left:,} of {len(judged):,} judged vectors have norms over {most:g} times the median, which training left out: "
                "they do not count; in the live model they are replaced like the others."
            )
        return judged.only(near[0]), fitted.only(near[1])

    def _questions(self, judged: Vectors, fitted: Vectors) -> list[Question]:
        found: list[Question] = []
        for kind, values in (("label", self.tokens.label), ("class", self.tokens.klass)):
            before, now = values[fitted.place], values[judged.place]
            names = sorted({str(v) for v in now if v is not None})
            found += [Question(kind, name, before == name, now == name) for name in names]
        return found

    def _letters(self, vectors: Vectors) -> NDArray[np.object_]:
        known = first_letters(self.run)
        return np.array([known.get(int(i)) for i in self.tokens.token_id[vectors.place]], dtype=object)

    def _note_split(self) -> None:
        judged, fitted = (len(np.unique(self.tokens.document[side])) for side in (self.split.judged, self.split.fitted))
        seen = (
            "of a run that it was not trained on"
            if not self.trained.saw(self.run)
            else "that training left out"
            if self.trained.held_out_share
            else "that training saw too"
        )
        where = (
            f"Judged on {judged:,} documents {seen}, controls and probes fitted on {fitted:,} others"
            if self.split.held_out
            else f"Judged and fitted on the same {judged:,} documents, which favours what was fitted"
        )
        skipped = f"; tokens before position {self.split.first} of their sequence left out" if self.split.first else ""
        self.notes.append(f"{where}{skipped}.")
        self._note_few(judged, "Judged on")

    def _note_few(self, documents: int, what: str) -> None:
        if documents < _FEW_DOCUMENTS:
            self.notes.append(
                f"{what} {documents:,} documents: intervals over so few are narrower than they should be."
            )


@contextmanager
def _model_runs(model: LiveModel, name: str) -> Iterator[None]:
    """Hold the model, and tell of its failures as such."""
    with claimed(model.module, f"judgement of {name}"):
        try:
            yield
        except (MoescopeError, KeyboardInterrupt):
            raise
        except Exception as failure:  # whatever a model may raise, told as its failure
            raise explained(failure) from failure
