"""What a router's own probabilities say: sure of each token, and different from token to token?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.balance.router_scores import logit_chunks, scored_routers, scoring
from moescope.routing.grid import layer_name
from moescope.routing.specialization.divergence import entropy_bits
from moescope.routing.specialization.layer_lines import layer_lines
from moescope.routing.specialization.resampling import centred_interval
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Floats = NDArray[np.float64]

INFORMATION, GLOBAL, LOCAL = "router information", "entropy of the mean distribution", "mean entropy of a token"


@analysis(
    name="router_information",
    needs=("routing", "router_logits"),
    source="arXiv 2306.04640 (router mutual information), arXiv 2206.02770 (local and global entropy by group)",
    section="specialization",
    order=45,
)
def router_information(run: Run, *, draws: Count = 500, seed: Natural = 0) -> Result:
    """How many bits does a router's choice carry about the token, over all text and within each label?

    Over the tokens of the run, or of a label, with p the router's distribution over all its experts: the mean entropy of p
    (local: how undecided each token is), the entropy of the mean p (global: how evenly the experts are used), and their
    difference, the mutual information of expert and token: 0 where every token gets the same p, log2(experts) where each
    token is sure and all experts are used alike. ModuleFormer trains with it; LIMoE with the two entropies for each kind of
    input.

    Trap: this is of the probabilities before the top-k, not of decisions; `routing_information` asks the decisions. Where
    scores are no softmax (sigmoid routers) they are divided by their sum.

    Args:
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Raises:
        InputError: the run has no router logits.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> probes = ("tokens", "routing", "router_logits")
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", probes=probes, progress=False)
        ...     frame = ms.analyze(run, "router_information").df()
        >>> bool((frame["value"] >= 0).all())
        True
    """
    trace = read_trace(run)
    routers = scored_routers(trace)
    drawn = document_weights(trace.n_documents, draws=draws, seed=seed).astype(np.float64)
    rows = []
    for router in routers:
        for label, documents, sums in _groups(trace, router):
            row = {"layer": router.layer, "block": router.block, "label": label, "n": int(sums[:, -1].sum())}
            rows += [row | measured for measured in _measured(sums, drawn[:, documents], router.n_experts)]
    frame = pd.DataFrame(rows)
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame[frame["label"].isna() & (frame["metric"] == INFORMATION)]["n"].sum()),
        n_unit="token × router pairs",
        definition="p is the router's distribution over all its experts. Global: entropy of the mean p over tokens; local: mean "
        "entropy of p; router information: global − local, the mutual information of expert and token. Rows without a label "
        "are over all tokens.",
        units={"value": "bits", "null": "bits"},
        interval=f"95 % bootstrap over documents, {draws} resamples, centred on the estimate",
        null="information: 0, every token gets the same distribution; entropies: log2 of the experts, none is preferred",
        computation="probabilities of stored logits, summed for each document",
        notes=trace.notes,
    )


def _groups(trace: Trace, router: Router) -> list[tuple[str | None, NDArray[np.int64], Floats]]:
    """All tokens, then each label: its name, documents, and their [document, expert + 2] sums of p, of entropy, of tokens."""
    rule = scoring(trace, router)
    labels = len(trace.label_names) + 1
    sums = np.zeros((trace.n_documents * labels, router.n_experts + 2))
    for rows, logits in logit_chunks(trace, router):
        p = rule.probabilities(logits)
        entropy = -np.einsum("te,te->t", p, np.log2(np.maximum(p, np.float32(1e-30))), dtype=np.float64)
        label = np.where(
            trace.label[rows] < 0, labels - 1, trace.label[rows]
        )  # the last place is for tokens without one
        unit = trace.document[rows].astype(np.int64) * labels + label
        order = np.argsort(unit, kind="stable")
        present, first = np.unique(unit[order], return_index=True)
        sums[present, :-2] += np.add.reduceat(p[order], first, axis=0, dtype=np.float64)
        sums[present, -2] += np.add.reduceat(entropy[order], first)
        sums[present, -1] += np.diff(np.append(first, len(order)))
    by_label = sums.reshape(trace.n_documents, labels, -1)
    found: list[tuple[str | None, Floats]] = [(None, by_label.sum(1))]
    found += [(name, by_label[:, number]) for number, name in enumerate(trace.label_names)]
    present_documents = [(name, np.flatnonzero(part[:, -1] > 0), part) for name, part in found]
    return [(name, documents, part[documents]) for name, documents, part in present_documents if len(documents)]


def _entropies(sums: Floats) -> dict[str, Floats]:
    """Each metric, from [..., expert + 2] sums."""
    tokens = sums[..., -1]
    mean = sums[..., :-2] / tokens[..., None]
    # Probabilities are stored as 32-bit numbers: their sum is 1 to seven digits.
    whole, local = entropy_bits(mean / mean.sum(-1, keepdims=True)), sums[..., -2] / tokens
    return {INFORMATION: np.maximum(whole - local, 0.0), GLOBAL: whole, LOCAL: local}


def _measured(sums: Floats, drawn: Floats, n_experts: int) -> list[dict[str, Any]]:
    """The three rows of one router and group of documents."""
    observed = _entropies(sums.sum(0))
    resampled = drawn @ sums
    spread = _entropies(resampled[resampled[:, -1] > 0]) if len(sums) > 1 else None
    rows = []
    for metric, value in observed.items():
        low, high = (np.nan, np.nan) if spread is None else centred_interval(value, spread[metric])
        null = 0.0 if metric == INFORMATION else float(np.log2(n_experts))
        least, most = max(float(low), 0.0), min(float(high), float(np.log2(n_experts)))
        bounds = {"ci_low": np.nan, "ci_high": np.nan} if spread is None else {"ci_low": least, "ci_high": most}
        rows.append({"metric": metric, "value": float(value), **bounds, "null": null})
    return rows


def _title(frame: pd.DataFrame) -> str:
    whole = frame[frame["label"].isna()]
    information = whole[whole["metric"] == INFORMATION]
    most, least = information.loc[information["value"].idxmax()], information.loc[information["value"].idxmin()]
    most_possible = whole[whole["metric"] == GLOBAL]["null"].max()
    if len(information) == 1:
        return f"The router's choice carries {most['value']:.2f} of {most_possible:.2f} bits about the token"
    return (
        f"A router's choice carries from {least['value']:.2f} bits about the token in "
        f"{layer_name(least['layer'], least['block'])} to {most['value']:.2f} in {layer_name(most['layer'], most['block'])}, "
        f"of at most {most_possible:.2f}"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    return layer_lines(
        frame[frame["label"].isna()],
        series="metric",
        title_y="bits",
        null_name="no preference (entropies), 0 (information)",
    )
