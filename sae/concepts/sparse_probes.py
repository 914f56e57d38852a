"""Sparse probes: how few units tell a concept, with one interface over neurons, latents, experts and router logits."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.sae.concepts.concept import Concept, read_concepts
from moescope.sae.concepts.counting import counted
from moescope.sae.concepts.document_split import documents_tested, untrained
from moescope.sae.concepts.probe_fitting import PERMUTED, ROTATED, Probed, Split, permuted, probe_concept, split_units
from moescope.sae.concepts.probe_scores import interval
from moescope.sae.concepts.ranking import RANKINGS, Ranking
from moescope.sae.concepts.token_table import read_tokens
from moescope.sae.concepts.unit_reading import Budget, read_units
from moescope.sae.concepts.units import UnitKind, Units
from moescope.store.sae_rows import write_rows

if TYPE_CHECKING:
    from moescope.sae.autoencoder import Autoencoder
    from moescope.store.run import Run
    from moescope.store.store import Store

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ENOUGH = 0.95  # share of the dense probe's F1 at which a sparse one counts as enough
_DOCUMENTS = " (whole documents)"


@dataclass(frozen=True)
class SparseProbes:
    """What was measured and stored.

    Attributes:
        run: name of the run.
        unit_kind, site: what was read, and where.
        sae_id: of the autoencoder, for latents.
        units: how many there are.
        concepts: those probed.
        skipped: concept → why it was not.
        rows: as they lie in `sparse_probes`.
        train, test: rows (tokens or documents) of either part; test_documents: documents tested on.
        notes: what a reader must know besides.
    """

    run: str
    unit_kind: UnitKind
    site: str
    sae_id: str | None
    units: int
    concepts: tuple[str, ...]
    skipped: dict[str, str]
    rows: tuple[dict[str, Any], ...]
    train: int
    test: int
    test_documents: int
    notes: tuple[str, ...] = ()


def sparse_probes(
    run: Run,
    store: Store,
    *,
    units: UnitKind = "neuron",
    site: str | None = None,
    sae: Autoencoder | None = None,
    concepts: Sequence[str | Concept] | None = None,
    level: Literal["token", "document"] = "token",
    ranking: Ranking | Sequence[Ranking] = "mean_difference",
    k: int | Sequence[int] = KS,
    values: Literal["chosen", "weight"] = "chosen",
    dense: bool = True,
    train_share: float = 0.7,
    tokens: int = 10_000,
    skip_first: int = 1,
    least: int = 10,
    controls: int = 3,
    draws: int = 500,
    memory: int = 1 << 29,
    seed: int = 0,
    progress: bool = True,
) -> SparseProbes:
    """Probe for concepts with few units, and store how well each probe does on documents it has not seen.

    Units are ranked on the training documents, and a logistic regression (L2, scikit-learn's C = 1, both classes weighted
    alike) is fitted on the first k of them, standardised (Gurnee et al. 2023, arXiv 2305.01610). Tested on other documents:
    F1, precision, recall, MCC, AUC and log loss at equal weight of the classes, each with a bootstrap interval over
    documents, beside two nulls: the same with the concept's labels permuted (ranking and fit included), and k random units
    of the kind. k = 0 is the dense probe of all units, its penalty chosen on training documents kept back. `sparsity` is the
    smallest k that reaches 95 % of the dense probe's F1; without a row where none does. k = 1 on experts maps a concept to
    an expert.

    Args:
        run: the run whose tokens are looked at.
        store: where rows go, over those of the same units, concept and ranking.
        units: `neuron`: of the vectors recorded at `site` (`….mlp.hook_post`; `….mlp.experts.hook_post`, where neuron i of
            expert e has number e · d_expert + i and is 0 on tokens that do not choose e; components of any other site);
            `latent`: of `sae`, on the vectors recorded at its site; `expert`: those chosen, from the table `routing`;
            `router_logit`: from the table `router_logits`.
        site: where; for experts and logits `blocks.L.mlp.…` for one router, None for all.
        sae: the autoencoder of the latents. With other units: its test documents are taken, to compare like with like.
        concepts: labels, `class: word`, `next class: word`, or `Concept` objects; None for every label of the corpus.
        level: probe tokens, or documents by the mean over their tokens.
        ranking: one or several; see `moescope.sae.concepts.ranking.rank_units`.
        k: units a probe may read.
        values: for experts, 1 where chosen or the weight it was given.
        dense: fit the dense probe.
        train_share: of the documents (of each label). An autoencoder that was trained on this run is tested on the
            documents it was not trained on, and no others.
        tokens: read at most, those of smallest hash.
        skip_first: leave so many first positions of every sequence out, whose activations may be massive. Special tokens are too.
        least: tokens of a concept, and of its contrary, that either part must have; always of two documents or more.
        controls: permutations, and draws of random units.
        draws: bootstrap resamples of the test documents.
        memory: bytes that the units' values may take; fewer tokens are read where they would take more.
        seed: of everything random.
        progress: draw a bar on stderr.

    Raises:
        InputError: nothing was recorded there, no concept can be probed, or a value makes no sense.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> texts = [{"text": t, "label": l} for t, l in [("one two three", "en"), ("1 2 3 4 5", "digits")] * 6]
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), texts, store, name="first", progress=False)
        ...     found = sparse_probes(run, store, units="expert", k=1, least=2, draws=50, progress=False)
        ...     found.concepts
        ('digits', 'en')
    """
    rankings, ks = _checked(
        ranking, k, tokens=tokens, least=least, draws=draws, skip_first=skip_first, controls=controls
    )
    table = read_tokens(run)
    table = table.rows((table.position >= skip_first) & ~table.special)
    asked = read_concepts(concepts, table)
    if level == "document" and (wrong := [one.name for one in asked if not one.of_documents]):
        raise InputError(
            f"concept {wrong[0]!r} is of tokens, not of documents", fix="probe tokens, or a label of the corpus"
        )
    read = read_units(run, table, units, site=site, sae=sae, values=values, budget=Budget(tokens, memory, seed))
    read = read.by_document() if level == "document" else read
    tested = documents_tested(read.tokens, train_share=train_share, seed=seed, only=untrained(run, sae, read.tokens))
    split = split_units(read, tested)
    if not split.alive.any():
        raise InputError(f"no unit at {read.site} varies over the training documents", fix="record more text")
    ready, skipped = _ready(asked, split, least if level == "token" else 2)
    fitting = [one for one in ks if one <= split.alive.sum()] or [int(split.alive.sum())]
    rows: list[dict[str, Any]] = []
    over = []
    with counted("probes", len(ready), shown=progress) as count:
        for number, (concept, y) in enumerate(ready):
            random = np.random.default_rng([seed, number])
            nulls = permuted(y, split, of_documents=concept.of_documents, draws=controls, random=random)
            found = list(
                probe_concept(
                    split, y, nulls, rankings=rankings, ks=fitting, dense=dense, draws=draws, seed=seed,
                    null_kind=PERMUTED if concept.of_documents else ROTATED,
                )
            )  # fmt: skip
            name = concept.name + (_DOCUMENTS if level == "document" else "")
            rows += _rows(run, read, name, found, int((~split.train).sum()))
            over += [_key(run, read, name, one) for one in ("all", *rankings)]
            count()
    write_rows(store, {"sparse_probes": rows}, over=[("sparse_probes", one) for one in over])
    return SparseProbes(
        run.name, read.kind, read.site, read.sae_id, read.width, tuple(concept.name for concept, _ in ready), skipped,
        tuple(rows), int(split.train.sum()), int((~split.train).sum()), len(np.unique(split.test_documents)),
        (*read.notes, *(f"{name} is left out: {why}." for name, why in skipped.items())),
    )  # fmt: skip


def _checked(
    ranking: Ranking | Sequence[Ranking], k: int | Sequence[int], **counts: int
) -> tuple[list[Ranking], list[int]]:
    rankings = [ranking] if isinstance(ranking, str) else list(ranking)
    if not rankings or (unknown := [one for one in rankings if one not in RANKINGS]):
        raise InputError(
            f"there is no ranking {unknown[0]!r}" if rankings else "no ranking is given", expected=", ".join(RANKINGS)
        )
    ks = sorted({int(one) for one in ([k] if isinstance(k, int) else k)})
    if not ks or ks[0] < 1:
        raise InputError("k counts units", expected="whole numbers from 1 on", found=f"{k!r}")
    lowest = {"tokens": 4, "least": 2, "draws": 2, "skip_first": 0, "controls": 1}
    for name, value in counts.items():
        if value < lowest[name]:
            raise InputError(f"{name} cannot be {value}", expected=f"{lowest[name]} or more")
    return rankings, ks


def _ready(
    asked: list[Concept], split: Split, least: int
) -> tuple[list[tuple[Concept, NDArray[np.bool_]]], dict[str, str]]:
    """Concepts with enough rows on either side, and why the others are left out."""
    ready, skipped = [], {}
    for concept in asked:
        y = concept.on(split.units.tokens)
        if reason := _too_few(y, split, least):
            skipped[concept.name] = reason
        else:
            ready.append((concept, y))
    if not ready:
        name, reason = next(iter(skipped.items()))
        raise InputError(
            "no concept has enough tokens to be probed for",
            found=f"{name}: {reason}",
            fix="record more text, read more tokens, or lower least",
        )
    return ready, skipped


def _too_few(y: NDArray[np.bool_], split: Split, least: int) -> str | None:
    document = split.units.tokens.document
    for part, rows in (("training", split.train), ("test", ~split.train)):
        for what, side in (("with it", y & rows), ("without it", ~y & rows)):
            documents = len(np.unique(document[side]))
            if side.sum() < least or documents < 2:
                return f"{int(side.sum()):,} rows of {documents} documents {what} in the {part} part"
    return None


def _key(run: Run, units: Units, concept: str, ranking: str) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "sae_id": units.sae_id,
        "unit_kind": units.kind,
        "site": units.site,
        "concept": concept,
        "ranking": ranking,
    }


def _rows(run: Run, units: Units, concept: str, found: list[Probed], n: int) -> list[dict[str, Any]]:
    rows = []
    whole = next((float(one.metrics["F1"][0]) for one in found if one.k == 0), None)
    enough: set[str] = set()
    for one in sorted(found, key=lambda probe: probe.k):
        base = _key(run, units, concept, one.ranking) | {
            "probe_id": str(uuid.uuid4()), "k": one.k, "n": n,
            "units": one.units.tolist(), "coefficients": one.coefficients.astype(float).tolist(),
        }  # fmt: skip
        for metric, values in one.metrics.items():
            low, high = interval(values)
            measured = {"metric": metric, "value": float(values[0]), "ci_low": low, "ci_high": high}
            for null_kind, null in one.nulls.items():
                value = null.get(metric, math.nan)
                rows.append(
                    base | measured | {"null_kind": null_kind, "null_value": value if math.isfinite(value) else None}
                )
        if one.k and whole is not None and one.ranking not in enough and one.metrics["F1"][0] >= ENOUGH * whole:
            enough.add(one.ranking)
            rows.append(base | {"metric": "sparsity", "value": float(one.k)})
    return rows
