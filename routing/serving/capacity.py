"""Capacity: which decisions would be dropped, and where in the batch, if every expert took only so many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.grid import layer_name
from moescope.routing.pathways.pairs import document_groups, router_chain
from moescope.routing.serving.batches import Batches, balanced_router, cut
from moescope.routing.serving.filling import Filling, Priority
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

FACTORS = (1.0, 1.25, 1.5, 2.0)
_TENTHS = 10
_ROWS = 2_000  # beyond so many documents, neighbours are resampled together


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
    factors: str | None = None,
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
        factors: several of them in one pass, ascending, such as 1,1.5,2; none for `factor`.
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
    asked = _asked(factor, factors)
    trace = read_trace(run)
    routers = router_chain(trace, block)
    batches = cut(trace, batch)
    study = _Study(trace, batches, priority, minimum, reroute, samples, draws, seed)
    rows = study.rows(routers, asked)
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
        interval=interval_words(draws, trace.n_documents),
        null=f"a balanced router that draws every set of k experts alike, mean of {samples}",
        notes=(*trace.notes, *batches.notes),
        computation="replay of every batch against the capacity",
    )


_ORDER = {
    "slot": "order of slots, then of tokens",
    "token": "order of tokens, then of slots",
    "weight": "order of routing weight",
}


def _asked(factor: float | None, factors: str | None) -> tuple[float, ...]:
    """The capacity factors, ascending."""
    if factor is not None and factors is not None:
        raise InputError("factor and factors cannot both be given", fix="leave one of them out")
    if factor is not None and not 0 < factor < np.inf:
        raise InputError(f"parameter 'factor' cannot be {factor}", expected="a number above 0")
    if factors is None:
        return FACTORS if factor is None else (factor,)
    try:
        asked = sorted({float(part) for part in factors.split(",")})
    except ValueError:
        asked = []
    if not asked or not all(0 < value < np.inf for value in asked):
        raise InputError(f"parameter 'factors' cannot be {factors!r}", expected="numbers above 0, such as 1,1.5,2")
    return tuple(asked)


def interval_words(draws: int, documents: int) -> str:
    """What `ci_low` and `ci_high` are, in words."""
    groups = f", in {_ROWS:,} groups of neighbours" if documents > _ROWS else ""
    return f"95 % percentile bootstrap over documents{groups}, {draws} resamples"


@dataclass(frozen=True)
class _Dropped:
    """What one router drops at every factor.

    Attributes:
        by_cell: [document, tenth, factor] decisions.
        tokens: [document, factor] tokens that lose every expert.
    """

    by_cell: NDArray[np.float64]
    tokens: NDArray[np.float64]


class _Study:
    """Replays all capacity factors, router by router."""

    def __init__(
        self, trace: Trace, batches: Batches, priority: Priority, minimum: int, reroute: bool, samples: int, draws: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.trace, self.batches, self.reroute = trace, batches, reroute
        self.filling = Filling(trace, batches, priority, minimum)
        self.draws, self.seed, self.samples = draws, seed, samples
        at = np.arange(len(batches.rows)) - np.repeat(batches.starts[:-1], batches.sizes)
        tenth = at * _TENTHS // np.repeat(batches.sizes, batches.sizes)
        group, self.groups = document_groups(trace, _ROWS)
        self.document = group[batches.rows].astype(np.int64)
        self.cell = self.document * _TENTHS + tenth
        self.tokens = np.bincount(self.cell, minlength=self.groups * _TENTHS).reshape(-1, _TENTHS).astype(np.float64)
        self._chance: dict[tuple[int, int, int], _Dropped] = {}

    def rows(self, routers: tuple[Router, ...], factors: tuple[float, ...]) -> list[dict[str, Any]]:
        """Factor by factor: rows by router, over all, and by tenth of the batch."""
        rows: list[list[dict[str, Any]]] = [[] for _ in factors]
        shape = (self.groups, _TENTHS, len(factors))
        lost, null, everything = np.zeros(shape), np.zeros(shape), np.zeros((self.groups, len(factors)))
        chance = np.zeros(len(factors))
        for router in routers:
            refusals = self.filling.refusals(router, factors)
            found, balanced = self._dropped(refusals, len(factors)), self._balanced(router, factors)
            lost += found.by_cell
            null += balanced.by_cell
            everything += found.tokens
            chance += balanced.tokens.sum(0) / self.tokens.sum() / len(routers)
            decisions = self.tokens.sum(1) * router.top_k
            expected = balanced.by_cell.sum((0, 1)) / decisions.sum()
            dropped = self._shares("dropped", found.by_cell.sum(1), decisions, expected)
            for number, factor in enumerate(factors):
                place = {"layer": router.layer, "block": router.block, "factor": factor}
                rows[number] += [place | dropped[number], place | self._slots(router, factor, refusals.size)]
                if self.reroute:
                    kept = refusals <= number
                    left = (~(kept | self.filling.rerouted(router, kept, factor))).sum(1)
                    gone = np.bincount(self.document, weights=left, minlength=self.groups)
                    rows[number].append(
                        place | self._shares("dropped after reroute", gone[:, None], decisions, None)[0]
                    )
        size = self.tokens * sum(router.top_k for router in routers)
        pairs = self.tokens.sum(1) * len(routers)
        found_rows = [
            self._shares("dropped", lost.sum(1), size.sum(1), null.sum((0, 1)) / size.sum()),
            self._shares("tokens that lose every expert", everything, pairs, chance),
        ]
        for tenth in range(_TENTHS):
            if size[:, tenth].sum():
                expected = null[:, tenth].sum(0) / size[:, tenth].sum()
                at = self._shares("dropped in a tenth of the batch", lost[:, tenth], size[:, tenth], expected)
                found_rows.append([row | {"tenth": tenth + 1} for row in at])
        for number, factor in enumerate(factors):
            rows[number] += [{"layer": None, "block": None, "factor": factor} | each[number] for each in found_rows]
        return [row for part in rows for row in part]

    def _balanced(self, router: Router, factors: tuple[float, ...]) -> _Dropped:
        """What a balanced router of the same size drops, mean of the samples."""
        key = (router.n_experts, router.n_null, router.top_k)
        if key not in self._chance:
            generator = np.random.default_rng([self.seed, *key])
            drawn = [balanced_router(router, self.trace.tokens, generator) for _ in range(self.samples)]
            found = [self._dropped(self.filling.refusals(each, factors), len(factors)) for each in drawn]
            self._chance[key] = _Dropped(
                np.mean([each.by_cell for each in found], axis=0), np.mean([each.tokens for each in found], axis=0)
            )
        return self._chance[key]

    def _dropped(self, refusals: NDArray[np.uint16], factors: int) -> _Dropped:
        k = refusals.shape[1]
        by_cell = _more_than(refusals.ravel(), np.repeat(self.cell, k), self.groups * _TENTHS, factors)
        tokens = _more_than(refusals.min(axis=1), self.document, self.groups, factors)
        return _Dropped(by_cell.reshape(self.groups, _TENTHS, factors), tokens)

    def _slots(self, router: Router, factor: float, decisions: int) -> dict[str, Any]:
        value = self.filling.slots_per_decision(router, factor)
        return {"metric": "slots provided", "value": value, "n": decisions}

    def _shares(
        self, metric: str, lost: NDArray[Any], size: NDArray[Any], null: NDArray[np.float64] | None
    ) -> list[dict[str, Any]]:
        """The share lost at every factor, from [document, factor] decisions lost and [document] decisions."""
        present = size > 0
        found = bootstrap_ratio(
            lost[present].astype(np.float64), size[present, None].astype(np.float64), draws=self.draws, seed=self.seed
        )
        values = np.stack(found, axis=-1)
        return [
            {
                "metric": metric,
                "tenth": None,
                **{
                    name: None if np.isnan(part) else float(part)
                    for name, part in zip(("value", "ci_low", "ci_high"), values[number], strict=True)
                },
                "null": None if null is None else float(null[number]),
                "n": int(size.sum()),
            }
            for number in range(lost.shape[1])
        ]


def _more_than(refusals: NDArray[Any], cell: NDArray[np.int64], cells: int, factors: int) -> NDArray[np.float64]:
    """[cell, factor] how many have been refused at more than so many of the smaller factors, which is at this one too."""
    counts = np.bincount(cell * (factors + 1) + refusals, minlength=cells * (factors + 1)).reshape(cells, factors + 1)
    return np.cumsum(counts[:, ::-1], axis=1)[:, ::-1][:, 1:].astype(np.float64)


def _title(rows: list[dict[str, Any]], batch: int | None) -> str:
    whole = [row for row in rows if row["metric"] == "dropped" and row["layer"] is None]
    first = next((row for row in whole if row["factor"] == 1), whole[0])
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
    if frame["factor"].nunique() > len(SERIES):
        from moescope.routing.serving.capacity_curve import draw_curve

        return draw_curve(frame)
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
