"""Where two runs over the same texts decided differently: token by token, at one router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.dashboard.records import Router
from moescope.dashboard.token_view import Ints, Part, packed
from moescope.routing.comparison.paired_sequences import pair_parameters
from moescope.store.run import Run

Change = Literal["all", "changed", "lost", "gained"]
CHANGES: tuple[Change, ...] = get_args(Change)
ABSENT = 255

_CHOSEN = """
    SELECT t.sequence_id, t.position, r.experts
    FROM routing r
    JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
    WHERE r.run_id = $run AND r.layer = $layer AND r.block = $block AND coalesce(t.phase, 'prefill') = 'prefill'
        AND r.token BETWEEN $first AND $last AND t.token BETWEEN $first AND $last
"""
_DIFFERENCE = f"""
    WITH ours AS ({_CHOSEN.replace("$", "$our_")}), theirs AS ({_CHOSEN.replace("$", "$their_")})
    SELECT
        ours.sequence_id, ours.position,
        greatest(
            len(list_filter(ours.experts, lambda e: NOT list_contains(theirs.experts, e))),
            len(list_filter(theirs.experts, lambda e: NOT list_contains(ours.experts, e)))
        ) AS swapped,
        list_contains(ours.experts, $expert) AS now,
        list_contains(theirs.experts, $expert) AS earlier
    FROM ours
    JOIN theirs USING (sequence_id, position)
"""  # noqa: S608  both halves are written above
_STRETCH = """
    SELECT min(token), max(token)
    FROM tokens
    WHERE run_id = $run AND sequence_id BETWEEN $first AND $last
"""
_OTHER_TEXTS = """
    SELECT count(*)
    FROM sequences a
    JOIN sequences b ON b.run_id = $other AND b.sequence_id = a.sequence_id
    WHERE a.run_id = $run AND a.sequence_id BETWEEN $first AND $last
        AND (
            a.content_hash IS DISTINCT FROM b.content_hash
            OR a.n_tokens IS DISTINCT FROM b.n_tokens
            OR (a.content_hash IS NULL AND NOT $same)
        )
"""
_PARTNERS = """
    SELECT b.name
    FROM runs a
    JOIN runs b ON b.corpus_fingerprint = a.corpus_fingerprint AND b.run_id != a.run_id
    WHERE a.run_id = $run AND EXISTS (SELECT 1 FROM layers l WHERE l.run_id = b.run_id AND l.n_experts IS NOT NULL)
    ORDER BY b.started_at, b.name
"""


@dataclass(frozen=True)
class Changes:
    """Per token of a part: how many experts differ between the two runs, the larger of those that only one of them chose (−1
    where one of them has no record), and for the expert in focus whether it was chosen now, and in the other run.
    """

    swapped: Ints
    now: NDArray[np.bool_]
    earlier: NDArray[np.bool_]


def partners(run: Run) -> list[str]:
    """Runs over the same corpus whose models have routers, oldest first."""
    return [name for (name,) in run.store.fetch(_PARTNERS, {"run": run.run_id})]


def changes(run: Run, other: Run, part: Part, router: Router, expert: int | None) -> Changes:
    """Compare the decisions of two runs at a router, on the tokens of a part, by sequence and position.

    Raises:
        InputError: the runs' texts differ, or the other model has no such router.
    """
    edges = (
        {"first": int(part.sequence[0]), "last": int(part.sequence[-1])}
        if len(part.token)
        else {"first": 0, "last": -1}
    )
    differing = run.store.fetch(_OTHER_TEXTS, pair_parameters(run, other) | edges)[0][0]
    if differing:
        raise InputError(
            f"{other.name!r} read other texts than {run.name!r}",
            found=f"{differing:,} sequences of this page with other tokens, or not known to have the same",
            fix="compare with a run over the same corpus",
        )
    first, last = run.store.fetch(_STRETCH, {"run": other.run_id, **edges})[0]
    bound: dict[str, Any] = {"expert": -1 if expert is None else expert}
    for side, of, (low, high) in (
        ("our", run, (int(part.token[0]), int(part.token[-1])) if len(part.token) else (0, -1)),
        ("their", other, (-1, -1) if first is None else (first, last)),
    ):
        asked = {"run": of.run_id, "layer": router.layer, "block": router.block, "first": low, "last": high}
        bound |= {f"{side}_{name}": value for name, value in asked.items()}
    found = run.store.sql(_DIFFERENCE, bound).fetchnumpy()
    return _spread(found, part)


def shown(found: Changes, change: Change) -> NDArray[np.bool_]:
    """Which tokens the switch picks out; `lost` and `gained` are of the expert in focus, against the other run."""
    if change == "lost":
        return found.earlier & ~found.now
    return found.now & ~found.earlier if change == "gained" else found.swapped > 0


def changes_paint(part: Part, router: Router, found: Changes, other: Run, expert: int | None) -> dict[str, Any]:
    """For the browser: 0 the same experts, 1 others, 2 the expert in focus lost, 3 gained; 255 not recorded in both."""
    codes = np.where(found.swapped < 0, ABSENT, (found.swapped > 0).astype(np.int64))
    if expert is not None:
        codes = np.where(shown(found, "lost"), 2, np.where(shown(found, "gained"), 3, codes))
    return {
        "key": part.key,
        "kind": "changes",
        "other": other.name,
        "top_k": router.top_k,
        "swapped": packed(np.where(found.swapped < 0, ABSENT, found.swapped), 256),
        "recorded": int((found.swapped >= 0).sum()),
        **packed(codes, 256),
    }


def _spread(found: dict[str, Any], part: Part) -> Changes:
    """Rows, by sequence and position, in the order of the part's tokens."""
    wide = int(max(part.position.max(initial=0), np.max(found["position"], initial=0))) + 1
    ours = part.sequence * wide + part.position
    order = np.argsort(ours, kind="stable")
    theirs = found["sequence_id"].astype(np.int64) * wide + found["position"]
    at = np.searchsorted(ours, theirs, sorter=order)
    at = np.minimum(at, max(len(ours) - 1, 0))
    index = order[at] if len(order) else at
    inside = ours[index] == theirs if len(ours) else np.zeros(0, dtype=bool)
    swapped = np.full(len(ours), -1)
    swapped[index[inside]] = np.asarray(found["swapped"])[inside]
    flags = {name: np.zeros(len(ours), dtype=bool) for name in ("now", "earlier")}
    for name, values in flags.items():
        values[index[inside]] = np.asarray(found[name], dtype=bool)[inside]
    return Changes(swapped=swapped, **flags)
