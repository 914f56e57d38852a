"""Two sets of prompts and what every prompt sent to every expert: what the contrasts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.positions import Positions, read_positions
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Array = NDArray[np.float64]

OTHERS = "all others"


@dataclass(frozen=True)
class Sides:
    """Prompts of two sets, prompt by prompt; a prompt is a document.

    Attributes:
        names: of the first and the second set.
        first: [prompt] whether it is of the first set.
        tokens: [prompt] tokens counted; none is 0.
        sums: [prompt, expert of all routers] tokens that chose the expert, or the weight they gave it; float32, which counts
            up to 16 million without rounding.
        routers: in the order in which their experts lie in `sums`.
        trace: of the run, or of the first of two.
        notes: what is left out.
    """

    names: tuple[str, str]
    first: NDArray[np.bool_]
    tokens: Array
    sums: NDArray[np.float32]
    routers: tuple[Router, ...]
    trace: Trace
    notes: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Prompts of either set."""
        return int(self.first.sum()), int((~self.first).sum())

    @property
    def side_tokens(self) -> tuple[int, int]:
        """Tokens counted of either set."""
        return int(self.tokens[self.first].sum()), int(self.tokens[~self.first].sum())

    def places(self) -> dict[str, NDArray[Any]]:
        """Columns layer, block and expert of the cells of `sums`."""
        sizes = [router.n_experts for router in self.routers]
        return {
            "layer": np.repeat([r.layer for r in self.routers], sizes),
            "block": np.repeat(np.array([r.block for r in self.routers], dtype=object), sizes),
            "expert": np.concatenate([np.arange(size) for size in sizes]),
        }


def sides_of_labels(run: Run, a: str | None, b: str | None, tokens: str, *, weighted: bool) -> Sides:
    """The prompts of two labels of a run.

    Args:
        run: with routing and labels.
        a, b: labels, each one or several divided by commas; `a` None for the first by name, `b` None for every other label.
        tokens: which tokens count, as `counted_tokens` reads them.
        weighted: sum the weights given to experts instead of counting tokens.

    Raises:
        InputError: no labels, a label that is not there, twice the same one, a set without a token that counts, a run
            without weights where they are wanted.
    """
    trace = read_trace(run)
    names = trace.label_names
    if len(names) < 2:
        raise InputError(
            f"run {run.name!r} has fewer than two labels",
            found=", ".join(map(repr, names)) or "none",
            fix='give documents a "label" (--label-field), and record again',
        )
    first, second = (None if given is None else _labels(run, names, given) for given in (a, b))
    if first is None:
        first = next(({name} for name in names if second is None or name not in second), set())
    if second is None:
        second = set(names) - first
    if not first or not second or first & second:
        both = ", ".join(map(repr, sorted(first & second))) or "every label"
        raise InputError(f"both sets are {both}", expected=f"different ones of {', '.join(map(repr, names))}")
    numbers = [[names.index(name) for name in wanted] for wanted in (first, second)]
    side = np.where(np.isin(trace.label, numbers[0]), 0, np.where(np.isin(trace.label, numbers[1]), 1, -1))
    called = ", ".join(sorted(first)), OTHERS if b is None and len(second) > 1 else ", ".join(sorted(second))
    counted = counted_tokens(trace, tokens) & (side >= 0)
    return _sides(called, [(trace, counted, side)], trace.routers, trace.notes, tokens, weighted)


def _labels(run: Run, names: Sequence[str], given: str) -> set[str]:
    """One label, or those that commas divide; a label may hold commas itself."""
    wanted = {given} if given in names else {part.strip() for part in given.split(",") if part.strip()}
    if unknown := sorted(wanted - set(names)) or ([given] if not wanted else []):
        raise InputError(f"run {run.name!r} has no label {unknown[0]!r}", expected=", ".join(map(repr, names)))
    return wanted


def sides_of_runs(run: Run, other: Run, tokens: str, *, weighted: bool) -> Sides:
    """The prompts of two runs of a model, each run a set.

    Raises:
        InputError: the same run twice, or no router of equal layer, block and number of experts in both.
    """
    if run.run_id == other.run_id:
        raise InputError(f"both sets are run {run.name!r}", expected="two runs of one model")
    traces = [read_trace(run), read_trace(other)]
    found = [{(r.layer, r.block, r.n_experts) for r in trace.routers} for trace in traces]
    alike = tuple(r for r in traces[0].routers if (r.layer, r.block, r.n_experts) in found[1])
    if not alike:
        raise InputError(
            "the two runs have no router of the same layer and number of experts",
            found=f"{run.name!r}: {len(found[0])} routers; {other.name!r}: {len(found[1])}",
            fix="record both sets with one model",
        )
    parts = [(t, counted_tokens(t, tokens), np.full(t.tokens, s)) for s, t in enumerate(traces)]
    left_out = len(found[0] ^ found[1])
    notes = (f"{left_out} routers are in one run only, and left out.",) if left_out else ()
    return _sides((run.name, other.name), parts, alike, (*traces[0].notes, *traces[1].notes, *notes), tokens, weighted)


def counted_tokens(trace: Trace, tokens: str) -> NDArray[np.bool_]:
    """[token] which tokens count.

    Args:
        trace: of the run.
        tokens: `all`; `prompt`, those read; `generated`; `last`, the last read token of each document; a span of places in
            the sequence such as `0:1`; or `token:13`, by id.

    Raises:
        InputError: none of these.
    """
    if tokens == "last":
        last = np.zeros(trace.tokens, np.bool_)
        read = np.flatnonzero(~trace.decode)
        document = trace.document[read]
        # Sequences lie in corpus order, so a document's last read token is the last row that is its own.
        last[read[len(read) - 1 - np.unique(document[::-1], return_index=True)[1]]] = True
        return last
    return _inside(trace, read_positions(tokens))


def _inside(trace: Trace, where: Positions) -> NDArray[np.bool_]:
    if where.which == "all":
        return np.ones(trace.tokens, np.bool_)
    if where.which in ("prompt", "generated"):
        return trace.decode if where.which == "generated" else ~trace.decode
    if where.which == "token":
        return np.asarray(trace.token_id == where.token_id)
    return (trace.position >= where.start) & (trace.position < (where.stop or np.iinfo(np.int32).max))


def _sides(
    names: tuple[str, str],
    parts: Sequence[tuple[Trace, NDArray[np.bool_], NDArray[np.integer[Any]]]],
    routers: tuple[Router, ...],
    notes: tuple[str, ...],
    tokens: str,
    weighted: bool,
) -> Sides:
    first, totals, sums, empty = [], [], [], 0
    for trace, counted, side in parts:
        if weighted:
            trace.require_weights()
        member = np.unique(trace.document[side >= 0])
        row = np.searchsorted(member, trace.document[counted])
        of_prompt = np.zeros(len(member), np.int64)
        of_prompt[np.searchsorted(member, trace.document[side >= 0])] = side[side >= 0]
        prompt_tokens = np.bincount(row, minlength=len(member)).astype(np.float64)
        sums.append(_sums(trace, routers, counted, row, len(member), weighted=weighted)[prompt_tokens > 0])
        totals.append(prompt_tokens[prompt_tokens > 0])
        first.append(of_prompt[prompt_tokens > 0] == 0)
        empty += int((prompt_tokens == 0).sum())
    if empty:
        notes = (*notes, f"{empty:,} prompts have no token that counts ({tokens}), and are left out.")
    found = Sides(
        names, np.concatenate(first), np.concatenate(totals), np.concatenate(sums), routers, parts[0][0], notes
    )
    for name, size in zip(names, found.sizes, strict=True):
        if not size:
            raise InputError(
                f"no prompt of {name!r} has a token that counts",
                expected=f"at least one prompt with tokens {tokens!r} on either side",
                fix="ask for other tokens (all, prompt, generated, last, 0:10, token:13), or record more prompts",
            )
    return found


def _sums(
    trace: Trace,
    routers: Sequence[Router],
    counted: NDArray[np.bool_],
    row: NDArray[np.intp],
    rows: int,
    *,
    weighted: bool,
) -> NDArray[np.float32]:
    """[prompt, expert of all routers] tokens, or weights, of the tokens that count."""
    own = {(r.layer, r.block): r for r in trace.routers}
    found = []
    for place in routers:
        router = own[place.layer, place.block]
        cell = (row * router.n_experts)[:, None] + router.experts[counted]
        weights = trace.weights(router)[counted].astype(np.float64) if weighted else None
        flat = None if weights is None else np.nan_to_num(weights).ravel()
        counts = np.bincount(cell.ravel(), weights=flat, minlength=rows * router.n_experts)
        found.append(counts.reshape(rows, router.n_experts).astype(np.float32))
    return np.concatenate(found, axis=1)
