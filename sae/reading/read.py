"""`read_features`: one pass over the vectors at an autoencoder's site, and what its latents fire on, as rows of the store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from moescope.core.errors import InputError
from moescope.probes.progress import RunProgress
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.trained_with import TrainedWith
from moescope.sae.reading.activations import MOST_TRIPLES, Activations, activations
from moescope.sae.reading.association import Association, associations, sets_of_labels
from moescope.sae.reading.contexts import contexts
from moescope.sae.reading.counting import counted
from moescope.sae.reading.feature_rows import feature_rows
from moescope.sae.reading.labels import Lifts, lifts
from moescope.sae.reading.link_rows import link_rows
from moescope.sae.reading.logit_effects import LogitEffects, checked_top, logit_effects, why_no_logits
from moescope.sae.reading.measure_rows import MEASURES, measure_rows
from moescope.sae.reading.predictability import predictability
from moescope.sae.reading.run_text import RunText
from moescope.sae.reading.sources import check_stored, chosen_text, source_of
from moescope.sae.reading.vocabulary import missing_words
from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

_LINKS = ("cosine", "coactivation", "family", "split")


@dataclass(frozen=True)
class ReadOutcome:
    """What reading the features of an autoencoder gave.

    Attributes:
        sae_id, run_id: of what, on what.
        tokens, documents: that were encoded.
        features: latents that fire somewhere; `dead` those that do not.
        examples: contexts stored.
        rows: table → rows written.
        seconds: all of it.
        notes: what a reader must know.
    """

    sae_id: str
    run_id: str
    tokens: int
    documents: int
    features: int
    dead: int
    examples: int
    rows: Mapping[str, int]
    seconds: float
    notes: tuple[str, ...]


def read_features(
    autoencoder: Autoencoder,
    run: Run,
    store: Store,
    *,
    model: LiveModel | None = None,
    documents: Literal["held_out", "all"] = "held_out",
    top: int = 20,
    strata: int = 5,
    per_stratum: int = 4,
    window: int = 32,
    bins: int = 40,
    logits: int = 15,
    others: Sequence[Autoencoder] = (),
    skip_first: int | None = None,
    most: int = MOST_TRIPLES,
    progress: bool = True,
    seed: int = 0,
) -> ReadOutcome:
    """Read what every latent of an autoencoder fires on, and store it.

    One pass over the vectors that the run kept at the autoencoder's site; with `model`, and where the run kept none of some
    token, over the run's sequences live. Activations are held as triples (token, latent, value), never as a matrix. Where a
    token has several vectors, one for each expert, the largest activation counts.

    Written: `features`, `feature_contexts`, `feature_labels`, `feature_links` (kinds `cosine`, `coactivation`, `family`, and
    with `others` `split`), `sae_measures` (how well simple rules predict each latent, associations between labels), and words
    of `vocabulary` that only logit effects name. What was read of the same autoencoder on the same run before is replaced.

    Args:
        autoencoder: whose latents; anything with its attributes will do.
        run: whose tokens; the run it was trained on, or any other of the model.
        store: open for writing, that holds the run.
        model: for logit effects, and for vectors that the run did not keep.
        documents: `held_out`, those that training left out where the run is that of training, else all; or `all`.
        top: largest activations kept as examples, one a document.
        strata, per_stratum: quantiles of activation, and examples drawn at random from each.
        window: tokens of an example.
        bins: of the histogram.
        logits: token ids kept that a latent raises, and lowers, most.
        others: autoencoders of the same site that neighbours are looked for in.
        skip_first: so many first tokens of each sequence are left out; by default as in training, else 1: the first token of a sequence may
            carry a massive activation. Vectors of a norm that training left out are left out here too.
        most: activations held in memory; with more to come, documents are drawn at random.
        progress: draw a bar on stderr.
        seed: of everything random.

    Returns:
        what was read, in numbers.

    Raises:
        InputError: a number below 1, an autoencoder that is not in the store, no vectors to read, another width.
        StoreError: a shard of vectors is missing or damaged.

    Example:
        >>> import moescope as ms
        >>> from moescope.sae.loading import load_autoencoder
        >>> with ms.Store("runs.duckdb") as store:  # doctest: +SKIP
        ...     read_features(load_autoencoder(store, "topk-512-k16"), store.run("base"), store, model=model)
    """
    _check(top=top, strata=strata, per_stratum=per_stratum, window=window, bins=bins, logits=logits, most=most)
    check_stored(autoencoder, store)
    started = time.perf_counter()
    text = chosen_text(autoencoder, run, documents)
    with RunProgress("reading features", len(text), shown=progress) as bar:
        source, live = source_of(autoencoder, run, model, text)
        passed = _Passed(bar, len(text))
        trained = TrainedWith.of(autoencoder.row)
        first = trained.skip_first if skip_first is None else skip_first
        acts = activations(
            autoencoder, text, source, first_position=first, most_norm=trained.max_norm_ratio, most=most, seed=seed, seen=passed
        )  # fmt: skip
    counts = counted(acts, bins=bins)
    examples = contexts(acts, top=top, strata=strata, per_stratum=per_stratum, window=window, seed=seed)
    found = lifts(acts, seed=seed)
    scores = predictability(acts, seed=seed)
    pairs, families = link_rows(autoencoder, acts, others, seed=seed)
    related = associations(acts, sets_of_labels(found, acts.text.labels), seed=seed) if found is not None else []
    effects, why = _effects(autoencoder, model, acts.text, logits)
    tables: dict[str, pa.Table] = {
        "features": feature_rows(autoencoder, acts, counts, effects),
        "feature_contexts": pa.table(examples.table(acts)),
        "feature_links": pairs,
        "sae_measures": measure_rows(scores, related, families),
    }
    if found is not None:
        tables["feature_labels"] = pa.table(found.table(acts.text.labels))
    owner = {"sae_id": autoencoder.sae_id, "run_id": run.run_id}
    tables = {name: _owned(rows, owner) for name, rows in tables.items()}
    if effects is not None and model is not None:
        tables["vocabulary"] = missing_words(run, model, effects)
    write_rows(store, tables, over=_replaced(owner))
    return ReadOutcome(
        autoencoder.sae_id, run.run_id, acts.tokens, int((acts.tokens_by_document > 0).sum()), int((counts.active > 0).sum()),
        int((counts.active == 0).sum()), len(examples.latent), {name: rows.num_rows for name, rows in tables.items()},
        time.perf_counter() - started, _notes(autoencoder, acts, text, effects, why, live=live, first=first, found=found),
    )  # fmt: skip


def associate_features(
    autoencoder: Autoencoder,
    run: Run,
    store: Store,
    concepts: Mapping[str, Sequence[int]],
    *,
    model: LiveModel | None = None,
    documents: Literal["held_out", "all"] = "held_out",
    window: int = 32,
    progress: bool = True,
    seed: int = 0,
) -> list[Association]:
    """Log-odds that two concepts, each a set of latents, come up in the same window of text; see `associations`.

    Stored in `sae_measures` beside those between labels, which `read_features` writes.

    Args:
        autoencoder, run, store, model, documents: as in `read_features`.
        concepts: name → latents.
        window: tokens of a window.
        progress: draw a bar on stderr.
        seed: of resamples and shifts.

    Raises:
        InputError: fewer than two concepts, or a latent that is not there.
    """
    _check(window=window)
    check_stored(autoencoder, store)
    if len(concepts) < 2:
        raise InputError("an association is between two concepts", found=f"{len(concepts)}", fix="name two or more")
    for name, latents in concepts.items():
        if not latents or not all(0 <= latent < autoencoder.d_sae for latent in latents):
            raise InputError(
                f"concept {name!r} is no set of latents", expected=f"numbers from 0 to {autoencoder.d_sae - 1:,}",
                found=f"{list(latents)[:5]}",
            )  # fmt: skip
    text = chosen_text(autoencoder, run, documents)
    with RunProgress("reading features", len(text), shown=progress) as bar:
        source, _ = source_of(autoencoder, run, model, text)
        trained = TrainedWith.of(autoencoder.row)
        passed = _Passed(bar, len(text))
        acts = activations(
            autoencoder, text, source, first_position=trained.skip_first, most_norm=trained.max_norm_ratio, seed=seed, seen=passed
        )  # fmt: skip
    found = associations(acts, concepts, window=window, seed=seed)
    owner = {"sae_id": autoencoder.sae_id, "run_id": run.run_id}
    over = [("sae_measures", {**owner, "metric": "association", "group_kind": "concepts"})]
    write_rows(store, {"sae_measures": _owned(measure_rows([], found, None, kind="concepts"), owner)}, over=over)
    return found


class _Passed:
    """Moves a bar on by the vectors that were read."""

    def __init__(self, bar: RunProgress, total: int) -> None:
        self._bar, self._total, self._done, self._started = bar, total, 0, time.perf_counter()

    def __call__(self, vectors: int) -> None:
        self._done += vectors
        self._bar.advance_to(min(self._done, self._total), self._done, time.perf_counter() - self._started)


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1", found=str(value))


def _effects(
    autoencoder: Autoencoder, model: LiveModel | None, text: RunText, top: int
) -> tuple[LogitEffects | None, str | None]:
    """Logit effects, or why there are none."""
    why = why_no_logits(autoencoder, model)
    if why is not None or model is None:
        return None, why
    try:
        return logit_effects(autoencoder, model, text, top=checked_top(top, model.anatomy.vocabulary)), None
    except InputError as refused:
        return None, str(refused)


def _owned(rows: pa.Table, owner: Mapping[str, str]) -> pa.Table:
    """Rows with whose and on what they are."""
    for column, value in owner.items():
        rows = rows.append_column(column, pa.array([value] * rows.num_rows, pa.string()))
    return rows


def _replaced(owner: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """What an earlier reading wrote."""
    over: list[tuple[str, dict[str, str]]] = [
        (t, dict(owner)) for t in ("features", "feature_contexts", "feature_labels")
    ]
    over += [("feature_links", {**owner, "kind": kind}) for kind in _LINKS]
    return over + [("sae_measures", {**owner, **match}) for match in MEASURES]


def _notes(
    autoencoder: Autoencoder,
    acts: Activations,
    text: RunText,
    effects: LogitEffects | None,
    why: str | None,
    *,
    live: bool,
    first: int,
    found: Lifts | None,
) -> tuple[str, ...]:
    notes = [f"Tokens before position {first} of their sequence are left out."] if first else []
    if live:
        notes.append("Vectors were read while the model ran over the run's sequences again.")
    if len(acts.text) < len(text):
        notes.append(
            f"{acts.text.documents:,} of {text.documents:,} documents, drawn at random: activations of all are more than memory shall hold."
        )
    if (ratio := TrainedWith.of(autoencoder.row).max_norm_ratio) is not None:
        notes.append(f"As in training, vectors of more than {ratio:g} times the median norm are left out.")
    missing = int((~acts.encoded & (acts.text.position >= first)).sum())
    if missing:
        notes.append(
            f"{missing:,} of {len(acts.text):,} tokens have no vector; in windows they are shown without an activation."
        )
    if effects is None:
        notes.append(f"No logit effects: {why}.")
    notes += list(effects.notes) if effects is not None else []
    if found is None:
        notes.append("No lift of labels: fewer than two labels are on the documents read.")
    return tuple(notes)
