"""What is measured of attention heads: the name it is stored under, in words, with its unit and its chance level."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moescope.routing.phenomena.attention_records import uniform_alpha


@dataclass(frozen=True)
class HeadMetric:
    """One number of every head.

    Attributes:
        name: as it stands in `heads`.
        words: what it is, for a sentence.
        unit: of its value.
        chance: the metric that holds its chance level, where one is stored.
        even: its value under even attention, where that is one number.
    """

    name: str
    words: str
    unit: str = "share of attention"
    chance: str | None = None
    even: float | None = None


_KNOWN = {
    metric.name: metric
    for metric in (
        HeadMetric("induction", "induction score", chance="other offset"),
        HeadMetric("echo", "echo score", chance="other offset"),
        HeadMetric("previous token", "attention to the token before, on repeated random tokens", chance="other offset, one key"),
        HeadMetric("induction, mean over copies", "induction, mean over copies", chance="other offset, mean over copies"),
        HeadMetric("echo, mean over copies", "echo, mean over copies", chance="other offset, mean over copies"),
        HeadMetric("retrieval score", "retrieval score", "score", "even choice of key"),
        HeadMetric(
            "retrieval score, each place once", "retrieval score, each place once", "score", "even choice of key, each place once"
        ),
        HeadMetric("retrieval activation", "retrieval activation", "share of trials", "even choice of key, activation"),
        HeadMetric(
            "retrieval score, answer given", "retrieval score with the answer given", "score", "even choice of key, answer given"
        ),
        HeadMetric("mass_previous", "attention to the token before"),
        HeadMetric("mass_first", "attention to the first token of the text"),
        HeadMetric("mass_special", "attention to special tokens"),
        HeadMetric("mass_punctuation", "attention to punctuation"),
        HeadMetric("mass_self", "attention of a token to itself"),
        HeadMetric("mass_local", "attention to the 16 tokens before"),
        HeadMetric("mass_other", "attention to tokens further back"),
        HeadMetric("entropy", "entropy of attention", "nats"),
        HeadMetric("distance", "mean distance that a query looks back", "tokens"),
        HeadMetric("mass_sink_logit", "attention to the learned sink logit"),
    )
}  # fmt: skip
_ALPHA = re.compile(r"(sink_alpha|alpha)_(\d+)", re.ASCII)
_FIRST = (
    "sink_alpha_0",
    "induction",
    "retrieval score",
    "retrieval score, answer given",
    "mass_previous",
    "previous token",
)


def head_metric(name: str) -> HeadMetric:
    """What a stored metric is; its own name where it is none that moescope measures.

    Example:
        >>> head_metric("sink_alpha_0").words
        'sink score α₀ (attention to token 0 of the first 64)'
        >>> head_metric("mine").words
        'mine'
    """
    if name in _KNOWN:
        return _KNOWN[name]
    if alpha := _ALPHA.fullmatch(name):
        position = int(alpha[2])
        index = "".join(chr(0x2080 + int(digit)) for digit in alpha[2])
        if alpha[1] == "sink_alpha":
            even = uniform_alpha(position) if position < 64 else None
            return HeadMetric(name, f"sink score α{index} (attention to token {position} of the first 64)", even=even)
        return HeadMetric(name, f"attention to token {position} of a text, over all its queries")
    return HeadMetric(name, name, "value")


def in_order(names: list[str]) -> list[str]:
    """Names of metrics, those that are asked for most first, then by alphabet.

    Example:
        >>> in_order(["entropy", "induction", "sink_alpha_0"])
        ['sink_alpha_0', 'induction', 'entropy']
    """
    place = {name: number for number, name in enumerate(_FIRST)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))
