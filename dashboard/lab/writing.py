"""What the model writes after a prompt, unedited and under edits, and where the two part."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moescope.core.intervention import Intervention
from moescope.dashboard.lab.bench import Base, Bench
from moescope.dashboard.lab.comparison import pieces_of

if TYPE_CHECKING:
    import torch

    from moescope.probes.live_model import LiveModel

MAX_WRITTEN = 256


def written(
    bench: Bench,
    model: LiveModel,
    base: Base,
    intervention: Intervention | None,
    *,
    row: int,
    tokens: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Both continuations of a prompt, aligned token by token, with their health.

    Args:
        bench: holds the session of edits.
        model: what writes.
        base: the prompts; the unedited continuation is kept with them.
        intervention: the edits; None for none.
        row: which prompt.
        tokens: at most so many.
        temperature: 0 for the most likely token each time.
        seed: of the drawing, the same for both.
    """
    row = max(0, min(row, len(base.batch.sequences) - 1))
    key = (row, tokens, temperature, seed)
    if key not in base.written:
        bench.host.let_go()
        base.written[key] = _continued(model, base, row, tokens, temperature, seed)
    plain, changed = base.written[key], None
    if intervention is not None:
        session = bench.under(model, intervention, [base.batch.sequences[row].sequence_id])
        changed = _continued(model, base, row, tokens, temperature, seed)
        session.check_finite()
    return {
        "row": row,
        "tokens": tokens,
        "temperature": temperature,
        "base": pieces_of(model, plain),
        "edited": None if changed is None else pieces_of(model, changed),
        "parts": None if changed is None else _aligned(plain, changed),
        "parting": None if changed is None else _parting(plain, changed),
        "health": {"base": _health(plain), "edited": None if changed is None else _health(changed)},
    }


def _continued(model: LiveModel, base: Base, row: int, tokens: int, temperature: float, seed: int) -> list[int]:
    import torch

    from moescope.probes.choices import longest
    from moescope.probes.forward import to_device
    from moescope.probes.generation import check_can_generate

    check_can_generate(model)
    one = replace(base.batch, sequences=(base.batch.sequences[row],))
    room = longest(model, len(one.sequences[0].token_ids), tokens)
    kept = one.sequences[0].token_ids[-room:] if room else one.sequences[0].token_ids
    one = replace(one, sequences=(replace(one.sequences[0], token_ids=kept),))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = _generate(model, to_device(one, model), tokens, temperature)
    return [int(token) for token in found]


def _generate(model: LiveModel, on_device: Any, tokens: int, temperature: float) -> torch.Tensor:
    """By the model's own `generate` and cache, its own generation settings set aside."""
    from transformers import GenerationConfig

    from moescope.probes.generation import end_ids

    settings: Any = GenerationConfig
    asked: Any = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ends: Sequence[int] = end_ids(model)
    wanted = settings(
        max_new_tokens=tokens,
        num_beams=1,
        use_cache=True,
        pad_token_id=model.pad_id,
        eos_token_id=list(ends) or None,
        disable_compile=True,
        **asked,
    )
    generating: Any = model.module
    own, generating.generation_config = generating.generation_config, settings()
    try:
        found = generating.generate(on_device.ids, generation_config=wanted, attention_mask=on_device.mask.long())
    finally:
        generating.generation_config = own
    written_ids: torch.Tensor = found[0, on_device.ids.shape[1] :]
    return written_ids


def _aligned(before: Sequence[int], after: Sequence[int]) -> list[list[Any]]:
    """Spans of both texts: [`equal` or `replace` or `delete` or `insert`, first, end, first, end]."""
    matcher = difflib.SequenceMatcher(None, list(before), list(after), autojunk=False)
    return [list(part) for part in matcher.get_opcodes()]


def _parting(before: Sequence[int], after: Sequence[int]) -> int | None:
    """The first token at which they differ; None where they do not."""
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    if same is None and len(before) != len(after):
        return min(len(before), len(after))
    return same


def _health(ids: Sequence[int]) -> dict[str, float | None]:
    """Repetition, distinct n-grams and length, as `moescope.effect` measures them."""
    from moescope.probes.effects.generation_health import METRICS, measures

    return {name: None if math.isnan(value) else value for name, value in zip(METRICS, measures(ids), strict=True)}
