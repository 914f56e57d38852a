"""The token view's data: the text of a part of a run, sent once, and one small number a token for what colours it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.url_state import ViewState
from moescope.routing.context import pieces
from moescope.store.run import Run

PAGE_TOKENS = 100_000
Ints = NDArray[np.int64]

_SEQUENCES = """
    WITH chosen AS (
        SELECT
            sequence_id, label, source, n_tokens,
            (sum(n_tokens) OVER (ORDER BY sequence_id) - n_tokens) // $size AS page
        FROM sequences
        WHERE run_id = $run AND ($label IS NULL OR label = $label) AND ($sequence IS NULL OR sequence_id = $sequence)
    ),
    paged AS (
        SELECT *, dense_rank() OVER (ORDER BY page) AS number
        FROM chosen
    )
    SELECT sequence_id, label, source, (SELECT max(number) FROM paged), (SELECT sum(n_tokens)::BIGINT FROM paged)
    FROM paged
    WHERE number = $page
    ORDER BY sequence_id
"""
_TOKENS = """
    SELECT token, sequence_id, coalesce(token_id, -1) AS token_id, coalesce(is_special, false) AS special
    FROM tokens
    WHERE run_id = $run AND sequence_id BETWEEN $first AND $last
    ORDER BY token
"""


@dataclass(frozen=True)
class Part:
    """The part of a run that one page of the token view shows.

    Attributes:
        key: names the part; text and colours that belong together carry the same.
        sequences: sequence_id, label and source of each sequence in it.
        token: run-wide numbers of its tokens, ascending.
        sequence, token_id, special: of each token.
        page, pages: which page of how many.
        total: tokens on all pages together, as the sequences count them.
        whole: whether it is all of the run.
    """

    key: str
    sequences: list[tuple[int, str | None, str | None]]
    token: Ints
    sequence: Ints
    token_id: Ints
    special: NDArray[np.bool_]
    page: int
    pages: int
    total: int
    whole: bool


def find_part(run: Run, state: ViewState) -> Part:
    """The tokens that the address asks for.

    Raises:
        InputError: no such label, sequence or page in the run.
    """
    asked = {
        "run": run.run_id,
        "label": state.label,
        "sequence": state.sequence,
        "page": state.page,
        "size": PAGE_TOKENS,
    }
    rows = run.store.fetch(_SEQUENCES, asked)
    if not rows:
        raise _nothing(run, state)
    ids = [row[0] for row in rows]
    table = run.sql(_TOKENS, {"first": ids[0], "last": ids[-1]}).fetchnumpy()
    kept = np.isin(table["sequence_id"], ids)
    columns = {name: np.asarray(values)[kept] for name, values in table.items()}
    pages = int(rows[0][3])
    return Part(
        key=f"{state.label}|{state.sequence}|{state.page}",
        sequences=[row[:3] for row in rows],
        token=columns["token"],
        sequence=columns["sequence_id"],
        token_id=columns["token_id"],
        special=columns["special"],
        page=state.page,
        pages=pages,
        total=int(rows[0][4] or 0),
        whole=pages == 1 and state.label is None and state.sequence is None,
    )


def text_of(run: Run, part: Part) -> dict[str, Any]:
    """The text of a part for the browser: distinct pieces once, and for each token which piece it shows.

    `pieces[0]` stands for a token that only continues a character. `sequences` hold the index of their first token, and
    `stretches` pairs of (index, run-wide token) from which tokens are numbered on without a gap.
    """
    reader = PieceReader(pieces(run))
    distinct: dict[tuple[str | None, bool], int] = {(None, False): 0}
    numbers = np.zeros(len(part.token), dtype=np.uint32)
    edges = np.searchsorted(part.sequence, [sequence for sequence, _, _ in part.sequences])
    ends = [*edges[1:], len(part.token)]
    for start, end in zip(edges, ends, strict=True):
        shown = reader.read([None if i < 0 else i for i in part.token_id[start:end].tolist()])
        for at, (text, special) in enumerate(
            zip(shown, part.special[start:end].tolist(), strict=True), start=int(start)
        ):
            numbers[at] = distinct.setdefault((text, special and text is not None), len(distinct))
    breaks = np.flatnonzero(np.diff(part.token, prepend=part.token[:1] - 2) != 1)
    return {
        "key": part.key,
        "pieces": [text or "" for text, _ in distinct],
        "special": [number for (_, special), number in distinct.items() if special],
        "numbers": packed(numbers, len(distinct)),
        "sequences": [
            [int(start), sequence, label, source, int(end - start)]
            for (sequence, label, source), start, end in zip(part.sequences, edges, ends, strict=True)
        ],
        "stretches": [[int(at), int(part.token[at])] for at in breaks],
    }


def packed(values: NDArray[Any], limit: int) -> dict[str, Any]:
    """Whole numbers below `limit` as base64 bytes, one, two or four each, low byte first."""
    width = 1 if limit <= 1 << 8 else 2 if limit <= 1 << 16 else 4
    data = values.astype({1: "<u1", 2: "<u2", 4: "<u4"}[width]).tobytes()
    return {"width": width, "data": base64.b64encode(data).decode("ascii")}


def _nothing(run: Run, state: ViewState) -> InputError:
    if state.sequence is not None:
        last = run.store.fetch("SELECT max(sequence_id) FROM sequences WHERE run_id = ?", [run.run_id])[0][0]
        has = "none" if last is None else f"sequences 0 to {last}"
        return InputError(
            f"run {run.name!r} has no sequence {state.sequence}"
            + (f" with label {state.label!r}" if state.label else ""),
            found=has,
            fix="choose one of these, or clear the filter",
        )
    if state.label is not None and state.page == 1:
        return InputError(
            f"run {run.name!r} has no text with label {state.label!r}", fix="choose a label from the list"
        )
    if state.page > 1:
        return InputError(f"there is no page {state.page} of this view", fix="go back to page 1")
    return InputError(
        f"run {run.name!r} has no sequences", found="an empty table `sequences`", fix="record with the probe tokens"
    )
