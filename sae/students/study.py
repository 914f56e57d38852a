"""How well sparse mixtures of experts imitate a dense MLP, on what it is really given and on Gaussian inputs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.probes.live_model import LiveModel
from moescope.probes.progress import RunProgress
from moescope.sae.students.fitting import Fitted, Parts, fit, linear_map, mean_output, spread_of
from moescope.sae.students.gaussian import gaussian_like, moments
from moescope.sae.students.measures import Units
from moescope.sae.students.networks import ACTIVATIONS, dense_neurons
from moescope.sae.students.student_rows import Asked, Inputs, Scored, StudentKind, StudentRow, rows_of
from moescope.sae.students.teacher import Pairs, Teacher
from moescope.sae.ticker import ticker
from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from moescope.sae.autoencoder import Autoencoder

_DRAWS = 1000
_CHARACTERS, _DOCUMENTS = (
    8,
    50,
)  # of a corpus, for each vector wanted; documents, at least


@dataclass(frozen=True)
class StudentsOutcome:
    """What students of an MLP reached.

    Attributes:
        run: whose tokens the real inputs are of.
        layer, block: the MLP.
        teacher_parameters: those of it that work on a token.
        rows: every number.
        seconds: how long it took.
    """

    run: Run
    layer: int
    block: str
    teacher_parameters: int
    rows: tuple[StudentRow, ...]
    seconds: float = field(compare=False)

    def df(self) -> pd.DataFrame:
        """One row a number: student, inputs, experts, active, share, router_rank, metric, value, ci_low, ci_high, n."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows]).drop(columns="settings")


def mlp_students(
    model: LiveModel,
    run: Any,
    store: Store,
    *,
    layer: int,
    block: str = "mlp",
    students: Sequence[StudentKind] = ("moe", "moe_low_rank", "dense", "linear", "mean"),
    active: Sequence[int] = (16, 64),
    experts: int = 512,
    router_rank: int = 32,
    inputs: Sequence[Inputs] = ("real", "gaussian"),
    vectors: int = 16_384,
    skip_first: int = 4,
    steps: int = 400,
    batch: int = 256,
    lrs: Sequence[float] = (3e-3, 1e-2),
    seeds: int = 1,
    activation: str = "gelu",
    sae: Autoencoder | None = None,
    seed: int = 0,
    progress: bool = True,
) -> StudentsOutcome:
    """Does a sparse mixture of single-neuron experts imitate this MLP better than a dense one with as many active neurons?

    Students learn MLP(x) from x. `dense` has h neurons. `moe` has h/2 neurons that are always on and h/2 chosen from `experts`
    single-neuron experts by a linear router, with a softmax over the chosen; the router of `moe_low_rank` has low rank. Every
    student's FVU is Σ‖MLP(x) − student(x)‖² ÷ Σ‖MLP(x) − mean‖² over held-out vectors: of documents that no student saw, or fresh
    Gaussian draws. The claim tested: the mixture is ahead for real inputs and not for Gaussian ones of the same mean and
    covariance, so that what it uses is in the data and not in the MLP.

    Traps. Equal active neurons, as published, are not equal active parameters: a full router multiplies each input with a row for
    every expert. So beside every mixture a dense student is trained that has as many parameters as the mixture has active ones,
    router included (`gain_equal_share`). Students are plain neurons, also where the MLP is gated. The rate is the best on a
    validation part of its own. No loss balances the experts; `experts_used` says how many are ever chosen.

    Rows of `mlp_students`, over those of the same run, layer and block: `fvu` for every student; for mixtures `gain` (FVU of the
    dense student with as many active neurons, less the mixture's), `gain_equal_share`, `experts_used`; with inputs `gaussian −
    real` the difference of FVU, and of gain; with `sae` `nmi` and `nmi_shuffled` of a token's first expert and largest latent.
    Intervals resample documents (vectors, for Gaussian inputs) and, with several, seeds of training; differences are paired.

    Args:
        model: the live model.
        run: a run of this model with tokens, or a corpus, of which as many documents as are needed are then recorded (token ids alone).
        store: where to keep the rows; None of them is kept where anything fails.
        layer, block: which MLP; of a mixture of experts, the whole of it.
        students: kinds to train.
        active: h, neurons at work on a token.
        experts: single-neuron experts to choose from.
        router_rank: of `moe_low_rank`.
        inputs: `real`, `gaussian` or both.
        vectors: pairs of input and output; 70 % train, 10 % choose the rate, 20 % test, by document.
        skip_first: positions left out at the start of every sequence, where massive activations stand that would be all of the variance.
        steps, batch, lrs: of training; every rate is tried.
        seeds: students of each kind, with seeds of their own.
        activation: of the students' neurons, `gelu` or `relu`.
        sae: an autoencoder at a site of the same tokens, for the agreement of its largest latent with the first expert.
        seed: of everything random.
        progress: show a bar.

    Returns:
        Every number; the analysis `mlp_students` tells and draws them.

    Raises:
        InputError: no such MLP, numbers out of range, too few documents to hold some out.
        RunError: outputs that are not finite, or no rate with a finite loss.

    Source: arXiv 2512.18452 and its released code.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = mlp_students(ms.load("demo"), ms.Corpus.load("demo"), store, layer=5, students=("linear", "mean"),
        ...                          inputs=("real",), vectors=1000, progress=False)
        ...     found.df().groupby("student")["value"].mean().round().tolist()[1]
        1.0
    """
    _check(students, active, experts, router_rank, inputs, vectors, steps, batch, lrs, seeds, activation)
    started = time.perf_counter()
    teacher = Teacher(model, layer, block)
    recorded = _run_of(model, run, store, vectors, progress=progress)
    also = None if sae is None else sae.site
    pairs = teacher.pairs(recorded, vectors=vectors, skip=skip_first, also=also, seed=seed, progress=progress)
    kinds = [kind for kind in get_args(StudentKind) if kind in students]
    asked = list(_asked(kinds, active, experts, router_rank, pairs))
    told = {
        "steps": steps, "batch": batch, "lrs": list(lrs), "seeds": seeds, "activation": activation, "skip_first": skip_first, "seed": seed,
        "vectors": len(pairs), "documents": len(np.unique(pairs.document)), "teacher_parameters": teacher.parameters,
    }  # fmt: skip
    runs_of_each = len(lrs) + seeds - 1
    work = steps * min(batch, len(pairs)) * runs_of_each * len(asked) * len(inputs)
    done: dict[str, list[Scored]] = {}
    with RunProgress("students", work, shown=progress) as bar:
        tick = ticker(bar)
        for kind in inputs:
            parts, unit, test = _parts(pairs, teacher, kind, seed)
            units = Units.of(unit, spread_of(parts), draws=_DRAWS, seed=seed)
            fitted: list[tuple[Asked, Fitted]] = []
            for one in asked:
                make = one.make(parts.train[0].shape[1], parts.train[1].shape[1], activation)
                over = range(seed, seed + seeds)
                fitted.append((one, fit(make, parts, rates=lrs, steps=steps, batch=batch, seeds=over, tick=tick)))
            fitted += [(Asked("linear", 0), linear_map(parts))] if "linear" in kinds else []
            fitted += [(Asked("mean", 0), mean_output(parts))] if "mean" in kinds else []
            done[kind] = [
                Scored(one, found, units.fvu(found.errors, seed=seed), parts, units, test) for one, found in fitted
            ]
    rows = [replace(row, settings=told | row.settings) for row in rows_of(done, teacher, sae, seed)]
    outcome = StudentsOutcome(recorded, layer, block, teacher.parameters, tuple(rows), time.perf_counter() - started)
    _store(outcome, store)
    return outcome


def _asked(
    kinds: Sequence[StudentKind], active: Sequence[int], experts: int, rank: int, pairs: Pairs
) -> Iterator[Asked]:
    """Students to train; beside every mixture the dense one of as many parameters."""
    width_in, width_out = pairs.x.shape[1], pairs.y.shape[1]
    dense = set(active) if "dense" in kinds else set()
    mixtures = [
        Asked(kind, h, experts, rank if kind == "moe_low_rank" else None)
        for kind in kinds
        if kind in ("moe", "moe_low_rank")
        for h in active
    ]
    if "dense" in kinds:
        for one in mixtures:
            dense.add(_equal_dense(one, width_in, width_out))
    yield from mixtures
    yield from (Asked("dense", h) for h in sorted(dense))


def _equal_dense(one: Asked, width_in: int, width_out: int) -> int:
    """Neurons of the dense student with as many parameters as a mixture has active ones."""
    router = (one.experts or 0) * width_in if one.rank is None else one.rank * (width_in + (one.experts or 0))
    own = one.active * (width_in + width_out + 1) + width_out
    return dense_neurons(own + router, width_in, width_out)


def _parts(pairs: Pairs, teacher: Teacher, inputs: Inputs, seed: int) -> tuple[Parts, NDArray[np.int64], Pairs | None]:
    """Train, validation and test; the unit that each test vector is resampled with; the test part's pairs where they are real."""
    validation, test = _held_out(pairs.document, seed)
    train = ~(validation | test)
    masks = (train, validation, test)
    if inputs == "real":
        parts = [pairs.at(mask) for mask in masks]
        return Parts.of(*((p.x, p.y) for p in parts)), parts[2].document, parts[2]
    mean, covariance = moments(pairs.x[torch.from_numpy(train)])
    drawn = [gaussian_like(mean, covariance, int(m.sum()), seed=seed + n) for n, m in enumerate(masks)]
    made = [(x, teacher(x)) for x in drawn]
    return Parts.of(made[0], made[1], made[2]), np.arange(len(drawn[2])), None


def _held_out(document: NDArray[np.int64], seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[vector] which are of the validation and test documents: a tenth and a fifth of the documents, at least one and two."""
    names = np.unique(document)
    if len(names) < 5:
        raise InputError(
            "there are too few documents to hold some out",
            expected="at least 5",
            found=str(len(names)),
            fix="use more or shorter documents, or raise vectors",
        )
    order = np.random.default_rng(seed).permutation(names)
    test, validation = max(2, round(0.2 * len(names))), max(1, round(0.1 * len(names)))
    return np.isin(document, order[test : test + validation]), np.isin(document, order[:test])


def _run_of(model: LiveModel, run: Any, store: Store, vectors: int, *, progress: bool) -> Run:
    """The run itself, or one of the tokens of as many of the corpus's documents, evenly spread, as are needed."""
    if isinstance(run, Run):
        return run
    from moescope.probes.corpus import Corpus
    from moescope.probes.record import record

    corpus = Corpus.load(run)
    facts = corpus.facts()
    share = min(1.0, max(_CHARACTERS * vectors / facts.characters, _DOCUMENTS / facts.documents))
    picked = [d for n, d in enumerate(corpus) if int((n + 1) * share) > int(n * share)]
    if share < 1:
        ids = all(d.token_ids is not None for d in picked)
        fields = [{"token_ids": d.token_ids} if ids else {"text": d.text} for d in picked]
        corpus = Corpus.load([f | {"label": d.label} for f, d in zip(fields, picked, strict=True)])
    names = {known.name for known in store.runs()}
    name = next(n for n in ("mlp inputs", *(f"mlp inputs {i}" for i in range(2, 10_000))) if n not in names)
    return record(model, corpus, store, name=name, probes=("tokens",), max_length=256, stop_after=0, progress=progress)


def _store(outcome: StudentsOutcome, store: Store) -> None:
    place = {"run_id": outcome.run.run_id, "layer": outcome.layer, "block": outcome.block}
    rows = [place | vars(row) | {"settings": json.dumps(row.settings)} for row in outcome.rows]
    write_rows(store, {"mlp_students": rows}, over=[("mlp_students", place)])


def _check(
    students: Sequence[str], active: Sequence[int], experts: int, rank: int, inputs: Sequence[str], vectors: int,
    steps: int, batch: int, lrs: Sequence[float], seeds: int, activation: str,
) -> None:  # fmt: skip
    """Refuse what cannot be trained, before anything runs."""
    for name, given, known in (
        ("students", students, get_args(StudentKind)),
        ("inputs", inputs, get_args(Inputs)),
        ("activation", [activation], tuple(ACTIVATIONS)),
    ):
        if not given or (wrong := sorted(set(given) - set(known))):
            found = "none" if not given else repr(wrong[0])
            raise InputError(f"{name} cannot be {found}", expected=", ".join(known))
    for name, value in (("steps", steps), ("batch", batch), ("seeds", seeds), ("router_rank", rank)):
        if value < 1:
            raise InputError(f"{name} cannot be {value}", expected="a whole number, at least 1")
    if not active or min(active) < 2 or max(active) - max(active) // 2 > experts:
        raise InputError(
            "active neurons and experts do not go together",
            expected=f"2 to {2 * experts} active neurons for {experts} experts, half of them chosen",
            found=", ".join(map(str, active)) or "none",
        )
    if not lrs or not all(0 < rate < 1 for rate in lrs):
        raise InputError("lrs cannot be used", expected="learning rates between 0 and 1", found=str(list(lrs)))
    if vectors < 64:
        raise InputError(f"vectors cannot be {vectors}", expected="at least 64")
