"""Induction and echo heads: who looks at earlier copies of a token, and at what came after them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.phenomena.head_figures import draw_heads
from moescope.routing.phenomena.head_records import (
    HEADS_SQL,
    condition_of,
    groups_of,
    head_record,
    leading,
    needed_record,
)
from moescope.store.run import Run

_NULLS = {
    "induction": "other offset",
    "echo": "other offset",
    "previous token": "other offset, one key",
    "induction, mean over copies": "other offset, mean over copies",
    "echo, mean over copies": "other offset, mean over copies",
}
_PROTOCOL = "moescope phenomena MODEL, or moescope.probes.phenomena.induction.induction_heads(model, store=store)"
_COLUMNS = (
    "layer", "block", "head", "metric", "value", "ci_low", "ci_high", "null", "above", "key_value_head", "rank", "protected", "n"
)  # fmt: skip


@analysis(
    name="induction_heads",
    needs=("head_sequences",),
    source="arXiv 2407.15891 (RazorAttention) and its released code; arXiv 2209.11895",
    section="phenomena",
    order=70,
)
def induction_heads(
    run: Run,
    *,
    threshold: float = 0.3,
    induction_share: float = 0.14,
    echo_share: float = 0.01,
    grouped: bool = True,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """Which heads look at what came after a token before (induction), and which at the token itself (echo)?

    On random tokens that repeat, induction is the mean share of a query's attention that goes to the tokens after its earlier
    copies, echo the share that goes to the copies, and previous token the share of the token just before. The chance level is the
    same read at other offsets.

    RazorAttention keeps the whole cache of the heads that lead: 14 % by induction and 1 % by echo, ranked over all layers, each
    key-value head by the largest of its query heads: `protected`. Traps: its released code builds attention from queries and keys
    without rotary positions and norms, where here it is what the model attended to; and it takes the mean over copies
    (`…, mean over copies`), which no head can bring to 1 where there are several.

    Args:
        threshold: share of attention from which a head is counted in the title; ours, since none is published.
        induction_share: of the key-value heads, protected by induction, rounded up.
        echo_share: the same by echo.
        grouped: rank key-value heads, by the largest of their query heads; otherwise query heads.
        draws: bootstrap resamples of sequences.
        seed: of resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.probes.phenomena.induction import induction_heads
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = induction_heads(ms.load("demo"), segment=16, repeats=2, draws=2, store=store)
        ...     ms.analyze(found.run, "induction_heads").df()["metric"].nunique()
        5
    """
    for name, share in (
        ("threshold", threshold),
        ("induction_share", induction_share),
        ("echo_share", echo_share),
    ):
        if not 0 <= share <= 1:
            raise InputError(f"parameter {name!r} cannot be {share!r}", expected="a share, 0 to 1")
    parts = []
    for metric, null in _NULLS.items():
        record = needed_record(run, metric, protocol=_PROTOCOL)
        chance = head_record(run, null)
        part = record.frame(metric, draws=draws, seed=seed, null=None if chance is None else chance.value)
        part["key_value_head"] = groups_of(run, record.heads)
        parts.append(part)
        documents = record.documents
    shares = {"induction": induction_share, "echo": echo_share}
    parts = [_ranked(part, shares.get(metric), grouped) for part, metric in zip(parts, _NULLS, strict=True)]
    frame = pd.concat(parts, ignore_index=True)
    frame["above"] = frame["value"] >= threshold
    frame = frame.reindex(columns=list(_COLUMNS))
    frame["rank"], frame["protected"] = frame["rank"].astype("Int64"), frame["protected"].astype("boolean")
    return Result(
        title=_title(parts, threshold),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_heads,
        n=int(documents),
        n_unit="sequences of repeated random tokens",
        definition="For queries i in the second and later copies of a segment of n random tokens: induction = mean over i of "
        "Σ_c A[i, i − c·n + 1], echo = mean over i of Σ_c A[i, i − c·n], over all earlier copies c; mean over copies: the mean over pairs "
        "of i and c; previous token = mean over i of A[i, i − 1]. rank: place among key-value heads by their largest query head; "
        f"protected: the first {induction_share:.0%} by induction and {echo_share:.0%} by echo.",
        units={"value": "share of attention", "n": "queries"},
        interval=f"95 % percentile bootstrap over sequences, {draws} resamples",
        null="the same attention read at other offsets: c·n − 1 − δ, for 8 values of δ drawn for each sequence",
        sql=HEADS_SQL,
        sql_parameters={"run": run.run_id, "metric": "induction", "condition": condition_of(run, "induction")},
        computation="means over sequences of the query's rows; bootstrap; ranking",
        notes=tuple(str(note) for note in run.info["summary"].get("notes") or []),
    )


def _ranked(part: pd.DataFrame, share: float | None, grouped: bool) -> pd.DataFrame:
    """Rank key-value heads (or heads) over all layers, and mark the first share of them as protected."""
    keys = ["layer", "block", "key_value_head" if grouped else "head"]
    best = part.groupby(keys, as_index=False)["value"].max().sort_values("value", ascending=False, kind="stable")
    best["rank"] = np.arange(1, len(best) + 1)
    part = part.merge(best.drop(columns="value"), on=keys, how="left")
    if share is not None:
        part["protected"] = part["rank"] <= math.ceil(share * len(best))
    return part


def _title(parts: list[pd.DataFrame], threshold: float) -> str:
    texts = []
    for part, name in zip(parts, ("induction", "echo"), strict=False):
        above = int((part["value"] >= threshold).sum())
        texts.append(f"{above} of {len(part)} heads have {name} ≥ {threshold:g} ({leading(part, 3)})")
    best = parts[0].sort_values("value", ascending=False).iloc[0]
    ratio = best["value"] / best["null"] if best.get("null", 0) > 0 else math.nan
    return "; ".join(texts) + (
        f"; the first is {ratio:,.{0 if ratio >= 10 else 1}f}× chance" if math.isfinite(ratio) else ""
    )
