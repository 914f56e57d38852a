"""Exact direct logit attribution: what each expert, head, MLP and bias adds to a logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.probes.attribution.logit_parts import Part, parts
from moescope.probes.attribution.logit_readout import Positions, Readout, Targets, readout
from moescope.probes.foreign.taps import foreign_taps
from moescope.probes.forward import DeviceBatch, is_encoder_decoder
from moescope.probes.live_model import LiveModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

_KINDS = ("expert", "shared", "attn", "head", "mlp", "embedding", "bias")
_NAMES = {
    "expert": "experts",
    "shared": "shared experts",
    "attn": "attention",
    "head": "attention heads",
    "mlp": "dense MLPs",
    "embedding": "the embedding",
    "bias": "biases",
}
_DEFINITION = (
    "logit = Σ over the parts of the model of (part's output) · (unembedding row × final norm's gain × its scale at that "
    "position). An expert's part is its routing weight · its output; attention's is what it adds to the stream, or each head's "
    "output through the output projection; the embedding's is the stream before the first block. Norms after a sublayer and "
    "the final norm are held at the scale they had."
)
_NULL = "what the same part adds to the logit of every token alike: its mean over the vocabulary"
_NOT_CAUSAL = (
    "This tells where the logit's sum comes from, not what causes it: a part that acts through later layers shows in theirs, "
    "and without a part the norms' scales, the routing and all later parts would change. To measure that, ablate it."
)


@torch.no_grad()
def logit_attribution(
    model: LiveModel,
    text: str | Sequence[int],
    *,
    targets: Targets = "predicted",
    positions: Positions = "last",
    versus: int | None = None,
    heads: bool = False,
) -> Result:
    """Take logits apart: exactly, into what every expert, attention, MLP, the embedding and biases add to them.

    Direct logit attribution (Elhage et al. 2021, transformer-circuits.pub/2021/framework) down to single experts: with the
    final norm's scale frozen, a logit is linear in what the parts of the model add to the residual stream. The sum of all
    parts is the logit; what is missing, from rounding, is `residual`.

    Args:
        model: a loaded decoder model; inside `edited`, the edited one is taken apart.
        text: a text, or its token ids.
        targets: whose logits: `predicted`, the most likely token at each position; `next`, the token that follows; or ids,
            all of them at each position.
        positions: `last`, `all`, or places in the text, from 0 or negative from its end.
        versus: id of a token whose logit is subtracted from each target's: where the difference comes from.
        heads: attention by head, where its output projection shows them, instead of by layer.

    Returns:
        A table of one row for each part at each position and target: position, token_id, target_id, target, component (embedding,
        attn, head, attn bias, expert, shared, mlp, norm bias, final norm bias, unembedding bias), layer, block, expert, head,
        metric, value (logit units), null, logit, residual. The values of a position and target sum to logit − residual.

    Raises:
        InputError: a position or token that is not there; a model whose logits are no sum of its parts (with the reason).

    Example:
        >>> import moescope as ms
        >>> result = logit_attribution(ms.load("demo"), [5, 6, 7, 8])
        >>> frame = result.df()
        >>> bool(abs(frame.value.sum() - frame.logit[0]) < 1e-4)
        True
    """
    reason = _why_not(model)
    if reason is not None:
        raise InputError(f"the logits of {model.name} cannot be taken apart", found=reason)
    ids = _ids(model, text)
    batch = DeviceBatch(ids.to(model.device), torch.ones_like(ids, dtype=torch.bool).to(model.device))
    read = readout(model, batch, targets=targets, positions=positions, versus=versus)
    found, limits = parts(model, batch, read, heads=heads)
    found.append(Part("final norm bias", read.norm_bias))
    found.append(Part("unembedding bias", read.head_bias))
    found = [part for part in found if "bias" not in part.component or bool(part.values.any())]
    return _result(model, read, found, limits, versus)


def _result(model: LiveModel, read: Readout, found: list[Part], limits: list[str], versus: int | None) -> Result:
    import pyarrow as pa

    total = torch.stack([part.values for part in found]).sum(0)
    residual = (read.logits - total).cpu()
    values = {
        "logit": read.logits.cpu().tolist(),
        "residual": residual.tolist(),
        "target": read.targets.cpu().tolist(),
        "parts": [part.values.cpu().tolist() for part in found],
        "experts": [None if part.expert is None else part.expert.cpu().tolist() for part in found],
    }
    rows = []
    for p, position in enumerate(read.positions):
        for t, target in enumerate(values["target"][p]):
            for part, value, experts in zip(found, values["parts"], values["experts"], strict=True):
                rows.append(
                    {
                        "position": position,
                        "token_id": read.tokens[p],
                        "target_id": target,
                        "target": _piece(model, target),
                        "component": part.component,
                        "layer": part.layer,
                        "block": part.block,
                        "expert": None if experts is None else experts[p],
                        "head": part.head,
                        "metric": "contribution",
                        "value": value[p][t],
                        "null": value[p][-1],
                        "logit": values["logit"][p][t],
                        "residual": values["residual"][p][t],
                    }
                )
    table = pa.Table.from_pylist(rows, schema=_schema())
    asked = len(read.positions) * read.targets.shape[1]
    worst = float(residual[:, :-1].abs().max())
    notes = [
        _NOT_CAUSAL,
        f"The parts sum to the logits within {worst:.2g} (residual, from rounding in {model.dtype}).".replace(
            "torch.", ""
        ),
    ]
    notes += [read.cap + "."] if read.cap else []
    if versus is not None:
        notes.append(f"Every value is a difference from that of token {versus} ({_piece(model, versus)!r}).")
    return Result(
        title=_title(model, read, found, versus),
        table=table,
        definition=_DEFINITION,
        units={"value": "logits", "null": "logits", "logit": "logits", "residual": "logits"},
        n=asked,
        n_unit="logits" if asked > 1 else "logit",
        null=_NULL
        if versus is None
        else "0 by construction: what a part adds to every token alike is in neither difference",
        computation="two forward passes and inner products in float64",
        notes=(*notes, *limits),
        name="logit_attribution",
        source="transformer-circuits.pub/2021/framework (direct logit attribution)",
        provenance={"model": model.name, "revision": model.revision},
        draw=_draw,
    )


def _title(model: LiveModel, read: Readout, found: list[Part], versus: int | None) -> str:
    sums: dict[str, float] = {}
    for part in found:
        kind = "bias" if "bias" in part.component else part.component
        sums[kind] = sums.get(kind, 0.0) + float(part.values[:, :-1].mean())
    largest = sorted(sums, key=lambda kind: -abs(sums[kind]))[:3]
    told = ", ".join(f"{_NAMES[kind]} {sums[kind]:+.2f}" for kind in largest)
    logit, many = float(read.logits[:, :-1].mean()), read.targets.numel() > 1
    what = "lead" if versus is not None else "logit"
    if many:
        return f"Of a mean {what} of {logit:.2f} over {read.targets.numel()} targets, {told}"
    token = _piece(model, int(read.targets[0, 0]))
    over = f" over {_piece(model, versus)!r}" if versus is not None else ""
    return f"The {what} of {token!r}{over}, {logit:.2f}, is made of {told}"


def _draw(result: Result) -> go.Figure:
    import plotly.graph_objects as go

    frame = result.df()
    asked = frame.groupby(["position", "target_id"]).ngroups
    frame["part"] = [_label(row) for row in frame.itertuples()]
    frame["kind"] = ["bias" if "bias" in c else c for c in frame["component"]]
    sums = frame.groupby(["part", "kind"], as_index=False)[["value", "null"]].sum()
    sums[["value", "null"]] /= asked
    shown = sums.reindex(sums["value"].abs().sort_values(ascending=False).index)[:20]
    figure = go.Figure()
    for kind in [k for k in _KINDS if k in set(shown["kind"])]:
        of_kind = shown[shown["kind"] == kind]
        figure.add_bar(
            x=of_kind["value"],
            y=of_kind["part"],
            orientation="h",
            name=_NAMES[kind],
            marker={"color": SERIES[_KINDS.index(kind) % len(SERIES)]},
            hovertemplate="%{y}: %{x:+.3f}<extra></extra>",
        )
    figure.add_scatter(
        x=shown["null"],
        y=shown["part"],
        mode="markers",
        marker={"symbol": "line-ns", "size": 14, "line": {"width": 3, "color": CHANCE}},
        name="to the mean logit of all tokens",
        hovertemplate="%{y}: %{x:+.3f} to the mean logit<extra></extra>",
    )
    figure.update_xaxes(title="logits" if asked == 1 else f"logits, mean over {asked} targets", zeroline=True)
    figure.update_yaxes(categoryorder="array", categoryarray=list(shown["part"])[::-1])
    figure.update_layout(barmode="overlay", height=160 + 24 * len(shown))
    return figure


def _label(row: Any) -> str:
    """A part's name in the figure."""
    import pandas as pd

    if pd.isna(row.layer):
        return str(row.component)
    block = "" if row.block in ("attn", "mlp") else f" {row.block}"
    number = row.expert if row.component == "expert" else row.head if row.component == "head" else None
    names = {"attn": "attention", "mlp": "MLP", "shared": "shared experts"}
    return plain(
        f"L{int(row.layer)}{block} {names.get(row.component, row.component)}{'' if number is None else f' {int(number)}'}"
    )


def _schema() -> Any:
    import pyarrow as pa

    words = ("target", "component", "block", "metric")
    numbers = ("position", "token_id", "target_id", "layer", "expert", "head")
    first = ("position", "token_id", "target_id", "target", "component", "layer", "block", "expert", "head", "metric")
    order = (*first, "value", "null", "logit", "residual")
    kinds = {**dict.fromkeys(words, pa.string()), **dict.fromkeys(numbers, pa.int64())}
    return pa.schema([(name, kinds.get(name, pa.float64())) for name in order])


def _why_not(model: LiveModel) -> str | None:
    if is_encoder_decoder(model.module):
        return "an encoder-decoder model: its decoder reads another stream too"
    if foreign_taps(model.module, model.anatomy) is not None:
        return "the model runs inside another library's wrapper: load it with transformers"
    return model.anatomy.no_stream


def _ids(model: LiveModel, text: str | Sequence[int]) -> torch.Tensor:
    if isinstance(text, str):
        if model.tokenizer is None:
            raise InputError(f"{model.name} has no tokenizer", fix="pass token ids")
        text = model.tokenizer(text)["input_ids"]
    ids = [int(i) for i in text]
    if not ids or not all(0 <= i < model.anatomy.vocabulary for i in ids):
        raise InputError(
            "this is no text of this model",
            expected=f"one or more ids from 0 to {model.anatomy.vocabulary - 1:,}",
            found=f"{ids[:5]}",
        )
    if model.context is not None and len(ids) > model.context:
        raise InputError(
            "the text is longer than the model's context",
            expected=f"{model.context:,} tokens at most",
            found=f"{len(ids):,}",
        )
    return torch.tensor([ids])


def _piece(model: LiveModel, token: int) -> str:
    return f"token {token}" if model.tokenizer is None else str(model.tokenizer.decode([token]))
