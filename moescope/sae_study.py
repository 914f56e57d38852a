"""`study`: one autoencoder, or several, from text to findings: record, train, judge, read, join to experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moescope.core.errors import InputError
from moescope.core.sites import MLP_OUT, RESID_POST, Site

if TYPE_CHECKING:
    from moescope.core.result import Result
    from moescope.probes.live_model import LiveModel
    from moescope.sae.autoencoder import Autoencoder
    from moescope.sae.training.specs import SaeSpec
    from moescope.store.run import Run
    from moescope.store.store import Store


@dataclass(frozen=True)
class Study:
    """What a study made.

    Attributes:
        run: whose vectors the autoencoders were trained on, and whose held-out documents they are judged on.
        autoencoders: as trained.
        results: answers, in the order in which they were found; `ms.write_report(run, path)` writes them all.
    """

    run: Run
    autoencoders: tuple[Autoencoder, ...]
    results: tuple[Result, ...]


def study(
    model: LiveModel,
    corpus: Any,
    store: Store,
    *,
    site: str,
    specs: Sequence[str] = ("topk",),
    name: str = "study",
    tokens: int | None = None,
    vectors: int | None = None,
    max_norm_ratio: float | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    judged_tokens: int = 20_000,
    seed: int = 0,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Study:
    """Record vectors at a site, train autoencoders on them, judge them, read their features, and join these to experts.

    What is in the store already under these names is taken up again: a recording or training that was stopped goes on, one
    that ended is not repeated.

    Args:
        model: from `moescope.load`.
        corpus: a `Corpus`, or anything `Corpus.load` takes; labels give lifts and probes.
        store: open for writing.
        site: where: `blocks.3.hook_mlp_out`.
        specs: what to train, as `SaeSpec.parse` reads it; several are trained in one pass over the vectors.
        name: of the run; the autoencoders are named after it and their form.
        tokens: how many to record; None for the whole corpus.
        vectors: how many to train on, repeats included; None for every one once.
        max_norm_ratio: vectors of more than so many times the median norm are left out, as those of first tokens always are.
        batch_size, max_length: sequences a pass, and tokens of the longest.
        judged_tokens: held-out tokens that each is judged on.
        seed: of everything random.
        progress: show how far it is, on stderr.
        tell: called with a line before each step.

    Returns:
        The run, the autoencoders and the answers.

    Raises:
        InputError: a site the model has not or that keeps no vectors, a spec that cannot be read, too little text.
        RunError: training that went to NaN; the last good checkpoint is kept.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> texts = ["The cat sat on the mat and looked at the dog. " * 8] * 12
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     try:
        ...         ms.sae.study(ms.load("demo"), texts, store, site="blocks.9.hook_mlp_out", progress=False)
        ...     except ms.InputError as error:
        ...         print("blocks.9" in str(error))
        True
    """
    from moescope.sae.recording import record_vectors
    from moescope.sae.saelens import need_saelens
    from moescope.sae.training.specs import SaeSpec
    from moescope.sae.training.train import train

    need_saelens()  # told before anything is recorded
    say = tell or (lambda _: None)
    place = Site.parse(site)
    asked = [SaeSpec.parse(text) for text in specs]
    if not asked:
        raise InputError("a study trains at least one autoencoder", fix='name one: specs=["topk:d=1024,k=16"]')
    names = _names(name, specs)
    say(f"recording vectors at {site}")
    run = record_vectors(
        model, corpus, store, sites=[site], name=name, tokens=tokens, batch_size=batch_size, max_length=max_length,
        seed=seed, progress=progress, resume=True,
    )  # fmt: skip
    trained = _there(store, run, names, asked, model)
    if trained is None:
        say(f"training {len(asked)} autoencoder{'s' * (len(asked) > 1)}")
        trained = train(
            run, store, asked, site=site, vectors=vectors, max_norm_ratio=max_norm_ratio, names=names,
            device=str(model.device), seed=seed, resume=True, progress=progress,
        )  # fmt: skip
    results: list[Result] = []
    for autoencoder in trained:
        results += _findings(autoencoder, model, run, store, place, judged_tokens, seed, say, progress=progress)
    if len(trained) > 1:
        from moescope.analysis_api import analyze

        results.append(analyze(run, "sae_comparison", site=site, allow_incomplete=True))
    return Study(run, tuple(trained), tuple(results))


def _names(name: str, specs: Sequence[str]) -> list[str]:
    """A name for each spec: that of the study, numbered where there are several."""
    return [name] if len(specs) == 1 else [f"{name}-{number}" for number in range(1, len(specs) + 1)]


def _there(
    store: Store, run: Run, names: Sequence[str], specs: Sequence[SaeSpec], model: LiveModel
) -> list[Autoencoder] | None:
    """The autoencoders of an earlier study of the same; None where there are none of these names.

    Raises:
        InputError: one of these names that is something else.
    """
    from moescope.sae.catalogue import sae_rows
    from moescope.sae.loading import load_autoencoder

    held = {row["name"]: row for row in sae_rows(store)}
    if not held.keys() & set(names):
        return None
    for name, spec in zip(names, specs, strict=True):
        row = held.get(name, {})
        if str(row.get("trained_on")) != run.run_id or (row.get("settings") or {}).get("asked") != str(spec):
            raise InputError(
                f"the autoencoder {name!r} of this store is not the one of this study",
                expected=f"{spec} of run {run.name!r}",
                found=f"{(row.get('settings') or {}).get('asked') or row.get('architecture', 'none')}",
                fix="give the study another name, or delete it: moescope sae delete",
            )
    return [load_autoencoder(store, name, device=str(model.device)) for name in names]


def _findings(
    autoencoder: Autoencoder,
    model: LiveModel,
    run: Run,
    store: Store,
    site: Site,
    tokens: int,
    seed: int,
    say: Callable[[str], None],
    *,
    progress: bool,
) -> list[Result]:
    """Judge, read, and, where experts write to the site, join to them."""
    from moescope import sae_api as api
    from moescope.analysis_api import analyze

    say(f"judging {autoencoder.name} on held-out documents, beside its controls")
    results = [api.judge(autoencoder, model, store, run=run, tokens=tokens, seed=seed, progress=progress)]
    say(f"reading the features of {autoencoder.name}")
    results.append(api.read(autoencoder, run, store, model=model, seed=seed, progress=progress))
    results.append(analyze(run, "top_features", sae=autoencoder.name, allow_incomplete=True))
    if _written_by_experts(model, site):
        say(f"joining the features of {autoencoder.name} to experts")
        results.append(api.feature_experts(autoencoder, model, run, store, seed=seed, progress=progress))
        say("ablating the experts that write them")
        results.append(api.ablate_writers(autoencoder, model, store, run=run, seed=seed, progress=progress))
    return results


def _written_by_experts(model: LiveModel, site: Site) -> bool:
    """Whether experts of the site's own layer write what is read there."""
    return site.tensor in (MLP_OUT, RESID_POST) and any(s.layer == site.layer for s in model.anatomy.moe)
