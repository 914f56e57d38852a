"""Units that a probe may read, one row a token: neurons, latents, experts or router logits, behind one face."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.sae.concepts.token_table import TokenTable

UnitKind = Literal["neuron", "latent", "expert", "router_logit"]
_BLOCK = 512


@dataclass(frozen=True)
class Units:
    """What units did on some tokens (or, as means, on documents).

    Attributes:
        kind: what they are.
        site: where they are read; a name without `blocks.L.` means every layer that has it.
        values: [row, unit] float32, an array or a SciPy sparse one in columns.
        tokens: the row's token; for documents its first token.
        sae_id: of the autoencoder, for latents.
        notes: what a reader must know of rows left out.
    """

    kind: UnitKind
    site: str
    values: Any
    tokens: TokenTable
    sae_id: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many units."""
        return int(self.values.shape[1])

    def columns(self, chosen: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """[row, chosen] some units, as they are."""
        found = self.values[:, chosen]
        return np.asarray(found if isinstance(found, np.ndarray) else found.toarray(), np.float64)

    def blocks(self) -> Iterator[tuple[slice, Any]]:
        """All units, some columns at a time."""
        for start in range(0, self.width, _BLOCK):
            piece = slice(start, min(start + _BLOCK, self.width))
            yield piece, self.values[:, piece]

    def spread(self, rows: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of every unit over the rows of a mask."""
        picked = rows.astype(np.float64) / rows.sum()
        mean, square = np.empty(self.width), np.empty(self.width)
        for piece, values in self.blocks():
            mean[piece] = picked @ values
            square[piece] = picked @ _squared(values)
        return mean, np.sqrt(np.maximum(square - mean**2, 0))

    def scaled(self, scale: NDArray[np.float64]) -> Any:
        """All units, each times a number, in the layout that products with vectors want."""
        if isinstance(self.values, np.ndarray):
            return self.values * scale.astype(np.float32)
        from scipy.sparse import diags_array

        return (self.values @ diags_array(scale.astype(np.float32))).tocsr()

    def by_document(self) -> Units:
        """One row a document: the mean of its tokens."""
        from scipy.sparse import csr_array

        known, first, of, sizes = np.unique(
            self.tokens.document, return_index=True, return_inverse=True, return_counts=True
        )
        rows = np.arange(len(of))
        mean = csr_array(((1 / sizes[of]).astype(np.float32), (of, rows)), shape=(len(known), len(of)))
        values = mean @ self.values
        return replace(
            self, values=values if isinstance(values, np.ndarray) else values.tocsc(), tokens=self.tokens.rows(first)
        )


def _squared(values: Any) -> Any:
    return values.astype(np.float64) ** 2 if isinstance(values, np.ndarray) else values.astype(np.float64).power(2)
