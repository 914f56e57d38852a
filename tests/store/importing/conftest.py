"""Random traces, and what a store must hold of them, counted by plain loops."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moescope.store.run import Run

N_EXPERTS, TOP_K, LAYERS = 16, 3, (1, 2, 5)


@dataclass
class Rows:
    """A trace as Python rows, in a random order."""

    rows: list[dict[str, Any]]

    @property
    def table(self) -> pa.Table:
        return pa.Table.from_pylist(self.rows)

    def but(self, number: int, **changed: Any) -> pa.Table:
        """The table with one row changed."""
        return pa.Table.from_pylist([{**row, **changed} if n == number else row for n, row in enumerate(self.rows)])

    def without(self, *numbers: int) -> pa.Table:
        """The table without some rows."""
        return pa.Table.from_pylist([row for n, row in enumerate(self.rows) if n not in numbers])


@pytest.fixture
def random_trace() -> Callable[..., Rows]:
    """`random_trace(lengths, weights=True, seed=0)`: one label a sequence, ties among the weights, rows shuffled."""

    def make(lengths: tuple[int, ...] = (7, 1, 12), *, weights: bool = True, seed: int = 0) -> Rows:
        random = np.random.default_rng(seed)
        rows = []
        for sequence, length in enumerate(lengths):
            for position in range(length):
                token_id = int(random.integers(0, 500))
                for layer in LAYERS:
                    row: dict[str, Any] = {
                        "sequence_id": sequence,
                        "position": position,
                        "layer": layer,
                        "experts": random.permutation(N_EXPERTS)[:TOP_K].tolist(),
                    }
                    if weights:
                        # Of four values, so that ties are common.
                        drawn = random.choice([0.125, 0.25, 0.5, 0.75], TOP_K)
                        row |= {"weights": drawn.tolist(), "label": "ab"[sequence % 2], "token_id": token_id}
                        row |= {"text": f"«{token_id}»", "phase": "prefill" if position < 5 else "decode"}
                    rows.append(row)
        return Rows([rows[n] for n in random.permutation(len(rows))])

    return make


@pytest.fixture
def expected_routing() -> Callable[[Rows], list[tuple[Any, ...]]]:
    """(token, layer, experts, weights) of every decision, slots by weight and then id, tokens numbered by sequence."""

    def count(trace: Rows) -> list[tuple[Any, ...]]:
        places = sorted({(row["sequence_id"], row["position"]) for row in trace.rows})
        number = {place: n for n, place in enumerate(places)}
        found = []
        for row in trace.rows:
            experts, weights = row["experts"], row.get("weights")
            if weights is not None:
                order = sorted(range(len(experts)), key=lambda n: (-weights[n], experts[n]))
                experts, weights = [experts[n] for n in order], [weights[n] for n in order]
            found.append((number[row["sequence_id"], row["position"]], row["layer"], experts, weights))
        return sorted(found, key=lambda decision: decision[:2])

    return count


@pytest.fixture
def expected_loads() -> Callable[[Rows], dict[tuple[Any, ...], tuple[int, float]]]:
    """(layer, label, phase, expert) → (tokens, sum of weights), experts that were never chosen included."""

    def count(trace: Rows) -> dict[tuple[Any, ...], tuple[int, float]]:
        tokens: Counter[tuple[Any, ...]] = Counter()
        sums: defaultdict[tuple[Any, ...], float] = defaultdict(float)
        for row in trace.rows:
            group = row["layer"], row.get("label"), row.get("phase", "prefill")
            for expert in range(N_EXPERTS):
                tokens[(*group, expert)] += 0
            for expert, weight in zip(row["experts"], row["weights"], strict=True):
                tokens[(*group, expert)] += 1
                sums[(*group, expert)] += weight
        return {key: (n, sums[key]) for key, n in tokens.items()}

    return count


@pytest.fixture
def routing_of() -> Callable[[Run], list[tuple[Any, ...]]]:
    """What a run holds: (token, layer, experts, weights)."""
    return lambda run: run.sql(
        "SELECT token, layer, experts, weights FROM routing WHERE run_id = $run ORDER BY token, layer"
    ).fetchall()


@pytest.fixture
def gaps() -> Callable[[Run], dict[str, tuple[str, str]]]:
    """Sites of a run that are not complete: name → (status, detail)."""
    return lambda run: {
        row["site"]: (row["status"], row["detail"])
        for row in run.coverage.table.to_pylist()
        if row["status"] != "complete"
    }
