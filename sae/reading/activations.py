"""`Activations`: where the latents of an autoencoder fire on the tokens of a run, as triples that take memory for what fires only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.reading.run_text import Ints, RunText
from moescope.sae.reading.vectors import Piece

# Triples that are held at once, at 8 bytes each and as much again while they are sorted.
MOST_TRIPLES = 80_000_000
_AT_ONCE = 1 << 24  # activations of one piece, dense


@dataclass(frozen=True)
class Segments:
    """Latent by latent, the documents in which it fires.

    Attributes:
        starts: [segment + 1] where each begins among the triples.
        latent, document: [segment], ascending.
    """

    starts: Ints
    latent: NDArray[np.int32]
    document: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def counts(self) -> Ints:
        """[segment] tokens of the document on which the latent fires."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Activations:
    """Activations over 0, latent after latent, and in each by the order of the text.

    Attributes:
        text: the tokens.
        encoded: [token] whether its vector was encoded.
        starts: [latent + 1] where each latent's triples begin.
        place: [triple] where the token stands in `text`.
        value: [triple] the activation.
    """

    text: RunText
    encoded: NDArray[np.bool_]
    starts: Ints
    place: NDArray[np.int32]
    value: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.place)

    @property
    def latents(self) -> int:
        """How many latents the autoencoder has."""
        return len(self.starts) - 1

    @property
    def counts(self) -> Ints:
        """[latent] tokens on which it is over 0."""
        return np.diff(self.starts)

    @cached_property
    def tokens(self) -> int:
        """Tokens that were encoded."""
        return int(self.encoded.sum())

    @cached_property
    def tokens_by_document(self) -> Ints:
        """[document] tokens that were encoded."""
        found: Ints = np.bincount(self.text.document[self.encoded], minlength=self.text.documents).astype(np.int64)
        return found

    @cached_property
    def latent(self) -> NDArray[np.int32]:
        """[triple] the latent."""
        return np.repeat(np.arange(self.latents, dtype=np.int32), self.counts)

    @cached_property
    def segments(self) -> Segments:
        """The triples cut wherever latent or document changes."""
        document, latent = self.text.document[self.place], self.latent
        new = np.ones(len(self), bool)
        new[1:] = (latent[1:] != latent[:-1]) | (document[1:] != document[:-1])
        first = np.flatnonzero(new)
        return Segments(np.concatenate([first, [len(self)]]).astype(np.int64), latent[first], document[first])

    def of(self, latent: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Places and activations of one latent."""
        mine = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
        return self.place[mine], self.value[mine]

    def by_document(self, latents: slice) -> NDArray[np.float32]:
        """[latent, document] tokens on which each of some latents fires."""
        s, first, last = self.segments, latents.start, min(latents.stop, self.latents)
        mine = slice(*np.searchsorted(s.latent, [first, last]))
        dense = np.zeros((last - first, self.text.documents), np.float32)
        dense[s.latent[mine] - first, s.document[mine]] = s.counts[mine]
        return dense

    def moved(self, place: NDArray[np.integer[Any]]) -> Activations:
        """The same activations on other tokens, `place` [triple], which must differ within each latent."""
        order = np.lexsort((place, self.latent))
        return Activations(self.text, self.encoded, self.starts, place[order].astype(np.int32), self.value[order])


def activations(
    autoencoder: Autoencoder,
    text: RunText,
    pieces: Callable[[RunText], Iterable[Piece]],
    *,
    first_position: int = 1,
    most_norm: float | None = None,
    most: int = MOST_TRIPLES,
    seed: int = 0,
    seen: Callable[[int], None] = lambda _: None,
) -> Activations:
    """Encode vectors piece by piece and keep what is over 0. Where a token has several vectors (slots), the largest counts.

    Args:
        autoencoder: whose latents.
        text: the tokens.
        pieces: text → vectors with the places of their tokens; called again with fewer documents where memory bids it.
        first_position: tokens before this one of their sequence are left out.
        most_norm: vectors of more than so many times the median norm (of the first piece) are left out; None for none.
        most: triples to hold; with more to come, documents are drawn at random so that these suffice.
        seed: of that draw.
        seen: told how many vectors a piece had.

    Raises:
        InputError: no vector of these documents.
    """
    usual = _Usual(first_position, most_norm)
    gathered = _gathered(autoencoder, text, pieces, usual, most, seen)
    if isinstance(gathered, float):
        text = _affordable(text, gathered, seed)
        gathered = _gathered(autoencoder, text, pieces, usual, 2 * most, seen)
    if isinstance(gathered, float):
        raise InputError(
            f"{autoencoder.name} has more activations over 0 than can be held", expected=f"{most:,} at most"
        )
    encoded, latent, place, value = gathered
    if not encoded.any():
        raise InputError(
            f"there are no vectors at {autoencoder.site} of these documents",
            expected=f"some from position {first_position} on",
            fix="read all documents (documents='all', --documents all), or pass the model",
        )
    order = np.argsort(latent.astype(np.int64) * len(text) + place, kind="stable")
    latent, place, value = latent[order], place[order], value[order]
    new = np.ones(len(latent), bool)
    new[1:] = (latent[1:] != latent[:-1]) | (place[1:] != place[:-1])
    if not new.all():
        first = np.flatnonzero(new)
        latent, place, value = latent[first], place[first], np.maximum.reduceat(value, first)
    starts = np.searchsorted(latent, np.arange(autoencoder.d_sae + 1))
    return Activations(text, encoded, starts.astype(np.int64), place, value)


class _Usual:
    """Which vectors count: not those of first tokens, and not those that are far too long."""

    def __init__(self, first_position: int, most_norm: float | None) -> None:
        self._first, self._ratio, self._most = first_position, most_norm, None if most_norm is None else -1.0

    def __call__(self, vectors: torch.Tensor, position: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """[row] whether each counts."""
        kept = position >= self._first
        if self._ratio is None or self._most is None or not kept.any():
            return kept
        norm = vectors.norm(dim=-1).numpy()
        if self._most < 0:
            self._most = self._ratio * float(np.median(norm[kept]))
        found: NDArray[np.bool_] = kept & (norm <= self._most)
        return found


def _gathered(
    autoencoder: Autoencoder,
    text: RunText,
    pieces: Callable[[RunText], Iterable[Piece]],
    usual: _Usual,
    most: int,
    seen: Callable[[int], None],
) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]] | float:
    """Encoded tokens, latent, place and value of all triples; or, once there are too many, the share of the text they fit."""
    encoded = np.zeros(len(text), bool)
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = []
    held = 0
    for whole, places in pieces(text):
        kept = usual(whole, text.position[places])
        if text.special is not None:
            kept &= ~text.special[places]  # training leaves them out too
        vectors, place = whole[torch.from_numpy(kept)], places[kept]
        encoded[place] = True
        for latent, row, value in _triples(autoencoder, vectors):
            parts.append((latent, place[row].astype(np.int32), value))
            held += len(value)
        if held > most:
            return max(float(encoded.sum()) / len(text) * most / held * 0.9, 1e-6)
        seen(len(kept))
    if not parts:
        return encoded, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    latents, rows, values = zip(*parts, strict=True)
    return encoded, np.concatenate(latents), np.concatenate(rows), np.concatenate(values)


def _triples(
    autoencoder: Autoencoder, vectors: torch.Tensor
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]]]:
    """Latent, row and value of what is over 0."""
    rows = max(1, _AT_ONCE // autoencoder.d_sae)
    for start in range(0, len(vectors), rows):
        found = autoencoder.encode(vectors[start : start + rows].to(autoencoder.device)).cpu()
        over = (found > 0).nonzero()
        value = found[over[:, 0], over[:, 1]]
        yield over[:, 1].numpy().astype(np.int32), over[:, 0].numpy() + start, value.numpy()


def _affordable(text: RunText, share: float, seed: int) -> RunText:
    """A random part of the documents with about `share` of the tokens."""
    order = np.random.default_rng(seed).permutation(text.documents)
    sizes = np.bincount(text.document, minlength=text.documents)
    fit = np.cumsum(sizes[order]) <= share * len(text)
    fit[0] = True
    kept = np.zeros(text.documents, bool)
    kept[order[fit]] = True
    return text.of_documents(kept)
