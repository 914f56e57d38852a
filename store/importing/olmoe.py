"""Reader of the OLMoE authors' routing analysis: pickled counts, and JSON lines with the decisions. Nothing is unpickled.

`expert_counts/*.pkl` are three counters, of layers 0, 7 and 15; `eid2token/*.pkl` three dicts expert → token → count;
`c4_results*.jsonl` have `input_ids`, `predicted_token_ids` and `exp_ids` [token, k, layer]. Source: scripts/
run_routing_analysis.py and run_moe_analysis.py of allenai/OLMoE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from moescope.core.errors import InputError
from moescope.store.importing.counted import count_table
from moescope.store.importing.expert_arrays import ArrayRows, as_ids, layer_numbers
from moescope.store.importing.files import laid_out, reading
from moescope.store.importing.pickle_reader import read_pickle
from moescope.store.importing.pickled_arrays import number_builders, plain
from moescope.store.importing.router_logits import from_scores
from moescope.store.importing.trace import Options, Trace

_COUNTED_LAYERS = (0, 7, 15)
_NO_WEIGHTS = "the analysis kept expert ids without weights; slots keep the order of the file"
_EXPECTED = (
    "a list of counters expert → tokens, or of dicts expert → token → count, a layer; expert ids [token, k, layer]; or "
    "router scores [token, expert] a layer"
)


def read_olmoe(source: Path, connection: duckdb.DuckDBPyConnection, options: Options) -> Trace:
    """Counts or decisions of the OLMoE analysis.

    Args:
        source: a .pkl file of `routing_output`, or a .jsonl file of `run_moe_analysis.py`.
        connection: unused.
        options: `layers` of the counters, where they are not 0, 7 and 15; `top_k` and `probabilities` for pickled scores.

    Raises:
        InputError: the pickle holds more than data, or is laid out otherwise.
    """
    if source.suffix in (".json", ".jsonl"):
        with laid_out(source, "the OLMoE analysis does"):
            return _of_results(list(_lines(source)), options, source)
    with reading(source):
        raw = source.read_bytes()
    try:
        value = plain(read_pickle(raw, called=str(source), builders=number_builders()))
    except (ValueError, RecursionError) as damage:
        raise InputError(f"{source} is damaged", found=str(damage)) from damage
    with laid_out(source, "the OLMoE analysis does"):
        return _of_pickle(value, options, source)


def _of_pickle(value: Any, options: Options, source: Path) -> Trace:
    if isinstance(value, np.ndarray):
        value = [value] if value.ndim == 2 else list(value) if value.dtype.kind == "f" else {"exp_ids": value}
    if isinstance(value, dict) and "exp_ids" in value:
        value = [value]
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if items and all(isinstance(item, dict) and "exp_ids" in item for item in items):
        return _of_results(items, options, source)
    if items and all(isinstance(item, np.ndarray) and item.ndim == 2 and item.dtype.kind == "f" for item in items):
        if len({item.shape for item in items}) > 1:
            raise InputError(f"the layers of {source} differ in shape", expected="[token, expert] for every layer")
        return from_scores(items, options, source)
    if items and all(isinstance(item, dict) for item in items):
        return _of_counters(items, options, source)
    raise InputError(f"{source} is not laid out as the OLMoE analysis does", expected=_EXPECTED, found=_shape(value))


def _of_counters(counters: list[dict[Any, Any]], options: Options, source: Path) -> Trace:
    default = _COUNTED_LAYERS if len(counters) == len(_COUNTED_LAYERS) else None
    numbers = layer_numbers(len(counters), options.layers or default, source)
    layers, experts, tokens = [], [], []
    for layer, counter in zip(numbers, counters, strict=True):
        for expert, count in sorted(counter.items(), key=lambda pair: str(pair[0])):
            total = sum(count.values()) if isinstance(count, dict) else count
            if type(expert) is not int or type(total) is not int:
                pairs = isinstance(expert, tuple)
                raise InputError(
                    f"{source} does not count experts",
                    expected=_EXPECTED,
                    found="counts of pairs of experts in two layers" if pairs else f"the key {expert!r}",
                    fix="import expert_counts, from the same analysis" if pairs else None,
                )
            layers.append(layer)
            experts.append(expert)
            tokens.append(total)
    trace = Trace("olmoe", counts=count_table(layers, experts, tokens))
    if options.layers is None:
        trace.notes.append(f"the counters were taken for layers {', '.join(map(str, numbers))}")
    return trace


def _of_results(results: list[dict[str, Any]], options: Options, source: Path) -> Trace:
    arrays = [as_ids(result["exp_ids"], f"exp_ids of {source}").transpose(0, 2, 1) for result in results]
    rows = ArrayRows(options.layers, source)
    rows.look(arrays)

    def tables() -> Iterator[pa.Table]:
        for number, (result, ids) in enumerate(zip(results, arrays, strict=True)):
            yield from rows.tables(number, ids, token_ids=result.get("input_ids"))

    return Trace("olmoe", decisions=tables(), notes=[_NO_WEIGHTS, *rows.notes])


def _lines(source: Path) -> Iterator[dict[str, Any]]:
    with reading(source), source.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as bad:
                raise InputError(f"line {number} of {source} is not JSON", found=str(bad)) from bad
            if not isinstance(found, dict) or "exp_ids" not in found:
                raise InputError(f"line {number} of {source} has no exp_ids", expected="exp_ids [token, k, layer]")
            # Smaller than lists of Python numbers by far, and the file may be long.
            yield {
                **found,
                "exp_ids": as_ids(found["exp_ids"], f"exp_ids of line {number} of {source}").astype(np.int32),
            }


def _shape(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {list(value.shape)}"
    kind = type(value).__name__
    inner = f" of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) and value else ""
    return f"a {kind}{inner}"
