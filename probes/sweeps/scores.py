"""Scores of experts from outside, and the sets of experts that they choose: the lowest or highest, or random ones beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.probes.anatomy import Anatomy

Router = tuple[int, str]
Across = Literal["layer", "model"]
# Which experts of each router.
Chosen = dict[Router, tuple[int, ...]]


@dataclass(frozen=True)
class ExpertScores:
    """One number an expert, of every router.

    Attributes:
        name: what it measures.
        by_router: (layer, block) → [expert] scores.

    Example:
        >>> scores = ExpertScores("load", {(0, "mlp"): np.array([3.0, 1.0, 2.0, 9.0])})
        >>> scores.lowest(0.5)
        {(0, 'mlp'): (1, 2)}
        >>> scores.lowest(0.5, least=3)
        {(0, 'mlp'): (1,)}
    """

    name: str
    by_router: Mapping[Router, NDArray[np.float64]]

    def lowest(self, share: float, *, across: Across = "layer", least: int = 1, highest: bool = False) -> Chosen:
        """The share of experts with the lowest scores, ties by lower id.

        Args:
            share: of the experts: of each router (`layer`), or of all of them together (`model`).
            across: where experts compete.
            least: so many experts are left to every router.
            highest: the highest scores instead.
        """
        sign = -1.0 if highest else 1.0
        order = {router: np.argsort(sign * s, kind="stable") for router, s in self.by_router.items()}
        most = {router: max(0, len(found) - least) for router, found in order.items()}
        if across == "layer":
            count = {router: min(most[router], round(share * len(found))) for router, found in order.items()}
        else:
            count = _counts(self.by_router, order, sign, share, most)
        return {r: tuple(sorted(map(int, found[: count[r]]))) for r, found in order.items() if count[r]}


def _counts(
    scores: Mapping[Router, NDArray[np.float64]],
    order: Mapping[Router, NDArray[np.intp]],
    sign: float,
    share: float,
    most: Mapping[Router, int],
) -> dict[Router, int]:
    """How many experts of each router are among the lowest of the model, each router keeping what it must."""
    total = round(share * sum(map(len, order.values())))
    entries = [(sign * scores[r][e], r, i) for r, found in order.items() for i, e in enumerate(found[: most[r]])]
    count = dict.fromkeys(order, 0)
    for _, router, _ in sorted(entries)[:total]:
        count[router] += 1
    return count


def random_experts(anatomy: Anatomy, like: Chosen, *, seed: int, draw: int) -> Chosen:
    """As many experts of each router as `like` has, at random: the same seed and draw give the same.

    Example:
        >>> import moescope as ms
        >>> chosen = random_experts(ms.load("demo").anatomy, {(3, "mlp"): (0, 1)}, seed=0, draw=0)
        >>> [len(found) for found in chosen.values()]
        [2]
    """
    found: Chosen = {}
    for (layer, block), experts in like.items():
        s = anatomy.moe_at(layer, block)
        assert s is not None
        generator = np.random.default_rng([seed, draw, layer, sum(map(ord, block))])
        picked = generator.choice(s.n_experts or 0, len(experts), replace=False)
        found[layer, block] = tuple(sorted(map(int, picked)))
    return found


def read_scores(given: Any, anatomy: Anatomy, *, name: str = "score") -> ExpertScores:
    """Scores as a mapping from (layer, expert) or (layer, block, expert) to a number, or a table with columns layer, expert
    and value (block where a layer has several routers).

    Args:
        given: the scores; every routed expert of every router must have one. Missing values (an expert that was never chosen
            has no mean) count as the lowest.
        anatomy: of the model.
        name: what the scores measure, for tables and figures.

    Raises:
        InputError: experts without a score or that the model does not have, several metrics in one table.
    """
    rows = _table_rows(given) if hasattr(given, "columns") else _mapping_rows(given)
    scores = {(s.layer, s.block): np.full(s.n_experts or 0, np.inf) for s in anatomy.moe}
    for (layer, block, expert), value in rows:
        router = scores.get((layer, block))
        if router is None or not 0 <= expert < len(router):
            raise InputError(
                f"the scores name expert {expert} of layer {layer} ({block}), which this model does not have",
                fix="use scores of this model",
            )
        router[expert] = -math.inf if math.isnan(value) else value
    lost = [(layer, block, int(e)) for (layer, block), s in scores.items() for e in np.flatnonzero(s == np.inf)]
    if lost:
        layer, block, expert = lost[0]
        raise InputError(
            f"{len(lost):,} experts have no score",
            expected="a finite number for every expert of every router",
            found=f"none for expert {expert} of layer {layer} ({block})",
        )
    return ExpertScores(name, scores)


def _mapping_rows(given: Any) -> Iterable[tuple[tuple[int, str, int], float]]:
    if not isinstance(given, Mapping):
        raise InputError(
            f"scores cannot be a {type(given).__name__}",
            expected="a mapping (layer, expert) → score, or a table with columns layer, expert and value",
        )
    for key, value in given.items():
        if not isinstance(key, tuple) or len(key) not in (2, 3):
            raise InputError(f"scores are not by {key!r}", expected="(layer, expert) or (layer, block, expert)")
        layer, block, expert = (key[0], "mlp", key[1]) if len(key) == 2 else key
        yield (int(layer), str(block), int(expert)), float(value)


def _table_rows(given: Any) -> Iterable[tuple[tuple[int, str, int], float]]:
    columns = list(given.columns)
    if missing := [name for name in ("layer", "expert", "value") if name not in columns]:
        raise InputError(f"the table of scores has no column {missing[0]!r}", found=", ".join(map(str, columns)))
    if "metric" in columns and given["metric"].nunique() > 1:
        raise InputError(
            "the table of scores has several metrics",
            found=", ".join(map(str, given["metric"].unique())),
            fix="keep one: table[table.metric == 'frequency']",
        )
    blocks: Sequence[Any] = given["block"] if "block" in columns else ["mlp"] * len(given)
    for layer, block, expert, value in zip(given["layer"], blocks, given["expert"], given["value"], strict=True):
        yield (int(layer), str(block), int(expert)), float(value)
