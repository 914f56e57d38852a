"""`ablate_writers`: a latent's top writers taken out, beside experts that were chosen as often, and what is left of the latent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.edit_kinds.experts import Ablate
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.claim import claimed
from moescope.probes.effects.controls import controls_for
from moescope.probes.effects.variants import alternately
from moescope.probes.live_model import LiveModel
from moescope.probes.progress import RunProgress
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.live import site_vectors
from moescope.sae.data.run_batches import Documents
from moescope.sae.data.trained_with import TrainedWith
from moescope.sae.experts.intervals import with_interval
from moescope.sae.experts.passes import Sums, Walk, whole_sums
from moescope.sae.experts.run_text import run_text
from moescope.sae.experts.subject import Router, routers_around, subject_of
from moescope.sae.experts.writer_rows import excess
from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store

Floats = NDArray[np.float64]
METRICS = ("ablation_drop", "ablation_drop_control", "ablation_drop_excess", "ablated_writer")
NULL_KIND = "matched experts"
_SHARE = "share of its mean activation"
_GROUPS = 2000


@dataclass(frozen=True)
class Ablated:
    """What is left of one latent without its writers.

    Attributes:
        feature, layer, block: which latent, and where the experts are.
        experts: its top writers, the strongest first.
        controls: the experts taken out instead, one tuple a draw.
        drop: by which share its mean activation falls on the tokens on which it was active; with interval.
        control_drops: the same for each control.
        more: drop less the mean of the controls'; with interval.
        n: those tokens.
        notes: what was matched and what could not be.
    """

    feature: int
    layer: int
    block: str
    experts: tuple[int, ...]
    controls: tuple[tuple[int, ...], ...]
    drop: tuple[float, float, float]
    control_drops: tuple[float, ...]
    more: tuple[float, float, float]
    n: int
    notes: tuple[str, ...]


def ablate_writers(
    autoencoder: Autoencoder,
    model: LiveModel,
    store: Store,
    *,
    run: Run,
    features: Sequence[int] | None = None,
    top: int = 10,
    writers: int = 3,
    controls: int = 5,
    layer: int | None = None,
    how: Literal["zero", "route_around"] = "zero",
    documents: Documents = "held_out",
    tokens: int | None = 10_000,
    least_active: int = 20,
    skip_first: int | None = None,
    draws: int = 1000,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> list[Ablated]:
    """Take out the experts that write a latent most, and hold its activation against what other experts' absence leaves.

    A latent's writers are the routed experts of largest `writes_excess` (`feature_experts`). They are taken out together: by
    `zero` their slots stay and give nothing, so that what is lost is what they wrote; by `route_around` the router takes its
    next choice instead. Its activation is read again on the tokens on which it was active: drop = 1 − Σ after ÷ Σ before.
    Controls take out as many other experts of the same router, drawn among those chosen about as often on those same tokens
    (`moescope.probes.effects.controls.controls_for`). Rows of `feature_experts`: `ablation_drop`, without an expert, its null
    the mean of the controls; each control's (`ablation_drop_control`); the difference (`ablation_drop_excess`); and which
    experts were taken out (`ablated_writer`, its value their rank).

    Writers are ranked and judged on the same tokens; for hundreds of tokens and a few experts that flatters them little.

    Args:
        autoencoder: of a block's output or of the stream.
        model: the model it belongs to.
        store: open for writing.
        run: whose sequences are run again.
        features: latents; None for the `top` ones whose first writer stands out most from their other experts.
        writers: experts taken out for each.
        controls: draws of matched experts.
        layer: of the writers; None for the nearest before the autoencoder's site.
        how: in which way.
        documents, tokens, least_active, skip_first: as in `feature_experts`; by default about 10,000 tokens, since every latent takes
            1 + `controls` passes.
        draws, seed: of the resampling of documents, and of the controls.
        batch_size: sequences a forward pass.
        progress: show how far it is, on stderr.

    Raises:
        InputError: as `feature_experts`; no experts left to compare with.

    Example:
        >>> import moescope as ms
        >>> from moescope.sae.loading import load_autoencoder
        >>> def cut(store: ms.Store) -> list[Ablated]:
        ...     return ablate_writers(load_autoencoder(store, "mine"), ms.load("demo"), store, run=store.run("base"), top=3)
    """
    if min(top, writers, controls, draws, batch_size, least_active) < 1:
        raise InputError("top, writers, controls, draws, batch_size and least_active are 1 or more")
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    subject = subject_of(autoencoder, model, features)
    if subject.by_slot:
        raise InputError(
            f"{autoencoder.name!r} is of experts' own outputs",
            found="without an expert there is nothing to encode",
            fix="take an autoencoder of the block's output or of the stream",
        )
    sides, _ = routers_around(subject, model, None if layer is None else [layer])
    if not sides:
        raise InputError(f"no expert writes into {subject.written_at}", fix="take an autoencoder behind a router")
    at = sides[0]
    text = run_text(run, autoencoder, documents=documents, tokens=tokens)
    begin = TrainedWith.of(autoencoder.row).skip_first if skip_first is None else skip_first
    with claimed(model.module, "ablation of writers"):
        walk = Walk(model, subject, text, [at], [], begin, batch_size, progress)
        sums = whole_sums(walk, {"writes": subject.directions})
        chosen = _chosen(walk, sums, at, least_active, features is not None, top)
        plans = [_plan(walk, sums, at, place, writers, controls, how, seed) for place in chosen]
        measured = _measure(walk, plans)
    found = [_ablated(plan, counts, draws, seed) for plan, counts in zip(plans, measured, strict=True)]
    _store(store, autoencoder, run, found)
    return found


@dataclass(frozen=True)
class _Plan:
    """One latent's cuts: its own, then the controls'."""

    place: int
    feature: int
    at: Router
    variants: tuple[Intervention, ...]
    experts: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]


def _chosen(walk: Walk, sums: Sums, at: Router, least: int, named: bool, top: int) -> list[int]:
    """Places of the latents to look at."""
    alive = np.flatnonzero((sums.active >= least) & (sums.documents >= 2) & (sums.active < sums.rows))
    if named:
        silent = sorted(set(range(len(sums.active))) - set(alive.tolist()))
        if silent:
            raise InputError(
                f"latent {walk.subject.features[silent[0]]} is active on {int(sums.active[silent[0]])} tokens here",
                expected=f"at least {least}, in two documents",
                fix="take more text (tokens), or another latent",
            )
        return list(range(len(sums.active)))
    if not len(alive):
        raise InputError(f"no latent is active on {least} tokens of two documents", fix="take more text (tokens)")
    score = np.sort(_score(walk, sums, at)[:, alive], axis=0)
    # How far the first writer stands out, against what the latent's other experts write.
    apart = score[-1] / np.maximum(np.abs(score[:-1]).mean(0), 1e-9) * np.minimum(1, sums.active[alive] / 100)
    return [int(place) for place in alive[np.argsort(-apart, kind="stable")[:top]]]


def _score(walk: Walk, sums: Sums, at: Router) -> Floats:
    """[routed expert, latent] `writes_excess`."""
    tally, routed = sums.writers[at], walk.parts[at].sublayer.n_experts or 0
    along, everywhere = (t.cpu().numpy()[:routed] for t in (tally.along["writes"], tally.everywhere("writes")))
    with np.errstate(divide="ignore", invalid="ignore"):
        return excess(along, everywhere, sums.active[None], np.array(float(sums.rows)))


def _plan(walk: Walk, sums: Sums, at: Router, place: int, writers: int, controls: int, how: Any, seed: int) -> _Plan:
    """A latent's writers and their controls, matched by decisions on its active tokens."""
    score = _score(walk, sums, at)[:, place]
    most = max(1, min(writers, len(score) - (walk.parts[at].sublayer.top_k or 1), len(score) // 2))
    experts = tuple(int(e) for e in np.argsort(-score, kind="stable")[:most])
    feature = walk.subject.features[place]
    cut = Intervention(
        [Ablate(layer=at[0], block=at[1], experts=experts, how=how)], name=f"writers of latent {feature}"
    )
    loads = {at: sums.writers[at].chosen[:, place].cpu().numpy()}
    drawn = controls_for(cut, walk.model, loads=loads, draws=controls, seed=seed + place)
    if not drawn.interventions:
        raise InputError(
            f"layer {at[0]} has too few experts to compare {most} of them with others",
            found=" ".join(drawn.notes) or None,
            fix="take out fewer (writers)",
        )
    others = tuple(tuple(control.edits[0].ids) for control in drawn.interventions)  # type: ignore[attr-defined]  # Ablate
    notes = (
        drawn.notes
        if most == writers
        else (*drawn.notes, f"Only {most} of {walk.parts[at].n_choices} experts are taken out.")
    )
    return _Plan(place, feature, at, (cut, *drawn.interventions), (experts, *others), notes)


def _measure(walk: Walk, plans: Sequence[_Plan]) -> list[tuple[Floats, Floats]]:
    """For each latent [document, variant + 1] sums of its activation on its active tokens, unedited first; and [document] tokens."""
    variants = [variant for plan in plans for variant in plan.variants]
    starts = np.cumsum([0, *(len(plan.variants) for plan in plans)])
    groups = walk.text.n_groups(_GROUPS)
    sums = [np.zeros((groups, 1 + len(plan.variants))) for plan in plans]
    counts = [np.zeros(groups) for _ in plans]
    site, places = walk.subject.autoencoder.site, torch.tensor([plan.place for plan in plans], device=walk.device)
    done, started = 0, time.perf_counter()
    with (
        RunProgress("without writers", walk.text.tokens, shown=walk.progress) as bar,
        alternately(walk.model, variants) as under,
    ):
        for batch in walk.text.batches(walk.batch_size):
            ids = [s.sequence_id for s in batch.sequences]
            with under(None, ids):
                plain = site_vectors(walk.model, batch, [site], first=walk.first)
            if len(plain):
                before = walk.subject.activity(plain).index_select(1, places)
                active = before > 0
                group = walk.text.groups(plain.document, _GROUPS)
                for number, plan in enumerate(plans):
                    on = active[:, number]
                    _add(sums[number][:, 0], group, before[:, number])
                    counts[number] += np.bincount(group, on.double().cpu().numpy(), groups)
                    for k in range(len(plan.variants)):
                        with under(int(starts[number]) + k, ids):
                            edited = site_vectors(walk.model, batch, [site], first=walk.first)
                        after = walk.subject.activity(edited)[:, plan.place]
                        _add(sums[number][:, 1 + k], group, after * on)
            done += batch.tokens
            bar.advance_to(done, done * (1 + len(variants)), time.perf_counter() - started)
    return list(zip(sums, counts, strict=True))


def _add(into: Floats, group: NDArray[np.int64], values: torch.Tensor) -> None:
    into += np.bincount(group, values.double().cpu().numpy(), len(into))


def _ablated(plan: _Plan, measured: tuple[Floats, Floats], draws: int, seed: int) -> Ablated:
    sums, counts = measured
    there = counts > 0
    before, after = sums[there, :1], sums[there, 1:]
    value, low, high = with_interval(lambda b, a: 1 - a / b, [before, after], draws=draws, seed=seed)

    def more(before: Floats, target: Floats, others: Floats) -> Floats:
        found: Floats = (others - target) / before
        return found

    beside = with_interval(more, [before, after[:, :1], after[:, 1:].mean(1, keepdims=True)], draws=draws, seed=seed)
    return Ablated(
        plan.feature,
        *plan.at,
        plan.experts[0],
        plan.experts[1:],
        (float(value[0]), float(low[0]), float(high[0])),
        tuple(float(v) for v in value[1:]),
        (float(beside[0][0]), float(beside[1][0]), float(beside[2][0])),
        int(counts.sum()),
        plan.notes,
    )


def _store(store: Store, autoencoder: Autoencoder, run: Run, found: Sequence[Ablated]) -> None:
    rows: list[dict[str, Any]] = []
    same: dict[str, Any] = {"sae_id": autoencoder.sae_id, "run_id": run.run_id}
    for one in found:
        place = {**same, "feature": one.feature, "layer": one.layer, "block": one.block, "n": one.n}

        def row(
            metric: str,
            value: float,
            bounds: tuple[float, float] | None = None,
            place: dict[str, Any] = place,
            **more: Any,
        ) -> dict[str, Any]:
            low, high = (None if not np.isfinite(b) else b for b in bounds or (np.nan, np.nan))
            return {**place, "metric": metric, "value": value, "ci_low": low, "ci_high": high, "unit": _SHARE, **more}

        control: dict[str, Any] = {"null_value": float(np.mean(one.control_drops)), "null_kind": NULL_KIND}
        rows.append(row("ablation_drop", one.drop[0], one.drop[1:], **control))
        rows.append(row("ablation_drop_excess", one.more[0], one.more[1:], null_value=0.0, null_kind=NULL_KIND))
        rows += [row("ablation_drop_control", value, null_kind=NULL_KIND) for value in one.control_drops]
        rows += [
            row("ablated_writer", float(rank + 1), expert=expert) | {"unit": "rank"}
            for rank, expert in enumerate(one.experts)
        ]
    over = [
        ("feature_experts", {**same, "metric": metric, "feature": one.feature, "layer": one.layer})
        for metric in METRICS
        for one in found
    ]
    write_rows(store, {"feature_experts": rows}, over=over)
