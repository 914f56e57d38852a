"""Capacity: which decisions would be dropped, and where in the batch, if every expert took only so many tokens."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.pathways.estimates import estimate
from moescope.routing.pathways.pairs import router_chain
from moescope.routing.serving.batches import Batches, balanced_router, cut
from moescope.routing.serving.filling import Filling, Priority
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

FACTORS = (1.0, 1.25, 1.5, 2.0)
_TENTHS = 10


@analysis(
    name="capacity",
    needs=("routing",),
    source="capacity and drops: arXiv 2101.03961, arXiv 2402.01739; reroute: arXiv 2503.05066",
    section="serving",
    order=10,
)
def capacity(
    run: Run,
    *,
    factor: float | None = None,
    batch: Count | None = None,
    priority: Literal["slot", "token", "weight"] = "slot",
    minimum: Natural = 4,
    reroute: bool = False,
    block: str | None = None,
    samples: Count = 3,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """How many decisions would be dropped, and where, if every expert took a limited number of tokens?

    In a batch of B tokens each of E experts takes at most C = max(`minimum`, ⌈factor · B · k / E⌉) decisions; what comes later
    is dropped. Decisions come in order of tokens: the first choices of all tokens, then the second choices, and so on
    (`slot`), or all choices of a token before the next token's (`token`), so that late tokens lose most; or an expert keeps
    those with the largest routing weight (`weight`, the rule of capacity-aware inference, whose code has `minimum` 1). Null
    experts have no capacity and drop nothing. With `reroute`, a dropped decision goes to its token's next-best expert that
    still has room, in the same order, once all batches' own decisions are placed.

    The null is a balanced router: as many experts a token, every set alike.

    Args:
        factor: capacity over fair share; none for 1, 1.25, 1.5 and 2.
        batch: tokens served together, in the order of the run; none for each sequence by itself.
        priority: who comes first.
        minimum: smallest capacity.
        reroute: send dropped decisions to the next choice; needs router logits.
        block: only routers of this block; none for all.
        samples: draws of the balanced router.
        draws: bootstrap resamples of documents.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     frame = ms.analyze(run, "capacity", factor=8, minimum=0).df()
        >>> float(frame[frame.metric == "dropped"].value.max())
        0.0
    """
    if factor is not None and not 0 < factor < np.inf:
        raise InputError(f"parameter 'factor' cannot be {factor}", expected="a number above 0")
    trace = read_trace(run)
    routers = router_chain(trace, block)
    batches = cut(trace, batch)
    study = _Study(trace, batches, priority, minimum, reroute, samples, draws, seed)
    rows = [row for value in ((factor,) if factor else FACTORS) for row in study.rows(routers, value)]
    return Result(
        title=_title(rows, None if batch is None else int(batches.sizes.max())),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=len(batches.rows) * sum(router.top_k for router in routers),
        n_unit="decisions",
        definition=f"Share of decisions beyond the C = max({minimum}, ⌈factor · B · k / E⌉) that an expert takes from a batch of "
        f"B tokens ({'a sequence' if batch is None else f'{batch:,} tokens'}), in {_ORDER[priority]}; by layer, and by tenths "
        "of the batch over all layers.",
        units={
            "value[dropped]": "share of decisions",
            "value[dropped after reroute]": "share of decisions",
            "value[dropped in a tenth of the batch]": "share of decisions",
            "value[tokens that lose every expert]": "share of tokens × routers",
            "value[slots provided]": "slots per decision",
            "factor": "capacity ÷ fair share",
            "tenth": "tenth of the batch",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null=f"a balanced router that draws every set of k experts alike, mean of {samples}",
        notes=(*trace.notes, *batches.notes),
        computation="replay of every batch against the capacity",
    )


_ORDER = {
    "slot": "order of slots, then of tokens",
    "token": "order of tokens, then of slots",
    "weight": "order of routing weight",
}


class _Study:
    """Replays one capacity factor after the other."""

    def __init__(
        self, trace: Trace, batches: Batches, priority: Priority, minimum: int, reroute: bool, samples: int, draws: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.trace, self.batches, self.reroute = trace, batches, reroute
        self.filling = Filling(trace, batches, priority, minimum)
        self.draws, self.seed, self.samples = draws, seed, samples
        at = np.arange(len(batches.rows)) - np.repeat(batches.starts[:-1], batches.sizes)
        self.tenth = at * _TENTHS // np.repeat(batches.sizes, batches.sizes)
        self.document = trace.document[batches.rows]
        self._chance: dict[tuple[int, int, int, float], tuple[NDArray[np.float64], float]] = {}

    def rows(self, routers: tuple[Router, ...], factor: float) -> list[dict[str, Any]]:
        """All rows of one factor: by router, by tenth of the batch, and over all."""
        documents = self.trace.n_documents
        lost, size = np.zeros((2, documents, _TENTHS)), np.zeros((documents, _TENTHS))
        cells = self.document.astype(np.int64) * _TENTHS + self.tenth
        everything = np.zeros(documents)
        rows, chance = [], []
        for router in routers:
            kept = self.filling.kept(router, factor)
            null, null_lost = self._balanced(router, factor, cells)
            by_cell = self._by_cell(kept, cells)
            decisions = np.bincount(cells, minlength=size.size).reshape(size.shape) * router.top_k
            lost += np.stack([by_cell, null])
            size += decisions
            everything += np.bincount(self.document, weights=~kept.any(1), minlength=documents)
            chance.append(null_lost)
            place = {"layer": router.layer, "block": router.block, "factor": factor}
            rows.append(place | self._share("dropped", by_cell.sum(1), decisions.sum(1), null.sum() / decisions.sum()))
            rows.append(place | self._slots(router, factor, kept.size))
            if self.reroute:
                left = ~(kept | self.filling.rerouted(router, kept, factor))
                gone = np.bincount(self.document, weights=left.sum(1), minlength=documents)
                rows.append(place | self._share("dropped after reroute", gone, decisions.sum(1), None))
        whole = {"layer": None, "block": None, "factor": factor}
        rows.append(whole | self._share("dropped", lost[0].sum(1), size.sum(1), lost[1].sum() / size.sum()))
        pairs = np.bincount(self.document, minlength=documents).astype(np.float64) * len(routers)
        rows.append(whole | self._share("tokens that lose every expert", everything, pairs, float(np.mean(chance))))
        for tenth in range(_TENTHS):
            if size[:, tenth].sum():
                null_share = lost[1, :, tenth].sum() / size[:, tenth].sum()
                found = self._share("dropped in a tenth of the batch", lost[0, :, tenth], size[:, tenth], null_share)
                rows.append(whole | found | {"tenth": tenth + 1})
        return rows

    def _balanced(self, router: Router, factor: float, cells: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
        """What a balanced router of the same size drops: [document, tenth] decisions, share of tokens losing every expert."""
        key = (router.n_experts, router.n_null, router.top_k, factor)
        if key not in self._chance:
            generator = np.random.default_rng([self.seed, *key[:3]])
            drawn = [balanced_router(router, self.trace.tokens, generator) for _ in range(self.samples)]
            kept = [self.filling.kept(each, factor) for each in drawn]
            by_cell = np.mean([self._by_cell(each, cells) for each in kept], axis=0)
            self._chance[key] = by_cell, float(np.mean([(~each.any(1)).mean() for each in kept]))
        return self._chance[key]

    def _by_cell(self, kept: NDArray[np.bool_], cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """[document, tenth] decisions dropped."""
        size = self.trace.n_documents * _TENTHS
        lost = np.bincount(cells, weights=(~kept).sum(1), minlength=size)
        return lost.astype(np.float64).reshape(-1, _TENTHS)

    def _slots(self, router: Router, factor: float, decisions: int) -> dict[str, Any]:
        value = self.filling.slots_per_decision(router, factor)
        return {"metric": "slots provided", "value": value, "n": decisions}

    def _share(self, metric: str, lost: NDArray[Any], size: NDArray[Any], null: float | None) -> dict[str, Any]:
        found = estimate(lost, size, draws=self.draws, seed=self.seed)
        return {"metric": metric, "tenth": None, **found, "null": null, "n": int(size.sum())}


def _title(rows: list[dict[str, Any]], batch: int | None) -> str:
    whole = [row for row in rows if row["metric"] == "dropped" and row["layer"] is None]
    first = whole[0]
    tenths = [
        row for row in rows if row["metric"] == "dropped in a tenth of the batch" and row["factor"] == first["factor"]
    ]
    where = "a sequence" if batch is None else f"a batch of {batch:,} tokens"
    end = tenths[-1]
    title = (
        f"At a capacity of {first['factor']:g}× the fair share, {first['value']:.1%} of decisions are dropped "
        f"({first['null']:.1%} for a balanced router), {end['value']:.1%} at the end of {where}"
    )
    return title if len(whole) == 1 else f"{title}; at {whole[-1]['factor']:g}×, {whole[-1]['value']:.1%}"


def _draw(result: Result) -> go.Figure:
    from plotly.subplots import make_subplots

    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    by_tenth = frame[frame["metric"] == "dropped in a tenth of the batch"]
    by_layer = frame[(frame["metric"] == "dropped") & frame["layer"].notna()]
    for number, factor in enumerate(sorted(frame["factor"].unique())):
        colour, name = SERIES[number % len(SERIES)], f"{factor:g}×"
        left = by_tenth[by_tenth["factor"] == factor]
        right = by_layer[by_layer["factor"] == factor]
        names = [layer_name(int(r.layer), r.block) for r in right.itertuples()]
        for column, x, part in ((1, list(left["tenth"].astype(int)), left), (2, names, right)):
            value, low, high = (part[c].astype(float) for c in ("value", "ci_low", "ci_high"))
            figure.add_scatter(
                x=x, y=value, name=name, legendgroup=name, showlegend=column == 1, mode="lines+markers",
                line={"color": colour}, row=1, col=column,
                error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low,
                         "thickness": 1},
                hovertemplate=f"%{{x}}, capacity {name}: %{{y:.2%}}<extra></extra>",
            )  # fmt: skip
            figure.add_scatter(
                x=x, y=part["null"].astype(float), name="balanced router", legendgroup="null", mode="lines",
                showlegend=column == 1 and number == 0, line={"color": CHANCE, "dash": "dash", "width": 1}, row=1,
                col=column, hovertemplate=f"%{{x}}, balanced, {name}: %{{y:.2%}}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title="tenth of the batch", dtick=1, row=1, col=1)
    figure.update_xaxes(title="layer", type="category", nticks=24, row=1, col=2)
    figure.update_yaxes(title="decisions dropped", tickformat=".0%", rangemode="tozero")
    figure.update_layout(height=420)
    return figure
