"""Context independence: does the same id, or the same position, get the same experts everywhere?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.specialization.layer_lines import layer_lines
from moescope.routing.specialization.resampling import LINEARISED, drawn_beyond_once, linearised_interval
from moescope.routing.specialization.token_groups import (
    TokenGroups,
    group_tokens,
    log2_table,
    previous_id,
    require_token_ids,
)
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

SPREAD = "standard deviation over experts"
AGREEMENT = "agreement of two occurrences"


@analysis(
    name="context_independence",
    needs=("routing", "tokens"),
    source="arXiv 2402.01739 (context-independent specialization)",
    section="specialization",
    order=30,
)
def context_independence(
    run: Run, *, more_than: Natural = 128, shuffles: Count = 2, draws: Count = 1000, seed: Natural = 0
) -> Result:
    """Does a token id get the same experts in every context, more than a position does?

    Two measures, each for the tokens that share an id, a position, or the id before them:
    the standard deviation over experts of the distribution of their decisions over experts (0 where all experts are used
    alike, √(k⁻¹ − E⁻¹)/√E where always the same k), averaged over ids with more than 128 occurrences, as OpenMoE does;
    and the share of their k experts that two such tokens have in common, over all pairs of tokens, averaged over ids that
    occur twice or more: it needs no threshold, because pairs do not make rare ids look sure of themselves.

    Trap: the standard deviation falls with the number of experts and is above 0 for a finite number of occurrences; compare
    it with that of positions and with shuffled tokens, never between models.

    Args:
        more_than: the standard deviation is taken over ids (positions) with more occurrences than this.
        shuffles: of ids (positions) over tokens, for the chance level.
        draws: bootstrap resamples of documents.
        seed: of both.

    Raises:
        InputError: the run has no token ids, or neither an id nor a position occurs twice.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0] * 4, "position": [0, 1, 2, 3], "layer": [0] * 4,
        ...                   "experts": [[0], [1], [0], [1]], "token_id": [5, 6, 5, 6]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     ms.analyze(run, "context_independence").df()["value"][0].item()  # both ids always choose one expert
        1.0
    """
    trace = read_trace(run)
    require_token_ids(trace)
    keys = {"token id": trace.token_id, "position": trace.position, "id before it": previous_id(trace)}
    drawn = drawn_beyond_once(trace.n_documents, draws=draws, seed=seed)
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for given, key in keys.items():
        groups = group_tokens(key)
        for metric, least in ((AGREEMENT, 2), (SPREAD, more_than + 1)):
            kept = groups.at_least(max(least, 2))
            if not len(kept.key):
                missing.append(f"No {given} occurs {max(least, 2):,} times or more, so its {metric} is left out.")
                continue
            rows += [
                _row(trace, router, kept, metric, drawn, shuffles=shuffles, seed=seed) | {"given": given}
                for router in trace.routers
            ]
    if not rows:
        raise InputError(f"no token id and no position occurs twice in run {run.name!r}", fix="record a longer corpus")
    frame = pd.DataFrame(rows)
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.tokens,
        n_unit="tokens",
        definition="Over the tokens that share an id (a position, the id before them): the share of the k experts that two of "
        "them have in common, averaged over pairs and then ids; and the standard deviation over experts of the distribution "
        f"of their decisions, averaged over ids with more than {more_than} occurrences.",
        units={f"value[{AGREEMENT}]": "share of k experts", f"value[{SPREAD}]": "share of decisions", "n": "ids"},
        interval=LINEARISED.format(draws=draws, fixed=""),
        null=f"the same with ids (positions) shuffled over tokens, mean of {shuffles} shuffles",
        computation="tokens sorted by id, decisions counted id by id",
        notes=(*trace.notes, *missing),
    )


def _row(
    trace: Trace,
    router: Router,
    groups: TokenGroups,
    metric: str,
    drawn: NDArray[np.float64],
    *,
    shuffles: int,
    seed: int,
) -> dict[str, Any]:
    """One measure of one router for one kind of group."""
    from moescope.routing.specialization.group_kernels import group_statistics, spread_influence

    log2 = log2_table(int(groups.sizes.max()))
    generator = np.random.default_rng(seed)
    orders = [groups.order] + [groups.shuffled(generator) for _ in range(shuffles)]
    squares = [group_statistics(router.experts, order, groups.starts, router.n_experts, log2)[2] for order in orders]
    measure = _agreement if metric == AGREEMENT else _spread
    values = [float(measure(found, groups.sizes, router).mean()) for found in squares]
    means = np.array([measure_of(squares[0], groups.sizes, router).mean() for measure_of in (_spread, _agreement)])
    influence = np.zeros((trace.n_documents, 2))
    spread_influence(
        router.experts, groups.order, groups.starts, router.n_experts, squares[0], means, trace.document, influence
    )
    of_metric = influence[:, 1 if metric == AGREEMENT else 0]
    low, high = linearised_interval(np.array(values[0]), of_metric, drawn, most=1.0)
    return {
        "layer": router.layer,
        "block": router.block,
        "metric": metric,
        "value": values[0],
        "ci_low": float(low),
        "ci_high": float(high),
        "null": float(np.mean(values[1:])),
        "n": len(groups.key),
        "occurrences": len(groups.order),
    }


def _agreement(squares: NDArray[np.float64], sizes: NDArray[np.int64], router: Router) -> NDArray[np.float64]:
    """[group] share of the k experts that two of its tokens have in common."""
    decisions = sizes * router.top_k
    return (squares - decisions) / (decisions * (sizes - 1.0))


def _spread(squares: NDArray[np.float64], sizes: NDArray[np.int64], router: Router) -> NDArray[np.float64]:
    """[group] standard deviation over experts of its decisions' distribution."""
    mean_square = squares / (sizes * router.top_k) ** 2.0 / router.n_experts
    return np.sqrt(np.maximum(mean_square - 1 / router.n_experts**2, 0.0))


def _title(frame: pd.DataFrame) -> str:
    pairs = frame[frame["metric"] == AGREEMENT].groupby("given")[["value", "null"]].mean()
    said = [
        f"{row.value:.0%} of their experts where the {given} is the same (shuffled {row.null:.0%})"
        for given, row in zip(pairs.index, pairs.itertuples(), strict=True)
        if given != "id before it"
    ]
    order = sorted(said, key=lambda text: "token id" not in text)
    return "Two tokens share " + " and ".join(order)


def _draw(result: Result) -> go.Figure:
    return layer_lines(
        result.df(),
        series="given",
        panel="metric",
        title_y="share",
        null_name="shuffled over tokens",
        percent=True,
        one_scale=False,
    )
