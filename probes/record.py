"""`record`: one pass of a corpus through a live model, into a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import Site
from moescope.probes.choices import chosen_probes
from moescope.probes.corpus import Corpus
from moescope.probes.live_model import LiveModel
from moescope.probes.recording import Recording
from moescope.store.run import Run
from moescope.store.store import Store

__all__ = ["Recording", "chosen_probes", "record"]


def record(
    model: LiveModel,
    corpus: Any,
    store: Store,
    *,
    name: str,
    probes: Sequence[str] | None = None,
    sites: Sequence[str | Site] = (),
    sample: float = 1.0,
    intervention: Intervention | None = None,
    sources: Mapping[str, Any] | None = None,
    generate: int = 0,
    batch_size: int = 8,
    max_length: int = 512,
    padding: str | None = None,
    seed: int = 0,
    budget: str | int | None = None,
    resume: bool = False,
    batches: range | None = None,
    stop_after: int | None = None,
    progress: bool = True,
) -> Run:
    """Run a corpus through a model and keep what the probes see.

    Args:
        model: from `moescope.load`.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        store: open for writing.
        name: of the run; unique in the store.
        probes: names of probes; None for the default four, less those that a dense model has no use for.
        sites: where to keep whole vectors as well (probe `activations`): `blocks.3.hook_resid_post`, or any other
            spelling of a site that `moescope.core.site_names.read_site` knows.
        sample: share of the tokens whose vectors are kept there, chosen by hash(seed, sequence, position); 0 < sample ≤ 1.
        intervention: record the model as these edits change it; None for the model as it is. The run says so wherever it is
            shown. Routers whose decisions are edited have no margin (their rule does not give what the experts were given).
        sources: name → autoencoder, for edits that go through one.
        generate: continue every sequence greedily by up to so many tokens, with the model's cache, and record those
            too (phase `decode`). A sequence ends early after its end-of-sequence token.
        batch_size: sequences a forward pass.
        max_length: tokens of the longest sequence; longer documents are split. Never more than the model's context, less
            the tokens to generate.
        padding: side at which shorter sequences are filled up: "left" or "right"; None for left where texts are continued,
            which needs it, and right elsewhere. Both give the same records but for rounding.
        seed: stored with the run; the only thing it decides is which tokens a sample takes.
        budget: bytes that the run may take on disk: `"2GB"`, `"500 MiB"`, or a number; what does not fit is left out, as
            `moescope.plan` says. A run that is resumed keeps what it kept before.
        resume: go on with the run of this name where it was stopped (killed, interrupted, or failed), after its last whole
            chunk; the plan must be the same, and on the same machine the rows are those of an unbroken run. A run that is
            complete is given back as it is; one that does not exist is begun.
        batches: record only these batches of the plan, as a shard for `moescope merge`: batches and sequences keep their
            numbers of the plan, tokens are numbered from 0. The run is `incomplete`, since most of the corpus is elsewhere.
        stop_after: the last block that each forward pass runs; None for whole passes. Nothing behind it is computed, so the
            run has neither NLL nor predictions (null, not 0): for vectors of the blocks before, at a part of the cost.
        progress: draw a progress bar, on stderr or in the notebook.

    Returns:
        The run. Its status is `complete` only if every expected event is in the store; otherwise `incomplete`, with the
        gaps in `run.coverage`.

    Raises:
        InputError: a name that is taken, a corpus that cannot be read, a probe that this model has no use for, a site that
            it does not have, a model that cannot generate or is being recorded already, a budget that nothing fits, edits
            that the model cannot take, or edits of a run that generates or has a budget; passes that stop before a probe's
            site, or in a run that generates, is edited or has a budget, or of an encoder-decoder model.
        RunError: taps change the model's logits; or the disk, the model or the device failed on the way, or logits are NaN
            after an edit: whole chunks written before stay, status `failed`.
        KeyboardInterrupt: after Ctrl-C, once what was recorded is safe; status `incomplete`.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     run.status
        'complete'
    """
    corpus = Corpus.load(corpus)
    asked: dict[str, Any] = {
        "probes": probes,
        "sites": sites,
        "sample": sample,
        "generate": generate,
        "batch_size": batch_size,
        "max_length": max_length,
        "padding": padding,
        "seed": seed,
    }
    planned = None
    if budget is not None and intervention is not None:
        raise InputError("a budget is for runs without edits", fix="leave out the budget, or the intervention")
    if budget is not None and stop_after is not None:
        raise InputError(
            "a budget is planned for whole passes", fix="leave out the budget, or stop_after; or keep a smaller sample"
        )
    if budget is not None:
        from moescope.probes.budgeted import budgeted  # which itself records a few batches

        kept, planned = budgeted(
            model, corpus, store, name=name, budget=budget, resume=resume, progress=progress, asked=asked
        )
        asked |= kept
    recording = Recording(
        model,
        corpus,
        store,
        name=name,
        intervention=intervention,
        sources=sources,
        resume=resume,
        batches=batches,
        planned=planned,
        stop_after=stop_after,
        **asked,
    )
    return recording.run(progress=progress)
