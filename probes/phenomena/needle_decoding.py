"""Answering token by token with a model's cache, and the key that each head looks at most in every step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.attention_reduced import attention_reduced
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.forward import logits_in, named_arguments
from moescope.probes.generation import end_ids
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.head_map import HeadMap


@dataclass(frozen=True)
class Steps:
    """What the decode steps of one answer showed.

    Attributes:
        written: [step] the token that each step gave (or was given).
        looked: [step, head] the key with the largest weight for that step's query, as a place in the sequence.
        keys: [step, head] how many keys it could see.
    """

    written: NDArray[np.int64]
    looked: NDArray[np.int64]
    keys: NDArray[np.int64]


def last_only(model: LiveModel) -> dict[str, int]:
    """Logits of the last position alone, where the model can leave the others out."""
    return {"logits_to_keep": 1} if "logits_to_keep" in named_arguments(model.module) else {}


class AnswerEnds:
    """Whether an answer is over: at an end of sequence, or at a line break after its first words.

    (The authors' code stops at a line break wherever it comes; models that begin their answers with one would all fail.)
    """

    def __init__(self, model: LiveModel) -> None:
        self._ends = set(end_ids(model))
        self._tokenizer = model.tokenizer

    def __call__(self, written: Sequence[int]) -> bool:
        """Whether these tokens are a whole answer."""
        if not written or written[-1] in self._ends:
            return bool(written)
        if self._tokenizer is None or "\n" not in self._tokenizer.decode([written[-1]]):
            return False
        return bool(self._tokenizer.decode(list(written)).strip())


def prefilled(model: LiveModel, ids: Int[torch.Tensor, "1 position"]) -> Any:
    """The cache after a prompt, which runs as the model always runs.

    Raises:
        InputError: the model gives none.
    """
    out = model.module(input_ids=ids, use_cache=True, **last_only(model))
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise InputError(
            f"{model.name} gives no cache, with which answers are written token by token",
            expected="a causal language model of transformers with use_cache",
        )
    return cache


def decoded(
    model: LiveModel,
    heads: HeadMap | None,
    token: Int[torch.Tensor, "1 1"],
    cache: Any,
    before: int,
    steps: int,
    ended: AnswerEnds,
    *,
    told: Sequence[int] | None = None,
) -> Steps:
    """Go on greedily, one token a step, and look where each head looks.

    Args:
        model: runs.
        heads: whose attention to read; None for nobody's.
        token: [1, 1] what the first step is fed: the prompt's last token.
        cache: of the tokens before it, which it changes.
        before: how many these are.
        steps: tokens to write at most.
        ended: says when the answer is over.
        told: what to write instead of the model's choices, token by token.
    """
    written: list[int] = []
    seen: dict[tuple[int, str], tuple[torch.Tensor, int]] = {}
    looked: list[list[tuple[torch.Tensor, int]]] = []

    def look(site: Site, slices: PatternSlices) -> None:
        for pattern, _ in slices:
            seen[site.layer, site.block] = pattern[0, :, -1].argmax(-1), pattern.shape[-1]

    places = heads.places if heads is not None else ()
    with attention_reduced(model, heads.layer_numbers, look) if heads is not None else nullcontext():
        for step in range(steps):
            out = model.module(input_ids=token, past_key_values=cache, use_cache=True, **last_only(model))
            cache = out.past_key_values
            looked.append([seen[place.layer, place.block] for place in places])
            chosen = int(logits_in(out)[0, -1].argmax()) if told is None else told[step]
            written.append(chosen)
            if told is None and ended(written):
                break
            token = torch.tensor([[chosen]], device=token.device)
    return Steps(np.array(written, np.int64), *_places(looked, heads, before))


def _places(
    looked: list[list[tuple[torch.Tensor, int]]], heads: HeadMap | None, before: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Top keys as places in the sequence, and how many keys were seen; [step, head]."""
    if heads is None:
        return np.zeros((len(looked), 0), np.int64), np.zeros((len(looked), 0), np.int64)
    tops = np.empty((len(looked), heads.total), np.int64)
    keys = np.empty_like(tops)
    for step, row in enumerate(looked):
        tokens = before + step + 1
        for place, (top, n) in zip(heads.places, row, strict=True):
            columns = heads.slices[place.layer, place.block]
            # A cache that has dropped its oldest keys holds the newest ones.
            tops[step, columns] = top.cpu().numpy() + (tokens - n)
            keys[step, columns] = min(n, place.window or n)
    return tops, keys
