"""How many bytes one expert takes, from what the run says of its model."""

from __future__ import annotations

from moescope.routing.caching.streams import Stream
from moescope.store.run import Run

_SQL = """
    SELECT layer, block, d_expert
    FROM layers
    WHERE run_id = $run AND kind = 'moe' AND d_expert IS NOT NULL
"""
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
SIZE_UNKNOWN = "The run does not say how large an expert is, so bytes are left out; give them with expert_bytes."
SIZE_ASSUMED = (
    "Bytes assume experts of three matrices (router-free gated MLP): 3 × width × neurons × bytes of the dtype."
)
SIZES_DIFFER = "Experts of different layers differ in size, so the pool counts transfers and not bytes."


def bytes_of(run: Run, streams: list[Stream], given: int | None) -> tuple[list[float | None], tuple[str, ...]]:
    """Bytes of one expert in each stream, None where unknown, and what a reader must know of them."""
    if given is not None:
        return [float(given) for _ in streams], ()
    info = run.info
    width, dtype = info["anatomy"].get("d_model"), info["settings"].get("dtype")
    neurons = {(layer, block): size for layer, block, size in run.sql(_SQL).fetchall()}
    if not neurons or not width or dtype not in _WIDTHS:
        return [None for _ in streams], (SIZE_UNKNOWN,)
    sizes = {place: float(3 * width * size * _WIDTHS[dtype]) for place, size in neurons.items()}
    if streams[0].layer is None:
        if len(set(sizes.values())) > 1:
            return [None], (SIZES_DIFFER,)
        return [next(iter(sizes.values()))], (SIZE_ASSUMED,)
    found = [sizes.get((stream.layer or 0, stream.block or "mlp")) for stream in streams]
    return found, (SIZE_ASSUMED,) if None not in found else (SIZE_UNKNOWN,)
