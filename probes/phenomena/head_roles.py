"""Roles of heads by recovered mass: how little of the past a head can be left with and still find nearly all it attends to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.attention_classes import PUNCTUATION, SPECIAL, key_codes
from moescope.probes.attention_reduced import attention_reduced
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.batches import BatchPlan, Sequence
from moescope.probes.corpus import Corpus
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.haystack import bundled_haystack
from moescope.probes.phenomena.head_map import HeadMap, head_map
from moescope.probes.phenomena.head_run import HeadRun
from moescope.probes.phenomena.head_scores import HeadMetric, HeadScores
from moescope.probes.phenomena.one_sequence import run_ids
from moescope.probes.pieces import Pieces
from moescope.store.store import Store

# Nested, the cheapest first; the last, all keys, recovers everything.
POLICIES = ("special", "+ punctuation", "+ frequent", "+ local")
MASS, EVEN = "recovered mass, ", "even attention, "


def head_roles(
    model: LiveModel,
    corpus: Any = None,
    *,
    documents: int = 8,
    max_length: int = 512,
    frequent: float = 0.3,
    local: float = 0.3,
    store: Store | None = None,
    run_name: str = "head roles",
) -> HeadScores:
    """How much of its attention each head keeps if it may look at some of the keys only.

    For a set of keys C(q) of query q, the recovered mass is m = mean over q of Σ A[q, k] over k in C(q), A being the head's
    attention as the model computed it. The sets are nested: *special* (the first token of the text and special tokens),
    *+ punctuation*, *+ frequent* (the keys with the largest sum of attention from all queries, for each head its own),
    *+ local* (the nearest keys, the query's own included). A head's role is the cheapest set that recovers 95 %
    (analysis `head_roles`). The chance level is the recovered mass of even attention over the same keys.

    The sets are those of FastGen (arXiv 2310.01801); it takes queries of the prompt, as here. Its frequent keys are the
    largest by accumulated attention, which favours early keys, seen by more queries: kept so.

    Args:
        model: any with attention over its tokens.
        corpus: anything `Corpus.load` takes; None for a bundled text in the public domain.
        documents: of the corpus at most.
        max_length: tokens of a document at most: its beginning is taken.
        frequent, local: how many keys these two sets hold, as shares of the text's tokens, rounded up.
        store: where to keep it: a run of its own.
        run_name: its name.

    Raises:
        InputError: shares out of range, no attention to look at, or a corpus that cannot be read.

    Example:
        >>> import moescope as ms
        >>> found = head_roles(ms.load("demo"), ["Well, here it is. And there, too."])
        >>> bool((found.value("recovered mass, + local") <= 1.0001).all())
        True
    """
    if not (0 < frequent <= 1 and 0 < local <= 1) or documents < 1 or max_length < 2:
        raise InputError(
            "these sets of keys cannot be taken",
            expected="shares over 0 up to 1, at least one document of at least two tokens",
            found=f"frequent {frequent:g}, local {local:g}, documents {documents}, max_length {max_length}",
        )
    heads = head_map(model)
    sequences = _sequences(model, corpus, documents, max_length)
    pieces = Pieces(model.tokenizer)
    settings = {
        "protocol": "head roles",
        "documents": documents,
        "max_length": max_length,
        "frequent": frequent,
        "local": local,
    }
    with HeadRun.open(model, store, run_name, settings, seed=0) as run:
        sums = {name: np.zeros((len(sequences), heads.total)) for name in _names()}
        for row, sequence in enumerate(sequences):
            read = _Reader(heads, key_codes(pieces, sequence.token_ids), frequent, local)
            with attention_reduced(model, heads.layer_numbers, read):
                run_ids(model, sequence.token_ids.tolist())
            for name, values in read.sums().items():
                sums[name][row] = values
        counts = np.array([len(sequence.token_ids) for sequence in sequences])
        metrics = {name: HeadMetric(name, values, counts) for name, values in sums.items()}
        facts = tuple({"source": sequence.document.source} for sequence in sequences)
        nulls = {MASS + policy: EVEN + policy for policy in POLICIES}
        found = HeadScores(heads, metrics, nulls, facts, {}, heads.refused)
        return run.kept(found, [(s.token_ids.tolist(), s.text, s.document.label) for s in sequences])


def _names() -> list[str]:
    return [*(MASS + policy for policy in POLICIES), *(EVEN + policy for policy in POLICIES)]


def _sequences(model: LiveModel, corpus: Any, documents: int, max_length: int) -> list[Sequence]:
    texts = Corpus.load(list(bundled_haystack().passages) if corpus is None else corpus)
    longest = max_length if model.context is None else min(max_length, model.context)
    found: list[Sequence] = []
    for batch in BatchPlan(texts, model.tokenizer, 1, longest, model.anatomy.vocabulary):
        found += [s for s in batch.sequences if s.part == 0 and len(s.token_ids) > 1]
        if len(found) >= documents:
            break
    if not found:
        raise InputError(f"the corpus {texts.name} has no text of two tokens or more")
    return found[:documents]


class _Reader:
    """Reduces each pattern to the mass of every set, going over its slices twice: for the frequent keys, then for the sets."""

    def __init__(
        self, heads: HeadMap, codes: np.ndarray[Any, np.dtype[np.int64]], frequent: float, local: float
    ) -> None:
        length = len(codes)
        self._heads, self._frequent, self._near = heads, math.ceil(frequent * length), math.ceil(local * length)
        special = codes == SPECIAL
        special[0] = True
        self._fixed = torch.from_numpy(np.stack([special, special | (codes == PUNCTUATION)]))
        self._found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def __call__(self, site: Site, slices: PatternSlices) -> None:
        columns = torch.zeros(slices.heads, len(self._fixed[0]), device=slices.device)
        for pattern, _ in slices:
            columns[:, : pattern.shape[-1]] += pattern[0].sum(1)
        often = torch.zeros_like(columns, dtype=torch.bool)
        often.scatter_(1, columns.topk(self._frequent, dim=1).indices, True)
        fixed = self._fixed.to(slices.device)
        special, punctuation = (part.expand_as(often) for part in fixed)
        sums = dict.fromkeys(_names(), torch.zeros(slices.heads, device=slices.device, dtype=torch.float64))
        for pattern, first in slices:
            keys = pattern.shape[-1]
            query = torch.arange(first, first + pattern.shape[2], device=pattern.device)
            key = torch.arange(keys, device=pattern.device)
            seen = key <= query[:, None]
            near = seen & (key > query[:, None] - self._near)
            last = (often | punctuation)[:, None, :keys]
            sets = [part[:, None, :keys] & seen for part in (special, punctuation)] + [
                last & seen,
                (last & seen) | near,
            ]
            for policy, chosen in zip(POLICIES, sets, strict=True):
                sums[MASS + policy] = sums[MASS + policy] + _mass(pattern[0], chosen)
                even = chosen.sum(-1) / (query + 1)
                sums[EVEN + policy] = sums[EVEN + policy] + even.double().sum(-1)
        self._found[site.layer, site.block] = sums

    def sums(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """[head] sums over queries."""
        return {
            name: np.concatenate([self._found[p.layer, p.block][name].cpu().numpy() for p in self._heads.places])
            for name in _names()
        }


def _mass(
    pattern: Float[torch.Tensor, "head query key"], chosen: Bool[torch.Tensor, "head query key"]
) -> Float[torch.Tensor, " head"]:
    return torch.where(chosen, pattern, torch.zeros((), device=pattern.device)).double().sum((1, 2))
