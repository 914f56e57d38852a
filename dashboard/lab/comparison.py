"""What the page shows of two passes over the prompts: next tokens, token by token, decisions; plain data for the browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.dashboard.lab.bench import Base, Pass

if TYPE_CHECKING:
    import torch

    from moescope.probes.live_model import LiveModel

TOP = 10


def shown(model: LiveModel, base: Base, edited: Pass | None, *, row: int, at: int | None) -> dict[str, Any]:
    """Everything the page paints.

    Args:
        model: what ran.
        base: the prompts without edits.
        edited: under the edits; None where there are none, or they are refused.
        row: the prompt whose next token is shown.
        at: after which of its tokens; None for the last.
    """
    lengths = [int(n) for n in base.batch.lengths]
    row = max(0, min(row, len(lengths) - 1))
    place = lengths[row] - 1 if at is None else max(0, min(at, lengths[row] - 1))
    pieces = _Pieces(model)
    return {
        "moe": bool(model.anatomy.moe),
        "edited": edited is not None,
        **_tokens(model, base, edited, pieces),
        "row": row,
        "at": place,
        "next": _next_tokens(base.plain, edited, row, place, pieces),
        "routers": _decisions_at(base.plain, edited, row, place),
    }


class _Pieces:
    """Token ids as text."""

    def __init__(self, model: LiveModel) -> None:
        self._tokenizer = model.tokenizer

    def __call__(self, token_id: int) -> str:
        from moescope.probes.pieces import token_bytes

        return token_bytes(self._tokenizer, token_id).decode("utf-8", "replace")


def pieces_of(model: LiveModel, ids: Sequence[int]) -> list[str]:
    """Token ids as texts."""
    piece = _Pieces(model)
    return [piece(int(token_id)) for token_id in ids]


def _tokens(model: LiveModel, base: Base, edited: Pass | None, pieces: _Pieces) -> dict[str, Any]:
    """Every token's numbers, per prompt, and over all; exactly those of `moescope.effect`."""
    from moescope.probes.effects.token_numbers import compared

    spans = base.batch.spans() if model.device.type == "cpu" else None
    changed = (edited or base.plain).logits
    numbers = compared(base.plain.logits, changed, base.on_device.ids, spans=spans)
    values = {name: getattr(numbers, name).double().cpu().numpy() for name in ("base_nll", "delta_nll", "kl", "flips")}
    switched, layers = _switched(base, edited)
    prompts = []
    for number, sequence in enumerate(base.batch.sequences):
        n = len(sequence.token_ids)
        # Nothing predicted the first token.
        one: dict[str, Any] = {name: [None, *_rounded(array[number, 1:n])] for name, array in values.items()}
        one["pieces"] = [pieces(int(token_id)) for token_id in sequence.token_ids]
        one["switched"] = switched[number, :n].tolist()
        one["document"], one["part"] = sequence.document_id, sequence.part
        prompts.append(one)
    inside = np.arange(values["kl"].shape[1])[None, :] < base.batch.lengths[:, None]
    inside[:, 0] = False
    n = int(inside.sum())
    sums = {name: float(array[inside].sum()) for name, array in values.items()}
    means = {name: total / n if n and np.isfinite(total) else None for name, total in sums.items()}
    decisions = int(base.batch.tokens) * len(base.plain.decisions)
    return {
        "prompts": prompts,
        "summary": {**means, "n": n, "decisions": decisions, "switched": int(sum(x["switched"] for x in layers))},
        "layers": layers,
    }


def _switched(base: Base, edited: Pass | None) -> tuple[np.ndarray[Any, Any], list[dict[str, Any]]]:
    """How many routers gave each token another set of experts, and each router's count over the tokens."""
    rows, width = base.on_device.ids.shape
    inside = np.arange(width)[None, :] < base.batch.lengths[:, None]
    total = np.zeros((rows, width), np.int64)
    layers = []
    for (layer, block), before in base.plain.decisions.items():
        after = before if edited is None else edited.decisions[layer, block]
        changed = _other_sets(before, after) & inside
        total += changed
        layers.append({"layer": layer, "block": block, "n": int(inside.sum()), "switched": int(changed.sum())})
    return total, layers


def _other_sets(before: torch.Tensor, after: torch.Tensor) -> np.ndarray[Any, Any]:
    if before.shape != after.shape:  # another number of experts a token
        return np.ones(before.shape[:2], bool)
    found: np.ndarray[Any, Any] = (before.sort(-1).values != after.sort(-1).values).any(-1).numpy()
    return found


def _next_tokens(plain: Pass, edited: Pass | None, row: int, at: int, pieces: _Pieces) -> dict[str, Any]:
    """The most likely next tokens of both passes, with probability, its change and the change of rank."""
    before = plain.logits[row, at].double()
    after = before if edited is None else edited.logits[row, at].double()
    p, q = before.softmax(-1), after.softmax(-1)

    def listed(first: torch.Tensor, second: torch.Tensor, by: torch.Tensor, other: torch.Tensor) -> list[Any]:
        top = by.topk(min(TOP, len(by))).indices
        return [
            {
                "id": int(i),
                "piece": pieces(int(i)),
                "p": float(first[i]),
                "delta": float(q[i] - p[i]),
                "rank": 1 + int((by > by[i]).sum()),
                "other_rank": 1 + int((other > other[i]).sum()),
                "other_p": float(second[i]),
            }
            for i in top
        ]

    return {"base": listed(p, q, before, after), "edited": None if edited is None else listed(q, p, after, before)}


def _decisions_at(plain: Pass, edited: Pass | None, row: int, at: int) -> list[dict[str, Any]]:
    """What every router chose for one token, before and after."""
    found = []
    for (layer, block), ids in plain.decisions.items():
        after = None if edited is None else edited.decisions[layer, block][row, at].tolist()
        found.append({"layer": layer, "block": block, "base": ids[row, at].tolist(), "edited": after})
    return found


def _rounded(values: np.ndarray[Any, Any]) -> list[float | None]:
    return [float(f"{x:.6g}") if np.isfinite(x) else None for x in values.tolist()]
