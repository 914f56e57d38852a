"""Decoding by contrast: what a model says with its own routing, less what it would say with weak routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from moescope.core.edit_kinds.experts import RankRouting
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.attribution.decoding_prompts import padded_prompts, prompt_ids, prompts_of
from moescope.probes.edits.session import Edited, edited
from moescope.probes.forward import logits_in, named_arguments
from moescope.probes.generation import check_can_generate, end_ids
from moescope.probes.live_model import LiveModel

Logits = Float[torch.Tensor, "row vocabulary"]


@dataclass(frozen=True)
class Contrasted:
    """A prompt gone on with by contrast, and greedily by the model as it is.

    Attributes:
        prompt: its token ids.
        ids, text: the continuation by contrast; None for a text where there is no tokenizer.
        plain_ids, plain_text: the greedy continuation without contrast.
        overruled: [step of `ids`] whether the token is another than the unedited model would have taken at that place.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str | None
    plain_ids: tuple[int, ...]
    plain_text: str | None
    overruled: tuple[bool, ...]


def self_contrast(
    model: LiveModel,
    prompts: str | Sequence[Any],
    *,
    weak: Intervention | None = None,
    tokens: int = 64,
    alpha: float = 0.1,
    beta: float = 0.5,
) -> list[Contrasted]:
    """Go on with prompts by contrast of strong and weak routing (SCMoE, arXiv 2405.14507).

    Each step takes the token of the largest score (1 + β) · strong − β · weak, of logits with the model's own routing and
    under an intervention that weakens it; tokens whose strong logit is below ln α + the largest are left out. Both see the
    same text, each with a cache of its own: three rows a prompt in one batch, the third being the model's own greedy
    continuation, to compare with.

    Args:
        model: a causal language model with experts.
        prompts: a text, a list of token ids, or a list of texts or of lists of token ids.
        weak: the weak routing; None for the router's second choice alone in every layer, weights by its own rule.
        tokens: at most so many more for each prompt; one ends after its end-of-sequence token.
        alpha: over 0, up to 1; 1 leaves the strong model's own choice alone.
        beta: at least 0; 0 is greedy decoding.

    Raises:
        InputError: no prompt, a model that cannot generate or be edited so, α or β out of range, prompts too long for the
            model's context with the tokens asked for.
        RunError: logits that are not finite.

    Example:
        >>> import moescope as ms
        >>> found = self_contrast(ms.load("demo"), "In the beginning", tokens=4)
        >>> len(found[0].ids), len(found[0].overruled)
        (4, 4)
    """
    if not 0 < alpha <= 1 or beta < 0 or tokens < 1:
        raise InputError(
            "this cannot be decoded",
            expected="alpha over 0 and up to 1, beta at least 0, at least one token",
            found=f"alpha={alpha}, beta={beta}, tokens={tokens}",
        )
    check_can_generate(model)
    given = [prompt_ids(model, prompt) for prompt in prompts_of(prompts)]
    if weak is None:
        if not model.anatomy.moe:
            raise InputError(f"{model.name} has no experts to weaken", fix="pass weak=Intervention([…])")
        weak = Intervention([RankRouting(ranks=(2,))], name="second choice")
    longest = max(map(len, given)) + tokens
    if model.context is not None and longest > model.context:
        raise InputError(
            "prompt and continuation do not fit the model's context",
            expected=f"at most {model.context:,} tokens",
            found=f"{longest:,}",
        )
    with torch.no_grad(), edited(model, [Intervention(), weak]) as session:
        taken, plain, overruled = _decoded(model, session, given, tokens, alpha, beta)
        session.check_finite()
    found = []
    for row, prompt in enumerate(given):
        ids, own = _ended(taken[row], model), _ended(plain[row], model)
        found.append(
            Contrasted(prompt, ids, _text(model, ids), own, _text(model, own), tuple(overruled[row][: len(ids)]))
        )
    return found


def contrast_scores(strong: Logits, weak: Logits, *, alpha: float, beta: float) -> Logits:
    """(1 + β) · strong − β · weak, minus infinity where strong < ln α + its largest.

    Example:
        >>> strong, weak = torch.tensor([[2.0, 1.9, -9.0]]), torch.tensor([[2.0, 0.0, 0.0]])
        >>> contrast_scores(strong, weak, alpha=0.1, beta=0.5).argmax(-1).item()
        1
    """
    scores = (1 + beta) * strong - beta * weak
    least = strong.amax(-1, keepdim=True) + torch.log(torch.tensor(alpha, dtype=strong.dtype, device=strong.device))
    return torch.where(strong < least, -torch.inf, scores)


def _decoded(
    model: LiveModel, session: Edited, prompts: Sequence[tuple[int, ...]], tokens: int, alpha: float, beta: float
) -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """[prompt][step] tokens by contrast, greedy tokens of the model as it is, and where contrast overruled."""
    ids, mask = padded_prompts(model, prompts)
    n, ends = len(prompts), torch.tensor(end_ids(model), dtype=torch.int64, device=ids.device)
    session.assign([0] * n + [1] * n + [0] * n)
    feed, mask, cache = ids.repeat(3, 1), mask.repeat(3, 1), None
    taken, plain, overruled = [], [], []
    ended = torch.zeros(2 * n, dtype=torch.bool, device=ids.device)
    for _ in range(tokens):
        last, cache = _step(model, feed, mask, cache)
        strong, weak, own = (last[start : start + n].float() for start in (0, n, 2 * n))
        best = contrast_scores(strong, weak, alpha=alpha, beta=beta).argmax(-1)
        greedy = own.argmax(-1)
        taken.append(best)
        plain.append(greedy)
        overruled.append(best != strong.argmax(-1))
        ended = ended | (torch.cat([best, greedy])[:, None] == ends).any(-1)
        if bool(ended.all()):
            break
        feed = torch.cat([best, best, greedy])[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return tuple(torch.stack(part, 1).tolist() for part in (taken, plain, overruled))  # type: ignore[return-value]  # three


def _step(
    model: LiveModel, feed: Int[torch.Tensor, "row position"], mask: Int[torch.Tensor, "row column"], cache: Any
) -> tuple[Logits, Any]:
    """Logits of the last position, and the cache to go on with."""
    named = named_arguments(model.module)
    given: dict[str, Any] = {"input_ids": feed, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    if "position_ids" in named:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -feed.shape[1] :]
    if "logits_to_keep" in named:
        given["logits_to_keep"] = 1
    output = model.module(**given)
    return logits_in(output)[:, -1], output.past_key_values


def _ended(ids: Sequence[int], model: LiveModel) -> tuple[int, ...]:
    """Up to the first end-of-sequence token, that included."""
    ends = set(end_ids(model))
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])


def _text(model: LiveModel, ids: Sequence[int]) -> str | None:
    return None if model.tokenizer is None else str(model.tokenizer.decode(list(ids)))
