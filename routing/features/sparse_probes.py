"""Sparse probes: how well a concept is told from few units, by kind of unit."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.routing.features.probe_tables import PROBES_SQL, common_concepts, read_probes, tested_notes
from moescope.store.run import Run

Metric = Literal["F1", "MCC", "AUC", "precision", "recall", "log_loss"]
_MEAN = "mean of the concepts"
_COLUMNS = [
    "reads", "unit_kind", "site", "sae", "ranking", "concept", "k", "metric", "value", "ci_low", "ci_high", "null", "random",
    "dense", "n",
]  # fmt: skip


@analysis(
    name="sparse_probes",
    needs=("sparse_probes",),
    source="Gurnee et al. 2023, arXiv 2305.01610; code wesg52/sparse-probing-paper@a610e10 for the rankings",
    section="features",
    order=40,
)
def sparse_probes(
    run: Run,
    *,
    concept: str | None = None,
    metric: Metric = "F1",
    ranking: str | None = None,
    sae: str | None = None,
) -> Result:
    """How few neurons, latents or experts tell a concept, beside random ones and permuted labels?

    Units are ranked on training documents, and a logistic regression reads the first k of them; all numbers are of other
    documents, at equal weight of both classes. By `mean_difference` a unit's rank is |mean with the concept − mean without|;
    the authors' released selector `means` sorts indices instead and ranks nothing, `mean_dif` is the one meant.

    Args:
        concept: one of those probed, with its interval; None for the mean of all.
        metric: F1, MCC, AUC, precision, recall or log_loss (nats).
        ranking: one of those probed; None for all.
        sae: autoencoder of the latents, its name or id; the newest probed by default.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sae.concepts.sparse_probes import sparse_probes as probe
        >>> texts = [{"text": t, "label": l} for t, l in [("one two three", "en"), ("1 2 3 4 5", "digits")] * 6]
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), texts, store, name="first", progress=False)
        ...     found = probe(run, store, units="expert", k=[1, 2], least=2, draws=50, progress=False)
        ...     sorted(set(ms.analyze(run, "sparse_probes").df()["metric"]))
        ['F1', 'sparsity']
    """
    probes = read_probes(run, metric=metric, concept=concept, ranking=ranking, sae=sae)
    frame = _with_dense(probes.frame, metric)
    common, told = common_concepts(frame)
    if concept is None:
        frame = pd.concat([_means(frame[frame["concept"].isin(common)], metric), frame], ignore_index=True)
    shown = frame[frame["k"] > 0]
    return Result(
        title=_title(frame, metric, concept),
        table=pa.Table.from_pandas(frame[_COLUMNS], preserve_index=False),
        draw=_draw,
        n=int(shown["n"].max() if len(shown) else frame["n"].max()),
        n_unit="tokens or documents of the test part",
        definition=_DEFINITION,
        units={
            "value[log_loss]" if metric == "log_loss" else f"value[{metric}]": "nats" if metric == "log_loss" else "0 to 1",
            "value[sparsity]": "units",
        },
        interval="95 % percentile bootstrap over test documents; none for means over concepts",
        null="the same, ranking and fit included, with labels permuted over documents (of tokens: rotated along them), mean of the "
        "draws; `random`: k random units of the kind",
        sql=PROBES_SQL,
        sql_parameters=probes.parameters,
        computation="the dense probe's value beside each, and means over concepts",
        notes=(*_notes(frame), *(told if concept is None else ()), *tested_notes(probes.frame)),
    )  # fmt: skip


_DEFINITION = (
    "With r the share of the concept's tokens called so and f the share of the others: precision r ÷ (r + f), F1 2r ÷ (1 + r + f), "
    "MCC (r − f) ÷ √((r + f)(2 − r − f)), so that both classes count alike; F1 of calling everything is 0.667. k = 0: the dense probe "
    "of all units. sparsity: smallest k whose F1 reaches 95 % of the dense probe's; without a row where none does."
)


def _with_dense(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The dense probe's value on every row of the same units and concept."""
    keys = ["reads", "site", "concept"]
    dense = frame[(frame["k"] == 0) & (frame["metric"] == metric)].drop_duplicates(keys)
    found = frame.merge(dense[[*keys, "value"]].rename(columns={"value": "dense"}), on=keys, how="left")
    found.loc[found["metric"] != metric, ["dense"]] = np.nan
    return found


def _means(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Means over concepts, by units and ranking."""
    rows = frame[frame["metric"] == metric]
    keys = ["reads", "unit_kind", "site", "sae", "ranking", "k", "metric"]
    grouped = rows.groupby(keys, dropna=False, sort=False)
    found = grouped[["value", "null", "random", "dense"]].mean()
    found["n"] = grouped["n"].max()
    found["concept"] = _MEAN
    found[["ci_low", "ci_high"]] = np.nan
    return found.reset_index()


def _title(frame: pd.DataFrame, metric: str, concept: str | None) -> str:
    subject = _MEAN if concept is None else concept
    rows = frame[(frame["concept"] == subject) & (frame["metric"] == metric)]
    parts, ks = [], sorted(k for k in set(rows["k"]) if k > 0)
    for name, part in rows.groupby("reads", sort=False):
        at = part.drop_duplicates("k").set_index("k")["value"]
        shown = [at.get(ks[0], np.nan), *([at[at.index > 0].iloc[-1]] if len(ks) > 1 else []), at.get(0, np.nan)]
        parts.append(f"{name} {' / '.join(f'{value:.2f}' for value in shown if np.isfinite(value))}")
    what = "mean over the concepts" if concept is None else f"of {concept!r}"
    null = rows.loc[rows["k"] > 0, "null"].mean()
    read = f"{ks[0]} unit{'s' * (ks[0] > 1)}" + (" / the most tried" if len(ks) > 1 else "")
    read += " / all" if (rows["k"] == 0).any() else ""
    beside = f"; permuted labels {null:.2f}" if np.isfinite(null) else ""
    return f"{metric} {what} from {read}: " + ", ".join(parts[:4]) + (", …" if len(parts) > 4 else "") + beside


def _notes(frame: pd.DataFrame) -> tuple[str, ...]:
    reached = set(frame.loc[frame["metric"] == "sparsity", "concept"])
    concepts = set(frame.loc[(frame["k"] > 0), "concept"]) - {_MEAN}
    return (f"{len(reached)} of {len(concepts)} concepts reach 95 % of a dense probe's F1 with the k that were tried.",)


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    metric = next(name for name in frame["metric"] if name != "sparsity")
    means = frame[frame["concept"] == _MEAN]
    shown = (means if len(means) else frame)[lambda rows: rows["metric"] == metric]
    counts = sorted(k for k in set(shown["k"]) if k > 0)
    order = [f"{k:,}" for k in counts] + (["all"] if (shown["k"] == 0).any() else [])
    figure = go.Figure()
    sparse = shown[shown["k"] > 0]
    rankings = sparse["ranking"].nunique()
    groups = list(sparse.groupby(["reads", "site", "ranking"], sort=False, dropna=False))
    for number, ((reads, site, ranking), part) in enumerate(groups[: len(SERIES)]):
        color = SERIES[number]
        name = plain(f"{reads}, {ranking}" if rankings > 1 else str(reads))
        dense = shown[(shown["k"] == 0) & (shown["reads"] == reads) & (shown["site"] == site)]
        line = pd.concat([part.sort_values("k"), dense])
        x = ["all" if k == 0 else f"{k:,}" for k in line["k"]]
        figure.add_scatter(
            x=x, y=line["value"], mode="lines+markers", name=name, line={"color": color},
            error_y={
                "type": "data", "symmetric": False, "array": (line["ci_high"] - line["value"]).fillna(0),
                "arrayminus": (line["value"] - line["ci_low"]).fillna(0), "thickness": 1,
            },
            hovertemplate=f"{name}<br>k = %{{x}}: %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
        if part["random"].notna().any():
            figure.add_scatter(
                x=[f"{k:,}" for k in part.sort_values("k")["k"]], y=part.sort_values("k")["random"], mode="lines",
                line={"color": color, "dash": "dot", "width": 1}, name="random units (same colour)", showlegend=number == 0,
                hovertemplate=f"{name}, random<br>k = %{{x}}: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
    null = shown.groupby("k")["null"].mean()
    if null.notna().any():
        figure.add_scatter(
            x=["all" if k == 0 else f"{k:,}" for k in [*counts, 0] if k in null.index],
            y=[null[k] for k in [*counts, 0] if k in null.index],
            mode="lines", name="labels permuted", line={"color": CHANCE, "dash": "dash"},
            hovertemplate="labels permuted, k = %{x}: %{y:.3f}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        title="units the probe may read (k)", type="category", categoryorder="array", categoryarray=order
    )
    figure.update_yaxes(title=f"{metric} on test documents" + (" (nats)" if metric == "log_loss" else ""))
    figure.update_layout(height=440)
    return figure
