"""From the last block to the logits: which directions of the stream the asked logits read, with the final norm's scale frozen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import nn

from moescope.core.errors import InputError
from moescope.probes.attribution.logit_norms import frozen_norm, identity, tolerance
from moescope.probes.forward import DeviceBatch, logits_of
from moescope.probes.live_model import LiveModel
from moescope.probes.projections import widths

Targets = Literal["predicted", "next"] | Sequence[int]
Positions = Literal["last", "all"] | Sequence[int]


@dataclass(frozen=True)
class Readout:
    """What is asked, and how the stream after the last block becomes it.

    Attributes:
        positions: places of the text whose logits are asked.
        tokens: token ids there.
        targets: token ids asked at each.
        directions: of the stream after the last block, so that direction · stream + biases = logit; the last one at each
            position is the mean over the vocabulary.
        norm_bias, head_bias: what the final norm's bias and the unembedding's add.
        logits: the model's, or the differences from `versus`; the mean over the vocabulary last.
        cap: why these are not the model's final logits; None where they are.
    """

    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    targets: Int[torch.Tensor, "position target"]
    directions: Float[torch.Tensor, "position target+1 d_model"]
    norm_bias: Float[torch.Tensor, "position target+1"]
    head_bias: Float[torch.Tensor, "position target+1"]
    logits: Float[torch.Tensor, "position target+1"]
    cap: str | None


@torch.no_grad()
def readout(
    model: LiveModel, batch: DeviceBatch, *, targets: Targets, positions: Positions, versus: int | None
) -> Readout:
    """Run one text and find the directions that its logits read.

    Args:
        model: a loaded model.
        batch: one text.
        targets: `predicted`, the most likely token at each position; `next`, the one that follows; or token ids.
        positions: `last`, `all`, or places counted from 0, or from the end where negative.
        versus: a token whose logit is subtracted; None for none.

    Raises:
        InputError: a position or token that is not there, or logits that are no linear reading of the normed stream.
    """
    end = _End(model)
    with end:
        logits = logits_of(model, batch)[0]
    places = _places(positions, len(logits) - (targets == "next"))
    asked = _targets(targets, places, logits, batch.ids[0])
    if versus is not None:
        _check_ids([versus], logits.shape[-1])
    head, bias = _weights(end.head)
    x, y, given, raw, final = (t[places].to(head.device) for t in (end.stream, end.normed, end.given, end.raw, logits))
    raw, asked = raw[:, : final.shape[-1]], asked.to(head.device)
    norm = identity(x) if end.norm is None else frozen_norm(end.norm, x, y)
    if norm is None:
        raise _refused(f"its final norm, {type(end.norm).__name__}, is neither an RMS norm nor a layer norm")
    before = _factor(y, given)
    if before is None:
        raise _refused("what stands between its final norm and its unembedding is more than a factor")
    if not _close(nn.functional.linear(given, head)[:, : raw.shape[1]].double() + bias[: raw.shape[1]], raw):
        raise _refused(f"its unembedding, {type(end.head).__name__}, is no plain matrix of weights")
    after = _factor(raw, final)
    if after is None and not _capped(model.module):
        raise _refused("what it does to the output of its unembedding is more than a factor")
    cap = None if after is not None else _CAPPED
    factor = after or 1.0
    rows, biases, values = _asked(head, bias, raw if after is None else final, asked, versus)
    through = rows * (before * factor)
    tokens = tuple(batch.ids[0][places].tolist())
    return Readout(tuple(places), tokens, asked, norm.back(through), through @ norm.bias, biases * factor, values, cap)


_CAPPED = (
    "The model puts a soft cap, which is not linear, on its logits: these are the logits before it, in the same order "
    "as those after"
)


def _capped(module: nn.Module) -> bool:
    """Whether a model's configuration asks for a soft cap on its logits."""
    config: Any = getattr(module, "config", None)
    return bool(getattr(config, "final_logit_softcapping", None))


def _asked(
    head: torch.Tensor, bias: torch.Tensor, logits: torch.Tensor, asked: torch.Tensor, versus: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the unembedding, biases and logits of the asked tokens, less those of `versus`; last the vocabulary's mean."""
    head, bias = head[: logits.shape[-1]], bias[: logits.shape[-1]]
    rows, biases, values = head[asked].double(), bias[asked], logits.gather(1, asked).double()
    vocabulary = head.mean(0, dtype=torch.float64), bias.mean(), logits.mean(1, keepdim=True, dtype=torch.float64)
    mean_row, mean_bias = vocabulary[0].expand(len(asked), 1, -1), vocabulary[1].expand(len(asked), 1)
    if versus is None:
        return torch.cat([rows, mean_row], 1), torch.cat([biases, mean_bias], 1), torch.cat([values, vocabulary[2]], 1)
    rows, biases, values = (
        rows - head[versus].double(),
        biases - bias[versus],
        values - logits[:, versus, None].double(),
    )
    # What is added to every token alike is in neither difference.
    nothing = torch.zeros_like(mean_bias)
    return torch.cat([rows, 0 * mean_row], 1), torch.cat([biases, nothing], 1), torch.cat([values, nothing], 1)


class _End:
    """What passes between the last block and the logits, for one text."""

    def __init__(self, model: LiveModel) -> None:
        self.model, self.stack = model, ExitStack()
        getter: Any = getattr(model.module, "get_output_embeddings", None)
        self.head: nn.Module = getter() if callable(getter) else None  # type: ignore[assignment]  # checked below
        if self.head is None:
            raise _refused("it has no unembedding that can be told")
        self.norm: nn.Module | None = None
        self.known: torch.Tensor | None = None

    def __enter__(self) -> None:
        anatomy, module = self.model.anatomy, self.model.module
        blocks = [module.get_submodule(path) for path in anatomy.block_paths]
        inside = {id(m) for block in blocks for m in block.modules()} | {id(self.head)}
        for m in module.modules():
            if id(m) not in inside and not any(id(child) in inside for child in m.modules()):
                self.stack.callback(m.register_forward_hook(self._follow).remove)
        self.stack.callback(blocks[-1].register_forward_hook(self._last).remove)
        self.stack.callback(self.head.register_forward_hook(self._logits).remove)

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _last(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.known = output[0] if isinstance(output, (tuple, list)) else output
        self.stream = self.normed = self.known[0].clone()
        self.norm = None

    def _follow(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        after = self.known is not None and bool(inputs) and inputs[0] is self.known
        if after and isinstance(output, torch.Tensor) and self.norm is None:
            self.norm, self.normed = module, output[0].clone()

    def _logits(self, _module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.given, self.raw = inputs[0].reshape(-1, inputs[0].shape[-1]), output.reshape(-1, output.shape[-1])


def _weights(head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    weight: Any = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or widths(head) is None or weight.is_meta:
        raise _refused(f"its unembedding, {type(head).__name__}, is no plain matrix of weights")
    bias: Any = getattr(head, "bias", None)
    return weight.detach(), (torch.zeros_like(weight[:, 0]) if bias is None else bias.detach()).double()


def _factor(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """The number c with y = c · x; None where there is none."""
    if x.shape != y.shape:
        return None
    if torch.equal(x, y):
        return 1.0
    wide = x.double()
    c = float((wide * y.double()).sum() / wide.square().sum())
    return c if _close(c * wide, y) else None


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((x - y.double()).abs().max() <= tolerance(y.dtype) * y.abs().max())


def _places(positions: Positions, length: int) -> list[int]:
    if length < 1:
        raise InputError("this text has no position to ask", expected="two tokens or more for the next one")
    if isinstance(positions, str):
        if positions not in ("last", "all"):
            raise InputError(f"positions cannot be {positions!r}", expected="last, all, or numbers")
        return [length - 1] if positions == "last" else list(range(length))
    places = [int(p) + (length if p < 0 else 0) for p in positions]
    if not places or not all(0 <= p < length for p in places):
        raise InputError("there is no such position", expected=f"{-length} to {length - 1}", found=f"{list(positions)}")
    return list(dict.fromkeys(places))


def _targets(targets: Targets, places: list[int], logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(targets, str):
        if targets not in ("predicted", "next"):
            raise InputError(f"targets cannot be {targets!r}", expected="predicted, next, or token ids")
        return logits[places].argmax(-1, keepdim=True) if targets == "predicted" else ids[[p + 1 for p in places], None]
    asked = list(dict.fromkeys(int(t) for t in targets))
    _check_ids(asked, logits.shape[-1])
    return torch.tensor(asked, device=logits.device).expand(len(places), -1)


def _check_ids(ids: list[int], vocabulary: int) -> None:
    if not ids or not all(0 <= i < vocabulary for i in ids):
        raise InputError("there is no such token", expected=f"ids from 0 to {vocabulary - 1:,}", found=f"{ids[:5]}")


def _refused(reason: str) -> InputError:
    return InputError(
        "the logits of this model cannot be taken apart", found=reason, fix="measure the effect of ablations instead"
    )
