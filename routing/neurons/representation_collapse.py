"""Representation collapse: how few directions token vectors take, layer by layer, and how they gather round experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.core.sites import ATTN_OUT, MLP_OUT, RESID_POST, RESID_PRE
from moescope.core.statistics import document_weights
from moescope.routing.neurons.recorded_vectors import Vectors, read_vectors, reading_notes, sites_of
from moescope.store.run import Run

STATES = (RESID_PRE, RESID_POST, ATTN_OUT, MLP_OUT)
_RANK, _COSINE, _SPREAD = "effective rank", "mean cosine", "within ÷ between experts"
_FIRST = """
    SELECT token, experts[1] AS expert
    FROM routing
    WHERE run_id = $run AND layer = $layer AND block = 'mlp'
    ORDER BY token
"""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Asked:
    shuffles: int
    draws: int
    seed: int


@analysis(
    name="representation_collapse",
    needs=("activations",),
    source="arXiv 2204.09179 (collapse towards experts); effective rank: Roy & Vetterli 2007",
    section="residual",
    order=60,
)
def representation_collapse(
    run: Run, *, tokens: Count = 1024, shuffles: Count = 5, draws: Count = 500, seed: Natural = 0
) -> Result:
    """Do token vectors collapse onto few directions, or onto their experts, from layer to layer?

    Effective rank: e to the entropy of the eigenvalues of the vectors' covariance, divided by their sum: how many
    directions they fill evenly. Mean cosine: of the angle between vectors of tokens of different documents, the mean not
    removed: 0 where directions are spread, 1 where all agree. Within ÷ between experts: Tr(Σ_W Σ_B⁺), Σ_W the covariance
    of vectors round the mean of their first expert's tokens, Σ_B that of these means, Σ_B⁺ its pseudoinverse: low where
    vectors gather round their experts (at `hook_resid_pre` and `hook_resid_post` of layers with a router in the MLP).

    Args:
        tokens: recorded tokens to look at, in whole sequences.
        shuffles: permutations of experts over tokens, for the null of within ÷ between.
        draws: bootstrap resamples of documents.
        seed: of drawing sequences, of normal vectors, of shuffles and of resampling.
    """
    asked = _Asked(shuffles, draws, seed)
    sites = sites_of(run, STATES)
    routed = {int(layer) for (layer,) in run.sql(_ROUTED).fetchall()}
    nulls: dict[tuple[int, int], float] = {}
    read, rows, short = [], [], []
    for vectors in read_vectors(run, sites, limit=tokens, seed=seed):
        read.append(vectors.emptied())
        if len(vectors.values) < 2:
            short.append(str(vectors.site))
            continue
        shape = (len(vectors.values), vectors.values.shape[1])
        if shape not in nulls:
            nulls[shape] = _effective_rank(np.random.default_rng(seed).standard_normal(shape))
        rows += _rows(run, vectors, asked, nulls[shape], vectors.site.layer in routed)
    if not rows:
        raise InputError(f"run {run.name!r} kept fewer than two vectors at every site", found=", ".join(short))
    frame = pd.DataFrame(rows).sort_values(["tensor", "layer", "metric"], kind="stable", ignore_index=True)
    notes = (f"Fewer than two vectors at {', '.join(short)}.",) if short else ()
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=max(len(v.token) for v in read),
        n_unit="tokens",
        definition="effective rank: exp of the entropy of the covariance's eigenvalues over their sum; mean cosine: between "
        "vectors of different documents, mean not removed; within ÷ between experts: Tr(Σ_W Σ_B⁺) with tokens grouped by "
        "their first expert at that layer, low where vectors gather round experts.",
        units={
            f"value[{_RANK}]": "directions",
            f"value[{_COSINE}]": "cosine",
            f"value[{_SPREAD}]": "ratio",
            "width": "components",
            "n": "tokens",
        },
        interval=f"mean cosine: 95 % percentile bootstrap over documents, {draws} resamples; none for the others",
        null="effective rank: as many normal vectors of the same width; mean cosine: 0; within ÷ between experts: experts "
        f"shuffled over tokens, mean of {shuffles}",
        computation="eigenvalues of the smaller of covariance and Gram matrix",
        notes=(*notes, *reading_notes(read)),
    )


_ROUTED = "SELECT DISTINCT layer FROM layers WHERE run_id = $run AND kind = 'moe' AND block = 'mlp'"


def _rows(run: Run, vectors: Vectors, asked: _Asked, rank_null: float, routed: bool) -> list[dict[str, object]]:
    states = vectors.values.astype(np.float64)
    site = vectors.site
    where = {"layer": site.layer, "tensor": site.tensor, "width": states.shape[1], "n": len(states)}
    none = {"ci_low": np.nan, "ci_high": np.nan}
    rows: list[dict[str, object]] = [
        {**where, "metric": _RANK, "value": _effective_rank(states), **none, "null": rank_null}
    ]
    cosine, low, high = _mean_cosine(states, vectors.document[vectors.at], vectors.documents, asked)
    if np.isfinite(cosine):
        rows.append({**where, "metric": _COSINE, "value": cosine, "ci_low": low, "ci_high": high, "null": 0.0})
    if routed and site.tensor in (RESID_PRE, RESID_POST):
        spread = _within_between(run, vectors, states, asked)
        if spread is not None:
            rows.append({**where, "metric": _SPREAD, "value": spread[0], **none, "null": spread[1]})
    return rows


def _effective_rank(states: Array) -> float:
    """exp(−Σ p ln p) of the covariance's eigenvalues over their sum; 0 where all vectors are the same."""
    centred = states - states.mean(axis=0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = np.clip(np.linalg.eigvalsh(gram), 0.0, None)
    total = values.sum()
    if total <= 1e-20 * max(1.0, float((states**2).sum())):
        return 0.0
    share = values / total
    share = share[share > 1e-15]
    return float(np.exp(-(share * np.log(share)).sum()))


def _mean_cosine(
    states: Array, document: NDArray[np.int64], documents: int, asked: _Asked
) -> tuple[float, float, float]:
    """Over pairs of tokens of different documents; NaN with fewer than two documents."""
    length = np.linalg.norm(states, axis=1, keepdims=True)
    direction = np.divide(states, length, out=np.zeros_like(states), where=length > 0)
    sums = np.zeros((documents, states.shape[1]))
    np.add.at(sums, document, direction)
    count = np.bincount(document, weights=(length[:, 0] > 0).astype(float), minlength=documents)
    if (count > 0).sum() < 2:
        return np.nan, np.nan, np.nan
    gram = sums @ sums.T
    np.fill_diagonal(gram, 0.0)
    pairs = np.outer(count, count)
    np.fill_diagonal(pairs, 0.0)
    drawn = document_weights(documents, draws=asked.draws, seed=asked.seed).astype(np.float64)
    above = np.einsum("di,ij,dj->d", drawn, gram, drawn, optimize=True)
    below = np.einsum("di,ij,dj->d", drawn, pairs, drawn, optimize=True)
    low, high = np.quantile(above[below > 0] / below[below > 0], [0.025, 0.975])
    return float(gram.sum() / pairs.sum()), float(low), float(high)


def _within_between(run: Run, vectors: Vectors, states: Array, asked: _Asked) -> tuple[float, float] | None:
    """Tr(Σ_W Σ_B⁺) by first expert, and under shuffled experts; None where fewer than two experts come first."""
    found = run.sql(_FIRST, {"layer": vectors.site.layer}).fetchnumpy()
    if not len(found["token"]):
        return None
    token = vectors.token[vectors.at]
    at = np.minimum(np.searchsorted(found["token"], token), len(found["token"]) - 1)
    there = np.asarray(found["token"])[at] == token
    group = np.unique(np.ma.filled(found["expert"], 0)[at[there]], return_inverse=True)[1]
    states = states[there]
    if len(states) < 3 or group.max() < 1:
        return None
    value = _trace(states, group)
    generator = np.random.default_rng(asked.seed)
    null = np.mean([_trace(states, generator.permutation(group)) for _ in range(asked.shuffles)])
    return value, float(null)


def _trace(states: Array, group: NDArray[np.intp]) -> float:
    """Tr(Σ_W Σ_B⁺), both over the number of tokens; only the span of the means matters."""
    count = np.bincount(group).astype(np.float64)
    sums = np.zeros((len(count), states.shape[1]))
    np.add.at(sums, group, states)
    means = sums / count[:, None]
    offsets = (means - states.mean(axis=0)) * np.sqrt(count / len(states))[:, None]
    within = states - means[group]
    _, singular, axes = np.linalg.svd(offsets, full_matrices=False)
    real = singular > singular.max(initial=0.0) * 1e-10
    variance = ((within @ axes[real].T) ** 2).mean(axis=0)
    return float((variance / singular[real] ** 2).sum())


def _title(frame: pd.DataFrame) -> str:
    tensor = next(t for t in (RESID_POST, RESID_PRE, MLP_OUT, ATTN_OUT) if (frame["tensor"] == t).any())
    part = frame[(frame["tensor"] == tensor) & (frame["metric"] == _RANK)]
    share = part["value"] / part["null"]
    low = part.loc[share.idxmin()]
    title = (
        f"Token vectors are narrowest at {tensor} of L{low['layer']}: {low['value']:.1f} directions of {low['width']} "
        f"(normal vectors: {low['null']:.1f})"
    )
    spread = frame[frame["metric"] == _SPREAD]
    if spread.empty:
        return title
    below = int((spread["value"] < spread["null"]).sum())
    return f"{title}; at {below} of {len(spread)} places they gather round experts more than under shuffled ones"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    frame = frame[frame["metric"] == _RANK]
    figure = go.Figure()
    for number, (tensor, part) in enumerate(frame.groupby("tensor", sort=False)):
        names = [f"L{layer}" for layer in part["layer"]]
        figure.add_scatter(
            x=names,
            y=part["value"],
            mode="lines+markers",
            name=str(tensor),
            line={"color": SERIES[number]},
            customdata=np.stack([part["null"], part["width"], part["n"]], axis=-1),
            hovertemplate="%{x}: %{y:.1f} of %{customdata[1]} directions, normal vectors %{customdata[0]:.1f}, "
            "%{customdata[2]:,} tokens<extra></extra>",
        )
        if number == 0:
            figure.add_scatter(
                x=names,
                y=part["null"],
                mode="lines",
                name="normal vectors",
                line={"color": CHANCE, "dash": "dash"},
                hoverinfo="skip",
            )
    order = [f"L{layer}" for layer in sorted(frame["layer"].unique())]
    figure.update_xaxes(title="layer", type="category", categoryorder="array", categoryarray=order)
    figure.update_yaxes(title="effective rank (directions)", rangemode="tozero")
    figure.update_layout(height=420)
    return figure
