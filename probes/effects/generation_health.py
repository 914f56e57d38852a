"""Whether a model still writes: greedy continuations of the corpus's first texts, unedited and under each intervention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError, RunError
from moescope.core.intervention import Intervention
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.batches import Sequence as BatchSequence
from moescope.probes.choices import longest
from moescope.probes.effects.paired import called
from moescope.probes.effects.variants import Under, alternately
from moescope.probes.forward import to_device
from moescope.probes.generation import continue_greedily
from moescope.probes.live_model import LiveModel
from moescope.probes.selfcheck import check_generation

METRICS = ("repetition", "distinct_1", "distinct_2", "distinct_3", "length")
_PROMPT_TOKENS = 32
_REPEATED = 4


@dataclass(frozen=True)
class Health:
    """What was written after each prompt.

    Attributes:
        prompts: the texts begun, cut to the prompts.
        values: [variant, metric, prompt] with the unedited model first; NaN where a continuation is too short for a metric.
    """

    prompts: tuple[BatchSequence, ...]
    values: NDArray[np.float64]


def generation_health(
    model: LiveModel,
    plan: BatchPlan,
    variants: Sequence[Intervention],
    *,
    tokens: int,
    prompts: int = 16,
    sources: Mapping[str, Any] | None = None,
) -> Health:
    """Continue the beginnings of the first texts greedily and measure what is written.

    All prompts are equally long, at most 32 tokens and at most all but one of a text's, so that nothing is padded.

    Args:
        model: what writes.
        plan: the corpus, cut into sequences.
        variants: interventions, each held against the unedited model.
        tokens: written after each prompt, at most; a text ends after its end-of-sequence token.
        prompts: how many texts are begun; fewer where the corpus has fewer.
        sources: name → run or autoencoder, for edits that name one.

    Raises:
        InputError: a model that cannot generate, or has no room for so many tokens; edits that cannot be generated under.
        RunError: logits that are no numbers.
    """
    chosen = _prompts(plan, prompts, longest(model, _PROMPT_TOKENS, tokens))
    batches = [Batch(0, chosen[i : i + plan.batch_size], 0) for i in range(0, len(chosen), plan.batch_size)]
    values = np.full((1 + len(variants), len(METRICS), len(chosen)), np.nan)
    with torch.no_grad():
        check_generation(model, to_device(replace(batches[0], sequences=batches[0].sequences[:2]), model))
        with alternately(model, variants, sources=sources) as under:
            for batch_number, batch in enumerate(batches):
                at = slice(batch_number * plan.batch_size, batch_number * plan.batch_size + len(batch.sequences))
                for number in range(1 + len(variants)):
                    variant = None if number == 0 else number - 1
                    name = "without any edit" if variant is None else called(variants[variant], variant)
                    written = _written(model, under, variant, batch, tokens, name)
                    values[number, :, at] = np.array([measures(ids) for ids in written]).T
    return Health(chosen, values)


def measures(ids: Sequence[int]) -> tuple[float, ...]:
    """Repetition, distinct-1, -2 and -3, and length of one continuation; NaN where it is too short.

    distinct-n is the number of different n-grams over the number of n-grams (Li et al. 2016, arXiv 1510.03055, who divide by
    the number of tokens instead). Repetition is seq-rep-4 of Welleck et al. 2020 (arXiv 1908.04319): 1 − distinct-4, the
    share of 4-grams that occurred before.

    Example:
        >>> measures([7, 7, 7, 7, 7])
        (0.5, 0.2, 0.25, 0.3333333333333333, 5.0)
    """
    distinct = [_distinct(ids, n) for n in (_REPEATED, 1, 2, 3)]
    return (1 - distinct[0], *distinct[1:], float(len(ids)))


def _distinct(ids: Sequence[int], n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _prompts(plan: BatchPlan, wanted: int, most: int) -> tuple[BatchSequence, ...]:
    """The beginnings of the first texts, equally long."""
    sequences = (s for batch in plan for s in batch.sequences if s.part == 0 and len(s.token_ids) > 1)
    # Where many texts are short, longer ones further on are taken instead, so that prompts need not be as short.
    looked_at = list(islice(sequences, 4 * wanted))
    if not looked_at:
        raise InputError("no text is long enough to be continued", expected="texts of at least two tokens")
    lengths = sorted((len(s.token_ids) - 1 for s in looked_at), reverse=True)
    length = min(most, lengths[min(wanted, len(lengths)) - 1])
    fitting = [s for s in looked_at if len(s.token_ids) > length][:wanted]
    return tuple(replace(s, token_ids=s.token_ids[:length]) for s in fitting)


def _written(
    model: LiveModel, under: Under, number: int | None, batch: Batch, tokens: int, name: str
) -> Iterator[list[int]]:
    """The continuation of each prompt of a batch."""
    fed: list[torch.Tensor] = []
    unsound: list[torch.Tensor] = []
    with under(number, [sequence.sequence_id for sequence in batch.sequences]):
        lengths = continue_greedily(
            model,
            to_device(batch, model),
            tokens,
            before=fed.append,
            after=lambda logits: unsound.append(~torch.isfinite(logits[:, -1].float().amax(-1)).all()),
        )
    if bool(torch.stack(unsound).any()):
        raise RunError(
            f"the model's logits are no numbers while it writes ({name})",
            found="NaN or infinity",
            fix="take a smaller strength, or another dtype; nothing was stored",
        )
    ids = torch.cat(fed[1:], 1).cpu() if len(fed) > 1 else torch.zeros(len(batch.sequences), 0, dtype=torch.int64)
    return (row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True))
