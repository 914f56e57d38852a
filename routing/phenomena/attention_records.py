"""Statistics of attention heads of a run as arrays: by text, place and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.grid import layer_name
from moescope.store.run import Run

POSITIONS, WINDOW = 10, 64

HEADS_SQL = """
    SELECT h.metric, h.layer, h.block, h.sequence_id, s.document_id, s.content_hash, h.n, h.sums
    FROM head_sequences h
    JOIN sequences s ON s.run_id = h.run_id AND s.sequence_id = h.sequence_id
    WHERE h.run_id = $run AND h.condition = $condition AND h.metric IN (SELECT unnest($metrics))
    ORDER BY h.metric, h.layer, h.block, h.sequence_id
"""


@dataclass(frozen=True)
class HeadSums:
    """One metric of one attention.

    Attributes:
        layer, block: which attention.
        metric: what was measured.
        sequence, document: [text] numbers of each.
        content: [text] digest of its token ids.
        n: [text] queries behind each sum.
        sums: [text, head].
    """

    layer: int
    block: str
    metric: str
    sequence: NDArray[np.int64]
    document: NDArray[np.int64]
    content: NDArray[np.object_]
    n: NDArray[np.int64]
    sums: NDArray[np.float64]

    @property
    def name(self) -> str:
        """`L3`, or `L3 attn.1` for a second attention."""
        return layer_name(self.layer, "mlp" if self.block == "attn" else self.block)

    @property
    def means(self) -> NDArray[np.float64]:
        """[text, head] Value in each text."""
        found: NDArray[np.float64] = self.sums / np.maximum(self.n, 1)[:, None]
        return found

    def of(self, chosen: NDArray[np.bool_]) -> HeadSums:
        """Only some texts."""
        return HeadSums(
            self.layer,
            self.block,
            self.metric,
            self.sequence[chosen],
            self.document[chosen],
            self.content[chosen],
            self.n[chosen],
            self.sums[chosen],
        )

    def by_document(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[document, …] Sums of values by text, [text, …]."""
        units, place = np.unique(self.document, return_inverse=True)
        found = np.zeros((len(units), *values.shape[1:]))
        np.add.at(found, place, values)
        return found


def head_sums(run: Run, metrics: Sequence[str], *, condition: str = "base") -> dict[str, list[HeadSums]]:
    """Metric → its sums at every attention, in order of layers; metrics that the run does not have are left out.

    Raises:
        InputError: a text was recorded with another number of heads than the others, or a sum that is no number.
    """
    frame = run.store.sql(HEADS_SQL, {"run": run.run_id, "condition": condition, "metrics": list(metrics)}).df()
    found: dict[str, list[HeadSums]] = {}
    for (metric, layer, block), part in frame.groupby(["metric", "layer", "block"], sort=True):
        widths = part["sums"].map(len)
        if widths.nunique() > 1:
            raise InputError(f"texts of run {run.name!r} have different numbers of heads at layer {layer}")
        sums = np.stack(part["sums"].to_list()).astype(np.float64)
        if not np.isfinite(sums).all():
            raise InputError(
                f"attention of layer {layer} in run {run.name!r} holds NaN or infinite values",
                fix="record the model in another dtype (float32, bfloat16)",
            )
        sequence, document, content, n = (
            part[name].to_numpy() for name in ("sequence_id", "document_id", "content_hash", "n")
        )
        heads = HeadSums(int(layer), str(block), str(metric), sequence, document, content, n, sums)
        found.setdefault(str(metric), []).append(heads)
    return found


def uniform_alpha(position: int, window: int = WINDOW) -> float:
    """α of a position under uniform causal attention: (H_T − H_k) ÷ (T − k), H being harmonic numbers.

    Example:
        >>> round(uniform_alpha(0), 5), round(uniform_alpha(1), 5)
        (0.07412, 0.05943)
    """
    return float(sum(1 / (i + 1) for i in range(position, window)) / (window - position))
