"""Expert caches: what share of the choices a cache of each size would have served."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.caching.expert_bytes import bytes_of
from moescope.routing.caching.hit_rates import Average, HitRates, hit_rates, replay_all
from moescope.routing.caching.replay import FORESIGHT, POLICIES, POLICY_NAMES, Policy, Rule
from moescope.routing.caching.steps import in_steps
from moescope.routing.caching.streams import Sequences, Stream, layer_streams, pool_stream, sequences_of, uses
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run

POOL_SIZES = 32
_SHUFFLED_TOKENS = 1 << 16  # enough for the third digit; the control then costs a third of the replay


@analysis(
    name="expert_cache",
    needs=("routing", "tokens", "sequences"),
    source="arXiv 2505.16056: SCH, with LRU, LFU and Belady; arXiv 2303.06182: FIFO and LIFO",
    section="caching",
    order=10,
)
def expert_cache(
    run: Run,
    *,
    policy: Literal["all", "lru", "lfu", "fifo", "lifo", "look_ahead", "belady"] = "all",
    pool: Literal["layer", "model"] = "layer",
    size: Count | None = None,
    preload: bool = True,
    horizon: Count = 16,
    average: Literal["choice", "sequence"] = "choice",
    next_use: Literal["token", "slot"] = "token",
    together: Literal["token", "layer"] = "token",
    batch: Count = 1,
    expert_bytes: Count | None = None,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """What share of the choices would a cache of experts have served, at every size and under every policy?

    A cache of C experts is replayed over the recorded decisions, empty at the start of each sequence. All k experts of a token
    are tested against the cache before it; then each is brought in, in slot order, and a full cache gives up: LRU the one
    used longest ago; LFU the one used least since the start of the sequence, also counting while it was outside; FIFO the one
    brought in first; LIFO the one brought in last; look-ahead the one with the fewest uses in the next `horizon` tokens (the
    present one included, less what is already used); Belady the one whose next use is farthest. Of equals the one used longest
    ago goes, under Belady the one with the higher id.

    As in the paper, the first C different experts of a sequence count as hits, as if they had been loaded before (look-ahead
    counted so is its SCH); `transfers` counts them as the loads they are. Since experts are brought in one after another, a
    cache hardly larger than k can give up an expert of the same token, which no real one could: read sizes from 2k on. That is
    also how look-ahead can beat Belady there.

    The authors' released Belady counts the next use slot by slot, not token by token (`next_use="slot"`); their mean is over
    samples, which here may differ in length (`average="sequence"`); they use every 16th sample, which is not done here.

    Args:
        policy: one policy, or all.
        pool: one cache a layer, or one for all layers, where LRU is replayed at every size, others at 32 of a log scale.
        size: the size the title speaks of; 2k where not given.
        preload: count the first C different experts of a sequence as hits.
        horizon: tokens that look-ahead sees.
        average: the mean over all choices, or over sequences.
        next_use: what Belady counts the time to the next use in.
        together: in a pool, test the experts of all layers before the token (the paper), or each layer's when it comes.
        batch: consecutive tokens of a sequence that are served together and ask for each of their experts once; layers only.
        expert_bytes: bytes of one expert; from the model's width, neurons and dtype where the run has them.
        draws: bootstrap resamples of documents.
        seed: of the resampling and of the shuffle.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     result = ms.analyze(run, "expert_cache", policy="lru")
        >>> sorted(set(result.df()["size"]))[:3]
        [1, 2, 3]
    """
    if batch > 1 and pool == "model":
        raise InputError("tokens are served together in caches of layers only", fix="take pool=layer, or batch=1")
    trace = read_trace(run)
    streams = layer_streams(trace) if pool == "layer" else [pool_stream(trace, by_layer=together == "layer")]
    sequences = sequences_of(trace)
    chosen: tuple[Policy, ...] = POLICIES if policy == "all" else (policy,)
    largest = max(stream.experts for stream in streams)
    named = min(size or 2 * max(stream.width for stream in streams), largest)
    shuffled, some = _shuffled(trace, streams, sequences, seed)
    controls = int(some.starts[-1])
    streams, sequences = in_steps(streams, sequences, batch)
    shuffled, some = in_steps(shuffled, some, batch)
    rates, nulls = {}, {}
    for one in chosen:
        rule = Rule(one, horizon, next_use == "token")
        sizes = pool_sizes(trace, streams[0], named) if pool == "model" and one != "lru" else None
        found = replay_all(streams, sequences, rule, average=average, sizes=sizes)
        control = replay_all(shuffled, some, rule, average=average, sizes=sizes)
        rates[one] = hit_rates(found, preload=preload, draws=draws, seed=seed)
        nulls[one] = hit_rates(control, preload=preload, draws=0, seed=seed)
    held, notes = bytes_of(run, streams, expert_bytes)
    table = _table(streams, sequences, rates, nulls, held, pool, trace.tokens, batch)
    units = {
        "value": "share of choices",
        "null": "share of choices",
        "uniform": "share of choices",
        "size": "experts" if pool == "model" else "experts a layer",
        "transfers": "experts brought in a token",
        "bytes": "bytes brought in a token",
    }
    return Result(
        title=_title(table, named, largest, pool, batch),
        table=table,
        draw=_draw,
        n=int(sum(uses(stream, sequences).sum() for stream in streams)),
        n_unit="choices" if batch == 1 else f"different experts asked for by steps of {batch} tokens",
        definition=_definition(preload, average, horizon, batch),
        units={column: unit for column, unit in units.items() if column in table.column_names},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="the same replay after the run's tokens are shuffled (all layers alike), which keeps load and removes order, over "
        f"{controls:,} tokens; `uniform` is C ÷ experts, what a full cache without foresight serves when every expert is as likely",
        computation="compiled replay: stack distances for LRU, LFU, look-ahead and Belady, one state a size for FIFO and LIFO",
        notes=(*trace.notes, *notes, *_notes(trace, streams)),
    )


def pool_sizes(trace: Trace, stream: Stream, named: int) -> NDArray[np.int64]:
    """32 sizes of a log scale from one layer's k to all experts, and the one the title speaks of."""
    smallest = min(*(router.top_k for router in trace.routers), stream.experts)
    scale = np.geomspace(smallest, stream.experts, POOL_SIZES)
    return np.unique([*np.round(scale).astype(np.int64), named])


def _shuffled(trace: Trace, streams: list[Stream], sequences: Sequences, seed: int) -> tuple[list[Stream], Sequences]:
    """Tokens drawn from the whole run in random order, in sequences of the run's lengths."""
    order = np.random.default_rng(seed).permutation(trace.tokens)
    enough = min(int(np.searchsorted(sequences.starts, _SHUFFLED_TOKENS)), len(sequences.row))
    some = sequences.part(0, enough)
    return [stream.at(order[: some.starts[-1]]) for stream in streams], some


def _definition(preload: bool, average: Average, horizon: int, batch: int) -> str:
    cold = "The first C different experts of a sequence count as hits." if preload else "Every cache starts empty."
    mean = "over all choices" if average == "choice" else "over sequences"
    unit = "tokens" if batch == 1 else "steps"
    what = "choices (token × slot) whose expert the cache holds when the token comes"
    if batch > 1:
        what = f"the different experts that {batch} consecutive tokens ask for which the cache holds when they come"
        mean = mean.replace("choices", "experts asked for")
    return (
        f"Share of {what}, mean {mean}; caches are reset at "
        f"each sequence. {cold} LFU counts uses since the start of the sequence; look-ahead sees {horizon} {unit}. "
        "transfers: experts brought in, also into free places."
    )


def _notes(trace: Trace, streams: list[Stream]) -> list[str]:
    notes = ["Sizes below 2k are not physically realisable: an expert may be given up within its own token."]
    if any(router.n_null for router in trace.routers):
        notes.append("Null experts take no place; their choices are left out.")
    if len({stream.experts for stream in streams}) > 1:
        notes.append("Layers differ in experts; a cache larger than a layer holds all of it.")
    return notes


def _table(
    streams: list[Stream],
    sequences: Sequences,
    rates: dict[Policy, HitRates],
    nulls: dict[Policy, HitRates],
    held: list[float | None],
    pool: str,
    tokens: int,
    batch: int,
) -> pa.Table:
    """Long: one row a policy, layer and size; rows without a layer are of all layers together."""
    counted = np.array([uses(stream, sequences).sum() for stream in streams])
    widest = max(stream.width for stream in streams)
    frames = []
    for policy, rate in rates.items():
        uniform = _uniform(streams, counted, rate.sizes, policy, pool)
        moved = [rate.loads[i] * n / tokens for i, n in enumerate(counted)]
        sent = [part * size if size else np.full(len(part), np.nan) for part, size in zip(moved, held, strict=True)]
        moved, sent = [*moved, np.sum(_filled(moved), axis=0)], [*sent, np.sum(_filled(sent), axis=0)]
        rows = range(len(streams) + 1) if pool == "layer" else [len(streams)]
        for i in rows:
            inside = np.isfinite(rate.value[i])
            stream = streams[i] if i < len(streams) else None
            frames.append(
                pd.DataFrame(
                    {
                        "layer": pd.array([stream.layer if stream else None] * inside.sum(), dtype="Int64"),
                        "block": stream.block if stream else None,
                        "policy": policy,
                        "size": rate.sizes[inside],
                        "metric": "hit rate",
                        "value": rate.value[i][inside],
                        "ci_low": rate.low[i][inside],
                        "ci_high": rate.high[i][inside],
                        "null": nulls[policy].value[i][inside],
                        "uniform": uniform[i][inside],
                        "realisable": rate.sizes[inside]
                        >= _enough(stream.width if stream else widest, rate.sizes, batch),
                        "transfers": moved[i][inside],
                        "bytes": sent[i][inside],
                        "n": int(counted[i] if stream else counted.sum()),
                    }
                )
            )
    frame = pd.concat(frames, ignore_index=True)
    return pa.Table.from_pandas(frame.drop(columns=[] if None not in held else "bytes"), preserve_index=False)


def _enough(width: int, sizes: NDArray[np.int64], batch: int) -> int:
    """The size from which no expert is given up within its own step; all experts are always enough for many tokens."""
    return 2 * width if batch == 1 else min(2 * width, int(sizes[-1]))


def _filled(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """[stream, size]: beyond its experts a layer moves what it moves at its largest size."""
    last = [part[np.isfinite(part)][-1:] for part in parts]
    return np.stack(
        [np.where(np.isnan(part), end if len(end) else np.nan, part) for part, end in zip(parts, last, strict=True)]
    )


def _uniform(
    streams: list[Stream], counted: NDArray[np.int64], sizes: NDArray[np.int64], policy: str, pool: str
) -> NDArray[np.float64]:
    """C ÷ experts for each stream, and for all together; NaN where no closed form is known."""
    if policy in FORESIGHT or pool == "model":
        return np.full((len(streams) + 1, len(sizes)), np.nan)
    each = np.stack([np.minimum(sizes / stream.experts, 1.0) for stream in streams])
    return np.concatenate([each, (counted @ each / counted.sum())[None]])


def _title(table: pa.Table, named: int, largest: int, pool: str, batch: int) -> str:
    frame = table.to_pandas()
    whole = frame[frame["layer"].isna() & (frame["size"] == named)].set_index("policy")
    place = f"A cache of {named} of {largest:,} experts {'a layer' if pool == 'layer' else 'for all layers'}"
    first = "lru" if "lru" in whole.index else str(whole.index[0])
    what = "the choices" if batch == 1 else f"what {batch} tokens ask for"
    served = f"serves {whole['value'][first]:.0%} of {what} by {POLICY_NAMES[first]}"
    best = f", {whole['value']['belady']:.0%} at best (Belady)" if first != "belady" and "belady" in whole.index else ""
    return f"{place} {served}{best}; with tokens shuffled, {whole['null'][first]:.0%} by {POLICY_NAMES[first]}"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    whole = frame[frame["layer"].isna()]
    figure = go.Figure()
    policies = list(dict.fromkeys(whole["policy"]))
    for number, policy in enumerate(policies):
        part = whole[whole["policy"] == policy]
        figure.add_scatter(
            x=part["size"],
            y=part["value"],
            mode="lines",
            name=POLICY_NAMES[policy],
            line={"color": SERIES[number % len(SERIES)], "dash": "solid"},
            customdata=np.stack([part["ci_low"], part["ci_high"], part["null"], part["transfers"]], axis=-1),
            hovertemplate=f"{POLICY_NAMES[policy]}, %{{x}} experts: %{{y:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]"
            "<br>tokens shuffled: %{customdata[2]:.1%}<br>%{customdata[3]:.3g} experts brought in a token<extra></extra>",
        )
    first = "lru" if "lru" in policies else policies[0]
    control = whole[whole["policy"] == first]
    name = f"{POLICY_NAMES[first]}, tokens shuffled"
    figure.add_scatter(
        x=control["size"], y=control["null"], mode="lines", name=name, line={"color": CHANCE, "dash": "dash"}
    )
    if control["uniform"].notna().any():
        line = {"color": CHANCE, "dash": "dot"}
        figure.add_scatter(
            x=control["size"], y=control["uniform"], mode="lines", name="uniform routing: C ÷ experts", line=line
        )
    tight = whole.loc[~whole["realisable"], "size"].max()
    if np.isfinite(tight):
        words = "below 2k" if result.parameters.get("batch", 1) == 1 else "below twice a step's experts"
        figure.add_vrect(
            x0=0, x1=tight, fillcolor=CHANCE, opacity=0.12, line_width=0, annotation_text=words, layer="below"
        )
    figure.update_xaxes(title=f"size of the cache ({result.units['size']})", type="linear", rangemode="tozero")
    figure.update_yaxes(title="hit rate (share of choices)", range=[0, 1.02], tickformat=".0%")
    figure.update_layout(height=440)
    return figure
