"""How well vectors are written again: by the autoencoder, and by each control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.sae.judging.controls import Reconstruction, in_parts
from moescope.sae.judging.rows import ByDocument, Floats, MeasureRow
from moescope.sae.judging.vectors import Vectors

Groups = Sequence[tuple[str, str, NDArray[np.bool_]]]


@dataclass(frozen=True)
class PerVector:
    """Numbers of every judged vector x under one way to reconstruct it as x̂ (of what a transcoder predicts, for one).

    Attributes:
        squared: [row] ‖x − x̂‖².
        cosine: [row] of x and x̂; 0 where one of them is 0.
        norm_ratio: [row] ‖x̂‖ ÷ ‖x‖; 0 where x is 0.
    """

    squared: Floats
    cosine: Floats
    norm_ratio: Floats


def per_vector(
    way: Reconstruction,
    x: Float[torch.Tensor, "row component"],
    y: Float[torch.Tensor, "row component"],
    *,
    width: int,
) -> PerVector:
    """Reconstruct every vector y from x, a few rows of `width` latents at a time; raises `InputError` for what is no number."""
    found = []
    for part, wanted in zip(in_parts(x, width), in_parts(y, width), strict=True):
        again, given = way.reconstruct(part).double(), wanted.double()
        norm, norm_again = given.norm(dim=-1), again.norm(dim=-1)
        cosine = (given * again).sum(-1) / (norm * norm_again).clamp(min=1e-300)
        found.append(torch.stack([(given - again).square().sum(-1), cosine, norm_again / norm.clamp(min=1e-300)]))
    squared, cosine, ratio = torch.cat(found, dim=1).numpy()
    if bad := int((~np.isfinite(squared)).sum()):
        raise InputError(
            "reconstructed vectors are no numbers",
            found=f"NaN or infinity in {bad:,} of {len(squared):,} under {way.name}",
            fix="the weights of the autoencoder are damaged: load or train it again",
        )
    return PerVector(squared, cosine, ratio)


def reconstruction_rows(
    ways: Sequence[Reconstruction],
    vectors: Vectors,
    mean: Float[torch.Tensor, " component"],
    by_document: ByDocument,
    groups: Groups,
    *,
    width: int,
) -> list[MeasureRow]:
    """FVU, error a token, cosine and ratio of norms of each way, and variance explained by label and class.

        FVU = Σ ‖x − x̂‖² ÷ Σ ‖x − x̄‖²      normalised MSE = mean of ‖x − x̂‖² ÷ ‖x − x̄‖²

    with x̄ the mean of the vectors that are not judged, also within groups. Draws of one control are averaged.

    Args:
        ways: the autoencoder and its controls; those of one name are draws of one control.
        vectors: judged.
        mean: x̄.
        by_document: their documents.
        groups: kind, value and rows of each group.
        width: latents, which settles how many rows are done at a time.
    """
    pieces = in_parts(vectors.y, vectors.y.shape[1])
    about = torch.cat([(piece.double() - mean.double()).square().sum(-1) for piece in pieces]).numpy()
    rows: list[MeasureRow] = []
    for name in dict.fromkeys(way.name for way in ways):
        draws = [per_vector(way, vectors.x, vectors.y, width=width) for way in ways if way.name == name]
        mean_of = {f: np.mean([getattr(d, f) for d in draws], 0) for f in ("squared", "cosine", "norm_ratio")}
        rows += _of_one(name, mean_of, about, by_document, groups)
    return rows


def _of_one(
    name: str, numbers: dict[str, Floats], about: Floats, by_document: ByDocument, groups: Groups
) -> list[MeasureRow]:
    squared, ones = numbers["squared"], np.ones(len(about))
    there = about > 0
    relative = np.divide(squared, about, out=np.zeros_like(squared), where=there)
    above = np.stack([squared, relative, numbers["cosine"], numbers["norm_ratio"]], 1)
    below = np.stack([about, there.astype(float), ones, ones], 1)
    fvu, nmse, cosine, ratio = by_document.ratios(above, below)
    n = len(about)
    rows = [
        MeasureRow("fvu", name, fvu[0], n, "share of variance", *fvu[1:]),
        MeasureRow("normalised_mse", name, nmse[0], n, "ratio", *nmse[1:]),
        MeasureRow("cosine", name, cosine[0], n, "cosine", *cosine[1:]),
        MeasureRow("norm_ratio", name, ratio[0], n, "ratio", *ratio[1:]),
        _explained(name, fvu, n),
    ]
    if groups:
        members = np.stack([m for _, _, m in groups], 1)
        parts = by_document.ratios(squared[:, None] * members, about[:, None] * members)
        rows += [
            _explained(name, part, int(m.sum()), kind, value)
            for part, (kind, value, m) in zip(parts, groups, strict=True)
        ]
    return rows


def _explained(
    name: str, fvu: tuple[float, float | None, float | None], n: int, kind: str = "all", value: str | None = None
) -> MeasureRow:
    share, low, high = (None if bound is None else 1 - bound for bound in fvu)
    assert share is not None
    return MeasureRow("explained_variance", name, share, n, "share of variance", high, low, kind, value)
