"""The token view's data: the text of a part of a run, sent once, and one small number a token for what colours it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.dashboard.kept import Kept
from moescope.dashboard.only import sequences_with
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.url_state import ViewState
from moescope.routing.context import pieces
from moescope.store.run import Run

PAGE_TOKENS = 100_000
NO_LABEL = "\N{SYMBOL FOR NULL}"
"""What the address has for texts without a label."""

Ints = NDArray[np.int64]

_SEQUENCES = """
    WITH chosen AS (
        SELECT
            sequence_id, label, source, n_tokens,
            (sum(n_tokens) OVER (ORDER BY sequence_id) - n_tokens) // $size AS page
        FROM sequences
        WHERE run_id = $run
            AND ($label IS NULL OR coalesce(label, $unlabelled) = $label)
            AND ($sequence IS NULL OR sequence_id = $sequence)
            AND ($kept IS NULL OR list_contains($kept::BIGINT[], sequence_id))
    ),
    paged AS (
        SELECT *, dense_rank() OVER (ORDER BY page) AS number
        FROM chosen
    )
    SELECT sequence_id, label, source, (SELECT max(number) FROM paged)
    FROM paged
    WHERE number = $page
    ORDER BY sequence_id
"""
_TOTAL = """
    SELECT count(*)
    FROM tokens
    WHERE run_id = $run{texts}
"""
_OF_TEXTS = """
        AND sequence_id IN (
            SELECT sequence_id
            FROM sequences
            WHERE run_id = $run
                AND ($label IS NULL OR coalesce(label, $unlabelled) = $label)
                AND ($kept IS NULL OR list_contains($kept::BIGINT[], sequence_id))
        )"""
_PARTS: Kept[Part] = Kept(4)
_VOCABULARY: Kept[dict[int, bytes]] = Kept(3)
_TOKENS = """
    SELECT
        token, sequence_id, position,
        coalesce(token_id, -1) AS token_id,
        coalesce(is_special, false) AS special
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
        sequence, position, token_id, special: of each token.
        page, pages: which page of how many.
        total: tokens on all pages together, generated ones among them.
        whole: whether it is all of the run.
    """

    key: str
    sequences: list[tuple[int, str | None, str | None]]
    token: Ints
    sequence: Ints
    position: Ints
    token_id: Ints
    special: NDArray[np.bool_]
    page: int
    pages: int
    total: int
    whole: bool


def find_part(run: Run, state: ViewState) -> Part:
    """The tokens that the address asks for.

    Raises:
        InputError: no such label, sequence or page in the run, or no sequence with what is asked for.
    """
    key = part_key(state)
    if state.given("only") == "feature":  # examples of features may be written later
        return _found(run, state, key)
    return _PARTS.of(run, (key, PAGE_TOKENS), lambda: _found(run, state, key))


def part_key(state: ViewState) -> str:
    """What of the address decides which tokens are shown."""
    only = state.given("only")
    place = {"expert": (state.layer, state.expert), "feature": (state.sae, state.feature)}.get(only, ())
    return "|".join(str(part) for part in (state.label, state.sequence, state.page, only, *place))


def _found(run: Run, state: ViewState, key: str) -> Part:
    asked = {
        "run": run.run_id,
        "label": state.label,
        "unlabelled": NO_LABEL,
        "sequence": state.sequence,
        "page": state.page,
        "size": PAGE_TOKENS,
        "kept": sequences_with(run, state),
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
        key=key,
        sequences=[row[:3] for row in rows],
        token=columns["token"],
        sequence=columns["sequence_id"],
        position=columns["position"].astype(np.int64),
        token_id=columns["token_id"],
        special=columns["special"],
        page=state.page,
        pages=pages,
        total=len(columns["token"]) if pages == 1 else _total(run, asked),
        whole=pages == 1 and state.label is None and state.sequence is None and asked["kept"] is None,
    )


def _total(run: Run, asked: dict[str, Any]) -> int:
    """Tokens of every sequence that the address leaves; only whole runs and labels have more than one page."""
    texts = {name: asked[name] for name in ("label", "unlabelled", "kept")}
    narrowed = texts["label"] is not None or texts["kept"] is not None
    query = _TOTAL.format(texts=_OF_TEXTS if narrowed else "")
    return int(run.store.fetch(query, {"run": run.run_id, **(texts if narrowed else {})})[0][0])


def text_of(run: Run, part: Part) -> dict[str, Any]:
    """The text of a part for the browser: distinct pieces once, and for each token which piece it shows.

    `pieces[0]` stands for a token that only continues a character; a token of which not even the id is known shows its
    position. `sequences` hold the index of their first token, and
    `stretches` pairs of (index, run-wide token) from which tokens are numbered on without a gap.
    """
    reader = PieceReader(_vocabulary(run))
    # Most tokens show the same wherever they stand: each pair of id and special or not is looked up once.
    pairs, of = np.unique(part.token_id * 2 + part.special, return_inverse=True)
    whole = np.array([reader.whole(pair >> 1) for pair in pairs.tolist()], dtype=bool)
    distinct: dict[tuple[str | None, bool], int] = {(None, False): 0}
    table = np.zeros(len(pairs), dtype=np.uint32)
    table[whole] = [
        distinct.setdefault((reader.piece(pair >> 1), bool(pair & 1)), len(distinct)) for pair in pairs[whole].tolist()
    ]
    numbers = table[of]
    edges = np.searchsorted(part.sequence, [sequence for sequence, _, _ in part.sequences])
    ends = np.append(edges[1:], len(part.token)).astype(np.int64)
    torn = np.concatenate([[0], np.cumsum(~whole[of])])
    for start, end in zip(edges.tolist(), ends.tolist(), strict=True):
        if torn[start] == torn[end]:
            continue
        shown = _shown(reader, part, start, end)
        for at, (text, special) in enumerate(zip(shown, part.special[start:end].tolist(), strict=True), start=start):
            numbers[at] = distinct.setdefault((text, special and text is not None), len(distinct))
    documents = _documents(run, part)
    breaks = np.flatnonzero(np.diff(part.token, prepend=part.token[:1] - 2) != 1)
    return {
        "key": part.key,
        "named": bool((part.token_id >= 0).any()),
        "pieces": [text or "" for text, _ in distinct],
        "special": [number for (_, special), number in distinct.items() if special],
        "numbers": packed(numbers, len(distinct)),
        "sequences": [
            [int(start), sequence, label, source, int(end - start), documents.get(sequence, "")]
            for (sequence, label, source), start, end in zip(part.sequences, edges, ends, strict=True)
        ],
        "stretches": [[int(at), int(part.token[at])] for at in breaks],
    }


def _vocabulary(run: Run) -> dict[int, bytes]:
    """Token id → bytes; one dictionary a run, so that every part reads the same one."""
    return _VOCABULARY.of(run, "vocabulary", lambda: pieces(run))


def _documents(run: Run, part: Part) -> dict[int, str]:
    """Which document a sequence is of, and which part of it, for those that are not simply the document of their number."""
    query = """
        SELECT sequence_id, document_id, part
        FROM sequences
        WHERE run_id = $run AND sequence_id BETWEEN $first AND $last AND (document_id != sequence_id OR part > 0)
    """
    edges = (part.sequences[0][0], part.sequences[-1][0]) if part.sequences else (0, -1)
    rows = run.store.fetch(query, {"run": run.run_id, "first": edges[0], "last": edges[1]})
    return {
        sequence: f"document {document}" + (f", part {number + 1}" if number else "")
        for sequence, document, number in rows
    }


def _shown(reader: PieceReader, part: Part, start: int, end: int) -> list[str | None]:
    """What the tokens of one sequence show; their positions where not even their ids are known."""
    ids = part.token_id[start:end].tolist()
    if any(i >= 0 for i in ids):
        return reader.read([None if i < 0 else i for i in ids])
    return [f"·{position} " for position in part.position[start:end].tolist()]


def packed(values: NDArray[Any], limit: int) -> dict[str, Any]:
    """Whole numbers below `limit` as base64 bytes, one, two or four each, low byte first."""
    width = 1 if limit <= 1 << 8 else 2 if limit <= 1 << 16 else 4
    data = values.astype({1: "<u1", 2: "<u2", 4: "<u4"}[width]).tobytes()
    return {"width": width, "data": base64.b64encode(data).decode("ascii")}


def _nothing(run: Run, state: ViewState) -> InputError:
    if state.given("only") and state.page == 1 and state.sequence is None:
        return InputError(
            "no sequence has what `only` asks for", found=f"only={state.given('only')}", fix="take that filter away"
        )
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
