"""Massive activations: where they form, on which tokens and channels, how large, and for how many layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.context import around, joined, pieces
from moescope.routing.phenomena.layer_ranges import layer_ranges
from moescope.routing.phenomena.massive_figure import draw_massive
from moescope.routing.phenomena.massive_records import (
    LARGEST_SQL,
    RATIO,
    SMALLEST,
    largest_of_texts,
    massive_activations_of,
    ratio_to,
    top_by_layer,
)
from moescope.store.run import Run

_SPECIAL_SQL = """
    SELECT count(*), count(*) FILTER (WHERE is_special)
    FROM tokens
    WHERE run_id = $run AND position = 0
"""


@analysis(
    name="massive_activations",
    needs=("residual", "residual_sequences"),
    source="arXiv 2402.17762; |x| > 100 and |x| ≥ 1000 × the median |x| as in the code of arXiv 2503.22329",
    section="phenomena",
    order=10,
)
def massive_activations(run: Run, *, contexts: Natural = 12, draws: Count = 500, seed: Natural = 0) -> Result:
    """Where do massive activations form, on which tokens and channels, and how many layers do they last?

    An activation x at a block's output is massive where |x| > 100 and |x| ≥ 1000 × the median |x| over all tokens and channels
    of its text at that layer. Every channel of every token is held against the rule while the model runs. A block *forms*
    massive activations where its output has some and the largest |x| rises over the block before by at least a tenth of the
    largest |x| anywhere.

    The test of existence in the code of arXiv 2503.22329 takes one number a layer, the mean over texts of their largest |x|,
    and holds it against 1000 × the mean of their medians: the rows `mean of maxima`. At the edge of the rule the two
    differ. The last entry that transformers gives as `hidden_states` lies behind the final norm and is no block's output:
    nothing here is taken from it.

    Args:
        contexts: how many of the places where massive activations stand are shown with the text around the largest.
        draws: bootstrap resamples of documents.
        seed: of resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world, how are you?"], store, name="first", progress=False)
        ...     ms.analyze(run, "massive_activations").title.split(";")[0]
        'No massive activation'
    """
    largest = largest_of_texts(run)
    found, recorded = massive_activations_of(run)
    top = top_by_layer(largest)
    parts = [
        top.assign(metric="max |x|"),
        _means(largest),
        _shares(largest, draws, seed),
        _by_channel(found),
        _by_place(found, run, contexts),
    ]
    columns = (
        "layer", "metric", "value", "ci_low", "ci_high", "massive", "forms", "channel", "at", "position", "token", "signed", "ratio",
        "median_abs", "threshold", "last_layer", "layers", "peak_layer", "texts", "n", "context",
    )  # fmt: skip
    frame = pd.concat([part for part in parts if len(part)], ignore_index=True).reindex(columns=list(columns))
    for name in ("channel", "position", "token", "last_layer", "layers", "peak_layer", "texts", "n"):
        frame[name] = frame[name].astype("Int64")
    for name in ("massive", "forms"):
        frame[name] = frame[name].astype("boolean")
    return Result(
        title=_title(largest, found, top),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_massive,
        n=int(top["n"].sum()),
        n_unit="token × layer pairs",
        definition=f"Massive: |x| > {SMALLEST:g} and |x| ≥ {RATIO:g} × the median |x| over all tokens and channels of the text, at "
        "a block's output (the last one before the final norm). max |x|: the largest of each layer; mean of maxima: mean over "
        "texts of their largest |x|, its ratio to the mean of their medians; texts with massive activations: share; massive in "
        "channel: largest of each layer and channel, n tokens; massive at token: largest of each channel and kind of token "
        "(the first of a text, or by its id), first to last layer, n tokens.",
        units={
            "value": "activation",
            "value[texts with massive activations]": "share of texts",
            "ratio": "|x| ÷ median |x|",
            "median_abs": "activation",
            "threshold": "activation",
        },
        interval=f"texts with massive activations: 95 % percentile bootstrap over documents, {draws} resamples",
        sql=LARGEST_SQL,
        sql_parameters={"run": run.run_id},
        computation="the query's rows grouped by layer; rows of massive_activations grouped by layer, channel and kind of token",
        notes=_notes(run, found, recorded),
    )


def _means(largest: pd.DataFrame) -> pd.DataFrame:
    """The test of existence on means over texts."""
    means = largest.groupby("layer", as_index=False)[["value", "median_abs"]].mean()
    means["texts"] = means["layer"].map(largest.groupby("layer").size())
    means["ratio"] = ratio_to(means["value"], means["median_abs"])
    means["threshold"] = np.maximum(SMALLEST, RATIO * means["median_abs"])
    means["massive"] = (means["value"] > SMALLEST) & (means["value"] >= RATIO * means["median_abs"])
    return means.assign(metric="mean of maxima")


def _shares(largest: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """Share of texts with a massive activation at each layer."""
    counts = largest.pivot_table(
        index="document_id", columns="layer", values="massive", aggfunc=["sum", "count"], fill_value=0
    )
    numerator, denominator = (counts[name].to_numpy(np.float64) for name in ("sum", "count"))
    value, low, high = bootstrap_ratio(numerator, denominator, draws=draws, seed=seed)
    return pd.DataFrame(
        {
            "layer": counts["sum"].columns, "metric": "texts with massive activations", "value": value, "ci_low": low,
            "ci_high": high, "texts": denominator.sum(axis=0).astype(int),
        }
    )  # fmt: skip


def _by_channel(found: pd.DataFrame) -> pd.DataFrame:
    order = found.sort_values(["layer", "channel", "value", "token"], ascending=[True, True, False, True])
    groups = order.groupby(["layer", "channel"])
    top = groups.first().reset_index()
    top["n"] = groups["token"].nunique().to_numpy()
    top["texts"] = groups["sequence_id"].nunique().to_numpy()
    return top.assign(metric="massive in channel", massive=True)


def _by_place(found: pd.DataFrame, run: Run, contexts: int) -> pd.DataFrame:
    """One row a channel and kind of token, the largest first."""
    vocabulary = pieces(run)
    kind = found["token_id"].where(found["position"] > 0, -1)
    order = found.assign(kind=kind).sort_values(["value", "token"], ascending=[False, True])
    groups = order.groupby(["channel", "kind"], sort=False)
    top = groups.first().reset_index().rename(columns={"layer": "peak_layer"})
    top["layer"] = groups["layer"].min().to_numpy()
    top["last_layer"] = groups["layer"].max().to_numpy()
    top["layers"] = groups["layer"].nunique().to_numpy()
    top["n"] = groups["token"].nunique().to_numpy()
    top["texts"] = groups["sequence_id"].nunique().to_numpy()
    top["at"] = ["first token" if k < 0 else repr(joined([k], vocabulary)) for k in top["kind"]]
    top["context"] = [
        around(run, int(t), vocabulary, reach=6) if number < contexts else None for number, t in enumerate(top["token"])
    ]
    return top.assign(metric="massive at token", massive=True)


def _title(largest: pd.DataFrame, found: pd.DataFrame, top: pd.DataFrame) -> str:
    if found.empty:
        near = largest.loc[(largest["value"] / largest["threshold"]).idxmax()]
        return (
            f"No massive activation; the nearest is |x| = {near['value']:,.4g} after layer {near['layer']:.0f} (channel "
            f"{near['channel']:.0f}, position {near['position']:.0f}), {near['ratio']:,.0f}× the median: "
            f"{near['value'] / near['threshold']:.1%} of what the rule asks"
        )
    peak = found.loc[found["value"].idxmax()]
    first = found[found["layer"] == found["layer"].min()]
    forming = top.loc[top["forms"], "layer"].astype(int).tolist() or [int(first["layer"].iloc[0])]
    texts, of = found["sequence_id"].nunique(), largest["sequence_id"].nunique()
    where = "on the first token of" if (found["position"] == 0).all() else f"on {found['token'].nunique():,} tokens in"
    channels = found["channel"].nunique()
    return (
        f"Massive activations form in block{'s' * (len(forming) > 1)} {layer_ranges(forming)}, {where} {texts:,} of {of:,} texts: "
        f"|x| up to {peak['value']:,.5g} in channel {peak['channel']}, {peak['ratio']:,.0f}× the median; {channels} "
        f"channel{'s qualify' if channels > 1 else ' qualifies'}, at the outputs of blocks {layer_ranges(found['layer'])}"
    )


def _notes(run: Run, found: pd.DataFrame, recorded: bool) -> tuple[str, ...]:
    texts, special = run.store.fetch(_SPECIAL_SQL, {"run": run.run_id})[0]
    notes = [
        f"{special:,} of {texts:,} texts begin with a special token; with and without one, values, tokens and even existence can "
        "differ: record both to compare."
    ]
    if not recorded:
        notes.append(
            "The run does not hold every massive activation as such: up to three channels a token are known, from the table residual."
        )
    if (found["phase"] == "decode").any():
        notes.append("Generated tokens are held against the median of the text that was given.")
    return tuple(notes)
