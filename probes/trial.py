"""Before a run is entered: the routing rules are found on the first sequences, and what the run will do is tried there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from moescope.core.errors import InputError, MoescopeError
from moescope.core.probe import ProbeEntry
from moescope.probes.batches import Batch, BatchPlan, Side
from moescope.probes.batches import Sequence as BatchSequence
from moescope.probes.failures import explained
from moescope.probes.forward import to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.probe import Probe, ProbeContext
from moescope.probes.rule_search import find_rules
from moescope.probes.selfcheck import check_generation, check_left_padding, check_taps, first_look

if TYPE_CHECKING:
    from moescope.probes.effects.edited_recording import EditedRecording

# Rules are found on so many tokens of the first sequences, each cut to that length.
_RULE_TOKENS, _RULE_LENGTH = 512, 128
_RULE_ROWS = 64


def look_first(
    model: LiveModel,
    plan: BatchPlan,
    entries: Sequence[ProbeEntry],
    context: ProbeContext,
    *,
    side: Side,
    generate: int,
    edits: EditedRecording | None = None,
) -> list[Probe]:
    """Put the routing rules into `context`, make the probes, and try on the first sequences what the run will do.

    Rules are found on the model as it is; of a router whose decisions are edited there is none.

    Raises:
        InputError: no text gives a token; a model that cannot pad at this side, or cannot generate.
        RunError: taps change the logits, or the model fails.
    """
    first = next(iter(plan), None)
    if first is None:
        raise InputError(
            f"no text of {plan.corpus.name} gives a token", fix="check that the tokenizer belongs to the model"
        )
    try:
        if any(entry.name == "routing" for entry in entries):
            rules = find_rules(model, Batch(0, tuple(_enough(plan)), 0))
            context.rules = rules if edits is None else edits.rules_left(rules)
        probes: list[Probe] = [entry.function(context) for entry in entries]
        look = to_device(first_look(first), model, side=side)
        if side == "left" and plan.batch_size > 1:
            check_left_padding(model, first_look(first))
        if generate:
            check_generation(model, look)
        with nullcontext() if edits is None else edits.open():
            if edits is not None:
                edits.begin(first_look(first).sequences)
            check_taps(model, look, probes, generate=generate > 0)
    except MoescopeError:
        raise
    except Exception as failure:  # whatever a model may raise, told as its failure
        raise explained(failure) from failure
    return probes


def _enough(plan: BatchPlan) -> Iterator[BatchSequence]:
    """The first sequences of a plan, cut short: enough tokens to tell one routing rule from another."""
    tokens = 0
    sequences = (sequence for batch in plan for sequence in batch.sequences)
    for sequence in islice(sequences, _RULE_ROWS):
        cut = replace(sequence, token_ids=sequence.token_ids[:_RULE_LENGTH])
        yield cut
        tokens += len(cut.token_ids)
        if tokens >= _RULE_TOKENS:
            return
