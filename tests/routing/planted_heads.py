"""Statistics of attention heads planted row by row: patterns written down, and their statistics by plain loops.

Nothing here comes from moescope's own reduction. Test folders load this file by its path, as they do `planted.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.store.head_totals import fold_heads
from moescope.store.run import Run

POSITIONS, WINDOW, LOCAL = 10, 64, 16
Pattern = NDArray[np.float64]


def uniform(length: int) -> Pattern:
    """Every query attends to all keys up to its own alike."""
    return np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]


def on_first(length: int) -> Pattern:
    """Every query attends to the first key alone."""
    pattern = np.zeros((length, length))
    pattern[:, 0] = 1
    return pattern


def on_itself(length: int) -> Pattern:
    """Every query attends to its own key alone."""
    return np.eye(length)


def towards_first(share: float) -> Callable[[int], Pattern]:
    """Every query gives the first key a share, and the rest to all keys alike."""
    return lambda length: share * on_first(length) + (1 - share) * uniform(length)


def statistics(pattern: Pattern, punctuation: Sequence[bool] = ()) -> dict[str, tuple[float, int]]:
    """Metric → (sum, n) of one head in one text whose pattern [query, key] is given."""
    length = len(pattern)
    found: dict[str, tuple[float, int]] = {}
    for k in range(POSITIONS):
        for name, end in (("sink_alpha", min(WINDOW, length)), ("alpha", length)):
            found[f"{name}_{k}"] = (float(sum(pattern[i, k] for i in range(k, end))), max(0, end - k))
    mass = dict.fromkeys(("first", "special", "punctuation", "self", "local", "other"), 0.0)
    previous = entropy = distance = 0.0
    for i in range(length):
        for k in range(i + 1):
            a = float(pattern[i, k])
            mark = len(punctuation) > 0 and punctuation[k]
            near = "self" if i == k else "local" if i - k <= LOCAL else "other"
            mass["first" if k == 0 else "punctuation" if mark else near] += a
            previous += a * (k == i - 1)
            distance += a * (i - k)
            entropy -= a * math.log(a) if a > 0 else 0.0
    found |= {f"mass_{name}": (total, length) for name, total in mass.items()}
    others = {"mass_previous": previous, "entropy": entropy, "distance": distance}
    return found | {name: (total, length) for name, total in others.items()}


def plant_heads(
    run: Run,
    lengths: Iterable[int],
    layers: Mapping[int, Sequence[Callable[[int], Pattern]]],
    *,
    condition: str = "base",
    block: str = "attn",
) -> None:
    """Write rows of `head_sequences`, and `heads` from them, for texts of these lengths.

    Args:
        run: whose `sequences` are there already, numbered from 0.
        lengths: tokens of each text.
        layers: layer → for each head, a function from a text's length to its pattern.
        condition, block: of all rows.
    """
    rows: list[dict[str, Any]] = []
    known: dict[tuple[Any, int], dict[str, tuple[float, int]]] = {}
    for sequence, length in enumerate(lengths):
        for layer, heads in layers.items():
            for head in heads:
                if (head, length) not in known:
                    known[head, length] = statistics(head(length))
            each = [known[head, length] for head in heads]
            rows += [
                {
                    "sequence_id": sequence, "layer": layer, "block": block, "metric": metric, "condition": condition,
                    "sums": [found[metric][0] for found in each], "n": each[0][metric][1],
                }
                for metric in each[0]
            ]  # fmt: skip
    cursor = run.store.cursor()
    cursor.register("planted_heads", pa.Table.from_pylist(rows))
    cursor.execute("INSERT INTO head_sequences BY NAME SELECT ?::UUID AS run_id, * FROM planted_heads", [run.run_id])
    cursor.unregister("planted_heads")
    fold_heads(run.store.connection, run.run_id)
