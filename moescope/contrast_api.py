"""`contrast`: find the experts that tell two sets of prompts apart, and test what suppressing and stimulating them does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moescope.core.errors import InputError
from moescope.core.result import Result

if TYPE_CHECKING:
    from moescope.core.intervention import Intervention
    from moescope.probes.attribution.contrast_edits import Chosen, RankedExpert, StimulateBy, SuppressBy
    from moescope.probes.attribution.contrast_prompts import Halves
    from moescope.probes.live_model import LiveModel
    from moescope.store.run import Run
    from moescope.store.store import Store

Method = Literal["risk_difference", "prompt_mean", "resonance", "npmi"]
METHODS = ("risk_difference", "prompt_mean", "resonance", "npmi")
_NAMED = 12


@dataclass(frozen=True)
class _Plan:
    """What to edit, once experts are ranked."""

    suppress: int
    stimulate: int
    steer: tuple[int, int] | None
    suppress_by: SuppressBy
    stimulate_by: StimulateBy
    amount: float | None


def contrast(
    model: LiveModel,
    prompts_a: Any,
    prompts_b: Any,
    store: Store,
    *,
    name: str = "contrast",
    labels: tuple[str, str] = ("a", "b"),
    method: Method = "risk_difference",
    tokens: str = "all",
    words: str | None = None,
    suppress: int = 10,
    stimulate: int = 0,
    steer: tuple[int, int] | None = None,
    suppress_by: SuppressBy = "route_around",
    stimulate_by: StimulateBy = "force",
    amount: float | None = None,
    controls: int = 5,
    desired: Sequence[str | Sequence[int]] = (),
    undesired: Sequence[str | Sequence[int]] = (),
    batch_size: int = 8,
    max_length: int = 512,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Find the experts that tell two sets of prompts apart, and test on other prompts what changing them does.

    Each set is halved at random. One half is recorded (run `NAME: chosen on`) and ranks the experts, by the analysis
    `expert_contrast` (SteerMoE, fTRI, CEAI) or by `token_experts` (RICE). The other half (run `NAME: tested on`) is run
    without edits, under interventions on the chosen experts, and under as many random sets of experts of the same routers
    and like load. Nothing is tested on prompts that chose it.

    What is measured: ΔNLL, KL and flips on the prompts of either set, and the first set's less the second's; with
    continuations, the change of the preference: mean log p(desired | prompt) less mean log p(undesired | prompt). All of it
    is stored in `effects` and `effect_sequences` (group kinds `label` and `contrast`).

    As published: SteerMoE, `method="risk_difference"` with `steer=(5, 50)`; fTRI, `method="resonance"`, `suppress=10`,
    `suppress_by="renormalise"`; CEAI, `method="prompt_mean"`, `tokens="last"`, `stimulate_by="bias"`; RICE, `method="npmi"`
    with `words`, `stimulate=2`, `stimulate_by="scale"`.

    Args:
        model: a mixture-of-experts model.
        prompts_a, prompts_b: two corpora, or anything `Corpus.load` takes; at least two different prompts each.
        store: open for writing.
        name: of the two runs.
        labels: names of the sets.
        method: how experts are ranked: `risk_difference`, `prompt_mean`, `resonance`, or `npmi` of `words`.
        tokens: which tokens count for the first three: all, last, 0:10, token:13, ….
        words: for `npmi`: token ids or texts, divided by commas.
        suppress: how many of the first experts of set a to suppress; 0 for none.
        stimulate: how many of them to stimulate; 0 for none.
        steer: SteerMoE's intervention as well: how many experts of a to force, how many of b to route around.
        suppress_by: `route_around`, `renormalise` (fTRI), `zero`, `bias` or `scale`.
        stimulate_by: `force` (SteerMoE; at most top-k a router), `bias` (CEAI) or `scale` (RICE).
        amount: of `bias` (logits) and `scale` (a factor); 2 where not given.
        controls: random sets for each intervention, at least 1; published comparisons use 5.
        desired, undesired: continuations, as texts or token ids.
        batch_size, max_length: of the passes.
        draws: bootstrap resamples of prompts.
        seed: of halves, random sets, shuffles and resamples.
        progress: draw a progress bar, on stderr or in the notebook.

    Returns:
        A Result; its table has one row an intervention or control, set and metric, in nats or shares; `null` is the mean of
        the random sets, null_low and null_high their range.

    Raises:
        InputError: sets that are too small or the same, a dense model, a name that is taken, nothing to do. Where that is
            seen only once prompts were recorded (no expert to be chosen, prompts too long), the runs stay.
        RunError: NaN after an edit; nothing of the effects is stored.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> a, b = (["In the beginning.", "And he said.", "Thus."], ["int main()", "for (;;)", "return 0;"])
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     result = ms.contrast(ms.load("demo"), a, b, store, suppress=2, controls=2, draws=50, progress=False)
        >>> sorted(set(result.df()["metric"]))
        ['delta_nll', 'flips', 'kl']
    """
    from moescope.analysis_api import analyze
    from moescope.probes.attribution.contrast_estimates import continuation_ids
    from moescope.probes.attribution.contrast_measuring import keep, measured
    from moescope.probes.attribution.contrast_prompts import halved
    from moescope.probes.attribution.contrast_result import contrast_result
    from moescope.probes.choices import longest

    _check(model, store, method, words, suppress, stimulate, steer, controls, amount)
    for continuation in (*desired, *undesired):
        continuation_ids(model, continuation)
    max_length = longest(model, max_length, 0)
    halves = halved(prompts_a, prompts_b, labels=labels, seed=seed)
    runs = _recorded(
        model, halves, store, name, batch_size=batch_size, max_length=max_length, seed=seed, progress=progress
    )
    if method == "npmi":
        found = analyze(runs[0], "token_experts", words=words, draws=draws, seed=seed)
    else:
        a, b = labels
        found = analyze(runs[0], "expert_contrast", a=a, b=b, measure=method, tokens=tokens, draws=draws, seed=seed)
    parameters: dict[str, Any] = {
        "method": method, "tokens": tokens, "words": words, "suppress": suppress, "stimulate": stimulate, "steer": steer,
        "suppress_by": suppress_by, "stimulate_by": stimulate_by, "amount": amount, "controls": controls, "seed": seed,
    }  # fmt: skip
    plan = _Plan(suppress, stimulate, steer, suppress_by, stimulate_by, amount)
    interventions, notes = _interventions(model, found, plan)
    passes: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    tested, sums, more = measured(
        model,
        halves,
        runs[0],
        interventions,
        controls,
        (tuple(desired), tuple(undesired)),
        passes,
        draws=draws,
        seed=seed,
    )
    keep(store, runs[1], tested, sums, labels)
    return contrast_result(
        tested, halves, runs, found, (*halves.notes, *notes, *more), draws=draws, parameters=parameters
    )


def _check(
    model: LiveModel,
    store: Store,
    method: str,
    words: str | None,
    suppress: int,
    stimulate: int,
    steer: tuple[int, int] | None,
    controls: int,
    amount: float | None,
) -> None:
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    if not model.anatomy.moe:
        raise InputError(f"{model.name} has no experts", expected="a mixture-of-experts model")
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}", expected=", ".join(METHODS))
    if (method == "npmi") != (words is not None):
        raise InputError(
            "npmi needs words, and only npmi takes them",
            fix="method='npmi', words='Wait,Alternatively' (--method npmi --words …)",
        )
    numbers = (suppress, stimulate, *(steer or (0, 0)))
    if min(numbers) < 0 or not any(numbers):
        raise InputError("nothing is to be suppressed or stimulated", expected="numbers from 0, and not all of them 0")
    if controls < 1:
        raise InputError("an effect is never shown without its control", expected="controls=1 or more (--controls)")
    if amount is not None and not amount > 0:
        raise InputError("the amount cannot be used", expected="a number above 0", found=f"{amount}")


def _recorded(
    model: LiveModel,
    halves: Halves,
    store: Store,
    name: str,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    progress: bool,
) -> tuple[Run, Run]:
    """Both halves as runs."""
    from moescope.probes.record import record

    names = (f"{name}: chosen on", f"{name}: tested on")
    if taken := [n for n in names if n in {run.name for run in store.runs()}]:
        raise InputError(f"there is a run {taken[0]!r} already", fix="give another name (--name)")
    parts = (halves.chosen_on, halves.tested_on)
    first, second = (
        record(
            model, part, store, name=one, probes=("tokens", "routing"), batch_size=batch_size, max_length=max_length,
            seed=seed, progress=progress,
        )
        for part, one in zip(parts, names, strict=True)
    )  # fmt: skip
    return first, second


def _ranking(found: Result) -> list[RankedExpert]:
    from moescope.probes.attribution.contrast_edits import RankedExpert

    return [
        RankedExpert(int(r["layer"]), str(r["block"]), int(r["expert"]), float(r["value"]))
        for r in found.table.to_pylist()
    ]


def _interventions(model: LiveModel, found: Result, plan: _Plan) -> tuple[list[Intervention], tuple[str, ...]]:
    """The interventions to test, and what to say of how their experts were chosen."""
    from moescope.core.intervention import Intervention
    from moescope.probes.attribution import contrast_edits as made

    ranking, anatomy = _ranking(found), model.anatomy
    sure = {(r["layer"], r["block"], r["expert"]) for r in found.table.to_pylist() if r["q"] < 0.05}
    interventions, notes = [], []
    if plan.suppress:
        chosen = made.choose(ranking, plan.suppress, sign=1, most=made.most_removed(anatomy))
        edits = made.suppress(chosen.experts, by=plan.suppress_by, amount=plan.amount)
        interventions.append(Intervention(edits, name=f"suppress {len(chosen.experts)}", anatomy=anatomy.digest))
        notes.append(_said("Suppressed", plan.suppress_by, chosen, sure))
    if plan.stimulate:
        forced = made.most_forced(anatomy) if plan.stimulate_by == "force" else made.most_removed(anatomy)
        chosen = made.choose(ranking, plan.stimulate, sign=1, most=forced)
        edits = made.stimulate(chosen.experts, by=plan.stimulate_by, amount=plan.amount)
        interventions.append(Intervention(edits, name=f"stimulate {len(chosen.experts)}", anatomy=anatomy.digest))
        notes.append(_said("Stimulated", plan.stimulate_by, chosen, sure))
    if plan.steer is not None:
        activate, deactivate = plan.steer
        interventions.append(made.steer(ranking, anatomy, activate=activate, deactivate=deactivate))
    return interventions, tuple(notes)


def _said(what: str, by: str, chosen: Chosen, sure: set[tuple[int, str, int]]) -> str:
    named = ", ".join(f"{e.name} ({e.value:+.3f})" for e in chosen.experts[:_NAMED])
    more = f" and {len(chosen.experts) - _NAMED} more" if len(chosen.experts) > _NAMED else ""
    certain = sum((e.layer, e.block, e.expert) in sure for e in chosen.experts)
    full = f"; {len(chosen.skipped)} skipped, their router having its fill" if chosen.skipped else ""
    return (
        f"{what} by {by}: {named}{more}; {certain} of {len(chosen.experts)} with q < 0.05 where they were chosen{full}."
    )
