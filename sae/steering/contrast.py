"""Steering vectors from contrast: the difference of means of two sets of texts, and the layer where they differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.edit_kinds.stream import Add
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import RESID_POST, Site
from moescope.sae.steering.steering import Steering, in_block
from moescope.sae.steering.text_vectors import At, label_vectors, text_vectors

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.store.run import Run

Vectors = Float[NDArray[np.floating], "text component"]
_FEWEST = 4  # texts a side from which on a layer can be chosen by held-out ones


@dataclass(frozen=True)
class LayerChoice:
    """How well two sets of texts can be told apart in each layer.

    Attributes:
        layer: the best.
        auc: layer → chance that a held-out positive text lies further along the difference of means than a held-out negative
            one; 0.5 is chance.
        shuffled: layer → the same with the two sides' texts mixed at random.
    """

    layer: int
    auc: dict[int, float]
    shuffled: dict[int, float]


def contrastive_mean(
    model: LiveModel,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layer: int,
    site: str = RESID_POST,
    at: At = "last",
    norm: float | None = None,
    name: str | None = None,
) -> Steering:
    """The difference between the mean vectors of two sets of texts, as a vector to be added at every token.

    Args:
        model: from `moescope.load`.
        positive, negative: texts; the vector points from the second to the first.
        layer, site: where.
        at: `last`, the texts' last token; `mean`, all tokens but the first.
        norm: length of the vector, in units of activation; None for the difference as it is.
        name: of the intervention.

    Raises:
        InputError: no texts on a side, a site the model does not have, or two equal means.

    Example:
        >>> import moescope as ms
        >>> found = contrastive_mean(ms.load("demo"), ["I love it.", "Great!"], ["I hate it.", "Bad!"], layer=2, norm=4.0)
        >>> round(sum(x * x for x in found.intervention.edits[0].vector) ** 0.5, 3), found.provenance["positive_texts"]
        (4.0, 2)
    """
    place = Site.parse(f"blocks.{layer}.{site}")
    first, second = (text_vectors(model, texts, [place], at=at)[place].numpy() for texts in (positive, negative))
    told: dict[str, object] = {
        "positive_texts": len(positive),
        "negative_texts": len(negative),
        "at": at,
        "model": model.name,
    }
    return from_sides(first, second, place, norm=norm, name=name, told=told)


def contrastive_labels(
    run: Run,
    positive: str,
    negative: str | None = None,
    *,
    site: str,
    norm: float | None = None,
    name: str | None = None,
) -> Steering:
    """The same from recorded vectors: the documents of one label against those of another, or of all others.

    Args:
        run: with vectors at the site.
        positive, negative: labels; None for every other label.
        site: for instance `blocks.3.hook_resid_post`.
        norm, name: as for `contrastive_mean`.

    Raises:
        InputError: no such vectors or labels.
    """
    place = Site.parse(site)
    first = label_vectors(run, place, positive)
    second = label_vectors(run, place, negative, other_than=positive)
    told: dict[str, object] = {"run": run.name, "positive_label": positive, "negative_label": negative or "all others"}
    told |= {"positive_texts": len(first), "negative_texts": len(second)}
    return from_sides(first, second, place, norm=norm, name=name or f"{positive} − {negative or 'others'}", told=told)


def from_sides(
    positive: Vectors, negative: Vectors, site: Site, *, norm: float | None, name: str | None, told: dict[str, object]
) -> Steering:
    """A steering vector from the vectors of two sides."""
    difference = positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64)
    length = float(np.linalg.norm(difference))
    if length == 0:
        raise InputError("the two sides have the same mean: there is no direction between them", fix="give other texts")
    if norm is not None and not norm > 0:
        raise InputError(f"a vector cannot have the norm {norm:g}", expected="a number over 0")
    vector = difference if norm is None else difference * (norm / length)
    edit = Add(layer=site.layer, site=in_block(site), vector=vector.tolist())  # type: ignore[arg-type]  # checked with the edit
    provenance = {
        "method": "difference of means",
        "site": str(site),
        "norm": float(np.linalg.norm(vector)),
        "difference_norm": length,
        "mean_norm": float(np.linalg.norm(np.concatenate([positive, negative]), axis=-1).mean()),
        **told,
    }
    return Steering(Intervention([edit], name=name or "difference of means"), provenance)


def best_layer(
    model: LiveModel,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    site: str = RESID_POST,
    at: At = "last",
    folds: int = 4,
    seed: int = 0,
) -> LayerChoice:
    """The layer in which the difference of means tells held-out texts apart best.

    In each fold the difference is taken from the other texts, and held-out ones are compared along it.

    Args:
        model, positive, negative, site, at: as for `contrastive_mean`.
        layers: those to look at; None for all.
        folds: parts that are held out in turn.
        seed: of the folds and of the shuffled sides.

    Raises:
        InputError: fewer than four texts a side.

    Example:
        >>> import moescope as ms
        >>> found = best_layer(ms.load("demo"), ["a b", "a c", "a d", "a e"], ["1 2", "3 4", "5 6", "7 8"], layers=[0, 3])
        >>> sorted(found.auc), 0 <= found.auc[3] <= 1
        ([0, 3], True)
    """
    if min(len(positive), len(negative)) < _FEWEST:
        raise InputError(
            "a layer is chosen by held-out texts",
            expected=f"{_FEWEST} texts a side or more",
            found=f"{len(positive)} and {len(negative)}",
        )
    wanted = list(range(model.anatomy.n_layers) if layers is None else layers)
    places = {layer: Site.parse(f"blocks.{layer}.{site}") for layer in wanted}
    found = text_vectors(model, [*positive, *negative], list(places.values()), at=at)
    truth = np.arange(len(positive) + len(negative)) < len(positive)
    random = np.random.default_rng(seed)
    fold = random.permutation(len(truth)) % folds
    mixed = random.permutation(truth)
    auc = {layer: _held_out_auc(found[place].numpy(), truth, fold) for layer, place in places.items()}
    shuffled = {layer: _held_out_auc(found[place].numpy(), mixed, fold) for layer, place in places.items()}
    return LayerChoice(max(auc, key=lambda layer: auc[layer]), auc, shuffled)


def _held_out_auc(vectors: Vectors, truth: NDArray[np.bool_], fold: NDArray[np.int64]) -> float:
    """AUC over pairs of held-out texts of one fold."""
    won, pairs = 0.0, 0
    for number in np.unique(fold):
        here = fold == number
        ours, theirs = truth & ~here, ~truth & ~here
        if not ours.any() or not theirs.any():
            continue
        direction = vectors[ours].mean(0) - vectors[theirs].mean(0)
        high, low = vectors[here & truth] @ direction, vectors[here & ~truth] @ direction
        gap = high[:, None] - low[None]
        won += float((gap > 0).sum() + 0.5 * (gap == 0).sum())
        pairs += gap.size
    return won / pairs if pairs else 0.5
