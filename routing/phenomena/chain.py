"""The chain of phenomena: who writes the massive activation, the sink it makes, the heads behind it, and what each cut leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.phenomena.chain_figure import draw_chain
from moescope.routing.phenomena.chain_records import (
    EFFECTS_SQL,
    ChainEffects,
    Share,
    heads_of,
    short,
    super_experts_of,
)
from moescope.routing.phenomena.expert_names import expert_name
from moescope.routing.phenomena.massive_records import forming_layers, largest_of_texts, massive_activations_of
from moescope.store.run import Run

# What is told of each cut: metric as stored → what it is called here.
_TOLD = {
    "massive_share": "massive activation that remains",
    "sink_share": "attention to first tokens that remains",
    "induction_share": "induction score that remains",
    "delta_nll": "ΔNLL",
    "kl": "KL",
    "delta_copy_nll": "ΔNLL of copies",
    "delta_repetition": "Δ repetition",
}
_TOLD_BY_LAYER = {
    "largest_share": "largest |x| that remains",
    "sink_share": "attention to first tokens that remains",
}
_COLUMNS = (
    "node", "metric", "cut", "value", "ci_low", "ci_high", "null", "null_low", "null_high", "layer", "channel", "token",
    "position", "heads", "what", "n",
)  # fmt: skip


@analysis(
    name="phenomena_chain",
    needs=("residual", "residual_sequences"),
    source="arXiv 2507.23279 (super experts, decay of sinks), 2402.17762 and 2503.22329 (massive activations), 2410.10781 (sinks), "
    "2404.15574 and 2407.15891 (retrieval and induction heads)",
    section="phenomena",
    order=5,
)
def phenomena_chain(run: Run, *, threshold: float = 0.1, uncut: bool = False) -> Result:
    """What writes the massive activation, which sink it makes, which heads read past it, and what is left once a link is cut?

    Nodes are what the run's records name: the writer (super experts, or the neurons or heads that add most of the massive
    activation, found by taking its value apart), the massive activation with the block that forms it, the sink (the
    mean attention to the first token, over heads of the layers behind that block), and the heads whose retrieval score, or
    where no needle trial was counted whose induction score, reaches the threshold.

    A number at a link is the share of what stands behind it that remains once the link is cut: Σ with the cut ÷ Σ without, over
    the same texts; by layer too, where 1 − the share of attention to first tokens is the decay of sums over heads; the decay
    rate D of arXiv 2507.23279, a mean over heads of ratios, is told by `sink_decay`.
    The same cut made at random (other experts of the router at like load, other neurons or heads of the sublayer, other
    channels) stands beside each. `moescope phenomena` makes the cuts. Taking a massive activation to zero takes out all that
    stands in the channel, what its writer added and what was there before.

    Args:
        threshold: of retrieval and induction scores.
        uncut: show the nodes of a run in which no link was cut and no head was measured; it is refused otherwise.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world, how are you?"], store, name="first", progress=False)
        ...     ms.analyze(run, "phenomena_chain", uncut=True).title.split(":")[0]
        'No massive activation'
    """
    effects = ChainEffects(run)
    if not (uncut or effects.links or run.rows("heads") or run.rows("super_experts")):
        raise InputError(
            "nothing of the chain was measured in this run but its residual stream",
            fix="find and cut the links: moescope phenomena MODEL; the residual stream alone: uncut=true",
        )
    rows = [_writer(run, effects), *_massive(run), _sink(run, effects), _heads(run, threshold)]
    rows += [row for link in effects.links for row in _cut_rows(effects, link)]
    frame = pd.DataFrame([row for row in rows if row]).reindex(columns=list(_COLUMNS))
    for name in ("layer", "channel", "token", "position", "heads", "n"):
        frame[name] = frame[name].astype("Int64")
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_chain,
        n=run.rows("sequences"),
        n_unit="sequences",
        definition="Nodes: writer, massive activation (largest |x|), sink (mean attention to the first token of a text, over heads of "
        "the layers behind the block where it forms), heads (scores of at least "
        f"{threshold:g}). What remains: Σ under the cut ÷ Σ without it. ΔNLL, KL: mean over predicted tokens, nats. Cuts: writer, its "
        "contribution at zero at every token; massive to zero and to mean, every massive channel after the block that forms "
        "them, where it is massive; heads, the output of the leading heads at zero.",
        units={
            "value": "share that remains",
            "value[largest |x|]": "activation",
            "value[mean attention to the first token]": "attention",
            "value[heads over the threshold]": "heads",
            "value[ΔNLL]": "nats",
            "value[KL]": "nats",
            "value[ΔNLL of copies]": "nats",
            "value[Δ repetition]": "share of 4-grams",
            "n": "observations",
        },
        interval="95 % percentile bootstrap over documents (over sequences for scores of heads), 1000 resamples",
        null=f"the same cut made at random, mean of at least {effects.controls} draws (null_low, null_high: the smallest and largest)"
        if effects.links
        else "the same cut made at random; no link was cut",
        sql=EFFECTS_SQL if effects.links else None,
        sql_parameters={"run": run.run_id} if effects.links else {},
        computation="nodes from massive_activations, residual, super_experts and heads; the newest effect of each link",
        notes=_notes(effects),
    )


def _writer(run: Run, effects: ChainEffects) -> dict[str, Any]:
    cut = effects.cut("writer")
    named = super_experts_of(run)
    sizes = {expert_name(int(r.layer), str(r.block), int(r.expert)): float(r.value) for r in named.itertuples()}
    what = cut if cut is not None else ", ".join(sizes)
    value = max((sizes[name] for name in what.split(", ") if name in sizes), default=np.nan)
    return {
        "node": "writer",
        "metric": "largest |output|",
        "value": value,
        "what": what or "none found",
        "n": len(named),
    }


def _massive(run: Run) -> list[dict[str, Any]]:
    largest = largest_of_texts(run)
    found, _ = massive_activations_of(run)
    if found.empty:
        peak = largest.loc[largest["value"].idxmax()]
        return [
            {
                "node": "massive activation", "metric": "largest |x|", "value": float(peak["value"]), "what": "none found",
                "layer": int(peak["layer"]), "channel": int(peak["channel"]), "position": int(peak["position"]),
                "token": int(peak["token"]), "n": len(largest),
            }
        ]  # fmt: skip
    formed = forming_layers(run)
    first = found[found["layer"] == (formed[0] if formed else found["layer"].min())]
    top = first.loc[first["value"].idxmax()]
    peak = float(found["value"].max())
    on_first = bool((first["position"] == 0).all())
    return [
        {
            "node": "massive activation", "metric": "largest |x|", "value": peak, "layer": int(top["layer"]),
            "channel": int(top["channel"]), "position": int(top["position"]), "token": int(top["token"]),
            "what": "on first tokens" if on_first else f"on {first['token'].nunique()} tokens",
            "n": int(first["sequence_id"].nunique()),
        }
    ]  # fmt: skip


def _sink(run: Run, effects: ChainEffects) -> dict[str, Any]:
    base = next((share for link in effects.links if (share := effects.share(link, "base_sink"))), None)
    alpha = heads_of(run, "sink_alpha_0")
    row: dict[str, Any] = {"node": "sink", "metric": "mean attention to the first token", "what": "not measured"}
    if len(alpha):
        over = int((alpha["value"] > 0.3).sum())
        row |= {"value": float(alpha["value"].mean()), "heads": over, "what": f"{over} of {len(alpha)} heads over 0.3"}
    if base is not None:
        row |= {"value": base.value, "ci_low": base.low, "ci_high": base.high, "n": base.n}
        row["what"] = row["what"] if len(alpha) else "of all heads behind it"
    return row


def _heads(run: Run, threshold: float) -> dict[str, Any]:
    for metric in ("retrieval score", "induction"):
        found = heads_of(run, metric)
        over = found[found["value"] >= threshold]
        if len(over) or (len(found) and metric == "induction"):
            names = ", ".join(f"L{r.layer}·H{r.head} {r.value:.2f}" for r in over.head(3).itertuples())
            kind = "retrieval" if metric == "retrieval score" else metric
            return {
                "node": "heads", "metric": "heads over the threshold", "value": float(len(over)), "heads": len(over),
                "what": f"{kind} of at least {threshold:g}: {names}" if names else f"none found ({kind})", "n": len(found),
            }  # fmt: skip
    return {"node": "heads", "metric": "heads over the threshold", "value": np.nan, "what": "not measured"}


def _cut_rows(effects: ChainEffects, link: str) -> list[dict[str, Any]]:
    rows = []
    for metric, told in _TOLD.items():
        share = effects.share(link, metric)
        if share is not None:
            rows.append(_row(link, told, effects.cut(link), share))
    for metric, told in _TOLD_BY_LAYER.items():
        for layer in effects.layers(link, metric):
            share = effects.share(link, metric, layer=layer)
            if share is not None:
                rows.append(_row(link, told, effects.cut(link), share) | {"layer": layer})
    return rows


def _row(link: str, metric: str, cut: str | None, share: Share) -> dict[str, Any]:
    return {
        "node": link, "metric": metric, "cut": cut, "value": share.value, "ci_low": share.low, "ci_high": share.high,
        "null": share.null, "null_low": share.null_low, "null_high": share.null_high, "n": share.n,
    }  # fmt: skip


def _title(frame: pd.DataFrame) -> str:
    def remains(link: str, metric: str) -> float:
        found = frame[(frame["node"] == link) & (frame["metric"] == metric)]["value"]
        return float(found.iloc[0]) if len(found) else float("nan")

    writer, massive = frame.iloc[0], frame.iloc[1]
    loss, null = remains("writer", "ΔNLL"), frame[(frame["node"] == "writer") & (frame["metric"] == "ΔNLL")]["null"]
    cost = f"NLL changes by {loss:+.3g} nats" + (
        f" (random cuts {float(null.iloc[0]):+.2g})" if len(null) and np.isfinite(null.iloc[0]) else ""
    )
    if massive["what"] == "none found":
        what = "" if writer["what"] == "none found" else str(writer["what"])
        several = ", " in what
        named = f"; {short(what)} stand{'s' * (not several)} out by a relative rule" if what else ""
        end = f", and without {'them' if several else 'it'} {cost}" if what and np.isfinite(loss) else ""
        return f"No massive activation: the largest |x| is {massive['value']:,.4g}{named}{end}"
    place = f"|x| up to {massive['value']:,.5g} in channel {massive['channel']}, from block {massive['layer']} on"
    if not np.isfinite(loss):
        zero, mean = (remains(link, "ΔNLL") for link in ("massive to zero", "massive to mean"))
        cut = f"at zero NLL changes by {zero:+.3g} nats, at its mean by {mean:+.3g}"
        end = cut if np.isfinite(zero) and np.isfinite(mean) else "no link of its chain was cut"
        return f"A massive activation stands {massive['what']}: {place}; {end}"
    left = remains("writer", "massive activation that remains")
    sink = remains("writer", "attention to first tokens that remains")
    names = " and ".join(short(str(writer["what"])).rsplit(", ", 1))
    parts = [f"{left:.1%} of the massive activation ({place})"]
    parts += [f"{sink:.1%} of the attention to first tokens"] if np.isfinite(sink) else []
    return f"Without {names}, {' and '.join(parts)} remain{'s' * (len(parts) == 1)}, and {cost}"


def _notes(effects: ChainEffects) -> tuple[str, ...]:
    if not effects.links:
        return ("No link was cut: `moescope phenomena` cuts them.",)
    notes = [f"Cut at the {link}: {effects.cut(link)}." for link in effects.links]
    if effects.controls < 5:
        notes.append(f"Some cut has {effects.controls} controls only: there are no more different ones.")
    return tuple(notes)
