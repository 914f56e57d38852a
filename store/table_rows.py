"""Rows of every table that a probe writes, and bytes a row of each column, as formulas of the run's shape.

DuckDB packs integers to the width of their range, 2,048 at a time, so their bytes follow from the shape. Floats take a little
less than they are wide, which only data can tell: `FLOAT_BYTES` are the means over recordings of three models (the bundled
MoE of 6 layers, 16 experts, top-2; a random OLMoE of 8 layers, 32 experts, top-4; SmolLM2 of 135 M parameters, dense), read
from the pieces in which DuckDB 2.0 stored their columns. `benchmarks/store_sizes.py` takes them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, log2

from moescope.store.run_shapes import RouterShape, RunShape

# Bytes of one value, compressed.
FLOAT_BYTES: Mapping[str, float] = {
    "expert_outputs.norms": 3.2,
    "residual.norm": 3.35,
    "residual.top_values": 3.35,
    "residual_sequences.median_abs": 3.5,
    "router_logits.logits": 3.47,
    "routing.entropy": 3.25,
    "routing.margin": 3.37,
    "routing.weights": 3.6,
    "tokens.nll": 3.5,
}
_PACKED_TOGETHER = 2048
_RUN_OF_EQUALS = 10.0  # bytes; sequence ids come in runs
_NAME = 0.13  # bytes of a value of a column that holds next to one text: block, phase
_DIGEST = 66.5  # a SHA-256 in hexadecimal, which nothing compresses
# Metrics of attention that a probe keeps of each head (one more where the softmax has a logit of its own), and bytes of a sum.
_HEAD_METRICS, _HEAD_SUM = 29, 3.4
_PIECE_OF_TEXT = 16.0  # a row of `vocabulary`: id, bytes, text

Columns = list[float]


def rows_of(table: str, shape: RunShape) -> int:
    """Rows that a run of this shape adds to a table.

    Example:
        >>> rows_of("residual", RunShape(tokens=1000, sequences=4, batches=1, longest=250, layers=2, d_model=64, vocabulary=512))
        2000
    """
    return _ROWS[table](shape)


def columns_of(table: str, shape: RunShape, floats: Mapping[str, float] = FLOAT_BYTES) -> Columns:
    """Bytes a row of each column of a table, compressed, in the order in which they are stored; texts as they are.

    Args:
        table: one that a probe writes.
        shape: of the run.
        floats: bytes of a value for each column of floats, as `FLOAT_BYTES`.
    """
    return _COLUMNS[table](shape, {**FLOAT_BYTES, **floats})


def bits(values: float) -> float:
    """Bytes of a packed integer that takes so many values.

    Example:
        >>> [bits(n) * 8 for n in (1, 2, 16, 17)]
        [0.0, 1.0, 4.0, 5.0]
    """
    return ceil(log2(values)) / 8 if values > 1 else 0.0


def _chosen(router: RouterShape, tokens: float) -> float:
    """Experts that so many tokens choose at least once, were they chosen evenly."""
    draws = tokens * router.top_k
    return router.choices * (1 - (1 - 1 / router.choices) ** draws) if router.choices > 1 else float(tokens > 0)


def _phase_tokens(shape: RunShape) -> list[float]:
    """Tokens of a batch in each phase."""
    parts = (shape.tokens - shape.generated, shape.generated)
    return [part / max(1, shape.batches) for part in parts if part]


def _loads(shape: RunShape) -> int:
    labels = max(1, min(shape.labels, round(shape.batches * shape.labels_a_batch)))
    return sum(r.choices for r in shape.routers) * labels * len(_phase_tokens(shape))


def _load_partials(shape: RunShape) -> int:
    cells = [(router, n / shape.labels_a_batch) for router in shape.routers for n in _phase_tokens(shape)]
    return round(shape.batches * shape.labels_a_batch * sum(_chosen(router, n) for router, n in cells))


def _expert_partials(shape: RunShape) -> int:
    return round(shape.batches * sum(_chosen(r, shape.batch_tokens) + r.shared for r in shape.routers if r.inside))


_ROWS: Mapping[str, Callable[[RunShape], int]] = {
    "tokens": lambda s: s.tokens,
    "sequences": lambda s: s.sequences,
    "vocabulary": lambda s: s.distinct,
    "routing": lambda s: s.tokens * len(s.routers),
    "loads": _loads,
    "load_partials": _load_partials,
    "experts": lambda s: sum(r.choices + r.shared for r in s.routers if r.inside),
    "expert_partials": _expert_partials,
    "residual": lambda s: s.tokens * s.layers,
    "residual_sequences": lambda s: s.sequences * s.layers,
    "router_logits": lambda s: s.tokens * sum(r.logits for r in s.routers),
    "expert_outputs": lambda s: s.tokens * sum(r.inside for r in s.routers),
    "head_sequences": lambda s: s.sequences * len(s.heads) * _HEAD_METRICS,
    "heads": lambda s: sum(s.heads) * _HEAD_METRICS,
    "batches": lambda s: s.batches,
}


def _token_column(shape: RunShape, places: int) -> float:
    """Token numbers run up within a layer of a batch, which costs nothing, and start again with the next layer."""
    share = shape.generated / max(1, shape.tokens)
    tokens = max(2.0, shape.batch_tokens)
    broken = min(1.0, _PACKED_TOGETHER / tokens) * (1 - (1 if tokens >= _PACKED_TOGETHER else 0.5) / max(1, places))
    return bits(tokens) * (share + (1 - share) * broken)


def _where(shape: RunShape, places: int) -> Columns:
    """Columns token, layer and block of a table with a row a token and place."""
    share = shape.generated / max(1, shape.tokens)
    return [_token_column(shape, places), 0.002 + share * bits(places), _NAME]


def _mean(shape: RunShape, of: Callable[[RouterShape], float]) -> float:
    return sum(map(of, shape.routers)) / max(1, len(shape.routers))


def _tokens(s: RunShape, floats: Mapping[str, float]) -> Columns:
    starts = _RUN_OF_EQUALS * s.sequences / max(1, s.tokens)
    ids, classes = bits(s.vocabulary), 0.38 if s.distinct else 0.0
    generated = s.generated / max(1, s.tokens)
    return [
        0.01 + generated * bits(s.batch_tokens),
        starts + generated,
        bits(s.longest + s.generated / max(1, s.sequences)),
        ids,
        _NAME,
        floats["tokens.nll"],
        0.01,
        ids,
        0.01,
        classes,
    ]


def _routing(s: RunShape, floats: Mapping[str, float]) -> Columns:
    k = _mean(s, lambda r: r.top_k)
    ids = _mean(s, lambda r: r.top_k * bits(r.choices))
    score = [floats["routing.margin"], floats["routing.entropy"]] if any(r.logits for r in s.routers) else []
    return [*_where(s, len(s.routers)), 0.01, ids, 0.01, k * floats["routing.weights"], *score]


def _residual(s: RunShape, floats: Mapping[str, float]) -> Columns:
    where = _where(s, s.layers)[:2]
    return [*where, floats["residual.norm"], 3 * floats["residual.top_values"], 3 * bits(s.d_model)]


def _lists(name: str, length: Callable[[RouterShape], float]) -> Callable[[RunShape, Mapping[str, float]], Columns]:
    return lambda s, floats: [*_where(s, len(s.routers)), 0.01, _mean(s, length) * floats[name]]


def _load_key(s: RunShape) -> Columns:
    experts = max((r.choices for r in s.routers), default=1)
    return [0.26, _NAME, bits(s.labels), _NAME, bits(experts), 1.4, 7.2]


def _expert_columns(s: RunShape) -> Columns:
    experts = max((r.choices for r in s.routers), default=1)
    key = [0.08, 0.26, _NAME, bits(experts), 1.4]
    return [*key, 7.2, 7.7, 7.7, 3.4, bits(s.d_model), bits(s.batch_tokens) + 0.2, 2.4, 2.4, 1.0]


_COLUMNS: Mapping[str, Callable[[RunShape, Mapping[str, float]], Columns]] = {
    "tokens": _tokens,
    "sequences": lambda s, _: [
        *(0.2, 0.2, bits(s.labels), bits(s.longest)),
        _DIGEST,
        s.text_bytes / max(1, s.sequences),
    ],
    "vocabulary": lambda s, _: [_PIECE_OF_TEXT],
    "routing": _routing,
    "loads": lambda s, _: _load_key(s),
    "load_partials": lambda s, _: [0.08, *_load_key(s)],
    "experts": lambda s, _: _expert_columns(s),
    "expert_partials": lambda s, _: _expert_columns(s),
    "residual": _residual,
    "residual_sequences": lambda s, floats: [0.55, 0.42, floats["residual_sequences.median_abs"]],
    "router_logits": _lists("router_logits.logits", lambda r: r.choices),
    "expert_outputs": _lists("expert_outputs.norms", lambda r: r.top_k),
    "head_sequences": lambda s, _: [
        *(bits(s.batch_tokens / max(1.0, s.longest)) + 0.3, 0.1, _NAME, bits(_HEAD_METRICS), _NAME),
        _HEAD_SUM * sum(s.heads) / max(1, len(s.heads)),
        bits(s.longest),
    ],
    "heads": lambda s, _: [0.1, bits(max(s.heads, default=1)), bits(_HEAD_METRICS), _NAME, 7.2, 2.0, _NAME],
    "batches": lambda s, _: [6.0],
}
