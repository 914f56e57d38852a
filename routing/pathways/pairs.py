"""Pairs of routers that follow each other, and how often their experts meet."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.trace import Router, Trace

PairKind = Literal["first", "all", "same_rank"]
# Documents are resampled one by one up to this number, and in as many groups of neighbours beyond it.
GROUPS = 128

PAIR_WORDS = {
    "first": "first choices",
    "all": "all pairs of chosen experts",
    "same_rank": "experts of the same rank",
}


def router_chain(trace: Trace, block: str | None, *, least: int = 1) -> tuple[Router, ...]:
    """The routers a token meets, in order of layer and block.

    Args:
        trace: the decisions.
        block: only routers of this block; None for all.
        least: how many there must be.

    Raises:
        InputError: there are fewer, or none of that block.
    """
    chain = tuple(router for router in trace.routers if block is None or router.block == block)
    if not chain:
        known = ", ".join(sorted({repr(router.block) for router in trace.routers}))
        raise InputError(f"no router is in a block {block!r}", expected=f"block as one of {known}")
    if len(chain) < least:
        raise InputError(
            f"run {trace.run.name!r} has too few routers for a step from one to a later one",
            expected=f"at least {least} routers",
            found=f"{len(chain)}",
            fix="record a model with more layers of experts, or name another block or a smaller distance",
        )
    return chain


def router_steps(trace: Trace, block: str | None, distance: int) -> list[tuple[Router, Router]]:
    """Each router with the one `distance` routers later."""
    chain = router_chain(trace, block, least=distance + 1)
    return list(zip(chain, chain[distance:], strict=False))


def document_groups(trace: Trace, limit: int = GROUPS) -> tuple[NDArray[np.int32], int]:
    """[token] the group its document is resampled with, and how many groups there are.

    A document is a group of its own where there are at most `limit`; else neighbours share one.
    """
    documents = trace.n_documents
    if documents <= limit:
        return trace.document, documents
    return (trace.document.astype(np.int64) * limit // documents).astype(np.int32), limit


def interval_words(trace: Trace, draws: int, kind: str = "percentile") -> str:
    """What `ci_low` and `ci_high` are, in words."""
    groups = f", in {GROUPS} groups" if trace.n_documents > GROUPS else ""
    return f"95 % {kind} bootstrap over documents{groups}, {draws} resamples"


def joint_counts(
    first: Router, second: Router, group: NDArray[np.int32], groups: int, pairs: PairKind
) -> NDArray[np.int32]:
    """[group, expert of `first`, expert of `second`] how often both are chosen for one token."""
    counts = np.zeros((groups, first.n_experts, second.n_experts), np.int32)
    add_pairs(first.experts, second.experts, group, counts, pairs)
    return counts


def add_pairs(
    first: NDArray[Any], second: NDArray[Any], group: NDArray[Any], counts: NDArray[Any], pairs: PairKind
) -> None:
    """Add the pairs of two routers' choices, each [token, k], to `counts` [group, i, j]."""
    from moescope.routing.pathways.pair_kernels import count_pairs

    if pairs == "all":
        count_pairs(first, second, group, counts)
        return
    ranks = 1 if pairs == "first" else min(first.shape[1], second.shape[1])
    for rank in range(ranks):
        count_pairs(first[:, rank : rank + 1], second[:, rank : rank + 1], group, counts)


def shuffled_rows(
    trace: Trace, generator: np.random.Generator, within: Literal["run", "document"]
) -> NDArray[np.int64]:
    """A random order of tokens, over the whole run or inside each document."""
    if within == "run":
        return generator.permutation(trace.tokens)
    by_document = np.argsort(trace.document, kind="stable")
    order = np.empty(trace.tokens, np.int64)
    order[by_document] = np.lexsort((generator.random(trace.tokens), trace.document))
    return order
