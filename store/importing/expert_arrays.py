"""Arrays of expert ids, [token, layer, k], as rows of the neutral form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.importing.trace import decision_table


def layer_numbers(places: int, layers: Sequence[int] | None, called: object) -> list[int]:
    """Layer of each place along an array's layer axis.

    Raises:
        InputError: `layers` names not as many.
    """
    if layers is None:
        return list(range(places))
    if len(layers) != places or len(set(layers)) != places or min(layers) < 0:
        raise InputError(
            f"layers names {len(set(layers))} layers, and the arrays of {called} have {places}",
            expected=f"{places} different numbers from 0",
        )
    return list(layers)


def as_ids(values: Any, called: object) -> NDArray[np.int64]:
    """[token, layer, k] Ids from an array or nested lists.

    Raises:
        InputError: another shape, or numbers that are no integers.
    """
    try:
        array = np.asarray(values)
    except ValueError as ragged:
        raise InputError(
            f"{called} holds lists of different lengths", expected="expert ids [token, layer, k]"
        ) from ragged
    if array.ndim != 3 or array.dtype.kind not in ("iu" if array.size else "iuf"):
        raise InputError(
            f"{called} is not an array of expert ids",
            expected="integers [token, layer, k]",
            found=f"{array.dtype} {list(array.shape)}",
        )
    return array.astype(np.int64)


class ArrayRows:
    """Turns arrays of one file into rows, leaving out layers that have no router.

    Engines keep a place for every layer; at a dense one they write nothing, and what lies there is one id repeated (0) or
    −1. No router chooses one expert k times: where all tokens of a layer look so, it has none.
    """

    def __init__(self, layers: Sequence[int] | None, called: object) -> None:
        self._layers, self._called = layers, called
        self._dense: set[int] | None = None

    def look(self, arrays: Sequence[NDArray[np.int64]]) -> None:
        """Find the dense layers: those without a decision in any array. Needed once, before `tables`."""
        shapes = {array.shape[1:] for array in arrays if len(array)}
        if len(shapes) != 1:
            raise InputError(
                f"the arrays of {self._called} differ in layers or k",
                expected="[token, layer, k] with the same layers and k",
                found=", ".join(str(list(shape)) for shape in sorted(shapes)) or "no token",
            )
        places, k = shapes.pop()
        self.numbers = layer_numbers(places, self._layers, self._called)
        filled = np.zeros(places, bool)
        for array in arrays:
            filled |= ((array != array[:, :, :1]).any(2) if k > 1 else array[:, :, 0] >= 0).any(0)
        self._dense = {number for number, decided in zip(self.numbers, filled, strict=True) if not decided}
        if len(self._dense) == places:
            raise InputError(f"{self._called} holds no decision", found="one id repeated everywhere")

    @property
    def notes(self) -> list[str]:
        """What was left out."""
        if not self._dense:
            return []
        named = ", ".join(map(str, sorted(self._dense)))
        return [f"layers {named} hold one id repeated and were taken for dense ones"]

    def tables(
        self,
        sequence: int,
        ids: NDArray[np.int64],
        *,
        first: int = 0,
        phase: str | Sequence[str] = "prefill",
        token_ids: Sequence[int] | None = None,
    ) -> list[pa.Table]:
        """Rows of one sequence, layer by layer.

        Args:
            sequence: its number.
            ids: [token, layer, k].
            first: position of the first token.
            phase: of all tokens, or of each.
            token_ids: [token].
        """
        assert self._dense is not None
        positions = np.arange(first, first + len(ids))
        if token_ids is not None and len(token_ids) != len(ids):
            raise InputError(
                f"{self._called} has {len(token_ids)} token ids for {len(ids)} tokens of sequence {sequence}",
                fix="leave the token ids out, or give one for each row",
            )
        known = pa.array(token_ids, pa.int64()) if token_ids is not None else pa.nulls(len(ids), pa.int64())
        return [
            decision_table(sequence, positions, number, ids[:, place], phase=phase, token_id=known)
            for place, number in enumerate(self.numbers)
            if number not in self._dense
        ]
