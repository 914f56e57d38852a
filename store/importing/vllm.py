"""Reader of vLLM's `routed_experts`: ids of the chosen experts, [token, layer, k], as arrays or in responses.

vLLM (`--enable-return-routed-experts`) gives `prompt_routed_experts` with a request and `routed_experts` with each
completion; before 0.21 `routed_experts` held both. Source: docs/training/routed_experts_replay.md of vllm-project/vllm.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.importing.expert_arrays import ArrayRows, as_ids
from moescope.store.importing.files import laid_out, load_arrays, reading
from moescope.store.importing.trace import Options, Trace

_PROMPT, _ANSWER = "prompt_routed_experts", "routed_experts"
_NO_WEIGHTS = "vLLM gives expert ids without weights; slots keep the order of the file"


@dataclass
class _Stretch:
    """Consecutive tokens of one sequence."""

    sequence: int
    first: int
    phase: str
    ids: NDArray[np.int64]
    token_ids: list[int] | None


def read_vllm(source: Path, connection: duckdb.DuckDBPyConnection, options: Options) -> Trace:
    """A trace of vLLM.

    Args:
        source: .npy with one sequence's [token, layer, k]; .npz with one such array a sequence, in order, or the two arrays
            `prompt_routed_experts` and `routed_experts` of one; .json or .jsonl with responses of its server.
        connection: unused.
        options: `layers`, where the layer axis leaves out dense layers (vLLM 0.21 and later count MoE layers only).

    Raises:
        InputError: no array of expert ids is there.
    """
    if source.suffix in (".npy", ".npz"):
        stretches = _of_arrays(source)
    else:
        with reading(source), laid_out(source, "responses of vLLM are"):
            stretches = [
                s for number, answer in enumerate(_answers(source)) for s in _of_answer(answer, number, source)
            ]
        stretches = _renumbered(stretches)
    if not stretches:
        raise InputError(
            f"{source} holds no routed experts",
            expected=f"fields {_PROMPT} or {_ANSWER}",
            fix="start vLLM with --enable-return-routed-experts",
        )
    rows = ArrayRows(options.layers, source)
    rows.look([stretch.ids for stretch in stretches])
    notes = [_NO_WEIGHTS, *rows.notes]
    if options.layers is None:
        notes.append("layers were numbered from 0 along the array's axis")
    return Trace("vllm", decisions=_tables(rows, stretches), notes=notes)


def _tables(rows: ArrayRows, stretches: list[_Stretch]) -> Iterator[pa.Table]:
    for s in stretches:
        yield from rows.tables(s.sequence, s.ids, first=s.first, phase=s.phase, token_ids=s.token_ids)


def _of_arrays(source: Path) -> list[_Stretch]:
    arrays = {name: as_ids(array, f"{name or 'the array'} of {source}") for name, array in load_arrays(source).items()}
    if set(arrays) & {_PROMPT, _ANSWER}:
        prompt = arrays.get(_PROMPT)
        first = 0 if prompt is None else len(prompt)
        stretches = [] if prompt is None else [_Stretch(0, 0, "prefill", prompt, None)]
        if _ANSWER in arrays:
            stretches.append(_Stretch(0, first, "decode" if first else "prefill", arrays[_ANSWER], None))
        return stretches
    return [_Stretch(number, 0, "prefill", array, None) for number, array in enumerate(arrays.values())]


def _answers(source: Path) -> Iterator[dict[str, Any]]:
    """Responses of a .json file (one, or a list) or a .jsonl file (one a line)."""
    text = source.read_text(encoding="utf-8-sig")
    lines = [line for line in text.split("\n") if line.strip()] if source.suffix == ".jsonl" else [text]
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as bad:
            raise InputError(f"line {number} of {source} is not JSON", found=str(bad)) from bad
        for answer in found if isinstance(found, list) else [found]:
            if not isinstance(answer, dict):
                raise InputError(
                    f"{source} holds a {type(answer).__name__}", expected="responses of vLLM: JSON objects"
                )
            yield answer


def _of_answer(answer: dict[str, Any], number: int, source: Path) -> Iterator[_Stretch]:
    """Stretches of one response; the prompt is the first choice's, and later choices begin after it."""
    called = f"response {number} of {source}"
    prompt = _ids(answer.get(_PROMPT), called)
    prompt_ids = answer.get("prompt_token_ids")
    choices = answer.get("choices") or answer.get("outputs") or [answer]
    for place, choice in enumerate(choices):
        ids = _ids(choice.get(_ANSWER), called)
        known = choice.get("token_ids")
        told = choice.get("prompt_token_ids") or prompt_ids
        if prompt is not None:
            if place == 0:
                yield _Stretch(number, 0, "prefill", prompt, told[: len(prompt)] if told else None)
            if ids is not None:
                sequence = number if place == 0 else -1 - place
                yield _Stretch(sequence, len(prompt), "decode", ids, known[: len(ids)] if known else None)
        elif ids is not None:
            yield from _whole(number if place == 0 else -1 - place, ids, told, known)


def _whole(sequence: int, ids: NDArray[np.int64], prompt: Any, answer: Any) -> Iterator[_Stretch]:
    """Prompt and answer in one array, as before vLLM 0.21: told apart by the prompt's token ids, where they are there."""
    length = len(prompt) if prompt else len(ids)
    yield _Stretch(sequence, 0, "prefill", ids[:length], list(prompt[: len(ids)]) if prompt else None)
    if len(ids) > length:
        rest = ids[length:]
        yield _Stretch(sequence, length, "decode", rest, list(answer[: len(rest)]) if answer else None)


def _renumbered(stretches: list[_Stretch]) -> list[_Stretch]:
    """Number sequences in the order they come: responses 0, 1, … and each further choice as a sequence of its own."""
    last: int | None = None
    number = -1
    for stretch in stretches:
        if stretch.sequence != last:
            number += 1
        last, stretch.sequence = stretch.sequence, number
    return stretches


def _ids(value: Any, called: str) -> NDArray[np.int64] | None:
    """Nested lists, or an .npy file in base64."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
        except (ValueError, binascii.Error, EOFError) as bad:
            raise InputError(f"{called} holds routed experts that cannot be decoded", found=str(bad)) from bad
    return as_ids(value, called)
