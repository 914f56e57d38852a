"""CETT and the activation ratio it gives: how many neurons a token needs for most of its MLP output."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.grid import series_figure
from moescope.routing.neurons.neuron_activity import NEURONS
from moescope.routing.neurons.recorded_vectors import Vectors, read_vectors, reading_notes, sites_of
from moescope.routing.neurons.tail_error import cut_at, gaussian_ratio
from moescope.store.run import Run

_RATIO = "activation ratio"


@analysis(
    name="neuron_cett",
    needs=("activations",),
    source="CETT: arXiv 2402.03804, arXiv 2411.02335, thunlp/SparsingLaw src/calc_activation.py; under unit columns",
    section="neurons",
    order=20,
)
def neuron_cett(
    run: Run, *, target: float = 0.2, tokens: Count = 1024, draws: Count = 500, seed: Natural = 0
) -> Result:
    """What share of its neurons does a layer need, if its output may lose no more than a given part?

    The largest threshold t is searched such that leaving out the neurons of smaller output norm changes the output by no
    more than `target` (CETT, cumulative error of tail truncation); the activation ratio is the share of neurons that
    stay. The full definition weighs neuron i by its column of W_down, which a store does not hold. Here the columns of W_down
    are taken as orthogonal and of one length, so CETT(t) is the mean over tokens of ‖a below t‖ ÷ ‖a‖. With the weights
    at hand, `moescope.routing.neurons.tail_error.cut_at(neurons, target, down=W_down)` gives the full CETT.

    Args:
        target: CETT to stay within.
        tokens: recorded tokens to look at, in whole sequences.
        draws: bootstrap resamples of documents, the threshold held fixed.
        seed: of drawing sequences and of resampling.
    """
    if not 0 <= target <= 1:
        raise InputError(f"parameter 'target' cannot be {target!r}", expected="a CETT from 0 to 1")
    read, rows, silent = [], [], []
    for vectors in read_vectors(run, sites_of(run, NEURONS), limit=tokens, seed=seed):
        read.append(vectors.emptied())
        if (vectors.values != 0).any():
            rows += _rows(vectors, target, draws, seed)
        else:
            silent.append(str(vectors.site))
    if not rows:
        raise InputError(f"every recorded neuron of run {run.name!r} is 0", found=", ".join(silent))
    frame = pd.DataFrame(rows)
    notes: tuple[str, ...] = (
        "Columns of W_down are taken as orthogonal and of one length: weights are not in the store.",
    )
    notes += (f"All neurons are 0 at {', '.join(silent)}.",) if silent else ()
    return Result(
        title=_title(frame, target),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=max(len(v.token) for v in read),
        n_unit="tokens",
        definition="CETT(t): mean over tokens of ‖a below t‖/‖a‖, a the input of the down projection, whose columns are taken as "
        "orthogonal and of one length. threshold: the largest t with CETT(t) within the target, among 65,536 candidates up "
        "to the 0.99 quantile of |a|. activation ratio: share of neurons with |a| ≥ t and a ≠ 0.",
        units={
            f"value[{_RATIO}]": "share of neurons",
            "value[threshold]": "activation",
            "value[CETT]": "relative error",
            "n": "tokens",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples, the threshold held fixed",
        null="the activation ratio of independent normal neurons at the same CETT",
        computation="bisection on sorted neurons of every token",
        notes=(*notes, *reading_notes(read)),
    )


def _rows(vectors: Vectors, target: float, draws: int, seed: int) -> list[dict[str, object]]:
    some = (vectors.values != 0).any(axis=1)
    cut = cut_at(vectors.values, target)
    document = vectors.document[vectors.at[some]]
    total = np.bincount(document, cut.kept, minlength=vectors.documents).astype(np.float64)
    count = np.bincount(document, minlength=vectors.documents).astype(np.float64)
    value, low, high = bootstrap_ratio(total, count, draws=draws, seed=seed)
    where = {
        "layer": vectors.site.layer,
        "block": vectors.site.block,
        "inside": vectors.inside,
        "n": len(vectors.token),
    }
    none = {"ci_low": np.nan, "ci_high": np.nan, "null": np.nan}
    ratio = {"ci_low": float(low), "ci_high": float(high), "null": gaussian_ratio(target)}
    return [
        {**where, "metric": _RATIO, "value": float(value), **ratio},
        {**where, "metric": "threshold", "value": cut.threshold, **none},
        {**where, "metric": "CETT", "value": cut.cett, **none},
    ]


def _title(frame: pd.DataFrame, target: float) -> str:
    part = frame[frame["metric"] == _RATIO]
    low, high = part.loc[part["value"].idxmin()], part.loc[part["value"].idxmax()]
    spread = (
        "" if len(part) < 2 else f", from {low['value']:.1%} in {_named(low)} to {high['value']:.1%} in {_named(high)}"
    )
    null = part["null"].iloc[0]
    return (
        f"At a CETT of {target:g} (unit columns) {part['value'].mean():.1%} of neurons stay{spread}; "
        f"normal neurons would keep {null:.1%}"
    )


def _named(row: pd.Series) -> str:
    return f"L{row['layer']}" + (" (experts)" if row["inside"] == "experts" else "")


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    part = frame[frame["metric"] == _RATIO]
    figure = series_figure(
        part,
        x=[_named(row) for _, row in part.iterrows()],
        title_x="layer",
        title_y=f"activation ratio at CETT {result.parameters.get('target', 0.2):g}",
        null=list(part["null"]),
        null_name="independent normal neurons",
    )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure
