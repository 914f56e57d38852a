"""Scores of latents, associations of concepts and the number of families, as rows of `sae_measures`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from moescope.sae.reading.association import Association
from moescope.sae.reading.link_rows import FamilyCounts
from moescope.sae.reading.predictability import RULES, Predictability

# What a reading writes, and the next one replaces.
MEASURES: tuple[dict[str, str], ...] = (
    *({"metric": rule, "group_kind": "feature"} for rule in RULES),
    {"metric": "association", "group_kind": "labels"},
    {"metric": "families", "group_kind": "all"},
    {"metric": "family_members", "group_kind": "all"},
)
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("metric", "condition", "group_kind", "group_value")),
        *((name, pa.float64()) for name in ("value", "ci_low", "ci_high")),
        ("n", pa.int64()),
        ("unit", pa.string()),
    ]
)


def measure_rows(
    scores: Sequence[Predictability],
    related: Sequence[Association],
    sizes: FamilyCounts | None,
    *,
    kind: str = "labels",
) -> pa.Table:
    """Rows of `sae_measures`; `kind` says what the associated sets are: labels, or concepts of the user."""
    rows: list[tuple[Any, ...]] = []
    for score in scores:
        for i, latent in enumerate(score.latents.tolist()):
            group = score.rule, "feature", str(latent)
            rows.append(_row(*group, "sae", score.value[i], score.low[i], score.high[i], score.tokens, "correlation"))
            rows.append(_row(*group, "shuffled", score.null[i], None, None, score.tokens, "correlation"))
    for pair in related:
        sets = {"a": pair.a, "b": pair.b, "latents_a": pair.latents_a, "latents_b": pair.latents_b}
        group = "association", kind, json.dumps(sets, ensure_ascii=False)
        rows.append(_row(*group, "sae", pair.value, pair.low, pair.high, pair.windows, "log odds"))
        rows.append(_row(*group, "shuffled", pair.null, pair.null_low, pair.null_high, pair.windows, "log odds"))
    if sizes is not None:
        for metric, value, null in (
            ("families", sizes.families, sizes.null_families),
            ("family_members", sizes.members, sizes.null_members),
        ):
            rows.append(_row(metric, "all", "all", "sae", value, None, None, sizes.latents, "latents"))
            rows.append(_row(metric, "all", "all", "shuffled", null, None, None, sizes.latents, "latents"))
    columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)


def _row(
    metric: str, kind: str, group: str, condition: str, value: Any, low: Any, high: Any, n: int, unit: str
) -> tuple[Any, ...]:
    return metric, condition, kind, group, _known(value), _known(low), _known(high), n, unit


def _known(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
