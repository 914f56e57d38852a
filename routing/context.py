"""Tokens as readable text: joined from the bytes that a run stores for every token id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moescope.store.run import Run

_PIECES = "SELECT token_id, bytes FROM vocabulary WHERE run_id = ?"
_AROUND = """
    SELECT t.token, t.token_id, t.sequence_id
    FROM tokens t
    JOIN tokens c ON c.run_id = t.run_id AND c.sequence_id = t.sequence_id AND abs(t.token - c.token) <= $reach
    WHERE t.run_id = $run AND c.token = $token
    ORDER BY t.token
"""


def pieces(run: Run) -> dict[int, bytes]:
    """Token id → the bytes it stands for, for every id seen in the run."""
    return {int(token_id): bytes(raw) for token_id, raw in run.store.fetch(_PIECES, [run.run_id])}


def joined(ids: Iterable[int], vocabulary: Mapping[int, bytes]) -> str:
    """Ids as text; broken characters at the ends show as U+FFFD, ids without bytes as their number."""
    return b"".join(vocabulary.get(int(i), f"[{i}]".encode()) for i in ids).decode("utf-8", "replace")


def around(run: Run, token: int, vocabulary: Mapping[int, bytes], *, reach: int = 12) -> str:
    """The text around a token, the token itself between ⟦ and ⟧."""
    rows = run.store.fetch(_AROUND, {"run": run.run_id, "token": token, "reach": reach})
    before = joined((i for t, i, _ in rows if t < token), vocabulary)
    here = joined((i for t, i, _ in rows if t == token), vocabulary)
    after = joined((i for t, i, _ in rows if t > token), vocabulary)
    return " ".join(f"{before}⟦{here}⟧{after}".split())
