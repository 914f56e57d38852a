"""How far a model's predictions go with the choice of experts by rank: what decoding by contrast lives on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.edit_kinds.experts import RankRouting
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.intervention import Intervention
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.effects.paired import paired_pass
from moescope.probes.effects.tally import TOKEN_METRICS, Tallied, Tally
from moescope.probes.live_model import LiveModel

Array = NDArray[np.float64]

ALL = "all"
_UNITS = {"delta_nll": "nats a token", "kl": "nats a token", "flips": "share of tokens"}


def rank_divergence(
    model: LiveModel,
    corpus: Any,
    *,
    ranks: Sequence[int] | None = None,
    controls: int = 5,
    batch_size: int = 8,
    max_length: int = 512,
    draws: int = 1000,
    seed: int = 0,
) -> Result:
    """How far do predictions move where every token goes to its expert of one rank alone?

    Rank 1 is a router's first choice, rank 2 its second, …, in every layer at once, weights by the router's own rule. For
    each rank, over predicted tokens: KL(own ‖ rank alone) of the next-token distribution, ΔNLL, and flips of the most likely
    token, for all texts and by label (the pilot study of SCMoE, arXiv 2405.14507, which compares rank-k with the model's own
    top-2).

    Args:
        model: with experts and verified rules.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        ranks: which; None for all of 1 … k + 2.
        controls: draws of the control: the expert of a random rank of all, drawn for each layer.
        batch_size, max_length: of the passes.
        draws: bootstrap resamples of documents.
        seed: of controls and resamples.

    Raises:
        InputError: a dense model, a rank beyond the experts there are, no control.
        RunError: predictions that are no numbers.

    Example:
        >>> import moescope as ms
        >>> found = rank_divergence(ms.load("demo"), ["In the beginning.", "int main()"], ranks=(1, 3), controls=1)
        >>> sorted(set(found.df()["rank"]))
        [1, 3]
    """
    if not model.anatomy.moe:
        raise InputError(f"{model.name} has no experts", expected="a mixture-of-experts model")
    if controls < 1:
        raise InputError("an effect is never shown without its control", expected="controls=1 or more")
    corpus = Corpus.load(corpus)
    most = min(int(s.n_experts or 0) for s in model.anatomy.moe)
    chosen = (
        tuple(ranks) if ranks is not None else tuple(range(1, min(most, int(model.anatomy.moe[0].top_k or 1) + 2) + 1))
    )
    if not chosen or min(chosen) < 1 or max(chosen) > most or len(set(chosen)) < len(chosen):
        raise InputError("these are no ranks", expected=f"different numbers from 1 to {most}", found=f"{chosen}")
    variants = [Intervention([RankRouting(ranks=(rank,))], name=f"rank {rank} alone") for rank in chosen]
    generator = np.random.default_rng(seed)
    variants += [_random_ranks(model, generator, number) for number in range(controls)]
    tally = Tally(groups=())
    plan = BatchPlan(corpus, model.tokenizer, batch_size, max_length, model.anatomy.vocabulary)
    for paired in paired_pass(model, plan, variants):
        tally.add(paired)
    frame = _table(tally.done(), chosen, draws=draws, seed=seed)
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame[(frame["label"] == ALL) & (frame["metric"] == "kl")]["n"].iloc[0]),
        n_unit="predicted tokens",
        definition="Every token goes to its expert of one rank alone, in all layers, weights by the router's own rule: "
        "KL(own ‖ edited) of the next-token distribution, ΔNLL, and share of tokens whose most likely token is another.",
        units={f"value[{metric}]": unit for metric, unit in _UNITS.items()} | {"n": "tokens"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null=f"the expert of a random rank of all, drawn for each layer, mean of {controls} draws",
        computation="paired passes over the same tokens",
        name="rank_divergence",
        source="SCMoE, arXiv 2405.14507",
        parameters={"ranks": chosen, "controls": controls, "seed": seed},
        provenance={"run": model.name},
    )


def _random_ranks(model: LiveModel, generator: np.random.Generator, number: int) -> Intervention:
    """The expert of one random rank in each layer."""
    edits = [
        RankRouting(layer=s.layer, block=s.block, ranks=(1 + int(generator.integers(int(s.n_experts or 0))),))
        for s in model.anatomy.moe
    ]
    return Intervention(edits, name=f"random ranks ({number})")


def _table(done: Tallied, ranks: Sequence[int], *, draws: int, seed: int) -> pd.DataFrame:
    labels = sorted({str(label) for label in done.label if label is not None})
    rows: list[dict[str, Any]] = []
    for label in (ALL, *labels):
        mine = np.ones(len(done.label), bool) if label == ALL else np.asarray(done.label == label)
        documents, place = np.unique(done.document[mine], return_inverse=True)
        tokens = np.bincount(place, weights=done.n[mine, 0], minlength=len(documents)).astype(np.float64)
        for number, metric in enumerate(TOKEN_METRICS):
            sums: Array = np.zeros((len(documents), len(done.sums)))
            np.add.at(sums, place, done.sums[:, number, :, 0][:, mine].T)
            value, low, high = bootstrap_ratio(sums, tokens[:, None], draws=draws, seed=seed)
            null = float(value[len(ranks) :].mean())
            rows += [
                {
                    "rank": rank,
                    "label": label,
                    "metric": metric,
                    "value": float(value[i]),
                    "ci_low": float(low[i]),
                    "ci_high": float(high[i]),
                    "null": null,
                    "n": int(tokens.sum()),
                }
                for i, rank in enumerate(ranks)
            ]
    return pd.DataFrame(rows)


def _title(frame: pd.DataFrame) -> str:
    rows = frame[(frame["label"] == ALL) & (frame["metric"] == "kl")].set_index("rank")
    said = ", ".join(f"rank {rank} alone {value:.3f}" for rank, value in rows["value"].items())
    return f"KL from the model's own predictions, nats a token: {said}; random ranks {rows['null'].iloc[0]:.3f}"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    frame = frame[frame["metric"] == "kl"]
    figure = go.Figure()
    for number, label in enumerate(list(dict.fromkeys(frame["label"]))[: len(SERIES)]):
        rows = frame[frame["label"] == label]
        whole = label == ALL
        figure.add_scatter(
            x=rows["rank"],
            y=rows["value"],
            mode="lines+markers",
            name=plain(str(label)),
            line={
                "color": SERIES[number],
                "width": 3 if whole else 1,
            },
            error_y={
                "type": "data",
                "symmetric": False,
                "array": rows["ci_high"] - rows["value"],
                "arrayminus": rows["value"] - rows["ci_low"],
                "thickness": 1,
                "visible": whole,
            },
            hovertemplate=f"{plain(str(label))}, rank %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    null = float(frame[frame["label"] == ALL]["null"].iloc[0])
    figure.add_scatter(
        x=sorted(set(frame["rank"])),
        y=[null] * frame["rank"].nunique(),
        mode="lines",
        name="random ranks, all texts",
        line={"color": CHANCE, "dash": "dash"},
    )
    figure.update_xaxes(title="rank of the only expert", dtick=1)
    figure.update_yaxes(title="KL(own ‖ rank alone), nats a token", rangemode="tozero")
    figure.update_layout(height=420)
    return figure
