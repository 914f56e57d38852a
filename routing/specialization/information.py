"""Mutual information between the expert chosen and what is known of a token, in bits."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.specialization.divergence import distribution, entropy_bits
from moescope.routing.specialization.layer_lines import layer_lines
from moescope.routing.specialization.resampling import LINEARISED, drawn_beyond_once, linearised_interval
from moescope.routing.specialization.token_groups import (
    TokenGroups,
    group_tokens,
    log2_table,
    previous_id,
    token_classes,
)
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Floats = NDArray[np.float64]
Given = Literal["all", "label", "token id", "id before it", "class", "position"]


@analysis(
    name="routing_information",
    needs=("routing", "tokens"),
    source="arXiv 2402.01739 (token-id against position and domain), arXiv 2306.04640; Miller 1955 (bias)",
    section="specialization",
    order=40,
)
def routing_information(
    run: Run,
    *,
    given: Given = "all",
    permutations: Count = 100,
    shuffles: Count = 2,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How many bits does a token's label, id, position or class say about the expert it goes to?

    I(expert; X) = H(expert) − H(expert | X) over decisions, every slot of a token counting as one; `share` is it over
    H(expert). X is the document's label, the token's id, the id before it, its class, or its position.

    Trap: from a finite sample it is above 0 even where X says nothing. The column `bias` is the first-order term
    (experts − 1)(values of X − 1) ÷ (2 decisions ln 2), which holds where every value of X is seen many times and is far too
    large for rare ids; the chance level is the same measure after shuffling, and the difference is the finding. Labels are
    shuffled over documents (tokens of a document are alike for other reasons too), everything else over tokens.

    Args:
        given: X; all that the run has by default.
        permutations: shuffles of labels over documents.
        shuffles: of ids, classes and positions over tokens.
        draws: bootstrap resamples of documents.
        seed: of all three.

    Raises:
        InputError: the run does not have the X asked for.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0] * 4, "position": [0, 1, 2, 3], "layer": [0] * 4,
        ...                   "experts": [[0], [1], [0], [1]], "token_id": [5, 6, 5, 6]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     ms.analyze(run, "routing_information", given="token id").df()["value"][0].item()  # the id says it all
        1.0
    """
    trace = read_trace(run)
    keys, missing = _keys(trace, given)
    drawn = drawn_beyond_once(trace.n_documents, draws=draws, seed=seed)
    rows = []
    for name, key in keys.items():
        groups = group_tokens(key)
        for router in trace.routers:
            row, experts = _observed(trace, router, groups, drawn)
            if name == "label":
                row["null"] = _label_null(trace, router, permutations, seed)
            else:
                row["null"] = _token_null(router, groups, experts, shuffles, seed)
            rows.append({"layer": router.layer, "block": router.block, "given": name, **row})
    frame = pd.DataFrame(rows).assign(metric="mutual information")
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.decisions,
        n_unit="decisions",
        definition="I(expert; X) = H(expert) − H(expert | X) in bits over decisions, for each router and each X: "
        f"{', '.join(keys)}. share = I ÷ H(expert).",
        units={"value": "bits", "null": "bits", "bias": "bits", "entropy": "bits", "share": "share of H(expert)"},
        interval=LINEARISED.format(draws=draws, fixed="; it carries the same bias as the estimate"),
        null=f"the same after shuffling: labels over documents (mean of {permutations}), all else over tokens "
        f"(mean of {shuffles})",
        computation="tokens sorted by X, decisions counted group by group",
        notes=(*trace.notes, *missing),
    )


def _keys(trace: Trace, given: Given) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """Each X that the run has, as [token] numbers (−1 for none), and what to say of the others."""
    keys: dict[str, NDArray[Any]] = {
        "token id": trace.token_id,
        "label": trace.label,
        "id before it": previous_id(trace),
        "class": token_classes(trace)[0],
        "position": trace.position,
    }
    if given != "all":
        keys = {given: keys[given]}
    had = {name: key for name, key in keys.items() if (key >= 0).any()}
    if not had:
        fix = (
            'give documents a "label" (--label-field), and record again' if given == "label" else "record it from text"
        )
        raise InputError(f"run {trace.run.name!r} has no {given} of any token", fix=fix)
    return had, tuple(f"The run has no {name} of any token." for name in keys if name not in had)


def information_bits(decisions: int, group_sizes: NDArray[np.int64], group_bits: float, expert_bits: float) -> float:
    """I(expert; group) from sums of count · log2 count.

    Args:
        decisions: N; group_sizes: [group] decisions of each.
        group_bits: Σ over groups and experts of count · log2 count.
        expert_bits: Σ over experts of count · log2 count.
    """
    sizes = group_sizes[group_sizes > 0].astype(np.float64)
    joint = group_bits - float((sizes * np.log2(sizes)).sum()) - expert_bits + decisions * np.log2(decisions)
    return max(float(joint / decisions), 0.0)


def _observed(trace: Trace, router: Router, groups: TokenGroups, drawn: Floats) -> tuple[dict[str, Any], Floats]:
    """Columns of one row, and [expert] decisions of the tokens that have an X."""
    from moescope.routing.specialization.group_kernels import information_influence

    counts = np.bincount(router.experts[groups.pool].ravel(), minlength=router.n_experts).astype(np.float64)
    share = distribution(counts)
    value, log2 = _information(router, groups, groups.order, counts)
    influence = np.zeros(trace.n_documents)
    bits = -np.log2(np.where(share > 0, share, 1.0))
    information_influence(
        router.experts, groups.order, groups.starts, router.n_experts, log2, bits, value, trace.document, influence
    )
    entropy = float(entropy_bits(share))
    low, high = linearised_interval(np.array(value), influence, drawn, most=entropy)
    used, decisions = int((counts > 0).sum()), int(counts.sum())
    return {
        "value": value,
        "ci_low": float(low),
        "ci_high": float(high),
        "bias": (used - 1) * (len(groups.key) - 1) / (2 * decisions * np.log(2)),
        "share": value / entropy if entropy > 0 else 0.0,
        "entropy": entropy,
        "groups": len(groups.key),
        "n": decisions,
    }, counts


def _information(router: Router, groups: TokenGroups, order: NDArray[np.int64], counts: Floats) -> tuple[float, Floats]:
    from moescope.routing.specialization.group_kernels import group_statistics

    log2 = log2_table(int(groups.sizes.max()))
    bits = group_statistics(router.experts, order, groups.starts, router.n_experts, log2)[3]
    expert_bits = float((counts * np.log2(np.maximum(counts, 1))).sum())
    sizes = groups.sizes * router.top_k
    return information_bits(len(order) * router.top_k, sizes, float(bits.sum()), expert_bits), log2


def _token_null(router: Router, groups: TokenGroups, counts: Floats, shuffles: int, seed: int) -> float:
    generator = np.random.default_rng(seed)
    values = [_information(router, groups, groups.shuffled(generator), counts)[0] for _ in range(shuffles)]
    return float(np.mean(values))


def _label_null(trace: Trace, router: Router, permutations: int, seed: int) -> float:
    """Mean information of labels shuffled over the labelled documents."""
    labelled = trace.label >= 0
    unit = trace.document[labelled].astype(np.int64) * len(trace.label_names) + trace.label[labelled]
    units, row = np.unique(unit, return_inverse=True)
    cell = (row * router.n_experts)[:, None] + router.experts[labelled]
    counts = np.bincount(cell.ravel(), minlength=len(units) * router.n_experts).reshape(len(units), -1)
    label = units % len(trace.label_names)
    generator = np.random.default_rng(seed)
    expert_counts = counts.sum(0).astype(np.float64)
    expert_bits = float((expert_counts * np.log2(np.maximum(expert_counts, 1))).sum())
    values = []
    for _ in range(permutations):
        member = generator.permutation(label)[None, :] == np.arange(len(trace.label_names))[:, None]
        joint = member.astype(np.float64) @ counts
        bits = float((joint * np.log2(np.maximum(joint, 1))).sum())
        values.append(information_bits(int(counts.sum()), joint.sum(1).astype(np.int64), bits, expert_bits))
    return float(np.mean(values))


def _title(frame: pd.DataFrame) -> str:
    mean = frame.groupby("given", sort=False)[["value", "null", "entropy", "ci_low"]].mean()
    best = (mean["value"] - mean["null"]).idxmax()
    row = mean.loc[best]
    if row["value"] <= row["null"] or row["ci_low"] <= row["null"]:
        return (
            f"The {best} says no more about the expert than after shuffling: {row['value']:.3f} and {row['null']:.3f} bits, "
            "layers averaged"
        )
    return (
        f"The {best} says {row['value']:.3f} of {row['entropy']:.2f} bits about the expert, layers averaged; "
        f"{row['null']:.3f} bits after shuffling"
        + (", the largest gain of all that is known of a token" if len(mean) > 1 else "")
    )


def _draw(result: Result) -> go.Figure:
    return layer_lines(
        result.df(), series="given", title_y="information about the expert (bits)", null_name="after shuffling"
    )
