"""Classes of keys: what attention goes to, beside what attention without preferences would give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.phenomena.attention_figures import draw_classes
from moescope.routing.phenomena.attention_records import HEADS_SQL, HeadSums, head_sums
from moescope.store.run import Run

LOCAL = 16
_CLASSES = ("first", "special", "punctuation", "self", "local", "other", "sink_logit")
_METRICS = (*(f"mass_{name}" for name in _CLASSES), "mass_previous", "entropy", "distance")
_TOKENS_SQL = """
    SELECT sequence_id, is_special, class = 'punctuation' AS is_punctuation
    FROM tokens
    WHERE run_id = $run AND phase = 'prefill'
    ORDER BY sequence_id, position
"""
_COLUMNS = ("metric", "layer", "block", "head", "value", "ci_low", "ci_high", "null", "texts", "n")


@analysis(
    name="attention_classes",
    needs=("head_sequences", "sequences", "tokens"),
    source="definition of moescope; sink logits: arXiv 2508.10925",
    section="phenomena",
    order=31,
)
def attention_classes(run: Run, *, draws: Count = 300, seed: Natural = 0) -> Result:
    """What does attention go to: the first token, special tokens, punctuation, itself, near or far ones?

    The attention of every query is shared out among its keys: the first token of the text, special tokens, punctuation, the
    query's own token, the 16 tokens before it, all others. A key belongs to the first of these that fits it. Where a head
    has a logit of the softmax's own (GPT-OSS), what that takes is a class by itself, `sink logit`, and belongs to no token;
    counting only what keys get would make such a head look as if it attended to nothing. The shares sum to 1.
    `previous` is the token just before, whatever its class; entropy (a sink logit is one more outcome) and distance tell how
    far attention is spread.

    Args:
        draws: bootstrap resamples of documents.
        seed: of resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello, you."], store, name="a", probes=["attention"], progress=False)
        ...     frame = ms.analyze(run, "attention_classes").df()
        >>> layer = frame[(frame["layer"] == 2) & frame["head"].isna() & frame["metric"].str.startswith("mass ")]
        >>> round(float(layer.loc[layer["metric"] != "mass previous", "value"].sum()), 5)
        1.0
    """
    found = head_sums(run, _METRICS)
    if "entropy" not in found:
        raise InputError(
            f"run {run.name!r} has no statistics of attention by classes of keys",
            expected="records of the probe attention",
            fix="record with the probe attention",
        )
    nulls = _uniform(run)
    frames = [
        _of_heads(heads, nulls.get(metric, {}), draws, seed) for metric in _METRICS for heads in found.get(metric, ())
    ]
    frame = pd.concat(frames, ignore_index=True).reindex(columns=list(_COLUMNS))
    for name in ("layer", "head", "texts", "n"):
        frame[name] = frame[name].astype("Int64")
    queries = int(found["entropy"][0].n.sum())
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_classes,
        n=queries,
        n_unit="queries",
        definition="mass: mean over queries of the share of attention that goes to keys of a class: the first token, special tokens, "
        f"punctuation, the query's own token, the {LOCAL} tokens before it, all others, each key in the first that fits; sink logit: "
        "what a logit of the softmax's own takes. previous: the token before. entropy: −Σ A ln A of a row. distance: Σ A · "
        "(query − key). Rows without a head are means over the heads of a layer.",
        units={
            "value": "share of attention",
            "value[entropy]": "nats",
            "value[distance]": "tokens",
            "null": "the same under uniform attention",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="uniform attention of every query over all tokens up to its own, on the same texts (a window that slides is not "
        "taken into account)",
        sql=HEADS_SQL,
        sql_parameters={"run": run.run_id, "condition": "base", "metrics": list(_METRICS)},
        computation="Σ sums ÷ Σ n over texts; means over the heads of a layer",
        notes=("Queries of the texts count; those of generated tokens are not recorded.",),
    )


def _of_heads(heads: HeadSums, nulls: dict[int, float], draws: int, seed: int) -> pd.DataFrame:
    """A row for the layer and one for each head."""
    n = heads.n[:, None].astype(np.float64)
    with_mean = np.concatenate([heads.sums.mean(axis=1, keepdims=True), heads.sums], axis=1)
    value, low, high = bootstrap_ratio(heads.by_document(with_mean), heads.by_document(n), draws=draws, seed=seed)
    expected = sum(nulls.get(int(s), np.nan) for s in heads.sequence) / heads.n.sum() if nulls else np.nan
    return pd.DataFrame(
        {
            "metric": heads.metric.replace("_", " "), "layer": heads.layer, "block": heads.block,
            "head": pd.array([None, *range(heads.sums.shape[1])], dtype="Int64"), "value": value, "ci_low": low, "ci_high": high,
            "null": 0.0 if heads.metric == "mass_sink_logit" else expected, "texts": len(heads.n), "n": int(heads.n.sum()),
        }
    )  # fmt: skip


def _uniform(run: Run) -> dict[str, dict[int, float]]:
    """Metric → text → sum over its queries under uniform attention."""
    frame = run.sql(_TOKENS_SQL).df()
    found: dict[str, dict[int, float]] = {}
    for sequence, part in frame.groupby("sequence_id", sort=True):
        flags = (part[name].fillna(False).to_numpy(bool) for name in ("is_special", "is_punctuation"))
        for metric, total in uniform_sums(*flags).items():
            found.setdefault(metric, {})[int(sequence)] = total
    return found


def uniform_sums(special: NDArray[np.bool_], punctuation: NDArray[np.bool_], *, local: int = LOCAL) -> dict[str, float]:
    """Statistics of uniform causal attention over one text, as sums over its queries.

    Args:
        special, punctuation: [token] what its tokens are.
        local: tokens before the query that count as local.

    Example:
        >>> nothing = np.zeros(2, bool)
        >>> uniform_sums(nothing, nothing)["mass_first"]
        1.5
    """
    length = len(special)
    seen = np.arange(1, length + 1, dtype=np.float64)  # keys that each query sees
    first = np.arange(length) == 0
    special = special & ~first
    punctuation = punctuation & ~first & ~special
    plain = ~(first | special | punctuation)
    so_far = np.concatenate([[0], plain.cumsum()])
    query = np.arange(length)
    near = so_far[query] - so_far[np.maximum(query - local, 0)]
    counts: dict[str, Any] = {
        "first": np.ones(length),
        "special": special.cumsum(),
        "punctuation": punctuation.cumsum(),
        "self": plain,
        "local": near,
        "other": so_far[1:] - plain - near,
    }
    sums = {f"mass_{name}": float((count / seen).sum()) for name, count in counts.items()}
    sums["mass_previous"] = float((1 / seen[1:]).sum())
    return sums | {"entropy": float(np.log(seen).sum()), "distance": float(query.sum() / 2)}


def _title(frame: pd.DataFrame) -> str:
    layers = frame[frame["head"].isna()]
    masses = layers[layers["metric"].isin([f"mass {name.replace('_', ' ')}" for name in _CLASSES])]
    mean = masses.groupby("metric", sort=False)["value"].mean().sort_values(ascending=False)
    null = masses.groupby("metric")["null"].mean()
    top = mean.index[0]
    said = [f"{metric.removeprefix('mass ')} {value:.1%}" for metric, value in mean.items() if value >= 0.0005]
    return (
        f"Most attention goes to keys of the class {top.removeprefix('mass ')}: {mean[top]:.1%} ({null[top]:.1%} under uniform "
        f"attention), over all layers; then {', '.join(said[1:])}"
    )
