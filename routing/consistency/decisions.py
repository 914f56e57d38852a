"""What the kernels read of a trace: decisions without repeats, which tokens count where, and shuffled orders of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moescope.routing.trace import Router, Trace

T = TypeVar("T")
S = TypeVar("S")
Longs = NDArray[np.int64]

# Kernels release the interpreter lock; more threads than this gain little, memory traffic being the limit.
_THREADS = 2


@dataclass(frozen=True)
class Parts:
    """How sequences, or tokens, fall into parts that are reported apart, and into rows: one for each document in each part.

    Attributes:
        row: [sequence or token] its row, −1 where it belongs to no part.
        part: [row] index into `names`.
        names: of the parts; one None where the run is taken whole.
    """

    row: Longs
    part: Longs
    names: tuple[str | None, ...]

    @property
    def of_each(self) -> Longs:
        """[sequence or token] its part, −1 for none."""
        return np.where(self.row < 0, -1, self.part[self.row])

    def of_sequences(self, kept: NDArray[np.bool_]) -> Parts:
        """The same parts of fewer sequences, with rows for their documents only."""
        rows, row = np.unique(np.where(kept, self.row, -1), return_inverse=True)
        missing = int(len(rows) > 0 and rows[0] < 0)
        return Parts(row.astype(np.int64) - missing, self.part[rows[missing:]], self.names)


def whole_run(trace: Trace) -> Parts:
    """One part, a row a document."""
    return Parts(trace.documents.astype(np.int64), np.zeros(trace.n_documents, np.int64), (None,))


def parts_by_label(trace: Trace) -> Parts:
    """A part for every label; raises `InputError` where there is none."""
    trace.require_labels()
    return _numbered(trace.documents, trace.labels.astype(np.int64), trace.label_names)


def tokens_by_phase(trace: Trace) -> Parts:
    """Tokens by whether they were read or generated."""
    return _numbered(trace.document, trace.decode.astype(np.int64), ("prefill", "decode"))


def by_token(trace: Trace, parts: Parts) -> Parts:
    """Parts of sequences as parts of their tokens."""
    return Parts(parts.row[trace.sequence], parts.part, parts.names)


def _numbered(documents: NDArray[np.int32], part: Longs, names: tuple[str, ...]) -> Parts:
    wide = int(documents.max(initial=0)) + 1
    keys, row = np.unique(np.where(part < 0, -1, part * wide + documents), return_inverse=True)
    missing = int(len(keys) > 0 and keys[0] < 0)
    return Parts(row.astype(np.int64) - missing, keys[missing:] // wide, names)


def without_repeats(trace: Trace) -> tuple[list[NDArray[np.uint16]], tuple[str, ...]]:
    """Decisions of each router with an expert named twice by a token counted once, and the note that says so."""
    from moescope.routing.consistency.window_kernels import mark_repeats

    marked = in_threads(lambda router: mark_repeats(router.experts, router.n_experts), trace.routers)
    repeats = sum(count for _, count in marked)
    note = f"{repeats:,} decisions name an expert that the token has already chosen; it counts once."
    return [experts for experts, _ in marked], (note,) if repeats else ()


def in_threads(work: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """`work` of every item, in order, on two threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def chance(router: Router) -> float:
    """k ÷ E: how often a router without preference chooses a given expert."""
    return router.top_k / router.n_experts


@dataclass(frozen=True)
class Shuffle:
    """A control that keeps loads and breaks the order of tokens.

    Attributes:
        column: of the result's table.
        name: in words, for legends and notes.
        keeps: what is left of the order: None, "label" or "sequence".
    """

    column: str
    name: str
    keeps: str | None

    def order(self, trace: Trace, kept: NDArray[np.bool_], generator: np.random.Generator) -> Longs:
        """[token] which token to read at each place: those of `kept` [sequence] change places among themselves."""
        order = np.arange(trace.tokens, dtype=np.int64)
        places = np.flatnonzero(kept[trace.sequence])
        if self.keeps is None:
            order[places] = generator.permutation(places)
            return order
        group = (trace.sequence if self.keeps == "sequence" else trace.label)[places]
        mixed = generator.permutation(len(places))
        order[places[np.argsort(group, kind="stable")]] = places[mixed[np.argsort(group[mixed], kind="stable")]]
        return order


SHUFFLES = (
    Shuffle("null_shuffled", "tokens shuffled over the run", None),
    Shuffle("null_shuffled_in_label", "tokens shuffled within labels", "label"),
    Shuffle("null_shuffled_in_sequence", "tokens shuffled within sequences", "sequence"),
)


def shuffles_for(trace: Trace, times: int) -> tuple[Shuffle, ...]:
    """The controls a run allows: without labels there is no shuffle within them; none where `times` is 0."""
    return tuple(s for s in SHUFFLES if times and (s.keeps != "label" or trace.label_names))


def missing_controls(trace: Trace, times: int) -> tuple[str, ...]:
    """The note for a reader who would look for them."""
    if not times:
        return ("Shuffles are left out, as asked.",)
    return () if trace.label_names else ("Documents have no labels, so there is no shuffle within labels.",)


def shuffle_seeds(times: int, seed: int, *where: int) -> list[np.random.Generator]:
    """A generator for each shuffle, the same for the same seed and place."""
    return [np.random.default_rng([seed, number, *where]) for number in range(times)]


def numbers(text: str, name: str) -> list[int]:
    """Whole numbers of at least 1 in "4,16,64", ascending; raises `InputError` naming the parameter."""
    from moescope.core.errors import InputError

    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < 1:
        raise InputError(
            f"parameter {name!r} cannot be {text!r}", expected='whole numbers of at least 1, such as "4,16,64,256"'
        )
    return values


def spread(values: Iterable[Any]) -> str:
    """Numbers as a list for a note: "4, 16 and 64"."""
    listed = [str(value) for value in values]
    return " and ".join(filter(None, [", ".join(listed[:-1]), *listed[-1:]]))
