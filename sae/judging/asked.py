"""What a judgement is asked of: the run to judge on, and refusals of what cannot be judged."""

from __future__ import annotations

from typing import Any

from moescope.core.errors import InputError
from moescope.probes.corpus import Corpus
from moescope.probes.effects.baseline import baseline
from moescope.probes.live_model import LiveModel
from moescope.sae.autoencoder import Autoencoder
from moescope.store.run import Run
from moescope.store.store import Store


def check_asked(autoencoder: Autoencoder, store: Store, **counts: int) -> None:
    """Refuse counts that make no sense, a store for reading only, and an autoencoder that is not in the store."""
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    if counts["ablations"] < 0 or min(n for name, n in counts.items() if name != "ablations") < 1:
        raise InputError(
            "tokens, live_tokens and controls are 1 or more, ablations 0 or more",
            found=", ".join(f"{name} {n}" for name, n in counts.items()),
        )
    if not store.fetch("SELECT 1 FROM saes WHERE sae_id = ?", [autoencoder.sae_id]):
        raise InputError(
            f"{autoencoder.name} is not in {store.path}",
            fix="load it into the store first: from_disk(folder, store=store), published(release, sae_id, store=store)",
        )


def run_to_judge_on(
    autoencoder: Autoencoder,
    model: LiveModel | None,
    store: Store,
    run: Run | str | None,
    corpus: Any,
    *,
    seed: int,
    progress: bool,
) -> Run:
    """The run to judge on: the one named, one recorded of the corpus, or the one that it was trained on."""
    if run is not None:
        return store.run(run) if isinstance(run, str) else run
    if corpus is not None:
        if model is None:
            raise InputError("a corpus can only be judged on with a model", fix="pass the model, or a run")
        return baseline(model, Corpus.load(corpus), store, seed=seed, progress=progress)
    trained_on = autoencoder.row.get("trained_on")
    found = next((r for r in store.runs() if str(r.run_id) == str(trained_on)), None)
    if found is None:
        raise InputError(
            f"{autoencoder.name} was trained on no run of {store.path}",
            fix="say what to judge it on: a run (--run), or a corpus (--data)",
        )
    return found


def check_run(autoencoder: Autoencoder, model: LiveModel | None, run: Run, *, force: bool) -> None:
    """Refuse a run that failed or is of another model."""
    if run.status == "failed":
        raise InputError(f"run {run.name!r} failed", fix="record it again, or name another")
    named = autoencoder.row.get("model") if model is None else model.name
    if not force and named is not None and run.model != named:
        raise InputError(
            f"run {run.name!r} is of another model",
            expected=str(named),
            found=run.model,
            fix="name a run of that model, or force it (force=True, --force)",
        )
