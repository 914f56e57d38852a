"""Sequences of random tokens, repeated: text in which nothing but the copies before can be attended to with profit."""

from __future__ import annotations

import numpy as np

from moescope.core.errors import InputError
from moescope.probes.live_model import LiveModel


def repeated_tokens(model: LiveModel, *, segment: int, repeats: int, draws: int, seed: int) -> list[list[int]]:
    """Segments of random token ids, each repeated; before them the token with which the tokenizer begins texts, if any.

    Ids are drawn evenly from the vocabulary without its special tokens, no id twice in a segment.

    Args:
        model: whose vocabulary and context.
        segment: tokens of a segment.
        repeats: how often it stands there, the first time included.
        draws: sequences, each with a segment of its own.
        seed: of drawing.

    Raises:
        InputError: numbers out of range, more tokens than the context or than the vocabulary has.
    """
    for name, value, least in (("segment", segment, 4), ("repeats", repeats, 2), ("draws", draws, 1)):
        if value < least:
            raise InputError(f"{name} cannot be {value}", expected=f"a whole number, at least {least}")
    first = first_ids(model)
    length = len(first) + segment * repeats
    if model.context is not None and length > model.context:
        raise InputError(
            f"{segment:,} tokens {repeats} times do not fit into this model's context",
            expected=f"at most {model.context:,} tokens",
            found=f"{length:,}",
            fix="lower segment or repeats",
        )
    ids = plain_ids(model)
    if len(ids) < segment:
        raise InputError(
            f"the vocabulary has no {segment:,} different tokens",
            found=f"{len(ids):,} without special ones",
            fix="lower segment",
        )
    random = np.random.default_rng(seed)
    segments = (random.choice(ids, segment, replace=False).tolist() for _ in range(draws))
    return [first + drawn * repeats for drawn in segments]


def plain_ids(model: LiveModel) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Token ids of a model that are no special tokens; all where it has no tokenizer."""
    tokenizer = model.tokenizer
    known = model.anatomy.vocabulary if tokenizer is None else min(model.anatomy.vocabulary, len(tokenizer))
    special = set(getattr(tokenizer, "all_special_ids", ()) or ()) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    return np.array([i for i in range(known) if i not in special], np.int64)


def first_ids(model: LiveModel) -> list[int]:
    """What the tokenizer puts before a text by itself."""
    if model.tokenizer is None:
        return []
    text = "a"
    whole = list(model.tokenizer(text, verbose=False)["input_ids"])
    bare = list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    places = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
    return whole[: next(places, 0)]
