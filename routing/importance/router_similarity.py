"""Router similarity: which experts the router treats alike, by the columns of its logits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.grid import expert_grid, layer_name
from moescope.routing.importance.expert_sums import LOGITS, Array, listed
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

_NEAREST, _MEAN = "similarity to the nearest", "mean similarity"
# Documents are resampled in this many bundles at most: a product matrix of experts is kept for each.
_BUNDLES = 32


@analysis(
    name="router_similarity",
    needs=("routing", "router_logits"),
    source="M-SMoE: arXiv 2310.01334, UNITES-Lab/MC-SMoE mcsmoe/merging/grouping.py",
    section="importance",
    order=50,
)
def router_similarity(run: Run, *, centred: bool = False, draws: Count = 100, seed: Natural = 0) -> Result:
    """Which experts does the router treat alike?

    For experts i and j of a layer, (cos + 1) ÷ 2 of the columns of their router logits over all tokens: 1 where the router
    always raises both in proportion, ½ where it does so independently, 0 where it sets one against the other. M-SMoE
    merges each expert with the most similar of those that are used most. Logits that share a large mean are similar by
    that alone, which the null shows.

    Args:
        centred: subtract each token's mean logit first, which a softmax does not see.
        draws: bootstrap resamples of documents.
        seed: of the resampling.
    """
    trace = read_trace(run)
    generator = np.random.default_rng(seed)
    units = min(trace.n_documents, _BUNDLES)
    unit = (generator.permutation(trace.n_documents) % units)[trace.document]
    resampled = document_weights(units, draws=draws, seed=seed).astype(np.float64) if units > 1 else None
    frames, without = [], []
    for router in trace.routers:
        part = _rows(trace, router, unit, units, resampled, centred)
        if part is None:
            without.append(router.name)
        else:
            frames.append(part)
    if not frames:
        raise InputError(
            f"run {run.name!r} has no whole router logits of the tokens it has decisions for",
            fix="record with --probe router_logits",
        )
    frame = pd.concat(frames, ignore_index=True)
    notes = (f"No logits are recorded in {', '.join(without)}.",) if without else ()
    if trace.n_documents > units:
        notes = (*notes, f"{trace.n_documents:,} documents are resampled in {units} random bundles.")
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.tokens,
        n_unit="tokens",
        definition="(cos + 1)/2 of the columns of router logits of two experts over all tokens"
        + (", each token's mean logit subtracted" if centred else "")
        + ". nearest: the most similar other expert of the layer (column other).",
        units={"value": "similarity, 0 to 1", "null": "similarity", "n": "tokens"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples, the nearest expert held fixed",
        null="each column shuffled over tokens by itself: what means and spreads of logits alone give; for the nearest, the "
        "largest of these",
        computation="products of logit columns, summed over tokens",
        notes=(*trace.notes, *notes),
    )


def similarity(product: Array) -> Array:
    """(cos + 1)/2 from products of columns [..., expert, expert]; NaN where a column is all 0.

    Example:
        >>> similarity(np.array([[4.0, 0.0], [0.0, 1.0]]))[0].tolist()
        [1.0, 0.5]
    """
    square = np.einsum("...ii->...i", product)
    length = np.sqrt(square[..., :, None] * square[..., None, :])
    cosine = np.divide(product, length, out=np.full(product.shape, np.nan), where=length > 0)
    scaled: Array = (np.clip(cosine, -1.0, 1.0) + 1.0) / 2.0
    return scaled


def _rows(
    trace: Trace, router: Router, unit: NDArray[np.int64], units: int, resampled: Array | None, centred: bool
) -> pd.DataFrame | None:
    logits = listed(trace, router, LOGITS, router.n_experts)
    if logits is None:
        return None
    known = np.isfinite(logits).all(axis=1)
    if not known.all():
        logits, unit = logits[known], unit[known]
    if not len(logits):
        return None
    if centred:
        logits = logits - logits.mean(axis=1, keepdims=True)
    order = np.argsort(unit, kind="stable")
    bounds = np.searchsorted(unit[order], np.arange(units + 1))
    size = router.n_experts
    products = np.zeros((units, size, size))
    for number in range(units):
        part = logits[order[bounds[number] : bounds[number + 1]]]
        products[number] = part.T @ part
    value = similarity(products.sum(0))
    null = similarity(_independent(products.sum(0), logits.mean(axis=0), len(logits)))
    return _framed(router, value, null, products, resampled, len(logits))


def _independent(product: Array, mean: Array, tokens: int) -> Array:
    """Products to expect when every column is shuffled by itself: squares stay, the rest is that of the means."""
    expected = np.outer(mean, mean) * tokens
    np.fill_diagonal(expected, np.diagonal(product))
    return expected


def _framed(
    router: Router, value: Array, null: Array, products: Array, resampled: Array | None, tokens: int
) -> pd.DataFrame:
    size = router.n_experts
    where = {"layer": router.layer, "block": router.block, "n": tokens}
    if size < 2:
        row = {**where, "metric": _MEAN, "expert": None, "other": None, "value": None, "ci_low": None, "ci_high": None}
        return pd.DataFrame([row | {"null": None}]).astype({"expert": "Int64", "other": "Int64"} | _FLOATS)
    upper = np.triu_indices(size, 1)
    others = np.where(np.eye(size, dtype=bool) | np.isnan(value), -1.0, value)
    nearest = others.argmax(axis=1)
    own = np.arange(size)
    low, high = np.full(size + 1, np.nan), np.full(size + 1, np.nan)
    if resampled is not None:
        drawn = np.empty((len(resampled), size + 1))
        for number, weights in enumerate(resampled):
            again = similarity(np.tensordot(weights, products, axes=1))
            drawn[number, :size] = again[own, nearest]
            drawn[number, size] = _mean(again[upper])
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    chance = np.where(np.eye(size, dtype=bool) | np.isnan(null), -1.0, null).max(axis=1)
    known = others.max(axis=1) >= 0
    return pd.DataFrame(
        {
            "layer": router.layer,
            "block": router.block,
            "expert": pd.array([*own, None], dtype="Int64"),
            "other": pd.array(
                [*(int(n) if k else None for n, k in zip(nearest, known, strict=True)), None], dtype="Int64"
            ),
            "metric": [_NEAREST] * size + [_MEAN],
            "value": np.append(np.where(known, value[own, nearest], np.nan), _mean(value[upper])),
            "ci_low": low,
            "ci_high": high,
            "null": np.append(np.where(known, chance, np.nan), _mean(null[upper])),
            "n": tokens,
        }
    )


def _mean(values: Array) -> float:
    """Over the pairs that have a similarity; NaN where none has."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


_FLOATS = {"value": "float64", "ci_low": "float64", "ci_high": "float64", "null": "float64"}


def _title(frame: pd.DataFrame) -> str:
    nearest = frame[(frame["metric"] == _NEAREST) & frame["value"].notna()]
    if nearest.empty:
        return "No layer has two experts whose logits can be compared"
    top = nearest.loc[nearest["value"].idxmax()]
    mean = frame[frame["metric"] == _MEAN]
    name = layer_name(top["layer"], top["block"])
    return (
        f"{name}·E{top['expert']} and {name}·E{top['other']} are the most alike to their router, at {top['value']:.3f}; "
        f"experts are {mean['value'].mean():.3f} alike on average (shuffled columns: {mean['null'].mean():.3f})"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    nearest = frame[frame["metric"] == _NEAREST]
    if nearest.empty:
        nearest = frame.assign(expert=0, other=0)
    values, rows, columns, fields = expert_grid(nearest, "value", extra=("other", "null"))
    figure = heatmap(
        values,
        x=columns,
        y=rows,
        customdata=fields,
        colorbar="similarity to the nearest expert",
        hover="%{y}·%{x} and E%{customdata[0]:.0f}: %{z:.3f}<br>shuffled columns %{customdata[1]:.3f}",
    )
    null = nearest["null"].mean()
    figure.update_xaxes(title="expert" if np.isnan(null) else f"expert (chance, columns shuffled: {null:.3f})")
    figure.update_yaxes(title="layer")
    return figure
