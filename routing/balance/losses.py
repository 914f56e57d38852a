"""Balance losses of training, computed from a record: Switch's, its pooled and its per-layer form, and the z-loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import SERIES
from moescope.core.result import Result
from moescope.core.statistics import document_weights, quotient
from moescope.routing.balance.groups import By, Grouping, grouped
from moescope.routing.balance.panels import group_column, group_grid, panels
from moescope.routing.balance.router_scores import logit_chunks, scored_routers, scoring
from moescope.routing.grid import layer_name
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Floats = NDArray[np.float64]
Per = Literal["slot", "token"]

POOLED = "pooled loss (all layers' tokens in one)"
MEAN = "mean loss of layers"


@dataclass(frozen=True)
class _Sums:
    """Sums of one router over the tokens of each cell: decisions and probabilities [cell, expert]; z² and tokens [cell]."""

    router: Router
    decisions: Floats
    probabilities: Floats
    z: Floats
    tokens: Floats


@analysis(
    name="balance_losses",
    needs=("routing", "router_logits"),
    source="Switch: arXiv 2101.03961; z-loss: arXiv 2202.08906; pooled form: transformers load_balancing_loss_func; "
    "per-layer form: arXiv 2409.02060",
    section="experts",
    order=12,
)
def balance_losses(
    run: Run, *, by: By = "layer", bins: Count = 10, per: Per = "slot", draws: Count = 500, seed: Natural = 0
) -> Result:
    """What do the balance losses of training say of this text, and does pooling layers hide imbalance?

    Switch loss of a router: E × Σ f P over experts; f is an expert's share of decisions, P its mean probability (scores over
    their sum where the router is no softmax). Balanced routing gives 1, one expert for all tokens gives E. With
    per="token", f is the share of tokens that choose the expert, k times as much: balanced routing gives k. z-loss: the mean of
    the squared logsumexp of the logits.

    For the model there are two forms. The mean of layers (as OLMoE trains) averages the routers' losses. The pooled form
    (load_balancing_loss_func of transformers, f per token) joins all layers' tokens before f and P are taken: a trap, since one
    layer's overload cancels against another's, so that a model whose layers all collapse, each onto another expert, reads
    as balanced. It needs routers of one size, and is left out elsewhere. The routers' own decisions are used for f.

    Args:
        by: measure over all tokens of a router (layer), or apart for each label, position in the sequence, phase or
            class of token.
        bins: equal parts of each sequence, for by="position".
        per: share of decisions (slot) or of tokens (token) for f; the pooled form is given likewise.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> probes = ("tokens", "routing", "router_logits")
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", probes=probes, progress=False)
        ...     sorted(set(ms.analyze(run, "balance_losses").df().metric))[:2]
        ['Switch loss', 'mean loss of layers']
    """
    trace = read_trace(run)
    grouping = grouped(trace, by, bins)
    sums = [_sums(trace, router, grouping) for router in scored_routers(trace)]
    rows = []
    for name, cells in grouping.cells():
        place = {grouping.column: name} if grouping.column else {}
        rows += [place | row for row in _group_rows(sums, cells, per=per, draws=draws, seed=seed)]
    frame = pd.DataFrame(rows).astype({"layer": "Int64"})
    missing = sum(int(grouping.tokens.sum() - part.tokens.sum()) for part in sums)
    notes = trace.notes + ((f"{missing:,} token × router pairs without logits are left out.",) if missing else ())
    if len(sums) < len(trace.routers):
        notes += (f"{len(trace.routers) - len(sums)} routers have no logits and are left out.",)
    if not _one_size(sums):
        notes += ("Routers differ in experts or top-k, so there is no pooled loss.",)
    return Result(
        title=_title(frame, by, per),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(sum(part.tokens.sum() for part in sums)),
        n_unit="token × router pairs",
        definition=f"Switch loss: E × Σ f P, f the share of {per}s that go to the expert and P its mean probability. Pooled: "
        "the same after joining the tokens of all layers, where overloads of different layers cancel. Mean of layers: the "
        "average of the routers' losses. z-loss: mean of (logsumexp of logits)².",
        units={
            "value": "by metric",
            "value[router z-loss]": "squared logits",
            "value[Switch loss]": "1 or k if balanced",
        },
        interval=grouping.interval(draws).replace("basic", "percentile"),
        null=f"{'1' if per == 'slot' else 'k'}: decisions go to all experts alike, whatever the probabilities; none for the z-loss",
        computation="decisions and probabilities summed by document, losses of the sums",
        notes=notes,
    )


def _sums(trace: Trace, router: Router, grouping: Grouping) -> _Sums:
    rule = scoring(trace, router)
    cells, size = len(grouping.group_of), router.n_experts
    sums = _Sums(router, np.zeros((cells, size)), np.zeros((cells, size)), np.zeros(cells), np.zeros(cells))
    for rows, logits in logit_chunks(trace, router):
        sums.probabilities[:] += grouping.sums(rule.probabilities(logits), rows)
        highest = logits.max(1)
        z = highest + np.log(np.exp(logits - highest[:, None]).sum(1, dtype=np.float64))
        inside = grouping.cell[rows] >= 0
        cell = grouping.cell[rows][inside]
        sums.z[:] += np.bincount(cell, weights=z[inside] ** 2, minlength=cells)
        sums.tokens[:] += np.bincount(cell, minlength=cells)
        place = cell[:, None] * size + router.experts[rows][inside]
        sums.decisions[:] += np.bincount(place.ravel(), minlength=cells * size).reshape(cells, size)
    return sums


def _one_size(sums: list[_Sums]) -> bool:
    return len({(part.router.n_experts, part.router.top_k) for part in sums}) == 1


def _group_rows(sums: list[_Sums], cells: slice, *, per: Per, draws: int, seed: int) -> list[dict[str, Any]]:
    documents = cells.stop - cells.start
    weights = np.ones((1, documents))
    if documents > 1:
        weights = np.vstack([weights, document_weights(documents, draws=draws, seed=seed)])
    drawn = [
        _Sums(p.router, weights @ p.decisions[cells], weights @ p.probabilities[cells], weights @ p.z[cells],
              weights @ p.tokens[cells])
        for p in sums
    ]  # fmt: skip
    drawn = [part for part in drawn if part.tokens[0] > 0]
    if not drawn:
        return []
    rows, losses = [], []
    for part in drawn:
        losses.append(_switch(part, per))
        where = {"layer": part.router.layer, "block": part.router.block}
        n, null = int(part.tokens[0]), float(part.router.top_k if per == "token" else 1)
        rows.append(where | _row("Switch loss", losses[-1], null, n))
        rows.append(where | _row("router z-loss", quotient(part.z, part.tokens), np.nan, n))
    n = int(sum(part.tokens[0] for part in drawn))
    balanced = [part.router.top_k if per == "token" else 1 for part in drawn]
    rows.append({"layer": None, "block": None} | _row(MEAN, np.mean(losses, axis=0), float(np.mean(balanced)), n))
    if _one_size(drawn):
        pooled = _Sums(
            drawn[0].router,
            sum((p.decisions for p in drawn), np.zeros(1)),
            sum((p.probabilities for p in drawn), np.zeros(1)),
            np.zeros(1),
            sum((p.tokens for p in drawn), np.zeros(1)),
        )
        rows.append({"layer": None, "block": None} | _row(POOLED, _switch(pooled, per), float(balanced[0]), n))
    return rows


def _switch(part: _Sums, per: Per) -> Floats:
    """[draw] E × Σ f P."""
    share = part.router.n_experts * (part.decisions * part.probabilities).sum(-1)
    slots = part.tokens * (1 if per == "token" else part.router.top_k)
    return quotient(share, slots * part.tokens)


def _row(metric: str, values: Floats, null: float, n: int) -> dict[str, Any]:
    """The first value is the estimate, the others its resamples."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975]) if len(values) > 1 else (np.nan, np.nan)
    bounds = {"ci_low": float(low), "ci_high": float(high)}
    return {"metric": metric, "value": float(values[0]), **bounds, "null": null, "n": n}


def _title(frame: pd.DataFrame, by: By, per: Per) -> str:
    mean = frame[frame["metric"] == MEAN]
    pooled = frame[frame["metric"] == POOLED]
    switch = frame[frame["metric"] == "Switch loss"].reset_index(drop=True)
    worst = switch.loc[switch["value"].idxmax()]
    place = layer_name(int(worst["layer"]), str(worst["block"]))
    place = place if by == "layer" else f"{place} · {worst[by]}"
    balanced = f"balanced: {switch['null'].iloc[0]:g}" if switch["null"].nunique() == 1 else "balanced: k"
    first = f"Switch loss is {mean['value'].mean():.3f} on average ({balanced}), {worst['value']:.3f} in {place}"
    if pooled.empty or len(switch) == len(pooled):
        return first
    hidden = mean["value"].mean() - pooled["value"].mean()
    return f"{first}; pooling all layers reads {pooled['value'].mean():.3f} and hides {hidden:.3f} of it"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    routers = frame[frame["layer"].notna()].astype({"layer": int})
    if group_column(frame) is not None:
        part = routers[routers["metric"] == "Switch loss"]
        return group_grid(part, part["value"].to_numpy(), colorbar="Switch loss (1 or k if balanced)")
    titles = {"Switch loss": "E × Σ f P", "router z-loss": "squared logits"}
    figure = panels(routers, titles, null_name="balanced routing")
    for row in frame[frame["metric"].isin([MEAN, POOLED])].itertuples():
        figure.add_scatter(
            x=[layer_name(*place) for place in zip(routers["layer"], routers["block"], strict=True)],
            y=[row.value] * len(routers),
            mode="lines",
            name="pooled over layers" if row.metric == POOLED else "mean of layers",
            line={"color": SERIES[1] if row.metric == POOLED else SERIES[2], "dash": "dot"},
            row=1,
            col=1,
        )
    return figure
