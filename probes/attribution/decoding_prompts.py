"""Prompts as token ids, alone and padded at the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int

from moescope.core.errors import InputError
from moescope.probes.live_model import LiveModel

Ids = tuple[int, ...]


def prompts_of(given: Any) -> list[Any]:
    """A text, a list of token ids, or a list of either, as a list of prompts.

    Raises:
        InputError: there is none.

    Example:
        >>> prompts_of("Hello"), prompts_of([1, 2]), prompts_of([[1], [2, 3]])
        (['Hello'], [[1, 2]], [[1], [2, 3]])
    """
    alone = isinstance(given, str) or (len(given) > 0 and not isinstance(given[0], (str, Sequence)))
    found = [given] if alone else list(given)
    if not found:
        raise InputError("there is no prompt", expected="a text, a list of token ids, or a list of either")
    return found


def prompt_ids(model: LiveModel, prompt: str | Sequence[int]) -> Ids:
    """Token ids of a prompt; special tokens as the tokenizer puts them round a text.

    Raises:
        InputError: nothing in it, an id the model does not have, or a text without a tokenizer.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise InputError("this model has no tokenizer", fix="give prompts as token ids")
        ids = tuple(int(i) for i in model.tokenizer(prompt)["input_ids"])
    else:
        ids = tuple(int(i) for i in prompt)
    if not ids or min(ids) < 0 or max(ids) >= model.anatomy.vocabulary:
        raise InputError(
            f"this is no prompt: {prompt!r}",
            expected=f"at least one token, ids from 0 to {model.anatomy.vocabulary - 1:,}",
        )
    return ids


def padded_prompts(
    model: LiveModel, prompts: Sequence[Ids]
) -> tuple[Int[torch.Tensor, "row position"], Int[torch.Tensor, "row position"]]:
    """Ids and mask on the model's device, padded at the left, so that all end in the last column."""
    width = max(map(len, prompts))
    ids = [[model.pad_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return (torch.tensor(rows, dtype=torch.int64).to(model.device) for rows in (ids, mask))  # type: ignore[return-value]  # two
