"""Reader of `router_logits` as transformers returns them (`output_router_logits=True`), saved as arrays.

The decision is not in them: it is made here, by the rule softmax → the k largest, which is said in the run's notes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.importing.expert_arrays import layer_numbers
from moescope.store.importing.files import laid_out, load_arrays
from moescope.store.importing.trace import Options, Trace, decision_table

_ROWS = 65_536
_SUM_OF_SHARES = 1e-3
_LAYERS_FIRST = "[layer, token, expert] or [layer, sequence, token, expert], or one [token, expert] a layer"


def read_router_logits(source: Path, connection: duckdb.DuckDBPyConnection, options: Options) -> Trace:
    """Router scores of every expert, as a trace of the decisions that follow from them.

    Args:
        source: .npy with [layer, token, expert] or [layer, sequence, token, expert]; .npz with such an array called
            `router_logits`, or one array [token, expert] a layer in order of the numbers in their names; beside them
            `attention_mask` and `input_ids` [sequence, token], where there are any.
        connection: unused.
        options: `top_k` (needed), `probabilities`, `normalize`, `layers`.

    Raises:
        InputError: k is not given, shapes do not fit, or the rows are probabilities and nobody said so.
    """
    if options.top_k is None:
        raise InputError(
            "router logits do not say how many experts a token is given",
            fix="pass top_k=… (--top-k), as the model's config has it (num_experts_per_tok)",
        )
    arrays = load_arrays(source)
    with laid_out(source, "router logits are"):
        return _of_arrays(arrays, options, source)


def _of_arrays(arrays: dict[str, NDArray[Any]], options: Options, source: Path) -> Trace:
    beside = {name: arrays.pop(name) for name in ("attention_mask", "input_ids") if name in arrays}
    return from_scores(_by_layer(arrays, source), options, source, **beside)


def from_scores(
    scores: Sequence[NDArray[Any]],
    options: Options,
    called: object,
    *,
    attention_mask: NDArray[Any] | None = None,
    input_ids: NDArray[Any] | None = None,
) -> Trace:
    """A trace of the decisions that follow from scores [token, expert] of every layer; see `read_router_logits`."""
    tokens, n_experts = scores[0].shape
    k = options.top_k or 0
    if not 1 <= k <= n_experts:
        raise InputError(f"top_k={k} does not fit {n_experts} experts of {called}")
    beside = attention_mask if attention_mask is not None else input_ids
    shape = (1, tokens) if beside is None else np.atleast_2d(beside).shape
    for name, array in (("attention_mask", attention_mask), ("input_ids", input_ids)):
        if array is not None and (np.atleast_2d(array).size != tokens or array.ndim > 2):
            raise InputError(
                f"{name} of {called} has the shape {list(array.shape)}",
                expected=f"[sequence, token] of {tokens} tokens",
            )
    mask = np.ones(shape, bool) if attention_mask is None else np.atleast_2d(attention_mask).astype(bool)
    ids = None if input_ids is None else np.atleast_2d(input_ids).astype(np.int64)
    numbers = layer_numbers(len(scores), options.layers, called)
    _check_shares(scores, numbers, options, called)
    rule = "the scores as they are" if options.probabilities else "softmax of the logits"
    notes = [
        f"decisions were made here, not read: the {k} largest of {rule}"
        + (", scaled to sum to 1" if options.normalize else "")
        + "; margins are null, since nothing verifies that rule"
    ]
    if beside is None:
        notes.append("all tokens were taken for one sequence: no attention_mask or input_ids lies beside the logits")
    decisions = _tables(scores, numbers, mask, ids, k, options)
    return Trace("router_logits", decisions=decisions, n_experts=n_experts, top_k=k, notes=notes)


def _by_layer(arrays: dict[str, NDArray[Any]], source: Path) -> list[NDArray[Any]]:
    """[token, expert] of each layer, sequences one after the other."""
    if set(arrays) <= {"", "router_logits"} and arrays:
        (whole,) = arrays.values()
        layers = list(whole) if whole.ndim in (3, 4) else []
    else:
        layers = [arrays[name] for name in sorted(arrays, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]
    layers = [layer.reshape(-1, layer.shape[-1]) for layer in layers if layer.ndim in (2, 3)]
    shapes = {layer.shape for layer in layers}
    if len(shapes) != 1 or any(layer.dtype.kind != "f" for layer in layers):
        found = ", ".join(f"{name or 'the array'} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(f"{source} holds no router logits", expected=_LAYERS_FIRST, found=found[:300] or "nothing")
    return layers


def _check_shares(scores: Sequence[NDArray[Any]], numbers: Sequence[int], options: Options, called: object) -> None:
    """Rows that are non-negative and sum to 1 are probabilities, whatever they are called."""
    like_shares = [number for number, layer in zip(numbers, scores, strict=True) if _sums_to_1(layer[:_ROWS])]
    if like_shares and not options.probabilities:
        raise InputError(
            f"{called} holds probabilities, not logits",
            expected="scores before the softmax",
            found=f"in layer {like_shares[0]} ({len(like_shares)} of {len(scores)} layers) every row is non-negative and "
            "sums to 1; a softmax of them would give wrong weights",
            fix="say so: probabilities=True (--probabilities)",
        )
    if options.probabilities and len(like_shares) < len(scores):
        raise InputError(
            f"{called} holds no probabilities",
            expected="rows that are non-negative and sum to 1",
            found=f"other rows in layer {min(set(numbers) - set(like_shares))}",
            fix="leave probabilities out, so that the softmax is taken here",
        )


def _sums_to_1(layer: NDArray[Any]) -> bool:
    rows = np.asarray(layer, np.float32)
    return bool(len(rows)) and bool((rows >= 0).all() and (np.abs(rows.sum(1) - 1) < _SUM_OF_SHARES).all())


def _tables(
    scores: Sequence[NDArray[Any]],
    numbers: Sequence[int],
    mask: NDArray[np.bool_],
    ids: NDArray[np.int64] | None,
    k: int,
    options: Options,
) -> Iterator[pa.Table]:
    sequences, places = np.nonzero(mask)
    positions = (mask.cumsum(1) - 1)[mask]
    flat = sequences * mask.shape[1] + places
    for start in range(0, len(flat), _ROWS):
        part = slice(start, start + _ROWS)
        token_ids = None if ids is None else ids.ravel()[flat[part]]
        for number, layer in zip(numbers, scores, strict=True):
            rows = np.asarray(layer[flat[part]], np.float32)
            shares = rows if options.probabilities else _softmax(rows)
            order = np.argsort(-shares, axis=1, kind="stable")[:, :k]
            weights = np.take_along_axis(shares, order, 1)
            if options.normalize:
                weights = weights / weights.sum(1, keepdims=True)
            with np.errstate(divide="ignore", invalid="ignore"):
                entropy = -np.where(shares > 0, shares * np.log(shares), 0).sum(1, dtype=np.float64)
            yield decision_table(
                sequences[part],
                positions[part],
                number,
                order,
                weights=weights,
                entropy=entropy.astype(np.float32),
                logits=None if options.probabilities else rows,
                token_id=token_ids,
            )


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True), np.float32)
