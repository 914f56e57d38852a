"""`effect`: what an intervention does, measured, stored and answered as a `Result`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.core.intervention import Intervention
    from moescope.core.result import Result
    from moescope.probes.live_model import LiveModel
    from moescope.store.run import Run
    from moescope.store.store import Store


def effect(
    model: LiveModel,
    corpus: Any,
    intervention: Intervention,
    store: Store,
    *,
    controls: int = 5,
    base: Run | str | None = None,
    groups: Sequence[str] = ("label", "position", "class"),
    generate: int = 0,
    prompts: int = 16,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    decompose: bool = False,
    keep_run: str | None = None,
    sources: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Result:
    """Measure what an intervention does to a model's predictions, against the unedited model and matched random controls.

    The intervened pass is paired with its base run on the same tokens: ΔNLL and KL (nats per token) and top-1 flips (share of
    tokens), with intervals over documents, stored in `effects` and `effect_sequences` in one transaction. `ms.analyze(run,
    "effect_groups")`, with the base run, tells the same by label, place and class of token.

    Args:
        model: from `moescope.load`.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        intervention: what to measure: `ms.Intervention([ms.edits.Ablate(layer=3, experts=5)])`.
        store: open for writing.
        controls: matched random controls: the same edit of others of the same size, layers and, for experts, load; for latents
            of an autoencoder, of others that are active about as often and write as long a vector.
        base: the run of the unedited model, or its name; None to take one that fits, or to record one now.
        groups: what to group tokens by as well: `label`, `position`, `class`.
        generate: also continue texts greedily by up to so many tokens and measure repetition, length and distinct n-grams.
        prompts: how many texts are continued.
        batch_size: sequences a forward pass; None for that of the base run, else 8.
        max_length: tokens of the longest sequence; None for that of the base run, else 512.
        seed: of the controls and of the resampling.
        decompose: split the effect into content (every router replays its decisions of the base run) and re-routing.
        keep_run: also record a full run under the intervention, with this name.
        sources: name → autoencoder, for edits that go through one; those left out are loaded from the store.
        progress: show how far it is, on stderr or in the notebook.

    Returns:
        The answer of the analysis `effect`, with its figure.

    Raises:
        InputError: an intervention that is empty or that the model cannot take, a base run that does not fit, a name that is
            taken, a dense model that is to be decomposed.
        RunError: NaN after an edit, or a base run whose numbers the model does not give; nothing is stored.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> cut = ms.Intervention([ms.edits.Ablate(layer=3, experts=5)])
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     answer = ms.effect(ms.load("demo"), ["Hello world.", "Good day."], cut, store, controls=2, progress=False)
        >>> answer.df().query("kind == 'target'").metric.tolist()
        ['delta_nll', 'kl', 'flips', 'base_nll']
    """
    from moescope.analysis_api import analyze
    from moescope.probes.effects.measure import measure_effect

    measured = measure_effect(
        model,
        corpus,
        intervention,
        store,
        controls=controls,
        base=base,
        groups=groups,
        generate=generate,
        prompts=prompts,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        decompose=decompose,
        keep_run=keep_run,
        sources=with_autoencoders(model, store, [intervention], sources),
        progress=progress,
    )
    return with_notes(analyze(measured.base, "effect", effect=measured.effect_id), measured.notes)


def with_autoencoders(
    model: LiveModel, store: Store, interventions: Iterable[Intervention], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Name → autoencoder, for every edit that goes through one: as given, else loaded from the store.

    Args:
        model: where they will be used; they come to its device.
        store: where they are looked for.
        interventions: whose edits name them.
        given: those that are there already.

    Raises:
        InputError: the store has no autoencoder of such a name, or it is one of another model (an edit with `forced=True`
            takes it all the same).
    """
    from moescope.probes.effects.sources import autoencoder_names

    several = list(interventions)
    found = dict(given or {})
    missing = [name for name in autoencoder_names(several) if name not in found]
    if not missing:
        return found
    from moescope.sae.loading import load_autoencoder

    edits: list[Any] = [edit for intervention in several for edit in intervention.edits]
    for name in missing:
        forced = all(edit.forced for edit in edits if getattr(edit, "sae", None) == name)
        found[name] = load_autoencoder(store, name, device=model.device, model=model, force=forced)
    return found


def with_notes(result: Result, notes: Sequence[str]) -> Result:
    """An answer with more that its reader must know."""
    import dataclasses

    return dataclasses.replace(result, notes=(*result.notes, *notes))
