"""Greedy continuation with the model's own cache, watched one forward pass at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from moescope.core.errors import InputError
from moescope.probes.forward import DeviceBatch, is_encoder_decoder, logits_in
from moescope.probes.live_model import LiveModel

Before = Callable[[Int[torch.Tensor, "row position"]], None]
After = Callable[[Float[torch.Tensor, "row position vocabulary"]], None]


def continue_greedily(
    model: LiveModel, batch: DeviceBatch, tokens: int, *, before: Before, after: After
) -> Int[torch.Tensor, " row"]:
    """Run a batch and go on with the most likely token of each sequence, by the model's own `generate` and cache.

    A sequence ends once an end-of-sequence token was fed, or after so many tokens; every generated token is fed, so the
    model runs at most `tokens + 1` times. Temperature, penalties, beams and whatever else the model's generation
    settings hold are left out. The experts' implementation is left to the model, which on an accelerator may change it
    between prompt and continuation, and on a CPU does not.

    Args:
        model: runs on `batch`, padded at the left.
        tokens: at most so many tokens more for each sequence.
        before: called with the token ids that the model is about to be fed, in each pass.
        after: called with the logits it gave, all positions of the prompt's pass included.

    Returns:
        How many tokens were generated for each sequence, its end-of-sequence token included: counted from what
        `generate` gives back, whatever passes were seen.
    """
    module: Any = model.module
    ends = torch.tensor(end_ids(model), dtype=torch.int64, device=batch.ids.device)
    thread = threading.get_ident()

    def entering(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return None
        before(named["input_ids"] if "input_ids" in named else inputs[0])
        # `generate` asks for the logits of the last position alone; 0 is all of them.
        return (inputs, named | {"logits_to_keep": 0}) if "logits_to_keep" in named else None

    def leaving(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            after(logits_in(output))

    with ExitStack() as stack:
        stack.enter_context(_plain_settings(module))
        for hook in (
            module.register_forward_pre_hook(entering, with_kwargs=True),
            module.register_forward_hook(leaving),
        ):
            stack.callback(hook.remove)
        prompt = batch.ids.shape[1]
        written = module.generate(
            batch.ids,
            generation_config=_greedy(tokens + 1, model.pad_id),  # the last is predicted and never fed
            stopping_criteria=[_AllEnded(prompt, ends)],
            attention_mask=batch.mask.long(),
        )
    return fed_before_the_end(written[:, prompt : prompt + tokens], ends).sum(1)


def fed_before_the_end(
    ids: Int[torch.Tensor, "row generated"], ends: Int[torch.Tensor, " end"]
) -> Bool[torch.Tensor, "row generated"]:
    """Which of the generated tokens belong to their sequence: all up to its first end-of-sequence token, that included.

    Example:
        >>> fed_before_the_end(torch.tensor([[5, 1, 5], [5, 5, 5]]), torch.tensor([1])).tolist()
        [[True, True, False], [True, True, True]]
    """
    ended = ends_sequence(ids, ends)
    return (ended.long().cumsum(1) - ended.long()) == 0


def ends_sequence(ids: Int[torch.Tensor, "*any"], ends: Int[torch.Tensor, " end"]) -> Bool[torch.Tensor, "*any"]:
    """Which ids are end-of-sequence tokens."""
    return (ids.unsqueeze(-1) == ends).any(-1)


def end_ids(model: LiveModel) -> tuple[int, ...]:
    """The model's end-of-sequence tokens: of its generation settings, its configuration or its tokenizer, the first that
    names any; none where nobody does."""
    module: Any = model.module
    config: Any = getattr(module, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for owner in (getattr(module, "generation_config", None), text, model.tokenizer):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


def check_can_generate(model: LiveModel) -> None:
    """Raise `InputError` for a model that is not made to continue texts."""
    module: Any = model.module
    reason = None
    if is_encoder_decoder(module):
        reason = "an encoder-decoder model, whose answers are not continuations of their texts"
    elif not callable(getattr(module, "generate", None)) or not callable(getattr(module, "can_generate", None)):
        reason = f"{type(module).__name__} has no generate of transformers"
    elif not module.can_generate():
        reason = f"transformers says that {type(module).__name__} cannot generate"
    if reason:
        raise cannot_generate(model, reason)


def cannot_generate(model: LiveModel, reason: str) -> InputError:
    """The refusal to generate with a model."""
    return InputError(
        f"{model.name} cannot continue texts",
        expected="a causal language model that generates with a cache",
        found=reason,
        fix="record without generate (--generate)",
    )


class _AllEnded:
    """A stopping criterion: which sequences have had an end-of-sequence token fed."""

    def __init__(self, prompt: int, ends: Int[torch.Tensor, " end"]) -> None:
        self._prompt, self._ends = prompt, ends

    def __call__(self, ids: Int[torch.Tensor, "row position"], _scores: Any, **_named: Any) -> torch.Tensor:
        return ends_sequence(ids[:, self._prompt : -1], self._ends).any(1)


def _greedy(tokens: int, pad_id: int) -> Any:
    from transformers import GenerationConfig

    settings: Any = GenerationConfig
    return settings(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad_id,
        disable_compile=True,
        return_dict_in_generate=False,
    )


@contextmanager
def _plain_settings(module: Any) -> Iterator[None]:
    """Set the model's own generation settings aside: `generate` would fill in what ours leave open."""
    from transformers import GenerationConfig

    settings: Any = GenerationConfig
    own = module.generation_config
    module.generation_config = settings()
    try:
        yield
    finally:
        module.generation_config = own
