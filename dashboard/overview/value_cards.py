"""The cards at the head of the overview: how much was run, how well the model predicts it, what the model is made of."""

from __future__ import annotations

import math
from typing import Any

from moescope.dashboard import cards, numbers
from moescope.dashboard.records import Router
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run

_NLL = "SELECT count(nll), avg(nll::DOUBLE), count(*) FILTER (isnan(nll)) FROM tokens WHERE run_id = ?"
_TEXTS = "SELECT count(*), sum(n_tokens)::BIGINT FROM sequences WHERE run_id = ?"
_LAYERS = "SELECT count(DISTINCT layer) FROM layers WHERE run_id = ?"


def value_cards(run: Run, info: dict[str, Any], known: list[Router], plain: ViewState) -> list[Any]:
    """Tokens, mean NLL, layers, experts and speed of a run, each with what stands behind it."""
    sequences, in_texts = run.store.fetch(_TEXTS, [run.run_id])[0]
    tokens = in_texts if info["summary"].get("tokens") is None else info["summary"]["tokens"]
    predicted, nll, unknown = run.store.fetch(_NLL, [run.run_id])[0]
    layers = run.store.fetch(_LAYERS, [run.run_id])[0][0]
    seconds = info["summary"].get("seconds")
    speed = info["summary"].get("tokens_per_second")
    measured = not numbers.absent(nll)
    return [
        cards.value_card(
            "Tokens",
            numbers.short_count(tokens),
            f"in {numbers.count(sequences)} sequences",
            href=link("/tokens", plain),
            title=numbers.count(tokens),
        ),
        cards.value_card(
            "Mean NLL",
            f"{nll:.3f} nats" if measured else numbers.MISSING,
            f"perplexity {math.exp(min(nll, 700)):,.1f} · n = {numbers.count(predicted)}"
            if measured
            else f"not a number in {numbers.count(unknown)} {'token' if unknown == 1 else 'tokens'}"
            if unknown
            else "not recorded",
            href=link("/tokens", plain.but(mode="nll")) if measured or unknown else None,
        ),
        cards.value_card(
            "Layers",
            numbers.count(layers),
            f"{len(known)} with a router" if known else "none with a router",
            href=link("/tokens", plain),
        ),
        cards.value_card(
            "Experts",
            _span([router.experts for router in known]),
            f"a layer, {_span([router.top_k for router in known])} chosen a token"
            if known
            else "a dense model has none",
            href=link("/experts", plain) if known else None,
        ),
        cards.value_card(
            "Recording speed",
            numbers.short_count(speed) if speed is not None else numbers.MISSING,
            f"tokens/s · {duration(seconds)}" if seconds is not None else "tokens/s, not recorded",
        ),
    ]


def duration(seconds: float) -> str:
    """Seconds for reading.

    Example:
        >>> duration(3.21), duration(75), duration(7260)
        ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _span(values: list[int]) -> str:
    """One number where all are equal, else from the smallest to the largest."""
    sizes = sorted(set(values))
    return "0" if not sizes else str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
