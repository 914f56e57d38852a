"""Recorded decisions of a run, laid out by sequence and position, one query a batch for all routers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from moescope.core.errors import InputError
from moescope.store.run import Run


@dataclass(frozen=True)
class Laid:
    """Recorded decisions of some sequences at one router.

    Attributes:
        ids, weights: experts and their weights, NaN where those were not recorded.
        known: tokens that have a decision.
        tokens: token ids of the recorded texts, −1 where they are not known.
    """

    ids: Int[np.ndarray, "row position k"]
    weights: Float[np.ndarray, "row position k"]
    known: Bool[np.ndarray, "row position"]
    tokens: Int[np.ndarray, "row position"]


class StoredRouting:
    """Decisions of one run; those of the sequences asked for last are kept, for the other routers of the model."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._sequences: tuple[int, ...] = ()
        self._rows: dict[tuple[int, str], Any] = {}
        self._length = 0

    def at(self, sequences: tuple[int, ...], layer: int, block: str, k: int) -> Laid:
        """The decisions of every token of some sequences at one router.

        Raises:
            InputError: a sequence that the run does not have.
        """
        if sequences != self._sequences:
            self._fetch(sequences)
        shape = len(sequences), self._length
        ids, weights = np.zeros((*shape, k), np.int64), np.zeros((*shape, k), np.float32)
        known, tokens = np.zeros(shape, bool), np.zeros(shape, np.int64)
        table = self._rows.get((layer, block))
        if table is not None:
            for row, sequence in enumerate(sequences):
                mine = table["sequence_id"] == sequence
                at = table["position"][mine]
                ids[row, at], weights[row, at], known[row, at] = table["experts"][mine], table["weights"][mine], True
                tokens[row, at] = table["token_id"][mine]
        return Laid(ids, weights, known, tokens)

    def _fetch(self, sequences: tuple[int, ...]) -> None:
        query = """
            SELECT t.sequence_id, t.position, coalesce(t.token_id, -1) AS token_id, r.layer, r.block, r.experts, r.weights
            FROM tokens AS t
            JOIN routing AS r ON r.run_id = t.run_id AND r.token = t.token
            WHERE t.run_id = $run AND t.sequence_id IN (SELECT unnest($sequences::BIGINT[]))
            ORDER BY r.layer, r.block, r.token
        """
        asked = {"run": self.run.run_id, "sequences": sorted(set(sequences))}
        table = self.run.store.sql(query, asked).to_arrow_table()
        found = set(table["sequence_id"].unique().to_pylist())
        if missing := sorted(set(sequences) - found):
            raise InputError(
                f"run {self.run.name!r} has no decisions of sequence {missing[0]}",
                expected="a run of the same corpus with the probes `tokens` and `routing`",
            )
        places = np.asarray(table["layer"]).astype(np.int64), np.asarray(table["block"])
        positions = np.asarray(table["position"]).astype(np.int64)
        self._length = int(positions.max(initial=0)) + 1
        self._rows = {}
        for layer, block in sorted({*zip(places[0].tolist(), places[1].tolist(), strict=True)}):
            mine = np.flatnonzero((places[0] == layer) & (places[1] == block))
            part = table.take(mine)
            self._rows[layer, block] = {
                "sequence_id": np.asarray(part["sequence_id"]),
                "position": positions[mine],
                "token_id": np.asarray(part["token_id"]),
                "experts": _matrix(part["experts"], len(mine), np.int64),
                "weights": _matrix(part["weights"], len(mine), np.float32),
            }
        self._sequences = sequences


def stored_routing(sources: dict[str, Any], name: str) -> StoredRouting:
    """The decisions of a source, shared by all routers of a session."""
    kept = f"decisions of {name}"
    if not isinstance(sources.get(kept), StoredRouting):
        sources[kept] = StoredRouting(sources[name])
    found: StoredRouting = sources[kept]
    return found


def _matrix(column: Any, rows: int, dtype: Any) -> Any:
    """Lists of one length as an array [row, k]; weights that are null become NaN."""
    flat = column.combine_chunks().flatten()
    values = flat.to_numpy(zero_copy_only=False).astype(dtype)
    if len(values) % max(rows, 1):
        raise InputError("decisions of one router have different numbers of experts", fix="replay another run")
    return values.reshape(rows, -1) if len(values) else np.full((rows, 1), np.nan).astype(dtype)
