"""Reader of SGLang's expert-distribution dumps (`/dump_expert_distribution_record`), `.pt` files, never unpickled.

Mode `stat` holds `logical_count` [pass, layer, expert]; `per_pass` and `per_token` hold `records`, of which each pass of
`per_token` has `topk_ids_of_layer` [layer, token, 8], −1 where nothing was chosen. Source: eplb/expert_distribution.py of
sgl-project/sglang.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.importing.counted import count_table
from moescope.store.importing.expert_arrays import layer_numbers
from moescope.store.importing.torch_file import read_torch_file
from moescope.store.importing.trace import Options, Trace, decision_table

_DECODE = 2  # ForwardMode.DECODE
_NO_WEIGHTS = "SGLang's recorder keeps expert ids without weights; slots keep the order of the file"


@dataclass
class _Pass:
    """One forward pass: what each of its tokens is, and what was chosen for it."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    sequences: NDArray[np.int64]
    phase: str
    chosen: NDArray[np.int64]


def read_sglang(source: Path, connection: duckdb.DuckDBPyConnection, options: Options) -> Trace:
    """A dump of SGLang's recorder.

    Args:
        source: one .pt file; of several ranks, one rank's.
        connection: unused.
        options: `layers`, where the first layer axis place is not layer 0.

    Raises:
        InputError: the file holds more than data, or is no such dump.
    """
    dump = read_torch_file(source)
    if not isinstance(dump, dict) or not {"logical_count", "records"} & set(dump):
        raise InputError(
            f"{source} is no dump of SGLang's expert-distribution recorder",
            expected="a dict with logical_count, or with records",
            found=f"a {type(dump).__name__}" + (f" with {', '.join(map(str, dump))}" if isinstance(dump, dict) else ""),
        )
    try:
        if "logical_count" in dump:
            counts = np.asarray(dump["logical_count"], np.int64)
            return _counted(counts.sum(0) if counts.ndim == 3 else counts, options, source)
        return _of_records(dump["records"], dump.get("last_physical_to_logical_map"), options, source)
    except (KeyError, ValueError, TypeError, IndexError) as bad:
        raise InputError(f"{source} is not laid out as SGLang does", found=f"{type(bad).__name__}: {bad}") from bad


def _counted(counts: NDArray[np.int64], options: Options, source: Path) -> Trace:
    """Counts [layer, expert]; layers without any are dense."""
    numbers = layer_numbers(len(counts), options.layers, source)
    layers, experts = np.nonzero(counts >= 0)
    used = counts.sum(1)[layers] > 0
    layers, experts = layers[used], experts[used]
    table = count_table(np.array(numbers)[layers].tolist(), experts.tolist(), counts[layers, experts].tolist())
    return Trace("sglang", counts=table, n_experts=counts.shape[1])


def _of_records(records: list[dict[str, Any]], physical: Any, options: Options, source: Path) -> Trace:
    if not records:
        raise InputError(f"{source} holds no forward pass")
    to_logical = None if physical is None else np.asarray(physical, np.int64)
    n_experts = None if to_logical is None else int(to_logical.max()) + 1
    notes = []
    if to_logical is not None and not (to_logical == np.arange(to_logical.shape[1])).all():
        notes.append(
            "experts were placed twice or moved: ids were put back by the placement at the end of the recording, and are "
            "wrong before it last changed"
        )
    if "topk_ids_of_layer" not in records[0]:
        total = sum(np.asarray(record["global_physical_count"], np.int64) for record in records)
        trace = _counted(_logical_counts(np.asarray(total), to_logical, n_experts), options, source)
    else:
        trace = _decided(records, to_logical, options, source)
    trace.n_experts = n_experts or trace.n_experts
    trace.notes += notes
    return trace


def _logical_counts(counts: NDArray[np.int64], to_logical: Any, n_experts: int | None) -> NDArray[np.int64]:
    if to_logical is None or n_experts is None:
        return counts
    logical = np.zeros((len(counts), n_experts), np.int64)
    for layer, (row, places) in enumerate(zip(counts, to_logical, strict=True)):
        np.add.at(logical[layer], places, row)
    return logical


def _decided(records: list[dict[str, Any]], to_logical: Any, options: Options, source: Path) -> Trace:
    passes = list(_placed(records))
    chosen = np.concatenate([p.chosen for p in passes], axis=1)
    numbers = layer_numbers(len(chosen), options.layers, source)
    filled = np.asarray((chosen >= 0).any(axis=(1, 2)))
    k = int((chosen[filled] >= 0).any(axis=(0, 1)).sum())
    if not k:
        raise InputError(f"{source} holds no decision", found="-1 everywhere")
    dense = [numbers[place] for place in np.flatnonzero(~filled)]
    told = sum(len(p.positions) for p in passes)
    kept = sum(int((p.sequences >= 0).sum()) for p in passes)
    trace = Trace("sglang", top_k=k, notes=[_NO_WEIGHTS])
    if dense:
        trace.notes.append(f"layers {', '.join(map(str, dense))} hold no decision and were taken for dense ones")
    if kept < told:
        trace.expected_tokens = told
        trace.notes.append(
            f"{told - kept:,} generated tokens were left out: the dump does not name requests, and several texts, or none, "
            "end just before their positions"
        )
    places = [place for place in range(len(numbers)) if filled[place]]
    trace.decisions = _tables(passes, places, numbers, k, to_logical)
    return trace


def _placed(records: list[dict[str, Any]]) -> Iterator[_Pass]:
    """Give every token its sequence. Without request ids a generated token is that of the one text that ends before it."""
    ends: dict[int, list[int]] = {}
    by_request: dict[Any, int] = {}
    count = 0
    for record in records:
        chosen = np.asarray(record["topk_ids_of_layer"], np.int64)
        positions = np.asarray(record["positions"], np.int64)
        decode = record["forward_mode"] == _DECODE
        lengths = [1] * len(positions) if decode else [int(n) for n in record["extend_seq_lens"]]
        if sum(lengths) != len(positions) or chosen.shape[1] != len(positions):
            raise ValueError(
                f"a pass of {len(positions)} tokens with {sum(lengths)} in its texts and {chosen.shape} ids"
            )
        requests = record.get("rids") or [None] * len(lengths)
        owners = []
        for length, start, request in zip(lengths, np.cumsum([0, *lengths[:-1]]), requests, strict=True):
            first = int(positions[start]) if length else 0
            owner = by_request.get(request, -1) if request is not None else _continued(ends, first)
            if owner < 0 and (not decode or request is not None):
                owner, count = count, count + 1
            if request is not None:
                by_request[request] = owner
            elif owner >= 0:
                ends.setdefault(first + length, []).append(owner)
            owners.append(owner)
        phase = "decode" if decode else "prefill"
        yield _Pass(np.asarray(record["input_ids"], np.int64), positions, np.repeat(owners, lengths), phase, chosen)


def _continued(ends: dict[int, list[int]], position: int) -> int:
    """The text that goes on at a position, −1 where it is none or not the only one."""
    if position == 0 or len(ends.get(position, [])) != 1:
        return -1
    return ends.pop(position)[0]


def _tables(passes: list[_Pass], places: list[int], numbers: list[int], k: int, to_logical: Any) -> Iterator[pa.Table]:
    for p in passes:
        kept = np.flatnonzero(p.sequences >= 0)
        for place in places:
            ids = p.chosen[place, kept, :k]
            if to_logical is not None:
                ids = np.where(ids >= 0, to_logical[place][ids], -1)
            yield decision_table(
                p.sequences[kept], p.positions[kept], numbers[place], ids, phase=p.phase, token_id=p.token_ids[kept]
            )
