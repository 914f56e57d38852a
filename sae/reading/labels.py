"""Which labels of documents a latent goes with: lift, interval over documents, and a null in which documents swap labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.statistics import benjamini_hochberg, document_weights
from moescope.sae.reading.activations import Activations
from moescope.sae.reading.run_text import Ints

_BLOCK = 256  # latents at once
_CHUNK = 250  # permutations at once
_TAILS = (0.025, 0.975)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Lifts:
    """Latent by label, for latents that fire on a labelled document.

    Attributes:
        latents: [latent] which.
        active, tokens: [latent, label] and [label].
        lift, low, high, p, q: [latent, label]; bounds NaN for a label of one document.
    """

    latents: Ints
    active: Ints
    tokens: Ints
    lift: Floats
    low: Floats
    high: Floats
    p: Floats
    q: Floats

    def table(self, labels: tuple[str, ...]) -> dict[str, pa.Array]:
        """Columns of `feature_labels`, one row a latent and label."""
        n, m = self.lift.shape
        wide = {"lift": self.lift, "ci_low": self.low, "ci_high": self.high, "p": self.p, "q": self.q}
        return {
            "feature": pa.array(np.repeat(self.latents, m), pa.int32()),
            "label": pa.array(list(labels) * n, pa.string()),
            "active": pa.array(self.active.ravel()),
            "tokens": pa.array(np.tile(self.tokens, n)),
            **{name: pa.array(cells.ravel(), mask=np.isnan(cells.ravel())) for name, cells in wide.items()},
        }


def lifts(acts: Activations, *, draws: int = 1000, permutations: int = 1000, seed: int = 0) -> Lifts | None:
    """P(active | label) ÷ P(active) over the tokens of labelled documents, for every latent and label.

    The interval resamples documents (percentiles of `draws` bootstrap resamples). The null gives the documents' labels out anew
    at random, so that tokens of one text stay together. Two statistics have a distribution under it that can be told: how many
    of the label's documents the latent fires in (hypergeometric, exact), and its share of the label's tokens
    (`permutations` random permutations). Each gives a two-sided probability; p is twice the smaller one, at most 1. q is that
    of Benjamini and Hochberg over all pairs of latent and label.

    Args:
        acts: activations.
        draws, permutations: of documents.
        seed: of both.

    Returns:
        None where fewer than two labels are on documents that were read.
    """
    labelled = np.flatnonzero((acts.text.label >= 0) & (acts.tokens_by_document > 0))
    label = acts.text.label[labelled]
    if len(np.unique(label)) < 2:
        return None
    member = (label[:, None] == np.arange(len(acts.text.labels))).astype(np.float32)
    tokens = acts.tokens_by_document[labelled].astype(np.float64)
    weights = document_weights(len(labelled), draws=draws, seed=seed).astype(np.float32)
    parts = []
    for start in range(0, acts.latents, _BLOCK):
        dense = acts.by_document(slice(start, start + _BLOCK))[:, labelled]
        alive = np.flatnonzero(dense.any(1))
        if len(alive):
            parts.append((alive + start, *_of_block(dense[alive], member, tokens, weights, permutations, seed)))
    if not parts:
        return None
    latents, active, lift, low, high, p = (np.concatenate(column) for column in zip(*parts, strict=True))
    present = member.any(0)
    q = np.full_like(p, np.nan)
    q[:, present] = benjamini_hochberg(p[:, present])
    of_label = (tokens @ member).astype(np.int64)
    return Lifts(latents, active, of_label, lift, low, high, p, q)


def _of_block(
    dense: NDArray[np.float32],
    member: NDArray[np.float32],
    tokens: Floats,
    weights: NDArray[np.float32],
    permutations: int,
    seed: int,
) -> tuple[Ints, Floats, Floats, Floats, Floats]:
    """[latent, label] active tokens, lift, bounds and p of some latents; `dense` is [latent, document]."""
    active = dense @ member
    lift = _lift(active.astype(np.float64), tokens @ member, active.sum(1, dtype=np.float64)[:, None], tokens.sum())
    low, high = np.full_like(lift, np.nan), np.full_like(lift, np.nan)
    everywhere, all_tokens = weights @ dense.T, weights @ tokens
    for number in np.flatnonzero(member.sum(0) > 1):
        mine = member[:, number] > 0
        drawn = _lift(
            (weights[:, mine] @ dense[:, mine].T).astype(np.float64),
            (weights[:, mine] @ tokens[mine])[:, None],
            everywhere.astype(np.float64),
            all_tokens[:, None],
        )
        known = np.isfinite(drawn)
        drawn = np.where(
            known, drawn, lift[:, number]
        )  # a resample without the label, or without the latent, says nothing
        low[:, number], high[:, number] = np.quantile(drawn, _TAILS, axis=0)
    exact, shuffled = _of_documents(dense > 0, member), _of_shares(dense, member, tokens, permutations, seed)
    p = np.minimum(1.0, 2 * np.minimum(exact, shuffled))
    return active.astype(np.int64), lift, low, high, p


def _lift(active: Floats, tokens: Floats, all_active: Floats, all_tokens: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = (active / tokens) / (all_active / all_tokens)
    return found


def _of_documents(fires: NDArray[np.bool_], member: NDArray[np.float32]) -> Floats:
    """[latent, label] two-sided exact probability of as many of the label's documents as the latent fires in."""
    from scipy.stats import hypergeom

    inside = fires.astype(np.float32) @ member
    args = len(member), member.sum(0)[None, :], fires.sum(1)[:, None]
    found: Floats = np.minimum(1.0, 2 * np.minimum(hypergeom.sf(inside - 1, *args), hypergeom.cdf(inside, *args)))
    return found


def _of_shares(
    dense: NDArray[np.float32], member: NDArray[np.float32], tokens: Floats, permutations: int, seed: int
) -> Floats:
    """[latent, label] share of permutations of the labels with as large a surplus of active tokens, the observed one counted."""
    share = dense.sum(1, dtype=np.float64) / tokens.sum()
    surplus = (dense - share[:, None] * tokens).astype(np.float32)
    observed = np.abs(surplus @ member)
    random = np.random.default_rng(seed)  # every block sees the same permutations
    at_least = np.ones(observed.shape)
    for start in range(0, permutations, _CHUNK):
        orders = random.permuted(np.tile(np.arange(len(member)), (min(_CHUNK, permutations - start), 1)), axis=1)
        drawn = surplus @ member[orders].transpose(1, 0, 2).reshape(len(member), -1)
        drawn = np.abs(drawn).reshape(len(dense), len(orders), -1)
        at_least += (drawn >= observed[:, None] * (1 - 1e-5) - 1e-6).sum(1)
    return at_least / (1 + permutations)
