"""The chain from writer to retrieval, each link cut: every effect beside the same cut made at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.batches import Batch
from moescope.probes.batches import Sequence as BatchSequence
from moescope.probes.edits.session import Edited, edited
from moescope.probes.forward import DeviceBatch, logits_of
from moescope.probes.likelihood import token_nll
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.chain_cuts import HEADS, Cut
from moescope.probes.phenomena.chain_readings import read_variants
from moescope.probes.phenomena.chain_rows import copy_rows, score_rows, text_rows, text_sums
from moescope.probes.phenomena.induction import INDUCTION, induction_heads
from moescope.probes.phenomena.massive import MassivePlaces
from moescope.probes.phenomena.repeated_tokens import plain_ids, repeated_tokens
from moescope.store.effects import EffectRow, Measured, SequenceSums, new_effect_id
from moescope.store.run import Run

SEGMENT, REPEATS, SEQUENCES = 32, 3, 4  # of the random tokens on which induction is read under each cut
Head = tuple[int, str, int]
Sums = list[list[SequenceSums]]  # by target and controls


@dataclass(frozen=True)
class CutEffect:
    """What one cut did, and its controls.

    Attributes:
        cut: what was cut.
        effect_id: under which it is stored.
        target: rows of the cut; controls: rows of each control.
    """

    cut: Cut
    effect_id: str
    target: tuple[EffectRow, ...]
    controls: tuple[tuple[EffectRow, ...], ...]


def fitting(model: LiveModel, segment: int, repeats: int) -> tuple[int, int]:
    """Tokens of a segment and how often it stands there, as near to these as the model's context and vocabulary allow.

    Example:
        >>> import moescope as ms
        >>> fitting(ms.load("demo"), 64, 4), fitting(ms.load("demo"), 300, 4)
        ((64, 4), (255, 2))
    """
    room = (model.context or segment * repeats + 2) - 2
    segment = max(4, min(segment, room // 2, len(plain_ids(model)) // 2))
    return segment, max(2, min(repeats, room // segment))


def passes_of(cuts: Sequence[Cut]) -> int:
    """How often the texts are run: once without a cut, and once for each target and control."""
    return 1 + sum(1 + len(cut.controls) for cut in cuts)


def cut_links(
    model: LiveModel,
    batches: Sequence[Batch],
    cuts: Sequence[Cut],
    *,
    places: MassivePlaces | None,
    heads: Sequence[Head],
    seed: int = 0,
    tell: Callable[[], None] = lambda: None,
) -> tuple[list[CutEffect], list[Sums]]:
    """Cut each link, and measure what is left of everything behind it.

    Args:
        model: what runs.
        batches: texts, padded at the right; their sequence ids are those of `places`.
        cuts: the links.
        places: of massive activations; None where there are none.
        heads: whose induction score is read on random repeated tokens; none to leave that out.
        seed: of the bootstraps and the random tokens.
        tell: called after each pass over a batch.

    Returns:
        An effect a cut; and for each of them the sums by sequence of target and controls.

    Raises:
        InputError: an edit the model cannot take. RunError: logits that are no numbers.
    """
    variants = [Intervention(), *(v for cut in cuts for v in (cut.target, *cut.controls))]
    at = places.places if places is not None else {}
    channel = places.channel if places is not None else 0
    layers = places.layers if places is not None else None
    with torch.no_grad(), edited(model, variants) as session:
        readings = read_variants(model, session, batches, len(variants), places=at, channel=channel, tell=tell)
        scores = _induction(model, session, len(variants), heads, seed, tell) if heads else None
        copies = _copies(model, session, len(variants), seed, tell) if heads else None
    base, number = readings[0], 1
    effects, sums = [], []
    for cut in cuts:
        rows, behind = [], []
        for _ in range(1 + len(cut.controls)):
            found = text_rows(base, readings[number], layers=layers, seed=seed)
            if scores is not None and cut.link != HEADS:  # where a masked head looks is not changed
                found += score_rows("induction", scores[0], scores[number], seed=seed)
            if copies is not None:
                found += copy_rows(*copies, number, seed=seed)
            rows.append(tuple(found))
            behind.append(text_sums(base, readings[number]))
            number += 1
        effects.append(CutEffect(cut, new_effect_id(), rows[0], tuple(rows[1:])))
        sums.append(behind)
    return effects, sums


def stored(effects: Sequence[CutEffect], sums: Sequence[Sums], run: Run) -> list[Measured]:
    """Effects as they are written: one id a cut, its controls numbered."""
    found = []
    for effect, behind in zip(effects, sums, strict=True):
        variants = [effect.cut.target, *effect.cut.controls]
        rows = [effect.target, *effect.controls]
        for number, (variant, part, sequences) in enumerate(zip(variants, rows, behind, strict=True)):
            found.append(
                Measured(
                    effect.effect_id,
                    run.run_id,
                    variant.to_json(),
                    "target" if number == 0 else "control",
                    None if number == 0 else number - 1,
                    part,
                    sequences,
                )
            )
    return found


def chosen_batches(plan: Iterable[Batch], *, texts: int, batch_size: int) -> tuple[list[Batch], list[Batch]]:
    """The first part of so many documents, spread evenly over a plan, in batches; sequence ids stay.

    Returns:
        Those, and as many batches of other documents, to calibrate on: the same ones where there are no others.

    Raises:
        InputError: no text has two tokens.
    """
    first = [s for batch in plan for s in batch.sequences if s.part == 0 and len(s.token_ids) > 1]
    if not first:
        raise InputError("no text is long enough to be measured", expected="texts of at least two tokens")
    places = np.unique(np.linspace(0, len(first) - 1, min(texts, len(first))).round().astype(int))
    others = [s for number, s in enumerate(first) if number not in set(places.tolist())][:texts]
    chosen = _batched([first[place] for place in places], batch_size)
    return chosen, _batched(others, batch_size) if others else chosen


def _batched(sequences: Sequence[BatchSequence], batch_size: int) -> list[Batch]:
    """Sequences of like length together."""
    ordered = sorted(sequences, key=lambda s: len(s.token_ids))
    return [Batch(n, tuple(ordered[i : i + batch_size]), 0) for n, i in enumerate(range(0, len(ordered), batch_size))]


def _induction(
    model: LiveModel, session: Edited, variants: int, heads: Sequence[Head], seed: int, tell: Callable[[], None]
) -> list[NDArray[np.float64]]:
    """[variant][sequence] mean induction score of some heads on random tokens that repeat."""
    found = []
    segment, repeats = fitting(model, SEGMENT, REPEATS)
    for number in range(variants):
        session.assign([number])
        scores = induction_heads(model, segment=segment, repeats=repeats, draws=SEQUENCES, seed=seed)
        metric = scores.metrics[INDUCTION]
        columns = [scores.heads.slices[layer, block].start + head for layer, block, head in heads]
        found.append((metric.sums[:, columns] / metric.n[:, None]).mean(1))
        tell()
    return found


def _copies(
    model: LiveModel, session: Edited, variants: int, seed: int, tell: Callable[[], None]
) -> tuple[NDArray[np.float64], int]:
    """[variant, sequence] sum of the NLL over the later copies of the same random tokens, and how many tokens these are."""
    segment, repeats = fitting(model, SEGMENT, REPEATS)
    sequences = repeated_tokens(model, segment=segment, repeats=repeats, draws=SEQUENCES, seed=seed)
    ids = torch.tensor(sequences, device=model.device)
    first = len(sequences[0]) - segment * (repeats - 1)
    given = DeviceBatch(ids, torch.ones_like(ids, dtype=torch.bool))
    sums = np.zeros((variants, len(sequences)))
    for number in range(variants):
        session.assign([number] * len(sequences))
        nll, _ = token_nll(logits_of(model, given), ids)
        sums[number] = nll[:, first:].double().sum(1).cpu().numpy()
        tell()
    return sums, segment * (repeats - 1)
