"""How well a simple rule, learned on some documents, predicts a latent's activation on others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights
from moescope.sae.reading.activations import Activations
from moescope.sae.reading.run_text import Ints

RULES = ("predicted_by_token", "predicted_by_previous_token", "predicted_by_label")
FEWEST_TOKENS, FEWEST_DOCUMENTS = 20, 4
_BLOCK = 128
_TAILS = (0.025, 0.975)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Predictability:
    """Correlations of one rule for the latents that fire often enough in both halves.

    Attributes:
        rule: its name.
        latents: [latent] which.
        value, low, high: [latent] mean over both ways round.
        null: [latent] the same with the latent's activations moved along the corpus, or labels given out anew.
        tokens: tokens predicted.
    """

    rule: str
    latents: Ints
    value: Floats
    low: Floats
    high: Floats
    null: Floats
    tokens: int


@dataclass(frozen=True)
class _Key:
    """What a rule goes by: [token] a group, 0 … groups − 1; and the same with groups given out anew, where that is its null."""

    rule: str
    group: Ints
    groups: int
    shuffled: _Key | None = None


def predictability(acts: Activations, *, draws: int = 500, seed: int = 0) -> list[Predictability]:
    """Pearson correlation of predicted and real activation on held-out documents, for three rules.

    The rules predict a latent's activation on a token by its mean over the tokens of the learning half with the same token id,
    the same previous token id, or the same label; groups that the learning half does not have by its mean there. Documents are
    halved at random; each half predicts the other, and the two correlations are averaged. This is the score by simulation of
    Disentangling Dense Embeddings with Sparse Autoencoders (arXiv 2408.00657) with a table in the place of a language model:
    it finds what words and topics explain, and not all that has a meaning. Nothing is said of latents on fewer than 20 tokens
    or 4 documents.

    The null of the rules of tokens moves every latent's activations along the corpus by a random number of tokens: their number,
    size and bursts stay, the words they stood on change. That of labels gives the documents' labels out anew at random.

    Args:
        acts: activations.
        draws: bootstrap resamples of documents, for the interval.
        seed: of halves, moves and resamples.
    """
    chosen = np.flatnonzero(_often_enough(acts))
    if not len(chosen) or acts.text.documents < FEWEST_DOCUMENTS:
        return []
    random = np.random.default_rng(seed)
    half = random.permutation(acts.text.documents) % 2
    tokens = np.flatnonzero(acts.encoded)
    shifted = moved_along(acts, tokens, random)
    found = []
    for key in _keys(acts, random):
        parts = _scores(acts, key, half, chosen, draws, seed)
        nulls = _scores(acts if key.shuffled else shifted, key.shuffled or key, half, chosen, 0, seed)
        value, low, high = (np.concatenate(column) for column in zip(*parts, strict=True))
        null = np.concatenate([part for part, _, _ in nulls])
        known = np.isfinite(value)
        found.append(
            Predictability(key.rule, chosen[known], value[known], low[known], high[known], null[known], len(tokens))
        )
    return [part for part in found if len(part.latents)]


def moved_along(acts: Activations, tokens: Ints, random: np.random.Generator) -> Activations:
    """Activations moved along the encoded tokens, around the end to the start, each latent by its own random number."""
    number = np.zeros(len(acts.text), np.int64)
    number[tokens] = np.arange(len(tokens))
    shift = random.integers(0, len(tokens), acts.latents)
    return acts.moved(tokens[(number[acts.place] + shift[acts.latent]) % len(tokens)])


def _often_enough(acts: Activations) -> NDArray[np.bool_]:
    documents = np.bincount(acts.segments.latent, minlength=acts.latents)
    found: NDArray[np.bool_] = (acts.counts >= FEWEST_TOKENS) & (documents >= FEWEST_DOCUMENTS)
    return found


def _keys(acts: Activations, random: np.random.Generator) -> Iterator[_Key]:
    text = acts.text
    ids, token = np.unique(text.token_id, return_inverse=True)
    yield _Key(RULES[0], token, len(ids))
    previous = np.roll(token, 1)
    first = np.concatenate([[True], text.sequence_id[1:] != text.sequence_id[:-1]])
    yield _Key(RULES[1], np.where(first, len(ids), previous), len(ids) + 1)
    if len(np.unique(text.label[text.label >= 0])) > 1:
        named = np.where(text.label < 0, len(text.labels), text.label)
        shuffled = _Key(RULES[2], random.permutation(named)[text.document], len(text.labels) + 1)
        yield _Key(RULES[2], named[text.document], len(text.labels) + 1, shuffled)


def _scores(
    acts: Activations, key: _Key, half: NDArray[np.integer[Any]], chosen: Ints, draws: int, seed: int
) -> list[tuple[Floats, Floats, Floats]]:
    """Value and bounds of the latents, some at a time."""
    from scipy.sparse import csr_array

    shape = acts.text.documents, key.groups
    encoded = np.flatnonzero(acts.encoded)
    cells = acts.text.document[encoded].astype(np.int64), key.group[encoded]
    of_document = csr_array((np.ones(len(encoded), np.float32), cells), shape=shape)  # tokens of each group
    of_document.sum_duplicates()
    sums = [of_document[half == side].sum(0) for side in (0, 1)]
    parts = []
    for start in range(0, len(chosen), _BLOCK):
        block = _Block(acts, key, chosen[start : start + _BLOCK])
        both = [_way(block, of_document, sums[learn], half, learn, draws, seed) for learn in (0, 1)]
        value = (both[0][0] + both[1][0]) / 2
        low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
        if draws:
            drawn = (both[0][1] + both[1][1]) / 2
            low, high = np.quantile(np.where(np.isfinite(drawn), drawn, np.nan_to_num(value)), _TAILS, axis=0)
        parts.append((value, low, high))
    return parts


class _Block:
    """The triples of some latents, with the group and document of each."""

    def __init__(self, acts: Activations, key: _Key, latents: Ints) -> None:
        sizes = acts.counts[latents]
        ends = np.cumsum(sizes)
        triple = np.arange(int(ends[-1])) - np.repeat(ends - sizes, sizes) + np.repeat(acts.starts[latents], sizes)
        self.size = len(latents)
        self.column = np.repeat(np.arange(self.size), sizes)
        self.value = acts.value[triple].astype(np.float64)
        self.group = key.group[acts.place[triple]]
        self.document = acts.text.document[acts.place[triple]]
        self.groups = key.groups

    def summed(self, row: NDArray[np.integer[Any]], rows: int, weight: Floats) -> Floats:
        """[row, latent] sums of `weight` over the triples."""
        flat = np.bincount(row.astype(np.int64) * self.size + self.column, weight, rows * self.size)
        found: Floats = flat.astype(np.float64).reshape(rows, self.size)
        return found


def _way(
    block: _Block, of_document: Any, seen: Floats, half: NDArray[np.integer[Any]], learn: int, draws: int, seed: int
) -> tuple[Floats, Floats]:
    """[latent] and [draw, latent] correlations on the half that was not learned from."""
    from_half = half[block.document] == learn
    sums = block.summed(block.group, block.groups, np.where(from_half, block.value, 0.0))
    mean = sums.sum(0) / max(float(seen.sum()), 1.0)
    predicted = np.where(seen[:, None] > 0, sums / np.maximum(seen, 1)[:, None], mean)
    tested = np.flatnonzero(half != learn)
    number = np.full(len(half), -1)
    number[tested] = np.arange(len(tested))
    mine = ~from_half
    row = np.where(mine, number[block.document], 0)
    weight = np.where(mine, block.value, 0.0)
    counts = of_document[tested]
    n = np.asarray(counts.sum(1), np.float64).reshape(-1)
    five = (
        counts @ predicted,
        counts @ (predicted**2),
        block.summed(row, len(tested), weight),
        block.summed(row, len(tested), weight * block.value),
        block.summed(row, len(tested), weight * predicted[block.group, block.column]),
    )
    whole = _pearson(n.sum(), *(part.sum(0) for part in five))
    if not draws:
        return whole, whole[None]
    weights = document_weights(len(tested), draws=draws, seed=seed + learn).astype(np.float64)
    return whole, _pearson((weights @ n)[:, None], *(weights @ part for part in five))


def _pearson(n: Any, x: Floats, xx: Floats, y: Floats, yy: Floats, xy: Floats) -> Floats:
    """Correlation of predicted x with real y from sums; 0 where the prediction does not vary, NaN where y does not."""
    spread_x, spread_y = n * xx - x * x, n * yy - y * y
    varies = spread_x > 1e-12 * n * xx
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(varies, (n * xy - x * y) / np.sqrt(spread_x * spread_y), 0.0)
        found: Floats = np.where(spread_y > 1e-12 * n * yy, r, np.nan)
    return found
