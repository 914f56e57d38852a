"""From a model's inputs to `Now`: where each token stands in its sequence, whatever pads, packs or caches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import nn

from moescope.core.errors import RunError
from moescope.probes.edits.now import Now


def now_of(
    module: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    row: Int[torch.Tensor, " row"] | None,
    sequences: tuple[int, ...] | None,
) -> Now:
    """What a call of a model says of its tokens; nothing is read back from the device.

    Args:
        module: the whole model.
        inputs, named: what it is called with.
        row: which intervention each row is under; None for the first, all of them.
        sequences: ids of the rows' sequences, where they are known.

    Raises:
        RunError: no token ids, or another number of rows than was assigned.
    """
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, inputs, strict=False)) | named
    ids = given.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise RunError(
            "an edited model must be given token ids",
            expected="input_ids [row, position]",
            found="vectors" if given.get("inputs_embeds") is not None else "no input_ids",
        )
    rows, positions = ids.shape
    if row is not None and len(row) != rows:
        raise RunError(
            "the rows of this pass are not those that interventions were assigned to",
            expected=f"{len(row)} rows, as assigned",
            found=f"{rows}",
            fix="call assign([…]) with one number a row before the pass",
        )
    before = _fed_before(given.get("past_key_values"))
    mask, columns = _mask(given.get("attention_mask"), ids, before)
    place = given.get("position_ids")
    if not isinstance(place, torch.Tensor) or place.shape[-1] != positions or place.ndim != 2:
        counted = columns.long().cumsum(-1)[:, -positions:] - 1
        place = counted.clamp(min=0)
    elif len(place) != rows:
        place = place.expand(rows, positions)
    under = torch.zeros(rows, dtype=torch.int64, device=ids.device) if row is None else row.to(ids.device)
    return Now(ids, mask, place, before > 0, under, sequences)


def _fed_before(cache: Any) -> int:
    """Tokens of earlier passes, as the host knows them."""
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return int(cache[0][0].shape[-2]) if isinstance(cache, (tuple, list)) and cache else 0
    found = length()
    if isinstance(found, torch.Tensor):
        raise RunError(
            "edits need to know how many tokens came before",
            found=f"{type(cache).__name__}, which keeps that on the device",
            fix="generate with the default cache",
        )
    return int(found)


def _mask(
    given: Any, ids: Int[torch.Tensor, "row position"], before: int
) -> tuple[Bool[torch.Tensor, "row position"], Bool[torch.Tensor, "row column"]]:
    """Real tokens among those fed, and among all columns up to now."""
    rows, positions = ids.shape
    if isinstance(given, torch.Tensor) and given.ndim == 2 and given.shape[1] >= positions:
        columns = given.to(ids.device) > 0
        missing = before + positions - columns.shape[1]
        if missing > 0:
            columns = torch.cat([columns.new_ones(rows, missing), columns], 1)
    else:  # none, or one of pairs of tokens: nothing tells padding from text
        columns = torch.ones(rows, before + positions, dtype=torch.bool, device=ids.device)
    return columns[:, -positions:], columns
