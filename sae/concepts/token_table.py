"""The tokens of a run as arrays: what concepts are told by, and how a document is found again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.run import Run

TOKENS_SQL = """
    SELECT t.token, t.sequence_id, t.position, t.token_id, t.class, t.is_special, s.document_id, s.label
    FROM tokens t
    JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
    WHERE t.run_id = $run AND t.phase = 'prefill'
    ORDER BY t.token
"""


@dataclass(frozen=True)
class TokenTable:
    """Tokens of the run's texts in the order of the run, generated ones left out.

    Attributes:
        token: run-wide numbers, ascending.
        sequence, position: of each.
        token_id: ids of the vocabulary.
        special: whether the tokenizer calls the token special.
        document: `document_id` of each.
        token_class: class of each, "" where none was recorded.
        label: label of its document, None for none.
    """

    token: NDArray[np.int64]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    token_id: NDArray[np.int64]
    special: NDArray[np.bool_]
    document: NDArray[np.int64]
    token_class: NDArray[np.object_]
    label: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.token)

    @property
    def next_class(self) -> NDArray[np.object_]:
        """Class of the token that follows in the sequence, "" at its end."""
        return self._following(self.token_class, "")

    @property
    def next_id(self) -> NDArray[np.int64]:
        """Id of the token that follows in the sequence, −1 at its end."""
        return self._following(self.token_id, -1)

    def _following(self, values: NDArray[Any], end: Any) -> NDArray[Any]:
        found = np.full_like(values, end)
        found[:-1] = np.where(self.sequence[1:] == self.sequence[:-1], values[1:], end)
        return found

    def rows(self, chosen: NDArray[Any]) -> TokenTable:
        """Some of the tokens, by mask or index."""
        return TokenTable(
            self.token[chosen], self.sequence[chosen], self.position[chosen], self.token_id[chosen], self.special[chosen],
            self.document[chosen], self.token_class[chosen], self.label[chosen],
        )  # fmt: skip


def read_tokens(run: Run) -> TokenTable:
    """All tokens of a run's texts.

    Raises:
        InputError: the run has none.
    """
    found = run.sql(TOKENS_SQL).to_arrow_table()
    if not found.num_rows:
        raise InputError(
            f"run {run.name!r} has no tokens", fix="record with the probe tokens (it is on unless others were named)"
        )

    def whole(name: str) -> NDArray[np.int64]:
        values: NDArray[np.int64] = found[name].to_numpy().astype(np.int64)
        return values

    classes = np.array([text or "" for text in found["class"].to_pylist()], dtype=object)
    labels = np.array(found["label"].to_pylist(), dtype=object)
    special = np.array([bool(value) for value in found["is_special"].to_pylist()])
    return TokenTable(
        whole("token"), whole("sequence_id"), whole("position"), whole("token_id"), special, whole("document_id"), classes,
        labels,
    )  # fmt: skip
