"""Induction and echo heads: where heads look in random tokens that repeat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from moescope.core.sites import Site
from moescope.probes.attention_reduced import attention_reduced
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.head_map import HeadMap, head_map
from moescope.probes.phenomena.head_run import HeadRun
from moescope.probes.phenomena.head_scores import HeadMetric, HeadScores
from moescope.probes.phenomena.one_sequence import run_ids
from moescope.probes.phenomena.repeated_tokens import first_ids, repeated_tokens
from moescope.store.store import Store

INDUCTION, ECHO, PREVIOUS = "induction", "echo", "previous token"
INDUCTION_MEAN, ECHO_MEAN = "induction, mean over copies", "echo, mean over copies"
NULL, NULL_MEAN, NULL_ONE = "other offset", "other offset, mean over copies", "other offset, one key"
_NULLS = {INDUCTION: NULL, ECHO: NULL, INDUCTION_MEAN: NULL_MEAN, ECHO_MEAN: NULL_MEAN, PREVIOUS: NULL_ONE}
_METRICS = (INDUCTION, ECHO, PREVIOUS, INDUCTION_MEAN, ECHO_MEAN, NULL, NULL_MEAN, NULL_ONE)
_OFFSETS = 8  # other offsets, whose mean is the chance level


def induction_heads(
    model: LiveModel,
    *,
    segment: int = 64,
    repeats: int = 4,
    draws: int = 8,
    seed: int = 0,
    store: Store | None = None,
    run_name: str = "induction heads",
) -> HeadScores:
    """How much each head attends to earlier copies of its token (echo), and to what followed them (induction).

    A segment of n random tokens stands there `repeats` times. For the query i of its second and later copies, and A its
    attention as the model computed it, rotary positions included:

    * `induction`: mean over i of Σ_c A[i, i − c·n + 1], over all copies c = 1, 2, … before it: 1 for a head that looks at nothing
      but what came after the same token before;
    * `echo`: mean over i of Σ_c A[i, i − c·n]: 1 for a head that looks at the same token alone;
    * `…, mean over copies`: the mean over pairs of i and c in place of the sum over c, as released code of RazorAttention has it
      (there of queries and keys without rotary positions, of 2,500 tokens 4 times). With more copies it is less than 1 for any
      head; it ranks heads much alike;
    * `previous token`: mean over the same i of A[i, i − 1].

    The chance level is the same read at other offsets: c·n − 1 − δ for 8 values of δ that are drawn for each sequence.

    Args:
        model: any with attention over its tokens.
        segment, repeats: n, and how often it stands there.
        draws: sequences, each with its own segment; intervals resample them.
        seed: of the tokens and offsets.
        store: where to keep them: a run of its own, whose sequences are these (tables `heads`, `head_sequences`).
        run_name: its name.

    Returns:
        Every head's scores. Heads in layers whose sliding window is shorter than a segment cannot see a copy: `notes` says so.

    Raises:
        InputError: no attention to look at; more tokens than the context or vocabulary takes; a run's name that is taken.

    Source: arXiv 2407.15891 (RazorAttention), arXiv 2209.11895 (induction heads).

    Example:
        >>> import moescope as ms
        >>> found = induction_heads(ms.load("demo"), segment=16, repeats=2, draws=2)
        >>> len(found.top("induction", 3))
        3
    """
    heads = head_map(model)
    sequences = repeated_tokens(model, segment=segment, repeats=repeats, draws=draws, seed=seed)
    before = len(first_ids(model))
    settings = {"protocol": "repeated tokens", "segment": segment, "repeats": repeats, "draws": draws, "first": before}
    facts = tuple({"draw": draw, "segment": segment, "repeats": repeats} for draw in range(draws))
    with HeadRun.open(model, store, run_name, settings, seed=seed) as run:
        measured = {name: np.zeros((draws, heads.total)) for name in _METRICS}
        random = np.random.default_rng(seed + 1)
        for draw, ids in enumerate(sequences):
            other = _other_offsets(segment, random)
            for name, values in _read(model, heads, ids, before, segment, other).items():
                measured[name][draw] = values
        counts = np.full(draws, segment * (repeats - 1))
        metrics = {name: HeadMetric(name, values * counts[:, None], counts) for name, values in measured.items()}
        found = HeadScores(heads, metrics, _NULLS, facts, {}, _notes(heads, segment))
        return run.kept(found, [(list(ids), "", None) for ids in sequences])


def _other_offsets(segment: int, random: np.random.Generator) -> list[int]:
    """Places δ, read at 1 + δ after the copy, that are neither the token after it (δ = 0) nor the one before the query."""
    free = np.arange(1, segment - 2)
    return sorted(random.choice(free, min(_OFFSETS, len(free)), replace=False).tolist())


def _read(
    model: LiveModel, heads: HeadMap, ids: list[int], before: int, segment: int, other: list[int]
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """[head] every metric of one sequence."""
    read = _Reader(heads, before, segment, len(ids), other)
    with attention_reduced(model, heads.layer_numbers, read):
        run_ids(model, ids)
    return read.means()


class _Reader:
    """Gathers attention at the offsets, slice by slice."""

    def __init__(self, heads: HeadMap, before: int, segment: int, length: int, other: list[int]) -> None:
        self._heads, self._before, self._segment, self._length, self._other = heads, before, segment, length, other
        self._sums: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def __call__(self, site: Site, slices: PatternSlices) -> None:
        sums: dict[str, torch.Tensor] = {}
        for pattern, first in slices:
            queries = torch.arange(first, first + pattern.shape[2], device=pattern.device)
            for name, value in self._slice(pattern[0], queries).items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
        self._sums[site.layer, site.block] = sums

    def _slice(
        self, pattern: Float[torch.Tensor, "head query key"], queries: Int[torch.Tensor, " query"]
    ) -> dict[str, torch.Tensor]:
        copies = (queries - self._before) // self._segment  # of its token before each query; 0 in the first segment
        most = max(1, (self._length - self._before) // self._segment - 1)
        back = torch.arange(1, most + 1, device=queries.device) * self._segment
        there = (back[None] <= copies[:, None] * self._segment) & (queries >= self._before + self._segment)[:, None]

        def at(offset: int) -> torch.Tensor:
            """[head, query, copy] attention to the place `offset` after each copy, 0 where there is none."""
            return _gathered(pattern, queries[:, None] - back[None] + offset, there)

        found = {}
        for name, mean, offset in ((INDUCTION, INDUCTION_MEAN, 1), (ECHO, ECHO_MEAN, 0)):
            mass = at(offset).double()
            found[name], found[mean] = mass.sum((1, 2)), mass.sum((1, 2))
        chance = torch.stack([at(1 + other).double() for other in self._other])
        found[NULL] = found[NULL_MEAN] = chance.mean(0).sum((1, 2))
        found[NULL_ONE] = chance[..., :1].mean(0).sum((1, 2))
        found[PREVIOUS] = _gathered(pattern, queries[:, None] - 1, there[:, :1]).double().sum((1, 2))
        return found

    def means(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """[head] means over queries, or over pairs of query and copy."""
        repeats = (self._length - self._before) // self._segment
        queries = self._segment * (repeats - 1)
        pairs = self._segment * repeats * (repeats - 1) // 2
        found = {}
        for name in _METRICS:
            by_place = [self._sums[p.layer, p.block][name].cpu().numpy() for p in self._heads.places]
            found[name] = np.concatenate(by_place) / (pairs if name.endswith("mean over copies") else queries)
        return found


def _gathered(
    pattern: Float[torch.Tensor, "head query key"],
    keys: Int[torch.Tensor, "query copy"],
    there: Bool[torch.Tensor, "query copy"],
) -> Float[torch.Tensor, "head query copy"]:
    """Attention to given keys, 0 where they do not count."""
    index = keys.clamp(0, pattern.shape[-1] - 1).expand(pattern.shape[0], -1, -1)
    return torch.where(there[None], pattern.gather(-1, index), torch.zeros((), device=pattern.device))


def _notes(heads: HeadMap, segment: int) -> tuple[str, ...]:
    notes = list(heads.refused)
    near = [p.layer for p in heads.places if p.window is not None and p.window < segment]
    if near:
        notes.append(
            f"{len(near)} layers have sliding windows shorter than the segment of {segment:,} tokens: their heads cannot see a copy "
            "and score 0."
        )
    return tuple(notes)
