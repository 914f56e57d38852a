"""One model, unedited and under several interventions in turn, over the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from moescope.core.intervention import Intervention
from moescope.probes.edits.session import edited
from moescope.probes.edits.step import WeightStep, step_for
from moescope.probes.live_model import LiveModel

# Called with the variant's number (None for the unedited model) and the ids of the sequences, one a row.
Under = Callable[[int | None, Sequence[int]], AbstractContextManager[None]]


@contextmanager
def alternately(
    model: LiveModel, variants: Sequence[Intervention], *, sources: Mapping[str, Any] | None = None
) -> Iterator[Under]:
    """Hold a model ready to run unedited or under any of some interventions; gives a function that chooses which.

    All share one session of edits, entered once, unless one of them changes weights: those act on every row alike, and are
    put in and taken out for each pass.

    Args:
        model: what will run.
        variants: the interventions.
        sources: name → run or autoencoder, for edits that name one.

    Raises:
        InputError: an edit that this model cannot take.
        RunError: texts that a replayed run does not have, or logits that are no numbers, where the caller has not said so.

    Example:
        >>> import torch, moescope as ms
        >>> from moescope.core.edit_kinds.experts import Ablate
        >>> model, ids = ms.load("demo"), torch.tensor([[5, 6, 7]])
        >>> with torch.no_grad(), alternately(model, [Intervention([Ablate(layer=3, experts=range(8))])]) as under:
        ...     with under(None, [0]):
        ...         plain = model.module(input_ids=ids).logits
        ...     with under(0, [0]):
        ...         cut = model.module(input_ids=ids).logits
        >>> bool(torch.equal(plain, cut))
        False
    """
    if any(issubclass(step_for(edit), WeightStep) for variant in variants for edit in variant.edits):
        yield _one_by_one(model, variants, sources)
        return
    with edited(model, [Intervention(), *variants], sources=sources) as session:

        @contextmanager
        def under(number: int | None, sequences: Sequence[int]) -> Iterator[None]:
            if number is None:  # a batch begins: whoever runs it has looked at the numbers of the last one
                session.check_finite()
            session.begin(sequences)
            session.assign([0 if number is None else number + 1] * len(sequences))
            yield

        yield under
        session.check_finite()


def _one_by_one(model: LiveModel, variants: Sequence[Intervention], sources: Mapping[str, Any] | None) -> Under:
    @contextmanager
    def under(number: int | None, sequences: Sequence[int]) -> Iterator[None]:
        if number is None:
            yield
            return
        with edited(model, variants[number], sources=sources) as session:
            session.begin(sequences)
            yield
            session.check_finite()

    return under
