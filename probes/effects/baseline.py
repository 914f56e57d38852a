"""The run without edits that effects are measured against: found in the store, or recorded."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError, RunError
from moescope.probes.batches import BatchPlan
from moescope.probes.choices import longest
from moescope.probes.corpus import Corpus
from moescope.probes.effects.paired import PairedBatch, paired_pass
from moescope.probes.live_model import LiveModel
from moescope.probes.record import record
from moescope.store.run import Run
from moescope.store.store import Store

BATCH_SIZE, MAX_LENGTH = 8, 512
# By how much the mean NLL of a batch may differ from the recorded one: the same passes give the same bits, and other threads
# or kernels differ by rounding, which in narrow types is coarse.
_ROUNDING = {"float32": 1e-3, "float64": 1e-3}
_ROUNDING_NARROW = 2e-2

_NLL = """
    SELECT sequence_id, position, nll
    FROM tokens
    WHERE run_id = $run AND phase = 'prefill' AND sequence_id BETWEEN $first AND $last AND nll IS NOT NULL
"""


def baseline(
    model: LiveModel,
    corpus: Corpus,
    store: Store,
    *,
    base: Run | str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """A complete run of the corpus through the unedited model: the one given, one that fits, or one recorded now.

    Args:
        model, corpus, store: what is measured.
        base: the run, or its name; it must fit.
        batch_size, max_length: of the plan; those of the run where None, and 8 and 512 where there is none yet.
        seed: stored with a run that is recorded.
        progress: show how far the recording is.

    Raises:
        InputError: a run given that is of another model, corpus or plan, edited or incomplete.
    """
    needed = ["tokens", *(["routing"] if model.anatomy.moe else [])]
    wanted = _identity(model, corpus, batch_size, max_length)
    if base is not None:
        run = store.run(base) if isinstance(base, str) else base
        if reason := _misfit(run, wanted, needed):
            raise InputError(
                f"run {run.name!r} cannot be the base run",
                found=reason,
                fix="name another run (--base), or leave it out to have one recorded",
            )
        return run
    fixed = wanted | _identity(model, corpus, batch_size or BATCH_SIZE, max_length or MAX_LENGTH)
    fitting = [run for run in reversed(store.runs()) if _misfit(run, fixed, needed) is None]
    if fitting:
        plan = BatchPlan(corpus, model.tokenizer, *plan_of(fitting[0]), model.anatomy.vocabulary)
        first = next(paired_pass(model, islice(plan, 1), ()))
        # Two models may share a name; the numbers tell them apart.
        if found := next((run for run in fitting if SameNumbers(run, model).reason(first) is None), None):
            return found
    taken = {run.name for run in store.runs()}
    name = next(n for n in ("base", *(f"base-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    return record(
        model,
        corpus,
        store,
        name=name,
        probes=needed,
        batch_size=batch_size or BATCH_SIZE,
        max_length=max_length or MAX_LENGTH,
        seed=seed,
        progress=progress,
    )


def plan_of(run: Run) -> tuple[int, int]:
    """Batch size and maximum length of a run."""
    settings = run.info["settings"]
    return int(settings["batch_size"]), int(settings["max_length"])


class SameNumbers:
    """Holds what a pass without edits gives against what the base run has.

    Args:
        run: the base run.
        model: that runs now.
    """

    def __init__(self, run: Run, model: LiveModel) -> None:
        self._run = run
        self._most = _ROUNDING.get(model.settings()["dtype"], _ROUNDING_NARROW)

    def check(self, paired: PairedBatch) -> None:
        """Raise `RunError` unless the batch's NLL is the recorded one, but for rounding."""
        if reason := self.reason(paired):
            raise RunError(
                f"the unedited model does not give the numbers of its base run {self._run.name!r}",
                expected=f"the same NLL, within {self._most:g} nats on average",
                found=reason,
                fix="record a new base run with this model and these versions (leave --base out); nothing was stored",
            )

    def reason(self, paired: PairedBatch) -> str | None:
        """How a batch's NLL differs from the recorded one; None where it does not."""
        recorded = self._recorded(paired)
        there = ~np.isnan(recorded)
        if lost := int((paired.predicted & ~there).sum()):
            return f"{lost:,} tokens without an NLL"
        differences = np.abs(paired.base_nll - recorded)[paired.predicted]
        mean = float(differences.mean()) if len(differences) else 0.0
        return f"a mean difference of {mean:.3g} nats" if mean > self._most else None

    def _recorded(self, paired: PairedBatch) -> NDArray[np.float64]:
        """[row, position] NLL in the store, NaN where there is none."""
        ids = [sequence.sequence_id for sequence in paired.batch.sequences]
        rows = self._run.sql(_NLL, {"first": min(ids), "last": max(ids)}).fetchnumpy()
        found: NDArray[np.float64] = np.full(paired.ids.shape, np.nan)
        row, position = (np.asarray(rows[name], np.int64) for name in ("sequence_id", "position"))
        inside = position < found.shape[1]
        found[(row[inside] - min(ids), position[inside])] = np.asarray(rows["nll"], np.float64)[inside]
        return found


def _identity(model: LiveModel, corpus: Corpus, batch_size: int | None, max_length: int | None) -> dict[str, Any]:
    """What a base run must agree in; plan sizes only where they are given."""
    facts = {
        "model": model.name,
        "revision": model.revision,
        "corpus_fingerprint": corpus.facts().fingerprint,
        "generate": 0,
        "dtype": model.settings()["dtype"],
        "experts": model.settings()["experts"],
        "attention": model.settings()["attention"],
    }
    facts |= {} if batch_size is None else {"batch_size": batch_size}
    return facts | ({} if max_length is None else {"max_length": longest(model, max_length, 0)})


def _misfit(run: Run, wanted: dict[str, Any], needed: list[str]) -> str | None:
    """Why a run is no base run; None where it is."""
    info = run.info
    has = {**info["settings"], **{name: info[name] for name in ("model", "revision", "corpus_fingerprint")}}
    if info["intervention"]:
        return "it was recorded under an intervention"
    if info["status"] != "complete":
        return f"it is {info['status']}"
    if "batches" in has:
        return "it is a part of a corpus"
    for name, value in wanted.items():
        if has.get(name) != value:
            return f"its {name.replace('_', ' ')} is {has.get(name)!r}, not {value!r}"
    return next((f"it has no {name}" for name in needed if not run.rows(name)), None)
