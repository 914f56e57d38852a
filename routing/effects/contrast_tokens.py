"""Which experts go with given tokens: normalised pointwise mutual information, as cognitive experts are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.core.statistics import benjamini_hochberg, document_weights
from moescope.routing.context import joined, pieces
from moescope.routing.effects.document_p_values import ratio_p
from moescope.routing.grid import expert_grid, layer_name
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run

Array = NDArray[np.float64]

_TAILS = (0.025, 0.975)
_COMMON = 8
_FOUND = 0.05


@analysis(
    name="token_experts",
    needs=("routing", "tokens"),
    source="RICE, arXiv 2505.14681: nPMI of thinking tokens and experts",
    section="specialization",
    order=82,
)
def token_experts(run: Run, *, words: str | None = None, draws: Count = 1000, seed: Natural = 0) -> Result:
    """Which experts go with given tokens, such as those that mark thinking?

    Normalised pointwise mutual information of "the token is one of the words" (x) and "the token chooses the expert" (e),
    over all tokens: nPMI = log2(p(x, e) / (p(x) p(e))) / −log2 p(x, e). It is 0 where the two are independent, 1 where one
    never comes without the other, −1 where they never meet.

    The null is in closed form: with words shuffled within documents, the tokens that are both x and e have the sum of
    hypergeometric means Σ n_x n_e / n over documents. p is that of a t-test over documents of observed less expected, since
    words come in bursts and routing is sticky, so that tokens of one document are not independent; it is 1 where fewer than
    two documents hold a word. q by Benjamini and Hochberg.

    Args:
        words: tokens, divided by commas: ids (13,27), or texts as the vocabulary has them, spaces at the ends not counted
            (Alternatively,Wait); where not given, the run's eight most frequent ids.
        draws: bootstrap resamples of documents.
        seed: of the bootstrap.

    Raises:
        InputError: no word is a token of the run, or every token is one of the words.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0] * 4, "position": [0, 1, 2, 3], "layer": [0] * 4,
        ...                   "experts": [[0], [1], [0], [1]], "token_id": [5, 6, 5, 7]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     ms.analyze(run, "token_experts", words="5").df().set_index("expert")["value"].to_dict()
        {0: 1.0, 1: -1.0}
    """
    trace = read_trace(run)
    ids, missing = _ids(trace, words)
    word = np.isin(trace.token_id, ids)
    if word.all() or not word.any():
        raise InputError(
            f"{'every' if word.any() else 'no'} token of run {run.name!r} is one of the words",
            expected="words that some of the tokens are",
        )
    frame = pd.concat([_of_router(trace, number, word, draws, seed) for number in range(len(trace.routers))])
    frame["q"] = benjamini_hochberg(frame["p"].to_numpy())
    frame = frame.sort_values(["q", "value"], ascending=[True, False], kind="stable").reset_index(drop=True)
    shown = _shown(run, ids)
    return Result(
        title=_title(frame, shown),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.tokens,
        n_unit=f"tokens, {int(word.sum()):,} of them among the words",
        definition=f"nPMI = log2(p(x, e) / (p(x) p(e))) / −log2 p(x, e); x: the token is one of {shown}; e: it chooses the "
        "expert.",
        units={
            "value": "nPMI, −1 to 1",
            "null": "nPMI",
            "together": "tokens",
            "expected": "tokens",
            "p": "probability",
            "q": "false-discovery rate",
            "n": "tokens of the expert",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples, widened to hold the value",
        null="words shuffled within documents, in closed form: the nPMI at the expected number of tokens that are both",
        computation="tokens counted by document, word and expert",
        notes=(*trace.notes, *((f"No token of the run is {', '.join(missing)}.",) if missing else ())),
    )


def npmi(both: Array, word: Any, expert: Array, total: Any) -> Array:
    """Normalised pointwise mutual information from counts; −1 where the two never meet, 0 where both are always there.

    Args:
        both, word, expert, total: observations that are both, one, the other, and all; they broadcast.

    Example:
        >>> npmi(np.array([25.0, 50.0]), 50, np.array([50.0, 50.0]), 100).tolist()
        [0.0, 1.0]
    """
    both, word, expert, total = np.broadcast_arrays(np.asarray(both, float), word, expert, total)
    found = np.full(both.shape, -1.0)
    met = both > 0
    share = both[met] / total[met]
    # log2 of counts, so that what is equal comes out as 0 and what coincides as 1, without a rounding between.
    mutual = np.log2(both[met] * total[met] / (word[met] * expert[met]))
    found[met] = np.divide(mutual, -np.log2(share), out=np.zeros_like(mutual), where=share < 1)
    return found


def _ids(trace: Trace, words: str | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The ids that words name, and the words that no token of the run is."""
    known, times = np.unique(trace.token_id[trace.token_id >= 0], return_counts=True)
    if not len(known):
        raise InputError(f"run {trace.run.name!r} has no token ids", fix="import a trace with token_id, or record it")
    if words is None:
        most = known[np.argsort(-times, kind="stable")][:_COMMON]
        return np.asarray(most[:-1] if len(most) == len(known) and len(known) > 1 else most, np.int64), ()
    texts: dict[str, list[int]] = {}
    for token_id, raw in pieces(trace.run).items():
        texts.setdefault(raw.decode("utf-8", "replace").strip(), []).append(token_id)
    items = [part.strip() for part in words.split(",") if part.strip()]
    meant = {item: [int(item)] if item.isdigit() else texts.get(item, []) for item in items}
    missing = tuple(repr(item) for item, ids in meant.items() if not set(ids) & set(known.tolist()))
    if len(missing) == len(meant):
        raise InputError(
            f"no token of run {trace.run.name!r} is {', '.join(missing) or 'among no words'}",
            expected="ids or texts of tokens, divided by commas, as in Wait,Alternatively",
        )
    return np.array([i for ids in meant.values() for i in ids], np.int64), missing


def _shown(run: Run, ids: NDArray[np.int64]) -> str:
    names = [repr(joined([int(i)], pieces(run))) for i in ids[:_COMMON]]
    return ", ".join(names) + (f" and {len(ids) - _COMMON} more" if len(ids) > _COMMON else "")


def _of_router(trace: Trace, number: int, word: NDArray[np.bool_], draws: int, seed: int) -> pd.DataFrame:
    router, documents = trace.routers[number], trace.n_documents
    total = np.bincount(trace.document, minlength=documents).astype(np.float64)[:, None]
    words = np.bincount(trace.document, weights=word, minlength=documents)[:, None]
    chosen, both = (_counted(trace, number, rows) for rows in (np.ones_like(word), word))
    mean = (words * chosen / total).sum(0)
    excess = both - words * chosen / total
    p = ratio_p(excess, np.broadcast_to((words > 0).astype(np.float64), excess.shape))
    value = npmi(both.sum(0), words.sum(), chosen.sum(0), total.sum())
    low = high = np.full(router.n_experts, np.nan)
    if documents > 1:
        weights = document_weights(documents, draws=draws, seed=seed).astype(np.float64)
        parts = (weights @ both, weights @ words, weights @ chosen, weights @ total)
        low, high = np.quantile(npmi(*parts), _TAILS, axis=0)
    return pd.DataFrame(
        {
            "layer": router.layer,
            "block": router.block,
            "expert": np.arange(router.n_experts),
            "metric": "nPMI",
            "value": value,
            "ci_low": np.minimum(low, value),
            "ci_high": np.maximum(high, value),
            "null": npmi(mean, words.sum(), chosen.sum(0), total.sum()),
            "together": both.sum(0).astype(np.int64),
            "expected": mean,
            "p": np.where(np.isnan(p), 1.0, p),
            "n": chosen.sum(0).astype(np.int64),
        }
    )


def _counted(trace: Trace, number: int, rows: NDArray[np.bool_]) -> Array:
    """[document, expert] tokens among `rows` that chose the expert."""
    router = trace.routers[number]
    cell = (trace.document[rows].astype(np.int64) * router.n_experts)[:, None] + router.experts[rows]
    counts = np.bincount(cell.ravel(), minlength=trace.n_documents * router.n_experts)
    return counts.reshape(trace.n_documents, router.n_experts).astype(np.float64)


def _title(frame: pd.DataFrame, shown: str) -> str:
    found = frame[(frame["q"] < _FOUND) & (frame["value"] > frame["null"])]
    if found.empty:
        return f"No expert goes with {shown} beyond what shuffled words give (q < {_FOUND})"
    best = found.sort_values("value", ascending=False, kind="stable").iloc[0]
    return (
        f"{len(found):,} of {len(frame):,} experts go with {shown} (q < {_FOUND}); most: "
        f"{layer_name(best['layer'], best['block'])}·E{best['expert']}, nPMI {best['value']:.3f} (shuffled {best['null']:.3f})"
    )


def _draw(result: Result) -> go.Figure:
    values, rows, columns, fields = expert_grid(result.df(), "value", extra=("null", "q", "together"))
    figure = heatmap(
        values,
        x=columns,
        y=rows,
        diverging=True,
        customdata=fields,
        colorbar="nPMI",
        hover="%{y}·%{x}: nPMI %{z:.3f}, shuffled %{customdata[0]:.3f}<br>q = %{customdata[1]:.3f}, %{customdata[2]:,} tokens",
    )
    figure.update_xaxes(title="expert")
    figure.update_yaxes(title="layer")
    return figure
