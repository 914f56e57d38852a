"""`sweep`: many interventions of one kind, measured, stored and answered as one result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.effect_api import with_autoencoders

if TYPE_CHECKING:
    from moescope.core.intervention import Intervention
    from moescope.probes.live_model import LiveModel
    from moescope.probes.sweeps.cost import SweepCost
    from moescope.probes.sweeps.perform import SweepRequest
    from moescope.probes.sweeps.scores import ExpertScores
    from moescope.store.run import Run
    from moescope.store.store import Store

SweepKind = Literal["experts", "drop", "keep", "top_k", "top_p", "routing_value", "dose"]
# Which analysis answers each kind of sweep.
ANSWERS: dict[SweepKind, str] = {
    "experts": "expert_effects",
    "drop": "drop_curves",
    "keep": "keep_curves",
    "top_k": "routing_width",
    "top_p": "routing_width",
    "routing_value": "routing_value",
    "dose": "dose_response",
}


_WHOLE = ("drop", "keep", "dose")  # kinds of sweep that are not cut down to some layers


def sweep(
    model: LiveModel,
    corpus: Any,
    store: Store,
    *,
    kind: SweepKind = "experts",
    how: str | None = None,
    layers: Sequence[int] | None = None,
    scores: Any = "frequency",
    shares: Sequence[float] | None = None,
    numbers: Sequence[int] | None = None,
    across: Literal["layer", "model"] = "layer",
    highest: bool = False,
    controls: int = 5,
    intervention: Intervention | None = None,
    strengths: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    generate: int = 32,
    prompts: int = 16,
    screen: int | None = None,
    verify: int = 16,
    base: Run | str | None = None,
    sources: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    pass_size: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Measure many interventions of one kind on the same tokens, store their effects, and answer.

    Passes begin at the edited layer, from what a plain pass left there, wherever the model's logits come out the same;
    several interventions share a pass; sequences in which an expert was never chosen are known to be unchanged, and are left
    out. The numbers are those of one whole pass an intervention.

    Args:
        model: from `moescope.load`.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        store: open for writing; effects are stored under one sweep id, a group at a time.
        kind: `experts`: every expert of every layer alone. `drop`, `keep`: growing shares of experts taken out, or kept, by
            score, beside random sets of the same layers. `top_k`, `top_p`: other numbers of experts a token, in each layer
            alone and in all. `routing_value`: random experts for every token. `dose`: an intervention at several strengths.
        how: for `experts` (default `zero`) and `drop` (default `route_around`), how experts are taken out: see
            `moescope.edits.Ablate`.
        layers: those of `experts`, and those taken alone by `top_k`, `top_p`, `routing_value`; None for all.
        scores: for `drop` and `keep`: names of measures of the analysis `importance` ("frequency", "REAP", or several), a
            mapping (layer, expert) → score, or a table with columns layer, expert, value.
        shares: of experts, or of scores for `top_p`.
        numbers: of experts a token, for `top_k`.
        across: whether experts compete in their layer or in the whole model, for `drop`.
        highest: take out the highest scores, for `drop`.
        controls: random sets beside each set, or seeds of random routing.
        intervention, strengths: for `dose`.
        generate, prompts: for `dose`, tokens written after each of so many prompts; 0 for none.
        screen: for `experts`, estimate all with one forward and one backward pass, and run only so many of the highest
            exactly; None to run all.
        verify: with `screen`, so many of the others, at random, are run exactly too.
        base: the run of the unedited model, or its name; None to take one that fits, or to record one now.
        sources: name → autoencoder, for a `dose` of edits that go through one; those left out are loaded from the store.
        batch_size, max_length: of the plan; those of the base run by default.
        pass_size: pairs of an intervention and a sequence that share one edited pass; by default as many as a batch has
            sequences.
        seed: of random sets, samples and intervals.
        resume: go on with the same sweep where it was stopped; one that is whole is answered from the store.
        progress: show how far it is, on stderr or in the notebook.

    Raises:
        InputError: no such kind, an edit or scores that do not fit the model, a sweep that is stored already.
        RunError: NaN after an edit, or a base run whose numbers the model does not give; what was stored before stays.
        KeyboardInterrupt: after Ctrl-C; what was stored before stays.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = ms.sweep(ms.load("demo"), ["Hello world.", "It rains."], store, screen=4, verify=4, progress=False)
        ...     found.name, int((found.df()["metric"] == "ΔNLL estimate").sum())
        ('expert_effects', 96)
    """
    from moescope.probes.corpus import Corpus
    from moescope.probes.effects.baseline import baseline

    loaded = Corpus.load(corpus)
    options = {
        "how": how, "layers": layers, "shares": shares, "numbers": numbers, "across": across, "highest": highest,
        "controls": controls, "intervention": intervention, "strengths": strengths, "generate": generate, "prompts": prompts,
        "screen": screen, "verify": verify, "seed": seed,
        "sources": with_autoencoders(model, store, [] if intervention is None else [intervention], sources),
    }  # fmt: skip
    request = _request(model, loaded, kind, scores, options)
    _ = request.variants  # what cannot be run is refused before a base run is recorded
    sized = {"batch_size": batch_size, "max_length": max_length}
    run = baseline(model, loaded, store, base=base, seed=seed, progress=progress, **sized)
    if kind in ("drop", "keep"):
        request = _request(model, loaded, kind, scores, options, run)
    sweep_id = request.run(store, run, pass_size=pass_size, resume=resume, progress=progress)
    return analyze(run, ANSWERS[kind], sweep=sweep_id, seed=seed)


def sweep_cost(
    model: LiveModel,
    corpus: Any,
    *,
    kind: SweepKind = "experts",
    scores: Any = "frequency",
    batch_size: int | None = None,
    max_length: int | None = None,
    pass_size: int | None = None,
    **options: Any,
) -> SweepCost:
    """What a sweep would take, from a few timed passes; nothing is stored.

    Args:
        model, corpus, kind, scores, batch_size, max_length, pass_size: as for `sweep`, and so are the options.

    Raises:
        InputError: as `sweep`.

    Example:
        >>> import moescope as ms
        >>> sweep_cost(ms.load("demo"), ["Hello world."], kind="top_k", numbers=[1]).variants
        7
    """
    from moescope.probes.corpus import Corpus

    request = _request(model, Corpus.load(corpus), kind, scores, options)
    return request.cost(batch_size=batch_size, max_length=max_length, pass_size=pass_size)


def _request(
    model: LiveModel, corpus: Any, kind: str, scores: Any, options: Mapping[str, Any], run: Run | None = None
) -> SweepRequest:
    from moescope.probes.sweeps.perform import SweepRequest, flat_scores

    if kind in _WHOLE and options.get("layers") is not None:
        raise InputError(
            f"layers are not for a sweep of kind {kind}",
            expected="layers with experts, top_k, top_p or routing_value",
            fix="leave them out: sets by score are taken from every layer, and a dose acts where its edits say",
        )
    found: Sequence[ExpertScores] = ()
    if kind in ("drop", "keep") and model.anatomy.moe:
        names = _names(scores)
        planned = names is not None and run is None  # only counted, before there are records to score by
        found = flat_scores(model, names or ()) if planned else _scores(scores, names, model, run)
    return SweepRequest(model, corpus, kind, scores=found, **options)  # type: ignore[arg-type]  # the kind is checked there


def _names(scores: Any) -> list[str] | None:
    """Names of measures; None where the scores themselves are given."""
    if isinstance(scores, str):
        return [scores]
    if isinstance(scores, (list, tuple)) and scores and all(isinstance(name, str) for name in scores):
        return list(scores)
    return None


def _scores(scores: Any, names: Sequence[str] | None, model: LiveModel, run: Run | None) -> Sequence[ExpertScores]:
    from moescope.probes.sweeps.scores import read_scores

    if names is None or run is None:
        return [read_scores(scores.df() if isinstance(scores, Result) else scores, model.anatomy)]
    table = analyze(run, "importance", draws=1).df()
    measures = list(dict.fromkeys(table["metric"]))
    if unknown := [name for name in names if name not in measures]:
        raise InputError(
            f"run {run.name!r} has no measure {unknown[0]!r} of its experts",
            expected=", ".join(measures),
            fix="record a base run with the probe experts (base=…) for measures of their outputs",
        )
    return [read_scores(table[table["metric"] == name], model.anatomy, name=name) for name in names]
